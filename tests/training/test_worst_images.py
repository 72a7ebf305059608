# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The images of the highest losses: exact, whatever the batches and ranks."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import main_finetune
from config import parser as options
from data_loading.dataset import TransformedDataset
from data_loading.loader import DeviceLoader
from data_loading.workers import WatchedLoader
from tests import fakes, tiny
from tests.groups import results_of, run_ranks
from training import worst_images
from training.hooks import Batch
from training.worst_images import Worst, WorstImages, describe_errors, draw_rows

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


def batch(ids: list[int], loss: float) -> Batch:
    outputs = torch.tensor([[0.0, 2.0]]).expand(len(ids), 2)
    losses = torch.full((len(ids), 2), loss / 2)  # of two terms
    return Batch(torch.zeros(len(ids), 3, 8, 8), torch.zeros(len(ids)), outputs, losses,
                 torch.tensor(ids))  # fmt: skip


def test_each_evaluation_has_its_own_worst_images():
    """Those of the first epoch have the highest losses, and would stay for the whole run."""
    images, loader = WorstImages("softmax", count=3), SimpleNamespace(device="cpu")
    for ids, loss in (([0, 1], 9.0), ([2, 3], 1.0)):
        images.begin(loader, "class")
        images.add(batch(ids, loss))
    rows = images.worst.merged()
    assert numbers(rows) == [2, 3]
    assert rows[:, 0].tolist() == [1.0, 1.0]  # the sum of the terms


def test_texts_name_target_and_prediction(monkeypatch):
    seen = []
    monkeypatch.setattr(worst_images, "draw_images", lambda *words: seen.append(words))
    data = TransformedDataset(tiny.Colors(9), lambda image: image, 0)
    loader = DeviceLoader(WatchedLoader(data, [], 1), "cpu", [0.5] * 3, [0.25] * 3)
    rows = torch.tensor([[2.5, 7, 0, 1, 0.75], [0.5, 3, 2, 0, 0.5]])
    draw_rows(rows, loader, "class", ("ant", "bee", "cat"))
    pictures, texts, paths, *_ = seen[0]
    assert texts == [
        "true: ant\npredicted: bee\np 0.75, loss 2.5",
        "true: cat\npredicted: ant\np 0.50, loss 0.5",
    ]
    assert paths == ["number 7", "number 3"]
    bright = [int(picture.mean((1, 2)).argmax()) for picture in pictures]
    assert bright == [7 % 3, 3 % 3]


def test_errors_of_numbers_have_no_sign():
    assert describe_errors([1.0, 3.5]) == "error 2.5"
    assert describe_errors([1.0, 2.0, 3.0, 1.5]) == "errors 2, 0.5"


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
