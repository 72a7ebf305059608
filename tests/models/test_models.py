# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Models that the flags cannot build get a sentence, not a traceback."""

import pytest
import torch

from config import parser as options
from errors import UserError
from models import build_classifier, build_fcmae, check_model

WORDS = ["--data_set", "DIGITS", "--input_size", "64", "--model"]


def faulty(num_classes: int, **unused: object) -> torch.nn.Module:
    """A function with an error of its own."""
    return torch.nn.Linear(num_classes, wrong=3)


def build(kind: str, model: str) -> torch.nn.Module:
    if kind == "pretrain":
        return build_fcmae(options.parse(options.pretrain_parser(), [*WORDS, model]))
    return build_classifier(options.parse(options.finetune_parser(), [*WORDS, model]), 3)


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        (
            "finetune",
            "torchvision.models:resnet18",
            "unexpected keyword argument 'in_chans'.*num_c",
        ),
        ("pretrain", "torchvision.models:resnet18", "unexpected keyword .* a masked autoencoder"),
        (
            "pretrain",
            "tests.tiny:other",
            "missing 1 required .*'num_classes'.*patch_size, mask_rat",
        ),
        ("pretrain", "tests.tiny:classifier", "unexpected keyword argument 'patch_size'"),
        ("finetune", "tests.tiny:fcmae", "unexpected keyword argument 'num_classes'"),
        ("finetune", "math:pi", "'float' object is not callable"),
        ("finetune", "builtins:dict", "returned dict, expected a classifier"),
        (
            "pretrain",
            "tests.models.test_models:greedy",
            "returned Linear, expected a masked.*main_f",
        ),
        ("finetune", "tests.models.test_models:blind", "returned FCMAE, expected a cla.*main_pret"),
    ],
)
def test_function_of_another_kind_is_explained(kind, model, message):
    with pytest.raises(UserError, match=f"--model {model} .*{message}"):
        build(kind, model)


def greedy(**unused: object) -> torch.nn.Module:
    """A classifier, whatever is asked for."""
    return torch.nn.Linear(3, 3)


def blind(**unused: object) -> torch.nn.Module:
    """An FCMAE, whatever is asked for."""
    return build("pretrain", "convnextv2_atto")


def test_error_within_a_function_of_the_user_is_a_traceback():
    with pytest.raises(TypeError, match="'wrong'"):
        build("finetune", "tests.models.test_models:faulty")


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_name_is_checked_without_building(kind):
    parser = getattr(options, f"{kind}_parser")()
    for model in ("convnextv2_atto", "fcmae_convnextv2_atto", "tests.tiny:other"):
        check_model(options.parse(parser, [*WORDS, model]))
    for model, message in {
        "convnextv2_tny": "Did you mean",
        "tests.tiny:x": "cannot import",
    }.items():
        with pytest.raises(UserError, match=message):
            check_model(options.parse(parser, [*WORDS, model]))


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("finetune", "convnextv2_atto(num_classes=3)", "give --nb_classes, not the argument num_c"),
        ("finetune", "resnet(num_blocks=[1,1,1,1], in_chans=1)", "give --in_chans, not"),
        ("finetune", "mlp(hidden_dims=[8], input_size=8)", "give --input_size, not the argument"),
        ("pretrain", "convnextv2_atto(drop_path_rate=0.1)", "give --drop_path, not the argument"),
        ("pretrain", "convnextv2_atto(patch_size=16)", "give --patch_size, not the argument"),
        (
            "finetune",
            "tests.tiny:classifier(stem_stride=2)",
            "give --stem_stride, not the argument",
        ),
        (
            "finetune",
            "convnextv2_atto(foo=1)",
            "no argument 'foo'.* arguments are layer_scale_init",
        ),
        ("pretrain", "convnext_atto(layer_scale=1)", "Did you mean 'layer_scale_init_value'"),
        ("finetune", "timm:", "--model timm:: give a name, as in timm:resnet18"),
    ],
)
def test_arguments_in_brackets_are_those_that_no_flag_sets(kind, model, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build(kind, model)
