# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A stored data set with a transform, seeded for each sample.

python -c "from data_loading.dataset import TransformedDataset; print(TransformedDataset.__doc__)"
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_loading.bad_images import retry_io
from data_loading.decode import UNREADABLE, BadImage, decode
from data_loading.rng import fold_in, seed_all
from errors import UserError

TRIES = 100  # others in place of an image that cannot be used


class Replacement(NamedTuple):
    """Another sample, or None, in place of those that cannot be used: (name, why) of each."""

    sample: tuple[Tensor, int, int] | None
    bad: list[tuple[str, str]]


class TransformedDataset(Dataset):
    """`dataset` with `transform`, asked by keys (epoch, index) and seeded by (seed, epoch, index).

    Returns (image (C, H, W), label, index), or a UserError where the sample cannot be used: as a
    value, because what a worker raises reaches the user as a long traceback. What a transform
    raises is a bug and stays an exception. on_bad: for an image that cannot be decoded `error`, or
    a `Replacement` that says so: with `replace` it holds another by the hash of (seed, epoch, index),
    which keeps the index and so the mask of its place, with `leave out` none.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable,
        seed: int,
        in_chans: int = 3,
        nb_classes: int | None = None,
        on_bad: str = "error",
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.in_chans, self.nb_classes, self.on_bad = in_chans, nb_classes, on_bad

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(
        self, key: tuple[int, int]
    ) -> tuple[Tensor, int, int] | Replacement | UserError:
        index, bad = key[1], []
        for attempt in range(1 + TRIES * (self.on_bad == "replace")):
            draw = (self.seed, *key, attempt) if attempt else (self.seed, *key)
            chosen = fold_in(*draw) % len(self) if attempt else index
            try:
                image, label = self._load(chosen, draw)
                sample = self.transform(image), label, index
                return Replacement(sample, bad) if bad else sample
            except BadImage as error:
                if self.on_bad == "error":
                    return error
                bad.append((self._file(chosen) or f"image number {chosen}", error.reason))
            except UserError as error:
                return error
        if self.on_bad == "leave out":
            return Replacement(None, bad)
        return UserError(
            f"{TRIES} others in place of {self.name_of(index)} cannot be used either, the last "
            f"{bad[-1][0]} ({bad[-1][1]}); too many to go on without: look at the data"
        )

    def _read(self, index: int, draw: tuple[int, ...]) -> tuple[Image.Image | Tensor, Any]:
        seed_all(*draw)
        item = self.dataset[index]
        sample, label = item if isinstance(item, tuple | list) else (item, None)
        return decode(sample, self.in_chans), label

    def _load(self, index: int, draw: tuple[int, ...]) -> tuple[Image.Image | Tensor, int]:
        try:
            image, label = retry_io(partial(self._read, index, draw))
        except (BadImage, *UNREADABLE) as error:
            if isinstance(error, UserError) and not isinstance(error, BadImage):
                raise UserError(f"{self.name_of(index)}: {error}") from error
            reason = str(error)
            if not isinstance(error, BadImage):
                reason = f"{type(error).__name__}: {reason}"
            raise BadImage(
                f"cannot read {self.name_of(index)} ({reason}); replace or remove it, or do "
                "without such images: --on_bad_image skip",
                reason,
            ) from error
        if label is None and self.nb_classes is not None:
            raise UserError(f"{self.name_of(index)} has no label; expected (image, label)")
        label = 0 if label is None else int(label)  # pre-training has no use for it
        if self.nb_classes is not None and not 0 <= label < self.nb_classes:
            expected = f"expected 0 to {self.nb_classes - 1}"
            raise UserError(f"{self.name_of(index)}: label {label}; {expected}")
        return image, label

    def _file(self, index: int) -> str | None:
        entries = getattr(self.dataset, "samples", None)  # (path, label) where there are files
        listed = isinstance(entries, Sequence) and not isinstance(entries, str)
        entry = entries[index] if listed and index < len(entries) else None
        path = entry[0] if isinstance(entry, tuple | list) and entry else entry
        return str(path) if isinstance(path, str | os.PathLike) else None

    def name_of(self, index: int) -> str:
        """`image <its file>`, or `image number 7` where there are no files."""
        return f"image {self._file(index) or f'number {index}'}"
