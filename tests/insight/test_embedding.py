# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Maps: PCA is that of the definition, and packages that lack are named."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from errors import UserError
from insight import embedding
from insight.embedding import check_count, check_method, embed, pca


def test_pca_gives_the_directions_of_largest_variance():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    scales = torch.tensor([9.0, 4.0, 1.0, 0.5, 0.1])
    features = torch.randn(300, 5, generator=generator) * scales @ turn + 100
    points, fractions = pca(features)
    centered = (features - features.mean(0)).double()
    values = torch.linalg.svdvals(centered).square()
    torch.testing.assert_close(fractions, values[:2] / values.sum())
    torch.testing.assert_close(points.square().sum(0), values[:2])
    assert pca(features)[0].equal(points)


def test_sign_of_a_direction_is_that_of_its_largest_weight():
    """A map would be mirrored on another machine."""
    for seed in range(6):
        features = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed)).double()
        directions = (features - features.mean(0)).T @ pca(features)[0]
        assert (directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_single_channel_makes_a_line():
    points, fractions = pca(torch.arange(4.0)[:, None])
    assert points[:, 1].tolist() == [0] * 4
    assert fractions.tolist() == [1, 0]
    assert pca(torch.ones(4, 3))[1].tolist() == [0, 0]  # all images are equal


def test_axes_tell_the_variance():
    _, axes = embed(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), "pca", 0)
    assert axes == ["PC 1 (90% of variance)", "PC 2 (10% of variance)"]


@pytest.mark.parametrize(("method", "package"), [("tsne", "scikit-learn"), ("umap", "umap-learn")])
def test_missing_package_is_named_with_its_installation(method, package, monkeypatch):
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=f"--method {method} needs {package}: pip install {package}"
    ):
        check_method(method)


@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_packages_get_unit_rows_the_seed_and_settings_for_few_images(method, monkeypatch):
    """t-SNE refuses a perplexity of as many images or more, UMAP warns of too many neighbors."""
    seen = {}

    class Fake:
        def __init__(self, *args, **settings):
            seen.update(settings)

        def fit_transform(self, rows):
            seen["rows"] = rows
            return rows[:, :2]

    sklearn, manifold, umap = map(ModuleType, ("sklearn", "sklearn.manifold", "umap"))
    manifold.TSNE, umap.UMAP = Fake, Fake
    for module in (sklearn, manifold, umap):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(embedding, "find_spec", lambda name: name)
    points, axes = embed(3 * torch.eye(4), method, 7)
    assert np.array_equal(seen["rows"], np.eye(4, dtype=np.float32))
    assert seen["random_state"] == 7
    assert seen.get("perplexity", seen.get("n_neighbors")) in (1.0, 3)
    assert points.shape == (4, 2)
    assert axes[0] in ("t-SNE 1", "UMAP 1")


def test_map_of_two_images_is_refused():
    with pytest.raises(UserError, match="a map of 2 images says nothing; give at least 3"):
        check_count(2, "pca")
