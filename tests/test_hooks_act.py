# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Whole runs with hooks: all of them change no bit, their states and files survive a resume."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks.chaos import untimed
from config import parser as options
from tests import fakes
from tests.tiny import CLASSES
from training import hook_table, run_lock

COMMON = (
    "--data_set tests.tiny:colors --data_path x --input_size 16 --stem_stride 1 --batch_size 6 "
    "--lr 0.01 --num_workers 0 --device cpu --kernels torch --print_freq 2 --drop_path 0.2 "
)
BASE = {
    "main_pretrain": f"{COMMON} --model tests.tiny:fcmae --decoder_embed_dim 8",
    "main_finetune": f"{COMMON} --model tests.tiny:classifier --model_ema --model_ema_eval",
}
LEFT_OUT = {"main_pretrain": ("graph", "predictions", "export"), "main_finetune": ("export",)}


def run(script: str, folder: Path, words: str = "") -> dict:
    """Run a script in this process; returns its last checkpoint."""
    fakes.CALLS.clear()
    main = importlib.import_module(script)
    words = f"{BASE[script]} --epochs 2 --output_dir {folder} {words}"
    try:
        main.main(options.parse(main.get_args_parser(), words.split()))
    finally:
        run_lock.acquire_run_lock("")
    newest = sorted(folder.glob("checkpoint-?.pth"))[-1]
    return torch.load(newest, weights_only=True)


def all_hooks(script: str) -> str:
    names = [name for name in hook_table.HOOKS if name not in LEFT_OUT[script]]
    names = [f"{name}(steps=1,skip=1)" if name == "profiler" else name for name in names]
    return f"--hook {' '.join(names)} --tracker tests.fakes:tracker"


def bits(checkpoint: dict) -> dict:
    names = ("model", "model_ema", "optimizer", "state")
    return {name: checkpoint[name] for name in names}


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert repr(ours) == repr(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("script", BASE)
def test_no_hook_changes_a_bit(script, tmp_path):
    """Nor one that draws random numbers, and sets seeds, at every point."""
    plain = run(script, tmp_path / "plain")
    generator = torch.get_rng_state()
    assert "hooks" not in plain
    watched = run(script, tmp_path / "watched", all_hooks(script))
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same(bits(plain), bits(watched))
    assert watched["hooks"] == {"tests.fakes:tracker": {"name": "own name", "id": "id7"}}
    plain_log, watched_log = (untimed(tmp_path / name / "log.txt") for name in ("plain", "watched"))
    assert plain_log == watched_log
    assert_same(bits(plain), bits(run(script, tmp_path / "d", "--hook tests.fakes:Disturbing")))


@pytest.mark.slow
def test_resumed_run_continues_its_hooks(tmp_path):
    words = "--hook tests.fakes:Counter csv predictions --tracker tests.fakes:tracker"
    first = run("main_finetune", tmp_path, f"{words} --epochs 1")
    assert first["hooks"]["tests.fakes:Counter"] == {"steps": 4}
    second = run("main_finetune", tmp_path, words)
    assert second["hooks"]["tests.fakes:Counter"] == {"steps": 8}
    assert fakes.CALLS[0][1]["id"] == "id7"
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        assert {name: float(value) for name, value in row.items()} == line


@pytest.mark.slow
def test_predictions_agree_with_the_accuracy_of_training_and_of_eval(tmp_path):
    run("main_finetune", tmp_path, "--epochs 1 --hook predictions")
    last = json.loads((tmp_path / "log.txt").read_text())
    files = {"": "predictions.csv", "_ema": "predictions-ema.csv"}
    before = {name: (tmp_path / name).read_text() for name in files.values()}
    for ending, name in files.items():
        rows = list(csv.DictReader((tmp_path / name).open()))
        assert [row["path"] for row in rows] == [f"number {index}" for index in range(7)]
        names = ("red", "green", "blue")
        assert [row["target"] for row in rows] == [names[i % CLASSES] for i in range(7)]
        right = sum(row["target"] == row["prediction"] for row in rows)
        assert last[f"test_acc1{ending}"] == pytest.approx(100 * right / 7)
        (tmp_path / name).unlink()
    run("main_finetune", tmp_path, "--eval --hook predictions costs")
    assert {name: (tmp_path / name).read_text() for name in before} == before


@pytest.mark.slow
def test_hooks_of_eval_see_the_evaluated_weights_from_their_start(tmp_path):
    """They saw random ones in on_start."""
    run("main_finetune", tmp_path)
    run("main_finetune", tmp_path, "--eval --hook tests.fakes:Weights")
    files = {"model": "checkpoint-best.pth", "model_ema": "checkpoint-best-ema.pth"}
    own, average = (
        torch.load(tmp_path / name, weights_only=True)[key]["head.weight"].tolist()
        for key, name in files.items()
    )
    assert own != average
    wanted = [("", "", own), ("test", "", own), ("test", "ema", average)]
    assert wanted == fakes.CALLS
