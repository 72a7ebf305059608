# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lines about a run: epochs from 1, the last line with result and next command."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from config import parser as options
from config.parser import ROOT
from training.checkpoint import TrainState
from training.report import (
    count_epochs,
    describe_evaluation,
    describe_progress,
    format_stats,
    last_line,
    log_entry,
    plain,
    small_stats,
)

PRETRAIN = options.parse(options.pretrain_parser(), ["--data_set", "DIGITS", "--epochs", "5"])
FINETUNE = options.parse(options.finetune_parser(), ["--data_set", "DIGITS", "--epochs", "5"])
RUN = Path("runs/x")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (TrainState(), "in epoch 1, step 0"),
        (TrainState(0, 3, samples_in_epoch=6), "in epoch 1, step 3"),
        (TrainState(1, 4), "after epoch 1, step 4"),
        (TrainState(1, 5, samples_in_epoch=2), "in epoch 2, step 5"),
    ],
)
def test_epochs_count_from_1(state, expected):
    """A resumed run called the epoch 0 that its progress line called 1."""
    assert describe_progress(state) == expected


def test_metrics_of_a_user_become_plain_numbers(tmp_path):
    """A checkpoint that holds NumPy's cannot be read, and log.txt took no float32."""
    stats = {"loss": 1 / 3, "nan": math.nan, "f1": np.float64(0.25), "kappa": np.float32(0.5)}
    stats |= {"auc": torch.tensor(0.75), "counts": np.arange(2), "where": Path("a")}
    stats |= {"classes": {np.int64(3): np.float32(0.5)}, 5: (1, torch.ones(1).to_sparse())}
    torch.save(plain(stats), tmp_path / "a.pth")
    found = torch.load(tmp_path / "a.pth", weights_only=True)
    assert math.isnan(found.pop("nan"))
    expected = {"loss": 1 / 3, "f1": 0.25, "kappa": 0.5, "auc": 0.75, "counts": [0, 1]}
    sparse = found.pop("5")
    assert sparse[0] == 1
    assert "layout=torch.sparse_coo" in sparse[1]  # as text
    assert found == expected | {"where": "a", "classes": {"3": 0.5}}


def test_no_epoch_is_above_the_last():
    assert [count_epochs(finished, 2) for finished in range(3)] == ["1/2", "2/2", "2/2"]


def test_last_line_names_folder_best_epoch_and_next_command(monkeypatch):
    state = TrainState(5)
    assert state.update_best({"best": 50.0}) == ["best"]
    state.epoch = 4
    state.update_best({"best": 81.25, "best-ema": 70.0})
    state.epoch = 5
    state.update_best({"best": 60.0})
    best = "best top-1 81.25% in epoch 4, best-ema top-1 70.00% in epoch 4"
    assert last_line(FINETUNE, RUN, state) == (
        f"runs/x: 5 of 5 epochs done; {best}; next: "
        "python main_finetune.py --config runs/x/args.yaml --eval"
    )
    monkeypatch.chdir("docs")  # the scripts are not in the current folder
    assert f"next: python {ROOT / 'main_finetune.py'} --config" in last_line(FINETUNE, RUN, state)
    fewer = last_line(FINETUNE.replace(epochs=2), RUN, state)
    assert fewer.startswith("runs/x: 5 epochs done, more than --epochs 2; best top-1 81.25% in")
    state.best_epochs = {}  # of a run of an earlier version
    assert "; best top-1 81.25%, best-ema top-1 70.00%; nothing saved" in last_line(
        FINETUNE, None, state
    )


def test_last_line_says_stopped_early_only_of_such_a_run():
    """Patience may be used up in the last evaluation of a run that ends anyway."""
    args = FINETUNE.replace(patience=2)
    assert "stopped early (--patience 2)" in last_line(args, RUN, TrainState(4, since_best=2))
    assert "stopped" not in last_line(args, RUN, TrainState(5, since_best=2))
    ended = TrainState(1, 3, samples_in_epoch=4, since_best=2)  # 3 of 3 steps
    ended.steps_per_epoch = ended.epoch_start = 2
    assert "stopped" not in last_line(args.replace(epochs=1.6), RUN, ended)


def test_next_command_of_a_run_without_evaluation_evaluates():
    """--disable_eval true of its args.yaml contradicts --eval."""
    line = last_line(FINETUNE.replace(disable_eval=True), RUN, TrainState(5))
    assert line.endswith("--config runs/x/args.yaml --eval --disable_eval false")


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("acc5", 90.0, "best top-5 90.00% in epoch 2"),
        ("loss", 0.51234, "best loss 0.5123 in epoch 2"),
        ("f1_micro", 71.236, "best f1_micro 71.24% in epoch 2"),
        ("precision_5", 30.0, "best precision_5 30.00% in epoch 2"),
        ("my_f1", 0.25, "best my_f1 0.25 in epoch 2"),
        ("r2", -0.01234567, "best r2 -0.01235 in epoch 2"),
    ],
)
def test_last_line_names_the_metric(metric, value, expected):
    state = TrainState(2, best_metric=metric)
    state.update_best({"best": value})
    assert f"done; {expected}; next" in last_line(FINETUNE, RUN, state)


def test_evaluation_shows_numbers_only_and_the_loss_last():
    stats = {"loss": 0.5, "acc1": 80.0, "acc5": 99.0, "f1": 75.5, "confusion": [[1]], "ece": 1.25}
    assert describe_evaluation(stats, True) == (
        "top-1 80.00%, top-5 99.00%, f1 75.50%, ece 1.25%, loss 0.5000"
    )
    stats = {"loss": 0.5, "acc1": 80.0, "acc5": 99.0}
    assert describe_evaluation(stats, False) == "top-1 80.00%, loss 0.5000"


def test_log_has_lists_without_nan_and_no_large_matrix():
    stats = {"a": math.nan, "b": [1.0, [math.inf]], "test_confusion": [[1]], "name": "x"}
    expected = {"a": None, "b": [1.0, [None]], "test_confusion": [[1]], "name": "x"}
    assert log_entry(stats) == expected
    large = {"test_confusion_ema": [[0] * 101] * 101, "a": math.nan, "test_confusion_rate": 0.5}
    assert log_entry(large) == {"a": None, "test_confusion_rate": 0.5}
    assert list(small_stats(large)) == ["a", "test_confusion_rate"]  # of checkpoints
    assert math.isnan(small_stats(large)["a"])


def test_line_of_an_epoch_has_no_lists():
    assert format_stats({"test_f1": 5.0, "test_class_accuracy": [1.0, None]}, True) == "test_f1 5"


def test_last_line_of_pretraining_has_its_loss_and_names_what_uses_the_weights():
    state = TrainState(5, stats={"train_loss": 0.51234})
    assert last_line(PRETRAIN, RUN, state) == (
        "runs/x: 5 of 5 epochs done; train_loss 0.5123 in epoch 5; next: "
        "python visualize.py --checkpoint runs/x, or "
        "python main_finetune.py --finetune runs/x --data_path FOLDER_OF_CLASSES"
    )
    older = TrainState(5)  # a run of an earlier version, which stored no values
    assert last_line(PRETRAIN, RUN, older).startswith("runs/x: 5 of 5 epochs done; next: ")
    assert "done; not evaluated; next: " in last_line(FINETUNE, RUN, older)
    unsaved = PRETRAIN.replace(save_ckpt=False)
    assert last_line(unsaved, RUN, state).endswith("nothing saved")
    code = last_line(PRETRAIN.replace(model="a.b:c"), RUN, state)
    assert "--checkpoint runs/x --model a.b:c, or" in code
