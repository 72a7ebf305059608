# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Evaluators of frozen features: nearest neighbors and a linear probe, on a fraction of the labels.

python -c "from insight.evaluators import EVALUATORS; print(*EVALUATORS)"

All are functions of tensors, on the device of the features, and draw nothing at random. Targets are
integers (N,) of one class per image, zeros and ones (N, K) of several, or numbers (N, K); the kind
is `class`, `multi` or `number`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_loading.labels import describe_one_class
from data_loading.rng import fold_in_each
from data_loading.samplers import rarest_classes
from data_loading.split import lowest_draws
from errors import UserError, plural
from insight.neighbors import nearest
from insight.scores import score

# Of the linear probe, in units of the mean variance of the features.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FEW = 0xFE3  # stream of the draws of `few_labels`


class Labeled(NamedTuple):
    """Features (N, D) of images, and their targets (N,) or (N, K), on one device."""

    features: Tensor
    targets: Tensor


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_features(train: Labeled, test: Labeled, kind: str) -> None:
    """Raise UserError for sets that cannot be evaluated, such as one with a single class."""
    for name, data in (("train", train), ("test", test)):
        shape = tuple(data.features.shape)
        if len(shape) != 2 or not shape[0] or len(data.targets) != shape[0]:
            raise UserError(
                f"{name} features of shape {shape} and {plural(len(data.targets), 'label')}; "
                "expected features (N, D), N above 0, and N labels"
            )
        if not data.features.isfinite().all():
            raise UserError(f"the {name} features hold NaN or Inf; the network has diverged")
    if train.features.shape[1] != test.features.shape[1]:
        got = f"{train.features.shape[1]} and {test.features.shape[1]}"
        raise UserError(f"train and test features have {got} columns, expected the same network")
    if kind == "class" and len(found := train.targets.unique()) < 2:
        problem = describe_one_class(found.item(), "training images")
        raise UserError(f"{problem}; give images of two classes or more")


def class_count(train: Labeled, test: Labeled) -> int:
    """Return the number of classes of two sets, the highest label plus one."""
    return 1 + int(torch.maximum(train.targets.max(), test.targets.max()))


# --- nearest neighbors ----------------------------------------------------------------------------


def knn_outputs(
    train: Labeled, test: Labeled, kind: str = "class", k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Weighted votes (M, K) of the `k` nearest neighbors by cosine similarity.

    A neighbor's weight is exp(similarity / temperature); the weights of an image sum to 1, so that
    numbers are weighted means. UserError if there are fewer than `k` images to choose from.
    """
    if not (isinstance(k, int) and k >= 1 and temperature > 0):
        got = f"k {k} and temperature {temperature}"
        raise UserError(f"{got}: expected an integer of at least 1, and a number above 0")
    # On GPUs float32 products may be of TF32, with 10 bits.
    dtype = torch.float64 if train.features.device.type == "cuda" else torch.float32
    similar, places = nearest(test.features, train.features, k, dtype=dtype)
    weights = (similar / temperature).softmax(1)  # (M, k)
    targets = train.targets[places]  # (M, k), or (M, k, K)
    if kind == "class":
        votes = weights.new_zeros(len(weights), class_count(train, test))
        return votes.scatter_add_(1, targets, weights)
    return torch.einsum("mk,mkd->md", weights, targets.to(dtype))


def knn(
    train: Labeled, test: Labeled, kind: str = "class", k: int = 20, temperature: float = 0.07
) -> float:
    """Score in percent of `knn_outputs` on the test set (`insight.scores.SCORES`)."""
    check_features(train, test, kind)
    return score(knn_outputs(train, test, kind, k, temperature), test.targets, kind)


# --- linear probe by ridge regression -------------------------------------------------------------


class Ridge(NamedTuple):
    """A linear map of features: `(features - mean) * scale @ weight + bias`."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    weight: Tensor  # (D, K)
    bias: Tensor  # (K,)
    penalty: float  # the chosen one of PENALTIES
    quality: tuple[float, ...]  # of each penalty on left-out training images; highest is best

    def outputs(self, features: Tensor) -> Tensor:
        """(N, D) features -> (N, K) outputs, in float64 where the device has it."""
        return (features.to(self.mean.dtype) - self.mean) * self.scale @ self.weight + self.bias


def fit_ridge(
    train: Labeled, kind: str = "class", classes: int = 0, standardize: bool = True
) -> Ridge:
    """Fit ridge regression, with the penalty that predicts left-out training images best.

    One eigendecomposition serves all PENALTIES, and gives the prediction of each image by the fit
    on all others in closed form (leave-one-out). For `class` the targets are one-hot rows of
    `classes` columns and the accuracy decides; for others the squared error does. standardize:
    divide features by their standard deviation; otherwise they are only centered.
    """
    x, y = train.features, train.targets
    dtype = exact_dtype(x.device)
    x = x.to(dtype)
    mean = x.mean(0)
    x = x - mean
    scale = torch.ones_like(mean)
    if standardize:  # a constant feature stays 0
        spread = x.square().mean(0).sqrt()
        scale = torch.where(spread > 0, 1 / spread.clamp(min=torch.finfo(dtype).tiny), 0.0)
    x = x * scale
    z, values, directions = _decompose(x)
    if kind == "class":
        bias = torch.bincount(y, minlength=classes).to(dtype) / len(y)
        moments = z.new_zeros(classes, z.shape[1]).index_add_(0, y, z).T  # (r, K)
    else:
        y = y.to(dtype)
        bias = y.mean(0)
        moments = z.T @ (y - bias)
    unit = values.sum() / x.shape[1] + torch.finfo(dtype).tiny  # N times the mean variance
    quality: list[float] = []
    for penalty in PENALTIES:
        shrunk = 1 / (values + penalty * unit)
        fitted = z @ (moments * shrunk[:, None]) + bias
        influence = (z.square() @ shrunk + 1 / len(x))[:, None]  # of each image on its own fit
        quality.append(_quality_left_out(fitted, influence, y, kind))
    best = max(range(len(PENALTIES)), key=lambda i: (quality[i], i))  # of equals the largest
    shrunk = 1 / (values + PENALTIES[best] * unit)
    weight = directions @ (moments * shrunk[:, None])
    return Ridge(mean, scale, weight, bias, PENALTIES[best], tuple(quality))


def _decompose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D) -> z (N, r) with orthogonal columns, their squared norms (r,), and (D, r): z = x @ d.

    By the smaller of x'x and xx'. r counts the directions in which x varies.
    """
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    limit = values[-1] * max(x.shape) * torch.finfo(x.dtype).eps
    values, vectors = values[kept := values > limit], vectors[:, kept]
    if wide:
        roots = values.sqrt()
        return vectors * roots, values, x.T @ vectors / roots
    return x @ vectors, values, vectors


def _quality_left_out(fitted: Tensor, influence: Tensor, targets: Tensor, kind: str) -> float:
    """Return accuracy or minus the squared error of images that their own fit leaves out.

    fitted: (N, K) outputs of the fit on all, which it may change. influence: (N, 1). The output
    without an image is (fitted - influence * target) / (1 - influence).
    """
    if kind == "class":  # the denominator changes no order
        left_out = fitted.scatter_add_(1, targets[:, None], -influence)
        return (left_out.argmax(1) == targets).float().mean().item()
    left_out = (fitted - influence * targets) / (1 - influence).clamp(min=1e-9)
    return -(left_out - targets).square().mean().item()


def linear(train: Labeled, test: Labeled, kind: str = "class", standardize: bool = True) -> float:
    """Score in percent of `fit_ridge` on the test set (`insight.scores.SCORES`)."""
    check_features(train, test, kind)
    classes = class_count(train, test) if kind == "class" else 0
    ridge = fit_ridge(train, kind, classes, standardize)
    return score(ridge.outputs(test.features), test.targets, kind)


# --- few labels -----------------------------------------------------------------------------------


def few_labels(targets: Tensor, fraction: float, seed: int, kind: str = "class") -> Tensor:
    """Return the sorted places (n,) of a `fraction` of the images of each class, rounded.

    A class has at least one. Of several labels the rarest decides; numbers are like one class. The
    draw of a place depends on the seed alone, so a smaller fraction is a part of a larger one.
    UserError if the fraction has fewer images than there are classes.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction {fraction:g}: expected a number above 0, up to 1")
    own = targets.cpu()
    if kind == "multi":
        own = rarest_classes(own)[0]
    labels = own.numpy() if kind != "number" else np.zeros(len(own), int)
    classes = len(np.unique(labels))
    if round(fraction * len(labels)) < classes:
        raise UserError(
            f"{fraction:g} of {plural(len(labels), 'image')} is less than one for each of "
            f"{plural(classes, 'class')}; raise the fraction, or give more images"
        )
    draws = fold_in_each(np.arange(len(labels)), seed, FEW)
    kept = lowest_draws(labels, draws, fraction)
    return torch.from_numpy(np.flatnonzero(kept)).to(targets.device)


def take(data: Labeled, places: Tensor) -> Labeled:
    """Return the images at `places`."""
    return Labeled(data.features[places], data.targets[places])


# Functions (train, test, kind, ...) -> score in percent, or a dict of several by name.
EVALUATORS: dict[str, Callable[..., float]] = {"knn": knn, "linear": linear}
