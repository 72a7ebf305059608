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
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from errors import Preempted, TrainingStopped, UserError
from parallel.process_group import broadcast, from_main_process, get_logger
from training import run_lock
from training.checkpoint import TrainState
from training.preemption import Agreement, Requests

RETRY = 60.0  # seconds after which a save that failed is tried again
PAUSE = 5.0  # seconds between tries where a run ends with its save


class Writer:
    """Writes checkpoints, in a thread if `in_background`; what went wrong is told the next time."""

    def __init__(self, in_background: bool) -> None:
        self.in_background = in_background
        self.thread: threading.Thread | None = None
        self.problem, self.done = "", 0  # what went wrong; how often nothing did

    def __call__(self, content: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """`write(content)`, or start to write a copy of it; OSError if this or the last failed."""
        if not self.in_background:
            write(content)
            self.done += 1
            return
        try:
            self.wait()
        finally:  # what is new is written though the last was not
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
        if sys.platform == "linux":  # where a thread has a priority of its own: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            write(content)
            self.done += 1
        except Exception as error:  # which would be lost with the thread
            self.problem = str(error) if isinstance(error, OSError) else repr(error)


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
    before_save: called on all ranks before a save within an epoch.

        with Keeper(...) as keeper:
            ...
            keeper.after_update(state, means, guard)  # in the epoch, after every update
            keeper.end_epoch(state, accuracies, last)   # after the evaluation
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
        before_save: Callable[[], Any] | None = None,
    ) -> None:
        self.before_save = before_save
        self.save, self.every_epochs, self.every_steps = save, every_epochs, every_steps
        self.requests = Requests(every_minutes, max_minutes)
        self.agreement = Agreement()
        self.writer = Writer(in_background)
        self.saved_at, self.unsaved = 0, ""  # update; why the last save is none
        self.saves = 0  # that went well
        self.written: dict[str, float] = {}  # best accuracies that have their checkpoint
        self.failures, self.max_failures = 0, max_failures  # saves in a row that went wrong

    def __enter__(self) -> Keeper:
        self.requests.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.requests.__exit__()
        with contextlib.suppress(OSError):  # the error that ends the run tells more
            self.writer.wait()

    def after_update(self, state: TrainState, means: Any, guard: Any, look: bool = False) -> None:
        """Save if it is time to; raise Preempted if any rank was asked to stop.

        look: read what became of the updates, as before every save: a log line waits as well.
        TrainingStopped if that went wrong too often, after a save.
        """
        save, stop = self.agreement.exchange(*self.requests.read())
        save &= state.updates > self.saved_at + 1  # the answer to a question of before that
        due = self.every_steps is not None and state.updates % self.every_steps == 0
        problem = guard.check(state) if look or save or stop or due else ""
        if save or stop or due or problem:
            self.saved_at = state.updates
            if self.before_save is not None:
                self.before_save()
            guard.snapshot(state)
            state.within = {"means": means.state(), "guard": guard.state()}
            self._settle(state)
            self._write(state, ends=stop or bool(problem))
        if problem:
            raise TrainingStopped(problem)
        if stop:
            self._stop(state)

    def end_epoch(
        self,
        state: TrainState,
        accuracies: Mapping[str, float | None] | None = None,
        last: bool = False,
    ) -> None:
        """Save what the end of an epoch asks for, and what could not be saved before.

        accuracies: checkpoint name -> value; a new best is written under its name.
        """
        self._settle(state)
        improved = state.note_best(accuracies or {})
        numbered = last or state.epoch % self.every_epochs == 0 or bool(self.unsaved)
        stop = False
        if not last:
            self.agreement.exchange(*self.requests.read())
            stop = (self.agreement.wait() or self.requests.read())[1]
        if numbered or stop or improved:
            self._write(state, last or stop, numbered=numbered or stop, improved=improved)
        if stop:
            self._stop(state)
        if last and self.unsaved:
            raise TrainingStopped(
                f"training is over, but its end is not saved: {self.unsaved}; once that is mended, "
                "the same command goes on from the last checkpoint"
            )

    def _write(self, state: TrainState, ends: bool = False, **options: Any) -> None:
        """Save; a disk that is full or gone does not end the run, unless for long.

        ends: nothing comes after it, so that it is waited for and tried again at once.
        """
        run_lock.check()
        if self.save is None:
            return
        best = dict(state.best)
        for attempt in range(1 + self.max_failures * ends):
            if attempt:
                time.sleep(PAUSE)
            state.best = dict(best)
            problem, of_disk, done = broadcast(self._try(state, options))
            state.best = dict(self.written) if problem else state.best
            self._note(problem, done, of_disk)
            if ends and not problem:
                of_disk = self._settle(state)
            if not (self.unsaved and of_disk):
                break
        if not self.unsaved and options.get("numbered", True):
            self.requests.saved = time.monotonic()
        if self.failures > self.max_failures and not ends:
            raise TrainingStopped(
                f"{self.failures} saves in a row failed, the last with: {self.unsaved}; free some "
                "space or choose another --output_dir, and start again: what was saved is whole"
            )

    def _note(self, problem: str, done: int, of_disk: bool = True) -> None:
        """What became of a save, if that is known: in the background it has only begun."""
        went_well, self.saves = done > self.saves, done
        self.unsaved = problem or self.unsaved * (not went_well)
        failed = bool(problem) and of_disk
        self.failures = (self.failures + failed) * (failed or not went_well)
        self.requests.retry_at = time.monotonic() + RETRY if failed else math.inf
        if failed:
            text = "could not save, %d times in a row (%s); the checkpoints before are whole"
            get_logger().warning(text, self.failures, problem)
        elif problem:
            get_logger().warning("not saved: %s; the checkpoints before are whole", problem)

    def _try(self, state: TrainState, options: dict[str, Any]) -> tuple[str, bool, int]:
        """What went wrong, whether that is the disk's fault, and how many saves went well."""
        problem, of_disk = "", False
        try:
            self.save(state=state, writer=self.writer, **options)
        except (OSError, UserError) as error:
            problem, of_disk = str(error), isinstance(error, OSError)
        return problem, of_disk, self.writer.done

    def _settle(self, state: TrainState) -> bool:
        """Wait until nothing is being written; whether that failed. A best must be written."""
        problem, done = from_main_process(self._await)
        if problem or done > self.saves:
            self._note(problem, done)
        if problem:
            state.best = dict(self.written)
        self.written = dict(state.best)
        return bool(problem)

    def _await(self) -> tuple[str, int]:
        problem = ""
        try:
            self.writer.wait()
        except OSError as error:
            problem = str(error)
        return problem, self.writer.done

    def _stop(self, state: TrainState) -> None:
        reason = self.requests.reason or "another process"
        get_logger().info("asked to stop (%s) at update %d", reason, state.updates)
        where = f"stopped by {reason} at epoch {state.epoch}, update {state.updates}"
        if self.unsaved and not self.saves:  # to be queued again it would begin where it did
            raise TrainingStopped(f"{where}; nothing of this run could be saved: {self.unsaved}")
        saved = "nothing saved, as asked for" if self.save is None else "saved"
        saved = f"not saved since: {self.unsaved}" if self.unsaved else saved
        raise Preempted(f"{where}, {saved}; the same command goes on from the last save")


def build_keeper(
    args: Any, save: Callable[..., None] | None, before_save: Callable[[], Any]
) -> Keeper:
    """`Keeper` as the flags say."""
    return Keeper(
        save if args.save_ckpt else None,
        args.save_ckpt_freq,
        args.save_ckpt_every_steps,
        args.save_ckpt_every_minutes,
        args.max_minutes,
        args.max_save_failures,
        args.async_save,
        before_save,
    )
