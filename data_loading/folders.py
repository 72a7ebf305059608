# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Which images a folder holds, in a few long arrays: in memory, or in a file that processes map.

python -c "from data_loading.folders import list_images; print(list_images('assets', False)[0])"

It holds, with numbers of 8 bytes, little-endian:

    MAGIC, version, number of images, end of the paths, length of the JSON, CRC-32 of these and it
    the paths, relative to the root, as bytes, a zero after each; more zeros to a multiple of 8
    where each path begins, and where one more would
    JSON: the root, when it was listed, and [class, number of images] of each in order of the labels
"""

from __future__ import annotations

import bisect
import contextlib
import glob
import heapq
import io
import itertools
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data_loading.bad_images import retry_io
from data_loading.decode import EXTENSIONS, load_image
from errors import UserError, first_few
from parallel.process_group import from_main_process, get_logger
from utils import write_atomically

MAGIC, VERSION = b"\x89images\n", 1
HEADER, CRC = struct.Struct("<8s4Q"), struct.Struct("<Q")
FIRST = HEADER.size + CRC.size  # byte of the first path
BLOCK = 2**22  # bytes of paths that are looked at in one go
LEFT = 86400  # seconds without a change after which half a file has no writer any more
REMEDY = "remove it, and the next run makes it anew"


class FileIndex(Sequence):
    """(path, label) of each image below `root`; thousands of them are a handful of objects.

    data: what `write_index` wrote, as bytes or mapped from `file`; ValueError says what is wrong
    with it. classes: their names by label; None if there are none, and then every label is 0.
    listed: the folder as the file names it, without links. made: when, in seconds since 1970.
    """

    def __init__(self, data: bytes | mmap.mmap, root: str | Path, file: Path | None = None) -> None:
        self.data, self.root, self.file = data, str(root), file
        self.offsets, self.end, about = _parse(data)
        self.listed, self.made = about["root"], about["made"]
        self.checksum = CRC.unpack_from(data, HEADER.size)[0]
        names, counts = zip(*about["classes"], strict=True)
        self.classes: tuple[str, ...] | None = None if names == (None,) else names
        self.starts = [*itertools.accumulate(counts, initial=0)]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[str, int]:
        number = range(len(self))[index]  # counts from the end too, or raises IndexError
        first, after = int(self.offsets[number]), int(self.offsets[number + 1])
        # What a copy that was cut short left out reads as zeros. The checksum leaves the paths out.
        path = self.data[first : after - 1] if FIRST <= first < after <= self.end else b""
        if not path or b"\0" in path:
            raise UserError(f"{self.file or self.root}: the list is damaged; {REMEDY}")
        path = os.path.join(self.root, os.fsdecode(path))
        return path, bisect.bisect_right(self.starts, number) - 1

    def __reduce__(self) -> tuple:
        """Worker processes that are spawned map the file themselves."""
        if self.file is not None:
            return open_index, (self.file, self.root, self.checksum)
        return FileIndex, (self.data, self.root)


def _parse(data: bytes | mmap.mmap) -> tuple[np.ndarray, int, dict[str, Any]]:
    """(images + 1,) where paths begin, their end, the JSON; as fast for a billion as for one."""
    if len(data) < FIRST or data[:8] != MAGIC:
        raise ValueError("it is no index of images, or truncated")
    _, version, count, end, size = HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"its format has version {version}, expected {VERSION}")
    start = end + -end % 8
    last = start + 8 * (count + 1)
    if len(data) != last + size:
        raise ValueError(f"it is truncated or damaged: {len(data)} bytes, expected {last + size}")
    about = data[last:]
    if CRC.unpack_from(data, HEADER.size)[0] != zlib.crc32(about, zlib.crc32(data[: HEADER.size])):
        raise ValueError("it is damaged: its checksum does not fit")
    return np.frombuffer(data, "<u8", count + 1, start), end, json.loads(about)


def open_index(file: Path, root: str | Path, checksum: int | None = None) -> FileIndex:
    """Map what `write_index` wrote; UserError if it cannot be used, or has another checksum."""
    try:
        with open(file, "rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        index = FileIndex(data, root, file)
    except FileNotFoundError as error:
        raise UserError(
            f"{file}: no such file on this machine; --data_index must be a folder that all share"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be used: {error}; {REMEDY}") from error
    if checksum not in (None, index.checksum):
        raise UserError(
            f"{file} is not the list that this run began with: it was made anew since, or this "
            "machine sees an old one; start again"
        )
    return index


def write_index(
    file: BinaryIO, root: str, groups: Iterable[tuple[str | None, Iterable[str]]]
) -> list[tuple[str | None, int]]:
    """Fill an empty file, open to read too, in memory that does not grow with the number of paths.

    groups: (class, its paths relative to the root) in order of the labels; images without labels
    are one group called None. Returns (class, number of images) of each.
    """
    file.write(bytes(FIRST))
    counts = []
    for name, paths in groups:
        count = 0
        for path in paths:
            file.write(os.fsencode(path) + b"\0")
            count += 1
        counts.append((name, count))
    end = file.tell()
    file.write(bytes(-end % 8))
    _write_offsets(file, end)
    about = {"root": root, "made": int(time.time()), "classes": counts}
    text = json.dumps(about).encode()
    file.write(text)
    header = HEADER.pack(MAGIC, VERSION, sum(count for _, count in counts), end, len(text))
    file.seek(0)
    file.write(header + CRC.pack(zlib.crc32(text, zlib.crc32(header))))
    return counts


def _write_offsets(file: BinaryIO, end: int) -> None:
    """Found in the file by the zeros between paths: kept until here they would take memory."""
    file.write(CRC.pack(FIRST))
    for start in range(FIRST, end, BLOCK):
        file.seek(start)
        block = np.frombuffer(file.read(min(BLOCK, end - start)), np.uint8)
        file.seek(0, os.SEEK_END)
        file.write((np.flatnonzero(block == 0) + start + 1).astype("<u8").tobytes())


# --- folders --------------------------------------------------------------------------------------


def list_images(root: str | Path, labelled: bool, file: Path | None = None) -> FileIndex:
    """The images below a folder, links followed; labelled: of one folder a class.

    file: where the main process writes the list unless it is there already, for all ranks to map;
    None: each lists for itself. Every rank must call it. UserError if there are no images.
    """
    if file is None:
        memory = io.BytesIO()
        _fill(memory, str(root), labelled)
        return FileIndex(memory.getvalue(), root)
    checksum = from_main_process(partial(_make, file, str(root), labelled))
    index = open_index(file, root, checksum)
    if index.listed != os.path.realpath(root) or labelled != (index.classes is not None):
        what = "images without labels in" if index.classes is None else "the class folders of"
        ours = "the class folders of" if labelled else "images without labels in"
        raise UserError(
            f"{file} lists {what} {index.listed}, not {ours} {os.path.realpath(root)}; give "
            "another --data_index, or remove that file"
        )
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(index.made))
    text = "%s: %d images of %s as of %s; files that came since are seen once it is removed"
    get_logger().info(text, file, len(index), root, when)
    return index


def _make(file: Path, root: str, labelled: bool) -> int:
    """The checksum of the list that is there, or is there now."""
    if file.exists():
        return open_index(file, root).checksum
    get_logger().info("%s: listing the images of %s, once", file, root)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # finished just now
                if time.time() - left.stat().st_mtime > LEFT:
                    left.unlink()
        write_atomically(partial(_fill, root=root, labelled=labelled), file)
    except OSError as error:
        raise UserError(
            f"--data_index: {file} cannot be written ({error}); choose a folder with room for it"
        ) from error
    return open_index(file, root).checksum


def _fill(file: BinaryIO, root: str, labelled: bool) -> None:
    """`write_index` of a folder, class by class; UserError if a class or all is empty."""
    groups = _classes(root) if labelled else [(None, _in_order(root))]
    counts = write_index(file, os.path.realpath(root), groups)
    empty = [str(name) for name, count in counts if not count]
    if not labelled and empty:
        raise UserError(f"{root}: no images; expected some of {' '.join(EXTENSIONS)}")
    if empty or not counts:
        found = f"no images in {len(empty)} class folders: {first_few(empty)}"
        raise UserError(
            f"{root}: {found if counts else 'no class folders'}; expected one folder of images a "
            f"class ({' '.join(EXTENSIONS)}): fill or remove empty ones; images without labels "
            "pre-train with --data_set folder"
        )


def _classes(root: str) -> Iterator[tuple[str, Iterator[str]]]:
    for name in sorted(_names(root)[1]):
        yield name, _by_folder(root, name)


def _by_folder(root: str, top: str) -> Iterator[str]:
    """In torchvision's order of a class: folders by their path, in each its images by name.

    What a folder holds comes after it in that order, so the least of those found is the next.
    """
    waiting = [top]
    while waiting:
        folder = heapq.heappop(waiting)
        images, folders = _names(os.path.join(root, folder))
        yield from (f"{folder}/{name}" for name in sorted(images))
        for name in folders:
            heapq.heappush(waiting, f"{folder}/{name}")


def _in_order(root: str, below: str = "") -> Iterator[str]:
    """In order of their paths; a folder sorts as the paths in it, whose next letter is a slash."""
    images, folders = _names(os.path.join(root, below))
    for name in sorted(images + [f"{name}/" for name in folders]):
        if name.endswith("/"):
            yield from _in_order(root, below + name)
        else:
            yield below + name


def _names(folder: str) -> tuple[list[str], list[str]]:
    """Names of the images and of the folders in one, in any order."""
    try:
        return retry_io(partial(_scan, folder))
    except OSError as error:  # gone, or somebody else's, such as lost+found
        get_logger().warning("what is in %s is not used: %s", folder, error)
        return [], []


def _scan(folder: str) -> tuple[list[str], list[str]]:
    images, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(entry.name)
    return images, folders


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


@dataclass(frozen=True)
class DatasetSpec:
    """What a row of `DATASETS` may need to know; each uses what concerns it."""

    data_path: str | None = None
    eval_data_path: str | None = None
    input_size: tuple[int, int] = (224, 224)
    nb_classes: int | None = None
    data_index: str = ""


def _folder_at(path: str | None, flag: str, holds: str) -> Path:
    if not path:
        raise UserError(f"{flag} is not given; expected a folder with {holds}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"{flag} {path}: no such folder; expected {holds} there")
    return root


class ImageFiles(Dataset):
    """The images of an index, with their labels."""

    def __init__(self, samples: FileIndex):
        self.samples, self.classes = samples, samples.classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return load_image(path), label


def _images(root: Path, labelled: bool, spec: DatasetSpec, train: bool) -> ImageFiles:
    name = "train.index" if train else "val.index"
    file = Path(spec.data_index).expanduser() / name if spec.data_index else None
    return ImageFiles(list_images(root, labelled, file))


def imnet(spec: DatasetSpec, train: bool) -> ImageFiles:
    """`train/` and `val/` under data_path, one folder a class."""
    root = _folder_at(spec.data_path, "--data_path", "train/ and val/")
    split = root / ("train" if train else "val")
    if not split.is_dir():
        raise UserError(
            f"--data_set IMNET: {root} has no {split.name}/; expected train/ and val/ with one "
            "folder a class. Class folders right there are --data_set image_folder, images "
            "without labels --data_set folder"
        )
    return _images(split, True, spec, train)


def image_folder(spec: DatasetSpec, train: bool) -> ImageFiles:
    """One folder a class: in data_path for training, in eval_data_path for validation."""
    path, flag = (spec.data_path, "data_path") if train else (spec.eval_data_path, "eval_data_path")
    root = _folder_at(path, f"--{flag}", "one folder of images a class")
    return _images(root, True, spec, train)


def folder(spec: DatasetSpec, train: bool) -> ImageFiles:
    """Images without labels, flat or nested, in order of their paths, for pre-training."""
    path, flag = (spec.data_path, "data_path") if train else (spec.eval_data_path, "eval_data_path")
    return _images(_folder_at(path, f"--{flag}", "images"), False, spec, train)
