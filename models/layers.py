# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The layers of a ConvNeXt V2 block, all channels-last, none of which looks at a neighbour.

python -c "import torch; from models.layers import GRN; print(GRN(8)(torch.ones(1, 2, 2, 8)).shape)"
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from errors import UserError
from models.kernels import ops

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # statistics in float32 under autocast, unlike (x-u)^2


class GRN(nn.Module):
    """Global response normalisation of an image's own positions, `(N, ..., C) -> (N, ..., C)`.

    Sums run over every axis between the first and the last: all cells of a dense map
    `(N, H, W, C)`, all visible cells of a packed one `(N, V, p, p, C)`. Identity at the start.
    Source: arXiv 2301.00808, algorithm 1.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.grn(x, self.gamma.flatten(), self.beta.flatten(), self.eps)


class DropPath(nn.Module):
    """Drop a whole residual branch of an image with probability `prob`, rescaling the others."""

    def __init__(self, prob: float = 0.0) -> None:
        super().__init__()
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.prob)
        return x * keep / max(1 - self.prob, 1e-6)  # prob 1 keeps nothing; 0 / 0 would be NaN

    def extra_repr(self) -> str:
        return f"prob={self.prob:.3f}"


class PatchConv(nn.Conv2d):
    """Convolution whose stride is its kernel, `(..., H, W, C) -> (..., H/k, W/k, D)`.

    It never crosses a patch border, so dense maps and packed patches take the same path: cut
    into k x k squares and multiply. What does not fill a square at the right or bottom is cut
    off, as `nn.Conv2d` does. Parameters are those of `nn.Conv2d`.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int) -> None:
        super().__init__(dim_in, dim_out, kernel_size=kernel, stride=kernel)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        k = self.kernel_size[0]
        if k == 1:
            return affine(x, self.weight.flatten(1), self.bias)
        if ops.exporting() and x.ndim == 4:  # without arithmetic on shapes in the graph
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        *lead, height, width, dim = x.shape
        h, w = height // k, width // k
        if h == 0 or w == 0:
            raise UserError(
                f"a map of {height} x {width} cells is smaller than the {k} x {k} of the next "
                "layer; use larger images or a smaller stem_stride"
            )
        x = x[..., : h * k, : w * k, :].reshape(*lead, h, k, w, k, dim)
        x = x.transpose(-4, -3).reshape(*lead, h, w, k * k * dim)  # (..., h, w, k*k*C)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (D, k*k*C)
        return affine(x, weight, self.bias)


def init_weights(module: nn.Module) -> None:
    """Weights of a convolution or linear layer: std 0.02, cut at two units; biases zero.

    Called once by whoever creates the layer. PyTorch's and timm's own default of std 1.0 made
    the official pre-training start at a loss of 2e10.
    """
    nn.init.trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def linear(dim_in: int, dim_out: int) -> nn.Linear:
    """`nn.Linear` with this toolkit's initialisation."""
    layer = nn.Linear(dim_in, dim_out)
    init_weights(layer)
    return layer


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors as autocast would hand them to a convolution: for our own autograd functions.

    float64 stays, as it does there.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    half = torch.get_autocast_dtype(kind)
    return [x if x.dtype == torch.float64 else x.to(half) for x in tensors]


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, with its products and those of its gradients in the form that is fastest."""
    half = torch.is_autocast_enabled(x.device.type)
    if half or bias is None or ops.exporting() or not ops.has_onednn(x):
        return F.linear(x, weight, bias)
    return _Affine.apply(x, weight, bias)


class _Affine(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.no_view(ops.product(x, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return ops.plain_gradients(F.linear, (x, weight, bias), dy)
        of_x, of_weight, _ = ctx.needs_input_grad
        dx = ops.product(dy, weight.mT) if of_x else None
        dy = dy.flatten(0, -2)
        return dx, ops.gram(dy, x.flatten(0, -2)) if of_weight else None, dy.sum(0)
