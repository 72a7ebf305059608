# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lookup by name, and error types."""

import math
import pickle

import pytest

from errors import (
    TrainingStopped,
    UserError,
    a_type,
    did_you_mean,
    first_few,
    first_line,
    plural,
    problem_of,
    resolve,
    sentences,
)

TABLE = {"sgd": 1, "adamw": 2, "IMNET": 3}


def test_known_name_returns_its_row():
    assert resolve("adamw", TABLE, "optimizer") == 2


def test_colon_in_a_name_of_the_table_is_no_import():
    assert resolve("a:b", {"a:b": 5}, "thing") == 5


def test_function_is_imported_from_any_module():
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


def test_name_without_a_close_match_gets_the_full_list():
    with pytest.raises(UserError, match="Known: sgd, adamw, IMNET"):
        resolve("zzz", TABLE, "optimizer")


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such", ":f", "math:", ":", ".x:f"])
def test_failed_import_is_a_user_error(name):
    with pytest.raises(UserError, match="cannot import optimizer"):
        resolve(name, TABLE, "optimizer")


def test_table_without_imports_offers_none():
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


def test_first_few():
    assert first_few(["a"]) == "a"
    assert first_few({"a": 1, "b": 2, "c": 3, "d": 4}) == "a, b, c and 1 more"
    assert first_few(range(9), limit=2) == "0, 1 and 7 more"
    assert first_few([]) == ""


def test_number_and_noun_agree():
    """Logs said `29 images of 1 classes`."""
    numbers = (0, 1, 2, "1", "1.5")
    assert [plural(number, "image") for number in numbers] == [
        "0 images", "1 image", "2 images", "1 image", "1.5 images",
    ]  # fmt: skip
    assert [plural(2, noun) for noun in ("class", "micro-batch", "epoch", "bad step")] == [
        "2 classes", "2 micro-batches", "2 epochs", "2 bad steps",
    ]  # fmt: skip


def test_first_line_can_be_followed_by_other_punctuation():
    """A message of timm with a period made `model (224).; choose another`."""
    assert first_line(ValueError("\nwrong size (224).\nmore")) == "wrong size (224)"
    assert first_line(ValueError()) == "ValueError"


def test_problem_of_a_message_has_no_remedy():
    assert problem_of(UserError("a has no labels; give b; or c")) == "a has no labels"
    assert problem_of(UserError("a has no labels.")) == "a has no labels"


def test_did_you_mean_is_empty_without_a_close_match():
    assert did_you_mean("--epoch", ["--epochs", "--lr"]) == "Did you mean '--epochs'?"
    assert did_you_mean("zzz", TABLE) == ""


def test_a_type_has_its_article():
    assert [a_type(value) for value in (3, 0.5, OSError())] == ["an int", "a float", "an OSError"]


def test_sentences_leave_no_space_for_what_is_absent():
    assert sentences("unknown.", "", "Known: a") == "unknown. Known: a"
    assert sentences("unknown.", "") == "unknown."
