# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Sums that stay on the device and are reduced over ranks once, when somebody reads them.

python -c "from training import meters; print(meters.Means(['loss'], 'cpu').read())"
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from parallel.process_group import all_gather, all_reduce_sum, get_rank, get_world_size


class Means:
    """Means of named values, each image (or update) counting once, over all ranks.

    names: fixed at the start, so that a rank without a single image still takes part.
    skip_nonfinite: a value that is not finite counts as not seen, as the update that held it was
        skipped; else it makes the mean what it is itself.
    """

    def __init__(
        self, names: Iterable[str], device: torch.device | str, skip_nonfinite: bool = True
    ) -> None:
        self.names, self.skip_nonfinite = list(names), skip_nonfinite
        kind = torch.device(device).type
        wide = torch.float32 if kind == "mps" else torch.float64  # MPS has no float64
        self.recent = torch.zeros(2, len(self.names), dtype=wide, device=device)
        self.before = torch.zeros(2, len(self.names), dtype=torch.float64)

    @torch.no_grad()
    def update(self, n: int = 1, **values: Tensor) -> None:
        """Add means over `n` images; no host sync."""
        for name, value in values.items():
            i = self.names.index(name)
            value = value.to(self.recent.dtype)
            seen = torch.isfinite(value) | (not self.skip_nonfinite)
            self.recent[0, i] += torch.where(seen, value, 0.0) * n
            self.recent[1, i] += seen * n

    def state(self) -> dict[str, list]:
        """All sums as plain numbers, those of every rank; every rank must call it."""
        recent = all_gather(self.recent.cpu().double().tolist())
        return {"recent": recent, "before": self.before.tolist()}

    def restore(self, state: dict[str, list]) -> None:
        """Go on from `state()`, on as many ranks as it was made on or, in sum, on others."""
        recent = torch.tensor(state["recent"], dtype=torch.float64)  # (ranks, 2, names)
        if len(recent) == get_world_size():
            own = recent[get_rank()]
        else:
            own = recent.sum(0) * (get_rank() == 0)
        self.recent.copy_(own)
        self.before.copy_(torch.tensor(state["before"], dtype=torch.float64))

    def read(self) -> dict[str, float]:
        """Means since the last `read`; every rank must call it."""
        sums = all_reduce_sum(self.recent.clone()).cpu().double()
        self.recent.zero_()
        self.before += sums
        return self._divide(sums)

    def total(self) -> dict[str, float]:
        """Means since the beginning; every rank must call it."""
        self.read()
        return self._divide(self.before)

    def _divide(self, sums: Tensor) -> dict[str, float]:
        means = (sums[0] / sums[1]).tolist()  # nothing seen gives NaN
        return dict(zip(self.names, means, strict=True))


def accuracy(logits: Tensor, labels: Tensor, topk: Iterable[int] = (1, 5)) -> list[Tensor]:
    """Percentage of images whose label is among the k largest of `logits` (N, K), for each k.

    With fewer than k classes every image counts.
    """
    ks = [min(k, logits.shape[1]) for k in topk]
    hits = logits.topk(max(ks), dim=1).indices == labels[:, None]
    return [100 * hits[:, :k].any(1).float().mean() for k in ks]
