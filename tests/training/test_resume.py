# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The weights that an evaluation takes. How runs resume: test_checkpoint.py, test_mains.py."""

import pytest
import torch

from errors import UserError
from training.resume import choose_evaluated, compare_args


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """`run`, and `moved` and `lost`, whose args.yaml names it; `ema` and `empty`; the start."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other", "moved", "lost", "ema", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.yaml").write_text("output_dir: run\n")
    for path in ("run/checkpoint-0", "other/checkpoint-0", "moved/checkpoint-0", "checkpoint-0"):
        torch.save({"args": {"output_dir": "run"}}, tmp_path / f"{path}.pth")
    (tmp_path / "ema" / "checkpoint-best-ema.pth").touch()
    (tmp_path / "nothing.yaml").write_text("epochs: 3\n")


@pytest.mark.parametrize(
    ("resume", "folder", "config", "finetune", "expected", "message"),
    [
        ("", "run", None, "start", "run", ""),
        ("", "empty", None, "start", "start", "empty holds no checkpoint: --finetune start is"),
        ("", "", None, "start", "start", "no --output_dir names a run: --finetune start is"),
        ("", "empty", None, "", "empty", ""),  # which is reported later
        ("", "run", "moved/args.yaml", "start", "moved", ""),
        ("", "run", "moved", "start", "moved", ""),
        ("", "run", "moved/checkpoint-0.pth", "start", "moved", ""),
        ("", "run", "lost/args.yaml", "start", "run", ""),
        ("", "run", "nothing.yaml", "start", "run", ""),
        ("", "other", "moved/args.yaml", "start", "other", ""),  # --output_dir was given too
        ("run/checkpoint-0.pth", "run", None, "", "run/checkpoint-0.pth", ""),
        ("other", "run", None, "", "other", "--resume other is evaluated, not the run in run"),
        ("other", "empty", None, "", "other", ""),
    ],
)
def test_evaluation_takes_what_is_resumed_else_the_run_else_its_start(
    resume, folder, config, finetune, expected, message, runs, log
):
    assert choose_evaluated(resume, folder, config, finetune, False) == expected
    assert [text.startswith(message) for text in log.messages] == [True] * bool(message)


def test_folder_of_ema_weights_is_a_run_if_they_are_asked_for(runs):
    found = [choose_evaluated("", "ema", None, "start", use_ema) for use_ema in (True, False)]
    assert found == ["ema", "start"]


def test_flag_that_a_run_left_out_is_to_be_left_out():
    """`pass --patch_size None` cannot be typed."""
    with pytest.raises(UserError, match="with no --patch_size and cannot .* 8: leave --patch_size"):
        compare_args({"patch_size": None}, {"patch_size": 8}, "x.pth")


def test_a_run_of_any_task_resumes_by_its_own_command():
    """--task auto with --loss was refused, and --smoothing was said to have changed."""
    saved = {"task": "multi_label", "loss": "zlpr", "smoothing": 0.0}
    now = saved | {"task": "auto", "smoothing": 0.1}
    assert compare_args(saved, now, "x.pth", given={"task", "loss"}) == []
    with pytest.raises(UserError, match="with --task multi_label and cannot resume with regressi"):
        compare_args(saved, now | {"task": "regression"}, "x.pth", given={"task"})


@pytest.mark.parametrize(
    ("name", "before", "now", "text"),
    [
        ("num_samples", 100, None, "with --num_samples 100 and cannot resume without it: pass"),
        ("num_samples", None, 9, "with no --num_samples and cannot resume with 9: leave"),
        ("aug_repeats", 3, 1, "with --aug_repeats 3 and cannot resume with 1: pass"),
        ("aug_repeats", 1, 3, "with --aug_repeats 1 and cannot resume with 3: pass"),
    ],
)
def test_an_interrupted_epoch_keeps_its_length_and_repeats(name, before, now, text):
    """The rest of another order has images that the epoch has seen, and lacks others."""
    with pytest.raises(UserError, match=text):
        compare_args({name: before}, {name: now}, "x.pth", in_epoch=True)
    assert compare_args({name: before}, {name: now}, "x.pth") != []
    if before in (None, 1):  # of an earlier version, which stores no such flag
        with pytest.raises(UserError, match=text):
            compare_args({"seed": 0}, {name: now}, "x.pth", in_epoch=True)
    assert compare_args({"seed": 0}, {"num_samples": None, "aug_repeats": 1}, "x", True) == []


def test_run_trains_on_one_fraction_of_the_labels_alone():
    """With another fraction or seed it would have seen more labels than its flags say."""
    with pytest.raises(UserError, match="--label_fraction 0.01 and cannot resume with 0.1: pass"):
        compare_args({"label_fraction": 0.01}, {"label_fraction": 0.1}, "x.pth")
    with pytest.raises(UserError, match="--label_fraction 1.0 and cannot resume with 0.1"):
        compare_args({"seed": 0}, {"label_fraction": 0.1}, "x.pth")  # of an earlier version
    saved = {"label_fraction": 0.1, "seed": 0}
    with pytest.raises(UserError, match="--seed 0 and cannot resume with 1"):
        compare_args(saved, saved | {"seed": 1}, "x.pth")
    saved = {"label_fraction": 1.0, "seed": 0}
    assert compare_args(saved, saved | {"seed": 1}, "x.pth") == ["--seed 1 (was 0)"]


def test_resumed_run_keeps_its_split_and_refuses_other_data():
    """--eval_data_path was ignored, since the split of the run was taken instead."""
    saved, now = {"val_split": 0.3}, {"val_split": 0.0, "eval_data_path": None}
    assert compare_args(saved, now, "x.pth", given=()) == []
    with pytest.raises(UserError, match="on --val_split 0.3, .* drop --eval_data_path"):
        compare_args(saved, now | {"eval_data_path": "other.csv"}, "x.pth", given=())
