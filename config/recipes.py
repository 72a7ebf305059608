# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files of flags, --config and --recipe, below the command line.

python -c "from config import recipes; print(recipes.listing())"
"""

from __future__ import annotations

import argparse
import difflib
import reprlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.flags import str2bool

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
FILES = ("config", "recipe")  # flags that name a file, and that no file may set
# Two ways to say one thing: who says it one way takes back what a file below said the other way.
ONE_OF = (
    ("update_freq", "effective_batch"),
    ("lr", "blr"),
    ("warmup_epochs", "warmup_steps"),
    ("amp", "use_amp"),
)
PARTNER = {name: other for pair in ONE_OF for name, other in (pair, pair[::-1])}
Flags = dict[str, Any]


def closest(name: str, known: Iterable[str], kind: str = "flag") -> str:
    """A hint for a name that is not known."""
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return (
        f"did you mean {' or '.join(close)}?" if close else f"no {kind} is called anything like it"
    )


def read_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Flags:
    """The command line over `--config` over `--recipe` over the defaults.

    `recipe` becomes what that stands for, in words for the log.
    """
    typed = _given(parser, argv)
    if typed.get("recipe") == "list":
        print(listing())
        parser.exit()
    layers = {name: _read(parser, name, typed[name]) for name in FILES if typed.get(name)}
    above = _over(layers.get("config", {}), typed)
    flags = vars(parser.parse_args([])) | _over(layers.get("recipe", {}), above)
    if "recipe" in layers:
        flags["recipe"] = _in_words(parser, typed["recipe"], layers["recipe"], above)
    return flags


def recipes() -> dict[str, Path]:
    """Name -> file in recipes/; parts that only others build on start with an underscore."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def listing() -> str:
    """Every recipe that can be asked for by name, and the first line of its file."""
    offered = {name: path for name, path in recipes().items() if not name.startswith("_")}
    width = max(map(len, offered), default=0)
    lines = []
    for name, path in offered.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"{name:{width}}  {first.lstrip('# ')}")
    return "\n".join(lines)


def _given(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> Flags:
    """The flags that words set, without the defaults of the others."""
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    found = vars(parser.parse_args(words, blank))
    return {name: value for name, value in found.items() if value is not unset}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Flags:
    """`above` over `below`, from which goes what `above` says another way."""
    told = {PARTNER.get(name) for name, value in above.items() if value is not None}
    return {name: value for name, value in below.items() if name not in told} | above


def _read(parser: argparse.ArgumentParser, option: str, name: str) -> Flags:
    """Put a file through the parser as if its lines were flags; null resets to None."""
    parser.source = f"--{option} {name}: "
    path = _find(parser, name) if option == "recipe" else Path(name)
    values = _load(parser, path, ())
    script = values.pop("script", parser.script)
    if script != parser.script:
        parser.error(f"it is for {script}.py and this is {parser.script}.py")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", *FILES)}
    words = []
    for key, value in values.items():
        if key not in actions:
            hint = "a file builds on another by 'base: NAME'" if key in FILES else None
            parser.error(f"unknown key {key!r}; {hint or closest(str(key), actions)}")
        words += _words(parser, actions[key], value)
    nulls = {key: None for key, value in values.items() if value is None}
    flags = _given(parser, words) | nulls
    parser.source = ""
    return flags


def _find(parser: argparse.ArgumentParser, name: str, beside: Path | None = None) -> Path:
    """A recipe's file: by name, or as a path, which a `base` counts from its own folder."""
    if name.endswith((".yaml", ".yml")):
        return (beside or Path()) / name
    known = recipes() if beside else {k: v for k, v in recipes().items() if k[0] != "_"}
    if name not in known:
        parser.error(f"unknown recipe; {closest(name, known, 'recipe')} (--recipe list shows all)")
    return known[name]


def _load(parser: argparse.ArgumentParser, path: Path, seen: tuple[Path, ...]) -> Flags:
    """The lines of a file over those of its `base`."""
    import yaml

    if path.resolve() in seen:
        parser.error(f"{path} builds on itself; change a 'base' on the way")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        parser.error(f"cannot read it: {error}")
    except RecursionError:
        parser.error("it is nested too deeply; expected lines of 'flag: value'")
    if not isinstance(values, dict):
        parser.error("expected lines of 'flag: value', without dashes")
    base = values.pop("base", None)
    if base is None:
        return values
    said, parser.source = parser.source, f"{parser.source}base {base}: "
    below = _load(parser, _find(parser, str(base), path.parent), (*seen, path.resolve()))
    parser.source = said
    return _over(below, values)


def _words(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> list[str]:
    """What to type on the command line for a value of a file; nothing for an allowed null."""
    if value is None and (action.default is None or action.dest == "aa"):
        return []
    several = action.nargs not in (None, "?")
    items = value if several and isinstance(value, list) else [value]
    for item in items:
        wrong_bool = isinstance(item, bool) and action.type is not str2bool
        if wrong_bool or not isinstance(item, (str, int, float)):
            expected = f"one value{' or a list' * several}; quote words like no"
            parser.error(f"{action.dest}: got {reprlib.repr(value)[:80]}, expected {expected}")
    option = action.option_strings[0]
    return [f"{option}={items[0]}"] if len(items) == 1 else [option, *map(str, items)]


def _in_words(
    parser: argparse.ArgumentParser, name: str, recipe: Mapping[str, Any], above: Mapping[str, Any]
) -> str:
    """`NAME: flags to paste`, and what the command line or --config says instead of some."""
    told = recipe.keys() | {PARTNER.get(key) for key in recipe}
    differ = {k: v for k, v in above.items() if k in told and (k not in recipe or recipe[k] != v)}
    expanded, instead = (_typed(parser, flags) for flags in (recipe, differ))
    return f"{name}: {expanded}" + f"; instead of it: {instead}" * bool(instead)


def _typed(parser: argparse.ArgumentParser, flags: Mapping[str, Any]) -> str:
    """Flags as one would type them; None, which cannot be typed, only where it has a word."""
    options = {action.dest: action.option_strings[0] for action in parser._actions}
    words = []
    for name, value in flags.items():
        value = "none" if value is None and name == "aa" else value
        if value is not None:
            items = value if isinstance(value, list) else [value]
            items = [str(x).lower() if isinstance(x, bool) else shlex.quote(str(x)) for x in items]
            words += [options[name], *items]
    return " ".join(words)
