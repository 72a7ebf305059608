# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The MLP of a ConvNeXt V1 block, pwconv1 - GELU - pwconv2, as one operation with its own backward.

python -c "from models.kernels import mlp; print(mlp.mlp.__doc__)"

Shapes: x (N, L, C), w1 (K, C), b1 (K), w2 (C, K), b2 (C) -> y (N, L, C), with h = x w1' + b1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from models.kernels import ops
from models.kernels.ops import linear, weight_grad


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The MLP of x (N, ..., C).

    It saves x and h, one tensor of width 4C where plain autograd saves two.
    """
    y, w1, w2 = ops.in_autocast_dtype(x, w1, w2)  # the vectors and their gradients stay float32
    with torch.autocast(x.device.type, enabled=False):
        y = _MLP.apply(y.flatten(1, -2), w1, b1, w2, b2)[0]
    return y.unflatten(1, x.shape[1:-1])


def _plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """y by torch's own differentiable operations."""
    return F.linear(F.gelu(F.linear(x, w1, b1.to(x.dtype))), w2, b2.to(x.dtype))


class _MLP(Function):
    @staticmethod
    def forward(x, w1, b1, w2, b2) -> tuple[Tensor, Tensor]:
        """y, and h (N, L, K) for the gradients."""
        h = linear(x, w1, b1.to(x.dtype))
        parts = h.split(ops.images_at_once(h, 2 * h.shape[1] * h.shape[2]))
        return ops.join([linear(F.gelu(part), w2, b2.to(x.dtype)) for part in parts]), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, h = output
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)  # of h, zeros as wide as it
        ctx.save_for_backward(*inputs, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        *inputs, h = ctx.saved_tensors
        if ops.plain_backward(dy):
            return ops.plain_gradients(_plain, tuple(inputs), dy)
        x, w1, _, w2, _ = inputs
        of_x, of_w1, of_b1, of_w2, of_b2 = ctx.needs_input_grad
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # of sums
        images = ops.images_at_once(h, 2 * h.shape[1] * h.shape[2])
        parts, dxs = [], []
        for dy_, x_, h_ in zip(*(t.split(images) for t in (dy, x, h)), strict=True):
            dw1 = db1 = dw2 = None
            if of_w2:
                dw2 = weight_grad(dy_.flatten(0, 1), F.gelu(h_).flatten(0, 1))
            if of_x or of_w1 or of_b1:
                dh = linear(dy_, w2.mT)
                dh = torch.ops.aten.gelu_backward.grad_input(dh, h_, grad_input=dh)
                dw1 = weight_grad(dh.flatten(0, 1), x_.flatten(0, 1)) if of_w1 else None
                db1 = dh.sum((0, 1), dtype=wide) if of_b1 else None
                dxs += [linear(dh, w1.mT)] if of_x else []
            parts.append((dw1, db1, dw2))
        dw1, db1, dw2 = (ops.total(own, wide) for own in zip(*parts, strict=True))
        db2 = dy.sum((0, 1), dtype=wide) if of_b2 else None
        return ops.join(dxs) if of_x else None, dw1, db1, dw2, db2
