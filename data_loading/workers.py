# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What goes wrong between disk and batch, by name: images without use, processes that die or hang.

python -c "from data_loading import workers; print(workers.BadImages.__doc__)"
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from errors import TrainingStopped

LOOKS, LOOK = 4, 5.0  # at the processes within --data_timeout; at most these seconds apart
IDLE = -1  # in place of a sample
DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]*)")
REMEDY = (
    "if memory ran out, give fewer --num_workers, or more /dev/shm after a bus error; if not, "
    "look at that sample, and at the data set's code with --num_workers 0"
)


# --- processes ------------------------------------------------------------------------------------


class Watched(Dataset):
    """`dataset`, whose worker notes in a row of `table` what it holds.

    table: (workers, 3) float64 in shared memory: process, index of a sample or IDLE, since when.
    """

    def __init__(self, dataset: Any, table: Tensor) -> None:
        self.dataset, self.table = dataset, table

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        row = self.table[get_worker_info().id]
        row[1:] = torch.tensor([key[1], time.monotonic()], dtype=torch.float64)
        try:
            return self.dataset[key]
        finally:
            row[1] = IDLE


class Watch:
    """Turns torch's "worker died" and "timed out" into TrainingStopped with the sample's name.

    seconds: that a process may take for one sample; 0: any time.
    """

    def __init__(self, workers: int, seconds: float, name_of: Callable[[int], str]) -> None:
        self.table = torch.tensor([[0.0, IDLE, 0.0]] * workers, dtype=torch.float64)
        self.table.share_memory_()
        self.seconds, self.name_of = seconds, name_of
        self.idle_since = math.inf

    def over(self, batches: Any) -> Iterator[Any]:
        """What `batches`, torch's iterator, gives."""
        # Looks are for hanging processes, and for dead ones: a SIGCHLD that comes just before the
        # wait begins does not end it. Between epochs a process may take its time to answer.
        batches._timeout = min(LOOK, self.seconds / LOOKS)
        try:
            yield from self._each(batches)
        finally:
            batches._timeout = self.seconds

    def _each(self, batches: Any) -> Iterator[Any]:
        end = object()
        while True:
            self.idle_since = math.inf
            try:
                batch = next(batches, end)
            except RuntimeError as error:
                self.explain(error)
                if not self._waits_on(error):
                    raise
                continue
            except (OSError, EOFError):  # perhaps of a batch that a dead process still held
                self._look_for_dead()
                raise
            if batch is end:
                return
            yield batch

    def explain(self, error: RuntimeError) -> None:
        """Raise TrainingStopped if `error` says that a process of this loader died."""
        if isinstance(error.__cause__, TrainingStopped):  # by `_OnDeath`, which knew the signal
            raise error.__cause__
        found = DIED.search(str(error))
        dead = {int(number) for number in re.findall(r"\d+", found[1])} if found else set()
        rows = [row for row in self.table.tolist() if row[0] in dead]
        if rows:
            held = [self.name_of(int(index)) for _, index, _ in rows if index != IDLE]
            raise TrainingStopped(
                f"a loader process (pid {found[1]}) {_how_it_ended(dead) or found[2]}; it held "
                f"{' and '.join(held) or 'no sample'}: {REMEDY}"
            ) from error

    def _look_for_dead(self) -> None:
        mine, until = {int(row[0]) for row in self.table.tolist()} - {0}, time.monotonic() + 1
        while mine and time.monotonic() < until:  # the system may not know yet
            dead = mine - {child.pid for child in multiprocessing.active_children()}
            if dead:
                who = ", ".join(map(str, sorted(dead)))
                self.explain(RuntimeError(f"DataLoader worker (pid {who}) died"))
            time.sleep(0.02)

    def _waits_on(self, error: RuntimeError) -> bool:
        """Whether to wait on after `error`: it is a time-out, and the processes make progress."""
        if "DataLoader timed out" not in str(error):
            return False
        rows, now = self.table.tolist(), time.monotonic()
        busy = [row for row in rows if row[1] != IDLE]
        late = [row for row in busy if now - row[2] >= self.seconds]
        self.idle_since = math.inf if busy else min(self.idle_since, now)
        if not late and now - self.idle_since < self.seconds:
            return True
        _end([int(pid) for pid, _, _ in late])
        held = [f"{self.name_of(int(i))} for {now - t:.0f} s (pid {p:.0f})" for p, i, t in late]
        raise TrainingStopped(
            f"a loader process hangs: it has held {' and another '.join(held) or 'no sample'}; "
            f"--data_timeout {self.seconds:g} ended the wait. See whether that can be read at all "
            "(a file system that stalls?), or allow more seconds"
        ) from error


STARTED: weakref.WeakSet[Any] = weakref.WeakSet()  # of what multiprocessing itself still holds


def _how_it_ended(pids: set[int]) -> str:
    """Which torch tells only if the system told it of that death, not if it found it itself."""
    for code in [process.exitcode for process in STARTED if process.pid in pids]:
        if code is not None:
            killed = f"was ended by signal {-code} ({signal.strsignal(-code)})"
            return killed if code < 0 else f"exited with code {code}"
    return ""


def _end_all() -> None:
    """At the end of the program, where multiprocessing would wait for a loader still in use."""
    _end([child.pid for child in multiprocessing.active_children() if child in STARTED])


def _end(pids: list[int]) -> None:
    """Kill what would not leave with the run, since workers ignore what ends other processes."""
    if pids and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for them
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


class _OnDeath:
    """A handler of SIGCHLD around torch's, which raises wherever the main thread is just then."""

    def __init__(self, before: Callable) -> None:
        self.before: Callable = before
        self.watches: weakref.WeakSet[Watch] = weakref.WeakSet()

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.before(number, frame)
        except RuntimeError as error:
            for watch in self.watches:
                watch.explain(error)
            raise


def _listen(watch: Watch) -> None:
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        return  # torch has not set one; then it looks at the processes when a batch is late
    if not isinstance(handler, _OnDeath):
        handler = _OnDeath(handler)
        signal.signal(signal.SIGCHLD, handler)
    handler.watches.add(watch)


class WatchedLoader(DataLoader):
    """A DataLoader that says over which sample one of its processes died or hangs.

    start: called in each process with its number.
    """

    def __init__(
        self,
        dataset: Any,
        num_workers: int,
        seconds: float,
        start: Callable[[int], None],
        **options: Any,
    ) -> None:
        self.watch, self.samples = None, dataset
        if num_workers:
            name_of = getattr(dataset, "name_of", "sample {}".format)
            self.watch = Watch(num_workers, seconds, name_of)
            dataset = Watched(dataset, self.watch.table)
            options["worker_init_fn"] = _Start(start, self.watch.table)
            options["timeout"] = seconds
        super().__init__(dataset, num_workers=num_workers, **options)

    def __iter__(self) -> Iterator[Any]:
        if self.watch is None:
            return super().__iter__()
        others = multiprocessing.active_children()
        try:
            batches = super().__iter__()
            _listen(self.watch)
        except RuntimeError as error:  # in the first moments, or at the next epoch
            self.watch.explain(error)
            raise
        finally:
            STARTED.update(set(multiprocessing.active_children()).difference(others))
            atexit.unregister(_end_all)  # the last that is registered is the first that is called,
            atexit.register(_end_all)  # before torch gives each process 5 seconds
        return self.watch.over(batches)


class _Start:
    """What a process does first; a class, since spawned ones get it pickled."""

    def __init__(self, start: Callable[[int], None], table: Tensor) -> None:
        self.start, self.table = start, table

    def __call__(self, worker: int) -> None:
        self.table[worker, 0] = os.getpid()
        sys.excepthook = _tell  # torch tells the run itself what a sample raises
        self.start(worker)


def _tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What a thread of multiprocessing met; not that the run ended while it fetched a batch."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


# --- images ---------------------------------------------------------------------------------------
