# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Targets of an image as a data set gives them: a class, zeros and ones, or numbers.

python -c "from data_loading.targets import Scale; print(Scale((2.0,), (3.0,)))"
"""

import operator
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config.tasks import TASK_OF
from errors import UserError, first_few
from parallel.process_group import get_logger

# Kinds of targets: (N,) integers; (N, K) that sum to 1, of losses alone; (N, K) of zeros and ones;
# (N, D), or (N,) for one.
KINDS = {
    "class": "one class per image",
    "soft": "mixed labels (of --mixup or --cutmix)",
    "multi": "several classes per image",
    "number": "numbers",
}


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each number that a network predicts in units of them."""

    mean: Sequence[float]
    std: Sequence[float]

    def tensors(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return mean and std, (D,) each."""
        mean, std = torch.tensor([list(self.mean), list(self.std)], dtype=dtype, device=device)
        return mean, std


def find_scale(targets: np.ndarray, names: Sequence[str]) -> Scale:
    """Return mean and std of each column of (N, D) targets; std 1, with a warning, if it is 0."""
    mean, std = targets.mean(0), targets.std(0)
    constant = [name for name, spread in zip(names, std, strict=True) if not spread > 0]
    if constant:
        get_logger().warning("train: %s never varies; nothing to learn there", first_few(constant))
    return Scale(tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))


def check_label(label: Any, nb_classes: int) -> int:
    """Return a label as an int; UserError unless it is an integer from 0 to nb_classes - 1."""
    expected = f"expected an integer from 0 to {nb_classes - 1}"
    if label is None:
        raise UserError(f"it has no label; expected (image, label); label: {expected}")
    shape = tuple(getattr(label, "shape", ()))
    try:
        number = operator.index(label)  # also of a tensor of one element
    except TypeError:
        number = None
    if number is None or shape:
        got = f"{type(label).__name__} {reprlib.repr(label)}"
        if shape:
            got = f"{type(label).__name__} of shape {shape}"
        raise UserError(f"got the label {got}, {expected}; convert it in the data set")
    if not 0 <= number < nb_classes:
        raise UserError(f"label {number}; expected 0 to {nb_classes - 1}")
    return number


def check_row(row: Any, kind: str, count: int) -> Tensor:
    """Return zeros and ones, or numbers, as (count,) float64; UserError if they are not that."""
    what = "zeros and ones" if kind == "multi" else "finite numbers"
    expected = f"expected {count} {what}, as --task {TASK_OF[kind]} needs; correct the data set"
    try:
        row = (
            np.array(row) if isinstance(row, np.ndarray) else row
        )  # torch warns if it is read-only
        values = torch.as_tensor(row, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"got the label {reprlib.repr(row)}, {expected}") from None
    if values.ndim == 0 and count == 1:
        values = values[None]
    fits = ((values == 0) | (values == 1)) if kind == "multi" else values.isfinite()
    if values.shape != (count,) or not fits.all():
        shape = f"of shape {tuple(values.shape)} " * (values.shape != (count,))
        raise UserError(f"got the label {shape}{reprlib.repr(values.tolist())}, {expected}")
    return values


@dataclass(frozen=True)
class Targets:
    """The targets of a network: the outputs that they are for, and how a label becomes one.

    kind: class, multi or number. count: of outputs. positions: output of each class, or number, of
    the data; None if they are the same. scale: of numbers, None for the units of the data.
    """

    kind: str
    count: int
    positions: Sequence[int] | None = None
    scale: Scale | None = None

    def read(self, label: Any) -> int | Tensor:
        """Return a class as its output, others as (count,) float32; UserError if it is wrong."""
        own = self.count if self.positions is None else len(self.positions)
        if self.kind == "class":
            number = check_label(label, own)
            return number if self.positions is None else self.positions[number]
        values = check_row(label, self.kind, own)
        if self.positions is not None:  # classes that the data lacks are absent from its images
            place = torch.as_tensor(self.positions)
            values = torch.zeros(self.count, dtype=torch.float64).index_copy_(0, place, values)
        if self.scale is not None:
            mean, std = self.scale.tensors()
            values = (values - mean) / std
        return values.float()
