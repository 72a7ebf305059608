# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Observers of a run: log lines or a progress bar, log.txt, TensorBoard, pictures.

python main_pretrain.py --data_set SYNTHETIC --model convnextv2_atto --output_dir runs/look
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import parser as options
from datasets import Batches
from errors import UserError
from models.kernels.autotune import autotuner, only_torch
from parallel import process_group
from training import pictures, run_lock
from training.checkpoint import TrainState
from training.meters import Means
from utils import write_atomically

Record = dict[str, float]


class Hook:
    """What a run tells: override what you want to hear. Hooks never change a number."""

    def on_update(self, state: TrainState) -> None:
        """After every update; no values, so no host sync."""

    def on_log(self, record: Record, state: TrainState) -> None:
        """Every `print_freq` updates: means since the last time, speed, time left."""

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        """After training and evaluation of an epoch: what goes into log.txt."""

    def on_picture(self, name: str, picture: Tensor, state: TrainState) -> None:
        """A picture (3, H, W) in 0 to 1 was made."""

    def on_end(self) -> None:
        """The run is over, or broke off."""


class Reporter:
    """Reads meters and clock at log lines and tells the hooks.

    Every rank makes one, since reading meters is collective; only the main process has hooks.
    updates_all: updates of the whole run, for the time left.
    """

    def __init__(
        self,
        hooks: Sequence[Hook],
        device: torch.device,
        state: TrainState,
        updates_all: int,
        updates_per_epoch: int,
        print_freq: int,
    ) -> None:
        self.hooks, self.device, self.state = hooks, device, state
        self.updates_all, self.updates_per_epoch = updates_all, updates_per_epoch
        self.print_freq = print_freq
        self.began, self.began_at = time.perf_counter(), state.updates
        self.told_kernels = False

    def begin_epoch(self, names: Sequence[str], batches: Batches, state: TrainState) -> Means:
        """Meters for an epoch on `batches`: fresh, or as they were when it broke off."""
        self.means, self.batches = Means(names, self.device), batches
        if "means" in state.within:
            self.means.restore(state.within["means"])
        self._restart_window()
        return self.means

    def _restart_window(self) -> None:
        self.since, self.images = time.perf_counter(), 0
        self.waited = self.batches.wait_seconds

    def after_batch(self, images: int) -> None:
        """A micro-batch of so many images went by."""
        self.images += images * process_group.get_world_size()

    def after_update(self, lr: float) -> bool:
        """An update is done; a log line reads the meters on every rank. Returns if this was one."""
        self._tell("on_update", self.state)
        step = (self.state.updates - 1) % self.updates_per_epoch + 1
        if step % self.print_freq and step != self.updates_per_epoch:
            return False
        record = self.means.read()
        now = time.perf_counter()
        window = max(now - self.since, 1e-9)
        done = self.state.updates - self.began_at
        record |= {
            "lr": lr,
            "images_per_s": self.images / window,
            "data_wait": (self.batches.wait_seconds - self.waited) / window,
            "memory_mb": self._memory_mb(),
            "eta_s": (now - self.began) / done * (self.updates_all - self.state.updates),
            "step": step,
            "steps": self.updates_per_epoch,
        }
        self._tell("on_log", record, self.state)
        if not self.told_kernels:  # at the first line every choice is made
            process_group.get_logger().info("kernels %s", autotuner.summary())
            self.told_kernels = True
        self._restart_window()
        return True

    def end_epoch(self, stats: Record) -> None:
        """Tell what log.txt gets for the epoch, if the folder is still this run's."""
        run_lock.check()
        self._tell("on_epoch", stats, self.state)

    def picture(self, name: str, picture: Tensor) -> None:
        """Show a picture."""
        self._tell("on_picture", name, picture, self.state)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tell("on_end")

    def _tell(self, what: str, *about: object) -> None:
        """Call each hook; one that cannot write does not end the run."""
        for hook in self.hooks:
            try:
                getattr(hook, what)(*about)
            except OSError as error:
                process_group.get_logger().warning(
                    "%s cannot write: %s", type(hook).__name__, error
                )

    def _memory_mb(self) -> float:
        """Largest memory so far: of the GPU if there is one, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB here
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def clock(seconds: float) -> str:
    """3723.4 -> 1:02:03"""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


class LineHook(Hook):
    """A line at every log point, a line an epoch: for files and schedulers' logs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_log(self, record: Record, state: TrainState) -> None:
        process_group.get_logger().info(
            "epoch %d/%d  step %d/%d  %s",
            state.epoch + 1,
            self.epochs,
            record["step"],
            record["steps"],
            describe(record),
        )

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        process_group.get_logger().info(
            "epoch %d/%d done  %s", state.epoch, self.epochs, summary(stats)
        )


def describe(record: Record) -> str:
    """The values of a log line."""
    return (
        f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}  "
        f"{record['images_per_s']:.0f} img/s  data {100 * record['data_wait']:.0f}%  "
        f"mem {record['memory_mb']:.0f} MB  eta {clock(record['eta_s'])}"
    )


def summary(stats: Record) -> str:
    """The losses and accuracies of an epoch."""
    shown = [key for key in stats if key.endswith("loss") or "acc" in key]
    return "  ".join(f"{key} {stats[key]:.4g}" for key in shown)


class BarHook(Hook):
    """One progress bar over the whole run, for a person at a terminal."""

    def __init__(self, epochs: int, state: TrainState, updates_all: int) -> None:
        from tqdm import tqdm

        self.epochs = epochs
        self.bar = tqdm(
            total=updates_all, initial=state.updates, unit="update", dynamic_ncols=True, leave=False
        )

    def on_update(self, state: TrainState) -> None:
        self.bar.update(state.updates - self.bar.n)

    def on_log(self, record: Record, state: TrainState) -> None:
        self.bar.set_description(f"epoch {state.epoch + 1}/{self.epochs}")
        self.bar.set_postfix_str(describe(record).split("  eta")[0])

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        self.bar.write(f"epoch {state.epoch}/{self.epochs}  {summary(stats)}")

    def on_end(self) -> None:
        self.bar.close()


class JsonHook(Hook):
    """log.txt: one JSON object an epoch. What a resumed run is about to repeat is taken out."""

    def __init__(self, folder: Path, state: TrainState) -> None:
        self.path, self.unwritten = folder / "log.txt", ""
        if self.path.exists():
            content = self.path.read_bytes()  # not all of it text, after a crash
            lines = [line + b"\n" for line in content.splitlines()]
            kept = [line for line in lines if self._epoch(line) < state.epoch]
            if b"".join(kept) != content:
                write_atomically(b"".join(kept), self.path)

    @staticmethod
    def _epoch(line: bytes) -> float:
        try:
            return json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):  # half a line, or bytes that are no text
            return math.inf

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in stats.items()
        }
        self.unwritten += json.dumps(finite) + "\n"  # NaN would not be JSON
        self.on_end()

    def on_end(self) -> None:
        """Write what is not written yet, whole lines or, on a full disk, nothing."""
        if not self.unwritten:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write(self.unwritten)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self.unwritten = ""


class TensorboardHook(Hook):
    """Scalars by update and epoch, and pictures.  tensorboard --logdir runs"""

    def __init__(self, folder: Path, state: TrainState, at_end: bool = False) -> None:
        """at_end: of its epoch, which is told again at the update that the run goes on from."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "TensorBoard files need tensorboard: pip install tensorboard, or --log_dir none"
            ) from error
        self.folder, self.open = folder, partial(SummaryWriter, str(folder))
        try:
            kept = train_points(folder, state.updates) if at_end else {}
            self.writer = self.open(purge_step=state.updates + (not at_end))
            for tag, (value, seconds) in kept.items():
                self.writer.add_scalar(tag, value, state.updates, seconds)
        except OSError as error:
            raise UserError(f"--log_dir {folder}: cannot write there ({error.strerror})") from error

    def on_log(self, record: Record, state: TrainState) -> None:
        for key, value in record.items():
            if key not in ("step", "steps"):
                self._write("add_scalar", f"train/{key}", value, state.updates)

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        if self.writer is None:
            self.folder.mkdir(exist_ok=True)  # not the run's folder, where that vanished
            self.writer = self.open()
        for key, value in stats.items():
            if key.startswith("test_"):
                self._write("add_scalar", f"test/{key[5:]}", value, state.updates)
        self._write("flush")

    def on_picture(self, name: str, picture: Tensor, state: TrainState) -> None:
        self._write("add_image", name, picture, state.updates)

    def on_end(self) -> None:
        self._write("close")

    def _write(self, what: str, *point: object) -> None:
        """After an OSError the writer's thread is dead: nothing more until the next epoch."""
        if self.writer is None:
            return
        try:
            getattr(self.writer, what)(*point)
        except OSError:
            with contextlib.suppress(OSError):
                self.writer.close()
            self.writer = None
            raise


def train_points(folder: Path, step: int) -> dict[str, tuple[float, float]]:
    """tag -> (value, time) of what TensorBoard's files hold of training at a step."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            values = event.summary.value if event.step == step else ()
            train = [value for value in values if value.tag.startswith("train/")]
            found |= {value.tag: (value.simple_value, event.wall_time) for value in train}
    return found


class PictureHook(Hook):
    """Pictures as PNG files, numbered by the epoch after which they were made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_picture(self, name: str, picture: Tensor, state: TrainState) -> None:
        place = self.folder / name
        place.mkdir(exist_ok=True)  # in the run's folder, which is not made anew where it vanished
        (place / f"epoch-{state.epoch - 1}.png").write_bytes(pictures.png(picture))


def build_reporter(
    args: Any,
    folder: Path | None,
    device: torch.device,
    state: TrainState,
    updates_per_epoch: int,
) -> Reporter:
    """The hooks that the flags ask for, on the main process, and the reporter that tells them."""
    updates_all = updates_per_epoch * args.epochs
    found: list[Hook] = []
    process_group.from_main_process(
        lambda: found.extend(_build_hooks(args, folder, state, updates_per_epoch))
    )
    return Reporter(found, device, state, updates_all, updates_per_epoch, args.print_freq)


def _build_hooks(
    args: Any, folder: Path | None, state: TrainState, updates_per_epoch: int
) -> list[Hook]:
    watched = args.progress == "bar" or (args.progress == "auto" and sys.stderr.isatty())
    found: list[Hook] = [LineHook(args.epochs)]
    if watched:
        found = [BarHook(args.epochs, state, updates_per_epoch * args.epochs)]
    try:
        if folder:
            write_atomically(options.dump_args(args), folder / "args.yaml")  # --config takes it
            found += [JsonHook(folder, state), PictureHook(folder)]
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot write args.yaml and log.txt there "
            f"({error.strerror}); choose a folder you own or free some space"
        ) from error
    log_dir = args.log_dir if args.log_dir is not None else folder and folder / "tensorboard"
    if log_dir and log_dir != "none":
        at_end = state.seen > 0 and state.updates % updates_per_epoch == 0
        found.append(TensorboardHook(Path(log_dir), state, at_end))
    return found


def log_cost(
    model: torch.nn.Module, in_chans: int, size: tuple[int, int], device: torch.device
) -> int:
    """Log parameters and the forward cost of one image; returns the number of parameters."""
    from torch.utils.flop_counter import FlopCounterMode

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counter = FlopCounterMode(display=False)
    model.eval()
    with torch.no_grad(), only_torch(), counter:
        model(torch.zeros(1, in_chans, *size, device=device))
    process_group.get_logger().info(
        "%s: %.2fM parameters, %.3f GMAC an image forward",
        type(model).__name__,
        parameters / 1e6,
        counter.get_total_flops() / 2e9,
    )
    return parameters
