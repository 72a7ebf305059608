# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Check a training run before it starts: data, memory, speed, disk, time. Nothing is written.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --input_size 32 --stem_stride 1 \
    --batch_size 64 --epochs 10 --output_dir runs/tried --dry_run
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import chain, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_loading.dataset import Replacement, collate
from data_loading.loader import DeviceLoader
from data_loading.rng import fold_in
from data_loading.samplers import keys_at
from data_loading.workers import WatchedLoader
from datasets import class_map
from errors import TrainingStopped, UserError, first_few
from optim_factory import Schedule
from parallel.process_group import all_gather, broadcast, get_logger, get_rank, get_world_size
from training import hooks, run_lock
from training.anomaly import AnomalyGuard
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.setup import TrainLoop

SECONDS = 4.0  # for each measurement of speed
DECODE_SECONDS = 4.0  # for the images of each data set
MARGIN = 0.95  # fraction of the free memory that an estimated batch may use
NEVER = 1 << 40  # steps until the next log line
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in plain RuntimeErrors


@dataclass
class PlannedRun:
    """Everything that a training script has built when its first epoch is about to begin."""

    args: Any
    folder: Path | None
    source: str  # file or folder of the initial weights, "" for random ones
    loop: TrainLoop
    train_epoch: Callable[[Any, TrainLoop], dict]
    data_loader_train: DeviceLoader
    data_loader_val: DeviceLoader | None = None
    evaluate: Callable[[Any], dict] | None = None


@dataclass
class Report:
    """Logs the results and collects the problems."""

    problems: list[str] = field(default_factory=list)

    def line(self, label: str, text: str) -> None:
        """Log one result."""
        get_logger().info("%-12s %s", label, text)

    def problem(self, text: str) -> None:
        """Log a problem, which `conclude` will list again."""
        self.problems.append(text)
        self.line("", f"problem: {text}")

    def conclude(self) -> None:
        """Raise TrainingStopped with the problems of rank 0, on every rank, if there are any."""
        problems = broadcast(self.problems)
        if problems:
            listed = "".join(f"\n  {number}. {text}" for number, text in enumerate(problems, 1))
            count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
            raise TrainingStopped(f"dry run: {count} found:{listed}")
        get_logger().info("dry run: no problems found, nothing was written")


def check_run(run: PlannedRun) -> None:
    """Try everything that a run needs and report it; every rank must call this.

    It trains for some steps, so the weights and the optimizer state are useless afterwards.
    """
    report, args, rate, evaluation = Report(), run.args, 0.0, 0.0
    get_logger().info("dry run: this takes about a minute and writes nothing")
    samples = check_images(report, "train", run.data_loader_train.loader, args.seed)
    if run.data_loader_val is not None:
        check_images(report, "val", run.data_loader_val.loader, args.seed)
    good_data = not broadcast(report.problems)
    report_plan(report, run)
    check_folder(report, run.folder, args.log_dir)
    if min(all_gather(len(samples))):
        probe = StepProbe(run, samples)
        size = check_memory(report, probe)
        if good_data and size == args.batch_size:
            rate = measure_training(report, probe)
            if run.data_loader_val is not None:
                evaluation = measure_evaluation(report, probe)
        probe.finish(report)
        if size and run.folder and args.save_ckpt:
            check_disk(report, run)
        if rate:
            report_time(report, run, rate, evaluation)
    report.conclude()


# --- data, plan, folder --------------------------------------------------------------------------


@dataclass
class Decoded:
    """Images that this rank has tried to decode."""

    tried: int = 0
    good: list[tuple] = field(default_factory=list)  # the first samples
    bad: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # by --on_bad_image skip

    def add(self, name: str, sample: Any) -> None:
        """Count a sample as good, skipped or bad."""
        self.tried += 1
        if isinstance(sample, Replacement):
            self.skipped += [f"{image} ({reason})" for image, reason in sample.bad]
            sample = sample.sample
        if isinstance(sample, UserError):
            self.bad.append(str(sample))
        elif sample and sample[0].is_floating_point() and not sample[0].isfinite().all():
            self.bad.append(f"{name} holds values that are not finite")
        elif sample and len(self.good) < 64:
            self.good.append(sample)


def decode_some(loader: WatchedLoader, seed: int, seconds: float) -> Decoded:
    """Decode this rank's part of a loader's images in random order until the time is up.

    Uses the run's own number of worker processes and time limit, so that an image that kills or
    blocks its reader is named.
    """
    data, found = loader.dataset, Decoded()
    mine = range(get_rank(), len(data), get_world_size())[:100_000]  # more than there is time for
    keys = list(keys_at(mine, len(data), fold_in(seed, 1), 0))
    workers, first = min(loader.num_workers, len(keys)), itemgetter(0)
    one_by_one = WatchedLoader(data, keys, 1, workers, timeout=loader.timeout, collate_fn=first)
    start = time.perf_counter()
    try:
        for (_, index), sample in zip(keys, one_by_one, strict=True):
            found.add(data.name_of(index), sample)
            if time.perf_counter() - start > seconds:
                break
    except TrainingStopped as error:  # a worker process died or hangs
        found.add("", UserError(error))
    except Exception as error:  # of a user's own data set or transform
        name, last_line = data.name_of(keys[found.tried][1]), str(error).splitlines()[-1:]
        found.add(name, UserError(f"{name}: {type(error).__name__}: {''.join(last_line)}"))
    del one_by_one
    gc.collect()  # the error refers to its loader, whose workers would outlive this check
    return found


def check_images(report: Report, name: str, loader: WatchedLoader, seed: int) -> list[tuple]:
    """Decode images of a data set on all ranks and report the bad ones; returns good samples."""
    data, mine = loader.dataset, decode_some(loader, seed, DECODE_SECONDS)
    found = all_gather((mine.bad, mine.skipped, mine.tried, len(mine.good)))
    bad, skipped = (sorted(set(chain(*lists))) for lists in list(zip(*found, strict=True))[:2])
    tried, good = (sum(counts) for counts in list(zip(*found, strict=True))[2:])
    same = "the same " * (name == "val" and class_map(data) is not None)
    classes = f"of {same}{data.nb_classes} classes" if data.nb_classes else "without labels"
    fate = "left out" if data.on_bad == "leave out" else "replaced"
    verdict = [f"{len(bad)} bad"] * bool(bad) + [f"{len(skipped)} bad and {fate}"] * bool(skipped)
    verdict = ", ".join(verdict) or "all good"
    report.line(name, f"{len(data)} images {classes}; decoded {tried}: {verdict}")
    if skipped:
        report.line("", f"{fate}: {first_few(skipped)}")
    if bad:
        report.problem(f"{len(bad)} of {tried} {name} images: {first_few(bad, 5)}")
    elif not good:
        report.problem(f"none of {tried} {name} images can be used; check the data")
    return mine.good


def report_plan(report: Report, run: PlannedRun) -> None:
    """Log where the run starts, its steps, parameters and learning rates."""
    state, total = run.loop.state, run.loop.schedule.total
    start = f"epoch {state.epoch}, step {state.global_step} of {total}"
    report.line("start", f"{run.source or 'random weights'}, {start}")
    ranks, accumulation = get_world_size(), run.loop.stepper.update_freq
    factors = f"{run.args.batch_size} x {accumulation} accumulation steps x {ranks} processes"
    report.line("step", f"{state.effective_batch} images = {factors}; {total} steps in the run")
    groups = run.loop.stepper.optimizer.param_groups
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    decayed = sum(n for n, group in zip(counts, groups, strict=True) if group["decayed"])
    text = f"{sum(counts) / 1e6:.2f}M trainable, {decayed / 1e6:.2f}M with weight decay"
    lowest = min(group["lr_scale"] for group in groups)
    layers = f", learning rate x {lowest:.3g} to 1 by layer" * (lowest < 1)
    report.line("parameters", f"{text}, in {len(groups)} groups{layers}")
    for number, row in enumerate(lr_rows(run.loop.schedule, state.global_step)):
        report.line("" if number else "lr", row)


def lr_rows(schedule: Schedule, now: int) -> Iterator[str]:
    """Yield the learning rate, with a bar, at the first and last step, the peak and each tenth."""
    last = schedule.total - 1
    peak = min(max(schedule.warmup - 1, 0), last)
    tenths = (schedule.total * tenth // 10 for tenth in range(10))
    for step in sorted({0, peak, last, min(now, last), *tenths}):
        lr = schedule.rate(step)
        bar = "#" * round(40 * lr / schedule.lr) if schedule.lr > 0 else ""
        mark = " peak" * (step == peak) + " here" * (step == now > 0)
        yield f"step {step:{len(str(last))}d}  {lr:.2e}  {bar}{mark}".rstrip()


def check_folder(report: Report, folder: Path | None, log_dir: str | None) -> None:
    """Report if the run could not write its files; nothing is written here."""
    own_logs = Path(log_dir) if log_dir not in (None, "", "none") else None
    log_folder = folder if log_dir is None else own_logs
    for flag, path in (("--output_dir", folder), ("--log_dir", log_folder)):
        if path and not nearest(path).is_dir():
            report.problem(f"{flag} {path}: {nearest(path)} is a file; choose another folder")
        elif path and not os.access(nearest(path), os.W_OK | os.X_OK):
            report.problem(f"{flag} {path}: not writable; choose a folder you own")
    if get_rank() == 0 and folder and (holder := run_lock.describe_holder(folder)):
        report.problem(f"--output_dir {folder} is in use by {holder}; choose another folder")
    if log_folder and importlib.util.find_spec("tensorboard") is None:
        report.problem("tensorboard is not installed: pip install tensorboard, or --log_dir none")


def nearest(path: Path) -> Path:
    """Return the path if it exists, else the nearest parent that does."""
    return next(place for place in (path, *path.resolve().parents) if place.exists())


# --- training steps and memory -------------------------------------------------------------------


class TimedLoader:
    """`warmup` + `times` batches, in place of a loader; `start` is the time after the warm-up."""

    wait_seconds = 0.0

    def __init__(self, batches: Iterator[Any], times: int, warmup: int = 0) -> None:
        self.batches, self.times, self.warmup = batches, times, warmup

    def __len__(self) -> int:
        return self.warmup + self.times

    def __iter__(self) -> Iterator[Any]:
        for count in range(len(self)):
            if count == self.warmup:
                self.start = time.perf_counter()
            yield next(self.batches)


class StepProbe:
    """Runs the script's own training on chosen batches, without hooks and checkpoints."""

    def __init__(self, run: PlannedRun, samples: list[tuple]) -> None:
        """samples: (image (C, H, W), label, index). Every rank must create a probe."""
        self.run, self.device = run, run.loop.stepper.device
        self.samples = collate(samples)[:3]  # images, labels, indices
        self.batch_multiple = 2 if run.loop.mixup else 1  # mixup mixes pairs
        self.checkpoints, self.guard = CheckpointManager(None), AnomalyGuard(run.loop.stepper)
        self.bad_steps = 0
        on_linux = self.device.type == "cpu" and os.access(PROC / "self/clear_refs", os.W_OK)
        self.tells_memory = on_linux or self.device.type == "cuda"
        self.local_processes = all_gather(socket.gethostname()).count(socket.gethostname())

    def batches(self, size: int, times: int = 1) -> TimedLoader:
        """Make a batch on the device, of repeated samples if need be, and repeat it."""
        rows = torch.arange(size) % len(self.samples[0])
        images, labels, ids = (part[rows].to(self.device) for part in self.samples)
        batch = self.run.data_loader_train.normalise(images), labels, ids
        return TimedLoader(map(deepcopy, repeat(batch)), times)  # mixup works in place

    def train(self, batches: TimedLoader) -> None:
        """Train an epoch on these batches."""
        state = TrainState()
        reporter = hooks.Reporter([], self.device, state, NEVER, NEVER, NEVER)
        loop = replace(self.run.loop, state=state, reporter=reporter)
        loop.guard, loop.checkpoints = self.guard, self.checkpoints
        try:
            self.run.train_epoch(batches, loop)
        except RuntimeError as error:
            if isinstance(error, TrainingStopped) or "deterministic" not in str(error):
                raise
            raise UserError(f"--deterministic: {str(error).partition('.')[0]}") from error
        self.guard.check(state)
        self.bad_steps += state.bad_steps

    def peak(self, size: int, times: int = 1) -> int:
        """Return the most bytes in use during a step: by tensors on CUDA, else by the process."""
        for _ in range(2):  # the first step compiles and creates the optimizer state
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            elif self.tells_memory:
                (PROC / "self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
            self.train(self.batches(size, times))
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return read_memory("self/status", "VmHWM") if self.tells_memory else 0

    def used_and_free(self) -> tuple[int, int]:
        """Bytes used by this process and free for it, on the GPU if it has one."""
        if self.device.type == "cuda":
            used = torch.cuda.memory_allocated(self.device)
            cached = torch.cuda.memory_reserved(self.device) - used
            return used, torch.cuda.mem_get_info(self.device)[0] + cached
        free = min(read_memory("meminfo", "MemAvailable"), free_in_cgroup())
        return read_memory("self/status", "VmRSS"), int(free // self.local_processes)

    def finish(self, report: Report) -> None:
        """Wait for the last exchange between ranks and report steps that were not finite."""
        self.checkpoints.vote.wait()
        searches_scale = self.run.loop.stepper.scaler.is_enabled()  # fp16 skips steps meanwhile
        if self.bad_steps and not searches_scale:
            report.problem(f"{self.bad_steps} steps had a loss or gradient that is not finite")


def check_memory(report: Report, probe: StepProbe) -> int:
    """Report the memory of a step and the largest batch; returns a size that fits, 0 for none."""
    args, unit, asked = probe.run.args, probe.batch_multiple, probe.run.args.batch_size
    most = len(probe.run.data_loader_train.loader.dataset) // get_world_size() // unit * unit
    largest, how = asked, "no other size was tried"
    try:
        if probe.tells_memory and not (args.compile or args.cuda_graphs):  # they compile each size
            largest, how = estimate_largest(probe, asked)
        largest = min(*all_gather(largest), most)
        survives = probe.device.type == "cuda" and get_world_size() == 1  # a CPU process dies
        size = min(asked, most if survives else largest)
        peak = probe.peak(size, min(2, probe.run.loop.stepper.update_freq)) if size else 0
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        full = full or any(text in str(error) for text in OUT_OF_MEMORY)
        if get_world_size() > 1 or not full:
            raise  # other processes would wait for this one
        size, largest = 0, largest if largest < asked else 0
    if size < asked:
        report.problem(f"--batch_size {asked} does not fit; try {largest or 'a smaller model'}")
    if size and probe.tells_memory:
        largest = max(largest, size)
        limit = f"the largest batch that fits is {largest}{' (all images)' * (largest == most)}"
        report.line("memory", f"{format_bytes(peak)} for a batch of {size}; {limit}, {how}")
    return size


def estimate_largest(probe: StepProbe, asked: int) -> tuple[int, str]:
    """Estimate the largest batch from two small steps; returns it and how it was found."""
    unit = probe.batch_multiple
    small = max(asked // 8 // unit, 1) * unit
    size = min(2 * small, asked)
    low, high = probe.peak(small), probe.peak(size)
    used, free = probe.used_and_free()
    growth = (high - low) / (size - small) if size > small else (high - used) / size
    each = max(growth, probe.samples[0][0].numel() * 4)
    more = math.floor((used + MARGIN * free - high) / each)
    how = f"estimated from {format_bytes(each)} per image and {format_bytes(free)} free per process"
    return max(size + more // unit * unit, 0), how


def read_memory(file: str, name: str) -> int:
    """Return the bytes of a line such as "VmRSS:  5678 kB" in a file of /proc."""
    text = (PROC / file).read_text()
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1])


def free_in_cgroup() -> float:
    """Bytes free under the tightest limit of this process's control groups (v2); inf if none."""
    free, own = [math.inf], PROC / "self/cgroup"
    group = CGROUPS / (own.read_text() if own.exists() else "").strip().rpartition("0::/")[2]
    for place in (group, *group.parents):  # SLURM limits the job, some groups above its processes
        with suppress(OSError, ValueError):  # no such group, or its limit is "max"
            limit = int((place / "memory.max").read_text())
            used = re.search(r"^anon (\d+)", (place / "memory.stat").read_text(), re.MULTILINE)
            free.append(max(0, limit - int(used[1])))
    return min(free)


def format_bytes(size: float) -> str:
    """1536 -> 1.5 KiB"""
    power = min(max(int(size), 1).bit_length() - 1, 49) // 10
    return f"{size / 1024**power:.{int(power > 0)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# --- speed, time, disk ---------------------------------------------------------------------------


def calls_per_second(work: Callable[[int], Any], seconds: float) -> float:
    """Time `work(times)`, which does a thing `times` times, on the slowest rank; all must call."""
    start = time.perf_counter()
    work(1)
    once = time.perf_counter() - start
    times = min(all_gather(max(1, min(50, int(seconds / max(once, 1e-9))))))
    start = time.perf_counter()
    work(times)
    return times / max(all_gather(time.perf_counter() - start))


def loader_rate(loader: WatchedLoader, seconds: float) -> float:
    """Images/s of this process's loader, once the batches that its workers hold ready are used."""
    if not len(loader):  # without --dist_eval only rank 0 has images
        return 0.0
    start, batches, images = time.perf_counter(), chain.from_iterable(repeat(loader)), 0
    for _ in islice(batches, 2 * loader.num_workers + 1):
        if time.perf_counter() - start > 2 * seconds:
            break
    start = time.perf_counter()
    for batch in batches:
        images += 0 if isinstance(batch, UserError) else len(batch[0])
        if time.perf_counter() - start > seconds:
            break
    return images / (time.perf_counter() - start)


def measure_training(report: Report, probe: StepProbe) -> float:
    """Report images/s of the model, of the loader and of both together; returns the last."""
    batches, ranks, size = probe.run.data_loader_train, get_world_size(), probe.run.args.batch_size
    model = size * ranks * calls_per_second(lambda n: probe.train(probe.batches(size, n)), SECONDS)
    report.line("model", f"{model:.1f} images/s")
    workers = batches.loader.num_workers
    loader = sum(all_gather(loader_rate(batches.loader, SECONDS)))
    report.line("loader", f"{loader:.1f} images/s with {workers} workers per process")
    times = min(all_gather(max(1, int(SECONDS * min(model, loader) / ranks / size))))
    timed = TimedLoader(chain.from_iterable(repeat(batches)), times, min(2 * workers + 1, times))
    probe.train(timed)
    seconds = max(all_gather(time.perf_counter() - timed.start))
    together = times * size * ranks / seconds
    slower = "loader" if loader < model else "model"
    report.line("together", f"{together:.1f} images/s, limited by the {slower}")
    return together


def measure_evaluation(report: Report, probe: StepProbe) -> float:
    """Report images/s of the evaluation; returns its seconds per epoch."""
    run, loader = probe.run, probe.run.data_loader_val.loader
    images, ranks = len(loader.dataset), get_world_size() if run.args.dist_eval else 1
    size = min(loader.batch_size, images)
    run.evaluate(probe.batches(size))  # warm-up
    rate = calls_per_second(lambda n: run.evaluate(probe.batches(size, n)), SECONDS / 2)
    model = rate * size * ranks
    read = sum(all_gather(loader_rate(loader, SECONDS / 2)))
    slower = "loader" if read < model else "model"
    seconds = images / min(model, read)
    text = f"model {model:.1f} images/s, loader {read:.1f} images/s, limited by the {slower}"
    report.line("evaluation", f"{text}: {timedelta(seconds=round(seconds))}")
    return seconds * (2 if run.args.model_ema_eval else 1)


def report_time(report: Report, run: PlannedRun, rate: float, evaluation: float) -> None:
    """Report the duration of an epoch and of the rest of the run."""
    loader, state = run.data_loader_train, run.loop.state
    epochs = run.args.epochs - state.epoch - state.samples_in_epoch / len(loader.loader.dataset)
    epoch = len(loader) * run.args.batch_size * get_world_size() / rate + evaluation
    each, rest = timedelta(seconds=round(epoch)), timedelta(seconds=round(epoch * epochs))
    report.line("time", f"{each} per epoch, {rest} for the {epochs:.4g} epochs left, without saves")


def tensor_bytes(content: Any) -> int:
    """Return the bytes of all tensors in nested dicts and lists: nearly all of a checkpoint."""
    if isinstance(content, Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content
    return sum(map(tensor_bytes, parts)) if isinstance(content, dict | list | tuple) else 0


def check_disk(report: Report, run: PlannedRun) -> None:
    """Compare the size of all checkpoints that will exist at once with the free disk space."""
    args, evaluated, contents = run.args, run.data_loader_val is not None, []
    run.loop.checkpoints.save(
        state=run.loop.state, writer=lambda content, write: contents.append(content)
    )
    if not contents:  # only rank 0 has them
        return
    complete, ema = tensor_bytes(contents[0]), tensor_bytes(contents[0]["model_ema"]) * evaluated
    epoch_ends = math.ceil((args.epochs - run.loop.state.epoch) / args.save_ckpt_freq)
    within_epoch = 2 if args.save_ckpt_every_steps or args.save_ckpt_every_minutes else 0
    files = min(args.save_ckpt_num, max(epoch_ends, 1)) + within_epoch + evaluated + 1  # a new one
    existing = [file.stat() for file in run.folder.glob("checkpoint-*.pth")]
    existing = {file.st_ino: file.st_size for file in existing}  # without hard links
    needed = max(files * complete + ema - sum(existing.values()), 0)
    place = nearest(run.folder)
    free = shutil.disk_usage(place).free
    text = f"{format_bytes(complete)} per checkpoint, {format_bytes(needed)} more for {files}"
    report.line("disk", f"{text} of them, {format_bytes(free)} free in {place}")
    if needed > free:
        text = f"checkpoints need {format_bytes(needed)}, {format_bytes(free)} are free"
        report.problem(f"{text}; lower --save_ckpt_num, or choose another --output_dir")
