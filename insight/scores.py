# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Scores of predictions in percent: accuracy, mean average precision, explained variance.

python -c "from insight.scores import SCORES; print(SCORES)"
"""

import torch
from torch import Tensor

SCORES = {"class": "top-1 accuracy", "multi": "mean average precision", "number": "R squared"}


def score(outputs: Tensor, targets: Tensor, kind: str) -> float:
    """Return the score of outputs (N, K) in percent, by the kind of targets (see SCORES).

    kind: `class`, targets (N,) of integers; `multi`, (N, K) of zeros and ones; `number`, (N, K).
    R squared is 0 for the mean of the targets, and below 0 for worse outputs. The last two are
    means over the columns that have a score: those with a positive, or whose numbers vary.
    """
    outputs, targets = outputs.cpu(), torch.as_tensor(targets).cpu()
    if kind == "class":
        return 100 * (outputs.argmax(1) == targets).double().mean().item()
    if kind == "number":
        return 100 * r_squared(outputs, targets).nanmean().item()
    columns = zip(outputs.T, (targets >= 0.5).T, strict=True)
    found = [average_precision(*column) for column in columns]
    found = [value for value in found if value is not None]
    return sum(found) / max(len(found), 1)


def average_precision(scores: Tensor, positive: Tensor) -> float | None:
    """Mean, over the positives (N,), of the precision among scores that are at least as high.

    In percent; None without a positive.
    """
    ordered, own = scores.sort().values, scores[positive].sort().values
    if not len(own):
        return None
    hits = len(own) - torch.searchsorted(own, own)
    answers = len(ordered) - torch.searchsorted(ordered, own)
    return 100 * (hits.double() / answers).mean().item()


def r_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 - squared error / variance of the targets, of each column of (N, K); NaN if it is 0."""
    outputs, targets = outputs.double(), targets.double()
    error = (outputs - targets).square().sum(0)
    spread = (targets - targets.mean(0)).square().sum(0)
    return torch.where(spread > 0, 1 - error / spread, torch.nan)
