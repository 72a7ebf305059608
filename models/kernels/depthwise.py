# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The depthwise convolution, which alone must know where patches lie, and the norm behind it.

python -c "from models.kernels import depthwise; print(list(depthwise.CONVOLVE))"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from models.kernels import autotune, ops
from models.layers import in_autocast_dtype
from models.sparse import Pack, PatchGrid, Unpack

# Shapes: x dense (N, H, W, C) with `place` (None, None, 0, 0), or packed (N, V, p, p, C) with
# (ids (N, V), slots (N, h, w), h, w); weight (C, 1, k, k), bias (C).


def depthwise(
    x: Tensor, conv: nn.Conv2d, grid: PatchGrid | None, norm: nn.LayerNorm | None = None
) -> Tensor:
    """Depthwise convolution of a dense or packed map, then `norm` if given, in its layout.

    Stride 1, odd square kernel, as many cells out as in. Removed patches count as zeros, as the
    zero padding around the image does. Under autocast the norm's statistics are in float32.
    """
    fused = ops.can_fuse(conv, nn.Conv2d) and _is_plain(conv)
    if norm is not None and not (fused and ops.can_fuse(norm, nn.LayerNorm)):
        return norm(depthwise(x, conv, grid))
    if not fused:
        dense = x if grid is None else grid.unpack(x)
        y = conv(dense.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y if grid is None else grid.pack(y)
    place = (None, None, 0, 0) if grid is None else (grid.ids, grid.slots, *grid.size)
    affine = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    x, weight, bias = in_autocast_dtype(x, conv.weight, conv.bias)
    with torch.autocast(x.device.type, enabled=False):
        return _Depthwise.apply(x, weight, bias, *affine, *place)[0]


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether the convolution is the depthwise one that `depthwise` describes."""
    rows, columns = conv.kernel_size
    square = rows == columns and rows % 2 == 1 and conv.padding == (rows // 2, rows // 2)
    ones = conv.stride == conv.dilation == (1, 1) and conv.weight.shape[1] == 1
    same = conv.groups == conv.out_channels and conv.padding_mode == "zeros"
    return square and ones and same


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *place: Any,
) -> Tensor:
    """What `_Depthwise` computes, in torch's own differentiable operations."""
    y = _on_canvas(x, weight, bias, *place)
    return y if norm_weight is None else _layer_norm(y, norm_weight, norm_bias, eps)[0]


def _layer_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Normalised (..., C) in y's dtype, mean and 1 / deviation (..., 1) in the weight's."""
    wide = y.to(weight.dtype)
    normed, mean, rstd = torch.native_layer_norm(wide, weight.shape, weight, bias, eps)
    return normed.to(y.dtype), mean, rstd


class _Depthwise(Function):
    """Saves x, and with a norm the convolution's result: of packed maps the visible cells."""

    @staticmethod
    def forward(  # each by name: the compiler counts them
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        ids: Tensor | None,
        slots: Tensor | None,
        h: int,
        w: int,
    ) -> tuple[Tensor, ...]:
        place = (ids, slots, h, w)
        if norm_weight is None:
            return (ops.no_view(convolve(x, weight, bias, *place)),)
        arguments = (x, weight, bias, norm_weight, norm_bias, eps, *place)
        key = autotune.size(x, weight.shape[-1], h, w)
        return autotune.run("depthwise norm", CONVOLVE_NORM, key, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, norm_weight, norm_bias, ctx.eps, ids, slots, *ctx.size = inputs
        y_and_statistics = output[1:]
        ctx.mark_non_differentiable(*y_and_statistics)
        ctx.set_materialize_grads(False)
        rest = (norm_weight, norm_bias, ids, slots, *y_and_statistics)
        ctx.save_for_backward(x, weight, bias, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, bias, norm_weight, norm_bias, ids, slots, *saved = ctx.saved_tensors
        place = (ids, slots, *ctx.size)
        if torch.is_grad_enabled():  # for a second derivative
            inputs = (x, weight, bias, norm_weight, norm_bias, ctx.eps, *place)
            return ops.plain_gradients(_plain, inputs, grad)
        norm_gradients = None, None
        if saved:
            y, mean, rstd = saved
            grad, *norm_gradients = torch.ops.aten.native_layer_norm_backward(
                *(t.to(norm_weight.dtype) for t in (grad, y)),
                norm_weight.shape,
                mean,
                rstd,
                norm_weight,
                norm_bias,
                [True, True, True],
            )
            grad = grad.to(y.dtype)
        dbias = grad.flatten(0, -2).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
        if not ctx.needs_input_grad[1]:  # frozen
            dx, dweight = convolve(grad, weight.flip(2, 3), None, *place), None
        else:
            compiling = torch.compiler.is_compiling()
            run = torch.ops.convnextv2.depthwise_gradients if compiling else _gradients
            dx, dweight = run(grad, x, weight, *place)
        return dx, dweight, dbias, *norm_gradients, None, None, None, None, None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
    """The convolution, in the fastest form; none of them has a gradient of its own."""
    run = torch.ops.convnextv2.depthwise if torch.compiler.is_compiling() else _fastest_convolve
    return run(x, weight, bias, *place)


def _on_canvas(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
    """torch's convolution of the whole map, hidden patches zero."""
    (ids, _, h, w), outs = place, []
    for part, part_ids in _parts(x, ids, h, w):
        dense = part if part_ids is None else Unpack.apply(part, part_ids, h, w)
        y = F.conv2d(
            dense.permute(0, 3, 1, 2), weight, bias, padding="same", groups=len(weight)
        ).permute(0, 2, 3, 1)
        outs.append(y if part_ids is None else Pack.apply(y, part_ids, h, w))
    return ops.join(outs)


def _parts(x: Tensor, ids: Tensor | None, h: int, w: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """As many images at a time as `ops.images_at_once` likes, with their ids."""
    cells = x.shape[2] * x.shape[1] if ids is None else h * w * x.shape[2] ** 2
    images = ops.images_at_once(x, 3 * cells * x.shape[-1])  # x, dy and dx
    if images == x.shape[0]:
        return iter([(x, ids)])  # an exported graph with `split` would take no other batch
    parts = x.split(images)
    return zip(parts, ids.split(images) if ids is not None else [None] * len(parts), strict=True)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, *place: Any) -> tuple[Tensor, Tensor]:
    """Of the convolution in x and weight.

    The weight's is contiguous as DDP's gradient buckets are, which would copy any other.
    """
    if x.device.type == "cpu" and autotune.choices.mode != "triton":
        return _cpu_gradients(dy, x, weight, *place)
    key = autotune.size(x, weight.shape[-1], *place[2:])
    dx = _fastest_convolve(dy, weight.flip(2, 3), None, *place)
    arguments = (dy, x, weight.shape[-1], *place)
    dweight = autotune.run("depthwise weight", WEIGHT_GRADIENT, key, *arguments)
    return dx, dweight.to(weight.dtype).contiguous()


def _cpu_gradients(dy: Tensor, x: Tensor, weight: Tensor, *place: Any) -> tuple[Tensor, Tensor]:
    """`_gradients`, as many images at once as the cache holds.

    On a CPU torch's own weight gradient is slow. The same numbers come out of a forward
    convolution of an image's channel with its own gradient as the kernel.
    """
    ids, _, h, w = place
    flipped, pad = weight.flip(2, 3), weight.shape[-1] // 2
    wide = torch.promote_types(weight.dtype, torch.float32)
    dxs, dweight = [], torch.zeros_like(weight, dtype=wide)
    if x.numel() == 0:  # as many groups as there are channels in all images: none
        return torch.zeros_like(x), dweight.to(weight.dtype)
    for (part, part_ids), (grad, _) in zip(
        _parts(x, ids, h, w), _parts(dy, ids, h, w), strict=True
    ):
        if part_ids is not None:
            part, grad = (Unpack.apply(t, part_ids, h, w) for t in (part, grad))
        planes, grad = part.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
        dx = F.conv2d(grad, flipped, padding=pad, groups=len(weight)).permute(0, 2, 3, 1)
        dxs.append(dx if part_ids is None else Pack.apply(dx, part_ids, h, w))
        planes = planes.reshape(1, -1, *planes.shape[2:])
        kernels = grad.reshape(-1, 1, *grad.shape[2:])
        each = F.conv2d(planes, kernels, padding=pad, groups=len(kernels))
        dweight += each.reshape(-1, *weight.shape).sum(0, dtype=wide)
    return ops.join(dxs).contiguous(), dweight.to(weight.dtype)


def _weight_gradient_on_canvas(dy: Tensor, x: Tensor, k: int, *place: Any) -> Tensor:
    """torch's weight gradient (C, 1, k, k) on the whole map."""
    ids, _, h, w = place
    if ids is not None:
        x, dy = (Unpack.apply(t, ids, h, w) for t in (x, dy))
    x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
    channels = x.shape[1]
    weight = x.new_empty(channels, 1, k, k)  # only its shape matters
    rest = ([1, 1], [k // 2] * 2, [1, 1], False, [0, 0], channels, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *rest)[1]


def _without_cudnn(form: Callable) -> Callable:
    """The same with torch's own CUDA kernels, which are faster at some shapes."""

    def native(*args: Any) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return form(*args)

    return native


def _triton_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    slots: Tensor | None,
    *_: int,
) -> Tensor:
    from models.kernels import triton_kernels

    return triton_kernels.depthwise(x, weight, bias, ids, slots)


def _triton_weight_gradient(dy: Tensor, x: Tensor, k: int, *place: Any) -> Tensor:
    from models.kernels import triton_kernels

    return triton_kernels.depthwise_weight_grad(dy, x, k, *place[:2])


def _separate_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *place: Any,
) -> tuple[Tensor, ...]:
    y = convolve(x, weight, bias, *place)
    normed, *statistics = _layer_norm(y, norm_weight, norm_bias, eps)
    return normed, y, *statistics


def _triton_norm(*args: Any) -> tuple[Tensor, ...]:
    from models.kernels import triton_kernels

    return triton_kernels.depthwise_norm(*args[:-2])  # all but h and w


def _forms(torch_form: Callable, triton_form: Callable) -> autotune.Forms:
    return {"torch": torch_form, "native": _without_cudnn(torch_form), "triton": triton_form}


CONVOLVE = _forms(_on_canvas, _triton_convolve)
WEIGHT_GRADIENT = _forms(_weight_gradient_on_canvas, _triton_weight_gradient)
CONVOLVE_NORM = {"torch": _separate_norm, "triton": _triton_norm}


def _fastest_convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *place: Any) -> Tensor:
    key = autotune.size(x, weight.shape[-1], *place[2:])
    y = autotune.run("depthwise", CONVOLVE, key, x, weight, bias, *place)
    return y.contiguous()  # as the compiler is told; torch's own follows the strides of x


# The compiler takes both as they are: nothing of them could be fused with what surrounds them.
_PLACE = "Tensor? ids, Tensor? slots, int h, int w"
torch.library.custom_op(
    "convnextv2::depthwise",
    _fastest_convolve,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_PLACE}) -> Tensor",
).register_fake(lambda x, *_: x.new_empty(x.shape))
torch.library.custom_op(
    "convnextv2::depthwise_gradients",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor weight, {_PLACE}) -> (Tensor, Tensor)",
).register_fake(lambda dy, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
