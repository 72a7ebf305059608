# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Triton's kernels against plain torch, interpreted without a GPU."""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F

from models.sparse import PatchGrid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
pytest.importorskip("triton")
kernels = importlib.import_module("models.kernels.triton_kernels")

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64 against float64
SINGLE = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of up to a few hundred terms
HALF = {"rtol": 2**-7, "atol": 2**-7}  # bfloat16, which the interpreter cuts off, not rounds

# p, h, w and how many patches are visible: of all, one, all but one, more than a tile takes
GRIDS = [(2, 4, 3, 1), (2, 3, 2, 5), (1, 7, 8, 40), (3, 2, 3, 3), (4, 1, 3, 2), (8, 2, 2, 2)]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype)


def weights(channels, k, dtype=torch.float64):
    return randn(channels, 1, k, k, dtype=dtype), randn(channels, dtype=dtype)


def plain(x, weight, bias):
    """The convolution of a dense map by torch."""
    pad, groups = weight.shape[-1] // 2, weight.shape[0]
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=pad, groups=groups)
    return y.permute(0, 2, 3, 1)


def plain_gradients(dy, x, weight):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(plain(x, weight, None), (x, weight), dy)


def patches(h, w, visible, images=2):
    """A grid with so many visible patches in every image, and its ids and slots."""
    noise = torch.rand(images, h * w, device=DEVICE)
    mask = (noise.argsort(1).argsort(1) >= visible).view(images, h, w).float()
    grid = PatchGrid(mask)
    slots = torch.full((images, h * w), -1, dtype=torch.int32, device=DEVICE)
    numbers = torch.arange(visible, dtype=torch.int32, device=DEVICE).expand(images, -1)
    return grid, {"ids": grid.ids, "slots": slots.scatter(1, grid.ids, numbers).view(mask.shape)}


def amid_nan(tensor):
    """The same tensor with NaN before and behind it in memory."""
    margin = tensor.numel() + 64
    memory = tensor.new_full((tensor.numel() + 2 * margin,), float("nan"))
    inside = memory[margin:-margin].view(tensor.shape)
    return inside.copy_(tensor)


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **tolerance)


# --- depthwise convolution ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("shape", [(2, 5, 6, 20), (1, 1, 1, 3), (1, 9, 21, 16), (3, 4, 2, 32)])
def test_dense_convolution_is_torchs_with_its_gradients(shape, k):
    """Maps that no tile fits, channels that no block fits, kernels larger than the map."""
    x, dy = randn(*shape), randn(*shape)
    weight, bias = weights(shape[-1], k)
    close(kernels.depthwise(x, weight, bias), plain(x, weight, bias), EXACT)
    close(kernels.depthwise(x, weight, None), plain(x, weight, None), EXACT)
    dx, dweight = plain_gradients(dy, x, weight)
    close(kernels.depthwise(dy, weight.flip(2, 3), None), dx, EXACT)
    close(kernels.depthwise_weight_grad(dy, x, k), dweight, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(("p", "h", "w", "visible"), GRIDS)
def test_packed_convolution_is_that_of_a_canvas_with_its_gradients(p, h, w, visible):
    """Taps find their patch several patches away, and nothing where it is hidden."""
    grid, where = patches(h, w, visible)
    x, dy = (randn(2, visible, p, p, 5) for _ in range(2))
    weight, bias = weights(5, 7)
    canvas = grid.unpack(x)
    wanted = grid.pack(plain(canvas, weight, bias))
    close(kernels.depthwise(x, weight, bias, **where), wanted, EXACT)
    dx, dweight = plain_gradients(grid.unpack(dy), canvas, weight)
    close(kernels.depthwise(dy, weight.flip(2, 3), None, **where), grid.pack(dx), EXACT)
    close(kernels.depthwise_weight_grad(dy, x, 7, **where), dweight, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_memory_around_the_map_does_not_leak_in(packed):
    """NaN lies where hidden patches (slot -1), padding and channels past the last would be."""
    grid, where = patches(2, 3, 4) if packed else (None, {})
    shape = (2, 4, 2, 2, 5) if packed else (2, 3, 5, 5)
    x, dy = randn(*shape), randn(*shape)
    weight, bias = weights(5, 7)
    norm = weights(5, 1)[1], weights(5, 1)[1], 1e-6
    calls = (
        lambda x, dy, *w: kernels.depthwise(x, *w, **where),
        lambda x, dy, *w: kernels.depthwise_weight_grad(dy, x, 7, **where),
        lambda x, dy, *w: torch.cat(kernels.depthwise_norm(x, *w, *norm, **where), dim=-1),
    )
    for call in calls:
        wanted = call(x, dy, weight, bias)
        assert torch.isfinite(wanted).all()
        assert torch.equal(call(*map(amid_nan, (x, dy, weight, bias))), wanted)


def test_strides_of_inputs_are_respected():
    """Gradients may be expanded, ids are a slice of argsort's result."""
    grid, where = patches(3, 3, 4)
    x = randn(5, 4, 2, 2, 2).transpose(0, -1)
    dy = randn(2, 4, 1, 1, 1).expand(2, 4, 2, 2, 5)
    weight, bias = randn(5, 5, 1, 5).permute(3, 2, 0, 1), randn(10)[::2]
    assert not any(t.is_contiguous() for t in (x, dy, weight, bias, where["ids"]))
    canvas = grid.unpack(x)
    wanted = grid.pack(plain(canvas, weight, bias))
    close(kernels.depthwise(x, weight, bias, **where), wanted, EXACT)
    wanted = plain_gradients(grid.unpack(dy), canvas, weight)[1]
    close(kernels.depthwise_weight_grad(dy, x, 5, **where), wanted, EXACT)


@pytest.mark.parametrize("programs", [1, 3])
def test_weight_gradient_is_complete_however_many_programs_share_it(monkeypatch, programs):
    """Of five tiles three programs take two each, the last one of them past the end."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    x, dy = randn(4, 7, 5, 16), randn(4, 7, 5, 16)
    wanted = plain_gradients(dy, x, weights(16, 3)[0])[1]
    close(kernels.depthwise_weight_grad(dy, x, 3), wanted, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_convolution_in_lower_precision_sums_in_float32(dtype):
    """Against float64 sums of the same inputs; sums in half precision would be 100 times off."""
    x, dy = (randn(2, 9, 9, 6, dtype=dtype) for _ in range(2))
    weight, bias = weights(6, 7, dtype)
    y, dweight = kernels.depthwise(x, weight, bias), kernels.depthwise_weight_grad(dy, x, 7)
    assert (y.dtype, dweight.dtype) == (dtype, torch.float32)
    wanted = plain(*(t.double() for t in (x, weight, bias)))
    rounding = torch.finfo(dtype).eps  # half of it but for the interpreter, see HALF
    assert ((y.double() - wanted).abs() <= rounding * wanted.abs() + 2e-5).all()
    close(dweight, plain_gradients(*(t.double() for t in (dy, x, weight)))[1], SINGLE)


# --- LayerNorm behind it -----------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [5, 40])
def test_fused_norm_is_that_of_the_convolution(packed, channels):
    grid, where = patches(2, 3, 4) if packed else (None, {})
    x = randn(2, 4, 2, 2, channels) if packed else randn(2, 5, 3, channels)
    weight, bias = weights(channels, 7)
    gain, shift = randn(channels), randn(channels)
    wanted = plain(grid.unpack(x) if packed else x, weight, bias)
    wanted = grid.pack(wanted) if packed else wanted
    normed, y, mean, rstd = kernels.depthwise_norm(x, weight, bias, gain, shift, 1e-6, **where)
    close(y, wanted, EXACT)
    theirs = torch.native_layer_norm(wanted, [channels], gain, shift, 1e-6)
    for one, other in zip((normed, mean, rstd), theirs, strict=True):
        assert one.shape == other.shape
        close(one, other, EXACT)


def test_fused_norm_takes_statistics_of_the_rounded_output():
    """The backward pass has only that one, as LayerNorm's own has."""
    x = randn(1, 4, 4, 24, dtype=torch.bfloat16)
    weight, bias = weights(24, 3, torch.bfloat16)
    gain, shift = randn(24, dtype=torch.float32), randn(24, dtype=torch.float32)
    normed, y, mean, rstd = kernels.depthwise_norm(x, weight, bias, gain, shift, 1e-6)
    assert torch.equal(y, kernels.depthwise(x, weight, bias))
    assert (normed.dtype, mean.dtype, rstd.dtype) == (x.dtype, torch.float32, torch.float32)
    wanted = torch.native_layer_norm(y.float(), [24], gain, shift, 1e-6)
    close(normed, wanted[0], HALF)
    close(mean, wanted[1], {"rtol": 1e-5, "atol": 1e-6})
    close(rstd, wanted[2], {"rtol": 1e-5, "atol": 0})


def test_fused_norm_of_zeros_is_its_bias():
    x, (weight, shift) = randn(1, 2, 2, 3) * 0, weights(3, 3)
    normed, _, mean, rstd = kernels.depthwise_norm(x, weight, None, shift, shift, 1e-6)
    close(normed, shift.expand_as(x), EXACT)
    close(mean, mean * 0, EXACT)
    close(rstd, torch.full_like(rstd, 1000), EXACT)


# --- the MLP's passes --------------------------------------------------------------------


def mlp_inputs(dtype=torch.float64, shape=(2, 133, 20)):
    """h and da, whose L and K no block fits, scale and slopes."""
    h, da = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return h, da, *(randn(shape[0], shape[2], dtype=wide) for _ in range(2))


def plain_passes(h, da, scale, slopes):
    """Squares, dscale, scaled, dh, db by torch, in the dtype of h."""
    a = F.gelu(h)
    grad = da * scale[:, None] + a * slopes[:, None]
    dh = torch.ops.aten.gelu_backward(grad, h)
    return a.square().sum(1), (da * a).sum(1), a * scale[:, None], dh, dh.sum((0, 1))


def passes(h, da, scale, slopes):
    a, squares = kernels.gelu_sum_of_squares(h)
    return (
        a,
        squares,
        *kernels.scale_grad(da, h, scale),
        *kernels.gelu_grad(da, h, scale, slopes),
    )


@pytest.mark.parametrize("programs", [1, 2048])
@pytest.mark.parametrize("shape", [(2, 133, 20), (1, 1, 3), (3, 20, 256)])
def test_mlp_passes_are_those_of_torch(monkeypatch, shape, programs):
    """One program for all positions and one for a few, the last of them with fewer."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    inputs = mlp_inputs(shape=shape)
    wanted = (F.gelu(inputs[0]), *plain_passes(*inputs))
    for one, other in zip(passes(*inputs), wanted, strict=True):
        assert one.shape == other.shape
        close(one, other, EXACT)


def test_mlp_passes_respect_strides_and_leak_nothing():
    h, da, scale, slopes = mlp_inputs(shape=(2, 5, 20))
    wanted = passes(h, da, scale, slopes)
    turned = (t.mT.contiguous().mT for t in (h, da, scale, slopes))
    for one, other in zip(passes(*turned), wanted, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(passes(*map(amid_nan, (h, da, scale, slopes))), wanted, strict=True):
        assert torch.equal(one, other)


def test_sum_of_squares_of_an_empty_channel_is_zero():
    """Its length is 0, which the caller tells from small ones."""
    h = mlp_inputs()[0]
    h[..., 4] = 0
    a, squares = kernels.gelu_sum_of_squares(h)
    assert (a[..., 4] == 0).all()
    assert (squares[:, 4] == 0).all()
    assert (squares > 0).sum() == 2 * 19


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mlp_passes_in_lower_precision_sum_in_float32(dtype):
    """Sums are of the stored values: the gradients see the same a as the linear layers."""
    h, da, scale, slopes = inputs = mlp_inputs(dtype)
    a, squares, dscale, scaled, dh, db = passes(*inputs)
    assert {t.dtype for t in (a, scaled, dh)} == {dtype}
    assert {t.dtype for t in (squares, dscale, db)} == {torch.float32}
    wide = [t.double() for t in inputs]
    close(a.double(), F.gelu(wide[0]), SINGLE if dtype == torch.float32 else HALF)
    for ours, theirs in zip((scaled, dh), plain_passes(*wide)[2:4], strict=True):
        assert (ours - theirs).norm() < 2 * torch.finfo(dtype).eps * theirs.norm()
    sums = {"rtol": 1e-5, "atol": 1e-4}  # float32 sums of 133 and 266 terms
    close(squares.double(), a.double().square().sum(1), sums)
    close(dscale.double(), (a.double() * da.double()).sum(1), sums)
    close(db.double(), dh.double().sum((0, 1)), sums)


# --- on a GPU only -----------------------------------------------------------------------


@pytest.mark.gpu
def test_elements_beyond_32_bits_are_found():
    """4.3 GB a tensor; a 32-bit offset would point before its start."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free memory")
    x = torch.zeros(33, 256, 256, 1024, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 1
    weight = torch.zeros(1024, 1, 3, 3, device=DEVICE)
    weight[:, :, 1, 1] = 2
    assert (kernels.depthwise(x, weight, None)[-1] == 2).all()
    grad = kernels.depthwise_weight_grad(x, x, 3)
    assert (grad[:, 0, 1, 1] == 256 * 256).all()
    _, squares = kernels.gelu_sum_of_squares(x.view(33, 256 * 256, 1024))
    assert squares[-1].min() > squares[0].max()


@pytest.mark.gpu
def test_kernels_can_be_captured_and_repeat_their_bits():
    """In a CUDA graph nothing may wait for the GPU or be tuned; sums may not be atomic."""
    _, where = patches(7, 7, 19)
    x, dy = (randn(2, 19, 8, 8, 96, dtype=torch.bfloat16) for _ in range(2))
    inputs = mlp_inputs(torch.bfloat16, (2, 3136, 384))
    calls = (
        lambda: kernels.depthwise_weight_grad(dy, x, 7, **where),
        lambda: torch.cat([t.float().flatten() for t in passes(*inputs)]),
    )
    for call in calls:
        first = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            second = call()
        graph.replay()
        assert torch.equal(first, second)
