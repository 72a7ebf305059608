# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Compare worker processes with threads that decode, crop and resize the same bits.

python benchmarks/loader_threads.py --photos photos.zip --output benchmarks/RESULTS.md
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="zip of JPEG files")
    parser.add_argument("--workers", type=int, default=2, help="processes, or threads")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11, help="each goes through every row once")
    parser.add_argument("--images", type=int, default=960, help="in a timing, at least")
    parser.add_argument("--output", type=Path, help="markdown file to append the table to")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch
from torch import Tensor

from benchmarks.loader import from_folder, write_files
from benchmarks.step import machine
from config import parser as options
from data_loading.dataset import TransformedDataset, collate
from data_loading.decode import MAX_PIXELS, WithBox
from data_loading.jpeg import decode_jpeg, read_header
from data_loading.rng import seed_cpu
from data_loading.samplers import TrainSampler
from data_loading.workers import WatchedLoader
from datasets import build_pretrain_dataset
from errors import plural

PREFETCH = 2  # batches a worker, as DataLoader's
LOCK = threading.Lock()  # around the draws: Python, NumPy and torch have one state a process


class Reader:
    """Reads one sample: the draws of pre-training under the lock, all else without it."""

    def __init__(self, data: TransformedDataset) -> None:
        self.data = data
        self.crop, self.flip = data.transform.transforms
        self.paths = [path for path, _ in data.dataset.samples]

    def __call__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        with open(self.paths[key[1]], "rb") as file:
            content = file.read()
        header = read_header(content, MAX_PIXELS)
        with LOCK:
            seed_cpu(self.data.seed, *key)
            box = self.crop.draw_box(header.height, header.width)
            flips = self.flip(torch.arange(2).view(1, 1, 2))[0, 0, 0].item() == 1
        image = decode_jpeg(content, header)
        image = image.expand(3, -1, -1).as_subclass(WithBox)  # RGB, of a gray one too
        image.box = box
        image = self.crop(image)
        return (image.flip(2) if flips else image), 0, key[1]


def with_threads(
    read: Reader, sampler: TrainSampler, args: argparse.Namespace
) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches that threads read, some of them in advance."""
    keys, waiting = iter(sampler), []
    with ThreadPoolExecutor(args.workers) as pool:

        def start() -> list[Future]:
            return [pool.submit(read, key) for key in islice(keys, args.batch_size)]

        waiting = [start() for _ in range(args.workers * PREFETCH)]
        while len(waiting[0]) == args.batch_size:
            yield collate([future.result() for future in waiting.pop(0)])
            waiting.append(start())


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Milliseconds an image of each row in each round; checks that all give the same bits."""
    files = write_files(args.photos, "photos", folder / "photos", args.images)
    words = f"--num_workers 0 --device cpu --input_size {args.input_size} --scale 0.2 1"
    flags = options.parse(options.pretrain_parser(), [*from_folder(files), *words.split()])
    data = build_pretrain_dataset(flags)
    sampler = TrainSampler(len(data), flags.seed, 0, 1)
    loaders = {
        plural(count, "worker process") if count else "no workers": WatchedLoader(
            data, sampler, args.batch_size, count, drop_last=True
        )
        for count in (0, args.workers)
    }
    rows = {name: (lambda loader=loader: loader) for name, loader in loaders.items()}
    rows[plural(args.workers, "thread")] = lambda: with_threads(Reader(data), sampler, args)
    found: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(1 + args.rounds):
        sampler.set_epoch(number)
        sums = set()
        turn = number % len(rows)
        for name in [*rows][turn:] + [*rows][:turn]:
            images, total, start = 0, 0, time.perf_counter()
            for batch in rows[name]():
                images += len(batch[0])
                total += int(batch[0][0].long().sum()) * (images + 7)  # of images in their places
            if number:
                found[name].append(1000 * (time.perf_counter() - start) / images)
            sums.add(total)
        assert len(sums) == 1, "the rows read other images"
        print(f"round {number} of {args.rounds}", file=sys.stderr)
    return found


def report(args: argparse.Namespace, found: dict[str, list[float]]) -> str:
    """Markdown: a row for each way to read."""
    usual = statistics.median(found[plural(args.workers, "worker process")])
    lines = ["| | ms an image: median | min | max | speed to processes |", f"|---|{'---|' * 4}"]
    for name, times in found.items():
        median = statistics.median(times)
        cells = f"**{median:.3f}** | {min(times):.3f} | {max(times):.3f} | {usual / median:.2f}"
        lines.append(f"| {name} | {cells} |")
    settings = (
        f"Pre-training images of {args.input_size} px in uint8 batches of {args.batch_size}, the "
        f"same bits in all rows; {args.rounds} interleaved rounds after one of warm-up, files in "
        "the page cache."
    )
    head = ["### Worker processes and threads", "", settings, machine(torch.device("cpu")), ""]
    return "\n".join([*head, *lines])


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(text := report(args, found))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    main()
