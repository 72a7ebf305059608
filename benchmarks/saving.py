# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure how much saving a checkpoint, at once or in the background, slows FCMAE steps down.

python benchmarks/saving.py --model convnextv2_tiny --output benchmarks/RESULTS.md
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WAYS = {None: "no save", False: "written at once", True: "`--async_save`"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnextv2_tiny", help="one of the eight sizes")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, help="default 32 on CPU, 256 on CUDA")
    parser.add_argument("--steps", type=int, help="from a save on; default 4 on CPU, 20 on CUDA")
    parser.add_argument("--rounds", type=int, default=5, help="each goes through every way once")
    parser.add_argument("--device", help="default cuda where there is one, else cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default temporary")
    parser.add_argument("--output", type=Path, help="markdown file to append the table to")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch

from benchmarks.step import machine
from benchmarks.variants import Variant, make_variant
from models.fcmae import visible_patches
from training import stepper
from training.checkpoint import (
    TrainableParts,
    TrainState,
    collect_checkpoint,
    write_checkpoints,
)
from training.checkpoint_manager import AsyncWriter

MASK_RATIO = 0.6


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags with defaults filled in."""
    args = get_args_parser().parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = args.device.type == "cuda"
    args.batch_size = args.batch_size or (256 if on_cuda else 32)
    args.steps = args.steps or (20 if on_cuda else 4)
    args.amp = stepper.choose_amp(None, None, args.device)
    args.mask_ratio, args.grid = MASK_RATIO, (args.input_size // 32,) * 2
    args.visible = visible_patches(args.grid[0] * args.grid[1], MASK_RATIO)
    return args


def window(
    variant: Variant, writer: AsyncWriter | None, folder: Path, args: argparse.Namespace
) -> float:
    """Return the seconds of some steps, with a save before the first if there is a writer.

    Waiting for a background save that takes longer is not counted.
    """
    parts = TrainableParts(variant.model, variant.optimizer)
    wait = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    if writer is not None:
        content = collect_checkpoint(parts, TrainState(epoch=1), {"args": {}})
        writer(content, lambda content: write_checkpoints(folder, content, True, [], 1, ""))
    for _ in range(args.steps):
        variant.step()
    wait()
    seconds = time.perf_counter() - start
    if writer is not None:
        writer.wait()
    return seconds / args.steps


def measure(args: argparse.Namespace, folder: Path) -> dict[bool | None, list[float]]:
    """Seconds a step of each way in each round."""
    variant = make_variant("packed", args.batch_size, args)
    for _ in range(3):
        variant.step()
    seconds: dict[bool | None, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        turn = number % len(WAYS)
        for way in [*WAYS][turn:] + [*WAYS][:turn]:
            writer = None if way is None else AsyncWriter(in_background=way)
            seconds[way].append(window(variant, writer, folder, args))
            print(f"round {number}: {WAYS[way]} {seconds[way][-1]:.3f} s", file=sys.stderr)
    return seconds


def report(args: argparse.Namespace, seconds: dict[bool | None, list[float]], size: int) -> str:
    """Markdown: a row for each way."""
    usual = statistics.median(seconds[None])
    lines = ["| | seconds a step: median | min | max | to no save |", f"|---|{'---|' * 4}"]
    for way, name in WAYS.items():
        median = statistics.median(seconds[way])
        cells = f"**{median:.3f}** | {min(seconds[way]):.3f} | {max(seconds[way]):.3f}"
        lines.append(f"| {name} | {cells} | {median / usual:.2f} |")
    settings = (
        f"FCMAE steps of {args.batch_size} images of {args.input_size} px, "
        f"{'float32' if args.amp == 'none' else 'autocast ' + args.amp}; {args.steps} steps from a "
        f"save of {size / 2**20:.0f} MiB (weights and optimizer state) on, {args.rounds} rounds."
    )
    head = [f"### Saving, {args.model}", "", settings, machine(args.device), ""]
    return "\n".join([*head, *lines])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = measure(args, Path(folder))
        size = max(path.stat().st_size for path in Path(folder).glob("*.pth"))
    print(text := report(args, seconds, size))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    main()
