# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Accuracy by confidence."""

import math

import pytest
import torch

from config import parser as options
from training import calibration
from training.evaluation import Metrics, build_metrics


def test_rows_are_means_of_the_images_of_a_bin():
    """Confidences 0.6, 0.6 and 0.9 in bins of a fifth; the last image is wrong."""
    metrics = Metrics(["ece(bins=5)"], None, 2)
    metrics.metrics["reliability"] = calibration.reliability("class", 5)
    metrics.reset("cpu")
    logits = torch.tensor([[math.log(0.55), math.log(0.45)]] * 2 + [[math.log(0.1), math.log(0.9)]])
    metrics.update(logits, torch.tensor([0, 1, 0]), torch.zeros(3))
    metrics.reduce()
    stats = metrics.values()
    rows = stats["reliability"]
    assert [row[2] for row in rows] == [0, 0, 2, 0, 1]
    assert rows[2] == pytest.approx([40, 60, 2, 55, 50])
    assert rows[4] == pytest.approx([80, 100, 1, 90, 0])
    assert rows[0] == [0, 20, 0, None, None]
    gap = sum(row[2] * abs(row[3] - row[4]) for row in rows if row[2]) / 3
    assert stats["ece_5"] == pytest.approx(gap)


def test_confidence_is_the_probability_that_predictions_show():
    """It was the softmax for weights of --loss bce, whose predictions are sigmoids."""
    metrics = Metrics(["ece(bins=1)"], None, 3)
    metrics.metrics["reliability"] = calibration.reliability("class", 1)
    metrics.activation = "sigmoid"
    metrics.reset("cpu")
    logits = torch.tensor([[-3.0, -2.0, -4.0], [1.0, -5.0, -5.0]])
    metrics.update(logits, torch.tensor([1, 0]), torch.zeros(2))
    metrics.reduce()
    ((*_, sure, right),) = metrics.values()["reliability"]
    assert sure == pytest.approx(100 * torch.tensor([-2.0, 1.0]).sigmoid().mean().item())
    assert right == 100.0


def test_each_class_of_several_is_an_answer():
    """Images of several classes had no calibration; a broken output is as wrong as can be."""
    metrics = Metrics(["f1"], None, 2, "multi")
    metrics.metrics["reliability"] = calibration.reliability("multi", 5)
    metrics.reset("cpu")
    logits = torch.tensor([[0.3, 0.9], [0.3, 0.5]]).logit()
    broken = torch.full((1, 2), math.nan)
    targets = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    metrics.update(torch.cat([logits, broken]), targets, torch.zeros(3))
    metrics.reduce()
    rows = metrics.values()["reliability"]
    assert rows[1] == pytest.approx([20, 40, 2, 30, 50])
    assert rows[2] == pytest.approx([40, 60, 1, 50, 100])
    assert rows[4] == pytest.approx([80, 100, 2, 95, 50])  # 0.9 with the class, 1 without it
    assert rows[0] == pytest.approx([0, 20, 1, 0, 100])
    assert calibration.describe(rows, "multi")[0].split() == [
        "probability", "answers", "mean", "probability", "frequency",
    ]  # fmt: skip


def test_table_has_the_bins_with_images():
    lines = calibration.describe([[0, 50, 0, None, None], [50, 100, 1200, 75.25, 60.0]])
    assert len(lines) == 2
    assert lines[1].split() == ["50.0-100.0%", "1,200", "75.25%", "60.00%"]


def test_diagram_has_a_box_as_high_as_the_accuracy():
    blue = (59, 117, 175)
    rows = [[0, 50, 0, None, None], [50, 100, 4, 90.0, 50.0]]
    picture = calibration.draw(rows, "class", "title")
    x = calibration.EDGE + calibration.SIDE * 3 // 4
    column = [picture.getpixel((x, y)) for y in range(picture.height)]
    first = column.index(blue)
    middle = calibration.EDGE + calibration.SIDE // 2
    assert abs(first - middle) <= 1
    x = calibration.EDGE + calibration.SIDE * 9 // 10
    assert picture.getpixel((x, middle - 2)) == blue  # the dot at the mean confidence


def test_gray_of_the_diagram_is_the_share_of_all_images():
    """Of the largest bin it would look as if all were there."""
    picture = calibration.draw([[0, 0, *row] for row in ([1, 20, 0], [1, 90, 0], [6, 95, 0])])
    x, bottom = calibration.EDGE + calibration.SIDE * 5 // 6, calibration.EDGE + calibration.SIDE
    column = [picture.getpixel((x, y)) for y in range(picture.height)]
    height = bottom - column.index((217, 217, 217))  # PALE
    assert height == pytest.approx(calibration.SIDE * 6 / 8, abs=2)


def test_a_run_measures_the_probabilities_that_its_loss_implies():
    words = ["--data_path", "photos", "--loss", "bce", "--metrics", "acc1", "ece"]
    args = options.parse(options.finetune_parser(), words)
    assert build_metrics(args, 3).activation == "sigmoid"
    assert build_metrics(args.replace(loss=None), 3).activation == "softmax"
