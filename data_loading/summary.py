# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Log lines that say what a data set holds, and what is odd about it.

python -c "from data_loading.summary import describe_outputs; print(describe_outputs(3, 'class'))"
"""

import re
from collections.abc import Iterable
from typing import Any

from data_loading.labels import class_names, describe_one_class
from data_loading.mixed import Listed
from data_loading.split import Part
from data_loading.tables import SPLITS
from errors import first_few, plural
from parallel.process_group import get_logger

NOUN = {"class": "class", "multi": "class", "number": "number"}  # of an output
IN_LOG = {"class": "of", "multi": "with any of", "number": "with"}


def describe_class_problem(dataset: Any, nb_classes: int | None) -> str:
    """Describe classes that suggest a folder of another level; '' if they do not.

    nb_classes: None if labels are not used.
    """
    names = class_names(dataset) or ()
    fix = "give the folder that directly holds one folder of images per class"
    if nb_classes == 1:
        return f"{describe_one_class(names[0] if names else None)}; {fix}"
    if nb_classes and names and SPLITS.issuperset(map(str.lower, names)):
        return f"the classes are called {first_few(names)}, like parts of a data set; {fix}"
    return ""


def describe_similar_classes(names: Iterable[str]) -> str:
    """Describe names that differ only in case, or in the ` (2)` of `class_names`; '' if none do."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r" \(\d+\)$", "", name).casefold(), []).append(name)
    found = [" and ".join(group) for group in alike.values() if len(group) > 1]
    fix = "if they mean the same, give them one name"
    return f"classes with nearly the same name: {first_few(found)}; {fix}" if found else ""


def describe_fractions(names: Iterable[str]) -> str:
    """Describe classes whose names are fractions, as in a column of prices; '' if none are."""
    number = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)
    found = [name for name in names if number.fullmatch(name) and float(name) % 1]
    fix = "if they are numbers to predict, give --task regression"
    return f"classes are called {first_few(found)}; {fix}" if found else ""


def describe_outputs(count: int, kind: str, some: str = "") -> str:
    """Return `of 3 classes`, `with any of 3 classes` or `with 3 numbers`; some: such as `2 of `."""
    return f"{IN_LOG[kind]} {some}{plural(count, NOUN[kind])}"


def log_dataset(
    dataset: Any,
    is_train: bool,
    used: str,
    nb_classes: int | None = None,
    kind: str = "class",
) -> None:
    """Log images, classes and image size, and what is left out and why; warn of odd classes.

    used: sizes of images, `224 x 224 pixels`. nb_classes: None if labels are not used.
    """
    name, classes, names = "train" if is_train else "val", "", ()
    if nb_classes is not None:
        names = class_names(dataset) or ()
        some = f"{len(names)} of " * (0 < len(names) < nb_classes)
        classes = f" {describe_outputs(nb_classes, kind, some)}"
        classes += f" ({first_few(names)})" if names else ""
    files = dataset.dataset if isinstance(dataset, Part) else dataset
    remarks = files.describe_list(is_train) if isinstance(files, Listed) else ""
    source = f" from {files.what}" if getattr(files, "what", "") else ""
    text = "%s: %s%s%s, used at %s%s"
    get_logger().info(text, name, plural(len(dataset), "image"), classes, source, used, remarks)
    if kind == "class" and (problem := describe_class_problem(dataset, nb_classes)):
        get_logger().warning("%s: %s", name, problem)
    if is_train and kind != "number":
        for odd in filter(None, (describe_similar_classes(names), describe_fractions(names))):
            get_logger().warning("%s: %s", name, odd)
