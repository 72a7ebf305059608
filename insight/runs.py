# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The runs below a folder, as a table or as JSON; reads run.json, log.txt and args.yaml.

python visualize.py runs runs --sort test_acc1

It needs no torch, so the table appears at once.
"""

import json
import os
import re
import sys
import time
from calendar import timegm
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from config.flags import is_pretraining
from config.run_files import ARGS, LOG, PLACES, RECORD
from errors import UserError, did_you_mean, first_few, sentences
from insight.run_data import RunData, number, part, read_run

# Parts of the names of metrics of which the lowest value is the best.
LOWEST = {"loss", "rmse", "mae", "ece", "dead", "saturated", "skipped"}
# Metrics of which a value is the best, the highest unless LOWEST says otherwise.
HAVE_BEST = re.compile(
    r"(?!train_lr$|train_grad_norm$|test_best_blr$)(train|test|probe)_.+|"
    r"(holdout|fixed_train)_loss|rank_me|(dead|saturated)_channels|skipped_steps|images_per_s|mfu"
)
SHOWN = ("acc1", "map", "rmse")  # metrics of tasks, to show if a run names none of its own
UNKNOWN = "-"
TIME = "%Y-%m-%dT%H:%M:%SZ"
COLUMNS = ("run", "script", "model", "recipe", "status", "epochs")
COLUMNS += ("metric", "last", "best", "time", "started")


@dataclass(frozen=True)
class Value:
    """A metric of a run: its last value, its best one, and the epochs done at the best."""

    last: float | None
    best: float | None = None
    epoch: float | None = None


@dataclass
class FoundRun:
    """A run, as its files describe it; None or '' for what they do not tell.

    metrics: by their names in log.txt. notes: problems of its files, as sentences.
    """

    name: str
    folder: Path
    script: str = ""
    model: str = ""
    recipe: str = ""
    status: str = ""  # running, finished, stopped, failed or killed
    error: str = ""
    epochs_done: float = 0
    epochs: float | None = None  # of --epochs
    start: str = ""  # UTC
    end: str = ""
    seconds: float | None = None
    metrics: dict[str, Value] = field(default_factory=dict)
    main: str = ""  # the metric that chooses its best checkpoint
    lowest: set[str] = field(default_factory=set)  # metrics of which it says that lower is better
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the run as JSON's types."""
        values = {name: vars(value) for name, value in self.metrics.items()}
        shown = {name: value for name, value in vars(self).items() if name != "lowest"}
        return shown | {"folder": str(self.folder), "metrics": values}


# --- finding and reading ----------------------------------------------------------------------


def find_runs(root: Path) -> list[FoundRun]:
    """Read all runs in a folder and in those below it, the newest first."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {problem}; give the folder that holds the folders of runs")
    found = [describe(read_run(folder), root) for folder in _run_folders(root)]
    if not found:
        raise UserError(
            f"no run in {root}: no folder there holds {RECORD}, or {LOG} with {ARGS}; give the "
            "folder above those of --output_dir"
        )
    found.sort(key=lambda run: run.name)
    return sorted(found, key=lambda run: run.start, reverse=True)


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        if RECORD in files or {LOG, ARGS} <= {*files}:
            yield Path(folder)


def describe(run: RunData, root: Path | None = None) -> FoundRun:
    """Return the row of a run, which is called by its path below `root`."""
    below = run.folder.relative_to(root).as_posix() if root and run.folder != root else ""
    found = FoundRun(below or run.name, run.folder, recipe=run.recipe, status=run.status)
    if run.flags:
        found.script = "main_pretrain" if is_pretraining(run.flags) else "main_finetune"
    for name in ("script", "error", "start", "end"):
        setattr(found, name, str(run.record.get(name) or getattr(found, name)))
    found.model, found.epochs = str(run.flags.get("model", "")), number(run.flags.get("epochs"))
    found.seconds, found.epochs_done = number(run.record.get("seconds")), run.epochs_done
    found.lowest, found.metrics = run.lowest, find_metrics(run)
    names = [n for s in SHOWN for n in found.metrics if n.startswith("test_") and n.endswith(s)]
    names = (*run.best, *names, "train_loss", *found.metrics)
    found.main = next((name for name in names if name in found.metrics), "")
    found.notes = [f"{run.folder}: {problem}" for problem in run.problems]
    return found


def find_metrics(run: RunData) -> dict[str, Value]:
    """Return the last and the best values in run.json and log.txt."""
    final = part(run.record, "final")
    found = {name: Value(number(value)) for name, value in final.items()}
    for name, each in run.best.items():
        best = number(each.get("value")), number(each.get("epoch"))
        found[name] = Value(number(final.get(name)), *best)
    for row in run.rows:
        for name, value in row.items():
            if (value := number(value)) is None or name in (*PLACES, "at"):
                continue
            held = found.get(name, Value(None))
            best = (value, row["at"])
            if not is_better(name, value, held.best, run.lowest):
                best = (held.best, held.epoch)
            found[name] = Value(value, *best)
    return found


# --- order and output -------------------------------------------------------------------------


def goal_of(name: str, lowest: Iterable[str] = ()) -> str:
    """Return `min` or `max`, which is the best value of a metric, '' if neither is.

    lowest: names of metrics of which the lowest is.
    """
    if not HAVE_BEST.fullmatch(name):
        return ""
    return "min" if name in lowest or not LOWEST.isdisjoint(name.split("_")) else "max"


def is_better(name: str, value: float, best: float | None, lowest: Iterable[str] = ()) -> bool:
    """Return True if a value of a metric is better than the best one so far."""
    goal = goal_of(name, lowest)
    return goal != "" and (best is None or (value < best if goal == "min" else value > best))


def sort_runs(runs: Sequence[FoundRun], metric: str) -> list[FoundRun]:
    """Return the runs by the best value of a metric, the best run first, those without it last.

    By the last value, the highest first, where no value is the best.
    """
    if not any(metric in run.metrics for run in runs):
        known = sorted({name for run in runs for name in run.metrics})
        hint = did_you_mean(metric, known)
        listed = f"The runs have {first_few(known, 40) or 'no metrics yet'}"
        raise UserError(f"--sort: no run has the metric {metric!r}. {sentences(hint, listed)}")
    sign = 1 if any(goal_of(metric, run.lowest) == "min" for run in runs) else -1

    def key(run: FoundRun) -> tuple[bool, float]:
        value = run.metrics.get(metric, Value(None))
        best = value.last if value.best is None else value.best
        return best is None, sign * (best or 0)

    return sorted(runs, key=key)


def rows_of(runs: Sequence[FoundRun], metric: str = "") -> list[tuple[str, ...]]:
    """Return the cells of the table; metric: to show, '' for the main one of each run."""
    return [_cells(run, metric or run.main) for run in runs]


def _cells(run: FoundRun, metric: str) -> tuple[str, ...]:
    value = run.metrics.get(metric, Value(None))
    best = _text(value.best)
    if value.best is not None and value.epoch is not None:
        best += f" (epoch {round(value.epoch, 3):g})"
    epochs = f"{round(run.epochs_done or 0, 3):g}"
    epochs += "" if run.epochs is None else f"/{run.epochs:g}"
    seconds = "" if run.seconds is None else str(timedelta(seconds=round(run.seconds)))
    script = run.script.removeprefix("main_")
    cells = (run.name, script, run.model, run.recipe, run.status, epochs)
    cells += (metric, _text(value.last), best, seconds, _local(run.start))
    return tuple(cell or UNKNOWN for cell in cells)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _local(text: str) -> str:
    """Return a time of run.json in the time zone of this machine."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(timegm(time.strptime(text, TIME))))
    except ValueError:
        return ""


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows under the names of the columns, aligned."""
    rows = [[name.upper() for name in COLUMNS], *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def print_runs(args: Any) -> None:
    """Print the runs below a folder as `visualize.py runs` does; notes go to stderr."""
    runs = find_runs(Path(args.folder))
    if args.sort:
        runs = sort_runs(runs, args.sort)
    for note in (note for run in runs for note in run.notes):
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps([run.as_json() for run in runs], indent=1, allow_nan=False))
    else:
        print(as_table(rows_of(runs, args.sort or "")))
