# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parameter groups, optimizers by name."""

import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.optim import list_optimizers, param_groups_weight_decay
from torch import nn

from config import parser as options
from data_loading.rng import seed_all
from errors import UserError
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from optim_factory import (
    LayerDecayValueAssigner,
    build_optimizer,
    build_optimizer_call,
    create_optimizer,
    get_parameter_groups,
    matches,
    scale_lr,
)
from parallel.state_dict import tensor_leaves
from training.checkpoint import (
    TrainableParts,
    TrainState,
    collect_checkpoint,
    restore_run,
    write_checkpoint,
)
from training.schedules import Schedule
from training.stepper import Stepper


def classifier(depths=(1, 1, 2, 1)) -> ConvNeXtV2:
    torch.manual_seed(0)
    return ConvNeXtV2(depths, (4, 6, 8, 10), num_classes=3)


def fcmae() -> FCMAE:
    torch.manual_seed(0)
    return FCMAE(ConvNeXtV2((1, 1, 2, 1), (4, 6, 8, 10)), decoder_embed_dim=12)


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """Parameter name -> its group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert len(found) == len(set(found))  # none twice
    return {names[id(p)]: group for group in groups for p in group["params"]}


# --- weight decay ---------------------------------------------------------------------------

MATRICES = {"dwconv.weight", "pwconv1.weight", "pwconv2.weight"}
SPARED = {
    *("dwconv.bias", "norm.weight", "norm.bias", "pwconv1.bias", "grn.gamma", "grn.beta"),
    "pwconv2.bias",
}


def expected_decay(model: nn.Module) -> dict[str, bool]:
    """Name -> decayed, block by block from the two sets above, the rest spelled out."""
    rest = {
        "downsample_layers.0.0.weight": True,
        "downsample_layers.0.0.bias": False,
        "downsample_layers.0.1.weight": False,
        "downsample_layers.0.1.bias": False,
    }
    for i in (1, 2, 3):
        rest[f"downsample_layers.{i}.0.weight"] = False
        rest[f"downsample_layers.{i}.0.bias"] = False
        rest[f"downsample_layers.{i}.1.weight"] = True
        rest[f"downsample_layers.{i}.1.bias"] = False
    for block in ("stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"):
        rest |= {f"{block}.{name}": True for name in MATRICES}
        rest |= {f"{block}.{name}": False for name in SPARED}
    if isinstance(model, ConvNeXtV2):
        ends = {"norm.weight": False, "norm.bias": False, "head.weight": True, "head.bias": False}
        return rest | ends
    decoder = {f"decoder.0.{name}": True for name in MATRICES}
    decoder |= {f"decoder.0.{name}": False for name in SPARED}
    ends = {"proj.weight": True, "proj.bias": False, "mask_token": False}
    ends |= {"pred.weight": True, "pred.bias": False}
    return {f"encoder.{name}": value for name, value in rest.items()} | decoder | ends


@pytest.mark.parametrize("make", [classifier, fcmae])
def test_only_matrices_are_decayed(make):
    """Official pre-training decayed GRN and the mask token, its fine-tuning did not."""
    model = make()
    groups = by_name(model, get_parameter_groups(model, 0.3))
    assert {name: group["decayed"] for name, group in groups.items()} == expected_decay(model)
    for name, group in groups.items():
        assert group["weight_decay"] == (0.3 if group["decayed"] else 0.0), name
        assert group["lr_scale"] == 1.0


def test_frozen_parameters_are_in_no_group():
    model = classifier()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    assert set(by_name(model, get_parameter_groups(model, 0.3))) == {"head.weight", "head.bias"}


class Wrapped(nn.Module):
    """A network of timm as a part of one's own."""

    def __init__(self, name: str, **sizes) -> None:
        super().__init__()
        self.body = timm.create_model(name, **sizes)


VIT = {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 1}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1)}


@pytest.mark.parametrize(
    ("name", "sizes", "exempt"),
    [
        ("vit_tiny_patch16_224", VIT, {"pos_embed", "cls_token"}),
        (
            "swin_tiny_patch4_window7_224",
            SWIN | {"num_heads": (1, 1)},
            {f"layers.{n}.blocks.0.attn.relative_position_bias_table" for n in (0, 1)},
        ),
    ],
)
def test_what_a_network_of_timm_exempts_is_not_decayed(name, sizes, exempt):
    """Position embeddings and tokens have more than one dimension, so they were decayed."""
    wrapped = Wrapped(name, num_classes=3, **sizes)
    for model, prefix in ((wrapped, "body."), (wrapped.body, "")):
        groups = by_name(model, get_parameter_groups(model, 0.3))
        ours = {name for name, group in groups.items() if not group["decayed"]}
        (undecayed, _) = param_groups_weight_decay(
            wrapped.body, 0.3, no_weight_decay_list=wrapped.body.no_weight_decay()
        )
        timms = by_name(wrapped.body, [undecayed])
        assert ours == {prefix + name for name in timms}
        assert {prefix + name for name in exempt} <= ours


def test_exempt_names_may_be_patterns():
    """As in timm's own parameter groups."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.no_weight_decay = lambda: {"1.w*"}
    groups = by_name(model, get_parameter_groups(model, 0.3))
    assert [name for name, group in groups.items() if group["decayed"]] == ["0.weight"]


# --- layer decay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "depths", "powers"),
    [
        (  # layers: stem 0, five blocks 1 to 5, head 6; powers are distances from the head
            "single",
            (1, 1, 2, 1),
            {
                "downsample_layers.0.0.weight": 6,
                "stages.0.0.grn.beta": 5,
                "downsample_layers.1.1.weight": 4,
                "stages.1.0.dwconv.weight": 4,
                "downsample_layers.2.0.bias": 3,
                "stages.2.0.norm.weight": 3,
                "stages.2.1.pwconv1.weight": 2,
                "stages.3.0.pwconv2.bias": 1,
                "norm.weight": 1,
                "head.weight": 0,
                "head.bias": 0,
            },
        ),
        (  # layers: stem 0, stages 1, 2, thirds of stage 2: 3, 4, stage 3: 5, head 6
            "group",
            (2, 1, 4, 1),
            {
                "downsample_layers.0.1.bias": 6,
                "stages.0.0.dwconv.weight": 5,
                "stages.0.1.dwconv.weight": 5,
                "downsample_layers.1.1.weight": 4,
                "stages.1.0.dwconv.weight": 4,
                "downsample_layers.2.1.weight": 3,
                "stages.2.2.grn.gamma": 3,
                "stages.2.3.grn.gamma": 2,
                "downsample_layers.3.1.bias": 1,
                "stages.3.0.norm.bias": 1,
                "norm.bias": 1,
                "head.weight": 0,
            },
        ),
    ],
)
def test_rate_falls_by_half_with_each_layer_from_the_head(kind, depths, powers):
    model = classifier(depths)
    assigner = LayerDecayValueAssigner(model, 0.5, kind)
    groups = by_name(model, get_parameter_groups(model, 0.05, assigner))
    assert len(groups) == len(list(model.parameters()))
    assert {name: groups[name]["lr_scale"] for name in powers} == {
        name: 0.5**power for name, power in powers.items()
    }
    decayed = {name: group["decayed"] for name, group in groups.items()}
    assert decayed["head.weight"]
    assert not decayed["head.bias"]


def test_layer_decay_of_a_model_without_layers_is_refused():
    with pytest.raises(
        UserError,
        match="--layer_decay 0.9 needs a model.*layer_of.*FCMAE has none: use --layer_decay 1",
    ):
        create_optimizer(fcmae(), lr=1.0, layer_decay=0.9)


# --- optimizers by name ---------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lion", "AdamW"])
def test_any_optimizer_of_timm_steps_by_its_name(opt):
    model = classifier()
    optimizer = create_optimizer(model, opt, lr=0.1, weight_decay=0.3)
    assert type(optimizer).__name__.lower().startswith(opt.lower())
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.3 if group["decayed"] else 0.0)
    before = [parameter.clone() for parameter in model.parameters()]
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("name", ["foreach", "differentiable", "capturable", "fused"])
def test_a_choice_of_kernels_is_the_users(name):
    options = {name: name != "capturable"}  # it needs a GPU
    optimizer = create_optimizer(nn.Linear(2, 2), lr=0.1, **options)
    assert optimizer.defaults[name] == options[name]
    with pytest.raises(UserError, match="cannot be"):
        create_optimizer(nn.Linear(2, 2), lr=0.1, fused=True, foreach=True)


def test_sgd_steps_by_hand():
    """Momentum 0.5 with Nesterov: the step is g + 0.5 g; decay 0.2 of the weight joins g."""
    layer = nn.Linear(1, 1).double()
    layer.weight.data[:], layer.bias.data[:] = 2.0, 3.0
    optimizer = create_optimizer(layer, "sgd", lr=0.1, weight_decay=0.2, momentum=0.5)
    layer.weight.grad, layer.bias.grad = (torch.ones_like(p) for p in (layer.weight, layer.bias))
    optimizer.step()
    assert layer.weight.item() == pytest.approx(2 - 0.1 * 1.5 * 1.4)
    assert layer.bias.item() == pytest.approx(3 - 0.1 * 1.5)


def test_unknown_optimizer_is_an_error_that_names_the_right_one():
    with pytest.raises(UserError, match="unknown optimizer 'adamww'.*'adamw'"):
        create_optimizer(classifier(), "adamww", lr=1.0)


@pytest.mark.parametrize(
    ("opt", "given"),
    [
        ("sgd", {"eps": 1e-6}),
        ("sgd", {"betas": (0.9, 0.95)}),
        ("lion", {"eps": 1e-6}),
    ],
)
def test_option_that_an_optimizer_does_not_have_is_refused(opt, given):
    with pytest.raises(UserError, match=f"--opt {opt}.*{next(iter(given))}"):
        create_optimizer(classifier(), opt, lr=1.0, **given)


def test_given_eps_and_betas_reach_the_optimizer():
    optimizer = create_optimizer(classifier(), lr=1.0, eps=1e-5, betas=(0.8, 0.7))
    for group in optimizer.param_groups:
        assert (group["eps"], group["betas"]) == (1e-5, (0.8, 0.7))


def test_flags_reach_the_optimizer():
    flags = {"opt": "sgd", "weight_decay": 0.3, "opt_eps": None, "opt_betas": None}
    flags |= {"layer_decay": 0.1, "layer_decay_type": "group", "momentum": 0.6}
    flags |= dict.fromkeys(("param_group", "no_weight_decay", "freeze"))
    optimizer = build_optimizer(SimpleNamespace(**flags), classifier(), 0.5)
    scales = {round(group["lr_scale"], 9) for group in optimizer.param_groups}
    assert scales == {round(0.1**k, 9) for k in range(6)}  # stem, 1, 2, one third, 4, head
    assert {group["momentum"] for group in optimizer.param_groups} == {0.6}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}
    flags |= {"opt": "adamw", "opt_eps": 1e-5, "opt_betas": [0.8, 0.7]}
    for group in build_optimizer(SimpleNamespace(**flags), classifier(), 0.5).param_groups:
        assert (group["eps"], group["betas"]) == (1e-5, (0.8, 0.7))


@pytest.mark.parametrize("opt", ["adamw", "lion", "adopt", "lookahead_adamw"])
@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.95, 0.99)])
def test_wrong_number_of_betas_is_refused(opt, betas):
    """It was a traceback, in some optimizers from the first step."""
    with pytest.raises(
        UserError, match=rf"--opt {opt} takes 2 --opt_betas \(default 0.9 0.99"
    ) as e:
        create_optimizer(classifier(), opt, lr=1.0, betas=betas)
    assert str(e.value).endswith(f"), got {len(betas)}")


def test_adan_takes_three_betas():
    with pytest.raises(UserError, match=r"takes 3 --opt_betas \(default 0.98 0.92 0.99\), got 2"):
        create_optimizer(classifier(), "adan", lr=1.0, betas=(0.9, 0.95))
    optimizer = create_optimizer(classifier(), "adan", lr=1.0, betas=(0.9, 0.8, 0.7))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.8, 0.7)


def test_momentum_of_an_optimizer_that_has_none_is_refused():
    """It was ignored. Files hold the flag with its default or with that of another optimizer."""
    words = ["--data_set", "DIGITS", "--momentum", "0.8", "--opt"]

    def read(opt: str, *more: str) -> str:
        parser = options.finetune_parser()
        return build_optimizer_call(options.parse(parser, [*words, opt, *more])).name

    for opt in ("adamw", "adadelta(rho=0.8)"):
        with pytest.raises(UserError, match=rf"--opt {opt[:8]}.* has no momentum; drop --momentum"):
            read(opt)
    assert read("adamw", "--momentum", "0.9") == "adamw"
    assert read("adamw", "--eval", "--resume", "x") == "adamw"
    assert [read(opt) for opt in ("sgd", "rmsproptf", "lookahead_sgd")] == [
        "sgd", "rmsproptf", "lookahead_sgd",
    ]  # fmt: skip
    assert build_optimizer_call(SimpleNamespace(opt="adamw", momentum=0.8)).name == "adamw"


def test_optimizer_without_default_betas_has_none():
    """Their number could not be compared, which was a traceback."""
    with pytest.raises(UserError, match="adafactor has no betas; drop --opt_betas"):
        create_optimizer(classifier(), "adafactor", lr=1.0, betas=(0.9, 0.99))


@pytest.mark.parametrize(
    ("opt", "package"), [("bnbadamw8bit", "bitsandbytes"), ("fusedlamb", "NVIDIA's apex")]
)
@pytest.mark.parametrize("has_gpu", [False, True])
def test_optimizer_of_an_absent_package_is_an_error_that_names_it(
    opt, package, has_gpu, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if they were not installed
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    expected = rf"--opt {opt} needs a CUDA GPU and {package} \(.*\); try --opt adamw"
    with pytest.raises(UserError, match=expected):
        create_optimizer(classifier(), opt, lr=1.0)


OTHER_PACKAGES = ("bnb", "fused")
OPTIMIZERS = [opt for opt in list_optimizers() if not opt.startswith(OTHER_PACKAGES)]


def steps(parts: TrainableParts, numbers: range) -> None:
    """Train one step for each number."""
    stepper = Stepper(parts.model, parts.optimizer, torch.device("cpu"))
    stepper.begin_epoch(len(numbers))
    with torch.compiler.set_stance("force_eager"):  # kron would compile
        for number in numbers:
            seed_all(0, number, 0, 0)  # as the engines do
            with stepper.micro_batch():
                loss = parts.model(torch.randn(4, 3, 4, 4)).square().mean()
            assert stepper.step(loss).taken


def parts_of(opt: str, seed: int = 0) -> TrainableParts:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)
    model = nn.Sequential(*layers)
    return TrainableParts(model, create_optimizer(model, opt, lr=0.01, seed=seed))


@pytest.mark.parametrize("opt", [*OPTIMIZERS, "lookahead_adamw", "lookahead_adahessian"])
def test_resumed_optimizer_continues_bit_for_bit(opt, tmp_path):
    """adahessian's noise began again at the first step."""
    whole = parts_of(opt)
    steps(whole, range(3))
    write_checkpoint(collect_checkpoint(whole, TrainState(), {}), tmp_path / "a.pth")
    steps(whole, range(3, 8))
    resumed = parts_of(opt)
    restore_run(torch.load(tmp_path / "a.pth", weights_only=True), "a.pth", resumed)
    steps(resumed, range(3, 8))
    ends = [tensor_leaves(parts.model.state_dict()) for parts in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    states = [tensor_leaves(parts.optimizer.state_dict()["state"]) for parts in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("opt", ["adahessian", "kron"])
def test_noise_of_an_optimizer_depends_on_seed_and_step_alone(opt):
    """With noise of their own, two processes took steps of their own."""

    def run(seed: int, rank: int) -> list[torch.Tensor]:
        parts = parts_of(opt, seed)
        stepper = Stepper(parts.model, parts.optimizer, torch.device("cpu"))
        stepper.begin_epoch(3)
        images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        with torch.compiler.set_stance("force_eager"):
            for step in range(3):
                seed_all(seed, step, 0, rank)
                stepper.step(parts.model(images).square().mean())
        return list(parts.model.parameters())

    first = run(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, run(0, 1), strict=True))
    assert not torch.equal(first[0], run(1, 0)[0])


# --- learning rate ----------------------------------------------------------------------------


def test_lr_follows_the_linear_rule_unless_it_is_given():
    assert scale_lr(None, 1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scale_lr(None, 5e-4, 128) == pytest.approx(2.5e-4)
    assert scale_lr(0.1, 5e-4, 4096) == 0.1
    assert scale_lr(0.0, 5e-4, 4096) == 0.0


# --- rules of the user -------------------------------------------------------------------------


def flags(**changes) -> SimpleNamespace:
    """Flags of build_optimizer."""
    values = {"opt": "adamw", "weight_decay": 0.3, "opt_eps": None, "opt_betas": None}
    values |= dict.fromkeys(("param_group", "no_weight_decay", "freeze"))
    return SimpleNamespace(**values | {"momentum": 0.9} | changes)


def built(model: nn.Module, **changes) -> dict[str, dict]:
    """Parameter name -> its group in the optimizer of the flags."""
    return by_name(model, build_optimizer(flags(**changes), model, 0.5).param_groups)


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("head.weight", "head", True),
        ("head.weight", "head.*", True),
        ("head2.weight", "head", False),
        ("stages.1.0.norm.bias", "stages.*.norm", True),
        ("stages.1.0.norm.bias", "*.bias", True),
        ("stages.10.0.norm.bias", "stages.1", False),
        ("stages.1.0.norm.bias", "norm", False),
    ],
)
def test_pattern_is_the_name_of_a_parameter_or_of_a_module_above(name, pattern, fits):
    assert matches(name, pattern) == fits


def test_rule_sets_options_of_its_parameters_and_a_later_rule_wins():
    model = classifier()
    rules = ["stages:lr=0.5,betas=(0.8, 0.7)", "stages.0.0:lr=2", "head:lr=10,weight_decay=0.1"]
    groups = built(model, param_group=rules, layer_decay=0.5)
    block, head, other = (groups[f"{x}.bias"] for x in ("stages.0.0.norm", "head", "norm"))
    assert (block["lr_scale"], block["betas"]) == (2 * 0.5**5, (0.8, 0.7))  # layer decay, times 2
    assert groups["stages.3.0.norm.bias"]["lr_scale"] == 0.5 * 0.5
    assert (head["lr_scale"], head["weight_decay"]) == (10, 0.1)  # biases too, if one says so
    assert (other["lr_scale"], other["weight_decay"], other["betas"]) == (0.5, 0, (0.9, 0.999))
    assert sorted(head["own_options"]) == ["weight_decay"]
    assert "own_options" not in other


def test_rules_change_the_step():
    """SGD without momentum: 1 x 0.5 of the gradient, for the head 10 times as much."""
    model = nn.Sequential()
    for name in ("body", "head"):
        model.add_module(name, nn.Linear(1, 1, bias=False))
    args = flags(opt="momentum", momentum=0.0, weight_decay=0.0, param_group=["head:lr=10"])
    optimizer = build_optimizer(args, model, 0.5)
    for step_of, parameter in ((1, model.body.weight), (10, model.head.weight)):
        before, parameter.grad = parameter.item(), torch.ones(1, 1)
        Schedule(optimizer, total=1, lr=0.5, weight_decay=0.0).apply(0)
        optimizer.step()
        parameter.grad = None
        assert before - parameter.item() == pytest.approx(0.5 * step_of)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("hed:lr=3", "--param_group 'hed' matches no parameter that is trained. Did you .*'head"),
        ("xyzzy:lr=3", "Known: downsample_layers, stages, norm, head."),
        ("head:lrr=3", "--param_group head: unknown option 'lrr'. Did you mean 'lr'"),
        ("head:lr=x", "--param_group head: lr is 'x', expected a number"),
        ("head:lr=-1", "lr is -1, expected a number of at least 0"),
        ("head:betas=(0.9,)", "betas is .*, expected 2 values"),
        ("head:betas=(2.0, 3.0)", "--param_group head: Invalid beta parameter at index 0: 2.0"),
        ("head:eps=-1", "--param_group head: Invalid epsilon value: -1"),
        ("head:amsgrad=1", "amsgrad is 1, expected True or False"),
        ("head:use_fallback=True", "unknown option 'use_fallback'"),  # of muon
        ("head", r"expected PATTERN:name=value,name=value\n  head\n      \^"),
    ],
)
def test_wrong_rule_is_an_error_that_names_it(rule, message):
    with pytest.raises(UserError, match=message):
        built(classifier(), param_group=[rule])


def with_batch_norm() -> nn.Module:
    model = nn.Sequential()
    layers = {"conv": nn.Conv2d(1, 2, 1), "bn": nn.BatchNorm2d(2), "ln": nn.LayerNorm(2)}
    for name, layer in (layers | {"head": nn.Linear(2, 2)}).items():
        model.add_module(name, layer)
    return model


@pytest.mark.parametrize(
    ("words", "spared"),
    [
        (None, {"conv.bias", "bn", "ln", "head.bias"}),
        (["none"], set()),  # ClassyVision's bn_weight_decay=True
        (["batchnorm"], {"bn"}),  # its default: biases and LayerNorm are decayed
        (["norm", "bias"], {"conv.bias", "bn", "ln", "head.bias"}),
        (["bias"], {"conv.bias", "bn.bias", "ln.bias", "head.bias"}),
        (["head", "l?.weight"], {"head", "ln.weight"}),
    ],
)
def test_choice_of_parameters_without_weight_decay(words, spared):
    model = with_batch_norm()
    found = {n for n, group in built(model, no_weight_decay=words).items() if not group["decayed"]}
    names = dict(model.named_parameters())
    assert found == {name for name in names if spared & {name, name.partition(".")[0]}}


def test_norm_means_grn_and_timms_norms_too():
    groups = built(classifier(), no_weight_decay=["norm"])
    decayed = {name for name, group in groups.items() if group["decayed"]}
    assert not any("grn" in name or "norm" in name for name in decayed)
    assert {"stages.0.0.dwconv.bias", "head.bias"} <= decayed
    model = timm.create_model("efficientnet_b0", num_classes=2)
    groups = built(model, no_weight_decay=["batchnorm"])
    assert not groups["bn1.weight"]["decayed"]
    assert groups["classifier.bias"]["decayed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batchnorm"], "--no_weight_decay batchnorm: ConvNeXtV2 has none; drop it"),
        (["none", "bias"], "none stands alone"),
        (["hed"], "--no_weight_decay 'hed' matches no parameter"),
    ],
)
def test_wrong_choice_of_weight_decay_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        built(classifier(), no_weight_decay=words)


# --- arguments of an optimizer -----------------------------------------------------------------


def test_arguments_reach_the_optimizer():
    (group, *_) = build_optimizer(
        flags(opt="rmsproptf(alpha=0.99, lr_in_momentum=False)"), classifier(), 0.5
    ).param_groups
    assert (group["alpha"], group["lr_in_momentum"]) == (0.99, False)
    args = flags(opt="AdamW(betas=(0.8, 0.7))")
    assert build_optimizer(args, classifier(), 0.5).param_groups[0]["betas"] == (0.8, 0.7)


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ("rmsproptf(xyz=0.9)", "unknown option 'xyz'. Known: alpha, eps"),
        ("rmsproptf(alpa=0.9)", "unknown option 'alpa'. Did you mean 'alpha'.* Known: alpha, eps"),
        ("rmsproptf(alpha=x)", "alpha is 'x', expected a number"),
        ("rmsproptf(0.9)", "expected arguments as name=value"),
        ("adamw(lr=1)", "lr has a flag of its own; use --lr"),
        ("adamw(betas=(0.9,))", "betas is .*expected 2 values"),
        ("adamw(eps=1e-3", r"'\(' is not closed"),
        ("adamww(eps=1e-3)", "unknown optimizer 'adamww'"),
        ("adamw(eps=1e-3)", None),
    ],
)
def test_wrong_argument_of_an_optimizer_is_refused(opt, message):
    if message is None:
        opt, message = flags(opt=opt, opt_eps=1e-3), "both set eps; drop one"
    else:
        opt = flags(opt=opt)
    with pytest.raises(UserError, match=message):
        build_optimizer(opt, classifier(), 0.5)


def test_larc_steps_by_hand():
    """ClassyVision's LARC: a norm of 5 and a gradient of norm 1 give a rate of 0.02 x 5 / 1.

    Below lr it acts on biases too; with a smaller lr (0.01) lr itself is the rate.
    """
    for lr, rate in ((0.5, 0.1), (0.01, 0.01)):
        layer = nn.Linear(2, 1, bias=False).double()
        layer.weight.data[:] = torch.tensor([3.0, 4.0])
        args = flags(opt="larc(trust_coeff=0.02, always_adapt=True)", weight_decay=0.0)
        optimizer = build_optimizer(args, layer, lr)
        layer.weight.grad = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
        optimizer.step()
        expected = [3 - rate * 0.6, 4 - rate * 0.8]
        assert layer.weight.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_muon_takes_matrices_and_adamw_the_rest():
    model = ConvNeXtV2((1, 1, 1, 1), (8, 8, 8, 8), num_classes=8)
    args = flags(opt="muon", param_group=["head:use_fallback=True"])
    optimizer = build_optimizer(args, model, 0.01)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for p, held in optimizer.state.items() if "momentum_buffer" in held}
    matrices = {f"stages.{n}.0.pwconv{k}.weight" for n in range(4) for k in (1, 2)}
    downsampling = {f"downsample_layers.{n}.1.weight" for n in (1, 2, 3)}
    assert muon == matrices | downsampling | {"downsample_layers.0.0.weight"}
    assert len(optimizer.state) == len(names)
