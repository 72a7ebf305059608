# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Logistic regression on features by L-BFGS, with its penalty chosen on held-out features.

python probe.py runs/photos --data_path photos --probes logistic
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_loading.rng import fold_in_each
from data_loading.split import lowest_draws
from insight.evaluators import exact_dtype

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.2  # fraction of the images of each class
STREAM = 0x401D  # of the draws of `hold_out`
STEPS = 100  # of L-BFGS for one penalty, at most
AT_ONCE = 1 << 25  # logits that are held at once
SMALLEST = 1e-8  # variance of a direction over the largest one, below which it is rounding
TOLERANCE = 1e-5  # largest value of the gradient at the end


@dataclass(frozen=True)
class Logistic:
    """A classifier (N, D) -> (N, K) on standardized features.

    weight: (D, K); bias: (K,); mean, std: (D,) of the training features. penalty: the one that was
    chosen, of half the sum of the squared weights in the mean cross-entropy. whitened: these
    weights are those of features whose correlations were removed.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    penalty: float
    whitened: bool

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> logits (N, K)."""
        return (features.float() - self.mean) / self.std @ self.weight + self.bias


def fit_logistic(features: Tensor, labels: Tensor, classes: int, seed: int = 0) -> Logistic:
    """Fit a classifier to features (N, D) with labels (N,) in 0..classes-1.

    Each of PENALTIES is fitted without HELD_OUT of the images of each class, to standardized and
    to whitened features; the one with the lowest cross-entropy on the held-out images is fitted to
    all. Their accuracy would be too coarse to choose by.
    """
    features = features.float()
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, 1.0)  # of constant features
    scaled = (features - mean) / std
    directions, held = whiten(scaled), hold_out(labels, HELD_OUT, seed)
    best, lowest = (max(PENALTIES), False), math.inf
    for whitened in (False, True) if held.any() else ():
        inputs = scaled @ directions if whitened else scaled
        start = _zeros(inputs, classes)
        for penalty in sorted(PENALTIES, reverse=True):  # each starts from the last one's weights
            start = _fit(inputs[~held], labels[~held], penalty, start)
            loss = F.cross_entropy(_logits(inputs[held], start), labels[held]).item()
            if loss < lowest:
                best, lowest = (penalty, whitened), loss
    penalty, whitened = best
    inputs = scaled @ directions if whitened else scaled
    weights = _fit(inputs, labels, penalty, _zeros(inputs, classes))
    weight = directions @ weights[:-1] if whitened else weights[:-1]
    return Logistic(weight, weights[-1], mean, std, penalty, whitened)


def whiten(features: Tensor) -> Tensor:
    """Return (D, r) that makes centered features (N, D) uncorrelated, with variance 1.

    r counts the directions in which they vary. Features of masked pre-training vary little in
    directions that separate classes, which a penalty on the others' scale would hide.
    """
    exact = features.to(exact_dtype(features.device))
    values, vectors = torch.linalg.eigh(exact.T @ exact / len(exact))
    kept = values > SMALLEST * values[-1].clamp(min=1e-30)
    return (vectors[:, kept] / values[kept].sqrt()).float()


def hold_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Return which images are held out, (N,) bool: a fraction of each class, drawn by the seed.

    A class with one image keeps it for the fit.
    """
    own = labels.cpu().numpy()
    held = lowest_draws(own, fold_in_each(np.arange(len(own)), seed, STREAM), fraction)
    _, places, counts = np.unique(own, return_inverse=True, return_counts=True)
    return torch.from_numpy(held & (counts > 1)[places]).to(labels.device)


def _zeros(features: Tensor, classes: int) -> Tensor:
    return features.new_zeros(features.shape[1] + 1, classes)


def _logits(features: Tensor, weights: Tensor) -> Tensor:
    return features @ weights[:-1] + weights[-1]


def _fit(features: Tensor, labels: Tensor, penalty: float, start: Tensor) -> Tensor:
    """Minimize the penalized mean cross-entropy; returns (D + 1, K), the bias in the last row."""
    weights = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=STEPS,
        tolerance_grad=TOLERANCE,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, AT_ONCE // weights.shape[1])

    @torch.no_grad()
    def closure() -> Tensor:
        """The loss; its gradient is set by hand, a part of the images at a time."""
        loss = penalty / 2 * weights[:-1].square().sum()
        weights.grad = torch.cat([penalty * weights[:-1], torch.zeros_like(weights[-1:])])
        for part, wanted in zip(features.split(rows), labels.split(rows), strict=True):
            logits = _logits(part, weights)
            loss += F.cross_entropy(logits, wanted, reduction="sum") / len(labels)
            error = logits.softmax(1)
            error[torch.arange(len(wanted), device=error.device), wanted] -= 1
            error /= len(labels)
            weights.grad[:-1] += part.T @ error
            weights.grad[-1] += error.sum(0)
        return loss

    optimizer.step(closure)
    return weights.detach()
