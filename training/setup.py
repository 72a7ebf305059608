# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Set up a run: process group, precision, output folder, resume point; the parts of a train loop.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --epochs 1 --dry_run
"""

import contextlib
import hashlib
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
from config.checks import idle_in_evaluation
from config.flags import is_code, is_pretraining, library_of
from config.parser import LIBRARIES
from config.sizes import as_one_flag
from config.tasks import possible_kinds, task_flags
from data_loading.labels import Head
from data_loading.mixing import Mixing
from data_loading.rng import make_deterministic
from errors import UserError, first_few, see_working_folder
from models.heads import check_heads, has_own_head
from models.kernels.autotune import autotuner, set_kernels
from optim_factory import build_optimizer_call, build_rules, choose_update_freq
from parallel import console, process_group, sharding
from parallel.process_group import all_gather, broadcast, get_logger, get_world_size
from training import run_lock
from training.anomaly import AnomalyGuard
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.criterion import check_loss
from training.cuda_graphs import check_graphs
from training.ema import ModelEma
from training.evaluation import build_metrics
from training.freeze import Freezer
from training.hook_table import check_built_in_hooks, check_hooks, idle_hooks
from training.hooks import Reporter
from training.metrics import default_metrics
from training.precise_bn import check_norms
from training.probes import check_probes
from training.resume import ResumePoint, find_resume_point
from training.run_folder import create_run_folder, folder_name
from training.schedules import Schedule, build_curves
from training.stepper import Stepper, choose_amp
from weights.convert import CLASSIFIER, DECODER
from weights.library import read_library_weights
from weights.pretrained import EMA_KEY, Pretrained, read_pretrained
from weights.saved_run import SavedRun, inherit_flags, kept_head, read_saved_run

ROOT = Path(__file__).resolve().parents[1]
LOCAL_FLAGS = ("local_rank", "num_workers")  # flags that may differ between ranks


@dataclass(frozen=True)
class RunSetup:
    """Settings of a run that are known before its data is loaded."""

    args: Any  # flags, some of them taken from the checkpoint that the run starts from
    head: Head | None  # of that checkpoint; None if it is not kept
    parallelism: sharding.Parallelism
    output_dir: Path | None  # locked for this run
    resume_point: ResumePoint
    weights: Pretrained | None  # to start from; None for random ones, or if a run resumes
    update_freq: int  # micro-batches in an optimizer step
    effective_batch: int  # images in an optimizer step, over all ranks


def setup_process(args: Any) -> tuple[torch.device, str]:
    """Join the process group and set up kernels and determinism; returns (device, precision)."""
    device = process_group.init_distributed_mode(
        args.device, args.dist_url, args.world_size, args.local_rank, args.dist_on_itp
    )
    check_ranks_agree(vars(args))
    check_flags(args)
    log_idle_flags(args)
    set_kernels(args.kernels, device)
    make_deterministic(args.deterministic, device)
    return device, choose_amp(args.amp, args.use_amp, device)


def check_flags(args: Any) -> None:
    """Raise UserError, before the data is listed, for values of flags that cannot work."""
    checks = models.check_model, build_optimizer_call, build_rules, build_curves, check_hooks
    for check in (*checks, check_probes):
        check(args)
    check_heads_and_task(args)


def check_heads_and_task(args: Any) -> None:
    """Raise UserError for heads, a loss or metrics that cannot work."""
    if not is_pretraining(vars(args)):
        check_heads(args)
        check_task(args)


def log_idle_flags(args: Any) -> None:
    """Name the flags of the command line that do nothing with --eval."""
    hooks = idle_hooks(args) if "hook" in args.typed else ()
    names = [f"--{name}" for name in idle_in_evaluation(args)] + [f"--hook {x}" for x in hooks]
    if names:
        get_logger().info("with --eval these do nothing: %s", ", ".join(names))


def check_task(args: Any) -> None:
    """Raise UserError for a loss or metrics that fit no kind of targets that the data may have.

    The data may tell its kind only when it is listed: then they are checked for it.
    """
    problem = None
    for kind in possible_kinds(vars(args)):
        try:
            build_metrics(args, kind=kind)
            return check_loss(args, kind)
        except UserError as error:
            problem = problem or error
    raise problem


def settle_task(args: Any, kind: str) -> Any:
    """Return `args` with what --task auto and an absent --loss stand for with this data."""
    if kind != "number" and "normalize_targets" in args.given and not args.normalize_targets:
        raise UserError(
            "--normalize_targets false is for numbers, and the data has classes; drop it, or give "
            "--task regression"
        )
    new = args.replace(**task_flags(vars(args), args.given, kind))
    if kind != "class" or args.task == "auto":
        metrics = " ".join(args.metrics or default_metrics(kind))
        text = "task %s: --loss %s, metrics %s"
        get_logger().info(text, new.task, new.loss, metrics)
    return new


def setup_run(args: Any, device: torch.device, amp: str) -> RunSetup:
    """Check the parallel mode, lock the output folder and find the checkpoint to resume from."""
    parallelism = sharding.build_parallelism(args, device, amp)
    args = _choose_folder(args)
    output_dir = Path(args.output_dir) if args.output_dir else None
    if not args.dry_run:
        run_lock.acquire_run_lock(args.output_dir)
    console.open_console_log(None if args.dry_run else output_dir)
    log_recipe(args)
    resume_point = find_resume_point(
        output_dir,
        args.resume,
        args.auto_resume,
        args.sha256,
        vars(args),
        rename=not args.dry_run,
        given=args.given,
    )
    weights = _read_start(args, resume_point)
    saved = weights.saved if weights else _saved_run(resume_point)
    args = inherit_flags(args, saved, resume_point.is_run)
    check_heads_and_task(args)  # again, with the flags of the checkpoint
    check_built_in_hooks(args)
    autotuner.restore(resume_point.entry("kernels", {}), device)
    update_freq = choose_update_freq(
        args.update_freq,
        args.effective_batch,
        args.batch_size,
        get_world_size(),
        resume_point.entry("state", {}).get("effective_batch", 0),
    )
    check_graphs(args.cuda_graphs, device, update_freq)
    effective_batch = args.batch_size * update_freq * get_world_size()
    check_start(args, weights)
    return RunSetup(
        args,
        kept_head(args, saved, resume_point.is_run),
        parallelism,
        output_dir,
        resume_point,
        weights,
        update_freq,
        effective_batch,
    )


def _choose_folder(args: Any) -> Any:
    """Return `args` with a folder of the run, a new one if none is given, and log it."""
    folder, log = args.output_dir, get_logger()
    if folder is None:
        model = args.model
        if "model" not in args.given and not args.sha256:  # that of the weights to start from
            weights = _read_start(args, ResumePoint(args.resume), check=False)
            model = weights.saved.flags.get("model", model) if weights else model
        if args.dry_run:
            folder = str(folder_name(args, model, time.time()))
        else:
            folder = create_run_folder(args, model)
            log.info("%s: a new run; to continue it, add --output_dir %s", folder, folder)
    elif not args.dry_run:
        log.info("%s", f"output folder {folder}" if folder else "--output_dir none: nothing saved")
    return args.replace(output_dir=folder)


def log_recipe(args: Any) -> None:
    """Log the flags of --recipe."""
    if args.recipe:
        get_logger().info("recipe %s", args.recipe)


def _saved_run(point: ResumePoint) -> SavedRun:
    """Return what the checkpoint of a run that resumes tells about it; nothing without one."""
    if not point.is_run:
        return SavedRun()
    return read_saved_run(point.checkpoint, point.source, point.checkpoint["model"])


def _read_start(args: Any, point: ResumePoint, check: bool = True) -> Pretrained | None:
    """Read the weights that a new run starts from; None for random ones, or if a run resumes."""
    source = point.source or vars(args).get("finetune", "")
    if point.is_run:
        return None
    if not source and vars(args).get("pretrained"):
        size = args.input_size if "input_size" in args.given else None
        try:
            return read_library_weights(args.model, size)
        except UserError as error:
            raise UserError(f"--pretrained: {error} with --finetune FILE") from error
    return read_weights(args, source, args.sha256, check) if source else None


def read_weights(args: Any, source: str, sha256: str = "", check: bool = True) -> Pretrained:
    """Read the weights that the flags select; other arguments: as in `read_checkpoint`."""
    key = EMA_KEY if vars(args).get("use_ema") else args.model_key
    return read_pretrained(source, key, args.model_prefix, sha256, check)


def check_start(
    args: Any,
    weights: Pretrained | None,
    classes: int | None = None,
    new: Iterable[str] = CLASSIFIER + DECODER,
) -> None:
    """Raise UserError if weights do not fit the model of the flags, as `Pretrained.load` does.

    So it does if a network of a library lacks what a flag asks for; weights: None for random ones.
    Listing the data may take minutes, so this comes before. Code of the user's own is not run for
    it, since it may need real tensors or do other things too: only the values are checked.
    """
    if is_code(args.model) or has_own_head(args):
        return weights.check_values() if weights else None
    with torch.device("meta"):
        if is_pretraining(vars(args)):
            model = models.build_fcmae(args)
            models.check_images(args, model)
        else:
            model = models.build_classifier(args, classes or args.nb_classes)
            models.check_sizes(args, model)
    if vars(args).get("layer_decay", 1) < 1 and not args.eval:
        model.layer_of("", args.layer_decay_type)
    if vars(args).get("precise_bn") and not args.eval:
        check_norms(model)
    if weights:
        weights.check(model, new)
        if vars(args).get("freeze_backbone") and not args.eval:
            _warn_of_masked_statistics(model, weights)


def _warn_of_masked_statistics(model: nn.Module, weights: Pretrained) -> None:
    is_masked = any(name.startswith("encoder.") for name in weights.state)
    if is_masked and any(isinstance(module, _BatchNorm) for module in model.modules()):
        get_logger().warning(
            "--freeze_backbone true: the BatchNorm of %s keeps the statistics of masked images, "
            "which are off for whole ones in deep layers; without the flag it learns new ones "
            "(docs/pretraining.md)",
            type(model).__name__,
        )


@dataclass
class TrainLoop:
    """Everything that `train_one_epoch` needs besides the model and the data."""

    stepper: Stepper
    schedule: Schedule
    state: TrainState
    guard: AnomalyGuard
    reporter: Reporter
    checkpoints: CheckpointManager
    seed: int
    freezer: Freezer | None = None
    # Fine-tuning only:
    criterion: Callable[..., torch.Tensor] | None = None  # (logits, labels) -> loss
    mixup: Mixing | None = None
    model_ema: ModelEma | None = None
    kind: str = "class"  # of the targets


def check_ranks_agree(args: Mapping[str, Any]) -> None:
    """Raise UserError on all ranks if one differs from rank 0; every rank must call it."""
    if get_world_size() == 1:
        return
    mine = describe_rank(args)
    first = broadcast(mine)
    found = all_gather(
        [
            f"{name} {mine.get(name, 'absent')} (rank 0: {first.get(name, 'absent')})"
            for name in first | mine
            if mine.get(name) != first.get(name)
        ]
    )
    others = [rank for rank, differences in enumerate(found) if differences]
    if others:
        also = f"; other ranks that differ: {first_few(others[1:])}" * (len(others) > 1)
        raise UserError(
            f"rank {others[0]} differs from rank 0: {first_few(found[others[0]])}{also}. Start all "
            "processes with the same flags, and with the same files and packages on every machine"
        )


def describe_rank(args: Mapping[str, Any]) -> dict[str, str]:
    """Return the flags, versions and file digests that all ranks must share, by name."""
    shared = {k: value for k, value in as_one_flag(args).items() if k not in LOCAL_FLAGS}
    flags = {f"--{name}": str(value) for name, value in shared.items()}
    versions = {"Python": "{}.{}".format(*sys.version_info)}
    versions |= {name: metadata.version(name) for name in LIBRARIES}
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    paths = [*ROOT.glob("*.py"), *(path for folder in packages for path in folder.rglob("*.py"))]
    files = {path.relative_to(ROOT).as_posix(): path for path in sorted(paths)} | user_modules(args)
    digests = {
        name: f"(SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"
        for name, path in files.items()
    }
    return flags | versions | digests


def user_modules(args: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files of the modules that flags name as `package.module:function`."""
    see_working_folder()
    found = {}
    for value in args.values():
        named = re.findall(r"(?<![\w./:-])([A-Za-z_][\w.]*):[A-Za-z_]\w*", str(value))
        for module in (name for name in named if not library_of(f"{name}:")):
            with contextlib.suppress(ImportError, ValueError):  # what imports it reports more
                spec = importlib.util.find_spec(module)
                if spec and spec.origin and Path(spec.origin).is_file():
                    found[module] = Path(spec.origin)
    return found
