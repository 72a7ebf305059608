# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Set up a run: process group, precision, output folder, resume point, parts of the train loop.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --epochs 1 --dry_run
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import datasets
from data_loading.bad_images import BadImages
from data_loading.loader import DeviceLoader
from data_loading.rng import make_deterministic
from errors import UserError, first_few, see_working_folder
from models.kernels.autotune import autotuner, set_kernels
from optim_factory import Schedule, choose_update_freq
from parallel import process_group, sharding
from parallel.process_group import all_gather, broadcast, get_logger, get_world_size
from training import run_lock
from training.anomaly import AnomalyGuard, build_guard
from training.checkpoint import TrainableParts, TrainState
from training.checkpoint_manager import CheckpointManager, build_checkpoint_manager
from training.cuda_graphs import check_graphs
from training.ema import ModelEma
from training.hooks import Reporter, build_reporter
from training.resume import ResumePoint, find_resume_point
from training.stepper import Stepper, choose_amp

ROOT = Path(__file__).resolve().parents[1]
LOCAL_FLAGS = ("local_rank", "num_workers")  # flags that may differ between ranks
PACKAGES = ("torch", "torchvision", "timm", "numpy")
OUR_PACKAGES = ("config", "parallel", "data_loading", "models", "weights", "training")
SHOWN = 3  # differences in a message


@dataclass(frozen=True)
class RunSetup:
    """Settings that both training scripts make before they load data."""

    device: torch.device
    amp: str  # "none", "bf16" or "fp16"
    parallelism: sharding.Parallelism
    output_dir: Path | None  # locked for this run
    resume_point: ResumePoint
    update_freq: int  # micro-batches in an optimizer step
    effective_batch: int  # images in an optimizer step, over all ranks


def setup_process(args: Any) -> tuple[torch.device, str]:
    """Join the process group and set up kernels and determinism; returns (device, precision)."""
    device = process_group.init_distributed_mode(
        args.device, args.dist_url, args.world_size, args.local_rank, args.dist_on_itp
    )
    check_ranks_agree(vars(args))
    if args.recipe:
        get_logger().info("recipe %s", args.recipe)
    set_kernels(args.kernels, device)
    make_deterministic(args.deterministic, device)
    return device, choose_amp(args.amp, args.use_amp, device)


def setup_run(args: Any, device: torch.device, amp: str) -> RunSetup:
    """Check the parallel mode, lock the output folder and find the checkpoint to resume from."""
    parallelism = sharding.build_parallelism(args, device, amp)
    output_dir = Path(args.output_dir) if args.output_dir else None
    if not args.dry_run:
        output_dir = run_lock.acquire_run_lock(args.output_dir)
    resume_point = find_resume_point(
        output_dir, args.resume, args.auto_resume, args.sha256, vars(args), not args.dry_run
    )
    autotuner.restore(resume_point.entry("kernels", {}), device)
    update_freq = choose_update_freq(
        args.update_freq,
        args.effective_batch,
        args.batch_size,
        get_world_size(),
        resume_point.effective_batch,
    )
    check_graphs(args.cuda_graphs, device, update_freq)
    effective_batch = args.batch_size * update_freq * get_world_size()
    return RunSetup(
        device, amp, parallelism, output_dir, resume_point, update_freq, effective_batch
    )


@dataclass
class TrainLoop:
    """The parts of a training run besides model and data, for `train_one_epoch`.

    As a context manager it listens for stop signals and closes log files and checkpoints.
    """

    stepper: Stepper
    schedule: Schedule
    state: TrainState
    guard: AnomalyGuard
    reporter: Reporter
    checkpoints: CheckpointManager
    bad_images: BadImages
    seed: int
    criterion: Callable[..., torch.Tensor] | None = None  # fine-tuning only, as what follows
    mixup: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    model_ema: ModelEma | None = None

    def __enter__(self) -> TrainLoop:
        with contextlib.ExitStack() as stack:
            for part in (self.checkpoints, self.reporter):
                stack.enter_context(part)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def report_epoch(self, stats: dict[str, float]) -> None:
        """List new bad images and write the statistics of an epoch to log.txt and TensorBoard."""
        self.bad_images.write()
        self.reporter.end_epoch(stats)


def build_train_loop(
    args: Any,
    run: RunSetup,
    parts: TrainableParts,
    stepper: Stepper,
    schedule: Schedule,
    state: TrainState,
    data_loader_train: DeviceLoader,
    data_loader_val: DeviceLoader | None = None,
) -> TrainLoop:
    """Build a `TrainLoop` from the flags; with --dry_run it writes nothing."""
    dataset = data_loader_train.loader.dataset
    classes = datasets.class_map(dataset) if dataset.nb_classes else None
    steps_per_epoch = schedule.total // args.epochs
    bad_images = BadImages(
        run.output_dir, data_loader_train, data_loader_val, active=args.on_bad_image == "skip"
    )
    return TrainLoop(
        stepper,
        schedule,
        state,
        guard=build_guard(args, stepper, parts.present(), data_loader_train, run.output_dir),
        reporter=build_reporter(args, run.output_dir, run.device, state, steps_per_epoch),
        checkpoints=build_checkpoint_manager(
            args, run.output_dir, parts, classes, bad_images.write
        ),
        bad_images=bad_images,
        seed=args.seed,
    )


def check_ranks_agree(args: Mapping[str, Any]) -> None:
    """Raise UserError on all ranks if one differs from rank 0; every rank must call it."""
    if get_world_size() == 1:
        return
    mine = describe_rank(args)
    if len(set(all_gather(digest_of(mine)))) == 1:
        return
    found = all_gather(differences(mine, broadcast(mine)))
    others = [rank for rank, (_, count) in enumerate(found) if count]
    shown, count = found[others[0]]
    more = f" and {count - SHOWN} more" * (count > SHOWN)
    also = f"; other ranks that differ: {first_few(others[1:])}" * (len(others) > 1)
    raise UserError(
        f"rank {others[0]} differs from rank 0: {', '.join(shown)}{more}{also}. Start all "
        "processes with the same flags, and with the same files and packages on every machine"
    )


def describe_rank(args: Mapping[str, Any]) -> dict[str, str]:
    """Flags, package versions and file digests that must be the same on all ranks, by name."""
    flags = {f"--{name}": str(value) for name, value in args.items() if name not in LOCAL_FLAGS}
    versions = {"Python": "{}.{}".format(*sys.version_info)}
    versions |= {name: _version(name) for name in PACKAGES}
    files = {
        path.relative_to(ROOT).as_posix(): f"(SHA-256 {_digest(path.read_bytes())[:12]})"
        for path in sorted(
            [*ROOT.glob("*.py"), *(p for n in OUR_PACKAGES for p in ROOT.glob(f"{n}/**/*.py"))]
        )
    }
    return flags | versions | files | _user_modules(args)


def _user_modules(args: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the modules that flags name as `package.module:function`."""
    found = {}
    see_working_folder()
    for value in map(str, args.values()):
        module = re.fullmatch(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*", value)
        with contextlib.suppress(ImportError, ValueError):  # the part that imports it reports more
            spec = importlib.util.find_spec(module[1]) if module else None
            if spec and spec.origin and Path(spec.origin).is_file():
                found[module[1]] = f"(SHA-256 {_digest(Path(spec.origin).read_bytes())[:12]})"
    return found


def digest_of(described: Mapping[str, str]) -> str:
    """Digest of a description; equal descriptions have equal digests."""
    return _digest(json.dumps(described, sort_keys=True).encode())


def differences(mine: Mapping[str, str], first: Mapping[str, str]) -> tuple[list[str], int]:
    """Describe the first few differences to rank 0; also returns how many there are."""
    names = [name for name in {**first, **mine} if mine.get(name) != first.get(name)]
    texts = [
        f"{name} {mine.get(name, 'absent')} (rank 0: {first.get(name, 'absent')})"
        for name in names[:SHOWN]
    ]
    return texts, len(names)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
