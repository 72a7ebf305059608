# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Hooks that report a run: log lines, a progress bar, log.txt, TensorBoard, images.

python main_pretrain.py --data_set SYNTHETIC --model convnextv2_atto --output_dir runs/look
"""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from config.parser import dump_args
from datasets import DeviceLoader
from errors import UserError, first_line
from models.kernels.autotune import autotuner
from parallel.console import note
from parallel.process_group import from_main_process, get_logger, get_world_size
from training import run_lock
from training.checkpoint import TrainState, checkpoint_name
from training.confusion import confusion_file, write_confusion
from training.meters import Means
from training.report import (
    Record,
    count_epochs,
    describe_end,
    format_record,
    format_short,
    format_stats,
    log_entry,
    position_of,
)
from training.schedules import count_total
from utils import write_atomically


class Hook:
    """Base class of hooks: override the methods you need. A hook must not change the training."""

    def on_step(self, state: TrainState) -> None:
        """Called after every optimizer step. It gets no values, so nothing synchronizes."""

    def on_first_step(self, record: Record, state: TrainState) -> None:
        """Called after the first step of a process, so that nobody waits for `print_freq` steps."""

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

    def on_end(self) -> None:
        """Called once when the run ends or fails."""


@dataclass
class Reporter:
    """Reads the meters every `print_freq` steps and notifies the hooks.

    Reading meters is collective, so every rank has a reporter; only rank 0 has hooks.
    total_steps: optimizer steps of the whole run, for the time left. open_hooks: called on rank 0
    on entering the run, since hooks create files.
    """

    hooks: list[Hook]
    device: torch.device
    state: TrainState
    total_steps: int
    steps_per_epoch: int
    print_freq: int
    open_hooks: Callable[["Reporter"], list[Hook]] | None = None

    def __post_init__(self) -> None:
        self.run_start, self.first_step = time.perf_counter(), self.state.global_step
        self.kernels_logged, self.failed = False, set()  # hooks whose failure is reported

    def begin_epoch(self, names: Sequence[str], batches: DeviceLoader) -> Means:
        """Return the meters of an epoch, which continue those of an interrupted one."""
        self.means, self.batches = Means(names, self.device), batches
        if "means" in self.state.epoch_sums:
            self.means.restore(self.state.epoch_sums["means"])
        self._begin_window()
        return self.means

    def _begin_window(self) -> None:
        self.window_start, self.images = time.perf_counter(), 0
        self.waited_before = self.batches.wait_seconds

    def after_batch(self, images: int) -> None:
        """Count the images of a micro-batch; every rank has as many."""
        self.images += images * get_world_size()

    def after_step(self, lr: float) -> bool:
        """Notify the hooks of an optimizer step; returns True if it read the meters.

        Every rank must call it.
        """
        self._notify("on_step", self.state)
        steps_done = self.state.global_step - self.first_step
        step = (self.state.global_step - 1) % self.steps_per_epoch + 1
        is_last = self.state.global_step == self.total_steps  # perhaps within an epoch
        regular = step % self.print_freq == 0 or step == self.steps_per_epoch or is_last
        if not regular and steps_done > 1:
            return False
        record = self._record(self.means.read() if regular else self.means.peek(), lr, step)
        self._notify("on_log" if regular else "on_first_step", record, self.state)
        if not regular:
            return False
        if not self.kernels_logged:  # by now a kernel is chosen for every operation
            if autotuner.chosen:  # not by networks of other libraries
                get_logger().info("kernels chosen: %s", autotuner.summary())
            autotuner.save()
            self.kernels_logged = True
        self._begin_window()
        return True

    def _record(self, means: Record, lr: float, step: int) -> Record:
        """Return the values of a log line of this step."""
        now = time.perf_counter()
        window = max(now - self.window_start, 1e-9)
        seconds_per_step = (now - self.run_start) / (self.state.global_step - self.first_step)
        return means | {
            "lr": lr,
            "images_per_s": self.images / window,
            "data_wait": (self.batches.wait_seconds - self.waited_before) / window,
            "memory_mb": peak_memory_mb(self.device),
            "eta_s": seconds_per_step * (self.total_steps - self.state.global_step),
            "step": step,
            "steps": min(self.steps_per_epoch, self.total_steps - self.state.global_step + step),
        }

    def end_epoch(self, stats: Record | None = None) -> None:
        """Notify the hooks of an epoch's values; raises if this run lost its output folder.

        stats: with large confusion matrices, which `state.stats` does not hold: a resumed run that
        writes the missed line of an epoch cannot write confusion.csv again.
        """
        run_lock.check()
        self._notify("on_epoch", dict(self.state.stats if stats is None else stats), self.state)

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
            self._report_failure(f"the image {name}", error)
            return
        if image is not None:
            self._notify("on_image", name, image, self.state)

    def _any(self, question: str, *args: object) -> bool:
        """Return True if a hook answers with True."""
        for hook in self.hooks:
            try:
                if getattr(hook, question)(*args):
                    return True
            except Exception as error:
                self._report_failure(type(hook).__name__, error)
        return False

    def __enter__(self) -> "Reporter":
        if self.open_hooks is not None:  # errors of rank 0 reach all ranks
            from_main_process(lambda: self.hooks.extend(self.open_hooks(self)))
        if self._any("misses_epoch", self.state):
            self._notify("on_epoch", dict(self.state.stats), self.state)
        return self

    def __exit__(self, *exception: object) -> None:
        self._notify("on_end")

    def _notify(self, method: str, *args: object) -> None:
        """Call a method of each hook; a hook that fails does not end the run."""
        for hook in self.hooks:
            try:
                getattr(hook, method)(*args)
            except Exception as error:
                self._report_failure(type(hook).__name__, error)

    def _report_failure(self, name: str, error: Exception) -> None:
        """Warn of the first failure of a hook or an image."""
        if name in self.failed:
            return
        self.failed.add(name)
        *_, last = traceback.extract_tb(error.__traceback__)
        place = "" if isinstance(error, OSError) else f" at {last.filename}:{last.lineno}"
        reason = f"{type(error).__name__}: {first_line(error)}{place}"
        text = "%s failed (%s); the run continues without it, and tries again (reported once)"
        get_logger().warning(text, name, reason)


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


class LineHook(Hook):
    """Log a line after the first step, every `print_freq` steps and every epoch.

    top5: show top-5 accuracies. shown: False if a progress bar is on the terminal, so that the
    lines of steps go to console.log alone.
    """

    def __init__(self, epochs: float, top5: bool = True, shown: bool = True) -> None:
        self.epochs, self.top5, self.shown = epochs, top5, shown

    def on_first_step(self, record: Record, state: TrainState) -> None:
        self.on_log(record, state)

    def on_log(self, record: Record, state: TrainState) -> None:
        epoch, step = count_epochs(state.epoch, self.epochs), f"{record['step']}/{record['steps']}"
        line = f"epoch {epoch}  step {step}  {format_record(record)}"
        if self.shown:
            get_logger().info("%s", line)
        else:
            note(line)

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        line = format_stats(stats, self.top5)
        get_logger().info("%s  %s", describe_end(state, self.epochs), line)


class BarHook(Hook):
    """Show one progress bar for the whole run, the values first: they stay when it is narrow."""

    def __init__(self, epochs: float, state: TrainState, total: int) -> None:
        from tqdm import tqdm

        self.epochs, self.values = epochs, ""
        self.bar = tqdm(
            desc=self._text(state),
            total=total,
            initial=state.global_step,
            bar_format="{desc}  {percentage:3.0f}% |{bar}|",
            dynamic_ncols=True,
            leave=False,
        )

    def _text(self, state: TrainState) -> str:
        return f"epoch {count_epochs(state.epoch, self.epochs)}{self.values}"

    def on_step(self, state: TrainState) -> None:
        self.bar.set_description_str(self._text(state), refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_first_step(self, record: Record, state: TrainState) -> None:
        self.on_log(record, state)

    def on_log(self, record: Record, state: TrainState) -> None:
        self.values = f"  {format_short(record)}"
        self.bar.set_description_str(self._text(state))

    def on_end(self) -> None:
        self.bar.close()


class JsonHook(Hook):
    """Write log.txt, one JSON object an epoch; drop the epochs that a resumed run repeats.

    The line of an evaluation within an epoch has no `epoch`, but `after_epochs` and `step`.
    It comes after the other hooks that write values of epochs: if the last epoch is not in log.txt,
    a killed run has perhaps not told them of it.
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        self.path = folder / "log.txt"
        self.written = self.path.read_bytes() if self.path.exists() else b""
        lines = {line + b"\n": position_of(line) for line in self.written.splitlines()}
        now = state.position
        last = now if state.at_phase_end else math.nextafter(now, -math.inf)
        self.content = b"".join(line for line, position in lines.items() if position <= last)
        self.on_end()
        # A run that continues another one in a folder of its own does not have its checkpoint.
        saved = bool(state.stats) and (folder / checkpoint_name(vars(state))).exists()
        self.misses = saved and state.at_phase_end and now not in lines.values()

    def misses_epoch(self, state: TrainState) -> bool:
        return self.misses

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        self.content += json.dumps(log_entry(stats)).encode() + b"\n"
        self.on_end()

    def on_end(self) -> None:
        """Write the lines that are not on the disk yet, perhaps because a write failed."""
        if self.content != self.written:
            write_atomically(self.content, self.path)
            self.written = self.content


class TensorboardHook(Hook):
    """Write TensorBoard scalars by step and epoch, and images.  tensorboard --logdir runs"""

    def __init__(self, folder: Path, state: TrainState, repeats_epoch_end: bool = False) -> None:
        """Hide the points after `state` that an interrupted run has written.

        repeats_epoch_end: the values of an epoch are written again at the step of `state`, of which
            therefore only the training scalars are kept.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "TensorBoard files need tensorboard: pip install tensorboard, or --log_dir none"
            ) from error
        step, self.folder = state.global_step, folder
        self.open = partial(SummaryWriter, str(folder))
        kept = _train_scalars(folder, step) if repeats_epoch_end else []
        self.writer = self.open(purge_step=step if repeats_epoch_end else step + 1)
        for tag, scalar in kept:
            self.writer.add_scalar(tag, scalar.value, step, scalar.wall_time)

    def on_log(self, record: Record, state: TrainState) -> None:
        for key, value in record.items():
            if key not in ("step", "steps"):
                self._write("add_scalar", f"train/{key}", value, state.global_step)

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        if self.writer is None:
            self.folder.mkdir(exist_ok=True)  # fails while the run's own folder is missing
            self.writer = self.open()
        for key, value in stats.items():
            if key.startswith("test_") and isinstance(value, int | float):
                self._write("add_scalar", f"test/{key[5:]}", value, state.global_step)
        self._write("flush")

    def on_image(self, name: str, image: Tensor, state: TrainState) -> None:
        self._write("add_image", name, image, state.global_step)

    def on_end(self) -> None:
        self._write("close")

    def _write(self, method: str, *args: object) -> None:
        """Call the writer. An OSError ends its thread, so `on_epoch` opens another writer."""
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args)
        except OSError:
            self.writer = None
            raise


def _train_scalars(folder: Path, step: int) -> list[tuple[str, Any]]:
    """Read the (tag, scalar event) pairs of `train/*` at a step from TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.exists():
        return []
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()  # 0: all of them
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/")]
    return [(tag, event) for tag in tags for event in events.Scalars(tag) if event.step == step]


class ImageHook(Hook):
    """Write images as PNG files, numbered by epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_image(self, name: str, image: Tensor, state: TrainState) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)  # fails if the run's own folder is missing
        path = self._path(name, state)
        write_atomically(partial(save_image, image, format="png"), path)

    def has_image(self, name: str, state: TrainState) -> bool:
        return self._path(name, state).exists()

    def _path(self, name: str, state: TrainState) -> Path:
        return self.folder / name / f"epoch-{math.ceil(state.position) - 1}.png"


class ConfusionHook(Hook):
    """Write the confusion matrix of the last evaluation into confusion.csv, if there is one.

    classes: names in the order of the head. `confusion_file` names the files of others.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None) -> None:
        self.folder, self.classes = folder, classes

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        for key, matrix in stats.items():
            if name := confusion_file(key):
                write_confusion(matrix, self.classes, self.folder / name)


def build_reporter(
    args: Any,
    folder: Path | None,
    device: torch.device,
    state: TrainState,
    steps_per_epoch: int,
    top5: bool = True,
    classes: Sequence[str] | None = None,
) -> Reporter:
    """Build the reporter; on entering it, rank 0 opens the hooks that the flags choose.

    top5: show top-5 accuracies, which say nothing with five classes or fewer. classes: their names.
    """
    total_steps = count_total(args.epochs, steps_per_epoch)
    open_hooks = partial(_build_hooks, args, folder, top5, classes)
    return Reporter([], device, state, total_steps, steps_per_epoch, args.print_freq, open_hooks)


def _build_hooks(
    args: Any,
    folder: Path | None,
    top5: bool,
    classes: Sequence[str] | None,
    reporter: Reporter,
) -> list[Hook]:
    state, total_steps = reporter.state, reporter.total_steps
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty()  # else `> train.log` needs the lines
    bar = args.progress == "bar" or (args.progress == "auto" and on_terminal)
    hooks: list[Hook] = [LineHook(args.epochs, top5, shown=not (bar and on_terminal))]
    get_logger().info("epochs count from 1 in these lines, from 0 in log.txt and in file names")
    at_epoch_end = state.global_step % reporter.steps_per_epoch == 0 and state.samples_in_epoch > 0
    logs, files = log_folder(args.log_dir, folder), []
    try:
        if folder:
            write_atomically(dump_args(args), folder / "args.yaml")  # for --config
            files = [ConfusionHook(folder, classes), JsonHook(folder, state), ImageHook(folder)]
            at_epoch_end |= files[1].misses
        if logs:
            hooks.append(TensorboardHook(logs, state, at_epoch_end))
    except OSError as error:
        raise UserError(
            f"the run cannot write its logs ({error}); choose another --output_dir or --log_dir, "
            "or free some space"
        ) from error
    bars = [BarHook(args.epochs, state, total_steps)] if bar else []
    return [*bars, *hooks, *files]


def log_folder(log_dir: str | None, output_dir: Path | None) -> Path | None:
    """Return the folder of the TensorBoard files, None for none. log_dir: the flag's value."""
    if log_dir is None:
        return output_dir and output_dir / "tensorboard"
    return None if log_dir in ("", "none") else Path(log_dir)


def log_cost(name: str, model: torch.nn.Module, in_chans: int, size: tuple[int, int]) -> int:
    """Log the number of parameters and the GMACs per image; returns the number of parameters."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counter = FlopCounterMode(display=False)
    model.eval()
    with torch.no_grad(), counter:
        model(torch.zeros(1, in_chans, *size, device=device))
    macs = counter.get_total_flops() / 2
    frozen = sum(p.numel() for p in model.parameters()) - parameters
    count = f"{(parameters + frozen) / 1e6:.2f}M parameters"
    count += f" ({parameters / 1e6:.3g}M trained)" if frozen else ""
    get_logger().info("%s: %s, %.3f GMACs per %dx%d image", name, count, macs / 1e9, *size)
    return parameters
