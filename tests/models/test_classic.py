# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""ResNet, DenseNet and MLP: timm's networks where it has the same, and each option alone."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import models
from config import parser as options
from errors import UserError
from models import create_model
from models.classic import NETWORKS, DenseLayer, DenseNet, ResNet
from tests.models.test_anynet import assert_same, count, shapes
from training.run_folder import folder_name
from training.setup import check_start
from weights.saved_run import inherit_flags, read_saved_run

SMALL = "num_blocks=[1, 1, 1, 1]"


def build(words: str) -> nn.Module:
    return create_model(words, num_classes=3)


def test_table_and_names_agree():
    """models/__init__.py lists the names so that timm is imported late."""
    assert tuple(NETWORKS) == models.CLASSIC


# --- the same as timm and torchvision ---------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("resnet(num_blocks=[2, 2, 2, 2], basic_layer=true)", "resnet18"),
        pytest.param("resnet(num_blocks=[3, 4, 6, 3])", "resnet50", marks=pytest.mark.slow),
        pytest.param(
            "resnet(num_blocks=[3, 4, 6, 3], base_width_and_cardinality=[4, 32])",
            "resnext50_32x4d",
            marks=pytest.mark.slow,
        ),
        ("resnet(num_blocks=[3, 4, 6, 3], use_se=true)", "seresnet50"),
        ("densenet", "densenet121"),
        pytest.param(
            "densenet(num_blocks=[6, 12, 36, 24], growth_rate=48, init_planes=96)",
            "densenet161",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tensors_are_those_of_timm(words, name):
    """Published weights load by name."""
    with torch.device("meta"):
        ours, theirs = create_model(words), timm.create_model(name)
    assert shapes(ours) == shapes(theirs)
    assert ours.feature_info == theirs.feature_info


@pytest.mark.slow
def test_resnext152_has_the_parameters_of_its_blocks():
    """ResNeXt-101 has 23 blocks in stage 3, this one 36, and 8 instead of 4 in stage 2."""
    with torch.device("meta"):
        model, smaller = build("resnext152_32x4d"), timm.create_model("resnext101_32x4d")
        smaller.reset_classifier(3)
    more = 13 * count(model.layer3[-1]) + 4 * count(model.layer2[-1])
    assert count(model) == count(smaller) + more
    # 1x1 to 512, 3x3 in 32 groups of 16, 1x1 to 1024, and three norms.
    stage_3 = 1024 * 512 + 9 * 512 * 16 + 512 * 1024 + 2 * (512 + 512 + 1024)
    assert count(model.layer3[-1]) == stage_3


def test_preset_begins_with_residuals_at_zero():
    """As ClassyVision's presets do; the general network does not unless it is asked to."""
    shape = {"num_blocks": (1, 1, 1, 1), "base_width_and_cardinality": (1, 4)}
    assert NETWORKS["resnext152_32x4d"].keywords["zero_init_bn_residuals"]
    assert ResNet(**shape, zero_init_bn_residuals=True).layer4[-1].bn3.weight.abs().max() == 0
    assert ResNet(**shape).layer4[-1].bn3.weight.min() == 1


def test_densenet_equals_torchvisions():
    """Stem of 6 channels, which timm cannot build, growth 4 and expansion 3."""
    theirs = torchvision.models.DenseNet(4, (2, 1), 6, bn_size=3, num_classes=3)
    ours = build("densenet(num_blocks=[2, 1], init_planes=6, growth_rate=4, expansion=3)")
    assert count(ours) == count(theirs)
    assert_same(ours, theirs)


def test_densenet_gives_timms_intermediate_maps():
    ours = build("densenet(num_blocks=[1, 2], init_planes=8, growth_rate=4)").eval()
    images = torch.randn(1, 3, 32, 32)
    last, maps = ours.forward_intermediates(images)
    assert [(info["num_chs"], info["reduction"]) for info in ours.feature_info] == [
        (8, 2),
        (12, 4),
        (14, 8),
    ]
    for info, found in zip(ours.feature_info, maps, strict=True):
        side = 32 // info["reduction"]
        assert found.shape == (1, info["num_chs"], side, side)
    torch.testing.assert_close(last, ours.forward_features(images))


# --- options ----------------------------------------------------------------------------


def test_squeeze_excite_of_a_dense_layer_by_hand():
    """sigmoid(W2 relu(W1 mean + b1) + b2) scales the 4 channels that the layer adds."""
    torch.manual_seed(0)
    layer = DenseLayer(6, growth_rate=4, expansion=2, reduction=2).double().eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    plain = layer.conv2(layer.norm2(layer.conv1(layer.norm1(x))))
    first, second = layer.se.fc1, layer.se.fc2
    assert (first.out_channels, second.out_channels) == (2, 4)
    inner = (plain.mean((2, 3)) @ first.weight[:, :, 0, 0].T + first.bias).clamp(min=0)
    scale = torch.sigmoid(inner @ second.weight[:, :, 0, 0].T + second.bias)
    torch.testing.assert_close(layer(x), plain * scale[:, :, None, None])


@pytest.mark.slow
def test_se_densenet_adds_parameters_to_each_layer():
    """Growth 32: 32 -> 2 -> 32 channels, with biases, in each of 58 layers."""
    with torch.device("meta"):
        plain, with_se = create_model("densenet"), create_model("densenet(use_se=true)")
    assert count(with_se) - count(plain) == 58 * (32 * 2 + 2 + 2 * 32 + 32)


@pytest.mark.parametrize(
    ("words", "stride"),
    [
        pytest.param(f"resnet({SMALL}, small_input=true)", 8, marks=pytest.mark.slow),
        pytest.param(
            f"resnet({SMALL}, basic_layer=true, small_input=true)", 8, marks=pytest.mark.slow
        ),
        ("densenet(num_blocks=[1, 1], growth_rate=8, small_input=true)", 2),
        ("densenet(num_blocks=[1, 1], growth_rate=8, use_se=true, se_reduction_ratio=4)", 8),
        (f"resnet({SMALL}, final_bn_relu=false, use_se=true)", 32),
        ("densenet(num_blocks=[1, 1], growth_rate=8, final_bn_relu=false)", 8),
    ],
)
def test_stride_and_one_training_step(words, stride):
    torch.manual_seed(0)
    model = build(words)
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 32 // stride, 32 // stride)
    assert model.feature_info[-1]["reduction"] == stride
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(images), torch.tensor([0, 2])))
        losses[-1].backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
        optimizer.step()
    assert losses[1] < losses[0]
    assert model.layer_of("head.weight") > model.layer_of(next(model.named_parameters())[0]) == 0


def test_features_without_final_norm_and_relu_are_signed():
    """For siamese networks; with them, features cannot be negative."""
    images = torch.randn(2, 3, 32, 32)
    for name in (f"resnet({SMALL}, %s)", "densenet(num_blocks=[1, 1], growth_rate=8, %s)"):
        assert build(name % "final_bn_relu=true").forward_features(images).min() >= 0
        assert build(name % "final_bn_relu=false").forward_features(images).min() < 0


def test_residual_without_final_norm_is_the_sum():
    """conv3 + shortcut, nothing else: by hand from the block's own layers."""
    model = build(f"resnet({SMALL}, final_bn_relu=false)").eval()
    block, x = model.layer4[-1], torch.randn(1, 1024, 4, 4)
    branch = block.conv3(block.act2(block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x)))))))
    torch.testing.assert_close(block(x), branch + block.downsample(x))


def test_convolutions_of_densenet_are_initialized_by_fan_out():
    """std sqrt(2 / (9 * 32)) = 0.083 of 3x3 convolutions from 128 to 32 channels."""
    weight = DenseNet([2]).features.denseblock1.denselayer2.conv2.weight
    assert weight.std().item() == pytest.approx(0.0833, rel=0.05)


# --- MLP --------------------------------------------------------------------------------


def test_mlp_equals_plain_layers_in_classyvisions_order():
    """Linear, norm, dropout, ReLU; norm of the pixels first."""
    words = "hidden_dims=[5, 4], use_batchnorm=true, first_batchnorm=true"
    ours = create_model(f"mlp({words})", input_size=(4, 6), num_classes=3)
    plain = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 5), nn.BatchNorm1d(5), nn.ReLU(),
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip
    ours, plain = ours.double(), plain.double()
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(4, 3, 4, 6, dtype=torch.float64)
    results = ours(images), plain(images)
    torch.testing.assert_close(*results)
    gradients = [
        torch.autograd.grad(result.square().sum(), [*model.parameters()])
        for result, model in zip(results, (ours, plain), strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_mlp_drops_where_it_is_asked_to():
    words = "hidden_dims=[5], dropout=0.5, first_dropout=true"
    model = create_model(f"mlp({words})", input_size=2, num_classes=3)
    assert [type(layer).__name__ for layer in (*model.stem, *model.layers[0])] == [
        "Flatten", "Dropout", "Linear", "Dropout", "ReLU",
    ]  # fmt: skip
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5] * 2
    assert len(create_model("mlp(hidden_dims=[])", input_size=2, num_classes=3).layers) == 0


def test_mlp_has_the_size_of_the_flags_and_refuses_others():
    words = ["--data_set", "DIGITS", "--model", "mlp(hidden_dims=[7])", "--input_size", "8", "12"]
    args = options.parse(options.finetune_parser(), [*words, "--in_chans", "1"])
    model = models.build_classifier(args, 10)
    assert count(model) == (8 * 12 * 7 + 7) + (7 * 10 + 10)
    assert [model.layer_of(f"{name}.weight") for name in ("layers.0.0", "head")] == [0, 1]
    with pytest.raises(UserError, match="images of 1x8x12 got 1x12x8: set --input_size"):
        model(torch.zeros(2, 1, 12, 8))


# --- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("resnet(num_blocks=[1, 2, 1])", r"num_blocks is \[1, 2, 1\], expected a list of 4 integ"),
        ("resnet(num_blocks=4)", "num_blocks is 4, expected a list of 4 integers"),
        ("resnet", r"lacks num_blocks: give resnet\(num_blocks=...\)"),
        (f"resnet({SMALL}, base_width_and_cardinality=4)", "is 4, expected two numbers"),
        (f"resnet({SMALL}, basic_layer=true, base_width_and_cardinality=[4, 32])", "drop one"),
        (f"resnet({SMALL}, use_se=true, se_reduction_ratio=512)", "leaves no channel of 256; try"),
        (f"resnet({SMALL}, small_inputs=true)", "'small_inputs'. Did you mean 'small_input'"),
        ("densenet(growth_rate=8, use_se=true)", "se_reduction_ratio 16 leaves no channel of 8"),
        ("densenet(growth_rate=0)", "growth_rate is 0, expected integers above 0"),
        ("densenet(num_blocks=[])", r"num_blocks is \[\], expected"),
        ("densenet(init_planes=1.5)", "init_planes is 1.5, expected an integer"),
        ("mlp(hidden_dims=[8], dropout=1)", "dropout is 1, expected at least 0 and below 1"),
        ("mlp(hidden_dims=[8], first_dropout=true)", "first_dropout needs dropout"),
        ("mlp(hidden_dims=[8], first_batchnorm=true)", "first_batchnorm needs use_batchnorm"),
        ("mlp(hidden_dims=[0])", r"hidden_dims is \[0\], expected integers above 0"),
    ],
)
def test_bad_argument_is_explained(words, message):
    with pytest.raises(UserError, match=message):
        build(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("densenet --drop_path 0.1", "--drop_path 0.1: densenet has no such option; drop it"),
        ("densenet --stem_stride 2", r"--stem_stride 2: densenet .*; use densenet\(small_input="),
        ("regnet_y_256gf --stem_stride 2", r"use regnet_y_256gf\(stem_type=...\)"),
        ("densenet(growth_rate=-1)", "growth_rate is -1"),
        ("anynet(depths=[1],widths=[8],block_type=vanilla) --drop_path 0.1", "have no residual"),
    ],
)
def test_flags_are_checked_before_the_data_is_listed(words, message):
    args = options.parse(
        options.finetune_parser(), ["--data_set", "DIGITS", "--model", *words.split()]
    )
    with pytest.raises(UserError, match=message):
        check_start(args, None)


def test_mlp_is_not_pretrained():
    args = options.parse(options.pretrain_parser(), ["--data_set", "DIGITS", "--model", "mlp"])
    with pytest.raises(UserError, match="unknown model 'fcmae_mlp'"):
        models.check_model(args)


def test_call_replaces_flags_and_unknown_calls_get_a_hint():
    model = create_model("convnextv2_atto(drop_path_rate=0.5)", drop_path_rate=0.0)
    assert model.stages[-1][-1].drop_path.prob == 0.5
    with pytest.raises(UserError, match="unknown model 'densnet'. Did you mean 'densenet'"):
        create_model("densnet(growth_rate=8)")


# --- checkpoints ------------------------------------------------------------------------


def test_checkpoint_brings_its_network_with_arguments():
    """Without --model, its arguments too; with one, other options are not a contradiction."""
    saved = read_saved_run({"args": {"model": "densenet(growth_rate=12)"}}, "run")
    words = ["--data_set", "DIGITS"]
    args = options.parse(options.finetune_parser(), words)
    assert inherit_flags(args, saved).model == "densenet(growth_rate=12)"
    other = "densenet(growth_rate=12, final_bn_relu=false)"
    args = options.parse(options.finetune_parser(), [*words, "--model", other])
    assert inherit_flags(args, saved).model == other


def test_run_folder_is_named_after_the_network_alone():
    args = options.parse(options.finetune_parser(), ["--data_set", "DIGITS"])
    folder = folder_name(args, "anynet(depths=[1], widths=[8])", 0.0)
    assert folder.name.startswith("finetune-anynet-1970")
