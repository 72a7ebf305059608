# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Run state and output folder."""

from __future__ import annotations

import pytest

from errors import UserError
from training.checkpoint import TrainState
from training.run_lock import hold_folder

# --- run state ------------------------------------------------------------------------------


def test_accuracy_of_zero_is_still_a_first_best():
    """The official strict `<` from 0.0 never wrote a best file for it."""
    state = TrainState()
    assert state.note_best({"best": 0.0, "best-ema": None}) == ["best"]
    assert state.best == {"best": 0.0}


def test_equal_accuracy_is_no_new_best():
    state = TrainState(best={"best": 50.0})
    assert state.note_best({"best": 50.0}) == []
    assert state.note_best({"best": 49.0}) == []
    assert state.note_best({"best": 50.5}) == ["best"]
    assert state.best == {"best": 50.5}


def test_accuracies_of_model_and_average_are_kept_apart():
    state = TrainState(best={"best": 50.0, "best-ema": 60.0})
    assert state.note_best({"best": 55.0, "best-ema": 55.0}) == ["best"]
    assert state.best == {"best": 55.0, "best-ema": 60.0}
    assert state.note_best({"best": None, "best-ema": None}) == []


def test_states_share_no_best():
    one, other = TrainState(), TrainState()
    one.note_best({"best": 1.0})
    assert other.best == {}


def test_accuracy_that_is_not_a_number_is_no_best():
    assert TrainState().note_best({"best": float("nan")}) == []


# --- output folder --------------------------------------------------------------------------


def test_no_output_dir_is_no_folder(tmp_path, monkeypatch):
    """The official '' was the current folder, whose checkpoints were then resumed."""
    monkeypatch.chdir(tmp_path)
    assert hold_folder("") is None
    assert list(tmp_path.iterdir()) == []


def test_output_dir_is_made_with_its_parents_and_left_as_it_was(tmp_path):
    for _ in range(2):
        folder = hold_folder(str(tmp_path / "a" / "b"))
        assert {path.name for path in folder.iterdir()} - {"kept"} == {".lock"}
        (folder / "kept").write_text("")


def test_output_dir_that_cannot_be_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir .*file.*: cannot write there"):
        hold_folder(str(tmp_path / "file" / "run"))
