# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags from files: `--recipe` and `--config`, which the command line overrides.

python -c "from config import recipes; print(recipes.listing())"
"""

import argparse
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.flags import as_typed, is_pretraining, library_of
from config.kinds import str2bool
from config.sizes import as_one_flag
from errors import did_you_mean, first_line, pipe_may_close, sentences

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
FILES = ("config", "recipe")  # flags that name a file, and that no file may set
YAML, CHECKPOINTS = (".yaml", ".yml"), (".pth", ".pt")
# Flags whose colons name no code: paths and sources, patterns, names of columns and devices.
MAY_HOLD_COLONS = """
data_path eval_data_path data_index image_root output_dir log_dir finetune resume param_group freeze
no_weight_decay tags image_column label_column split_column weight_column model_key model_prefix
device dist_url input_size probe_data probe_label_column
"""
# Pairs of flags for the same thing: one on the command line replaces the other in a file.
ONE_OF = (
    ("update_freq", "effective_batch"),
    ("lr", "blr"),
    ("warmup_epochs", "warmup_steps"),
    ("warmup_epochs", "sched"),
    ("warmup_steps", "sched"),
    ("min_lr", "sched"),
    ("amp", "use_amp"),
    ("imagenet_default_mean_and_std", "mean"),
    ("imagenet_default_mean_and_std", "std"),
    ("val_split", "eval_data_path"),
    ("eval", "disable_eval"),
)
# Values that turn a flag of ONE_OF off, as null does, and so replace no other.
ABSENT = {"val_split": 0, "eval_data_path": "", "eval": False, "disable_eval": False}
Flags = dict[str, Any]


def read_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[Flags, set[str], set[str]]:
    """Read the command line over `--config` over `--recipe` over the defaults.

    Returns all flags, the names of those that one of the three sets, and of those that the command
    line sets. The value of `recipe` becomes a text for the log: its name and its flags.
    """
    typed = flags_set_by(parser, argv)
    if typed.get("recipe") == "list":
        with pipe_may_close():
            print(listing())
        parser.exit()
    layers = {name: _read(parser, name, typed) for name in FILES if typed.get(name)}
    above = _merge(layers.get("config", {}), typed)
    given = _merge(layers.get("recipe", {}), above)
    flags = vars(parser.parse_args([])) | given
    if "recipe" in layers:
        flags["recipe"] = _describe(parser, typed["recipe"], layers["recipe"], above)
    return flags, set(given), set(typed)


def recipes(pattern: str = "*") -> dict[str, Path]:
    """Map names to files in recipes/; those that other recipes build on begin with `_`."""
    return {path.stem: path for path in sorted(FOLDER.glob(f"{pattern}.yaml"))}


def listing() -> str:
    """List every recipe with its script and the first line of its file."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in recipes("[!_]*").items()}
    width = max(map(len, texts))
    first = {name: text.partition("\n")[0].lstrip("# ") for name, text in texts.items()}
    return "\n".join(f"{name:{width}}  {script_of(name)}.py  {first[name]}" for name in texts)


def script_of(name: str) -> str:
    """Return the script that a recipe is for, which may stand in the recipe that it builds on."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(script|base): (\w+)$", text, re.MULTILINE))
    return found["script"] if "script" in found else script_of(found["base"])


def flags_set_by(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> Flags:
    """Parse words, and return only the flags that they set, without defaults."""
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    found = vars(parser.parse_args(words, blank))
    return {name: value for name, value in found.items() if value is not unset}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Flags:
    """Override `below` with `above`, and drop the partners of flags in `above` from it."""
    replaced = _partners(k for k, value in above.items() if value not in (None, ABSENT.get(k)))
    return {name: value for name, value in below.items() if name not in replaced} | above


def _partners(names: Iterable[str]) -> set[str]:
    names = {*names}
    return {other for pair in ONE_OF for name, other in (pair, pair[::-1]) if name in names}


def _read(parser: argparse.ArgumentParser, option: str, typed: Flags) -> Flags:
    """Parse a file's values as if they were typed; null resets a flag to None."""
    name = typed[option]
    parser.source = f"--{option} {name}: "
    path = _find(parser, name) if option == "recipe" else Path(name)
    values = _load(parser, path, (), typed)
    script = values.pop("script", parser.script)
    if script != parser.script:
        parser.error(f"this file is for {script}.py, not for {parser.script}.py")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", *FILES)}
    nulls, words = {key: None for key, value in values.items() if value is None}, []
    for key, value in values.items():
        if key not in actions:
            hint = "To build on another recipe write 'base: NAME'." if key in FILES else ""
            hint = hint or did_you_mean(str(key), actions)
            parser.error(sentences(f"unknown key {key!r}.", hint))
        words += _words(parser, actions[key], value)
    flags = flags_set_by(parser, words) | nulls
    parser.source = ""
    return flags


def _find(parser: argparse.ArgumentParser, name: str, folder: Path | None = None) -> Path:
    """Find a recipe by name or path; for a `base`, paths are relative to its `folder`."""
    if name.endswith((*YAML, *CHECKPOINTS)) or (folder and "/" in name):
        return (folder or Path()) / name
    known = recipes() if folder else recipes("[!_]*")
    if name not in known:
        hint = sentences(did_you_mean(name, known), "--recipe list shows all")
        parser.error(f"unknown recipe {name!r}. {hint}")
    return known[name]


def _load(
    parser: argparse.ArgumentParser, path: Path, seen: tuple[Path, ...], typed: Flags
) -> Flags:
    """Read a file's values over those of its `base`, of which the later ones win.

    typed: flags of the command line.
    """
    path = _file_of(path)
    if path.resolve() in seen:
        parser.error(f"{path} builds on itself through its 'base'; remove one 'base'")
    try:
        values = read_values(path)
    except ValueError as error:
        parser.error(str(error))
    if path.name.endswith(CHECKPOINTS):
        _refuse_code(parser, {key: x for key, x in values.items() if key not in typed})
    base = values.pop("base", None)
    names = base if isinstance(base, list) else [base] * (base is not None)
    below: Flags = {}
    for name in names:
        source, parser.source = parser.source, f"{parser.source}base {name}: "
        found = _find(parser, str(name), path.parent)
        below = _merge(below, _load(parser, found, (*seen, path.resolve()), typed))
        parser.source = source
    return _merge(below, values)


def _file_of(path: Path) -> Path:
    return path / "args.yaml" if path.is_dir() else path


def read_values(path: Path) -> Flags:
    """Read the flags in a YAML file, in a checkpoint, or in the args.yaml of a run's folder.

    ValueError if they cannot be read.
    """
    path = _file_of(path)
    if path.name.endswith(CHECKPOINTS):
        return _read_checkpoint(path)
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("expected lines of 'flag: value', without dashes")
    return values


def _read_checkpoint(path: Path) -> Flags:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's unpickler raises almost anything for other files
        raise ValueError(f"cannot read the file: {first_line(error)}") from error
    stored = content.get("args") if isinstance(content, dict) else None
    if not isinstance(stored, dict):
        raise ValueError("it holds no flags; expected a checkpoint of this toolkit, or a YAML file")
    values = {key: list(x) if isinstance(x, tuple) else x for key, x in as_one_flag(stored).items()}
    values = {key: x for key, x in values.items() if key not in (*FILES, "base")}
    return values | {"script": "main_pretrain" if is_pretraining(values) else "main_finetune"}


def _refuse_code(parser: argparse.ArgumentParser, values: Flags) -> None:
    """End with an error if a value of a checkpoint may name code, which would be imported.

    Anybody may have written the file.
    """
    for key, value in values.items():
        named = key not in MAY_HOLD_COLONS.split() and ":" in str(value)
        if named and not (key == "model" and library_of(str(value))):
            parser.error(
                f"it names code, --{key} {as_typed(value)}, which would be imported; type this "
                "flag too, or give the args.yaml of the run"
            )


def _words(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> list[str]:
    """Turn a value of a file into command-line words; none for null where it is allowed."""
    if value is None and (action.default is None or action.dest == "aa"):
        return []
    several = action.nargs not in (None, "?")
    items = value if several and isinstance(value, list) else [value]
    for item in items:
        wrong_bool = isinstance(item, bool) and action.type is not str2bool
        if wrong_bool or not isinstance(item, (str, int, float)):
            expected = f"one value{' or a list' * several}; put words like no in quotes"
            parser.error(f"{action.dest}: got {reprlib.repr(value)[:80]}, expected {expected}")
    option = action.option_strings[0]
    return [f"{option}={items[0]}"] if len(items) == 1 else [option, *map(str, items)]


def _describe(
    parser: argparse.ArgumentParser, name: str, recipe: Mapping[str, Any], above: Mapping[str, Any]
) -> str:
    """Write `NAME: flags of the recipe; changed: flags given at a higher level`."""
    affected = recipe.keys() | _partners(recipe)
    changed = {k: v for k, v in above.items() if k in affected and recipe.get(k, recipe) != v}
    flags, changes = (_command_line(parser, values) for values in (recipe, changed))
    return f"{name}: {flags}" + f"; changed: {changes}" * bool(changes)


def _command_line(parser: argparse.ArgumentParser, flags: Mapping[str, Any]) -> str:
    """Write flags as one would type them; None cannot be typed, except `--aa none`."""
    options = {action.dest: action.option_strings[0] for action in parser._actions}
    values = {k: "none" if v is None and k == "aa" else v for k, v in flags.items()}
    return " ".join(f"{options[k]} {as_typed(v)}" for k, v in values.items() if v is not None)
