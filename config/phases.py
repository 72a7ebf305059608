# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags of epochs and evaluations: several evaluation sets, and checks of these flags.

python -c "from config.phases import eval_sets; print(eval_sets('real=/data/a,sketch=/data/b'))"
"""

import argparse
import contextlib
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
    found = [name for name in names if name and text and text.startswith(f"{name}_")]
    if not found:
        return "", text
    name = max(found, key=len)  # of sets a and a_b, a_b_acc1 is of a_b
    return "" if name == names[0] else name, text.removeprefix(f"{name}_")


def phase_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of fine-tuning that cannot work with the others."""
    yield from _set_problems(args.eval_data_path, own=":" in args.data_set)
    with contextlib.suppress(ValueError):  # reported already
        if args.eval_classes == "data" and len(eval_sets(args.eval_data_path)) > 1:
            yield "--eval_classes data is for one evaluation set; give them one by one, or drop it"
    if args.min_delta and not args.patience:
        yield f"--min_delta {args.min_delta:g} needs --patience; give both or neither"
    if args.disable_eval and args.eval_freq != 1:
        text = f"--disable_eval true and --eval_freq {args.eval_freq:g} cannot be combined"
        yield f"{text}: there would be no evaluation; drop one"


def _set_problems(text: str | None, own: bool) -> Iterator[str]:
    """own: a data set of the user's own gets the text, which may be no path."""
    try:
        sets = eval_sets(text)
    except ValueError as error:
        return (yield f"--eval_data_path: {error}")
    for name in sets:
        if name == "ema" or name.endswith("_ema"):
            yield (
                f"--eval_data_path: the set {name} would be mistaken for an evaluation of EMA "
                "weights in the names of files; rename it"
            )
    named = any(map(_NAMED.fullmatch, (text or "").split(",")))
    if named and "" in sets and not os.path.exists(text) and not own:
        yield (
            f"--eval_data_path: got {text!r}, which is no file or folder; for one set give its "
            "path alone, for several NAME=PATH,NAME=PATH"
        )
