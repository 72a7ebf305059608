# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Outputs of a network for a data set: their kind, number, names and units.

python -c "from data_loading.outputs import own_count; help(own_count)"
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from config.tasks import TASK_OF, known_kind
from data_loading.images import Images
from data_loading.labels import (
    Head,
    class_names,
    differences,
    find_positions,
    order_of_head,
)
from data_loading.split import Part, list_values
from data_loading.summary import NOUN
from data_loading.targets import Scale, find_scale
from errors import UserError, first_few, plural
from parallel.process_group import get_logger


def find_kind(data: Any, args: Any, head: Head | None) -> str:
    """Return the kind of the targets: what the data says, or else the flags, or else the head."""
    own, told = getattr(data, "kind", None), known_kind(vars(args))
    if own not in (None, *TASK_OF):
        got = f"--data_set {args.data_set} has kind = {own!r}"
        raise UserError(f"{got}, expected class, multi or number; correct it")
    if own and told and own != told:
        got = f"--task {args.task}, but --data_set {args.data_set} has kind = {own!r}"
        raise UserError(f"{got}; pass --task {TASK_OF[own]}, or correct the data set")
    kind = own or told or (head and head.kind) or "class"
    if head and head.kind not in (None, kind):
        raise UserError(
            f"the data is for --task {TASK_OF[kind]}, and {head.source} for {TASK_OF[head.kind]}; "
            "give the data of that task"
        )
    return kind


def count_outputs(data: Any, args: Any, head: Head | None, kind: str, part: str) -> int:
    """Return the number of outputs; UserError if it is unknown, or not that of --nb_classes."""
    nouns = "numbers" if kind == "number" else "classes"
    count = (head and head.count) or own_count(data, kind)
    if count is None and args.nb_classes is None:
        raise UserError(
            f"--data_set {args.data_set} has no class names; set their number with --nb_classes"
            if kind == "class"
            else f"--data_set {args.data_set} has no names; set how many {nouns} an image has with "
            "--nb_classes"
        )
    if args.nb_classes and count not in (None, args.nb_classes):
        owner = head.source if head else f"the {part} data"
        raise UserError(
            f"--nb_classes {args.nb_classes}, but {owner} has {plural(count, NOUN[kind])}; drop "
            "--nb_classes or fix the data"
        )
    return count or args.nb_classes


def own_count(data: Any, kind: str) -> int | None:
    """Return the number of outputs that a data set tells, or None."""
    if (names := class_names(data)) is not None:
        return len(names)
    if kind == "class" or (rows := list_values(data, "targets")) is None:
        return None
    return rows.shape[1] if rows.ndim == 2 else 1


def choose_scale(
    data: Any, args: Any, head: Head | None, names: Sequence[str] | None
) -> Scale | None:
    """Return mean and std of the numbers: those of the head, or else of the training data."""
    if head is not None:  # its outputs are in these units, or in those of the data
        own, asked = head.scale is not None, args.normalize_targets
        if own != asked and (own or "normalize_targets" in getattr(args, "typed", ())):
            own, asked = ("true" if value else "false" for value in (own, asked))
            raise UserError(
                f"--normalize_targets {asked}, but {head.source} was trained with {own} and its "
                "head is kept; drop it, or train a new head: --finetune with --reset_head true"
            )
        return head.scale
    if not args.normalize_targets:
        return None
    rows = list_values(data, "targets")
    if rows is None:
        raise UserError(
            f"--normalize_targets: --data_set {args.data_set} does not list its numbers; give it a "
            "list `targets` with those of each image, or pass --normalize_targets false"
        )
    rows = np.asarray(rows, np.float64).reshape(len(rows), -1)
    if names is not None and rows.shape[1] != len(names):
        got = f"{plural(rows.shape[1], 'number')} for each image in `targets`"
        raise UserError(f"--data_set {args.data_set} has {got}, and {plural(len(names), 'name')}")
    scale = find_scale(rows, names or range(rows.shape[1]))
    pairs = zip(scale.mean, scale.std, strict=True)
    texts = [f"{mean:.4g} and {std:.4g}" for mean, std in pairs]
    get_logger().info("train: mean and std of the numbers: %s", first_few(texts, 5))
    return scale


def check_table(data: Any, names: Sequence[str], head: Head, part: str) -> None:
    """Raise UserError with lines of a table for classes that a head does not know."""
    rows = data.dataset if isinstance(data, Part) else data
    if not (isinstance(rows, Images) and rows.is_table) or rows.kind == "number" or not head.names:
        return
    if order_of_head(names, head)[0] is None:
        unknown = [
            f"{name} ({rows.example_of(label)})"
            for label, name in enumerate(names)
            if name not in head.names
        ]
        raise UserError(
            f"{part}: {rows.path} has classes that {head.source} does not know: "
            f"{first_few(unknown, 5)}; correct the table"
        )


def head_to_keep(
    names: Sequence[str], head: Head, resumes: bool, kind: str, in_folders: bool
) -> Head | None:
    """Return `head` if it has these classes, or None; UserError if a run must resume with it."""
    if (kind == "number") != (head.kind == "number"):
        return None
    if head.names is not None:
        same = set(names) == set(head.names)
        if resumes and not same:
            raise UserError(differences(names, head, "train"))
        return head if same else None
    if resumes and in_folders:  # of an earlier version, which sorted folders as text
        return replace(head, names=sorted(names))
    if resumes or not head.count:  # of an earlier version, or of data without names
        return head if resumes and kind == "number" else None
    order, _ = order_of_head(names, head)
    if order is None or set(order) != set(names):
        return None
    find_positions(names, head, "train")  # logs how they are matched
    return replace(head, names=order)
