# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parameter groups with layer decay, optimizers by name, learning-rate schedule.

python -c "import optim_factory; print(optim_factory.cosine(0, 1.0, 0.0, warmup=10, total=100))"
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from config.flags import is_pretraining
from data_loading.rng import fold_in
from errors import UserError, plural, resolve
from parallel import sharding
from parallel.process_group import get_logger

INITIAL_STD = 0.02  # of the weights
# Parts of the names of optimizers whose steps do not grow with the gradients.
BOUNDED = ("adam", "adan", "lamb", "lion")
# GRN parameters and the mask token have 4 dimensions, so `ndim <= 1` would miss them. `.gamma` is
# also layer scale in ConvNeXt V1.
NO_WEIGHT_DECAY = (".bias", ".gamma", ".beta", "mask_token")


def scale_lr(lr: float | None, blr: float, effective_batch: int) -> float:
    """Return `lr`, or if it is None `blr * effective_batch / 256`."""
    return blr * effective_batch / 256 if lr is None else lr


def choose_update_freq(
    update_freq: int | None,
    effective_batch: int | None,
    batch_size: int,
    world_size: int,
    resumed_batch: int = 0,
) -> int:
    """Gradient accumulation steps: `update_freq`, or as many as `effective_batch` images need.

    resumed_batch: effective batch of the run that is resumed (0 for none). The run keeps it on any
        number of processes unless `effective_batch` is given.
    """
    global_batch, log = batch_size * world_size, get_logger()
    if resumed_batch and resumed_batch != (effective_batch or resumed_batch):
        log.warning("effective batch changes from %d to %d", resumed_batch, effective_batch)
    elif resumed_batch and resumed_batch != global_batch * (update_freq or 1):
        log.warning("effective batch stays %d, as in the run that is resumed", resumed_batch)
    wanted = effective_batch or resumed_batch  # 0: not given
    if wanted % global_batch:
        name = f"--effective_batch {wanted}"
        if not effective_batch:
            name = f"the effective batch {wanted} of the resumed run"
        raise UserError(
            f"{name} is not a multiple of --batch_size {batch_size} x "
            f"{plural(world_size, 'process')} = {global_batch}; "
            f"try {_fitting(wanted, batch_size, world_size)}"
        )
    update_freq = wanted // global_batch or update_freq or 1
    log.info(
        "effective batch %d = %s x %s x %s",
        global_batch * update_freq,
        plural(batch_size, "image"),
        plural(update_freq, "micro-batch"),
        plural(world_size, "process"),
    )
    return update_freq


def _fitting(effective_batch: int, batch_size: int, world_size: int) -> str:
    """Suggest the nearest batch sizes that divide it, or else the nearest effective batches."""
    per_process, rest = divmod(effective_batch, world_size)
    if rest:
        step = batch_size * world_size
        low = effective_batch // step * step
        return f"--effective_batch {low} or {low + step}" if low else f"--effective_batch {step}"
    sizes = [size for size in range(1, per_process + 1) if per_process % size == 0]
    sizes = [size for size in sizes if size % 2 == 0] or sizes  # mixup takes pairs
    below, above = [s for s in sizes if s < batch_size], [s for s in sizes if s > batch_size]
    return f"--batch_size {' or '.join(map(str, below[-1:] + above[:1]))}"


def count_steps(batches: int, update_freq: int) -> int:
    """Optimizer steps in an epoch of `batches` micro-batches; the last may be smaller."""
    if batches < update_freq:
        get_logger().warning(
            "an epoch has %d micro-batches, fewer than the %d of an optimizer step: every step "
            "uses fewer images than its learning rate assumes; lower --effective_batch or "
            "--update_freq",
            batches,
            update_freq,
        )
    return math.ceil(batches / update_freq)


class LayerDecayValueAssigner:
    """Learning-rate scale of a parameter: `decay` to the power of its distance from the head.

    kind: `single` (every block is a layer) or `group` (see `ConvNeXtV2.layer_of`).
    """

    def __init__(self, model: nn.Module, decay: float, kind: str = "single") -> None:
        if not hasattr(model, "layer_of"):
            raise UserError(
                f"--layer_decay {decay} needs a model with a method layer_of(name, kind) that "
                f"returns a parameter's layer; {type(model).__name__} has none: use --layer_decay 1"
            )
        self.model, self.decay, self.kind = model, decay, kind

    def get_layer_id(self, name: str) -> int:
        """Layer of a parameter, counted from the stem, which is 0."""
        return self.model.layer_of(name, self.kind)

    def get_scale(self, layer: int) -> float:
        """Learning-rate scale of a layer; 1 for the head."""
        return self.decay ** (self.get_layer_id("head.weight") - layer)


def get_parameter_groups(
    model: nn.Module, weight_decay: float, assigner: LayerDecayValueAssigner | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and learning-rate scale (`lr_scale`).

    Biases, norms, GRN, layer scale, the mask token and what the network itself exempts get no
    weight decay.
    """
    exempt = _exempt_from_decay(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(NO_WEIGHT_DECAY)
        decayed = decayed and not any(fnmatchcase(name, pattern) for pattern in exempt)
        decay = weight_decay if decayed else 0.0
        scale = assigner.get_scale(assigner.get_layer_id(name)) if assigner else 1.0
        new = {"params": [], "weight_decay": decay, "lr_scale": scale, "decayed": decayed}
        groups.setdefault((decayed, scale), new)["params"].append(parameter)
    return list(groups.values())


def _groups_of_loss(loss: nn.Module | None) -> list[dict[str, Any]]:
    """Return a group without weight decay for the parameters of a loss, if it has any."""
    own = [p for p in loss.parameters() if p.requires_grad] if loss is not None else []
    group = {"params": own, "weight_decay": 0.0, "lr_scale": 1.0, "decayed": False}
    return [group] if own else []


def _exempt_from_decay(model: nn.Module) -> set[str]:
    """Return name patterns of what `no_weight_decay()` of timm's networks exempts, such as tokens.

    The network may be a part of another one.
    """
    names = set()
    for prefix, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", set)()
        names |= {f"{prefix}.{name}" if prefix else name for name in exempt}
    return names


def create_optimizer(
    model: nn.Module,
    opt: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    layer_decay_type: str = "single",
    momentum: float = 0.9,
    shard: str = "ddp",
    **options: Any,
) -> torch.optim.Optimizer:
    """Create any of timm's optimizers by name, over `get_parameter_groups`.

    lr: peak of the schedule. momentum: for optimizers that have one. shard: data-parallel mode,
    `ddp`, `zero1` or `fsdp`. options: `seed` of the noise that adahessian and kron draw, 0 by
    default; `loss`, a module whose parameters are trained too, without weight decay; others of the
    optimizer itself, such as `eps` and `betas`: UserError if it has none of that name.
    """
    from timm.optim import create_optimizer_v2

    seed = options.pop("seed", 0)
    assigner = None
    if layer_decay < 1.0:
        assigner = LayerDecayValueAssigner(model, layer_decay, layer_decay_type)
    groups = get_parameter_groups(model, weight_decay, assigner)
    groups += _groups_of_loss(options.pop("loss", None))
    own = signature(_optimizer_class(opt)).parameters
    betas = own["betas"].default if "betas" in own else None  # None of adafactor
    if betas and len(options.get("betas", betas)) != len(betas):
        default, got = " ".join(map(str, betas)), len(options["betas"])
        text = f"takes {len(betas)} --opt_betas (default {default}), got {got}"
        raise UserError(f"--opt {opt} {text}")
    in_one_kernel = next(model.parameters()).device.type in ("cpu", "cuda")
    # With fsdp only they work on DTensors.
    in_one_kernel &= shard != "fsdp" or opt.lower().startswith("adam")
    fixed = {"fused": in_one_kernel, "deterministic": True}  # kron's noise is then that of its rng
    fixed = {name: value for name, value in fixed.items() if value and name in own}
    make = partial(create_optimizer_v2, opt=opt, lr=lr, momentum=momentum, **options, **fixed)
    try:
        optimizer = sharding.wrap_optimizer(make, groups, lr, shard)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UserError(f"--opt {opt} with {options}: {error}; try --opt adamw") from error
    # timm drops options that an optimizer does not have
    for key in options.keys() - sharding.local_optimizer(optimizer).defaults.keys():
        raise UserError(f"--opt {opt} has no {key}; drop --opt_{key}")
    _seed_noise(sharding.local_optimizer(optimizer), seed)
    return optimizer


def _optimizer_class(opt: str) -> type:
    """Return the class of an optimizer; UserError if it is unknown or cannot be imported."""
    from timm.optim import get_optimizer_class, list_optimizers

    name = opt.lower().removeprefix("lookahead_")
    resolve(name, dict.fromkeys(list_optimizers()), "optimizer", importable=False)
    try:
        return get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        packages = {"bnb": "bitsandbytes", "fused": "NVIDIA's apex"}
        package = next((p for start, p in packages.items() if name.startswith(start)), "")
        needs = f"needs a CUDA GPU and {package}" if package else "cannot be imported"
        raise UserError(f"--opt {opt} {needs} ({error}); try --opt adamw") from error


def _seed_noise(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Make the noise of adahessian and kron a function of (seed, step), equal on all processes.

    Their generators would begin again after a resume. Processes with other noise would take other
    steps.
    """
    optimizer = getattr(optimizer, "_base_optimizer", optimizer)  # of lookahead

    def before_step(*_: Any) -> None:
        states = optimizer.state.values()
        steps = [state.get("hessian step", state.get("step", 0)) for state in states]
        number = fold_in(seed, max(map(int, steps), default=0))
        if hasattr(optimizer, "rng"):  # kron
            optimizer.rng.seed(number)
        else:  # adahessian, which creates another generator on a GPU, with this seed
            optimizer.seed = number
            optimizer.generator.manual_seed(number)

    if hasattr(optimizer, "rng") or hasattr(optimizer, "generator"):
        optimizer.register_step_pre_hook(before_step)


def cosine(step: int, start: float, end: float, *, warmup: int, total: int) -> float:
    """Linear warm-up from start/warmup to `start` in `warmup` steps, then half a cosine to `end`.

    The first step has a rate above 0, and the last one has exactly `end`.
    """
    if step < warmup:
        return start * (step + 1) / warmup
    steps = total - 1 - warmup  # from the peak to the end
    position = (step - warmup) / steps if steps > 0 else float(warmup > 0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))


@dataclass(eq=False)
class Schedule:
    """Learning rate and weight decay of every parameter group as functions of the global step.

    total: optimizer steps of the whole run; the first `warmup` raise the learning rate to `lr`.
    weight_decay_end: None keeps the weight decay constant.
    """

    optimizer: torch.optim.Optimizer
    total: int
    lr: float
    min_lr: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.05
    weight_decay_end: float | None = None

    def __post_init__(self) -> None:
        if self.warmup >= self.total:
            text = "warm-up of %s, but the run has %d: the learning rate never decays"
            get_logger().warning(text, plural(self.warmup, "step"), self.total)

    def rate(self, step: int) -> float:
        """Base learning rate of a global step, counted from 0."""
        return cosine(step, self.lr, self.min_lr, warmup=self.warmup, total=self.total)

    def apply(self, step: int) -> float:
        """Set lr and weight decay of all groups for a global step; returns the base rate."""
        lr = self.rate(step)
        decay, end = self.weight_decay, self.weight_decay_end
        if end is not None:
            decay = cosine(step, decay, end, warmup=0, total=self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = decay if group["decayed"] else 0.0
        return lr


def build_optimizer(
    args: Any, model: nn.Module, lr: float, shard: str = "ddp", loss: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer from the flags; pre-training has no layer decay.

    loss: a module whose parameters, if it has any, are trained with those of the model.
    """
    options = {"eps": args.opt_eps, "betas": args.opt_betas}
    return create_optimizer(
        model,
        args.opt,
        lr=lr,
        weight_decay=args.weight_decay,
        layer_decay=getattr(args, "layer_decay", 1.0),
        layer_decay_type=getattr(args, "layer_decay_type", "single"),
        momentum=args.momentum,
        shard=shard,
        seed=getattr(args, "seed", 0),
        loss=loss,
        **{name: value for name, value in options.items() if value is not None},
    )


def _warn_if_too_short(args: Any, lr: float, steps: int) -> None:
    """Warn if an optimizer that moves a weight by about `lr` a step at most hardly changes them.

    Others have no such bound: with SGD, digits reached 65% in 88 steps of 0.0002.
    """
    bounded = any(name in args.opt.lower() for name in BOUNDED)
    if not bounded or not 0 < lr * steps < INITIAL_STD:
        return
    kind = "pretrain" if is_pretraining(vars(args)) else "ft"
    recipe = "" if args.recipe else f", or use --recipe small_data_{kind}"
    get_logger().warning(
        "peak lr %.3g for %s moves a weight by %.2g at most, and initial weights have a "
        "standard deviation of %g: the run will hardly learn. Raise --lr (0.0005 suits adamw "
        "and batches of 16) or --epochs%s",
        lr, plural(steps, "step"), lr * steps, INITIAL_STD, recipe,
    )  # fmt: skip


def build_schedule(
    args: Any, optimizer: torch.optim.Optimizer, lr: float, steps_per_epoch: int
) -> Schedule:
    """Build the schedule from the flags."""
    _warn_if_too_short(args, lr, steps_per_epoch * args.epochs)
    warmup = args.warmup_steps  # replaces --warmup_epochs unless negative
    if warmup < 0:
        warmup = round(args.warmup_epochs * steps_per_epoch)
    return Schedule(
        optimizer,
        steps_per_epoch * args.epochs,
        lr,
        min_lr=args.min_lr,
        warmup=warmup,
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay_end,
    )
