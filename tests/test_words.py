# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Plain English: no archaic or private words in documents, help texts, messages and comments."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from config import parser as options
from config import predict_flags, probe_flags, views

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/RESULTS.md")]
PAGES += [ROOT / "assets/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = [path.parent for path in ROOT.glob("*/__init__.py")]
PRODUCT = sorted([*ROOT.glob("*.py"), *(f for folder in PACKAGES for f in folder.rglob("*.py"))])
INSTEAD = {  # regular expression -> plain words
    "became of": "result of",
    "go(es|ing|ne)? on|went on": "continue, resume",
    "begins? with the weights": "load the weights",
    "(is|are|be|been|was|were|as) told|tells? apart": "reported, distinguish",
    "reckon(s|ed|ing)?": "estimate",
    "anew": "again",
    "beside": "alongside, next to",
    "(for|in) want of|wants? to be": "lack of, should be",
    "imagined?": "reconstruction",
    "moments": "optimizer state, times",
    "the mains": "the training scripts",
    "who (has|have|pays|shall|reads|keeps|knows)": "(name the thing)",
    "signs? of life": "heartbeat",
    "careful side": "conservatively",
    "nothing of (it|that)|of its own kind": "(say what)",
    "what is left of": "leftovers of",
    "said to be|it is said|that is said": "reported",
    "moving averages? of the weights|average of the weights|averaged weights": "EMA weights",
    "share of the (weights|moments|optimizer|memory|patches)": "fraction of",
    "hearken|whilst|thereof|whereof|hence(forth)?|lest|nought|ere|shall": "(modern English)",
    "of every random draw": "random seed",
    "once more|yet again": "again",
}
FORBIDDEN = {re.compile(rf"\b(?:{words})\b", re.IGNORECASE): INSTEAD[words] for words in INSTEAD}
QUESTION = re.compile(r"(What|Who|Whether|How)\b")
PARSERS = {
    "main_pretrain.py": options.pretrain_parser,
    "main_finetune.py": options.finetune_parser,
    "visualize.py": options.visualize_parser,
    "visualize.py data": views.data_parser,
    "visualize.py stats": views.stats_parser,
    "visualize.py runs": views.runs_parser,
    "visualize.py report": views.report_parser,
    "export.py": options.export_parser,
    "pack.py": options.pack_parser,
    "predict.py": predict_flags.predict_parser,
    "visualize.py explain": views.explain_parser,
} | {f"probe.py {view}": partial(probe_flags.probe_parser, view) for view in probe_flags.AIMS}


def faults(text: str) -> list[str]:
    """Forbidden words of a text, with some context and what to write instead."""
    text = " ".join(text.split())
    return [
        f"...{text[max(found.start() - 30, 0) : found.end() + 30]}...  write: {instead}"
        for pattern, instead in FORBIDDEN.items()
        for found in pattern.finditer(text)
    ]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of all comments, docstrings and other strings of a Python file."""
    source = path.read_text(encoding="utf-8")
    comment, start, last = "", 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1:
            yield start, comment
            comment, start = "", line
        comment, last = f"{comment} {token.string.lstrip('# ')}", line
    yield start, comment
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            yield node.lineno, "{}".join(str(part.value) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, docstring) of a file, its classes and functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_is_plain_english(page):
    assert faults(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("script", PARSERS)
def test_help_is_plain_english(script):
    assert faults(PARSERS[script]().format_help()) == []


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_help_of_jobs_is_plain_english(name):
    parser = getattr(options, f"{name}_parser")()
    options.add_submitit_args(parser)
    assert faults(parser.format_help()) == []


def collect(find: Callable[[Path], Iterator[tuple[int, str]]], wrong: Callable[[str], list]) -> str:
    found = [
        f"{name_of(path)}:{line}: {fault}"
        for path in PRODUCT
        for line, text in find(path)
        for fault in wrong(text)
    ]
    return "\n".join(dict.fromkeys(found))


def test_comments_and_messages_are_plain_english():
    found = collect(texts, faults)
    assert found == "", f"\n{found}"


def test_docstring_says_what_a_thing_is_or_does():
    found = collect(docstrings, lambda text: [text.splitlines()[0]] if QUESTION.match(text) else [])
    assert found == "", f"docstrings must not begin with What, Who, Whether or How:\n{found}"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("the run goes\non from there", True),
        ("the run continues from there", False),
        ("kernels are chosen Anew", True),
        ("it is renewed", False),
        ("optimizer moments", True),
    ],
)
def test_words_are_found_across_lines_and_cases(text, wrong):
    assert bool(faults(text)) is wrong
