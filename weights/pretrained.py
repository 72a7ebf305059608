# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Load pretrained weights of any layout into a model, all of them or none, with a report.

python main_finetune.py --model convnextv2_atto --data_set DIGITS --input_size 32 --finetune FILE
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config.flags import MODEL_KEY
from errors import UserError, first_few
from parallel.process_group import get_logger, main_process_first
from weights.convert import CLASSIFIER, DECODER, SIGNS, Report, to_convnextv2, unwrap
from weights.files import find_source, load_weights, read_checkpoint
from weights.saved_run import SavedRun, read_saved_run

EMA_KEY = "model_ema|state_dict_ema"
TOO_LARGE = (
    "the rms of its pointwise weights is %.2f, where 0.02 to 0.1 is usual; the official code's "
    "initialization with std 1 causes this. In fp16 activations can exceed 65504 and the loss "
    "become NaN: train with --amp bf16 or none, and do not export it in float16"
)


def select_state_dict(
    checkpoint: Any, source: str, model_key: str = MODEL_KEY, model_prefix: str = ""
) -> dict[str, Tensor]:
    """Return the state dict under the first of the keys that a checkpoint has, or itself.

    model_prefix: prefix to strip from the names; names without it are left out.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    found = [content[key] for key in model_key.split("|") if content.get(key) is not None]
    state = found[0] if found else content if model_key == MODEL_KEY else {}  # a bare state dict
    tensors = state.values() if isinstance(state, dict) else [None]
    if not state or not all(isinstance(value, Tensor) for value in tensors):
        got = first_few(content) or type(checkpoint).__name__
        raise UserError(
            f"{source} contains {got}; expected weights under {model_key!r}, as --model_key says"
        )
    n = len(model_prefix)
    selected = {name[n:]: value for name, value in state.items() if name.startswith(model_prefix)}
    if not selected:
        raise UserError(
            f"--model_prefix {model_prefix}: no name in {source} starts with it, but there is "
            f"{first_few(state, 1)}"
        )
    return selected


def peek(
    source: str, model_key: str = MODEL_KEY, model_prefix: str = "", sha256: str = ""
) -> SavedRun:
    """Return what a checkpoint tells about its run, without verifying its checksums."""
    path, checkpoint = _read(source, model_key, sha256, check=False)
    weights = select_state_dict(checkpoint, path, model_key, model_prefix)
    return read_saved_run(checkpoint, path, weights)


def _read(source: str, model_key: str, sha256: str, check: bool = True) -> tuple[str, Any]:
    """Return the name of a source's file for messages, and its content."""
    file = main_process_first(lambda: find_source(source, sha256, ema=model_key == EMA_KEY))
    path = str(file) if Path(source).is_dir() else source
    return path, read_checkpoint(file, check=check)


def load_pretrained(
    model: nn.Module,
    source: str,
    model_key: str = MODEL_KEY,
    model_prefix: str = "",
    sha256: str = "",
    new: Iterable[str] = CLASSIFIER + DECODER,
    classes: Sequence[str] | None = None,
) -> Report:
    """Load weights of any layout into a classifier or an FCMAE, all of them or none.

    source, sha256: as in `weights.files.find_source`. new: prefixes of parts that may be absent
    from the checkpoint as a whole; they stay as initialized. If `head.` is one of them, a head for
    another number of classes, or for other than `classes`, counts as absent. Other missing or
    unexpected names and other shapes are an error that lists them.
    """
    log = get_logger()
    path, checkpoint = _read(source, model_key, sha256)
    expected = model.state_dict()
    selected = select_state_dict(checkpoint, path, model_key, model_prefix)
    try:
        state, report = _rename(selected, expected)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    left_out = tuple(getattr(model, "left_out", ()))  # a backbone has no head, or not all stages
    head, own_head = state.get("head.weight"), expected.get("head.weight")
    if "head." in new and head is not None:
        saved = read_saved_run(checkpoint, path).head.names
        others = None not in (saved, classes) and list(classes) != list(saved)
        if others or own_head is None or head.shape != own_head.shape:
            names = f" ({first_few(saved, 5)})" if saved else ""
            text = "%s: its head has %d classes%s, so the model gets a new head"
            log.warning(text, path, len(head), names)
            left_out += ("head.",)
    report.dropped += [name for name in state if name.startswith(left_out)]
    state = {name: value for name, value in state.items() if not name.startswith(left_out)}
    absent = [part for part in new if not any(name.startswith(part) for name in state)]
    report.missing = load_weights(model, state, path, absent)
    report.loaded, report.source = list(state), path
    log.info("loaded %d tensors from %s (%s)", len(state), path, report)
    if warning := large_weights(state):
        log.warning("%s: %s", path, warning)
    return report


def _rename(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Report]:
    """Convert any layout to a ConvNeXt V2's names; other models have only their own names."""
    is_fcmae = any(name.startswith("encoder.") for name in expected)
    if any(name.removeprefix("encoder.") in SIGNS for name in expected):
        return to_convnextv2(state, decoder=is_fcmae)
    own, report = {unwrap(name): value for name, value in state.items()}, Report("own")
    if not is_fcmae and any(name.startswith("encoder.") for name in own):  # of an autoencoder
        report.dropped = [name for name in own if name.startswith(DECODER)]
        kept = [name for name in own if name not in report.dropped]
        own = {name.removeprefix("encoder."): own[name] for name in kept}
    return own, report


def has_ema(source: str, sha256: str = "") -> bool:
    """Return True if a checkpoint contains EMA weights."""
    checkpoint = read_checkpoint(main_process_first(lambda: find_source(source, sha256)))
    content = checkpoint if isinstance(checkpoint, dict) else {}
    return any(content.get(key) is not None for key in EMA_KEY.split("|"))


def large_weights(state: Mapping[str, Tensor]) -> str:
    """Return a warning if an encoder's weights are too large for half precision, else ''.

    The official pre-training draws weights from a truncated normal with std 1: rms 0.88, not 0.02.
    """
    rms = [v.float().square().mean().sqrt() for n, v in state.items() if "pwconv1.weight" in n]
    typical = torch.stack(rms).median().item() if rms else 0.0
    return TOO_LARGE % typical if typical > 0.5 else ""
