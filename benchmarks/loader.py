# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure how fast one core loads augmented images: ours, ImageFolder, timm, decoding alone.

python benchmarks/loader.py --photos photos.zip --output benchmarks/RESULTS.md
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETS = {"photos": "as they are", "large": "enlarged to 2,000 pixels", "small": "of 32 x 32 pixels"}
TASKS = ("pretrain", "finetune")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="zip of JPEG files")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS], help="sizes of photos")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--input_size", type=int, default=224, help="of the larger images")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11, help="each goes through every row once")
    parser.add_argument("--images", type=int, default=300, help="photos in a timing, at least")
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import datasets
from benchmarks.step import machine
from config import parser as options
from data_loading.augment import fix_posterize
from data_loading.decode import load_image
from data_loading.transforms import mean_and_std

AUGMENTATION = "rand-m9-mstd0.5-inc1"
SCALES = {"pretrain": (0.2, 1.0), "finetune": (0.08, 1.0)}
TEXTS = {
    "pretrain": "random resized crop (bicubic), flip",
    "finetune": f"random resized crop (bicubic), flip, {AUGMENTATION}, erasing 0.25",
}
LARGE, SMALL = 2000, 32  # pixels of the longer side, and of both sides


def from_folder(files: Path) -> list[str]:
    """Return flags that read the class folders of JPEG files."""
    return ["--data_set", "image_folder", "--data_path", str(files)]


def from_pack(files: Path) -> list[str]:
    """Return flags that read a pack of the files, which is made once."""
    pack = files.with_name(f"{files.name}-packed")
    words = [sys.executable, ROOT / "pack.py", files, pack, "--num_workers", "1"]
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)
    return ["--data_path", str(pack)]


def from_memory(files: Path) -> list[str]:
    """Return flags that hold the files in shared memory."""
    return [*from_folder(files), "--ram_cache"]


# Our flags for some files.
SOURCES: dict[str, Callable[[Path], list[str]]] = {
    "folder": from_folder,
    "pack": from_pack,
    "--ram_cache": from_memory,
}


@dataclass
class Row:
    """One way to read images; `read(epoch)` reads them once, from memory, as a batch iterator."""

    name: str
    read: Callable[[int], Iterable]
    batched: bool = True
    seconds: list[float] = field(default_factory=list)  # an image, in each round


def write_files(archive: Path, size: str, folder: Path, at_least: int) -> Path:
    """Write the photos, enlarged or shrunk, into a class folder, with copies to have enough."""
    with zipfile.ZipFile(archive) as photos:
        names = sorted(n for n in photos.namelist() if n.lower().endswith((".jpg", ".jpeg")))
        files = [change_size(photos.read(name), size) for name in names]
    if not files:
        sys.exit(f"--photos {archive}: it holds no JPEG files")
    (folder / "class").mkdir(parents=True)
    for number in range(max(at_least, len(files))):
        content = files[number % len(files)]
        (folder / "class" / f"{number:05d}.jpg").write_bytes(content)
    return folder


def change_size(data: bytes, size: str) -> bytes:
    """Return a JPEG file with the same photo in the size of a set."""
    if size == "photos":
        return data
    image, file = Image.open(io.BytesIO(data)), io.BytesIO()
    ratio = LARGE / max(image.size)
    sides = tuple(round(ratio * side) for side in image.size)
    image.resize((SMALL, SMALL) if size == "small" else sides).save(file, "JPEG", quality=90)
    return file.getvalue()


def ours(flags: list[str], task: str, size: int, batch: int) -> Callable[[int], Iterable]:
    """Return the loader that the training scripts build from flags."""
    parser = options.pretrain_parser() if task == "pretrain" else options.finetune_parser()
    words = f"--batch_size {batch} --num_workers 0 --device cpu --input_size {size}"
    words += f" --scale {SCALES[task][0]} {SCALES[task][1]}"
    if task == "finetune":
        words += f" --aa {AUGMENTATION} --reprob 0.25 --disable_eval true"
    elif size <= SMALL:
        words += " --stem_stride 1"
    args = options.parse(parser, [*flags, *words.split()])
    build = datasets.build_pretrain_dataset
    data = build(args) if task == "pretrain" else datasets.build_dataset(True, args)[0]
    loader = datasets.build_loader(data, True, args, "cpu")

    def read(epoch: int) -> Iterable:
        loader.set_epoch(epoch)
        return loader

    return read


def image_folder(files: Path, task: str, size: int, batch: int) -> Callable[[int], Iterable]:
    """Return what the official code does: PIL, torchvision's transforms; timm's to fine-tune."""
    mean, std = mean_and_std()
    transform = T.Compose(
        [
            T.RandomResizedCrop(size, SCALES[task], interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )
    if task == "finetune":
        transform = create_transform(
            size, is_training=True, color_jitter=None, auto_augment=AUGMENTATION, mean=mean,
            std=std, interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1,
        )  # fmt: skip
    repair(transform)
    data = ImageFolder(str(files), transform)
    loader = DataLoader(data, batch, shuffle=True, num_workers=0, drop_last=True)
    return lambda epoch: loader


def timms(files: Path, task: str, size: int, batch: int) -> Callable[[int], Iterable]:
    """Return timm's loader, which normalizes and erases whole batches."""
    mean, std = mean_and_std()
    erasing = {"re_prob": 0.25, "re_mode": "pixel", "auto_augment": AUGMENTATION}
    loader = create_loader(
        create_dataset("", root=str(files)), (3, size, size), batch, is_training=True,
        num_workers=0, persistent_workers=False, color_jitter=None, interpolation="bicubic",
        scale=SCALES[task], mean=mean, std=std, device=torch.device("cpu"),
        **(erasing if task == "finetune" else {}),
    )  # fmt: skip
    repair(loader.dataset.transform)
    return lambda epoch: loader


def repair(transform: T.Compose) -> None:
    """Let timm's augmentation run with Pillow 13, as ours does."""
    for step in transform.transforms:
        fix_posterize(step)


def make_rows(files: Path, task: str, size: int, batch: int) -> list[Row]:
    """Make every way to read the files of a set."""
    paths = sorted(str(path) for path in files.rglob("*.jpg"))
    rows = [Row("read and decode only", lambda epoch: map(load_image, paths), batched=False)]
    for name, flags in SOURCES.items():
        rows.append(Row(f"ours, {name}", ours(flags(files), task, size, batch)))
    whole = rows[1].read
    rows.append(Row("ours, folder, as sent to a GPU", lambda epoch: whole(epoch).loader))
    if files.name == "large":
        flags = [*from_folder(files), "--decode", "fast"]
        rows.append(Row("ours, folder, --decode fast", ours(flags, task, size, batch)))
    what = "timm's" if task == "finetune" else "torchvision's"
    rows.append(Row(f"ImageFolder, PIL, {what} transforms", image_folder(files, task, size, batch)))
    rows.append(Row("timm's loader", timms(files, task, size, batch)))
    return rows


def check(batch: torch.Tensor, size: int, count: int) -> None:
    """Assert that a row gives what the others give."""
    assert batch.shape == (count, 3, size, size), batch.shape
    if batch.dtype == torch.uint8:  # a GPU normalizes it
        return
    assert batch.dtype == torch.float32
    assert batch.mean().abs() < 1.5
    assert 0.3 < batch.std() < 3


def measure(rows: list[Row], size: int, batch: int, rounds: int) -> float:
    """Time each row once a round; returns the clock's time relative to the CPU's.

    The first round warms up.
    """
    busy = wall = 0.0
    for number in range(1 + rounds):
        turn = number % len(rows)
        for row in rows[turn:] + rows[:turn]:
            images, start, begin = 0, time.process_time(), time.perf_counter()
            for item in row.read(number):
                images += len(item[0]) if row.batched else 1
            seconds, passed = time.process_time() - start, time.perf_counter() - begin
            if number:
                row.seconds.append(seconds / images)
                busy, wall = busy + seconds, wall + passed
            elif row.batched:
                check(item[0], size, batch)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return wall / busy


def report(title: str, rows: list[Row]) -> list[str]:
    """Return a Markdown table: each row, and how much faster ours is."""
    medians = {row.name: statistics.median(row.seconds) for row in rows}
    decode, *others = rows
    peers = [row for row in others if not row.name.startswith("ours")]
    head = ["ms an image: median", "min", "max", "images/s", "to decode only"]
    head += [f"to {row.name}" for row in peers]
    lines = [f"| {title} | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for row in rows:
        times = medians[row.name], min(row.seconds), max(row.seconds)
        cells = [f"{1000 * t:.3f}" for t in times]
        cells[0] = f"**{cells[0]}**"
        cells.append(f"{1 / medians[row.name]:.0f}")
        cells.append(f"{medians[decode.name] / medians[row.name]:.0%}")
        for peer in peers:
            ratio = f"{medians[peer.name] / medians[row.name]:.2f}"
            cells.append(ratio if row in others else "")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    lines, clock = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.sets:
            at_least = {"photos": args.images, "large": args.images // 5, "small": 8 * args.images}
            at_least = -(-at_least[name] // args.batch_size) * args.batch_size
            files = write_files(args.photos, name, Path(scratch, name), at_least)
            size = SMALL if name == "small" else args.input_size
            for task in args.tasks:
                rows = make_rows(files, task, size, args.batch_size)
                clock.append(measure(rows, size, args.batch_size, args.rounds))
                lines += ["", f"Photos {SETS[name]}, {size} px, {task}: {TEXTS[task]}.", ""]
                lines += report(f"{name}, {task}", rows)
    settings = (
        "One process on one core. Times are CPU times; the clock showed at most "
        f"{max(clock):.2f} of them. Batches of {args.batch_size} normalized float32 images on the "
        f"CPU, {args.rounds} interleaved rounds after one of warm-up, files in the page cache. "
        "Decode only makes no batches. As sent to a GPU they are uint8: the GPU normalizes them."
    )
    head = ["### Loading images on one core", "", settings, machine(torch.device("cpu"))]
    text = "\n".join([*head, *lines])
    print(text)
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    main()
