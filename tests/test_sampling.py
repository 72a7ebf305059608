# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Runs with --num_samples, --aug_repeats and --label_fraction; units are in tests/data_loading."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.parallel.test_sharding import assert_same_run, distance, train
from tests.test_engines import finetune, pretrain
from training.checkpoint_manager import CheckpointManager

SAMPLED = "--num_samples 40 --aug_repeats 3"  # two steps of 16 images
LABELED = (
    f"{SAMPLED} --label_fraction 0.6 --sampling balanced --data_set tests.test_sampling:listed"
)
RUNS = {pretrain: f"{SAMPLED} --picture_freq 0", finetune: LABELED}


class Listed(tiny.Colors):
    """Colors that list their labels."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.targets = [index % tiny.CLASSES for index in range(length)]


def listed(data_path: str, train: bool) -> Listed:
    """26 images to train on, 7 to evaluate."""
    return Listed(26 if train else 7)


class Killed(BaseException):
    """Ends a run like SIGKILL: nothing is saved."""


def weights_of(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"checkpoint-{epoch}.pth", weights_only=True)["model"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_run_killed_within_an_epoch_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    """It resumes after 10 images, the first of the three times of the fourth image."""
    words = f"{RUNS[run]} --batch_size 5 --epochs 2 --save_ckpt_every_steps 1 --log_dir none"
    run(f"{words} --output_dir {tmp_path / 'whole'}")
    real, calls = CheckpointManager.after_step, []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 11:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointManager, "after_step", killing)
        with pytest.raises(Killed):
            run(f"{words} --output_dir {tmp_path / 'killed'}")
    saved = {path.name for path in (tmp_path / "killed").glob("checkpoint-*.pth")}
    assert "checkpoint-1-seen-10.pth" in saved
    run(f"{words} --output_dir {tmp_path / 'killed'}")
    assert distance(*(weights_of(tmp_path / name, 1) for name in ("whole", "killed"))) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"), [("main_pretrain.py", SAMPLED), ("main_finetune.py", LABELED)]
)
def test_processes_and_workers_change_no_weight(script, words, tmp_path):
    for name, processes, workers in (("one", 1, 0), ("workers", 1, 2), ("two", 2, 2)):
        more = [*words.split(), "--num_workers", workers]
        train(script, tmp_path / name, processes, 16 // processes, 1, *more)
    assert distance(weights_of(tmp_path / "one", 2), weights_of(tmp_path / "workers", 2)) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
