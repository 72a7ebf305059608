# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""FCMAE without packing: every layer runs on the full map, and hidden cells are zeroed.

PYTHONPATH=. python -c "import benchmarks.dense_masked as d; print(d.DenseMasked.__doc__)"
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convnextv2 import Block
from models.fcmae import FCMAE, random_mask
from models.layers import GRN

TOLERANCE = 1e-3  # float32, packed against dense-masked; 1e-6 is seen


class DenseMasked(nn.Module):
    """The arithmetic and parameters of an FCMAE, computed densely; decoder and loss are its own.

    Hidden cells are zeroed wherever they could reach a visible one: before a depthwise
    convolution and before GRN's sum, so the result is that of zeroing around every operation.
    What lies between works on one cell at a time and needs no mask. The mask of a stage is built
    once and applied in place or within the residual addition: this is the fast form of it.
    """

    def __init__(self, model: FCMAE) -> None:
        super().__init__()
        self.model = model

    def forward_encoder(self, images: Tensor, mask: Tensor) -> Tensor:
        """Images (N, C, H, W), mask (N, L) -> (N, D, H/stride, W/stride), zero where removed."""
        h, w = self.model.grid_size(*images.shape[-2:])
        visible = (1 - mask).reshape(-1, h, 1, w, 1, 1)
        encoder = self.model.encoder
        x = images.permute(0, 2, 3, 1)  # (N, H, W, C), as the network's inside
        for downsample, blocks in zip(encoder.downsample_layers, encoder.stages, strict=True):
            x = downsample(x)
            keep = stage_mask(visible, x)
            x = x * keep  # biases filled hidden cells
            narrow = keep.to(compute_dtype(x))  # so that no wide tensor is promoted
            for block in blocks:
                x = masked_block(block, x, narrow)
        return x.permute(0, 3, 1, 2)

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `FCMAE.forward` with a mask: loss, prediction and mask."""
        pred = self.model.forward_decoder(self.forward_encoder(images, mask), mask)
        return self.model.forward_loss(images, pred, mask), pred, mask


def stage_mask(visible: Tensor, x: Tensor) -> Tensor:
    """(N, h, 1, w, 1, 1), 1 = visible -> (N, H, W, 1) for the map x (N, H, W, C)."""
    n, height, width, _ = x.shape
    h, w = visible.shape[1], visible.shape[3]
    cells = visible.to(x.dtype).expand(-1, -1, height // h, -1, width // w, -1)
    return cells.reshape(n, height, width, 1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer returns for x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def masked_block(block: Block, x: Tensor, visible: Tensor) -> Tensor:
    """A block on the map x (N, H, W, C), zero in hidden cells; visible (N, H, W, 1) 1 or 0.

    Plain torch operations, as those toolkits have them; none of `models`' own backward passes.
    """
    y = block.norm(block.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    y = grn(F.gelu(block.pwconv1(y)).mul_(visible), block.grn)
    return torch.addcmul(x, block.drop_path(block.pwconv2(y)), visible)


def grn(x: Tensor, layer: GRN) -> Tensor:
    """GRN of (N, H, W, C) as the official code and timm write it."""
    length = x.norm(p=2, dim=(1, 2), keepdim=True)
    relative = (length / (length.mean(-1, keepdim=True) + layer.eps)).to(x.dtype)
    return x + torch.addcmul(layer.beta.to(x.dtype), layer.gamma.to(x.dtype), x * relative)


def assert_equal_to_packed(
    model: FCMAE, images: Tensor, mask: Tensor, tolerance: float
) -> dict[str, float]:
    """Check that both forms give the same loss, prediction and gradients; returns the differences.

    Works on a copy whose GRN and biases are moved off their start, where they would hide faults.
    tolerance: on the norm of a difference, over that of the dense-masked value.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".gamma", ".beta", ".bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    names, parameters = zip(*model.named_parameters(), strict=True)
    sides = []
    for forward in (model, DenseMasked(model)):
        loss, pred, _ = forward(images, mask)
        gradients = torch.autograd.grad(loss, parameters)
        sides.append((loss.detach(), pred.detach(), *gradients))
    gaps = {}
    labels = ("loss", "prediction", *(f"gradient of {name}" for name in names))
    for label, ours, theirs in zip(labels, *sides, strict=True):
        gaps[label] = ((ours - theirs).norm() / theirs.norm()).item()
        assert gaps[label] <= tolerance, f"{label}: relative difference {gaps[label]:.1e}"
    return gaps


def check_against_packed(model: FCMAE, size: int, visible: int, device: torch.device) -> str:
    """`assert_equal_to_packed` in float32, TF32 off, on two images; says how close, in words."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    images = torch.randn(2, model.in_chans, size, size, device=device)
    h, w = model.grid_size(size, size)
    mask = random_mask(torch.rand(2, h * w, device=device), visible)
    for backend in backends:
        backend.allow_tf32 = False
    gaps = assert_equal_to_packed(model, images, mask, TOLERANCE)
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value
    return (
        "Checked before timing: dense-masked equals packed on the same mask; largest relative "
        f"difference in loss, prediction and every gradient {max(gaps.values()):.0e} "
        "(float32, 2 images)."
    )
