# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Runs write their report while they train and at their end; it never harms them."""

import json
import os

import pytest

import main_finetune
import main_pretrain
from config import parser as options
from errors import TrainingStopped
from tests import fakes
from tests.test_flags_act import BASE
from training import html_report
from training.html_report import HtmlReport

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune}


def run(script, words, folder):
    """Train for two epochs; returns the log."""
    main = MAINS[script]
    data = BASE[script].replace("tests.test_flags_act:recorded", "tests.tiny:colors")
    args = options.parse(main.get_args_parser(), f"{data} --output_dir {folder} {words}".split())
    with fakes.logged() as messages:
        main.main(args)
    return "\n".join(messages)


@pytest.mark.parametrize("script", MAINS)
def test_report_of_a_run_holds_its_last_epoch_and_its_pictures(script, tmp_path):
    words = "--picture_freq 1" if script == "pretrain" else "--metrics acc1 confusion"
    said = run(script, words, tmp_path / "run")
    path = tmp_path / "run" / "report.html"
    assert f"{path}: curves, images and notes of this run" in said
    page = path.read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    curves = {s["label"]: s for s in data["charts"][0]["series"]}
    assert curves["train"]["x"] == [1, 2]
    last = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert curves["train"]["y"][-1] == pytest.approx(last["train_loss"], rel=1e-5)
    part = "reconstructions of run after 2 epochs" if script == "pretrain" else "red as red: "
    assert part in page


def test_report_is_refreshed_when_an_epoch_begins(tmp_path, monkeypatch):
    """A run that is killed has the report of its last checkpoint."""
    written = []

    def write(hook):
        written.append((hook.folder / "log.txt").read_text().count("\n"))
        hook.seconds, hook.written_at = seconds, 0.0
        return True

    monkeypatch.setattr(HtmlReport, "write", write)
    monkeypatch.setattr(html_report.time, "monotonic", lambda: 49.0)
    seconds = 0.98
    run("pretrain", "--epochs 3", tmp_path / "cheap")
    assert written == [1, 2, 3]
    written.clear()
    seconds = 1.0  # a refresh would take more than 2% of the time
    run("pretrain", "--epochs 3", tmp_path / "dear")
    assert written == [1, 3]


def test_a_failing_report_is_a_warning(tmp_path, monkeypatch):
    def fail(folders):
        raise ZeroDivisionError("no page")

    monkeypatch.setattr(html_report, "write_report", fail)
    said = run("finetune", "", tmp_path / "run")
    assert "HtmlReport failed in on_phase_start (ZeroDivisionError in" in said
    assert "the run continues" in said
    assert (tmp_path / "run" / "checkpoint-1.pth").exists()
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2


def test_a_run_that_fails_has_a_report_and_one_without_a_step_has_none(tmp_path, monkeypatch):
    words = "--data_set tests.tiny:poisoned --epochs 3 --max_bad_steps 0 --aa none"
    with pytest.raises(TrainingStopped):
        run("finetune", words, tmp_path / "bad")
    assert (tmp_path / "bad" / "report.html").exists()
    monkeypatch.setattr(main_finetune, "train_one_epoch", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("finetune", "", tmp_path / "none")
    assert not (tmp_path / "none" / "report.html").exists()


def test_no_report_without_a_folder_or_in_one_that_another_run_took_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("finetune", "", "none")
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(html_report.run_lock, "is_taken_over", lambda: True)
    run("finetune", "", tmp_path / "lost")
    assert not (tmp_path / "lost" / "report.html").exists()
