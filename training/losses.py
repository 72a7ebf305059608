# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Losses by name; `training/criterion.py` adds them up.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --loss "0.5*focal(gamma=2) + ce"

A loss is a function (outputs, targets) -> (N,), a value for each image. outputs: (N, K) logits, or
(N, D) predicted numbers. Kinds of targets:

    class   (N,) integers
    soft    (N, K) probabilities that sum to 1, as of mixup
    multi   (N, K) of zeros and ones, any number of ones in a row
    number  (N,) or (N, D)

Some are in timm too. Here they give a value for each image, keep float64, and have finite gradients
where a probability rounds to 0 or 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError

EPS = torch.finfo(torch.float32).eps
TINY = 1e-12  # smallest base of a power: below it the power is 0, but its gradient would be Inf


def one_hot(targets: Tensor, outputs: Tensor) -> Tensor:
    """Labels (N,) -> (N, K) of zeros and ones, with the data type of outputs (N, K)."""
    if targets.ndim == outputs.ndim:
        return targets.to(outputs.dtype)
    return F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)


# --- one class per image --------------------------------------------------------------------


def cross_entropy(outputs: Tensor, targets: Tensor) -> Any:
    """-log p of the class, and (N,) 0 for targets of -100, otherwise 1; of probabilities the mean.

    As torch does, `Criterion` leaves out images that do not count.
    """
    values = F.cross_entropy(outputs, targets, reduction="none")
    return values if targets.ndim > 1 else (values, (targets != -100).to(values.dtype))


def _soft_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return -(targets * outputs.log_softmax(1)).sum(1)


def _valid_targets(
    outputs: Tensor, targets: Tensor, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return float targets (N, K), zero where ignored, and which are not ignored."""
    valid = targets != ignore_index
    floats = one_hot(targets * valid, outputs) * (valid if valid.ndim == 2 else valid[:, None])
    return (floats / (EPS + floats.sum(1, keepdim=True)) if normalize else floats), valid


def soft_target_ce(
    outputs: Tensor, targets: Tensor, normalize_targets: bool = True, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """ClassyVision's soft_target_cross_entropy; returns also (N,) 1 for images that count, or 0.

    normalize_targets: rescale a row of several classes to a sum of 1. Targets equal to
    `ignore_index` add nothing, and an image without others does not count in the mean.
    """
    floats, valid = _valid_targets(outputs, targets, ignore_index, normalize_targets)
    counts = valid.reshape(len(valid), -1).any(1).to(outputs.dtype)
    return _soft_cross_entropy(outputs, floats), counts


def classy_smoothing(
    outputs: Tensor, targets: Tensor, smoothing: float = 0.1, ignore_index: int = -100
) -> Any:
    """ClassyVision's label_smoothing_cross_entropy: targets (t + s/K) / (1 + s).

    Torch's label_smoothing = s / (1 + s) is the same: 0.0909 for s = 0.1. Images with ignored
    targets alone count in the mean, as in ClassyVision, except without smoothing, as in evaluation.
    """
    if smoothing == 0:
        return soft_target_ce(outputs, targets, ignore_index=ignore_index)
    floats, _ = _valid_targets(outputs, targets, ignore_index, normalize=True)
    floats = floats + smoothing / outputs.shape[1]
    return _soft_cross_entropy(outputs, floats / (EPS + floats.sum(1, keepdim=True)))


def focal(outputs: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """(1 - p)^gamma * -log p of the class (arXiv 1708.02002), with softmax."""
    log_p = outputs.log_softmax(1)
    weights = (-log_p.expm1()).clamp(min=TINY) ** gamma  # (1 - p)^gamma
    return -(one_hot(targets, outputs) * weights * log_p).sum(1)


def poly(outputs: Tensor, targets: Tensor, epsilon: float = 2.0) -> Tensor:
    """Poly-1 (arXiv 2204.12511): cross-entropy + epsilon * (1 - p)."""
    targets = one_hot(targets, outputs)
    p = (targets * outputs.softmax(1)).sum(1)
    return _soft_cross_entropy(outputs, targets) + epsilon * (1 - p)


def asymmetric_single(
    outputs: Tensor,
    targets: Tensor,
    gamma_pos: float = 1.0,
    gamma_neg: float = 4.0,
    eps: float = 0.1,
) -> Tensor:
    """timm's AsymmetricLossSingleLabel (arXiv 2009.14119); eps: its own label smoothing."""
    log_p, targets = outputs.log_softmax(1), one_hot(targets, outputs)
    wrong = torch.where(targets > 0, -log_p.expm1(), log_p.exp())  # 1 - p of the class, p of others
    weights = wrong.clamp(min=TINY) ** (gamma_pos * targets + gamma_neg * (1 - targets))
    smoothed = targets * (1 - eps) + eps / outputs.shape[1]
    return -(smoothed * weights * log_p).sum(1)


def jsd(outputs: Tensor, targets: Tensor, weight: float = 0.5) -> Tensor:
    """Jensen-Shannon divergence of target and prediction (arXiv 2105.04522), for noisy labels.

    weight: of the target, between 0 and 1: near 0 like cross-entropy, near 1 like mean absolute
    error. It is divided by -(1 - weight) * log(1 - weight), as in the paper.
    """
    log_p, targets = outputs.log_softmax(1), one_hot(targets, outputs)
    log_mean = torch.logaddexp(targets.log() + math.log(weight), log_p + math.log1p(-weight))
    to_target = (torch.xlogy(targets, targets) - targets * log_mean).sum(1)
    to_prediction = (log_p.exp() * (log_p - log_mean)).sum(1)
    divergence = weight * to_target + (1 - weight) * to_prediction
    return divergence / (-(1 - weight) * math.log1p(-weight))


# --- several classes per image --------------------------------------------------------------


def bce(
    outputs: Tensor, targets: Tensor, threshold: float | None = None, sum_classes: bool = False
) -> Tensor:
    """Binary cross-entropy (timm's BinaryCrossEntropy), the mean over classes or their sum.

    threshold: targets above it are 1, others 0.
    """
    targets = one_hot(targets, outputs)
    if threshold is not None:
        targets = (targets > threshold).to(outputs.dtype)
    values = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return values.sum(1) if sum_classes else values.mean(1)


def binary_focal(
    outputs: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    sum_classes: bool = False,
) -> Tensor:
    """torchvision's sigmoid_focal_loss of each class (arXiv 1708.02002): mean, or sum, of classes.

    alpha: weight of the positive targets, 1 - alpha of the negative ones; None: equal weights.
    """
    targets = one_hot(targets, outputs)
    values = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    wrong = outputs.sigmoid() * (1 - targets) + (-outputs).sigmoid() * targets  # 1 - p
    values = values * wrong.clamp(min=TINY) ** gamma
    if alpha is not None:
        values = values * (alpha * targets + (1 - alpha) * (1 - targets))
    return values.sum(1) if sum_classes else values.mean(1)


def asymmetric(
    outputs: Tensor,
    targets: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
) -> Tensor:
    """timm's AsymmetricLossMultiLabel (arXiv 2009.14119), summed over classes.

    clip: probability margin of negative classes. Log p of positive ones is not cut off at 1e-8.
    """
    targets = one_hot(targets, outputs)
    negative = ((-outputs).sigmoid() + clip).clamp(max=1.0)  # 1 - p, shifted
    log_negative = negative.log() if clip > 0 else F.logsigmoid(-outputs)
    values = targets * F.logsigmoid(outputs) + (1 - targets) * log_negative
    wrong = 1 - outputs.sigmoid() * targets - negative * (1 - targets)
    weights = wrong.clamp(min=TINY) ** (gamma_pos * targets + gamma_neg * (1 - targets))
    return -(weights * values).sum(1)


def zlpr(outputs: Tensor, targets: Tensor) -> Tensor:
    """log(1 + sum over positives of e^-s) + log(1 + sum over negatives of e^s) (arXiv 2208.02955).

    Targets between 0 and 1 count in both sums by their fractions.
    """
    targets, zeros = one_hot(targets, outputs), outputs.new_zeros(len(outputs), 1)
    positive = torch.cat([targets.log() - outputs, zeros], 1).logsumexp(1)
    return positive + torch.cat([(1 - targets).log() + outputs, zeros], 1).logsumexp(1)


# --- numbers --------------------------------------------------------------------------------


def _numbers(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets (N,) or (N, D) -> the shape and the data type of the outputs."""
    if targets.numel() != outputs.numel():  # broadcasting would give a wrong loss without an error
        got = f"targets of shape {tuple(targets.shape)} for outputs of {tuple(outputs.shape)}"
        raise UserError(f"{got}; the network must predict as many numbers as an image has")
    return targets.reshape(outputs.shape).to(outputs.dtype)


def _error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - _numbers(targets, outputs)).reshape(len(outputs), -1)  # (N, D)


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of an image's numbers."""
    return _error(outputs, targets).abs().mean(1)


def l2(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of an image's numbers."""
    return _error(outputs, targets).square().mean(1)


def smooth_l1(outputs: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    """Error^2 / (2 beta) if it is below beta, else |error| - beta / 2."""
    error = _error(outputs, targets)
    return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=beta).mean(1)


def barron(outputs: Tensor, targets: Tensor, alpha: float = 1.0, c: float = 1.0) -> Tensor:
    """Barron's general robust loss (arXiv 1701.03077), as in ClassyVision.

    With x = (error / c)^2 and z = max(1, 2 - alpha): log(x / 2 + 1) for alpha 0, 1 - exp(-x / 2)
    for alpha -inf and inf, otherwise z / alpha * ((x / z + 1)^(alpha / 2) - 1).
    """
    alpha, x = float(alpha), (_error(outputs, targets) / c).square()
    if alpha == 0:
        return (x / 2).log1p().mean(1)
    if math.isinf(alpha):
        return -(-x / 2).expm1().mean(1)
    z = max(1.0, 2.0 - alpha)
    return (z / alpha * (alpha / 2 * (x / z).log1p()).expm1()).mean(1)


# --- tables ---------------------------------------------------------------------------------


class Range(NamedTuple):
    """Values that an argument may have; None is always allowed, as a default."""

    text: str
    holds: Callable[[float], bool]


NOT_NEGATIVE = Range("a number of at least 0", lambda x: 0 <= x < math.inf)
POSITIVE = Range("a number above 0", lambda x: 0 < x < math.inf)
FRACTION = Range("a number from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_1 = Range("a number of at least 0 and below 1", lambda x: 0 <= x < 1)
FINITE = Range("a number", lambda x: -math.inf < x < math.inf)
ANY = Range("a number, inf or -inf", lambda x: x == x)
INSIDE = Range("a number between 0 and 1", lambda x: 0 < x < 1)


class Row(NamedTuple):
    """A loss, the kinds of targets that it takes, ranges of its arguments, others in evaluation."""

    function: Callable[..., Any]
    takes: str
    evaluation: dict[str, Any] = {}
    ranges: dict[str, Range] = {}


GAMMAS = dict.fromkeys(("gamma_pos", "gamma_neg"), NOT_NEGATIVE)
LOSSES: dict[str, Row] = {
    "ce": Row(cross_entropy, "class soft"),
    "soft_target_ce": Row(soft_target_ce, "class soft multi"),
    "classy_smoothing": Row(
        classy_smoothing, "class soft multi", {"smoothing": 0.0}, {"smoothing": BELOW_1}
    ),
    "focal": Row(focal, "class soft", ranges={"gamma": NOT_NEGATIVE}),
    "poly": Row(poly, "class soft", ranges={"epsilon": FINITE}),
    "asymmetric_single": Row(asymmetric_single, "class", {"eps": 0.0}, GAMMAS | {"eps": BELOW_1}),
    "jsd": Row(jsd, "class soft", ranges={"weight": INSIDE}),
    "bce": Row(bce, "class soft multi", ranges={"threshold": FRACTION}),
    "binary_focal": Row(
        binary_focal, "class soft multi", ranges={"gamma": NOT_NEGATIVE, "alpha": FRACTION}
    ),
    "asymmetric": Row(asymmetric, "class soft multi", ranges=GAMMAS | {"clip": FRACTION}),
    "zlpr": Row(zlpr, "class soft multi"),
    "l1": Row(l1, "number"),
    "l2": Row(l2, "number"),
    "smooth_l1": Row(smooth_l1, "number", ranges={"beta": NOT_NEGATIVE}),
    "barron": Row(barron, "number", ranges={"alpha": ANY, "c": POSITIVE}),
}


def _positive_indices(targets: Tensor, outputs: Tensor) -> Tensor:
    """(N, K) of zeros and ones -> (N, K), the classes of a row, then -1."""
    targets = one_hot(targets, outputs)
    order = targets.argsort(dim=1, descending=True, stable=True)
    return torch.where(targets.gather(1, order) > 0, order, -1)


def _signs(targets: Tensor, outputs: Tensor) -> Tensor:
    return 2 * one_hot(targets, outputs) - 1


# Classes of torch.nn: the kinds of targets that they take, and these in the form of torch.
TORCH_LOSSES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor] | None]] = {
    "CrossEntropyLoss": ("class soft", None),
    "MultiMarginLoss": ("class", None),
    "BCEWithLogitsLoss": ("class soft multi", one_hot),
    "MultiLabelSoftMarginLoss": ("class soft multi", one_hot),
    "MultiLabelMarginLoss": ("class multi", _positive_indices),
    "SoftMarginLoss": ("class multi", _signs),
    **dict.fromkeys(("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss"), ("number", _numbers)),
    "PoissonNLLLoss": ("number", _numbers),
}
# Arguments of these classes; a list has a value for each class.
TORCH_RANGES = {"weight": NOT_NEGATIVE, "pos_weight": NOT_NEGATIVE, "label_smoothing": BELOW_1}
NOT_LOGITS = {  # classes of torch.nn that take probabilities, where networks give logits
    "NLLLoss": "ce",
    "BCELoss": "bce",
    "KLDivLoss": "ce or jsd",
}
