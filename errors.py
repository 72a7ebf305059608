# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What to say when the input is bad, and names looked up so that a typo gets a hint.

python -c "from errors import resolve; print(resolve('math:sqrt', {}, 'function'))"
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again, it goes on


class UserError(ValueError):
    """Bad input from outside: what was got, what is expected, what to do. Scripts exit with 2."""


class TrainingStopped(RuntimeError):
    """A run that cannot go on, with the reason and a remedy. Scripts exit with 1."""


class Preempted(Exception):
    """A run that was asked to stop, and saved. Scripts exit with EXIT_REQUEUE."""


def first_few(names: Iterable[Any], limit: int = 3) -> str:
    """Join names for a message: `a, b, c and 2 more`."""
    names = list(map(str, names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def see_working_folder() -> None:
    """Let `import` find a user's own code; scripts see their own folder only."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


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
            raise UserError(f"cannot import {kind} {name!r}: {error}") from error
    lowered = {key.lower(): key for key in table}
    close = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(lowered[key]) for key in close)}?" if close else ""
    known = hint or f"Known: {', '.join(table)}."
    other = " Or pass 'package.module:function'." if importable else ""
    raise UserError(f"unknown {kind} {name!r}. {known}{other}")
