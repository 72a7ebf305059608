# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A DataLoader that reports the sample on which a worker process died or hung.

python -c "from data_loading.workers import WatchedLoader; print(WatchedLoader.__doc__)"
"""

import atexit
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
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
from data_loading.stages import ByEpoch
from data_loading.tuning import Plan, Tuner
from errors import TrainingStopped, first_line, plural
from parallel.environment import WARNINGS
from parallel.process_group import get_logger

IDLE = -1  # in place of the index of a sample
NOT_SENT = 74  # exit code of a worker that cannot send a batch
HAS_TIMER = hasattr(signal, "setitimer")  # not on Windows, where the run notices a hang itself
POLL = 2.0  # seconds between checks of the workers while the run waits for a batch
TIMED_OUT = "DataLoader timed out"  # torch's words when no batch came for POLL seconds
LARGEST_KEPT = 31 * 2**20  # bytes; glibc's limit is 32 MiB
EXIT_S = 1.0  # a worker's connection may break this long before its exit code is known
LIMITS = "/dev/shm may be full (df -h /dev/shm), or too many files open (ulimit -n)"
TOO_MANY = os.strerror(errno.EMFILE)  # also in torch's RuntimeError, which has no number
REMEDY = (
    "If memory ran out, lower --num_workers; after a bus error enlarge /dev/shm. Otherwise check "
    "that sample, and debug the data set with --num_workers 0"
)


class WatchedLoader:
    """A DataLoader with persistent workers that reports the sample on which one died or hung.

    The sampler's keys are (epoch, index). timeout: seconds that a worker may take for one sample,
    and that a batch may be missing while all workers are idle; 0: no limit. A worker that dies or
    exceeds the limit ends the iteration with TrainingStopped. options: of DataLoader.

    tuner: if set, it decides how many processes load the next batches; num_workers, of at least 1,
    is then their number at first.
    on_wait: if set, it is called with False every POLL seconds without a batch, and with True when
    one arrives after that. It may raise.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[tuple[int, int]],
        batch_size: int | ByEpoch,
        num_workers: int = 0,
        timeout: float = 0,
        collate_fn: Callable[[list], Any] = collate,
        **options: Any,
    ) -> None:
        self.dataset, self.sampler = dataset, sampler
        several = isinstance(batch_size, ByEpoch)
        self.batch_sizes = batch_size if several else ByEpoch({0: batch_size})
        self.batch_size = self.batch_sizes.at(0)
        self.timeout, self.collate_fn = timeout, collate_fn
        self.processes: list[Any] = []
        self.at_exit: Finalize | None = None
        self.waited = 0.0  # seconds since the last batch
        self.on_wait: Callable[[bool], None] | None = None
        self.interrupted = False  # True within an epoch, and after one that was broken off
        self.tuner: Tuner | None = None
        # DataLoader draws seeds of its workers, here not from the generator that the training uses.
        self.options = options | {"sampler": sampler, "generator": torch.Generator()}
        keep_freed_memory()  # in this process too, which reads without workers
        self._make(Plan(num_workers))

    @property
    def num_workers(self) -> int:
        """Processes that load data, 0 for this one."""
        return self.plan.workers

    def _make(self, plan: Plan) -> None:
        """Make a DataLoader, without starting its workers."""
        self.plan, count = plan, plan.workers
        # (workers, 3): process id, index of the sample that the worker reads or IDLE, since when.
        self.reading = torch.full((count, 3), IDLE).share_memory_()
        self.worked = torch.zeros(count, dtype=torch.float64).share_memory_()  # seconds of each
        dataset, collate_fn, options = self.dataset, self.collate_fn, dict(self.options)
        if count:
            read = _Timed(dataset.__getitem__, self.worked)
            dataset = _WatchedDataset(read, self.reading, self.timeout)
            collate_fn = _Timed(collate_fn, self.worked)
            options |= {"persistent_workers": True, "worker_init_fn": _start_worker}
            options |= {"timeout": POLL, "prefetch_factor": plan.ahead}
        options |= {"batch_size": self.batch_size, "num_workers": count, "collate_fn": collate_fn}
        self.loader = DataLoader(dataset, **options)

    def set_epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> None:
        """Call `set_epoch` of the sampler, and make batches of the size of this epoch."""
        self.sampler.set_epoch(epoch, start, stop)
        self.batch_size = self.batch_sizes.at(epoch)
        self.loader.batch_sampler.batch_size = self.batch_size  # it reads this for each epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            yield from self.loader
            return
        if self.interrupted:  # its workers may still read, and DataLoader would wait for them
            self._replace_workers(self.plan)
        self.interrupted, self.waited = True, 0.0
        if self.tuner is not None:
            self.sampler.skipped = 0  # of an earlier change of the plan
        batches, self.taken, asked = self._start(), 0, time.perf_counter()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception as error:
                self._check(error)
                if self.on_wait is not None:
                    self.on_wait(False)
                continue
            if self.waited and self.on_wait is not None:
                self.on_wait(True)
            self.waited = 0.0
            plan = self._next_plan(batch, time.perf_counter() - asked)
            if plan != self.plan:
                batches = self._change(plan)  # before the step, so that it reads meanwhile
            yield batch
            asked = time.perf_counter()
        self.interrupted = False

    def _next_plan(self, batch: Any, waited: float) -> Plan:
        """Return the plan for the samples after `batch`, which arrived after `waited` seconds."""
        if self.tuner is None:
            return self.plan
        self.taken += 1
        if self.taken == 1:
            self.tuner.begin(self.worked_before)  # with the work for the first batches of an epoch
            return self.plan
        size = batch[0].nbytes if isinstance(batch, tuple) else 0
        return self.tuner.after_batch(self.plan, waited, self.worked.sum().item(), size)

    def _change(self, plan: Plan) -> Iterator[Any]:
        """Load the samples that are left by another plan, or if that fails, by the old one."""
        self.sampler.skip(self.taken * self.batch_size)
        self.taken, before = 0, self.plan
        self._replace_workers(plan)
        try:
            return self._start()
        except Exception as error:  # such as a limit of processes or open files
            reason = f"{plural(plan.workers, 'process')} cannot be started: {first_line(error)}"
            get_logger().warning("loader: %s; it stays at %d", reason, before.workers)
            self.tuner = None
            self._replace_workers(before)
            return self._start()

    def shared_memory(self, size: int) -> int:
        """Return the bytes of /dev/shm that batches of samples of `size` bytes take at most."""
        return self.plan.held * self.batch_size * size if self.num_workers else 0

    def _replace_workers(self, plan: Plan) -> None:
        batches = self.loader._iterator  # None before the first epoch
        if thread := getattr(batches, "_pin_memory_thread", None):
            # It receives batches, and must end first: one of a killed worker would break it.
            batches._pin_memory_thread_done_event.set()
            batches._worker_result_queue.put((None, None))  # wakes it
            thread.join(POLL)
        _kill(self.processes)
        self.processes.clear()
        self._make(plan)

    def _start(self) -> Iterator[Any]:
        """Begin to load batches, again if the workers did not answer within POLL seconds."""
        try:
            return self._open()
        except Exception as error:
            self._check(error)
            self._replace_workers(self.plan)
            return self._open()

    def _open(self) -> Iterator[Any]:
        others = set(multiprocessing.active_children())
        self.worked_before = self.worked.sum().item()
        try:
            return iter(self.loader)
        finally:  # even if only some have started
            if started := set(multiprocessing.active_children()) - others:  # in the first epoch
                self._take_over(list(started))

    def _take_over(self, processes: list[Any]) -> None:
        """Kill the workers with the loader or the program; do not report deaths during a step."""
        if self.at_exit is None:  # one for all: it keeps the processes, and their files
            # At exit this runs before torch and multiprocessing send SIGTERM, which workers ignore.
            self.at_exit = Finalize(self, _kill, [self.processes], exitpriority=100)
            atexit.register(self.at_exit)
        self.processes[:] = processes
        with suppress(ValueError):  # outside the main thread
            # torch's SIGCHLD handler can raise at any line, even in backward. While it waits for a
            # batch, DataLoader checks its workers every POLL seconds.
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _check(self, error: Exception) -> None:
        """Raise TrainingStopped if a worker died or hangs; `error` unless it is a time-out."""
        still_waiting = TIMED_OUT in str(error)
        processes = {process.sentinel: process for process in self.processes}
        if exited := connection.wait(processes, 0 if still_waiting else EXIT_S):
            raise TrainingStopped(self._describe(processes[exited[0]])) from error
        if TOO_MANY in str(error):
            _kill(self.processes)
            raise TrainingStopped(
                "too many open files to receive batches from "
                f"{plural(self.num_workers, 'loader process')}; raise the limit (ulimit -n 65536), "
                "or lower --num_workers"
            ) from error
        if not still_waiting:
            raise error
        # A process that waits for a disk ignores every signal, SIGALRM too.
        now, self.waited = time.monotonic(), self.waited + POLL
        rows = self.reading.tolist()
        for pid, index, since in rows:
            if index != IDLE and 0 < self.timeout < now - since - POLL:
                _kill(self.processes)
                raise TrainingStopped(self._describe_hang(pid, index)) from error
        idle = all(index == IDLE and since < now - self.timeout for _, index, since in rows)
        if idle and 0 < self.timeout < self.waited - 5 * POLL:  # a thread of DataLoader died
            raise TrainingStopped(f"no batch arrived within {self.waited:g} s: {LIMITS}") from error

    def _describe(self, process: Any) -> str:
        process.join(EXIT_S)
        code = process.exitcode
        if code == NOT_SENT:
            return f"a loader process could not send a batch, for the reason above: {LIMITS}"
        index = next((i for pid, i, _ in self.reading.tolist() if pid == process.pid), IDLE)
        if HAS_TIMER and code == -signal.SIGALRM and index != IDLE:
            return self._describe_hang(process.pid, index)
        how = f"exited with code {code}"
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        what = "idle" if index == IDLE else f"reading {self._name_of(index)}"
        return f"a loader process (pid {process.pid}) {how} while it was {what}. {REMEDY}"

    def _describe_hang(self, pid: int, index: int) -> str:
        return (
            f"a loader process (pid {pid}) hangs: reading {self._name_of(index)} took longer than "
            f"--data_timeout {self.timeout:g} s. Check that the file can be read (the file system "
            "may stall), or raise --data_timeout"
        )

    def _name_of(self, index: int) -> str:
        return getattr(self.dataset, "name_of", "sample {}".format)(index)


class _Timed:
    """A function whose seconds are added to `worked` of this worker."""

    def __init__(self, function: Callable, worked: Tensor) -> None:
        self.function, self.worked = function, worked

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args)
        finally:
            self.worked.numpy()[get_worker_info().id] += time.perf_counter() - start


class _WatchedDataset:
    """Record the sample being read in `reading`; kill the worker after `timeout` seconds."""

    def __init__(self, read: Callable, reading: Tensor, timeout: float) -> None:
        self.read, self.reading, self.timeout = read, reading, timeout

    def __getitem__(self, key: tuple[int, int]) -> Any:
        self._note(key[1], self.timeout)
        try:
            return self.read(key)
        finally:
            self._note(IDLE, 0)

    def _note(self, index: int, seconds: float) -> None:
        row = os.getpid(), index, int(time.monotonic())
        self.reading.numpy()[get_worker_info().id] = row
        if HAS_TIMER:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, even if Python hangs in C


def keep_freed_memory() -> None:
    """Let glibc keep the memory of a decoded image for the next one.

    By default it is returned to the system, which takes 0.1 ms for an image of 500 x 375 pixels.
    glibc keeps blocks up to the size of the largest one that was ever freed.
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)


def _start_worker(worker: int) -> None:
    keep_freed_memory()
    # A scheduler signals all processes of a job, but the run still needs batches to finish its
    # step. Workers leave with the run.
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    for number in (*WARNINGS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if HAS_TIMER:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    Queue._on_queue_feeder_error = staticmethod(_exit_without_sending)


def _end_with(run: int) -> None:
    """End this worker soon after the run; torch checks that only between two batches."""
    while os.getppid() == run:
        time.sleep(POLL)
    os._exit(0)


def _exit_without_sending(error: Exception, batch: Any) -> None:
    """End the worker, since multiprocessing drops the batch, and the run would wait forever."""
    if not isinstance(error, ConnectionError):  # the run has ended
        print(f"a loader process cannot send a batch: {error!r}", file=sys.stderr, flush=True)
    os._exit(NOT_SENT)


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
