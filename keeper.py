# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""When a run is saved, and how it stops when it is asked to: one path for every launcher.

python main_pretrain.py --data_set DIGITS --input_size 32 --stem_stride 1 --output_dir runs/keep \
    --model convnextv2_atto --save_ckpt_every_steps 20 --max_minutes 1; echo "exit code $?"
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from errors import Preempted, TrainingStopped
from utils import TrainState, from_main_process, get_logger, get_world_size

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
RETRY = 60.0  # seconds after which a save that failed is tried again
WARNINGS = ("SIGUSR1", "SIGUSR2")  # a scheduler's, perhaps besides its SIGTERM
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
        self.reason, self.at, self.before = "", math.inf, {}

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
        if name in WARNINGS:
            return
        if now - self.at > PATIENCE:
            os._exit(128 + number)
        self.at = min(self.at, now)

    def read(self) -> tuple[bool, bool]:
        """(save, stop), as far as this process knows."""
        minutes = (time.monotonic() - self.began) / 60
        if not self.reason and self.max_minutes is not None and minutes >= self.max_minutes:
            self.reason, self.at = f"--max_minutes {self.max_minutes:g}", time.monotonic()
        since = (time.monotonic() - self.saved) / 60
        due = self.save_minutes is not None and since >= self.save_minutes
        return due or time.monotonic() >= self.retry_at, bool(self.reason)


class Agreement:
    """Flags of all ranks, each true if it is so on any; the answer comes one update later.

    Later, so that nobody waits: the exchange runs beside the update, on the CPU.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if get_world_size() > 1 else None
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


class Writer:
    """Writes checkpoints, in a thread if `in_background`; what went wrong is told the next time."""

    def __init__(self, in_background: bool) -> None:
        self.in_background = in_background
        self.thread: threading.Thread | None = None
        self.problem = ""

    def __call__(self, content: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """`write(content)`, or start to write a copy of it; OSError if this or the last failed."""
        self.wait()
        if not self.in_background:
            return write(content)
        copied = snapshot(content)
        self.thread = threading.Thread(target=self._run, args=(copied, write))
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written; OSError if that failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        problem, self.problem = self.problem, ""
        if problem:
            raise OSError(problem)

    def _run(self, content: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        try:
            write(content)
        except OSError as error:
            self.problem = str(error)


def snapshot(value: Any) -> Any:
    """A copy in host memory, which training does not change any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


class Keeper:
    """Saves a run between updates and at the end of epochs, and stops it when asked to.

    save: `utils.save_model` with everything but the state, or None to write nothing.
    every_steps, every_minutes: when to save within an epoch; None for never. every_epochs: when at
    its end. max_minutes: after which the run stops as if by a signal. max_failures: saves in a row
    that may fail; one that did is tried again a minute later. in_background: write in a thread.

        with Keeper(...) as keeper:
            ...
            keeper.after_update(state, means, stepper)  # in the epoch, after every update
            keeper.end_epoch(state, improved, last)     # after the evaluation
    """

    def __init__(
        self,
        save: Callable[..., None] | None,
        every_epochs: int = 1,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        max_minutes: float | None = None,
        max_failures: int = 5,
        in_background: bool = False,
    ) -> None:
        self.save, self.every_epochs, self.every_steps = save, every_epochs, every_steps
        self.requests = Requests(every_minutes, max_minutes)
        self.agreement = Agreement()
        self.writer = Writer(in_background)
        self.saved_at = 0  # update
        self.failures, self.max_failures = 0, max_failures  # saves in a row that went wrong

    def __enter__(self) -> Keeper:
        self.requests.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.requests.__exit__()
        with contextlib.suppress(OSError):  # the error that ends the run tells more
            self.writer.wait()

    def after_update(self, state: TrainState, means: Any, stepper: Any) -> None:
        """Save if it is time to; raise Preempted if any rank was asked to stop."""
        save, stop = self.agreement.exchange(*self.requests.read())
        save &= state.updates > self.saved_at + 1  # the answer to a question of before that
        due = self.every_steps is not None and state.updates % self.every_steps == 0
        if save or stop or due:
            self.saved_at = state.updates
            state.bad_steps += stepper.check()
            state.within = {"means": means.state(), "stepper": stepper.state()}
            self._write(state)
        if stop:
            self._stop(state)

    def end_epoch(
        self, state: TrainState, improved: Iterable[str] = (), last: bool = False
    ) -> None:
        """Save what the end of an epoch asks for."""
        numbered = last or state.epoch % self.every_epochs == 0
        stop = False
        if not last:
            self.agreement.exchange(*self.requests.read())
            stop = (self.agreement.wait() or self.requests.read())[1]
        self._write(state, numbered=numbered or stop, improved=improved)
        if stop:
            self._stop(state)
        if last:
            self.finish()

    def _write(self, state: TrainState, **options: Any) -> None:
        """Save; a disk that is full or gone does not end the run, unless for long."""
        if self.save is None:
            return
        problem = from_main_process(lambda: self._try(state, options))
        self.requests.saved, self.requests.retry_at = time.monotonic(), math.inf
        self.failures = self.failures + 1 if problem else 0
        if not problem:
            return
        self.requests.retry_at = time.monotonic() + RETRY
        text = "could not save, %d times in a row (%s); the checkpoints before are whole"
        get_logger().warning(text, self.failures, problem)
        if self.failures > self.max_failures:
            raise TrainingStopped(
                f"{self.failures} saves in a row failed, the last with: {problem}; free some "
                "space or choose another --output_dir, and start again: what was saved is whole"
            )

    def _try(self, state: TrainState, options: dict[str, Any]) -> str:
        try:
            self.save(state=state, writer=self.writer, **options)
        except OSError as error:
            return str(error)
        return ""

    def finish(self) -> None:
        """Until the last save is written."""
        problem = from_main_process(self._await)
        if problem:
            raise TrainingStopped(f"the last save failed: {problem}; the ones before are whole")

    def _await(self) -> str:
        try:
            self.writer.wait()
        except OSError as error:
            return str(error)
        return ""

    def _stop(self, state: TrainState) -> None:
        reason = self.requests.reason or "another process"
        get_logger().info("asked to stop (%s) at update %d", reason, state.updates)
        self.finish()
        raise Preempted(
            f"stopped by {reason} at epoch {state.epoch}, update {state.updates}"
            f"{', saved' if self.save is not None else ', nothing saved: no --output_dir'}; "
            "the same command goes on from there"
        )


def build_keeper(args: Any, save: Callable[..., None] | None) -> Keeper:
    """`Keeper` as the flags say."""
    return Keeper(
        save if args.save_ckpt else None,
        args.save_ckpt_freq,
        args.save_ckpt_every_steps,
        args.save_ckpt_every_minutes,
        args.max_minutes,
        args.max_save_failures,
        args.async_save,
    )
