# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Visible patches packed side by side, and back in their places.

python -c "import torch; from models.sparse import PatchGrid; print(PatchGrid(torch.eye(3)).ids)"
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from errors import UserError


class PatchGrid:
    """Which patches of an image are visible, and how to move between dense and packed maps.

    dense   (N, h*p, w*p, C)   all cells; p shrinks from stage to stage, h and w do not
    packed  (N, V, p, p, C)    the V visible patches of every image, rows first

    mask: (N, h, w) or (N, L) with `size`, 1 = removed, 0 = visible, V zeros in every image.
    visible: V, when the caller knows it; finding out costs a host sync on a GPU.
    """

    def __init__(
        self, mask: Tensor, size: tuple[int, int] | None = None, visible: int | None = None
    ) -> None:
        self.size = size or (mask.shape[-2], mask.shape[-1])
        mask = mask.reshape(-1, self.size[0] * self.size[1])
        if visible is None:
            counts = (mask == 0).sum(1)
            low, high = int(counts.min()), int(counts.max())
            if low != high or low == 0:
                raise UserError(
                    f"mask leaves between {low} and {high} patches visible; "
                    "expected the same number, at least 1, in every image"
                )
            visible = high
        order = mask.argsort(dim=1, stable=True)  # visible ones first, each kind row by row
        self.ids = order[:, :visible]  # (N, V)
        packed = torch.arange(visible, dtype=torch.int32, device=mask.device)
        slots = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
        slots.scatter_(1, self.ids, packed.expand(len(mask), -1))
        self.slots = slots.view(-1, *self.size)  # (N, h, w), where a patch is packed, -1 = removed

    def pack(self, dense: Tensor) -> Tensor:
        """(N, h*p, w*p, C) -> (N, V, p, p, C)"""
        return Pack.apply(dense, self.ids, *self.size)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, V, p, p, C) -> (N, h*p, w*p, C), zero where removed."""
        return Unpack.apply(packed, self.ids, *self.size)


def _cells(dense: Tensor, h: int, w: int) -> Tensor:
    """(N, h*p, w*p, C) -> a view (N, h, w, p, p, C)"""
    n, height, width, dim = dense.shape
    return dense.view(n, h, height // h, w, width // w, dim).transpose(2, 3)


def _places(ids: Tensor, w: int) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.arange(ids.shape[0], device=ids.device)[:, None]
    return image, torch.div(ids, w, rounding_mode="floor"), ids % w


class Pack(Function):
    """Gather; its adjoint is `Unpack`. Autograd's own would add up where nothing overlaps."""

    @staticmethod
    def forward(dense: Tensor, ids: Tensor, h: int, w: int) -> Tensor:
        return _cells(dense.contiguous(), h, w)[_places(ids, w)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ids, *ctx.size = inputs
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return Unpack.apply(grad, *ctx.saved_tensors, *ctx.size), None, None, None


class Unpack(Function):
    """Scatter into zeros; its adjoint is `Pack`."""

    @staticmethod
    def forward(packed: Tensor, ids: Tensor, h: int, w: int) -> Tensor:
        n, _, p, _, dim = packed.shape
        dense = packed.new_zeros(n, h * p, w * p, dim)
        _cells(dense, h, w)[_places(ids, w)] = packed
        return dense

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ids, *ctx.size = inputs
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return Pack.apply(grad, *ctx.saved_tensors, *ctx.size), None, None, None
