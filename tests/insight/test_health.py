# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measures of a network without labels, against their definitions and with planted faults."""

import math

import pytest
import timm
import torch
from torch import Tensor

from insight.health import (
    activations,
    channel_distance,
    describe_layers,
    grn_sizes,
    is_measure,
    layer_sums,
    parameters_by_stage,
    rank_me,
)
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.masked import MaskedFCMAE
from tests.tiny import SIZE

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def fcmae(**options) -> FCMAE:
    torch.manual_seed(0)
    return FCMAE(ConvNeXtV2(*SIZE, **options), decoder_embed_dim=8).eval()


# --- rank -----------------------------------------------------------------------------------------


def test_rank_is_the_number_of_equal_directions():
    basis = torch.linalg.qr(torch.randn(40, 10, dtype=torch.float64)).Q
    for directions in (1, 3, 10):
        assert rank_me(
            basis[:, :directions] @ torch.eye(10).double()[:directions]
        ) == pytest.approx(directions)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_rank_is_the_exponential_of_the_entropy_of_singular_values(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(features.double())
    shares = (values / values.sum()).tolist()
    expected = math.exp(-sum(x * math.log(x) for x in shares))
    assert rank_me(features) == pytest.approx(expected)


def test_rank_of_nothing_is_one():
    assert rank_me(torch.zeros(9, 4)) == pytest.approx(1)


# --- distance of channels -------------------------------------------------------------------------


def test_distance_is_the_mean_over_all_pairs():
    maps = torch.randn(2, 5, 9, dtype=torch.float64)
    for image, found in zip(maps, channel_distance(maps), strict=True):
        pairs = [(1 - torch.cosine_similarity(a, b, dim=0)) / 2 for a in image for b in image]
        assert found == pytest.approx(sum(pairs).item() / 25)


def test_distance_of_equal_and_of_unrelated_channels():
    one = torch.rand(1, 1, 16)
    assert channel_distance(one * torch.tensor([1.0, 5.0, 0.1])[:, None]) == pytest.approx(
        0, abs=1e-6
    )
    assert channel_distance(torch.eye(16)[None]) == pytest.approx((1 - 1 / 16) / 2)


def test_channels_without_values_do_not_count():
    maps = torch.cat([torch.eye(4), torch.zeros(4, 4)])[None]
    assert channel_distance(maps) == pytest.approx((1 - 1 / 4) / 2)
    assert channel_distance(torch.zeros(1, 4, 4)) == pytest.approx(0.5)


# --- activations ----------------------------------------------------------------------------------


def test_activations_are_the_input_of_grn_in_every_block():
    model, seen = fcmae(), []
    with torch.no_grad():
        found = list(activations(model.encoder, IMAGES))
        x = IMAGES.permute(0, 2, 3, 1)
        for downsample, (block,) in zip(
            model.encoder.downsample_layers, model.encoder.stages, strict=True
        ):
            x = downsample(x)
            inner = block.norm(block.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            wide = torch.nn.functional.gelu(block.pwconv1(inner))
            seen.append(wide.flatten(1, 2).transpose(1, 2))
            x = x + block.pwconv2(block.grn(wide))
    assert [stage for stage, _ in found] == [1, 2, 3, 4]
    for (_, maps), expected in zip(found, seen, strict=True):
        torch.testing.assert_close(maps, expected)


def test_other_networks_show_their_last_map():
    network = MaskedFCMAE(timm.create_model("resnet10t"), decoder_embed_dim=8).eval()
    ((stage, maps),) = activations(network.encoder, IMAGES)
    assert (stage, maps.shape) == (0, (4, 512, 1))
    found = describe_layers(layer_sums(network, IMAGES))
    assert sorted(found) == ["dead_channels", "feature_distance", "saturated_channels"]
    assert grn_sizes(network) == {}


def test_sums_of_parts_are_those_of_all():
    model = fcmae()
    whole = describe_layers(layer_sums(model, IMAGES))
    parts = describe_layers(layer_sums(model, IMAGES[:1]) + layer_sums(model, IMAGES[1:]))
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5), name
    blocks = whole["feature_distance_blocks"]
    assert whole["feature_distance"] == pytest.approx(sum(blocks) / 4)
    assert whole["feature_distance_stage2"] == pytest.approx(blocks[1])


def test_dead_and_saturated_channels_are_counted():
    model = fcmae()
    healthy = describe_layers(layer_sums(model, IMAGES))
    assert (healthy["dead_channels"], healthy["saturated_channels"]) == (0, 0)
    block, channels = model.encoder.stages[3][0], sum(4 * dim for dim in SIZE[1])
    with torch.no_grad():
        block.pwconv1.bias[:3] = -100.0
        block.pwconv1.bias[3:5] = 4.0
    found = describe_layers(layer_sums(model, IMAGES))
    assert found["dead_channels"] == pytest.approx(100 * 3 / channels)
    assert found["saturated_channels"] == pytest.approx(100 * 2 / channels)


def test_a_dead_channel_is_not_saturated_too():
    """Both shares add up in the alarm, which would count it twice."""
    model, channels = fcmae(), sum(4 * dim for dim in SIZE[1])
    layer = model.encoder.stages[3][0].pwconv1
    with torch.no_grad():
        layer.weight[:3] = 0
        layer.bias[:3] = 1e-4  # constant, and nearly 0
    found = describe_layers(layer_sums(model, IMAGES))
    assert found["dead_channels"] == pytest.approx(100 * 3 / channels)
    assert found["saturated_channels"] == 0


def test_channels_that_copy_each_other_have_a_small_distance():
    model = fcmae()
    healthy = describe_layers(layer_sums(model, IMAGES))["feature_distance_stage3"]
    layer = model.encoder.stages[2][0].pwconv1
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:1].clone().expand_as(layer.weight))
    found = describe_layers(layer_sums(model, IMAGES))
    assert found["feature_distance_stage3"] < 0.01 < 0.2 < healthy


def test_sums_of_float64_networks():
    found = describe_layers(layer_sums(fcmae().double(), IMAGES))
    expected = describe_layers(layer_sums(fcmae(), IMAGES))
    assert found["feature_distance"] == pytest.approx(expected["feature_distance"], rel=1e-4)


# --- parameters -----------------------------------------------------------------------------------


def test_sizes_of_grn_by_stage():
    model = fcmae()
    assert set(grn_sizes(model).values()) == {0.0}
    grn = model.encoder.stages[1][0].grn
    grn.gamma.data.copy_(torch.tensor([3.0, 4.0] * 12))
    grn.beta.data.fill_(-2)
    found = grn_sizes(model)
    assert found["grn_gamma_stage2"] == pytest.approx(12.5**0.5)
    assert found["grn_beta_stage2"] == pytest.approx(2)
    assert found["grn_gamma_stage1"] == 0
    assert grn_sizes(fcmae(layer_scale_init_value=1.0)) == {}  # V1


def test_every_parameter_belongs_to_one_stage():
    model = fcmae()
    found = parameters_by_stage(model)
    assert list(found) == ["decoder", "stage1", "stage2", "stage3", "stage4"]
    ids = [id(parameter) for part in found.values() for parameter in part]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    stage = {id(parameter) for parameter in found["stage3"]}
    assert id(model.encoder.downsample_layers[2][1].weight) in stage
    assert id(model.encoder.stages[2][0].grn.gamma) in stage
    other = parameters_by_stage(MaskedFCMAE(timm.create_model("resnet10t"), decoder_embed_dim=8))
    assert list(other) == ["decoder", "encoder"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("probe_knn", True), ("grad_norm_stage1", True), ("train_grad_norm", False), ("epoch", False)],
)
def test_names_of_measures(name, expected):
    assert is_measure(name) is expected


def maps_of(model: FCMAE) -> list[Tensor]:
    return [maps for _, maps in activations(model.encoder, IMAGES)]


def test_measuring_changes_no_weights_and_draws_nothing():
    model = fcmae(drop_path_rate=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = maps_of(model), maps_of(model)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
