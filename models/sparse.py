# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Visible patches packed side by side, and the one operation that must know where they lie.

python -c "import torch; from models.sparse import PatchGrid; print(PatchGrid(torch.eye(3)).ids)"
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from errors import UserError
from models.layers import in_autocast_dtype


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

    def pack(self, dense: Tensor) -> Tensor:
        """(N, h*p, w*p, C) -> (N, V, p, p, C)"""
        return _Pack.apply(dense, self.ids, *self.size)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, V, p, p, C) -> (N, h*p, w*p, C), zero where removed."""
        return _Unpack.apply(packed, self.ids, *self.size)


def _cells(dense: Tensor, h: int, w: int) -> Tensor:
    """(N, h*p, w*p, C) -> a view (N, h, w, p, p, C)"""
    n, height, width, dim = dense.shape
    return dense.view(n, h, height // h, w, width // w, dim).transpose(2, 3)


def _places(ids: Tensor, w: int) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.arange(ids.shape[0], device=ids.device)[:, None]
    return image, torch.div(ids, w, rounding_mode="floor"), ids % w


class _Pack(Function):
    """Gather; its adjoint is `_Unpack`. Autograd's own would add up where nothing overlaps."""

    @staticmethod
    def forward(dense: Tensor, ids: Tensor, h: int, w: int) -> Tensor:
        return _cells(dense.contiguous(), h, w)[_places(ids, w)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ids, *ctx.size = inputs
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Unpack.apply(grad, *ctx.saved_tensors, *ctx.size), None, None, None


class _Unpack(Function):
    """Scatter into zeros; its adjoint is `_Pack`."""

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
        return _Pack.apply(grad, *ctx.saved_tensors, *ctx.size), None, None, None


def depthwise(x: Tensor, conv: nn.Conv2d, grid: PatchGrid | None) -> Tensor:
    """Depthwise convolution of a dense or packed map, in the layout it came in.

    Stride 1, odd square kernel, as many cells out as in. Removed patches count as zeros, as the
    zero padding around the image does.
    """
    x, weight, bias = in_autocast_dtype(x, conv.weight, conv.bias)
    with torch.autocast(x.device.type, enabled=False):
        place = (None, 0, 0) if grid is None else (grid.ids, *grid.size)
        return _Depthwise.apply(x, weight, bias, *place)


class _Depthwise(Function):
    """The convolution on a canvas of the whole image, which is made again for the backward.

    So a packed map saves its visible cells alone.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor | None, h: int, w: int
    ) -> Tensor:
        dense = x if ids is None else _Unpack.apply(x, ids, h, w)
        y = _convolve(dense, weight, bias)
        return y if ids is None else _Pack.apply(y, ids, h, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ids, *ctx.size = inputs
        ctx.save_for_backward(x, weight, ids)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight, ids = ctx.saved_tensors
        if ids is not None:
            x, dy = (_Unpack.apply(t, ids, *ctx.size) for t in (x, dy))
        dx, dweight, dbias = _convolve_backward(dy, x, weight)
        if ids is not None:
            dx = _Pack.apply(dx, ids, *ctx.size)
        return dx, dweight, dbias, None, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, H, W, C), weight (C, 1, k, k) -> (N, H, W, C)"""
    pad, channels = weight.shape[-1] // 2, weight.shape[0]
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=pad, groups=channels)
    return y.permute(0, 2, 3, 1)


def _convolve_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_convolve` in x, weight and bias; the weight's has plain strides.

    DDP's gradient buckets have plain strides too, and would copy any other every step.
    """
    dbias = dy.sum((0, 1, 2))
    n, height, width, channels = x.shape
    pad = weight.shape[-1] // 2
    if x.device.type != "cpu":
        rest = ([1, 1], [pad, pad], [1, 1], False, [0, 0], channels, [True, True, False])
        x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
        dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *rest)
        return dx.permute(0, 2, 3, 1), dweight.contiguous(), dbias
    # On a CPU torch's weight gradient takes most of the time. The same numbers come out of a
    # forward convolution of each image's channel with its own gradient as the kernel.
    dx = _convolve(dy, weight.flip(2, 3), None)
    planes = x.new_zeros(n, channels, height + 2 * pad, width + 2 * pad)
    planes[:, :, pad:-pad, pad:-pad] = x.permute(0, 3, 1, 2)
    kernels = dy.permute(0, 3, 1, 2).reshape(n * channels, 1, height, width)
    dweight = F.conv2d(planes.flatten(0, 1)[None], kernels, groups=n * channels)
    return dx, dweight.reshape(n, *weight.shape).sum(0), dbias
