# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure where the time of an image goes: reading, decoding, each augmentation, the batch.

python benchmarks/loader_parts.py --photos photos.zip --output benchmarks/RESULTS.md
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TASKS = ("pretrain", "finetune")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="zip of JPEG files")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11, help="each takes every image once")
    parser.add_argument("--output", type=Path, help="markdown file to append the table to")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch

from benchmarks.loader import TEXTS, from_folder, ours, write_files
from benchmarks.step import machine
from data_loading.dataset import collate
from data_loading.decode import load_image
from data_loading.loader import DeviceLoader
from data_loading.rng import seed_cpu


def name_of(step: Any) -> str:
    """Return the name of a step of a transform."""
    return getattr(step, "__name__", type(step).__name__).strip("_")


class Clock:
    """Adds up the seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable, *args: Any) -> Any:
        start = time.process_time()
        result = function(*args)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start
        return result


def read_once(loader: DeviceLoader, epoch: int, batch: int) -> dict[str, float]:
    """Return the seconds of each part for all images, in the order of the parts."""
    data, clock, samples = loader.loader.dataset, Clock(), []
    for index, (path, _) in enumerate(data.dataset.samples):
        content = clock("read the file", Path(path).read_bytes)
        image = clock("decode", load_image, content).expand(3, -1, -1)  # RGB, of a gray one too
        clock("seed", seed_cpu, data.seed, epoch, index)
        for step in data.transform.transforms:
            image = clock(name_of(step), step, image)
        samples.append((image, 0, index))
        if len(samples) == batch:
            stacked = clock("stack the batch", collate, samples)
            clock("normalize the batch, write what is erased", loader._copy, stacked)
            samples = []
    return clock.seconds


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        files = write_files(args.photos, "photos", Path(scratch, "photos"), args.batch_size)
        for task in TASKS:
            loader = ours(from_folder(files), task, args.input_size, args.batch_size)(0)
            count = len(loader.loader.dataset)
            rounds = [read_once(loader, number, args.batch_size) for number in range(args.rounds)]
            parts = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            total = sum(parts.values())
            lines += [f"| {task}: {TEXTS[task]} | ms an image | share |", "|---|---|---|"]
            for name, seconds in parts.items():
                lines.append(f"| {name} | {1000 * seconds / count:.3f} | {seconds / total:.1%} |")
            lines += [f"| together | **{1000 * total / count:.3f}** | 100% |", ""]
    head = "### Parts of the time of an image"
    settings = f"CPU times of one process, medians of {args.rounds} rounds, {args.input_size} px."
    text = "\n".join([head, "", settings, machine(torch.device("cpu")), "", *lines])
    print(text)
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")


if __name__ == "__main__":
    main()
