# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A DataLoader that names the sample on which a worker process died or hung.

python -c "from data_loading.workers import WatchedLoader; print(WatchedLoader.__doc__)"
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data_loading.dataset import collate
from errors import TrainingStopped

IDLE = -1  # in place of the index of a sample
NOT_SENT = 74  # exit code of a worker that cannot send a batch
EXIT_S = 1.0  # a worker's connection may break this long before its exit code is known
REMEDY = (
    "If memory ran out, lower --num_workers; after a bus error enlarge /dev/shm. Otherwise check "
    "that sample, and debug the data set with --num_workers 0"
)


class WatchedLoader:
    """A DataLoader with keys (epoch, index) and persistent workers, which it watches.

    timeout: seconds that a worker may take for one sample; 0: no limit. A worker
    that dies or exceeds the limit ends the iteration with TrainingStopped, which names the sample.
    options: of DataLoader.
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
        # (workers, 2): process id, and index of the sample that the worker reads or IDLE.
        self.reading = torch.full((num_workers, 2), IDLE).share_memory_()
        self.processes: list[Any] = []
        options |= {"sampler": sampler, "num_workers": num_workers, "collate_fn": collate_fn}
        if num_workers:
            dataset = _WatchedDataset(dataset, self.reading, timeout)
            options |= {"persistent_workers": True, "worker_init_fn": _start_worker}
        self.loader = DataLoader(dataset, batch_size, **options)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        others = set(multiprocessing.active_children())
        try:
            batches = iter(self.loader)
            if started := set(multiprocessing.active_children()) - others:  # in the first epoch
                self._take_over(list(started))
            yield from batches
        except Exception as error:
            processes = {process.sentinel: process for process in self.processes}
            exited = connection.wait(processes, EXIT_S if processes else 0)
            if not exited:
                raise
            raise TrainingStopped(self._describe(processes[exited[0]])) from error

    def _take_over(self, processes: list[Any]) -> None:
        """Kill the workers with the loader or the program; do not report deaths during a step."""
        self.processes = processes
        # At exit this runs before torch and multiprocessing send SIGTERM, which workers ignore.
        atexit.register(Finalize(self, _kill, [processes], exitpriority=100))
        with suppress(ValueError):  # outside the main thread
            # torch's handler would raise anywhere, even in a backward pass. While it waits for a
            # batch, DataLoader checks its workers every 5 s.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _describe(self, process: Any) -> str:
        process.join(EXIT_S)
        code = process.exitcode
        if code == NOT_SENT:
            return (
                "a loader process could not send a batch, for the reason above: /dev/shm may be "
                "full (df -h /dev/shm), or too many files open (ulimit -n)"
            )
        name_of = getattr(self.dataset, "name_of", "sample {}".format)
        held = {pid: name_of(index) for pid, index in self.reading.tolist() if index != IDLE}
        name = held.get(process.pid, "no sample")
        if -code == signal.SIGALRM:
            return (
                f"a loader process (pid {process.pid}) hangs: reading {name} took longer than "
                f"--data_timeout {self.timeout:g} s. Check that the file can be read (the file "
                "system may stall), or raise --data_timeout"
            )
        how = f"exited with code {code}"
        if code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"a loader process (pid {process.pid}) {how} while it was reading {name}. {REMEDY}"


class _WatchedDataset:
    """`dataset`, whose reader notes the sample in `reading` and dies if it exceeds `timeout`."""

    def __init__(self, dataset: Any, reading: Tensor, timeout: float) -> None:
        self.dataset, self.reading, self.timeout = dataset, reading, timeout

    def __getitem__(self, key: tuple[int, int]) -> Any:
        self._note(key[1], self.timeout)
        try:
            return self.dataset[key]
        finally:
            self._note(IDLE, 0)

    def _note(self, index: int, seconds: float) -> None:
        self.reading[get_worker_info().id] = torch.tensor((os.getpid(), index))
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, even if Python code hangs in C


def _start_worker(worker: int) -> None:
    # A scheduler signals all processes of a job, but the run still needs batches to finish its
    # step. Workers leave with the run: torch's watchdog ends them when it is gone.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    Queue._on_queue_feeder_error = staticmethod(_exit_without_sending)


def _exit_without_sending(error: Exception, batch: Any) -> None:
    """End the worker, since multiprocessing drops the batch, and the run would wait forever."""
    print(f"a loader process cannot send a batch: {error!r}", file=sys.stderr, flush=True)
    os._exit(NOT_SENT)


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
