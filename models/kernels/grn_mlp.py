# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The MLP of a block, pwconv1 - GELU - GRN - pwconv2, as one operation with its own backward.

python -c "from models.kernels import grn_mlp; print(grn_mlp.__doc__)"

Shapes: x (N, L, C), w1 (K, C), b1 (K), w2 (C, K), b2 (C), gamma (K), beta (K) -> y (N, L, C).
With h = x w1' + b1, a = gelu(h), the norm G (N, K) of a over an image's positions and
s = 1 + gamma G / mean(G):  y = (a s + beta) w2' + b2. Where an image has more positions than the
layer has channels, s scales the weights of each image and beta goes into the bias, otherwise s
scales a.
"""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from models.kernels import autotune, ops
from models.kernels.ops import linear, over_mean, weight_grad


def grn_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """The MLP of x (N, ..., C).

    It saves x and h, one tensor of width 4C where plain autograd saves five, and never scales a
    wide tensor where the scale fits into the weights.
    """
    y, w1, w2 = ops.in_autocast_dtype(x, w1, w2)  # the vectors stay as they are
    with torch.autocast(x.device.type, enabled=False):
        y = _MLP.apply(y.flatten(1, -2), w1, b1, w2, b2, gamma, beta, eps)[0]
    return y.unflatten(1, x.shape[1:-1])


def _plain(x, w1, b1, w2, b2, gamma, beta, eps) -> Tensor:
    """y by torch's own differentiable operations."""
    a = F.gelu(F.linear(x, w1, b1.to(x.dtype)))
    return F.linear(ops.grn(a, gamma, beta, eps), w2, b2.to(x.dtype))


class _MLP(Function):
    @staticmethod
    def forward(x, w1, b1, w2, b2, gamma, beta, eps) -> tuple[Tensor, Tensor, Tensor]:
        """y, and for the gradients h (N, L, K) and G (N, K)."""
        h = linear(x, w1, b1.to(x.dtype))
        outs, norms = [], []
        for part in h.split(ops.images_at_once(h, 2 * h.shape[1] * h.shape[2])):
            a, squares = autotune.dispatch("gelu", GELU, (), part)
            norms.append(ops.safe_sqrt(squares))
            scale = (1 + gamma * over_mean(norms[-1], eps)[0])[:, None]  # (N, 1, K)
            if _scales_weights(a, w2):
                bias = b2 + beta @ w2.mT.to(beta.dtype)
                outs.append(linear(a, (w2 * scale).to(a.dtype), bias.to(a.dtype)))
            else:
                scaled = torch.addcmul(beta.to(a.dtype), a, scale.to(a.dtype), out=a)
                outs.append(linear(scaled, w2, b2.to(a.dtype)))
        return ops.join(outs), h, ops.join(norms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.eps = inputs
        _, h, norm = output
        ctx.mark_non_differentiable(h, norm)
        ctx.set_materialize_grads(False)  # of h, zeros as wide as it
        ctx.save_for_backward(*tensors, h, norm)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        *inputs, h, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return ops.plain_gradients(_plain, (*inputs, ctx.eps), dy)
        x, w1, _, w2, _, gamma, beta = inputs
        images = ops.images_at_once(h, 2 * h.shape[1] * h.shape[2])
        parts, dxs = [], []
        for dy_, x_, h_, norm_ in zip(*(t.split(images) for t in (dy, x, h, norm)), strict=True):
            arguments = (h_, dy_, w2, gamma, beta, norm_, ctx.eps)
            dh, *grads = autotune.dispatch("mlp gradients", BACKWARD, (), *arguments)
            dxs.append(linear(dh, w1.mT))
            parts.append((weight_grad(dh.flatten(0, 1), x_.flatten(0, 1)), *grads))
        dw1, db1, dw2, dgamma, dbeta = (_total(own, norm.dtype) for own in zip(*parts, strict=True))
        db2 = dy.sum((0, 1), dtype=norm.dtype)
        return ops.join(dxs), dw1, db1, dw2, db2, dgamma, dbeta, None


def _total(parts: tuple[Tensor, ...], wide: torch.dtype) -> Tensor:
    """Sum of the parts' gradients; in bf16 a sum over many would stagnate."""
    return parts[0] if len(parts) == 1 else reduce(torch.add, (t.to(wide) for t in parts))


def _scales_weights(h: Tensor, w2: Tensor) -> bool:
    """True if scaling weights (C, K) for every image is less work than scaling a (N, L, K)."""
    return h.shape[1] > w2.shape[0]


def _torch_backward(
    h: Tensor, dy: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """From dy back to h: dh (N, L, K), db1 (K), dw2 (C, K), dgamma (K), dbeta (K)."""
    a = F.gelu(h)
    wide = norm.dtype  # of sums
    scale = (1 + gamma * over_mean(norm, eps)[0]).to(a.dtype)[:, None]
    da = linear(dy, w2.mT)  # gradient of the input of pwconv2, not yet scaled
    if _scales_weights(h, w2):
        each = weight_grad(dy, a)  # (N, C, K)
        dw2, dbeta = _beta_in_bias((each * scale).sum(0), dy, w2, beta)
        dscale = (each * w2).sum(1, dtype=wide)
    else:
        dbeta = da.sum((0, 1), dtype=wide)
        buffer = da * a  # its memory is used twice: fresh memory is slow
        dscale = buffer.sum(1, dtype=wide)
        scaled = torch.addcmul(beta.to(a.dtype), a, scale, out=buffer)
        dw2 = weight_grad(dy.flatten(0, 1), scaled.flatten(0, 1))
    slope, dgamma = _through_norm(dscale, gamma, norm, eps)
    if a.dtype == torch.float16:  # the slope of an almost dead channel exceeds 65504
        unit = torch.where(norm > 0, norm, 1.0)
        a, slope = (a / unit[:, None]).to(a.dtype), slope * unit
    da.mul_(scale).addcmul_(a, slope.to(a.dtype)[:, None])
    dh = torch.ops.aten.gelu_backward.grad_input(da, h, grad_input=da)
    return dh, dh.sum((0, 1), dtype=wide), dw2, dgamma, dbeta


def _triton_backward(
    h: Tensor, dy: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """`_torch_backward` in two passes over h that recompute a."""
    scale = 1 + gamma * over_mean(norm, eps)[0]
    da = linear(dy, w2.mT)
    dscale, scaled = ops.triton_kernels().scale_grad(da, h, scale)
    dw2 = weight_grad(dy.flatten(0, 1), scaled.flatten(0, 1))
    dw2, dbeta = _beta_in_bias(dw2, dy, w2, beta)
    slope, dgamma = _through_norm(dscale, gamma, norm, eps)
    dh, db1 = ops.triton_kernels().gelu_grad(da, h, scale, slope)
    return dh, db1, dw2, dgamma, dbeta


def _beta_in_bias(dw2: Tensor, dy: Tensor, w2: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """dw2 with the contribution of `w2 beta` added, and dbeta."""
    total = dy.sum((0, 1), dtype=beta.dtype)
    return dw2.addr_(total.to(dw2.dtype), beta.to(dw2.dtype)), total @ w2.to(beta.dtype)


def _through_norm(dscale: Tensor, gamma: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradient of s (N, K) -> the factor (N, K) of a in da that comes from G, and dgamma (K)."""
    relative, mean = over_mean(norm, eps)
    drelative = dscale * gamma
    spread = (drelative * norm).sum(-1, keepdim=True) / (mean**2 * norm.shape[-1])
    dnorm = drelative / mean - spread
    alive = norm > 0
    slope = torch.where(alive, dnorm / torch.where(alive, norm, 1.0), 0.0)
    return slope, (dscale * relative).sum(0)


def _torch_gelu(h: Tensor) -> tuple[Tensor, Tensor]:
    a = F.gelu(h)
    return a, ops.sum_of_squares(a)


GELU = {  # h (N, L, K) -> a, and the sum (N, K) of its squares
    "torch": _torch_gelu,
    "triton": lambda h: ops.triton_kernels().gelu_sum_of_squares(h),
}
BACKWARD = {"torch": _torch_backward, "triton": _triton_backward}
