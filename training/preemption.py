# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Signals and time limits that make a run save or stop, and a vote that tells all ranks.

python main_pretrain.py --data_set DIGITS --device cpu --max_minutes 1; echo "exit code $?"
"""

import math
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from parallel.environment import WARNINGS
from parallel.process_group import WAIT_FOR_RANKS, get_world_size
from training import run_lock

SIGNALS = (*WARNINGS, signal.SIGINT)
SAME_SIGNAL = 1.0  # seconds within which a launcher may forward a signal that was received already


class StopSignals:
    """Signals that this process received, and time limits that it reached.

    The first signal asks for a save and a stop. A second SIGTERM or SIGINT, more than SAME_SIGNAL
    later, ends the process at once. SIGUSR1 and SIGUSR2 are a scheduler's warnings, which it may
    send before a SIGTERM.
    """

    def __init__(self, save_minutes: float | None, max_minutes: float | None) -> None:
        self.save_minutes, self.max_minutes = save_minutes, max_minutes
        self.started = self.last_save = time.monotonic()
        self.retry_at = math.inf  # when to repeat a save that failed
        self.reason = ""  # why to stop, '' to continue
        self.terminated = math.inf  # time of the first SIGTERM or SIGINT
        self.old_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self.old_handlers = {kind: signal.signal(kind, self._handle) for kind in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for kind, handler in self.old_handlers.items():
            signal.signal(kind, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number in (signal.SIGTERM, signal.SIGINT):
            now = time.monotonic()
            if now - self.terminated > SAME_SIGNAL:
                os._exit(128 + number)
            self.terminated = min(self.terminated, now)

    def read(self) -> tuple[bool, bool]:
        """Return (save, stop), as far as this process knows."""
        now = time.monotonic()
        if self.max_minutes is not None and now - self.started >= 60 * self.max_minutes:
            self.reason = self.reason or f"--max_minutes {self.max_minutes:g}"
        save = self.save_minutes is not None and now - self.last_save >= 60 * self.save_minutes
        save = save or now >= self.retry_at or run_lock.is_lost()  # a save reports the lost lock
        return save, bool(self.reason)


class RankVote:
    """Logical OR of flags over all ranks, one call late so that no rank waits for another.

    The exchange runs on the CPU, alongside the next optimizer step.
    """

    def __init__(self) -> None:
        alone = get_world_size() == 1
        self.group = None if alone else dist.new_group(backend="gloo", timeout=WAIT_FOR_RANKS)
        self.pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Return the result of the last call, and start to vote on `flags`.

        A single process gets its own flags back.
        """
        if self.group is None:
            return flags
        result = self.wait() or (False,) * len(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = work, votes
        return result

    def exchange_now(self, *flags: bool) -> tuple[bool, ...]:
        """Return the result for `flags`; waits for all ranks."""
        self.exchange(*flags)
        return self.wait() or flags

    def wait(self) -> tuple[bool, ...] | None:
        """Wait for the result of the last call; None if there is none."""
        if self.pending is None:
            return None
        work, votes = self.pending
        work.wait()
        self.pending = None
        return tuple(bool(vote) for vote in votes.tolist())
