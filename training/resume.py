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
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from config.flags import LISTED, as_typed, default_of, is_pretraining
from config.parser import absolute_paths
from config.paths import split_sources
from config.recipes import read_values
from config.sizes import as_one_flag
from config.tasks import TASKS, task_flags
from errors import UserError
from parallel.process_group import from_main_process, get_logger, main_process_first
from training.checkpoint import TrainableParts, TrainState, checkpoint_name, restore_run, rotate
from training.report import describe_progress
from utils import link
from weights import files
from weights.saved_run import EVAL_ONLY, INHERITED, RESUMED

REQUIRED = ("model", "optimizer", "state")  # entries without which no run can resume
# Flags that a resumed run must not change, and flags whose changes are not worth a line.
FIXED = ("model", "data_set", "opt", "in_chans", "stem_stride", "patch_size", "norm_pix_loss")
FIXED += ("decoder_depth", "decoder_embed_dim", "recon_loss", "val_split", "freeze_backbone")
FIXED += ("head", "heads", "linear_probe", "linear_probe_blr")
FIXED += ("task", "normalize_targets", "label_fraction")
IN_EPOCH = ("seed", "sampling", "weight_column")  # the order of an epoch depends on these
IN_EPOCH += ("num_samples", "aug_repeats")
ADDED = (
    "label_fraction",
    "num_samples",
    "aug_repeats",
    "linear_probe",
)  # not stored by earlier versions
LOCAL = ("output_dir", "log_dir", "resume", "auto_resume", "sha256", "finetune", "use_ema")
LOCAL += ("head_init_scale", "config", "recipe", "data_index", "local_rank", "world_size")
LOCAL += ("dist_url", "progress", "dry_run", "shard", "grad_checkpointing", "best_metric")
LOCAL += ("pretrained", "reset_head", "hook", "tracker", "project", "tags")
LOCAL += ("report",)
KEPT = {*INHERITED, *RESUMED} - {*EVAL_ONLY}
ATTEMPTS, PAUSE = 3, 1.0  # to read a checkpoint, and seconds between them


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run starts from: none, a run to resume, or weights alone."""

    source: str = ""
    checkpoint: Any = None
    weights_only_reason: str = ""  # not to resume the run of the checkpoint

    @property
    def is_run(self) -> bool:
        """True if there is a run to resume."""
        return bool(self.source) and not self.problem and not self.weights_only_reason

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
    given: Collection[str] | None = None,
) -> ResumePoint:
    """Read the checkpoint to continue from in the run's own `folder`, or else `resume`.

    `resume` is where a run starts: what it has saved itself since then takes precedence.
    args: current flags; changes since the checkpoint are logged, or refused. With --use_ema, or
        if `resume` belongs to another kind of run, only its weights are used.
    rename: rename damaged files, so that they are not tried again, and delete old saves.
    given: as in `compare_args`.
    """
    args = args or {}
    ema, start = bool(args.get("use_ema")), resume or args.get("finetune", "")
    own, damaged = from_main_process(lambda: _choose(folder, auto_resume))
    if folder and start and not own:
        from_main_process(lambda: _refuse_own_ema(folder, Path(start), ema))
    found = from_main_process(
        lambda: resume and not own and files.numbered_checkpoints(Path(resume))
    )
    source = own or (str(found[0]) if found else resume)  # a folder stands for its newest
    if not source:
        return ResumePoint()
    sha256 = "" if own else sha256  # the checksums of `own` are verified already
    read = main_process_first(lambda: files.read_checkpoint(source, sha256, not own, ema))
    point = ResumePoint(source, read)
    if args and point.is_run:
        saved_args, reason = point.entry("args", {}), ""
        if ema:
            reason = f"--use_ema: only the EMA weights of {source} are loaded"
        elif _kind(saved_args, args) != _kind(args):
            reason = f"{source} belongs to a {_kind(saved_args)} run: only its weights are loaded"
        elif _new_channels(saved_args, args, given):
            reason = f"--in_chans {args['in_chans']}: only the weights of {source} are loaded"
        if reason and not own:
            return replace(point, weights_only_reason=reason)
        if args.get("reset_head") and not own:
            text = f"--reset_head true: --resume {resume} continues that run with its heads; drop "
            raise UserError(f"{text}it, or start a new run with --finetune {resume}")
        in_epoch = TrainState.from_dict(point.entry("state")).samples_in_epoch > 0
        for change in compare_args(saved_args, args, source, in_epoch, given):
            get_logger().warning("resuming %s with a changed flag: %s", source, change)
    if own:
        from_main_process(lambda: _tidy(point, damaged, rename, resume))
    return point


def choose_evaluated(
    resume: str, folder: str, config: str | None, finetune: str, use_ema: bool
) -> str:
    """Return the weights to evaluate: `resume`, else the run in `folder`, else `finetune`.

    config: of --config; if `folder` comes from it, the folder that it is in takes precedence,
        since the run may have moved.
    """
    folders = [folder]
    if folder and config and read_values(Path(config)).get("output_dir") == folder:
        of_config = Path(config) if Path(config).is_dir() else Path(config).parent
        folders = [str(of_config), folder]
    own = from_main_process(
        lambda: [name for name in folders if name and files.list_checkpoints(Path(name), use_ema)]
    )
    if not (resume or own):
        if finetune:
            reason = f"{folder} holds no checkpoint" if folder else "no --output_dir names a run"
            get_logger().warning("%s: --finetune %s is evaluated", reason, finetune)
        return finetune or folder
    if resume and own and not Path(resume).resolve().is_relative_to(Path(own[0]).resolve()):
        get_logger().info("--resume %s is evaluated, not the run in %s", resume, own[0])
    return resume or own[0]


def _refuse_own_ema(folder: Path, start: Path, use_ema: bool) -> None:
    """UserError if a new run in `folder` would replace the EMA weights that it starts from."""
    ema = folder / files.BEST_EMA
    start = start / files.BEST_EMA if use_ema and start.is_dir() else start
    if start.exists() and ema.exists() and start.samefile(ema):
        raise UserError(
            f"the run would replace {ema}, which it starts from; choose another --output_dir"
        )


def _tidy(point: ResumePoint, damaged: Mapping[Path, str], rename: bool, resume: str) -> None:
    """Rename damaged checkpoints, number the one to resume, delete old saves within epochs."""
    for path, problem in damaged.items():
        if rename:
            names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            os.rename(path, aside)
            problem += f"; renamed to {aside.name}"
        get_logger().warning("%s; continuing from %s", problem, point.source)
    newest = source = Path(point.source)
    if not files.parse_checkpoint_name(source):  # the best one has no number
        state = TrainState.from_dict(point.entry("state"))
        newest = source.with_name(checkpoint_name(asdict(state)))
    if rename:
        with contextlib.suppress(OSError):
            if newest != source:
                link(source, newest)
            rotate(newest, sys.maxsize, resume)


def auto_load_model(point: ResumePoint, parts: TrainableParts, start_epoch: int = 0) -> TrainState:
    """Restore the run of a `ResumePoint`, or return the state of a new one at `start_epoch`."""
    log, source = get_logger(), point.source
    if point.is_run:
        restore_run(point.checkpoint, source, parts)
        state = TrainState.from_dict(point.checkpoint["state"])
        log.info("resumed from %s, %s", source, describe_progress(state))
        return state
    if source:
        reason = point.weights_only_reason or f"{point.problem}: only its weights are loaded"
        log.warning("%s; training starts at epoch %d", reason, start_epoch + 1)
    return TrainState(start_epoch)


def _choose(folder: Path | None, auto_resume: bool) -> tuple[str, dict[Path, str]]:
    """Return a run's newest intact checkpoint, '' if it has none, and problems of others."""
    if folder is None:
        return "", {}
    numbered, best = files.numbered_checkpoints(folder), folder / files.BEST
    ages = {path: files.parse_checkpoint_name(path) for path in numbered}
    if not auto_resume and (numbered or best.exists()):
        raise UserError(
            f"--auto_resume false, but {folder} holds {[*numbered, best][0].name}: the files of "
            "two runs would mix; choose another --output_dir or move these files away"
        )
    damaged: dict[Path, str] = {}
    if best.exists():
        problem, checkpoint = _read(best, check=False)
        if problem:
            damaged[best] = problem
        else:
            state = TrainState.from_dict(checkpoint["state"])
            ages[best] = (state.epoch, state.samples_in_epoch)
    for path in sorted(ages, key=ages.get, reverse=True):
        problem, _ = _read(path)
        if not problem:
            return str(path), damaged
        damaged[path] = problem
    if damaged:
        raise UserError(
            f"no run can resume from a checkpoint in {folder} ({next(iter(damaged.values()))}); "
            "choose another --output_dir, or move the checkpoints away to start again"
        )
    return "", damaged


def _read(path: Path, check: bool = True) -> tuple[str, Any]:
    """Return why no run can resume from a file, '' if one can, and its content.

    Raises UserError if the disk fails.
    """
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * (attempt > 0))
        try:
            content = files.read_checkpoint(path, check=check)
            return ResumePoint(str(path), content).problem, content
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, PermissionError):
                raise
            if not isinstance(cause, OSError) or cause.errno == errno.EINVAL:  # a damaged zip
                return str(error), None
    raise UserError(f"checkpoint {path} cannot be read now ({cause}); try again") from cause


def _kind(*flags: Mapping[str, Any]) -> str:
    """Return the kind of run that has these flags, the first that are not empty."""
    first = next(filter(None, flags), {})
    return "pre-training" if is_pretraining(first) else "fine-tuning"


def _new_channels(
    saved: Mapping[str, Any], now: Mapping[str, Any], given: Collection[str] | None
) -> bool:
    """Return True if the flags ask for another number of channels than a run has."""
    is_given = given is None or "in_chans" in given
    return is_given and saved.get("in_chans", now.get("in_chans")) != now.get("in_chans")


def _shares(path: str) -> list[float | None]:
    """Return the weights of the sources in --data_path."""
    return [weight for _, weight in split_sources(path)]


def _comparable(name: str, value: Any) -> Any:
    """Return the value of a flag, one for several that mean the same."""
    if name == "model":
        return str(value).removeprefix("fcmae_")
    return "auto" if name == "data_set" and value in LISTED else value


def compare_args(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    source: str,
    in_epoch: bool = False,
    given: Collection[str] | None = None,
) -> list[str]:
    """`--lr 0.2 (was 0.1)` for each flag that changed; UserError if the run cannot resume with it.

    in_epoch: an epoch was interrupted; the order of its images depends on the seed. given: names of
    the flags that were given; without one, the run keeps its size and preprocessing.
    """
    changes, fixed = [], FIXED + IN_EPOCH * in_epoch
    if now.get("label_fraction", 1) < 1:
        fixed += ("seed",)  # it chooses the images
    saved, now = (as_one_flag(absolute_paths(flags)) for flags in (saved, now))
    undecided = now.get("task") == "auto" or now.get("loss", "") is None
    if undecided and saved.get("task") in TASKS:  # the data decided in the first run
        now |= task_flags(now, given or (), TASKS[saved["task"]])
    hint = " (--finetune loads only its weights)" * (_kind(now) == "fine-tuning")
    if _kind(saved, now) != _kind(now):
        flag = "--finetune" if _kind(now) == "fine-tuning" else "--resume"
        raise UserError(
            f"{source} belongs to a {_kind(saved)} run; {_kind(now)} needs another --output_dir: "
            f"give it, and {flag} {Path(source).parent} to start from these weights"
        )
    for name, value in now.items():
        before = saved.get(name, default_of(name) if name in ADDED else value)
        before, value = _comparable(name, before), _comparable(name, value)
        if before == value or name in LOCAL:
            continue
        replaced = name == "val_split" and now.get("eval_data_path")
        if given is not None and name in KEPT and name not in given and not replaced:
            continue
        if replaced:
            raise UserError(
                f"{source} was evaluated on --val_split {before}, and a resumed run cannot change "
                f"that: drop --eval_data_path, or choose another --output_dir{hint}"
            )
        if in_epoch and name == "data_path" and _shares(before) != _shares(value):
            fixed += ("data_path",)  # other images would be drawn in the rest of the epoch
        if name in fixed:
            raise UserError(f"{source} {_describe_change(name, before, value)}{hint}")
        before, value = ("not set" if v is None else v for v in (before, value))
        changes.append(f"--{name} {value} (was {before})")
    return changes


def _describe_change(name: str, before: Any, value: Any) -> str:
    """Describe a change that a resumed run cannot make, and what to do."""
    had, fix = f"--{name} {as_typed(before)}", f"pass --{name} {as_typed(before)}"
    if before in (None, ""):
        had, fix = f"no --{name}", f"leave --{name} out"
    new = "without it" if value in (None, "") else f"with {as_typed(value)}"
    fix += ", or choose another --output_dir"
    return f"was trained with {had} and cannot resume {new}: {fix}"
