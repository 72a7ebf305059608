# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Encoded images by name, whatever holds them: the base of folders, zip, tar and Parquet files.

python -c "from data_loading.files import Names; print(list(Names.pack([b'a.jpg', b'b.jpg'])))"
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from errors import UserError


class Names(Sequence[str]):
    """Names stored as two arrays, which processes share, instead of one object each.

    text: (bytes,) uint8, the names, each followed by a zero. ends: (N + 1,) int64, where each name
    begins in `text`, and the end of the last.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, names: Iterable[bytes]) -> "Names":
        """Store names, given as bytes (`os.fsencode`)."""
        names = list(names)
        ends = np.zeros(len(names) + 1, np.int64)
        np.cumsum([len(name) + 1 for name in names], out=ends[1:])
        text = np.frombuffer(b"\0".join([*names, b""]), np.uint8)
        return cls(text, ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def encoded(self, number: int) -> bytes:
        """Return a name as bytes; UserError if the arrays are damaged."""
        first, after = int(self.ends[number]), int(self.ends[number + 1])
        name = (
            self.text[first : after - 1].tobytes() if 0 <= first < after <= len(self.text) else b""
        )
        if not name or b"\0" in name:  # zeros: an incomplete copy, which a checksum cannot see
            raise UserError("the list of images is damaged")
        return name

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self.encoded(range(len(self))[number]))

    def take(self, order: np.ndarray) -> "Names":
        """Return the names at some places, (M,) int64."""
        starts, lengths = self.ends[:-1][order], np.diff(self.ends)[order]
        ends = np.zeros(len(order) + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        places = np.repeat(starts - ends[:-1], lengths)
        places += np.arange(len(places))
        return Names(self.text[places], ends)


def order_key(name: bytes) -> bytes:
    """Return the key by which samples are ordered: folder by folder, each in order of bytes."""
    return name.replace(b"/", b"\0")


class Files:
    """Encoded images in the order of their names; subclasses say what holds them.

    Picklable without open files, so that spawned worker processes open what they read themselves.
    """

    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> bytes:
        """Return the content of an image file; may be called by several threads and processes."""
        raise NotImplementedError

    def locate(self, number: int) -> str:
        """Return where an image is, for messages: `photos/cat/1.jpg`, `photos.zip/cat/1.jpg`."""
        raise NotImplementedError


@dataclass
class Found:
    """The images that a source holds, in its own order.

    places: (N,) arrays that say where each image is, as the `Files` of the source need them.
    columns: what the source says of each image besides, (N,) arrays or lists of text by name;
    empty if it says nothing. class_names: names of integer labels, for columns that have them.
    left_out: number of files that are no images, by reason, as `listing.describe_left_out` takes.
    """

    names: Names
    places: dict[str, np.ndarray]
    columns: dict[str, Any] = field(default_factory=dict)
    class_names: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
