# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Conversion of every published layout, compared with the code that published it."""

import argparse
import pathlib
from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from models import create_model
from models.convnextv2 import V1_SIZES, ConvNeXtV2
from models.fcmae import FCMAE
from weights.convert import NAMES, describe, size_name, to_convnextv2, to_hf, to_official, to_timm
from weights.files import load_weights

DEPTHS, DIMS, CLASSES = (1, 2, 1, 1), (4, 6, 8, 10), 5


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Set random values everywhere: zeros and ones would hide swapped tensors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.double().eval()


def ours(seed: int = 0, **kwargs) -> ConvNeXtV2:
    return randomize(ConvNeXtV2(DEPTHS, DIMS, **{"num_classes": CLASSES, **kwargs}), seed)


def autoencoder(seed: int = 0) -> FCMAE:
    return randomize(FCMAE(ConvNeXtV2(DEPTHS, DIMS), decoder_embed_dim=12), seed)


def timm_model(is_v1: bool = False) -> torch.nn.Module:
    from timm.models.convnext import ConvNeXt

    version = {"use_grn": not is_v1, "ls_init_value": 1e-6 if is_v1 else None}
    model = ConvNeXt(depths=DEPTHS, dims=DIMS, num_classes=CLASSES, **version)
    return randomize(model, 1)


def hf_model(kind: str = "ConvNextV2ForImageClassification") -> torch.nn.Module:
    import transformers

    make = transformers.ConvNextV2Config if "V2" in kind else transformers.ConvNextConfig
    config = make(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=CLASSES, layer_norm_eps=1e-6
    )
    return randomize(getattr(transformers, kind)(config), 1)


def images(size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)


def minkowski(model: FCMAE) -> dict[str, torch.Tensor]:
    """Return what the official main_pretrain.py saves for this network, one kernel cell at a time.

    MinkowskiEngine numbers the cells of a kernel column by column.
    """
    out = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        sparse = name.startswith("encoder.") and ".downsample_layers.0." not in name
        if not sparse:
            out[name] = value
        elif name.endswith("dwconv.weight"):
            kernel = torch.empty(49, len(value), dtype=value.dtype)
            for i in range(7):
                for j in range(7):
                    kernel[j * 7 + i] = value[:, 0, i, j]
            out[name.replace("weight", "kernel")] = kernel
        elif parts[1] == "downsample_layers" and parts[3:] == ["1", "weight"]:
            kernel = torch.empty(4, value.shape[1], value.shape[0], dtype=value.dtype)
            for i in range(2):
                for j in range(2):
                    kernel[j * 2 + i] = value[:, :, i, j].T
            out[name.replace("weight", "kernel")] = kernel
        elif "grn" in name:
            out[name] = value.reshape(1, -1)
        elif "pwconv" in name:
            out[name.replace("pwconv1", "pwconv1.linear").replace("pwconv2", "pwconv2.linear")] = (
                value
            )
        elif parts[-2] == "norm" or parts[1] == "downsample_layers" and parts[3] == "0":
            out[".".join([*parts[:-1], "ln", parts[-1]])] = value
        else:  # biases of sparse convolutions
            out[name] = value[None]
    return out


def mmpretrain(state: dict) -> dict[str, torch.Tensor]:
    """Return the names of mmpretrain's ConvNeXt of these weights, with GRN's vectors."""
    out = {}
    for name, value in state.items():
        top, *rest = name.split(".")
        if top == "head":
            name = f"head.fc.{rest[0]}"
        elif top == "norm":
            name = f"backbone.norm3.{rest[0]}"
        else:
            rest = [r.replace("dwconv", "depthwise_conv") for r in rest]
            rest = [r.replace("pwconv", "pointwise_conv") for r in rest]
            name = ".".join(["backbone", top, *rest])
        out[name] = value.flatten() if ".grn." in name else value
    return out


def mmpretrain_model() -> SimpleNamespace:
    return SimpleNamespace(state_dict=lambda: mmpretrain(ours().state_dict()))


def load(model: torch.nn.Module, state: dict, **kwargs) -> None:
    load_weights(model, to_convnextv2(state, **kwargs)[0], "test")


# --- in ---------------------------------------------------------------------------------


def test_minkowski_layout_is_the_documented_one():
    """Literal names and shapes: a fixture made by our code could share its mistakes."""
    state = minkowski(autoencoder())
    expected = {
        "encoder.stages.0.0.dwconv.kernel": (49, 4),
        "encoder.stages.0.0.dwconv.bias": (1, 4),
        "encoder.stages.0.0.norm.ln.weight": (4,),
        "encoder.stages.0.0.pwconv1.linear.weight": (16, 4),
        "encoder.stages.0.0.grn.gamma": (1, 16),
        "encoder.downsample_layers.1.0.ln.weight": (4,),
        "encoder.downsample_layers.1.1.kernel": (4, 4, 6),
        "encoder.downsample_layers.1.1.bias": (1, 6),
        "encoder.downsample_layers.0.0.weight": (4, 3, 4, 4),
        "decoder.0.dwconv.weight": (12, 1, 7, 7),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    kernel = torch.arange(4.0)[:, None, None].expand(4, 4, 6)  # the cell, for every channel
    state["encoder.downsample_layers.1.1.kernel"] = kernel
    weight = to_convnextv2(state)[0]["downsample_layers.1.1.weight"]
    # dense weight = kernel.permute(2,1,0).reshape(Cout, Cin, k, k).transpose(3, 2)
    assert weight[0, 0].tolist() == [[0, 2], [1, 3]]
    assert torch.equal(weight, kernel.permute(2, 1, 0).reshape(6, 4, 2, 2).transpose(3, 2))
    kernel = torch.arange(49.0)[:, None].expand(49, 4)
    state["encoder.stages.0.0.dwconv.kernel"] = kernel
    weight = to_convnextv2(state)[0]["stages.0.0.dwconv.weight"]
    assert torch.equal(weight, kernel.permute(1, 0).reshape(4, 1, 7, 7).transpose(3, 2))


def test_minkowski_checkpoint_becomes_the_autoencoder_with_its_decoder():
    source, target = autoencoder(), autoencoder(seed=5)
    state, report = to_convnextv2(minkowski(source), decoder=True)
    load_weights(target, state, "test")
    mask = torch.tensor([[1.0, 0, 1, 0]] * 2)
    for got, expected in zip(target(images(), mask), source(images(), mask), strict=True):
        assert torch.equal(got, expected)
    assert (report.layout, report.dropped) == ("MinkowskiEngine", [])


def test_minkowski_checkpoint_becomes_the_classifiers_encoder():
    source, target = autoencoder(), ours(seed=5, num_classes=0)
    state, report = to_convnextv2(minkowski(source))
    load_weights(target, state, "test", ("norm.",))
    expected = source.encoder.forward_features(images())
    assert torch.equal(target.forward_features(images()), expected)
    parts = {name.split(".")[0] for name in report.dropped}
    assert parts == {"proj", "mask_token", "decoder", "pred"}


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("shape", ["as here", "two-dimensional"])
def test_published_fcmae_equals_timm(decoder, shape):
    """Dense names without head and final norm; GRN and biases may have two axes."""
    from timm.models.convnext import checkpoint_filter_fn

    source = autoencoder()
    state = {n.removeprefix("encoder."): v for n, v in source.state_dict().items()}
    if shape == "two-dimensional":
        flat = ("grn.gamma", "grn.beta", "dwconv.bias", "pwconv1.bias", "norm.weight")
        state = {n: v.reshape(1, -1) if n.endswith(flat) else v for n, v in state.items()}
    encoder = {n: v for n, v in state.items() if n.startswith(("downsample_layers.", "stages."))}
    state = state if decoder else encoder
    oracle, target = timm_model(), ours(seed=5)
    oracle.load_state_dict(checkpoint_filter_fn(dict(encoder), oracle), strict=False)
    load_weights(target, to_convnextv2(state)[0], "test", ("norm.", "head."))
    torch.testing.assert_close(
        target.forward_features(images()), oracle.forward_features(images()), rtol=1e-6, atol=1e-6
    )
    if decoder:
        again = autoencoder(seed=6)
        load(again, state, decoder=True)
        assert torch.equal(again(images(), torch.tensor([[1.0, 0, 1, 0]] * 2))[0],
                           source(images(), torch.tensor([[1.0, 0, 1, 0]] * 2))[0])  # fmt: skip


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_official_classifier_equals_timm(prefix):
    from timm.models.convnext import checkpoint_filter_fn

    source, target, oracle = ours(), ours(seed=5), timm_model()
    state = source.state_dict()
    oracle.load_state_dict(checkpoint_filter_fn(dict(state), oracle), strict=True)
    load(target, {prefix + name: value for name, value in state.items()})
    assert torch.equal(target(images()), source(images()))
    torch.testing.assert_close(target(images()), oracle(images()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [64, 96])
def test_timm_model(size):
    source, target = timm_model(), ours(seed=5)
    load(target, source.state_dict())
    torch.testing.assert_close(target(images(size)), source(images(size)), rtol=1e-6, atol=1e-6)


MMPRETRAIN = {  # of open-mmlab/mmpretrain, models/backbones/convnext.py and utils/norm.py
    "backbone.downsample_layers.0.0.weight": (4, 3, 4, 4),
    "backbone.downsample_layers.0.1.bias": (4,),
    "backbone.downsample_layers.1.1.weight": (6, 4, 2, 2),
    "backbone.stages.0.0.depthwise_conv.weight": (4, 1, 7, 7),
    "backbone.stages.0.0.norm.weight": (4,),
    "backbone.stages.0.0.pointwise_conv1.weight": (16, 4),
    "backbone.stages.0.0.grn.gamma": (16,),
    "backbone.stages.0.0.pointwise_conv2.bias": (4,),
    "backbone.norm3.weight": (10,),
    "head.fc.weight": (5, 10),
}


def test_mmpretrain_classifier():
    """Its published files were made from the official ones."""
    source, target = ours(), ours(seed=5)
    state = mmpretrain(source.state_dict())
    assert {name: tuple(state[name].shape) for name in MMPRETRAIN} == MMPRETRAIN
    load(target, state)
    assert to_convnextv2(state)[1].layout == "MMPretrain"
    assert torch.equal(target(images()), source(images()))


def test_mmpretrain_linear_layers_may_be_1x1_convolutions():
    source, target = ours(), ours(seed=5)
    state = mmpretrain(source.state_dict())
    load(target, {n: v[..., None, None] if "wise_conv" in n and v.ndim == 2 else v
                  for n, v in state.items()})  # fmt: skip
    assert torch.equal(target(images()), source(images()))


def test_mmpretrain_selfsupervised_weights_are_an_encoder():
    """SparK's decoder and mask tokens, and norms of other stages, have no place here."""
    source, target = ours(num_classes=0), ours(seed=5, num_classes=0)
    state = mmpretrain(source.state_dict())
    others = ("backbone.norm1.weight", "neck.a.weight", "mask_tokens.0", "enc_dec_norms.0.bias")
    state |= {name: torch.zeros(3) for name in others}
    load(target, state)
    assert torch.equal(target(images()), source(images()))
    assert to_convnextv2(state)[1].dropped == [n.removeprefix("backbone.") for n in others]


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 1)])
def test_timm_features_only(indices):
    """Names like stem_0 and stages_0 used to be unknown."""
    import timm

    theirs = timm.create_model("convnextv2_atto", features_only=True, out_indices=indices)
    target = create_model("convnextv2_atto", features_only=True, out_indices=indices)
    randomize(theirs), load(target.double(), theirs.state_dict())
    for got, expected in zip(target(images()), theirs(images()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fc", "classifier", "head.fc"])
def test_head_of_a_fork_by_another_name(name):
    source, target = ours(), ours(seed=5)
    state = source.state_dict()
    head = {f"{name}.{part}": state.pop(f"head.{part}") for part in ("weight", "bias")}
    load(target, state | head)
    assert torch.equal(target(images()), source(images()))


@pytest.mark.parametrize("size", ["atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"])
def test_every_size_is_timms_in_both_directions(size):
    """The four small ones have 1x1 convolutions in their MLPs there."""
    import timm

    name = f"convnextv2_{size}"
    with torch.device("meta"):
        theirs, model = timm.create_model(name, num_classes=7), create_model(name, num_classes=7)
    state = {n: v.contiguous() for n, v in theirs.state_dict().items()}
    theirs.load_state_dict(to_timm(model.state_dict()), assign=True)
    model.load_state_dict(to_convnextv2(state)[0], assign=True)


def test_small_size_of_timm_computes_the_same():
    import timm

    theirs, target = (
        randomize(timm.create_model("convnextv2_atto")),
        create_model("convnextv2_atto").double(),
    )
    load(target, theirs.state_dict())
    torch.testing.assert_close(target(images(32)), theirs(images(32)), rtol=1e-6, atol=1e-6)
    again = to_timm(target.state_dict())
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())


def test_timm_weights_without_a_head_are_an_encoder():
    state = timm_model().state_dict()
    encoder = {name: value for name, value in state.items() if not name.startswith("head.")}
    target = ours(seed=5)
    load_weights(target, to_convnextv2(encoder)[0], "test", ("norm.", "head."))


def test_hugging_face_classifier():
    source, target = hf_model(), ours(seed=5)
    load(target, source.state_dict())
    expected = source(images()).logits
    torch.testing.assert_close(target(images()), expected, rtol=1e-6, atol=1e-6)


def test_hugging_face_model_without_a_classifier():
    """Its names start with `encoder.`, as those of our own pre-training do."""
    source, target = hf_model("ConvNextV2Model"), ours(seed=5, num_classes=0)
    load(target, source.state_dict())
    expected = source(images()).pooler_output
    torch.testing.assert_close(target(images()), expected, rtol=1e-6, atol=1e-6)


def test_pretraining_wrapped_by_ddp_and_compile():
    source, target = autoencoder(), autoencoder(seed=5)
    state = {f"module._orig_mod.{name}": v for name, v in source.state_dict().items()}
    load(target, state, decoder=True)
    assert torch.equal(target.pred.weight, source.pred.weight)


def test_classifier_into_an_autoencoder_leaves_head_and_norm_out():
    state, report = to_convnextv2(ours().state_dict(), decoder=True)
    target = autoencoder(seed=5)
    load_weights(target, state, "test", ("proj.", "mask_token", "decoder.", "pred."))
    assert report.dropped == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


RESNET = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.bn1.bias": torch.zeros(64)}


@pytest.mark.parametrize(
    ("state", "message"), [(RESNET, "names like conv1.weight"), ({}, "not weights")]
)
def test_other_networks_are_refused_by_name(state, message):
    with pytest.raises(UserError, match=message):
        to_convnextv2(state)


def wrapped(state: dict, prefix: str, other: str = "") -> dict[str, torch.Tensor]:
    """Names of a network that is a part of another one, with another part next to it."""
    named = {prefix + name: value for name, value in state.items()}
    return named | ({other: torch.zeros(2)} if other else {})


@pytest.mark.parametrize(
    ("build", "prefix", "other", "hint"),
    [
        (ours, "net.", "", "net."),
        (ours, "net.", "net2.weight", "net."),
        (timm_model, "student.", "teacher.weight", "student."),
        (hf_model, "net.", "loss.weight", "net."),  # not net.convnextv2., which has no classifier
        (lambda: hf_model("ConvNextV2Model"), "a.net.", "", "a.net."),
        (autoencoder, "net.", "", "net."),  # not net.encoder., which has no decoder
        (mmpretrain_model, "net.", "", "net."),  # not net.backbone., which has no head
        (ours, "seg.encoder.", "seg.decoder.weight", "seg.encoder."),  # no decoder of ours
        (ours, "module.net.", "", "module.net."),  # as it stands in the file
        (ours, "net.module.", "", "net.module."),
    ],
)
def test_hint_names_the_prefix_with_which_the_weights_load(build, prefix, other, hint):
    """It used to be too long by a level where head or decoder stand next to the encoder."""
    from weights.pretrained import select_state_dict

    state = wrapped(build().state_dict(), prefix, other)
    with pytest.raises(UserError) as caught:
        to_convnextv2(state)
    assert str(caught.value).endswith(f"; try --model_prefix {hint}")
    decoder = build is autoencoder
    selected = select_state_dict(state, "a.pth", model_prefix=hint)
    got, expected = (to_convnextv2(s, decoder)[0] for s in (selected, build().state_dict()))
    assert got.keys() == expected.keys()


def test_hint_names_both_of_two_networks():
    state = wrapped(ours().state_dict(), "student.") | wrapped(ours().state_dict(), "teacher.")
    with pytest.raises(UserError, match=r"try --model_prefix student\. or teacher\.$"):
        to_convnextv2(state)


V1 = {"layer_scale_init_value": 1e-6}


@pytest.mark.parametrize("size", [64, 96])
def test_v1_of_timm(size):
    source, target = timm_model(is_v1=True), ours(seed=5, **V1)
    load(target, source.state_dict())
    torch.testing.assert_close(target(images(size)), source(images(size)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", V1_SIZES)
def test_every_size_of_v1_is_timms_in_both_directions(size):
    import timm

    name = f"convnext_{size}"
    with torch.device("meta"):
        theirs, model = timm.create_model(name, num_classes=7), create_model(name, num_classes=7)
    state = {n: v.contiguous() for n, v in theirs.state_dict().items()}
    theirs.load_state_dict(to_timm(model.state_dict()), assign=True)
    model.load_state_dict(to_convnextv2(state)[0], assign=True)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_v1_of_the_official_code_equals_timm(prefix):
    from timm.models.convnext import checkpoint_filter_fn

    source, target, oracle = ours(**V1), ours(seed=5, **V1), timm_model(is_v1=True)
    state = source.state_dict()
    assert {"stages.1.1.gamma", "stages.1.1.pwconv1.weight", "head.bias"} <= state.keys()
    oracle.load_state_dict(checkpoint_filter_fn(dict(state), oracle), strict=True)
    load(target, {prefix + name: value for name, value in state.items()})
    assert torch.equal(target(images()), source(images()))
    torch.testing.assert_close(target(images()), oracle(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prefix", ["convnext.", ""])
def test_v1_of_hugging_face(prefix):
    """ConvNextModel lacks the prefix of its classifier."""
    kind = "ConvNextForImageClassification" if prefix else "ConvNextModel"
    source, target = hf_model(kind), ours(seed=5, num_classes=CLASSES * bool(prefix), **V1)
    state = source.state_dict()
    assert f"{prefix}encoder.stages.1.layers.1.layer_scale_parameter" in state
    load(target, state)
    out = source(images())
    expected = out.logits if prefix else out.pooler_output
    torch.testing.assert_close(target(images()), expected, rtol=1e-9, atol=1e-9)


def test_v1_of_mmpretrain():
    source, target = ours(**V1), ours(seed=5, **V1)
    state = mmpretrain(source.state_dict())
    assert {"backbone.stages.1.1.gamma", "backbone.norm3.bias"} <= state.keys()
    load(target, state)
    assert torch.equal(target(images()), source(images()))


def test_to_timm_and_to_hugging_face_of_v1_are_what_they_load():
    source, timms = ours(**V1), timm_model(is_v1=True)
    theirs = hf_model("ConvNextForImageClassification")
    timms.load_state_dict(to_timm(source.state_dict()), strict=True)
    theirs.load_state_dict(to_hf(source.state_dict()), strict=True)
    for got in (timms(images()), theirs(images()).logits):
        torch.testing.assert_close(got, source(images()), rtol=1e-9, atol=1e-9)


def test_network_called_convnext_in_another_one_is_found():
    """Its prefix is not that of Hugging Face."""
    with pytest.raises(UserError, match=r"try --model_prefix convnext\.$"):
        to_convnextv2(wrapped(ours(**V1).state_dict(), "convnext."))


def test_two_tensors_for_one_name_are_refused():
    state = ours().state_dict()
    with pytest.raises(UserError, match=r"module\.head\.bias and another tensor are both"):
        to_convnextv2(state | {"module.head.bias": torch.zeros(CLASSES)})
    with pytest.raises(UserError, match=r"both norm\.bias"):
        to_convnextv2(state | {"encoder.norm.bias": torch.zeros(DIMS[-1])})


@pytest.mark.parametrize("name", ["stages.1.0.pwconv1.weight", "downsample_layers.1.1.weight"])
def test_transposed_tensor_is_an_error_that_names_both_shapes(name):
    state = ours().state_dict()
    here = tuple(state[name].shape)
    state[name] = state[name].transpose(0, 1)
    there = tuple(state[name].shape)
    target, before = ours(seed=5), ours(seed=5)
    with pytest.raises(UserError) as caught:
        load(target, state)
    assert f"{name} {there} instead of {here}" in str(caught.value)
    assert torch.equal(target(images()), before(images()))


# --- out --------------------------------------------------------------------------------


def test_to_timm_is_what_timm_loads():
    source, target = ours(), timm_model()
    target.load_state_dict(to_timm(source.state_dict()), strict=True)
    torch.testing.assert_close(target(images()), source(images()), rtol=1e-6, atol=1e-6)


def test_to_hugging_face_is_what_transformers_loads():
    source, target = ours(), hf_model()
    target.load_state_dict(to_hf(source.state_dict()), strict=True)
    torch.testing.assert_close(target(images()).logits, source(images()), rtol=1e-6, atol=1e-6)


def official_remap(state: dict) -> dict:
    """The part of the official remap_checkpoint_keys for dense weights."""
    out = {}
    for name, value in state.items():
        name = name.removeprefix("encoder.")
        if name.endswith("bias") and value.ndim != 1:
            value = value.reshape(-1)
        elif "grn" in name:
            value = value.unsqueeze(0).unsqueeze(1)
        out[name] = value
    return out


def test_to_official_is_what_the_official_finetuning_loads():
    """Its --finetune adds two axes to every GRN vector, so four axes would become six."""
    source, target = autoencoder(), ours(seed=5)
    state = official_remap(to_official(source.state_dict()))
    result = target.load_state_dict(state, strict=False)
    assert {name.split(".")[0] for name in result.missing_keys} == {"norm", "head"}
    expected = source.encoder.forward_features(images())
    assert torch.equal(target.forward_features(images()), expected)


@pytest.mark.parametrize("convert", [to_timm, to_hf, to_official])
@pytest.mark.parametrize("classes", [CLASSES, 0])
@pytest.mark.parametrize("version", [{}, V1])
def test_round_trip_is_bit_equal(convert, classes, version):
    state = ours(num_classes=classes, **version).state_dict()
    again = to_convnextv2(convert(state))[0]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_round_trip_of_an_autoencoder_keeps_its_decoder():
    state = autoencoder().state_dict()
    again = to_convnextv2(to_official(state), decoder=True)[0]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_every_layout_has_a_row_for_every_name_that_differs():
    """A row that never matches is a typo."""
    names = [*ours().state_dict(), *ours(**V1).state_dict()]
    for layout, rows in NAMES.items():
        from weights.convert import _rules

        for rule, row in zip(_rules(layout, inward=False), rows, strict=True):
            assert any(rule[0].match(name) for name in names), row


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_base", "convnext_xlarge"])
def test_describe_finds_the_shape_of_a_size(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
    found = describe(model.state_dict())
    assert (found["depths"], found["num_classes"], found["in_chans"]) == (model.depths, 7, 3)
    assert size_name(found) == name
    with torch.device("meta"):
        assert ConvNeXtV2(**found).state_dict().keys() == model.state_dict().keys()


def test_describe_small_stem_and_no_head():
    model = ours(num_classes=0, stem_stride=2, in_chans=1)
    expected = {"in_chans": 1, "stem_stride": 2, "num_classes": 0, "depths": DEPTHS, "dims": DIMS}
    assert describe(model.state_dict()) == expected | {"layer_scale_init_value": None}
    assert size_name(expected) is None


def test_checkpoints_with_a_namespace_and_paths_load(tmp_path):
    from weights.files import read_checkpoint

    content = {"model": ours().state_dict(), "epoch": 3}
    content["args"] = argparse.Namespace(output_dir=pathlib.PosixPath("/a"), lr=0.1)
    torch.save(content, tmp_path / "checkpoint-3.pth")
    assert read_checkpoint(tmp_path / "checkpoint-3.pth")["args"].lr == 0.1
