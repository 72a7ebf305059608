# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lines about a run that a person reads: of steps, of epochs and at its end.

python -c "from training.report import count_epochs; print(count_epochs(2, 5))"

Epochs count from 1 here, and from 0 in file names and log.txt, as in the official code.
"""

import contextlib
import math
import re
import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from config.flags import as_typed, command, is_code, is_pretraining
from config.run_files import PLACES
from errors import plural
from insight.health import is_measure
from training.checkpoint import TrainState
from training.metrics import METRICS
from training.steps import count_total

Record = dict[str, float]
# What a step's line shows in a place of its own; values with other names follow the loss.
TIMES = ("time_data", "time_forward", "time_backward", "time_optimizer", "time_comm")
SPEED = ("images_per_s", *TIMES, "mfu", "advice")  # what differs between two equal runs
PLACED = ("loss", "lr", "grad_norm", *SPEED, "memory_mb", "eta_s", "step", "steps")
MOST_LOGGED = 100  # classes of a confusion matrix in log.txt
OTHER_UNITS = ("mae", "rmse", "r2")  # the metrics that are no rates in percent
RATE = re.compile(
    rf"({'|'.join(name for name in METRICS if name not in OTHER_UNITS)})(_[\d.]+|_micro|_macro)*"
)
# In an epoch's line:
NOT_SHOWN = ("train_lr", "train_grad_norm", *PLACES, *SPEED)


def plain(stats: Mapping[str, Any]) -> Record:
    """Return the values of an epoch as JSON's types; a user's may be arrays, tensors or others."""
    return {str(name): _plain(value) for name, value in stats.items()}


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    with contextlib.suppress(Exception):  # a sparse tensor has none
        return _plain(value.tolist())
    return str(value)


def log_entry(stats: Record) -> Record:
    """Return the values of an epoch for log.txt: None for NaN and Inf, which are not valid JSON."""
    return {key: _finite(value) for key, value in small_stats(stats).items()}


def small_stats(stats: Record) -> Record:
    """Return the values of an epoch without large confusion matrices, for log.txt and checkpoints.

    The whole of log.txt is written again every epoch, and a matrix of 1000 classes makes saving a
    checkpoint seconds slower.
    """
    large = {
        key
        for key, value in stats.items()
        if "confusion" in key and isinstance(value, list) and len(value) > MOST_LOGGED
    }
    return {key: value for key, value in stats.items() if key not in large}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_finite(part) for part in value] if isinstance(value, list) else value


def describe_progress(state: TrainState) -> str:
    """Return `in epoch 3, step 25`, or `after epoch 3, step 30` at the end of an epoch."""
    if state.samples_in_epoch or not state.epoch:
        return f"in epoch {state.epoch + 1}, step {state.global_step}"
    return f"after epoch {state.epoch}, step {state.global_step}"


def count_epochs(finished: int, epochs: float) -> str:
    """Return `3/5` for the epoch that follows 2 finished ones; `5/5` when all are.

    The last epoch of 4.5 is `5/5` too; it has fewer steps.
    """
    return f"{min(finished + 1, math.ceil(epochs))}/{math.ceil(epochs)}"


def describe_end(state: TrainState, epochs: float) -> str:
    """Return `epoch 3/5 done`, or `2.5 of 5 epochs done` within an epoch."""
    if state.samples_in_epoch:
        return f"{round(min(state.position, epochs), 3)} of {plural(epochs, 'epoch')} done"
    return f"epoch {state.epoch}/{math.ceil(epochs)} done"


def describe_time(epochs: float) -> str:
    """Return `in epoch 3` for the end of an epoch, or `after 2.5 epochs`."""
    return f"in epoch {epochs}" if epochs == int(epochs) else f"after {round(epochs, 3)} epochs"


def format_record(record: Record) -> str:
    """Format the values of a log line, each after its name."""
    more = "".join(
        f"{name} {value:.4g}  "
        for name, value in record.items()
        if name not in PLACED and not undefined(name, value)
    )
    memory = record["memory_mb"]  # NaN where it is not known
    shares = {name.removeprefix("time_"): record.get(name) for name in (*TIMES, "mfu")}
    shares = {name: f"{100 * x:.0f}%" for name, x in shares.items() if x is not None}
    return (
        f"loss {record['loss']:.4f}  {more}lr {record['lr']:.2e}  "
        f"grad_norm {record['grad_norm']:.2f}  images/s {record['images_per_s']:.0f}  "
        + "".join(f"{name} {share}  " for name, share in shares.items())
        + f"memory {memory:.0f} MB  " * math.isfinite(memory)
        + f"eta {timedelta(seconds=round(record['eta_s']))}"
    )


def format_short(record: Record) -> str:
    """Format the values that fit into a progress bar."""
    return (
        f"loss {record['loss']:.4f}  lr {record['lr']:.1e}  "
        f"{record['images_per_s']:.0f} img/s  {timedelta(seconds=round(record['eta_s']))} left"
    )


def format_stats(stats: Record, top5: bool) -> str:
    """Format the values of an epoch, each after its name in log.txt; top5: also those of top-5."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, int | float) else f"{key} {value}"
        for key, value in stats.items()
        if key not in NOT_SHOWN
        and not is_measure(key)  # a probe has a line of its own
        and not isinstance(value, list)
        and not undefined(key, value)
        and (top5 or not re.match(r"test_(\w+_)?acc5", key))
    )


def undefined(name: str, value: Any) -> bool:
    """Return True for the training accuracy of mixed images, which have no single right class."""
    return name.endswith("class_acc") and math.isnan(value)


def describe_metric(name: str, value: float) -> str:
    """Return a metric with its value: `top-1 81.41%`, `f1 80.25%`, `loss 0.8373`, `mae 3.412`."""
    if RATE.fullmatch(name):
        shown = f"top-{name[3:]}" if name in ("acc1", "acc5") else name
        return f"{shown} {value:.2f}%"
    return f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.4g}"


def describe_evaluation(stats: Record, top5: bool) -> str:
    """Return the metrics of an evaluation that are numbers, the loss last; top5: also top-5."""
    order = [name for name in stats if name != "loss" and (top5 or name != "acc5")] + ["loss"]
    return ", ".join(
        describe_metric(name, stats[name]) for name in order if isinstance(stats[name], int | float)
    )


def describe_result(state: TrainState) -> str:
    """Return the best metrics with their epochs, or else the last training loss."""
    found = []
    for name, value in state.best.items():
        epoch = state.best_epochs.get(name)  # not stored by earlier versions
        text = f"{name} {describe_metric(state.best_metric, value)}"
        found.append(text if epoch is None else f"{text} {describe_time(epoch)}")
    if not found and "train_loss" in state.stats:
        found = [f"train_loss {state.stats['train_loss']:.4f} {describe_time(state.position)}"]
    return ", ".join(found)


def next_command(args: Any, path: Path) -> str:
    """Return the command that a finished run in the folder `path` makes possible."""
    folder = shlex.quote(str(path))
    if not is_pretraining(vars(args)):
        resumed = f" --resume {folder}" * bool(args.resume)  # else that one would be evaluated
        evaluates = " --disable_eval false" * args.disable_eval
        return f"{command('main_finetune')} --config {folder}/args.yaml --eval{resumed}{evaluates}"
    code = "".join(
        f" --{name} {as_typed(vars(args)[name])}"
        for name in ("model", "data_set")
        if is_code(vars(args)[name])
    )  # which no checkpoint may choose
    return (
        f"{command('visualize')} --checkpoint {folder}{code}, or "
        f"{command('main_finetune')} --finetune {folder} --data_path FOLDER_OF_CLASSES"
    )


def last_line(args: Any, folder: Path | None, state: TrainState) -> str:
    """Return the last line of a run: its folder, its result, and the next command to type."""
    patience, position = vars(args).get("patience"), round(state.position, 3)
    done = f"{min(position, args.epochs)} of {plural(args.epochs, 'epoch')} done"
    size = max(state.steps_per_epoch, 1)
    has_rest = round(state.position * size) < count_total(args.epochs, size)
    if patience and state.since_best >= patience and has_rest:
        metric, times = state.best_metric, plural(state.since_best, "evaluation")
        done += f", stopped early (--patience {patience}): no better {metric} in {times}"
    elif state.position - args.epochs > 0.6 / size:  # resumed with fewer
        done = f"{plural(position, 'epoch')} done, more than --epochs {args.epochs}"
    result = describe_result(state)
    if not (state.best or is_pretraining(vars(args))):
        result += f"{', ' * bool(result)}not evaluated"
    if folder is None or not args.save_ckpt:
        return "; ".join(filter(None, (done, result, "nothing saved")))
    words = (f"{folder}: {done}", result, f"next: {next_command(args, folder)}")
    return "; ".join(filter(None, words))
