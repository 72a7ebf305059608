# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Arguments of a network on the command line: their names and types, and flags that it lacks.

python -c "from models import create_model; create_model('mlp(hidden_dims=[8])', input_size=8)"
"""

import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, get_args

from torch import nn

from errors import UserError, did_you_mean, plural, sentences

FLAGS = ("in_chans", "input_size", "num_classes", "head_init_scale", "drop_path_rate")
IDLE = {"drop_path_rate": 0.0, "stem_stride": 4}  # values with which these flags do nothing
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}


def call_network(name: str, make: Callable[..., nn.Module], kwargs: Mapping[str, Any]) -> nn.Module:
    """Call `make` with flags and with what the user wrote in brackets after the name.

    An unknown or missing argument, one of another type, and a flag that the network lacks are
    UserErrors.
    """
    known, given = inspect.signature(make).parameters, dict(kwargs)
    own = [key for key in known if key not in FLAGS]
    for key, idle in IDLE.items():
        if key not in known and given.pop(key, idle) != idle:
            flag = f"--{key.removesuffix('_rate')} {kwargs[key]}"
            stem = [key for key in own if key in ("stem_type", "small_input")]
            fix = f"use {name}({stem[0]}=...)" if stem and key == "stem_stride" else "drop it"
            raise UserError(f"{flag}: {name} has no such option; {fix}")
    accepted = f"Its arguments are {', '.join(own)}"
    for key in sorted(given.keys() - known):
        hint = sentences(did_you_mean(key, own), accepted)
        raise UserError(f"--model {name} has no argument {key!r}. {hint}")
    missing = [key for key in own if known[key].default is known[key].empty and key not in given]
    if missing:
        example = ", ".join(f"{key}=..." for key in missing)
        raise UserError(
            f"--model {name} lacks {', '.join(missing)}: give {name}({example}). {accepted}"
        )
    label = f"--model {name}"
    given = {key: typed(label, key, x, known[key].annotation) for key, x in given.items()}
    try:
        return make(**given)
    except UserError as error:
        raise UserError(f"--model {name}: {error}") from error


def typed(label: str, key: str, value: Any, annotation: Any) -> Any:
    """Return the value, with the words `true` and `false` as booleans; UserError if it is wrong.

    label: begins the message.
    """
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if not set(kinds) <= {*KINDS, NoneType}:
        return value  # a list, which the network checks itself
    if bool in kinds and value in ("true", "false"):
        return value == "true"
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(KINDS[kind] for kind in kinds if kind in KINDS)
        raise UserError(f"{label}: {key} is {value!r}, expected {expected}")
    return value


def check_positive(key: str, value: Any, kind: type = int) -> None:
    """Raise UserError unless the value is a number above 0, or a list of them."""
    numbers = value if isinstance(value, list | tuple) else (value,)
    right = (int, float) if kind is float else kind
    wrong = [x for x in numbers if isinstance(x, bool) or not isinstance(x, right) or x <= 0]
    if wrong or not numbers:
        expected = "numbers" if kind is float else "integers"
        raise UserError(f"{key} is {value!r}, expected {expected} above 0")


def per_stage(key: str, value: Any, stages: int, kind: type = int) -> tuple[Any, ...]:
    """Return one value for each stage; a single number stands for all of them."""
    check_positive(key, value, kind)
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * stages
    if len(values) != stages:
        raise UserError(
            f"{key} {list(values)} has {plural(len(values), 'value')}, expected {stages}: one for "
            "each stage of depths"
        )
    return values


def look_up(key: str, value: str, table: Mapping[str, Any]) -> Any:
    """Return a row of a table of options; UserError with the closest names if there is none."""
    if value in table:
        return table[value]
    hint = did_you_mean(str(value), table)
    raise UserError(f"{key} is {value!r}, expected {' | '.join(table)}. {hint}".strip())
