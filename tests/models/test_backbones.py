# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Networks of timm and torchvision: names, stems, layers, freezing, checkpointing, features."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from config import parser as options
from config.flags import is_code, library_of
from errors import UserError
from models import backbones, create_model, parts
from models.parts import features, find_classifier, freeze_backbone, training_mode
from optim_factory import create_optimizer
from training.ema import ModelEma
from weights.fit import fit_weights

# Published numbers of parameters, 1000 classes.
PUBLISHED = {
    "timm:resnet18": 11_689_512,
    "timm:resnet34": 21_797_672,
    "timm:resnet50": 25_557_032,
    "timm:resnet101": 44_549_160,
    "timm:resnet152": 60_192_808,
    "timm:resnext50_32x4d": 25_028_904,
    "timm:resnext101_32x4d": 44_177_704,
    "timm:seresnet50": 28_088_024,
    "timm:densenet121": 7_978_856,
    "timm:densenet161": 28_681_000,
    "timm:densenet169": 14_149_480,
    "timm:densenet201": 20_013_928,
    "timm:efficientnet_b0": 5_288_548,
    "timm:efficientnet_b1": 7_794_184,
    "timm:efficientnet_b2": 9_109_994,
    "timm:efficientnet_b3": 12_233_232,
    "timm:efficientnet_b4": 19_341_616,
    "timm:efficientnet_b5": 30_389_784,
    "timm:efficientnet_b6": 43_040_704,
    "timm:efficientnet_b7": 66_347_960,
    "timm:regnetx_004": 5_157_512,
    "timm:regnetx_008": 7_259_656,
    "timm:regnetx_016": 9_190_136,
    "timm:regnetx_032": 15_296_552,
    "timm:regnetx_080": 39_572_648,
    "timm:regnetx_160": 54_278_536,
    "timm:regnetx_320": 107_811_560,
    "timm:regnety_004": 4_344_144,
    "timm:regnety_008": 6_263_168,
    "timm:regnety_016": 11_202_430,
    "timm:regnety_032": 19_436_338,
    "timm:regnety_080": 39_180_068,
    "timm:regnety_160": 83_590_140,
    "timm:regnety_320": 145_046_770,
    "timm:regnety_640": 281_378_786,
    "timm:regnety_1280": 644_812_894,
    "timm:regnetz_005": None,  # its head is a convolution
    "timm:regnetz_040": None,
    "timm:vit_base_patch16_224": 86_567_656,
    "timm:vit_base_patch32_224": 88_224_232,
    "timm:vit_large_patch16_224": 304_326_632,
    "timm:vit_large_patch32_224": 306_535_400,
    "timm:vit_huge_patch14_224": 632_045_800,
    "torchvision:resnet18": 11_689_512,
    "torchvision:efficientnet_b0": 5_288_548,
    "torchvision:densenet121": 7_978_856,
    "torchvision:regnet_y_400mf": 4_344_144,
    "torchvision:vit_b_16": 86_567_656,
    "torchvision:convnext_tiny": 28_589_128,
    "torchvision:swin_t": 28_288_354,
    "torchvision:mobilenet_v3_small": 2_542_856,
}
FAST = ("timm:resnet18", "timm:regnety_004", "torchvision:mobilenet_v3_small")
STEPS = FAST + ("timm:resnet50", "timm:resnext50_32x4d", "timm:resnext101_32x4d")
STEPS += ("timm:seresnet50", "timm:densenet121", "timm:densenet169", "timm:densenet201")
STEPS += ("timm:densenet161", *(f"timm:efficientnet_b{i}" for i in range(1, 5)))
STEPS += ("timm:regnetx_004", "timm:regnetx_008", "timm:regnetx_016", "timm:regnetx_032")
STEPS += ("timm:regnety_008", "timm:regnety_016", "timm:regnety_032", "timm:regnetz_005")
STEPS += ("timm:vit_base_patch32_224(depth=2)", "torchvision:efficientnet_b0")
STEPS += ("torchvision:densenet121", "torchvision:regnet_y_400mf", "torchvision:swin_t")
STEPS += ("torchvision:vit_b_16", "torchvision:convnext_tiny", "timm:resnet34", "timm:regnetz_040")
STEPS += ("timm:efficientnet_b0", "timm:efficientnet_b5", "timm:regnetx_080", "timm:regnety_080")
# Fewer blocks of networks that take long.
STEPS += ("timm:resnet101(layers=[1,1,1,1])", "timm:vit_base_patch16_224(depth=2)")
STEPS += ("timm:vit_large_patch16_224(depth=2)", "timm:vit_large_patch32_224(depth=2)")
STEPS += ("timm:vit_huge_patch14_224(depth=2)", "resnext152_32x4d(num_blocks=[1,1,1,1])")
STEPS += ("regnet_y_256gf(depth=8,w_0=32,w_a=16,group_width=16)",)
SHAPES_ONLY = [n for n in (*PUBLISHED, "resnext152_32x4d", "regnet_y_256gf") if n not in STEPS]


def tiny(name: str = "timm:test_resnet", **kwargs) -> nn.Module:
    """A small network in float64."""
    torch.manual_seed(0)
    return create_model(name, **({"num_classes": 5} | kwargs)).double()


def images(side: int = 32, channels: int = 3, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, side, side, generator=generator, dtype=torch.float64)


# --- construction -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED]
)
def test_published_networks_have_their_parameters_and_an_order_of_layers(name):
    with torch.device("meta"):
        model = create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == (PUBLISHED[name] or count)
    for kind in ("single", "group"):
        layers = [model.layer_of(n, kind) for n, _ in model.named_parameters()]
        assert layers == sorted(layers)
        assert set(layers) == {*range(layers[-1] + 1)}
        assert layers[-1] >= 5
        assert layers[0] == 0
        assert model.layer_of("head.weight", kind) == layers[-1]  # as the optimizer asks
        heads = find_classifier(model)
        assert {
            model.layer_of(n, kind) for n, _ in model.named_parameters() if n.startswith(heads)
        } == {layers[-1]}


def test_layers_of_a_torchvision_network():
    with torch.device("meta"):
        model = create_model("torchvision:resnet18")
        dense = create_model("torchvision:densenet121")
        vit = create_model("torchvision:vit_b_16")
    names = ("conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer2.1.bn2.bias", "fc.bias")
    assert [model.layer_of(name) for name in names] == [0, 0, 1, 4, 9]
    assert [model.layer_of(name, "group") for name in names] == [0, 0, 1, 2, 5]
    # A transition belongs to the block after it, the last norm to the block before it.
    names = ("denseblock1.denselayer6.conv1.weight", "transition1.conv.weight", "norm5.weight")
    assert [dense.layer_of(f"features.{name}") for name in names] == [6, 7, 58]
    names = ("class_token", "encoder.pos_embedding", "conv_proj.bias", "encoder.ln.bias")
    assert [vit.layer_of(name) for name in names] == [0, 0, 0, 12]


@pytest.mark.parametrize("name", ["torchvision:alexnet", "timm:vgg11"])
def test_layer_decay_without_an_order_of_layers_is_refused_by_name(name):
    with torch.device("meta"):
        model = create_model(name)
    if name.startswith("timm"):  # it says that all of its features are one layer
        model.group_matcher = lambda coarse=False: {"stem": "^"}
    with pytest.raises(UserError, match=f"{type(model).__name__} has no order of blocks"):
        model.layer_of("x")


def train_one_step(name: str) -> None:
    torch.manual_seed(0)
    size = {"input_size": (64, 64)} if library_of(name) else {}
    model = create_model(name, num_classes=3, drop_path_rate=0.0, **size)
    optimizer = create_optimizer(model, "adamw", lr=0.01, layer_decay=0.7)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 3
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    training_mode(model)
    for _ in range(2):  # the first step moves only the last norm of a block, whose weight is 0
        loss = F.cross_entropy(model(images(64, count=2).float()), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert loss.isfinite()
    assert changed == list(before)


@pytest.mark.parametrize("name", FAST[-1:])
def test_training_step_moves_every_parameter(name):
    train_one_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST[:-1], *(name for name in STEPS if name not in FAST)])
def test_training_step_of_larger_networks_moves_every_parameter(name):
    train_one_step(name)


@pytest.mark.parametrize(
    "name",
    [n if n == "regnet_y_256gf" else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES_ONLY],
)
def test_step_on_the_meta_device_has_a_gradient_for_every_parameter(name):
    """Of networks too large for a step with numbers: their code runs, on shapes alone."""
    with torch.device("meta"):
        model = create_model(name)
    optimizer = create_optimizer(model, "adamw", lr=0.01, layer_decay=0.7)
    training_mode(model)
    logits = model(torch.empty(2, 3, *[224 if "vit" in name else 64] * 2, device="meta"))
    assert logits.shape == (2, 1000)
    logits.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))


FAMILIES = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")
SLOW_FAMILIES = ("resnet18", "mobilenet_v2", "mnasnet0_5", "regnet_y_400mf")
SLOW_FAMILIES += ("alexnet", "vgg11", "densenet121", "efficientnet_b0", "vit_b_32", "convnext_tiny")
SLOW_FAMILIES += ("swin_t", "googlenet", "inception_v3")


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_FAMILIES)]
)
def test_torchvision_network_is_its_features_and_its_head(name):
    side = 96 if name.startswith("inception") else 64
    model = tiny(f"torchvision:{name}", input_size=(side, side)).eval()
    x = images(side, count=2)
    with torch.no_grad():
        maps, logits = model.forward_features(x), model(x)
        torch.testing.assert_close(model.forward_head(maps), logits, rtol=1e-10, atol=1e-12)
        vector = model.forward_head(maps, pre_logits=True)
        assert vector.shape == (2, model.num_features)
        if isinstance(model.get_classifier(), nn.Linear):
            torch.testing.assert_close(model.get_classifier()(vector), logits)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)


# --- names --------------------------------------------------------------------------------------


def test_names_of_libraries_are_not_code():
    names = ("timm:resnet18", "torchvision:resnet18", "my.nets:net", "timmy:net", "convnextv2_atto")
    assert [is_code(name) for name in names] == [False, False, True, True, False]
    assert [library_of(name) for name in names] == ["timm", "torchvision", "", "", ""]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet19", "unknown network of timm 'resnet19'. Did you mean 'resnet18'"),
        ("torchvision:resnet_18", "unknown network of torchvision 'resnet_18'. Did you mean"),
        ("torchvision:fcn_resnet50", "unknown network of torchvision"),  # no classifier
        ("timm:hf-hub:someone/net", "unknown network of timm"),  # a checkpoint must not choose it
        ("timm:resnet18.a1", "unknown weights of timm:resnet18 'a1'. Known: a1_in1k"),
        ("timm:resnet18(drop_rat=0.1)", "Did you mean 'drop_rate'"),
        ("timm:resnet18(num_classes=3)", "give --nb_classes, not the argument num_classes"),
        ("timm:resnet18(checkpoint_path=x)", "give --finetune"),
        ("timm:resnet18(pretrained_cfg_overlay=x)", "pretrained_cfg_overlay is not possible here"),
        ("timm:resnet18(3)", "give its arguments as key=value"),
        ("torchvision:resnet18(widths=3)", "Expected one of .*groups"),
        ("torchvision:efficientnet_b0(stochastic_depth_prob=0.1)", "give --drop_path"),
        ("timm:resnet18(drop_rate=0.1", "is not closed"),
    ],
)
def test_wrong_names_say_what_is_meant(name, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        create_model(name)


def test_arguments_reach_the_network():
    with torch.device("meta"):
        assert create_model("timm:resnet18(drop_rate=0.25)").drop_rate == 0.25
        assert create_model("torchvision:vgg11(dropout=0.25)").classifier[2].p == 0.25
        names = ["tests.tiny:classifier(stem_stride=2)", "tests.tiny:classifier"]
        assert [create_model(name).total_stride for name in names] == [16, 32]


def parsed(*words: str):
    return options.parse(options.finetune_parser(), ["--data_set", "DIGITS", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pretrained", "--model convnextv2_base is not of timm or torchvision"),
        ("--model timm:resnet18 --pretrained --finetune x", "both give the weights"),
        ("--model timm:resnet18 --pretrained --resume x", "both give the weights"),
        ("--freeze_backbone --layer_decay 0.5", "the head is the only layer that trains"),
        ("--freeze_backbone --drop_path 0.5", "a frozen backbone drops nothing"),
        ("--freeze_backbone --grad_checkpointing", "keeps nothing for backward"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parsed(*words.split())
    assert message in capsys.readouterr().err


# --- stem, channels, stochastic depth ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("timm:resnet18", [8, 4, 2]),  # of 64 pixels: at stride 1, 2 and its own
        ("timm:test_resnet", [8, 4, 2]),  # with three convolutions in the stem
        pytest.param("torchvision:resnet18", [8, 4, 2], marks=pytest.mark.slow),
        pytest.param("timm:densenet121", [8, 4, 2], marks=pytest.mark.slow),
        pytest.param("torchvision:densenet121", [8, 4, 2], marks=pytest.mark.slow),
        pytest.param("timm:efficientnet_b0", [4, 2], marks=pytest.mark.slow),
        pytest.param("torchvision:efficientnet_b0", [4, 2], marks=pytest.mark.slow),
        pytest.param("timm:regnety_002", [4, 2], marks=pytest.mark.slow),
        pytest.param("torchvision:regnet_y_400mf", [4, 2], marks=pytest.mark.slow),
        ("timm:mobilenetv3_small_050", [4, 2]),
        pytest.param("torchvision:mobilenet_v2", [4, 2], marks=pytest.mark.slow),
    ],
)
def test_stem_stride_for_small_images(name, sides):
    found, x = [], torch.zeros(1, 3, 64, 64)
    for stride in (1, 2, 4) if len(sides) == 3 else (1, 4):  # 2 is the own one already
        with torch.device("meta"):
            model = create_model(name, stem_stride=stride).eval()
        if next(model.parameters()).device.type == "cpu":  # torchvision's RegNet
            model = model.to("meta")
        found.append(model.forward_features(x.to("meta")).shape[-1])
    assert found == sides


def test_stem_of_stride_1_is_that_of_cifar():
    with torch.device("meta"):
        model = create_model("timm:resnet18", stem_stride=1, in_chans=1)
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    assert (model.conv1.stride, type(model.maxpool)) == ((1, 1), nn.Identity)


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:swin_t"])
def test_stem_that_cannot_change_is_refused_by_name(name):
    with torch.device("meta"), pytest.raises(UserError, match="this (Vision|Swin)Transformer has"):
        create_model(name, stem_stride=2)


def test_stem_whose_stride_is_2_already_is_refused():
    with torch.device("meta"), pytest.raises(UserError, match="MobileNetV3 has stride 2 already"):
        create_model("timm:mobilenetv3_small_050", stem_stride=2)


def test_channels_of_torchvision_weights_are_adapted_by_the_same_rule():
    weights = tiny("torchvision:mobilenet_v3_small").state_dict()
    model = tiny("torchvision:mobilenet_v3_small", in_chans=1)
    state, report = fit_weights(model, weights, ("head.",))
    expected = weights["features.0.0.weight"].float().sum(1, keepdim=True)
    torch.testing.assert_close(state["features.0.0.weight"].float(), expected)
    assert "1 channel" in report.warnings[0] or "has 1" in report.warnings[0]
    model.load_state_dict(state)
    assert list(model.state_dict()) == list(weights)  # no name has changed


@pytest.mark.slow
def test_drop_path_is_that_of_the_last_block_or_refused():
    with torch.device("meta"):
        model = create_model("torchvision:convnext_tiny", drop_path_rate=0.4)
        plain = create_model("torchvision:convnext_tiny")
        timms = create_model("timm:swin_tiny_patch4_window7_224")  # 0.1 by default
        for name in ("torchvision:resnet18", "timm:densenet121"):
            with pytest.raises(UserError, match=f"{name} has no stochastic depth; drop it"):
                create_model(name, drop_path_rate=0.1)
    rates = [m.p for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    assert rates == pytest.approx([0.4 * i / 17 for i in range(18)])
    assert not any(m.p for m in plain.modules() if type(m).__name__ == "StochasticDepth")
    assert not any(getattr(m, "drop_prob", 0) for m in timms.modules())


def test_size_reaches_networks_that_need_it():
    with torch.device("meta"):
        assert (
            create_model("timm:vit_tiny_patch16_224", input_size=(32, 48)).pos_embed.shape[1] == 7
        )
        model = create_model("torchvision:vit_b_16", input_size=(32, 32))
        assert model.encoder.pos_embedding.shape[1] == 5
        with pytest.raises(UserError, match="takes squares"):
            create_model("torchvision:vit_b_16", input_size=(32, 64))
        with pytest.raises(UserError, match="--model torchvision:vit_b_16: .*divisible"):
            create_model("torchvision:vit_b_16", input_size=(33, 33))


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:mobilenet_v3_small"])
def test_new_head_is_scaled(name):
    one, small = tiny(name), dict(tiny(name, head_init_scale=0.5).named_parameters())
    for path, weight in one.named_parameters():
        factor = 0.5 if path.startswith(find_classifier(one)) else 1.0
        assert torch.equal(small[path], weight * factor)


# --- frozen backbone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["timm:test_resnet", "timm:test_vit", "torchvision:mobilenet_v3_small", "convnextv2"]
)
def test_frozen_backbone_does_not_move(name):
    if name == "convnextv2":
        model = create_model("tests.tiny:classifier", num_classes=5, stem_stride=1)
    else:
        model = create_model(name, num_classes=5, input_size=(160, 160))
    freeze_backbone(model)
    optimizer = create_optimizer(model, "sgd", lr=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    before = copy.deepcopy(model.state_dict())
    training_mode(model)
    x = images(160 if "vit" in name else 32).float()
    assert torch.equal(model(x), model.eval()(x))  # no dropout, no statistics of the batch
    training_mode(model)
    logits = model(x)
    F.cross_entropy(logits, torch.arange(4)).backward()
    optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    head = find_classifier(model)[0]
    assert changed == {f"{head}weight", f"{head}bias"}
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith(head))


def test_frozen_backbone_costs_nothing_in_backward():
    model = tiny("torchvision:mobilenet_v3_small")
    freeze_backbone(model)
    training_mode(model)
    assert not model.forward_features(images()).requires_grad


def test_model_that_is_not_frozen_trains_as_a_whole():
    model = tiny()
    model.eval()
    training_mode(model)
    assert all(module.training for module in model.modules())


def test_classifier_that_is_not_found_cannot_be_frozen():
    with pytest.raises(UserError, match="the classifier of Sequential is not found"):
        freeze_backbone(nn.Sequential(nn.Linear(2, 2)))


# --- gradient checkpointing -------------------------------------------------------------------


def one_step(model: nn.Module) -> tuple[dict, dict]:
    model.train()
    torch.manual_seed(3)  # of dropout and stochastic depth
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    return {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("timm:test_resnet", 0.5),
        pytest.param("torchvision:mobilenet_v3_small", 0.0, marks=pytest.mark.slow),
        pytest.param("torchvision:resnet18", 0.0, marks=pytest.mark.slow),
        pytest.param("torchvision:efficientnet_b0", 0.5, marks=pytest.mark.slow),
        pytest.param("torchvision:densenet121", 0.0, marks=pytest.mark.slow),
        pytest.param("torchvision:swin_t", 0.5, marks=pytest.mark.slow),
        pytest.param("timm:densenet121", 0.0, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_gives_the_same_gradients_and_statistics(name, rate):
    plain = tiny(name, drop_path_rate=rate)
    model = copy.deepcopy(plain)
    models.enable_grad_checkpointing(model, False)
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, found = one_step(plain), one_step(model)
    for want, got in zip(expected, found, strict=True):
        assert want.keys() == got.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-12)
    one_step(model)
    assert {b.item() for n, b in model.named_buffers() if n.endswith("tracked")} <= {2}


def saved_for_backward(model: nn.Module) -> int:
    sizes = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.train()(images())
    return sum(sizes)


def test_checkpointing_saves_memory_in_torchvision_blocks():
    """Blocks that are not checkpointed at all would give the same gradients too."""
    model = tiny("torchvision:mobilenet_v3_small")
    before = saved_for_backward(model)
    model.set_grad_checkpointing(True)
    assert saved_for_backward(model) < before / 2
    model.set_grad_checkpointing(False)
    assert saved_for_backward(model) == before


def test_copies_use_their_own_weights():
    """The EMA model is a copy; methods bound to the trained model would evaluate that one."""
    model = tiny("torchvision:mobilenet_v3_small")
    model.set_grad_checkpointing()
    ema = ModelEma(model, 0.9, torch.device("cpu")).module
    expected = ema(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(ema(images()), expected)
    assert torch.equal(ema.forward_head(ema.forward_features(images())), expected)
    assert ema.layer_of.__self__ is ema
    assert ema.features[1].forward.__self__ is ema.features[1]


def test_compiled_checkpointing_with_batch_norm_is_refused():
    with pytest.raises(UserError, match="the BatchNorm of ResNet would count every batch twice"):
        models.enable_grad_checkpointing(tiny(), True)


# --- features ---------------------------------------------------------------------------------


def test_features_of_a_network_that_fx_cannot_trace():
    model = tiny("timm:regnety_002").eval()
    maps = features(model, images(64), ["s1", "s3.b1", "stem.bn"])
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == {
        "s1": (24, 16, 16), "s3.b1": (152, 4, 4), "stem.bn": (32, 32, 32),
    }  # fmt: skip
    whole = nn.Sequential(model.stem, model.s1)(images(64))
    assert torch.equal(maps["s1"], whole)


def test_features_are_not_changed_by_activations_that_work_in_place():
    model = tiny("torchvision:resnet18").eval()
    (maps,) = features(model, images(), ["bn1"]).values()
    assert torch.equal(maps, model.bn1(model.conv1(images())))
    assert (maps < 0).any()


def test_features_keep_the_gradient_and_leave_no_hook():
    model = tiny()
    features(model, images(), ["layer2"])["layer2"].sum().backward()
    assert model.conv1[0].weight.grad.abs().sum() > 0
    assert not any(module._forward_hooks for module in model.modules())


def test_features_of_unknown_modules_name_the_closest():
    with pytest.raises(UserError, match="unknown module 'layer22'. Did you mean 'layer2"):
        features(tiny(), images(), ["layer22"])
    model = tiny("torchvision:squeezenet1_1")
    model.unused = nn.Identity()
    with pytest.raises(UserError, match="unused is not called by SqueezeNet"):
        features(model, images(64, count=1), ["unused"])


def test_module_lists_of_stems_name_real_modules():
    assert parts.OWN_STEM == 4
    assert set(backbones.BY_FLAG.values()) <= vars(parsed()).keys()
