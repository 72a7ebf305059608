# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Weights of other layouts, under the names of the dense model.

python -c "from models.convert import to_convnextv2; print(to_convnextv2({'encoder.norm.bias': 0}))"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from checkpoint import load_weights, read_checkpoint
from errors import UserError
from utils import get_logger

MODEL_KEY = "model|module"
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
DECODER = ("proj.", "mask_token", "decoder.", "pred.")  # what pre-training has beside `encoder.`


def to_convnextv2(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """State dict of a fine-tuned or pre-trained model -> that of `ConvNeXtV2`, and a report.

    The report lists the names that were `renamed` and, since only pre-training has a use for
    them, `dropped`.
    """
    report: dict[str, list[str]] = {"renamed": [], "dropped": []}
    out = {}
    pretrained = any(_unwrap(name).startswith("encoder.") for name in state)
    for name, value in state.items():
        new = _unwrap(name)
        if pretrained and new.startswith(DECODER):
            report["dropped"].append(name)
            continue
        new = new.removeprefix("encoder.") if pretrained else new
        if new != name:
            report["renamed"].append(name)
        out[new] = value
    return out, report


def _unwrap(name: str) -> str:
    for prefix in WRAPPERS * 2:  # either may stand inside the other
        name = name.removeprefix(prefix)
    return name


def pick_weights(
    checkpoint: Any, source: str, model_key: str = MODEL_KEY, model_prefix: str = ""
) -> dict[str, Tensor]:
    """The state dict in a checkpoint: under the first of the keys that it has, or itself.

    model_prefix: what precedes the names of the weights that are wanted; others are left out.
    """
    holds = checkpoint if isinstance(checkpoint, dict) else {}
    keys = [key for key in model_key.split("|") if key in holds]
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
    path: str,
    model_key: str = MODEL_KEY,
    model_prefix: str = "",
    allow_missing: Iterable[str] = ("norm.", "head."),
) -> None:
    """Start a classifier from a checkpoint, pre-trained or fine-tuned; says what is new.

    A head for another number of classes stays as it was initialised, if `head.` may be missing.
    What else is missing, left over or of another shape is an error.
    """
    checkpoint = read_checkpoint(path)
    state, report = to_convnextv2(pick_weights(checkpoint, path, model_key, model_prefix))
    head, own = state.get("head.weight"), model.state_dict().get("head.weight")
    log = get_logger()
    if "head." in allow_missing and head is not None and (own is None or head.shape != own.shape):
        log.info("%s: its head for %d classes does not fit and is left out", path, len(head))
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    new = load_weights(model, state, path, allow_missing)
    log.info(
        "%s: loaded %d tensors, dropped %d of the decoder, new: %s",
        path,
        len(state),
        len(report["dropped"]),
        ", ".join(new) or "none",
    )
