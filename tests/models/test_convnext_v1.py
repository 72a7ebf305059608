# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""ConvNeXt V1: official names and sizes, timm's numbers, gradients, layer decay, half precision."""

import pytest
import torch

from errors import UserError
from models import create_model
from models.convnextv2 import V1_SIZES, Block, ConvNeXtV2
from optim_factory import get_parameter_groups
from weights.convert import to_convnextv2, to_timm

DEPTHS, DIMS = (1, 2, 1, 1), (4, 6, 8, 10)
COUNTS = {  # of arXiv 2201.03545 and of timm, with 1000 classes
    "atto": 3_695_520,
    "femto": 5_217_784,
    "pico": 9_045_672,
    "nano": 15_593_560,
    "tiny": 28_589_128,
    "small": 50_223_688,
    "base": 88_591_464,
    "large": 197_767_336,
    "xlarge": 350_196_968,
}


def toy(**kwargs) -> ConvNeXtV2:
    """A toy in float64 with every parameter away from its start."""
    torch.manual_seed(0)
    model = ConvNeXtV2(DEPTHS, DIMS, num_classes=5, layer_scale_init_value=1e-6, **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def timms(model: ConvNeXtV2) -> torch.nn.Module:
    """timm's network with the same weights."""
    from timm.models.convnext import ConvNeXt

    theirs = ConvNeXt(depths=DEPTHS, dims=DIMS, num_classes=5, use_grn=False).double()
    theirs.load_state_dict(to_timm(model.state_dict()), strict=True)
    return theirs


def test_sizes_have_the_published_numbers_of_parameters():
    assert COUNTS.keys() == V1_SIZES.keys()
    with torch.device("meta"):
        models = {size: create_model(f"convnext_{size}") for size in V1_SIZES}
    counts = {s: sum(p.numel() for p in m.parameters()) for s, m in models.items()}
    assert counts == COUNTS


def test_names_and_shapes_of_a_block_are_the_official_ones():
    block = {name: tuple(value.shape) for name, value in Block(6, 0.0, 1e-6).state_dict().items()}
    assert block == {
        "gamma": (6,),
        "dwconv.weight": (6, 1, 7, 7),
        "dwconv.bias": (6,),
        "norm.weight": (6,),
        "norm.bias": (6,),
        "pwconv1.weight": (24, 6),
        "pwconv1.bias": (24,),
        "pwconv2.weight": (6, 24),
        "pwconv2.bias": (6,),
    }
    with torch.device("meta"):
        v1, v2 = (create_model(f"convnext{v}_tiny").state_dict() for v in ("", "v2"))
    assert {name for name in v2 if ".grn." not in name} == {n for n in v1 if ".gamma" not in n}
    assert "stages.2.8.gamma" in v1


def test_layer_scale_starts_at_its_value_and_the_rest_as_in_v2():
    """Without GRN or layer scale, the random weights of both are the same draws."""
    states = []
    for value in (1e-6, 0.25, None):
        torch.manual_seed(0)
        states.append(ConvNeXtV2(DEPTHS, DIMS, layer_scale_init_value=value).state_dict())
    for state, value in zip(states[:2], (1e-6, 0.25), strict=True):
        assert torch.equal(state["stages.1.1.gamma"], torch.full((6,), value))
        for name in {*state} & {*states[2]}:
            assert torch.equal(state[name], states[2][name]), name


@pytest.mark.parametrize("value", [0, -1e-6, float("nan")])
def test_layer_scale_that_would_be_none_is_refused(value):
    with pytest.raises(UserError, match="expected a positive number, or None for ConvNeXt V2"):
        create_model("convnext_atto", layer_scale_init_value=value)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (39, 65)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_timms(size, checkpointing):
    ours = toy()
    theirs = timms(ours)
    ours.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    got, expected = ours(images), theirs(images)
    assert expected.std() > 0.1  # otherwise anything would be close
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got.square().sum().backward()
    expected.square().sum().backward()
    grads = to_convnextv2({name: p.grad for name, p in theirs.named_parameters()})[0]
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-9, atol=1e-11)


def test_stochastic_depth_drops_the_scaled_branch():
    block = Block(4, 0.5, 1.0).train()
    torch.nn.init.normal_(block.gamma)
    x = torch.randn(64, 2, 2, 4)
    torch.manual_seed(0)
    change = block(x) - x
    full = (block.eval()(x) - x) * 2  # a kept branch is divided by 1 - 0.5
    kept = (change != 0).flatten(1).any(1)
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(change[kept], full[kept], rtol=1e-4, atol=1e-5)


def test_maps_of_a_backbone_are_timms():
    from timm.models._features import FeatureGetterNet

    whole, backbone = toy(), toy(features_only=True)
    backbone.load_state_dict({n: v for n, v in whole.state_dict().items() if n[0] in "ds"})
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        pairs = zip(backbone(images), FeatureGetterNet(timms(whole))(images), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def official_layer(name: str) -> int:
    """Transcribe the official V1 layer decay, which is for 27 blocks in the third stage."""
    top, *rest = name.split(".")
    if top == "downsample_layers":
        return {0: 0, 1: 2, 2: 3, 3: 12}[int(rest[0])]
    if top == "stages":
        stage, block = int(rest[0]), int(rest[1])
        return 3 + block // 3 if stage == 2 else {0: 1, 1: 2, 3: 12}[stage]
    return 13


@pytest.mark.parametrize("size", ["small", "base", "large", "xlarge"])
def test_groups_of_layers_are_the_official_ones(size):
    """The final norm belongs to the last layer here, as in V2; there it is one above."""
    with torch.device("meta"):
        model = create_model(f"convnext_{size}")
    for name, _ in model.named_parameters():
        expected = 12 if name.startswith("norm.") else official_layer(name)
        assert model.layer_of(name, "group") == expected, name


def test_layer_scale_is_not_decayed():
    model = toy()
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in get_parameter_groups(model, 0.3):
        for parameter in group["params"]:
            is_matrix = names[parameter].endswith(".weight") and parameter.ndim > 1
            assert group["weight_decay"] == (0.3 if is_matrix else 0.0), names[parameter]


def test_layer_scale_of_1e_6_survives_fp16():
    """In fp16 it would be 17 units of the smallest number, and its product with 0.01 would be 0."""
    block = Block(4, 0.0, 1e-6)
    for name, parameter in block.named_parameters():
        if name != "gamma":
            torch.nn.init.normal_(parameter, std=0.3)
    x = torch.zeros(2, 3, 3, 4)
    exact = block(x)
    with torch.autocast("cpu", torch.float16):
        half = block(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-9)
