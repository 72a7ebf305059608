# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Exponential moving average (EMA) of a model's weights.

python -c "from training.ema import ModelEma; print(ModelEma.__doc__)"
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from parallel import sharding


class ModelEma:
    """EMA of a model's parameters and float buffers, in `module`.

    decay: fraction kept at each step; at step n at most 1 - n^(-2/3), as timm's warm-up.
    device: where the EMA weights are stored.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        self.module = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        self.decay, self.device = decay, device

    @torch.no_grad()
    def update(self, model: nn.Module, steps: Tensor, taken: Tensor) -> None:
        """Move toward `model` after its n-th optimizer step, unless the step was skipped.

        steps: n; taken: false if the step was skipped. Both are tensors on the model's device,
        so that the host need not wait for it.
        """
        averages = [sharding.to_local(average) for average in self.module.parameters()]
        fraction = steps.to(averages[0]).pow(-2 / 3).clamp(min=1 - self.decay)
        taken = taken.to(self.device)
        fraction = torch.where(taken, fraction, 0.0)
        weights = [sharding.to_local(weight).to(self.device) for weight in model.parameters()]
        fractions = [fraction.to(average.dtype) for average in averages]
        # In place, without temporary memory. With a number instead of `fractions` CUDA would need
        # fewer kernels, but only the device knows if the step was taken.
        torch._foreach_lerp_(averages, weights, fractions)
        for average, new in zip(self.module.buffers(), model.buffers(), strict=True):
            new = new.to(self.device)
            if average.is_floating_point():
                new = average.lerp(new, fraction.to(average.dtype))
            average.copy_(torch.where(taken, new, average))  # a skipped step may leave NaN in `new`


def build_ema(args: Any, model: nn.Module) -> ModelEma | None:
    """Create the EMA that the flags ask for, or None."""
    if not args.model_ema:
        return None
    device = "cpu" if args.model_ema_force_cpu else next(model.parameters()).device
    return ModelEma(model, args.model_ema_decay, torch.device(device))
