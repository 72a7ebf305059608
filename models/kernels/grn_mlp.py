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
    y, w1, w2 = ops.in_autocast_dtype(x, w1, w2)  # the vectors and their gradients stay float32
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
        if ops.plain_backward(dy):
            return ops.plain_gradients(_plain, (*inputs, ctx.eps), dy)
        x, w1, _, w2, _, gamma, beta = inputs
        of_x, of_w1, of_b1, of_w2, of_b2, of_gamma, of_beta, _ = ctx.needs_input_grad
        wanted = (of_x or of_w1 or of_b1, of_b1, of_w2, of_gamma)
        sizes = tuple(map(int, wanted))  # on which the speed depends too
        images = ops.images_at_once(h, 2 * h.shape[1] * h.shape[2])
        parts, dxs = [], []
        for dy_, x_, h_, norm_ in zip(*(t.split(images) for t in (dy, x, h, norm)), strict=True):
            arguments = (h_, dy_, w2, gamma, norm_, ctx.eps, wanted)
            dh, *grads = autotune.dispatch("mlp gradients", BACKWARD, sizes, *arguments)
            if of_x:
                dxs.append(linear(dh, w1.mT))
            dw1 = weight_grad(dh.flatten(0, 1), x_.flatten(0, 1)) if of_w1 else None
            parts.append((dw1, *grads))
        dw1, db1, dw2, dgamma = (ops.total(own, norm.dtype) for own in zip(*parts, strict=True))
        db2 = dbeta = None
        if of_b2 or of_w2 or of_beta:
            db2 = dy.sum((0, 1), dtype=norm.dtype)
        if of_w2:  # beta's contribution
            dw2.addr_(db2.to(dw2.dtype), beta.to(dw2.dtype))
        if of_beta:
            dbeta = db2 @ w2.to(db2.dtype)
        return ops.join(dxs) if of_x else None, dw1, db1, dw2, db2, dgamma, dbeta, None


def _scales_weights(h: Tensor, w2: Tensor) -> bool:
    """True if scaling weights (C, K) for every image is less work than scaling a (N, L, K)."""
    return h.shape[1] > w2.shape[0]


def _torch_backward(
    h: Tensor,
    dy: Tensor,
    w2: Tensor,
    gamma: Tensor,
    norm: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """From dy back to h: dh (N, L, K), db1 (K), dw2 (C, K) but for beta's part, and dgamma (K).

    wanted: which of them; the others are None.
    """
    of_h, of_b1, of_w2, of_gamma = wanted
    wide = norm.dtype  # of sums
    a, scale = F.gelu(h), (1 + gamma * over_mean(norm, eps)[0]).to(h.dtype)[:, None]
    scales_weights = of_w2 and _scales_weights(h, w2)
    dh = db1 = dw2 = dgamma = da = dscale = None
    if of_h or (of_gamma and not scales_weights):
        da = linear(dy, w2.mT)  # gradient of the input of pwconv2, not yet scaled
    if scales_weights:
        each = weight_grad(dy, a)  # (N, C, K)
        dw2 = (each * scale).sum(0)
        dscale = (each * w2).sum(1, dtype=wide)
    else:
        buffer = a.new_empty(a.shape)  # used twice: fresh memory is slow
        if da is not None:
            dscale = torch.mul(da, a, out=buffer).sum(1, dtype=wide)
        if of_w2:
            scaled = torch.mul(a, scale, out=buffer)
            dw2 = weight_grad(dy.flatten(0, 1), scaled.flatten(0, 1))
    if dscale is not None:
        slope, dgamma = _through_norm(dscale, gamma, norm, eps)
    if of_h:
        if a.dtype == torch.float16:  # the slope of an almost dead channel exceeds 65504
            unit = torch.where(norm > 0, norm, 1.0)
            a, slope = (a / unit[:, None]).to(a.dtype), slope * unit
        da.mul_(scale).addcmul_(a, slope.to(a.dtype)[:, None])
        dh = torch.ops.aten.gelu_backward.grad_input(da, h, grad_input=da)
        db1 = dh.sum((0, 1), dtype=wide) if of_b1 else None
    return dh, db1, dw2, dgamma if of_gamma else None


def _triton_backward(
    h: Tensor,
    dy: Tensor,
    w2: Tensor,
    gamma: Tensor,
    norm: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """`_torch_backward` in at most two passes over h that recompute a."""
    of_h, of_b1, of_w2, of_gamma = wanted
    scale = 1 + gamma * over_mean(norm, eps)[0]
    dh = db1 = dw2 = dgamma = None
    if of_h or of_gamma:
        da = linear(dy, w2.mT)
        dscale, scaled = ops.triton_kernels().scale_grad(da, h, scale)
        slope, dgamma = _through_norm(dscale, gamma, norm, eps)
    elif of_w2:
        scaled = ops.triton_kernels().gelu_sum_of_squares(h)[0].mul_(scale.to(h.dtype)[:, None])
    if of_w2:
        dw2 = weight_grad(dy.flatten(0, 1), scaled.flatten(0, 1))
    if of_h:
        dh, db1 = ops.triton_kernels().gelu_grad(da, h, scale, slope)
    return dh, db1 if of_b1 else None, dw2, dgamma if of_gamma else None


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
