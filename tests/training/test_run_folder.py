# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The folder of a run that was given none."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from config import parser as options
from errors import UserError
from parallel import console, process_group
from tests.test_end_to_end import FINETUNE, PRETRAIN, ROOT, run
from training import run_folder, setup

DIGITS = ["--data_set", "DIGITS", "--device", "cpu"]
NOON = 1796040600.0  # seconds
NAME = r"runs/(pretrain|finetune)-[\w.-]+-\d{8}-\d{4}(-\d+)?"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process_group, "_stores", [])  # other tests of this process leave theirs


def parse(kind: str, *words: str):
    parser = getattr(options, f"{kind}_parser")()
    return options.parse(parser, [*DIGITS, *words])


def test_name_has_script_model_and_time():
    for kind, model, expected in (
        ("pretrain", "convnextv2_atto", "pretrain-convnextv2_atto"),
        ("finetune", "my.nets:tiny", "finetune-my.nets-tiny"),
    ):
        name = str(run_folder.folder_name(parse(kind), model, NOON))
        assert re.fullmatch(rf"runs/{expected}-\d{{8}}-\d{{4}}", name)


def test_folder_of_another_run_is_never_used(monkeypatch):
    """Two runs that start in the same minute."""
    monkeypatch.setattr(run_folder.time, "time", lambda: NOON)
    made = [run_folder.create_run_folder(parse("pretrain"), "m") for _ in range(3)]
    assert made == [made[0], f"{made[0]}-2", f"{made[0]}-3"]
    assert all(Path(folder).is_dir() for folder in made)


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot create runs/.* give --output_dir FOLDER, or"):
        run_folder.create_run_folder(parse("pretrain"), "m")


@pytest.mark.parametrize("words", ["--output_dir none", "--output_dir="])
def test_run_that_shall_write_nothing_creates_nothing(words, tmp_path):
    run_setup = setup.setup_run(parse("pretrain", *words.split()), torch.device("cpu"), "none")
    assert run_setup.output_dir is None
    assert list(tmp_path.iterdir()) == []


def test_dry_run_names_a_folder_and_creates_none(tmp_path):
    run_setup = setup.setup_run(parse("pretrain", "--dry_run"), torch.device("cpu"), "none")
    assert re.fullmatch(NAME, str(run_setup.output_dir))
    assert list(tmp_path.iterdir()) == []


def test_unused_folder_is_removed_and_a_used_one_stays(tmp_path):
    for name in ("unused", "used"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "console.log").write_text("error")
    (tmp_path / "used" / "args.yaml").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("unused", "used", "empty", "missing"):
        run_folder.remove_if_unused(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_command_to_continue_names_a_folder_that_was_not_typed():
    typed = parse("pretrain", "--output_dir", "runs/x")
    assert run_folder.how_to_continue(typed) == "rerun the same command"
    chosen = parse("pretrain").replace(output_dir="runs/y")
    assert run_folder.how_to_continue(chosen) == "rerun the command with --output_dir runs/y"


def folder_of(output: str) -> str:
    """The folder in a run's first line."""
    return re.match(rf"({NAME}): a new run; to continue it, add --output_dir \1\n", output)[1]


def test_interrupted_run_continues_with_the_folder_it_named(tmp_path):
    """Without --output_dir everything was lost, and Ctrl-C said that the same command goes on."""
    words, env = [*PRETRAIN, "--log_dir", "none"], {"PYTHONPATH": str(ROOT)}
    stop = ["--max_minutes", 1e-6]
    done = run("main_pretrain.py", *words, *stop, expect=75, folder=True, cwd=tmp_path, env=env)
    folder = folder_of(done.stdout)
    again = f"Exit code 75: rerun the command with --output_dir {folder} to continue"
    assert again in done.stderr
    assert again in (tmp_path / folder / "console.log").read_text()
    done = run("main_pretrain.py", *words, "--output_dir", folder, cwd=tmp_path, env=env)
    assert f"resumed from {folder}/checkpoint-0-seen-6.pth, in epoch 1, step 1\n" in done.stdout
    log = (tmp_path / folder / "console.log").read_text()
    assert log.replace(console.WARNING, "").endswith(done.stdout)
    assert log.count("--- ") == 2
    assert done.stdout.splitlines()[-1].startswith(f"{folder}: 2 of 2 epochs done; train_loss")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(folder).name]


def test_two_processes_share_a_folder_and_the_last_line_gives_a_command_that_works(tmp_path):
    words, env = [*FINETUNE, "--batch_size", 3, "--log_dir", "none"], {"PYTHONPATH": str(ROOT)}
    done = run("main_finetune.py", *words, ranks=2, folder=True, cwd=tmp_path, env=env)
    folder = folder_of(done.stdout)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(folder).name]
    last = done.stdout.splitlines()[-1]
    best = re.search(r"best top-1 ([\d.]+)% in epoch [12]; next: python (.*)", last)
    script, *words = best[2].split()
    done = run(script, *words, cwd=tmp_path, env=env)
    assert f"{folder}/checkpoint-best.pth: top-1 {best[1]}%, loss" in done.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(folder).name]


def test_start_that_fails_leaves_no_folder(tmp_path):
    env = {"PYTHONPATH": str(ROOT)}
    words = [*FINETUNE, "--nb_classes", 2]
    done = run("main_finetune.py", *words, expect=2, folder=True, cwd=tmp_path, env=env)
    assert "--nb_classes 2" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_processes_that_torchrun_starts_again_keep_their_folder(monkeypatch):
    """They would begin a run of their own."""
    monkeypatch.setattr(process_group, "_stores", [dist.HashStore()])
    first, again = (run_folder.create_run_folder(parse("pretrain"), "m") for _ in range(2))
    assert again == first
