# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Maps of features in two dimensions: PCA, or t-SNE and UMAP of their packages.

python probe.py map runs/photos --data_path photos --method pca --output map.png
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from errors import UserError
from insight.neighbors import normalize

PACKAGES = {  # method -> module, package of pip
    "pca": ("torch", "torch"),
    "tsne": ("sklearn", "scikit-learn"),
    "umap": ("umap", "umap-learn"),
}
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
FEWEST = 3  # images of a map


def check_method(method: str) -> None:
    """Raise UserError, before features are computed, if a method's package is not installed."""
    module, package = PACKAGES[method]
    if find_spec(module) is None:
        raise UserError(
            f"--method {method} needs {package}: pip install {package}; or use --method pca"
        )


def check_count(count: int, method: str) -> None:
    """Raise UserError if a map would have too few images."""
    if count < FEWEST:
        raise UserError(
            f"a map of {count} images says nothing; give at least {FEWEST}, for --method {method}"
        )


def pca(features: Tensor, dims: int = 2) -> tuple[Tensor, Tensor]:
    """Project features (N, D) on their directions of largest variance.

    Returns points (N, dims) float64 and the fractions of the variance (dims,). The sign of each
    direction is that for which its largest weight is positive, so that a map is reproducible.
    """
    centered = features.double().cpu()
    centered = centered - centered.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    values = values.flip(0).clamp(min=0)
    vectors = vectors.flip(1)[:, :dims]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    points = centered @ (vectors * signs)
    fractions = values[:dims] / values.sum().clamp(min=1e-300)
    lacking = dims - points.shape[1]
    if lacking > 0:  # of features with a single channel
        points = torch.cat([points, points.new_zeros(len(points), lacking)], 1)
        fractions = torch.cat([fractions, fractions.new_zeros(lacking)])
    return points, fractions


def embed(features: Tensor, method: str, seed: int) -> tuple[Tensor, list[str]]:
    """Return points (N, 2) and the labels of the two axes.

    t-SNE and UMAP get rows of length 1, so that they see cosine similarities.
    """
    if method == "pca":
        points, fractions = pca(features)
        return points, [f"PC {i + 1} ({x:.0%} of variance)" for i, x in enumerate(fractions)]
    check_method(method)
    unit = normalize(features.cpu()).numpy()
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(unit) - 1) / 3)
        model = TSNE(2, init="pca", perplexity=perplexity, random_state=seed)
    else:
        from umap import UMAP

        model = UMAP(n_neighbors=min(15, len(unit) - 1), metric="cosine", random_state=seed)
    points = torch.as_tensor(model.fit_transform(unit)).double()
    return points, [f"{TITLES[method]} {number}" for number in (1, 2)]
