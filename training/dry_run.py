# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What a run would do, tried with the very objects that it would use, and nothing written.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --input_size 32 --stem_stride 1 \
    --batch_size 64 --epochs 10 --output_dir runs/tried --dry_run
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Augmented, Batches, class_map
from errors import TrainingStopped, some
from optim_factory import Schedule
from parallel.process_group import all_gather, barrier, broadcast, get_logger, get_rank
from parallel.process_group import get_world_size as processes
from training import hooks
from training.checkpoint import TrainState
from training.run_lock import describe_holder
from training.stepper import Stepper
from training.trial import Repeated, Trial, largest_that_fits, memory, peak_of, readable, size_of
from training.trial_data import Decoded, Stream, decode_some, rate_of

SECONDS = 4.0  # that a measurement lasts
DECODING = 4.0  # seconds for images of each set
MARGIN = 0.95  # share of the free memory that may be used


@dataclass
class Report:
    """Lines for the main process's log, and what a run would fail of."""

    faults: list[str] = field(default_factory=list)

    def line(self, label: str, text: str, *values: Any) -> None:
        """A label and what is to be said of it."""
        get_logger().info("%-12s " + text, label, *values)

    def fault(self, text: str) -> None:
        """What a run would fail of; listed again at the end."""
        self.faults.append(text)
        self.line("", "would fail: %s", text)

    def conclude(self) -> None:
        """Every rank leaves with exit code 1 if the main process found a fault."""
        faults = broadcast(self.faults)
        if not faults:
            return get_logger().info("dry run: nothing would fail; nothing was written")
        get_logger().info("dry run: %d found that would fail", len(faults))
        for number, text in enumerate(faults, 1):
            get_logger().info("  %d. %s", number, text)
        raise TrainingStopped(f"dry run: would fail: {faults[0]}{' ...' * (len(faults) > 1)}")


def named_folder(path: str) -> Path | None:
    """The folder of a run, neither made nor locked."""
    return Path(path) if path else None


def check_run(
    args: Any,
    folder: Path | None,
    source: str,
    state: TrainState,
    batches: Batches,
    stepper: Stepper,
    schedule: Schedule,
    train_epoch: Callable[..., dict],
    save: Callable[..., None],
    val_batches: Batches | None = None,
    evaluation: Callable[..., dict] | None = None,
) -> None:
    """Try what a main has built when its first epoch would begin; every rank must call it.

    source: what the run goes on from. train_epoch, evaluation: an engine's epoch and evaluation,
    ready but for batches, state, reporter and keeper. save: `utils.save_model` but for the state.
    Weights and moments are not what they were afterwards.
    """
    report = Report()
    get_logger().info("dry run: nothing is written, no epoch begins; a minute or so")
    samples = check_data(report, batches, val_batches, args.seed)
    sound = not broadcast(report.faults)
    tell_plan(report, source or vars(args).get("finetune", ""), state, stepper, schedule)
    check_folder(report, folder, args.log_dir)
    if samples:
        unit = 2 if vars(args).get("mixup") or vars(args).get("cutmix") else 1  # pairs are mixed
        trial = Trial(train_epoch, stepper, batches, samples)
        fixed = args.compile or args.cuda_graphs
        size = check_memory(report, trial, args.batch_size, unit, fixed)
        rate = size and measure_speed(report, trial, state, size, args.num_workers, sound)
        passes = 1 + bool(vars(args).get("model_ema_eval")) if val_batches is not None else 0
        judging = 0.0
        if rate and passes:
            shared = processes() if args.dist_eval else 1
            judging = passes * time_evaluation(report, trial, evaluation, val_batches, shared)
        bad = trial.end()
        if bad:
            report.fault(bad)
        if folder and args.save_ckpt and size:
            check_disk(report, args, folder, state, save, val_batches is not None)
        if rate:
            left = args.epochs - state.epoch - state.samples_in_epoch / len(batches.loader.dataset)
            epoch = len(batches) * args.batch_size * processes() / rate + judging
            text = "%s an epoch, %s for the %.4g epochs to come, without saving"
            report.line("time", text, hooks.clock(epoch), hooks.clock(epoch * left), left)
    report.conclude()


# --- data, plan, folder --------------------------------------------------------------------------


def check_data(
    report: Report, batches: Batches, val_batches: Batches | None, seed: int
) -> list[tuple]:
    """Decode images of both sets; returns some good ones for training, the same on every rank."""
    kept = []
    for name, of_set in (("train", batches), ("val", val_batches)):
        if of_set is None:
            continue
        found = decode_some(of_set.loader, seed, DECODING)
        tell_data(report, name, of_set.loader.samples, found)
        kept = kept or found.good
    if min(all_gather(len(kept))) == 0:
        report.fault("no training image could be decoded, so nothing else was tried")
        return []
    return kept


def tell_data(report: Report, name: str, data: Augmented, found: Decoded) -> None:
    """A line about a set, and its bad images: faults, or those that the run goes without."""
    whose = all_gather((found.faults, found.without, found.tried, len(found.good)))
    faults = [text for texts, *_ in whose for text in texts]
    without = dict(sorted(pair for _, part, *_ in whose for pair in part.items()))
    tried, good = (sum(column) for column in list(zip(*whose, strict=True))[2:])
    names = class_map(data) if data.nb_classes else None
    classes = f" of {data.nb_classes} classes" if data.nb_classes else ", labels not used"
    same = ", as train has them" if name == "val" and names else ""
    fate = "left out" if data.on_bad == "leave out" else "replaced"
    verdict = [f"{len(faults)} bad"] if faults else []
    verdict += [f"{len(without)} bad, {fate}"] if without else []
    text, said = "%d images%s%s; %d decoded, %s", ", ".join(verdict) or "all good"
    report.line(name, text, len(data), classes, same, tried, said)
    if without:
        report.line("", f"{fate}: %s", some([f"{image} ({why})" for image, why in without.items()]))
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        report.fault(f"{len(faults)} of {tried} {name} images: {'; '.join(faults[:5])}{more}")
    elif not good:
        report.fault(f"none of {tried} {name} images can be used; look at the data")


def tell_plan(
    report: Report, source: str, state: TrainState, stepper: Stepper, schedule: Schedule
) -> None:
    """Where the run begins, its updates, parameters and rates."""
    begins = f"at epoch {state.epoch}, update {state.global_step} of {schedule.total}"
    report.line("start", "%s, %s", source or "random weights", begins)
    groups = stepper.optimizer.param_groups
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    decayed = sum(n for n, group in zip(counts, groups, strict=True) if group["decayed"])
    per_update, micro = state.effective_batch, stepper.update_freq
    each = per_update // (micro * processes())
    text = "%d images = %d x %d micro-batches x %d processes; %d in the whole run"
    report.line("update", text, per_update, each, micro, processes(), schedule.total)
    scales = [group["lr_scale"] for group in groups]
    layers = f", rate times {min(scales):.3g} to 1 by layer" if min(scales) < 1 else ""
    text = "%.2fM trained, %.2fM of them decayed, in %d groups%s"
    report.line("parameters", text, sum(counts) / 1e6, decayed / 1e6, len(groups), layers)
    for row, text in enumerate(rate_rows(schedule, state.global_step)):
        report.line("" if row else "rate", "%s", text)


def rate_rows(schedule: Schedule, now: int) -> Iterator[str]:
    """The learning rate at the first update, the peak, every tenth and the last, with bars."""
    last = schedule.total - 1
    peak = min(max(schedule.warmup - 1, 0), last)
    updates = {0, peak, last, min(now, last), *(schedule.total * k // 10 for k in range(10))}
    width = len(str(last))
    for update in sorted(updates):
        rate = schedule.rate(update)
        bar = "#" * round(40 * rate / schedule.lr) if schedule.lr > 0 else ""
        mark = " peak" * (update == peak) + " here" * (update == now > 0)
        yield f"update {update:{width}d}  {rate:.2e}  {bar}{mark}".rstrip()


def check_folder(report: Report, folder: Path | None, log_dir: str | None) -> None:
    """Whether a run could write there; it is not tried."""
    log_folder = (
        folder if log_dir is None else Path(log_dir) if log_dir not in ("", "none") else None
    )
    for flag, path in (("--output_dir", folder), ("--log_dir", log_folder)):
        if path is None:
            continue
        there = nearest(path)
        if not there.is_dir():
            report.fault(f"{flag} {path}: {there} is a file; choose another folder")
        elif not os.access(there, os.W_OK | os.X_OK):
            report.fault(f"{flag} {path}: {there} may not be written; choose a folder you own")
    holder = describe_holder(folder) if folder and get_rank() == 0 else None
    if holder:
        report.fault(f"--output_dir {folder} is in use by {holder}, which is left alone")
    if log_folder and importlib.util.find_spec("tensorboard") is None:
        report.fault("no tensorboard: pip install tensorboard, or --log_dir none")


def nearest(path: Path) -> Path:
    """The path, or what of it is there."""
    return next(place for place in (path, *path.resolve().parents) if place.exists())


# --- memory and speed ----------------------------------------------------------------------------


def check_memory(report: Report, trial: Trial, asked: int, unit: int, fixed: bool) -> int:
    """Memory of a step and the largest batch; returns one that fits, `asked` if it does, or 0.

    unit: of which batches are multiples. fixed: no other batch than `asked` can be tried cheaply.
    """
    most = len(trial.batches.loader.dataset) // processes() // unit * unit
    alone = trial.device.type == "cuda" and processes() == 1
    report.line("", "measuring memory ...")
    if fixed or memory(trial.device) is None:
        largest, how = asked * trial.fits(asked), "no other was tried"
    elif alone:
        largest = largest_that_fits(trial.fits, asked, most, unit)
        how = "found by trying"
    else:
        largest, how = largest_by_measuring(trial, asked, unit)
    largest = min(min(all_gather(largest)), most)
    size = min(asked, largest)
    if size < asked:
        report.fault(f"--batch_size {asked} does not fit; try {largest or 'a smaller model'}")
    if size and memory(trial.device) is not None:
        peak = peak_of(trial.device, lambda: trial.step(size, min(2, trial.stepper.update_freq)))
        all_of_it = " (all images)" if largest == most else ""
        text = "%s in a step of %d images; the largest that fits is %d%s, %s"
        report.line("memory", text, readable(peak), size, largest, all_of_it, how)
    return size


def largest_by_measuring(trial: Trial, asked: int, unit: int) -> tuple[int, str]:
    """(images, how it was found) from the memory of two small steps, since too much may kill."""
    small = max(asked // 8 // unit, 1) * unit
    size = min(2 * small, asked)
    peaks, before = [], 0
    for count in (small, size):
        trial.step(count)  # the first of a size measures kernels, the first of all makes moments
        before = before or memory(trial.device)[0]
        peaks.append(peak_of(trial.device, lambda n=count: trial.step(n)))
    low, high = peaks
    floor = trial.samples[0][0].numel() * 4
    each = (high - low) / (size - small) if size > small else (high - before) / size
    each = max(each, floor)
    used, free = memory(trial.device)
    room = used + MARGIN * free - high
    text = f"from {readable(each)} an image and {readable(free)} free for each process"
    return max(size + math.floor(room / each) // unit * unit, 0), text


def measure_speed(
    report: Report, trial: Trial, state: TrainState, size: int, workers: int, sound: bool
) -> float:
    """Images/s of loader and model, apart and together; returns the last, over all processes.

    sound: no image is known to be bad, so that real batches can be trained on.
    """
    report.line("", "measuring speed ...")
    seconds, times = trial.step(size), 1  # `check_memory` did the first
    more = min(all_gather(min(50, int(SECONDS / seconds))))
    if more > 1:
        seconds, times = trial.step(size, more), more
    model = min(all_gather(size * times / seconds)) * processes()
    report.line("model", "%.1f images/s", model)
    if not sound:
        report.line("loader", "not measured: a bad image would end it")
        return 0.0
    batches, ahead = trial.batches, 2 * workers + 1  # what workers hold ready

    def set_epoch(epoch: int) -> None:
        batches.set_epoch(state.epoch + epoch)

    barrier()
    loader = sum(all_gather(rate_of(Stream(batches.loader, set_epoch), ahead, SECONDS)))
    report.line("loader", "%.1f images/s by %d workers a process", loader, workers)
    slowest = min(model, loader) / processes()
    times = min(all_gather(max(1, int(SECONDS * slowest / size))))
    stream = Stream(batches, set_epoch, min(ahead, times), times)
    trial.run(stream)
    seconds = max(all_gather(time.perf_counter() - stream.began))
    together = times * batches.loader.batch_size * processes() / seconds
    slower = "the loader" if loader < model else "the model"
    report.line("together", "%.1f images/s: %s is what takes the time", together, slower)
    return together


def time_evaluation(
    report: Report,
    trial: Trial,
    evaluation: Callable[..., dict],
    val_batches: Batches,
    shared: int,
) -> float:
    """Seconds that the evaluation of all images takes, at the rate of what is slower there."""
    loader, count = val_batches.loader, len(val_batches.loader.dataset)
    size = min(loader.batch_size, count)
    evaluation(batches=Repeated(trial.batch(size), 1))
    began = time.perf_counter()
    evaluation(batches=Repeated(trial.batch(size), 1))
    times = max(1, min(50, int(SECONDS / 2 / max(time.perf_counter() - began, 1e-9))))
    began = time.perf_counter()
    evaluation(batches=Repeated(trial.batch(size), times))
    model = size * times / max(all_gather(time.perf_counter() - began)) * shared
    stream = Stream(loader, lambda epoch: None)
    mine = len(loader) and rate_of(stream, 2 * loader.num_workers + 1, SECONDS / 2)
    read = sum(all_gather(mine))  # other ranks have no images without --dist_eval
    slower = "the loader" if read < model else "the model"
    seconds = count / min(model, read)
    text = "%.1f images/s by the model, %.1f by the loader: %s is what takes the time, %s"
    report.line("evaluation", text, model, read, slower, hooks.clock(seconds))
    return seconds


# --- disk ----------------------------------------------------------------------------------------


def check_disk(
    report: Report,
    args: Any,
    folder: Path,
    state: TrainState,
    save: Callable[..., None],
    evaluated: bool,
) -> None:
    """What the checkpoints of the run take, against what its folder has room for."""
    sizes: list[int] = []

    def weigh(content: dict[str, Any], write: Any) -> None:
        average = content["model_ema"]
        sizes.extend([size_of(content), size_of(average) if average and evaluated else 0])

    save(state=state, writer=weigh)  # on the main process only
    if not sizes:
        return
    whole, average = sizes
    ends = math.ceil((args.epochs - state.epoch) / args.save_ckpt_freq)
    within = 2 if args.save_ckpt_every_steps or args.save_ckpt_every_minutes else 0
    files = min(args.save_ckpt_num, max(ends, 1)) + within + evaluated + 1  # one is being written
    there = folder.glob("checkpoint-*.pth") if folder.is_dir() else ()
    own = sum({file.stat().st_ino: file.stat().st_size for file in there}.values())
    needed, free = files * whole + average - own, shutil.disk_usage(nearest(folder)).free
    text = "%s a checkpoint, %s more at most for %d of them, %s free in %s"
    values = readable(whole), readable(max(needed, 0)), files, readable(free), nearest(folder)
    report.line("disk", text, *values)
    if needed > free:
        fix = "lower --save_ckpt_num, or choose another --output_dir"
        report.fault(f"checkpoints need {readable(needed)}, {readable(free)} are free: {fix}")
