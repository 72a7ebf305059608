# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags of epochs and evaluations: several evaluation sets, and checks of these flags.

python -c "from config.phases import eval_sets; print(eval_sets('real=/data/a,sketch=/data/b'))"
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_NAMED = re.compile(r"\s*(\w+)=(.+)")


def eval_sets(text: str | None) -> dict[str, str]:
    """Map the names in `real=/a,sketch=/b` to their paths; a single path has the name ''.

    A path that exists is one path, whatever is in its name; so is a text that has no comma or does
    not begin with `NAME=`. ValueError if a part has no name, or one of another part.
    """
    parts = (text or "").split(",")
    if len(parts) == 1 or not _NAMED.fullmatch(parts[0]) or os.path.exists(text):
        return {"": text or ""}
    found: dict[str, str] = {}
    for part in parts:
        named = _NAMED.fullmatch(part)
        if not named:
            raise ValueError(f"got {part!r}, expected NAME=PATH, such as real=/a,sketch=/b")
        if named[1] in found:
            raise ValueError(f"two sets are called {named[1]}; rename one")
        found[named[1]] = named[2].strip()
    return found


def map_eval_paths(text: str | None, change: Callable[[str], str]) -> str | None:
    """Return `text` with each path of its named sets changed."""
    try:
        sets = eval_sets(text)
    except ValueError:  # reported by `phase_problems`
        return text
    if "" in sets:
        return text
    return ",".join(f"{name}={change(path)}" for name, path in sets.items())


def split_best_metric(flags: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the set and the metric that --best_metric names: `sketch_acc1` -> (sketch, acc1).

    The set is '' for the first one, whose name may stand there too.
    """
    text, names = flags.get("best_metric"), [*eval_sets(flags.get("eval_data_path"))]
    for name in names:
        if name and text and text.startswith(f"{name}_"):
            return "" if name == names[0] else name, text.removeprefix(f"{name}_")
    return "", text


def phase_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of fine-tuning that cannot work with the others."""
    sets: dict[str, str] = {}
    try:
        sets = eval_sets(args.eval_data_path)
    except ValueError as error:
        yield f"--eval_data_path: {error}"
    if args.eval_classes == "data" and len(sets) > 1:
        yield "--eval_classes data is for one evaluation set; give them one by one, or drop it"
    if args.min_delta and not args.patience:
        yield f"--min_delta {args.min_delta:g} needs --patience; give both or neither"
    if args.disable_eval and args.eval_freq != 1:
        text = f"--disable_eval true and --eval_freq {args.eval_freq:g} cannot be combined"
        yield f"{text}: there would be no evaluation; drop one"
