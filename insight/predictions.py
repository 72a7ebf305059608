# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Outputs of a network as predictions: the best classes and their probabilities, or numbers.

python -c "from insight.predictions import best_classes as f; import torch; print(f(torch.eye(3)))"
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data_loading.targets import Scale

LIKELY = 0.5  # probability from which one of several classes counts as predicted
BROKEN = "the outputs of the network are NaN or infinite"
DIGITS = 6  # significant digits of probabilities and numbers


def unusable(logits: Tensor) -> Tensor:
    """(N, K) logits -> (N,) bool, True if one is NaN or +Inf; -Inf may exclude a class."""
    return ~(logits < torch.inf).all(1)


def best_classes(
    outputs: Tensor, activation: str = "softmax", count: int = 1
) -> tuple[Tensor, Tensor]:
    """(N, K) outputs -> the best classes (N, count), the best first, and their probabilities.

    Of equal outputs the first class is better. activation: softmax or sigmoid. The class is -1
    where outputs are NaN or +Inf.
    """
    outputs = outputs.float()
    found = outputs.argmax(1, keepdim=True) if count == 1 else _ranked(outputs, count)
    broken = unusable(outputs)[:, None]
    return torch.where(broken, -1, found), probabilities(outputs, activation).gather(1, found)


def probabilities(outputs: Tensor, activation: str) -> Tensor:
    """(N, K) outputs -> (N, K) float32 probabilities; activation: softmax or sigmoid."""
    outputs = outputs.float()
    return outputs.sigmoid() if activation == "sigmoid" else outputs.softmax(1)


def in_units(values: Tensor, scale: Scale | None) -> Tensor:
    """(N, D) numbers of the network -> those of the data, float64 on the CPU."""
    values = values.cpu().double()
    if scale is None:
        return values
    mean, std = scale.tensors()
    return values * std + mean


def _ranked(outputs: Tensor, count: int) -> Tensor:
    """(N, K) -> (N, count) classes by falling output; of equal outputs the first is better."""
    if outputs.device.type == "cpu":  # where a whole sort takes longer than a network may
        values, found = outputs.topk(min(count + 1, outputs.shape[1]))
        if not (values[:, 1:] == values[:, :-1]).any():
            return found[:, :count]
    return outputs.argsort(dim=1, descending=True, stable=True)[:, :count]


def columns(targets: Tensor, outputs: Tensor, kind: str, activation: str) -> tuple[Tensor, ...]:
    """Return the numbers to keep of a batch: of one class each 3, otherwise targets and outputs."""
    if kind != "class":
        return targets, outputs
    return targets, *best_classes(outputs, activation)


def texts(row: Sequence[float], kind: str, names: Sequence[str] | None) -> list[str]:
    """Return target, prediction and probability of a row of `columns` as text.

    Several classes, or numbers, are joined by `|`; texts are empty where there is no answer.
    """
    width = 1 if kind == "class" else len(row) // 2  # of the target
    target, answer = row[:width], row[width:]
    return [cell(x) for x in (read_target(target, kind, names), *read_answer(answer, kind, names))]


def read_target(row: Sequence[float], kind: str, names: Sequence[str] | None) -> list[Any]:
    """Return the class of an image, its classes, or its numbers."""
    if kind == "number":
        return [*row]
    labels = row if kind == "class" else [k for k, x in enumerate(row) if x > 0]
    return [name_of(label, names) for label in labels]


def read_answer(
    row: Sequence[float], kind: str, names: Sequence[str] | None, threshold: float = LIKELY
) -> tuple[list[Any], list[float]]:
    """Return what is predicted for an image, in a list, and the probability of each class.

    row: of one class the best class and its probability, otherwise the outputs. The lists are empty
    if the class is -1.
    """
    if kind == "number":
        return [*row], []
    if kind == "class":
        labels, chances = (row[:1], row[1:]) if row[0] >= 0 else ((), ())
    else:
        labels, chances = likely_classes(row, threshold)
    return [name_of(label, names) for label in labels], [*chances]


def likely_classes(
    outputs: Sequence[float], threshold: float = LIKELY
) -> tuple[list[int], list[float]]:
    """Return the classes of an image of several from a probability on, in order, and those."""
    chances = torch.tensor(outputs, dtype=torch.float32).sigmoid().tolist()
    likely = [k for k, chance in enumerate(chances) if chance >= threshold]
    return likely, [chances[k] for k in likely]


def name_of(label: float, classes: Sequence[str] | None) -> str:
    """Return the name of a class, or else its number."""
    return classes[int(label)] if classes else str(int(label))


def number(value: float) -> str:
    """Write a number with 6 significant digits."""
    return f"{value:.{DIGITS}g}"


def cell(value: Any) -> str:
    """Return a value as a cell of a table: lists are joined by `|`, None is empty."""
    if isinstance(value, list):
        return "|".join(map(cell, value))
    return "" if value is None else number(value) if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class PredictionRecords:
    """Turns the outputs of a network into the fields of a result.

    kind: of the targets: class, multi or number. activation: softmax or sigmoid. count: of outputs.
    names: of classes or numbers, None if unknown. scale: of numbers. topk: best classes to list.
    threshold: of several classes. labeled: results have targets too.
    """

    kind: str
    activation: str
    count: int
    names: Sequence[str] | None = None
    scale: Scale | None = None
    topk: int = 5
    threshold: float = LIKELY
    labeled: bool = False

    @property
    def listed(self) -> int:
        """Best classes to list: none for numbers."""
        return 0 if self.kind == "number" else min(self.topk, self.count)

    @cached_property
    def fields(self) -> dict[str, type]:
        """Name and type of each field of a result: str, float, or list of these."""
        target, answer = ([f"{part}{end}" for end in self._ends] for part in PARTS)
        several, found = self.kind == "multi", {"path": str}
        text, value = (list[str], list[float]) if several else (str, float)
        kind = float if self.kind == "number" else text
        found |= dict.fromkeys(target, kind) if self.labeled else {}
        found |= {"loss": float} if self.labeled else {}
        found |= dict.fromkeys(answer, kind)
        found |= {} if self.kind == "number" else {"probability": value}
        for name, probability in self._places[not several :]:
            found |= {name: str, probability: float}
        return found | {"error": str}

    @cached_property
    def _ends(self) -> list[str]:
        """Endings of the fields with targets and predictions: `_NAME` of each number."""
        if self.kind != "number" or self.count == 1:
            return [""]
        return [f"_{name}" for name in self.names or range(self.count)]

    def columns(self, outputs: Tensor) -> Tensor:
        """(N, K) outputs -> (N, 2 * listed) best classes and probabilities, (N, D) of numbers."""
        if self.kind == "number":
            return outputs
        found, chances = best_classes(outputs, self.activation, self.listed)
        return torch.cat([found.to(chances.dtype), chances], 1)

    def in_units(self, values: Tensor) -> Tensor:
        """(N, D) numbers of the network -> those of the data, float64 on the CPU."""
        return in_units(values, self.scale if self.kind == "number" else None)

    def record(self, path: str, best: Sequence[float], outputs: Sequence[float]) -> dict[str, Any]:
        """Return the fields of an image, without its target.

        best: a row of `columns`. outputs: of the network, for several classes.
        """
        found = dict.fromkeys(self.fields) | {"path": plain(path)}
        if self.kind == "number":
            ends = [f"{PARTS[1]}{end}" for end in self._ends]
            broken = not torch.tensor(best).isfinite().all()
            values = dict.fromkeys(ends) if broken else dict(zip(ends, best, strict=True))
            return found | {"error": BROKEN if broken else None} | rounded(values)
        if best[0] < 0:
            return found | {"error": BROKEN}
        pairs = zip(self._places, best[: self.listed], best[self.listed :], strict=True)
        for (name, probability), label, chance in pairs:
            found[name], found[probability] = name_of(label, self.names), _rounded(chance)
        if self.kind == "multi":
            named, chances = read_answer(outputs, self.kind, self.names, self.threshold)
            found |= {"prediction": named, "probability": _rounded(chances)}
        return found

    @cached_property
    def _places(self) -> list[tuple[str, str]]:
        """Fields of the best classes and of their probabilities, the best first."""
        found = [(f"class_{n}", f"probability_{n}") for n in range(1, self.listed + 1)]
        if self.kind == "class":
            found[0] = PARTS[1], "probability"
        return found

    def targets(self, row: Sequence[float], loss: float) -> dict[str, Any]:
        """Return the fields of the target of an image, in the units of the data, and its loss."""
        target = read_target(row, self.kind, self.names)
        values = [target] if self.kind == "multi" else target
        found = zip([f"{PARTS[0]}{end}" for end in self._ends], values, strict=True)
        return rounded(dict(found) | {"loss": loss})

    def bad(self, path: str, reason: str) -> dict[str, Any]:
        """Return the fields of an image that cannot be read."""
        return dict.fromkeys(self.fields) | {"path": plain(path), "error": plain(reason)}


PARTS = ("target", "prediction")


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Round numbers to 6 significant digits, for all formats; None for NaN and Inf, as JSON has."""
    return {name: _rounded(value) for name, value in values.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [*map(_rounded, value)]
    if isinstance(value, float):
        return float(number(value)) if math.isfinite(value) else None
    return value


def plain(text: str) -> str:
    """Return a name as text that any file can hold, though its bytes may be no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
