# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checks of the flags that describe schedules and clipping.

python main_finetune.py --data_set DIGITS --sched "cosine(1,0)" --warmup_epochs 5
"""

import argparse
from collections.abc import Container, Iterator, Mapping
from typing import Any

from config.flags import default_of


def scheduled_options(values: Mapping[str, Any]) -> set[str]:
    """Return the options of the optimizer that --sched_options names."""
    return {word.partition("=")[0].strip() for word in values["sched_options"] or ()}


def clear_scheduled(new: dict[str, Any], given: Container[str]) -> None:
    """Set flags that --sched and --sched_options replace to 0, unless they are given."""
    replaced = ["warmup_epochs", "min_lr"] if new["sched"] else []
    replaced += ["weight_decay"] if "weight_decay" in scheduled_options(new) else []
    new |= {name: 0.0 for name in replaced if name not in given}


def schedule_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of schedules and clipping that cannot work with the others."""
    scheduled = scheduled_options(vars(args))
    ignored = {}
    if args.sched:
        ignored |= dict.fromkeys(("warmup_epochs", "warmup_steps", "min_lr"), "sched")
    if "weight_decay" in scheduled:
        ignored |= dict.fromkeys(("weight_decay", "weight_decay_end"), "sched_options")
    for name, flag in ignored.items():
        value = getattr(args, name)
        if value is not None and value > 0:
            text = f"--{name} {value:g} would be ignored, since --{flag} replaces it"
            yield f"{text}; drop one (--{name} 0 clears that of a file)"
    for option, name in (("momentum", "momentum"), ("eps", "opt_eps")):
        value = getattr(args, name)
        if option in scheduled and value != default_of(name):
            yield f"--{name} {value:g} would be ignored: --sched_options has {option}; drop one"
    if args.clip_mode != "norm" and args.clip_grad is None:
        yield f"--clip_mode {args.clip_mode} needs --clip_grad; give both or neither"
    if args.warmup_epochs > args.epochs:
        yield f"--warmup_epochs {args.warmup_epochs:g} is above --epochs {args.epochs}; lower it"
    if args.lr is not None and args.min_lr > args.lr:
        yield f"--min_lr {args.min_lr} is above --lr {args.lr}; lower --min_lr"
