# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Whole runs with --profile: training, --dry_run and several processes."""

import json
import re
from pathlib import Path

import pytest

import main_finetune
import main_pretrain
from config import parser as options
from tests.groups import run_script
from training import dry_run, run_lock

COMMON = (
    "--data_set tests.tiny:colors --data_path x --input_size 16 --stem_stride 1 --batch_size 6 "
    "--lr 0.01 --num_workers 0 --device cpu --kernels torch --save_ckpt false --log_dir none"
)
PRETRAIN = f"--model tests.tiny:fcmae --decoder_embed_dim 8 {COMMON}"
FINETUNE = f"--model tests.tiny:classifier --disable_eval {COMMON}"


def run(main, words: str) -> None:
    try:
        main.main(options.parse(main.get_args_parser(), words.split()))
    finally:
        run_lock.acquire_run_lock("")


def steps_in(folder: Path) -> list[str]:
    """Names of the steps in the trace; fails unless trace and table are what they should be."""
    events = json.loads((folder / "profile.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert "aten::mm" in names
    head, *_ = (folder / "profile.txt").read_text().splitlines()[1:]
    assert head.split()[:2] == ["Name", "Self"]
    return sorted(name for name in names if name.startswith("ProfilerStep"))


@pytest.mark.slow
def test_profile_of_a_run_is_said_to_be_there_at_its_end(tmp_path, capsys):
    run(main_pretrain, f"{PRETRAIN} --epochs 4 --output_dir {tmp_path} --profile")
    assert steps_in(tmp_path)[:2] == ["ProfilerStep#11", "ProfilerStep#12"]
    *files, last = capsys.readouterr().out.splitlines()[-3:]
    assert any(f"{tmp_path}/profile.json" in line for line in files)
    assert "4 of 4 epochs done" in last


def test_run_without_the_flag_writes_no_profile(tmp_path):
    run(main_finetune, f"{FINETUNE} --epochs 1 --output_dir {tmp_path}")
    assert not list(tmp_path.glob("profile*"))


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--profile", ""])
def test_dry_run_writes_the_profile_alone(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "SECONDS", 0.01)
    monkeypatch.setattr(dry_run, "DECODE_SECONDS", 0.01)
    folder = tmp_path / "run"
    run(main_finetune, f"{FINETUNE} --update_freq 2 --output_dir {folder} --dry_run {flag}")
    said = "only the profile" if flag else "nothing"
    assert f"writes {said} to --output_dir" in capsys.readouterr().out
    assert folder.exists() is bool(flag)
    if flag:
        assert {path.name for path in folder.iterdir()} == {"profile.json", "profile.txt"}
        assert steps_in(folder) == ["ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"]


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--dry_run"])
def test_first_of_two_processes_writes_the_profile(more, tmp_path):
    """The other one would write over its files, or wait for it."""
    words = f"{PRETRAIN} --epochs 8 --output_dir {tmp_path} --profile {more}"
    output = run_script("main_pretrain.py", *words.split(), ranks=2, folder=tmp_path)
    assert "a trace of" in output
    assert more or re.search(r"  comm \d+%  ", output)
    assert steps_in(tmp_path)
    assert len(list(tmp_path.glob("profile*"))) == 2
