# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Heads: their numbers, worked out by hand, and where they are put in networks.

python -m pytest tests/models/test_heads.py
"""

import argparse
import copy
import math

import pytest
import torch
from torch import nn

import models
from config import parser as options
from config.calls import parse_call
from errors import UserError
from models.attach import add_heads, replace_classifier
from models.heads import (
    HEADS,
    NUMBERS,
    SIGMOIDS,
    Conv,
    HeadOptions,
    Linear,
    check_heads,
    create_head,
    implied_activation,
    is_plain,
    parse_heads,
)
from models.parts import find_classifier, freeze_backbone, training_mode
from optim_factory import LayerDecayValueAssigner
from tests import tiny
from training.criterion import Criterion
from training.head_losses import HeadLosses
from training.losses import LOSSES, TORCH_LOSSES
from training.setup import check_start
from weights.fit import fit_weights

SIZE = (3, 16, 16)
OPTIONS = HeadOptions("--head", 3)


class Net(nn.Module):
    """stem (2 channels) -> ReLU in place -> body (4 channels) -> mean -> fc."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 2, 4, stride=4), nn.ReLU(inplace=True)
        self.body, self.fc = nn.Conv2d(2, 4, 1), nn.Linear(4, num_classes)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(self.act(self.stem(images)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.forward_features(images).mean((-2, -1)))


def with_heads(text: str, model: nn.Module | None = None, size: tuple = SIZE) -> nn.Module:
    model = model or Net()
    add_heads(model, parse_heads(text), size, HeadOptions("--heads", 3))
    return model


def with_head(text: str, model: nn.Module, size: tuple = SIZE) -> nn.Module:
    replace_classifier(model, parse_call(text, "--head"), size, OPTIONS)
    return model


def head(text: str, dim: int = 2, **options) -> nn.Module:
    return create_head(parse_call(text, "--head"), dim, HeadOptions("--head", 3, **options))


def flags(**changes) -> argparse.Namespace:
    own = {"model": "tests.tiny:classifier", "in_chans": 3, "stem_stride": 1, "drop_path": 0.0}
    own |= {"head_init_scale": 1.0, "grad_checkpointing": False, "freeze_backbone": False}
    own |= {"eval": False, "compile": False, "head": "", "heads": "", "loss": "ce"}
    return argparse.Namespace(**own | {"input_size": SIZE[1:]} | changes)


# --- numbers --------------------------------------------------------------------------------------


def test_conv_in_evaluation_is_the_mean_of_the_probabilities_of_its_windows():
    conv = head("conv(pool=2)").double().eval()
    x = torch.randn(4, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    windows = [x[:, :, i : i + 2, j : j + 2].mean((-2, -1)) for i in range(2) for j in range(4)]
    scores = [window @ conv.weight.T + conv.bias for window in windows]
    for name in ("softmax", "sigmoid"):
        conv = head("conv(pool=2)", activation=name).double().eval()
        conv.load_state_dict({"weight": conv.weight, "bias": conv.bias})
        scores = [window @ conv.weight.T + conv.bias for window in windows]
        act = torch.sigmoid if name == "sigmoid" else lambda s: s.exp() / s.exp().sum(1)[:, None]
        expected = sum(act(score) for score in scores) / 8
        got = torch.sigmoid(conv(x)) if name == "sigmoid" else conv(x).softmax(1)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
        gradients = [torch.autograd.grad(y[:, 0].sum(), x, retain_graph=True)[0]
                     for y in (got, expected)]  # fmt: skip
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)
    mean = head("conv(pool=2, activation=identity)").double().eval()
    expected = sum(window @ mean.weight.T + mean.bias for window in windows) / 8
    torch.testing.assert_close(mean(x), expected, atol=1e-12, rtol=1e-12)


def test_conv_without_pool_has_one_window_at_the_size_of_training():
    conv, small, large = head("conv"), torch.randn(2, 2, 2, 2), torch.randn(2, 2, 2, 3)
    expected = small.mean((-2, -1)) @ conv.weight.T + conv.bias
    torch.testing.assert_close(conv.train()(small), expected)
    torch.testing.assert_close(conv.eval()(small), expected)
    assert conv.trained_size.tolist() == [2, 2]
    other = head("conv")
    other.load_state_dict(conv.state_dict())  # a checkpoint that another process evaluates
    parts = [other.eval()(large[..., i : i + 2]).softmax(1) for i in range(2)]
    torch.testing.assert_close(other(large).softmax(1), sum(parts) / 2)


def test_windows_larger_than_the_map_are_for_smaller_images_in_evaluation_alone():
    """Training took them as windows of the size of the map, without a word."""
    problem = "pool=5 is larger than the map of 4 x 4 positions; give pool=4 or less, larger images"
    with pytest.raises(UserError, match=f"--head conv.*: {problem}"):
        with_head("conv(pool=5)", Net())
    with pytest.raises(UserError, match=f"--heads conv.*: {problem}"):
        with_heads("main=linear@body, aux=conv(pool=5)@stem")
    with pytest.raises(UserError, match="the map of 2 x 2"):  # (N, h, w, C)
        models.build_classifier(flags(heads="main=conv(pool=4)@stages.3"), 3)
    model = models.build_classifier(flags(head="conv(pool=4)", eval=True), 3).eval()
    x = torch.randn(1, 10, 2, 2)
    expected = x.mean((-2, -1)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model.head(x), expected)
    with pytest.raises(UserError, match="the map of 2 x 2"):
        model.head.train()(x)
    assert with_head("conv(pool=4)", Net()).fc.pool == 4


def test_linear_takes_l2_norm_planes_and_zero_bias():
    x = torch.tensor([[[[3.0]], [[4.0]]]]).expand(1, 2, 2, 2)
    unit = head("norm_linear(zero_init_bias=true)")
    assert unit.bias.tolist() == [0, 0, 0]
    torch.testing.assert_close(unit(x), torch.tensor([[0.6, 0.8]]) @ unit.weight.T)
    normed = head("linear(norm=true, zero_init_bias=true)")
    layer = torch.tensor([[-1.0, 1.0]])  # (3 - 3.5) / 0.5
    torch.testing.assert_close(normed(x), layer @ normed.weight.T, atol=1e-4, rtol=1e-4)
    planes = head("linear(planes=5, act=silu)").eval()
    y = nn.functional.silu(planes.project[0](x) / math.sqrt(1 + 1e-5)).mean((-2, -1))
    torch.testing.assert_close(planes(x), y @ planes.weight.T + planes.bias)
    assert planes.takes_maps
    assert not unit.takes_maps


def test_mlp_and_vit_tanh_compute_what_their_names_say():
    x = torch.randn(3, 2)
    mlp = head("mlp(4, dropout=0.5, act=relu)").eval()
    hidden = (x @ mlp.fc1.weight.T + mlp.fc1.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
    vit = head("vit_tanh(hidden=5)")
    assert vit(x).abs().max() == 0  # as in ClassyVision
    nn.init.ones_(vit.logits.weight)
    hidden = (x @ vit.pre_logits.weight.T + vit.pre_logits.bias).tanh()
    torch.testing.assert_close(vit(x), hidden.sum(1, keepdim=True).expand(3, 3))


def test_tokens_are_averaged_without_the_first_ones_or_the_class_token_is_taken():
    linear, tokens = head("linear"), torch.randn(2, 4, 2)
    linear.neck.prefix_tokens = 1
    torch.testing.assert_close(linear(tokens), linear(tokens[:, 1:].mean(1)))
    linear.neck.class_token = True
    torch.testing.assert_close(linear(tokens), linear(tokens[:, 0]))


def test_head_init_scale_acts_on_the_last_layer_alone():
    torch.manual_seed(0)
    one = head("mlp(4)")
    torch.manual_seed(0)
    half = head("mlp(4)", scale=0.5)
    torch.testing.assert_close(half.fc2.weight, 0.5 * one.fc2.weight)
    torch.testing.assert_close(half.fc2.bias, 0.5 * one.fc2.bias)
    torch.testing.assert_close(half.fc1.weight, one.fc1.weight)


def test_the_loss_chooses_the_activation_of_conv():
    for name, row in LOSSES.items():
        kinds = set(row.takes.split())
        assert (name in NUMBERS) == (kinds == {"number"}), name
        assert (name in SIGMOIDS) <= ("multi" in kinds), name
    for name, (kinds, _) in TORCH_LOSSES.items():
        assert (name in NUMBERS) == (kinds == "number"), name
    assert implied_activation("0.5*bce + ce") == "sigmoid"
    assert implied_activation("main=zlpr, aux=ce") == "sigmoid"
    assert implied_activation("l1") == "identity"
    assert implied_activation("focal(gamma=2)") == "softmax"


# --- in place of the classifier -------------------------------------------------------------------


def test_a_plain_linear_head_has_the_names_and_numbers_of_the_own_classifier():
    own = tiny.classifier(num_classes=3, stem_stride=1)
    new = with_head("linear", tiny.classifier(num_classes=3, stem_stride=1))
    new.load_state_dict(own.state_dict())
    images = torch.randn(2, *SIZE)
    assert torch.equal(new.eval()(images), own.eval()(images))


@pytest.mark.parametrize("text", ["mlp(4)", "conv", "linear(planes=4)", "vit_tanh(4)"])
def test_all_parameters_of_a_head_are_the_classifier(text):
    model = with_head(text, tiny.classifier(num_classes=3, stem_stride=1))
    assert find_classifier(model) == ("head.",)
    model(torch.randn(2, *SIZE)).square().sum().backward()
    lacking = [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert lacking == []
    assigner = LayerDecayValueAssigner(model, 0.5)
    top = {assigner.get_layer_id(n) for n, _ in model.named_parameters() if n.startswith("head.")}
    rest = {assigner.get_layer_id(n) for n, _ in model.named_parameters() if n[:5] != "head."}
    assert top == {max(rest) + 1}
    freeze_backbone(model)
    training_mode(model)
    assert all(p.requires_grad == n.startswith("head.") for n, p in model.named_parameters())
    assert model.head.training
    assert not model.stages.training


def test_conv_gets_the_normalized_map_of_a_convnext():
    model = with_head("conv", tiny.classifier(num_classes=3, stem_stride=1)).eval()
    images = torch.randn(2, *SIZE)
    x = model.norm(model.forward_features(images).permute(0, 2, 3, 1)).mean((1, 2))
    torch.testing.assert_close(model(images), x @ model.head.weight.T + model.head.bias)


def test_conv_replaces_what_follows_the_map_of_other_networks():
    model = with_head("conv", Net()).eval()
    images = torch.randn(2, *SIZE)
    x = model.forward_features(images).mean((-2, -1))
    torch.testing.assert_close(model(images), x @ model.fc.weight.T + model.fc.bias)
    copied = copy.deepcopy(model)
    nn.init.zeros_(model.fc.weight)
    assert not torch.equal(copied(images), model(images))  # a copy, as of EMA, has its own head


def test_a_head_that_cannot_be_put_in_place_is_refused_with_the_fix():
    two = Net()
    two.fc = nn.Conv2d(4, 3, 1)
    with pytest.raises(UserError, match="is Conv2d, expected one Linear; use --heads main=mlp@"):
        with_head("mlp", two)
    with pytest.raises(UserError, match="Other has no forward_features.*--heads main=conv@BLOCK"):
        with_head("conv", tiny.other(3))
    mlp = models.create_model("mlp(hidden_dims=[4])", input_size=16, num_classes=3)
    with pytest.raises(UserError, match=r"conv needs a map .*features of shape \(2, 4\)"):
        with_head("conv", mlp)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lineer", "--head: unknown head 'lineer'. Did you mean 'linear'"),
        ("mlp(hid=3)", "'hid'; it takes hidden=None, dropout=0.0, act=gelu"),
        ("mlp(hidden=many)", "hidden is 'many', expected an integer"),
        ("mlp(dropout=1)", "dropout is 1, expected at least 0 and below 1"),
        ("conv(pool=0)", "pool is 0, expected integers above 0"),
        ("conv(activation=tanh)", "activation is 'tanh', expected softmax"),
        ("linear(act=silu)", "act=silu is for planes"),
        ("identity", "there are 2 features and 3 classes; use linear"),
        ("tests.tiny:colors(3)", "tests.tiny:colors"),
    ],
)
def test_wrong_arguments_of_a_head_are_refused(text, problem):
    with pytest.raises(UserError) as error:
        head(text)
    assert problem in str(error.value)


def own_head(dim: int, num_classes: int, size: int = 1) -> nn.Module:
    """A user's head, which no check may call: it may need real tensors."""
    raise RuntimeError("called")


def parsed(*words: str) -> argparse.Namespace:
    return options.parse(options.finetune_parser(), ["--data_set", "DIGITS", *words])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("linear(act=silu)", "--head linear(act='silu'): act=silu is for planes"),
        ("mlp(hidden=many)", "hidden is 'many', expected an integer"),
        (f"{__name__}:own_head(speed=2)", "keyword argument 'speed'; it takes size=1"),
        ("os:sep", "'/' is not a callable object; give a function or a class"),
    ],
)
def test_arguments_of_heads_are_checked_before_the_data_is_listed_for_networks_with_code(
    text, problem
):
    with pytest.raises(UserError) as error:
        check_heads(parsed("--model", "tests.tiny:classifier", "--head", text))
    assert problem in str(error.value)


def test_a_check_does_not_call_a_users_head():
    for words in (["--head", f"{__name__}:own_head"], ["--heads", f"a={__name__}:own_head@norm"]):
        args = parsed("--model", "convnextv2_atto", *words)
        check_heads(args)
        check_start(args, None)


def test_identity_fits_if_the_data_tells_the_number_of_classes():
    """There were 1000 classes until then."""
    words = ["--model", "mlp(hidden_dims=[10])", "--input_size", "8", "--head", "identity"]
    check_start(parsed(*words), None)
    with pytest.raises(UserError, match="there are 10 features and 7 classes"):
        check_start(parsed(*words, "--nb_classes", "7"), None)


def test_which_heads_other_libraries_can_have():
    assert is_plain("")
    assert is_plain("linear(zero_init_bias=true)")
    for text in ("linear(l2=true)", "norm_linear", "mlp", "conv", "linear(true)"):
        assert not is_plain(text)
    assert set(HEADS) == {"linear", "norm_linear", "mlp", "conv", "vit_tanh", "identity"}
    assert issubclass(Conv, Linear)


# --- on blocks ------------------------------------------------------------------------------------


def test_heads_see_the_features_of_their_blocks_before_an_activation_in_place():
    model = with_heads("main=linear@body, aux=linear@stem")
    images = torch.randn(2, *SIZE)
    outputs = model.train()(images)
    features = {"aux": model.stem(images), "main": model.forward_features(images)}
    assert list(outputs) == ["main", "aux"]
    for name, x in features.items():
        layer = model.named_heads[name]
        expected = x.mean((-2, -1)) @ layer.weight.T + layer.bias
        torch.testing.assert_close(outputs[name], expected)
    assert torch.equal(model.eval()(images), model.train()(images)["main"])
    assert model.named_heads.found == {}  # no features are kept in memory


def test_the_own_classifier_stays_only_for_a_head_on_it():
    gone = with_heads("main=linear@body")
    assert isinstance(gone.fc, nn.Identity)
    assert gone.train()(torch.randn(2, *SIZE)).shape == (2, 3)  # one head: no dict
    own = Net()
    weights = copy.deepcopy(own.state_dict())
    kept = with_heads("main=identity@fc, aux=mlp@stem", own)
    assert torch.equal(kept.fc.weight, weights["fc.weight"])
    assert find_classifier(kept) == ("named_heads.main.", "named_heads.aux.", "fc.")


def test_blocks_of_a_convnext_are_channels_last_and_a_stage_stands_for_its_last_block():
    model = with_heads(
        "main=conv@stages.2, aux=linear@norm", tiny.classifier(num_classes=3, stem_stride=1)
    )
    assert model.named_heads.blocks == {"main": "stages.2.0", "aux": "norm"}
    assert model.named_heads["main"].weight.shape == (3, 8)
    images = torch.randn(2, 3, 32, 32)
    maps = model.forward_intermediates(images)[1]
    main = model.train()(images)["main"]
    layer = model.named_heads["main"]
    torch.testing.assert_close(main, maps[2].mean((-2, -1)) @ layer.weight.T + layer.bias)


def test_a_head_on_a_list_sees_its_output_although_its_last_item_has_another_place_too():
    model, act = Net(), nn.ReLU()
    model.stem, model.act = nn.Sequential(nn.Sequential(model.stem, act)), act
    model.body = nn.Sequential(model.body, nn.Sequential(nn.BatchNorm2d(4), act))
    with_heads("main=linear@body, aux=linear@stem", model)
    images = torch.randn(2, *SIZE)
    aux, layer = model.train()(images)["aux"], model.named_heads["aux"]
    x = model.stem(images).mean((-2, -1))
    torch.testing.assert_close(aux, x @ layer.weight.T + layer.bias)


def test_parameters_behind_all_heads_are_frozen_since_ddp_needs_gradients():
    model = with_heads("main=linear@stem")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    named = ["named_heads.main.weight", "named_heads.main.bias"]
    assert trained == ["stem.weight", "stem.bias", *named]


class Spare(nn.Linear):
    """A user's head with a parameter that it does not use."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        self.spare, self.takes_maps = nn.Parameter(torch.ones(2)), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mean((-2, -1)))


def test_a_frozen_backbone_trains_every_head_and_what_no_head_uses_stays_frozen():
    """Only the first head was called, so that the others got no gradient."""
    heads = f"main=linear@norm, aux=conv@stages.2, last={__name__}:Spare@stages.1"
    model = models.build_classifier(flags(heads=heads, freeze_backbone=True), 3)
    training_mode(model)
    loss = HeadLosses(dict.fromkeys(model.named_heads, Criterion()))
    loss(model(torch.randn(2, *SIZE)), torch.tensor([0, 1])).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    wanted = ("main", "aux", "last")
    assert trained == {
        f"named_heads.{name}.{kind}" for name in wanted for kind in ("weight", "bias")
    }
    assert model.named_heads["aux"].trained_size.tolist() == [4, 4]
    assert [name for name, m in model.named_modules() if m.training and "head" not in name] == []


def test_a_copy_of_a_network_calls_its_own_heads():
    model = with_heads("main=linear@body, aux=linear@stem")
    copied, images = copy.deepcopy(model), torch.randn(2, *SIZE)
    nn.init.zeros_(model.named_heads["aux"].weight)
    nn.init.zeros_(model.named_heads["aux"].bias)
    assert copied(images)["aux"].abs().max() > 0
    assert model(images)["aux"].abs().max() == 0


def test_heads_are_the_last_layer_of_a_network_that_knows_its_own_names_alone():
    class Layered(Net):
        def layer_of(self, name: str, kind: str) -> int:
            return {"stem": 0, "body": 1, "head": 2}[name.partition(".")[0] or "head"]

    assigner = LayerDecayValueAssigner(with_heads("main=mlp@body, aux=mlp@stem", Layered()), 0.5)
    names = ("stem.weight", "body.bias", "named_heads.aux.fc1.weight")
    assert [assigner.get_scale(assigner.get_layer_id(name)) for name in names] == [0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("main=linear@boddy", "unknown block 'boddy'. Did you mean 'body'? Blocks: stem, act"),
        ("main=linear@", "expected main=HEAD@BLOCK"),
        ("main=conv@fc", r"conv needs a map (N, C, h, w), and fc gives (2, 3); use linear or mlp"),
        ("keys=linear@body", "a head cannot be called 'keys'"),
        ("a=linear@body,a=linear@stem", "a is given twice"),
        ("linear@body", "expected NAME=VALUE"),
    ],
)
def test_wrong_heads_are_refused(text, problem):
    with pytest.raises(UserError) as error:
        with_heads(text)
    assert problem in str(error.value)


def test_an_uncalled_block_is_refused():
    model = Net()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(UserError, match="spare is not called by Net; choose another"):
        with_heads("main=linear@spare", model)


def test_the_flags_reach_heads_and_activation():
    model = models.build_classifier(flags(heads="main=conv@stages.1", loss="zlpr"), 3)
    torch.manual_seed(0)
    scores = torch.randn(1, 4, 3)
    mean = scores.sigmoid().mean(1)
    torch.testing.assert_close(model.named_heads["main"].activation(scores).sigmoid(), mean)
    plain = models.build_classifier(flags(), 3)
    assert not hasattr(plain, "named_heads")
    assert not plain._forward_hooks


# --- weights --------------------------------------------------------------------------------------


def test_weights_keep_heads_that_fit_and_get_new_ones_otherwise():
    saved = with_heads("main=linear@body, aux=linear@stem").state_dict()
    model = with_heads("main=linear@body, aux=mlp@stem, more=linear@stem")
    state, report = fit_weights(model, saved, ("head.",))
    assert sorted(n for n in state if "head" in n) == [
        "named_heads.main.bias", "named_heads.main.weight",
    ]  # fmt: skip
    assert report.warnings == ["its head aux is of another kind, so the model gets a new head"]
    state, _ = fit_weights(Net(), saved, ("head.",))  # without heads: the backbone
    assert sorted(state) == ["body.bias", "body.weight", "stem.bias", "stem.weight"]


def test_reset_head_leaves_out_a_head_that_fits():
    saved, model = Net().state_dict(), Net()
    assert "fc.weight" in fit_weights(model, saved, ("head.",))[0]
    state, report = fit_weights(model, saved, ("head.",), reset_head=True)
    assert sorted(state) == ["body.bias", "body.weight", "stem.bias", "stem.weight"]
    assert report.dropped == ["fc.weight", "fc.bias"]


def test_an_mlp_head_does_not_keep_the_backbone_from_loading():
    saved = with_head("mlp(4)", Net()).state_dict()
    state, report = fit_weights(Net(), saved, ("head.",))
    assert sorted(state) == ["body.bias", "body.weight", "stem.bias", "stem.weight"]
    assert report.warnings == ["its head is of another kind, so the model gets a new head"]
