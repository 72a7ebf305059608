# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""run.json: what it holds at the start, at saves, and at the end of finished and failed runs."""

import json
import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main_finetune
import main_pretrain
from config import parser as options
from data_loading.dataset import TransformedDataset
from errors import Preempted, TrainingStopped, UserError
from tests import fakes, tiny
from tests.test_end_to_end import FINETUNE, PRETRAIN, run
from training import run_record
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.hooks import Run
from training.resume import ResumePoint
from training.run_record import (
    as_json,
    best_of,
    build_run_record,
    describe_data,
    describe_end,
    describe_git,
)

KEYS = """
version script status error start end seconds arguments typed recipe seed mask_ratio git packages
python platform host device data parameters resumed_from finetuned_from epochs_done steps_done final
best updated sessions
"""


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def train(main, words: list, folder: Path, *more: str) -> dict:
    words = [*map(str, words), "--output_dir", str(folder), "--log_dir", "none", *more]
    with fakes.logged():
        main.main(options.parse(main.get_args_parser(), words))
    return record_of(folder)


def test_record_of_a_finished_pretraining(tmp_path):
    more = ["--patch_size", "8", "--mask_ratio", "0.6", "--input_size", "24", "--seed", "3"]
    found = train(main_pretrain, PRETRAIN, tmp_path, *more)
    assert {*found} == {*KEYS.split()}
    assert (found["version"], found["script"]) == (1, "main_pretrain")
    assert (found["status"], found["error"], found["seed"]) == ("finished", None, 3)
    assert found["start"] <= found["end"] == found["updated"]
    assert found["arguments"]["mask_ratio"] == 0.6
    assert found["mask_ratio"] == pytest.approx(6 / 9, abs=1e-6)  # 3 of 9 patches are visible
    assert "mask_ratio" in found["typed"]
    assert "drop_path" not in found["typed"]
    assert found["data"]["train"] == {
        "source": "tests.tiny:colors",
        "images": 26,
        "classes": None,
        "fingerprint": found["data"]["train"]["fingerprint"],
    }
    assert found["data"]["val"] is None
    assert (found["epochs_done"], found["steps_done"]) == (2, 8)
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert found["final"]["train_loss"] == log[-1]["train_loss"]
    assert found["best"] == {}
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["device"]["type"] == "cpu"
    assert found["device"]["processes"] == found["device"]["count"] == 1
    assert len(found["sessions"]) == 1


def test_record_of_a_finetuning_that_starts_from_weights(tmp_path):
    train(main_pretrain, PRETRAIN, tmp_path / "pre")
    words = [
        "--finetune",
        str(tmp_path / "pre"),
        "--recipe",
        "small_data_ft",
        "--warmup_epochs",
        "1",
    ]
    found = train(main_finetune, FINETUNE, tmp_path / "fine", *words)
    assert found["finetuned_from"] == str(tmp_path / "pre")
    assert (found["resumed_from"], found["mask_ratio"]) == (None, None)
    assert found["recipe"] == "small_data_ft"  # without its flags
    assert found["data"]["val"]["images"] == 7
    assert found["data"]["val"]["classes"] == 3
    log = [json.loads(line) for line in (tmp_path / "fine" / "log.txt").read_text().splitlines()]
    best = found["best"]["test_acc1"]
    assert best["value"] == max(entry["test_acc1"] for entry in log)
    assert log[int(best["epoch"]) - 1]["test_acc1"] == best["value"]
    assert found["final"]["test_acc1"] == log[-1]["test_acc1"]
    weights = torch.load(tmp_path / "fine" / "checkpoint-1.pth", weights_only=True)["model"]
    assert found["parameters"] == sum(weight.numel() for weight in weights.values())


def test_failing_run_notes_its_error(tmp_path):
    hook = ["--hook", "tests.fakes:Dies(step=7, error='of a test')"]
    with pytest.raises(TrainingStopped):
        train(main_finetune, FINETUNE, tmp_path, *hook)
    found = record_of(tmp_path)
    assert (found["status"], found["error"]) == ("failed", "of a test")
    assert (found["epochs_done"], found["final"].keys() >= {"test_acc1"}) == (1.75, True)
    assert found["end"] is not None


def test_epoch_without_its_line_in_the_log_is_not_done(tmp_path):
    """A run that failed in its last step or evaluation had an epoch that log.txt lacked."""
    with pytest.raises(TrainingStopped):
        train(main_finetune, FINETUNE, tmp_path, "--hook", "tests.fakes:Dies(step=4, error='x')")
    found = record_of(tmp_path)
    assert (found["epochs_done"], found["steps_done"]) == (0, 4)
    assert not (tmp_path / "log.txt").exists()


def test_stopped_run_says_so_and_continues_its_record(tmp_path, monkeypatch):
    words = [*FINETUNE, "--max_minutes", "1e-9"]
    with pytest.raises(Preempted):
        train(main_finetune, words, tmp_path)
    first = record_of(tmp_path)
    assert first["status"] == "stopped"
    assert "--max_minutes" in first["error"]
    found = train(main_finetune, FINETUNE, tmp_path)
    assert (found["status"], found["error"], found["epochs_done"]) == ("finished", None, 2)
    assert [each["status"] for each in found["sessions"]] == ["stopped", "finished"]
    assert found["start"] == first["start"]
    assert found["resumed_from"].startswith(str(tmp_path / "checkpoint-"))
    assert found["sessions"][0]["resumed_from"] is None
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["sessions"]))


def test_new_run_in_a_folder_has_no_earlier_sessions(tmp_path):
    """The run before it saved nothing, so this one does not continue it."""
    with pytest.raises(TrainingStopped):
        train(main_pretrain, PRETRAIN, tmp_path, "--hook", "tests.fakes:Dies(step=1, error='x')")
    found = train(main_pretrain, PRETRAIN, tmp_path)
    assert [each["status"] for each in found["sessions"]] == ["finished"]


def test_run_that_resumes_another_folder_begins_a_record(tmp_path):
    train(main_pretrain, PRETRAIN, tmp_path / "one", "--epochs", "1")
    found = train(main_pretrain, PRETRAIN, tmp_path / "two", "--resume", str(tmp_path / "one"))
    assert len(found["sessions"]) == 1
    assert found["resumed_from"] == str(tmp_path / "one" / "checkpoint-0.pth")
    assert found["epochs_done"] == 2


def test_record_is_refreshed_at_saves_within_an_epoch(tmp_path, monkeypatch):
    seen, real = [], CheckpointManager._save

    def save(*args, **kwargs):
        real(*args, **kwargs)
        found = record_of(tmp_path)
        seen.append((found["status"], found["end"], found["steps_done"]))

    monkeypatch.setattr(CheckpointManager, "_save", save)
    train(main_pretrain, PRETRAIN, tmp_path, "--save_ckpt_every_steps", "2", "--epochs", "1")
    assert seen == [("running", None, step) for step in (2, 4, 4)]


@pytest.mark.slow
def test_killed_run_is_noted_when_it_resumes(tmp_path):
    words = [*FINETUNE, "--output_dir", tmp_path, "--save_ckpt_every_steps", "1"]
    words += ["--finetune", ""]
    run("main_finetune.py", *words, "--hook", "tests.fakes:Dies(step=7)", expect=-9)
    killed = record_of(tmp_path)
    assert (killed["status"], killed["end"], killed["steps_done"]) == ("running", None, 6)
    run("main_finetune.py", *words)
    found = record_of(tmp_path)
    assert [each["status"] for each in found["sessions"]] == ["killed", "finished"]
    assert found["start"] == killed["start"]
    assert found["sessions"][0]["end"] is None


@pytest.mark.slow
def test_failure_of_another_process_ends_the_record(tmp_path):
    words = [*FINETUNE, "--data_set", "tests.tiny:fails", "--output_dir", tmp_path]
    run("main_finetune.py", *words, "--batch_size", 3, ranks=2, expect=2)
    found = record_of(tmp_path)
    assert found["status"] == "failed"
    assert found["end"] is not None
    assert found["device"]["processes"] == 2


def test_evaluation_leaves_the_record_of_the_run(tmp_path):
    train(main_finetune, FINETUNE, tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    train(main_finetune, FINETUNE, tmp_path, "--eval")
    assert (tmp_path / "run.json").read_bytes() == before


# --- parts --------------------------------------------------------------------------------------


def hook_in(folder: Path, point: ResumePoint | None = None, **flags) -> run_record.RunRecord:
    words = ["--data_set", "DIGITS", "--output_dir", str(folder)]
    args = options.parse(options.finetune_parser(), words).replace(**flags)
    hook = build_run_record(args, folder, point or ResumePoint(), {}, 5)
    hook.on_start(Run(args, folder, TrainState(), torch.device("cpu")))
    return hook


def test_damaged_record_is_reported_and_replaced(tmp_path, log):
    point = ResumePoint(str(tmp_path / "checkpoint-0.pth"), {n: {} for n in ("model", "optimizer")})
    point.checkpoint["state"] = {}
    (tmp_path / "run.json").write_text('{"sessions": [')
    hook_in(tmp_path, point).on_end(SimpleNamespace(error=None))
    assert "run.json is damaged" in log.text
    assert len(record_of(tmp_path)["sessions"]) == 1


def test_passwords_in_addresses_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    address = "https://me:hunter2@example.com/weights.pth"
    hook_in(tmp_path, finetune=address).on_end(SimpleNamespace(error=UserError(address)))
    text = (tmp_path / "run.json").read_text()
    assert "hunter2" not in text
    assert record_of(tmp_path)["finetuned_from"] == "https://***@example.com/weights.pth"


def test_values_that_json_lacks_are_none(tmp_path):
    hook = hook_in(tmp_path)
    state = TrainState(epoch=1, best={"best": float("inf")}, best_metric="loss")
    state.lower_is_better, hook.run.state = True, state
    stats = {"train_loss": float("nan"), "test_confusion": [[1]], "test_acc1": 5, "epoch": 0}
    hook.on_epoch(stats, state)
    found = record_of(tmp_path)
    assert found["final"] == {"train_loss": None, "test_acc1": 5}
    assert found["best"] == {"test_loss": {"value": None, "epoch": None, "lower_is_better": True}}


def test_flags_that_json_lacks_are_texts():
    """One with Inf would end the run."""
    flags = {"a": (math.inf, 1.5, True), "path": Path("x"), "none": None}
    assert as_json(flags) == {"a": ["inf", 1.5, True], "path": "x", "none": None}


def test_data_has_a_fingerprint_of_its_own():
    args = SimpleNamespace(data_set="mine")
    marks = [
        describe_data(TransformedDataset(tiny.Colors(count), None, 0, 3, 3), args)["fingerprint"]
        for count in (26, 26, 25)
    ]
    assert marks[0] is not None
    assert marks[0] == marks[1] != marks[2]


def test_best_metrics_have_their_names_and_epochs():
    """The epoch was that of the record and not of the metric."""
    state = TrainState(5, best={"best": 70.0, "best-ema": 72.0})
    state.best_epochs = {"best": 3, "best-ema": 4}
    assert best_of(state) == {
        "test_acc1": {"value": 70.0, "epoch": 3, "lower_is_better": False},
        "test_acc1_ema": {"value": 72.0, "epoch": 4, "lower_is_better": False},
    }


def test_resumed_run_keeps_its_origin_and_its_last_metrics(tmp_path):
    """A rerun without --finetune, which ends before its first epoch, had neither."""
    hook_in(tmp_path, finetune="weights.pth").on_end(SimpleNamespace(error=None))
    before = record_of(tmp_path)["finetuned_from"]
    saved = {"model": {}, "optimizer": {}, "state": {"stats": {"train_loss": 0.5}}}
    hook = hook_in(tmp_path, ResumePoint(str(tmp_path / "checkpoint-0.pth"), saved))
    hook.on_start(
        Run(hook.run.args, tmp_path, TrainState(1, stats={"train_loss": 0.5}), torch.device("cpu"))
    )
    hook.on_end(SimpleNamespace(error=None))
    found = record_of(tmp_path)
    assert before.endswith("weights.pth")
    assert (found["finetuned_from"], found["final"]) == (before, {"train_loss": 0.5})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, ("finished", None)),
        (KeyboardInterrupt(), ("stopped", "KeyboardInterrupt")),
        (ZeroDivisionError("x\ny"), ("failed", "ZeroDivisionError: x")),
    ],
)
def test_end_of_a_run(error, expected):
    assert describe_end(error) == expected


def test_process_that_another_ends_notes_it(tmp_path):
    hook = hook_in(tmp_path)
    hook._leave()
    assert record_of(tmp_path)["status"] == "failed"
    assert "another process" in record_of(tmp_path)["error"]


def test_run_that_lost_its_folder_writes_no_record(tmp_path, monkeypatch):
    hook = hook_in(tmp_path)
    (tmp_path / "run.json").unlink()  # and another run begins there
    monkeypatch.setattr(run_record.run_lock, "is_taken_over", lambda: True)
    hook.on_end(SimpleNamespace(error=None))
    assert not (tmp_path / "run.json").exists()


def git(folder: Path, *words: str) -> None:
    own = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-C", str(folder)]
    subprocess.run(["git", *own, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path) -> Path:
    git(tmp_path, "init", "-b", "main")
    (tmp_path / "errors.py").write_text("a\nb\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_git_state_counts_changes(repository):
    clean = describe_git(repository)
    assert (clean["branch"], clean["changed_files"], clean["diff_bytes"]) == ("main", 0, 0)
    assert len(clean["commit"]) == 40
    (repository / "errors.py").write_text("a\nc\n")
    (repository / "new.py").write_text("")
    (repository / "photo.jpg").write_text("")  # data is no code
    changed = describe_git(repository)
    assert (changed["commit"], changed["changed_files"]) == (clean["commit"], 2)
    command = ["git", "-C", str(repository), "diff", "HEAD"]
    diff = subprocess.run(command, check=True, capture_output=True).stdout
    assert (changed["diff_lines"], changed["diff_bytes"]) == (diff.count(b"\n"), len(diff))
    git(repository, "add", "errors.py")  # not committed, so the commit is still another code
    assert describe_git(repository) == changed


def test_git_runs_no_program_of_the_repository(repository):
    """A repository's settings may name programs, and a run only asks for its state."""
    mark, program = repository / "ran", repository / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    for name in ("core.fsmonitor", "diff.external", "diff.own.command", "diff.own.textconv"):
        git(repository, "config", name, str(program))
    (repository / ".gitattributes").write_text("*.py diff=own\n")
    (repository / "errors.py").write_text("other\n")
    assert describe_git(repository)["changed_files"] == 1
    assert not mark.exists()


@pytest.mark.parametrize("problem", ["no repository", "not its files", "no git", "slow"])
def test_without_git_there_is_no_state_and_no_error(problem, repository, monkeypatch, tmp_path):
    folder = repository
    if problem == "no repository":
        folder = Path("/")
    elif problem == "not its files":  # a virtual environment in a project of the user's
        folder = repository / "site-packages"
        folder.mkdir()
        (folder / "errors.py").write_text("")
    elif problem == "no git":
        monkeypatch.setenv("PATH", os.devnull)
    else:
        monkeypatch.setattr(run_record, "GIT_SECONDS", 1e-9)
    assert describe_git(folder) is None


def test_environment_names_no_other_repository(repository, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    git(other, "init")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert describe_git(repository)["branch"] == "main"
