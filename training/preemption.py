# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Requests to stop or save: signals, time limits, and the agreement of all ranks.

python main_pretrain.py --data_set DIGITS --device cpu --max_minutes 1; echo "exit code $?"
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from parallel.process_group import get_world_size
from parallel.sharding import WAIT_FOR_RANKS
from training import run_lock

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


WARNINGS = {"SIGUSR1", "SIGUSR2"}  # a scheduler's, perhaps besides its SIGTERM


PATIENCE = 1.0  # seconds in which a repeated signal is the same one: launchers pass them on


class Requests:
    """What this process was asked for from outside: signals, and clocks that ran out.

    The first signal is noted; another that ends programs, more than PATIENCE after such a one,
    ends the process at once.
    """

    def __init__(self, save_minutes: float | None, max_minutes: float | None) -> None:
        self.save_minutes, self.max_minutes = save_minutes, max_minutes
        self.began = self.saved = time.monotonic()
        self.retry_at = math.inf  # of a save that failed
        self.reason, self.times, self.before = "", {}, {}

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            kinds = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            self.before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *exception: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _note(self, number: int, frame: Any) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        self.reason = self.reason or name
        # A scheduler's warning and its SIGTERM, half a minute apart, are one wish.
        alike = [other for other in self.times if not WARNINGS & {other, name}]
        if any(now - self.times[other] > PATIENCE for other in alike):
            os._exit(128 + number)
        self.times.setdefault(name, now)

    def read(self) -> tuple[bool, bool]:
        """(save, stop), as far as this process knows."""
        minutes = (time.monotonic() - self.began) / 60
        if not self.reason and self.max_minutes is not None and minutes >= self.max_minutes:
            self.reason = f"--max_minutes {self.max_minutes:g}"
        since = (time.monotonic() - self.saved) / 60
        due = self.save_minutes is not None and since >= self.save_minutes
        due |= time.monotonic() >= self.retry_at or run_lock.is_lost()  # which ends the run
        return due, bool(self.reason)


class Agreement:
    """Flags of all ranks, each true if it is so on any; the answer comes one update later.

    Later, so that nobody waits: the exchange runs beside the update, on the CPU.
    """

    def __init__(self) -> None:
        alone = get_world_size() == 1
        self.group = None if alone else dist.new_group(backend="gloo", timeout=WAIT_FOR_RANKS)
        self.pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """What all ranks said at the last call; alone, what this one says now."""
        if self.group is None:
            return flags
        answer = self.wait() or (False,) * len(flags)
        said = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(said, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = work, said
        return answer

    def wait(self) -> tuple[bool, ...] | None:
        """What all ranks said at the last call, now; None before the first."""
        if self.pending is None:
            return None
        work, said = self.pending
        work.wait()
        self.pending = None
        return tuple(bool(flag) for flag in said.tolist())
