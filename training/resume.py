# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Resume a run: find its newest intact checkpoint, compare flags, restore its parts.

python -c "from training import resume; print(resume.FIXED)"
"""

import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Mapping
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
from weights import files

REQUIRED = ("model", "optimizer", "state")  # entries without which no run can resume
# Flags that a resumed run must not change, and flags whose changes are not worth a line.
FIXED = ("model", "data_set", "opt", "in_chans", "stem_stride", "patch_size", "norm_pix_loss")
FIXED += ("decoder_depth", "decoder_embed_dim")
LOCAL = ("output_dir", "log_dir", "resume", "auto_resume", "sha256", "finetune", "use_ema")
LOCAL += ("config", "recipe", "data_index", "local_rank", "world_size", "dist_url", "progress")
LOCAL += ("dry_run", "shard", "grad_checkpointing")
ATTEMPTS, PAUSE = 3, 1.0  # to read a checkpoint, and seconds between them


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run starts from: none, a run to resume, or weights alone."""

    source: str = ""
    checkpoint: Any = None
    weights_only: str = ""  # why its weights alone are taken although a run could resume

    @property
    def is_run(self) -> bool:
        """True if there is a run to resume."""
        return bool(self.source) and not self.problem and not self.weights_only

    @property
    def is_weights(self) -> bool:
        """True if a new run starts from the weights of the checkpoint."""
        return bool(self.source) and not self.is_run

    @property
    def problem(self) -> str:
        """Reason why no run can resume from this checkpoint, '' if one can."""
        held = self.checkpoint if isinstance(self.checkpoint, dict) else {}
        missing = " and no ".join(name for name in REQUIRED if name not in held)
        return f"cannot resume: {self.source} holds no {missing}" if missing else ""

    def entry(self, name: str, default: Any = None) -> Any:
        """Return an entry of the run's checkpoint; the default without a run or such an entry."""
        return self.checkpoint.get(name, default) if self.is_run else default


def find_resume_point(
    folder: Path | None,
    resume: str = "",
    auto_resume: bool = True,
    sha256: str = "",
    args: Mapping[str, Any] | None = None,
    rename: bool = True,
) -> ResumePoint:
    """Read the checkpoint to continue from in the run's own `folder`, or else `resume`.

    `resume` is where a run starts: what it has saved itself since then takes precedence.
    args: current flags; changes since the checkpoint are logged, or refused. With --use_ema, or
        if the script is another, `resume` gives weights alone.
    rename: rename damaged files, so that they are not tried again.
    """
    args = args or {}
    own, damaged = from_main_process(lambda: _choose(folder, auto_resume))
    source = own or from_main_process(lambda: _find_start(resume, folder, args))
    if not source:
        return ResumePoint()
    ema, sha256 = bool(args.get("use_ema")), "" if own else sha256
    # The checksums of `own` are verified already.
    read = main_process_first(lambda: files.read_checkpoint(source, sha256, not own, ema))
    point = ResumePoint(source, read)
    if args and point.is_run:
        saved_args = point.entry("args", {})
        if not own and ema:
            return replace(point, weights_only=f"--use_ema and {source}")
        if not own and _kind(saved_args, args) != _kind(args):
            return replace(point, weights_only=f"{source} belongs to a {_kind(saved_args)} run")
        in_epoch = TrainState.from_dict(point.entry("state")).samples_in_epoch > 0
        for change in compare_args(saved_args, args, source, in_epoch):
            get_logger().warning("resuming %s with a changed flag: %s", source, change)
    from_main_process(lambda: _set_aside(damaged, rename))
    if rename and files.parse_checkpoint_name(Path(own)) and is_main_process():
        with contextlib.suppress(OSError):
            rotate(Path(own), sys.maxsize, resume)
    return point


def _find_start(resume: str, folder: Path | None, args: Mapping[str, Any]) -> str:
    """Return the path that --resume gives, for a folder that of its newest checkpoint.

    Raises UserError if the new run would replace the EMA weights that it starts from.
    """
    start, ema = Path(resume or args.get("finetune", "")), Path(folder or "", files.BEST_EMA)
    start /= ema.name * bool(args.get("use_ema") and start.is_dir())
    if folder and start.exists() and ema.exists() and start.samefile(ema):
        raise UserError(
            f"the run would replace {ema}, which it starts from; choose another --output_dir"
        )
    found = files.run_checkpoints(Path(resume)) if resume else []
    return str(found[0]) if found else resume


def auto_load_model(point: ResumePoint, parts: TrainableParts, start_epoch: int = 0) -> TrainState:
    """Restore the run of a `ResumePoint`, or return the state of a new one at `start_epoch`."""
    log, source = get_logger(), point.source
    if point.is_run:
        restore_run(point.checkpoint, source, parts)
        state = TrainState.from_dict(point.checkpoint["state"])
        log.info("resumed from %s: epoch %d, step %d", source, state.epoch, state.global_step)
        return state
    if source:
        text = "%s: only its weights are loaded; training starts at epoch %d"
        log.warning(text, point.problem or point.weights_only, start_epoch)
    return TrainState(start_epoch)


def _choose(folder: Path | None, auto_resume: bool) -> tuple[str, dict[Path, str]]:
    """Return a run's newest intact checkpoint, '' if it has none, and problems of newer ones."""
    paths = files.run_checkpoints(folder) if folder else []
    if paths and not auto_resume:
        raise UserError(
            f"--auto_resume false, but {folder} holds {paths[0].name}: the files of two runs would "
            "mix; choose another --output_dir or move these files away"
        )
    damaged: dict[Path, str] = {}
    for path in paths:
        problem = _find_problem(path)
        if not problem:
            return str(path), damaged
        damaged[path] = problem
    if damaged:
        raise UserError(
            f"no run can resume from a checkpoint in {folder} (newest: {damaged[paths[0]]}); "
            "choose another --output_dir, or move the checkpoints away to start again"
        )
    return "", damaged


def _find_problem(path: Path) -> str:
    """Reason why no run can resume from a file, '' if one can; UserError if the disk fails."""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * (attempt > 0))
        try:
            return ResumePoint(str(path), files.read_checkpoint(path)).problem
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, PermissionError):
                raise
            if not isinstance(cause, OSError) or cause.errno == errno.EINVAL:  # a damaged zip
                return str(error)
    raise UserError(f"checkpoint {path} cannot be read now ({cause}); try again") from cause


def _set_aside(damaged: Mapping[Path, str], rename: bool) -> None:
    """Rename damaged checkpoints, and say why another is used."""
    for path, problem in damaged.items():
        if rename:
            names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            os.rename(path, aside)
            problem += f"; renamed to {aside.name}"
        get_logger().warning("%s, trying the one before", problem)


def _kind(*flags: Mapping[str, Any]) -> str:
    """Return the kind of run that has these flags, the first that are not empty."""
    return "pre-training" if "mask_ratio" in next(filter(None, flags), {}) else "fine-tuning"


def compare_args(
    saved: Mapping[str, Any], now: Mapping[str, Any], source: str, in_epoch: bool = False
) -> list[str]:
    """`--lr 0.2 (was 0.1)` for each flag that changed; UserError if the run cannot resume with it.

    in_epoch: an epoch was interrupted; the order of its images depends on the seed.
    """
    changes, fixed = [], FIXED + ("seed",) * in_epoch
    if _kind(saved, now) != _kind(now):
        raise UserError(
            f"{source} belongs to a {_kind(saved)} run; {_kind(now)} needs another --output_dir"
        )
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
        before, value = ("not set" if v is None else v for v in (before, value))
        changes.append(f"--{name} {value} (was {before})")
    return changes
