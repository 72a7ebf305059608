# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parts of the training images, a fraction of each class: held out for evaluation, or trained on.

python main_finetune.py --data_set image_folder --data_path photos --val_split 0.1
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data_loading.images import Images
from data_loading.labels import class_names
from data_loading.mixed import Listed
from data_loading.rng import fold_in_each
from data_loading.samplers import rarest_classes
from errors import UserError
from parallel.process_group import get_logger

STREAM = 0x5EED  # of the draws; --seed does not change the split, so that runs can be compared
LABELED = 0x1ABE1  # of those of --label_fraction, which --seed changes


class Part(Dataset):
    """The samples of `dataset` at `indices`, an array of integers."""

    def __init__(self, dataset: Any, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices
        self.kind = getattr(dataset, "kind", None)
        if (names := class_names(dataset)) is not None:
            self.classes = names
        if isinstance(entries := getattr(dataset, "samples", None), Sequence):
            self.samples = _Entries(entries, indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]


class _Entries(Sequence):
    """The entries at `indices`, (path, label) of each sample; nothing is copied."""

    def __init__(self, entries: Sequence, indices: np.ndarray) -> None:
        self.entries, self.indices = entries, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.entries[int(self.indices[index])]


def split(dataset: Any, fraction: float, train: bool) -> Part:
    """Return the samples to train on, or those held out: about `fraction` of each class.

    The name of an image in the data alone decides, or the number of a sample without a name, so the
    samples stay in their part when others are added, whatever holds them. Each class with two
    images gives at least one to both parts; rows of a table with the same image stay together. Data
    sets that do not list their labels are split as a whole. UserError if no sample can be held out.
    """
    labels, draws = list_labels(dataset), _draws(dataset, STREAM)
    labels = np.zeros(len(dataset), int) if labels is None else labels
    first, images = _images(dataset)
    labels, draws = labels[first], draws[first]
    held = draws < fraction
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) == 1:
            held[places] = False
        elif held[places].all() or not held[places].any():
            lowest = places[draws[places].argmin()]
            held[places] = False
            held[lowest] = True
    if not held.any():
        raise UserError(
            f"--val_split {fraction:g}: no class has two images, so none can be held out; add "
            "images, or pass --disable_eval"
        )
    held = held[images]  # samples
    return Part(dataset, np.flatnonzero(~held if train else held))


def keep_fraction(dataset: Any, fraction: float, seed: int, kind: str) -> Part:
    """Return `fraction` of the samples of each class, rounded, and at least one.

    They are those with the lowest draws, which depend on the seed and the name of a file alone, so
    a smaller fraction is a part of a larger one. Of several labels the rarest decides, as for
    `samplers.balance`; numbers (kind `number`) are like one class. Rows of a table with the same
    image stay together. dataset: perhaps a part, as of `split`. UserError if the data set does not
    list its labels.
    """
    part = dataset if isinstance(dataset, Part) else Part(dataset, np.arange(len(dataset)))
    labels = _list_strata(part, kind)
    _, first, images = np.unique(
        _images(part.dataset)[1][part.indices], return_index=True, return_inverse=True
    )
    labels, draws = labels[first], _draws(part.dataset, LABELED, seed)[part.indices][first]
    indices = part.indices[lowest_draws(labels, draws, fraction)[images]]
    get_logger().info(
        "train: %s of %s images (--label_fraction %g, seed %d)",
        *(f"{len(held):,}" for held in (indices, part)),
        fraction,
        seed,
    )
    return Part(part.dataset, indices)


def lowest_draws(labels: np.ndarray, draws: np.ndarray, fraction: float) -> np.ndarray:
    """Choose `fraction` of the samples of each class, rounded, and at least one.

    labels: (N,). draws: (N,), the lowest of each class are chosen. Returns (N,) bool.
    """
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((draws, labels))  # class by class, the lowest draws first
    rank = np.empty(len(order), int)  # of a sample within its class
    rank[order] = np.arange(len(order)) - (counts.cumsum() - counts)[labels[order]]
    return rank < np.rint(fraction * counts).clip(min=1)[labels]


def _list_strata(dataset: Any, kind: str) -> np.ndarray:
    """Return the class of each sample of which each is to give its fraction."""
    if kind == "number":
        return np.zeros(len(dataset), int)
    labels = list_labels(dataset) if kind == "class" else list_values(dataset, "targets")
    if labels is None:
        raise UserError(
            "--label_fraction: the data set does not list its labels; give it a list `targets` "
            "with the label of each image, or drop --label_fraction"
        )
    if labels.ndim == 1:
        return labels
    return rarest_classes(torch.from_numpy(labels.astype(bool)))[0].numpy()


def _images(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the first sample of each image, and the number of the image of each sample.

    Rows of a table may have the same image; it counts as one of the class of the first row. In
    other sources images of the same name, as in two shards, are different ones.
    """
    if not (isinstance(dataset, Images) and dataset.names_files and len(dataset)):
        return np.arange(len(dataset)), np.arange(len(dataset))
    names = dataset.names  # in order, so that the same ones are neighbors
    first = names.runs(names.ends[:-1], names.ends[1:])[1]
    return first, np.repeat(np.arange(len(first)), np.diff(np.append(first, len(names))))


def _draws(dataset: Any, *numbers: int) -> np.ndarray:
    """Return a number from 0 to 1 for each sample, which depends on its name alone.

    numbers: the seed.
    """
    words = np.arange(len(dataset))
    if isinstance(dataset, Listed):
        words = np.fromiter(map(zlib.crc32, dataset.encoded_names()), np.int64, len(dataset))
    return fold_in_each(words, *numbers) / 2**63


def list_labels(dataset: Any) -> np.ndarray | None:
    """Return the label of each sample, None if the data set does not list them as integers."""
    if isinstance(dataset, Part):
        labels = list_labels(dataset.dataset)
        return None if labels is None else labels[dataset.indices]
    targets = list_values(dataset, "targets")  # torchvision's name
    is_class = getattr(dataset, "kind", None) in (None, "class")
    usable = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu"
    return targets if usable and is_class else None


def list_values(dataset: Any, name: str) -> np.ndarray | None:
    """Return an attribute with a number, or a row of them, for each sample; None without one."""
    if isinstance(dataset, Part):
        values = list_values(dataset.dataset, name)
        return None if values is None else values[dataset.indices]
    try:
        values = np.asarray(getattr(dataset, name, None))
    except ValueError:  # of different lengths
        return None
    usable = values.shape[:1] == (len(dataset),) and values.dtype.kind in "iufb"
    return values if usable else None
