# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags, class names and network shape that a checkpoint stores, and flags that follow them.

python -c "from weights import saved_run; print(list(saved_run.INHERITED))"
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from config.flags import as_typed
from config.parser import FrozenNamespace, shape_problems
from data_loading.labels import Head
from data_loading.transforms import mean_and_std
from errors import UserError
from models.convnextv2 import SIZES
from parallel.process_group import get_logger
from weights.convert import describe, to_convnextv2

# Flags that a command takes from the checkpoint that it starts from, unless they are typed, and
# the types of their values. Weights of one shape fit no other, so those in SHAPE cannot differ.
SHAPE = {"model": str, "stem_stride": int}
INHERITED = SHAPE | {"in_chans": int, "input_size": (int, list, tuple), "crop_pct": (float, int)}
NORMALIZATION = {"imagenet_default_mean_and_std": bool, "mean": (list, tuple), "std": (list, tuple)}
INHERITED |= NORMALIZATION  # all of them or, if one is typed, none
# More of them where the run itself resumes.
RESUMED = {"patch_size": int, "norm_pix_loss": bool, "decoder_depth": int}
RESUMED |= {"decoder_embed_dim": int}


@dataclass(frozen=True)
class SavedRun:
    """The flags and the head of the run that wrote a checkpoint; empty where it stores none."""

    source: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    head: Head = Head()


def read_saved_run(
    checkpoint: Any, source: str, weights: Mapping[str, Any] | None = None
) -> SavedRun:
    """Return what a checkpoint says about its run, and what its weights imply.

    weights: the state dict in it. Those of a ConvNeXt V2 tell its size, channels and classes.
    """
    held = checkpoint if isinstance(checkpoint, dict) else {}
    args, classes = held.get("args"), held.get("classes")
    args = vars(args) if isinstance(args, argparse.Namespace) else args  # of the official code
    flags, count = _flags_of_shape(weights or {})
    flags |= {k: v for k, v in (args if isinstance(args, dict) else {}).items() if v is not None}
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else None
    return SavedRun(source, flags, Head(source, names, len(names) if names else count))


def _flags_of_shape(weights: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Return the flags and the number of classes that a ConvNeXt V2's weights imply."""
    try:
        shape = describe(to_convnextv2(weights)[0])
    except UserError:  # another network
        return {}, None
    names = {sizes: f"convnextv2_{name}" for name, sizes in SIZES.items()}
    name = names.get((shape["depths"], shape["dims"]))
    flags = {"model": name} if name else {}
    flags |= {key: shape[key] for key in ("in_chans", "stem_stride")}
    return flags, shape["num_classes"] or None


def inherit_flags(args: FrozenNamespace, saved: SavedRun, resumes: bool = False) -> FrozenNamespace:
    """Return `args` with the flags of the run that wrote a checkpoint, where none is given.

    A given flag that contradicts them is an error if the weights could not fit, else a warning.
    resumes: the run itself continues, and `compare_args` has judged the given flags.
    """
    source, names = saved.source, INHERITED | (RESUMED if resumes else {})
    if "mask_ratio" in vars(args):  # pre-training evaluates nothing
        del names["crop_pct"]
    if args.given & NORMALIZATION.keys():
        names = {name: kind for name, kind in names.items() if name not in NORMALIZATION}
        _warn_of_other_normalization(args, saved)
    taken: dict[str, Any] = {}
    for name in [name for name in names if name in saved.flags]:
        value = saved.flags[name]
        parts = value if isinstance(value, list | tuple) else ()
        if not isinstance(value, names[name]) or not all(isinstance(x, int | float) for x in parts):
            raise UserError(f"{source} stores --{name} {value!r}, which is no value of that flag")
        value = _same_form(name, value)
        if name not in vars(args) or _same_form(name, getattr(args, name)) == value:
            continue
        if name not in args.given:
            taken[name] = value
        elif not resumes:
            _contradict(name, getattr(args, name), value, source)
    if ":" in taken.get("model", ""):  # a file must not choose which code is imported
        raise UserError(
            f"{source} was trained with code of its own, --model {taken['model']}; type --model "
            "to choose which code to run"
        )
    if "patch_size" in vars(args) and "patch_size" not in args.given and "stem_stride" in taken:
        taken.setdefault("patch_size", 8 * taken["stem_stride"])
    if taken:
        typed = " ".join(f"--{name} {as_typed(value)}" for name, value in taken.items())
        get_logger().info("taken from %s: %s", source, typed)
    args = args.replace(**taken)
    for problem in shape_problems(args):
        raise UserError(problem)
    return args


def _warn_of_other_normalization(args: FrozenNamespace, saved: SavedRun) -> None:
    """Warn if the typed mean and std differ from those that a checkpoint was trained with."""
    if not NORMALIZATION.keys() & saved.flags.keys():  # of another toolkit
        return
    own, other = (
        mean_and_std(flags.get("in_chans", 3), *(flags.get(name) for name in NORMALIZATION))
        for flags in (vars(args), {"imagenet_default_mean_and_std": True, **saved.flags})
    )
    if own != other:
        texts = [f"mean {as_typed(mean)} and std {as_typed(std)}" for mean, std in (own, other)]
        get_logger().warning("%s, but %s was trained with %s", texts[0], saved.source, texts[1])


def _same_form(name: str, value: Any) -> Any:
    """Write a value as `config.parser.finalize` does."""
    if name == "model":
        return value.removeprefix("fcmae_")
    if name == "input_size":
        return (value, value) if isinstance(value, int) else tuple([*value, *value][:2])
    if isinstance(value, list):
        return tuple(value)
    return value


def _contradict(name: str, typed: Any, saved: Any, source: str) -> None:
    """Raise UserError if the weights cannot fit the typed flag, warn otherwise."""
    text = f"--{name} {as_typed(typed)}, but {source} was trained with {as_typed(saved)}"
    code = name == "model" and (":" in typed or ":" in saved)
    if name in SHAPE and not code:
        raise UserError(f"{text}; drop --{name}, or give another checkpoint")
    if not code:
        get_logger().warning("%s", text)
