# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags that name a function with its arguments, such as `focal(gamma=2)`, and sums of them.

python -c "from config.calls import parse_sum; print(parse_sum('0.5 * focal(gamma=2) + bce'))"
"""

import ast
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from errors import UserError

_FACTOR = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*")
_NAME = re.compile(r"[A-Za-z_][\w.:/-]*")
_CLOSING = {"(": ")", "[": "]"}
_Values = tuple[tuple[Any, ...], dict[str, Any], dict[int | str, int]]  # args, kwargs, places


@dataclass(frozen=True)
class Call:
    """A name and its arguments: `factor * name(args, key=value)[options]`."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    options: tuple[Any, ...] = ()  # in square brackets
    place: int = field(default=0, compare=False)  # of its name in the text
    # of each argument, by number or name; of each option
    places: dict[int | str, int] = field(default_factory=dict, compare=False)
    option_places: tuple[int, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        words = [*map(repr, self.args), *(f"{name}={x!r}" for name, x in self.kwargs.items())]
        return f"{self.name}({', '.join(words)})" if words else self.name


def parse_call(text: str, flag: str) -> Call:
    """Read `name` or `name(1, key=value)`; values are Python literals, or words without quotes.

    A UserError names the flag and points at the character.
    """
    reader = _Reader(text, flag)
    reader.skip_spaces()
    call = reader.call(with_options=False)
    if reader.place < len(text):
        reader.fail("expected the end, after one name, perhaps with (arguments)")
    return call


def parse_sum(text: str, flag: str) -> list[Call]:
    """Read terms joined by `+`, each a call with an optional factor before and options after it.

    `0.5 * focal(gamma=2) + bce`, `linear(0, 1)[0.1] + cosine(1, 0)[0.9, fixed]`; errors: as in
    `parse_call`.
    """
    return list(_Reader(text, flag).terms())


def parse_options(text: str, flag: str) -> tuple[str, dict[str, Any]]:
    """Read `pattern: key=value, key=value` into the pattern and its values.

    Values and errors: as in `parse_call`.
    """
    pattern, colon, _ = text.partition(":")
    reader = _Reader(text, flag)
    reader.place = len(text) + 1  # as if a bracket were open from the colon to the end
    args, kwargs, _ = reader.values(len(pattern)) if colon else ((), {}, {})
    if args or not kwargs or not pattern.strip():
        reader.fail("expected PATTERN:name=value,name=value", len(pattern))
    return pattern.strip(), kwargs


def parse_named(text: str, flag: str) -> dict[str, str]:
    """Read `name=value, name=value` into a dict; commas in brackets do not separate values.

    Errors: as in `parse_call`.
    """
    reader, found = _Reader(text, flag), {}
    for start, part in _split(text):
        name, equals, value = part.partition("=")
        reader.place = start + len(part) - len(part.lstrip())
        name = name.strip()
        if not (equals and value.strip() and re.fullmatch(r"[A-Za-z]\w*", name)):
            reader.fail("expected NAME=VALUE")
        if name in found:
            reader.fail(f"{name} is given twice")
        found[name] = value.strip()
    return found


def is_named(text: str) -> bool:
    """Return True if a text begins as `parse_named` takes it."""
    return re.match(r"\s*[A-Za-z]\w*\s*=", text) is not None


def fail_at(flag: str, text: str, problem: str, place: int) -> NoReturn:
    """Raise a UserError that points at a character of a flag's text."""
    raise UserError(f"{flag}: {problem}\n  {text}\n  {' ' * place}^")


def accepted(make: Callable[..., Any], inputs: int = 0, hidden: Collection[str] = ()) -> str:
    """Return the arguments that a function takes and their defaults, for a message.

    inputs: number of arguments before them, which a user does not write. hidden: names to omit.
    """
    known = [*inspect.signature(make).parameters.values()][inputs:]
    own = [word.replace(annotation=word.empty) for word in known if word.name not in hidden]
    words = [f"{x.name}={x.default}" if isinstance(x.default, str) else str(x) for x in own]
    return ", ".join(words) or "no arguments"  # as on the command line, without quotes


def _split(text: str) -> Iterator[tuple[int, str]]:
    """Yield the parts between commas outside brackets and quotes, and where they start."""
    start = 0
    for place, letter, depth in _outside_quotes(text):
        if letter == "," and depth == 0:
            yield start, text[start:place]
            start = place + 1
    yield start, text[start:]


def _outside_quotes(text: str, start: int = 0) -> Iterator[tuple[int, str, int]]:
    """Yield (place, letter, brackets open after it) for the letters that are not in quotes."""
    depth, quote = 0, ""
    for place in range(start, len(text)):
        letter = text[place]
        if quote:
            quote = quote if letter != quote else ""
            continue
        if letter in "'\"":
            quote = letter
            continue
        depth += (letter in "([{") - (letter in ")]}")
        yield place, letter, depth


class _Reader:
    """Reads a text from left to right; `place` is the next character."""

    def __init__(self, text: str, flag: str) -> None:
        self.text, self.flag, self.place = text, flag, 0

    def terms(self) -> Iterator[Call]:
        while True:
            self.skip_spaces()
            factor = self.take(_FACTOR)
            yield self.call(float(factor[1]) if factor else 1.0)
            if self.place == len(self.text):
                return
            if self.text[self.place] != "+":
                self.fail("expected '+' or the end")
            self.place += 1

    def call(self, factor: float = 1.0, with_options: bool = True) -> Call:
        """Read a name, its arguments and options, and the spaces after them."""
        name = self.take(_NAME) or self.fail("expected a name")
        args, kwargs, places = self.brackets("(")
        options, named, option_places = self.brackets("[") if with_options else ((), {}, {})
        if named:
            self.fail("expected values without names in [ ]", self.place - 1)
        where = name.start(), places, tuple(option_places.values())
        return Call(name[0], args, kwargs, factor, options, *where)

    def skip_spaces(self) -> None:
        while self.text[self.place : self.place + 1].isspace():
            self.place += 1

    def take(self, pattern: re.Pattern) -> re.Match | None:
        found = pattern.match(self.text, self.place)
        self.place = found.end() if found else self.place
        return found

    def brackets(self, opening: str) -> _Values:
        """Read the values in brackets, if they open here, and the spaces after them."""
        self.skip_spaces()
        start, found = self.place, ((), {}, {})
        if self.text[start : start + 1] == opening:
            self.place = self.end_of_brackets() + 1
            found = self.values(start)
        self.skip_spaces()
        return found

    def end_of_brackets(self) -> int:
        """Return the place where the bracket that opens here is closed; quotes are passed over."""
        start = self.place
        for place, letter, depth in _outside_quotes(self.text, start):
            if letter in ")]}" and depth == 0:
                if letter != _CLOSING[self.text[start]]:
                    self.fail(f"expected {_CLOSING[self.text[start]]!r}", place)
                return place
        self.fail(f"{self.text[start]!r} is not closed", start)

    def values(self, start: int) -> _Values:
        """Return the values between the brackets that open at `start`, and where they stand."""
        try:
            call = ast.parse(f"f({self.text[start + 1 : self.place - 1]})", mode="eval").body
        except (SyntaxError, ValueError) as error:  # its columns count from 1, and from `f(`
            place = start + (getattr(error, "offset", None) or 2) - 2
            self.fail("expected values separated by commas", max(start, place))
        seen: set[str] = set()
        for word in call.keywords:
            if word.arg is None:
                self.fail("expected values separated by commas", start)
            if word.arg in seen:
                self.fail(f"{word.arg} is given twice", start - 1 + word.col_offset)
            seen.add(word.arg)
        nodes = dict(enumerate(call.args)) | {word.arg: word.value for word in call.keywords}
        found = {key: self.value(node, start) for key, node in nodes.items()}
        args = tuple(found.pop(number) for number in range(len(call.args)))
        places = {key: start - 1 + node.col_offset for key, node in nodes.items()}
        return args, found, places

    def value(self, node: ast.expr, start: int) -> Any:
        """Return a literal, inf, or the word of a name, at any depth of lists and tuples."""
        if isinstance(node, ast.Name):
            return math.inf if node.id == "inf" else node.id
        signed = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd)
        if signed and getattr(node.operand, "id", "") == "inf":
            return -math.inf if isinstance(node.op, ast.USub) else math.inf
        if isinstance(node, ast.List | ast.Tuple):
            parts = [self.value(part, start) for part in node.elts]
            return parts if isinstance(node, ast.List) else tuple(parts)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):  # TypeError: a list as a key
            self.fail("expected a number, a word or a list", start - 1 + node.col_offset)

    def fail(self, problem: str, place: int | None = None) -> NoReturn:
        place = self.place if place is None else place
        fail_at(self.flag, self.text, problem, place)
