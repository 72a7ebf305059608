# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The files that runs have written, read for a report; damaged ones are named, not fatal.

python -c "from insight.report_data import read_run; print(read_run('runs/demo/pretrain').rows[-1])"
"""

import csv
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from config.run_files import ARGS, LOG, RECORD
from errors import UserError, first_few, first_line, plural
from insight.runs import is_alive

MOST_RUNS = 16  # in one report: more curves look alike
MOST_ANSWERS = 200_000  # rows of predictions.csv that are read
MOST_CLASSES = 2000  # of a confusion matrix: a larger one takes seconds
LONG = 12  # letters that names share, from which legends leave them out
WORST = 12  # wrong answers with the highest probability that are kept
PLACE = ("epoch", "after_epochs")  # keys of log.txt that say when
Row = dict[str, Any]


@dataclass(frozen=True)
class Confusion:
    """Numbers of images by true class (rows) and answer (columns)."""

    classes: Sequence[str]
    answers: Sequence[str]  # the classes, perhaps with `no answer`
    matrix: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Answers:
    """The most confident wrong answers of predictions.csv: (path, target, prediction, chance)."""

    worst: Sequence[tuple[str, str, str, float]]
    wrong: int
    read: int
    is_whole: bool  # False if the file has more rows than were read


@dataclass
class RunData:
    """Content of a run's folder.

    status: running, finished, stopped, failed, killed, or '' if it is unknown.
    rows: lines of log.txt by epoch, with `at`, the number of epochs done. record: run.json, {} if
    there is none. confusions, answers: by evaluation, '' for the first one. pictures: files by
    name and epoch, which counts from 1. problems: sentences on files that could not be read.
    """

    folder: Path
    name: str = ""
    status: str = ""
    rows: list[Row] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    confusions: dict[str, Confusion] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)
    pictures: dict[str, dict[int, Path]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def values(self, key: str) -> list[float | None]:
        """Return the values of a key of log.txt, a value a row; None where it is missing or NaN."""
        return [number(row.get(key)) for row in self.rows]

    def last(self, key: str) -> Any:
        """Return the last value of a key of log.txt that is there, otherwise None."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    @property
    def epochs_done(self) -> float:
        """Epochs that log.txt and run.json say are done."""
        logged = self.rows[-1]["at"] if self.rows else 0
        return max(logged, number(self.record.get("epochs_done")) or 0)


def number(value: Any) -> float | None:
    """Return a finite number as a float; None for NaN, Inf, booleans and all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Read the folders of runs, and name them so that no two have the same name.

    Raises UserError for a folder that is missing, holds no run, or is given twice.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(f"got {len(folders)} runs, expected at most {MOST_RUNS}; name fewer")
    seen: dict[Path, str | Path] = {}
    for folder in folders:
        place = Path(folder).expanduser().resolve()
        if place in seen:
            raise UserError(f"{folder} is given twice; name each run once")
        seen[place] = folder
    runs = [read_run(folder) for folder in folders]
    for run, name in zip(runs, short_names([*seen]), strict=True):
        run.name = name
    return runs


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of paths, as many as it takes to tell them apart."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def labels_of(names: Sequence[str]) -> list[str]:
    """Return names for legends: a long beginning that all of them share becomes an ellipsis."""
    shared = os.path.commonprefix([*names]) if len(names) > 1 else ""
    length = max((shared.rfind(mark) + 1 for mark in "-_./ "), default=0)
    return [f"…{name[length:]}" for name in names] if length >= LONG else [*names]


def read_run(folder: str | Path) -> RunData:
    """Read the folder of a run. Raises UserError if there is none, or no run in it."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{folder} {found}; expected the folder of a run (its --output_dir)")
    if not any((path / name).is_file() for name in (LOG, RECORD, ARGS)):
        raise UserError(_no_run(path))
    run = RunData(path, path.resolve().name)
    _read_log(run)
    run.record = _mapping(run, RECORD, json.loads)
    run.flags = _mapping(run, ARGS, yaml.safe_load)
    run.flags = run.flags or dict(_part(run.record, "arguments"))
    run.status = _status(run)
    for file in sorted(path.glob("confusion*.csv")):
        _read_table(run, file, run.confusions, read_confusion)
    for file in sorted(path.glob("predictions*.csv")):
        _read_table(run, file, run.answers, read_answers)
    _find_pictures(run)
    return run


def _status(run: RunData) -> str:
    """Return the status of run.json; a run that could not note its end was killed."""
    noted = str(run.record.get("status") or "")
    if noted in ("", "running") and is_alive(run.folder):
        return "running"
    return "killed" if noted == "running" else noted


def _no_run(path: Path) -> str:
    runs = sorted(file.parent.name for file in path.glob(f"*/{LOG}"))
    hint = f"; it holds runs: {first_few(runs)}. Name them" if runs else ""
    expected = "expected the folder of a run (its --output_dir)"
    return f"{path} has no {LOG}, {RECORD} or {ARGS}, {expected}{hint}"


def _part(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _read_log(run: RunData) -> None:
    """Read log.txt. Later lines of the same epoch replace earlier ones."""
    path, damaged, rows = run.folder / LOG, [], {}
    if not path.is_file():
        run.problems.append("log.txt is missing: no epoch is done, or its logs were deleted.")
        return
    try:
        for count, line in enumerate(path.read_bytes().splitlines(), 1):
            row = parse_line(line)
            if row is not None:
                rows[row["at"]] = row
            elif line.strip():
                damaged.append(count)
    except OSError as error:
        run.problems.append(f"log.txt cannot be read ({error.strerror or error}).")
    if damaged:
        kind = "line" if len(damaged) == 1 else "lines"
        run.problems.append(
            f"log.txt: {kind} {first_few(damaged)} cannot be read and "
            f"{'is' if len(damaged) == 1 else 'are'} left out."
        )
    run.rows = [rows[at] for at in sorted(rows)]


def parse_line(line: bytes) -> Row | None:
    """Return the values of a line of log.txt with `at`, the epochs done; None if it is damaged.

    Large lists, such as confusion matrices, are left out.
    """
    try:
        values = json.loads(line)
        at = number(values["after_epochs"]) if "after_epochs" in values else None
        at = number(values["epoch"]) + 1 if at is None else at
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    kept = {key: value for key, value in values.items() if not _is_large(value)}
    return kept | {"at": at}


def _is_large(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(part, list) for part in value)


def _mapping(run: RunData, name: str, parse: Any) -> dict[str, Any]:
    """Read a file that holds a mapping; {} if it is missing, and with a note if it is damaged."""
    path = run.folder / name
    try:
        value = parse(path.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping, got {type(value).__name__}")
        return {str(key): part for key, part in value.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        run.problems.append(f"{name} cannot be read ({first_line(error)}); it is left out.")
        return {}


def _read_table(run: RunData, file: Path, into: dict[str, Any], read: Any) -> None:
    """Read a CSV file of an evaluation: `confusion-sketch.csv` is of the set `sketch`."""
    name = re.sub(r"^[a-z]+-?", "", file.stem)
    try:
        with file.open(newline="", encoding="utf-8", errors="replace") as lines:
            found = read(csv.reader(lines))
        if found is not None:
            into[name] = found
    except (OSError, ValueError, LookupError, StopIteration, csv.Error) as error:
        run.problems.append(f"{file.name} cannot be read ({first_line(error)}); it is left out.")


def read_confusion(rows: Iterator[Sequence[str]]) -> Confusion:
    """Read confusion.csv: a row of answers, then a row for each true class. Raises ValueError."""
    _, *answers = next(rows)
    if len(answers) > MOST_CLASSES:
        raise ValueError(f"{len(answers)} classes are more than the {MOST_CLASSES} of a report")
    names, matrix = [], []
    for name, *counts in rows:
        names.append(name)
        matrix.append([*map(int, counts)])
    widths = {len(row) for row in matrix}
    if not matrix or widths != {len(answers)} or not len(matrix) <= len(answers):
        raise ValueError(f"{len(matrix)} rows do not match {len(answers)} columns")
    return Confusion(names, answers, matrix)


def read_answers(rows: Iterator[Sequence[str]]) -> Answers | None:
    """Read predictions.csv of one class an image; None for numbers and for several classes."""
    place = {name: index for index, name in enumerate(next(rows))}
    columns = [place[name] for name in ("path", "target", "prediction", "probability")]
    wrong, read = [], 0
    for row in itertools.islice(rows, MOST_ANSWERS):
        path, target, answer, chance = (row[column] for column in columns)
        read += 1
        if "|" in target + answer + chance or (answer and not chance):
            return None
        if target != answer:
            wrong.append((float(chance or 1), path, target, answer or "no answer"))
    wrong.sort(key=lambda each: (-each[0], each[1]))
    worst = [(path, target, answer, chance) for chance, path, target, answer in wrong[:WORST]]
    return Answers(worst, len(wrong), read, next(rows, None) is None)


def _find_pictures(run: RunData) -> None:
    """Find the files NAME/epoch-N.png."""
    for path in sorted(run.folder.glob("*/epoch-*.png")):
        if found := re.fullmatch(r"epoch-(\d+)\.png", path.name):
            run.pictures.setdefault(path.parent.name, {})[int(found[1]) + 1] = path
    run.pictures = {
        name: {epoch: files[epoch] for epoch in sorted(files)}
        for name, files in run.pictures.items()
    }


def evenly(items: Iterable[Any], most: int) -> list[Any]:
    """Return at most `most` of some items, the first and the last among them if most > 1."""
    items = [*items]
    if len(items) <= most:
        return items
    if most <= 1:
        return items[-most:] if most else []
    return [items[place * (len(items) - 1) // (most - 1)] for place in range(most)]


def describe_rows(run: RunData) -> str:
    """Return `12 epochs`, or how many there are within an epoch."""
    done = run.epochs_done
    return plural(int(done) if done == int(done) else round(done, 3), "epoch")
