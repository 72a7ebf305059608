# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Statistics of a data set: mean and std of the pixels, sizes, kinds of images, classes.

python visualize.py stats --data_path photos
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_loading.arrays import Encoded
from data_loading.dataset import Replacement, TransformedDataset
from data_loading.labels import class_names
from data_loading.split import list_labels, list_values
from data_loading.tiff import Raster
from errors import UserError, first_few, plural

BITS = {"1": 1, "I;16": 16, "I;16L": 16, "I;16B": 16, "I": 32, "F": 32}  # of PIL's modes, else 8

LEVELS = np.arange(256) / 255  # values of 8-bit pixels


class Spread(NamedTuple):
    """Pixels of one channel or more: count, and (C,) float64 mean, sum of squares, extremes."""

    count: int
    mean: np.ndarray
    squares: np.ndarray  # of the differences from the mean
    least: np.ndarray
    most: np.ndarray

    @classmethod
    def of(cls, pixels: Tensor) -> "Spread":
        """(C, H, W) uint8, which counts as 0 to 1, or float."""
        if pixels.dtype == torch.uint8:  # 25 times as fast as by values
            counts = [channel.flatten().bincount(minlength=256) for channel in pixels]
            return cls._of_counts(torch.stack(counts).numpy())
        values = pixels.flatten(1).numpy().astype(np.float64)
        mean = values.mean(1)
        squares = np.square(values - mean[:, None]).sum(1)
        return cls(values.shape[1], mean, squares, values.min(1), values.max(1))

    @classmethod
    def _of_counts(cls, counts: np.ndarray) -> "Spread":
        """(C, 256) numbers of pixels of each value."""
        count, has = int(counts[0].sum()), counts > 0
        mean = counts @ LEVELS / count
        squares = (counts * np.square(LEVELS - mean[:, None])).sum(1)
        least, most = np.where(has, LEVELS, 1).min(1), np.where(has, LEVELS, 0).max(1)
        return cls(count, mean, squares, least, most)

    def join(self, other: "Spread") -> "Spread":
        """Return the spread of all pixels of both (Chan et al.)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        return Spread(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart**2 * (self.count * other.count / count),
            np.minimum(self.least, other.least),
            np.maximum(self.most, other.most),
        )

    @property
    def std(self) -> np.ndarray:
        """(C,) standard deviation over all pixels."""
        return np.sqrt(self.squares / self.count)


class Measured(NamedTuple):
    """Facts about an image: its pixels, height and width, and its kind, such as `RGB, 8 bits`."""

    spread: Spread
    size: tuple[int, int]
    kind: str


class MeasuredDataset(TransformedDataset):
    """Measures images instead of transforming them; bad images are left out and named."""

    def __init__(self, dataset: Any, in_chans: int, on_bad: str = "error") -> None:
        super().__init__(dataset, self._measure, 0, in_chans, on_bad=on_bad)
        self.described = ""  # the image that was read last

    def _unpack(self, item: Any) -> tuple[Any, Any]:
        sample, label = super()._unpack(item)
        if isinstance(sample, Encoded):
            sample = sample.read(self.in_chans, self.value_range)
        self.described = describe_kind(sample, self.in_chans)
        return sample, label

    def _measure(self, pixels: Tensor) -> Measured:
        height, width = pixels.shape[1:]
        return Measured(Spread.of(pixels), (height, width), self.described)


@dataclass
class Stats:
    """Statistics of the images that were added."""

    spread: Spread | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)  # height and width
    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)  # name and reason

    def add(self, result: Any) -> None:
        """Add what `MeasuredDataset` returned; UserError for an image that cannot be read."""
        if isinstance(result, UserError):
            raise result
        if isinstance(result, Replacement):
            self.bad += result.bad
            return
        image: Measured = result[0]
        self.spread = self.spread.join(image.spread) if self.spread else image.spread
        self.sizes.append(image.size)
        self.kinds[image.kind] += 1

    def lines(self) -> list[str]:
        """Return a table as lines of text, the flags to paste last."""
        spread = self.spread
        if spread is None:
            raise UserError(f"no image can be read: {first_few(map(': '.join, self.bad), 5)}")
        by_area = sorted(self.sizes, key=lambda size: size[0] * size[1])
        sizes = by_area[0], by_area[len(by_area) // 2], by_area[-1]
        smallest, median, largest = (f"{width} x {height}" for height, width in sizes)
        kinds = [f"{kind} ({count:,})" for kind, count in self.kinds.most_common()]
        columns = spread.mean, spread.std, spread.least, spread.most
        found = [
            f"sizes    smallest {smallest}, median {median}, largest {largest} (width x height)",
            f"kinds    {first_few(kinds, 10)}",
            f"{'channel':>9}" + "".join(f"{name:>11}" for name in ("mean", "std", "min", "max")),
        ]
        for number, values in enumerate(zip(*columns, strict=True)):
            found.append(f"{number:>9}" + "".join(f"{value:>11.5f}" for value in values))
        if self.bad:
            names = first_few(map(": ".join, self.bad), 5)
            found.append(f"left out {plural(len(self.bad), 'bad image')}: {names}")
        return [*found, self.flags()]

    def flags(self) -> str:
        """Return the flags that standardize the images."""
        assert self.spread is not None, "no image was added"
        mean, std = (
            " ".join(f"{value:.5g}" for value in values)
            for values in (self.spread.mean, self.spread.std.clip(min=1e-5))
        )
        return f"--mean {mean} --std {std}"


def describe_kind(sample: Any, in_chans: int) -> str:
    """Return channels and depth of a sample as its file holds them: `RGB, 8 bits`.

    in_chans: tells the channels of an array from its height and width.
    """
    if isinstance(sample, Image.Image):
        return f"{sample.mode}, {plural(BITS.get(sample.mode, 8), 'bit')}"
    if isinstance(sample, Raster):
        sample = sample.array
    if isinstance(sample, Tensor):
        name = {1: "L", 3: "RGB"}.get(len(sample), f"{tuple(sample.shape)[0]} channels")
        return f"{name}, {str(sample.dtype).removeprefix('torch.').replace('uint8', '8 bits')}"
    shape = sample.shape
    sides = (shape[0], shape[-1]) if len(shape) == 3 else (1,)
    count = in_chans if in_chans in sides else min(sides)
    return f"{plural(count, 'channel')}, {sample.dtype}"


def describe_classes(dataset: Any) -> str:
    """Return the number of classes and of images in the rarest and in the most common one."""
    names, labels = class_names(dataset), list_labels(dataset)
    rows = list_values(dataset, "targets") if getattr(dataset, "kind", None) == "multi" else None
    if labels is not None:
        counts = np.bincount(labels, minlength=len(names) if names else 0)
    elif rows is not None:
        counts = rows.sum(0)
    else:
        return f"classes  {len(names)}" if names else "classes  the data lists no labels"
    titles = names or [*map(str, range(len(counts)))]
    if counts.min() == counts.max():
        return f"classes  {len(counts)}, {plural(int(counts[0]), 'image')} each"
    few, many = int(counts.argmin()), int(counts.argmax())
    return (
        f"classes  {len(counts)}: rarest {titles[few]} ({plural(int(counts[few]), 'image')}), "
        f"most common {titles[many]} ({plural(int(counts[many]), 'image')})"
    )


def keep_samples(samples: list) -> list:
    """Collate samples as a list."""
    return samples


def choose(count: int, wanted: int | None, seed: int) -> Sequence[int]:
    """Return the numbers of `wanted` of `count` images, chosen by the seed; None: of all."""
    if wanted is None or wanted >= count:
        return range(count)
    return sorted(np.random.default_rng(seed).choice(count, wanted, replace=False).tolist())
