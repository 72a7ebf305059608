# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Load pretrained weights of any layout into a model, all of them or none, with a report.

python main_finetune.py --model convnextv2_atto --data_set DIGITS --input_size 32 --finetune FILE
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
PARAMETERS = ("weight", "bias")  # last parts of names; other tensors may hold Inf, as masks do
STATISTICS = ("running_mean", "running_var")  # of BatchNorm; with NaN every output would be NaN
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


@dataclass(frozen=True)
class Pretrained:
    """Weights of a checkpoint that is read once, to check and to load them.

    path: of the file, for messages. key: keys of the weights, tried in order. prefix: to strip
    from their names. The tensors are mapped from the file, and their memory is free when this is.
    """

    path: str
    checkpoint: Any
    key: str = MODEL_KEY
    prefix: str = ""

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The weights under the file's names, without the prefix."""
        return select_state_dict(self.checkpoint, self.path, self.key, self.prefix)

    @cached_property
    def saved(self) -> SavedRun:
        """The flags and the head of the run that wrote the checkpoint."""
        return read_saved_run(self.checkpoint, self.path, self.state)

    @property
    def ema(self) -> "Pretrained | None":
        """The EMA weights of the same file, None if it has none."""
        content = self.checkpoint if isinstance(self.checkpoint, dict) else {}
        found = any(content.get(key) is not None for key in EMA_KEY.split("|"))
        return replace(self, key=EMA_KEY) if found else None

    def load(
        self,
        model: nn.Module,
        new: Iterable[str] = CLASSIFIER + DECODER,
        classes: Sequence[str] | None = None,
        reset_head: bool = False,
    ) -> Report:
        """Load into a classifier or an FCMAE, all weights or none.

        new: prefixes of parts that may be absent from the checkpoint as a whole; they stay as
        initialized. If `head.` is one of them, a head for another number of classes, or for other
        than `classes`, counts as absent, and the first layer is adapted to the model's channels.
        With reset_head every head counts as absent.
        Other missing or unexpected names, other shapes, NaN and Inf are an error.
        """
        state, report, absent = self._fit(model, new, classes, reset_head)
        report.missing = load_weights(model, state, self.path, absent)
        report.loaded, report.source = list(state), self.path
        log = get_logger()
        for warning in report.warnings:
            log.warning("%s: %s", self.path, warning)
        log.info("loaded %d tensors from %s (%s)", len(state), self.path, report)
        if warning := large_weights(state):
            log.warning("%s: %s", self.path, warning)
        return report

    def check(self, model: nn.Module, new: Iterable[str] = CLASSIFIER + DECODER) -> None:
        """Raise the UserError that `load` would raise; the model may be on the meta device."""
        state, _, absent = self._fit(model, new)
        check_weights(model, state, self.path, absent)

    def check_values(self) -> None:
        """Raise UserError if weights or statistics are not finite; it needs no model."""
        names = [name for name in self.state if name.split(".")[-1] in PARAMETERS + STATISTICS]
        check_finite({name: self.state[name] for name in names}, self.path)

    def _fit(
        self,
        model: nn.Module,
        new: Iterable[str],
        classes: Sequence[str] | None = None,
        reset_head: bool = False,
    ) -> tuple[dict[str, Tensor], Report, list[str]]:
        """Return the weights under the model's names, a report, and what they may lack."""
        weights, saved = self.state, self.saved.head.names
        try:
            state, report = fit_weights(model, weights, new, saved, classes, reset_head)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        check_finite({n: v for n, v in state.items() if n.endswith(STATISTICS)}, self.path)
        parts = [part for part in new if part != "head."]
        parts += find_classifier(model) or ("head.",) if "head." in new else ()
        absent = [part for part in parts if not any(name.startswith(part) for name in state)]
        return state, report, absent


def read_pretrained(
    source: str,
    model_key: str = MODEL_KEY,
    model_prefix: str = "",
    sha256: str = "",
    check: bool = True,
) -> Pretrained:
    """Read weights; source, sha256, check: as in `weights.files.read_checkpoint`."""
    file = main_process_first(lambda: find_source(source, sha256, ema=model_key == EMA_KEY))
    path = str(file) if Path(source).is_dir() else source
    return Pretrained(path, read_checkpoint(file, check=check), model_key, model_prefix)


def load_pretrained(
    model: nn.Module,
    source: str,
    model_key: str = MODEL_KEY,
    model_prefix: str = "",
    sha256: str = "",
    new: Iterable[str] = CLASSIFIER + DECODER,
    classes: Sequence[str] | None = None,
) -> Report:
    """Read weights of any layout and load them; new, classes: as in `Pretrained.load`."""
    return read_pretrained(source, model_key, model_prefix, sha256).load(model, new, classes)


def large_weights(state: Mapping[str, Tensor]) -> str:
    """Return a warning if an encoder's weights are too large for half precision, else ''.

    The official pre-training draws weights from a truncated normal with std 1: rms 0.88, not 0.02.
    """
    rms = [v.float().square().mean().sqrt() for n, v in state.items() if "pwconv1.weight" in n]
    typical = torch.stack(rms).median().item() if rms else 0.0
    return TOO_LARGE % typical if typical > 0.5 else ""
