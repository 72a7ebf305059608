# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Folders of runs, read for a report: with confusion matrices, wrong predictions and pictures.

python -c "from insight.report_data import read_runs; print(read_runs(['runs/demo/finetune']))"
"""

import csv
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.run_files import LOG
from errors import UserError, first_line, plural
from insight.run_data import RunData, number, read_into
from parallel import console

MOST_RUNS = 16  # in one report: more curves look alike
MOST_PREDICTIONS = 200_000  # rows of predictions.csv that are read
MOST_CLASSES = 2000  # of a confusion matrix: a larger one takes seconds
LONG = 12  # letters that names share, from which legends leave them out
NONE = "no prediction"  # of an image with NaN or Inf outputs
WORST = 12  # wrong predictions with the highest probability that are kept


@dataclass(frozen=True)
class Confusion:
    """Numbers of images by true class (rows) and predicted class (columns)."""

    classes: Sequence[str]
    columns: Sequence[str]  # the classes, perhaps with one for images without a prediction
    matrix: Sequence[Sequence[int]]


@dataclass(frozen=True)
class WrongPredictions:
    """The most confident wrong rows of predictions.csv: (path, target, prediction, probability)."""

    worst: Sequence[tuple[str, str, str, float]]
    wrong: int
    read: int
    is_whole: bool  # False if the file has more rows than were read


@dataclass
class ReportData(RunData):
    """Content of a run's folder with the files that a report shows.

    confusions, predictions: by evaluation, '' for the first one. pictures: files by name and epoch,
    which counts from 1.
    """

    confusions: dict[str, Confusion] = field(default_factory=dict)
    predictions: dict[str, WrongPredictions] = field(default_factory=dict)
    pictures: dict[str, dict[int, Path]] = field(default_factory=dict)


def read_runs(folders: Sequence[str | Path]) -> list[ReportData]:
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
    runs = [read_for_report(folder) for folder in folders]
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


def read_for_report(folder: str | Path) -> ReportData:
    """Read the folder of a run. Raises UserError if there is none, or no run in it."""
    run = ReportData(Path(folder).expanduser())
    read_into(run)
    begun = run.status not in ("", "finished") and run.epochs_done < 1
    if not begun and not (run.folder / LOG).exists():
        run.problems.insert(0, f"{LOG} is missing: no epoch is done, or its logs were deleted.")
    for file in sorted(run.folder.glob("confusion*.csv")):
        _read_table(run, file, run.confusions, read_confusion)
    for file in sorted(run.folder.glob("predictions*.csv")):
        _read_table(run, file, run.predictions, read_predictions)
    _find_pictures(run)
    run.warnings = read_warnings(run)
    return run


def read_warnings(run: RunData) -> list[str]:
    """Return the warnings of console.log before the first epoch, of the last process that trained.

    Of a run that failed, those of the last process, which may have failed before its first epoch.
    Later ones are left out: log.txt has the alarms, and other warnings repeat in each epoch. Runs
    of earlier versions did not mark their warnings, so none are found.
    """
    found: list[str] | None = None
    session, has_begun = [], False
    try:
        with (run.folder / console.NAME).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("--- "):
                    session, has_begun = [], False
                elif not has_begun and line.startswith(console.WARNING):
                    session.append(line.removeprefix(console.WARNING).strip())
                elif not has_begun and re.match(r"epoch \d", line):
                    found, has_begun = session, True
    except FileNotFoundError:
        return []
    except OSError as error:
        run.problems.append(f"{console.NAME} cannot be read ({error.strerror or error}).")
    return session if found is None or run.status == "failed" else found


def _read_table(run: ReportData, file: Path, into: dict[str, Any], read: Any) -> None:
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
    """Read confusion.csv: a row of names, then a row for each true class. Raises ValueError."""
    _, *columns = next(rows)
    if len(columns) > MOST_CLASSES:
        raise ValueError(f"{len(columns)} classes are more than the {MOST_CLASSES} of a report")
    names, matrix = [], []
    for name, *counts in rows:
        names.append(name)
        matrix.append([*map(int, counts)])
    widths = {len(row) for row in matrix}
    if not matrix or widths != {len(columns)} or not len(matrix) <= len(columns):
        raise ValueError(f"{len(matrix)} rows do not match {len(columns)} columns")
    return Confusion(names, columns, matrix)


def read_predictions(rows: Iterator[Sequence[str]]) -> WrongPredictions | None:
    """Read predictions.csv of one class an image; None for numbers and for several classes."""
    place = {name: index for index, name in enumerate(next(rows))}
    columns = [place[name] for name in ("path", "target", "prediction", "probability")]
    wrong, read = [], 0
    for row in itertools.islice(rows, MOST_PREDICTIONS):
        path, target, predicted, chance = (row[column] for column in columns)
        read += 1
        if "|" in target + predicted + chance or (predicted and not chance):
            return None
        if target != predicted:
            wrong.append((float(chance or 1), path, target, predicted or NONE))
    wrong.sort(key=lambda each: (-each[0], each[1]))
    worst = [(path, target, predicted, chance) for chance, path, target, predicted in wrong[:WORST]]
    return WrongPredictions(worst, len(wrong), read, next(rows, None) is None)


def _find_pictures(run: ReportData) -> None:
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


def describe_place(run: RunData) -> str:
    """Return `after 12 epochs`, or within an epoch `in epoch 13, at step 250`."""
    done, step = run.epochs_done, number(run.record.get("steps_done"))
    if step is None or (done and done == int(done)):
        return f"after {plural(int(done) if done == int(done) else round(done, 3), 'epoch')}"
    return f"in epoch {int(done) + 1}, at step {step:.0f}"
