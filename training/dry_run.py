# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Check a training run before it starts: data, memory, speed, disk, time.

python main_pretrain.py --recipe digits_pretrain --output_dir runs/tried --dry_run
"""

import contextlib
import gc
import importlib.util
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.sizes import batch_multiple, batch_sizes, last_stage
from data_loading.dataset import Replacement, TransformedDataset, collate
from data_loading.loader import DeviceLoader
from data_loading.rng import fold_in
from data_loading.samplers import keys_at
from data_loading.summary import describe_class_problem, describe_outputs
from data_loading.transforms import height_and_width
from data_loading.tta import ONE_VIEW, Views
from data_loading.tuning import SHARED_MEMORY
from data_loading.workers import WatchedLoader
from errors import TrainingStopped, UserError, first_few, first_line, format_bytes, plural
from parallel.environment import local_world_size
from parallel.process_group import all_gather, broadcast, get_logger, get_rank, get_world_size
from parallel.state_dict import tensor_leaves
from training import hooks, run_lock
from training.anomaly import AnomalyGuard
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.profiler import profile_probe
from training.report import describe_progress
from training.schedules import curve_rows, lr_rows
from training.setup import TrainLoop
from training.steps import Steps
from training.tensorboard import log_folder
from utils import nearest

SECONDS = 4.0  # for each measurement of speed
DECODE_SECONDS = 4.0  # for the images of each data set
MARGIN = 0.95  # fraction of the free memory that an estimated batch may use
MEMORY = Path("/proc/meminfo")  # on Linux; limits of containers and jobs are not in it
NEVER = 1 << 40  # steps until the next log line
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
    draw: Callable[[], Tensor | None] | None = None  # an image as the run writes it, on rank 0
    more_val: Sequence[DeviceLoader] = ()  # of other evaluation sets
    more_work: Callable[[], float] = lambda: 0.0  # measures its seconds per epoch


def check_run(run: PlannedRun) -> None:
    """Try everything that a run needs and log the results; every rank must call this.

    Raises TrainingStopped on every rank if rank 0 found problems. It trains for some steps, so the
    weights and the optimizer state are useless afterwards.
    """
    writes = "only the profile" if run.args.profile else "nothing"
    get_logger().info("dry run: this takes about a minute and writes %s to --output_dir", writes)
    epoch = last_stage(run.args)  # its images are the largest
    run.data_loader_train.set_epoch(epoch)  # and its batches may be smaller
    problems: list[str] = []  # those of data and of shared memory are the same on all ranks
    size = run.args.in_chans * math.prod(height_and_width(run.args.input_size))  # as uint8
    fits = check_shared_memory(problems, run, size)  # first: loaders fail if it is full
    unfit = len(problems)
    samples = check_images(problems, "train", run.data_loader_train.loader, run.args.seed, epoch)
    if run.data_loader_val is not None:
        for loader in (run.data_loader_val, *run.more_val):
            check_images(problems, "val", loader.loader, run.args.seed)
    skip = "the data has problems" if len(problems) > unfit else ""
    if run.draw is not None and not skip:
        check_picture(problems, run.draw)
    log_plan(run)
    check_folder(problems, run)
    sizes = all_gather(samples[0][0].nbytes if samples else 0)
    if min(sizes):
        if fits and max(sizes) > size:  # floats
            fits = check_shared_memory(problems, run, max(sizes))
        skip = skip or ("" if fits else f"batches do not fit in {SHARED_MEMORY}")
        check_steps(problems, StepProbe(run, samples), skip)
    else:
        log_result("skipped", "memory, speed, time and disk: not enough training images")
    problems = broadcast(problems)
    if problems:
        listed = "".join(f"\n  {number}. {text}" for number, text in enumerate(problems, 1))
        raise TrainingStopped(f"dry run: {plural(len(problems), 'problem')} found:{listed}")
    get_logger().info("dry run: no problems found")


def log_result(label: str, text: str) -> None:
    """Log one result on rank 0."""
    get_logger().info("%-12s %s", label, text)


class ErrorsAsSamples:
    """Wrapper of `dataset` that returns an exception as a UserError, so that reading continues."""

    def __init__(self, dataset: TransformedDataset) -> None:
        self.dataset, self.name_of = dataset, dataset.name_of

    def __getitem__(self, key: tuple[int, int]) -> Any:
        try:
            return self.dataset[key]
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            return UserError(f"{self.name_of(key[1])}: {reason}")


def decode_some(
    loader: WatchedLoader, seed: int, seconds: float, epoch: int = 0
) -> Iterator[tuple[str, Any]]:
    """Yield names and samples of this rank's part of a loader's images, in an epoch's random order.

    It ends when the time is up. The images are read with the run's own workers and time limit:
    TrainingStopped names one that kills or blocks its reader.
    """
    data, start = loader.dataset, time.perf_counter()
    mine = range(get_rank(), len(data), get_world_size())[:100_000]  # more than there is time for
    keys = list(keys_at(mine, len(data), fold_in(seed, 1), epoch))
    workers, safe = min(loader.num_workers, len(keys)), ErrorsAsSamples(data)
    one_by_one = WatchedLoader(safe, keys, 1, workers, loader.timeout, itemgetter(0))
    for (_, index), sample in zip(keys, one_by_one, strict=True):
        yield data.name_of(index), sample
        if time.perf_counter() - start > seconds:
            return


def check_images(
    problems: list[str], name: str, loader: WatchedLoader, seed: int, epoch: int = 0
) -> list[tuple]:
    """Decode images as in an epoch, on all ranks; returns the first good samples of this rank."""
    data, tried, good = loader.dataset, 0, []
    bad, skipped, stopped = set(), set(), set()
    try:
        for image, sample in decode_some(loader, seed, DECODE_SECONDS, epoch):
            tried += 1
            if isinstance(sample, Replacement):
                skipped |= {f"{file} ({reason})" for file, reason in sample.bad}
                sample = sample.sample
            if isinstance(sample, UserError):
                bad.add(str(sample))
            elif sample and sample[0].is_floating_point() and not sample[0].isfinite().all():
                bad.add(f"{image} holds values that are not finite")
            elif sample and len(good) < 64:
                good.append(sample)
    except TrainingStopped as error:
        stopped.add(f"{name} images: {error}")
    gc.collect()  # an error refers to its loader, whose workers would outlive this check
    tried, found, *texts = zip(*all_gather((tried, len(good), bad, skipped, stopped)), strict=True)
    tried, (bad, skipped, stopped) = sum(tried), (sorted(set().union(*each)) for each in texts)
    problems += stopped
    classes = "without labels"
    if data.nb_classes:
        classes = describe_outputs(data.nb_classes, data.kind)
    fate = "left out" if data.on_bad == "leave out" else "replaced"
    counts = f"{len(bad)} bad, {len(skipped)} {fate}"
    log_result(name, f"{plural(len(data), 'image')} {classes}; decoded {tried}: {counts}")
    if skipped:
        log_result("", f"{fate}: {first_few(skipped)}")
    if bad:
        first, *traceback = bad[0].split("\n")  # of an error in a user's dataset
        names = [first, *(text.partition("\n")[0] for text in bad[1:])]
        text = "\n".join([first_few(names, 5), *traceback])
        problems.append(f"{len(bad)} of {plural(tried, f'{name} image')}: {text}")
    elif not (sum(found) or stopped):
        problems.append(f"none of {plural(tried, f'{name} image')} can be used; check the data")
    is_labeled = name == "train" and data.kind == "class"
    if is_labeled and (problem := describe_class_problem(data.dataset, data.nb_classes)):
        problems.append(f"{name}: {problem}")
    return good


def check_picture(problems: list[str], draw: Callable[[], Tensor | None]) -> None:
    """Draw once; a run would report a failure and continue without pictures."""
    try:
        if (image := draw()) is not None:
            log_result("picture", "{2} x {1} pixels".format(*image.shape))
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        problems.append(f"no picture can be drawn ({reason}); --picture_freq 0 trains without")


def log_plan(run: PlannedRun) -> None:
    """Log where the run starts, its steps, parameters and learning rates."""
    state, total = run.loop.state, run.loop.schedule.total
    log_result("start", f"{run.source or 'random weights'}, {describe_progress(state)} of {total}")
    accumulation = plural(run.loop.stepper.update_freq, "accumulation step")
    factors = f"{run.args.batch_size} x {accumulation} x {plural(get_world_size(), 'process')}"
    steps = f"{plural(total, 'step')} in the run"
    log_result("step", f"{plural(state.effective_batch, 'image')} = {factors}; {steps}")
    groups = run.loop.stepper.optimizer.param_groups
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    decayed = sum(n for n, group in zip(counts, groups, strict=True) if group["decayed"])
    text = f"{sum(counts) / 1e6:.2f}M trainable, {decayed / 1e6:.2f}M with weight decay"
    low, high = (limit(group["lr_scale"] for group in groups) for limit in (min, max))
    layers = f", learning rate x {low:.3g} to {high:.3g} by layer" * (low < high)
    log_result("parameters", f"{text}, in {plural(len(groups), 'group')}{layers}")
    for number, row in enumerate(lr_rows(run.loop.schedule, state.global_step)):
        log_result("" if number else "lr", row)
    for name, curve in run.loop.schedule.options.items():
        for number, row in enumerate(curve_rows(partial(curve.at, total=total), total, {})):
            log_result("" if number else name, row)


def check_folder(problems: list[str], run: PlannedRun) -> None:
    """Find out if the run could not write its files."""
    folder, logs = run.folder, log_folder(run.args.log_dir, run.folder)
    for flag, path in (("--output_dir", folder), ("--log_dir", run.args.log_dir and logs)):
        place = path and nearest(path)
        if place and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            problems.append(f"{flag} {path}: cannot write in {place}; choose a folder you own")
    if get_rank() == 0 and folder and (holder := run_lock.describe_holder(folder)):
        problems.append(
            f"--output_dir {folder} is in use by {holder}; choose another folder, or wait "
            f"{run_lock.SILENCE:.0f} s if that run was killed"
        )
    if logs and importlib.util.find_spec("tensorboard") is None:
        problems.append("tensorboard is not installed: pip install tensorboard, or --log_dir none")


class FirstBatches:
    """The next `times` of endless batches, in place of a loader."""

    def __init__(self, batches: Iterator[Any], times: int, views: Views = ONE_VIEW) -> None:
        self.batches, self.times, self.views = batches, times, views

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        return islice(self.batches, self.times)


class StepProbe:
    """Runs the script's own training on chosen batches, without hooks and checkpoints."""

    def __init__(self, run: PlannedRun, samples: list[tuple]) -> None:
        """samples: (image (C, H, W), label, index). Every rank must create a probe."""
        self.run, self.device = run, run.loop.stepper.device
        self.samples = collate(samples)[:3]  # images, labels, indices
        self.batch_multiple = batch_multiple(run.args, mixes=run.loop.mixup is not None)
        self.bad_steps = 0  # NaN, Inf or a spike; fp16 has some while it searches for its scale
        guard = AnomalyGuard(run.loop.stepper, max_bad_steps=NEVER)
        self.loop = replace(run.loop, guard=guard, checkpoints=CheckpointManager(None))

    def batches(self, size: int, times: int = 1, views: Views = ONE_VIEW) -> FirstBatches:
        """Make a batch on the device, of repeated samples if need be, and repeat it."""
        rows = torch.arange(size) % len(self.samples[0])
        images, labels, ids = (part[rows].to(self.device) for part in self.samples)
        batch = views.repeat(self.run.data_loader_train.normalize(images)), labels, ids
        return FirstBatches(map(deepcopy, repeat(batch)), times, views)  # mixup works in place

    def train(self, batches: FirstBatches, observers: Sequence[hooks.Hook] = ()) -> None:
        """Train one epoch on these batches."""
        state = TrainState()
        reporter = hooks.Reporter([*observers], self.device, state, Steps.even(NEVER), NEVER)
        reporter.run.folder = self.run.folder
        self.run.train_epoch(batches, replace(self.loop, state=state, reporter=reporter))
        self.bad_steps += state.bad_steps
        self.loop.checkpoints.vote.wait()  # for the last exchange between ranks

    def peak(self, size: int, times: int = 1) -> float:
        """Return the peak memory of a step in bytes: of tensors on CUDA, else of the process."""
        for _ in range(2):  # the first step compiles and creates the optimizer state
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            else:
                with contextlib.suppress(OSError):  # resets the process's peak, see proc(5)
                    Path("/proc/self/clear_refs").write_text("5")
            self.train(self.batches(size, times))
        return hooks.peak_memory_mb(self.device) * 2**20

    def used_and_free(self) -> tuple[float, float]:
        """Return the bytes that this process uses and that are free for it, on its device."""
        if self.device.type == "cpu":
            free = int(re.search(r"MemAvailable: +(\d+)", MEMORY.read_text())[1]) * 1024
            used = hooks.peak_memory_mb(self.device) * 2**20
            return used, free / local_world_size(get_world_size())
        used = torch.cuda.memory_allocated(self.device)
        cached = torch.cuda.memory_reserved(self.device) - used
        return used, torch.cuda.mem_get_info(self.device)[0] + cached


def check_shared_memory(problems: list[str], run: PlannedRun, size: int) -> bool:
    """Compare the shared memory for batches of images of `size` bytes with what is free."""
    needed = run.data_loader_train.loader.shared_memory(size)
    if (val := run.data_loader_val) is not None:
        needed = max(needed, val.loader.shared_memory(size * val.views.crops))
    needed *= local_world_size(get_world_size())
    if not (needed and SHARED_MEMORY.is_dir()):  # other systems have another kind of it
        return True
    ranks = all_gather((needed, *shutil.disk_usage(SHARED_MEMORY)))  # perhaps of several machines
    needed, total, _, free = max(ranks, key=lambda sizes: sizes[0] - sizes[3])
    has = f"{format_bytes(free)} of {format_bytes(total)} free"
    sizes = f"{format_bytes(needed)} for batches of loader processes, {has}"
    log_result(str(SHARED_MEMORY), sizes)
    if needed > free:
        problems.append(
            f"{SHARED_MEMORY}: {sizes}; enlarge it (docker run --shm-size=16g or --ipc=host), or "
            "lower --num_workers or --batch_size"
        )
    return needed <= free


def check_steps(problems: list[str], probe: StepProbe, skip: str) -> None:
    """Check memory, speed, time and disk space; skip: reason not to measure speed and time."""
    run = probe.run
    size = check_memory(problems, probe)
    if skip:
        log_result("skipped", f"speed and time: {skip}")
    elif size < run.args.batch_size:
        log_result("skipped", "speed and time: the batch does not fit in memory")
    else:
        measure_speed(probe)
        profile_probe(probe, size)
    if probe.bad_steps and run.loop.stepper.amp != "fp16":
        found = f"{probe.bad_steps} of the steps tried had NaN, Inf or a loss spike"
        problems.append(f"{found}; lower --lr or --blr")
    if size and run.folder and run.args.save_ckpt:
        check_disk(problems, run)


def check_memory(problems: list[str], probe: StepProbe) -> int:
    """Log the memory of a step and the largest batch; returns a size that fits, 0 for none."""
    args, size = probe.run.args, probe.run.args.batch_size
    images = probe.run.data_loader_train.loader.sampler.samples // get_world_size()
    images = images * size // max(batch_sizes(args).values())  # an epoch fills its largest batch
    largest, how = 0, ""
    try:
        known = probe.device.type == "cuda" or (probe.device.type == "cpu" and MEMORY.exists())
        if known and not (args.compile or args.cuda_graphs):
            largest, how = estimate_largest(probe, size)
            unit = probe.batch_multiple
            largest = min(*all_gather(largest), images) // unit * unit
            # Others would wait for one that ran out of memory; a CPU's system would kill it.
            if get_world_size() > 1 or probe.device.type == "cpu":
                size = min(size, largest)
        peak = probe.peak(size, min(2, probe.run.loop.stepper.update_freq)) if size else 0.0
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        full = full or any(text in str(error) for text in OUT_OF_MEMORY)
        if get_world_size() > 1 or not full:
            raise
        size, largest = 0, largest if largest < size else 0
    if size < args.batch_size:
        advice = f"try {largest or 'a smaller model'}"
        problems.append(f"--batch_size {args.batch_size} does not fit; {advice}")
    if size:
        limit = f"; the largest batch that fits is {max(largest, size)}, {how}" if how else ""
        log_result("memory", f"{format_bytes(peak)} for a batch of {size}{limit}")
    return size


def estimate_largest(probe: StepProbe, asked: int) -> tuple[int, str]:
    """Estimate the largest batch from two small steps; returns it and a description."""
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


def calls_per_second(work: Callable[[int], Any], seconds: float) -> float:
    """Time `work(times)`, which does a thing `times` times, on the slowest rank; all must call."""
    work(1)  # warm-up
    start = time.perf_counter()
    work(1)
    once = time.perf_counter() - start
    times = min(all_gather(max(1, min(50, int(seconds / max(once, 1e-9))))))
    start = time.perf_counter()
    work(times)
    return times / max(all_gather(time.perf_counter() - start))


def endless(batches: DeviceLoader, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches of one epoch after another, each in its own order."""
    for epoch in count(first):
        if hasattr(batches.loader.sampler, "set_epoch"):  # evaluation has one order
            batches.set_epoch(epoch)
        batch = None
        for batch in batches:
            yield batch
        if batch is None:  # no images without --dist_eval, or all were left out
            return


def loader_rate(batches: Iterator[tuple], seconds: float) -> float:
    """Return this rank's images/s, after the batches that its workers held ready."""
    for _ in ("warm-up", "measurement"):
        start, images = time.perf_counter(), 0
        for batch in batches:
            images += len(batch[0])
            if time.perf_counter() - start > seconds:
                break
    return images / (time.perf_counter() - start)


def measure_speed(probe: StepProbe) -> None:
    """Log images/s of training and evaluation, and the time that the run will take."""
    run, size = probe.run, probe.run.args.batch_size
    images = size * get_world_size()  # in a batch of all ranks
    model = images * calls_per_second(lambda n: probe.train(probe.batches(size, n)), SECONDS)
    log_result("model", f"{model:.1f} images/s")
    batches = endless(run.data_loader_train, last_stage(run.args))
    workers = run.data_loader_train.loader.num_workers
    loader = sum(all_gather(loader_rate(batches, SECONDS)))
    log_result("loader", f"{loader:.1f} images/s with {plural(workers, 'worker')} per process")
    times = max(1, min(all_gather(int(SECONDS * min(model, loader) / images))))
    start = time.perf_counter()
    probe.train(FirstBatches(batches, times))  # at once: the workers hold nothing ready
    rate = times * images / max(all_gather(time.perf_counter() - start))
    slower = "loader" if loader < model else "model"
    log_result("together", f"{rate:.1f} images/s, limited by the {slower}")
    evaluation = measure_evaluation(probe) if run.data_loader_val is not None else run.more_work()
    log_time(run, rate, evaluation)


def measure_evaluation(probe: StepProbe) -> float:
    """Log images/s of the evaluation; returns its seconds per epoch."""
    run, batches = probe.run, probe.run.data_loader_val
    images = len(batches.loader.dataset)
    size, views = min(batches.loader.batch_size, images), batches.views
    rate = calls_per_second(lambda n: run.evaluate(probe.batches(size, n, views)), SECONDS / 2)
    model = rate * size * (get_world_size() if run.args.dist_eval else 1)
    loader = sum(all_gather(loader_rate(endless(batches), SECONDS / 2)))
    slower, seconds = "loader" if loader < model else "model", images / min(model, loader)
    text = f"model {model:.1f} images/s, loader {loader:.1f} images/s, limited by the {slower}"
    log_result("evaluation", f"{text}: {timedelta(seconds=round(seconds))}")
    seconds *= 1 + sum(len(other.loader.dataset) for other in run.more_val) / images
    return seconds * (2 if run.args.model_ema_eval else 1) / run.args.eval_freq


def log_time(run: PlannedRun, rate: float, evaluation: float) -> None:
    """Log the duration of an epoch and of the rest of the run."""
    loader, state = run.data_loader_train, run.loop.state
    epochs = run.args.epochs - state.epoch - state.samples_in_epoch / loader.loader.sampler.samples
    epoch = len(loader) * run.args.batch_size * get_world_size() / rate + evaluation
    left = plural(f"{epochs:.4g}", "epoch")
    each, rest = timedelta(seconds=round(epoch)), timedelta(seconds=round(epoch * epochs))
    several = vars(run.args).get("input_sizes")  # the speed is that of the last
    note = "with images of the last size, " if several else ""
    log_result("time", f"{note}{each} per epoch, {rest} for the {left} left, without saves")


def check_disk(problems: list[str], run: PlannedRun) -> None:
    """Compare the size of all checkpoints that will exist at once with the free disk space."""
    args, evaluated, saved = run.args, run.data_loader_val is not None, []
    run.loop.checkpoints.save(state=run.loop.state, writer=lambda content, _: saved.append(content))
    if not saved:  # only rank 0 has the content
        return
    whole, averaged = tensor_leaves(saved[0]), tensor_leaves(saved[0]["model_ema"])
    complete, ema = (sum(tensor.nbytes for tensor in part) for part in (whole, averaged))
    ema *= evaluated
    epoch_ends = math.ceil((args.epochs - run.loop.state.epoch) / args.save_ckpt_freq)
    within_epoch = 2 if args.save_ckpt_every_steps or args.save_ckpt_every_minutes else 0
    files = min(args.save_ckpt_num, max(epoch_ends, 1)) + within_epoch + evaluated + 1  # a new one
    existing = [file.stat() for file in run.folder.glob("checkpoint-*.pth")]
    existing = {file.st_ino: file.st_size for file in existing}  # without hard links
    needed = max(files * complete + ema - sum(existing.values()), 0)
    free = shutil.disk_usage(nearest(run.folder)).free
    each, more, left = map(format_bytes, (complete, needed, free))
    log_result("disk", f"{each} per checkpoint, {more} more for {files} of them, {left} free")
    if needed > free:
        problems.append(
            f"checkpoints need {more}, {left} are free; lower --save_ckpt_num, or choose another "
            "--output_dir"
        )
