# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Labels of a data set as positions in a head, found by the names of the classes.

python -c "from data_loading.labels import Head; print(Head('weights', ('ant', 'bee'), 2))"
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errors import UserError, first_few
from parallel.process_group import get_logger

IMAGENET = 1000  # classes


@dataclass(frozen=True)
class Head:
    """The classes of a head, in its order.

    source: file or data that they come from. names: None if unknown. count: None if unknown.
    """

    source: str = ""
    names: Sequence[str] | None = None
    count: int | None = None


def class_map(dataset: Any) -> dict[str, int] | None:
    """Return class name -> label, None if a data set has no class names."""
    if hasattr(dataset, "class_to_idx"):
        return dict(dataset.class_to_idx)
    names = getattr(dataset, "classes", None)
    return None if names is None else {name: label for label, name in enumerate(names)}


def class_names(dataset: Any) -> list[str] | None:
    """Return the class names of a data set in the order of its labels, None if it has none."""
    labels = class_map(dataset)
    return None if labels is None else [str(name) for name in sorted(labels, key=labels.get)]


def find_positions(names: Sequence[str], head: Head, kind: str) -> list[int]:
    """Return the position in the head for each label of a data set with these class names.

    Absent classes are logged. UserError if a name is not in the head.
    """
    order = _order_of_head(names, head)
    if order is None:
        raise UserError(differences(names, head, kind))
    absent = [name for name in order if name not in names]
    if absent:
        text = "%s has no images of %d of the %d classes: %s"
        get_logger().info(text, kind, len(absent), len(order), first_few(absent, 5))
    if head.names is not None and order != list(head.names):
        text = "%s: the class folders are named by numbers, which are taken for labels of %s"
        get_logger().info(text, kind, head.source)
    return [order.index(name) for name in names]


def _order_of_head(names: Sequence[str], head: Head) -> list[str] | None:
    """Name the classes of the head in its order as the data names them; None if that fails.

    Weights of 1000 classes without names are ImageNet's, if the data has ImageNet's names. Names
    that are all numbers are labels, or if there is one for each class, in the order of labels.
    """
    if head.names is not None and set(names) <= set(head.names):
        return list(head.names)
    count = head.count or len(names)
    if head.names is None and count == IMAGENET:
        from timm.data import ImageNetInfo

        imagenet = ImageNetInfo().label_names()
        if set(names) <= set(imagenet):
            return imagenet
    if all(name.isdecimal() for name in names):
        by_number = {int(name): name for name in names}
        if len(by_number) == count:
            return [by_number[number] for number in sorted(by_number)]
        if len(by_number) == len(names) and max(by_number) < count:
            return [by_number.get(number, str(number)) for number in range(count)]
    return list(names) if head.names is None and count == len(names) else None


def differences(names: Sequence[str], head: Head, kind: str) -> str:
    """Return the message for class names of a data set that do not fit a head."""
    text = f"{kind} has {len(names)} classes, {head.source} {head.count}"
    if head.names is None:
        return (
            f"{text}, and {head.source} stores no class names by which to match them: give data "
            f"with {head.count} class folders, or name the folders by label (0 to "
            f"{head.count - 1})"
        )
    unknown = [name for name in names if name not in head.names]
    absent = [name for name in head.names if name not in names]
    only = {kind: unknown, head.source: absent}
    texts = [f"only in {where}: {first_few(found, 5)}" for where, found in only.items() if found]
    return f"{text}, and they differ: {'; '.join(texts)}; rename or restore these class folders"
