# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Runs whose images grow: what they build, and that an interruption changes nothing."""

from pathlib import Path

import pytest
import torch

import datasets
from config import parser as options
from errors import UserError
from tests import tiny
from tests.groups import results_of, run_ranks
from tests.test_deterministic import differing
from tests.test_end_to_end import FINETUNE, PRETRAIN, log, run
from tests.test_flags_act import BASE, MAINS, build
from training.costs import log_cost
from training.resume import compare_args
from training.setup import check_start

SIZES = "--input_size 16:0,24:2"
MORE = ["--epochs", 3, "--save_ckpt_num", 9, "--drop_path", "0.2", *SIZES.split()]
ENDING = ["--mixup", "0.8", "--mixup_off_epoch", 1, "--reprob", "0.5", "--aug_off_epoch", 1]
MORE += ["--data_set", "tests.test_progressive:many"]
BATCH = ["--batch_size", 8, "--progressive_batch", "true", "--update_freq", 1]
WORDS = {
    "main_pretrain.py": [*PRETRAIN, *MORE],
    "main_finetune.py": [*FINETUNE, *MORE, *ENDING, "--model_ema"],
}


def many(data_path: str, train: bool) -> tiny.Colors:
    return tiny.Colors(80 if train else 7)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "more"), [(0, []), (2, BATCH)])
@pytest.mark.parametrize("script", WORDS)
def test_run_interrupted_in_an_epoch_of_small_images_ends_alike(script, workers, more, tmp_path):
    folders = tmp_path / "whole", tmp_path / "parts"
    words = [*WORDS[script], "--num_workers", workers, *more]
    run(script, *words, "--output_dir", folders[0])
    run(script, *words, "--output_dir", folders[1], "--max_minutes", "1e-6", expect=75)
    (saved,) = folders[1].glob("checkpoint-0-seen-*.pth")
    assert 0 < torch.load(saved, weights_only=True)["state"]["samples_in_epoch"] < 72
    run(script, *words, "--output_dir", folders[1])
    ends = [torch.load(folder / "checkpoint-2.pth", weights_only=True) for folder in folders]
    ends = [{name: x for name, x in end.items() if name != "args"} for end in ends]
    assert differing(*ends) == []
    assert log(folders[0]) == log(folders[1])
    steps = [4, 4, 10] if more else [13, 13, 13]  # 80 images in batches of 18 and 8, or of 6
    assert ends[0]["state"]["global_step"] == sum(steps)


def ids_of_steps(batch_size: int) -> list[list[int]]:
    """Images of this rank in each batch of two epochs, whose batches differ."""
    words = [*WORDS["main_finetune.py"], *BATCH, "--batch_size", batch_size, "--epochs", 3]
    args = options.parse(options.finetune_parser(), [*map(str, words)])
    train, _, _ = datasets.build_datasets(args)
    batches, found = datasets.build_loader(train, True, args, "cpu"), []
    for epoch in (0, 2):
        batches.set_epoch(epoch)
        found += [ids.tolist() for _, _, ids in batches]
    return found


def ids_of_rank(rank: int, folder: Path) -> list[list[int]]:
    return ids_of_steps(8)


def test_steps_have_the_same_images_on_1_and_2_processes(tmp_path):
    run_ranks([ids_of_rank], 2, tmp_path)
    ranks = [results["ids_of_rank"] for results in results_of(tmp_path)]
    together = [sorted(a + b) for a, b in zip(*ranks, strict=True)]
    assert [len(ids) for ids in together] == [36] * 2 + [16] * 5
    assert together == [sorted(ids) for ids in ids_of_steps(16)]


@pytest.mark.parametrize("script", MAINS)
def test_resumed_run_keeps_its_sizes(script, tmp_path, monkeypatch):
    """Without the flag those of the run; another flag is a change that is told."""
    build(script, f"{SIZES} --epochs 3", folder := tmp_path / "run", monkeypatch)
    (folder / "checkpoint-2.pth").unlink()
    monkeypatch.setitem(BASE, script, BASE[script].replace("--input_size 16 ", ""))
    built = build(script, "--epochs 3", folder, monkeypatch)
    assert built.epochs == [2]
    assert built.sample().shape == (3, 16, 16)  # of epoch 0
    assert built.train.loader.dataset[2, 0][0].shape == (3, 24, 24)
    assert "--input_size 16:0,24:2" in built.text
    assert "input_size: 16:0,24:2\n" in (folder / "args.yaml").read_text()


def test_changed_sizes_are_told_as_one_flag():
    saved = {"input_size": (24, 24), "input_sizes": "16:0,24:2", "lr": 1.0}
    now = saved | {"input_size": (32, 32), "input_sizes": "16:0,32:2"}
    told = ["--input_size 16:0,32:2 (was 16:0,24:2)"]
    assert compare_args(saved, now, "x.pth", given={"input_size"}) == told
    assert compare_args(saved, now, "x.pth", given=set()) == []
    old = {"input_size": (24, 24), "lr": 1.0}  # of an earlier version
    now = old | {"input_sizes": ""}
    assert compare_args(old, now, "x.pth", given={"input_size"}) == []
    assert compare_args(old, saved, "x.pth", given={"input_size"}) == [
        "--input_size 16:0,24:2 (was (24, 24))"
    ]


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "mlp(hidden_dims=[4])"])
def test_network_of_one_size_is_refused_before_the_data_is_listed(name):
    for size, fits in (("32", True), ("16:0,32:2", False)):
        words = ["--model", name, "--data_set", "DIGITS", "--input_size", size]
        args = options.parse(options.finetune_parser(), words)
        if fits:
            check_start(args, None)
            continue
        with pytest.raises(UserError, match="takes no images of 16 x 16 pixels when it"):
            check_start(args, None)


class Picky(tiny.Other):
    """A network of the user's own, which fails at one size."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] == 24:
            raise ValueError("cannot divide it\nby 16")
        return super().forward(images)


def test_network_of_the_users_own_is_tried_with_each_size(caplog):
    """It ended after the epochs of smaller images."""
    words = ["--data_set", "DIGITS", "--model", "tests.test_progressive:Picky", "--epochs", "3"]
    sizes = "16:0,24:1,32:2"
    args = options.parse(options.finetune_parser(), [*words, "--input_size", sizes])
    with pytest.raises(UserError, match=f"{sizes}: .* 24 x 24 pixels .cannot divide it"):
        log_cost(args, Picky(10))
    assert log_cost(args, tiny.Other(10)) == 314
    assert "0.000 GMACs per 16x16 image, 0.000 GMACs per 24x24 image, 0.0" in caplog.text


@pytest.mark.parametrize("name", ["timm:resnet18", "convnextv2_atto", "torchvision:resnet18"])
def test_network_of_any_size_is_taken(name):
    words = ["--model", name, "--data_set", "DIGITS", "--input_size", "32:0,64:2"]
    check_start(options.parse(options.finetune_parser(), words), None)


def test_each_mask_grid_is_logged(tmp_path, monkeypatch):
    built = build("pretrain", "--input_size 16:0,24:1", tmp_path, monkeypatch)
    assert "16 x 16 pixels: 1 of 4 patches visible: mask ratio 0.750" in built.text
    assert "24 x 24 pixels: 3 of 9 patches visible: mask ratio 0.667" in built.text
    assert "train: 26 images, used at 16 x 16 pixels, after 1 epoch 24 x 24" in built.text
