# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Hold out a part of the training images for evaluation, the same fraction of each class.

python main_finetune.py --data_set image_folder --data_path photos --val_split 0.1
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data_loading.folders import FileIndex
from data_loading.labels import class_names
from data_loading.rng import fold_in
from errors import UserError

STREAM = 0x5EED  # of the draws; --seed does not change the split, so that runs can be compared


class Part(Dataset):
    """The samples of `dataset` at `indices`, an array of integers."""

    def __init__(self, dataset: Any, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices
        if (names := class_names(dataset)) is not None:
            self.classes = names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    @property
    def samples(self) -> Sequence | None:
        """(path, label) of each sample, if the data set lists them."""
        entries = getattr(self.dataset, "samples", None)
        return None if entries is None else [entries[int(i)] for i in self.indices]


def split(dataset: Any, fraction: float, train: bool) -> Part:
    """Return the samples to train on, or those held out: `fraction` of each class, at least one.

    Data sets that do not list their labels are split as a whole. UserError if nothing is left.
    """
    labels = _labels_of(dataset)
    held = np.zeros(len(dataset), dtype=bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(places))), len(places) - 1)
        order = np.random.default_rng(fold_in(STREAM, int(label))).permutation(len(places))
        held[places[order[:count]]] = True
    if not held.any():
        raise UserError(
            f"--val_split {fraction:g}: no class has two images, so none can be held out; add "
            "images, or pass --disable_eval"
        )
    return Part(dataset, np.flatnonzero(~held if train else held))


def _labels_of(dataset: Any) -> np.ndarray:
    """Return the label of each sample, zeros if the data set does not list them."""
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, FileIndex):
        return samples.labels()
    targets = getattr(dataset, "targets", None)  # torchvision's name
    return np.zeros(len(dataset), int) if targets is None else np.asarray(targets)
