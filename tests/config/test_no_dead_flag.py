# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""No flag is silently ignored: each is read in a file that its script imports."""

import argparse
import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import parser as options
from config import predict_flags, probe_flags, recipes

ROOT = Path(options.__file__).resolve().parents[1]
# Flags that config/checks.py only refuses. recipes.FILES are read by config/recipes.py.
RESOLVED = {"main_pretrain": {"crop_pct"}, "main_finetune": {"resplit"}, "export": set()}
RESOLVED |= {"pack": set(), "predict": set(), "probe": set()}
GET = ("vars(args).get", "flags.get")


def probe_actions() -> list[argparse.Action]:
    """Return the flags of all sub-commands of probe.py."""
    return [
        action for view in probe_flags.AIMS for action in probe_flags.probe_parser(view)._actions
    ]


PARSERS = {
    "main_pretrain": options.pretrain_parser,
    "main_finetune": options.finetune_parser,
    "export": options.export_parser,
    "pack": options.pack_parser,
    "predict": predict_flags.predict_parser,
    "probe": lambda: SimpleNamespace(_actions=probe_actions()),
}


def submitit_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    options.add_submitit_args(parser)
    return parser


def destinations(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help"}


def imported_files(path: Path) -> set[Path]:
    """Files of this repository that `path` imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(path.parent.relative_to(ROOT).parts) if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            names |= {stem, *(f"{stem}.{alias.name}".strip(".") for alias in node.names)}
    found = set()
    for name in filter(None, names):
        place = ROOT.joinpath(*name.split("."))
        found |= {place.with_suffix(".py"), place / "__init__.py"}
    return {file for file in found if file.is_file()}


def reachable(script: Path) -> set[Path]:
    """The script and all that it imports, directly or not."""
    seen, waiting = set(), [script]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += imported_files(file)
    return seen


def reads(path: Path) -> set[str]:
    """Every `x` of `args.x`, `self.args.x`, `getattr(args, "x", ...)` or `flags["x"]` in a file.

    `vars(args)` counts as `flags`, and so does `get` of both. A function with `getattr(args, name)`
    reads what its string constants name.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = getattr(owner, "id", None) or getattr(owner, "attr", None)
            if name == "args":
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in GET:
            found.add(ast.unparse(node.args[0]).strip("'"))
        elif isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(args, '"):
            found.add(ast.literal_eval(node.args[1]))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("vars(args)", "flags"):
            found.add(ast.unparse(node.slice).strip("'"))
        elif isinstance(node, ast.FunctionDef) and "getattr(args, name)" in ast.unparse(node):
            found |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return found


def unread(script: str, flags: set[str]) -> set[str]:
    files = reachable(ROOT / f"{script}.py") - {
        ROOT / f"config/{name}.py" for name in ("parser", "checks", "schedules")
    }
    return flags - set().union(*(reads(file) for file in files))


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_of_a_script_is_read(script):
    flags = destinations(PARSERS[script]())
    assert unread(script, flags - RESOLVED[script] - {"config"}) == set()
    assert "config" in recipes.FILES


@pytest.mark.parametrize("script", ["submitit_pretrain", "submitit_finetune"])
def test_every_submitit_flag_is_read(script):
    assert unread(script, destinations(submitit_parser())) == set()


@pytest.mark.parametrize("script", PARSERS)
def test_refused_flags_exist_and_are_checked(script):
    assert RESOLVED[script] <= destinations(PARSERS[script]())
    assert RESOLVED[script] <= reads(ROOT / "config/checks.py")


def test_reads_are_found_through_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("from . import low\n")
    (tmp_path / "pack" / "low.py").write_text("def f(args):\n    return args.deep\n")
    (tmp_path / "other.py").write_text("def f(args):\n    return args.unrelated\n")
    (tmp_path / "main.py").write_text(
        "def main(args):\n    from pack import x\n    print(args.near, vars(args).get('got'))\n"
        "    args.set = 1\n"
        "def named(args):\n    return [getattr(args, name) for name in ('one', 'two')]\n"
        "def unrelated(args):\n    return 'three'\n"
    )
    flags = {"near", "got", "deep", "unrelated", "set", "one", "two", "three"}
    assert unread("main", flags) == {"unrelated", "set", "three"}
