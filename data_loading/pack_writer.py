# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Write the shards of a pack one after the other; an interrupted one continues after the last.

python -c "from data_loading.pack_writer import PartWriter; print(PartWriter.__doc__)"
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data_loading.encode import Encoded
from data_loading.files import Names
from data_loading.index import Listing, write_index
from data_loading.packs import INDEX, file_hashes
from data_loading.tar_headers import BLOCK
from errors import UserError, first_few, plural
from utils import write_atomically

RECORDS = ".packing"  # folder of what is known of finished shards, removed at the end
UNFINISHED = ".part"  # behind the name of the shard that is being written
TEXT = ("utf-8", "surrogateescape")  # names of files may be any bytes


def member_names(names: Sequence[bytes], by_stem: bool, dots: bool = True) -> list[str]:
    """Return names of members of a tar file, each once: `a/1.jpg` becomes `a/1-2.jpg` if need be.

    They are names without what has no meaning in a path, and without a leading /, as `tar` stores
    them. by_stem: they differ without their extensions too. dots: False for names whose only dot,
    in their last part, is that of the extension. UserError for names with '..'.
    """
    cleaned = [
        "/".join(part for part in os.fsdecode(name).split("/") if part not in ("", "."))
        for name in names
    ]
    if not dots:  # WebDataset takes what follows the first one for the extension
        parts = [(*os.path.split(name), os.path.splitext(name)[1]) for name in cleaned]
        cleaned = [
            os.path.join(folder, base.removesuffix(end).replace(".", "_") + end)
            for folder, base, end in parts
        ]
    outside = [os.fsdecode(name) for name in names if b".." in name.split(b"/")]
    if outside:
        raise UserError(
            f"{len(outside)} of {plural(len(names), 'path')} lead out of the folder of the images: "
            f"{first_few(outside)}; write the paths relative to a folder that holds all images, "
            "and give it by --image_root"
        )
    keys = [_key(name, by_stem) for name in cleaned]
    taken, seen = {*keys}, set()
    if len(taken) == len(cleaned):
        return cleaned
    for place, key in enumerate(keys):
        if key in seen:
            stem, extension = os.path.splitext(cleaned[place])
            number = 2
            while _key(f"{stem}-{number}{extension}", by_stem) in taken:
                number += 1
            cleaned[place] = f"{stem}-{number}{extension}"
            taken.add(_key(cleaned[place], by_stem))
        seen.add(key)
    return cleaned


def _key(name: str, by_stem: bool) -> str:
    return os.path.splitext(name)[0] if by_stem else name


class ShardWriter:
    """A tar file that is being written; its content depends on names and contents alone."""

    def __init__(self, path: Path) -> None:
        self.path, self.unfinished = path, Path(f"{path}{UNFINISHED}")
        self.file = open(self.unfinished, "wb")  # noqa: SIM115  closed by `finish`
        self.hash, self.bytes = hashlib.sha256(), 0

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.hash.update(content)
        self.bytes += len(content)

    def add(self, name: str, content: bytes) -> int:
        """Add a file; returns the first block of its content."""
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._write(member.tobuf(tarfile.GNU_FORMAT, *TEXT))
        block = self.bytes // BLOCK
        self._write(content)
        self._write(bytes(-len(content) % BLOCK))
        return block

    def finish(self) -> dict[str, Any]:
        """End the file and give it its name; returns name, bytes and sha256."""
        self._write(bytes(2 * BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.unfinished, self.path)
        return {"name": self.path.name, "bytes": self.bytes, "sha256": self.hash.hexdigest()}


class PartWriter:
    """The shards of a part of a pack.

    Images are numbered in the order in which they are written.
    folder: of the pack. limit: of (images, bytes) in a shard, None for no limit. A shard that is
    finished has a record in the folder `.packing`, with the numbers of its images, where they are,
    their CRC-32, labels that were read with them, and bad images, number -> reason.
    """

    def __init__(self, folder: Path, part: str, limit: tuple[int | None, int | None]) -> None:
        self.folder, self.part, self.limit = folder, part, limit
        self.records: list[dict[str, Any]] = []
        self.shard: ShardWriter | None = None
        self.record: dict[str, Any] = {}
        self.bad: dict[int, str] = {}  # since the last finished shard
        while record := self._read(len(self.records)):
            self.records.append(record)

    def _name(self, number: int) -> str:
        return f"{self.part}-{number:06d}"

    def _read(self, number: int) -> dict[str, Any] | None:
        """Return the record of a finished shard, None if there is none."""
        with suppress(OSError, ValueError):
            record = json.loads((self.folder / RECORDS / f"{self._name(number)}.json").read_bytes())
            if (self.folder / f"{self._name(number)}.tar").stat().st_size == record["bytes"]:
                return record
        return None

    @property
    def next(self) -> int:
        """Number of the first image, in their order, that is in no finished shard."""
        return self.records[-1]["next"] if self.records else 0

    def skip(self, number: int, reason: str) -> None:
        """Note a bad image."""
        self.bad[number] = reason

    def add(self, number: int, name: str, image: Encoded, label: str = "") -> bool:
        """Add an image, and a .json file with its label if there is one.

        Returns True if a shard was finished before it.
        """
        finishes = self._is_full(len(image.content))
        if finishes:
            self.finish(number)
        if self.shard is None:
            self.shard = ShardWriter(self.folder / f"{self._name(len(self.records))}.tar")
            self.record = {"images": [], "blocks": [], "sizes": [], "crcs": [], "labels": []}
        if image.extension:
            name = os.path.splitext(name)[0] + image.extension
        self.record["images"].append(number)
        self.record["blocks"].append(self.shard.add(name, image.content))
        if label:
            self.shard.add(f"{os.path.splitext(name)[0]}.json", label.encode())
        self.record["sizes"].append(len(image.content))
        self.record["crcs"].append(zlib.crc32(image.content))
        self.record["labels"].append(image.label)
        return finishes

    def _is_full(self, size: int) -> bool:
        if self.shard is None:
            return False
        images, largest = self.limit
        is_full = images is not None and len(self.record["images"]) >= images
        return is_full or (largest is not None and self.shard.bytes + size > largest)

    def finish(self, number: int) -> None:
        """Finish the shard, if there is one; number: of the next image."""
        if self.shard is not None:
            self.record |= self.shard.finish()
            bad = {key: why for key, why in self.bad.items() if key < number}
            self.record |= {"next": number, "bad": bad}
            name = f"{self._name(len(self.records))}.json"
            write_atomically(json.dumps(self.record), self.folder / RECORDS / name)
            self.records.append(self.record)
            self.shard, self.bad = None, {}

    def all_bad(self) -> dict[int, str]:
        """Return the reasons of all bad images by number."""
        found = {int(key): why for each in self.records for key, why in each["bad"].items()}
        return found | self.bad

    def places(self) -> dict[str, np.ndarray]:
        """Return arrays with an entry for each image: `image`, and shard, block, size and crc."""
        counts = [len(record["images"]) for record in self.records]
        numbers = np.arange(len(counts), dtype=np.min_scalar_type(len(counts)))
        found = {
            name: np.concatenate([np.array(record[f"{name}s"], kind) for record in self.records])
            for name, kind in (
                ("image", np.int64), ("block", np.uint32), ("size", np.uint32), ("crc", np.uint32)
            )
        }  # fmt: skip
        return {**found, "shard": np.repeat(numbers, counts)}

    def labels(self) -> list[Any]:
        """Return the labels that were read with the images."""
        return [label for record in self.records for label in record["labels"]]

    def finish_part(
        self, names: Names, arrays: dict[str, np.ndarray], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the list of images; returns what pack.json says of the part.

        The files of the list depend on the images alone, not on the time.
        """
        identity = hashlib.sha256("".join(r["sha256"] for r in self.records).encode()).hexdigest()
        folder = self.folder / INDEX / self.part
        folder.mkdir(parents=True, exist_ok=True)
        write_index(Listing(names, arrays, metadata), folder, identity)
        shards = [
            {key: record[key] for key in ("name", "bytes", "sha256")}
            | {"images": len(record["images"])}
            for record in self.records
        ]
        about = {"images": len(names), "bad_images": len(self.all_bad()), "shards": shards}
        return {**about, "index": file_hashes(folder)}
