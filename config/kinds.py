# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Kinds of flags for argparse: numbers in a range, truth values, sizes, repeated flags.

python -c "from config.kinds import FRACTION; print(FRACTION['type']('0.5'))"
"""

import argparse
import math
import os
from typing import Any

from config.sizes import parse_sizes, write_sizes


def str2bool(text: str) -> bool:
    """Read `true`, `yes`, `on`, `t`, `y`, `1` or one of their opposites, in any case."""
    for value, words in ((True, "true yes on t y 1"), (False, "false no off f n 0")):
        if text.lower() in words.split():
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected true or false")


class Repeated(argparse.Action):
    """A flag that may be given several times, each time with one value or more."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        held = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(held if isinstance(held, list) else []), *values])


def number(kind: str) -> dict[str, Any]:
    """Return argparse's type and metavar of `int [1, inf)`; a round bracket excludes its bound.

    NaN is refused. A `whole` is a float that becomes an int if it is one, so that 3 stays 3. The
    type's `range` is a text for help and errors: `>=1`, or `in (0,1]`; its
    `holds(value)` tests a number.
    """
    name, _, span = kind.partition(" ")
    first, last = span[1:-1].split(", ")
    low = math.nextafter(float(first), math.inf) if span[0] == "(" else float(first)
    high = math.nextafter(float(last), -math.inf) if span[-1] == ")" else float(last)

    def convert(text: str) -> float:
        try:
            value = int(text) if name == "int" else float(text)
            value = int(value) if name == "whole" and value.is_integer() else value
        except ValueError:
            value = math.nan
        if not convert.holds(value):
            expected = f"{'an integer' if name == 'int' else 'a number'} {convert.range}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    above = f"{'>' if span[0] == '(' else '>='}{first}"
    has_two_ends = last != "inf" or first == "-inf"
    convert.holds = lambda value: low <= value <= high
    convert.range = f"in {span.replace(' ', '')}" if has_two_ends else above
    return {"type": convert, "metavar": "INT" if name == "int" else "FLOAT"}


class FileToWrite:
    """Reads the path of a file or folder to write, with one of some endings, if any is named.

    Shells do not expand the ~ in --output=~/a; this does.
    """

    def __init__(self, *endings: str) -> None:
        self.endings = endings

    def __call__(self, text: str) -> str:
        if self.endings and text and not text.endswith(self.endings):
            expected = f"a name that ends in {' or '.join(self.endings)}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return os.path.expanduser(text)


def out(*endings: str) -> dict[str, Any]:
    """Return the kind of a file to write."""
    return PATH | {"type": FileToWrite(*endings)}


BOOL = {"type": str2bool, "metavar": "BOOL", "nargs": "?", "const": True}
PATH, NAME, TEXT = {"metavar": "PATH"}, {"metavar": "NAME"}, {"metavar": "TEXT"}
OUT = out()
REPEATED = TEXT | {"action": Repeated}
COUNT, FROM_0, FROM_MINUS_1 = map(number, ("int [1, inf)", "int [0, inf)", "int [-1, inf)"))
AMOUNT, POSITIVE = number("float [0, inf)"), number("float (0, inf)")
EPOCHS = number("whole (0, inf)")


def size(text: str) -> int | str:
    """Read a side in pixels, or the checked text of sizes by epoch."""
    if ":" not in text:
        return COUNT["type"](text)
    try:
        return write_sizes(parse_sizes(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


size.holds, size.range = COUNT["type"].holds, COUNT["type"].range
SIZE = COUNT | {"type": size}
ANY = number("float (-inf, inf)")
CHANCE, BELOW_1, FRACTION = map(number, ("float [0, 1]", "float [0, 1)", "float (0, 1]"))
