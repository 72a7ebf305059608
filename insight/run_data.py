# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The folder of a run: status, log.txt, run.json and args.yaml; damaged files are named, not fatal.

python -c "from insight.run_data import read_run; print(read_run('runs/demo/pretrain').rows[-1])"

It needs no torch, so that `visualize.py runs` lists runs at once.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.flags import is_pretraining
from config.recipes import FILES, read_values
from config.run_files import ARGS, LOCK, LOG, RECORD, SILENCE, parse_line, position_of
from errors import UserError, first_few, first_line

Row = dict[str, Any]


@dataclass
class RunData:
    """Content of a run's folder.

    status: running, finished, stopped, failed, killed, or '' if it is unknown.
    rows: lines of log.txt by epoch, with `at`, the number of epochs done. record: run.json, {} if
    there is none. recipe: its name, '' for none. problems: sentences on files that could not be
    read. warnings: those before the first epoch, as `read_warnings` finds them for a report.
    """

    folder: Path
    name: str = ""
    status: str = ""
    rows: list[Row] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def values(self, key: str) -> list[float | None]:
        """Return the values of a key of log.txt, a value a row; None where it is missing or NaN."""
        return [number(row.get(key)) for row in self.rows]

    def last(self, key: str) -> Any:
        """Return the last value of a key of log.txt that is there, otherwise None."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    @property
    def kind(self) -> str:
        """The kind of training, `pre-training` or `fine-tuning`; '' if the flags are unknown."""
        if not self.flags:
            return ""
        return "pre-training" if is_pretraining(self.flags) else "fine-tuning"

    @property
    def epochs_done(self) -> float:
        """Epochs that log.txt and run.json say are done."""
        logged = self.rows[-1]["at"] if self.rows else 0
        return max(logged, number(self.record.get("epochs_done")) or 0)

    @property
    def best(self) -> dict[str, Mapping[str, Any]]:
        """Best metrics of run.json by name: value, epoch, lower_is_better."""
        known = part(self.record, "best")
        return {name: each for name, each in known.items() if isinstance(each, Mapping)}

    @property
    def lowest(self) -> set[str]:
        """Metrics that run.json says are best where they are lowest."""
        return {name for name, each in self.best.items() if each.get("lower_is_better")}


def number(value: Any) -> float | None:
    """Return a finite number as a float; None for NaN, Inf, booleans and all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def part(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a mapping in another one, {} if there is none."""
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def read_run(folder: str | Path) -> RunData:
    """Read the folder of a run. Raises UserError if there is none, or no run in it."""
    run = RunData(Path(folder).expanduser())
    read_into(run)
    return run


def read_into(run: RunData) -> None:
    """Read the files in the folder of `run`. Raises UserError if it is none of a run."""
    path = run.folder
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; expected the folder of a run (its --output_dir)")
    if not any((path / name).is_file() for name in (LOG, RECORD, ARGS)):
        raise UserError(_no_run(path))
    run.name = path.resolve().name
    _read_log(run)
    _read_record(run)
    if not run.flags:
        _read_flags(run)
    noted = str(run.record.get("status") or "")
    if noted in ("", "running") and is_alive(path):
        run.status = "running"
    else:
        run.status = "killed" if noted == "running" else noted  # it could not note its end


def _no_run(path: Path) -> str:
    runs = sorted(file.parent.name for file in path.glob(f"*/{LOG}"))
    hint = f"; it holds runs: {first_few(runs)}. Name them" if runs else ""
    expected = "expected the folder of a run (its --output_dir)"
    return f"{path} has no {LOG}, {RECORD} or {ARGS}, {expected}{hint}"


def is_alive(folder: Path) -> bool:
    """Return True if a run holds the folder: its heartbeat is recent, by this machine's clock."""
    try:
        return time.time() - (folder / LOCK).stat().st_mtime < SILENCE
    except OSError:
        return False


def _read_log(run: RunData) -> None:
    """Read log.txt. Later lines of the same epoch replace earlier ones.

    Tables in it, such as confusion matrices, are left out.
    """
    damaged, rows = [], {}
    try:
        lines = (run.folder / LOG).read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        run.problems.append(f"{LOG} cannot be read ({error.strerror or error}).")
        return
    for count, line in enumerate(lines, 1):
        values = parse_line(line)
        at = position_of(values)
        if math.isfinite(at):
            kept = {key: value for key, value in values.items() if not _is_table(value)}
            rows[at] = kept | {"at": at}
        elif line.strip():
            damaged.append(count)
    if damaged:
        kind, verb = ("line", "is") if len(damaged) == 1 else ("lines", "are")
        text = f"{LOG}: {kind} {first_few(damaged)} cannot be read and {verb} left out."
        run.problems.append(text)
    run.rows = [rows[at] for at in sorted(rows)]


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(row, list) for row in value)


def _read_record(run: RunData) -> None:
    """Read run.json, with the flags and the recipe."""
    try:
        record = json.loads((run.folder / RECORD).read_bytes())
        if not isinstance(record, dict) or not isinstance(record.get("arguments", {}), dict):
            raise ValueError("expected a mapping that holds arguments")
    except FileNotFoundError:  # of an earlier version
        return
    except (OSError, ValueError, RecursionError) as error:
        _note_damage(run, RECORD, error)
        return
    flags = part(record, "arguments")
    run.record, run.recipe = record, str(record.get("recipe") or "")
    run.flags = {name: value for name, value in flags.items() if name not in FILES}


def _read_flags(run: RunData) -> None:
    """Read args.yaml, with the recipe that its first line names."""
    path = run.folder / ARGS
    if not path.exists():
        return
    try:
        run.flags = {str(name): value for name, value in read_values(path).items()}
        found = re.match(r"# recipe (\S+?):?\s", path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _note_damage(run, ARGS, error)
        return
    run.recipe = run.recipe or (found[1] if found else "")


def _note_damage(run: RunData, name: str, error: Exception) -> None:
    reason = first_line(error).removeprefix("cannot read the file: ")
    run.problems.append(f"{name} cannot be read ({reason}); it is left out.")
