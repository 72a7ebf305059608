# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The runs below a folder, as a table or as JSON; reads run.json, log.txt and args.yaml.

python visualize.py runs runs --sort test_acc1

It needs no torch, so the table appears at once.
"""

import json
import math
import os
import re
import sys
import time
from calendar import timegm
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from config.flags import is_pretraining
from config.recipes import read_values
from config.run_files import ARGS, LOCK, LOG, RECORD, SILENCE
from errors import UserError, did_you_mean, first_few, first_line, sentences

# Parts of the names of metrics of which the lowest value is the best.
LOWEST = {"loss", "rmse", "mae", "ece", "dead", "saturated", "skipped"}
PLACES = ("epoch", "after_epochs", "step", "n_parameters")  # values of log.txt that are no metrics
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
        shown = {name: value for name, value in vars(self).items() if name not in ("lowest",)}
        return shown | {"folder": str(self.folder), "metrics": values}


# --- finding and reading ----------------------------------------------------------------------


def find_runs(root: Path) -> list[FoundRun]:
    """Read all runs in a folder and in those below it, the newest first."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {problem}; give the folder that holds the folders of runs")
    found = [read_run(folder, root) for folder in _run_folders(root)]
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


def read_run(folder: Path, root: Path | None = None) -> FoundRun:
    """Read the run in a folder; its name is the path below `root`."""
    name = folder.relative_to(root).as_posix() if root and folder != root else folder.name
    run = FoundRun(name or str(folder), folder)
    record = _read_record(run)
    if record:
        _take_record(run, record)
    else:
        _take_flags(run)
    _read_log(run)
    if run.status in ("", "running") and is_alive(folder):
        run.status = "running"
    elif run.status == "running":  # it could not note its end
        run.status = "killed"
    if not run.main:
        names = [n for s in SHOWN for n in run.metrics if n.startswith("test_") and n.endswith(s)]
        run.main = next((n for n in (*names, "train_loss", *run.metrics) if n in run.metrics), "")
    return run


def _read_record(run: FoundRun) -> dict[str, Any]:
    """Return the content of run.json, {} without one; a damaged one is noted."""
    path = run.folder / RECORD
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
            raise ValueError("expected an object with arguments")
        return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        run.notes.append(f"{path} is damaged ({first_line(error)}); what {LOG} and {ARGS} tell")
    return {}


def _take_record(run: FoundRun, record: Mapping[str, Any]) -> None:
    flags = record["arguments"]
    for name in ("script", "recipe", "status", "error", "start", "end"):
        setattr(run, name, str(record.get(name) or ""))
    run.model, run.epochs = str(flags.get("model", "")), _number(flags.get("epochs"))
    run.seconds, run.epochs_done = (_number(record.get(n)) for n in ("seconds", "epochs_done"))
    best, final = (record.get(name) or {} for name in ("best", "final"))
    run.main = next(iter(best), "")
    run.lowest = {name for name, each in best.items() if each.get("lower_is_better")}
    run.metrics = {name: Value(_number(value)) for name, value in final.items()}
    for name, each in best.items():
        value, epoch = (_number(each.get(key)) for key in ("value", "epoch"))
        run.metrics[name] = Value(_number(final.get(name)), value, epoch)


def _take_flags(run: FoundRun) -> None:
    """Take what args.yaml tells: runs of earlier versions have no run.json."""
    path = run.folder / ARGS
    try:
        flags = read_values(path)
        found = re.match(r"# recipe (\S+?):?\s", path.read_text(encoding="utf-8"))
    except ValueError as error:
        run.notes.append(f"{path}: {error}")
        return
    run.script = "main_pretrain" if is_pretraining(flags) else "main_finetune"
    run.recipe, run.model = found[1] if found else "", str(flags.get("model", ""))
    run.epochs = _number(flags.get("epochs"))


def _read_log(run: FoundRun) -> None:
    """Take last and best values from log.txt, of which a power cut may have left half a line."""
    try:
        lines = (run.folder / LOG).read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            values = json.loads(line)
            place = values.get("after_epochs") or values["epoch"] + 1
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        run.epochs_done = max(run.epochs_done or 0, place)
        for name, value in values.items():
            if (value := _number(value)) is None or name in PLACES:
                continue
            held = run.metrics.get(name, Value(None))
            better = held.best is None or is_better(name, value, held.best, run.lowest)
            best = (value, place) if better else (held.best, held.epoch)
            run.metrics[name] = Value(value, *best)


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and math.isfinite(value) else None


def is_alive(folder: Path) -> bool:
    """Return True if a run holds the folder: its heartbeat is recent, by this machine's clock."""
    try:
        return time.time() - (folder / LOCK).stat().st_mtime < SILENCE
    except OSError:
        return False


# --- order and output -------------------------------------------------------------------------


def lower_is_better(name: str, lowest: Iterable[str] = ()) -> bool:
    """Return True for a metric of which the lowest value is the best; lowest: names of others."""
    return name in lowest or not LOWEST.isdisjoint(name.split("_"))


def is_better(name: str, value: float, other: float, lowest: Iterable[str] = ()) -> bool:
    """Return True if a value of a metric is better than another one."""
    return value < other if lower_is_better(name, lowest) else value > other


def sort_runs(runs: Sequence[FoundRun], metric: str) -> list[FoundRun]:
    """Return the runs by the best value of a metric, the best run first, those without it last."""
    if not any(metric in run.metrics for run in runs):
        known = sorted({name for run in runs for name in run.metrics})
        hint = did_you_mean(metric, known)
        listed = f"The runs have {first_few(known, 40) or 'no metrics yet'}"
        raise UserError(f"--sort: no run has the metric {metric!r}. {sentences(hint, listed)}")
    sign = 1 if any(lower_is_better(metric, run.lowest) for run in runs) else -1

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
    best += f" (epoch {round(value.epoch, 3):g})" * (
        value.best is not None and value.epoch is not None
    )
    epochs = f"{round(run.epochs_done or 0, 3):g}"
    epochs += f"/{run.epochs:g}" * (run.epochs is not None)
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
