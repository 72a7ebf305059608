# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What a data set of a billion images costs before the first of them is read.

python benchmarks/big_data.py --images 1300000000 --files 1000000 10000000
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

READ = 20_000  # paths out of an index


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_300_000_000, help="of an epoch")
    parser.add_argument("--rank", type=int, default=1023, help="whose epoch it is")
    parser.add_argument("--world_size", type=int, default=1024, help="processes that share it")
    parser.add_argument("--keys", type=int, default=1_000_000, help="of it that are timed")
    parser.add_argument("--files", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    return parser


def peak() -> int:
    """Most bytes that this process has had in memory so far, those of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def apart(work: Callable[..., dict], *about: Any) -> dict:
    """`work(*about)` in a process of its own, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, about)


def start_epoch(images: int, rank: int, world_size: int, keys: int, share: float = 0.0) -> dict:
    """Seconds to the first key of an epoch, keys/s, and bytes of memory for all of it.

    share: of the epoch that is behind, as after a resume.
    """
    from data_pipeline import TrainSampler

    list(itertools.islice(TrainSampler(1000, 0, 0, 1), 10))  # torch's own first calls
    before = peak()
    start = time.perf_counter()
    sampler = TrainSampler(images, 0, rank, world_size)
    sampler.set_epoch(1, int(images * share) // world_size * world_size)
    order = iter(sampler)
    next(order)
    first = time.perf_counter() - start
    start = time.perf_counter()
    count = sum(1 for _ in itertools.islice(order, keys))
    rate = count / (time.perf_counter() - start)
    return {"first": first, "keys_per_s": rate, "bytes": peak() - before}


def names(count: int) -> Iterator[tuple[str, Iterator[str]]]:
    """(class, paths) as ImageNet's are called, in 1000 classes, none of them kept."""
    each = -(-count // 1000)
    for label in range(1000):
        left = max(min(each, count - label * each), 0)
        yield f"n{label:08d}", (f"n{label:08d}/n{label:08d}_{i}.JPEG" for i in range(left))


def write(file: Path, count: int) -> dict:
    """Seconds, bytes of memory and of the file, of an index of made-up paths."""
    from file_index import write_index

    before, start = peak(), time.perf_counter()
    with open(file, "w+b") as opened:
        write_index(opened, "/data/train", names(count))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak() - before, "file": file.stat().st_size}


def read(file: Path) -> dict:
    """Seconds and bytes of memory to open an index; seconds a path, and bytes, for READ of them."""
    from file_index import open_index
    from randomness import shuffled, torch

    before, start = peak(), time.perf_counter()
    index = open_index(file, "/data/train")
    index[0]
    seconds, opened = time.perf_counter() - start, peak() - before
    some = shuffled(torch.arange(READ), len(index), 0).tolist()
    start = time.perf_counter()
    for number in some:
        index[number]
    path = (time.perf_counter() - start) / READ
    return {"seconds": seconds, "bytes": opened, "path": path, "read": peak() - before}


def mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def epoch_table(args: argparse.Namespace) -> Iterator[str]:
    yield f"### An epoch of {args.images} images, rank {args.rank} of {args.world_size}\n"
    yield "| begun | first key, ms | keys/s | memory, MiB |"
    yield "|---|---|---|---|"
    for share in (0.0, 0.5):
        shape = args.images, args.rank, args.world_size, args.keys
        found = apart(start_epoch, *shape, share)
        row = f"| {'in its middle' if share else 'at its start'} | {1000 * found['first']:.2f} "
        yield row + f"| {found['keys_per_s']:.3g} | {mib(found['bytes'])} |"


def index_table(args: argparse.Namespace) -> Iterator[str]:
    yield "\n### An index of made-up paths\n"
    yield "| images | file, MiB | write, s | memory, MiB | open, ms | memory, MiB | a path, us |"
    yield "|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        for count in args.files:
            file = Path(folder) / "train.index"
            written, found = apart(write, file, count), apart(read, file)
            row = f"| {count} | {mib(written['file'])} | {written['seconds']:.1f} "
            row += f"| {mib(written['bytes'])} | {1000 * found['seconds']:.2f} "
            yield row + f"| {mib(found['bytes'])} | {1e6 * found['path']:.1f} |"


def main(args: argparse.Namespace) -> None:
    """Print both tables."""
    lines = []
    for line in itertools.chain(epoch_table(args), index_table(args)):
        print(line, flush=True)
        lines.append(line)
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write("\n".join(["", *lines, ""]))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
