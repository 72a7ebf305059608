# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The block's own backward passes against plain torch.  pytest tests/test_blocks.py"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.depthwise import depthwise
from models.layers import GRN, linear
from models.mlp import block_mlp


def mlp_layers(dim):
    """fc1, GRN and fc2 in float64, far from their start, one channel dead."""
    torch.manual_seed(dim)
    layers = [linear(dim, 4 * dim), GRN(4 * dim), linear(4 * dim, dim)]
    for layer in layers:
        layer.double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    with torch.no_grad():
        layers[0].weight[0] = layers[0].bias[0] = 0  # GELU(0) = 0 everywhere
    return layers


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 1, 1), (3, 2, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("dim", [3, 5])  # fewer and more channels than positions
def test_fused_mlp_is_the_plain_one_with_its_gradients(shape, dim):
    fc1, grn, fc2 = mlp_layers(dim)
    x = torch.randn(dim, *shape[1:], shape[0], dtype=torch.float64).transpose(0, -1)
    x.requires_grad_()  # not contiguous
    inputs = [x, *fc1.parameters(), *grn.parameters(), *fc2.parameters()]
    plain = fc2(grn(F.gelu(fc1(x))))
    fused = block_mlp(x, fc1, grn, fc2)
    assert torch.allclose(fused, plain, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, dy)
    for ours, theirs in zip(torch.autograd.grad(fused, inputs, dy), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-11)


def test_fused_mlp_can_be_differentiated_twice():
    """Second-order optimizers; a backward that took saved tensors for constants would be wrong."""
    fc1, grn, fc2 = mlp_layers(2)
    with torch.no_grad():
        fc1.weight[0] += 1  # at a dead channel the length has no second derivative
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: block_mlp(x, fc1, grn, fc2), x)


def test_fused_mlp_of_an_all_zero_image_has_finite_gradients():
    fc1, grn, fc2 = mlp_layers(3)
    with torch.no_grad():
        fc1.bias.zero_()
    x = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)
    block_mlp(x, fc1, grn, fc2).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in grn.parameters())


def test_fused_mlp_saves_one_wide_tensor():
    """Plain autograd saves five; what is saved is what pre-training's memory goes into."""
    fc1, grn, fc2 = mlp_layers(4)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block_mlp(torch.randn(2, 50, 4, dtype=torch.float64, requires_grad=True), fc1, grn, fc2)
    assert sum(size == 2 * 50 * 16 for size in saved) == 1


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_fused_mlp_under_autocast_is_close_and_returns_full_gradients(half):
    fc1, grn, fc2 = (layer.float() for layer in mlp_layers(6))
    x = torch.randn(2, 9, 6, requires_grad=True)
    wanted = torch.autograd.grad(block_mlp(x, fc1, grn, fc2).sum(), [x, *grn.parameters()])
    with torch.autocast("cpu", half):
        y = block_mlp(x, fc1, grn, fc2)
    assert y.dtype == half
    grads = torch.autograd.grad(y.sum(), [x, *grn.parameters()])
    for ours, theirs in zip(grads, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 4)])
def test_depthwise_gradients_are_those_of_torch(size):
    """Small maps: the 7 x 7 kernel is larger than what it slides over."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 7, padding=3, groups=3).double()
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *conv.parameters()]
    ours = depthwise(x, conv, None)
    plain = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.allclose(ours, plain, atol=1e-12)
    dy = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, dy)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs, dy), wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)
    assert torch.autograd.gradgradcheck(lambda x: depthwise(x, conv, None), x)
