# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Moving average of the weights (EMA).

python -c "from training.ema import MovingAverage; print(MovingAverage.__doc__)"
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from parallel import sharding


class MovingAverage:
    """The exponential moving average of a model's weights and float buffers, in `module`.

    decay: the share that an update keeps; after the n-th, when that is less, 1 - n^(-2/3).
    device: where to keep it.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        self.module = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        self.decay, self.device = decay, device

    @torch.no_grad()
    def update(self, model: nn.Module, updates: Tensor, taken: Tensor) -> None:
        """Follow `model`, which so many `updates` have changed, unless the last was not `taken`.

        Where the average lies beside the model the host waits for nothing.
        """
        old = [sharding.to_local(kept) for kept in self.module.parameters()]
        share = updates.to(old[0]).pow(-2 / 3).clamp(min=1 - self.decay)
        taken = taken.to(self.device)
        share = torch.where(taken, share, 0.0)
        news = [sharding.to_local(new).to(self.device) for new in model.parameters()]
        change = torch._foreach_sub(news, old)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(old, change)
        for kept, new in zip(self.module.buffers(), model.buffers(), strict=True):
            new = new.to(self.device)  # of a skipped update it need not be finite
            new = kept.lerp(new, share.to(kept.dtype)) if kept.is_floating_point() else new
            kept.copy_(torch.where(taken, new, kept))


def build_ema(args: Any, model: nn.Module) -> MovingAverage | None:
    """The moving average that the flags ask for, or None."""
    if not args.model_ema:
        return None
    device = next(model.parameters()).device
    return MovingAverage(
        model, args.model_ema_decay, torch.device("cpu") if args.model_ema_force_cpu else device
    )
