# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure the seconds to list the images in tar files, and to start with them.

python benchmarks/listing.py --members 1000000 --output benchmarks/RESULTS.md

The files are written first, with members of --bytes bytes, and removed at the end: 10 million take
10 GB. The disk cache is warm if memory holds them.
"""

import argparse
import itertools
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.step import machine, others_busy
from data_loading.sources import DatasetSpec, open_images
from data_loading.tar import list_tar

CHUNK = 10_000  # members that are written at once
CLASS = 1300  # members in a folder
DIGITS = 8


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--bytes", type=int, default=300, help="of a member, without its header")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--tarfile", type=int, default=100_000, help="members for Python's tarfile")
    parser.add_argument("--folder", help="for the tar files; default: that of temporary files")
    parser.add_argument("--output", type=Path, help="markdown file to append the table to")
    return parser


def write_shard(path: str, first: int, count: int, size: int) -> None:
    """Write a tar file of `count` members, named by numbers from `first` on."""
    blocks = 1 + -(-size // tarfile.BLOCKSIZE)
    info = tarfile.TarInfo(f"n{'0' * DIGITS}/n{'0' * DIGITS}_{'0' * DIGITS}.JPEG")
    info.size = size
    member = np.zeros((1, blocks * tarfile.BLOCKSIZE), np.uint8)
    member[0, : tarfile.BLOCKSIZE] = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    member[0, tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + size] = 255
    with open(path, "wb") as file:
        for start in range(first, first + count, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, first + count))
            members = np.repeat(member, len(numbers), 0)
            for place, shown in ((1, numbers // CLASS), (11, numbers // CLASS), (20, numbers)):
                for digit in range(DIGITS):
                    tens = 10 ** (DIGITS - 1 - digit)
                    members[:, place + digit] = ord("0") + shown // tens % 10
            members[:, 148:156] = ord(" ")
            sums = members[:, : tarfile.BLOCKSIZE].sum(1, dtype=np.int64)
            for digit in range(6):
                members[:, 148 + digit] = ord("0") + sums // 8 ** (5 - digit) % 8
            members[:, 154] = 0
            file.write(members.tobytes())
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def write_shards(folder: str, members: int, shards: int, size: int) -> list[str]:
    """Write `members` to a number of tar files; returns their paths."""
    ends = [members * number // shards for number in range(shards + 1)]
    paths = []
    for number, (first, after) in enumerate(itertools.pairwise(ends)):
        paths.append(os.path.join(folder, f"shard-{number:04d}.tar"))
        write_shard(paths[-1], first, after - first, size)
        print(f"wrote {paths[-1]}", file=sys.stderr)
    return paths


def clocks() -> np.ndarray:
    """Return seconds: those that pass, those that this program computes, and all others."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = usage.ru_utime + usage.ru_stime
    times = [time.perf_counter(), time.process_time() + children, others_busy() - children]
    return np.array(times)


def time_listing(paths: list[str], members: int) -> tuple[np.ndarray, dict[str, int]]:
    """Return the three times of `clocks`, and the bytes held by what holds them."""
    before = clocks()
    found = list_tar(paths, False)
    seconds = clocks() - before
    if len(found.names) != members or found.left_out:
        sys.exit(f"benchmarks/listing.py: {len(found.names)} found, expected {members}")
    held = {
        "places": sum(place.nbytes for place in found.places.values()),
        "ends": found.names.ends.nbytes,
        "names": found.names.text.nbytes,
    }
    return seconds, held


def time_start(folder: str, index: str) -> tuple[float, float]:
    """Return the seconds to open the data set as a training script does, and the MiB that it takes.

    MiB: of memory that is not mapped from files.
    """
    before, start = anonymous_memory(), time.perf_counter()
    images = open_images("auto", DatasetSpec(folder, data_index=index), True)
    seconds, memory = time.perf_counter() - start, anonymous_memory() - before
    assert len(images) > 0
    return seconds, memory


def anonymous_memory() -> float:
    """Return the MiB of this process that no file holds."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def time_tarfile(path: str, members: int) -> tuple[float, int]:
    """Return seconds and number of members, at most `members`, that Python's tarfile lists."""
    start = time.perf_counter()
    with tarfile.open(path, "r:") as file:
        count = sum(1 for _ in itertools.islice(file, members))
    return time.perf_counter() - start, count


def table(args: argparse.Namespace, paths: list[str]) -> str:
    """Markdown: a row for the toolkit and one for tarfile."""
    rounds = []
    for number in range(args.rounds):
        seconds, held = time_listing(paths, args.members)
        print(f"round {number + 1}: {seconds[0]:.2f} s", file=sys.stderr)
        rounds.append(seconds)
    walls, cores, others = np.array(rounds).T
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    folder = str(Path(paths[0]).parent)
    with tempfile.TemporaryDirectory(prefix="index.", dir=args.folder) as index:
        first, _ = time_start(folder, index)
        later, memory = time_start(folder, index)
    seconds, count = time_tarfile(paths[0], args.tarfile)
    median = statistics.median(walls)
    places, ends, names = (held[name] / args.members for name in ("places", "ends", "names"))
    return "\n".join([
        "| | members | shards | seconds: median | min | max | members/s | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| `list_tar` | {args.members:,} | {args.shards} | **{median:.2f}** | {min(walls):.2f} | "
        f"{max(walls):.2f} | {args.members / median:,.0f} | {statistics.median(cores):.1f} |",
        f"| first start, `--data_index` | {args.members:,} | {args.shards} | {first:.2f} | | | | |",
        f"| later start | {args.members:,} | {args.shards} | {later:.2f} | | | | |",
        f"| Python's `tarfile` | {count:,} | 1 | {seconds:.2f} | | | {count / seconds:,.0f} | |",
        "",
        f"Other programs kept {sum(others) / sum(walls):.2f} cores busy, in the fastest round "
        f"{(others / walls)[walls.argmin()]:.2f}. Bytes held a member: {places:.0f} for its place, "
        f"{ends:.0f} for where its name begins, {names:.0f} for the name. Peak memory of the "
        f"process: {peak:.2f} GiB. After a later start the list takes {memory:.1f} MiB of a "
        "process's own memory; all else is mapped from the index.",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if min(args.members, args.shards, args.rounds, args.tarfile) < 1 or args.bytes < 0:
        parser.error("--members, --shards, --rounds and --tarfile must be at least 1")
    with tempfile.TemporaryDirectory(prefix="listing.", dir=args.folder) as folder:
        paths = write_shards(folder, args.members, args.shards, args.bytes)
        rows = table(args, paths)
    settings = (
        f"Members of {args.bytes} bytes, warm disk cache, {args.rounds} rounds, as many processes "
        "as cores."
    )
    lines = ["## Listing of tar files", "", settings, machine(torch.device("cpu")), "", rows]
    print(text := "\n".join(lines))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n\n")


if __name__ == "__main__":
    main()
