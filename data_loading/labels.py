# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Labels of a data set as positions in a head, found by the names of the classes.

python -c "from data_loading.labels import Head; print(Head('weights', ('ant', 'bee'), 2))"
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from data_loading.targets import Scale, Targets
from errors import UserError, first_few, plural
from parallel.process_group import get_logger

IMAGENET = 1000  # classes
ROUNDING = 1e-5  # of a normalized number in float32


@dataclass(frozen=True)
class Head:
    """The classes of a head, or the numbers that it predicts, in its order.

    source: file or data that they come from. names: None if unknown. count: None if unknown. kind:
    of its targets, None if unknown. scale: of its numbers, None for the units of the data.
    """

    source: str = ""
    names: Sequence[str] | None = None
    count: int | None = None
    kind: str | None = None
    scale: Scale | None = None

    def fits(self, targets: Targets) -> bool:
        """Return False if only one of head and targets is for numbers, or their units differ."""
        if self.kind and "number" in (self.kind, targets.kind) and self.kind != targets.kind:
            return False
        return targets.kind != "number" or self.scale == targets.scale


def order_classes(names: Iterable[str]) -> list[str]:
    """Return class names in the order of their labels: by number if all are numbers."""
    names = {*names}
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def class_names(dataset: Any) -> list[str] | None:
    """Return the class names of a data set in the order of its labels, None if it has none.

    A class with several names, a tuple, has the first; if another class has that too, as in
    torchvision's ImageNet, it becomes `name (2)`. UserError for other classes of one name.
    """
    labels, listed = getattr(dataset, "class_to_idx", None), getattr(dataset, "classes", None)
    if labels is None and listed is None:
        return None
    labels = {int(label): name for name, label in reversed((labels or {}).items())}
    if listed is not None and len(listed) > len(labels):  # also if two of them have one name
        labels = {n: name[0] if isinstance(name, tuple) else name for n, name in enumerate(listed)}
    if sorted(labels) != [*range(len(labels))]:
        got = first_few(sorted(labels))
        raise UserError(f"class_to_idx has the labels {got}; expected 0 to {len(labels) - 1}")
    seen: Counter = Counter()
    names = []
    for label in sorted(labels):
        name = str(labels[label])
        seen[name] += 1
        if seen[name] > 1 and not (listed is not None and isinstance(listed[label], tuple)):
            both = [n for n in sorted(labels) if str(labels[n]) == name][:2]
            raise UserError(
                f"two classes of the data set are called {name!r}, with the labels {both[0]} and "
                f"{both[1]}; give each class a name of its own"
            )
        names.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return names


def describe_one_class(name: Any = None, things: str = "images") -> str:
    """Return the text for data of a single class, to which the caller adds what to do.

    name: of the class, or its label; None if unknown.
    """
    only = "" if name is None else f", {name!r}"
    return f"all {things} are of one class{only}, so there is nothing to learn"


def describe_label(dataset: Any, label: Tensor) -> str:
    """Return the class of a label, the classes of several, or the numbers of a regression.

    dataset: a `TransformedDataset`. label: (), (K,) of several classes, or (D,) numbers.
    """
    names = dataset.classes
    if dataset.kind == "class":
        return str(names[int(label)]) if names else f"class {int(label)}"
    if dataset.kind == "multi":
        found = [str(names[i]) if names else str(i) for i in label.nonzero().flatten().tolist()]
        return ", ".join(found) or "no class"
    if dataset.targets.scale is not None:
        mean, std = dataset.targets.scale.tensors()
        label = label.double() * std + mean
        label = torch.where(label.abs() < ROUNDING * std, 0.0, label)
    return ", ".join(f"{value:.4g}" for value in label.tolist())


def check_column(names: Sequence[str], example_of: Callable[[int], str], column: str) -> None:
    """Raise UserError for labels of a table of which some are numbers and others are not.

    example_of: a label -> a line that has it. column: its name, with that of the file.
    """
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for label, name in enumerate(names):
        kinds[bool(number.fullmatch(name))].append(label)
    if kinds[True] and kinds[False]:
        numbers, others = (
            first_few((f"{names[label]} ({example_of(label)})" for label in labels), 3)
            for labels in kinds.values()
        )
        raise UserError(
            f"{column} mixes numbers, {numbers}, and names, {others}; correct the table, or if all "
            "are names of classes, give --task classification or multi_label"
        )


def order_of_head(names: Sequence[str], head: Head) -> tuple[list[str] | None, str]:
    """Return the classes of a head as a data set names them, and how they were matched.

    (None, "") if they cannot be matched. Weights of 1000 classes without names are taken for
    ImageNet's if the data has ImageNet's names, or the first of each in English.
    """
    known, count = head.names, head.count or len(names)
    if known is not None and set(names) <= set(known):
        return list(known), ""
    if known is None and count == IMAGENET:
        for how, imagenet in imagenet_names().items():
            spelled = {_simplify(name): name for name in names}
            if len(spelled) == len(names) and all(imagenet.count(name) == 1 for name in spelled):
                return [spelled.get(name, name) for name in imagenet], how
    if _are_numbers(names) and not (known and _are_numbers(known)):
        by_number = {int(name): name for name in names}
        if len(by_number) == len(names) and max(by_number) < count:
            return [by_number.get(place, str(place)) for place in range(count)], "by number"
        return None, ""
    if known is None and count == len(names):
        return list(names), "by position"
    return None, ""


def imagenet_names() -> dict[str, list[str]]:
    """Return ImageNet's names, n01440764 ..., and in English, tench ..., by what they are."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    english = [info.index_to_description(place) for place in range(IMAGENET)]
    return {
        "by ImageNet's names": info.label_names(),
        "by ImageNet's English names": [_simplify(name.partition(",")[0]) for name in english],
    }


def imagenet_classes() -> list[str]:
    """Return ImageNet's names in English, the first of each: `tench`, ..., `crane (2)`."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = [tuple(info.index_to_description(n).split(", ")) for n in range(IMAGENET)]
    return class_names(SimpleNamespace(classes=names))


def _simplify(name: str) -> str:
    """Great_White-Shark -> great white shark"""
    return name.lower().replace("_", " ").replace("-", " ")


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isdecimal() for name in names)


def find_positions(names: Sequence[str], head: Head, kind: str) -> list[int]:
    """Return the position in the head for each label of a data set with these class names.

    Absent classes are logged, and a match by anything but names. UserError if a class is unknown.
    """
    order, how = order_of_head(names, head)
    if order is None:
        raise UserError(differences(names, head, kind))
    places, present, log = (
        {name: place for place, name in enumerate(order)},
        set(names),
        get_logger(),
    )
    if how:
        pairs = first_few((f"{name} = {places[name]}" for name in names), 5)
        text = "%s: %s stores no such class names, so labels are matched %s (%s)"
        log.warning(text, kind, head.source, how, pairs)
    absent = [(head.names or order)[places[name]] for name in order if name not in present]
    if absent:
        text = "%s has no images of %d of the %d classes: %s"
        log.info(text, kind, len(absent), len(order), first_few(absent, 5))
    return [places[name] for name in names]


def find_outputs(names: Sequence[str], head: Head, kind: str) -> list[int]:
    """Return the output for each number of a data set with these names, all of which it needs.

    A single number matches by position, with a warning.
    """
    known = head.names if head.names is not None else names
    if {*names} == {*known} and head.count in (None, len(names)):
        return [known.index(name) for name in names]
    if head.names is not None and len(names) == len(known) == 1:
        text = "%s: %s is compared with what %s predicts: %s"
        get_logger().warning(text, kind, names[0], head.source, known[0])
        return [0]
    raise UserError(differences(names, head, kind))


def differences(names: Sequence[str], head: Head, kind: str, advice: str = "") -> str:
    """Return the message for class names of a data set that do not fit a head, and what to do."""
    if head.names is None:
        return (
            f"{kind} has {plural(len(names), 'class')}, {head.source} {head.count} without names "
            f"by which to match them; give data with {plural(head.count, 'class folder')}, or name "
            f"the folders by label, from 0 to {head.count - 1}"
        )
    things = "columns" if head.kind == "number" else "class folders"
    known, own = set(head.names), set(names)
    unknown = [name for name in names if name not in known]
    absent = [name for name in head.names if name not in own]
    texts = []
    if unknown:
        texts += [f"{kind} has classes that {head.source} does not know: {first_few(unknown, 5)}"]
    if absent:
        texts += [f"{kind} lacks classes of {head.source}: {first_few(absent, 5)}"]
    return f"{'; '.join(texts)}. {advice or f'Rename, remove or restore these {things}'}"
