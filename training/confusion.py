# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Results of each class: confusion.csv, a table of the worst classes, the most confused pairs.

python -c "from training import confusion as c; print(c.describe({'confusion': [[3, 1], [0, 4]]}))"
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError, plural
from parallel.process_group import get_logger, is_main_process
from utils import write_csv

ROWS, PAIRS = 20, 5  # of a table, and pairs, at most
NO_PREDICTION = "no prediction"  # column of images with NaN or Inf outputs


def name_classes(count: int, classes: Sequence[str] | None) -> list[str]:
    """Return the names of classes, or else their numbers."""
    return list(classes or map(str, range(count)))


def write_confusion(
    matrix: Sequence[Sequence[int]], classes: Sequence[str] | None, path: Path
) -> None:
    """Write numbers of images as CSV: a row for each true class, a column for each prediction."""
    names = name_classes(len(matrix), classes)
    columns = ["true class", *[*names, NO_PREDICTION][: len(matrix[0])]]
    write_csv(columns, [[name, *row] for name, row in zip(names, matrix, strict=True)], path)


def confusion_file(key: str) -> str:
    """Return the file for a value of log.txt, '' if it is no confusion matrix.

    `test_confusion_ema` goes to confusion-ema.csv, that of a set `sketch` to confusion-sketch.csv.
    """
    found = re.fullmatch(r"test_(\w+_)?confusion(_ema)?", key)
    return csv_name("confusion", (found[1] or "")[:-1] + (found[2] or "")) if found else ""


def csv_name(name: str, split: str) -> str:
    """Return the file of an evaluation by its `Run.split`: `b_ema` is in confusion-b-ema.csv."""
    return "-".join([name, *filter(None, split.split("_"))]) + ".csv"


def describe(stats: Mapping[str, Any], classes: Sequence[str] | None = None) -> list[str]:
    """Return the lines of a table of the worst classes, and of the most confused pairs.

    stats: values of an evaluation; no lines without a metric of each class.
    """
    columns = {name: value for name, value in stats.items() if isinstance(value, list)}
    matrix = columns.pop("confusion", None)
    if rates := columns.pop("class_accuracy", None):
        columns = {"accuracy": rates} | columns
    if matrix:
        rates = [*map(rate, matrix, range(len(matrix)))]
        columns = {"accuracy": rates} | columns | {"images": [*map(sum, matrix)]}
    if not columns:
        return []
    first = next(iter(columns.values()))  # the worst of it come first
    names = name_classes(len(first), classes)
    tested = [i for i in range(len(first)) if first[i] is not None]
    worst = sorted(tested, key=first.__getitem__)[:ROWS]
    rows = [["class", *map(head_of, columns)]]
    rows += [[names[i], *(cell(column[i]) for column in columns.values())] for i in worst]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    if len(tested) > ROWS:
        lines[0] += f"  (the worst {ROWS} of {plural(len(tested), 'class')})"
    return lines + (confused_pairs(matrix, names) if matrix else [])


def head_of(metric: str) -> str:
    """Return the head of a column of classes: `f1` for the metric `f1_per_class`."""
    return metric.removesuffix("_per_class")


def cell(value: float | None) -> str:
    """Return a value of the table: a number of images, a rate, or a dash for an undefined one."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def rate(row: Sequence[int], true: int) -> float | None:
    """Return the accuracy of a class from its row of the matrix; None without images."""
    return 100 * row[true] / sum(row) if any(row) else None


def report_classes(
    stats: Mapping[str, Any],
    classes: Sequence[str] | None,
    folder: str,
    of_ema: bool,
    prefix: str = "",
) -> None:
    """Log the table of an evaluation, and write its confusion matrix into `folder` if named.

    prefix: of the evaluation set in log.txt, such as `sketch_`.
    """
    for line in describe(stats, classes):
        get_logger().info("%s", line)
    if folder and "confusion" in stats and is_main_process():
        path = Path(folder, confusion_file(f"test_{prefix}confusion" + "_ema" * of_ema))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_confusion(stats["confusion"], classes, path)
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error}); choose another --output_dir"
            ) from error
        get_logger().info("%s: images of each true class by predicted class", path)


def confused_pairs(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    """Return a line of the most frequent wrong predictions."""
    wrong = [
        (count, f"{names[true]} as {[*names, NO_PREDICTION][predicted]}")
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if count and predicted != true
    ]
    wrong.sort(key=lambda pair: -pair[0])
    most = ", ".join(f"{pair} ({count})" for count, pair in wrong[:PAIRS])
    return [f"most confused: {most}"] if wrong else []
