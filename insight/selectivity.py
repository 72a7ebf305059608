# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Class selectivity index of the channels of each layer, of Morcos et al. (arXiv 1803.06959).

python probe.py selectivity runs/photos --data_path photos --output selectivity.png
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.attach import is_channels_last
from models.convnextv2 import Block
from parallel.process_group import all_reduce_sum

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Softplus,
)
SILENT = 1e-12  # largest mean activity of a channel that counts as never active


def find_layers(model: nn.Module) -> list[str]:
    """Return the layers whose channels are looked at, in the order of the network.

    Of a ConvNeXt of this toolkit: its blocks, whose activities are those after the GELU; of other
    networks: modules of ACTIVATIONS. UserError if there are none.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    blocks = [name for name, module in modules.items() if isinstance(module, Block)]
    layers = blocks or [name for name, module in modules.items() if _is_activation(module)]
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in ACTIVATIONS)
        raise UserError(
            f"{type(model).__name__} has no module that is one of {kinds}, so its layers are not "
            "known; name them with --layers"
        )
    return layers


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, ACTIVATIONS):
        return True
    # timm's own classes of the same functions, such as timm.layers.activations.GELU
    return type(module).__module__.startswith("timm.layers.activations")


class ClassMeans:
    """Mean activity of each channel of each layer for each class, over images of all ranks.

    `count(labels)` while the network runs within `watch()`: the activity of a channel for an image
    is the mean of its positive values over all positions. classes: number of them. size: channels,
    height and width of the images.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], classes: int, size: Sequence[int]
    ) -> None:
        self.model, self.layers, self.classes, self.size = model, [*layers], classes, size
        self.found: dict[str, Tensor] = {}  # of the last batch, (N, C)
        self.sums: dict[str, Tensor] = {}  # (K, C)
        self.images: Tensor | None = None  # (K,)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note the activities of every batch that the network gets."""
        handles = []
        try:
            for name in self.layers:
                module = self.model.get_submodule(name)
                is_block = isinstance(module, Block)
                target = module.pwconv1 if is_block else module
                hook = partial(self._keep, name, is_block)
                handles.append(target.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, is_block: bool, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"--layers: {name} gives {got}, expected (N, C), (N, L, C) or a map; choose others"
            )
        values = F.gelu(output.float()) if is_block else output.float()
        is_last = is_block or is_channels_last(self.model, name, output.shape, self.size)
        self.found[name] = pool(values.relu(), is_last)

    def count(self, labels: Tensor) -> None:
        """Add the batch that the network has just got; labels: (N,)."""
        lacking = [name for name in self.layers if name not in self.found]
        if lacking:
            raise UserError(
                f"--layers: {lacking[0]} is not called by {type(self.model).__name__}; choose "
                "others"
            )
        kind = torch.float32 if labels.device.type == "mps" else torch.float64
        if self.images is None:
            self.images = torch.zeros(self.classes, dtype=kind, device=labels.device)
        self.images += torch.bincount(labels, minlength=self.classes)
        for name, values in self.found.items():
            if name not in self.sums:
                shape = self.classes, values.shape[1]
                self.sums[name] = torch.zeros(shape, dtype=kind, device=labels.device)
            self.sums[name].index_add_(0, labels, values.to(kind))
        self.found = {}

    def reduce(self, device: torch.device) -> dict[str, Tensor]:
        """Return the means (K, C) by layer, of the classes with images; every rank must call it.

        device: of the process, for a rank that got no image.
        """
        widths = {name: sums.shape[1] for name, sums in self.sums.items()}
        shapes = torch.tensor([widths.get(name, 0) for name in self.layers], device=device)
        number = all_reduce_sum((shapes > 0).long())
        shapes = all_reduce_sum(shapes) // number.clamp(min=1)
        kind = torch.float32 if device.type == "mps" else torch.float64
        images = self.images
        if images is None:
            images = torch.zeros(self.classes, dtype=kind, device=device)
        images, means = all_reduce_sum(images), {}
        for name, width in zip(self.layers, shapes.tolist(), strict=True):
            empty = torch.zeros(self.classes, width, dtype=kind, device=device)
            sums = all_reduce_sum(self.sums.get(name, empty))
            means[name] = (sums[images > 0] / images[images > 0, None]).cpu()
        return means


def pool(values: Tensor, is_last: bool = False) -> Tensor:
    """Mean over positions: (N, C), (N, L, C) or (N, C, H, W) -> (N, C).

    is_last: maps are (N, H, W, C).
    """
    if values.ndim == 2:
        return values
    if values.ndim == 3:
        return values.mean(1)
    return values.mean((1, 2) if is_last else (2, 3))


def selectivity_index(means: Tensor) -> tuple[Tensor, int]:
    """Class selectivity of channels: (largest - others) / (largest + others).

    means: (K, C) mean activities of at least 0, K >= 2. largest: of the class with the highest
    mean; others: the mean of the other classes' means. 0: equally active for all classes, 1: active
    for one class alone. Returns (channels that are active at all,) and the number of silent ones.
    """
    means = means.double()
    largest = means.amax(0)
    others = (means.sum(0) - largest) / (len(means) - 1)
    active = largest > SILENT
    index = (largest - others)[active] / (largest + others)[active]
    return index.clamp(0, 1), int((~active).sum())


def summarize(means: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, int]]:
    """Yield (layer, index of its active channels, number of silent ones)."""
    for name, values in means.items():
        yield name, *selectivity_index(values)
