# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A dataset with a transform, seeded for each sample, and its samples collated to a batch.

python -c "from data_loading.dataset import TransformedDataset; help(TransformedDataset)"
"""

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data_loading import jpeg
from data_loading.arrays import to_pixels
from data_loading.bad_images import is_transient, retry_io
from data_loading.decode import UNREADABLE, BadImage, decode_for, is_of_decoder
from data_loading.erasing import Erased
from data_loading.formats import extensions
from data_loading.labels import Head
from data_loading.rng import fold_in, seed_cpu
from data_loading.stages import ByEpoch
from data_loading.targets import Targets
from errors import UserError, a_type, first_few

TRIES = 100  # other images to try in place of a bad one
FRAMES = 6  # of a traceback to show


class Replacement(NamedTuple):
    """Another sample, or None, in place of bad images; bad: (name, reason) of each."""

    sample: tuple[Tensor, int, int] | None
    bad: list[tuple[str, str]]


class TransformedDataset(Dataset):
    """`dataset` with `transform`; (seed, epoch, index) seeds the random draws of a sample.

    transform: or `ByEpoch`, several of them.
    Keys are (epoch, index), samples (image (C, H, W), label, index). An image that an epoch holds
    several times has another index each time, larger by the length, and so other draws. A sample
    that cannot be used is returned as a UserError: if a worker raised it, users would see a long
    traceback. An exception in the transform is a bug and stays an exception. nb_classes: labels
    must be integers below it, or as `expect` says; None: labels are not looked at, and returned as
    0. on_bad, for an image that cannot be decoded: `error`; `replace` returns a `Replacement` that
    depends on (seed, epoch, index) alone and keeps the index, and so the mask; `leave out` returns
    an empty `Replacement`.
    positions: in the head, for each label of `dataset`; classes: names in the order of the head.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable | ByEpoch,
        seed: int,
        in_chans: int = 3,
        nb_classes: int | None = None,
        on_bad: str = "error",
        positions: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.in_chans, self.nb_classes, self.on_bad = in_chans, nb_classes, on_bad
        self.positions, self.classes, self.fast = positions, classes, False
        self.targets = Targets("class", nb_classes or 0, positions)
        self.value_range: Sequence[float] | None = None

    def map_values(self, value_range: Sequence[float] | None) -> "TransformedDataset":
        """Map these two values to 0 and 1, and those between; returns the dataset itself."""
        self.value_range = None if value_range is None else tuple(value_range)
        return self

    def decode_fast(self, wanted: bool = True) -> "TransformedDataset":
        """If wanted, decode JPEG files at 1/2, 1/4 or 1/8 of their sides where the crop is large.

        The first step of the transform draws the crop. Returns the dataset itself.
        """
        if wanted:
            jpeg.require_simplejpeg()
            self.fast = True
        return self

    def expect(self, targets: Targets) -> None:
        """Take labels of another kind than one class per image, or for other outputs."""
        self.targets, self.positions, self.nb_classes = targets, targets.positions, targets.count

    def head(self, source: str) -> Head:
        """Return the head that a network for this data has; source: for messages."""
        targets = self.targets
        return Head(source, self.classes, targets.count, targets.kind, targets.scale)

    def keep_own_classes(self) -> list[int]:
        """Number the classes of the data without those that it lacks; returns their outputs."""
        own = self.targets.positions
        if self.kind == "number":
            raise UserError("--eval_classes data: the data has numbers and no classes; drop it")
        if own is None:
            raise UserError("--eval_classes data: the data set has no class names; drop it")
        kept = sorted(own)
        self.classes = self.classes and [self.classes[place] for place in kept]
        self.expect(Targets(self.kind, len(kept), [kept.index(place) for place in own]))
        return kept

    def describe_answers(self) -> str:
        """Return ` among all 1000 classes` if the data lacks some of them, otherwise ''."""
        own, count = self.targets.positions, self.targets.count
        return f" among all {count} classes" if own is not None and len(own) < count else ""

    @property
    def kind(self) -> str:
        """The kind of the targets: class, multi or number."""
        return self.targets.kind

    def __len__(self) -> int:
        return len(self.dataset)

    def transform_at(self, epoch: int) -> Callable:
        """Return the transform of an epoch."""
        return self.transform.at(epoch) if isinstance(self.transform, ByEpoch) else self.transform

    def __getitem__(
        self, key: tuple[int, int]
    ) -> tuple[Tensor, int, int] | Replacement | UserError:
        index, bad = key[1], []
        for attempt in range(1 + TRIES * (self.on_bad == "replace")):
            draw = (self.seed, *key, attempt) if attempt else (self.seed, *key)
            chosen = (fold_in(*draw) if attempt else index) % len(self)
            try:
                image, label = self._load(chosen, draw)
                sample = self.transform_at(key[0])(image), label, index
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
            f"{self.name_of(index)} cannot be used, nor can {TRIES} others in its place; the last "
            f"is {bad[-1][0]} ({bad[-1][1]}). Check the data"
        )

    def _read(self, index: int, draw: tuple[int, ...]) -> tuple[Any, Any]:
        """Return (image (C, H, W), label)."""
        sample, label = self._item(index, draw)
        return to_pixels(sample, self.in_chans, self.value_range), label

    def _item(self, index: int, draw: tuple[int, ...]) -> tuple[Any, Any]:
        """Return (sample, label or None); an error of the dataset's own code is a UserError."""
        seed_cpu(*draw)
        try:
            crop = self.transform_at(draw[1]).transforms[0] if self.fast else None
            with nullcontext() if crop is None else decode_for(crop):
                item = self.dataset[index]
        except (UserError, MemoryError):
            raise
        except Exception as error:
            if is_of_decoder(error) or is_transient(error) or self._is_of_file(error, index):
                raise
            raise UserError(describe_error(error)) from error
        return self._unpack(item)

    def _unpack(self, item: Any) -> tuple[Any, Any]:
        """Return (image, label or None); pre-training does not look at anything but the image."""
        if not isinstance(item, tuple | list | Mapping):
            return item, None
        if isinstance(item, Mapping):
            got = f"with the keys {first_few(item, 5)}"
        elif len(item) == 2 or (item and self.nb_classes is None):
            return item[0], item[1] if len(item) == 2 else None
        else:
            got = f"of {len(item)} ({', '.join(type(part).__name__ for part in item)})"
        raise UserError(
            f"got {a_type(item)} {got}, expected (image, label); correct __getitem__ of "
            "the data set"
        )

    def _load(self, index: int, draw: tuple[int, ...]) -> tuple[Tensor, Any]:
        try:
            image, label = retry_io(partial(self._read, index, draw))
        except (BadImage, *UNREADABLE) as error:
            if isinstance(error, UserError) and not isinstance(error, BadImage):
                raise UserError(f"{self.name_of(index)}: {error}") from error
            kind = "" if isinstance(error, BadImage) else f"{type(error).__name__}: "
            remedy = getattr(error, "remedy", "replace or remove it")
            raise BadImage(
                f"cannot read {self.name_of(index)} ({kind}{error}); {remedy}, or skip such "
                "images: --on_bad_image skip",
                f"{kind}{error}",
            ) from error
        if self.nb_classes is None:  # pre-training
            return image, 0
        try:
            return image, self.targets.read(label)
        except UserError as error:
            raise UserError(f"{self.name_of(index)}: {error}") from error

    def _is_of_file(self, error: Exception, index: int) -> bool:
        """Return True for an OSError of an image file, such as a deleted one."""
        path = str(error.filename) if isinstance(error, OSError) else ""
        return path == self._file(index) or path.lower().endswith(tuple(extensions()))

    def _file(self, index: int) -> str | None:
        entries = getattr(self.dataset, "samples", None)  # torchvision's name: (path, label) pairs
        listed = isinstance(entries, Sequence) and not isinstance(entries, str)
        entry = entries[index] if listed and index < len(entries) else None
        path = entry[0] if isinstance(entry, tuple | list) and entry else entry
        return str(path) if isinstance(path, str | os.PathLike) else None

    def path_of(self, index: int) -> str:
        """Return the path of an image, or `number 7` if the dataset has no files."""
        index %= len(self)
        return self._file(index) or f"number {index}"

    def name_of(self, index: int) -> str:
        """Return `image PATH`, or `image number 7`, for messages."""
        return f"image {self.path_of(index)}"


def describe_error(error: Exception) -> str:
    """Return an error of a user's dataset with its traceback, without the frames of this file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = traceback.format_list([frame for frame in frames if frame.filename != __file__])
    if len(lines) > FRAMES:  # the first are of the dataset itself
        lines[FRAMES // 2 : -FRAMES // 2] = ["  ...\n"]
    text = "".join(lines).rstrip()
    return f"{type(error).__name__}: {error}\nThe data set raised it:\n{text}"


class Patches(NamedTuple):
    """The patches of random erasing in a batch."""

    places: list[tuple[int, int, int, int, int]]  # (image, top, left, height, width)
    noise: Tensor  # (values,) float32: (C, height, width) of each place, one after the other


def collate(samples: list) -> tuple[Tensor, Tensor, Tensor, list, Patches] | UserError:
    """Stack samples to images (N, C, H, W), labels (N,), ids (N,), bad images and patches.

    Images are in channels_last order, as transforms leave them. Labels are (N, K) if they are rows
    of zeros and ones, or numbers.
    Returns the first UserError among the samples instead, if there is one. Bad images are a list of
    (name, reason). N is 0 if all images were left out.
    """
    error = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if error is not None:
        return error
    bad = [fault for sample in samples if isinstance(sample, Replacement) for fault in sample.bad]
    samples = [sample.sample if isinstance(sample, Replacement) else sample for sample in samples]
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        return torch.empty(0), torch.empty(0), torch.empty(0), bad, Patches([], torch.empty(0))
    images, labels, ids = zip(*samples, strict=True)
    patches = _join_patches(images)
    rows = isinstance(labels[0], Tensor)
    labels = torch.stack(labels) if rows else torch.tensor(labels)
    pixels = [image.permute(1, 2, 0) for image in images]
    batch = default_collate(pixels)  # stacks them, in a worker right in shared memory
    return batch.permute(0, 3, 1, 2), labels, torch.tensor(ids), bad, patches


def _join_patches(images: Sequence[Tensor]) -> Patches:
    places, noise = [], [torch.empty(0)]
    for number, image in enumerate(images):
        for patch in image.patches if isinstance(image, Erased) else ():
            places.append((number, patch.top, patch.left, *patch.noise.shape[1:]))
            noise.append(patch.noise.flatten())
    return Patches(places, torch.cat(noise))
