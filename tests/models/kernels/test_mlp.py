# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The MLP of ConvNeXt V1 against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.kernels import ops
from models.layers import fused_mlp


def layers(dim: int, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    """fc1 and fc2, far from their start."""
    torch.manual_seed(dim)
    found = [nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)]
    for parameter in (p for layer in found for p in layer.parameters()):
        nn.init.normal_(parameter)
    return [layer.to(dtype) for layer in found]


@pytest.mark.parametrize("shape", [(3, 3, 3), (5, 2, 1, 1), (4, 2, 2, 2), (1, 1, 1), (0, 2, 2)])
@pytest.mark.parametrize("cache", [ops.CACHE, 1])  # all images at once, or one by one
def test_it_is_the_plain_one_with_its_gradients(shape, cache, monkeypatch):
    monkeypatch.setattr(ops, "CACHE", cache)
    fc1, fc2 = layers(5)
    x = torch.randn(5, *shape[1:], shape[0], dtype=torch.float64).transpose(0, -1)
    x.requires_grad_()  # not contiguous
    inputs = [x, *fc1.parameters(), *fc2.parameters()]
    plain, fused = fc2(F.gelu(fc1(x))), fused_mlp(x, fc1, None, fc2)
    assert torch.allclose(fused, plain, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, dy)
    for ours, theirs in zip(torch.autograd.grad(fused, inputs, dy), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("wanted", range(1, 32))
def test_only_the_wanted_gradients_are_there_and_right(wanted):
    fc1, fc2 = layers(3)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    inputs = [x, fc1.weight, fc1.bias, fc2.weight, fc2.bias]
    for bit, tensor in enumerate(inputs):
        tensor.requires_grad_(bool(wanted >> bit & 1))
    asked = [tensor for tensor in inputs if tensor.requires_grad]
    expected = torch.autograd.grad(fc2(F.gelu(fc1(x))).square().sum(), asked)
    got = torch.autograd.grad(fused_mlp(x, fc1, None, fc2).square().sum(), asked)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_it_can_be_differentiated_twice():
    fc1, fc2 = layers(2)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fused_mlp(x, fc1, None, fc2), x)


def test_it_saves_one_wide_tensor():
    """Plain autograd saves two, and then V1 would take more memory than V2."""
    fc1, fc2 = layers(4, torch.float32)
    saved = []
    x = torch.randn(2, 50, 4, requires_grad=True)
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    )
    with keep:
        fused_mlp(x, fc1, None, fc2)
    assert sorted(saved)[-2:] == [2 * 50 * 4, 2 * 50 * 16]


def test_autocast_casts_as_it_does_for_linear_layers():
    fc1, fc2 = layers(4, torch.float32)
    x = torch.randn(2, 50, 4, requires_grad=True)
    inputs = [x, *fc1.parameters(), *fc2.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        plain, fused = fc2(F.gelu(fc1(x))), fused_mlp(x, fc1, None, fc2)
    assert fused.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(fused, plain, rtol=0.05, atol=0.3)
    for ours, theirs in zip(
        torch.autograd.grad(fused.float().sum(), inputs),
        torch.autograd.grad(plain.float().sum(), inputs),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("changed", ["fc1", "fc2"])
def test_changed_layer_is_called(changed):
    """LoRA on a layer whose forward never runs would train nothing."""
    fc1, fc2 = layers(3)
    layer = {"fc1": fc1, "fc2": fc2}[changed]
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    assert torch.equal(fused_mlp(x, fc1, None, fc2), fc2(F.gelu(fc1(x))))
