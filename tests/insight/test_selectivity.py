# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The selectivity index is that of Morcos et al., of activities over the right axes."""

import math

import pytest
import torch
from torch import nn

from errors import UserError
from insight.selectivity import ClassMeans, find_layers, pool, selectivity_index
from tests import tiny


def test_index_is_0_for_equal_and_1_for_exclusive_channels():
    means = torch.tensor([[2.0, 3.0, 0.0, 3.0], [2.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 2.0]])
    index, silent = selectivity_index(means)
    assert silent == 1
    assert index.tolist() == pytest.approx([0, 1, (3 - 1.5) / (3 + 1.5)])


def test_positions_are_averaged_and_channels_kept():
    values = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    torch.testing.assert_close(pool(values), values.mean((2, 3)))
    last = values.permute(0, 2, 3, 1)
    torch.testing.assert_close(pool(last, is_last=True), values.mean((2, 3)))
    assert pool(torch.ones(2, 7, 5)).shape == (2, 5)
    assert pool(torch.ones(2, 5)).shape == (2, 5)


def count(model: nn.Module, layers: list[str], images: torch.Tensor, labels: list[int]) -> dict:
    counter = ClassMeans(model, layers, 3, images.shape[1:])
    with torch.no_grad(), counter.watch():
        for part, label in zip(images.split(2), torch.tensor(labels).split(2), strict=True):
            model(part)
            counter.count(label)
    assert not any(module._forward_hooks for module in model.modules())
    return counter.reduce(torch.device("cpu"))


def test_activities_of_a_block_are_those_after_the_gelu():
    torch.manual_seed(0)
    model = tiny.classifier(num_classes=3, stem_stride=1).eval()
    layers = find_layers(model)
    assert layers == [f"stages.{stage}.0" for stage in range(4)]
    images, labels = torch.randn(5, 3, 16, 16), [0, 2, 0, 0, 2]
    means = count(model, layers, images, labels)
    x = model.downsample_layers[0](images.permute(0, 2, 3, 1))
    block = model.stages[0][0]
    hidden = block.norm(block.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    active = nn.functional.gelu(block.pwconv1(hidden)).relu().mean((1, 2)).double()
    expected = torch.stack([active[[0, 2, 3]].mean(0), active[[1, 4]].mean(0)])  # no image of 1
    torch.testing.assert_close(means["stages.0.0"], expected, rtol=1e-5, atol=1e-7)
    assert [means[name].shape for name in layers] == [(2, 4 * dim) for dim in tiny.SIZE[1]]


def test_activation_functions_are_the_layers_of_other_networks():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3))
    assert find_layers(model) == ["1"]
    images = torch.randn(4, 3, 2, 2)
    means = count(model, ["1"], images, [0, 1, 0, 1])
    active = model[0](images).relu().mean((2, 3)).double()
    torch.testing.assert_close(means["1"][0], active[::2].mean(0).detach())


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (32, 8)])
def test_channels_are_found_for_images_of_any_shape(size):
    """Rows of a map would be reported as channels."""
    own, other = tiny.classifier(num_classes=3, stem_stride=1).eval(), Maps()
    images, labels = torch.randn(2, 3, *size), [0, 1]
    layers = ["downsample_layers.1", "stages.0.0.dwconv"]
    means = count(own, layers, images, labels)
    assert [means[name].shape[1] for name in layers] == [*tiny.SIZE[1][1::-1]]
    means = count(other, ["first", "last"], images, labels)
    assert [means[name].shape[1] for name in ("first", "last")] == [5, 6]
    expected = other.last(other.first(images).permute(0, 2, 3, 1)).relu().mean((1, 2))
    torch.testing.assert_close(means["last"], expected.detach().double())


class Maps(nn.Module):
    """Gives a map in one layout and then one in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 1), nn.Linear(5, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(images).permute(0, 2, 3, 1)).mean((1, 2))


def test_layers_that_are_not_known_or_not_called_are_refused():
    model = tiny.other(3)
    with pytest.raises(UserError, match="Other has no module that is one of ReLU.*--layers"):
        find_layers(model)
    unused = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ReLU()})
    counter = ClassMeans(unused, ["b"], 2, (3, 4, 4))
    with counter.watch(), pytest.raises(UserError, match="b is not called by ModuleDict"):
        counter.count(torch.tensor([0]))


def test_silent_layer_has_no_index():
    index, silent = selectivity_index(torch.zeros(2, 5))
    assert (len(index), silent) == (0, 5)
    assert math.isnan(index.mean().item())
