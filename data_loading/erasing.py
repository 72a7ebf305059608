# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""timm's random erasing, for images that are normalized later.

python -c "from data_loading.erasing import RandomErasing; help(RandomErasing)"
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Patch(NamedTuple):
    """A rectangle of noise with standard deviation 1, for a normalized image."""

    top: int
    left: int
    noise: Tensor  # (C, h, w) float32


class Erased(Tensor):
    """An image (C, H, W) with patches to write into it, in this order, once it is normalized.

    So the noise is not clipped to 0..255, and images still travel as uint8.
    """

    patches: list[Patch]
    __torch_function__ = torch._C._disabled_torch_function_impl  # operations return plain tensors


class RandomErasing:
    """timm's random erasing, for one (C, H, W) image: returns it as it is, or `Erased`."""

    def __init__(self, prob: float, mode: str, count: int):
        from timm.data.random_erasing import RandomErasing as Erase

        self.prob = prob
        self.erase = Erase(1.0, mode=mode, max_count=count, device="cpu")

    def __call__(self, image: Tensor) -> Tensor:
        if torch.rand(()).item() >= self.prob:
            return image
        canvas = _Canvas(image.shape)
        self.erase(canvas)
        erased = image.as_subclass(Erased)
        erased.patches = canvas.patches
        return erased


class _Canvas:
    """Records what timm's random erasing writes into an image, instead of writing it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self.patches = shape, []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, columns = place
        size = self.shape[0], rows.stop - rows.start, columns.stop - columns.start
        self.patches.append(Patch(rows.start, columns.start, noise.expand(size)))
