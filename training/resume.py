# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What a run goes on from: the newest checkpoint that is whole, what may have changed since.

python -c "from training import resume; print(resume.FIXED)"
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errors import UserError
from parallel.process_group import (
    from_main_process,
    get_logger,
    is_main_process,
    main_process_first,
)
from training.checkpoint import TrainState, drop_passed, restore_run
from weights.files import numbered_checkpoints, read_checkpoint

RUN = ("model", "optimizer", "state")  # what a checkpoint holds if a run can go on from it
# Flags without which it is not the same run, and those that are nobody's affair.
FIXED = ("model", "data_set", "opt", "in_chans", "stem_stride", "patch_size", "norm_pix_loss")
FIXED += ("decoder_depth", "decoder_embed_dim")
LOCAL = ("output_dir", "log_dir", "resume", "auto_resume", "sha256", "finetune", "config", "recipe")
LOCAL += ("data_index", "local_rank", "world_size", "dist_url", "progress", "dry_run")
LOCAL += ("shard", "grad_checkpointing")
ATTEMPTS, PAUSE = 3, 1.0  # to read a checkpoint, seconds between them


@dataclass(frozen=True)
class Start:
    """What a run goes on from: nothing, a run of this toolkit, or weights alone."""

    source: str = ""
    checkpoint: Any = None
    as_weights: bool = False  # of another kind of run, or of an average that somebody asked for

    @property
    def is_run(self) -> bool:
        """Whether there is more than weights."""
        return bool(self.source) and not self.absent() and not self.as_weights

    @property
    def effective_batch(self) -> int:
        """Images in an update of the run; 0 where there was none."""
        return self.checkpoint["state"].get("effective_batch", 0) if self.is_run else 0

    @property
    def kernels(self) -> dict[str, dict[str, str]]:
        """The kernel choices of the run; empty where there was none, or an older version's."""
        return self.checkpoint.get("kernels", {}) if self.is_run else {}

    def absent(self) -> list[str]:
        """What a run has and this has not."""
        holds = self.checkpoint if isinstance(self.checkpoint, dict) else {}
        return [key for key in RUN if key not in holds]


def find_start(
    folder: Path | None,
    resume: str = "",
    auto_resume: bool = True,
    sha256: str = "",
    args: Mapping[str, Any] | None = None,
    rename: bool = True,
) -> Start:
    """The newest readable checkpoint of `folder`, else `resume`, read on every rank.

    A damaged newest file is passed over with a warning; if none can be read that is an error.
    `resume` is where a run starts: what the run has since saved itself wins. args: the flags now;
    what they change of the run's is told, or refused. rename: damaged files, out of the way.
    """
    source = from_main_process(lambda: choose_checkpoint(folder, resume, auto_resume, rename))
    if not source:
        return Start()
    named = source == resume  # what lies in the folder is checked already
    expected = sha256 if named else ""
    start = Start(
        source, main_process_first(lambda: read_checkpoint(source, expected, check=named))
    )
    if args is not None and start.is_run and named:
        was_pretraining = "mask_ratio" in start.checkpoint.get("args", {})
        other = was_pretraining != ("mask_ratio" in args) or args.get("use_ema", False)
        start = replace(start, as_weights=other)
    if args is not None and start.is_run:
        within = start.checkpoint["state"].get("seen", 0) > 0
        for change in compare_args(start.checkpoint.get("args", {}), args, source, within):
            get_logger().warning("%s: changed since, %s", source, change)
    if rename and source != resume and is_main_process():  # it goes on: what that file has passed
        drop_passed(Path(source), resume)
    if source != resume and start.absent():
        raise UserError(f"{source} has no {', '.join(start.absent())}: it is no run to go on with")
    return start


def auto_load_model(
    start: Start,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
    model_ema: nn.Module | None = None,
    *,
    load: Callable[[str], Any] | None = None,
    fresh: int = 0,
) -> TrainState:
    """Continue a run from what `find_start` found, or begin one at epoch `fresh`.

    load: what loads weights that are no run, and their average; without it they are an error.
    """
    log, source, absent = get_logger(), start.source, start.absent()
    if not source:
        return TrainState(fresh)
    if absent and load is None:
        raise UserError(f"{source} has no {', '.join(absent)}: it is no run to go on with")
    if not start.is_run:
        why = f"it has no {' and '.join(absent)}" if absent else "no run to go on with here"
        log.warning("%s: %s; training starts from its weights, at epoch %d", source, why, fresh)
        load(source)
        return TrainState(fresh)
    restore_run(start.checkpoint, source, model, optimizer, scaler, model_ema)
    state = TrainState(**start.checkpoint["state"])
    log.info("resumed from %s: epoch %d, update %d", source, state.epoch, state.updates)
    return state


def choose_checkpoint(
    folder: Path | None, resume: str, auto_resume: bool, rename: bool = True
) -> str:
    """The file that a run goes on from: the newest readable one, else `resume`, '' for none.

    rename: what is damaged, so that nobody tries it again.
    """
    paths = numbered_checkpoints(folder) if folder and folder.is_dir() else []
    if paths and not auto_resume:
        raise UserError(
            f"--auto_resume false, but {folder} holds {paths[0].name}: a new run would mix with "
            "that one; choose another --output_dir or move its files away"
        )
    reasons: dict[Path, str] = {}
    good = next((path for path in paths if not _note_fault(path, reasons)), None)
    if paths and good is None and not resume:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {folder} can be used, the newest since "
            f"{reasons[paths[0]]}; choose another --output_dir, or move them away to start anew"
        )
    for path, reason in reasons.items():
        aside = f"; it is now called {_set_aside(path).name}" if rename else ""
        logging.getLogger("convnextv2").warning("%s%s, trying the one before", reason, aside)
    return str(good) if good else resume


def _note_fault(path: Path, reasons: dict[Path, str]) -> bool:
    """Whether a run cannot go on from what should be its checkpoint; the reason goes there.

    A disk that does not answer is no fault of the file: it is asked again, then that is an error.
    """
    for attempt in range(ATTEMPTS):
        try:
            content = read_checkpoint(path)
            absent = [key for key in RUN if key not in content]
            if absent:
                raise UserError(f"checkpoint {path} has no {', '.join(absent)}")
        except UserError as error:
            reasons[path] = str(error)
        except OSError as error:
            if attempt + 1 == ATTEMPTS:
                raise UserError(
                    f"checkpoint {path} cannot be read now ({error}); try again"
                ) from error
            time.sleep(PAUSE)
            continue
        break
    return path in reasons


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nobody tries it again and nothing is lost."""
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
    aside = next(name for name in names if not name.exists())
    os.rename(path, aside)
    return aside


def compare_args(
    saved: Mapping[str, Any], given: Mapping[str, Any], source: str, within: bool = False
) -> list[str]:
    """`--lr 0.1 -> 0.2` for each flag that changed; UserError where a run cannot go on with it.

    within: an epoch, whose order depends on the seed.
    """
    told, fixed = [], FIXED + ("seed",) * within
    for name, now in given.items():
        before = saved.get(name, now)
        if name == "model":  # of which either name will do
            before, now = (str(value).removeprefix("fcmae_") for value in (before, now))
        if before == now or name in LOCAL:
            continue
        if name in fixed:
            raise UserError(
                f"{source} was made with --{name} {before} and cannot go on with {now}: give what "
                "it had, or another --output_dir; --finetune starts from its weights alone"
            )
        told.append(f"--{name} {before} -> {now}")
    return told
