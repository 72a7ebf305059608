# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parameter groups with layer decay, optimizers by name, schedules by update, moving average.

python -c "import optim_factory; print(optim_factory.cosine(0, 1.0, 0.0, warmup=10, total=100))"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from errors import UserError, resolve
from parallel import sharding
from parallel.process_group import get_logger

UNDECAYED = (".bias", ".gamma", ".beta", "mask_token")  # GRN and the token have 4 axes but no size


def scale_lr(lr: float | None, blr: float, effective_batch: int) -> float:
    """`lr` if given, else `blr` per 256 images of an update."""
    return blr * effective_batch / 256 if lr is None else lr


def choose_update_freq(
    update_freq: int | None,
    effective_batch: int | None,
    batch_size: int,
    processes: int,
    so_far: int = 0,
) -> int:
    """Micro-batches in an update: `update_freq`, or as many as make `effective_batch` images.

    so_far: what a resumed run took, which it keeps on any number of processes unless
    `effective_batch` says otherwise.
    """
    step, log = batch_size * processes, get_logger()
    if so_far and so_far != (effective_batch or so_far):
        log.warning("effective batch %d from here on, it was %d", effective_batch, so_far)
    elif so_far and so_far != step * (update_freq or 1):
        log.warning("kept: the effective batch of %d that the run has had so far", so_far)
    wanted = effective_batch or so_far
    if wanted:
        update_freq, rest = divmod(wanted, step)
        if rest:
            got = f"--batch_size {batch_size} x {processes} processes = {step}"
            whose = f"the run's effective batch {so_far}"
            name = f"--effective_batch {wanted}" if effective_batch else whose
            fixes = _fitting(wanted, batch_size, processes)
            raise UserError(f"{name}: not a multiple of {got}; try {fixes}")
    update_freq = update_freq or 1
    get_logger().info(
        "effective batch %d = %d images x %d micro-batches x %d processes",
        step * update_freq,
        batch_size,
        update_freq,
        processes,
    )
    return update_freq


def _fitting(effective_batch: int, batch_size: int, processes: int) -> str:
    """What to ask for instead: the nearest batch sizes that divide, and effective batches."""
    fixes = []
    share, rest = divmod(effective_batch, processes)
    if not rest:
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        sizes = [size for size in sizes if size % 2 == 0] or sizes  # mixup takes pairs
        below, above = [s for s in sizes if s < batch_size], [s for s in sizes if s > batch_size]
        near = [*below[-1:], *above[:1]]
        fixes.append(f"--batch_size {' or '.join(map(str, near))}")
    step = batch_size * processes
    low = effective_batch // step * step
    near = [low, low + step] if low else [step]
    fixes.append(f"--effective_batch {' or '.join(map(str, near))}")
    return ", or ".join(fixes)


def count_updates(batches: int, update_freq: int) -> int:
    """Updates in an epoch of so many micro-batches; the last may be smaller."""
    if batches < update_freq:
        get_logger().warning(
            "an epoch has %d micro-batches, fewer than the %d of an update: each update is smaller "
            "than its learning rate is meant for; ask for a smaller --effective_batch or "
            "--update_freq",
            batches,
            update_freq,
        )
    return math.ceil(batches / update_freq)


class LayerDecayValueAssigner:
    """Learning-rate factor of a parameter: `decay` to the power of its distance from the head.

    kind: `single` or `group`, as `model.layer_of(name, kind)` understands it.
    """

    def __init__(self, model: nn.Module, decay: float, kind: str = "single") -> None:
        if not hasattr(model, "layer_of"):
            raise UserError(
                f"--layer_decay {decay}: {type(model).__name__} has no layer_of(name, kind) that "
                "says which layer a parameter belongs to; use --layer_decay 1"
            )
        self.model, self.decay, self.kind = model, decay, kind

    def get_layer_id(self, name: str) -> int:
        """0 for the stem, rising to the head."""
        return self.model.layer_of(name, self.kind)

    def get_scale(self, layer: int) -> float:
        """The factor of a layer; 1 for the head."""
        return self.decay ** (self.get_layer_id("head.weight") - layer)


def get_parameter_groups(
    model: nn.Module, weight_decay: float, assigner: LayerDecayValueAssigner | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters grouped by weight decay and learning-rate factor (`lr_scale`).

    Biases, norms, GRN and mask token are not decayed: they shift and scale, they do not mix.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name.endswith(UNDECAYED)
        decay = 0.0 if spared else weight_decay
        scale = assigner.get_scale(assigner.get_layer_id(name)) if assigner else 1.0
        fresh = {"params": [], "weight_decay": decay, "lr_scale": scale, "decayed": not spared}
        groups.setdefault((not spared, scale), fresh)["params"].append(parameter)
    return list(groups.values())


def create_optimizer(
    model: nn.Module,
    opt: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    layer_decay_type: str = "single",
    opt_eps: float | None = None,
    opt_betas: Sequence[float] | None = None,
    momentum: float = 0.9,
    shard: str = "ddp",
) -> torch.optim.Optimizer:
    """Any of timm's optimizers by name, over `get_parameter_groups`.

    lr is the peak of the schedule. opt_eps and opt_betas replace the optimizer's own where given;
    an optimizer that does not have them is an error. shard: `sharding.Parallelism.mode`.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers

    name = opt.lower().removeprefix("lookahead_")
    resolve(name, dict.fromkeys(list_optimizers()), "optimizer", importable=False)
    assigner = None
    if layer_decay < 1.0:
        assigner = LayerDecayValueAssigner(model, layer_decay, layer_decay_type)
    groups = get_parameter_groups(model, weight_decay, assigner)
    given = {"eps": opt_eps, "betas": opt_betas and tuple(opt_betas)}
    given = {key: value for key, value in given.items() if value is not None}
    kind = get_optimizer_class(name, bind_defaults=False)
    in_one_kernel = next(model.parameters()).device.type in ("cpu", "cuda")
    in_one_kernel &= shard != "fsdp" or name.startswith("adam")  # torch spreads no other one
    fused = {"fused": True} if "fused" in signature(kind).parameters and in_one_kernel else {}
    options = {"opt": opt, "lr": lr, "momentum": momentum, **given, **fused}
    try:
        optimizer = sharding.wrap_optimizer(
            partial(create_optimizer_v2, **options), groups, lr, shard
        )
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UserError(f"--opt {opt} with {given}: {error}; try --opt adamw") from error
    taken = sharding.local_optimizer(optimizer).defaults.keys()  # timm leaves out what does not fit
    for key in given.keys() - taken:
        raise UserError(f"--opt {opt} has no {key}; drop --opt_{key}")
    return optimizer


def cosine(update: int, start: float, end: float, *, warmup: int, total: int) -> float:
    """Linear from start/warmup to `start` in `warmup` updates, then half a cosine to `end`.

    The first update does not waste itself on a rate of 0, and the last one gets `end` exactly.
    """
    if update < warmup:
        return start * (update + 1) / warmup
    steps = total - 1 - warmup  # from the peak to the end
    where = (update - warmup) / steps if steps > 0 else float(warmup > 0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(where, 1.0)))


class Schedule:
    """Learning rate and weight decay of every parameter group as a function of updates done.

    updates_per_epoch, epochs: their product is the length. warmup_steps, when 0 or more, counts
    updates and replaces warmup_epochs. weight_decay_end: None keeps the decay constant.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        updates_per_epoch: int,
        epochs: int,
        lr: float,
        min_lr: float = 0.0,
        warmup_epochs: float = 0,
        warmup_steps: int = -1,
        weight_decay: float = 0.05,
        weight_decay_end: float | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.total = updates_per_epoch * epochs
        self.warmup = round(warmup_epochs * updates_per_epoch)
        if warmup_steps >= 0:
            self.warmup = warmup_steps
        self.lr, self.min_lr = lr, min_lr
        self.decay = weight_decay
        self.decay_end = weight_decay if weight_decay_end is None else weight_decay_end
        if self.warmup >= self.total:
            get_logger().warning(
                "warm-up of %d updates is the whole run of %d: the learning rate never falls",
                self.warmup,
                self.total,
            )

    def rate(self, update: int) -> float:
        """The base learning rate of the update that follows `update` others."""
        return cosine(update, self.lr, self.min_lr, warmup=self.warmup, total=self.total)

    def apply(self, update: int) -> float:
        """Set the values for the update that follows `update` others; returns the base rate."""
        lr = self.rate(update)
        decay = cosine(update, self.decay, self.decay_end, warmup=0, total=self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = decay if group["decayed"] else 0.0
        return lr


def build_optimizer(
    args: Any,
    model: nn.Module,
    lr: float,
    layer_decay: float = 1.0,
    kind: str = "single",
    shard: str = "ddp",
) -> torch.optim.Optimizer:
    """`create_optimizer` as the flags say; kind: of the layer decay."""
    return create_optimizer(
        model,
        args.opt,
        lr=lr,
        weight_decay=args.weight_decay,
        layer_decay=layer_decay,
        layer_decay_type=kind,
        opt_eps=args.opt_eps,
        opt_betas=args.opt_betas,
        momentum=args.momentum,
        shard=shard,
    )


def build_schedule(
    args: Any, optimizer: torch.optim.Optimizer, lr: float, updates_per_epoch: int
) -> Schedule:
    """`Schedule` as the flags say."""
    return Schedule(
        optimizer,
        updates_per_epoch=updates_per_epoch,
        epochs=args.epochs,
        lr=lr,
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay_end,
    )
