# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Masked dense operations are exact: hidden cells do not matter, statistics are of visible ones.

The reference writes the definition a second time, with explicit zeros and sums.
"""

import contextlib
import copy
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from config.parser import parse, pretrain_parser
from errors import UserError
from models import build_fcmae
from models.fcmae import random_mask
from models.masked import MaskedFCMAE, MaskedMap, call_encoder, cleaned, masked, visible
from models.sparse import PatchGrid
from training.setup import check_start

MASK = torch.tensor([[[0, 1], [1, 0]], [[0, 0], [1, 1]], [[1, 0], [1, 0]]]).double()


def networks() -> dict:
    """Small networks of each kind of operation; stride 32."""
    narrow = {"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1), "num_classes": 0}
    return {
        "resnet": lambda: ResNet(BasicBlock, **narrow),
        "resnet-d with squeeze-excite": lambda: ResNet(
            Bottleneck, stem_type="deep", avg_down=True, block_args={"attn_layer": "se"}, **narrow
        ),
        "resnext": lambda: ResNet(Bottleneck, cardinality=4, base_width=16, **narrow),
        "densenet": lambda: timm.models.densenet.DenseNet(4, (2, 2, 2, 2), num_classes=0),
        "inverted residual": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
        "regnet": lambda: timm.create_model("regnety_002", num_classes=0),
        "group norm": lambda: ResNet(
            BasicBlock, norm_layer=partial(timm.layers.GroupNorm, num_groups=4), **narrow
        ),
        "channels last": lambda: timm.models.convnext.ConvNeXt(
            depths=(1, 1, 1, 1), dims=(4, 8, 8, 12), num_classes=0
        ),
    }


SLOW = ("resnet-d with squeeze-excite", "inverted residual", "regnet")
CASES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in networks()]


def build(name: str) -> nn.Module:
    """One of them in float64, with every parameter away from its start."""
    torch.manual_seed(0)
    network = networks()[name]().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.train()


def run(network: nn.Module, images: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Features, gradients and buffers after one step; of a copy, without a mask if it is None."""
    network = copy.deepcopy(network)
    if mask is not None:
        images = masked(torch.where(visible(masked(images, PatchGrid(mask))), images, 0.0),
                        PatchGrid(mask), clean=True)  # fmt: skip
    features = cleaned(network.forward_features(images))
    (features**2).sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [features.detach(), *gradients, *network.buffers()]


@pytest.mark.parametrize("name", CASES)
def test_an_empty_mask_is_the_plain_network(name):
    network, images = build(name), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for ours, plain in zip(
        run(network, images, torch.zeros_like(MASK)), run(network, images, None), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8 * (1 + float(plain.max())))


@pytest.mark.parametrize("name", CASES)
def test_hidden_cells_are_bit_for_bit_irrelevant(name):
    """Not only the pixels: whatever an operation leaves in a hidden cell."""
    network, images = build(name), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    model = MaskedFCMAE(network, decoder_embed_dim=8).double().train()
    hidden = MASK.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None] > 0
    results = []
    for content in (0.0, 7.0, math.nan):
        once = copy.deepcopy(model)
        features = once.forward_encoder(torch.where(hidden, content, images), MASK.flatten(1))
        (features**2).sum().backward()
        results.append([features, *(p.grad for p in once.encoder.parameters()), *once.buffers()])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)
    assert (results[0][0][MASK[:, None].expand_as(results[0][0]) > 0] == 0).all()


def test_batch_mates_do_not_matter_without_batch_norm():
    network, images = build("group norm"), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    model = MaskedFCMAE(network, decoder_embed_dim=8).double()
    whole = model.forward_encoder(images, MASK.flatten(1))
    alone = model.forward_encoder(images[:1], MASK.flatten(1)[:1])
    torch.testing.assert_close(whole[:1], alone)


class Toy(nn.Module):
    """Convolution, norm, maximum, residual, squeeze-excite, average: stride 8."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, stride=2, padding=3)
        self.norm1 = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.se = SqueezeExcite(4, rd_channels=2)
        self.conv3 = nn.Conv2d(4, 6, 3, padding=1)
        self.last = nn.AvgPool2d(3, 2, 1, count_include_pad=False)

    def reset_classifier(self, num_classes: int) -> None:
        assert num_classes == 0

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.norm1(self.conv1(x)))  # maxima of negative values too
        y = self.se(F.relu(self.norm2(self.conv2(x)), inplace=True))
        x = x + y
        return self.last(self.conv3(x))


def reference(net: Toy, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`Toy.forward_features` by the definition: zero, operate, zero; sums of visible cells."""

    def seen(x):  # (N, 1, h, w), 1 = visible
        return F.interpolate(1 - mask[:, None], size=x.shape[-2:], mode="nearest")

    def norm(x, layer):
        v = seen(x)
        mean = (x * v).sum((0, 2, 3), keepdim=True) / v.sum()
        var = ((x - mean) ** 2 * v).sum((0, 2, 3), keepdim=True) / v.sum()
        weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
        return ((x - mean) / (var + layer.eps).sqrt() * weight + bias) * v

    x = images * seen(images)
    x = F.conv2d(x, net.conv1.weight, net.conv1.bias, stride=2, padding=3)
    x = norm(x * seen(x), net.norm1)
    x = F.max_pool2d(torch.where(seen(x) > 0, x, -torch.inf), 3, 2, 1)
    x = torch.where(seen(x) > 0, x, 0.0)
    y = norm(F.conv2d(x, net.conv2.weight, padding=1), net.norm2).relu()
    pooled = (y * seen(y)).sum((2, 3), keepdim=True) / seen(y).sum((2, 3), keepdim=True)
    y = y * gate(net, pooled)
    x = (x + y) * seen(x)
    x = F.conv2d(x, net.conv3.weight, net.conv3.bias, padding=1)
    x = x * seen(x)
    ones = F.avg_pool2d(seen(x), 3, 2, 1, divisor_override=1)
    x = F.avg_pool2d(x, 3, 2, 1, divisor_override=1) / ones.clamp(min=1)
    return x * seen(x)


def gate(net: Toy, pooled: torch.Tensor) -> torch.Tensor:
    """Squeeze-excite of pooled features."""
    hidden = F.conv2d(pooled, net.se.fc1.weight, net.se.fc1.bias).relu()
    return F.conv2d(hidden, net.se.fc2.weight, net.se.fc2.bias).sigmoid()


def test_every_operation_follows_the_definition():
    torch.manual_seed(0)
    net = Toy().double()
    model = MaskedFCMAE(net, patch_size=8, decoder_embed_dim=8).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    ours = model.forward_encoder(images, MASK.flatten(1))
    weights = torch.randn_like(ours)
    theirs = reference(net, images, MASK)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for one, two in zip(
        torch.autograd.grad((ours * weights).sum(), parameters),
        torch.autograd.grad((theirs * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_running_statistics_are_those_of_visible_cells():
    """Zeros of hidden cells would shrink them, and the fine-tuned network would be off."""
    norm = nn.BatchNorm2d(1, momentum=1.0).double()
    images = torch.tensor([[1.0, 2.0], [9.0, 9.0]]).double().reshape(1, 1, 2, 2)
    grid = PatchGrid(torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]))  # the 9s are hidden
    cleaned(norm(masked(images, grid)))
    assert norm.running_mean.item() == 1.5
    assert norm.running_var.item() == 0.5  # (0.25 + 0.25) / (2 - 1)


@pytest.mark.slow
def test_statistics_of_large_patches_are_near_those_of_whole_images():
    """Deep layers with patches of one cell are further off (docs/pretraining.md)."""
    network = build("resnet").float()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.3
    model = MaskedFCMAE(network, patch_size=64, decoder_embed_dim=8).train()
    images, ratios = torch.randn(8, 3, 128, 128), []
    for _ in range(12):
        model.forward_encoder(images, random_mask(torch.rand(8, 4), 2))
    for norm in norms:  # variance of its input, of whole images, by the one that it expects
        norm.register_forward_pre_hook(
            lambda norm, x: ratios.append((x[0].var((0, 2, 3)) / norm.running_var).median().item())
        )
    network.eval().forward_features(images)
    assert len(ratios) == len(norms)
    assert min(ratios) > 0.4
    assert max(ratios) < 1.4  # 2 in the first layers if the hidden half counted as zeros


def test_pretraining_leaves_the_networks_own_names():
    network = build("densenet")
    names = {f"encoder.{name}" for name, _ in network.named_parameters()}
    model = MaskedFCMAE(network, decoder_embed_dim=8)
    assert {name for name, _ in model.named_parameters() if name.startswith("encoder.")} == names


def test_parameters_of_a_head_do_not_wait_for_gradients():
    """DistributedDataParallel waits for every parameter that requires a gradient."""
    encoder = timm.create_model("mobilenetv3_small_050")
    model = MaskedFCMAE(encoder, decoder_embed_dim=8)
    loss, *_ = model(torch.randn(2, 3, 64, 64))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not encoder.conv_head.weight.requires_grad


def test_measuring_leaves_the_network_as_it_was():
    network = build("resnet")
    before = copy.deepcopy(network.state_dict())
    MaskedFCMAE(network, decoder_embed_dim=8)
    assert all(module.training for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tf_efficientnet_b0", r"conv_stem \(Conv2dSame\): no exact masked form of pad"),
        ("skresnet18", r"layer1.0.conv1 \(SelectiveKernel\): no exact masked form of stack"),
        (
            "deit_tiny_patch16_224",
            r"of any size, without attention over positions, and cannot take a test image of 64 x "
            r"64 pixels: patch_embed \(PatchEmbed\): .* model \(224\); choose another --model$",
        ),
        ("crossvit_tiny_240", "CrossVit makes list of a test image of 64 x 64 pixels, expected a"),
        pytest.param("inception_v3", "a test image of 64 x 64", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_masked_is_refused_by_name(name, message):
    with pytest.raises(UserError, match=message):
        MaskedFCMAE(timm.create_model(name, num_classes=0))


SMALL = "resnet(num_blocks=[1,1,1,1],basic_layer=true,small_input=true)"


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (SMALL, "--input_size 32", ""),
        ("timm:test_resnet", "--input_size 64", ""),
        (SMALL, "--input_size 36", "--input_size 36 is not a multiple of 8, the stride of .*32 or"),
        (SMALL, "--input_size 8", "single patch .*; raise --input_size to 16 or more"),
        (SMALL, "--input_size 16 --mask_ratio 0.9", "--mask_ratio 0.9 keeps 0 of 4 patches"),
        (SMALL, "--input_size 32 --patch_size 12", "expected a multiple of 8; give --patch_size 8"),
        ("timm:test_resnet", "--stem_stride 1 --input_size 32", ""),
    ],
)
def test_sizes_are_checked_against_the_networks_own_stride(model, words, message):
    words = ["--model", model, "--data_set", "DIGITS", *words.split()]
    args = parse(pretrain_parser(), words)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_start(args, None)


def test_what_flags_and_networks_cannot_do_is_refused():
    words = ["--model", SMALL, "--data_set", "DIGITS", "--input_size", "32"]
    with pytest.raises(UserError, match="--shard fsdp does not work with the masked"):
        build_fcmae(parse(pretrain_parser(), [*words, "--shard", "fsdp"]))
    identity = nn.Identity()
    identity.reset_classifier = lambda count: None
    with pytest.raises(UserError, match="Identity has no convolution"):
        MaskedFCMAE(identity)


@pytest.mark.slow
def test_networks_that_recompute_other_operations_refuse_checkpointing():
    model = MaskedFCMAE(timm.create_model("poolformer_s12"), decoder_embed_dim=8)
    with pytest.raises(UserError, match="MetaFormer cannot recompute its masked operations"):
        model.set_grad_checkpointing()


class Fails(nn.Module):
    """Raises an error of an unusual type in `forward_features`."""

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        raise KeyError("a key")


def test_any_error_of_a_library_names_the_network():
    with pytest.raises(UserError, match="Fails cannot be pre-trained by FCMAE: .*a key"):
        call_encoder(Fails(), torch.zeros(1, 3, 64, 64))


def small_map(value: float = 0.0) -> MaskedMap:
    """A clean map of 4 channels and 2 x 2 cells."""
    x = torch.full((1, 4, 2, 2), value)
    return masked(x, PatchGrid(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])), clean=True)


def test_keyword_names_are_those_of_torch():
    x, norm = small_map(), {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    assert isinstance(F.batch_norm(x, **norm), MaskedMap)
    assert len(torch.chunk(x, chunks=2, dim=1)) == 2
    assert len(x.split(split_size=1, dim=1)) == len(x.chunk(chunks=4, dim=1)) == 4
    assert len(torch.split(x, split_size_or_sections=[1, 3], dim=1)) == 2


@pytest.mark.parametrize(
    ("operation", "clean"),
    [
        (lambda x: x / 2, True),
        (lambda x: x / x, False),  # 0 / 0 is NaN
        (lambda x: torch.ones(1) / x, False),
        (lambda x: F.hardtanh(x), True),
        (lambda x: F.hardtanh(x, 0.0, 6.0), True),
        (lambda x: F.hardtanh(x, 1.0, 6.0), False),
        (lambda x: F.hardtanh(x, min_val=0.5), False),
        (lambda x: F.relu(x), True),
        (lambda x: torch.sigmoid(x), False),
    ],
)
def test_an_operation_stays_clean_only_if_it_keeps_zeros(operation, clean):
    x = small_map()
    found = operation(x)
    assert found.clean == clean
    assert x.clean  # it is another memory
    assert not clean or (torch.Tensor(cleaned(found)) == 0).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :2],
        lambda x: x.split(2, 1)[0],
        lambda x: torch.chunk(x, 2, 1)[1],
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.contiguous(),
        lambda x: x.detach(),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.dropout(x, 0.5, training=False),
    ],
)
def test_a_change_of_a_view_in_place_concerns_the_map(view):
    x = small_map()
    view(x).add_(1.0)
    assert not x.clean
    assert (cleaned(x)[:, :, 0, 1] == 0).all()  # a hidden cell
