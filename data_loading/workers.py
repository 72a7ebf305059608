# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A DataLoader that names the sample over which one of its processes died or hangs.

python -c "from data_loading.workers import WatchedLoader; print(WatchedLoader.__doc__)"
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data_loading.dataset import collate
from errors import TrainingStopped

CHECK = 1.0  # seconds between checks of the processes while the run waits for a batch
GRACE = 1.0  # seconds in which the system reports a death that has already broken a connection
IDLE = -1  # in place of the index of a sample
_started: weakref.WeakSet[Any] = weakref.WeakSet()  # processes of all loaders of this program
TIMED_OUT = "DataLoader timed out"  # torch's words when no batch came for `timeout` seconds
IGNORED = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
REMEDY = (
    "If memory ran out, lower --num_workers; after a bus error enlarge /dev/shm. Otherwise check "
    "that sample, and debug the data set with --num_workers 0"
)


class WatchedLoader:
    """A DataLoader with keys (epoch, index) that watches its processes, which stay for all epochs.

    timeout: seconds that a process may take for one sample; 0: no limit. A process that dies or
    exceeds the limit ends the iteration with TrainingStopped, which names the sample. options: of
    DataLoader.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[tuple[int, int]],
        batch_size: int,
        num_workers: int = 0,
        timeout: float = 0,
        collate_fn: Callable[[list], Any] = collate,
        **options: Any,
    ) -> None:
        self.dataset, self.sampler, self.batch_size = dataset, sampler, batch_size
        self.num_workers, self.timeout, self.collate_fn = num_workers, timeout, collate_fn
        self.name_of = getattr(dataset, "name_of", "sample {}".format)
        # A row per process: pid, index of the sample that it reads or IDLE, since when.
        self.table = torch.tensor([[0.0, IDLE, 0.0]] * num_workers, dtype=torch.float64)
        self.table.share_memory_()
        self.processes: list[Any] = []
        options |= {"sampler": sampler, "batch_size": batch_size, "collate_fn": collate_fn}
        if num_workers:
            dataset = _NotedDataset(dataset, self.table)
            options |= {"num_workers": num_workers, "persistent_workers": True}
            options["worker_init_fn"] = partial(_start_worker, self.table)
            options["timeout"] = min(CHECK, timeout / 4) if timeout else CHECK
        self._arguments = dataset, options
        self.loader = DataLoader(dataset, **options)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            return iter(self.loader)
        try:
            batches = self._start()
        except RuntimeError as error:
            self._raise_unless_timed_out(error)
            # The processes still read batches of an epoch that was broken off: replace them.
            for process in self.processes:
                process.kill()
            dataset, options = self._arguments
            self.loader = DataLoader(dataset, **options)
            batches = self._start()
        return self._each(batches)

    def _start(self) -> Iterator[Any]:
        others = set(multiprocessing.active_children())
        try:
            return iter(self.loader)
        finally:
            started = set(multiprocessing.active_children()) - others
            self.processes = list(started) or self.processes  # persistent ones started before
            _started.update(started)
            if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
                # torch's handler would raise anywhere, in a backward pass too. We check instead.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            atexit.unregister(_kill_workers)  # functions run in reverse order of registration:
            atexit.register(_kill_workers)  # before those of torch and multiprocessing, which wait

    def _each(self, batches: Iterator[Any]) -> Iterator[Any]:
        waiting_since = time.monotonic()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                self._raise_unless_timed_out(error)
                self._check_progress(waiting_since)
            else:
                yield batch
                waiting_since = time.monotonic()

    def _raise_unless_timed_out(self, error: Exception) -> None:
        """Raise TrainingStopped if a process died, else `error`; return after a mere time-out."""
        timed_out = TIMED_OUT in str(error)
        until = time.monotonic() + (0 if timed_out else GRACE)
        while not (dead := [p for p in self.processes if p.exitcode is not None]):
            if time.monotonic() >= until:
                if timed_out:
                    return
                raise error
            time.sleep(0.02)
        code, pids = dead[0].exitcode, {process.pid for process in dead}
        how = f"exited with code {code}"
        if code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        held = [
            self.name_of(int(i)) for pid, i, _ in self.table.tolist() if pid in pids and i != IDLE
        ]
        raise TrainingStopped(
            f"a loader process (pid {', '.join(map(str, sorted(pids)))}) {how} while it was "
            f"reading {' and '.join(held) or 'no sample'}. {REMEDY}"
        ) from error

    def _check_progress(self, waiting_since: float) -> None:
        """Raise TrainingStopped if a process hangs, or if all are idle and still no batch comes."""
        rows, now = self.table.tolist(), time.monotonic()
        late = [row for row in rows if row[1] != IDLE and now - row[2] >= self.timeout]
        idle_since = max(waiting_since, *(since for _, _, since in rows))
        idle = all(pid and index == IDLE for pid, index, _ in rows)  # pid 0: not started yet
        if not self.timeout or not (late or (idle and now - idle_since >= self.timeout)):
            return
        for process in self.processes:  # they would not leave with the run
            process.kill()
        if late:
            held = [f"{self.name_of(int(i))} for {now - t:.0f} s (pid {p:.0f})" for p, i, t in late]
            raise TrainingStopped(
                f"a loader process hangs: it has been reading {' and another '.join(held)}, longer "
                f"than --data_timeout {self.timeout:g}. Check that the file can be read (the file "
                "system may stall), or raise --data_timeout"
            )
        raise TrainingStopped(
            f"no batch came for {now - waiting_since:.0f} s although all loader processes are "
            f"idle (--data_timeout {self.timeout:g}): a batch was lost on its way to the run. See "
            "the messages above; /dev/shm may be full, or too many files open (ulimit -n)"
        )


class _NotedDataset:
    """Wrapper of `dataset`: the process that reads a sample notes it in its row of `table`."""

    def __init__(self, dataset: Any, table: Tensor) -> None:
        self.dataset, self.table = dataset, table

    def __getitem__(self, key: tuple[int, int]) -> Any:
        self._note(key[1])
        try:
            return self.dataset[key]
        finally:
            self._note(IDLE)

    def _note(self, index: int) -> None:
        row = self.table[get_worker_info().id]
        row[1:] = torch.tensor([index, time.monotonic()], dtype=torch.float64)


def _start_worker(table: Tensor, worker: int) -> None:
    values = [os.getpid(), IDLE, time.monotonic()]
    table[worker] = torch.tensor(values, dtype=torch.float64)
    sys.excepthook = _report_exception
    # A scheduler signals all processes of a job, but the run still needs batches to finish its
    # step. Processes leave with the run: torch's watchdog ends them when it is gone.
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _report_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print what a thread raised, unless the run just ended while it was sending a batch."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _kill_workers() -> None:
    """Kill loader processes, since multiprocessing sends SIGTERM, which they ignore, and waits."""
    for process in multiprocessing.active_children():
        if process in _started:
            process.kill()
