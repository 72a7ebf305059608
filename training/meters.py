# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Means and accuracies that stay on the device; reading them reduces over ranks.

python -c "from training import meters; print(meters.Means(['loss'], 'cpu').read())"
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from insight.predictions import unusable
from parallel.process_group import all_gather, all_reduce_sum, get_rank, get_world_size


class Means:
    """Means of named values over all ranks, weighted by the number of images.

    names: given at the start, so that a rank without images still takes part in a reduction.
    Values that are not finite belong to skipped steps, and are left out.
    """

    def __init__(self, names: Iterable[str], device: torch.device | str) -> None:
        self.names = list(names)
        no_float64 = torch.device(device).type == "mps"
        dtype = torch.float32 if no_float64 else torch.float64
        # Row 0 holds sums of values, row 1 numbers of images.
        self.recent = torch.zeros(2, len(self.names), dtype=dtype, device=device)
        self.before = torch.zeros(2, len(self.names), dtype=torch.float64)  # until the last read

    @torch.no_grad()
    def update(self, n: int = 1, **values: Tensor) -> None:
        """Add values without a host sync: means over `n` images, or one (n,) for each image.

        Sums of one for each image are exact for whole numbers, however the images are split.
        """
        for name, value in values.items():
            i, images = self.names.index(name), n // value.numel()  # that each value stands for
            value = value.to(self.recent.dtype)
            counts = torch.isfinite(value)
            self.recent[0, i] += torch.where(counts, value, 0.0).sum() * images
            self.recent[1, i] += counts.sum() * images

    def state(self) -> dict[str, list]:
        """Return the sums of all ranks as plain numbers; every rank must call it."""
        recent = all_gather(self.recent.cpu().double().tolist())
        return {"recent": recent, "before": self.before.tolist()}

    def restore(self, state: dict[str, list]) -> None:
        """Continue from `state()`; with another number of ranks, rank 0 takes all sums."""
        recent = torch.tensor(state["recent"], dtype=torch.float64)  # (ranks, 2, names)
        same_ranks = len(recent) == get_world_size()
        own = recent[get_rank()] if same_ranks else recent.sum(0) * (get_rank() == 0)
        self.recent.copy_(own)
        self.before.copy_(torch.tensor(state["before"], dtype=torch.float64))

    def peek(self) -> dict[str, float]:
        """`read`, which then returns the same values again; every rank must call it."""
        return self._divide(all_reduce_sum(self.recent.clone()).cpu().double())

    def read(self) -> dict[str, float]:
        """Return the means since the last `read`; every rank must call it."""
        sums = all_reduce_sum(self.recent.clone()).cpu().double()
        self.recent.zero_()
        self.before += sums
        return self._divide(sums)

    def total(self) -> dict[str, float]:
        """Return the means since the beginning; every rank must call it."""
        return self._divide(self.before + all_reduce_sum(self.recent.clone()).cpu().double())

    def _divide(self, sums: Tensor) -> dict[str, float]:
        means = (sums[0] / sums[1]).tolist()  # NaN where nothing was added
        return dict(zip(self.names, means, strict=True))


def accuracy(logits: Tensor, labels: Tensor, topk: Iterable[int] = (1, 5)) -> list[Tensor]:
    """Accuracy in percent of each image, (N,), for each k: 100 or 0.

    100 if the label (N,) is among the k largest logits (N, K), or if there are fewer than k
    classes; 0 if a logit is NaN or +Inf, which would otherwise count as the largest.
    """
    ks = [min(k, logits.shape[1]) for k in topk]
    hits = logits.topk(max(ks), dim=1).indices == labels[:, None]
    hits &= ~unusable(logits)[:, None]
    return [100.0 * hits[:, :k].any(1) for k in ks]


def is_better(value: float | None, best: float | None, lower_is_better: bool = False) -> bool:
    """Compare a metric with its best value so far, None at first; NaN and Inf are never better."""
    if value is None or not math.isfinite(value):
        return False
    return best is None or (value < best if lower_is_better else value > best)
