# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Processes of one run that end together: what ends one of them is told to the others.

torchrun --nproc_per_node=2 main_pretrain.py --data_set DIGITS --device cpu --batch_size 9999
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

# Keys in the store: "<exit code> rank <number> has failed: <why>", how many ranks have printed that
# or are done, and how many of those look into the store no more.
FAILED, TOLD, DONE = "failed", "told", "done"
LOOK = 1.0  # seconds between two looks at it
GRACE = 3.0  # seconds in which a rank may end by itself, after another did: all may fail alike
LOST = 30.0  # seconds to wait for ranks that may be gone, or only done, or hang
CLEANUP = 10.0  # seconds for what gives the folder free and ends loader processes

_watches: list[Watch] = []  # this process's, if there are others


def watch(store: Any, name: str, rank: int, size: int) -> None:
    """From now on what ends one rank ends all; `store`: by which they met, under that name.

    Collectives wait for each other, those of nccl until their time is up. mpirun ends all ranks
    for one, srun if it is asked to, torchrun those of its own machine.
    """
    part()
    _watches.append(Watch(_own_client(store, name), rank, size))


def mark() -> str:
    """` [rank 3]` for messages; '' for a process alone."""
    return "".join(f" [rank {each.rank}]" for each in _watches)


def fail(code: int, message: str, error: BaseException) -> None:
    """Say `message`, or else the traceback, and end all ranks; returns only if this is alone."""
    for each in list(_watches):
        each.fail(code, message, error)


def part() -> None:
    """This rank is done, well: whatever becomes of the others ends it no more."""
    for each in _watches:
        each.part()
    _watches.clear()


class Watch:
    """A thread that looks in the store whether another rank has failed, and then ends this one."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.over, self.ending = threading.Event(), threading.Lock()
        threading.Thread(target=self._look, daemon=True).start()

    def fail(self, code: int, message: str, error: BaseException) -> NoReturn:
        """Print this rank's error, or another's that was only felt, tell the others and leave.

        An error of a user that several ranks meet is printed by the first one and by rank 0, whose
        output people read.
        """
        self.over.set()
        self.ending.acquire()  # never released: the watching thread may be about to end this too
        kind = "" if message else f"{type(error).__name__}: "
        why = " ".join(f"{kind}{error}".split())[:1000]
        first = own = f"{code} rank {self.rank} has failed: {why}"
        with contextlib.suppress(RuntimeError):  # of a store that is gone
            first = self.store.compare_set(FAILED, "", own).decode()
        same = bool(message) and first.endswith(f" has failed: {why}")
        told = code if first == own or same else self._tell(first)
        if first == own or (message and (self.rank == 0 or not same)):
            print(message or self._traceback(error), file=sys.stderr, flush=True)
        self._leave(code if message else told)

    def _leave(self, code: int) -> NoReturn:
        """End when all ranks have printed the error: launchers kill the others at the first end."""
        if self._count(TOLD, wait=True):
            self._count(DONE, wait=self.rank == 0)
        _end(code)

    def part(self) -> None:
        """Leave the watch; rank 0, which may keep the store, after all others have."""
        self.over.set()
        self.ending.acquire()
        self._count(TOLD, wait=False)
        self._count(DONE, wait=self.rank == 0)

    def _count(self, key: str, wait: bool) -> bool:
        """Add this rank to those of `key`, wait for all ranks there; False if some do not come."""
        until = time.monotonic() + LOST
        with contextlib.suppress(RuntimeError):
            count = self.store.add(key, 1)
            while wait and count < self.size:
                if time.monotonic() > until:
                    return False
                time.sleep(0.05 if self.rank == 0 else LOOK / 4)
                count = self.store.add(key, 0)
            return True
        return False

    def _look(self) -> None:
        while not self.over.wait(LOOK):
            try:
                if not self.store.check([FAILED]):
                    continue
                first, grace = self.store.get(FAILED).decode(), GRACE
            except RuntimeError:  # the rank that keeps it is gone
                first, grace = "1 rank 0 is gone: killed, out of memory, or its machine lost", LOST
            if not self.over.wait(grace) and self.ending.acquire(blocking=False):
                self._leave(self._tell(first))

    def _tell(self, first: str) -> int:
        code, _, why = first.partition(" ")
        line = f"{Path(sys.argv[0]).name}: error [rank {self.rank}]: {why}"
        with contextlib.suppress(OSError):  # nobody may listen
            print(line, file=sys.stderr, flush=True)
        return int(code)

    def _traceback(self, error: BaseException) -> str:
        lines = "".join(traceback.format_exception(error)).splitlines()
        return "\n".join(f"[rank {self.rank}] {line}" for line in lines)


def _own_client(store: Any, name: str) -> Any:
    """A connection for the thread alone: on the other one it would wait while that waits."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        store = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"watch of {name}", store)


def _end(code: int) -> NoReturn:
    """End now, with loaders and the folder in order, but without what may wait for other ranks."""
    limit = threading.Timer(CLEANUP, os._exit, [code])
    limit.daemon = True
    limit.start()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
