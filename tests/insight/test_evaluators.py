# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Nearest neighbors and the linear probe against plain loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks import probe_speed
from errors import UserError
from insight import neighbors
from insight.evaluators import PENALTIES, Labeled, few_labels, fit_ridge, knn, knn_outputs, linear
from insight.scores import average_precision, score


def made(
    images: int, columns: int, kind: str = "class", outputs: int = 3, seed: int = 0
) -> Labeled:
    """Features whose first columns say something about the targets."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, columns, generator=generator)
    noise = torch.randn(images, 3, generator=generator)
    hidden = features[:, :3] + 0.5 * noise
    if kind == "class":
        return Labeled(3 + 2 * features, hidden.argmax(1))
    targets = (hidden > 0).float() if kind == "multi" else hidden
    return Labeled(3 + 2 * features, targets)


# --- nearest neighbors ----------------------------------------------------------------------------


def votes_by_loops(train: Labeled, test: Labeled, k: int, temperature: float) -> Tensor:
    rows = []
    for image in test.features.double():
        found = [torch.dot(image, x) / image.norm() / x.norm() for x in train.features.double()]
        nearest = sorted(range(len(found)), key=lambda i: -found[i])[:k]
        weights = [math.exp(found[i] / temperature) for i in nearest]
        row = torch.zeros(3, dtype=torch.float64)
        for i, weight in zip(nearest, weights, strict=True):
            target = train.targets[i]
            row += weight / sum(weights) * (torch.eye(3)[target] if target.ndim == 0 else target)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["class", "multi", "number"])
def test_neighbors_vote_as_in_loops(kind):
    train, test = made(40, 6, kind), made(9, 6, kind, seed=1)
    found = knn_outputs(train, test, kind, k=5, temperature=0.1)
    expected = votes_by_loops(train, test, 5, 0.1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_chunks_of_neighbors_give_the_same(monkeypatch):
    train, test = made(40, 6), made(9, 6, seed=1)
    whole = knn_outputs(train, test, k=5)
    monkeypatch.setattr(neighbors, "AT_ONCE", 80)  # two images at once
    torch.testing.assert_close(knn_outputs(train, test, k=5), whole)


def test_the_scale_of_features_does_not_change_neighbors():
    train, test = made(40, 6), made(9, 6, seed=1)
    larger = Labeled(train.features * torch.linspace(1, 50, 40)[:, None], train.targets)
    torch.testing.assert_close(knn_outputs(larger, test, k=5), knn_outputs(train, test, k=5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 41}, "only 40 images"),
        ({"k": 0}, "at least 1"),
        ({"k": 2.5}, "at least 1"),
        ({"temperature": 0}, "above 0"),
    ],
)
def test_neighbors_that_cannot_be_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        knn(made(40, 6), made(9, 6), **options)


# --- linear probe ---------------------------------------------------------------------------------


def ridge_by_solve(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (D, K) and bias (K,), which is not penalized, by the normal equations."""
    columns = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    ridge = penalty * torch.eye(columns.shape[1], dtype=x.dtype)
    ridge[-1, -1] = 0
    solution = torch.linalg.solve(columns.T @ columns + ridge, columns.T @ y)
    return solution[:-1], solution[-1]


def prepared(data: Labeled, kind: str, standardize: bool) -> tuple[Tensor, Tensor]:
    x = data.features.double()
    x = x - x.mean(0)
    x = x / x.std(0, correction=0) if standardize else x
    y = torch.eye(3)[data.targets] if kind == "class" else data.targets
    return x, y.double()


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("kind", ["class", "multi", "number"])
@pytest.mark.parametrize(("images", "columns"), [(40, 6), (12, 30)])
def test_ridge_is_the_solution_of_the_normal_equations(kind, standardize, images, columns):
    train, test = made(images, columns, kind), made(9, columns, kind, seed=1)
    ridge = fit_ridge(train, kind, 3, standardize)
    x, y = prepared(train, kind, standardize)
    penalty = ridge.penalty * x.square().sum().item() / columns
    weight, bias = ridge_by_solve(x, y, penalty)
    own = (test.features.double() - train.features.double().mean(0)) * ridge.scale
    torch.testing.assert_close(ridge.outputs(test.features), own @ weight + bias)


@pytest.mark.parametrize("kind", ["class", "multi", "number"])
@pytest.mark.parametrize(("images", "columns"), [(20, 6), (12, 30)])
def test_penalty_is_chosen_by_images_that_are_left_out(kind, images, columns):
    """The closed form against one fit for each image and penalty, without that image."""
    train = made(images, columns, kind)
    x, y = prepared(train, kind, True)
    quality = []
    for penalty in PENALTIES:
        rows = []
        for i in range(images):
            kept = torch.arange(images) != i
            weight, bias = ridge_by_solve(x[kept], y[kept], penalty * images)
            rows.append(x[i] @ weight + bias)
        outputs = torch.stack(rows)
        if kind == "class":
            quality.append((outputs.argmax(1) == train.targets).double().mean().item())
        else:
            quality.append(-(outputs - y).square().mean().item())
    ridge = fit_ridge(train, kind, 3)
    assert ridge.quality == pytest.approx(quality)
    assert quality[PENALTIES.index(ridge.penalty)] == pytest.approx(max(quality))


def test_noise_gets_a_large_penalty_and_a_clear_rule_a_small_one():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 50, generator=generator)
    noise = fit_ridge(Labeled(features, torch.randn(60, 1, generator=generator)), "number")
    rule = fit_ridge(Labeled(features, features[:, :1] - features[:, 1:2]), "number")
    assert noise.penalty > 100 * rule.penalty


def test_of_equally_good_penalties_the_largest_is_chosen():
    targets = torch.arange(20) % 2
    ridge = fit_ridge(Labeled(torch.eye(2)[targets], targets), "class", 2)
    assert ridge.quality == (1.0,) * len(PENALTIES)
    assert ridge.penalty == max(PENALTIES)


def test_dead_and_repeated_features_do_no_harm():
    train, test = made(40, 6), made(30, 6, seed=1)
    wider = [
        Labeled(torch.cat([x.features, 0 * x.features, x.features], 1), x.targets)
        for x in (train, test)
    ]
    assert linear(*wider) == pytest.approx(linear(train, test), abs=7)  # an image or two of 30
    assert linear(*wider) > 50


def test_features_that_all_agree_give_the_most_frequent_class():
    train = Labeled(torch.ones(10, 4), torch.tensor([0] * 3 + [1] * 7))
    assert linear(train, Labeled(torch.ones(4, 4), torch.tensor([1, 1, 1, 0]))) == 75


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", [knn, linear])
def test_one_class_is_refused(evaluate):
    one = Labeled(torch.randn(30, 4), torch.full((30,), 2))
    with pytest.raises(UserError, match="one class, 2, so there is nothing to learn"):
        evaluate(one, made(9, 4))


@pytest.mark.parametrize("evaluate", [knn, linear])
def test_features_of_a_diverged_network_are_refused(evaluate):
    bad = made(30, 4)
    bad.features[3, 1] = math.nan
    for sets, name in (((bad, made(9, 4)), "train"), ((made(30, 4), bad), "test")):
        with pytest.raises(UserError, match=f"the {name} features hold NaN or Inf"):
            evaluate(*sets)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (made(0, 4), made(9, 4), "N above 0"),
        (made(30, 4), made(9, 5), "4 and 5 columns"),
        (Labeled(torch.ones(30, 4), torch.ones(29)), made(9, 4), "29 labels"),
    ],
)
def test_sets_that_do_not_fit_are_refused(train, test, words):
    with pytest.raises(UserError, match=words):
        linear(train, test)


def test_a_class_of_the_test_set_alone_counts_as_wrong():
    train, test = made(40, 6), made(9, 6, seed=1)
    targets = torch.cat([test.targets, torch.full((3,), 7)])
    more = Labeled(torch.cat([test.features, test.features[:3]]), targets)
    for evaluate in (knn, linear):
        assert evaluate(train, more) == pytest.approx(evaluate(train, test) * 9 / 12)


# --- few labels -----------------------------------------------------------------------------------


def test_few_labels_are_a_fraction_of_each_class():
    targets = torch.tensor([0] * 100 + [1] * 51 + [2] * 10)
    chosen = few_labels(targets, 0.1, seed=0)
    assert targets[chosen].bincount().tolist() == [10, 5, 1]
    assert chosen.tolist() == sorted(chosen.tolist())


def test_few_labels_depend_on_the_seed_alone_and_are_nested():
    targets = torch.arange(1000) % 4
    chosen = few_labels(targets, 0.1, seed=3)
    assert torch.equal(chosen, few_labels(targets, 0.1, seed=3))
    assert not torch.equal(chosen, few_labels(targets, 0.1, seed=4))
    assert set(few_labels(targets, 0.01, seed=3).tolist()) < set(chosen.tolist())


def test_one_label_of_each_class_is_not_lost_by_rounding():
    """3 / 47 * 47 is below 3 in floating point."""
    targets = torch.arange(47) % 3
    assert targets[few_labels(targets, 3 / 47, 0)].sort().values.tolist() == [0, 1, 2]


def test_few_labels_of_several_classes_and_of_numbers():
    rows = torch.zeros(100, 2)
    rows[:, 0], rows[:10, 1] = 1, 1
    assert rows[few_labels(rows, 0.1, 0, "multi")].sum(0).tolist() == [10, 1]
    assert len(few_labels(torch.randn(100, 3), 0.1, 0, "number")) == 10


@pytest.mark.parametrize(("fraction", "words"), [(0.01, "less than one"), (0, "above 0")])
def test_too_few_labels_are_refused(fraction, words):
    with pytest.raises(UserError, match=words):
        few_labels(torch.arange(100) % 4, fraction, 0)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_by_hand():
    outputs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert score(outputs, torch.tensor([0, 1, 1, 1]), "class") == 75
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])  # the second has no score
    expected = average_precision(outputs[:, 0], rows[:, 0] > 0)
    assert score(outputs, rows, "multi") == expected == pytest.approx(100 * (1 + 2 / 3) / 2)
    numbers = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert score(numbers, numbers, "number") == 100
    assert score(numbers.mean().expand(4, 1), numbers, "number") == pytest.approx(0)


# --- speed ----------------------------------------------------------------------------------------


def test_speed_is_printed_for_every_evaluator_and_share(capsys):
    words = "--train 2000 --test 20 --columns 8 --classes 3 --rounds 1"
    probe_speed.main(probe_speed.parse_args(words.split()))
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[3:]]
    assert rows == [[f"| {name}", f"{x}%"] for name in ("knn", "linear") for x in (100, 10, 1)]
