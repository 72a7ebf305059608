# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The images of an evaluation with the highest losses, as a grid: worst_images/epoch-9.png.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --stem_stride 1 --input_size 32
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_loading.loader import DeviceLoader
from errors import plural
from insight.drawing import draw_images
from insight.predictions import columns, texts
from parallel.process_group import gather_rows, join_rows, pack_rows
from training.pictures import to_show

COUNT, COLUMNS = 16, 4


class Worst:
    """The rows with the highest losses of all that were added, exact over all ranks.

    A row (2 + W,) is the loss, the number of the image, and what is kept of it. Of equal losses the
    lower number is worse; NaN is worse than any number.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu") -> None:
        self.count, self.device, self.rows = count, device, None

    def add(self, ids: Tensor, losses: Tensor, parts: Sequence[Tensor]) -> None:
        """Add images: numbers (N,), losses (N,), and tensors (N,) or (N, D) to keep."""
        rows = pack_rows([losses, ids, *parts])
        rows = rows if self.rows is None else torch.cat([self.rows, rows])
        self.rows = choose(rows, self.count)

    def merged(self) -> Tensor | None:
        """Return the worst rows of all ranks on rank 0, None on others; every rank must call it."""
        parts = [] if self.rows is None else [self.rows]
        rows = gather_rows(join_rows(parts, self.device))
        return choose(rows, self.count).cpu() if rows is not None and len(rows) else rows


def choose(rows: Tensor, count: int) -> Tensor:
    """Return the rows (count, W) of the highest losses, the worst first; see `Worst`."""
    rows = rows[rows[:, 1].argsort(stable=True)]
    losses = rows[:, 0].nan_to_num(nan=torch.inf)
    return rows[losses.argsort(descending=True, stable=True)[:count]]


class WorstImages:
    """Collects the worst images of an evaluation, and draws them.

    activation: of the outputs, softmax or sigmoid. classes: names in the order of the head.
    """

    def __init__(
        self, activation: str, classes: Sequence[str] | None = None, count: int = COUNT
    ) -> None:
        self.activation, self.classes, self.count = activation, classes, count
        self.worst, self.loader, self.kind = Worst(count), None, ""

    def begin(self, loader: DeviceLoader, kind: str) -> None:
        """Forget all images: an evaluation of `loader` begins; kind: of its targets."""
        self.worst, self.loader, self.kind = Worst(self.count, loader.device), loader, kind

    def add(self, batch: Any) -> None:
        """Add a `hooks.Batch` of an evaluation, without waiting for the device."""
        parts = columns(batch.targets, batch.outputs, self.kind, self.activation)
        self.worst.add(batch.ids, batch.loss.flatten(1).sum(1), parts)

    def draw(self) -> Tensor | None:
        """Draw (3, H, W) on rank 0, None on others and without images. Every rank must call it."""
        rows = self.worst.merged()
        if rows is None or not len(rows):
            return None
        return draw_rows(rows, self.loader, self.kind, self.classes)


def draw_rows(
    rows: Tensor, loader: DeviceLoader, kind: str, classes: Sequence[str] | None
) -> Tensor:
    """Draw the images of rows of `Worst`, in their order, with target and prediction.

    loader: reads the images, in this process. A row has the `predictions.columns` of its image.
    """
    images, _, found = loader.reload(0, rows[:, 1].long())
    images = loader.views.center(images)
    pictures = to_show(images, loader.mean, loader.std)
    shown = dict(zip(found.tolist(), pictures, strict=True))
    kept = [row for row in rows.tolist() if int(row[1]) in shown]
    dataset = loader.loader.dataset
    texts_below, paths = [], []
    for loss, number, *rest in kept:
        true, answer, probability = texts(rest, kind, classes)
        paths.append(dataset.path_of(int(number)))
        if kind == "number":
            values = describe_errors(rest)
        else:
            chances = ", ".join(f"{float(x):.2f}" for x in filter(None, probability.split("|")))
            values = ", ".join(filter(None, [f"p {chances}" * bool(chances), f"loss {loss:.3g}"]))
        texts_below.append(f"true: {true or '-'}\npredicted: {answer or '-'}\n{values}")
    title = f"{plural(len(kept), 'image')} of the highest losses"
    title += "" if kind == "number" else "; p: probability"
    images = [shown[int(row[1])] for row in kept]
    return draw_images(images, texts_below, paths, COLUMNS, title)


def describe_errors(row: Sequence[float]) -> str:
    """Return the errors of an image's numbers, in units of the data, as its loss is not.

    row: targets and outputs.
    """
    half = len(row) // 2
    pairs = zip(row[:half], row[half:], strict=True)
    errors = ", ".join(f"{abs(target - output):.3g}" for target, output in pairs)
    return f"error {errors}" if half == 1 else f"errors {errors}"
