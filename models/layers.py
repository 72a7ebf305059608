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
        length = vector_length(x.flatten(1, -2)).unflatten(0, (-1, *[1] * (x.ndim - 2)))
        scale = 1 + self.gamma * (length / (length.mean(-1, keepdim=True) + self.eps))
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


def vector_length(x: Tensor) -> Tensor:
    """(N, L, C) -> (N, C), the Euclidean length over L, in float32 or better.

    Half precision would overflow or stagnate in the sum. Where the length is 0 so is its
    gradient; that of a plain square root is infinite. On a CPU ten times faster than torch's norm.
    """
    energy = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(1)
    alive = energy > 0
    return torch.where(alive, energy, 1.0).sqrt() * alive


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
            return F.linear(x, self.weight.flatten(1), self.bias)
        *lead, height, width, dim = x.shape
        h, w = height // k, width // k
        x = x[..., : h * k, : w * k, :].reshape(*lead, h, k, w, k, dim)
        x = x.transpose(-4, -3).reshape(*lead, h, w, k * k * dim)  # (..., h, w, k*k*C)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (D, k*k*C)
        return F.linear(x, weight, self.bias)


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
    """The tensors as autocast would hand them to a convolution: for our own autograd functions."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def block_mlp(x: Tensor, fc1: nn.Linear, grn: GRN, fc2: nn.Linear) -> Tensor:
    """`fc2(grn(gelu(fc1(x))))` on (N, ..., C) in one piece, with a backward of its own.

    It saves x and fc1's output, one tensor of width 4C where plain autograd saves five, and
    never scales a wide tensor where the scale fits into the weights.
    """
    args = in_autocast_dtype(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    gamma, beta = grn.gamma.flatten(), grn.beta.flatten()
    with torch.autocast(x.device.type, enabled=False):
        flat = args[0].flatten(1, -2)
        y = _BlockMLP.apply(flat, *args[1:], gamma, beta, grn.eps)[0]
    return y.unflatten(1, x.shape[1:-1])


class _BlockMLP(Function):
    """x (N, L, C), w1 (K, C), b1 (K), w2 (D, K), b2 (D), gamma (K), beta (K) -> y (N, L, D).

    With a = gelu(x w1' + b1), G (N, K) the length of a over L and s = 1 + gamma G / mean(G):
    y = (a s) w2' + (b2 + w2 beta). Where an image has more positions than the layer has
    channels, s goes into the weights of the image, else into a.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = F.linear(x, w1, b1)
        a = F.gelu(h)
        length = vector_length(a)
        scale = (1 + gamma * _relative(length, eps)[0]).to(a.dtype)[:, None]  # (N, 1, K)
        bias = b2 + w2 @ beta.to(w2.dtype)
        if x.shape[1] > w2.shape[0]:
            y = torch.baddbmm(bias, a, (w2 * scale).transpose(1, 2))
        else:
            y = F.linear(a.mul_(scale), w2, bias)
        return y, h, length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, w1, b1, w2, _, gamma, beta, ctx.eps = inputs
        _, h, length = output
        ctx.mark_non_differentiable(h, length)
        ctx.save_for_backward(x, w1, b1, w2, gamma, beta, h, length)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _h: Tensor, _length: Tensor) -> tuple:
        x, w1, b1, w2, gamma, beta, h, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative goes through h back to x
            h = F.linear(x, w1, b1)
            length = vector_length(F.gelu(h))
        relative, mean = _relative(length, ctx.eps)
        wide_scale = 1 + gamma * relative  # (N, K)
        scale = wide_scale.to(dy.dtype)[:, None]
        a = F.gelu(h)
        db2 = dy.sum((0, 1))
        if x.shape[1] > w2.shape[0]:
            per_image = dy.transpose(1, 2) @ a  # (N, D, K)
            dw2 = (per_image * scale).sum(0)
            dscale = (per_image * w2).sum(1)
            da = dy @ (w2 * scale)
        else:
            da = dy @ w2
            dscale = (da * a).sum(1)
            dw2 = dy.flatten(0, 1).mT @ (a * scale).flatten(0, 1)
            da = da * scale
        dw2 = dw2 + torch.outer(db2, beta.to(db2.dtype))
        dbeta = db2 @ w2

        dscale = dscale.to(relative.dtype)
        drelative = dscale * gamma
        spread = (drelative * length).sum(-1, keepdim=True) / (mean**2 * length.shape[-1])
        dlength = drelative / mean - spread
        alive = length > 0
        direction = torch.where(alive, dlength / torch.where(alive, length, 1.0), 0.0)
        da.addcmul_(a, direction.to(a.dtype)[:, None])  # nothing above needs da itself again

        dh = torch.ops.aten.gelu_backward(da, h)
        dx = dh @ w1
        dw1 = dh.flatten(0, 1).mT @ x.flatten(0, 1)
        dgamma = (dscale * relative).sum(0)
        return dx, dw1, dh.sum((0, 1)), dw2, db2, dgamma, dbeta.to(beta.dtype), None


def _relative(length: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(N, K) lengths -> each over the image's mean, and that mean (N, 1)."""
    mean = length.mean(-1, keepdim=True) + eps
    return length / mean, mean
