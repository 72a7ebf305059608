# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Image folders, and lists of their files as two arrays in memory or memory-mapped from disk.

python -c "from data_loading.folders import list_images; print(list_images('assets', False)[0])"

An index on disk is a folder:

    paths.npy    (bytes,) uint8: the paths relative to the root, each followed by a zero
    offsets.npy  (images + 1,) int64: where each path begins in paths.npy, and their end
    index.json   root, time of listing, [class, number of images] in order of the labels, number of
                 files left out by reason, and of images shared by two classes, CRC-32
"""

import bisect
import itertools
import json
import os
import secrets
import tempfile
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data_loading.decode import BadImage, load_image
from data_loading.formats import extensions
from data_loading.listing import FolderWalk, SharedImages, class_folders, describe_left_out
from data_loading.tables import Columns
from errors import UserError, first_few, plural
from parallel.process_group import from_main_process, get_logger

VERSION = 2  # 1 lists hidden and system files too
ARRAYS = ("paths.npy", "offsets.npy")
REMEDY = "remove it, and the next run lists the images again"


class FileIndex(Sequence):
    """(path, label) of each image below `root`, stored as the arrays of an index.

    metadata: content of index.json. folder: of the index, if the arrays are mapped from one.
    classes: names by label; None if there are none, and then every label is 0.
    """

    def __init__(
        self,
        paths: np.ndarray,
        offsets: np.ndarray,
        metadata: dict[str, Any],
        root: str | Path,
        folder: Path | None = None,
    ) -> None:
        self.paths, self.offsets, self.metadata = paths, offsets, metadata
        self.root, self.folder = str(root), folder
        names, counts = zip(*metadata["classes"], strict=True)
        self.classes: tuple[str, ...] | None = None if names == (None,) else names
        self.starts = [*itertools.accumulate(counts, initial=0)]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[str, int]:
        number = range(len(self))[index]  # also counts from the end, or raises IndexError
        first, after = int(self.offsets[number]), int(self.offsets[number + 1])
        path = b""
        if 0 <= first < after <= len(self.paths):
            path = self.paths[first : after - 1].tobytes()
        if not path or b"\0" in path:  # zeros: an incomplete copy, which the checksum cannot see
            raise UserError(f"{self.folder or 'the list of images'} is damaged; {REMEDY}")
        path = os.path.join(self.root, os.fsdecode(path))
        return path, bisect.bisect_right(self.starts, number) - 1

    def labels(self) -> np.ndarray:
        """Return the label of each image."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def __reduce__(self) -> tuple:
        """Let spawned worker processes map the files themselves."""
        if self.folder is not None:
            return open_index, (self.folder, self.root, self.metadata["crc32"])
        return FileIndex, (self.paths, self.offsets, self.metadata, self.root)


def open_index(folder: Path, root: str | Path, crc32: int | None = None) -> FileIndex:
    """Open an index, memory-mapped; UserError if it is damaged or has another checksum."""
    try:
        metadata = json.loads((folder / "index.json").read_bytes())
        if (version := metadata.get("version")) != VERSION:
            raise ValueError(f"index.json has version {version}, expected {VERSION}")
        if metadata["crc32"] != _crc32(metadata):
            raise ValueError("index.json is damaged: its checksum does not fit")
        paths, offsets = (np.load(folder / name, mmap_mode="r") for name in ARRAYS)
        images = sum(count for _, count in metadata["classes"])
        got = paths.dtype, offsets.dtype, len(offsets), int(offsets[-1])
        if got != (np.uint8, np.int64, images + 1, len(paths)):
            raise ValueError(f"paths.npy and offsets.npy do not fit index.json: {images} images")
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: no such file on this machine; --data_index must be a folder that "
            "all machines share"
        ) from error
    except Exception as error:  # json and numpy raise nearly anything for damaged files
        raise UserError(f"{folder} cannot be used: {error}; {REMEDY}") from error
    if crc32 not in (None, metadata["crc32"]):
        raise UserError(
            f"{folder} is not the list that this run started with: it was replaced, or this "
            "machine sees an old copy; start again"
        )
    return FileIndex(paths, offsets, metadata, root, folder)


def _crc32(metadata: dict[str, Any]) -> int:
    content = {key: value for key, value in metadata.items() if key != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_json(folder: Path, root: str, listed: dict[str, Any]) -> None:
    """Write index.json; its random `id` makes the checksum of each list unique.

    listed: classes, and the numbers of files left out and of images shared by two classes.
    """
    metadata = {"version": VERSION, "root": os.path.realpath(root), **listed}
    metadata |= {"made": int(time.time()), "id": secrets.token_hex(8)}
    (folder / "index.json").write_text(json.dumps(metadata | {"crc32": _crc32(metadata)}))


def _make(folder: Path, root: str, labeled: bool, leave_out_empty: bool) -> int:
    """Write the index unless it exists; returns its checksum."""
    if not folder.exists():
        get_logger().info("%s: listing the images of %s, once", folder, root)
        index = _list_folder(root, labeled, leave_out_empty)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
                unfinished = Path(name, folder.name)
                unfinished.mkdir()
                for file, content in zip(ARRAYS, (index.paths, index.offsets), strict=True):
                    np.save(unfinished / file, content)
                write_json(unfinished, root, index.metadata)
                unfinished.rename(folder)
        except OSError as error:
            if not folder.exists():  # otherwise another process was faster
                raise UserError(
                    f"--data_index: cannot write {folder} ({error}); choose a writable folder with "
                    "enough space"
                ) from error
    return open_index(folder, root).metadata["crc32"]


def list_images(
    root: str | Path, labeled: bool, folder: Path | None = None, leave_out_empty: bool = False
) -> FileIndex:
    """List the images below `root`, links followed; labeled: one folder per class.

    folder: the index that all ranks map; the main process writes it unless it is there. None: each
    process lists for itself. leave_out_empty: classes without images are left out, not refused.
    Every rank must call it. UserError if there are no images.
    """
    if folder is None:
        return _list_folder(str(root), labeled, leave_out_empty)
    crc32 = from_main_process(partial(_make, folder, str(root), labeled, leave_out_empty))
    index = open_index(folder, root, crc32)
    kinds = {False: "images without labels in", True: "the class folders of"}
    got = f"{kinds[index.classes is not None]} {index.metadata['root']}"
    expected = f"{kinds[labeled]} {os.path.realpath(root)}"
    if got != expected:
        raise UserError(
            f"{folder} lists {got}, not {expected}; give another --data_index, or delete {folder}"
        )
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(index.metadata["made"]))
    text = "%s: %s of %s as of %s; remove that folder to list newer files too"
    get_logger().info(text, folder, plural(len(index), "image"), root, when)
    return index


def _list_folder(root: str, labeled: bool, leave_out_empty: bool = False) -> FileIndex:
    """List a folder in memory; UserError if it, or a class, is empty."""
    paths, offsets, classes = bytearray(), array("q", [0]), []
    left_out: Counter[str] = Counter()
    names = class_folders(root, left_out) if labeled else [None]
    shared = SharedImages(root, names)
    for label, name in enumerate(names):
        walk, before = FolderWalk(root, name or "", left_out), len(offsets)
        for file in walk.by_folder() if labeled else walk.in_order():
            paths += os.fsencode(file) + b"\0"
            offsets.append(len(paths))
        classes.append([name, len(offsets) - before])
        shared.add(walk.by_links, label)
    empty, rest = [name for name, count in classes if not count], describe_left_out(left_out)
    if not labeled and empty:
        raise UserError(f"{root}: no images; expected some of {' '.join(extensions())}{rest}")
    if leave_out_empty and len(empty) < len(classes):
        classes = [[name, count] for name, count in classes if count]
        if empty:
            text, found = "%s: left out %s without images: %s", plural(len(empty), "class folder")
            get_logger().warning(text, root, found, first_few(empty))
    elif empty or not classes:
        found = f"no images in {plural(len(empty), 'class folder')}: {first_few(empty)}"
        raise UserError(
            f"{root}: {found if classes else 'no class folders'}; expected one folder of images "
            f"per class ({' '.join(extensions())}): fill or remove empty ones; to pre-train on "
            f"images without labels use --data_set folder{rest}"
        )
    arrays = np.frombuffer(paths, np.uint8), np.frombuffer(offsets, np.int64)
    counts = {"left_out": dict(left_out), "shared": len(shared.shared)}
    return FileIndex(*arrays, {"classes": classes, **counts}, root)


@dataclass(frozen=True)
class DatasetSpec:
    """Settings for the functions in `DATASETS`; each uses those that concern it."""

    data_path: str | None = None
    eval_data_path: str | None = None
    input_size: tuple[int, int] = (224, 224)
    nb_classes: int | None = None
    data_index: str = ""
    kind: str | None = None  # of the targets of a table; None if its cells tell it
    columns: Columns | None = None  # of a table
    labeled: bool = True


def _root_folder(spec: DatasetSpec, train: bool, holds: str) -> Path:
    flag = "data_path" if train else "eval_data_path"
    path = getattr(spec, flag)
    if not path:
        hint = "" if train else ", or --val_split 0.1"
        raise UserError(f"--{flag} is not given; expected a folder with {holds}{hint}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"--{flag} {path}: no such folder; expected {holds} there")
    return root


class ImageFiles(Dataset):
    """The images of a file index, with their labels."""

    def __init__(self, samples: FileIndex):
        self.samples, self.classes = samples, samples.classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            return load_image(path), label
        except FileNotFoundError as error:
            if (folder := getattr(self.samples, "folder", None)) is None:
                raise
            raise BadImage(
                f"it does not exist, but {folder} lists it",
                remedy=f"the list is old: remove {folder}, and the next run lists the images again",
            ) from error

    def describe_list(self) -> str:
        """Describe the files that are left out, and those listed twice; '' if there are none."""
        shared = self.samples.metadata.get("shared")
        text = f"; in two classes, by links: {plural(shared, 'image')}" if shared else ""
        return describe_left_out(self.samples.metadata.get("left_out", {})) + text


def _images(root: Path, labeled: bool, spec: DatasetSpec, train: bool) -> ImageFiles:
    name = "train.index" if train else "val.index"
    index = Path(spec.data_index).expanduser() / name if spec.data_index else None
    return ImageFiles(list_images(root, labeled, index, leave_out_empty=not train))


def imnet(spec: DatasetSpec, train: bool) -> ImageFiles:
    """Images in `train/` and `val/` under data_path, one folder per class."""
    root = _root_folder(spec, True, "train/ and val/")
    split = root / ("train" if train else "val")
    if not split.is_dir():
        raise UserError(
            f"--data_set IMNET: {root} has no {split.name}/; expected train/ and val/ with one "
            "folder per class. If the class folders are directly in it, use --data_set "
            "image_folder; for images without labels, --data_set folder; without val/, "
            "--val_split 0.1"
        )
    return _images(split, True, spec, train)


def image_folder(spec: DatasetSpec, train: bool) -> ImageFiles:
    """Images in one folder per class: data_path for training, eval_data_path for validation."""
    return _images(_root_folder(spec, train, "one folder of images per class"), True, spec, train)


def folder(spec: DatasetSpec, train: bool) -> ImageFiles:
    """Images without labels, flat or nested, in order of their paths, for pre-training."""
    return _images(_root_folder(spec, train, "images"), False, spec, train)
