# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Encoded images by name, whatever holds them: the base of folders, zip, tar and Parquet files.

python -c "from data_loading.files import Names; print(list(Names.pack([b'a.jpg', b'b.jpg'])))"
"""

import itertools
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_loading.formats import extensions
from data_loading.listing import SYSTEM, is_system, reason_of
from errors import UserError

CHUNK = 1 << 20  # names to copy at once
PADDED = 1 << 24  # bytes of names that are compared at once


class Names(Sequence[str]):
    """Names stored as two arrays, which processes share, instead of one object each.

    text: (bytes,) uint8, the names, each followed by a zero. ends: (N + 1,) int64, where each name
    begins in `text`, and the end of the last. damaged: message if the arrays are.
    """

    def __init__(
        self, text: np.ndarray, ends: np.ndarray, damaged: str = "the list of images is damaged"
    ) -> None:
        self.text, self.ends, self.damaged = text, ends, damaged

    @classmethod
    def pack(cls, names: Iterable[bytes]) -> "Names":
        """Store names, given as bytes (`os.fsencode`)."""
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name + b"\0"
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def encoded(self, number: int) -> bytes:
        """Return a name as bytes; UserError if the arrays are damaged."""
        first, after = int(self.ends[number]), int(self.ends[number + 1])
        name = b""
        if 0 <= first < after <= len(self.text):
            name = self.text[first : after - 1].tobytes()
        if not name or b"\0" in name:  # zeros: an incomplete copy, which the checksum cannot see
            raise UserError(self.damaged)
        return name

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self.encoded(range(len(self))[number]))

    def all_encoded(self) -> list[bytes]:
        """Return all names as bytes."""
        return self.text.tobytes().split(b"\0")[:-1]

    def take(self, order: np.ndarray) -> "Names":
        """Return the names at some places, (M,) int64."""
        return self._copy(self.ends[:-1][order], np.diff(self.ends)[order])

    def cut(self, starts: np.ndarray) -> "Names":
        """Return the rest of each name from a place in `text` on, (N,) int64."""
        if np.array_equal(starts, self.ends[:-1]):
            return self
        return self._copy(starts, self.ends[1:] - starts)

    def _copy(self, starts: np.ndarray, lengths: np.ndarray) -> "Names":
        """Return the names that begin at `starts` and have `lengths` with their zeros."""
        ends = np.zeros(len(starts) + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        text = np.empty(int(ends[-1]), np.uint8)
        for first in range(0, len(starts), CHUNK):
            part = slice(first, first + CHUNK)
            places = np.repeat(starts[part] - ends[:-1][part], lengths[part])
            after = first + len(lengths[part])
            held = slice(int(ends[first]), int(ends[after]))
            text[held] = self.text[places + np.arange(held.start, held.stop)]
        return Names(text, ends)

    def runs(self, starts: np.ndarray, stops: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Return the parts of the names from `starts` to `stops`, each run of equal ones once.

        Returns them and the number of the first name of each run, (runs,) int64.
        """
        lengths, same = stops - starts, np.zeros(len(starts), bool)
        for part in _chunks(lengths):
            padded = _padded(self.text, starts[part], lengths[part])
            same[part.start + 1 : part.stop] = padded[1:] == padded[:-1]
        same[1:] &= lengths[1:] == lengths[:-1]
        firsts = np.flatnonzero(~same)
        pairs = zip(starts[firsts].tolist(), stops[firsts].tolist(), strict=True)
        return [os.fsdecode(self.text[a:b].tobytes()) for a, b in pairs], firsts


def _chunks(lengths: np.ndarray) -> Iterator[slice]:
    """Yield parts that take little memory with padding; each begins where the last one ended."""
    rows = max(2, PADDED // max(1, int(lengths.max(initial=1))))
    for first in range(0, len(lengths), rows - 1):
        yield slice(first, min(first + rows, len(lengths)))


def _padded(text: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return parts of a text as bytes of equal length, with zeros behind shorter ones: (N,) S."""
    width = max(1, int(lengths.max(initial=1)))
    first, after = int(starts[0]), int(starts[-1]) + width
    held = np.append(text[first:after], np.zeros(max(0, after - len(text)), np.uint8))
    rows = np.lib.stride_tricks.sliding_window_view(held, width)[starts - first]
    if lengths.min() < width:
        rows[np.arange(width) >= lengths[:, None]] = 0
    return rows.view(f"S{width}")[:, 0]


class Folders:
    """The folders in names, by their depth from 0; `cut` counts those that are cut off."""

    def __init__(self, names: Names) -> None:
        self.names, self.cut = names, 0
        self.places = np.flatnonzero((names.text == ord("/")) | (names.text == 0))
        self.ends = np.flatnonzero(names.text[self.places] == 0)  # in `places`, of each name
        self.firsts = np.append(0, self.ends[:-1] + 1)

    def have(self, depth: int) -> np.ndarray:
        """Return which names have a folder at a depth, (N,) bool."""
        return self.firsts + self.cut + depth < self.ends

    def starts(self) -> np.ndarray:
        """Return the place of the first letter of each name that is not cut off, (N,) int64."""
        if not self.cut:
            return self.names.ends[:-1]
        return self.places[self.firsts + self.cut - 1] + 1

    def runs(self) -> tuple[list[str], np.ndarray]:
        """Return the first folder of the names, '' for none, and `firsts` as in `Names.runs`."""
        starts = self.starts()
        return self.names.runs(
            starts, np.where(self.have(0), self.places[self.firsts + self.cut], starts)
        )

    def rest(self) -> Names:
        """Return the names without what is cut off."""
        return self.names.cut(self.starts())


def reason_to_leave_out(name: str) -> str:
    """Return why a member of an archive is no image of the data, '' if it is one."""
    *folders, base = name.split("/")
    if any(map(is_system, folders)):
        return SYSTEM
    is_image = base.lower().endswith(extensions()) and not base.startswith(".")
    return "" if is_image else reason_of(base)


def sort_by_name(names: Names) -> np.ndarray | None:
    """Return the order of samples, (N,) int64: folder by folder, each in order of its bytes.

    It depends on the names alone, whatever holds the images; None if they are in order already.
    """
    text = np.where(names.text == ord("/"), 0, names.text).astype(np.uint8)
    starts, lengths = names.ends[:-1], np.diff(names.ends)
    for part in _chunks(lengths):
        keys = _padded(text, starts[part], lengths[part])
        if not (keys[:-1] <= keys[1:]).all():
            break
    else:
        return None
    text = text.tobytes()
    keys = [text[first:after] for first, after in itertools.pairwise(names.ends.tolist())]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


class Files:
    """Encoded images in the order of their names; subclasses say what holds them.

    A worker process may have inherited an open file, so each opens its own.
    """

    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> bytes:
        """Return the content of an image file; may be called by several threads and processes."""
        raise NotImplementedError

    def size(self, number: int) -> int:
        """Return the bytes of an image file."""
        return len(self.read(number))

    def order(self) -> np.ndarray | None:
        """Return the numbers of all images in the only order that is fast; None if any order is."""
        return None

    def locate(self, number: int) -> str:
        """Return where an image is, for messages: `photos/cat/1.jpg`, `photos.zip/cat/1.jpg`."""
        raise NotImplementedError


@dataclass
class Found:
    """The images that a source holds, in its own order.

    places: (N,) arrays that say where each image is, as the `Files` of the source need them;
    no name is `targets`, `weights` or `lines`.
    columns: what the source says of each image besides, (N,) arrays or lists of text by name;
    empty if it says nothing. class_names: names of integer labels, for columns that have them.
    left_out: number of files that are no images, by reason, as `listing.describe_left_out` takes.
    """

    names: Names
    places: dict[str, np.ndarray]
    columns: dict[str, Any] = field(default_factory=dict)
    class_names: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
