# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Data sets of torchvision by name, with small files in the formats that they publish."""

import struct

import numpy as np
import pytest
from PIL import Image

import datasets
from data_loading.sources import DatasetSpec
from data_loading.split import list_labels
from data_loading.torchvision_sets import torchvision_set
from errors import UserError


def write_mnist(root):
    """Write 6 training and 4 test images in the IDX format."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 6), ("t10k", 4)):
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28).tobytes()
        head = struct.pack(">4I", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + pixels)
        labels = bytes(range(count))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + labels)


def write_folders(root, *classes):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (label, 0, 0)).save(root / name / "1.JPEG")


def test_parts_are_told_by_train(tmp_path):
    write_mnist(tmp_path)
    spec = DatasetSpec(str(tmp_path))
    train, val = (
        datasets.create_dataset("torchvision:MNIST", spec, part) for part in (True, False)
    )
    assert (len(train), len(val)) == (6, 4)
    assert list_labels(train).tolist() == [0, 1, 2, 3, 4, 5]
    assert train[3][1] == 3
    assert train[3][0].getpixel((0, 0)) == 3
    assert len(train.classes) == 10


def test_parts_are_told_by_split(tmp_path):
    """Of sets with another name for the evaluation, the training images would be evaluated."""
    for split, classes in (("train", 2), ("val", 1)):
        write_folders(tmp_path / "imagenette2" / split, *["n01440764", "n02102040"][:classes])
    name = "torchvision:Imagenette"
    assert [len(torchvision_set(name, str(tmp_path), part)) for part in (True, False)] == [2, 1]
    fixed = f"{name}(split=val)"  # for training
    assert [len(torchvision_set(fixed, str(tmp_path), part)) for part in (True, False)] == [1, 1]


def test_set_without_parts_is_never_evaluated_on_training_images(tmp_path):
    write_folders(tmp_path / "eurosat" / "2750", "Forest", "River")
    data = torchvision_set("torchvision:EuroSAT", str(tmp_path), True)
    assert (len(data), data.class_to_idx) == (2, {"Forest": 0, "River": 1})
    assert data.samples[1][0].endswith("River/1.JPEG")
    with pytest.raises(UserError, match="no images of its own for evaluation; give --val_split"):
        torchvision_set("torchvision:EuroSAT", str(tmp_path), False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MNST", "--data_set: unknown data set of torchvision 'MNST'. Did you mean 'MNIST'"),
        ("MNIST(1)", "expected named arguments"),
        ("HMDB51", "give the arguments that it needs: .*annotation_path"),
        ("DTD(colour=1)", "cannot open it in .*colour"),
        ("Food101(download=False)", "cannot open it in .*Dataset not found.*; place its files"),
    ],
)
def test_refusals(name, said, tmp_path):
    with pytest.raises(UserError, match=said):
        torchvision_set(f"torchvision:{name}", str(tmp_path), True)


def test_failure_of_the_main_process_reaches_the_others(tmp_path, monkeypatch):
    """Only a UserError is sent to them; after another one they would wait for an hour."""

    def first(find):
        with pytest.raises(UserError, match="cannot open it in .*Dataset not found"):
            find()
        raise UserError("sent")

    monkeypatch.setattr("data_loading.torchvision_sets.main_process_first", first)
    with pytest.raises(UserError, match="sent"):
        torchvision_set("torchvision:Food101(download=False)", str(tmp_path), True)
