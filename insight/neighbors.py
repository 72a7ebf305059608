# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Nearest neighbors, near-duplicates and outliers by cosine similarity, exact, in bounded memory.

python probe.py duplicates runs/photos --data_path photos --threshold 0.97
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from errors import UserError, plural

ROUNDING = 1e-6  # of a cosine similarity in float32; equal rows may be this far below 1
AT_ONCE = 1 << 24  # similarities that are held at once: 64 MiB of float32
MOST_PAIRS = 2_000_000  # near-duplicates; a lower threshold would say nothing about duplicates


def normalize(features: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, D) -> (N, D) rows of length 1 in `dtype`; a row of zeros stays so."""
    return torch.nn.functional.normalize(features.to(dtype), dim=1)


def check_k(k: int, available: int, where: str = "") -> None:
    """Raise UserError if there are fewer than k images to find neighbors among.

    where: added to the message, such as ` at fraction 0.1`.
    """
    if k > available:
        raise UserError(
            f"k {k}: there are only {plural(available, 'image')} to find neighbors among{where}; "
            "lower k, or give more images"
        )


def nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    own: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    bar: str = "",
) -> tuple[Tensor, Tensor]:
    """Return the k most similar rows of `gallery` (G, D) for each of `queries` (Q, D).

    own: (Q,) the row of the gallery that each query is itself, and that is left out; -1 for none.
    dtype: of the similarities. bar: text of a progress bar, '' for none. Returns cosine
    similarities (Q, k), the largest first, and rows of the gallery (Q, k), on the device of the
    features. UserError if the gallery has too few rows.
    """
    check_k(k, len(gallery) - int(own is not None and bool((own >= 0).any())))
    queries, gallery = normalize(queries, dtype), normalize(gallery, dtype)
    similar = queries.new_empty(len(queries), k)
    places = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
    rows = max(1, AT_ONCE // len(gallery))
    for part in _parts(len(queries), rows, bar):
        found = queries[part] @ gallery.T
        if own is not None:
            mine = own[part].to(found.device)
            has = (mine >= 0).nonzero()[:, 0]
            found[has, mine[has]] = -torch.inf
        similar[part], places[part] = found.topk(k, dim=1)
    return similar, places


def near_duplicates(features: Tensor, threshold: float, bar: str = "") -> tuple[Tensor, Tensor]:
    """Return all pairs of rows whose cosine similarity is at least a threshold, up to rounding.

    features: (N, D). Returns pairs (P, 2) with the smaller number first, sorted by similarity, and
    similarities (P,). UserError if there are more than MOST_PAIRS.
    """
    unit, count, least = normalize(features), len(features), threshold - ROUNDING
    rows = max(1, AT_ONCE // max(count, 1))
    pairs, similar, held = [torch.empty(0, 2, dtype=torch.long)], [torch.empty(0)], 0
    for part in _parts(count, rows, bar):
        found = unit[part] @ unit[part.start :].T
        # Above the diagonal: each pair once, and no row with itself.
        places = (found.triu(1) >= least).nonzero()
        if least <= 0:  # triu leaves zeros, which count then
            places = places[places[:, 1] > places[:, 0]]
        held += len(places)
        if held > MOST_PAIRS:
            raise UserError(
                f"--threshold {threshold:g}: over {MOST_PAIRS:,} pairs are that similar; raise it"
            )
        similar.append(found[places[:, 0], places[:, 1]].cpu())
        pairs.append(places.cpu() + part.start)
    similar = torch.cat(similar).clamp(max=1.0)
    order = similar.argsort(descending=True, stable=True)
    return torch.cat(pairs)[order], similar[order]


def group(pairs: Tensor, count: int) -> Tensor:
    """Return the group of each of `count` rows, (count,) int64, -1 for a row in no pair.

    pairs: (P, 2). Rows that a chain of pairs connects are one group. Groups are numbered from 0,
    the largest first, and equally large ones by their first row.
    """
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    members = torch.full((count,), -1, dtype=torch.long)
    for row in pairs.flatten().unique().tolist():
        members[row] = root(row)
    roots, sizes = members[members >= 0].unique(return_counts=True)
    order = sizes.argsort(descending=True, stable=True)
    numbers = {int(roots[place]): number for number, place in enumerate(order.tolist())}
    return torch.tensor([numbers.get(row, -1) for row in members.tolist()], dtype=torch.long)


def _parts(count: int, rows: int, bar: str) -> Iterator[slice]:
    """Yield slices of so many rows; bar: text of a progress bar on a terminal."""
    with tqdm(total=count, desc=bar, leave=False, disable=None if bar else True) as progress:
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            yield slice(start, stop)
            progress.update(stop - start)
