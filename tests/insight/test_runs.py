# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""visualize.py runs: which folders are runs, what is known of each, their order, bad input."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import views
from config.run_files import SILENCE
from errors import UserError
from insight import runs
from insight.run_data import read_run
from insight.runs import describe, find_runs, sort_runs
from training.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"model": "convnextv2_atto", "epochs": 3}
RECORD = {
    "version": 1, "script": "main_finetune", "status": "finished", "error": None, "recipe": "tiny",
    "start": "2026-11-30T14:00:00Z", "end": "2026-11-30T15:01:02Z", "seconds": 3662.0,
    "arguments": FLAGS, "epochs_done": 3, "final": {"test_acc1": 70.0},
    "best": {"test_acc1": {"value": 80.0, "epoch": 2, "lower_is_better": False}},
}  # fmt: skip


def write(folder: Path, record: dict | str | None, *lines: dict | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if record is not None:
        text = record if isinstance(record, str) else json.dumps(record)
        (folder / "run.json").write_text(text)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log.txt").write_text("".join(f"{text}\n" for text in texts))
    return folder


def epochs(name: str, *values: float) -> list[dict]:
    return [{name: value, "epoch": number, "lr": 0.1} for number, value in enumerate(values)]


def printed(capsys, *words: str) -> str:
    runs.print_runs(views.parse_runs(list(map(str, words))))
    return capsys.readouterr().out


def test_table_has_a_line_a_run_and_the_newest_first(tmp_path, capsys):
    write(tmp_path / "a", RECORD, *epochs("test_acc1", 60, 80, 70))
    later = RECORD | {"start": "2026-12-01T00:00:00Z", "script": "main_pretrain", "best": {}}
    later |= {"recipe": None, "status": "stopped", "epochs_done": 1, "final": {"train_loss": 0.5}}
    write(tmp_path / "b" / "c", later, *epochs("train_loss", 0.5))
    head, *rows = [line.split() for line in printed(capsys, tmp_path).splitlines()]
    assert head[:6] == ["RUN", "SCRIPT", "MODEL", "RECIPE", "STATUS", "EPOCHS"]
    texts = [" ".join(row[:9]) for row in rows]
    assert texts[0] == "b/c pretrain convnextv2_atto - stopped 1/3 train_loss 0.5 0.5"
    assert texts[1] == "a finetune convnextv2_atto tiny finished 3/3 test_acc1 70 80"
    assert rows[1][9:12] == ["(epoch", "2)", "1:01:02"]


def test_run_without_the_metric_is_in_the_table(tmp_path, capsys):
    """A run that had not finished an epoch, or lacked the metric of --sort, was a traceback."""
    write(tmp_path / "a", RECORD | {"script": "main_pretrain", "best": {}, "final": {}})
    write(tmp_path / "b", RECORD, *epochs("test_acc1", 60, 80, 70))
    for words in ((), ("--sort", "test_acc1")):
        rows = printed(capsys, tmp_path, *words).splitlines()[1:]
        (line,) = [row.split() for row in rows if row.startswith("a ")]
        assert line[6:9] == [words[1] if words else "-", "-", "-"]


def test_time_zone_of_the_machine_is_used(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert runs._local("2026-11-30T14:00:00Z") == "2026-11-30 23:00"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("metric", "order"),
    [
        ("test_acc1", ["b", "a", "c", "d"]),  # 90, 80 and 50, and one that lacks it
        ("test_loss", ["c", "a", "b", "d"]),  # the lowest first
    ],
)
def test_best_run_comes_first(tmp_path, metric, order):
    for name, accuracies, losses in (
        ("a", (80, 60), (2, 4)),
        ("b", (70, 90), (3, 3)),
        ("c", (50, 50), (9, 1)),
    ):
        pairs = zip(epochs("test_acc1", *accuracies), epochs("test_loss", *losses), strict=True)
        write(tmp_path / name, RECORD | {"best": {}}, *(one | other for one, other in pairs))
    write(tmp_path / "d", RECORD | {"best": {}, "final": {}}, *epochs("train_loss", 0.1))
    assert [run.name for run in sort_runs(find_runs(tmp_path), metric)] == order


def test_run_says_of_its_own_metric_that_lower_is_better(tmp_path):
    for name, value in (("a", 5), ("b", 3)):
        best = {"test_cost": {"value": value, "epoch": 1, "lower_is_better": True}}
        write(tmp_path / name, RECORD | {"best": best}, *epochs("test_cost", value, value + 1))
    found = sort_runs(find_runs(tmp_path), "test_cost")
    assert [(run.name, run.metrics["test_cost"].best) for run in found] == [("b", 3), ("a", 5)]


def test_direction_of_each_metric_is_that_of_the_training():
    """insight/runs.py loads no torch, so it has names of its own."""
    for name, make in METRICS.items():
        metric = make()
        if metric.best:
            expected = "min" if metric.best == "lowest" else "max"
            assert runs.goal_of(f"test_{name}") == expected, name
            assert runs.goal_of(f"test_b_{name}_ema") == expected, name


def test_the_run_with_the_fewest_idle_channels_is_the_best(tmp_path):
    names = ("dead_channels", "saturated_channels", "skipped_steps")
    for run, value in (("a", 9.0), ("b", 2.0)):
        write(tmp_path / run, RECORD, {"epoch": 0, **dict.fromkeys(names, value)})
    for name in names:
        found = sort_runs(find_runs(tmp_path), name)
        assert [(run.name, run.metrics[name].best) for run in found] == [("b", 2), ("a", 9)]


def test_no_learning_rate_or_share_of_the_time_is_the_best(tmp_path):
    """The run that waits longest for its data would be called the best."""
    for name, values in (("a", (0.9, 0.1)), ("b", (0.2, 0.3))):
        write(tmp_path / name, RECORD | {"best": {}}, *epochs("time_data", *values))
    found = sort_runs(find_runs(tmp_path), "time_data")
    held = [(run.name, *vars(run.metrics["time_data"]).values()) for run in found]
    assert held == [("b", 0.3, None, None), ("a", 0.1, None, None)]


def test_run_without_a_log_has_the_values_of_its_record(tmp_path):
    folder = write(tmp_path / "run", RECORD)
    (folder / "log.txt").unlink()
    assert describe(read_run(folder)).metrics == {"test_acc1": runs.Value(70.0, 80.0, 2.0)}


def test_unknown_metric_names_those_there_are(tmp_path):
    write(tmp_path / "a", RECORD, *epochs("test_acc1", 1))
    with pytest.raises(UserError, match=r"'test_acc'.*Did you mean 'test_acc1'.*lr, test_acc1"):
        sort_runs(find_runs(tmp_path), "test_acc")
    write(tmp_path / "a", RECORD | {"final": {}, "best": {}})
    with pytest.raises(UserError, match="no metrics yet"):
        sort_runs(find_runs(tmp_path), "test_acc1")


def test_run_without_a_record_is_known_by_its_flags_and_log(tmp_path):
    """Those of earlier versions."""
    folder = write(tmp_path, None, *epochs("test_acc1", 5, 7, 6))
    text = "# recipe tiny_ft: --epochs 9\nmodel: convnextv2_nano\nepochs: 9\nmixup: 0.0\n"
    (folder / "args.yaml").write_text(text)
    (run,) = find_runs(tmp_path)
    assert (run.script, run.model, run.recipe) == ("main_finetune", "convnextv2_nano", "tiny_ft")
    assert (run.epochs_done, run.epochs, run.start, run.seconds) == (3, 9, "", None)
    assert run.metrics["test_acc1"] == runs.Value(6, 7, 2)
    assert run.name == tmp_path.name  # of the folder itself
    assert "-" in runs._cells(run, "test_acc1")


def test_folder_with_only_a_log_is_no_run(tmp_path):
    write(tmp_path / "other", None, *epochs("x", 1))
    write(tmp_path / ".hidden", RECORD)
    with pytest.raises(UserError, match="no run in .*run.json, or log.txt with args.yaml"):
        find_runs(tmp_path)


@pytest.mark.parametrize("text", ["", '{"version": 1, "argu', "[1]", '{"arguments": 3}', "\0"])
def test_damaged_record_is_noted_and_the_rest_is_listed(text, tmp_path, capsys):
    write(tmp_path / "a", text, *epochs("test_acc1", 5))
    (tmp_path / "a" / "args.yaml").write_text("model: convnextv2_nano\nepochs: 9\n")
    write(tmp_path / "b", RECORD)
    runs.print_runs(views.parse_runs([str(tmp_path)]))
    out, err = capsys.readouterr()
    assert f"note: {tmp_path / 'a'}: run.json cannot be read" in err
    assert "convnextv2_nano" in out
    assert len(out.splitlines()) == 3
    (tmp_path / "a" / "args.yaml").unlink()  # nor is the number of epochs known
    runs.print_runs(views.parse_runs([str(tmp_path)]))
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_half_a_line_and_lists_are_left_out(tmp_path):
    lines = [*epochs("test_acc1", 5), '{"epoch": 1, "test_ac', "[]", '"x"', '{"test_acc1": 9}']
    lines += ['{"after_epochs": 1.5, "test_acc1": null, "test_confusion": [[1]], "alarms": ["a"]}']
    run = describe(read_run(write(tmp_path, None, *lines)))
    assert (run.epochs_done, run.metrics["test_acc1"]) == (1.5, runs.Value(5, 5, 1))
    assert {*run.metrics} == {"test_acc1", "lr"}


@pytest.mark.parametrize(
    ("status", "age", "shown"),
    [
        ("running", 0, "running"),
        ("running", SILENCE + 9, "killed"),  # it could not note its end
        ("running", None, "killed"),
        ("finished", None, "finished"),
    ],
)
def test_run_without_heartbeat_was_killed(status, age, shown, tmp_path):
    write(tmp_path, RECORD | {"status": status})
    if age is not None:
        (tmp_path / ".lock").write_text("")
        os.utime(tmp_path / ".lock", (time.time() - age,) * 2)
    assert read_run(tmp_path).status == shown


def test_json_has_all_metrics(tmp_path, capsys):
    write(tmp_path / "a", RECORD | {"seconds": None}, *epochs("test_acc1", 60, 80, 70))
    (found,) = json.loads(printed(capsys, tmp_path, "--json"))
    assert found["folder"] == str(tmp_path / "a")
    assert found["metrics"]["test_acc1"] == {"last": 70, "best": 80, "epoch": 2}
    assert (found["model"], found["epochs"], found["main"]) == ("convnextv2_atto", 3, "test_acc1")


def test_wrong_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_runs(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        find_runs(tmp_path / "file")


def test_commands_of_the_page_list_runs(tmp_path, monkeypatch, capsys):
    write(tmp_path / "runs" / "a", RECORD, *epochs("test_acc1", 60, 80, 70))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "insight.md").read_text(encoding="utf-8")
    section = page.partition("## What a run was")[2].partition("\n## ")[0]
    commands = re.findall(r"^python visualize.py (runs.*)$", section, re.MULTILINE)
    assert len(commands) == 3
    for line in commands:
        view, args = views.parse_view(shlex.split(line, comments=True))
        runs.print_runs(args)
        assert "test_acc1" in capsys.readouterr().out


def test_command_lists_runs_without_torch(tmp_path):
    """Loading torch takes longer than all else."""
    write(tmp_path / "a", RECORD, *epochs("test_acc1", 60, 80, 70))
    command = [sys.executable, "-X", "importtime", "visualize.py", "runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "80 (epoch 2)" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert loaded & {"torch", "numpy", "PIL", "yaml"} == set()
    command[4:] = ["runs", str(tmp_path / "b")]
    command[1:3] = []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("visualize.py: error: ")
