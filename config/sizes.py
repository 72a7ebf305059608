# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Image sizes by epoch, as `--input_size 128:0,160:50,224:80` has them.

python -c "from config.sizes import parse_sizes; print(parse_sizes('128:0,160:50,224:80'))"

Flags hold both `input_size`, the last size as (height, width), by which networks are built and
evaluated, and `input_sizes`, the whole text; files and messages show one flag (`as_one_flag`).
"""

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SMALL = 32  # pixels; up to this size the official code shifts images and does not crop them

_PAIR = re.compile(r"\s*(\d+)(?:x(\d+))?:(\d+)\s*")
_EXPECTED = "SIZE:EPOCH pairs with commas and no spaces, such as 128:0,160:50,224:80"


def parse_sizes(text: str) -> dict[int, tuple[int, int]]:
    """Map the epoch, counted from 0, from which a size holds to that size, (height, width).

    ValueError unless the first epoch is 0, epochs ascend and each size is larger than the one
    before.
    """
    sizes: dict[int, tuple[int, int]] = {}
    for part in text.split(","):
        found = _PAIR.fullmatch(part)
        if not found:
            raise ValueError(f"got {part!r}, expected {_EXPECTED}; a SIZE may be 96x128")
        size, epoch = (int(found[1]), int(found[2] or found[1])), int(found[3])
        if not sizes and epoch:
            raise ValueError(f"got {part.strip()!r} first, expected epoch 0 there; give SIZE:0")
        if sizes and epoch <= max(sizes):
            raise ValueError(f"got epoch {epoch} after {max(sizes)}, expected a later one")
        before = sizes[max(sizes)] if sizes else (0, 0)
        if not min(size) or size == before or any(a < b for a, b in zip(size, before, strict=True)):
            got = f"{part.strip()!r}" + f" after {_write(before)}" * bool(sizes)
            raise ValueError(f"got {got}, expected a larger size")
        sizes[epoch] = size
    if len(sizes) == 1:
        raise ValueError(f"got one size, {text!r}, expected {_EXPECTED}; or give the size alone")
    return sizes


def write_sizes(sizes: Mapping[int, tuple[int, int]]) -> str:
    """Write what `parse_sizes` reads."""
    return ",".join(f"{_write(size)}:{epoch}" for epoch, size in sizes.items())


def _write(size: tuple[int, int]) -> str:
    height, width = size
    return f"{height}" if height == width else f"{height}x{width}"


def sizes_by_epoch(args: Any) -> dict[int, tuple[int, int]]:
    """Map the first epoch of each image size of a run to (height, width); one size begins at 0."""
    text = vars(args).get("input_sizes")
    return parse_sizes(text) if text else {0: split_sizes(args.input_size)[0]}


def batch_sizes(args: Any) -> dict[int, int]:
    """Map the first epoch of each batch size to it: images per process in a forward pass.

    With --progressive_batch it is larger where images are smaller: times the ratio of their areas,
    rounded down to quarters, so that steps have as many images on any number of processes.
    """
    if not vars(args).get("progressive_batch"):
        return {0: args.batch_size}
    area = math.prod(args.input_size)
    quarters = {epoch: 4 * area // math.prod(size) for epoch, size in sizes_by_epoch(args).items()}
    return {epoch: args.batch_size * number // 4 for epoch, number in quarters.items()}


def batch_multiple(args: Any, mixes: bool = False) -> int:
    """Return the number of which --batch_size must be a multiple; mixes: mixup mixes pairs."""
    if vars(args).get("progressive_batch"):
        return 8  # so that quarters of it are whole and even
    return 2 if mixes else 1


def last_stage(args: Any) -> int:
    """Return the first epoch with images of the last size, which need the most memory and time."""
    return max(sizes_by_epoch(args))


def default_crop_pct(input_size: int | Sequence[int]) -> float | None:
    """Return 224/256 for 33 to 383 pixels; None for others, to which the whole image is resized."""
    sides = (input_size,) if isinstance(input_size, int) else input_size
    return None if max(sides) <= SMALL or min(sides) >= 384 else 224 / 256


def describe_size(size: Any) -> str:
    """Return `224 x 224 pixels` for (height, width), or for the side of a square."""
    return "{} x {} pixels".format(*split_sizes(size)[0])


def describe_sizes(args: Any) -> str:
    """Return `128 x 128 pixels, after 50 epochs 160 x 160` for the images of training."""
    first, *later = [
        (f"after {epoch} epoch{'s' * (epoch > 1)} ", "{} x {}".format(*size))
        for epoch, size in sizes_by_epoch(args).items()
    ]
    return ", ".join([f"{first[1]} pixels", *map("".join, later)])


def split_sizes(value: Any) -> tuple[Any, str]:
    """Return the last size of --input_size as (height, width), and the text of all, '' for one.

    value: numbers, or the text. Other numbers than one or two are returned as they are.
    """
    values = value if isinstance(value, tuple | list) else (value,)
    if len(values) == 1 and isinstance(values[0], str):
        sizes = parse_sizes(values[0])
        return sizes[max(sizes)], write_sizes(sizes)
    return tuple(values) * 2 if len(values) == 1 else tuple(values), ""


def as_one_flag(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags in which `input_size` is the text of `input_sizes`, if that has one."""
    new = dict(values)
    if text := new.pop("input_sizes", ""):
        new["input_size"] = text
    return new


def size_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for sizes of --input_size that cannot work with the other flags."""
    if any(isinstance(side, str) for side in args.input_size) or len(args.input_size) != 2:
        got = " ".join(map(str, args.input_size))
        return (yield f"--input_size: got {got}, expected one or two numbers, or {_EXPECTED}")
    text = args.input_sizes
    if not text or vars(args).get("eval"):
        return
    last = max(parse_sizes(text))
    if last >= args.epochs:
        got = f"--input_size {text}: epoch {last} is not below --epochs {args.epochs}"
        yield f"{got}; raise --epochs, or drop that size"
    if args.progressive_batch and args.batch_size % batch_multiple(args):
        got = f"--progressive_batch true with --batch_size {args.batch_size}"
        yield f"{got}: expected a multiple of 8, so that larger batches are whole and even"
    if args.cuda_graphs:
        yield f"--cuda_graphs true replays steps of one size; drop it, or --input_size {text}"
