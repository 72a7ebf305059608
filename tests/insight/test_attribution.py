# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Grad-CAM against an explicit computation in float64; masks and error maps."""

import pytest
import torch
from torch import nn

from data_loading.rng import mask_noise
from errors import UserError
from insight.attribution import covering_masks, enlarge, error_map, find_map, grad_cam
from models import create_model
from models.fcmae import visible_patches
from tests import tiny


def images(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """A convolution, and a nonlinear head that works in place on its map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.conv(x)).square().mean((2, 3)))


def test_grad_cam_is_the_formula_of_the_paper_in_float64():
    """The map before the ReLU in place: its gradient must be that of the values before it."""
    network, x = Plain().double().eval(), images().double()
    got, outputs = grad_cam(network, x, "conv", False, torch.tensor([3, 1]))
    assert torch.equal(outputs, network(x))
    for n, target in enumerate((3, 1)):
        feature = network.conv(x[n : n + 1]).detach()[0]  # (C, h, w)
        cells = feature[0].numel()
        gradient = network.fc.weight[target][:, None, None] * 2 * feature.relu() / cells
        weights = gradient.sum((1, 2)) / cells
        expected = (weights[:, None, None] * feature).sum(0).clamp(min=0)
        assert expected.max() > 0
        torch.testing.assert_close(got[n], expected.detach(), rtol=1e-12, atol=1e-15)


def test_maps_with_channels_last_are_the_same():
    class Turned(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.turn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.fc(x.relu().square().mean((2, 3)))

    x, targets = images().double(), torch.tensor([0, 4])
    expected, _ = grad_cam(Plain().double().eval(), x, "conv", False, targets)
    got, _ = grad_cam(Turned().double().eval(), x, "turn", True, targets)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_convnext_agrees_with_gradients_of_its_last_stage():
    """All positions have the same gradient, since the mean over them comes before the norm."""
    torch.manual_seed(0)
    network = tiny.classifier(num_classes=3, stem_stride=1, head_init_scale=50).double().eval()
    x = images(side=48).double()
    assert find_map(network, (3, 48, 48)) == ("stages.3.0", True)
    got, outputs = grad_cam(network, x, "stages.3.0", True)
    feature = network.forward_features(x).detach().requires_grad_()
    best = network.forward_head(feature).amax(1).sum()
    (gradient,) = torch.autograd.grad(best, feature)
    expected = (gradient.mean((2, 3), keepdim=True) * feature).sum(1).relu().detach()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert outputs.shape == (2, 3)


def test_convolution_of_a_convnext_gives_its_channels_first():
    """The other maps of the network have them last; the rows of a map would be taken for them."""
    network = tiny.classifier(num_classes=3, stem_stride=1, head_init_scale=50).eval()
    found, last = find_map(network, (3, 16, 24), "stages.0.0.dwconv")
    maps, _ = grad_cam(network, torch.randn(2, 3, 16, 24), found, last)
    assert maps.shape == (2, 16, 24)


def test_parameters_get_no_gradients():
    network = Plain().eval()
    grad_cam(network, images(), "conv", False)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "layer", "cells"),
    [
        ("convnextv2_atto", "stages.3.1", 2),
        ("convnext_atto", "stages.3.1", 2),
        ("timm:resnet18", "layer4", 2),
        ("timm:convnextv2_atto", "norm_pre", 2),
        ("timm:mobilenetv3_small_050", "blocks", 2),
        ("timm:densenet121", "features", 2),
        ("timm:swin_tiny_patch4_window7_224", "norm", 7),
        ("torchvision:resnet18", "layer4", 2),
        ("torchvision:densenet121", "features", 2),
        ("torchvision:efficientnet_b0", "features", 2),
    ],
)
def test_last_map_of_networks(name, layer, cells):
    side = 224 if "swin" in name else 64
    size = {"input_size": (side, side)} if ":" in name else {}
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, **size).eval()
    found, last = find_map(network, (3, side, side))
    assert found.startswith(layer)
    maps, _ = grad_cam(network, images(1, side), found, last)
    assert maps.shape == (1, cells, cells)


def test_networks_of_tokens_are_refused_and_a_layer_can_be_named():
    network = create_model("timm:vit_tiny_patch16_224", num_classes=3, input_size=(224, 224)).eval()
    with pytest.raises(UserError, match="ends in tokens or features, not in a map.*--layer NAME"):
        find_map(network, (3, 224, 224))
    assert find_map(network, (3, 224, 224), "patch_embed.proj") == ("patch_embed.proj", False)
    with pytest.raises(UserError, match="unknown module 'patch_embd'. Did you mean"):
        find_map(network, (3, 224, 224), "patch_embd")
    with pytest.raises(UserError, match=r"--layer head gives \(2, 3\), expected a map"):
        find_map(network, (3, 224, 224), "head")


def test_maps_are_scaled_each_by_its_largest_value():
    maps = torch.tensor([[[0.0, 4.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found = enlarge(maps, (2, 2))
    assert found[0].tolist() == [[0.0, 1.0], [0.25, 0.5]]
    assert found[1].max() == 0
    assert enlarge(maps, (8, 6)).shape == (2, 8, 6)


@pytest.mark.parametrize(
    ("length", "visible", "count"), [(49, 19, 8), (16, 4, 2), (9, 6, 3), (4, 1, 4)]
)
def test_masks_hide_each_patch_equally_often(length, visible, count):
    noise = torch.rand(3, length, generator=torch.Generator().manual_seed(0))
    masks = covering_masks(noise, visible, count)
    assert masks.shape == (count, 3, length)
    assert {*masks.sum(2).flatten().tolist()} == {length - visible}
    times = masks.sum(0)
    assert times.min() >= 1
    assert times.max() - times.min() <= 1
    assert not torch.equal(masks[:, 0], masks[:, 1])


def test_too_few_masks_to_hide_each_patch_are_refused():
    with pytest.raises(UserError, match="--num_masks 2: 3 of 9 patches are hidden.*--num_masks 3"):
        covering_masks(torch.rand(1, 9), 6, 2)


def test_error_map_is_the_mean_over_the_masks_that_hide_a_patch():
    torch.manual_seed(0)
    shape = {"patch_size": 8, "decoder_embed_dim": 8, "mask_ratio": 0.6}
    model = tiny.fcmae64(3, 1, 0.0, **shape).eval()
    x, ids = images().double(), torch.tensor([5, 9])
    found = error_map(model, x, ids, seed=3, count=5)
    visible = visible_patches(16, 0.6)
    masks = covering_masks(mask_noise(3, 0, ids, 16), visible, 5)
    sums, times = torch.zeros(2, 16, dtype=torch.float64), torch.zeros(2, 16)
    with torch.no_grad():
        for mask in masks:
            _, prediction, _ = model(x, mask, visible)
            for n in range(2):
                for patch in mask[n].nonzero().flatten().tolist():
                    one = torch.zeros(1, 16)
                    one[0, patch] = 1
                    own = model.forward_loss(x[n : n + 1], prediction[n : n + 1], one)
                    sums[n, patch] += own
                    times[n, patch] += 1
    patches = found.unflatten(2, (4, 8)).unflatten(1, (4, 8)).mean((2, 4)).flatten(1)
    torch.testing.assert_close(patches, sums / times, rtol=1e-9, atol=1e-12)
