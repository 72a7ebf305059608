# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files of results: parts that are kept if a program is killed, and one file of them at the end.

python -c "from insight.result_files import WRITERS; print(*WRITERS)"
"""

import contextlib
import csv
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from errors import UserError, first_few
from insight.predictions import cell
from utils import explain, write_atomically

PLAN, STATE = "plan.json", "state.pth"  # in the folder of the parts
TEXT, ROWS = ".jsonl", ".pth"  # of a part
LETTERS = 80  # of a value in a message
GROUP = 10_000  # rows of a row group in Parquet
# Files that an evaluation writes next to the results.
SIDE_FILES = ("metrics.json", "confusion.csv", "classes.csv", "calibration.csv", "calibration.png")
SIDE_FILES += ("worst.png",)
Records = Iterable[dict[str, Any]]
Fields = Mapping[str, type]  # name -> str, float, list[str] or list[float]


def write_csv(file: BinaryIO, records: Records, fields: Fields) -> None:
    """Write a line of names, and a line for each record."""
    for group in itertools.chain([[dict(zip(fields, fields, strict=True))]], chunks(records)):
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerows([cell(record[name]) for name in fields] for record in group)
        file.write(text.getvalue().encode())


def write_json(file: BinaryIO, records: Records, fields: Fields) -> None:
    """Write a list of objects, each in a line of its own."""
    start = "[\n"
    for record in records:
        file.write((start + json.dumps(record)).encode())
        start = ",\n"
    file.write(b"\n]\n" if start == ",\n" else b"[]\n")


def write_lines(file: BinaryIO, records: Records, fields: Fields) -> None:
    """Write an object per line."""
    for record in records:
        file.write(json.dumps(record).encode() + b"\n")


def write_parquet(file: BinaryIO, records: Records, fields: Fields) -> None:
    """Write Parquet: text and float64, or lists of them."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    kinds = {str: pyarrow.string(), float: pyarrow.float64()}
    kinds |= {list[kind]: pyarrow.list_(of) for kind, of in [*kinds.items()]}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in fields.items()])
    with ParquetWriter(pyarrow.PythonFile(file, "w"), schema) as writer:
        for group in chunks(records):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def chunks(records: Records) -> Iterator[list[dict[str, Any]]]:
    """Yield the records in lists of up to GROUP."""
    waiting = iter(records)
    while group := list(itertools.islice(waiting, GROUP)):
        yield group


WRITERS: dict[str, Callable[[BinaryIO, Records, Fields], None]] = {
    ".csv": write_csv,
    ".json": write_json,
    ".jsonl": write_lines,
    ".parquet": write_parquet,
}


def side_file(out: Path, name: str) -> Path:
    """Return the path of one of SIDE_FILES of an evaluation."""
    assert name in SIDE_FILES, name
    return out.with_name(f"{out.stem}-{name}")


def files_to_write(out: Path) -> list[Path]:
    """Return `out`, and the files next to it that an evaluation writes, and others remove."""
    return [out, *(side_file(out, name) for name in SIDE_FILES)]


def check_place(out: Path) -> None:
    """Raise UserError if `out` cannot be written, before anything is computed."""
    if out.is_dir():
        raise UserError(f"--output {out} is a folder; give the name of a file in it")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--output {out}: Parquet needs pyarrow: pip install pyarrow, or choose .csv"
            ) from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {out}: {error.strerror}; choose another place") from error
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--output {out}: the folder is not writable for you; choose another place")


class Parts:
    """The results of some images each, in a folder next to `out`, until all of them are there.

    A part is written at once or not at all, so that a program that is killed loses the part that it
    was working on. plan: plain values that decide the results; a folder of another plan is refused,
    or replaced with `overwrite`.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], overwrite: bool = False) -> None:
        self.out, self.folder = out, folder_of(out)
        self.plan = json.loads(json.dumps(plan))
        held = self._read_plan()
        self.continues = held == self.plan
        if held is not None and not (self.continues or overwrite):
            raise UserError(self._difference(held))
        there = [path for path in files_to_write(out) if path.exists()]
        if there and not (self.continues or overwrite):
            raise UserError(f"{there[0]} exists; choose another --output, or give --overwrite true")

    def _read_plan(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / PLAN).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            text = f"{self.folder / PLAN} is damaged ({error}); remove the folder"
            raise UserError(text) from error

    def _difference(self, held: Mapping[str, Any]) -> str:
        pairs = [(n, held.get(n), x) for n, x in self.plan.items() if x != held.get(n)]
        changed = [f"{n} {str(old)[:LETTERS]} (now {str(new)[:LETTERS]})" for n, old, new in pairs]
        return (
            f"{self.folder} holds the beginning of results with other arguments: "
            f"{first_few(changed)}; give the same, another --output, or --overwrite true"
        )

    def begin(self) -> dict[str, Any]:
        """Prepare the folder; returns the state after the last finished part, with `parts` of it.

        Leftovers of other results are removed.
        """
        if self.continues:
            return self._state()
        with disk_errors(self.out):
            for path in self.folder.glob("*"):
                if path.name in (PLAN, STATE) or path.suffix in (TEXT, ROWS):
                    path.unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(json.dumps(self.plan, indent=1), self.folder / PLAN)
        return {"parts": 0}

    def _state(self) -> dict[str, Any]:
        try:
            return torch.load(self.folder / STATE, weights_only=True)
        except FileNotFoundError:
            return {"parts": 0}
        except Exception as error:  # torch raises nearly anything for damaged files
            text = f"{self.folder / STATE} is damaged ({error}); remove {self.folder}"
            raise UserError(text) from error

    def _path(self, part: int, suffix: str = TEXT) -> Path:
        return self.folder / f"{part:08d}{suffix}"

    def write(
        self,
        part: int,
        lines: Sequence[str],
        state: Mapping[str, Any],
        rows: torch.Tensor | None = None,
    ) -> None:
        """Write a part, counted from 0, and then the state, of all parts up to it.

        lines: records as JSON. rows: numbers of the part that the end needs too; None for nothing.
        """
        with disk_errors(self.out):
            write_atomically("".join(f"{line}\n" for line in lines), self._path(part))
            if rows is not None:
                write_atomically(partial(torch.save, rows), self._path(part, ROWS))
            held = {**state, "parts": part + 1}
            write_atomically(partial(torch.save, held), self.folder / STATE)

    def rows(self, count: int) -> list[torch.Tensor]:
        """Return the rows of the first parts, as far as they have some."""
        paths = [self._path(part, ROWS) for part in range(count)]
        return [torch.load(path, weights_only=True) for path in paths if path.exists()]

    def records(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield the records of the first parts, in order."""
        for part in range(count):
            with open(self._path(part), encoding="utf-8") as file:
                yield from map(json.loads, file)

    def finish(self, count: int, fields: Fields) -> int:
        """Write the file of all parts; returns the number of records with an error."""
        write, bad = WRITERS[self.out.suffix], 0

        def counted() -> Iterator[dict[str, Any]]:
            nonlocal bad
            for record in self.records(count):
                bad += record["error"] is not None
                yield record

        with disk_errors(self.out):
            write_atomically(lambda file: write(file, counted(), fields), self.out)
            for path in files_to_write(self.out)[1:]:  # of other results
                path.unlink(missing_ok=True)
        return bad

    def remove(self) -> None:
        """Remove the folder of the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Shown:
    """The first records alone, in memory, for a command without --output."""

    def __init__(self, count: int) -> None:
        self.count, self.kept, self.bad = count, [], 0

    def begin(self) -> dict[str, Any]:
        """Return the state of a new start."""
        return {"parts": 0}

    def write(self, part: int, lines: Sequence[str], *_: Any) -> None:
        """Keep the first records of a part, and count those with an error."""
        records = [json.loads(line) for line in lines]
        self.kept += records[: self.count - len(self.kept)]
        self.bad += sum(record["error"] is not None for record in records)

    def rows(self, count: int) -> list[torch.Tensor]:
        """Return the rows of the first parts, of which there are none."""
        return []

    def finish(self, count: int, fields: Fields) -> int:
        """Print the table; returns the number of all records with an error."""
        shown = {n: [cell(record[n]) for record in self.kept] for n in fields}
        shown = {n: column for n, column in shown.items() if n == "path" or any(column)}
        widths = [max(map(len, [name, *column])) for name, column in shown.items()]
        for row in [[*shown], *map(list, zip(*shown.values(), strict=True))]:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        return self.bad

    def remove(self) -> None:
        """Do nothing: there are no files."""


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn errors of the disk into a UserError that says that finished parts are kept."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {out}: {explain(error)}; finished parts are kept, and the same command "
            "continues"
        ) from error


def folder_of(out: Path) -> Path:
    """Return the folder of the parts of a file."""
    return out.with_name(f"{out.name}.parts")
