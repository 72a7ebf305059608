# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""AnyNet and RegNet: the networks of timm and torchvision where these have the same."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from errors import UserError
from models import create_model
from models.anynet import BLOCKS, STEMS, AnyNet, regnet_shape, vanilla

DOCS = Path(__file__).resolve().parents[2] / "docs/models.md"
SMALL = {"depths": [1, 2], "widths": [16, 24], "stem_width": 16, "num_classes": 3}
PRESETS = {  # ClassyVision's name: depth, w_0, w_a, w_m, group width
    "regnet_x_400mf": (22, 24, 24.48, 2.54, 16),
    "regnet_x_800mf": (16, 56, 35.73, 2.28, 16),
    "regnet_x_1.6gf": (18, 80, 34.01, 2.25, 24),
    "regnet_x_3.2gf": (25, 88, 26.31, 2.25, 48),
    "regnet_x_8gf": (23, 80, 49.56, 2.88, 120),
    "regnet_x_16gf": (22, 216, 55.59, 2.1, 128),
    "regnet_x_32gf": (23, 320, 69.86, 2.0, 168),
    "regnet_y_400mf": (16, 48, 27.89, 2.09, 8),
    "regnet_y_800mf": (14, 56, 38.84, 2.4, 16),
    "regnet_y_1.6gf": (27, 48, 20.71, 2.65, 24),
    "regnet_y_3.2gf": (21, 80, 42.63, 2.66, 24),
    "regnet_y_8gf": (17, 192, 76.82, 2.19, 56),
    "regnet_y_16gf": (18, 200, 106.23, 2.48, 112),
    "regnet_y_32gf": (20, 232, 115.89, 2.53, 232),
    "regnet_y_64gf": (20, 352, 147.48, 2.4, 328),
    "regnet_y_128gf": (27, 456, 160.83, 2.52, 264),
    "regnet_z_500mf": (21, 16, 10.7, 2.51, 4),
    "regnet_z_4gf": (28, 48, 14.5, 2.226, 8),
}
LINEAR = {"bottleneck_multiplier": 4.0, "block_type": "res_bottleneck_linear", "activation": "silu"}


def count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def assert_same(ours: nn.Module, theirs: nn.Module, size: int = 32) -> None:
    """Equal logits and gradients in float64, with the parameters matched by their order."""
    ours, theirs = ours.double().train(), theirs.double().train()
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(torch.randn(value.shape, dtype=value.dtype) * 0.2)
    values = [v for name, v in theirs.state_dict().items() if "num_batches" not in name]
    keys = [name for name in ours.state_dict() if "num_batches" not in name]
    ours.load_state_dict(dict(zip(keys, values, strict=True)), strict=False)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    results = [model(images) for model in (ours, theirs)]
    torch.testing.assert_close(*results)
    for logits in results:
        (logits * torch.linspace(-1, 1, logits.shape[1])).sum().backward()
    gradients = [[weight.grad for weight in model.parameters()] for model in (ours, theirs)]
    torch.testing.assert_close(*gradients)


# --- the formula ------------------------------------------------------------------------


def documented() -> dict[str, str]:
    return dict(re.findall(r"\| `(regnet_\S+)` +\| `timm:(\w+)`", DOCS.read_text()))


def options_of(name: str) -> dict[str, object]:
    keys = ("depth", "w_0", "w_a", "w_m", "group_width")
    kind = {"x": {"use_se": False}, "y": {}, "z": LINEAR}[name[7]]
    return dict(zip(keys, PRESETS[name], strict=True)) | kind


def test_documented_timm_networks_have_classyvisions_numbers():
    """Similar names can be other networks: regnety_2560 is not ClassyVision's regnet_y_256gf."""
    rows = documented()
    assert rows.keys() == PRESETS.keys()
    for name, timm_name in rows.items():
        cfg = timm.models.regnet.model_cfgs[timm_name]
        assert (cfg.depth, cfg.w0, cfg.wa, cfg.wm, cfg.group_size) == PRESETS[name], name
        assert (cfg.se_ratio, cfg.group_min_ratio) == (0.25 * (name[7] != "x"), 0)
        assert (cfg.bottle_ratio, cfg.linear_out) == ((4, True) if name[7] == "z" else (1, False))
        assert cfg.act_layer == ("silu" if name[7] == "z" else "relu")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_documented_timm_networks_have_the_same_tensors(name):
    with torch.device("meta"):
        ours = create_model("regnet", num_classes=0, **options_of(name))
        theirs = timm.create_model(documented()[name], num_classes=0)
    expected = {k: v for k, v in shapes(theirs).items() if not k.startswith("final_conv")}
    assert shapes(ours) == expected


def test_formula_is_that_of_classyvision_in_float64():
    """timm computes it in float32, where a width could fall to the other side of a rounding."""
    for depth, w_0, w_a, w_m, group in [*PRESETS.values(), (27, 640, 124.47, 2.04, 848)]:
        powers = np.round(np.log((np.arange(depth) * w_a + w_0) / w_0) / np.log(w_m))
        blocks = np.round(w_0 * np.power(w_m, powers) / 8) * 8
        sizes, depths = np.unique(blocks, return_counts=True)
        groups = [min(group, int(size)) for size in sizes]
        widths = [int(round(w / g) * g) for w, g in zip(sizes, groups, strict=True)]
        got = regnet_shape(depth, w_0, w_a, w_m, group, 1.0)
        assert got == (depths.tolist(), widths, groups, [1.0] * len(groups))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("regnet(depth=22, w_0=24, w_a=24.48, w_m=2.54, group_width=16, use_se=false)", 4_772_512),
        (
            "anynet(depths=[1,2,7,12], widths=[32,64,160,384], group_widths=[16,16,16,16], "
            "bottleneck_multipliers=[1,1,1,1], strides=[2,2,2,2], use_se=False)",
            4_772_512,
        ),
        ("regnet_y_256gf", 821_051_008),
    ],
)
def test_known_numbers_of_parameters(name, parameters):
    with torch.device("meta"):
        assert count(create_model(name, num_classes=0)) == parameters


def test_numbers_of_parameters_worked_out_by_hand():
    """Stem 3 -> 4, one stage of one block 4 -> 6; a norm of c channels has 2c parameters."""
    shape = {"depths": [1], "widths": [6], "stem_width": 4, "num_classes": 2}
    stem, head, shortcut = 27 * 4 + 8, 6 * 2 + 2, 4 * 6 + 12
    two_3x3 = (9 * 4 * 6 + 12) + (9 * 6 * 6 + 12)
    assert count(AnyNet(**shape, block_type="vanilla")) == stem + two_3x3 + head
    assert count(AnyNet(**shape, block_type="res_basic")) == stem + two_3x3 + shortcut + head
    # 3 channels inside in groups of 1; squeeze-and-excitation has round(0.5 * 4) = 2 inside.
    inner = (4 * 3 + 6) + (9 * 3 + 6) + (3 * 6 + 12)
    excite = (3 * 2 + 2) + (2 * 3 + 3)
    options = {"group_widths": 1, "bottleneck_multipliers": 0.5, "se_ratio": 0.5}
    assert count(AnyNet(**shape, **options)) == stem + inner + excite + shortcut + head
    linear = AnyNet(**shape, **options, block_type="res_bottleneck_linear")
    assert count(linear) == stem + inner + excite + head
    plain = AnyNet(**shape, group_widths=1, bottleneck_multipliers=0.5, use_se=False)
    assert count(plain) == stem + inner + shortcut + head


# --- the same as others -----------------------------------------------------------------


def test_bottlenecks_equal_torchvisions_regnet():
    """Two stages with other group widths, multipliers, strides and squeeze-and-excitation."""
    params = torchvision.models.regnet.BlockParams(
        [2, 1], [16, 24], [4, 6], [1.0, 0.5], [1, 2], se_ratio=0.25
    )
    theirs = torchvision.models.regnet.RegNet(params, num_classes=3, stem_width=8)
    ours = AnyNet([2, 1], [16, 24], [4, 6], [1.0, 0.5], [1, 2], stem_width=8, num_classes=3)
    for stage in theirs.trunk_output:
        for block in stage:  # timm's block has its projection at the end
            if block.proj is not None:
                block.proj = block._modules.pop("proj")
    assert_same(ours, theirs)


def test_linear_blocks_equal_timms_regnetz():
    cfg = timm.models.regnet.RegNetCfg(
        depth=6, w0=8, wa=8.0, wm=2.0, group_size=4, bottle_ratio=2.0, se_ratio=0.25,
        linear_out=True, downsample=None, act_layer="silu", stem_width=8,
    )  # fmt: skip
    theirs = timm.models.regnet.RegNet(cfg, num_classes=3)
    ours = create_model(
        "regnet", depth=6, w_0=8, w_a=8.0, w_m=2.0, group_width=4, bottleneck_multiplier=2.0,
        block_type="res_bottleneck_linear", activation="silu", stem_width=8, num_classes=3,
    )  # fmt: skip
    theirs.final_conv = nn.Identity()  # timm's activation before the head, which ours has not
    assert shapes(ours) == shapes(theirs)
    assert_same(ours, theirs, size=64)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_resnets_are_anynets(kind):
    """Stem, pooling, strides and shortcuts of ResNet."""
    block = getattr(timm.models.resnet, {"basic": "BasicBlock"}.get(kind, "Bottleneck"))
    theirs = timm.models.ResNet(block, (1, 2, 1, 1), 3, channels=(4, 8, 12, 16))
    options = {"bottleneck_multipliers": 0.25, "use_se": False} if kind == "bottleneck" else {}
    widths = [channels * block.expansion for channels in (4, 8, 12, 16)]
    ours = AnyNet(
        [1, 2, 1, 1], widths, strides=[1, 2, 2, 2], stem_type="res_stem_in", stem_width=64,
        block_type=f"res_{kind}", num_classes=3, **options,
    )  # fmt: skip
    assert count(ours) == count(theirs)
    assert_same(ours, theirs, size=64)


def test_vanilla_block_equals_plain_layers():
    norm = {"act_layer": "relu", "norm_layer": nn.BatchNorm2d}
    ours = vanilla(3, 5, 2, **norm, dilation=(1, 1), drop_path_rate=0.0)
    plain = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
    )  # fmt: skip
    assert_same(nn.Sequential(ours, nn.Flatten()), plain, size=9)


# --- shapes, contract, initialization ---------------------------------------------------


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("block", BLOCKS)
def test_strides_and_one_training_step(stem, block):
    """Stages of stride 2 and 1 after the stem; odd sizes are rounded up."""
    torch.manual_seed(0)
    model = AnyNet(**SMALL, strides=[2, 1], stem_type=stem, block_type=block)
    stride = {"res_stem_cifar": 1, "simple_stem_in": 2, "res_stem_in": 4}[stem] * 2
    images = torch.randn(4, 3, 33, 40)
    features = model.forward_features(images)
    assert features.shape == (4, 24, math.ceil(33 / stride), math.ceil(40 / stride))
    assert model.forward_head(features, pre_logits=True).shape == (4, model.num_features)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    same = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert same == []


def test_names_of_classyvision_are_understood():
    model = AnyNet(**SMALL, block_type="res_basic_block")
    assert type(model.s1.b1).__name__ == "BasicBlock"


def test_layers_count_from_the_stem_to_the_head():
    model = AnyNet(**SMALL)
    names = ("stem.conv.weight", "s1.b1.conv1.conv.weight", "s2.b2.se.fc1.bias", "head.fc.weight")
    assert [model.layer_of(name) for name in names] == [0, 1, 3, 4]
    assert [model.layer_of(name, "group") for name in names] == [0, 1, 2, 3]
    assert model.layer_of("head.weight") == 4


def test_classifier_is_scaled_replaced_and_removed():
    torch.manual_seed(0)
    whole = AnyNet(**SMALL)
    torch.manual_seed(0)
    small = AnyNet(**SMALL, head_init_scale=0.5)
    torch.testing.assert_close(small.head.fc.weight, whole.head.fc.weight / 2)
    small.reset_classifier(7)
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    small.reset_classifier(0)
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 24)


def test_convolutions_are_initialized_by_fan_out_without_groups():
    """std is sqrt(2 / (9 * 64)) = 0.0589; per group, timm's would be 4 times as large."""
    model = AnyNet([1], [64], group_widths=4, use_se=False)
    assert model.s1.b1.conv2.conv.weight.std().item() == pytest.approx(0.0589, rel=0.05)


@pytest.mark.parametrize("block", ["res_basic", "res_bottleneck", "res_bottleneck_linear"])
def test_zero_residuals_leave_a_signal(block):
    """Blocks that keep the shape begin as the identity, and no stage gives zeros."""
    model = AnyNet(**SMALL, block_type=block, zero_init_last=True)
    x = torch.rand(2, 24, 4, 4)
    torch.testing.assert_close(model.s2.b2(x), x)
    assert model.forward_features(torch.randn(2, 3, 16, 16)).abs().max() > 0


def test_gradient_checkpointing_and_drop_path_act():
    rates = AnyNet(**SMALL, drop_path_rate=0.5).s2
    assert [rates.b1.drop_path.drop_prob, rates.b2.drop_path.drop_prob] == [0.25, 0.5]
    model = AnyNet(**SMALL).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert model.s1.grad_checkpointing
    torch.testing.assert_close(*gradients)


# --- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("depths=[1, 2], widths=[8]", r"widths \[8\] has 1 value, expected 2: one for each stage"),
        ("depths=[1], widths=[8], group_widths=[4, 4]", "group_widths .* 2 values, expected 1"),
        (
            "depths=[1, 1], widths=[8, 20], group_widths=8",
            "stage 2: 20 channels x bottleneck multiplier 1 = 20, expected a multiple of the group "
            "width 8, such as 16 or 24",
        ),
        ("depths=[1], widths=[8], group_widths=16", "multiple of the group width 16, such as 16"),
        ("depths=[0], widths=[8]", r"depths is \[0\], expected integers above 0"),
        ("depths=[], widths=[]", r"depths is \[\], expected integers above 0"),
        ("depths=[1.5], widths=[8]", r"depths is \[1.5\], expected integers"),
        ("depths=[1], widths=[8], bottleneck_multipliers=0", "multipliers is 0, expected numbers"),
        ("depths=[1], widths=[8], stem_type=simple_stem", "Did you mean 'simple_stem_in'"),
        ("depths=[1], widths=[8], block_type=res_botleneck", "Did you mean 'res_bottleneck'"),
        ("depths=[1], widths=[8], activation=gelu", "activation is 'gelu', expected relu | silu"),
        ("depths=[1], widths=[8], use_se=yes", "use_se is 'yes', expected true or false"),
        ("depths=[1], widths=[8], stem_width=1.5", "stem_width is 1.5, expected an integer"),
        ("depths=[1], widths=[8], bn_epsilon=true", "bn_epsilon is 'true', expected a number"),
        ("depths=[1], widths=[8], use_se=false, se_ratio=0.5", "se_ratio 0.5 does nothing"),
        ("depths=[1], widths=[8], stem_width=1", "se_ratio 0.25 leaves no channel of 1"),
        ("depths=[1], widths=[8], block_type=vanilla, group_widths=4", "vanilla blocks have no gr"),
        ("depths=[1], widths=[8], block_type=res_basic, use_se=true", "have no use_se: drop it"),
        ("depths=[1], widths=[8], block_type=vanilla, zero_init_last=true", "have no residual"),
        ("depths=[1], width=[8]", "no argument 'width'. Did you mean 'widths'"),
        ("depths=[1]", r"lacks widths: give anynet\(widths=...\). Its arguments are depths, wid"),
        ("[1], [8]", "give arguments by name"),
    ],
)  # fmt: skip
def test_bad_argument_is_explained(words, message):
    with pytest.raises(UserError, match=message):
        create_model(f"anynet({words})")


def test_bad_regnet_is_explained():
    good = {"depth": 4, "w_0": 8, "w_a": 4.0, "w_m": 2.0, "group_width": 8}
    for key, value in {"w_0": 12, "w_a": -1.0, "w_m": 1.0}.items():
        with pytest.raises(UserError, match=f"{key} {value}.*: expected w_0 a multiple of 8"):
            create_model("regnet", **{**good, key: value})
    with pytest.raises(UserError, match="depth is 0, expected integers above 0"):
        create_model("regnet", **{**good, "depth": 0})
    with pytest.raises(UserError, match="no argument 'widths'.*group_width"):
        create_model("regnet", **good, widths=[8])


def test_head_init_scale_scales_weight_and_bias():
    torch.manual_seed(0)
    whole = create_model("anynet(depths=[1], widths=[8])", num_classes=2)
    torch.manual_seed(0)
    half = create_model("anynet(depths=[1], widths=[8])", num_classes=2, head_init_scale=0.5)
    for one, two in zip(
        whole.get_classifier().parameters(), half.get_classifier().parameters(), strict=True
    ):
        assert torch.equal(one * 0.5, two)
