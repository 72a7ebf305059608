# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Transforms and mixing follow the epoch of a sample's key."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

import datasets
from config import parser as options
from data_loading.erasing import Erased
from data_loading.mixing import Mixing
from data_loading.stages import ByEpoch, by_epoch
from errors import UserError

WORDS = {
    "pretrain": "--model tests.tiny:fcmae",
    "finetune": "--model tests.tiny:classifier --reprob 1",
}
BUILD = {
    "pretrain": datasets.build_pretrain_dataset,
    "finetune": lambda args: datasets.build_dataset(True, args)[0],
}
PARSERS = {"pretrain": options.pretrain_parser, "finetune": options.finetune_parser}


def parse(kind: str, words: str):
    common = "--data_set tests.tiny:colors --stem_stride 1 --batch_size 6 --num_workers 0"
    words = f"{common} --epochs 4 {WORDS[kind]} {words}"
    return options.parse(PARSERS[kind](), words.split())


def test_one_part_needs_no_choice():
    parts = {0: "a", 3: "b"}
    assert [by_epoch(parts).at(epoch) for epoch in range(5)] == ["a", "a", "a", "b", "b"]
    assert by_epoch({0: len}) is len


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", PARSERS)
def test_images_have_the_size_of_their_epoch(kind, workers):
    """Workers that persist, an epoch that begins in its middle, and epochs in any order."""
    args = parse(kind, f"--input_size 16:0,16x24:1,32:3 --num_workers {workers}")
    loader = datasets.build_loader(BUILD[kind](args), True, args, "cpu")
    found = []
    for epoch, start in ((0, 0), (1, 0), (3, 12), (2, 0), (0, 12)):
        loader.set_epoch(epoch, start)
        shapes = [tuple(images.shape) for images, _, _ in loader]
        assert len(shapes) == 4 - start // 6
        found.append({*shapes})
    sides = [(16, 16), (16, 24), (32, 32), (16, 24), (16, 16)]
    assert found == [{(6, 3, *size)} for size in sides]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", PARSERS)
def test_batches_have_the_size_of_their_epoch(kind, workers):
    """Also after workers were replaced, and in an epoch that begins in its middle."""
    words = "--input_size 16:0,16x24:1,24:3 --batch_size 8 --progressive_batch"
    args = parse(kind, f"{words} --num_workers {workers}")
    loader = datasets.build_loader(BUILD[kind](args), True, args, "cpu")
    found = []
    for epoch, start in ((0, 0), (1, 0), (3, 0), (2, 12), (3, 8), (0, 2)):
        loader.set_epoch(epoch, start)
        batches = [tuple(images.shape) for images, _, _ in loader]
        assert len(batches) == len(loader)
        found.append(batches)
        if workers and epoch == 3:
            loader.loader._replace_workers(loader.loader.plan)
    small, middle, large = (18, 3, 16, 16), (12, 3, 16, 24), (8, 3, 24, 24)  # of 26 images
    assert found == [[small], [middle] * 2, [large] * 3, [middle], [large] * 2, [small]]


def test_data_must_fill_the_largest_batch():
    args = parse("finetune", "--input_size 8:0,32:3 --batch_size 8 --progressive_batch")
    with pytest.raises(
        UserError,
        match="26 training images, but one global batch takes 128 .* --progressive_batch false",
    ):
        datasets.build_loader(BUILD["finetune"](args), True, args, "cpu")


def test_evaluation_has_the_last_size():
    args = parse("finetune", "--input_size 16:0,16x24:1,32:3")
    _, val, _ = datasets.build_datasets(args)
    images, *_ = next(iter(datasets.build_loader(val, False, args, "cpu")))
    assert images.shape[1:] == (3, 32, 32)


def test_a_size_changes_no_other_epoch():
    """An image at 16 pixels is the same whether or not a larger size follows."""
    alone, first = (BUILD["finetune"](parse("finetune", f"--input_size {size}")) for size in
                    ("16 --aa none", "16:0,32:2 --aa none"))  # fmt: skip
    for epoch in (0, 1):
        assert torch.equal(alone[epoch, 3][0], first[epoch, 3][0])


def test_augmentation_ends_at_its_epoch():
    args = parse("finetune", "--input_size 16:0,32:3 --aug_off_epoch 2 --data_set DIGITS")
    transform = datasets.build_transform(True, args)
    assert isinstance(transform, ByEpoch)
    texts = [repr(transform.at(epoch)) for epoch in range(4)]
    assert ["RandAugment" in text for text in texts] == [True, True, False, False]
    assert ["((32, 32)," in text for text in texts] == [False, False, False, True]
    assert all("HorizontalFlip" in text for text in texts)
    data, _ = datasets.build_dataset(True, args)
    erased = [isinstance(data[epoch, 3][0], Erased) for epoch in range(4)]
    assert erased == [True, True, False, False]


def test_color_jitter_ends_too():
    args = parse("finetune", "--input_size 16 --aug_off_epoch 1 --aa none --color_jitter 0.4")
    transform = datasets.build_transform(True, args)
    assert ["ColorJitter" in repr(transform.at(epoch)) for epoch in (0, 1)] == [True, False]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_ends_at_its_epoch(mode):
    """Labels stay smoothed and soft, as timm has it, so that the loss is the same function."""
    mixing = Mixing(
        Mixup(1.0, num_classes=4, label_smoothing=0.2, mode=mode, prob=1.0), off_epoch=2
    )
    images = torch.rand(4, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 3])
    for epoch, mixed in ((0, True), (1, True), (2, False), (3, False), (1, True)):
        np.random.seed(0)
        new, targets = mixing(images.clone(), labels, epoch)
        assert mixing.is_on(epoch) is mixed
        assert torch.equal(new, images) is not mixed
        smooth = torch.full((4, 4), 0.05) + 0.8 * torch.eye(4)
        assert torch.allclose(targets, smooth) is not mixed
    assert Mixing(mixing.mixup).is_on(10_000)


def test_rows_of_labels_are_left_as_they_are():
    mixing = Mixing(Mixup(1.0, label_smoothing=0.0, prob=1.0), kind="multi", off_epoch=1)
    images, rows = torch.rand(2, 3, 8, 8), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    new, targets = mixing(images.clone(), rows, 1)
    assert torch.equal(new, images)
    assert torch.equal(targets, rows)
    assert not torch.equal(mixing(images.clone(), rows, 0)[0], images)
