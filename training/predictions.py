# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Predictions for every image of an evaluation, as CSV.

python main_finetune.py --config runs/digits/args.yaml --eval --hook predictions
"""

from typing import Any

from torch import Tensor

from errors import UserError
from insight.predictions import columns, texts
from models.heads import implied_activation
from parallel.process_group import gather_rows, join_rows, pack_rows
from training.confusion import csv_name
from training.hooks import Hook, Run
from training.log_files import needs_folder
from utils import write_csv


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
            kept = columns(batch.targets, batch.outputs, run.kind, activation)
            self.parts.append(pack_rows([batch.ids, *kept]))

    def on_phase_end(self, run: Run) -> None:
        if run.phase != "test":
            return
        rows = gather_rows(join_rows(self.parts, run.device))
        self.parts = []
        if rows is None:
            return
        table = [
            [run.name_of(int(number)), *texts(row, run.kind, run.classes)]
            for number, *row in sorted(rows.tolist(), key=lambda row: row[0])
        ]
        name = csv_name("predictions", run.split)
        run.folder.mkdir(parents=True, exist_ok=True)  # of --eval
        write_csv(("path", "target", "prediction", "probability"), table, run.folder / name)
