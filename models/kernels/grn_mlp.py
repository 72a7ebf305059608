# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The MLP of a block, pwconv1 - GELU - GRN - pwconv2, in one piece with a backward of its own.

python -c "from models.kernels import grn_mlp; print(grn_mlp.__doc__)"

Shapes: x (N, L, C), w1 (K, C), b1 (K), w2 (C, K), b2 (C), gamma (K), beta (K) -> y (N, L, C).
With h = x w1' + b1, a = gelu(h), G (N, K) the length of a over an image's positions and
s = 1 + gamma G / mean(G):  y = (a s + beta) w2' + b2. Where an image has more positions than the
layer has channels, s goes into the weights of the image and beta into the bias, else into a.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from models.kernels import autotune, ops
from models.kernels.ops import gram, product, relative_length
from models.layers import GRN, in_autocast_dtype


def block_mlp(x: Tensor, fc1: nn.Linear, grn: GRN, fc2: nn.Linear) -> Tensor:
    """`fc2(grn(gelu(fc1(x))))` on (N, ..., C).

    It saves x and fc1's output, one tensor of width 4C where plain autograd saves five, and
    never scales a wide tensor where the scale fits into the weights.
    """
    kinds = ((fc1, nn.Linear), (grn, GRN), (fc2, nn.Linear))
    if not all(ops.can_fuse(module, kind) for module, kind in kinds):
        return fc2(grn(F.gelu(fc1(x))))
    y, w1, w2 = in_autocast_dtype(x, fc1.weight, fc2.weight)  # the vectors stay as they are
    gamma, beta = grn.gamma.flatten(), grn.beta.flatten()
    arguments = (y.flatten(1, -2), w1, fc1.bias, w2, fc2.bias, gamma, beta, grn.eps)
    with torch.autocast(x.device.type, enabled=False):
        y = _MLP.apply(*arguments)[0]
    return y.unflatten(1, x.shape[1:-1])


def plain(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """y in torch's own differentiable operations."""
    a = F.gelu(F.linear(x, w1, b1.to(x.dtype)))
    return F.linear(ops.grn(a, gamma, beta, eps), w2, b2.to(x.dtype))


class _MLP(Function):
    @staticmethod
    def forward(  # each by name: the compiler counts them
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward(x, w1, b1, w2, b2, gamma, beta, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.eps = inputs
        _, h, length = output
        ctx.mark_non_differentiable(h, length)
        ctx.set_materialize_grads(False)  # of h, zeros as wide as it
        ctx.save_for_backward(*tensors, h, length)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        *inputs, h, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return ops.plain_gradients(plain, (*inputs, ctx.eps), dy)
        x, w1, _, w2, _, gamma, beta = inputs
        return *gradients(dy, x, w1, w2, gamma, beta, h, length, ctx.eps), None


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
    """y (N, L, C), and what the gradients need: h (N, L, K) and G (N, K)."""
    h = product(x, w1, b1.to(x.dtype))
    outs, lengths = [], []
    for part in h.split(ops.images_at_once(h, 2 * h.shape[1] * h.shape[2])):
        a, energy = autotune.run("gelu", GELU, autotune.size(part), part)
        lengths.append(ops.root(energy))
        scale = (1 + gamma * relative_length(lengths[-1], eps)[0])[:, None]  # (N, 1, K)
        if per_image_weights(a, w2):
            bias = b2 + beta @ w2.mT.to(beta.dtype)
            outs.append(product(a, (w2 * scale).to(a.dtype), bias.to(a.dtype)))
        else:
            scaled = torch.addcmul(beta.to(a.dtype), a, scale.to(a.dtype), out=a)
            outs.append(product(scaled, w2, b2.to(a.dtype)))
    return ops.join(outs), h, ops.join(lengths)


def per_image_weights(h: Tensor, w2: Tensor) -> bool:
    """Whether scaling weights (C, K) for every image is less work than scaling a (N, L, K)."""
    return h.shape[1] > w2.shape[0]


def gradients(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    h: Tensor,
    length: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Of y in x, w1, b1, w2, b2, gamma and beta."""
    images = ops.images_at_once(h, 2 * h.shape[1] * h.shape[2])
    parts = []
    for dy_, x_, h_, length_ in zip(*(t.split(images) for t in (dy, x, h, length)), strict=True):
        arguments = (h_, dy_, w2, gamma, beta, length_, eps)
        dh, *rest = autotune.run("mlp gradients", BACKWARD, autotune.size(h_), *arguments)
        parts.append((product(dh, w1.mT), gram(dh.flatten(0, 1), x_.flatten(0, 1)), *rest))
    dxs, *sums = zip(*parts, strict=True)
    wide = length.dtype  # a bf16 sum over parts would stagnate; autograd casts what it gets
    dw1, db1, dw2, dgamma, dbeta = (
        own[0] if len(own) == 1 else reduce(torch.add, (t.to(wide) for t in own)) for own in sums
    )
    return ops.join(dxs), dw1, db1, dw2, dy.sum((0, 1), dtype=length.dtype), dgamma, dbeta


def _torch_backward(
    h: Tensor, dy: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor, length: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """From dy back to h: dh (N, L, K), db1 (K), dw2 (C, K), dgamma (K), dbeta (K)."""
    a = F.gelu(h)
    wide = length.dtype  # of sums
    scale = (1 + gamma * relative_length(length, eps)[0]).to(a.dtype)[:, None]
    da = product(dy, w2.mT)  # of what goes into w2, not yet scaled
    if per_image_weights(h, w2):
        each = gram(dy, a)  # (N, C, K)
        dw2, dbeta = _beta_in_bias((each * scale).sum(0), dy, w2, beta)
        dscale = (each * w2).sum(1, dtype=wide)
    else:
        dbeta = da.sum((0, 1), dtype=wide)
        buffer = da * a  # its memory serves twice: fresh memory is slow
        dscale = buffer.sum(1, dtype=wide)
        scaled = torch.addcmul(beta.to(a.dtype), a, scale, out=buffer)
        dw2 = gram(dy.flatten(0, 1), scaled.flatten(0, 1))
    direction, dgamma = _through_length(dscale, gamma, length, eps)
    if a.dtype == torch.float16:  # the direction of an almost dead channel is beyond 65504
        unit = torch.where(length > 0, length, 1.0)
        a, direction = (a / unit[:, None]).to(a.dtype), direction * unit
    da.mul_(scale).addcmul_(a, direction.to(a.dtype)[:, None])
    dh = torch.ops.aten.gelu_backward.grad_input(da, h, grad_input=da)
    return dh, dh.sum((0, 1), dtype=wide), dw2, dgamma, dbeta


def _triton_backward(
    h: Tensor, dy: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor, length: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """As `_torch_backward`, in two passes that recompute a on the way."""
    from models.kernels import triton_kernels

    scale = 1 + gamma * relative_length(length, eps)[0]
    da = product(dy, w2.mT)
    dscale, scaled = triton_kernels.scale_grad(da, h, scale)
    dw2 = gram(dy.flatten(0, 1), scaled.flatten(0, 1))
    dw2, dbeta = _beta_in_bias(dw2, dy, w2, beta)
    direction, dgamma = _through_length(dscale, gamma, length, eps)
    dh, db1 = triton_kernels.gelu_grad(da, h, scale, direction)
    return dh, db1, dw2, dgamma, dbeta


def _beta_in_bias(dw2: Tensor, dy: Tensor, w2: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """dw2 with the share of `w2 beta` added, and dbeta."""
    total = dy.sum((0, 1), dtype=beta.dtype)
    return dw2.addr_(total.to(dw2.dtype), beta.to(dw2.dtype)), total @ w2.to(beta.dtype)


def _through_length(
    dscale: Tensor, gamma: Tensor, length: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """ds (N, K) -> what a is multiplied by in da (N, K), and dgamma (K)."""
    relative, mean = relative_length(length, eps)
    drelative = dscale * gamma
    spread = (drelative * length).sum(-1, keepdim=True) / (mean**2 * length.shape[-1])
    dlength = drelative / mean - spread
    alive = length > 0
    direction = torch.where(alive, dlength / torch.where(alive, length, 1.0), 0.0)
    return direction, (dscale * relative).sum(0)


def _torch_gelu(h: Tensor) -> tuple[Tensor, Tensor]:
    """a, and its energy (N, K)."""
    a = F.gelu(h)
    return a, ops.energy(a)


def _triton_gelu(h: Tensor) -> tuple[Tensor, Tensor]:
    from models.kernels import triton_kernels

    return triton_kernels.gelu_energy(h)


GELU = {"torch": _torch_gelu, "triton": _triton_gelu}
BACKWARD = {"torch": _torch_backward, "triton": _triton_backward}
