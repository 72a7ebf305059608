# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Tables of images: CSV, TSV and text files with a row per image and columns of labels.

python main_finetune.py --data_path photos.csv --eval_data_path more.csv --label_column species
"""

import contextlib
import csv
import itertools
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from data_loading.files import Names
from data_loading.formats import extensions
from data_loading.index import Listing
from data_loading.labels import order_classes
from errors import UserError, did_you_mean, first_few, plural, sentences

IMAGES = ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img")
LABELS = ("label", "labels", "class", "classes", "target", "targets", "category", "tags")
# Values of a split column; the rows of the first evaluation split that there is are evaluated.
TRAIN, EVAL = ("train", "training"), (("val", "valid", "validation", "eval", "dev"), ("test",))
SPLITS = {*TRAIN, *EVAL[0], *EVAL[1]}  # names of parts of a data set, not of classes
NO, YES = ("0", "0.0", "-1", "false", "no"), ("1", "1.0", "true", "yes")  # -1: as in CelebA
FEW = 5  # rows to name in a message


@dataclass(frozen=True)
class Columns:
    """Names of columns, as far as they are given; labels may be patterns such as `tag_*`.

    unused: a column that may be there, and that patterns leave out. root: folder of the image
    files; '' for that of the table.
    """

    image: str | None = None
    labels: Sequence[str] = ()
    split: str | None = None
    weight: str | None = None
    unused: str | None = None
    root: str = ""


@dataclass(frozen=True)
class Table:
    """Columns with an entry for each row: text, or arrays of numbers.

    lines: (N,) the line of the file that each row ends on, or the number of the row, as `unit`
    says. images: names of the images, if the source holds them itself; otherwise a column does.
    class_names: names of integer labels by column.
    """

    path: str
    columns: dict[str, Any]
    lines: np.ndarray
    unit: str = "line"
    images: Sequence[str] | None = None
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self.columns)

    def column(self, name: str) -> list[str]:
        """Return the cells of a column as text; a NaN is empty, as a cell without a number is."""
        values = self.columns[name]
        if not isinstance(values, np.ndarray):
            return [cell.strip() for cell in values]
        cells = values.astype(str).tolist()
        return ["" if cell == "nan" else cell for cell in cells]

    def holds_lists(self, name: str) -> bool:
        """Return True for a column with lists of numbers of classes, written as `0|3`."""
        return name in self.class_names and not isinstance(self.columns[name], np.ndarray)

    def find(self, name: str, flag: str) -> str:
        """Return the name of a column that a flag gives; UserError if there is none."""
        require_column(flag, name, self.columns, self.path)
        return name

    def refuse(self, rows: Iterable[int], problem: str, expected: str) -> None:
        """Raise UserError that names the lines, or images, of some rows, if there are any."""
        rows = list(rows)
        if not rows:
            return
        if self.images is None:
            found = [self.lines[row] for row in rows[: FEW + 1]]
            where = f"{self.unit}{'s' * (len(rows) > 1)} {_first_of(rows, found)}"
        else:
            where = _first_of(rows, [self.images[row] for row in rows[: FEW + 1]])
        raise UserError(f"{self.path}, {where}: {problem}, expected {expected}")

    def part(self, rows: np.ndarray) -> "Table":
        """Return a table of some rows, (M,) int64."""
        columns = {
            name: values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
            for name, values in self.columns.items()
        }
        images = None if self.images is None else [self.images[row] for row in rows]
        return replace(self, columns=columns, lines=self.lines[rows], images=images)


def require_column(flag: str, name: str, columns: Iterable[str], path: str) -> None:
    """Raise UserError with the columns there are if `name`, given by a flag, is none of them."""
    names = list(columns)
    if name not in names:
        hint = sentences(did_you_mean(name, names), f"Known: {first_few(names, 20)}.")
        raise UserError(f"{flag}: unknown column of {path} {name!r}. {hint}")


def _first_of(rows: Sequence[int], texts: Sequence[Any]) -> str:
    """Join the first of the texts, one for each row, as `first_few` does."""
    more = f" and {len(rows) - FEW} more" if len(rows) > FEW else ""
    return ", ".join(map(str, texts[:FEW])) + more


def read_table(path: str | Path) -> Table:
    """Read a table; cells are separated by commas, semicolons or tabs, in .txt also by spaces.

    The first row names the columns, unless it names an image file: then they are 1, 2, ...
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            rows = _split_rows(file, _separator(str(path), first))
            return _build_table(str(path), (row for row in rows if any(map(str.strip, row[0]))))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read the table {path}: {error}; expected UTF-8 text") from error


def _build_table(path: str, rows: Iterator[tuple[list[str], int]]) -> Table:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: the table is empty; expected a row for each image")
    has_names = not any(cell.strip().lower().endswith(extensions()) for cell in first[0])
    names = [cell.strip() for cell in first[0]] if has_names else []
    names = names or [str(number) for number in range(1, len(first[0]) + 1)]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name ({first_few(names, 9)})")
    columns, lines, uneven = [[] for _ in names], array("q"), []
    for row, line in rows if has_names else itertools.chain([first], rows):
        if len(row) != len(names):
            uneven.append((len(row), line))
            continue
        lines.append(line)
        for cells, cell in zip(columns, row, strict=True):
            cells.append(cell)
    if uneven:
        wrong = np.array([line for _, line in uneven])
        table = Table(path, {}, wrong)
        hint = " (in .txt spaces separate cells; write .csv for paths with spaces)"
        hint = hint * path.lower().endswith(".txt")
        table.refuse(range(len(wrong)), plural(uneven[0][0], "cell"), f"{len(names)}{hint}")
    if not lines:
        raise UserError(f"{path}: the table has column names and no rows; add one for each image")
    return Table(path, dict(zip(names, columns, strict=True)), np.frombuffer(lines, np.int64))


def _separator(path: str, first: str) -> str | None:
    if path.lower().endswith(".tsv"):
        return "\t"
    found = max(",;\t", key=first.count)
    if found in first:
        return found
    return None if path.lower().endswith(".txt") else ","


def _split_rows(file: Any, separator: str | None) -> Iterator[tuple[list[str], int]]:
    if separator is None:
        return ((line.split(), number) for number, line in enumerate(file, 1))
    reader = csv.reader(file, delimiter=separator, strict=True)
    return ((row, reader.line_num) for row in reader)


def choose_columns(table: Table, given: Columns, labeled: bool) -> Columns:
    """Return the columns of a table, those that are not given by their usual names."""
    lower = {name.lower(): name for name in reversed(table.names)}

    def usual(names: Sequence[str]) -> str | None:
        return next((lower[name] for name in names if name in lower), None)

    split = given.split and table.find(given.split, "--split_column")
    split = split or usual(("split",))
    weight = given.weight and table.find(given.weight, "--weight_column")
    image = None
    if table.images is None:
        image = given.image and table.find(given.image, "--image_column")
        image = image or usual(IMAGES) or table.names[0]
    others = (image, split, weight, given.unused)
    rest = [name for name in table.names if name not in others]
    labels: list[str] = []
    for pattern in given.labels:
        found = [name for name in rest if fnmatchcase(name, pattern)]
        if not found and pattern not in table.names:
            table.find(pattern, "--label_column")
        labels += [name for name in found or [pattern] if name not in labels]
    if not labels and labeled:
        found = usual(LABELS) or (rest[0] if len(rest) == 1 else None)
        if found is None and not rest:
            raise UserError(f"{table.path} has no column of labels; give data with labels")
        if found is None:
            raise UserError(
                f"{table.path} has the columns {first_few(table.names, 9)}; name those of the "
                "labels with --label_column, * for all but the image"
            )
        labels = [found]
    return Columns(image, labels, split, weight, given.unused, given.root)


def choose_rows(table: Table, split: str | None, train: bool) -> tuple[Table, np.ndarray]:
    """Return the rows to train on or to evaluate, as a table and as numbers."""
    if split is None:
        return table, np.arange(len(table))
    cells = [cell.lower() for cell in table.column(split)]
    known = {*TRAIN, *EVAL[0], *EVAL[1]}
    unknown = [row for row, cell in enumerate(cells) if cell not in known]
    if unknown:
        got = f"{split} is {cells[unknown[0]]!r}"
        table.refuse(unknown, got, "train, val or test")
    wanted = TRAIN if train else next((some for some in EVAL if {*some} & {*cells}), EVAL[0])
    rows = np.array([row for row, cell in enumerate(cells) if cell in wanted], np.int64)
    if not len(rows):
        raise UserError(f"{table.path}: no row of {split} is {wanted[0]}; correct the column")
    return table.part(rows), rows


def read_classes(table: Table, name: str) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes of a column, and the label of each row."""
    cells = table.column(name)
    empty = [row for row, cell in enumerate(cells) if not cell]
    table.refuse(empty, f"{name} is empty", "the name of a class")
    if name not in table.class_names:
        return _number(cells)
    names, labels = table.class_names[name], np.asarray(table.columns[name])
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        got = f"{name} is {labels[wrong[0]]}"
        table.refuse(wrong, got, f"a number from 0 to {len(names) - 1}")
    return names, labels.astype(np.int32)


def _number(cells: Sequence[str]) -> tuple[list[str], np.ndarray]:
    order = order_classes(cells)
    places = {name: place for place, name in enumerate(order)}
    return order, np.array([places[cell] for cell in cells], np.int32)


def read_label_sets(table: Table, name: str) -> tuple[list[str], np.ndarray]:
    """Read cells such as `cat|dog`, empty for none: names, (rows, K) of zeros and ones."""
    sets = [[part.strip() for part in cell.split("|")] for cell in table.column(name)]
    sets = [[part for part in parts if part] for parts in sets]
    if order := table.class_names.get(name):  # the parts are numbers of these classes
        known = {str(number): part for number, part in enumerate(order)}
        wrong = [row for row, parts in enumerate(sets) if not known.keys() >= {*parts}]
        if wrong:
            got = f"{name} is {'|'.join(sets[wrong[0]])}"
            table.refuse(wrong, got, f"numbers from 0 to {len(order) - 1}")
        sets = [[known[part] for part in parts] for parts in sets]
    else:
        order, _ = _number([part for parts in sets for part in parts])
    if not order:
        raise UserError(
            f"{table.path}: all cells of {name} are empty, so there are no classes; give another "
            "--label_column"
        )
    places = {part: place for place, part in enumerate(order)}
    found = np.zeros((len(sets), len(order)), np.uint8)
    for row, parts in enumerate(sets):
        found[row, [places[part] for part in parts]] = 1
    return order, found


def read_yes_or_no(table: Table, names: Sequence[str]) -> np.ndarray:
    """Read columns of 0 and 1: (rows, columns)."""
    known, found = dict.fromkeys(NO, 0) | dict.fromkeys(YES, 1), []
    for name in names:
        values = [known.get(cell.lower()) for cell in table.column(name)]
        wrong = [row for row, value in enumerate(values) if value is None]
        if wrong:
            table.refuse(wrong, f"{name} is {table.column(name)[wrong[0]]!r}", "0 or 1")
        found.append(values)
    return np.array(found, np.uint8).T


def read_targets(
    table: Table, names: Sequence[str], kind: str | None
) -> tuple[str, list[str], np.ndarray]:
    """Return the kind of the targets in some columns, their names, and a row per image.

    kind: None if the cells tell it: several columns, or a|b, are several classes per image.
    """
    several = len(names) > 1
    if kind is None:
        several_in_cell = any("|" in cell for cell in table.column(names[0]))
        several_in_cell |= table.holds_lists(names[0])
        kind = "multi" if several or several_in_cell else "class"
    if kind == "number":
        return kind, [*names], read_numbers(table, names)
    if kind == "class" and several:
        got = f"--label_column {' '.join(names)}"
        raise UserError(f"{got}: --task classification has one column; use --task multi_label")
    if kind == "class" and table.holds_lists(names[0]):
        raise UserError(
            f"{table.path}: {names[0]} holds lists of classes; use --task multi_label, or give a "
            "column with one class per image"
        )
    if kind == "class":
        return kind, *read_classes(table, names[0])
    if table.holds_lists(names[0]):
        return kind, *read_label_sets(table, names[0])
    if several or {cell.lower() for cell in table.column(names[0])} <= {*NO, *YES}:
        return kind, [*names], read_yes_or_no(table, names)
    return kind, *read_label_sets(table, names[0])


def read_numbers(table: Table, names: Sequence[str], least: float = -math.inf) -> np.ndarray:
    """Read columns of finite numbers: (rows, columns) float64."""
    found = []
    for name in names:
        values = [_as_number(cell) for cell in table.column(name)]
        wrong = [row for row, x in enumerate(values) if not (math.isfinite(x) and x >= least)]
        if wrong:
            got = f"{name} is {table.column(name)[wrong[0]]!r}"
            table.refuse(wrong, got, "a number" if least < 0 else f"a number of at least {least:g}")
        found.append(values)
    return np.array(found, np.float64).T


def _as_number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def list_table(table: Table, given: Columns, kind: str | None, labeled: bool) -> Listing:
    """List the rows of a table, in order of the names of their images.

    given: the columns as far as flags name them. kind: of the targets; None if the cells tell it.
    arrays: `targets`, (N,) labels or (N, K) rows; `weights` for sampling, if there is a column;
    `lines` of the table. metadata: also `classes_of_cells`, True if the cells of one column name
    the classes.
    """
    columns = choose_columns(table, given, labeled)
    names = table.images
    if names is None:
        names = table.column(columns.image)
        empty = [row for row, name in enumerate(names) if not name]
        table.refuse(empty, f"{columns.image} is empty", "an image file")
    arrays, classes = {"lines": table.lines}, None
    if columns.labels:
        kind, classes, arrays["targets"] = read_targets(table, columns.labels, kind)
    if columns.weight:
        arrays["weights"] = read_numbers(table, [columns.weight], least=0)[:, 0]
    metadata = {"classes": classes, "kind": kind if classes else None, "unit": table.unit}
    if kind in ("class", "multi") and len(columns.labels) == 1:
        metadata["classes_of_cells"] = columns.labels[0] not in table.class_names
    metadata |= {"columns": {"image": columns.image, "labels": columns.labels}}
    metadata["columns"] |= {"split": columns.split, "weight": columns.weight}
    return Listing(Names.pack(map(os.fsencode, names)), arrays, metadata)


def missing_files(names: Names, root: str) -> list[int]:
    """Return the numbers of the names without a file below `root`; reads each folder once."""
    folders: dict[bytes, set[bytes]] = {}
    missing = []
    for number, name in enumerate(names.all_encoded()):
        folder, _, base = os.path.join(os.fsencode(root), name).rpartition(b"/")
        if folder not in folders:
            with contextlib.suppress(OSError):
                folders[folder] = {*os.listdir(folder or b".")}
        if base not in folders.setdefault(folder, set()):
            missing.append(number)
    return missing
