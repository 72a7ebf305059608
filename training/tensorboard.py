# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""TensorBoard files: scalars and images; on demand histograms, the graph and hyper-parameters.

python main_finetune.py --recipe digits_finetune --output_dir runs/digits --hook histograms
"""

import copy
import warnings
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.flags import as_typed, is_pretraining
from errors import UserError
from insight.health import is_measure
from parallel.state_dict import full_state_dict
from training.checkpoint import TrainState
from training.hooks import Hook, Run
from training.log_files import at_least
from training.report import Record


def log_folder(log_dir: str | None, output_dir: Path | None) -> Path | None:
    """Return the folder of the TensorBoard files, None for none. log_dir: the flag's value."""
    if log_dir is None:
        return output_dir and output_dir / "tensorboard"
    return None if log_dir in ("", "none") else Path(log_dir)


def scalar_tag(name: str) -> str:
    """Return the tag of a value of an epoch by its name in log.txt, '' for one that is not shown.

    `test/acc1`, `probe/knn`, `health/rank_me`.
    """
    if name.startswith(("test_", "probe_")):
        return name.replace("_", "/", 1)
    return f"health/{name}" if is_measure(name) else ""


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

    def on_start(self, run: Run) -> None:
        run.tensorboard = self

    def on_log(self, record: Record, state: TrainState) -> None:
        for key, value in record.items():
            if key not in ("step", "steps"):
                self.write("add_scalar", f"train/{key}", value, state.global_step)

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        if self.writer is None:
            self.folder.mkdir(exist_ok=True)  # fails while the run's own folder is missing
            self.writer = self.open()
        for key, value in stats.items():
            if (tag := scalar_tag(key)) and isinstance(value, int | float):
                self.write("add_scalar", tag, value, state.global_step)
        self.write("flush")

    def on_image(self, name: str, image: Tensor, state: TrainState) -> None:
        self.write("add_image", name, image, state.global_step)

    def on_end(self, run: Run) -> None:
        self.write("close")

    def __getattr__(self, name: str) -> Any:
        """Offer `add_scalar` and others of SummaryWriter to hooks; they survive a full disk."""
        if name.startswith("add_"):
            return partial(self.write, name)
        raise AttributeError(name)

    def write(self, method: str, *args: object) -> None:
        """Call a method of the SummaryWriter.

        An OSError ends its thread, so `on_epoch` opens another writer.
        """
        if self.writer is None:
            return
        try:
            attrgetter(method)(self.writer)(*args)
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


class BoardHook(Hook):
    """Base of the hooks that write to the files of `TensorboardHook`.

    A second writer in its folder would stop TensorBoard from reading the first one while it runs.
    """

    name = ""  # in the table of hooks

    def check(self, args: Any) -> None:
        own = None if args.log_dir is None else args.log_dir not in ("", "none")
        if own is False or (own is None and args.output_dir == ""):
            fix = "give --output_dir or --log_dir"
            if own is False:
                fix = "--log_dir none turns them off, so drop it"
            raise UserError(
                f"--hook {self.name} writes to TensorBoard files, and there are none; {fix}"
            )


class HistogramHook(BoardHook):
    """Write histograms of all weights to TensorBoard, every so many epochs."""

    name, every_rank = "histograms", True  # gathers sharded weights

    def __init__(self, every: int = 1) -> None:
        self.every = at_least(every, 1, "histograms(every)")

    def on_start(self, run: Run) -> None:
        self.run = run

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        if state.epoch % self.every or state.samples_in_epoch:  # an evaluation within an epoch
            return
        weights = full_state_dict(self.run.model)
        if self.run.tensorboard is None:  # other ranks
            return
        for name, values in weights.items():
            values = values.float().flatten()
            values = values[torch.isfinite(values)].cpu()
            if len(values):
                step = state.global_step
                self.run.tensorboard.add_histogram(f"weights/{name}", values, step)


class GraphHook(BoardHook):
    """Write the graph of the network to TensorBoard, traced on the CPU with one blank image."""

    name = "graph"

    def check(self, args: Any) -> None:
        super().check(args)
        if args.shard == "fsdp":
            raise UserError("--hook graph cannot trace sharded weights; use --shard ddp or zero1")
        if is_pretraining(vars(args)):
            raise UserError(
                "--hook graph: masked autoencoders choose patches by index, which a trace would "
                "fix; drop it"
            )

    def on_start(self, run: Run) -> None:
        model = copy.deepcopy(run.model).cpu().eval()
        image = torch.zeros(1, run.args.in_chans, *run.args.input_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants in the trace
            run.tensorboard.add_graph(model, image)


class HparamsHook(BoardHook):
    """Write the flags to TensorBoard's table of runs, with the metrics of the last epoch.

    It has the flags that were given, and those that matter most; the metrics are test/*, or else
    train/loss, of the same files. SummaryWriter.add_hparams would create a folder for each call.
    """

    name = "hparams"
    ALWAYS = ("model", "epochs", "batch_size", "lr", "blr", "weight_decay", "drop_path", "seed")
    NEVER = ("output_dir", "log_dir", "hook", "tracker", "config", "recipe", "device", "progress")

    def on_end(self, run: Run) -> None:
        if not run.is_complete or not run.state.stats:
            return
        from torch.utils.tensorboard.summary import hparams

        given = getattr(run.args, "given", frozenset())
        flags = {
            name: value if isinstance(value, bool | int | float | str) else as_typed(value)
            for name, value in vars(run.args).items()
            if (name in given or name in self.ALWAYS) and name not in self.NEVER
        }
        stats = {name: x for name, x in run.state.stats.items() if isinstance(x, int | float)}
        metrics = {f"test/{name[5:]}": x for name, x in stats.items() if name.startswith("test_")}
        for summary in hparams(flags, metrics or {"train/loss": stats["train_loss"]}):
            run.tensorboard.write("file_writer.add_summary", summary)
