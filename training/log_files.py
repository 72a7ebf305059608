# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Hooks that write files into the output folder: log.txt, metrics.csv, images, confusion.csv.

python main_finetune.py --recipe digits_finetune --output_dir runs/digits --hook csv
"""

import csv
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.utils import save_image

from config.run_files import LOG, parse_line, position_of
from errors import UserError
from training.checkpoint import TrainState, checkpoint_name
from training.confusion import confusion_file, write_confusion
from training.hooks import Hook, Run
from training.report import Record, log_entry
from utils import write_atomically, write_csv


class JsonHook(Hook):
    """Write log.txt, one JSON object an epoch; drop the epochs that a resumed run repeats.

    The line of an evaluation within an epoch has no `epoch`, but `after_epochs` and `step`.
    It comes after the other hooks that write values of epochs: if the last epoch is not in log.txt,
    a killed run has perhaps not told them of it.
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        self.path = folder / LOG
        self.written = self.path.read_bytes() if self.path.exists() else b""
        lines = {line + b"\n": position_of(parse_line(line)) for line in self.written.splitlines()}
        now = state.position
        last = now if state.at_phase_end else math.nextafter(now, -math.inf)
        self.content = b"".join(line for line, position in lines.items() if position <= last)
        self._write()
        # A run that continues another one in a folder of its own does not have its checkpoint.
        saved = bool(state.stats) and (folder / checkpoint_name(vars(state))).exists()
        self.misses = saved and state.at_phase_end and now not in lines.values()

    def misses_epoch(self, state: TrainState) -> bool:
        return self.misses

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        self.content += json.dumps(log_entry(stats)).encode() + b"\n"
        self._write()

    def on_end(self, run: Run) -> None:
        self._write()

    def _write(self) -> None:
        """Write the lines that are not on the disk yet, perhaps because a write failed."""
        if self.content != self.written:
            write_atomically(self.content, self.path)
            self.written = self.content


class ImageHook(Hook):
    """Write images as PNG files, numbered by epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_image(self, name: str, image: Tensor, state: TrainState) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)  # fails if the run's own folder is missing
        path = self._path(name, state)
        write_atomically(partial(save_image, image, format="png"), path)

    def has_image(self, name: str, state: TrainState) -> bool:
        return self._path(name, state).exists()

    def _path(self, name: str, state: TrainState) -> Path:
        return self.folder / name / f"epoch-{math.ceil(state.position) - 1}.png"


class ConfusionHook(Hook):
    """Write the confusion matrix of the last evaluation into confusion.csv, if there is one.

    classes: names in the order of the head. `confusion_file` names the files of others.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None) -> None:
        self.folder, self.classes = folder, classes

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        for key, matrix in stats.items():
            if name := confusion_file(key):
                write_confusion(matrix, self.classes, self.folder / name)


class CsvHook(Hook):
    """Write metrics.csv, a row for each line of log.txt with its values that are no lists.

    The rows that a resumed run repeats are replaced.
    """

    def check(self, args: Any) -> None:
        needs_folder(args, "csv")

    def on_start(self, run: Run) -> None:
        self.path, self.rows = run.folder / "metrics.csv", {}
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows = {position_of(row): row for row in csv.DictReader(file)}
            now, whole = run.state.position, run.state.at_phase_end
            self.rows = {at: row for at, row in rows.items() if at < now or (whole and at == now)}

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        values = {name: value for name, value in stats.items() if not isinstance(value, list)}
        place = {name: stats[name] for name in ("epoch", "after_epochs") if name in stats}
        self.rows[position_of(place)] = place | values
        names = dict.fromkeys(name for row in self.rows.values() for name in row if name)
        rows = [[row.get(name, "") for name in names] for row in self.rows.values()]
        write_csv(names, rows, self.path)


class ScheduleHook(Hook):
    """Write schedule.csv before the training: the learning rate and other options by step.

    rows: at most so many steps, the first and the last among them.
    """

    def __init__(self, rows: int = 1000) -> None:
        self.most = at_least(rows, 2, "schedule(rows)")

    def check(self, args: Any) -> None:
        needs_folder(args, "schedule")

    def on_start(self, run: Run) -> None:
        schedule, total = run.schedule, run.schedule.total
        count = min(self.most, total)
        steps = [number * (total - 1) // max(count - 1, 1) for number in range(count)]
        names = [name for name in schedule.options if name != "weight_decay"]
        rows = [
            [step, schedule.rate(step), schedule.decay(step)]
            + [schedule.options[name].at(step, total) for name in names]
            for step in steps
        ]
        write_csv(["step", "lr", "weight_decay", *names], rows, run.folder / "schedule.csv")


def needs_folder(args: Any, name: str, flag: str = "") -> None:
    """Raise UserError if the run writes no files. flag: that asks for the hook, if not --hook."""
    if args.output_dir == "" or (args.output_dir is None and vars(args).get("eval")):
        raise UserError(f"{flag or f'--hook {name}'} writes into --output_dir; give a folder")


def at_least(value: Any, low: int, name: str) -> int:
    """Return an argument of a hook that is an integer >= `low`; otherwise raise UserError."""
    if type(value) is not int or value < low:
        raise UserError(f"--hook {name}: got {value!r}, expected an integer >={low}")
    return value
