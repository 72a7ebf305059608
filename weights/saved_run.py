# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags, class names and network shape that a checkpoint stores, and flags that follow them.

python -c "from weights import saved_run; print(list(saved_run.INHERITED))"
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from config.checks import shape_problems
from config.flags import allowed, as_typed, implied_patch, is_code, is_pretraining, library_of
from config.parser import FrozenNamespace, absolute_paths
from config.sizes import as_one_flag, parse_sizes, size_problems
from config.tasks import DEFAULT_LOSS, OF_TABLES, TASKS, may_be_table
from data_loading.labels import Head
from data_loading.targets import Scale
from errors import UserError
from models import is_known, same_network
from models.heads import is_plain
from parallel.process_group import get_logger
from weights.convert import describe, size_name, to_convnextv2

# Flags that a command takes from the checkpoint that it starts from, unless they are given, and
# what their values must be. Weights of one shape fit no other, so those in SHAPE cannot differ.
SHAPE = {"model": "a name", "stem_stride": "an integer"}
INHERITED = SHAPE | {"in_chans": "an integer", "input_size": "one or two integers"}
INHERITED |= {"patch_size": "an integer", "crop_pct": "a number", "value_range": "numbers"}
NORMALIZATION = {"imagenet_default_mean_and_std": "a boolean"}
NORMALIZATION |= {"mean": "numbers", "std": "numbers"}
OF_ITS_DATA = {"val_split": "a number", "image_root": "a name", "split_column": "a name"}
INHERITED |= OF_ITS_DATA  # to resume, or to evaluate the same data
EVALUATED = {"task": "a name", "image_column": "a name", "label_column": "names"}
EVALUATED |= {"normalize_targets": "a boolean", "tta": "names"}  # to resume, or for eval
INHERITED |= EVALUATED
INHERITED |= NORMALIZATION  # all of them or, if one is given, none
HEADS = {"head": "a name", "heads": "a name"}  # to evaluate or to resume, not to fine-tune again
INHERITED |= HEADS
EVAL_ONLY = {"loss": "a name"}  # see `_inherits_loss`
EVAL_ONLY |= {"weight_column": "a name"}  # which it leaves out of the labels
INHERITED |= EVAL_ONLY
# More of them where the run itself resumes.
RESUMED = {"norm_pix_loss": "a boolean", "decoder_depth": "an integer"}
RESUMED |= {"decoder_embed_dim": "an integer", "recon_loss": "a name"}
RESUMED |= {"progressive_batch": "a boolean"}
TYPES = {"a name": (str,), "a boolean": (bool,), "an integer": (int,), "a number": (int, float)}


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

    weights: the state dict in it. Those of a ConvNeXt tell its size, channels and classes.
    """
    held = checkpoint if isinstance(checkpoint, dict) else {}
    args = held.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args  # of the official code
    shape, count = _flags_of_shape(weights or {})
    flags = {k: v for k, v in (args if isinstance(args, dict) else {}).items() if v is not None}
    model = str(flags.get("model"))
    if not (is_code(model) or library_of(model)):  # names differ between libraries, shapes do not
        flags |= shape
        if not is_known(str(flags.get("model")).removeprefix("fcmae_")):
            flags.pop("model", None)
    head = _read_head(held, source, TASKS.get(str(flags.get("task"))))
    return SavedRun(source, flags, head if head.count else replace(head, count=count))


def describe_head(head: Head) -> dict[str, Any]:
    """Return the entries of a checkpoint that describe a head; `_read_head` reads them."""
    entries: dict[str, Any] = {"classes": head.names and list(head.names), "outputs": head.count}
    if head.scale is not None:
        entries["target_scale"] = {"mean": list(head.scale.mean), "std": list(head.scale.std)}
    return entries


def _read_head(held: Mapping[str, Any], source: str, kind: str | None) -> Head:
    """Return what a checkpoint says about a head; files of other toolkits say other things."""
    classes, outputs = held.get("classes"), held.get("outputs")
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else None
    count = outputs if type(outputs) is int and outputs > 0 else None
    return Head(source, names, len(names) if names else count, kind, _read_scale(held, source))


def kept_head(args: Any, saved: SavedRun, resumes: bool = False) -> Head | None:
    """Return the head of the weights that a run starts from, which training may keep.

    None for one that predicts numbers, with other heads or --reset_head: a new head has units of
    its own.
    """
    if resumes or saved.head.kind != "number":
        return saved.head
    is_new = vars(args).get("reset_head") or not _same_heads(args, saved)
    return None if is_new else saved.head


def _same_heads(args: Any, saved: SavedRun) -> bool:
    """Return True if the flags ask for the heads of the run that wrote a checkpoint."""
    (head, heads), (saved_head, saved_heads) = (
        [str(flags.get(name) or "") for name in HEADS] for flags in (vars(args), saved.flags)
    )
    same = head == saved_head or (is_plain(head) and is_plain(saved_head))
    return same and heads == saved_heads


def _read_scale(held: Mapping[str, Any], source: str) -> Scale | None:
    """Return mean and std of the numbers that a network predicts, None for their own units."""
    if (saved := held.get("target_scale")) is None:
        return None
    try:
        mean, std = (tuple(map(float, saved[name])) for name in ("mean", "std"))
    except (TypeError, ValueError, KeyError):
        mean = std = ()
    if not mean or len(mean) != len(std):
        raise UserError(f"{source}: target_scale is {saved!r}, expected lists of mean and std")
    return Scale(mean, std)


def _flags_of_shape(weights: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Return the flags and the number of classes that a ConvNeXt's weights imply."""
    try:
        shape = describe(to_convnextv2(weights)[0])
    except UserError:  # another network
        return {}, None
    name = size_name(shape)
    flags = {"model": name} if name else {}
    flags |= {key: shape[key] for key in ("in_chans", "stem_stride")}
    return flags, shape["num_classes"] or None


def inherit_flags(args: FrozenNamespace, saved: SavedRun, resumes: bool = False) -> FrozenNamespace:
    """Return `args` with the flags of the run that wrote a checkpoint, where none is given.

    A given flag that contradicts them is an error if the weights could not fit, else a warning.
    resumes: the run itself continues, and `compare_args` has judged the given flags.
    """
    source = saved.source
    if args.given & NORMALIZATION.keys() and not resumes:
        _warn_of_other_normalization(args, saved)
    names = [*INHERITED, *(RESUMED if resumes else ())]
    given = args.given - {"task"} if vars(args).get("task") == "auto" else args.given
    left_out = _not_inherited(args, saved, resumes)
    taken: dict[str, Any] = {}
    for name in names:
        if name in left_out or name not in saved.flags or name not in vars(args):
            continue
        if name in given:
            value = normalized(name, saved.flags[name])
            if value is not None and not resumes and value != normalized(name, vars(args)[name]):
                _contradict(name, vars(args)[name], value, source)
        elif (value := stored_flag(saved, name)) != normalized(name, vars(args)[name]):
            taken[name] = value
    if is_code(taken.get("model", "")):  # a file must not choose which code is imported
        raise UserError(
            f"{source} was trained with --model {taken['model']}, which is code and not a name; "
            "give --model to choose the code to run"
        )
    for name in HEADS.keys() & taken.keys():
        if ":" in taken[name]:
            raise UserError(
                f"{source} was trained with --{name} {taken[name]}, which is code and not a name; "
                f"give --{name} to choose the code to run"
            )
    for name in ("mean", "std"):  # of other channels than the given ones
        values = taken.get(name, ())
        if len(values) not in (0, 1, taken.get("in_chans", args.in_chans)):
            taken[name] = (sum(values) / len(values),)
    if resumes and "input_size" not in args.given:
        taken |= _saved_sizes(saved)
    if taken:
        shown = as_one_flag(taken).items()
        typed = " ".join(f"--{name} {as_typed(value)}" for name, value in shown)
        get_logger().info("taken from %s: %s", source, typed)
    if is_pretraining(vars(args)) and "patch_size" not in {*args.given, *saved.flags}:
        model, stride = ({**vars(args), **taken}[key] for key in ("model", "stem_stride"))
        taken["patch_size"] = implied_patch(model, stride)
    args = args.replace(**taken)
    for problem in (*size_problems(args), *shape_problems(args)):
        raise UserError(problem)
    return args


def _saved_sizes(saved: SavedRun) -> dict[str, Any]:
    """Return the image sizes by epoch of a run, if it has several."""
    text = str(saved.flags.get("input_sizes", ""))
    try:
        sizes = parse_sizes(text) if text else {}
    except ValueError as error:
        got = f"{saved.source} stores sizes by epoch, {text!r}"
        raise UserError(f"{got}, that cannot be read: {error}; give --input_size") from error
    return {"input_size": sizes[max(sizes)], "input_sizes": text} if sizes else {}


def _not_inherited(args: FrozenNamespace, saved: SavedRun, resumes: bool) -> set[str]:
    """Return the flags of a run that another use of its checkpoint does not take."""
    continues = resumes or vars(args).get("eval")
    left_out = set() if continues else {*EVALUATED, *HEADS}
    if not vars(args).get("eval"):
        left_out |= {*EVAL_ONLY}
    elif not _inherits_loss(args, saved):
        left_out |= {"loss"}
    if not (resumes or _evaluates_its_data(args, saved)):
        left_out |= {*OF_ITS_DATA}
    if is_pretraining(vars(args)):  # pre-training evaluates nothing
        left_out |= {"crop_pct"}
    if not may_be_table(args.data_set):
        left_out |= {*OF_TABLES}
    for together in (HEADS, NORMALIZATION):  # if one of them is given, none
        if args.given & together.keys():
            left_out |= {*together}
    return left_out


def _inherits_loss(args: FrozenNamespace, saved: SavedRun) -> bool:
    """Return True if --eval takes the loss of the run: one of another name than that of its task.

    Code, which a file must not choose, is never taken, nor a loss for other heads or another task.
    """
    loss, task = saved.flags.get("loss"), saved.flags.get("task")
    kind = TASKS.get(str(task))
    if "task" in args.given and args.task not in ("auto", task):
        return False
    if args.given & HEADS.keys() and not _same_heads(args, saved):
        return False
    return bool(kind) and loss != DEFAULT_LOSS[kind] and ":" not in str(loss)


def _evaluates_its_data(args: FrozenNamespace, saved: SavedRun) -> bool:
    """Return True if the data of the run is evaluated."""
    if not vars(args).get("eval") or args.eval_data_path:
        return False
    return absolute_paths(vars(args))["data_path"] == saved.flags.get("data_path")


def _warn_of_other_normalization(args: FrozenNamespace, saved: SavedRun) -> None:
    """Warn if the given mean and std differ from those that a checkpoint was trained with."""
    from data_loading.transforms import mean_and_std  # torchvision, which hubconf does without

    stored = {name: saved.flags[name] for name in NORMALIZATION if name in saved.flags}
    values = {name: normalized(name, value) for name, value in stored.items()}
    if not stored or None in values.values():  # of another toolkit, or unreadable
        return
    size = max(len(values.get("mean", ())), len(values.get("std", ())))
    values["in_chans"] = size if size > 1 else args.in_chans
    own, other = (
        mean_and_std(flags["in_chans"], *(flags.get(name) for name in NORMALIZATION))
        for flags in (vars(args), values)
    )
    if own != other:
        texts = [f"mean {as_typed(mean)} and std {as_typed(std)}" for mean, std in (own, other)]
        get_logger().warning(
            "%s are used; %s was trained with %s", texts[0], saved.source, texts[1]
        )


def stored_flag(saved: SavedRun, name: str) -> Any:
    """Return a flag that a checkpoint stores; UserError if it is unusable."""
    value = normalized(name, saved.flags[name])
    if value is None:
        expected = f"{(INHERITED | RESUMED)[name]} {allowed(name)[1]}".strip()
        got = f"{saved.source} stores --{name} {saved.flags[name]!r}"
        raise UserError(f"{got}, expected {expected}; give --{name}")
    return value


def normalized(name: str, value: Any) -> Any:
    """Return a flag's value as `config.parser.finalize` writes it; None if it cannot be one."""
    value, (holds, _) = _of_its_type(name, value), allowed(name)
    numbers = value if isinstance(value, tuple) else (value,)
    return value if value is not None and all(map(holds, numbers)) else None


def _of_its_type(name: str, value: Any) -> Any:
    expected = (INHERITED | RESUMED)[name]
    if name == "input_size":  # timm stores channels, height and width
        sides = [value] if isinstance(value, int) else value
        if not isinstance(sides, list | tuple) or not 1 <= len(sides) <= 3:
            return None
        if not all(type(side) is int for side in sides):
            return None
        return (*sides, *sides)[:2] if len(sides) < 3 else tuple(sides[1:])
    if expected == "names":
        is_list = isinstance(value, list | tuple) and len(value) > 0
        return tuple(value) if is_list and all(type(x) is str for x in value) else None
    if expected == "numbers":
        is_list = isinstance(value, list | tuple) and len(value) > 0
        return tuple(value) if is_list and all(type(x) in (int, float) for x in value) else None
    if type(value) not in TYPES[expected]:
        return None
    return value.removeprefix("fcmae_") if name == "model" else value


def _contradict(name: str, typed: Any, saved: Any, source: str) -> None:
    """Raise UserError if the weights cannot fit the given flag, warn otherwise."""
    if name == "model" and (
        is_code(typed) or is_code(saved) or "(" in typed + saved or same_network(typed, saved)
    ):
        return  # whether the weights fit is checked later
    verb = "evaluated" if name == "tta" else "trained"
    flag, trained = f"--{name} {as_typed(typed)}", f"{source} was {verb} with {as_typed(saved)}"
    if name in SHAPE:
        raise UserError(
            f"{flag} is given (on the command line, by --config or --recipe), but {trained}; give "
            f"--{name} {as_typed(saved)}, or another checkpoint"
        )
    get_logger().warning("%s is used; %s", flag, trained)
