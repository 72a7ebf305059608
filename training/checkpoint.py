# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoints of a run: their content, written atomically and rotated, and how to restore it.

python -c "from training.checkpoint import TrainState; print(TrainState())"
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import UserError, first_few
from models.kernels.autotune import autotuner
from parallel.process_group import get_logger, is_main_process
from parallel.state_dict import full_state_dict, load_optimizer, optimizer_name
from training.meters import is_better
from training.steps import Steps
from utils import link, write_atomically
from weights.files import load_weights, numbered_checkpoints, parse_checkpoint_name

OLD_NAMES = {"updates": "global_step", "seen": "samples_in_epoch", "within": "epoch_sums"}


@dataclass
class TrainState:
    """Progress of a run; a checkpoint stores all of it."""

    epoch: int = 0  # the current epoch, or the next one to run
    global_step: int = 0  # optimizer steps, skipped ones included
    bad_steps: int = 0  # steps that were skipped or rolled back
    best: dict[str, float] = field(default_factory=dict)  # checkpoint name -> best metric
    samples_in_epoch: int = 0  # images trained on in this epoch, over all ranks
    effective_batch: int = 0  # images in an optimizer step, over all ranks; see `Steps.base`
    epoch_sums: dict[str, Any] = field(default_factory=dict)  # of the meters and the anomaly guard
    images: int = 0  # in the data set
    best_epochs: dict[str, float] = field(default_factory=dict)  # epochs done at `best`
    stats: dict[str, Any] = field(default_factory=dict)  # of the last finished phase, for log.txt
    best_metric: str = "acc1"  # that `best` holds
    lower_is_better: bool = False  # of this metric
    phase_end: int = 0  # images of this epoch at the end of its last finished phase
    steps_per_epoch: int = 0  # optimizer steps of this epoch
    since_best: int = 0  # evaluations in a row without a better metric, for --patience
    watched: dict[str, float] = field(default_factory=dict)  # the metrics that it compares with
    epoch_start: int = 0  # `global_step` at the beginning of this epoch
    probed: dict[str, list] = field(default_factory=dict)  # what the next probe goes by

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "TrainState":
        """Return the state that a checkpoint of this or an earlier version stores."""
        return cls(**{OLD_NAMES.get(name, name): value for name, value in saved.items()})

    def recount_steps(self, steps: Steps, images: int) -> None:
        """Express the progress so far in steps of this run's batch size.

        images: in the data set; it cannot change within an epoch, since the order would change.
        """
        if self.samples_in_epoch and self.images not in (0, images):
            raise UserError(
                f"epoch {self.epoch + 1} began with {self.images} images and cannot resume with "
                f"{images}; restore the data, or pass a checkpoint from the end of an epoch to "
                "--resume, with another --output_dir"
            )
        self.images = images
        self.steps_per_epoch, in_step = steps.of(self.epoch)
        self.epoch_start, (_, self.effective_batch) = steps.before(self.epoch), steps.base
        in_epoch = min(-(-self.samples_in_epoch // in_step), self.steps_per_epoch)
        done = self.epoch_start + in_epoch
        self.bad_steps = self.bad_steps * done // max(self.global_step, 1)
        self.global_step = done

    @property
    def position(self) -> float:
        """Number of epochs done: an integer at the end of one, otherwise such as 1.25."""
        if not self.samples_in_epoch:
            return self.epoch
        in_epoch = (self.global_step - self.epoch_start) / max(self.steps_per_epoch, 1)
        return round(self.epoch + in_epoch, 6)

    @property
    def at_phase_end(self) -> bool:
        """True if the phase that ends here, with its evaluation, is finished."""
        return self.phase_end == self.samples_in_epoch

    def end_epoch(self, steps: Steps) -> None:
        """Advance to the next epoch."""
        self.epoch, self.samples_in_epoch, self.phase_end = self.epoch + 1, 0, 0
        self.steps_per_epoch, self.epoch_start = steps.of(self.epoch)[0], steps.before(self.epoch)
        self.epoch_sums.pop("means", None)

    def choose_best(self, metric: str, lower_is_better: bool) -> None:
        """Set the metric that chooses the best epoch; another one than before starts again."""
        if metric != self.best_metric and self.best:
            text = "--best_metric %s (was %s): the next evaluated epoch becomes the best"
            get_logger().warning(text, metric, self.best_metric)
            self.best, self.best_epochs, self.watched, self.since_best = {}, {}, {}, 0
        self.best_metric, self.lower_is_better = metric, lower_is_better

    def update_best(self, values: Mapping[str, float | None]) -> list[str]:
        """Store the best value of each name; returns the names that have a new one."""
        improved = [
            name
            for name, value in values.items()
            if is_better(value, self.best.get(name), self.lower_is_better)
        ]
        # New ones, since a save that fails puts the old ones back.
        self.best = self.best | {name: values[name] for name in improved}
        self.best_epochs = self.best_epochs | dict.fromkeys(improved, self.position)
        return improved

    def improves(self, value: float | None) -> bool:
        """Return True if this metric of the weights, without EMA, is better than any before."""
        return is_better(value, self.best.get("best"), self.lower_is_better)

    def count_without_better(self, values: Mapping[str, float | None], min_delta: float) -> None:
        """Count evaluations in a row in which no value is better by more than `min_delta`.

        values: name -> metric, as for `update_best`; the first value of a name is better.
        """
        change = min_delta if self.lower_is_better else -min_delta
        better = {
            name: value
            for name, value in values.items()
            if value is not None
            and is_better(value + change, self.watched.get(name), self.lower_is_better)
        }
        self.watched = self.watched | better
        self.since_best = 0 if better else self.since_best + 1


@dataclass
class TrainableParts:
    """The objects that training changes: what a checkpoint or a snapshot saves and restores."""

    model: nn.Module  # without DistributedDataParallel around it
    optimizer: Optimizer
    scaler: Any = None
    model_ema: nn.Module | None = None
    loss: nn.Module | None = None  # None if it has no parameters or buffers of its own

    def __post_init__(self) -> None:
        self.loss = self.loss if self.loss is not None and self.loss.state_dict() else None

    def present(self) -> list[Any]:
        """Return the parts that exist, the model first."""
        parts = (self.model, self.optimizer, self.scaler, self.model_ema, self.loss)
        return [part for part in parts if part is not None]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if the tensors hold no NaN and no Inf."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def collect_checkpoint(
    parts: TrainableParts, state: TrainState, entries: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Content of a checkpoint on the main process, None on others; every rank must call it.

    entries: plain values to store as well: `args`; `classes`, names in the order of the head.
    All of it is plain types and tensors, so it loads with `weights_only=True`.
    """
    weights, optimizer = full_state_dict(parts.model), full_state_dict(parts.optimizer)
    ema = full_state_dict(parts.model_ema) if parts.model_ema is not None else None
    loss = {"loss": full_state_dict(parts.loss)} if parts.loss is not None else {}
    if not is_main_process():
        return None
    if not all_finite(weights[name] for name, _ in parts.model.named_parameters()):
        raise UserError("the weights are not finite, so no run could resume from them")
    return {
        "model": weights,
        "model_ema": ema,
        "optimizer": optimizer | {"name": optimizer_name(parts.optimizer)},
        "scaler": parts.scaler.state_dict() if parts.scaler is not None else None,
        "state": asdict(state),
        "kernels": autotuner.state(),
        **loss,
        **entries,
    }


def write_checkpoint(content: Any, path: Path) -> None:
    """`torch.save` that leaves the old or the new file, complete."""
    write_atomically(lambda file: torch.save(content, file), path)


def checkpoint_name(state: Mapping[str, Any]) -> str:
    """`checkpoint-<last finished epoch>.pth`, or `checkpoint-<current epoch>-seen-<images>.pth`.

    Images and not steps, since the batch size may change within a run.
    """
    epoch, images = state["epoch"], state["samples_in_epoch"]
    return f"checkpoint-{epoch}-seen-{images}.pth" if images else f"checkpoint-{epoch - 1}.pth"


def write_checkpoints(
    folder: Path,
    content: Mapping[str, Any],
    numbered: bool = True,
    improved: Iterable[str] = (),
    keep: int = 3,
    source: str = "",
) -> None:
    """Write the checkpoints of an epoch end or of a step, each atomically.

    numbered: write `checkpoint-<epoch>.pth`, within an epoch `checkpoint-<epoch>-seen-<n>.pth`,
        and delete old ones but the `keep` newest and `source`, which the run resumed from.
    improved: `best` writes `checkpoint-best.pth`, complete as well; `best-ema` writes
        `checkpoint-best-ema.pth`, whose `model` is the EMA weights, for use and not to resume.
    The numbered one comes last: a run killed earlier continues from the best, or repeats the epoch.
    """
    newest = folder / checkpoint_name(content["state"])
    if "best-ema" in improved:
        run_only = ("optimizer", "scaler", "kernels")
        ema = {key: value for key, value in content.items() if key not in run_only}
        ema["model"] = content["model_ema"]
        write_checkpoint(ema, folder / "checkpoint-best-ema.pth")
    complete = [folder / f"checkpoint-{name}.pth" for name in improved if name != "best-ema"]
    complete += [newest] if numbered else []
    for number, path in enumerate(complete):
        link(complete[0], path) if number else write_checkpoint(content, path)
    if numbered:
        rotate(newest, keep, source)


def rotate(newest: Path, keep: int, source: str = "") -> None:
    """Delete numbered checkpoints but the `keep` newest ends of epochs and `source`.

    Of saves within epochs two stay while their epoch runs, none after its end.
    """
    paths = numbered_checkpoints(newest.parent)
    in_epoch = [path for path in paths if parse_checkpoint_name(path)[1] > 0]
    old = [path for path in paths if path not in in_epoch][keep:]
    if newest in in_epoch:
        old += in_epoch[2:]
    else:
        now = parse_checkpoint_name(newest)
        old += [path for path in in_epoch if parse_checkpoint_name(path) < now]
    for path in old:
        if path != newest and path.resolve() != Path(source).resolve():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def restore_run(checkpoint: Mapping[str, Any], source: str, parts: TrainableParts) -> None:
    """Load a checkpoint of `write_checkpoints` into the parts of a run."""
    load_weights(parts.model, checkpoint["model"], source)
    restore_loss(checkpoint, source, parts.loss)
    load_optimizer(parts.optimizer, checkpoint["optimizer"], source)
    if parts.scaler is not None and checkpoint.get("scaler"):
        parts.scaler.load_state_dict(checkpoint["scaler"])
    if parts.model_ema is not None:
        ema = checkpoint.get("model_ema")
        if ema is None:
            get_logger().warning("%s has no EMA weights: the EMA starts from its weights", source)
        load_weights(parts.model_ema, ema or checkpoint["model"], source)


def restore_loss(checkpoint: Mapping[str, Any], source: str, loss: nn.Module | None) -> None:
    """Load the parameters of a loss; UserError if the checkpoint has others, or only one has any.

    loss: None if it has none.
    """
    saved = (checkpoint.get("loss") if isinstance(checkpoint, Mapping) else None) or {}
    expected = loss.state_dict() if loss is not None else {}
    if saved.keys() != expected.keys():
        names = [first_few(held) or "none" for held in (saved, expected)]
        raise UserError(
            f"{source} has these parameters of a loss: {names[0]}; this --loss: {names[1]}. Give "
            "the --loss of that run"
        )
    if loss is not None:
        load_weights(loss, saved, source)
