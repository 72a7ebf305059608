# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Encoded images by name, whatever holds them: the base of folders, zip, tar and Parquet files.

python -c "from data_loading.files import Names; print(list(Names.pack([b'a.jpg', b'b.jpg'])))"
"""

import itertools
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_loading.formats import extensions
from data_loading.listing import SYSTEM, is_system, reason_of
from errors import UserError


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
        starts, lengths = self.ends[:-1][order], np.diff(self.ends)[order]
        ends = np.zeros(len(order) + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        places = np.repeat(starts - ends[:-1], lengths)
        places += np.arange(len(places))
        return Names(self.text[places], ends)


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
    text = names.text.tobytes().replace(b"/", b"\0")
    keys = [text[first:after] for first, after in itertools.pairwise(names.ends.tolist())]
    if all(first <= second for first, second in itertools.pairwise(keys)):
        return None
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
