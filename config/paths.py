# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Paths of data in flags: one, a pattern, or several with weights.

python -c "from config.paths import split_sources; print(split_sources('a.tar:0.7,b/:0.3'))"
"""

import math
import os
import re
from collections.abc import Callable

PATTERN = re.compile(r"[*?\[{]")  # begins a pattern of several files


def split_sources(text: str) -> list[tuple[str, float | None]]:
    """Split `a.tar:0.7,b/:0.3` into paths and weights; the weight of a single path is None.

    A path that exists is one path, whatever is in its name, and so is one with a comma within
    braces. Without weights, `a.tar,b/`, all of them are None. ValueError if only some have one, or
    if one is no number above 0.
    """
    if os.path.exists(os.path.expanduser(text)):
        return [(text, None)]
    parts = [part.strip() for part in re.split(r",(?![^{]*\})", text)]
    if len(parts) == 1:
        return [(text, None)]
    found = [re.fullmatch(r"(.+):([^:/]*)", part) for part in parts]
    if not any(found):
        return [(part, None) for part in parts]
    pairs = []
    for part, match in zip(parts, found, strict=True):
        weight = _as_number(match[2]) if match else math.nan
        if not 0 < weight < math.inf:
            raise ValueError(
                f"got {part!r} in {text!r}, expected PATH:WEIGHT with a weight above 0, such as "
                "a.tar:0.7,b/:0.3"
            )
        pairs.append((match[1], weight))
    return pairs


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def map_sources(text: str, change: Callable[[str], str]) -> str:
    """Return `text` with each path in it changed."""
    try:
        pairs = split_sources(text)
    except ValueError:  # reported by `checks.problems`
        return text
    weights = ["" if weight is None else f":{weight!r}" for _, weight in pairs]
    return ",".join(change(path) + weight for (path, _), weight in zip(pairs, weights, strict=True))


def absolute(text: str, exists: bool = False) -> str:
    """Return a path as an absolute one; a text that is no path stays as it is.

    exists: also if there is no such file. A pattern is a path if its folder exists.
    """
    path = os.path.abspath(os.path.expanduser(text))
    literal = PATTERN.split(path, maxsplit=1)[0]
    is_pattern = literal != path and os.path.isdir(os.path.dirname(literal))
    return path if exists or is_pattern or os.path.exists(path) else text
