# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Reasons why weights do not fit a model, each with its remedy.

python -c "from weights import mismatch; help(mismatch.explain)"
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from errors import UserError
from weights.convert import (
    CLASSIFIER,
    DECODER,
    describe,
    describe_decoder,
    family,
    size_name,
)
from weights.fit import find_classifier

State = Mapping[str, Tensor]
NO_HEAD = (
    "these weights have no classifier, as after pre-training: train one with main_finetune.py "
    "--finetune FILE, and evaluate the result"
)
OTHER_CLASSES = (
    "they were trained on {theirs} classes and this model has {ours}: give data with the same "
    "classes, or train a new head with main_finetune.py --finetune FILE"
)
CLASSIFIER_GIVEN = (
    "these are weights of a classifier, and those of a pre-training are expected: give a "
    "checkpoint of main_pretrain.py; main_pretrain.py --resume FILE, with an --output_dir of its "
    "own, pre-trains from the classifier's encoder"
)
AUTOENCODER_GIVEN = (
    "these are weights of a pre-training, and those of a classifier are expected: main_finetune.py "
    "--finetune FILE, with an --output_dir of its own, trains one from them"
)


def explain(model: nn.Module, found: State, missing: Sequence[str], reshaped: Sequence[str]) -> str:
    """Return the most likely reason why weights do not fit, after a semicolon; '' if unknown.

    found: the weights, under the model's names where known. missing, reshaped: names that they
    lack, or have with another shape.
    """
    reason = _head(model, found, missing, reshaped) or _kind(model.state_dict(), found)
    if not reason:
        ours, theirs = (
            {name.removeprefix("encoder."): value for name, value in state.items()}
            for state in (model.state_dict(), found)
        )
        flags = [*_encoder_flags(ours, theirs), *_decoder_flags(ours, theirs)]
        reason = f"these weights belong to other flags: {' '.join(flags)}" if flags else ""
    return f"; {reason}" if reason else ""


def _head(model: nn.Module, found: State, missing: Sequence[str], reshaped: Sequence[str]) -> str:
    """Return the reason if the weights differ from the model in nothing but the classifier."""
    heads = find_classifier(model)
    last = (*CLASSIFIER, *heads)
    if not heads or not all(name.startswith(last) for name in (*missing, *reshaped)):
        return ""
    if missing:
        return "" if any(name.startswith(heads) for name in found) else NO_HEAD
    if not reshaped:
        return ""
    ours, theirs = ((*state[reshaped[0]].shape, 0)[0] for state in (model.state_dict(), found))
    return OTHER_CLASSES.format(ours=ours, theirs=theirs) if ours != theirs else ""


def _kind(expected: State, found: State) -> str:
    """Return the reason if one is an FCMAE and the other a classifier."""
    ours, theirs = (
        any(name.startswith(("encoder.", *DECODER)) for name in state)
        for state in (expected, found)
    )
    if "mask_token" in expected and not theirs:
        return CLASSIFIER_GIVEN
    return AUTOENCODER_GIVEN if "mask_token" in found and not ours else ""


def _encoder_flags(ours: State, theirs: State) -> list[str]:
    """Return the flags of the ConvNeXt that `theirs` belongs to, where they differ from ours."""
    try:
        own, other = describe(ours), describe(theirs)
    except UserError:  # of other networks
        return []
    flags = []
    if any(own[name] != other[name] for name in ("depths", "dims", "layer_scale_init_value")):
        version = "" if family(own) == family(other) else f"{family(other)} "
        sizes = "of {version}depths {depths} and widths {dims}".format(version=version, **other)
        flags = [f"--model {size_name(other) or sizes}"]
    names = [name for name in ("stem_stride", "in_chans") if own[name] != other[name]]
    return flags + [f"--{name} {other[name]}" for name in names]


def _decoder_flags(ours: State, theirs: State) -> list[str]:
    """Return the flags of the decoder in `theirs`, where they differ from ours."""
    if "mask_token" not in ours or "mask_token" not in theirs:
        return []
    own, other = describe_decoder(ours), describe_decoder(theirs)
    return [f"--{name} {other[name]}" for name in own if own[name] != other[name]]
