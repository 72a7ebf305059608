# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Save a run on schedule, survive failed writes, and stop the run when asked to.

python main_pretrain.py --recipe digits_pretrain --output_dir runs/saved --save_ckpt_every_steps 20
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.parser import absolute_paths
from data_loading.labels import Head
from data_loading.loader import DeviceLoader
from errors import Preempted, TrainingStopped, UserError, first_line, plural
from parallel.process_group import agree, broadcast, count_ranks, get_logger, get_world_size
from parallel.state_dict import copy_to_cpu
from training import run_lock
from training.checkpoint import TrainableParts, TrainState, collect_checkpoint, write_checkpoints
from training.preemption import RankVote, StopSignals
from training.report import describe_progress
from training.run_folder import how_to_continue
from utils import explain
from weights.files import BEST, numbered_checkpoints
from weights.saved_run import describe_head

RETRY = 60.0  # seconds after which a failed save is repeated while training continues
PAUSE = 5.0  # seconds between attempts where the run ends with its save


class AsyncWriter:
    """Writes checkpoints, in a thread if `in_background`.

    writer(content, write)  # write(content) now, or write(a copy of it) in the background
    writer.wait()           # until that is done; raises its error

    Any error of a write is raised as an OSError, which a run survives.
    """

    def __init__(self, in_background: bool) -> None:
        self.pool = ThreadPoolExecutor(1, initializer=_lower_priority) if in_background else None
        self.pending: Future[None] | None = None

    def __call__(self, content: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Write, or start to."""
        with _as_os_error():
            if self.pool is None:
                write(content)
            else:
                self.pending = self.pool.submit(write, copy_to_cpu(content))

    def wait(self) -> bool:
        """Wait for the write in the background and raise its error; False if there is none."""
        pending, self.pending = self.pending, None
        if pending is not None:
            with _as_os_error():
                pending.result()
        return pending is not None


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise other errors as OSError: torch.save reports a full disk as a RuntimeError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def _lower_priority() -> None:
    if sys.platform == "linux":  # where threads have their own priorities
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class NoMoreBatches(Preempted):
    """The run was asked to stop while all ranks wait for a batch; `CheckpointManager` saves it."""


@dataclass
class LastStep:
    """The progress after the last optimizer step, from which a run can resume at any later time."""

    state: TrainState  # of the run, which may be ahead of the three numbers
    epoch: int
    samples_in_epoch: int
    phase_end: int
    guard: Any
    meters: Any = None  # None: the epoch has no step yet
    sums: Any = None  # of the meters, at this step


@dataclass(eq=False)
class CheckpointManager:
    """Saves a run between optimizer steps and at the end of epochs, and stops it when asked to.

    save: called on all ranks with state, writer, numbered and improved (`write_checkpoints`);
        None to save nothing.
    every_epochs: save at the end of every so many epochs; a new best also within an epoch.
    every_steps, every_minutes: save within epochs; None for never.
    max_minutes: the run stops after this time as if by a signal.
    max_failures: saves in a row that may fail; a failed one is repeated a minute later.
    in_background: write in a thread.
    before_save: called on all ranks before a save, and at the end of every epoch.
    again: words that tell how to continue an interrupted run. folder: of the checkpoints.

        with CheckpointManager(...) as checkpoints:
            ...
            checkpoints.after_step(state, meters, guard)       # after every optimizer step
            checkpoints.end_epoch(state, accuracies, last, report)  # after the evaluation

    With `watch` it saves and stops the run also if the batches of these loaders do not come.
    """

    save: Callable[..., None] | None
    every_epochs: int = 1
    every_steps: int | None = None
    every_minutes: float | None = None
    max_minutes: float | None = None
    max_failures: int = 5
    in_background: bool = False
    before_save: Callable[[], Any] | None = None
    again: str = "rerun the same command"
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.signals = StopSignals(self.every_minutes, self.max_minutes)
        self.vote, self.writer = RankVote(), AsyncWriter(self.in_background)
        self.saved_at = 0  # step of the last save within an epoch
        # Best accuracies that have their checkpoint, and their epochs.
        self.saved_best: tuple[dict[str, float], dict[str, int]] = {}, {}
        self.successes, self.failures = 0, 0  # saves in all; failed saves in a row
        self.problem = ""  # why the last save failed, '' if it did not
        self.last: LastStep | None = None
        # Ranks that wait for a batch and were asked to stop are counted, in another round after one
        # of them got its batch.
        self.round, self.counted = 0, False

    def __enter__(self) -> "CheckpointManager":
        self.signals.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            if isinstance(error, NoMoreBatches):  # here, since an evaluation has ended by now
                self._save_last_step()
        finally:
            self.signals.__exit__()
            with contextlib.suppress(OSError):  # the error that ends the run says more
                self.writer.wait()

    def watch(self, *loaders: DeviceLoader | None) -> "CheckpointManager":
        """Stop the run if it is asked to while it waits for batches of these loaders."""
        for loader in filter(None, loaders):
            loader.loader.on_wait = self._on_wait
        return self

    def _on_wait(self, arrived: bool) -> None:
        """Raise NoMoreBatches on all ranks if all wait for a batch and were asked to stop.

        The first one to find that all wait, or to get a batch after all, decides the round for all.
        """
        if not self.signals.read()[1]:
            return
        while agree(place := f"stop without a batch, round {self.round}", "") == "continue":
            self.round, self.counted = self.round + 1, False
        if not arrived:
            waiting = count_ranks(place, int(not self.counted))
            self.counted = True
            if waiting < get_world_size():
                return
        if agree(place, "continue" if arrived else "stop") == "stop":
            raise NoMoreBatches("asked to stop, and no batch comes")

    def _save_last_step(self) -> None:
        """Save the progress of the last optimizer step, and stop."""
        last = self.last
        if last is None:
            raise Preempted(
                "stopped before the first step, since no batch came; nothing to save. Exit code "
                f"75: {self.again} to continue"
            )
        now = last.state
        if last.meters is not None and now.epoch == last.epoch:
            last.meters.recent.copy_(last.sums)  # without those of an unfinished window
        numbers = ("epoch", "samples_in_epoch", "phase_end")
        state = replace(now, **{name: getattr(last, name) for name in numbers})
        state.epoch_sums = dict(now.epoch_sums)
        if last.meters is not None:
            state.epoch_sums["means"] = last.meters.state()
        problem = ""
        if last.guard is not None:
            last.guard.stepper.drop_window()
            last.guard.data_loader = None  # bad steps are not rerun: the data does not come
            problem = last.guard.check(state)
        self._prepare(state)
        self._save(state, is_last=True)
        if problem:
            raise TrainingStopped(problem)
        self._stop(state)

    def after_step(self, state: TrainState, meters: Any, guard: Any, check: bool = False) -> None:
        """Save if it is time to; raise Preempted if any rank was asked to stop.

        check: let the guard check recent steps, as before every save; it waits for the device.
        Raises TrainingStopped, after a save, if the guard found too many bad steps.
        """
        save, stop = self.vote.exchange(*self.signals.read())
        # The vote comes one step late, so right after a save it still asks for that save.
        save = save and state.global_step > self.saved_at + 1
        due = self.every_steps is not None and state.global_step % self.every_steps == 0
        problem = guard.check(state) if check or save or stop or due else ""
        if save or stop or due or problem:
            self.saved_at = state.global_step
            guard.snapshot(state)
            state.epoch_sums["means"] = meters.state()
            self._prepare(state)
            self._save(state, is_last=stop or bool(problem))
        if problem:
            raise TrainingStopped(problem)
        if stop:
            self._stop(state)
        place = state.epoch, state.samples_in_epoch, state.phase_end
        self.last = LastStep(state, *place, guard, meters, meters.recent.clone())

    def end_epoch(
        self,
        state: TrainState,
        best: Mapping[str, float | None] | None = None,
        last: bool = False,
        report: Callable[[], None] | None = None,
    ) -> None:
        """Save if this epoch is to be saved, or if the last save failed; then report the epoch.

        Also for an evaluation within an epoch. best: checkpoint name -> value; a new best is
        written under its name. last: the run ends here. report: called on all ranks after the save,
        since hooks may fail or hang, and before the run stops.
        """
        self._prepare(state)
        improved = state.update_best(best or {})
        due = not state.samples_in_epoch and state.epoch % self.every_epochs == 0
        numbered = last or due or bool(self.problem)
        stop = not last and self.vote.exchange_now(*self.signals.read())[1]
        report = report or (lambda: None)
        if numbered or stop or improved:
            try:
                self._save(state, last or stop, numbered or stop, improved)
            except TrainingStopped:  # after too many failures
                report()
                raise
        report()
        if stop:
            self._stop(state)
        guard = self.last.guard if self.last else None
        place = state.epoch, state.samples_in_epoch, state.phase_end
        self.last = LastStep(state, *place, guard)
        if last and self.problem:
            raise TrainingStopped(
                f"training is complete, but could not be saved: {self.problem}; correct "
                f"this, then {self.again} to continue from the last checkpoint"
            )

    def _save(
        self, state: TrainState, is_last: bool, numbered: bool = True, improved: Sequence[str] = ()
    ) -> None:
        """Save, or report the failure; raise TrainingStopped after too many failures in a row.

        is_last: the run ends after this save, so wait for it, and repeat it at once if it fails.
        """
        if self.save is None:
            return
        best, wait = (state.best, state.best_epochs), is_last or self.writer.pool is None

        def save() -> bool:
            self.save(state=state, writer=self.writer, numbered=numbered, improved=improved)
            if wait:
                self.writer.wait()
            return wait

        for attempt in range(1 + self.max_failures if is_last else 1):
            if attempt:
                time.sleep(PAUSE)
            state.best, state.best_epochs = best
            if self._attempt(state, save):
                break
        if not self.problem and numbered:
            self.signals.last_save = time.monotonic()
        if self.failures > self.max_failures and not is_last:
            raise TrainingStopped(
                f"{plural(self.failures, 'save')} in a row failed, the last with: {self.problem}; "
                f"correct this, then {self.again} to continue"
            )

    def _prepare(self, state: TrainState) -> None:
        """Do what precedes a save, and at the end of an epoch is also done without one.

        It waits for the last save, after which `state.best` is on the disk, checks that the folder
        is still this run's, and writes the list of bad images.
        """
        self._attempt(state, self.writer.wait)
        self.saved_best = state.best, state.best_epochs
        run_lock.check()
        if self.before_save is not None:
            self.before_save()

    def _attempt(self, state: TrainState, work: Callable[[], bool]) -> bool:
        """Save or wait on all ranks and record the result; False if a retry makes sense.

        work: returns True if a checkpoint is complete, on the main process. Its UserError means
        that the weights cannot be saved, which a retry does not change.
        """
        done, problem, retry = False, "", False
        try:
            done = work()
        except (OSError, UserError) as error:
            retry = isinstance(error, OSError)
            problem = f"{explain(error) if retry else error}; {self._intact()}"
        done, problem, retry = broadcast((done, problem, retry))
        self.signals.retry_at = time.monotonic() + RETRY if retry else math.inf
        if problem:
            self.problem = problem
            state.best, state.best_epochs = self.saved_best
            self.failures += retry
            times = f", {plural(self.failures, 'time')} in a row" if retry else ""
            get_logger().warning("could not save%s (%s)", times, problem)
        elif done:
            self.problem, self.failures, self.successes = "", 0, self.successes + 1
        return not retry

    def _intact(self) -> str:
        """Return the words for what a failed save has not touched."""
        if self.folder is None or not self.folder.is_dir():
            return "earlier checkpoints are intact"
        numbered = numbered_checkpoints(self.folder)
        newest = numbered[0].name if numbered else BEST
        if not (self.folder / newest).exists():
            return "this run has no checkpoint yet"
        return f"{newest} and earlier checkpoints are intact"

    def _stop(self, state: TrainState) -> None:
        reason = self.signals.reason or "another process"
        where = f"stopped by {reason} {describe_progress(state)}"
        get_logger().info("asked to stop (%s) at step %d", reason, state.global_step)
        if self.problem and not self.successes:  # a requeued run would start from the same point
            raise TrainingStopped(f"{where}; nothing of this run could be saved: {self.problem}")
        if self.save is None:
            raise Preempted(f"{where}; nothing saved: the same command starts from the beginning")
        saved = f"the last save failed: {self.problem}" if self.problem else "checkpoint saved"
        raise Preempted(f"{where}; {saved}. Exit code 75: {self.again} to continue")


def build_checkpoint_manager(
    args: Any,
    folder: Path | None,
    parts: TrainableParts,
    head: Head | None = None,
    before_save: Callable[[], Any] | None = None,
    more: Callable[[], dict[str, Any]] = dict,
) -> CheckpointManager:
    """Build a `CheckpointManager` from the flags; head: of the model, which checkpoints describe.

    more: called at every save for further entries, such as the states of hooks.
    """
    entries = {"args": absolute_paths(vars(args)), **describe_head(head or Head())}

    def save(
        state: TrainState, writer: AsyncWriter, numbered: bool = True, improved: Sequence[str] = ()
    ) -> None:
        def write(content: dict[str, Any]) -> None:
            write_checkpoints(folder, content, numbered, improved, args.save_ckpt_num, args.resume)

        content = collect_checkpoint(parts, state, entries | more())
        if content is not None:
            writer(content, write)

    return CheckpointManager(
        save if folder and args.save_ckpt else None,
        args.save_ckpt_freq,
        args.save_ckpt_every_steps,
        args.save_ckpt_every_minutes,
        args.max_minutes,
        args.max_save_failures,
        args.async_save,
        before_save,
        how_to_continue(args),
        folder,
    )
