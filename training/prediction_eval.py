# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Evaluation of predictions with labels: metrics, classes, calibration and the worst images.

python predict.py runs/finetune labeled --output results.csv
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from data_loading.loader import DeviceLoader
from errors import UserError, plural
from insight.predictions import columns
from insight.result_files import side_file
from parallel.process_group import get_logger, is_main_process
from training import calibration, confusion
from training.evaluation import Metrics
from training.metrics import MOST_CLASSES, default_metrics
from training.report import describe_evaluation, plain
from training.trained_model import TrainedModel
from training.worst_images import Worst, draw_rows
from utils import write_atomically, write_csv

PER_CLASS = "f1(average=per_class)"


class Evaluation:
    """Adds up the metrics of batches on rank 0, in their order, and reports them at the end.

    Batches are the same for any number of processes, so the sums are too, bit for bit. `state` and
    `restore` let another process continue. Metrics of the order of scores, as `map`, need all
    outputs, which `new_rows` gives part by part.
    """

    def __init__(self, trained: TrainedModel, device: torch.device, worst: int) -> None:
        self.kind, self.names, count = trained.kind, trained.names, trained.head.count
        extra = {"class": ["ece", PER_CLASS], "multi": [PER_CLASS], "number": []}[self.kind]
        extra += ["confusion"] * (self.kind == "class" and count <= MOST_CLASSES)
        words = [*default_metrics(self.kind), *extra]
        self.metrics = Metrics(words, None, count, self.kind, trained.head.scale)
        if self.kind != "number":
            self.metrics.metrics["reliability"] = calibration.reliability(self.kind)
        self.terms, self.device = len(trained.criterion.terms), device
        self.metrics.reset(device, self.terms)
        self.activation = self.metrics.activation = trained.activation
        self.worst, self.count = Worst(worst, "cpu"), count
        self.saved = 0  # entries of `metrics.rows` that `new_rows` has given

    def widths(self) -> tuple[int, ...]:
        """Return the columns of targets, losses and counts in the rows of an image."""
        return (1 if self.kind == "class" else self.count, self.terms, self.terms)

    def add(self, ids: Tensor, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
        """Add a batch: ids (N,), outputs (N, K), targets (N, ...), losses and counts (N, 2 T).

        All are float64 on the CPU, as the network gave and took them.
        """
        outputs, targets = outputs.to(self.device), targets.to(self.device)
        outputs = outputs.float()  # as the network gave them
        targets = targets[:, 0].long() if self.kind == "class" else targets.float()
        values, counts = losses.to(self.device).split(self.terms, 1)
        outputs, targets = self.metrics.in_units(outputs, targets)
        self.metrics.update(outputs, targets, values.float(), counts.float())
        parts = columns(targets, outputs, self.kind, self.activation)
        parts = [part.cpu() for part in parts]
        if self.worst.count:
            self.worst.add(ids, values.sum(1).cpu(), parts)

    # --- to continue in another process -----------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the sums so far as plain tensors."""
        state = {"sums": self.metrics.sums.cpu()}
        return state | ({} if self.worst.rows is None else {"worst": self.worst.rows.cpu()})

    def new_rows(self) -> Tensor | None:
        """Return the outputs and targets since the last call, if a metric needs them all."""
        new, self.saved = self.metrics.rows[self.saved :], len(self.metrics.rows)
        return torch.cat(new).cpu() if new else None

    def restore(self, state: Mapping[str, Any], rows: list[Tensor]) -> None:
        """Continue from `state()`; rows: of `new_rows` of each part."""
        self.metrics.sums.copy_(state["sums"].to(self.device))
        self.metrics.rows = [part.to(self.device) for part in rows]
        self.saved = len(rows)
        self.worst.rows = state.get("worst")

    # --- report -----------------------------------------------------------------------------------

    def report(self, out: Path | None, loader: DeviceLoader, about: str) -> None:
        """Log the results, and write them next to `out`. Every rank must call it.

        loader: of the images, to draw the worst. about: describes the images.
        """
        images, broken = self.metrics.reduce()
        if not images:
            raise UserError(f"{about}: no image could be read, so there is nothing to evaluate")
        stats = plain(self.metrics.values())
        if not is_main_process():
            return
        rows, log = stats.pop("reliability", None), get_logger()
        text = describe_evaluation(stats, top5=self.count > 5)
        log.info("%s: %s on %s", about, text, plural(images, "image"))
        if broken:
            log.warning("NaN or Inf outputs for %s, counted as wrong", plural(broken, "image"))
        lines = confusion.describe(stats, self.names)
        lines += calibration.describe(rows, self.kind) if rows else []
        for line in lines:
            log.info("%s", line)
        if out is not None:
            try:
                self._write(out, stats, rows, loader)
            except OSError as error:
                raise UserError(f"cannot write next to --output {out} ({error})") from error

    def _write(self, out: Path, stats: Mapping[str, Any], rows: Any, loader: DeviceLoader) -> None:
        """Write the metrics, tables and pictures: `results-metrics.json` and so on."""
        place = partial(side_file, out)
        values = {name: x for name, x in stats.items() if not isinstance(x, list)}
        written = ["metrics.json"]
        text = json.dumps({n: x if x == x else None for n, x in values.items()}, indent=1)
        write_atomically(text + "\n", place("metrics.json"))
        lists = {n: x for n, x in stats.items() if isinstance(x, list) and n != "confusion"}
        if matrix := stats.get("confusion"):
            confusion.write_confusion(matrix, self.names, place("confusion.csv"))
            rates = [*map(confusion.rate, matrix, range(len(matrix)))]
            lists = {"accuracy": rates} | lists | {"images": [*map(sum, matrix)]}
            written.append("confusion.csv")
        if lists:
            names = confusion.name_classes(self.count, self.names)
            table = zip(names, *lists.values(), strict=True)
            write_csv(
                ["class", *map(confusion.head_of, lists)], without_none(table), place("classes.csv")
            )
            written.append("classes.csv")
        if rows:
            write_csv(calibration.HEADS[self.kind], without_none(rows), place("calibration.csv"))
            title = f"ECE {stats['ece']:.2f}%" if self.kind == "class" else ""
            picture = calibration.draw(rows, self.kind, title)
            write_atomically(partial(picture.save, format="PNG"), place("calibration.png"))
            written += ["calibration.csv", "calibration.png"]
        if self.worst.rows is not None and len(self.worst.rows):
            grid = draw_rows(self.worst.rows, loader, self.kind, self.names)
            write_atomically(partial(save_image, grid, format="png"), place("worst.png"))
            written.append("worst.png")
        get_logger().info("%s: also %s", out, ", ".join(f"{out.stem}-{name}" for name in written))


def without_none(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Return rows with an empty text for each value that is not defined."""
    return [["" if value is None else value for value in row] for row in rows]
