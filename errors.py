# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Error types of the toolkit, and lookup by name with suggestions for typos.

python -c "from errors import resolve; print(resolve('math:sqrt', {}, 'function'))"
"""

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: rerun the same command to continue


class UserError(ValueError):
    """Invalid input. The message says what was got, what was expected, and the fix. Exit code 2."""


class TrainingStopped(RuntimeError):
    """A run that cannot continue. The message gives the reason and a remedy. Exit code 1."""


class Preempted(Exception):
    """A run that was asked to stop and has saved a checkpoint. Exit code EXIT_REQUEUE."""


def first_few(names: Iterable[Any], limit: int = 3) -> str:
    """Join names for a message: `a, b, c and 2 more`."""
    names = list(map(str, names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def plural(number: Any, noun: str) -> str:
    """Return a number and its noun, given in the singular: `1 image`, `2 classes`."""
    ending = "es" if noun.endswith(("s", "tch")) else "s"
    return f"{number} {noun}{ending * (str(number) != '1')}"


def format_bytes(size: float) -> str:
    """1536 -> 1.5 KiB"""
    power = min(max(int(size), 1).bit_length() - 1, 49) // 10
    return f"{size / 1024**power:.{int(power > 0)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def a_type(value: Any) -> str:
    """Return the type of a value with its article: `a list`, `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def sentences(*parts: str) -> str:
    """Join the parts of a message that are not empty."""
    return " ".join(filter(None, parts))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its period, or its type."""
    return str(error).strip().partition("\n")[0].rstrip(" .") or type(error).__name__


def problem_of(error: BaseException) -> str:
    """Return an error's message without what was expected and the fix: the part before `;`."""
    return first_line(error).partition("; ")[0]


def describe_error(error: Exception) -> str:
    """Return the type, place and first line of an error in a user's code; a UserError as it is."""
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    place = f"{os.path.basename(own[-1].filename)}, line {own[-1].lineno}"
    return f"{type(error).__name__} in {place}: {first_line(error)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known names, in any case: `Did you mean 'a' or 'b'?`; '' if none is."""
    lowered = {key.lower(): key for key in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(lowered[key]) for key in close)}?" if close else ""


@contextlib.contextmanager
def pipe_may_close() -> Iterator[None]:
    """End the program quietly if what reads its output ends first, as in `... | head -1`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        sys.exit()


def print_quickly(main: Callable[[Any], None], args: Any) -> int:
    """Call a `main` that needs no torch, as `launch` does; returns the exit code."""
    try:
        with pipe_may_close():
            main(args)
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        return 2
    return 0


def see_working_folder() -> None:
    """Make a user's own modules in the current folder importable; scripts see only their own."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _searched(error: Exception, module_name: str) -> str:
    """Return the folders where a module was looked for and not found; '' for other errors."""
    lacks = isinstance(error, ModuleNotFoundError) and error.name
    if not lacks or not f"{module_name}.".startswith(f"{error.name}."):  # one that it imports
        return ""
    folders = [os.path.abspath(path) for path in sys.path if os.path.isdir(path or ".")]
    here = [path for path in dict.fromkeys(folders) if path != os.getcwd()]
    return f"; looked in the working folder {os.getcwd()}, and in {', '.join(here)}"


def resolve(name: str, table: Mapping[str, Any], kind: str, importable: bool = True) -> Any:
    """Look `name` up in `table`, or import it when written as `package.module:function`."""
    if name in table:
        return table[name]
    if importable and ":" in name:
        module_name, _, attribute = name.partition(":")
        see_working_folder()
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            places = _searched(error, module_name)
            raise UserError(f"cannot import {kind} {name!r}: {error}{places}") from error
    hint = did_you_mean(name, table) or f"Known: {', '.join(table)}."
    other = " Or pass 'package.module:function'." if importable else ""
    raise UserError(f"unknown {kind} {name!r}. {hint}{other}")


def resolve_for(flag: str, name: str, table: Any, kind: str, importable: bool = False) -> Any:
    """`resolve` with the flag's name in the error; a table may be a list of words."""
    table = table if isinstance(table, Mapping) else {word: word for word in table}
    try:
        return resolve(name, table, kind, importable)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
