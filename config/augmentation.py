# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Policies of --aa, and checks of the flags of augmentation.

python -c "from config.augmentation import policy_problems; print(*policy_problems('rand-x9'))"
"""

import argparse
import re
from collections.abc import Iterator

from config.flags import as_typed
from config.kinds import AMOUNT, CHANCE, COUNT, FROM_0, POSITIVE, number
from config.sizes import sizes_by_epoch
from errors import did_you_mean

TRIVIAL = "ta_wide"  # name of TrivialAugment in torchvision's reference scripts
ON_OFF = number("int [0, 1]")
# Policy -> its parts, each a name and a number, as timm reads them; timm ignores some wrong ones.
POLICIES: dict[str, dict] = {
    "rand": {"m": FROM_0, "n": COUNT, "p": CHANCE, "mstd": AMOUNT, "mmax": COUNT, "inc": ON_OFF},
    "augmix": {"m": FROM_0, "w": COUNT, "d": COUNT, "a": POSITIVE, "b": ON_OFF, "mstd": AMOUNT},
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), {"mstd": AMOUNT}),
    TRIVIAL: {},
}
# Operations of rand, by the part t: how many it has, if it draws them without replacement.
SETS = {"3a": None, "3aw": 14, "weights": 15}
OF_BYTES = {"aa": "none", "color_jitter": "0"}  # for 8-bit images of 1 or 3 channels; off
OF_RGB = ("pca_lighting", "grayscale_prob")
ENDED = (*OF_BYTES, *OF_RGB, "gaussian_blur_prob", "reprob")  # by --aug_off_epoch


def ends_some(args: argparse.Namespace) -> bool:
    """Return True if there is an augmentation that --aug_off_epoch ends."""
    return any(vars(args)[name] for name in ENDED)


def policy_problems(aa: str | None, color_jitter: float | None = None) -> Iterator[str]:
    """Yield a message for a policy that is misspelled, or that replaces --color_jitter."""
    if not aa:
        return
    try:
        _read_policy(aa)
    except ValueError as error:
        yield f"--aa {aa}: {error}"
    if color_jitter and "3a" not in aa:
        yield (
            f"--color_jitter {color_jitter} has no effect with --aa {aa}; give --aa none or 3a, or "
            "drop --color_jitter"
        )


def _read_policy(aa: str) -> None:
    """Raise ValueError for a policy that does not exist, or with parts that it does not have."""
    policy, *parts = aa.split("-")
    if policy not in POLICIES:
        hint = did_you_mean(policy, POLICIES) or f"Expected {', '.join(POLICIES)} or none."
        raise ValueError(f"unknown policy {policy!r}. {hint}")
    values: dict[str, str] = {}
    for part in parts:
        name, value = _read_part(policy, part)
        if name in values:
            raise ValueError(f"{name} is given twice; drop one")
        values[name] = value
    most, count = SETS.get(values.get("t", "")), int(values.get("n", 2))
    if most is not None and count > most:
        raise ValueError(f"n{count} is above the {most} operations of t{values['t']}")


def _read_part(policy: str, part: str) -> tuple[str, str]:
    """Read `mstd0.5` as (mstd, 0.5); ValueError if the policy has no such part."""
    known = POLICIES[policy]
    if not known:
        raise ValueError(f"{policy} has no parts, got {part!r}")
    if policy == "rand" and part[:1] == "t":
        if part[1:] not in SETS:
            raise ValueError(f"got {part!r}, expected t with one of {', '.join(SETS)}")
        return "t", part[1:]
    found = re.fullmatch(r"([a-z]+)(\d.*)", part)
    if not found or found[1] not in known:
        sets = f", or t with one of {', '.join(SETS)}" * (policy == "rand")
        raise ValueError(f"got {part!r}, expected {', '.join(known)} with a number{sets}")
    try:
        known[found[1]]["type"](found[2])
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{found[1]}: {error}") from error
    return found[1], found[2]


def augmentation_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each augmentation that cannot work, whatever the images are."""
    for name in ("scale", "ratio"):
        if (values := getattr(args, name))[0] > values[1]:
            got = f"--{name}: got {as_typed(values)}"
            yield f"{got}, expected the smaller number first; swap them"
    if not vars(args).get("eval"):
        yield from policy_problems(args.aa, args.color_jitter)
        for name in ("mixup_off_epoch", "aug_off_epoch"):
            if (epoch := vars(args).get(name, 0)) >= args.epochs:
                got = f"--{name} {epoch} is not below --epochs {args.epochs}"
                yield f"{got}; lower it, or 0 for never"


def image_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each augmentation that is for images of other kinds or sizes."""
    values, chans = vars(args), args.in_chans
    if values.get("eval"):
        return
    value_range = values.get("value_range")
    is_deep = value_range is not None and tuple(value_range) != (0, 255)
    if is_deep or chans not in (1, 3):
        of_range = f"--value_range {as_typed(value_range)}"
        own = f"--in_chans {chans}" if chans not in (1, 3) else of_range
        for name, none in OF_BYTES.items():
            if values.get(name):
                got = f"--{name} {as_typed(values[name])}"
                text = "is for 8-bit images of 1 or 3 channels"
                yield f"{got} {text}, not {own}; give --{name} {none}"
    for name in OF_RGB:
        if values.get(name) and chans != 3:
            got = f"--{name} {as_typed(values[name])}"
            yield f"{got} is for RGB images, not --in_chans {chans}; drop it"
    oblong = next((x for x in sizes_by_epoch(args).values() if x[0] != x[1]), None)
    if values.get("rot90") and oblong:
        got = f"--rot90 {as_typed(args.rot90)} turns images"
        yield f"{got}, so they must be square, not --input_size {as_typed(oblong)}; drop one"
