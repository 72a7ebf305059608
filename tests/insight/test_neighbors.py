# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Neighbors, near-duplicates and their groups are those of a full matrix of similarities."""

import pytest
import torch

from errors import UserError
from insight import neighbors
from insight.neighbors import group, near_duplicates, nearest, normalize


@pytest.fixture(params=[1 << 24, 64])
def features(request, monkeypatch) -> torch.Tensor:
    """(50, 6), compared all at once or a row at a time."""
    monkeypatch.setattr(neighbors, "AT_ONCE", request.param)
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def test_neighbors_are_those_of_the_whole_matrix(features):
    similar = normalize(features) @ normalize(features).T
    values, places = nearest(features[:7], features, 4)
    expected = similar[:7].topk(4)
    assert torch.equal(places, expected.indices)
    torch.testing.assert_close(values, expected.values)
    assert places[:, 0].tolist() == list(range(7))  # itself


def test_image_is_not_its_own_neighbor(features):
    rows = torch.tensor([3, 49])
    values, places = nearest(features[rows], features, 49, own=rows)
    assert all(row not in found for row, found in zip(rows.tolist(), places.tolist(), strict=True))
    assert values.isfinite().all()
    with pytest.raises(UserError, match="k 50: there are only 49 images to find neighbors among"):
        nearest(features[rows], features, 50, own=rows)


@pytest.mark.parametrize("threshold", [0.7, 0.0, -0.5])
def test_pairs_are_those_of_the_whole_matrix(features, threshold):
    similar = normalize(features) @ normalize(features).T
    pairs, values = near_duplicates(features, threshold)
    expected = [(i, j) for i in range(50) for j in range(i + 1, 50) if similar[i, j] >= threshold]
    assert len(expected) > 0
    assert sorted(map(tuple, pairs.tolist())) == expected
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    torch.testing.assert_close(values, similar[pairs[:, 0], pairs[:, 1]].clamp(max=1))


def test_equal_images_are_a_pair_at_1(features):
    features[31] = 5 * features[2]  # the length does not count
    pairs, values = near_duplicates(features, 0.9999)
    assert pairs.tolist() == [[2, 31]]
    assert values.item() == pytest.approx(1)


def test_all_copies_are_found_at_threshold_1():
    """In float32 the product of a row of length 1 with itself is often 0.9999999."""
    torch.manual_seed(0)
    half = torch.randn(200, 33)
    pairs, values = near_duplicates(torch.cat([half, half]), 1.0)
    assert sorted(pairs.tolist()) == [[row, row + 200] for row in range(200)]
    assert (values > 0.99999).all()


def test_too_many_pairs_are_refused_before_memory_is_full(features, monkeypatch):
    monkeypatch.setattr(neighbors, "MOST_PAIRS", 10)
    with pytest.raises(UserError, match="--threshold -1: over 10 pairs .* raise it"):
        near_duplicates(features, -1.0)


def test_groups_are_chains_of_pairs_the_largest_first():
    pairs = torch.tensor([[0, 5], [7, 2], [2, 3], [5, 9], [3, 8]])
    assert group(pairs, 10).tolist() == [1, -1, 0, 0, -1, 1, -1, 0, 0, 1]
    assert group(torch.empty(0, 2, dtype=torch.long), 3).tolist() == [-1, -1, -1]
