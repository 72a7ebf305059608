# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The logistic probe reaches its minimum, and chooses its penalty on left-out images."""

import pytest
import torch
import torch.nn.functional as F

from insight import logistic
from insight.logistic import PENALTIES, fit_logistic, hold_out


def blobs(count: int, classes: int, dims: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, dims, generator=generator)
    labels = torch.arange(count) % classes
    return centers[labels] + noise * torch.randn(count, dims, generator=generator), labels


def objective(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor, penalty: float):
    loss = F.cross_entropy(x @ weights[:-1] + weights[-1], y)
    return loss + penalty / 2 * weights[:-1].square().sum()


@pytest.mark.parametrize("at_once", [1 << 25, 7])
def test_fit_is_the_minimum(at_once, monkeypatch):
    """The gradient by autograd vanishes there, also if it is summed in parts."""
    monkeypatch.setattr(logistic, "AT_ONCE", at_once)
    x, y = blobs(60, 3, 5, 1.0)
    weights = logistic._fit(x, y, 0.01, torch.zeros(6, 3)).requires_grad_(True)
    objective(weights, x, y, 0.01).backward()
    assert weights.grad.abs().max() < 1e-4


def test_penalty_is_chosen_on_left_out_images():
    """Of 400 random channels and 60 images a weak penalty fits the noise alone."""
    x, y = blobs(60, 3, 2, 0.7)
    noise = torch.randn(60, 400, generator=torch.Generator().manual_seed(1))
    found = fit_logistic(torch.cat([x, 0.3 * noise], 1), y, 3)
    clean = fit_logistic(x, y, 3)
    assert found.penalty > clean.penalty
    assert found.penalty in PENALTIES


def test_features_of_any_scale_and_constant_ones_are_fitted():
    x, y = blobs(90, 3, 4, 0.1)
    scale = torch.tensor([1e-4, 1.0, 1e4, 1.0])
    x = torch.cat([x * scale + 100, torch.full((90, 1), 7.0)], 1)
    model = fit_logistic(x, y, 4)  # one class has no images
    assert (model(x).argmax(1) == y).double().mean() == 1
    assert model(x).shape == (90, 4)
    assert model(x).isfinite().all()


def test_directions_of_small_variance_are_found():
    """Features of masked pre-training separate classes where they vary least."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    turn = torch.linalg.qr(torch.randn(20, 20, generator=generator))[0]
    x = torch.randn(400, 20, generator=generator) * torch.logspace(1, -2, 20)
    x[:, -1] += 0.05 * labels
    x = x @ turn
    model = fit_logistic(x[:200], labels[:200], 2)
    assert model.whitened
    assert (model(x[200:]).argmax(1) == labels[200:]).double().mean() > 0.95
    white = (x - x.mean(0)) @ logistic.whiten(x - x.mean(0))
    torch.testing.assert_close(white.T @ white / 400, torch.eye(20), atol=1e-3, rtol=0)


def test_equal_features_have_no_direction():
    assert logistic.whiten(torch.zeros(5, 3)).shape == (3, 0)
    model = fit_logistic(torch.ones(20, 3), torch.arange(20) % 2, 2)
    assert model(torch.ones(1, 3)).isfinite().all()


def test_a_part_of_each_class_is_held_out():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    held = hold_out(labels, 0.2, seed=0)
    assert [int(held[labels == k].sum()) for k in range(3)] == [2, 1, 0]  # a single one is kept
    assert torch.equal(held, hold_out(labels, 0.2, seed=0))
    assert not torch.equal(held, hold_out(labels, 0.2, seed=1))


def test_last_fit_is_to_all_images(monkeypatch):
    """The fit that is reported would lack the images that chose its penalty."""
    rows, real = [], logistic._fit
    monkeypatch.setattr(logistic, "_fit", lambda x, *rest: rows.append(len(x)) or real(x, *rest))
    fit_logistic(*blobs(60, 3, 2, 0.7), 3)
    assert rows == [48] * 2 * len(PENALTIES) + [60]


def test_single_images_of_each_class_are_fitted():
    model = fit_logistic(torch.eye(3), torch.arange(3), 3)
    assert model(torch.eye(3)).argmax(1).tolist() == [0, 1, 2]
    assert model.penalty == max(PENALTIES)
