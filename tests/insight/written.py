# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Folders of runs, written without a run, for tests of what reads them.

python -m tests.insight.written /tmp/runs    (two pre-training runs and a fine-tuning run)
"""

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

CLASSES = ("cat", "dog", "horse", "owl")
RECORD = {
    "version": 1, "script": "main_pretrain", "status": "finished", "error": None,
    "start": "2026-11-30T12:00:00+00:00", "end": "2026-11-30T12:21:40+00:00", "seconds": 1300.0,
    "typed": ["model", "data_path", "epochs"], "recipe": None, "seed": 0, "mask_ratio": 0.6122,
    "git": {"commit": "1fc3ee7a0b", "branch": "main", "changed_files": 2, "diff_lines": 31,
            "diff_bytes": 1536},
    "packages": {"torch": "2.14.1", "numpy": "2.4.0"}, "python": "3.11.9",
    "platform": "Linux-6.1-x86_64", "host": "node7",
    "device": {"type": "cuda", "name": "NVIDIA H200", "count": 8, "processes": 8, "cpu_cores": 64},
    "data": {"train": {"source": "/data/animals", "images": 20000, "classes": 4,
                       "fingerprint": "9f3a11c2"}, "val": None},
    "parameters": 3590336, "resumed_from": None, "finetuned_from": None, "epochs_done": 12,
    "steps_done": 5400, "final": {"train_loss": 0.41}, "best": {},
}  # fmt: skip
FLAGS = {"model": "convnextv2_atto", "data_path": "animals", "data_set": "auto", "epochs": 12,
         "lr": 1e-3, "batch_size": 64, "mask_ratio": 0.6, "output_dir": "runs/pre"}  # fmt: skip
SHARES = {"time_data": 0.31, "time_forward": 0.24, "time_backward": 0.35, "time_optimizer": 0.06}


def pretrain_rows(epochs: int = 12, speed: float = 1.0) -> list[dict[str, Any]]:
    """Lines of log.txt of a pre-training run; a higher speed makes its loss fall faster."""
    rows = []
    for epoch in range(epochs):
        done = 1 - math.exp(-speed * (epoch + 1) / 4)
        rows.append({
            "train_loss": 1.0 - 0.6 * done, "train_grad_norm": 2 - done, "epoch": epoch,
            "train_lr": 1e-3 * (1 + math.cos(math.pi * epoch / epochs)) / 2,
            "n_parameters": 3590336, "holdout_loss": 1.02 - 0.55 * done,
            "probe_knn": 30 + 50 * done, "probe_linear": 35 + 52 * done,
            "probe_knn_1pct": 20 + 30 * done, "probe_linear_10pct": 24 + 40 * done,
            "rank_me": 40 + 100 * done, "feature_distance": 0.5 * done,
            "feature_distance_stage1": 0.4 * done, "feature_distance_stage2": 0.6 * done,
            "feature_distance_blocks": [0.5 * done, 0.3 * done, 0.6 * done, 0.6 * done],
            "grn_gamma_stage1": done, "grn_beta_stage1": 0.5 * done,
            "dead_channels": 2 * (1 - done), "mfu": 0.31, **SHARES,
            "images_per_s": 900 + 60 * math.sin(epoch),
        })  # fmt: skip
    return rows


def finetune_rows(epochs: int = 12) -> list[dict[str, Any]]:
    """Lines of log.txt of a fine-tuning run whose test loss rises from epoch 5."""
    return [
        {
            "train_loss": 1.6 / (epoch + 1),
            "train_class_acc": 100 - 40 / (epoch + 1),
            "train_lr": 1e-3,
            "epoch": epoch,
            "test_loss": 0.5 + 0.05 * abs(epoch - 4),
            "test_loss_ema": 0.5,
            "test_acc1": 90 - abs(epoch - 6),
            "test_acc5": 99.0,
            "test_acc1_ema": 88 - abs(epoch - 8),
            "images_per_s": 400.0,
        }  # fmt: skip
        for epoch in range(epochs)
    ]


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]] = (),
    record: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] = FLAGS,
    classes: Sequence[str] = (),
    pictures: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write log.txt, args.yaml, and what else is given: run.json, CSV files, pictures by epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "log.txt").write_text("".join(lines))
    (folder / "args.yaml").write_text(yaml.safe_dump(dict(flags), sort_keys=False))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    if classes:
        write_evaluation(folder, classes)
    for name, epochs in (pictures or {}).items():
        for epoch in epochs:
            write_picture(folder / name / f"epoch-{epoch}.png", f"{name} {epoch + 1}")
    return folder


def write_evaluation(folder: Path, classes: Sequence[str]) -> None:
    """Write confusion.csv and predictions.csv: of 10 images a class, most are right."""
    count = len(classes)
    with (folder / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["true class", *classes])
        for true, name in enumerate(classes):
            row = [0] * count
            row[true] += 10 - min(true, 5)
            row[(true + 1) % count] += min(true, 5)
            table.writerow([name, *row])
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "target", "prediction", "probability"])
        for number in range(10 * count):
            true = number % count
            answer, chance = (
                (true + 1) % count if number % 7 == 3 else true,
                0.5 + number % 50 / 100,
            )
            table.writerow([f"{number}.jpg", classes[true], classes[answer], chance])


def write_picture(path: Path, text: str, size: tuple[int, int] = (660, 320)) -> None:
    """Write a picture with some text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((20, 20), text, fill="black")
    image.save(path)


def write_examples(folder: Path) -> list[Path]:
    """Write three runs, one of them with alarms."""
    drawn = {"reconstructions": [3, 7, 11]}
    record = RECORD | {"arguments": FLAGS}
    first = write_run(folder / "pre", pretrain_rows(), record, pictures=drawn)
    rows = pretrain_rows(speed=0.4)
    for row in rows[8:]:
        row["alarms"] = ["Features collapse: RankMe fell to 3 of 320. Try a lower --lr."]
    rows[-1]["advice"] = ["the loader is the limit: steps wait for data in 31% of the time"]
    flags = FLAGS | {"lr": 2e-3, "mask_ratio": 0.75, "output_dir": "runs/high"}
    record = RECORD | {"arguments": flags, "mask_ratio": 0.75}
    second = write_run(folder / "high", rows, record, flags, pictures=drawn)
    flags = {name: value for name, value in FLAGS.items() if name != "mask_ratio"}
    record = RECORD | {"script": "main_finetune", "finetuned_from": "runs/pre"}
    record |= {"mask_ratio": None}
    third = write_run(folder / "fine", finetune_rows(), record, flags, CLASSES,
                      {"worst_images": [11]})  # fmt: skip
    return [first, second, third]


if __name__ == "__main__":
    print("\n".join(map(str, write_examples(Path(sys.argv[1])))))
