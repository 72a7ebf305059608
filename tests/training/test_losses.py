# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Each loss by hand, by its gradient, against timm and torchvision, and at extreme logits."""

import math
from math import log

import pytest
import torch
from timm import loss as timm_loss
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from training import losses
from training.losses import LOSSES

D = torch.float64
# Softmax of (0, log 3) is (1/4, 3/4); sigmoids are 1/2 and 3/4.
LOGITS = torch.tensor([[0.0, log(3)]], dtype=D)
FIRST, SECOND = torch.tensor([0]), torch.tensor([1])
HALF = torch.tensor([[0.5, 0.5]], dtype=D)
BOTH, NONE = torch.ones(1, 2, dtype=D), torch.zeros(1, 2, dtype=D)
NUMBERS = torch.tensor([[2.0, 5.0]], dtype=D)  # errors of -1 and 3
TARGETS = torch.tensor([[3.0, 2.0]], dtype=D)
PLAIN_JSD = (0.5 * log(1 / 0.875) + 0.5 * (0.25 * log(2) + 0.75 * log(6 / 7))) / (0.5 * log(2))


@pytest.mark.parametrize(
    ("name", "options", "targets", "expected"),
    [
        ("ce", {}, FIRST, log(4)),  # -log 1/4
        ("ce", {}, SECOND, log(4 / 3)),
        ("ce", {}, HALF, (log(4) + log(4 / 3)) / 2),
        ("focal", {}, SECOND, 1 / 16 * log(4 / 3)),  # (1 - 3/4)^2
        ("focal", {"gamma": 1}, FIRST, 3 / 4 * log(4)),
        ("focal", {"gamma": 0}, HALF, (log(4) + log(4 / 3)) / 2),
        ("poly", {}, SECOND, log(4 / 3) + 2 * 1 / 4),
        ("poly", {"epsilon": -1}, FIRST, log(4) - 3 / 4),
        ("poly", {}, HALF, (log(4) + log(4 / 3)) / 2 + 2 * (1 - (1 / 8 + 3 / 8))),
        ("asymmetric_single", {"gamma_neg": 2, "eps": 0}, SECOND, 1 / 4 * log(4 / 3)),
        (  # targets (0.1, 0.9), weights ((1/4)^2, 1/4)
            *("asymmetric_single", {"gamma_neg": 2, "eps": 0.2}, SECOND),
            0.9 * 1 / 4 * log(4 / 3) + 0.1 * 1 / 16 * log(4),
        ),
        ("jsd", {}, SECOND, PLAIN_JSD),  # the mean of (0, 1) and (1/4, 3/4) is (1/8, 7/8)
        ("bce", {}, SECOND, (log(2) + log(4 / 3)) / 2),
        ("bce", {"sum_classes": True}, NONE, log(2) + log(4)),
        ("bce", {"threshold": 0.4}, HALF, (log(2) + log(4 / 3)) / 2),  # both are 1
        (
            *("binary_focal", {}, SECOND),
            (3 / 4 * 1 / 4 * log(2) + 1 / 4 * 1 / 16 * log(4 / 3)) / 2,
        ),
        (
            *("binary_focal", {"alpha": None, "gamma": 1, "sum_classes": True}, BOTH),
            1 / 2 * log(2) + 1 / 4 * log(4 / 3),
        ),
        ("asymmetric", {"gamma_neg": 2, "clip": 0}, SECOND, 1 / 4 * log(2) + 1 / 4 * log(4 / 3)),
        (  # negatives: 1/2 + 0.05
            *("asymmetric", {"gamma_neg": 2}, SECOND),
            0.45**2 * -log(0.55) + 1 / 4 * log(4 / 3),
        ),
        ("zlpr", {}, SECOND, log(1 + 1 / 3) + log(1 + 1)),
        ("zlpr", {}, BOTH, log(1 + 1 + 1 / 3)),
        ("zlpr", {}, NONE, log(1 + 1 + 3)),
        ("l1", {}, TARGETS, (1 + 3) / 2),
        ("l2", {}, TARGETS, (1 + 9) / 2),
        ("smooth_l1", {}, TARGETS, (0.5 + 2.5) / 2),
        ("smooth_l1", {"beta": 2}, TARGETS, (1 / 4 + 2) / 2),
        ("barron", {"alpha": 2}, TARGETS, (1 / 2 + 9 / 2) / 2),  # z = 1
        ("barron", {"alpha": -2, "c": 2}, TARGETS, (2 * (1 - 16 / 17) + 2 * (1 - 16 / 25)) / 2),
        ("barron", {"alpha": -math.inf}, TARGETS, (1 - math.exp(-0.5) + 1 - math.exp(-4.5)) / 2),
        ("barron", {"alpha": "inf"}, TARGETS, (1 - math.exp(-0.5) + 1 - math.exp(-4.5)) / 2),
    ],
)
def test_losses_by_hand(name, options, targets, expected):
    outputs = NUMBERS if LOSSES[name].takes == "number" else LOGITS
    values = LOSSES[name].function(outputs, targets, **options)
    values = values[0] if isinstance(values, tuple) else values  # and which images count
    assert values.tolist() == pytest.approx([expected])


def test_barron_gives_classyvisions_values():
    outputs, targets = torch.tensor([[2.0]]), torch.tensor([3.0])
    found = [losses.barron(outputs, targets, alpha).item() for alpha in (1.0, 0.0, math.inf)]
    assert found == pytest.approx([0.41421353816986, 0.40546512603760, 0.39346933364868], rel=1e-6)


def test_soft_targets_give_classyvisions_values():
    row = [1.0, 7.0, 0.0, 0.0, 2.0]
    outputs = torch.tensor([row, [4.0, 2.0, 1.0, 6.0, 0.5]])
    for targets, options, expected in (
        ([1, 0, 0, 0, 1], {}, 5.51097965),
        ([-1, 0, 0, 0, 1], {}, 5.01097918),
        ([1, 0, 0, 0, 1], {"normalize_targets": False}, 11.0219593),
        ([-1, 0, 0, 0, 1], {"normalize_targets": False}, 5.01097965),
    ):
        rows = torch.tensor([targets, [-1] * 5])
        values, counts = losses.soft_target_ce(outputs, rows, ignore_index=-1, **options)
        assert values.tolist() == pytest.approx([expected, 0.0], abs=1e-6)
        assert counts.tolist() == [1, 0]  # a row without a target does not count in the mean
    values, counts = losses.soft_target_ce(outputs, torch.tensor([4, -1]), ignore_index=-1)
    assert values.tolist() == pytest.approx([5.01097918, 0.0], abs=1e-6)
    assert counts.tolist() == [1, 0]


def test_smoothing_gives_classyvisions_values():
    for outputs, targets, smoothing, expected in (
        ([[0.0, 7.0, 0.0, 0.0, 2.0]], [[0, 0, 0, 0, 1]], 0.5, 5.07609558),
        ([[0.0, 7.0]], [-1], 0.2, 3.50090909),  # an ignored label: uniform targets
        ([[1.0, 2.0], [0.0, 2.0]], [0, 1], 0.2, 0.76176142),
    ):
        found = losses.classy_smoothing(
            torch.tensor(outputs), torch.tensor(targets), smoothing, ignore_index=-1
        )
        assert found.mean().item() == pytest.approx(expected, abs=1e-5)


def test_classys_smoothing_is_torchs_with_another_number():
    outputs, labels = torch.randn(6, 4, dtype=D), torch.arange(6) % 4
    expected = F.cross_entropy(outputs, labels, label_smoothing=0.1 / 1.1)
    torch.testing.assert_close(
        losses.classy_smoothing(outputs, labels).mean(), expected, rtol=1e-6, atol=0
    )


def test_losses_equal_those_of_timm_and_torchvision():
    outputs, labels = 3 * torch.randn(8, 5), torch.arange(8) % 5
    multi = (torch.rand(8, 5) < 0.4).float()
    soft = torch.rand(8, 5).softmax(1)
    for ours, theirs in (
        (losses.bce(outputs, labels), timm_loss.BinaryCrossEntropy(0.0)(outputs, labels)),
        (
            losses.bce(outputs, soft, threshold=0.2, sum_classes=True),
            timm_loss.BinaryCrossEntropy(target_threshold=0.2, sum_classes=True)(outputs, soft),
        ),
        (losses.asymmetric(outputs, multi), timm_loss.AsymmetricLossMultiLabel()(outputs, multi)),
        (
            losses.asymmetric_single(outputs, labels),
            timm_loss.AsymmetricLossSingleLabel()(outputs, labels),
        ),
        (losses.poly(outputs, soft), timm_loss.PolyCrossEntropy()(outputs, soft)),
        (losses.zlpr(outputs, multi), timm_loss.ZlprLoss()(outputs, multi)),
        (
            losses.binary_focal(outputs, multi),
            sigmoid_focal_loss(outputs, multi, reduction="mean"),
        ),
    ):
        assert ours.shape == (8,)
        torch.testing.assert_close(ours.mean(), theirs)


def cases(dtype: torch.dtype) -> list:
    """(loss, outputs, targets) for each loss and kind of targets."""
    labels = torch.tensor([0, 2, 1])
    rows = {
        "class": labels,
        "soft": torch.tensor([[0.2, 0.8, 0], [1, 0, 0], [0.3, 0.3, 0.4]], dtype=dtype),
        "multi": torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=dtype),
        "number": torch.tensor([[3, 1, -1], [0.5, 2, 2], [1, -3, 0]], dtype=dtype),
    }
    return [
        pytest.param(row.function, rows[kind], id=f"{name}-{kind}")
        for name, row in LOSSES.items()
        for kind in row.takes.split()
    ]


@pytest.mark.parametrize(("loss", "targets"), cases(D))
def test_gradients_are_those_of_the_values(loss, targets):
    outputs = torch.tensor([[0.3, -1, 2], [0.1, 1, -0.2], [4, 0, -2]], dtype=D, requires_grad=True)

    def values(outputs: torch.Tensor) -> torch.Tensor:
        found = loss(outputs, targets)
        return found[0] if isinstance(found, tuple) else found

    assert torch.autograd.gradcheck(values, outputs)


def test_gradients_equal_those_of_plain_formulas():
    """Shortcuts for stability must not change a gradient."""
    start = torch.randn(4, 3, dtype=D)
    labels, multi = torch.tensor([0, 1, 2, 0]), (torch.rand(4, 3) < 0.5).to(D)
    for ours, plain in (
        (
            lambda x: losses.focal(x, labels, 1.5),
            lambda x: (p := x.softmax(1)[range(4), labels]).log() * -((1 - p) ** 1.5),
        ),
        (
            lambda x: losses.binary_focal(x, multi, 1.5, None),
            lambda x: (
                (p := x.sigmoid() * multi + (1 - x.sigmoid()) * (1 - multi)).log()
                * -((1 - p) ** 1.5)
            ).mean(1),
        ),
        (
            lambda x: losses.zlpr(x, multi),
            lambda x: (
                (1 + (multi * (-x).exp()).sum(1)).log() + (1 + ((1 - multi) * x.exp()).sum(1)).log()
            ),
        ),
        (
            lambda x: losses.barron(x, start.flip(0), -1.5, 0.7),
            lambda x: (
                3.5 / -1.5
                * ((((x - start.flip(0)) / 0.7) ** 2 / 3.5 + 1) ** (-1.5 / 2) - 1)
            ).mean(1),
        ),
    ):  # fmt: skip
        one, other = (start.clone().requires_grad_() for _ in range(2))
        values, expected = ours(one), plain(other)
        torch.testing.assert_close(values, expected)
        for loss in (values, expected):
            loss.sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(("loss", "targets"), cases(torch.float32))
@pytest.mark.parametrize("scale", [100.0, -100.0, 1e4, -1e4])
def test_extreme_logits_have_finite_losses_and_gradients(loss, targets, scale):
    outputs = scale * torch.tensor([[1.0, 0, 0], [1, -1, 0.5], [-1, 1, 1]])
    outputs.requires_grad_()
    values = loss(outputs, targets)
    values = values[0] if isinstance(values, tuple) else values
    values.sum().backward()
    assert values.isfinite().all()
    assert outputs.grad.isfinite().all()
    assert (values >= 0).all()


def test_fractional_gamma_has_a_finite_gradient_at_a_certain_prediction():
    """d/dx x^0.5 is infinite at 0, where the probability rounds to 1."""
    for loss in (losses.focal, losses.binary_focal):
        outputs = torch.tensor([[100.0, -100.0]], requires_grad=True)
        loss(outputs, torch.tensor([0]), gamma=0.5).sum().backward()
        assert outputs.grad.tolist() == [[0, 0]]


def test_a_wrong_prediction_keeps_its_gradient():
    """timm cuts log p off at 1e-8, where a confidently wrong network would stop learning."""
    outputs = torch.tensor([[-50.0]], requires_grad=True)
    losses.asymmetric(outputs, torch.ones(1, 1)).sum().backward()
    assert outputs.grad.item() == pytest.approx(-1, rel=1e-3)


def test_jsd_is_between_cross_entropy_and_mean_absolute_error():
    near_ce, near_mae = losses.jsd(LOGITS, SECOND, 1e-4), losses.jsd(LOGITS, SECOND, 1 - 1e-9)
    assert near_ce.item() == pytest.approx(log(4 / 3), rel=1e-3)
    assert near_mae.item() == pytest.approx(1 / 4, rel=0.1)  # half of |0 - 1/4| + |1 - 3/4|


def test_one_number_may_have_any_of_two_shapes():
    """(N, 1) - (N,) would broadcast to (N, N)."""
    outputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 5.0])
    assert losses.l1(outputs, targets).tolist() == [2, 3]
    assert losses.l1(outputs[:, 0], targets).tolist() == [2, 3]
    with pytest.raises(ValueError, match="must predict as many numbers"):
        losses.l1(torch.zeros(2, 3), targets)
