# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Precise BatchNorm: running statistics measured on training images, not averaged while training.

python main_finetune.py --data_set DIGITS --model timm:resnet18 --input_size 32 --precise_bn 512
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_loading.loader import DeviceLoader
from errors import UserError
from models.heads import NamedHeads
from parallel import sharding
from parallel.process_group import all_reduce_sum, get_world_size
from training.ema import ModelEma
from training.stepper import SavedBuffers, autocast


def find_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of a model that have running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def check_norms(model: nn.Module) -> None:
    """Raise UserError for --precise_bn if the model has no BatchNorm."""
    if not find_norms(model):
        kind = type(model).__name__
        raise UserError(f"--precise_bn: {kind} has no BatchNorm with running statistics; drop it")


@dataclass(frozen=True)
class PreciseBn:
    """Replace the running statistics of BatchNorm layers by those of training images.

    loader: of training, whose augmented images are used. images: their number over all ranks,
    rounded up to whole batches, at most an epoch.
    """

    loader: DeviceLoader
    images: int
    device: torch.device
    amp: str = "none"

    def update(self, model: nn.Module, model_ema: ModelEma | None, epoch: int) -> None:
        """Replace the statistics of `model`, and of its EMA; every rank must call it.

        The images are the first in the order of this epoch. Layers in evaluation mode, which are
        frozen, keep theirs. Training does not see the new ones, since it uses those of each batch.
        """
        names = [name for name, norm in find_norms(model).items() if norm.training]
        self._measure(model, names, epoch)
        if model_ema is None:
            return
        network = model_ema.module
        if model_ema.device.type != self.device.type:  # --model_ema_force_cpu
            network = copy.deepcopy(network).to(self.device)
        self._measure(network, names, epoch)
        if network is not model_ema.module:
            for own, new in zip(model_ema.module.buffers(), network.buffers(), strict=True):
                own.copy_(new)

    @torch.no_grad()
    def _measure(self, model: nn.Module, names: list[str], epoch: int) -> None:
        """Set running statistics to the mean, and the variance around it, over all batches.

        A batch counts like any other, and is normalized by its own statistics in the layers before.
        Dropout and stochastic depth are off, as in evaluation. A layer that is not called keeps its
        statistics.
        """
        norms = {name: norm for name, norm in find_norms(model).items() if name in names}
        if not norms:
            return
        batch = self.loader.loader.batch_size * get_world_size()
        whole = self.loader.loader.sampler.samples // batch
        self.loader.set_epoch(epoch, 0, min(-(-self.images // batch), whole) * batch)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        sums = {
            name: torch.zeros(3, norm.num_features, dtype=dtype, device=self.device)
            for name, norm in norms.items()
        }
        before = SavedBuffers(model)
        try:
            with _batch_statistics(model, norms, sums), sharding.unsharded(model) as network:
                for images, _, _ in self.loader:
                    with autocast(self.device, self.amp):
                        network(images)
        finally:
            before.restore_unless(torch.tensor(False, device=self.device))
        total = all_reduce_sum(torch.cat([*sums.values()], 1))
        for norm, own in zip(
            norms.values(), total.split([part.shape[1] for part in sums.values()], 1), strict=True
        ):
            mean, square = own[0] / own[2], own[1] / own[2]  # NaN if it was not called
            for kept, new in (
                (norm.running_mean, mean),
                (norm.running_var, (square - mean.square()).clamp(min=0)),
            ):
                kept.copy_(torch.where(own[2] > 0, new, kept))


@contextlib.contextmanager
def _batch_statistics(
    model: nn.Module, norms: Mapping[str, _BatchNorm], sums: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let these layers use batch statistics, the others as in evaluation, and add them up.

    sums: (3, C) for each layer: of means, of mean squares, of batches. All heads are called, not
    only the first, as in evaluation. Compiled code, which does not see new hooks, is not used.
    """

    def record(name: str, x: Tensor) -> None:
        dims = [dim for dim in range(x.ndim) if dim != 1]
        var, mean = torch.var_mean(x.float(), dims, correction=0)
        mean, var = mean.to(sums[name].dtype), var.to(sums[name].dtype)
        sums[name] += torch.stack([mean, var + mean.square(), torch.ones_like(mean)])

    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name, norm in norms.items()
    ]
    model.eval()
    heads = [module for module in model.modules() if isinstance(module, NamedHeads)]
    for module in (*norms.values(), *heads):
        module.training = True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()


def build_precise_bn(
    args: Any, model: nn.Module, loader: DeviceLoader, device: torch.device, amp: str
) -> PreciseBn | None:
    """Build what --precise_bn asks for, or None."""
    if not args.precise_bn:
        return None
    check_norms(model)
    return PreciseBn(loader, args.precise_bn, device, amp)
