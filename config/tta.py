# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Test-time augmentation: the views that --tta names, and checks of this flag.

python main_finetune.py --eval --resume runs/finetune --data_path photos --tta hflip five_crop
"""

import argparse
import math
from collections.abc import Iterator
from typing import Any

from config.sizes import default_crop_pct


def tta_views(args: Any) -> tuple[str, ...]:
    """Return the views that --tta names, () for none."""
    return tuple(name for name in vars(args).get("tta") or () if name != "none")


def tta_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each value of --tta that cannot work, whatever the size of the images."""
    names, typed = args.tta or (), f"--tta {' '.join(args.tta or ())}"
    for name in {name: None for name in names if names.count(name) > 1}:
        yield f"{typed}: {name} is given {names.count(name)} times; give it once"
    if "none" in names and tta_views(args):
        yield f"{typed}: none stands for no augmentation; drop none, or the other views"
    if tta_views(args) and args.disable_eval and not args.eval:
        yield f"{typed} and --disable_eval true cannot be combined: there would be no evaluation"


def tta_size_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each view that images of this size do not have."""
    views, (height, width) = tta_views(args), args.input_size
    size = f"--input_size {height} {width}"
    if "rot90" in views and height != width:
        yield f"--tta rot90 needs square images, got {size}; give one side, or drop rot90"
    pct = args.crop_pct or default_crop_pct(args.input_size)
    if "five_crop" in views and (pct is None or not _has_corners(args.input_size, pct)):
        by = f" by --crop_pct {pct:g}" if pct else ""
        yield (
            f"--tta five_crop: images are resized to {size}{by}, which leaves no corners to crop; "
            "give --crop_pct 0.875, or drop five_crop (--tta none: no augmentation)"
        )


def _has_corners(size: tuple[int, int], pct: float) -> bool:
    """Return True if an image is resized to more than `size` in both directions."""
    return all(math.floor(side / pct) > side for side in size)
