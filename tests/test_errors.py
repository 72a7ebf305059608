# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Looking names up."""

from __future__ import annotations

import math
import pickle

import pytest

from errors import TrainingStopped, UserError, resolve

TABLE = {"sgd": 1, "adamw": 2, "IMNET": 3}


def test_known_name_is_its_row():
    assert resolve("adamw", TABLE, "optimizer") == 2


def test_colon_in_a_name_of_the_table_is_no_import():
    assert resolve("a:b", {"a:b": 5}, "thing") == 5


def test_function_of_any_module_needs_no_row():
    assert resolve("math:sqrt", TABLE, "optimizer") is math.sqrt
    assert resolve("os.path:join", TABLE, "optimizer")("a", "b") == "a/b"


@pytest.mark.parametrize(
    ("typo", "meant"), [("sgdd", "sgd"), ("imnet", "IMNET"), ("Adam", "adamw")]
)
def test_typo_gets_the_closest_name_in_any_case(typo, meant):
    with pytest.raises(UserError) as caught:
        resolve(typo, TABLE, "optimizer")
    message = str(caught.value)
    assert message.startswith(f"unknown optimizer '{typo}'. Did you mean '{meant}'")
    assert message.endswith("Or pass 'package.module:function'.")
    assert "\n" not in message


def test_name_like_no_other_gets_the_whole_list():
    with pytest.raises(UserError, match="Known: sgd, adamw, IMNET"):
        resolve("zzz", TABLE, "optimizer")


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such", ":f", "math:", ":", ".x:f"])
def test_what_cannot_be_imported_is_a_user_error(name):
    with pytest.raises(UserError, match="cannot import optimizer"):
        resolve(name, TABLE, "optimizer")


def test_table_that_takes_no_imports_offers_none():
    with pytest.raises(UserError) as caught:
        resolve("math:sqrt", TABLE, "optimizer", importable=False)
    assert "unknown optimizer 'math:sqrt'" in str(caught.value)
    assert "package.module" not in str(caught.value)


def test_error_inside_a_users_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_fork.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        resolve("broken_fork:f", TABLE, "model")


def test_errors_are_of_the_kinds_that_callers_catch():
    assert issubclass(UserError, ValueError)
    assert not issubclass(TrainingStopped, UserError)
    error = pickle.loads(pickle.dumps(UserError("got 3, expected 4")))  # from a loader's worker
    assert (type(error), str(error)) == (UserError, "got 3, expected 4")
