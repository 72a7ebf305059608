# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Predictions for every image of an evaluation, as CSV.

python main_finetune.py --config runs/digits/args.yaml --eval --hook predictions
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from models.heads import implied_activation
from parallel.process_group import all_gather, gather_rows
from training.confusion import csv_name
from training.hooks import Hook, Run
from training.log_files import needs_folder, write_csv
from training.meters import unusable

LIKELY = 0.5  # probability from which one of several classes counts as predicted


class PredictionsHook(Hook):
    """Write predictions.csv after each evaluation: path, target, prediction and its probability.

    Rows are in the order of the data set, whatever the number of processes. `csv_name` gives the
    names of the files. Probabilities are softmax, or sigmoid if --loss uses that. Several classes,
    or numbers, of an image are joined by `|`.
    """

    every_rank = True

    def check(self, args: Any) -> None:
        flags = vars(args)
        if "disable_eval" not in flags or flags["disable_eval"]:
            why = "--disable_eval true" if "disable_eval" in flags else "pre-training"
            raise UserError(f"--hook predictions: {why} has no evaluation; drop it")
        needs_folder(args, "predictions")

    def on_phase_start(self, run: Run) -> None:
        self.parts: list[Tensor] = []

    def on_step(self, run: Run) -> None:
        if run.phase == "test":
            batch = run.last_batch
            loss = run.args.loss or "ce"
            columns = _columns(batch.targets, batch.outputs, run.kind, loss)
            kept = (batch.ids, *columns)
            kept = [part.view(len(batch.ids), -1) for part in kept]
            kept = [part.cpu() if part.device.type == "mps" else part for part in kept]
            self.parts.append(torch.cat([part.double() for part in kept], 1))

    def on_phase_end(self, run: Run) -> None:
        if run.phase != "test":
            return
        width = max((part.shape[1] for part in self.parts), default=0)
        width = max(all_gather(width))
        empty = torch.empty(0, width, dtype=torch.float64, device=run.device)
        rows = gather_rows(torch.cat([*self.parts, empty]))
        self.parts = []
        if rows is None:
            return
        rows = rows.cpu()
        rows = rows[rows[:, 0].argsort()]
        table = [[run.name_of(int(row[0])), *_words(row[1:], run)] for row in rows.tolist()]
        name = csv_name("predictions", run.split)
        run.folder.mkdir(parents=True, exist_ok=True)  # of --eval
        write_csv(("path", "target", "prediction", "probability"), table, run.folder / name)


def _columns(targets: Tensor, outputs: Tensor, kind: str, loss: str) -> tuple[Tensor, ...]:
    """Return the numbers that are kept of a batch: of one class each 2, otherwise all outputs."""
    if kind != "class":
        return targets, outputs
    is_sigmoid, outputs = implied_activation(loss) == "sigmoid", outputs.float()
    prediction = outputs.argmax(1)
    chances = outputs.sigmoid() if is_sigmoid else outputs.softmax(1)
    probability = chances.gather(1, prediction[:, None])
    return targets, torch.where(unusable(outputs), -1, prediction), probability


def _words(row: Sequence[float], run: Run) -> list[Any]:
    """Return target, prediction and probability of a row of `_columns`."""
    if run.kind == "class":
        target, prediction, probability = row
        if prediction < 0:  # NaN or Inf outputs
            return [_name(target, run), "", ""]
        return [_name(target, run), _name(prediction, run), f"{probability:.6g}"]
    targets, outputs = row[: len(row) // 2], row[len(row) // 2 :]
    if run.kind == "number":
        return ["|".join(f"{x:.6g}" for x in part) for part in (targets, outputs)] + [""]
    chances = torch.tensor(outputs).sigmoid().tolist()
    likely = [k for k, chance in enumerate(chances) if chance >= LIKELY]
    return [
        "|".join(_name(k, run) for k, x in enumerate(targets) if x > 0),
        "|".join(_name(k, run) for k in likely),
        "|".join(f"{chances[k]:.6g}" for k in likely),
    ]


def _name(label: float, run: Run) -> str:
    return run.classes[int(label)] if run.classes else str(int(label))
