# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The images of the highest losses: exact, whatever the batches and ranks."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_finetune
from config import parser as options
from tests import fakes
from tests.groups import results_of, run_ranks
from training.worst_images import Worst

LOSSES = [0.5, 3.0, 0.1, 3.0, math.nan, 2.0, 0.0]


def add(worst: Worst, ids: list[int]) -> None:
    losses = torch.tensor([LOSSES[n] for n in ids])
    worst.add(torch.tensor(ids), losses, (torch.tensor(ids) * 10, losses[:, None].expand(-1, 2)))


def numbers(rows: torch.Tensor) -> list[int]:
    return rows[:, 1].int().tolist()


@pytest.mark.parametrize(
    "batches", [[range(7)], [[6, 5], [4, 3, 2], [1, 0]], [[n] for n in range(7)]]
)
def test_batches_do_not_matter(batches):
    """Of equal losses the lower number comes first, and NaN before all."""
    worst = Worst(4)
    for ids in batches:
        add(worst, [*ids])
    assert numbers(worst.merged()) == [4, 1, 3, 5]
    assert worst.merged()[:, 2].tolist() == [40, 10, 30, 50]


def test_only_the_worst_are_kept_in_memory():
    worst = Worst(2)
    for _ in range(5):
        add(worst, [0, 1, 2])
        assert len(worst.rows) == 2


def test_an_evaluation_without_images_has_no_worst_ones():
    assert len(Worst(3).merged()) == 0


def merged(rank: int, folder: Path) -> list:
    worst = Worst(3)
    if rank < 2:  # the third rank has no images
        add(worst, [*range(rank, 7, 2)])
    found = worst.merged()
    return [] if found is None else numbers(found)


def test_ranks_do_not_matter(tmp_path):
    found = results_of(run_ranks([merged], 3, tmp_path))
    assert [each["merged"] for each in found] == [[4, 1, 3], [], []]


def finetune(words: str) -> None:
    base = (
        "--model tests.tiny:classifier --data_set tests.tiny:colors --input_size 16 --device cpu "
        "--stem_stride 1 --batch_size 6 --num_workers 0 --warmup_epochs 0 --aa none --log_dir none"
    )
    with fakes.logged():
        main_finetune.main(options.parse(options.finetune_parser(), f"{base} {words}".split()))


def test_a_run_draws_them_at_its_best_and_last_epochs(tmp_path):
    """Of a metric that stays the same the first epoch is the best; the last is drawn anyway."""
    finetune(f"--epochs 3 --lr 0 --min_lr 0 --model_ema --model_ema_eval --output_dir {tmp_path}")
    found = sorted(path.name for path in (tmp_path / "worst_images").iterdir())
    assert found == ["epoch-0.png", "epoch-2.png"]
    assert Image.open(tmp_path / "worst_images/epoch-2.png").width > 4 * 128


def test_a_run_without_a_folder_collects_none(monkeypatch):
    monkeypatch.setattr(Worst, "add", lambda *words: 1 / 0)
    finetune("--epochs 1 --output_dir none")
