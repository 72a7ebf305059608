# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Tables of images: CSV, TSV and text files with a row per image and columns of labels.

python main_finetune.py --data_path photos.csv --eval_data_path more.csv --label_column species
"""

import csv
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data_loading.decode import BadImage, load_image
from data_loading.formats import extensions
from errors import UserError, first_few, plural, resolve_for
from parallel.process_group import get_logger

IMAGES = ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img")
LABELS = ("label", "labels", "class", "classes", "target", "targets", "category", "tags")
# Values of a split column; the rows of the first evaluation split that there is are evaluated.
TRAIN, EVAL = ("train", "training"), (("val", "valid", "validation", "eval", "dev"), ("test",))
NO, YES = ("0", "0.0", "-1", "false", "no"), ("1", "1.0", "true", "yes")  # -1: as in CelebA
LOOKED_FOR = 1000  # image files at the start; others are found missing when they are read


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
    """Rows of text cells; lines: the line of the file that each row ends on."""

    path: str
    names: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """Return the cells of a column."""
        place = self.names.index(name)
        return [row[place].strip() for row in self.rows]

    def find(self, name: str, flag: str) -> str:
        """Return the name of a column that a flag gives; UserError with close matches."""
        resolve_for(flag, name, dict.fromkeys(self.names), f"column of {self.path}")
        return name

    def refuse(self, rows: Iterable[int], problem: str, expected: str) -> None:
        """Raise UserError that names the lines of some rows, if there are any."""
        lines = [self.lines[row] for row in rows]
        if lines:
            where = f"line{'s' * (len(lines) > 1)} {first_few(lines, 5)}"
            raise UserError(f"{self.path}, {where}: {problem}, expected {expected}")

    def part(self, rows: Sequence[int]) -> "Table":
        """Return a table of some rows."""
        rows_and_lines = [self.rows[row] for row in rows], [self.lines[row] for row in rows]
        return Table(self.path, self.names, *rows_and_lines)


def read_table(path: str | Path) -> Table:
    """Read a table; cells are separated by commas, semicolons or tabs, in .txt also by spaces.

    The first row names the columns, unless it names an image file: then they are 1, 2, ...
    """
    rows, lines = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            for row, line in _split_rows(file, _separator(str(path), first)):
                if any(cell.strip() for cell in row):
                    rows.append(row)
                    lines.append(line)
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read the table {path}: {error}; expected UTF-8 text") from error
    if not rows:
        raise UserError(f"{path}: the table is empty; expected a row for each image")
    has_names = not any(cell.strip().lower().endswith(extensions()) for cell in rows[0])
    names = [cell.strip() for cell in rows[0]] if has_names else []
    names = names or [str(number) for number in range(1, len(rows[0]) + 1)]
    table = Table(str(path), names, rows[has_names:], lines[has_names:])
    if not table.rows:
        raise UserError(f"{path}: the table has column names and no rows; add one for each image")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name ({first_few(names, 9)})")
    uneven = [number for number, row in enumerate(table.rows) if len(row) != len(names)]
    if uneven:
        table.refuse(uneven, f"{plural(len(table.rows[uneven[0]]), 'cell')}", f"{len(names)}")
    return table


def _separator(path: str, first: str) -> str | None:
    if path.lower().endswith(".tsv"):
        return "\t"
    found = max(",;\t", key=first.count)
    if found in first:
        return found
    return None if path.lower().endswith(".txt") else ","


def _split_rows(file: Any, separator: str | None) -> Iterable[tuple[list[str], int]]:
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
        if found is None:
            raise UserError(
                f"{table.path} has the columns {first_few(table.names, 9)}; name those of the "
                "labels with --label_column, * for all but the image"
            )
        labels = [found]
    return Columns(image, labels, split, weight, given.unused, given.root)


def choose_rows(table: Table, split: str | None, train: bool) -> tuple[Table, int]:
    """Return the rows to train on or to evaluate, and the number of the other ones."""
    if split is None:
        return table, 0
    cells = [cell.lower() for cell in table.column(split)]
    known = {*TRAIN, *EVAL[0], *EVAL[1]}
    unknown = [row for row, cell in enumerate(cells) if cell not in known]
    if unknown:
        got = f"{split} is {cells[unknown[0]]!r}"
        table.refuse(unknown, got, "train, val or test")
    wanted = TRAIN if train else next((some for some in EVAL if {*some} & {*cells}), EVAL[0])
    rows = [row for row, cell in enumerate(cells) if cell in wanted]
    if not rows:
        raise UserError(f"{table.path}: no row of {split} is {wanted[0]}; correct the column")
    return table.part(rows), len(table.rows) - len(rows)


def read_classes(table: Table, name: str) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes of a column, and the label of each row."""
    cells = table.column(name)
    empty = [row for row, cell in enumerate(cells) if not cell]
    table.refuse(empty, f"{name} is empty", "the name of a class")
    return _number(cells)


def _number(cells: Sequence[str]) -> tuple[list[str], np.ndarray]:
    names = {*cells}
    are_numbers = all(name.isdecimal() for name in names)
    order = sorted(names, key=int) if are_numbers else sorted(names)
    places = {name: place for place, name in enumerate(order)}
    return order, np.array([places[cell] for cell in cells], np.int64)


def read_label_sets(table: Table, name: str) -> tuple[list[str], np.ndarray]:
    """Read cells such as `cat|dog`, empty for none: names, (rows, K) of zeros and ones."""
    sets = [[part.strip() for part in cell.split("|")] for cell in table.column(name)]
    sets = [[part for part in parts if part] for parts in sets]
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
        kind = "multi" if several or several_in_cell else "class"
    if kind == "number":
        return kind, [*names], read_numbers(table, names)
    if kind == "class" and several:
        got = f"--label_column {' '.join(names)}"
        raise UserError(f"{got}: --task classification has one column; use --task multi_label")
    if kind == "class":
        return kind, *read_classes(table, names[0])
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


class TableImages(Dataset):
    """The images of the rows of a table.

    kind: of the targets, class, multi or number. classes: names of the classes, or of the numbers.
    targets: a row of them per image; None without labels. weights: for sampling, if there are any.
    others: number of rows that belong to another split.
    """

    def __init__(self, table: Table, columns: Columns, kind: str | None, others: int = 0) -> None:
        """columns: as `choose_columns` returns them. kind: None if the cells tell it."""
        self.path, self.lines, self.others = table.path, table.lines, others
        self.columns, self.root = columns, os.path.expanduser(columns.root)
        self.root = self.root or os.path.dirname(table.path)
        self.files = table.column(columns.image)
        empty = [row for row, file in enumerate(self.files) if not file]
        table.refuse(empty, f"{columns.image} is empty", "an image file")
        self.kind, self.classes, self.targets = "class", None, None
        if columns.labels:
            self.kind, self.classes, self.targets = read_targets(table, columns.labels, kind)
        self.weights = None
        if columns.weight:
            self.weights = read_numbers(table, [columns.weight], least=0)[:, 0]
        self._look_for_files()

    def _look_for_files(self) -> None:
        some = range(min(len(self.files), LOOKED_FOR))
        missing = [row for row in some if not os.path.exists(self.path_of(row))]
        texts = [f"line {self.lines[row]}: {self.path_of(row)}" for row in missing]
        if len(missing) == len(some):
            raise UserError(
                f"{self.path}: no image file of column {self.columns.image} exists "
                f"({first_few(texts, 2)}); give --image_column, or --image_root for the folder "
                "that its paths are relative to"
            )
        if missing:
            got = f"{len(missing)} of the first {plural(len(some), 'image file')}"
            get_logger().warning("%s: %s do not exist: %s", self.path, got, first_few(texts, 5))

    def path_of(self, index: int) -> str:
        """Return the path of an image file."""
        return os.path.join(self.root, self.files[index])

    def line_of_class(self, label: int) -> int:
        """Return the first line that has a class."""
        has = self.targets == label if self.targets.ndim == 1 else self.targets[:, label]
        return self.lines[int(np.argmax(has))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        try:
            image = load_image(self.path_of(index))
        except FileNotFoundError as error:
            line = f"line {self.lines[index]} of {self.path}"
            raise BadImage("no such file", remedy=f"correct {line}, or --image_root") from error
        return image, None if self.targets is None else self.targets[index]

    @property
    def samples(self) -> "TableSamples":
        """Return its (path, target) pairs, as torchvision's folders have them."""
        return TableSamples(self)


class TableSamples(Sequence):
    """(path, target) of each image; nothing is copied. names: paths as the table has them."""

    def __init__(self, images: TableImages) -> None:
        self.images, self.names = images, images.files

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        targets = self.images.targets
        return self.images.path_of(index), None if targets is None else targets[index]


def table(spec: Any, train: bool) -> TableImages:
    """Rows of a table: data_path for training; eval_data_path, or a column of splits, to evaluate.

    spec: a `DatasetSpec`. The split column of eval_data_path counts only if --split_column names
    it.
    """
    own, given = bool(spec.eval_data_path) and not train, spec.columns or Columns()
    path = Path((spec.eval_data_path if own else spec.data_path) or "").expanduser()
    if not path.is_file():
        flag = "eval_data_path" if own else "data_path"
        raise UserError(f"--{flag} {path}: no such file; expected a table (.csv, .tsv, .txt)")
    whole = read_table(path)
    columns = choose_columns(whole, given, spec.labeled)
    split = columns.split if given.split or not own else None
    if split is None and not (train or own):
        raise UserError(
            f"{path} has no column of splits; give "
            "--eval_data_path OTHER_TABLE, --split_column, or --val_split 0.1"
        )
    rows, others = choose_rows(whole, split, train)
    data = TableImages(rows, columns, spec.kind, others)
    text = "%s: image %s, %s %s%s"
    labels = "labels" if len(columns.labels) > 1 else "label"
    rest = f", split {split}" * bool(split) + f", weight {columns.weight}" * bool(columns.weight)
    get_logger().info(text, path, columns.image, labels, first_few(columns.labels, 5), rest)
    return data
