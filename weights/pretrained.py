# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""From a checkpoint of any layout into a model, whole or not at all, with a report.

python main_finetune.py --model convnextv2_atto --data_set DIGITS --input_size 32 --finetune FILE
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from config.flags import MODEL_KEY
from errors import UserError
from parallel.process_group import get_logger, main_process_first
from weights.convert import CLASSIFIER, DECODER, SIGNS, Report, to_convnextv2, unwrap
from weights.files import load_weights, read_checkpoint

EMA_KEY = "model_ema|state_dict_ema"
WILD = (
    "its pointwise weights have an rms of %.2f where 0.02 to 0.1 is usual, as after an "
    "initialisation with std 1. In fp16 such activations pass 65504, become infinite, and "
    "the loss NaN: train with --amp bf16 or none, and do not export it in float16"
)


def pick_weights(
    checkpoint: Any, source: str, model_key: str = MODEL_KEY, model_prefix: str = ""
) -> dict[str, Tensor]:
    """The state dict in a checkpoint: under the first of the keys that it has, or itself.

    model_prefix: what precedes the names of the weights that are wanted; others are left out.
    """
    holds = checkpoint if isinstance(checkpoint, dict) else {}
    keys = [key for key in model_key.split("|") if holds.get(key) is not None]
    named = checkpoint[keys[0]] if keys else None  # a bare state dict has no keys to ask for
    state = checkpoint if not keys and model_key == MODEL_KEY else named
    tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not state:
        held = list(holds)[:5] or type(checkpoint).__name__
        raise UserError(
            f"{source} holds {held}; expected weights under {model_key!r}: see --model_key"
        )
    wanted = {
        name.removeprefix(model_prefix): value
        for name, value in state.items()
        if name.startswith(model_prefix)
    }
    if not wanted:
        raise UserError(
            f"--model_prefix {model_prefix}: no name in {source} starts so; "
            f"they look like {next(iter(state))}"
        )
    return wanted


def load_pretrained(
    model: nn.Module,
    source: str,
    model_key: str = MODEL_KEY,
    model_prefix: str = "",
    sha256: str = "",
    new: Iterable[str] = CLASSIFIER + DECODER,
) -> Report:
    """Start a classifier or an FCMAE from weights of any layout, whole or not at all; tells what.

    source, sha256: as `checkpoint.read_checkpoint`. new: prefixes of parts that may be absent
    there as a whole and then stay as initialised; a head for another number of classes counts as
    absent if `head.` is one of them. What else is missing, unexpected or of another shape is an
    error that names it.
    """
    log = get_logger()
    average = model_key == EMA_KEY
    checkpoint = main_process_first(lambda: read_checkpoint(source, sha256, average=average))
    expected = model.state_dict()
    try:
        given = pick_weights(checkpoint, source, model_key, model_prefix)
        state, report = _under_names_of(expected, given)
    except UserError as error:
        raise UserError(f"{source}: {error}".replace(f"{source}: {source}", source)) from error
    left_out = tuple(getattr(model, "left_out", ()))  # a backbone has no head, or not all stages
    report.dropped += [name for name in state if name.startswith(left_out)]
    state = {name: value for name, value in state.items() if not name.startswith(left_out)}
    head, own = state.get("head.weight"), expected.get("head.weight")
    if "head." in new and head is not None and (own is None or head.shape != own.shape):
        log.warning("%s: its head for %d classes does not fit: a new one", source, len(head))
        report.dropped += [name for name in state if name.startswith("head.")]
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    absent = [part for part in new if not any(name.startswith(part) for name in state)]
    report.missing = load_weights(model, state, source, absent)
    report.loaded = list(state)
    report.renamed = {theirs: ours for theirs, ours in report.renamed.items() if ours in state}
    log.info("%s: %s", source, report)
    wild = wild_weights(state)
    if wild:
        log.warning("%s: %s", source, wild)
    return report


def _under_names_of(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Report]:
    """Weights under the names of a model: of any layout for a ConvNeXt V2, else of its own."""
    is_fcmae = any(name.startswith("encoder.") for name in expected)
    if any(name.removeprefix("encoder.") in SIGNS for name in expected):
        return to_convnextv2(given, decoder=is_fcmae)
    state, report = (
        {unwrap(name): value for name, value in given.items()},
        Report("the model's own"),
    )
    if not is_fcmae and any(name.startswith("encoder.") for name in state):  # of an autoencoder
        report.dropped = [name for name in state if name.startswith(DECODER)]
        kept = {name: value for name, value in state.items() if name not in report.dropped}
        state = {name.removeprefix("encoder."): value for name, value in kept.items()}
    return state, report


def load_both(
    model: nn.Module,
    average: nn.Module | None,
    source: str,
    model_key: str = MODEL_KEY,
    model_prefix: str = "",
    sha256: str = "",
) -> None:
    """`load_pretrained`, and of an average of the weights that it begins with what is there."""
    load_pretrained(model, source, model_key, model_prefix, sha256)
    if average is None:
        return
    if model_key != EMA_KEY and has_average(source, sha256):
        load_pretrained(average, source, EMA_KEY, model_prefix, sha256)
    else:
        get_logger().info("%s: the average starts from the weights that were loaded", source)
        average.load_state_dict(model.state_dict())  # spread alike, if they are


def has_average(source: str, sha256: str = "") -> bool:
    """Whether a checkpoint holds averaged weights beside its own."""
    checkpoint = main_process_first(lambda: read_checkpoint(source, sha256))
    holds = checkpoint if isinstance(checkpoint, dict) else {}
    return any(holds.get(key) is not None for key in EMA_KEY.split("|"))


def wild_weights(state: Mapping[str, Tensor]) -> str:
    """What to say of an encoder whose weights half precision will not survive; '' of others.

    The official pre-training drew weights with std 1, truncated: rms 0.88 instead of 0.02.
    """
    rms = [v.float().square().mean().sqrt() for n, v in state.items() if "pwconv1.weight" in n]
    typical = torch.stack(rms).median().item() if rms else 0.0
    return WILD % typical if typical > 0.5 else ""
