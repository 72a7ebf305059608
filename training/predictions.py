# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Predictions for every image of an evaluation, as CSV.

python main_finetune.py --config runs/digits/args.yaml --eval --hook predictions
"""

from typing import Any

import torch
from torch import Tensor

from errors import UserError
from insight.predictions import columns, words
from models.heads import implied_activation
from parallel.process_group import all_gather, gather_rows
from training.confusion import csv_name
from training.hooks import Hook, Run
from training.log_files import needs_folder, write_csv


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
            activation = implied_activation(run.args.loss or "ce")
            kept = (batch.ids, *columns(batch.targets, batch.outputs, run.kind, activation))
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
        table = [
            [run.name_of(int(row[0])), *words(row[1:], run.kind, run.classes)]
            for row in rows.tolist()
        ]
        name = csv_name("predictions", run.split)
        run.folder.mkdir(parents=True, exist_ok=True)  # of --eval
        write_csv(("path", "target", "prediction", "probability"), table, run.folder / name)
