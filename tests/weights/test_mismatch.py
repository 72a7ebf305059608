# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Each reason for which weights do not fit has its own sentence and the right remedy.

All of them used to be `check --model and the flags that shape it`.
"""

import pytest
import torch

from errors import UserError
from models import create_model
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from tests import tiny
from weights.convert import to_hf
from weights.files import load_weights
from weights.pretrained import load_pretrained


def classifier(**kwargs) -> ConvNeXtV2:
    return ConvNeXtV2(*tiny.SIZE, **{"num_classes": 3, **kwargs})


def autoencoder(**kwargs) -> FCMAE:
    return FCMAE(ConvNeXtV2(*tiny.SIZE), **{"decoder_embed_dim": 8, **kwargs})


def atto(**kwargs) -> ConvNeXtV2:
    with torch.device("meta"):
        return create_model("convnextv2_atto", num_classes=3, **kwargs)


def atto_v1() -> ConvNeXtV2:
    return atto(layer_scale_init_value=1e-6)


@pytest.fixture
def saved(tmp_path):
    """Save a model's state dict; returns the path."""

    def save(state: dict) -> str:
        torch.save({"model": state}, tmp_path / "a.pth")
        return str(tmp_path / "a.pth")

    return save


@pytest.mark.parametrize("convert", [dict, to_hf])
@pytest.mark.parametrize("build", [autoencoder, lambda: classifier(num_classes=0)])
def test_evaluation_of_weights_without_a_classifier(saved, build, convert):
    state = build().state_dict()
    path = saved(convert(state) if "mask_token" not in state else state)
    with pytest.raises(UserError, match=r"have no classifier, .*main_finetune.py --finetune") as e:
        load_pretrained(classifier(), path, new=())
    assert "check --model" not in str(e.value)


@pytest.mark.parametrize("build", [classifier, lambda num_classes=3: tiny.Other(num_classes)])
def test_evaluation_on_another_number_of_classes(saved, build):
    with pytest.raises(UserError, match="trained on 5 classes and this model has 3: give data"):
        load_pretrained(build(), saved(build(num_classes=5).state_dict()), new=())


def test_classifier_where_an_autoencoder_is_expected():
    """A fine-tuning folder given to pre-training: `151 missing, check --model`."""
    with pytest.raises(UserError, match="weights of a classifier, .*a pre-training are expected"):
        load_weights(autoencoder(), classifier().state_dict(), "a.pth")


def test_autoencoder_where_a_classifier_is_expected():
    with pytest.raises(UserError, match=r"weights of a pre-training, .*--finetune FILE"):
        load_weights(classifier(), autoencoder().state_dict(), "a.pth")


@pytest.mark.parametrize(
    ("model", "weights", "flags"),
    [
        (classifier, lambda: classifier(stem_stride=2), "--stem_stride 2"),
        (classifier, lambda: classifier(in_chans=4), "--in_chans 4"),
        (classifier, atto, "--model convnextv2_atto"),
        (classifier, lambda: atto(stem_stride=1), "--model convnextv2_atto --stem_stride 1"),
        (atto, classifier, r"--model of depths \(1, 1, 1, 1\) and widths \(4, 6, 8, 10\)"),
        (atto, lambda: atto_v1(), "--model convnext_atto"),
        (lambda: atto_v1(), atto, "--model convnextv2_atto"),
        (
            classifier,
            lambda: classifier(layer_scale_init_value=1e-6),
            r"--model of convnext depths \(1, 1, 1, 1\) and widths \(4, 6, 8, 10\)",
        ),
        (autoencoder, lambda: autoencoder(decoder_embed_dim=16), "--decoder_embed_dim 16"),
        (autoencoder, lambda: autoencoder(decoder_depth=2), "--decoder_depth 2"),
    ],
)
def test_weights_of_other_flags_name_the_flags(model, weights, flags):
    with pytest.raises(UserError, match=f"; these weights belong to other flags: {flags}$"):
        load_weights(model(), weights().state_dict(), "a.pth")


def test_decoder_of_another_network_is_no_fcmae():
    model = torch.nn.ModuleDict(
        {"encoder": torch.nn.Linear(2, 2), "decoder": torch.nn.Linear(2, 2)}
    )
    for name in ("a", "mask_token"):
        with pytest.raises(UserError, match=rf"1 unexpected \({name}\)$"):
            load_weights(model, {name: torch.zeros(1)}, "a.pth")


def test_incomplete_decoder_is_no_reason():
    state = autoencoder().state_dict()
    del state["mask_token"]
    with pytest.raises(UserError, match=r"1 missing \(mask_token\)$"):
        load_weights(autoencoder(), state, "a.pth")


def test_network_without_a_classifier_misses_none():
    with pytest.raises(UserError, match=r"2 missing \(norm.weight, norm.bias\)$"):
        load_weights(classifier(num_classes=0), autoencoder().encoder.state_dict(), "a.pth")


def test_head_that_may_be_new_is_not_the_reason(saved):
    state = autoencoder().encoder.state_dict() | {"extra.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"1 unexpected \(extra\.weight\)$"):
        load_pretrained(classifier(), saved(state))


def test_unknown_reason_gives_no_advice():
    state = {**classifier().state_dict(), "extra.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"1 unexpected \(extra\.weight\)$"):
        load_weights(classifier(), state, "a.pth")
    with pytest.raises(UserError, match=r"4 unexpected \(a\.0, a\.1, a\.2 and 1 more\)$"):
        load_weights(tiny.Other(3), {f"a.{i}": torch.zeros(1) for i in range(4)}, "a.pth")
