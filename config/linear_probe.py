# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags that --linear_probe implies, as in MAE's linear probing, and checks of those that it needs.

python -c "from config import linear_probe; print(linear_probe.RATES)"
"""

import argparse
from collections.abc import Container, Iterator, Mapping
from typing import Any

# Optimizer -> default learning rates of the heads, per 256 images of an optimizer step. MAE uses
# 0.1 with LARS and 16384 images a step; shorter runs in smaller steps need larger ones.
RATES = {
    "lars": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),  # and others
}
# Values of flags that are not given: MAE's. Images are cropped and flipped, and nothing else.
IMPLIED = {
    "opt": "lars",
    "epochs": 90,
    "weight_decay": 0.0,
    "min_lr": 0.0,
    "aa": "none",
    "reprob": 0.0,
    "smoothing": 0.0,
}
WARMUP = 9  # the warm-up is this part of the epochs: 10 of 90
EXCLUDED = (  # flags that cannot be combined with it, and the reason
    ("mixup", "each head learns the labels as they are"),
    ("cutmix", "each head learns the labels as they are"),
    ("cutmix_minmax", "each head learns the labels as they are"),
    ("head", "its heads are linear"),
    ("heads", "its heads are linear"),
    ("param_group", "its heads have learning rates of their own; give --linear_probe_blr"),
    ("no_weight_decay", "its heads are all that is trained; give --weight_decay"),
    ("freeze", "the backbone is frozen in all epochs"),
    ("model_ema", "EMA weights are of the whole network"),
    ("clip_grad", "the norm of all gradients would couple the heads"),
    ("disable_eval", "the evaluation chooses the best head"),
    ("compile", "the features are taken between two layers of the network"),
    ("precise_bn", "the backbone keeps its statistics"),
    ("sync_bn", "the backbone keeps its statistics"),
    ("grad_checkpointing", "a frozen backbone keeps nothing for backward"),
    ("cuda_graphs", "graphs are for networks that train as a whole"),
    ("drop_path", "a frozen backbone drops nothing"),
    ("sched_options", "they are for the groups of a whole network"),
)
OWN_RATES = ("lr", "blr")  # which --linear_probe_blr replaces


def is_on(values: Mapping[str, Any]) -> bool:
    """Return True for flags that train a linear probe; with --eval the flag does nothing."""
    return bool(values.get("linear_probe")) and not values.get("eval")


def imply_flags(new: dict[str, Any], given: Container[str], typed: Container[str] = ()) -> None:
    """Set the flags that --linear_probe implies, unless they are given.

    A file of another run may say that its backbone is not frozen; the command line may not.
    """
    if not is_on(new):
        return
    new |= {name: value for name, value in IMPLIED.items() if name not in given}
    if new["warmup_epochs"] is None:
        new["warmup_epochs"] = new["epochs"] / WARMUP
    if new["linear_probe_blr"] is None:
        new["linear_probe_blr"] = RATES["lars" if _is_lars(new) else "sgd"]
    rates = tuple(new["linear_probe_blr"])
    new |= {"linear_probe_blr": rates, "lr": None, "blr": max(rates)}
    new["freeze_backbone"] |= "freeze_backbone" not in typed


def linear_probe_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag that cannot be combined with --linear_probe."""
    values = vars(args)
    if not is_on(values):
        return
    for name, reason in EXCLUDED:
        if values.get(name):
            yield f"--linear_probe true and --{name} cannot be combined: {reason}; drop one"
    if args.layer_decay < 1:
        got = f"--layer_decay {args.layer_decay:g}"
        yield f"{got} and --linear_probe true: the heads are the only layers that train; drop one"
    for name in OWN_RATES:
        if name in args.typed:
            yield f"--{name}: with --linear_probe give --linear_probe_blr, a rate for each head"
    if not args.freeze_backbone:
        yield "--freeze_backbone false: --linear_probe trains heads of a frozen backbone; drop one"
    rates = args.linear_probe_blr
    if len(set(rates)) < len(rates):
        got = " ".join(f"{rate:g}" for rate in rates)
        yield f"--linear_probe_blr {got}: expected each learning rate once"
    if args.shard != "ddp":
        yield f"--linear_probe true and --shard {args.shard}: its heads are small; use --shard ddp"
    if "=" in str(args.eval_data_path or ""):
        yield "--linear_probe true chooses its head on one evaluation set; name only one"
    if "=" in str(args.loss or "").partition("(")[0]:
        yield f"--loss {args.loss}: --linear_probe has one loss for all heads; drop the name"


def optimizer_flags(args: Any) -> Any:
    """Return `args` with the options of each head's parameters for the optimizer.

    LARS adapts the rates of matrices and not of biases, as in MAE; timm's does so by default only
    where there is weight decay.
    """
    if not is_on(vars(args)):
        return args
    adapts = ",always_adapt=True" * (_is_lars(vars(args)) and "always_adapt" not in args.opt)
    options = []
    for number, rate in enumerate(args.linear_probe_blr):
        scale = f"lr={rate / args.blr!r}"
        options.append(f"sweep.heads.{number}.weight:{scale}{adapts}")
        options.append(f"sweep.heads.{number}.bias:{scale}")
    return args.replace(param_group=tuple(options))


def _is_lars(values: Mapping[str, Any]) -> bool:
    return values["opt"].partition("(")[0].strip().lower() == "lars"
