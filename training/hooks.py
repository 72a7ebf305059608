# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Hooks: what they may see of a run, and the reporter that calls them.

python main_finetune.py --recipe digits_finetune --hook csv --hook my_fork.my_hook:MyHook(every=5)
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_loading.loader import DeviceLoader
from errors import TrainingStopped, UserError, describe_error, first_few
from models.kernels.autotune import autotuner
from parallel.process_group import (
    from_main_process,
    get_logger,
    get_world_size,
    is_main_process,
)
from parallel.state_dict import map_tensors
from training import run_lock
from training.checkpoint import TrainableParts, TrainState
from training.meters import Means
from training.report import Record
from training.speed import Speed
from training.stepper import Stepper
from training.steps import Steps
from training.worst_images import WorstImages

PLAIN = (type(None), bool, int, float, str, bytes)  # besides tensors, dicts, lists and tuples


class Batch(NamedTuple):
    """A batch on the device: the tensors of the step, not copies. Reading one waits for it."""

    images: Tensor  # (N, C, H, W), normalized and perhaps mixed
    targets: Tensor | None  # as the data has them; None in pre-training
    outputs: Tensor | None  # (N, K), of several heads those of the first; None in pre-training
    loss: Tensor  # in training a scalar; in evaluation (N, T), of each image and term of --loss
    ids: Tensor  # (N,) numbers of the images in the data set


@dataclass
class Run:
    """The run as hooks see it, to read and not to change."""

    args: Any  # flags
    folder: Path | None  # of the run, None if it writes none
    state: TrainState  # epoch, global_step, best, stats of the last epoch ...
    device: torch.device
    classes: Sequence[str] | None = None  # names in the order of the head
    model: nn.Module | None = None  # without DistributedDataParallel
    optimizer: Any = None
    model_ema: nn.Module | None = None
    schedule: Any = None  # learning rate and other options by step; None with --eval
    phase: str = ""  # train or test, '' before the first
    split: str = ""  # of a test phase: '', with EMA weights ema, of another set b or b_ema
    kind: str = ""  # of the targets of a test phase: class, multi or number
    loader: Any = None  # `DeviceLoader` of the phase
    scalars: Record = field(default_factory=dict)  # of the last log line, or of the ended phase
    last_batch: Batch | None = None
    tensorboard: Any = None  # SummaryWriter on rank 0, None without TensorBoard files
    error: BaseException | None = None  # that ended the run

    def name_of(self, number: int) -> str:
        """Return the path of an image of the phase, or `number 7` if the data has no files."""
        return self.loader.loader.dataset.path_of(number)

    @property
    def is_complete(self) -> bool:
        """True in `on_end` if no error and no signal ends the run."""
        return self.error is None


class Hook:
    """Base class of hooks: override the methods you need. A hook must not change the training.

    every_rank: call it on all ranks, for collectives; otherwise on rank 0 alone, which writes.
    The constructor only stores its arguments; `on_start` opens files.
    """

    every_rank = False

    def check(self, args: Any) -> None:
        """Raise UserError, before data is listed, if the flags do not fit. Built-in hooks only."""

    def on_start(self, run: Run) -> None:
        """Called once before the first epoch, after `load_state_dict` if a run resumes.

        With --eval, before the first evaluation. The model has its weights.
        """

    def on_phase_start(self, run: Run) -> None:
        """Called before the training of an epoch, or of its rest, and before an evaluation."""

    def on_step(self, run: Run) -> None:
        """Called after every optimizer step, and after every batch of an evaluation."""

    def on_phase_end(self, run: Run) -> None:
        """Called after the training of an epoch and after an evaluation, before the save."""

    def on_save(self, run: Run) -> None:
        """Called on rank 0 before each checkpoint is written, within epochs too."""

    def on_end(self, run: Run) -> None:
        """Called once when the run ends or fails, the last hook first."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint: numbers, texts, tensors, dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the hook from `state_dict()`; not called for a new hook in a resumed run."""

    def on_first_step(self, record: Record, state: TrainState) -> None:
        """Called after the first step of a process, for a log line before `print_freq` steps."""

    def on_log(self, record: Record, state: TrainState) -> None:
        """Called every `print_freq` steps with means since the last call, speed and time left."""

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        """Called at the end of an epoch, after its save, with the values for log.txt.

        Also after an evaluation within an epoch: `state.samples_in_epoch` is above 0 then.
        A resumed run calls it again if the process ended before all hooks were called.
        """

    def on_image(self, name: str, image: Tensor, state: TrainState) -> None:
        """Called with an image to show, (3, H, W) in 0 to 1."""

    def has_image(self, name: str, state: TrainState) -> bool:
        """Return True if the image of the last finished epoch is written already."""
        return False

    def misses_epoch(self, state: TrainState) -> bool:
        """Return True if a killed run has saved its last epoch, and not written its values."""
        return False


@dataclass
class Reporter:
    """Reads the meters every `print_freq` steps and notifies the hooks.

    Reading meters is collective, so every rank has a reporter; only rank 0 has hooks, and other
    ranks those with `every_rank`. steps: optimizer steps of the run.
    open_hooks: called on rank 0 on entering the run, since hooks create files. observers: hooks of
    --hook and --tracker on this rank, by name, of which `open_hooks` decides the order. speed:
    measures where the time goes; default: without advice and MFU. record: hook that writes
    run.json, if the run has a folder. worst: collects the worst images of each evaluation of the
    first set, without EMA weights.
    """

    hooks: list[Hook]
    device: torch.device
    state: TrainState
    steps: Steps
    print_freq: int
    open_hooks: Callable[["Reporter"], list[Hook]] | None = None
    observers: Mapping[str, Hook] = field(default_factory=dict)
    run: Run | None = None
    speed: Speed | None = None
    record: Hook | None = None
    worst: WorstImages | None = None

    def __post_init__(self) -> None:
        self.run_start, self.first_step = time.perf_counter(), self.state.global_step
        self.kernels_logged, self.failed = False, set()  # hooks whose failure is reported
        self.run = self.run or Run(None, None, self.state, self.device)
        self.speed = self.speed or Speed(self.device)
        self.phase_speed: Record = {}  # of the last phase of training

    @classmethod
    def quiet(cls, device: torch.device) -> "Reporter":
        """Return a reporter without hooks."""
        return cls([], device, TrainState(), Steps.even(1), 1)

    # --- the run ----------------------------------------------------------------------------

    def attach(
        self,
        parts: TrainableParts,
        schedule: Any,
        saved: Mapping[str, Any] | None = None,
        record: Hook | None = None,
    ) -> None:
        """Show hooks the parts of the run, and give them their states of a checkpoint.

        record: the hook that writes run.json.
        """
        self.record = record
        self.run.model, self.run.optimizer = parts.model, parts.optimizer
        self.run.model_ema, self.run.schedule = parts.model_ema, schedule
        saved = dict(saved or {})
        for name, hook in self.observers.items():
            if name in saved:
                self._call(hook, "load_state_dict", saved.pop(name))
        names = [name for name in saved if name not in self.observers]
        if names and is_main_process():
            text = "the checkpoint has states of hooks that are not given; they are dropped: %s"
            get_logger().info(text, first_few(names))

    def hook_states(self) -> dict[str, Any]:
        """Notify the hooks of a save; return their states as an entry of the checkpoint.

        Nothing if no hook has one.
        """
        states = {}
        if not is_main_process():
            return {}
        self._notify("on_save", self.run)
        for name, hook in self.observers.items():
            try:
                state = hook.state_dict()
                if wrong := _not_plain(state):
                    raise UserError(f"state_dict() holds a {wrong}; convert it to Python's types")
                if state:
                    states[name] = copy.deepcopy(map_tensors(state, Tensor.detach))
            except Exception as error:
                self._report_failure(hook, "state_dict", error)
        return {"hooks": states} if states else {}

    def __enter__(self) -> "Reporter":
        if self.open_hooks is not None:  # errors of rank 0 reach all ranks
            from_main_process(lambda: self.hooks.extend(self.open_hooks(self)))
        if not is_main_process():
            self.hooks.extend(self.observers.values())
        self._notify("on_start", self.run)
        if from_main_process(lambda: self._any("misses_epoch", self.state)):
            self._notify("on_epoch", dict(self.state.stats), self.state)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        self.run.error = error
        for hook in reversed(self.hooks):
            self._call(hook, "on_end", self.run)

    # --- phases -----------------------------------------------------------------------------

    def begin_epoch(
        self, names: Sequence[str], batches: DeviceLoader, stepper: Stepper | None = None
    ) -> Means:
        """Return the meters of an epoch, which continue those of an interrupted one.

        stepper: makes the steps whose parts are timed.
        """
        self.means = Means(names, self.device)
        if "means" in self.state.epoch_sums:
            self.means.restore(self.state.epoch_sums["means"])
        batches.mark = self.speed.clock.mark
        if stepper is not None:
            self.speed.watch(stepper)
        self.begin_phase("train", batches)
        self.speed.begin_phase()
        return self.means

    def begin_phase(
        self, phase: str, loader: DeviceLoader, split: str = "", kind: str = ""
    ) -> None:
        """Notify the hooks that a pass over `loader` begins; phase: train or test."""
        self.run.phase, self.run.split, self.run.kind = phase, split, kind
        self.run.loader, self.run.last_batch = loader, None
        if self._collects_worst():
            self.worst.begin(loader, kind)
        self._notify("on_phase_start", self.run)

    def end_phase(self, values: dict[str, Any]) -> dict[str, Any]:
        """Notify the hooks of the values of a phase, and return them; all ranks must call it."""
        if self.run.phase == "train":
            self.phase_speed = self.speed.end_phase(self.state.epoch)
        self.run.scalars = dict(values)
        self._notify("on_phase_end", self.run)
        self.run.last_batch = None
        return values

    # --- steps ------------------------------------------------------------------------------

    def after_batch(self, images: int, batch: Batch | None = None) -> None:
        """Count the images of a micro-batch; every rank has as many."""
        self.speed.after_batch(images * get_world_size())
        self._show(batch)

    def after_evaluated(self, batch: Batch) -> None:
        """Notify the hooks of a batch of an evaluation."""
        if self._collects_worst():
            self.worst.add(batch)
        self._show(batch)
        for hook in self.observers.values():
            self._call(hook, "on_step", self.run)

    def _collects_worst(self) -> bool:
        return self.worst is not None and (self.run.phase, self.run.split) == ("test", "")

    def _show(self, batch: Batch | None) -> None:
        """Keep the batch for hooks; without any, its memory is free for the next one."""
        if self.observers and batch is not None:
            self.run.last_batch = map_tensors(batch, Tensor.detach)  # without its graph

    def after_step(self, lr: float) -> bool:
        """Notify the hooks of an optimizer step; returns True if it read the meters.

        Every rank must call it.
        """
        self.speed.after_step()
        steps_done = self.state.global_step - self.first_step
        before, size = self.steps.within(self.state.global_step - 1)
        step = before + 1  # of the epoch
        is_last = self.state.global_step == self.steps.total  # perhaps within an epoch
        regular = step % self.print_freq == 0 or step == size or is_last
        if not regular and steps_done > 1:
            self._notify("on_step", self.run)
            return False
        record = self._record(self.means.read() if regular else self.means.peek(), lr, step)
        self.run.scalars = record
        self._notify("on_step", self.run)
        self._notify("on_log" if regular else "on_first_step", record, self.state)
        if not regular:
            return False
        if not self.kernels_logged:  # by now a kernel is chosen for every operation
            if autotuner.chosen:  # not by networks of other libraries
                get_logger().info("kernels chosen: %s", autotuner.summary())
            autotuner.save()
            self.kernels_logged = True
        self.speed.end_line()
        return True

    def _record(self, means: Record, lr: float, step: int) -> Record:
        """Return the values of a log line of this step."""
        left = self.steps.total - self.state.global_step
        _, size = self.steps.within(self.state.global_step - 1)
        seconds = time.perf_counter() - self.run_start
        seconds_per_step = seconds / (self.state.global_step - self.first_step)
        return means | {
            "lr": lr,
            **self.speed.line(self.state.epoch),
            "memory_mb": peak_memory_mb(self.device),
            "eta_s": seconds_per_step * left,
            "step": step,
            "steps": min(size, left + step),
        }

    # --- epochs and images ------------------------------------------------------------------

    def end_epoch(self, stats: Record | None = None) -> None:
        """Notify the hooks of an epoch's values; raises if this run lost its output folder.

        stats: with large confusion matrices, which `state.stats` does not hold: a resumed run that
        writes the missed line of an epoch cannot write confusion.csv again, nor its speed.
        """
        run_lock.check()
        stats = self.state.stats if stats is None else stats
        self._notify("on_epoch", stats | self.phase_speed, self.state)

    def image(
        self, name: str, draw: Callable[[], Tensor | None], only_missing: bool = False
    ) -> None:
        """Draw an image and notify the hooks of it, if there is one; every rank must call it.

        only_missing: only if the hooks have not written it, as in a run that was killed before.
        """
        if only_missing and from_main_process(lambda: self._any("has_image", name, self.state)):
            return
        try:
            image = draw()
        except Exception as error:
            self._report_failure(f"the image {name}", "", error)
            return
        if image is not None:
            self._notify("on_image", name, image, self.state)

    # --- calls ------------------------------------------------------------------------------

    def _any(self, question: str, *args: object) -> bool:
        """Return True if a hook answers with True."""
        for hook in self.hooks:
            try:
                if getattr(hook, question)(*args):
                    return True
            except Exception as error:
                self._report_failure(hook, question, error)
        return False

    def _notify(self, point: str, *args: object) -> None:
        """Call a method of each hook."""
        for hook in self.hooks:
            self._call(hook, point, *args)

    @torch.no_grad()
    def _call(self, hook: Hook, point: str, *args: object) -> None:
        """Call a hook. One that fails is reported, and ends the run only where it must.

        It does so at the start; where other ranks would wait for it; and if it raises a UserError
        or TrainingStopped. At the end the error that ends the run says more.
        """
        try:
            getattr(hook, point)(*args)
        except Exception as error:
            observes = hook in self.observers.values()
            if observes and point != "on_end":
                if isinstance(error, UserError | TrainingStopped):
                    raise
                alone = get_world_size() == 1 or not hook.every_rank
                if point in ("load_state_dict", "on_start") or not alone:
                    raise UserError(
                        f"{self._name(hook)} failed in {point} ({describe_error(error)}); "
                        "correct it, or drop it"
                    ) from error
            self._report_failure(hook, point, error)

    def _name(self, hook: Hook) -> str:
        names = (f"hook {name}" for name, own in self.observers.items() if own is hook)
        return next(names, type(hook).__name__)

    def _report_failure(self, source: Hook | str, point: str, error: Exception) -> None:
        """Warn of the first failure of a hook or an image."""
        name = source if isinstance(source, str) else self._name(source)
        if name in self.failed:
            return
        self.failed.add(name)
        place = f" in {point}" * bool(point)
        after = "; the run continues, and further failures of it are not reported"
        if point == "on_end":
            after = "; training and checkpoints are complete" * self.run.is_complete
        get_logger().warning("%s failed%s (%s)%s", name, place, describe_error(error), after)


def _not_plain(value: Any) -> str:
    """Return the type of the first value that torch.load(weights_only=True) refuses, or ''."""
    if isinstance(value, Tensor) or type(value) in PLAIN:
        return ""
    if type(value) is dict:
        return next(filter(None, map(_not_plain, [*value, *value.values()])), "")
    if type(value) in (list, tuple):
        return next(filter(None, map(_not_plain, value)), "")
    return type(value).__name__


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU, otherwise of this process; NaN on Windows without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
