# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Triton kernels for the depthwise convolution and the block's MLP.

TRITON_INTERPRET=1 python -c "import torch; from models.kernels import triton_kernels as kernels
print(kernels.gelu_sum_of_squares(torch.ones(1, 2, 3)))"

On CUDA tensors they are compiled; with TRITON_INTERPRET=1 they run on CPU tensors, slowly. Sums
are float32, or float64 where the input is. No atomics and no tuning: the same bits at every call.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 2048  # that share a sum: enough to fill any GPU, and the same number on all


# Convolution: C channels, P x P cells in a patch (P = 0: dense), SIDE x SIDE taps. A strip is a
# column of ROWS cells. A program takes STRIPS of them, numbered through the whole batch, and BLOCK
# channels, which are adjacent in memory. Cells are counted in 32 bits, elements in 64.


@triton.jit
def _place(strip, ids, images, height, width, cells, P: tl.constexpr, ROWS: tl.constexpr):
    """Numbers of strips -> their images, and row and column of their topmost cells."""
    if P == 0:
        per_image = tl.cdiv(height, ROWS) * width
        top = strip % per_image // width * ROWS
        left = strip % width
    else:
        per_image = cells // ROWS
        per_patch = P // ROWS * P
        patch = tl.load(ids + strip // per_patch, mask=strip < images * per_image, other=0)
        patch = patch.to(tl.int32)
        top = patch // (width // P) * P + strip % per_patch // P * ROWS
        left = patch % (width // P) * P + strip % P
    image = strip // per_image
    return image, top, tl.where(image < images, left, 1 << 30)  # past the end: outside of all


@triton.jit
def _at(image, row, column, channel, slots, height, width, cells, C: tl.constexpr, P: tl.constexpr):
    """Positions (...), channels (BLOCK,) -> offsets (..., BLOCK), and which of them exist."""
    row, column = row.to(tl.uint32), column.to(tl.uint32)  # negative ones become huge
    there = (row < height) & (column < width)
    if P == 0:
        cell = row * width + column
    else:
        patch = (image * (height // P) + row // P) * (width // P) + column // P
        slot = tl.load(slots + patch, mask=there, other=-1)
        there = there & (slot >= 0)
        cell = (slot * P + row % P) * P + column % P
    offset = tl.expand_dims(image * cells + cell, -1).to(tl.int64) * C + channel
    return offset, tl.expand_dims(there, -1) & (channel < C)


@triton.jit
def _convolve(
    x, weight, image, top, left, channel,
    slots, height, width, cells, C: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The sums (ROWS, STRIPS, BLOCK) of strips whose image, top and left are (1, STRIPS).

    Each value that is read serves all cells of the strip. The compiler knows the `line` of each
    register, so that `where` costs nothing. All values are read in one shape, so that no thread
    needs those of another.
    """
    line = tl.arange(0, ROWS)[:, None, None]
    sums = tl.zeros([ROWS, left.shape[1], channel.shape[0]], weight.dtype.element_ty)
    own = tl.broadcast_to(channel[None, None, :], [1, left.shape[1], channel.shape[0]])
    for j in range(SIDE):
        for r in tl.static_range(SIDE + ROWS - 1):
            row, column = top + (r - SIDE // 2), left + (j - SIDE // 2)
            at, there = _at(image, row, column, channel, slots, height, width, cells, C, P)
            value = tl.load(x + at, mask=there, other=0).to(sums.dtype)
            for s in tl.static_range(ROWS):
                if r >= s and r - s < SIDE:
                    tap = weight + ((r - s) * SIDE + j) * C + own
                    factor = tl.load(tap, mask=own < C, other=0)
                    sums = tl.where(line == s, sums + value * factor, sums)
    return sums


@triton.jit
def _depthwise_kernel(
    x, weight, bias, y, norm_weight, norm_bias, normed, mean, rstd,
    ids, slots, images, height, width, cells, C: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, SIDE: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """With EPS a LayerNorm follows, for which BLOCK must cover all channels."""
    blocks = tl.cdiv(C, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    strip = tl.program_id(0) // blocks * STRIPS + tl.arange(0, STRIPS)[None, :]
    image, top, left = _place(strip, ids, images, height, width, cells, P, ROWS)
    sums = _convolve(
        x, weight, image, top, left, channel, slots, height, width, cells, C, P, ROWS, SIDE
    )
    if bias is not None:
        sums += tl.load(bias + channel, mask=channel < C, other=0).to(sums.dtype)
    row = top + tl.arange(0, ROWS)[:, None]
    at, there = _at(image, row, left, channel, slots, height, width, cells, C, P)
    value = sums.to(y.dtype.element_ty)
    tl.store(y + at, value, mask=there)
    if EPS is not None:
        value = value.to(sums.dtype)  # 0 where there is no channel
        average = tl.sum(value, axis=2, keep_dims=True) / C
        error = tl.where(there, value - average, 0)
        scale = 1 / tl.sqrt(tl.sum(error * error, axis=2, keep_dims=True) / C + EPS)
        gain = tl.load(norm_weight + channel, mask=channel < C, other=0).to(sums.dtype)
        shift = tl.load(norm_bias + channel, mask=channel < C, other=0).to(sums.dtype)
        tl.store(normed + at, (error * scale * gain + shift).to(y.dtype.element_ty), mask=there)
        one = tl.arange(0, 1)
        at, there = _at(image, row, left, one, slots, height, width, cells, 1, P)
        tl.store(mean + at, average, mask=there)
        tl.store(rstd + at, scale, mask=there)


@triton.jit
def _weight_grad_kernel(
    dy, x, partial, tiles,
    ids, slots, images, height, width, cells, C: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, SIDE: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Sums over `tiles` tiles. A thread has all rows of the taps; columns lie across threads."""
    blocks = tl.cdiv(C, BLOCK)
    chunk = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    tap = tl.arange(0, TAPS)  # SIDE, filled up to a power of two
    line = tap[:, None, None, None]
    sums = tl.zeros([TAPS, TAPS, STRIPS, BLOCK], partial.dtype.element_ty)
    for tile in range(chunk * tiles, chunk * tiles + tiles):
        strip = tile * STRIPS + tl.arange(0, STRIPS)[None, None, :]
        image, top, left = _place(strip, ids, images, height, width, cells, P, ROWS)
        column = left + tap[None, :, None] - SIDE // 2
        own = tl.broadcast_to(left, [1, TAPS, STRIPS])  # so that each thread reads the dy it needs
        for r in tl.static_range(SIDE + ROWS - 1):
            row = top + (r - SIDE // 2)
            at, there = _at(image, row, column, channel, slots, height, width, cells, C, P)
            value = tl.load(x + at, mask=there & (tap < SIDE)[:, None, None], other=0)
            for s in tl.static_range(ROWS):
                if r >= s and r - s < SIDE:
                    row = top + s
                    at, there = _at(image, row, own, channel, slots, height, width, cells, C, P)
                    grad = tl.load(dy + at, mask=there, other=0).to(sums.dtype)
                    sums = tl.where(line == r - s, sums + value.to(sums.dtype) * grad, sums)
    at = ((chunk * SIDE + tap[:, None]) * SIDE + tap)[:, :, None] * C + channel
    there = (tap < SIDE)[:, None, None] & (tap < SIDE)[:, None] & (channel < C)
    tl.store(partial + at, tl.sum(sums, axis=2), mask=there)


@triton.jit
def _gelu_kernel(
    h, da, scale, slopes, out, partial, L, K, span, LINES: tl.constexpr, BLOCK: tl.constexpr
):
    """One of three passes over (N, L, K): the arguments that are not None select it.

    A program takes BLOCK channels and, LINES at a time, `span` of an image's L positions.
    """
    blocks = tl.cdiv(K, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(0) // blocks  # counted through the batch
    image, start = chunk // tl.cdiv(L, span), chunk % tl.cdiv(L, span) * span
    sums = tl.zeros([LINES, BLOCK], partial.dtype.element_ty)
    if scale is not None:
        factor = tl.load(scale + image * K + channel, mask=channel < K, other=0)
    if slopes is not None:
        slope = tl.load(slopes + image * K + channel, mask=channel < K, other=0)
    for first in range(start, start + span, LINES):
        position = first + tl.arange(0, LINES)
        at = (image * L + position).to(tl.int64)[:, None] * K + channel
        there = (position < L)[:, None] & (channel < K)
        raw = tl.load(h + at, mask=there, other=0)
        wide = raw.to(sums.dtype)
        below = 0.5 + 0.5 * tl.erf(wide * 0.7071067811865476)
        a = (wide * below).to(raw.dtype).to(sums.dtype)  # as a tensor of its dtype would hold it
        if da is None:
            result = a.to(raw.dtype)
            sums += a * a
        else:
            grad = tl.load(da + at, mask=there, other=0).to(sums.dtype)
            if slopes is None:
                result = (a * factor).to(raw.dtype)
                sums += grad * a
            else:
                density = 0.3989422804014327 * tl.exp(-0.5 * wide * wide)  # 1 / sqrt(2 pi)
                grad = (grad * factor + a * slope) * (below + wide * density)
                result = grad.to(raw.dtype)
                sums += result.to(sums.dtype)
        tl.store(out + at, result, mask=there)
    tl.store(partial + chunk * K + channel, tl.sum(sums, axis=0), mask=channel < K)


# Maps, ids (N, V) int64 and slots (N, h, w) int32 are those of models/kernels/depthwise.py.


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution with weight (C, 1, k, k)."""
    y = x.new_empty(x.shape)
    options, tiles = _options(x, ids, slots, _block(x.shape[-1], 64))
    programs = tiles * triton.cdiv(x.shape[-1], options["BLOCK"])
    taps = _taps(weight, x)
    tensors = (x, taps, bias, y, *[None] * 5)
    _run(_depthwise_kernel, programs, *tensors, SIDE=weight.shape[-1], EPS=None, **options)
    return y


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    ids: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`depthwise` and a LayerNorm: normalized, y, and y's mean and 1 / deviation (..., 1)."""
    y, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=_sum_dtype(x)) for _ in range(2))
    block = max(16, triton.next_power_of_2(x.shape[-1]))
    options, tiles = _options(x, ids, slots, block)
    tensors = (x, _taps(weight, x), bias, y, norm_weight, norm_bias, normed, mean, rstd)
    options |= {"SIDE": weight.shape[-1], "EPS": eps, "num_warps": max(4, block // 256)}
    _run(_depthwise_kernel, tiles, *tensors, **options)
    return normed, y, mean, rstd


def depthwise_weight_grad(
    dy: Tensor, x: Tensor, k: int, ids: Tensor | None = None, slots: Tensor | None = None
) -> Tensor:
    """Gradient (C, 1, k, k) of `depthwise` in its weight."""
    channels, taps = x.shape[-1], triton.next_power_of_2(k)
    options, tiles = _options(x, ids, slots, _block(channels, 64), elements=128)
    blocks = triton.cdiv(channels, options["BLOCK"])
    each = max(1, triton.cdiv(tiles, max(1, PROGRAMS // blocks)))  # 0 tiles in an empty batch
    chunks = triton.cdiv(tiles, each)
    partial = x.new_empty(chunks, k * k, channels, dtype=_sum_dtype(x))
    options |= {"SIDE": k, "TAPS": taps, "num_warps": max(1, taps // 2)}
    _run(_weight_grad_kernel, chunks * blocks, dy, x, partial, each, **options)
    return partial.sum(0).t().reshape(channels, 1, k, k).contiguous()


def gelu_sum_of_squares(h: Tensor) -> tuple[Tensor, Tensor]:
    """h (N, L, K) -> a = gelu(h), and the sum (N, K) of its squares over L."""
    a, sums = _gelu_pass(h)
    return a, sums.sum(1)


def scale_grad(da: Tensor, h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sum (N, K) of da times a = gelu(h) over L, and a times scale (N, K)."""
    scaled, sums = _gelu_pass(h, da, scale)
    return sums.sum(1), scaled


def gelu_grad(da: Tensor, h: Tensor, scale: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """dh = (da scale + gelu(h) slopes) gelu'(h), and its sum (K,) over N and L."""
    dh, sums = _gelu_pass(h, da, scale, slopes)
    return dh, sums.sum((0, 1))


def _run(kernel: triton.JITFunction, programs: int, *args: object, **options: object) -> None:
    """Launch on the tensors' device, which need not be the current one."""
    if programs == 0:  # an empty batch
        return
    args = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **options)


def _options(
    x: Tensor, ids: Tensor | None, slots: Tensor | None, block: int, elements: int = 1024
) -> tuple[dict[str, object], int]:
    """Arguments that describe a map, and its number of tiles: `elements // block` strips each."""
    n, (height, width, channels) = len(x), x.shape[-3:]
    p = 0 if slots is None else width
    rows = gcd(p, 4)  # 4 for a dense map; more would take too many registers
    cells, strips = height * width, triton.cdiv(height, rows) * width
    if slots is not None:
        height, width = slots.shape[1] * p, slots.shape[2] * p
        cells, strips = x.shape[1] * cells, x.shape[1] * strips
        ids, slots = ids.contiguous(), slots.contiguous()
    count = max(1, elements // block)
    tensors = {"ids": ids, "slots": slots}
    sizes = {"images": n, "height": height, "width": width, "cells": cells}
    constants = {"C": channels, "P": p, "ROWS": rows, "STRIPS": count, "BLOCK": block}
    return tensors | sizes | constants, triton.cdiv(n * strips, count)


def _block(channels: int, most: int) -> int:
    """Channels of a program: the largest power of two that divides them, from 16 to `most`."""
    return min(most, max(16, channels & -channels))


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """(C, 1, k, k) -> (k * k, C), since adjacent threads take adjacent channels."""
    weight = weight.flatten(1).t()
    return torch.empty(weight.shape, dtype=_sum_dtype(x), device=x.device).copy_(weight)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _gelu_pass(h: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """h, and optionally da, scale and slopes -> (N, L, K), partial sums (N, -1, K)."""
    n, length, channels = h.shape
    block = _block(channels, 128)
    lines, blocks = 2048 // block, triton.cdiv(channels, block)
    chunks = min(max(1, PROGRAMS // max(1, n * blocks)), triton.cdiv(length, lines))
    span = triton.cdiv(triton.cdiv(length, chunks), lines) * lines
    chunks = triton.cdiv(length, span)
    out, partial = h.new_empty(h.shape), h.new_empty(n, chunks, channels, dtype=_sum_dtype(h))
    tensors = (h, *others, *[None] * (3 - len(others)), out, partial)
    options = {"L": length, "K": channels, "span": span, "LINES": lines, "BLOCK": block}
    _run(_gelu_kernel, n * chunks * blocks, *tensors, **options)
    return out, partial
