# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Folders of runs as a report reads them: damaged, unfinished, old, or no runs at all."""

import json

import pytest

from errors import UserError
from insight import report_data, run_data
from insight.report_data import evenly, labels_of, read_for_report, read_runs
from insight.run_data import number, read_run
from tests.insight.written import CLASSES, RECORD, pretrain_rows, write_run


def test_damaged_lines_are_named_and_the_others_kept(tmp_path):
    run = write_run(tmp_path / "run", pretrain_rows(3))
    with (run / "log.txt").open("ab") as file:
        file.write(b'[1, 2]\n\xff\xfe\n\n{"train_loss": 0.1, "epoch": "x"}\n{"train_loss": 0.')
    found = read_run(run)
    assert [row["at"] for row in found.rows] == [1, 2, 3]
    said = "log.txt: lines 4, 5, 7 and 1 more cannot be read and are left out."
    assert found.problems == [said]


def test_a_log_that_the_disk_does_not_give_is_a_note(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied")

    run = write_run(tmp_path / "run", pretrain_rows(1))
    monkeypatch.setattr(run_data.Path, "read_bytes", fail)
    assert read_run(run).problems[0] == "log.txt cannot be read (Permission denied)."


def test_repeated_epochs_count_once_and_those_within_an_epoch_have_their_place(tmp_path):
    rows = [{"epoch": 0, "train_loss": 3}, {"after_epochs": 1.5, "test_acc1": 7}]
    rows += [{"epoch": 1, "train_loss": 2}, {"epoch": 0, "train_loss": 1}]
    found = read_run(write_run(tmp_path / "run", rows))
    assert [row["at"] for row in found.rows] == [1, 1.5, 2]
    assert found.values("train_loss") == [1, None, 2]
    assert found.last("test_acc1") == 7


def test_flags_and_recipe_are_those_of_the_record_or_of_args_yaml(tmp_path):
    arguments = {"lr": 1, "recipe": "tiny: --lr 1", "config": None}
    run = write_run(tmp_path / "run", (), {"arguments": arguments, "recipe": "tiny"}, {"lr": 2})
    assert (read_run(run).flags, read_run(run).recipe) == ({"lr": 1}, "tiny")
    (run / "run.json").unlink()
    (run / "args.yaml").write_text("# recipe old: --lr 3\nlr: 3\n")
    assert (read_run(run).flags, read_run(run).recipe) == ({"lr": 3}, "old")


def test_values_that_are_no_numbers():
    values = (float("nan"), float("inf"), True, "1", None, 10**400)
    assert [number(value) for value in values] == [None] * 6
    assert number(3) == 3


def test_folders_that_hold_no_run_are_refused(tmp_path):
    write_run(tmp_path / "runs" / "one", pretrain_rows(1))
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("missing", "missing does not exist; expected the folder of a run"),
        ("file", "file is a file; expected the folder of a run"),
        ("empty", r"has no log\.txt, run\.json or args\.yaml, expected the folder"),
        ("runs", "it holds runs: one. Name them"),
    ):
        with pytest.raises(UserError, match=said):
            read_for_report(tmp_path / name)


def test_runs_of_one_name_get_names_that_differ(tmp_path):
    folders = [write_run(tmp_path / name / "run", pretrain_rows(1)) for name in "ab"]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    with pytest.raises(UserError, match="is given twice"):
        read_runs([folders[0], tmp_path / "b" / ".." / "a" / "run"])
    with pytest.raises(UserError, match="got 17 runs, expected at most 16"):
        read_runs([f"run{index}" for index in range(17)])


def test_legends_leave_out_a_long_beginning_that_names_share():
    names = ["pretrain-convnextv2_atto-lr1e-3", "pretrain-convnextv2_atto-lr2e-3"]
    assert labels_of(names) == ["…lr1e-3", "…lr2e-3"]
    assert labels_of(names[:1]) == names[:1]
    assert labels_of(["run_a", "run_b"]) == ["run_a", "run_b"]


def test_a_run_before_its_first_epoch_can_be_read(tmp_path):
    run = write_run(
        tmp_path / "run", record=RECORD | {"status": "failed", "error": "out of memory"}
    )
    (run / "log.txt").unlink()
    found = read_for_report(run)
    assert (found.rows, found.record["error"]) == ([], "out of memory")
    assert "log.txt is missing" in found.problems[0]


@pytest.mark.parametrize("status", ["failed", "stopped", "running"])
def test_missing_log_is_no_problem_before_the_first_epoch_is_done(status, tmp_path):
    """The note said `no epoch is done, or its logs were deleted` of each run that had failed."""
    record = RECORD | {"status": status, "epochs_done": 0.5}
    run = write_run(tmp_path / "run", record=record)
    (run / "log.txt").unlink()
    assert read_for_report(run).problems == []
    (run / "run.json").write_text(json.dumps(record | {"epochs_done": 3}))
    assert "log.txt is missing" in read_for_report(run).problems[0]


def test_other_damaged_files_are_named(tmp_path):
    run = write_run(tmp_path / "run", pretrain_rows(1), classes=CLASSES)
    for name, text in (
        ("run.json", '{"status": '),
        ("args.yaml", "a: [1"),
        ("confusion.csv", "true class,a,b\na,1\n"),
        ("predictions.csv", "path,prediction\nx,y\n"),
    ):
        (run / name).write_text(text)
    found = read_for_report(run)
    assert (found.record, found.flags, found.confusions, found.predictions) == ({}, {}, {}, {})
    names = [problem.split(" cannot be read")[0] for problem in found.problems]
    assert names == ["run.json", "args.yaml", "confusion.csv", "predictions.csv"]
    (run / "run.json").write_text(json.dumps({"arguments": {"lr": 1}}))
    assert read_run(run).flags == {"lr": 1}  # of a run without args.yaml


def test_huge_confusion_matrices_are_left_out_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(report_data, "MOST_CLASSES", 3)
    found = read_for_report(write_run(tmp_path / "run", pretrain_rows(1), classes=CLASSES))
    assert found.confusions == {}
    assert "4 classes are more than the 3 of a report" in found.problems[0]


def test_worst_predictions_are_the_most_confident_wrong_ones(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", pretrain_rows(1))
    rows = [
        "path,target,prediction,probability",
        "a,cat,cat,0.99",
        "b,cat,dog,0.6",
        "c,dog,cat,0.9",
    ]
    (run / "predictions.csv").write_text("\n".join([*rows, "d,cat,,"]))  # d: NaN outputs
    (run / "predictions-sketch-ema.csv").write_text("\n".join(rows[:2]))
    (run / "predictions-tags.csv").write_text("\n".join([rows[0], "a,cat|dog,cat,0.9"]))
    found = read_for_report(run).predictions
    assert [row[0] for row in found[""].worst] == ["d", "c", "b"]
    assert (found[""].wrong, found[""].read, found[""].is_whole) == (3, 4, True)
    assert [*found] == ["sketch-ema", ""]  # several classes an image have no single prediction
    monkeypatch.setattr(report_data, "MOST_PREDICTIONS", 2)
    found = read_for_report(run).predictions[""]
    assert (found.read, found.is_whole) == (2, False)


def test_pictures_are_found_by_name_and_epoch(tmp_path):
    drawn = {"reconstructions": [11, 3], "worst_images": [0]}
    run = write_run(tmp_path / "run", pretrain_rows(1), pictures=drawn)
    (run / "reconstructions" / "epoch-x.png").touch()
    found = read_for_report(run).pictures
    assert {name: [*files] for name, files in found.items()} == {
        "reconstructions": [4, 12],
        "worst_images": [1],
    }


def test_items_are_chosen_evenly_with_both_ends():
    assert evenly(range(10), 4) == [0, 3, 6, 9]
    assert evenly(range(3), 8) == [0, 1, 2]
    assert evenly(range(3), 1) == [2]
