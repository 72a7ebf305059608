# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A report says in words what went wrong in a run, and nothing if nothing did."""

import pytest

from insight.alarms import find_alarms
from insight.report_data import read_for_report
from insight.report_notes import MOST, describe_epochs, find_notes
from insight.run_data import read_run
from tests.insight.written import FLAGS, RECORD, finetune_rows, pretrain_rows, write_run


def notes_of(tmp_path, rows, record=RECORD, flags=FLAGS):
    return find_notes(read_run(write_run(tmp_path / "run", rows, record, flags)))


WEAK = "peak lr 0.0005 for 6 steps moves a weight by 0.003 at most: the run will hardly learn"


def with_console(tmp_path, *lines, **record):
    """The notes of a run, a finished one by default, with these lines in console.log."""
    run = write_run(tmp_path / "run", pretrain_rows(1), RECORD | record)
    (run / "console.log").write_text("".join(f"{line}\n" for line in lines))
    return find_notes(read_for_report(run))


def test_warnings_before_the_first_epoch_are_notes_once(tmp_path):
    """The page said `No alarms in the logs.` of a run that could not learn."""
    notes = with_console(
        tmp_path,
        "--- 2026-11-30 12:00:00 main_pretrain.py",
        f"warning: {WEAK}",
        f"warning: {WEAK}",
        "warning: runs/a is old",
        "epoch 1/1  step 1/2  loss 2",
        "warning: alarm after epoch 1: collapse",  # log.txt has it
    )
    assert notes == [("warning", "P" + WEAK[1:]), ("warning", "runs/a is old")]


def test_warnings_are_those_of_the_last_process_that_trained(tmp_path):
    trained = ["--- 1", "warning: first", "epoch 1/1  step 1/2"]
    resumed = ["--- 2", "warning: second", "epoch 1/1  step 2/2"]
    other = ["--- 3", "warning: third"]
    texts = [text for _, text in with_console(tmp_path, *trained, *resumed, *other)]
    assert texts == ["second"]
    assert [text for _, text in with_console(tmp_path, *other)] == ["third"]
    assert with_console(tmp_path, "--- 1", "epoch 1/1  step 1/2", *other) == []
    failed = with_console(tmp_path, *trained, *other, status="failed")  # before its first epoch
    assert [text for _, text in failed][1:] == ["third"]


def test_alarms_come_before_warnings_of_the_start(tmp_path):
    run = write_run(tmp_path / "run", [pretrain_rows(1)[0] | {"alarms": ["Collapse: x"]}], RECORD)
    (run / "console.log").write_text(f"--- 1\nwarning: {WEAK}\nepoch 1/1  step 1/2\n")
    alarm, warning = find_notes(read_for_report(run))
    assert (alarm.text, warning.text) == ("Collapse: x (epoch 1)", "P" + WEAK[1:])


def test_a_good_run_has_no_notes(tmp_path):
    assert notes_of(tmp_path, pretrain_rows()) == []
    assert notes_of(tmp_path, pretrain_rows(), record=None) == []


@pytest.mark.parametrize(
    ("record", "level", "said"),
    [
        ({"status": "failed", "error": "CUDA out\nof memory"}, "error",
         "The run failed after 3 epochs: CUDA out of memory"),
        ({"status": "failed"}, "error", "The run failed after 3 epochs: no reason was written"),
        ({"status": "stopped", "error": "SIGTERM"}, "warning",
         "The run was stopped after 3 epochs (SIGTERM). Rerun it to continue."),
        ({"status": "running"}, "warning",
         "The run was killed after 3 epochs: no process holds its folder, and it could not note "
         "its end. Rerun it to continue."),
        ({}, "info", "3 of 12 epochs are done: the run is running, was stopped, or has failed."),
    ],
)  # fmt: skip
def test_the_end_of_a_run_is_described(record, level, said, tmp_path):
    assert notes_of(tmp_path, pretrain_rows(3), record) == [(level, said)]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"status": "failed", "error": "no memory", "epochs_done": 0, "steps_done": 15},
         "The run failed in epoch 1, at step 15: no memory"),
        ({"status": "failed", "error": "no memory", "epochs_done": 3.25, "steps_done": 49},
         "The run failed in epoch 4, at step 49: no memory"),
        ({"status": "failed", "error": "NaN in epoch 4, step 49", "epochs_done": 3.25,
          "steps_done": 49}, "The run failed: NaN in epoch 4, step 49"),
        ({"status": "stopped", "epochs_done": 2.067, "steps_done": 31},
         "The run was stopped in epoch 3, at step 31. Rerun it to continue."),
        ({"status": "stopped", "epochs_done": 2.067, "steps_done": 31,
          "error": "stopped by SIGTERM in epoch 3, step 31; checkpoint saved. Exit code 75: ..."},
         "Stopped by SIGTERM in epoch 3, step 31; checkpoint saved. Exit code 75: ..."),
    ],
)  # fmt: skip
def test_an_end_within_an_epoch_is_named_once(record, said, tmp_path):
    """`failed after 1 epoch` was said of a run in its first one, and SIGTERM's place twice."""
    rows = pretrain_rows(int(record["epochs_done"]))
    assert [note.text for note in notes_of(tmp_path, rows, record)] == [said]


def test_a_run_that_holds_its_folder_is_running(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    said = "The run had not ended when this was written, after 3 epochs."
    for record in ({"status": "running"}, None):
        assert notes_of(tmp_path, pretrain_rows(3), record) == [("info", said)]


def test_alarms_come_once_with_their_epochs_and_old_ones_are_no_warnings(tmp_path):
    rows = pretrain_rows(6)
    rows[1]["alarms"] = ["The loss stalls."]
    for index, row in enumerate(rows[3:]):
        row["alarms"] = [f"collapse: rank_me {4.5 + index} has fallen from 40.0"]
    rows[2]["advice"] = ["use more workers.", "try --compile"]
    assert notes_of(tmp_path, rows) == [
        ("warning", "Collapse: rank_me 6.5 has fallen from 40.0 (epochs 4 to 6)"),
        ("advice", "Use more workers."),
        ("advice", "Try --compile"),
        ("info", "The loss stalls. (epoch 2, not since)"),
    ]


def test_overfitting_needs_a_rising_test_loss_and_a_falling_training_loss(tmp_path):
    rows = finetune_rows()
    ((level, said),) = notes_of(tmp_path, rows)
    assert level == "warning"
    assert "lowest in epoch 5 (0.5) and has risen to 0.85" in said
    assert "fell from 0.32 to 0.1333" in said
    assert notes_of(tmp_path, rows[:7]) == []  # two evaluations after the minimum
    for row in rows:
        row["train_loss"] = 0.4
    assert notes_of(tmp_path, rows) == []


def test_divergence_is_said_and_a_single_spike_is_none(tmp_path):
    rows = pretrain_rows(6)
    rows[-1]["train_loss"] = 5.0
    assert notes_of(tmp_path, rows) == []
    rows[-2]["train_loss"] = 4.0
    ((level, said),) = notes_of(tmp_path, rows)
    rows[-1]["alarms"] = ["divergence: train_loss 5 is 8 times its lowest value"]
    assert [text[:20] for _, text in notes_of(tmp_path, rows)] == ["Divergence: train_lo"]
    assert (level, said[:41]) == ("warning", "Divergence: train_loss 5 is far above its")


def test_losses_that_were_not_finite_and_skipped_steps_are_said(tmp_path):
    rows = pretrain_rows(4)
    rows[2]["train_loss"] = None
    rows[1]["skipped_steps"], rows[2]["skipped_steps"] = 0.0, 0.5
    (first, nan), (second, skipped) = notes_of(tmp_path, rows)
    assert (first, second) == ("error", "warning")
    assert nan.startswith("train_loss was NaN or infinite (epoch 3).")
    assert skipped.startswith("Up to 0.5% of the optimizer steps were skipped")
    assert "loss spike (epoch 3)." in skipped


def test_an_alarm_says_it_alone(tmp_path):
    """One bad epoch had two notes on the same loss, and two on its skipped steps."""
    rows = pretrain_rows(4)
    rows[3] |= {"train_loss": None, "skipped_steps": 40.0}
    rows[3]["alarms"] = find_alarms(rows)
    kinds = ["Divergence", "Skipped steps"]
    assert [text.split(":")[0] for _, text in notes_of(tmp_path, rows)] == kinds
    rows[1]["train_loss"] = None  # of an epoch without an alarm
    assert "train_loss was NaN or infinite (epoch 2)." in notes_of(tmp_path, rows)[0].text


def test_thousands_of_alarms_do_not_fill_the_page(tmp_path):
    rows = pretrain_rows(2)
    rows[-1]["alarms"] = ["alarm" + "x" * index for index in range(1000)]
    found = notes_of(tmp_path, rows)
    assert len(found) == MOST + 1
    assert found[-1].text == "970 more notes left out."


def test_epochs_in_words():
    assert describe_epochs([3]) == "epoch 3"
    assert describe_epochs([3, 4, 4.5, 5]) == "epochs 3 to 5"
    assert describe_epochs([3, 5]) == "epochs 3, 5"
    assert describe_epochs([1, 4, 9, 12, 20]) == "epochs 1, 4, 9 and 2 more"
