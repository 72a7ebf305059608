# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Depthwise convolution of dense and packed maps, followed by LayerNorm.

python -c "from models.kernels import depthwise; print(list(depthwise.CONVOLVE))"

Shapes: x dense (N, H, W, C) with ids and slots None, or packed (N, V, p, p, C) with the ids (N, V)
and slots (N, h, w) of a `PatchGrid`; weight (C, 1, k, k), bias (C). Results are in the layout of x.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from models.kernels import autotune, ops


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    ids: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Convolve with stride 1 and zero padding, then normalize.

    Removed patches count as zeros. Under autocast the norm's statistics are in float32.
    """
    x, weight = ops.in_autocast_dtype(x, weight)  # the vectors and their gradients stay float32
    with torch.autocast(x.device.type, enabled=False):
        return _DepthwiseNorm.apply(x, weight, bias, norm_weight, norm_bias, eps, ids, slots)[0]


def _plain(x, weight, bias, norm_weight, norm_bias, eps, ids, slots) -> Tensor:
    """The result of `_DepthwiseNorm` by torch's own differentiable operations."""
    y = _torch_convolve(x, weight, bias.to(x.dtype), ids, slots)
    return _layer_norm(y, norm_weight, norm_bias, eps)[0]


def _layer_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Normalized (..., C) in y's dtype, mean and 1 / deviation (..., 1) in the weight's."""
    wide = y.to(weight.dtype)
    normed, mean, rstd = torch.native_layer_norm(wide, weight.shape, weight, bias, eps)
    return normed.to(y.dtype), mean, rstd


class _DepthwiseNorm(Function):
    """Returns (normalized, y, mean, 1 / deviation) and saves x and the last three."""

    @staticmethod
    def forward(x, weight, bias, norm_weight, norm_bias, eps, ids, slots) -> tuple[Tensor, ...]:
        inputs = (x, weight, bias.to(x.dtype), norm_weight, norm_bias, eps, ids, slots)
        return autotune.dispatch("depthwise norm", CONVOLVE_NORM, _sizes(weight, slots), *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.eps, ids, slots = inputs
        y_and_statistics = output[1:]
        ctx.mark_non_differentiable(*y_and_statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, ids, slots, *y_and_statistics)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, bias, norm_weight, norm_bias, ids, slots, y, mean, rstd = ctx.saved_tensors
        if ops.plain_backward(grad):
            inputs = (x, weight, bias, norm_weight, norm_bias, ctx.eps, ids, slots)
            return ops.plain_gradients(_plain, inputs, grad)
        of_x, of_weight, of_bias, *of_norm = ctx.needs_input_grad[:5]
        of_y = of_x or of_weight or of_bias
        wide = (t.to(norm_weight.dtype) for t in (grad, y))
        rest = (norm_weight.shape, mean, rstd, norm_weight, norm_bias, [of_y, *of_norm])
        grad, *norm_grads = torch.ops.aten.native_layer_norm_backward(*wide, *rest)
        dx = dweight = dbias = None
        if of_y:
            grad = grad.to(y.dtype)
        if of_bias:
            dbias = grad.flatten(0, -2).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
        if of_x or of_weight:
            dx, dweight = _gradients(grad, x, weight, ids, slots, of_x, of_weight)
        dx, dweight = dx if of_x else None, dweight if of_weight else None
        return dx, dweight, dbias, *norm_grads, None, None, None


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, slots: Tensor | None
) -> Tensor:
    """The convolution in its fastest implementation, which has no gradient."""
    if torch.compiler.is_compiling():
        return torch.ops.convnextv2.depthwise(x, weight, bias, ids, slots)
    sizes = _sizes(weight, slots)
    y = autotune.dispatch("depthwise", CONVOLVE, sizes, x, weight, bias, ids, slots)
    return y.contiguous()  # as `register_fake` promises; torch's own follows the strides of x


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    slots: Tensor | None,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution for x and weight, empty where not wanted.

    The weight's is contiguous like DDP's gradient buckets, which would copy any other.
    """
    if torch.compiler.is_compiling():
        return torch.ops.convnextv2.depthwise_gradients(dy, x, weight, ids, slots, of_x, of_weight)
    if x.device.type == "cpu" and autotune.autotuner.mode != "triton":
        return _cpu_gradients(dy, x, weight, ids, slots, of_x, of_weight)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if of_x:
        dx = _convolve(dy, weight.flip(2, 3), None, ids, slots)
    if of_weight:
        inputs = (dy, x, weight.shape[-1], ids, slots)
        dweight = autotune.dispatch("depthwise weight", WEIGHT_GRAD, _sizes(weight, slots), *inputs)
        dweight = dweight.to(weight.dtype).contiguous()
    return dx, dweight


def _sizes(weight: Tensor, slots: Tensor | None) -> tuple[int, ...]:
    """k, h and w, on which the speed depends too; h and w are 0 for a dense map.

    And under torch.compile, which would compile again for each h: its implementation is fixed.
    """
    known = slots is not None and not torch.compiler.is_compiling()
    return weight.shape[-1], *(map(autotune.round_up, slots.shape[1:]) if known else (0, 0))


def _to_dense(x: Tensor, ids: Tensor | None, slots: Tensor | None) -> Tensor:
    """Dense or packed map -> (N, C, H, W), zero where removed."""
    x = x if ids is None else ops.unpack(x, ids, *slots.shape[1:])
    return x.permute(0, 3, 1, 2)


def _from_dense(y: Tensor, ids: Tensor | None, slots: Tensor | None) -> Tensor:
    """The inverse of `_to_dense`."""
    y = y.permute(0, 2, 3, 1)
    return y if ids is None else ops.pack(y, ids, *slots.shape[1:])


def _split(ids: Tensor | None, slots: Tensor | None, *maps: Tensor) -> Iterator[tuple]:
    """Yield the parts of a batch that fit into the cache: maps (N, C, H, W), and their ids."""
    *_, height, width, dim = maps[0].shape
    patches = 1 if slots is None else slots.shape[1] * slots.shape[2]
    images = ops.images_at_once(maps[0], 3 * patches * height * width * dim)  # x, dy and dx
    own_ids = repeat(None) if ids is None else ids.split(images)
    for *part, own in zip(*(x.split(images) for x in maps), own_ids, strict=False):
        yield *(_to_dense(x, own, slots) for x in part), own


def _torch_convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, slots: Tensor | None
) -> Tensor:
    outs = []
    for dense, own in _split(ids, slots, x):
        y = F.conv2d(dense, weight, bias, padding="same", groups=len(weight))
        outs.append(_from_dense(y, own, slots))
    return ops.join(outs)


def _cpu_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    slots: Tensor | None,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """`_gradients` on a CPU, where torch's own weight gradient is slow.

    The same numbers come out of a forward convolution of an image's channel with its own gradient
    as the kernel.
    """
    flipped, pad = weight.flip(2, 3), weight.shape[-1] // 2
    wide = torch.promote_types(weight.dtype, torch.float32)
    dxs, dweight = [], torch.zeros_like(weight, dtype=wide)
    if x.numel() == 0:  # a convolution of no groups is refused
        return torch.zeros_like(x), dweight.to(weight.dtype)
    for planes, grad, own in _split(ids, slots, x, dy):
        if of_x:
            dx = F.conv2d(grad, flipped, padding=pad, groups=len(weight))
            dxs.append(_from_dense(dx, own, slots))
        if of_weight:
            planes = planes.reshape(1, -1, *planes.shape[2:])
            kernels = grad.reshape(-1, 1, *grad.shape[2:])
            each = F.conv2d(planes, kernels, padding=pad, groups=len(kernels))
            dweight += each.reshape(-1, *weight.shape).sum(0, dtype=wide)
    dx = ops.join(dxs).contiguous() if of_x else x.new_empty(0)
    return dx, dweight.to(weight.dtype) if of_weight else weight.new_empty(0)


def _torch_weight_grad(
    dy: Tensor, x: Tensor, k: int, ids: Tensor | None, slots: Tensor | None
) -> Tensor:
    x, dy = (_to_dense(t, ids, slots) for t in (x, dy))
    channels = x.shape[1]
    weight = x.new_empty(channels, 1, k, k)  # only its shape matters
    rest = ([1, 1], [k // 2] * 2, [1, 1], False, [0, 0], channels, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *rest)[1]


def _torch_norm(x, weight, bias, norm_weight, norm_bias, eps, ids, slots) -> tuple[Tensor, ...]:
    y = _convolve(x, weight, bias, ids, slots)
    normed, *statistics = _layer_norm(y, norm_weight, norm_bias, eps)
    return normed, y, *statistics


_without_cudnn = torch.backends.cudnn.flags(enabled=False)  # torch's own CUDA kernels
CONVOLVE = {  # (x, weight, bias, ids, slots) -> y
    "torch": _torch_convolve,
    "native": _without_cudnn(_torch_convolve),
    "triton": lambda *args: ops.triton_kernels().depthwise(*args),
}
WEIGHT_GRAD = {  # (dy, x, k, ids, slots) -> (C, 1, k, k)
    "torch": _torch_weight_grad,
    "native": _without_cudnn(_torch_weight_grad),
    "triton": lambda *args: ops.triton_kernels().depthwise_weight_grad(*args),
}
CONVOLVE_NORM = {  # the inputs of `depthwise_norm` -> normalized, y, mean and 1 / deviation
    "torch": _torch_norm,
    "triton": lambda *args: ops.triton_kernels().depthwise_norm(*args),
}

# torch.compile calls both as they are: nothing in them could be fused with the layers around.
torch.library.custom_op(
    "convnextv2::depthwise",
    _convolve,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? ids, Tensor? slots) -> Tensor",
).register_fake(lambda x, *_: x.new_empty(x.shape))
torch.library.custom_op(
    "convnextv2::depthwise_gradients",
    _gradients,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? ids, Tensor? slots, bool of_x, "
    "bool of_weight) -> (Tensor, Tensor)",
).register_fake(
    lambda dy, x, weight, ids, slots, of_x, of_weight: (
        x.new_empty(x.shape if of_x else 0),
        weight.new_empty(weight.shape if of_weight else 0),
    )
)
