# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Progress of a run and its checkpoint files: written, rotated, restored.

python -c "from training.checkpoint import TrainState; print(TrainState())"
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from errors import UserError
from parallel import sharding, state_dict
from parallel.process_group import is_main_process
from parallel.sharding import own_part
from parallel.state_dict import whole_state
from utils import link, write_atomically
from weights.files import _is_within, load_weights, numbered_checkpoints, progress


@dataclass
class TrainState:
    """How far a run has come; all of it is stored in a checkpoint."""

    epoch: int = 0  # the epoch that runs, or the next one to run
    updates: int = 0  # groups of micro-batches done, skipped ones included
    bad_steps: int = 0  # updates skipped because something was not finite
    best: dict[str, float] = field(default_factory=dict)  # checkpoint name -> highest accuracy
    seen: int = 0  # images of the epoch that its updates have taken, over all ranks
    effective_batch: int = 0  # images in an update, over all ranks
    within: dict[str, Any] = field(default_factory=dict)  # sums of the epoch and of the guard
    images: int = 0  # of the data set

    def count_updates(self, updates_per_epoch: int, effective_batch: int, images: int) -> None:
        """Count what is behind in updates of this run's size, whatever it was before.

        images: of the data set, which cannot change within an epoch, as its order would.
        """
        if self.seen and self.images not in (0, images):
            raise UserError(
                f"epoch {self.epoch} began on {self.images} images and cannot go on with {images}: "
                "give it the data it had, or go on from the end of an epoch with --resume, into "
                "another --output_dir"
            )
        self.images = images
        here = min(-(-self.seen // effective_batch), updates_per_epoch)
        updates = self.epoch * updates_per_epoch + here
        self.bad_steps = self.bad_steps * updates // max(self.updates, 1)
        self.updates, self.effective_batch = updates, effective_batch

    def end_epoch(self) -> None:
        """All images of the epoch are behind."""
        self.epoch, self.seen = self.epoch + 1, 0
        self.within.pop("means", None)

    def note_best(self, accuracies: Mapping[str, float | None]) -> list[str]:
        """Remember the highest accuracy of each name; returns the names that have a new one."""
        given = {name: value for name, value in accuracies.items() if value is not None}
        better = [name for name, value in given.items() if value > self.best.get(name, -1.0)]
        self.best |= {name: given[name] for name in better}
        return better


def is_finite(model: nn.Module) -> bool:
    """Whether all parameters are, of those that this process has."""
    return all_finite(sharding.local(parameter) for parameter in model.parameters())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers in them are."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def save_model(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
    model_ema: nn.Module | None = None,
    *,
    state: TrainState,
    args: Mapping[str, Any],
    classes: Mapping[str, int] | None = None,
    numbered: bool = True,
    improved: Iterable[str] = (),
    keep: int = 3,
    source: str = "",
    kernels: Callable[[], Mapping[str, Any]] = dict,
    writer: Callable[..., None] | None = None,
) -> None:
    """Write the checkpoints of this moment, atomically, on the main process; all must call it.

    numbered: write `checkpoint-<epoch>.pth`, or within an epoch `checkpoint-<epoch>-seen-<n>.pth`,
        and delete all but `source`, the `keep` newest ends of epochs and two saves in the last.
    improved: `best` writes `checkpoint-best.pth`, complete as well; `best-ema` writes
        `checkpoint-best-ema.pth`, whose `model` is the averaged weights, for use and not resume.
    classes: label by name; stored are the names in the order of the head.
    kernels: returns the choices of models/kernels/autotune.py. writer: what calls write(content),
        perhaps later with a copy.
    Contents are plain types and tensors: they load with `weights_only=True`.
    """
    parts = [part for part in (model, optimizer, model_ema) if part is not None]
    whole = [whole_state(part) for part in parts]
    if not is_main_process():
        return
    weights, moments, *average = whole
    if not all_finite(weights[name] for name, _ in model.named_parameters()):
        raise UserError("the weights are not finite, and nobody could go on from them")
    content = {
        "model": weights,
        "model_ema": average[0] if average else None,
        "optimizer": moments | {"name": type(sharding.own_part(optimizer)).__name__},
        "scaler": scaler.state_dict() if scaler is not None else None,
        "state": asdict(state),
        "args": dict(args),
        "classes": None if classes is None else sorted(classes, key=classes.__getitem__),
        "kernels": kernels(),
    }
    which = {"numbered": numbered, "improved": list(improved), "keep": keep, "source": source}
    write = partial(write_checkpoints, folder, **which)
    writer(content, write) if writer is not None else write(content)


GROUP_STATE = ("step", "lookahead_step", "k")  # what optimizers count in a group, not in a state


def write_checkpoint(content: Any, path: Path) -> None:
    """`torch.save` that leaves the old or the new file, complete; OSError if the disk fails."""

    def save(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # raised by torch's zip writer when the disk is full
            raise OSError(f"torch.save: {str(error).splitlines()[0]}") from error

    write_atomically(save, path)


def checkpoint_name(epoch: int, seen: int) -> str:
    """`checkpoint-<last finished epoch>.pth`, or in an epoch `checkpoint-<it>-seen-<images>.pth`.

    Images, since what an update takes may change within a run.
    """
    return f"checkpoint-{epoch}-seen-{seen}.pth" if seen else f"checkpoint-{epoch - 1}.pth"


def write_checkpoints(
    folder: Path,
    content: dict[str, Any],
    numbered: bool,
    improved: Iterable[str],
    keep: int,
    source: str = "",
) -> None:
    """The files of `utils.save_model`.

    The numbered one comes last: a run that is killed before it repeats the epoch, and writes the
    others again.
    """
    state = content["state"]
    newest = folder / checkpoint_name(state["epoch"], state["seen"])
    complete = [folder / f"checkpoint-{name}.pth" for name in improved if name != "best-ema"]
    complete += [newest] if numbered else []
    if "best-ema" in improved:
        short = {key: content[key] for key in ("state", "args", "classes")}
        write_checkpoint(
            {"model": content["model_ema"], "model_ema": content["model_ema"], **short},
            folder / "checkpoint-best-ema.pth",
        )
    for number, path in enumerate(complete):
        if number == 0:
            write_checkpoint(content, path)
        else:
            link(complete[0], path)
    if numbered:
        _rotate(folder, newest, keep, source)


def _rotate(folder: Path, newest: Path, keep: int, source: str) -> None:
    """Delete all but the `keep` newest ends of epochs, and within an epoch all but two saves.

    source: what the run went on from, which stays as long as it runs.
    """
    paths = numbered_checkpoints(folder)
    ends = [path for path in paths if not _is_within(path)]
    within = [path for path in paths if _is_within(path)]
    for path in ends[keep:] + (within[2:] if newest in within else []):
        if path != newest and path.resolve() != Path(source).resolve():
            path.unlink()
    drop_passed(newest, source)


def drop_passed(newest: Path, source: str = "") -> None:
    """Delete the saves within epochs that end no later than `newest`, itself such an end.

    A run that was killed between its last save and this has left them.
    """
    for path in numbered_checkpoints(newest.parent) if not _is_within(newest) else ():
        passed = _is_within(path) and progress(path) < progress(newest)
        if passed and path.resolve() != Path(source).resolve():
            with contextlib.suppress(OSError):  # they are in nobody's way
                path.unlink()


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, source: str) -> None:
    """Restore the moments; learning rate, decay and betas stay as the flags set them now."""
    name = type(own_part(optimizer)).__name__
    if saved.get("name", name) != name:
        raise UserError(f"{source}: saved by {saved['name']}, this run uses {name}; change --opt")
    kept = GROUP_STATE + ("params",)
    options = [{k: v for k, v in g.items() if k not in kept} for g in optimizer.param_groups]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    if ours != theirs:
        raise UserError(
            f"{source}: its optimizer has parameter groups of {theirs} tensors, this run has "
            f"{ours}; resume with the same --layer_decay, --layer_decay_type and --weight_decay"
        )
    state_dict.load_optimizer(optimizer, saved)
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)


def restore_run(
    checkpoint: Mapping[str, Any],
    source: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
    model_ema: nn.Module | None = None,
) -> None:
    """Put what `utils.save_model` wrote back into the parts of a run."""
    load_weights(model, checkpoint["model"], source)
    load_optimizer(optimizer, checkpoint["optimizer"], source)
    if scaler is not None and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    if model_ema is not None:
        averaged = checkpoint.get("model_ema")
        if averaged is None:
            logging.getLogger("convnextv2").warning(
                "%s has no averaged weights: the average starts from its weights", source
            )
        load_weights(model_ema, averaged or checkpoint["model"], source)
