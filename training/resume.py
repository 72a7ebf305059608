# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Resume a run: find its newest intact checkpoint, compare flags, restore its parts.

python -c "from training import resume; print(resume.FIXED)"
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import UserError
from parallel.process_group import (
    from_main_process,
    get_logger,
    is_main_process,
    main_process_first,
)
from training.checkpoint import TrainableParts, TrainState, restore_run, rotate
from weights.files import numbered_checkpoints, read_checkpoint

REQUIRED = ("model", "optimizer", "state")  # entries without which no run can resume
# Flags that a resumed run must not change, and flags whose changes are not worth a line.
FIXED = ("model", "data_set", "opt", "in_chans", "stem_stride", "patch_size", "norm_pix_loss")
FIXED += ("decoder_depth", "decoder_embed_dim")
LOCAL = ("output_dir", "log_dir", "resume", "auto_resume", "sha256", "finetune", "config", "recipe")
LOCAL += ("data_index", "local_rank", "world_size", "dist_url", "progress", "dry_run")
LOCAL += ("shard", "grad_checkpointing")
ATTEMPTS, PAUSE = 3, 1.0  # to read a checkpoint, seconds between them


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run starts from: none, a run to resume, or weights alone."""

    source: str = ""
    checkpoint: Any = None
    as_weights: bool = False  # weights only: from pre-training to fine-tuning, or with --use_ema

    @property
    def is_run(self) -> bool:
        """True if there is a run to resume."""
        return bool(self.source) and not self.missing() and not self.as_weights

    @property
    def effective_batch(self) -> int:
        """Images in an optimizer step of the run; 0 without one."""
        return self.entry("state", {}).get("effective_batch", 0)

    def entry(self, name: str, default: Any = None) -> Any:
        """Return an entry of the run's checkpoint; the default without a run or such an entry."""
        return self.checkpoint.get(name, default) if self.is_run else default

    def missing(self) -> list[str]:
        """Entries that a run needs and this checkpoint does not hold."""
        held = self.checkpoint if isinstance(self.checkpoint, dict) else {}
        return [name for name in REQUIRED if name not in held]


def find_resume_point(
    folder: Path | None,
    resume: str = "",
    auto_resume: bool = True,
    sha256: str = "",
    args: Mapping[str, Any] | None = None,
    rename: bool = True,
) -> ResumePoint:
    """Read the newest intact checkpoint of `folder`, or else `resume`, on every rank.

    `resume` is where a run starts: what it has saved itself since then takes precedence.
    args: current flags; changes since the checkpoint are logged, or refused.
    rename: rename damaged files, so that they are not tried again.
    """
    source = from_main_process(lambda: choose_checkpoint(folder, resume, auto_resume, rename))
    if not source:
        return ResumePoint()
    named = source == resume  # files in the folder are checked already
    digest = sha256 if named else ""
    read = main_process_first(lambda: read_checkpoint(source, digest, check=named))
    point = ResumePoint(source, read)
    if args is not None and point.is_run and named:
        was_pretraining = "mask_ratio" in point.entry("args", {})
        other_kind = was_pretraining != ("mask_ratio" in args)
        point = replace(point, as_weights=other_kind or args.get("use_ema", False))
    if args is not None and point.is_run:
        state = TrainState.from_dict(point.entry("state"))
        for change in compare_args(
            point.entry("args", {}), args, source, state.samples_in_epoch > 0
        ):
            get_logger().warning("%s: changed since then: %s", source, change)
    if not named and point.missing():
        raise UserError(_cannot_resume(point))
    if rename and not named and is_main_process():
        with contextlib.suppress(OSError):
            rotate(Path(source), sys.maxsize, resume)
    return point


def _cannot_resume(point: ResumePoint) -> str:
    return f"cannot resume: {point.source} holds no {' and no '.join(point.missing())}"


def auto_load_model(
    point: ResumePoint,
    parts: TrainableParts,
    load: Callable[[Any, str], Any] | None = None,
    start_epoch: int = 0,
) -> TrainState:
    """Restore the run of a `ResumePoint`, or start a new one at `start_epoch`.

    load: called with (EMA model or None, path) to load weights alone; None makes them an error.
    """
    log, source = get_logger(), point.source
    if point.is_run:
        restore_run(point.checkpoint, source, parts)
        state = TrainState.from_dict(point.checkpoint["state"])
        log.info("resumed from %s: epoch %d, step %d", source, state.epoch, state.global_step)
        return state
    if source:
        if load is None:
            raise UserError(_cannot_resume(point))
        why = _cannot_resume(point) if point.missing() else f"{source} serves as weights alone"
        log.warning("%s; training starts from its weights, at epoch %d", why, start_epoch)
        load(parts.model_ema, source)
    return TrainState(start_epoch)


def choose_checkpoint(
    folder: Path | None, resume: str, auto_resume: bool, rename: bool = True
) -> str:
    """Path of the newest intact checkpoint of `folder`, or else `resume`, or ''."""
    paths = numbered_checkpoints(folder) if folder and folder.is_dir() else []
    if paths and not auto_resume:
        raise UserError(
            f"--auto_resume false, but {folder} holds {paths[0].name}: the files of two runs would "
            "mix; choose another --output_dir or move these files away"
        )
    problems: dict[Path, str] = {}
    intact = ""
    for path in paths:
        problems[path] = _find_problem(path)
        if not problems[path]:
            intact = str(path)
            break
    if paths and not intact and not resume:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {folder} can be used (newest: "
            f"{problems[paths[0]]}); choose another --output_dir, or move them away to start again"
        )
    for path, problem in problems.items():
        if problem:
            renamed = f"; renamed to {_set_aside(path).name}" if rename else ""
            get_logger().warning("%s%s, trying the one before", problem, renamed)
    return intact or resume


def _find_problem(path: Path) -> str:
    """Reason why no run can resume from a file, '' if one can.

    A disk that does not answer says nothing about the file: try again, then raise.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        try:
            point = ResumePoint(str(path), read_checkpoint(path))
            return _cannot_resume(point) if point.missing() else ""
        except UserError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno == errno.EINVAL:  # a damaged zip
                return str(error)
    raise UserError(f"checkpoint {path} cannot be read now ({cause}); try again") from cause


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint."""
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
    aside = next(name for name in names if not name.exists())
    os.rename(path, aside)
    return aside


def compare_args(
    saved: Mapping[str, Any], now: Mapping[str, Any], source: str, within_epoch: bool = False
) -> list[str]:
    """`--lr 0.1 -> 0.2` for each flag that changed; UserError if the run cannot resume with it.

    within_epoch: the rest of an epoch is to run, whose order depends on the seed.
    """
    changes, fixed = [], FIXED + ("seed",) * within_epoch
    for name, value in now.items():
        before = saved.get(name, value)
        if name == "model":  # either name is valid
            before, value = (str(model).removeprefix("fcmae_") for model in (before, value))
        if before == value or name in LOCAL:
            continue
        if name in fixed:
            raise UserError(
                f"{source} was trained with --{name} {before} and cannot resume with {value}: "
                f"pass --{name} {before}, or choose another --output_dir (--finetune loads only "
                "its weights)"
            )
        changes.append(f"--{name} {before} -> {value}")
    return changes
