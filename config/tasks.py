# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Tasks of fine-tuning, and the flags that follow from them or contradict them.

python main_finetune.py --data_path photos.csv --task regression --label_column width height
"""

import argparse
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

TASKS = {"classification": "class", "multi_label": "multi", "regression": "number"}  # -> kind
TASK_OF = {kind: task for task, kind in TASKS.items()}
DEFAULT_LOSS = {"class": "ce", "multi": "bce", "number": "l2"}
OF_TABLES = ("image_column", "label_column", "split_column", "weight_column", "image_root")
PACK = "pack.json"  # in a folder that pack.py wrote


def may_be_table(data_set: str) -> bool:
    """Return True if --data_path may have columns with labels, which flags choose."""
    return data_set in ("auto", "table")


def _may_have_any_task(data_set: str) -> bool:
    return may_be_table(data_set) or ":" in data_set


def known_kind(values: Mapping[str, Any]) -> str | None:
    """Return the kind of targets that the flags say, None if the data tells it."""
    if values["task"] != "auto":
        return TASKS[values["task"]]
    return None if _may_have_any_task(values["data_set"]) else "class"


def possible_kinds(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kinds of targets that the data of these flags may have.

    A checkpoint to evaluate or to resume may bring --task regression, which no table tells.
    """
    if kind := known_kind(values):
        return (kind,)
    told = may_be_table(values["data_set"]) and not (values["eval"] or values["resume"])
    told = told and not _is_pack(values["data_path"])  # which may have numbers
    return ("class", "multi") if told else tuple(DEFAULT_LOSS)


def task_flags(values: Mapping[str, Any], given: Collection[str], kind: str) -> dict[str, Any]:
    """Return task, loss and smoothing for a kind of targets; given flags stay."""
    loss = DEFAULT_LOSS[kind] if values["loss"] is None else values["loss"]
    smoothing = values["smoothing"]
    if "smoothing" not in given and loss != "ce":
        smoothing = 0.0  # other losses may not take smoothed labels
    return {"task": TASK_OF[kind], "loss": loss, "smoothing": smoothing}


def task_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of tables, tasks or sampling that cannot act."""
    values = vars(args)
    for name in OF_TABLES:
        if values.get(name) and not may_be_table(args.data_set):
            yield f"--{name} is for tables, not for --data_set {args.data_set}; drop it"
    if "task" not in values:  # pre-training
        return
    if args.task not in ("auto", "classification") and not _may_have_any_task(args.data_set):
        got = f"--task {args.task}: --data_set {args.data_set} has one class per image"
        yield f"{got}; give a table as --data_path, or a data set of your own"
    mixes = args.mixup or args.cutmix or args.cutmix_minmax
    if args.task == "regression" and mixes and not args.eval:
        yield "--mixup and --cutmix mix classes, and --task regression has none; drop them"
    if not args.normalize_targets and (kind := known_kind(values)) in ("class", "multi"):
        yield f"--normalize_targets false is for numbers, not for --task {TASK_OF[kind]}; drop it"
    if not args.eval:
        yield from _sampling_problems(args)
    if args.eval_classes == "data" and not args.eval:
        yield "--eval_classes data needs --eval; in training all classes are evaluated"
    if args.eval_classes == "data" and args.task == "regression":
        yield "--eval_classes data: --task regression has no classes; drop it"


def _is_pack(path: str) -> bool:
    return os.path.isfile(os.path.join(os.path.expanduser(path), PACK))


def _sampling_problems(args: argparse.Namespace) -> Iterator[str]:
    if args.task == "regression" and args.sampling == "balanced":
        yield "--sampling balanced needs classes; use --sampling weighted, or --task classification"
    if args.weight_column and args.sampling != "weighted":
        yield "--weight_column needs --sampling weighted; give both or neither"
    weighted = args.sampling == "weighted" and not _is_pack(args.data_path)  # it stores weights
    if may_be_table(args.data_set) and weighted and not args.weight_column:
        yield "--sampling weighted needs --weight_column; name the column with the weights"
