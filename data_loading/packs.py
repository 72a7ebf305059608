# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Packs: folders of tar shards with their list of images, as pack.py writes them.

python pack.py photos packed; python main_pretrain.py --data_path packed --dry_run

    pack.json          how it was packed; size, SHA-256 and number of images of each shard
    train-000000.tar   images under their names in the source; val- for evaluation, or images-
                       if the source has no parts
    index/train/       an index, as data_loading/index.py describes it, with class names, labels and
                       weights, and shard, block, size and CRC-32 of each image
    bad_images.txt     images that were left out
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from config.tasks import PACK as NAME
from data_loading.arrays import load_whole
from data_loading.files import Names
from data_loading.index import Listing, checksums, open_index
from data_loading.tar import TarFiles
from data_loading.tar_headers import BLOCK
from errors import UserError, first_few, first_line, plural

INDEX, VERSION = "index", 1
WHOLE = "images"  # name of the part of a source without parts
PARTS = {"train": "train", "val": "val", WHOLE: ""}  # names -> split, '' for both
REMEDY = "copy the pack again, or delete it and pack the images again"


def is_pack(folder: str) -> bool:
    """Return True for a folder that pack.py has written, or has begun to write."""
    return os.path.isfile(os.path.join(folder, NAME))


def read_pack(folder: str) -> dict[str, Any]:
    """Return pack.json of a finished pack; UserError if it is unfinished, damaged or newer."""
    path = os.path.join(folder, NAME)
    try:
        with open(path, encoding="utf-8") as file:
            pack = json.load(file)
        version, parts = pack["version"], pack["parts"]
        if version == VERSION:
            names = [shard["name"] for part in parts.values() for shard in part["shards"]]
            if not parts.keys() <= PARTS.keys() or any(os.path.basename(n) != n for n in names):
                raise ValueError("it names other parts or files outside the pack")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {first_line(error)}; {REMEDY}") from error
    if version != VERSION:
        raise UserError(f"{path} has version {version}, expected {VERSION}; update the toolkit")
    if not parts:
        raise UserError(f"{folder} is an unfinished pack; run the command of pack.py again")
    return pack


def shard_paths(folder: str, pack: dict[str, Any], part: str) -> list[str]:
    """Return the paths of the shards of a part."""
    return [os.path.join(folder, shard["name"]) for shard in pack["parts"][part]["shards"]]


def list_part(folder: str, pack: dict[str, Any], part: str) -> Listing:
    """Map the list of images of a part.

    UserError if a shard is missing or has another size, or if the labels do not fit their checksum.
    """
    shards = pack["parts"][part]["shards"]
    wrong = [shard["name"] for shard in shards if _wrong_size(folder, shard)]
    if wrong:
        raise UserError(
            f"{folder}: {plural(len(wrong), 'shard')} of {len(shards)} missing or not of the size "
            f"in {NAME}: {first_few(wrong)}; {REMEDY}"
        )
    return _open_list(folder, part, len(shards))


def _open_list(folder: str, part: str, shards: int) -> Listing:
    index = Path(folder, INDEX, part)
    try:
        listing = open_index(index)
    except UserError as error:
        cause = first_line(error.__cause__ or error)
        raise UserError(f"{index} cannot be used: {cause}; {REMEDY}") from error
    numbers = listing.arrays.get("shard")
    known = numbers is not None and (not len(numbers) or int(numbers.max()) < shards)
    if not known or checksums(listing) != listing.metadata["checksums"]:
        raise UserError(f"{index} is damaged: it does not fit {NAME} or its checksums; {REMEDY}")
    names = Names(listing.names.text, listing.names.ends, f"{index} is damaged; {REMEDY}")
    return replace(listing, names=names)


def _wrong_size(folder: str, shard: dict[str, Any]) -> str:
    """Return how the size of a shard differs from that in pack.json, '' if it does not."""
    size = None
    with suppress(OSError):
        size = os.stat(os.path.join(folder, shard["name"])).st_size
    found = "missing" if size is None else f"{size} bytes"
    return "" if size == shard["bytes"] else f"{found}, expected {shard['bytes']} bytes"


def for_task(listing: Listing, folder: str, labeled: bool) -> Listing:
    """Return the list of a part with its labels, or without; UserError if it has none."""
    if labeled and "targets" not in listing.arrays:
        raise UserError(
            f"{folder} was packed with --unlabeled true, so its images are for main_pretrain.py "
            "alone; pack them again with their labels"
        )
    if labeled:
        return listing
    arrays = {name: array for name, array in listing.arrays.items() if name != "targets"}
    metadata = {**listing.metadata, "classes": None, "kind": None}
    return replace(listing, arrays=arrays, metadata=metadata)


def open_files(shards: Sequence[str], listing: Listing) -> TarFiles:
    """Return what reads the images of a part."""
    return TarFiles(shards, listing.names, dict(listing.arrays))


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def check_lists(folder: str, pack: dict[str, Any]) -> list[str]:
    """Return the files in the index of a pack that do not fit their SHA-256."""
    faults = []
    for part, about in pack["parts"].items():
        place = Path(folder, INDEX, part)
        found = file_hashes(place) if place.is_dir() else {}
        wrong = [name for name, known in about["index"].items() if found.get(name) != known]
        faults += [f"{place / name}: missing, or its SHA-256 differs" for name in wrong]
    return faults


class ShardChecks:
    """The shards of a pack: item (0, N) is a list of what is wrong with shard number N.

    Each is compared with its SHA-256, each image with its CRC-32, and decoded.
    """

    def __init__(self, folder: str, pack: dict[str, Any]) -> None:
        self.folder = folder
        self.listings = {
            part: _open_list(folder, part, len(about["shards"]))
            for part, about in pack["parts"].items()
        }
        self.shards = [
            (part, number, shard)
            for part, about in pack["parts"].items()
            for number, shard in enumerate(about["shards"])
        ]

    def __len__(self) -> int:
        return len(self.shards)

    def name_of(self, index: int) -> str:
        """Return the name of a shard, for messages."""
        return self.shards[index][2]["name"]

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, list[str]]:
        """Return the number of images in a shard, and a line for each fault."""
        part, number, shard = self.shards[key[1]]
        listing = self.listings[part]
        rows = np.flatnonzero(listing.arrays["shard"] == number)
        # Rows of a table with the same image share it.
        _, first = np.unique(listing.arrays["block"][rows], return_index=True)
        path = os.path.join(self.folder, shard["name"])
        if wrong := _wrong_size(self.folder, shard):
            return len(first), [f"{path}: {wrong}"]
        try:
            with (
                open(path, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m,
            ):
                whole = hashlib.sha256(m).hexdigest() == shard["sha256"]
                found = [fault for row in rows[first] if (fault := _check(m, listing, int(row)))]
        except (OSError, ValueError) as error:
            return len(first), [f"{path}: {first_line(error)}"]
        if not (whole or found):
            found = ["its SHA-256 differs, outside the images: in a header or at its end"]
        return len(first), [f"{path}: {fault}" for fault in found]


def _check(content: mmap.mmap, listing: Listing, row: int) -> str:
    """Return what is wrong with an image, '' if nothing is."""
    name, arrays = listing.names[row], listing.arrays
    start, size = int(arrays["block"][row]) * BLOCK, int(arrays["size"][row])
    data = content[start : start + size]
    if len(data) != size or zlib.crc32(data) != int(arrays["crc"][row]):
        return f"{name}: damaged: its CRC-32 differs"
    try:
        load_whole(data)
    except Exception as error:  # of any decoder
        return f"{name}: cannot be decoded: {first_line(error)}"
    return ""
