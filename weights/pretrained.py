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
from weights.convert import CLASSIFIER, DECODER, Report
from weights.files import check_finite, check_weights, find_source, load_weights, read_checkpoint
from weights.fit import find_classifier, fit_weights
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
    names = {*state} - {"n_averaged"}  # a counter of torch.optim.swa_utils.AveragedModel
    if all(name.startswith("module.") for name in names):
        state = {name: state[name] for name in state if name in names}
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
    another number of classes, or for other than `classes`, counts as absent, and the first layer is
    adapted to the model's channels. Other missing or unexpected names, other shapes, NaN and Inf
    are an error.
    """
    read = (model, source, model_key, model_prefix, sha256, new, classes)
    path, state, report, absent = _read_and_fit(*read)
    report.missing = load_weights(model, state, path, absent)
    report.loaded, report.source = list(state), path
    log = get_logger()
    for warning in report.warnings:
        log.warning("%s: %s", path, warning)
    log.info("loaded %d tensors from %s (%s)", len(state), path, report)
    if warning := large_weights(state):
        log.warning("%s: %s", path, warning)
    return report


def check_pretrained(
    model: nn.Module,
    source: str,
    model_key: str = MODEL_KEY,
    model_prefix: str = "",
    sha256: str = "",
    new: Iterable[str] = CLASSIFIER + DECODER,
) -> None:
    """Raise the UserError that `load_pretrained` would raise; the model may be on the meta device.

    It takes about a second; a script calls it before it spends minutes on the data.
    """
    path, state, _, absent = _read_and_fit(model, source, model_key, model_prefix, sha256, new)
    check_weights(model, state, path, absent)


def _read_and_fit(
    model: nn.Module,
    source: str,
    model_key: str,
    model_prefix: str,
    sha256: str,
    new: Iterable[str],
    classes: Sequence[str] | None = None,
) -> tuple[str, dict[str, Tensor], Report, list[str]]:
    """Return the file, the weights under the model's names, a report, and what they may lack."""
    path, checkpoint = _read(source, model_key, sha256)
    selected = select_state_dict(checkpoint, path, model_key, model_prefix)
    saved = read_saved_run(checkpoint, path).head.names
    try:
        state, report = fit_weights(model, selected, new, saved, classes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    statistics = {n: v for n, v in state.items() if n.endswith(("running_mean", "running_var"))}
    check_finite(statistics, path)  # of BatchNorm, with which every output would be NaN
    parts = [part for part in new if part != "head."]
    parts += find_classifier(model) or ("head.",) if "head." in new else ()
    absent = [part for part in parts if not any(name.startswith(part) for name in state)]
    return path, state, report, absent


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
