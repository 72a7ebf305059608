# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Calibration of a classifier: accuracy by confidence, as a table and as a reliability diagram.

python predict.py runs/finetune labeled --output results.csv
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.metrics import Batch, Metric, ratio

BINS = 15  # as `metrics.ece` has them
SIDE, EDGE, FONT = 360, 56, 14  # of the diagram, its margins and its letters, in pixels
BLUE, RED, INK, PALE = "#3b75af", "#c44e52", "#303030", "#d9d9d9"


def reliability(kind: str, bins: int = BINS) -> Metric:
    """A row for each bin of confidence: its range, answers, mean confidence and accuracy.

    All but the answers are in percent; the means are None where there are none. kind: of the
    targets. Of several classes an image has an answer for each of them, the confidence is the
    probability of the class, and accuracy the share of images that have it.
    """

    def add(batch: Batch) -> Tensor:
        if kind == "multi":
            place, sure = batch.likelihoods(bins)
            right = batch.targets.to(sure.dtype).flatten()
        else:
            place, sure = batch.confidences(bins)
            right = batch.gains[:, 0]
        columns = torch.stack([torch.ones_like(sure), sure, right], 1)
        return columns.new_zeros(bins, 3).index_add_(0, place, columns).flatten()

    def value(sums: Tensor, images: int) -> list[list[float | None]]:
        rows = sums.view(-1, 3).tolist()
        means = [[ratio(x, row[0]) if row[0] else None for x in row[1:]] for row in rows]
        ends = [round(100 * number / bins, 2) for number in range(bins + 1)]
        both = zip(pairwise(ends), rows, means, strict=True)
        return [[*span, int(row[0]), *mean] for span, row, mean in both]

    return Metric((kind,), add, value, size=lambda outputs: 3 * bins, best="")


Rows = Sequence[Sequence[float | None]]
HEADS = {  # the range of a row, what it counts, its confidence and its accuracy, by kind
    "class": ("from", "to", "images", "confidence", "accuracy"),
    "multi": ("from", "to", "answers", "probability", "frequency"),
}


def describe(rows: Rows, kind: str = "class") -> list[str]:
    """Return the lines of a table of the bins that have images."""
    counted, sure, right = HEADS[kind][2:]
    lines = [f"{sure:11}  {counted:>11}  {f'mean {sure}':>16}  {right:>9}"]
    for low, high, images, sure, right in rows:
        if images:
            lines.append(f"{low:5.1f}-{high:5.1f}%  {images:9,}  {sure:14.2f}%  {right:7.2f}%")
    return lines


def draw(rows: Rows, kind: str = "class", title: str = "") -> Image.Image:
    """Draw accuracy by confidence, the diagonal of a calibrated network, and shares of images."""
    canvas = Image.new("RGB", (SIDE + 2 * EDGE, SIDE + 2 * EDGE), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)
    total, width = sum(row[2] for row in rows), SIDE / len(rows)
    counted, confidence, accuracy = HEADS[kind][2:]

    def place(x: float, y: float) -> tuple[float, float]:
        return EDGE + SIDE * x, EDGE + SIDE * (1 - y)

    for number, (*_, images, sure, right) in enumerate(rows):
        left = number / len(rows)
        if images:
            share = place(left, images / total), place(left + 1 / len(rows), 0)
            pen.rectangle(share, fill=PALE)
            x, y = place(left, right / 100)
            pen.rectangle((x + 1, y, x + width - 1, EDGE + SIDE), outline=BLUE, width=2)
            x, y = place(sure / 100, right / 100)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=BLUE)
    pen.line((place(0, 0), place(1, 1)), fill=RED, width=1)
    pen.rectangle((place(0, 1), place(1, 0)), outline=INK)
    for percent in (0, 50, 100):
        pen.text((EDGE + SIDE * percent / 100, EDGE + SIDE + 6), f"{percent}%", INK, font, "mt")
        pen.text((EDGE - 6, EDGE + SIDE * (1 - percent / 100)), f"{percent}%", INK, font, "rm")
    pen.text((EDGE + SIDE / 2, SIDE + 2 * EDGE - 8), confidence, INK, font, "ms")
    pen.text((EDGE, EDGE - 24), f"{accuracy} (boxes), {counted} (gray)", INK, font, "ls")
    pen.text((EDGE, EDGE - 6), title, INK, font, "ls")
    return canvas
