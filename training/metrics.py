# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Metrics by name: each computed from sums over images, or from the outputs of all images.

python -c "from training.metrics import METRICS; print(*METRICS)"

Rates are in percent, as top-1 accuracy is. An image whose outputs hold NaN or +Inf counts as wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from insight.scores import average_precision, r_squared
from training.meters import unusable

DEFAULTS = {  # by kind of targets; mixed labels are of training alone
    "class": ("acc1", "acc5"),
    "multi": ("map", "f1", "exact_match"),
    "number": ("rmse", "mae", "r2"),
}
LABELED = ("class", "multi")
MOST_CLASSES = 5000  # of a confusion matrix, which then has 200 MB


def default_metrics(kind: str) -> tuple[str, ...]:
    """Return the metrics of a kind of targets; the first of them chooses the best checkpoint."""
    return DEFAULTS[kind]


def _bins(chances: Tensor, count: int) -> Tensor:
    """(N,) probabilities -> (N,) numbers of bins of equal width, for `ece`."""
    edges = torch.linspace(0, 1, count + 1, dtype=chances.dtype, device=chances.device)
    return torch.bucketize(chances, edges[1:-1])


class Batch:
    """Outputs and targets of a batch, with the quantities that several metrics use.

    logits: (N, K) float. kind: of targets. ranks: number of best classes that metrics look at.
    activation: that makes probabilities of logits of one class per image, softmax or sigmoid.
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        kind: str,
        ranks: int,
        dtype: torch.dtype,
        activation: str = "softmax",
    ) -> None:
        self.activation = activation
        self.logits, self.targets, self.kind, self.dtype = logits, targets, kind, dtype
        self.outputs = logits.shape[1]
        self.ranks = min(ranks, self.outputs)

    @cached_property
    def broken(self) -> Tensor:
        """(N,) bool: images without a usable output."""
        if self.kind == "number":
            return ~torch.isfinite(self.logits).all(1)
        return unusable(self.logits)

    @cached_property
    def ranked(self) -> Tensor:
        """(N, ranks) the best classes, the best first."""
        return self.logits.topk(self.ranks, dim=1).indices

    @cached_property
    def gains(self) -> Tensor:
        """(N, ranks) target values of the best classes: 1 or 0, between them for soft targets."""
        if self.kind == "class":
            gains = (self.ranked == self.targets[:, None]).to(self.dtype)
        else:
            gains = self.targets.gather(1, self.ranked).to(self.dtype)
        return gains.masked_fill(self.broken[:, None], 0)

    @cached_property
    def errors(self) -> Tensor:
        """(N, D) outputs - targets, which are numbers."""
        return self.logits.to(self.dtype) - self.targets.to(self.dtype)

    def count(self, labels: Tensor, size: int, where: Tensor | None = None) -> Tensor:
        """(N,) labels -> (size,) number of images of each, only `where` (N,) is true."""
        ones = torch.ones(len(labels), dtype=self.dtype, device=labels.device)
        ones = ones if where is None else where.to(self.dtype)
        return torch.zeros(size, dtype=self.dtype, device=labels.device).index_add_(0, labels, ones)

    def decisions(self, threshold: float | None) -> tuple[Tensor, Tensor]:
        """(N, K) bool of multi-label targets: answers and true labels; broken ones all differ."""
        positive = self.targets >= 0.5
        answer = torch.sigmoid(self.logits) >= (0.5 if threshold is None else threshold)
        return torch.where(self.broken[:, None], ~positive, answer), positive

    def confidences(self, bins: int) -> tuple[Tensor, Tensor]:
        """(N,) bins of the confidence in the best class, as for `ece`, and the confidence."""
        logits = self.logits.to(self.dtype)
        chances = logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(1)
        sure = chances.amax(1).masked_fill(self.broken, 1.0)
        return _bins(sure, bins), sure

    def likelihoods(self, bins: int) -> tuple[Tensor, Tensor]:
        """(N * K,) bins of the probability of each class of several, and the probability.

        Broken outputs are as wrong as can be.
        """
        wrong = 1 - self.targets.to(self.dtype)
        chances = self.logits.to(self.dtype).sigmoid()
        chances = torch.where(self.broken[:, None], wrong, chances).flatten()
        return _bins(chances, bins), chances

    def class_counts(self, threshold: float | None = None) -> Tensor:
        """(3, K) images of each class: right answers, all answers, all targets."""
        if self.kind == "multi":
            answer, positive = self.decisions(threshold)
            found = torch.stack([answer & positive, answer, positive])
            return found.sum(1, dtype=self.dtype)
        answer, right = self.ranked[:, 0], self.gains[:, 0] > 0
        counted = ((self.targets, right), (answer, ~self.broken), (self.targets, None))
        return torch.stack([self.count(labels, self.outputs, each) for labels, each in counted])


@dataclass(frozen=True)
class Metric:
    """A metric, computed from sums over images, or else from all outputs.

    add: sums of a batch, (size,). value: makes the metric of (sums, number of images) in float64.
    whole: makes it of (outputs, targets, kind) of all images instead.
    """

    kinds: Sequence[str]
    add: Callable[[Batch], Tensor] | None = None
    value: Callable[[Tensor, int], Any] | None = None
    whole: Callable[[Tensor, Tensor, str], Any] | None = None
    size: Callable[[int], int] = lambda outputs: 1
    best: str = "highest"  # or lowest; "" for several values
    ranks: int = 1  # best classes that it looks at
    fewest: int = 1  # outputs that it needs


def ratio(part: Any, whole: Any) -> float:
    """Return a fraction in percent; NaN of nothing."""
    return 100 * float(part) / float(whole) if whole else math.nan


def mean(values: Sequence[float | None]) -> float:
    """Mean of the values that are not None; NaN if there is none."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else math.nan


def positive_int(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer >=1")
    return value


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected {', '.join(known)}")
    return value


def checked_threshold(value: Any) -> float | None:
    if value is not None and not (type(value) in (int, float) and 0 < value < 1):
        raise ValueError(f"threshold: got {value!r}, expected a number in (0,1)")
    return value


# --- metrics of the k best classes ------------------------------------------------------------


def accuracy_at(k: int = 1) -> Metric:
    """An image is a hit if a target is among its k best classes; always, if there are fewer.

    With soft targets a hit counts as the largest target value among them.
    """
    positive_int("k", k)

    def add(batch: Batch) -> Tensor:
        return 100 * batch.gains[:, :k].amax(1).sum()[None]

    return Metric(LABELED, add, lambda sums, images: sums[0].item() / images, ranks=k)


def precision_at(k: int) -> Metric:
    """Targets among the k best classes / (k * images)."""

    def add(batch: Batch) -> Tensor:
        return batch.gains[:, :k].sum()[None]

    return Metric(LABELED, add, lambda s, images: ratio(s[0], k * images), ranks=k, fewest=k)


def recall_at(k: int) -> Metric:
    """Targets among the k best classes / all targets."""

    def add(batch: Batch) -> Tensor:
        targets = batch.targets
        if batch.kind == "class":
            targets = torch.ones_like(targets)
        return torch.stack([batch.gains[:, :k].sum(), targets.sum(dtype=batch.dtype)])

    return Metric(LABELED, add, lambda s, _: ratio(*s), size=lambda outputs: 2, ranks=k, fewest=k)


# --- metrics of the answers: the best class, or all labels above a threshold -------------------


def by_class(
    of_class: Callable[[float, float, float], float],
    average: str,
    threshold: float | None,
) -> Metric:
    """A function of (right answers, answers, targets), averaged over classes.

    macro: mean over the classes that are a target or an answer; micro: of the sums over classes;
    per_class: a list with a value for each class, None if it is neither.
    """
    one_of("average", average, ("macro", "micro", "per_class"))
    checked_threshold(threshold)

    def value(sums: Tensor, images: int) -> Any:
        counts = sums.view(3, -1)
        if average == "micro":
            return of_class(*counts.sum(1).tolist())
        values = [of_class(*one) if any(one) else None for one in counts.T.tolist()]
        return values if average == "per_class" else mean(values)

    return Metric(
        LABELED if threshold is None else ("multi",),
        lambda batch: batch.class_counts(threshold).flatten(),
        value,
        size=lambda outputs: 3 * outputs,
        best="" if average == "per_class" else "highest",
    )


def precision(
    k: int | None = None, average: str = "macro", threshold: float | None = None
) -> Metric:
    """Right answers / answers; 0 for a class that is never the answer. With k: `precision_at`."""
    if k is None:
        return by_class(lambda right, answers, _: ratio(right, answers or 1), average, threshold)
    if (average, threshold) != ("macro", None):
        raise ValueError("k takes the k best classes, so it goes with no other argument; drop one")
    return precision_at(positive_int("k", k))


def recall(k: int | None = None, average: str = "macro", threshold: float | None = None) -> Metric:
    """Right answers / targets; 0 for a class that is never a target. With k: `recall_at`."""
    if k is None:
        return by_class(lambda right, _, targets: ratio(right, targets or 1), average, threshold)
    if (average, threshold) != ("macro", None):
        raise ValueError("k takes the k best classes, so it goes with no other argument; drop one")
    return recall_at(positive_int("k", k))


def f1(average: str = "macro", threshold: float | None = None) -> Metric:
    """Harmonic mean of precision and recall: 2 * right answers / (answers + targets)."""

    def of_class(right: float, answers: float, targets: float) -> float:
        return ratio(2 * right, answers + targets)

    return by_class(of_class, average, threshold)


def class_accuracies(sums: Tensor) -> list[float | None]:
    """(3, K) counts of classes -> the accuracy of each; None without images."""
    counts = sums.view(3, -1).T.tolist()
    return [ratio(right, images) if images else None for right, _, images in counts]


def class_accuracy() -> Metric:
    """A list of the accuracy of each class; None for a class without images."""
    return Metric(
        ("class",),
        lambda batch: batch.class_counts().flatten(),
        lambda sums, images: class_accuracies(sums),
        size=lambda outputs: 3 * outputs,
        best="",
    )


def balanced_accuracy() -> Metric:
    """Mean accuracy of the classes that have images."""
    return Metric(
        ("class",),
        lambda batch: batch.class_counts().flatten(),
        lambda sums, images: mean(class_accuracies(sums)),
        size=lambda outputs: 3 * outputs,
    )


def confusion() -> Metric:
    """Matrix of images: a row for each true class, a column for each answer.

    A column more, if it is not empty, is for images without an answer.
    """

    def size(outputs: int) -> int:
        if outputs > MOST_CLASSES:
            raise ValueError(f"{outputs} classes, expected at most {MOST_CLASSES}; drop it")
        return outputs * (outputs + 1)

    def add(batch: Batch) -> Tensor:
        answer = batch.ranked[:, 0].masked_fill(batch.broken, batch.outputs)
        cells = batch.targets * (batch.outputs + 1) + answer
        return batch.count(cells, size(batch.outputs))

    def value(sums: Tensor, images: int) -> list[list[int]]:
        classes = math.isqrt(len(sums))
        matrix = sums.view(classes, classes + 1).long()
        return matrix[:, : classes + bool(matrix[:, -1].any())].tolist()

    return Metric(("class",), add, value, size=size, best="")


def exact_match(threshold: float = 0.5) -> Metric:
    """Images of which all labels are right / images."""
    checked_threshold(threshold)

    def add(batch: Batch) -> Tensor:
        answer, positive = batch.decisions(threshold)
        return (answer == positive).all(1).sum(dtype=batch.dtype)[None]

    return Metric(("multi",), add, lambda sums, images: ratio(sums[0], images))


def hamming(threshold: float = 0.5) -> Metric:
    """Labels that are right / all labels of all images: 1 - Hamming loss."""
    checked_threshold(threshold)

    def add(batch: Batch) -> Tensor:
        answer, positive = batch.decisions(threshold)
        same = (answer == positive).sum(dtype=batch.dtype)
        return torch.stack([same, torch.full_like(same, answer.numel())])

    return Metric(("multi",), add, lambda s, _: ratio(*s), size=lambda outputs: 2)


def ece(bins: int = 15) -> Metric:
    """Expected calibration error (Guo et al. 2017): distance of confidence and accuracy.

    The confidence is the softmax of the best class, or its sigmoid if --loss implies that.
    Bins of confidence are (0, 1/bins], (1/bins, 2/bins] and so on, weighted by their images. An
    image without a usable output has confidence 1 and is wrong.
    """
    positive_int("bins", bins)

    def add(batch: Batch) -> Tensor:
        place, sure = batch.confidences(bins)
        distance = torch.zeros(bins, dtype=batch.dtype, device=sure.device)
        return distance.index_add_(0, place, sure - batch.gains[:, 0])

    def value(sums: Tensor, images: int) -> float:
        return ratio(sums.abs().sum(), images)

    return Metric(("class",), add, value, size=lambda outputs: bins, best="lowest")


# --- metrics of the order of all scores ---------------------------------------------------------


def scores_and_positives(outputs: Tensor, targets: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(N, K) float64 scores and bool targets of each class against the others.

    An image without usable outputs has the lowest score where it should be high, and the highest
    where it should be low.
    """
    scores = outputs.double()
    if kind == "multi":
        positive = targets >= 0.5
    else:
        positive = F.one_hot(targets, outputs.shape[1]).bool()
        # For two classes the same order as of probabilities, which round to 0 and 1.
        scores = scores - scores.flip(1) if scores.shape[1] == 2 else scores.softmax(1)
    broken = unusable(outputs) | scores.isnan().any(1)
    worst = torch.where(positive, -torch.inf, torch.inf).to(scores.dtype)
    return torch.where(broken[:, None], worst, scores), positive


def area_under_roc(scores: Tensor, positive: Tensor) -> float | None:
    """Probability that a positive (N,) has a higher score than a negative; ties count as half."""
    ordered, own = scores.sort().values, scores[positive]
    positives, negatives = len(own), len(scores) - len(own)
    if not positives or not negatives:
        return None
    # Twice the sum of ranks: whole numbers, although tied scores share the mean of their ranks.
    ranks = torch.searchsorted(ordered, own) + torch.searchsorted(ordered, own, right=True) + 1
    wins = ranks.sum().item() - positives * (positives + 1)
    return 100 * wins / (2 * positives * negatives)


def one_versus_rest(score: Callable[[Tensor, Tensor], float | None], average: str) -> Metric:
    """Mean of `score` over the classes for which it is defined, or a list of all of them."""
    one_of("average", average, ("macro", "per_class"))

    def whole(outputs: Tensor, targets: Tensor, kind: str) -> Any:
        scores, positive = scores_and_positives(outputs, targets, kind)
        values = [score(*columns) for columns in zip(scores.T, positive.T, strict=True)]
        return values if average == "per_class" else mean(values)

    return Metric(LABELED, whole=whole, best="" if average == "per_class" else "highest")


def auroc(average: str = "macro") -> Metric:
    """Area under the ROC curve; mean of all classes, each against the others, or of all labels."""
    return one_versus_rest(lambda *columns: area_under_roc(*columns), average)


def mean_average_precision(average: str = "macro") -> Metric:
    """Area under the curve of precision over recall, without interpolation; mean of all classes."""
    return one_versus_rest(lambda *columns: average_precision(*columns), average)


# --- regression ---------------------------------------------------------------------------------


def mae() -> Metric:
    """Mean absolute error, over images and numbers."""

    def add(batch: Batch) -> Tensor:
        return batch.errors.abs().mean(1).sum()[None]

    return Metric(("number",), add, lambda sums, images: sums[0].item() / images, best="lowest")


def rmse() -> Metric:
    """Root of the mean squared error; the mean of all numbers if there are several."""

    def add(batch: Batch) -> Tensor:
        return batch.errors.square().sum(0)

    def value(sums: Tensor, images: int) -> float:
        return (sums / images).sqrt().mean().item()

    return Metric(("number",), add, value, size=lambda outputs: outputs, best="lowest")


def r2() -> Metric:
    """1 - squared error / variance of the targets; the mean of all numbers if there are several.

    It takes all outputs, since the variance as a difference of sums would lose its digits. NaN if a
    number never varies.
    """

    def whole(outputs: Tensor, targets: Tensor, kind: str) -> float:
        return r_squared(outputs, targets).mean().item()

    return Metric(("number",), whole=whole)


METRICS: dict[str, Callable[..., Metric]] = {
    "acc1": lambda: accuracy_at(1),
    "acc5": lambda: accuracy_at(5),
    "acc": accuracy_at,
    "precision": precision,
    "recall": recall,
    "f1": f1,
    "balanced_accuracy": balanced_accuracy,
    "class_accuracy": class_accuracy,
    "confusion": confusion,
    "auroc": auroc,
    "map": mean_average_precision,
    "ece": ece,
    "exact_match": exact_match,
    "hamming": hamming,
    "mae": mae,
    "rmse": rmse,
    "r2": r2,
}
