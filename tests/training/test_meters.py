# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Means and accuracies by hand; over several ranks: tests/parallel/test_distributed.py."""

import math

import pytest
import torch

from training.meters import Means, accuracy, is_better, unusable


def value(x: float) -> torch.Tensor:
    return torch.tensor(x)


def test_batches_are_weighted_by_their_images():
    """The official evaluation averages batch means: 4 images of 1 and 1 image of 0 gave 0.5."""
    means = Means(["loss"], "cpu")
    means.update(4, loss=value(1.0))
    means.update(1, loss=value(0.0))
    assert means.read() == {"loss": pytest.approx(0.8)}


def test_read_covers_the_time_since_the_last_read_and_total_covers_all():
    means = Means(["loss", "grad_norm"], "cpu")
    means.update(1, loss=value(2.0), grad_norm=value(10.0))
    means.update(1, loss=value(4.0))
    assert means.read() == {"loss": 3.0, "grad_norm": 10.0}
    means.update(2, loss=value(6.0))
    assert means.read()["loss"] == 6.0
    means.update(2, loss=value(1.0))  # not read yet, but part of the total
    assert means.total() == {"loss": pytest.approx(20 / 6), "grad_norm": 10.0}
    assert means.total() == {"loss": pytest.approx(20 / 6), "grad_norm": 10.0}


def test_mean_of_nothing_is_nan():
    means = Means(["loss", "class_acc"], "cpu")
    means.update(3, loss=value(1.0))
    read = means.read()
    assert read["loss"] == 1.0
    assert math.isnan(read["class_acc"])
    assert math.isnan(Means(["loss"], "cpu").total()["loss"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_left_out(bad):
    means = Means(["loss"], "cpu")
    means.update(8, loss=value(bad))
    means.update(2, loss=value(3.0))
    assert means.read() == {"loss": 3.0}


def test_half_precision_values_are_summed_in_float64():
    """Summed in bfloat16, a thousand ones stop at 256."""
    means = Means(["loss"], "cpu")
    for _ in range(1000):
        means.update(1, loss=torch.ones((), dtype=torch.bfloat16))
    assert means.recent[:, 0].tolist() == [1000, 1000]
    assert means.recent.dtype == torch.float64


def test_update_keeps_no_graph():
    means = Means(["loss"], "cpu")
    means.update(1, loss=torch.ones((), requires_grad=True) * 2)
    assert not means.recent.requires_grad


def test_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="lost"):
        Means(["loss"], "cpu").update(1, lost=value(1.0))


LOGITS = torch.tensor(
    [
        [0.1, 0.9, 0.5, 0.3],  # 1, then 2, 3, 0
        [0.8, 0.1, 0.2, 0.3],  # 0, then 3, 2, 1
        [0.0, 0.1, 0.2, 0.3],  # 3, then 2, 1, 0
        [0.4, 0.3, 0.2, 0.1],  # 0, then 1, 2, 3
    ]
)


def test_accuracy_by_hand():
    labels = torch.tensor([1, 3, 1, 3])  # the label has rank 1, 2, 3, 4
    got = [a.mean().item() for a in accuracy(LOGITS, labels, (1, 2, 3, 4))]
    assert got == [25, 50, 75, 100]


def test_top_5_of_fewer_classes_is_100_percent():
    """timm 0.3.2 raises an error here."""
    assert [a.mean().item() for a in accuracy(LOGITS, torch.tensor([3, 3, 3, 3]))] == [25, 100]
    one = accuracy(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    assert [a.mean().item() for a in one] == [100, 100]


def test_accuracies_have_the_order_of_topk():
    labels = torch.tensor([1, 3, 1, 3])
    assert [a.mean().item() for a in accuracy(LOGITS, labels, (3, 1))] == [75, 25]


def test_class_of_a_nan_logit_is_no_answer():
    """NaN is the largest value to `topk`, so that a broken network was right on one class."""
    logits = torch.eye(4)
    logits[1, 0] = logits[2, 2] = math.nan
    logits[3, 0] = -math.inf  # excludes a class
    assert [a.tolist() for a in accuracy(logits, torch.arange(4), (1, 4))] == [[100, 0, 0, 100]] * 2
    logits[3, 3] = math.inf  # after an overflow there may be several
    assert unusable(logits).tolist() == [False, True, True, True]
    half = torch.full((2, 3), math.nan, dtype=torch.float16)
    assert accuracy(half, torch.tensor([0, 1]))[0].tolist() == [0, 0]


@pytest.mark.parametrize("sizes", [[355], [71] * 5, [1] * 355, [200, 155], [48] * 7 + [19]])
def test_accuracy_does_not_depend_on_the_split_into_batches(sizes):
    """Means of float32 percentages differed in the sixth digit, and became a new best epoch."""
    labels = torch.zeros(355, dtype=torch.long)
    logits = torch.zeros(355, 3)
    logits[:, 0], logits[3::60, 1] = 1, 2  # 6 wrong ones
    means = Means(["acc1"], "cpu")
    for part, own in zip(logits.split(sizes), labels.split(sizes), strict=True):
        means.update(len(own), acc1=accuracy(part, own)[0])
    assert means.read() == {"acc1": 34900 / 355}


def test_one_value_for_each_image_is_a_mean_over_them():
    means = Means(["loss"], "cpu")
    means.update(3, loss=torch.tensor([1.0, math.nan, 2.0]))
    means.update(2, loss=value(6.0))
    assert means.read() == {"loss": pytest.approx(15 / 4)}


@pytest.mark.parametrize(
    ("value", "best", "lower", "expected"),
    [
        (0.0, None, False, True),
        (-3.0, None, False, True),  # R2 of a first epoch
        (2.0, 1.0, False, True),
        (1.0, 1.0, False, False),
        (2.0, 1.0, True, False),
        (0.5, 1.0, True, True),
        (1.0, 1.0, True, False),
        (None, None, False, False),
        (math.nan, None, True, False),
        (math.nan, 1.0, False, False),
        (math.inf, 1.0, False, False),
        (-math.inf, 1.0, True, False),
    ],
)
def test_better_depends_on_the_direction(value, best, lower, expected):
    """A NaN or Inf would stay the best for ever."""
    assert is_better(value, best, lower) is expected
