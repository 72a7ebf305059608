# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lists of images in memory, or memory-mapped from the folders that --data_index keeps.

python main_pretrain.py --data_path photos --data_index lists --dry_run; ls lists/train.index

An index on disk is a folder:

    names.npy    (bytes,) uint8: the names of the images, each followed by a zero
    ends.npy     (images + 1,) int64: where each name begins in names.npy, and their end
    NAME.npy     (images, ...): labels, or where the images are in an archive
    index.json   the source, time of listing, classes, what was left out, type and length of each
                 array, CRC-32 of the whole
"""

import json
import os
import secrets
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_loading.files import Names
from errors import UserError, plural
from parallel.process_group import from_main_process, get_logger

VERSION = 3  # 1 lists hidden files too; 2 has labels by count, and no archives
CHECKED = ("targets", "weights")  # zeros of an incomplete copy would be taken for real ones
REMEDY = "remove it, and the next run lists the images again"


@dataclass(frozen=True, eq=False)
class Listing:
    """Names of images, arrays with an entry for each image, and facts about all of them.

    arrays: such as `targets`. metadata: plain values, such as `source` and `classes`; `above`:
    folders in an archive that names do not have. folder: of the index, if the arrays are mapped
    from one.
    """

    names: Names
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple:
        """Let spawned worker processes map the files themselves."""
        if self.folder is not None:
            return open_index, (self.folder, self.metadata["crc32"])
        return Listing, (self.names, self.arrays, self.metadata)

    def take(self, order: np.ndarray) -> "Listing":
        """Return the images at some places, (M,) int64."""
        arrays = {name: array[order] for name, array in self.arrays.items()}
        return Listing(self.names.take(order), arrays, self.metadata)


def open_index(folder: Path, crc32: int | None = None) -> Listing:
    """Open an index, memory-mapped; UserError if it is damaged or has another checksum."""
    try:
        metadata = json.loads((folder / "index.json").read_bytes())
        if (version := metadata.get("version")) != VERSION:
            raise ValueError(f"index.json has version {version}, expected {VERSION}")
        if metadata["crc32"] != _crc32(metadata):
            raise ValueError("index.json is damaged: its checksum does not fit")
        shapes = metadata["arrays"]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
        for name, array in arrays.items():
            if [array.dtype.str, *array.shape] != shapes[name]:
                raise ValueError(f"{name}.npy does not fit index.json: {shapes[name]}")
        names, ends = arrays.pop("names"), arrays.pop("ends")
        if ends[-1] != len(names):
            raise ValueError("names.npy and ends.npy do not fit index.json")
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
    return Listing(Names(names, ends, f"{folder} is damaged; {REMEDY}"), arrays, metadata, folder)


def _crc32(metadata: dict[str, Any]) -> int:
    content = {key: value for key, value in metadata.items() if key != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def checksums(listing: Listing) -> dict[str, int]:
    """Return the CRC-32 of the labels and weights of a list, by name."""
    found = {name: array for name, array in listing.arrays.items() if name in CHECKED}
    return {name: zlib.crc32(np.ascontiguousarray(array)) for name, array in found.items()}


def write_index(listing: Listing, folder: Path, identity: str = "") -> None:
    """Write the files of an index; identity: see `write_json`."""
    for name, array in _arrays(listing).items():
        np.save(folder / f"{name}.npy", array)
    write_json(listing, folder, identity)


def _arrays(listing: Listing) -> dict[str, np.ndarray]:
    return {"names": listing.names.text, "ends": listing.names.ends, **listing.arrays}


def write_json(listing: Listing, folder: Path, identity: str = "") -> None:
    """Write index.json; its random `id` makes the checksum of each index unique.

    identity: takes the place of the time and of the random `id`, so that the file depends on the
    content alone.
    """
    arrays = _arrays(listing)
    shapes = {name: [array.dtype.str, *array.shape] for name, array in arrays.items()}
    metadata = {"version": VERSION, **listing.metadata, "arrays": shapes}
    metadata["checksums"] = checksums(listing)
    made = 0 if identity else int(time.time())
    metadata |= {"made": made, "id": identity or secrets.token_hex(8)}
    (folder / "index.json").write_text(json.dumps(metadata | {"crc32": _crc32(metadata)}))


def _make(folder: Path, what: str, make: Callable[[], Listing]) -> int:
    """Write the index unless it exists, and check its labels; returns its checksum."""
    if not folder.exists():
        get_logger().info("%s: listing %s, once", folder, what)
        listing = make()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
                unfinished = Path(name, folder.name)
                unfinished.mkdir()
                write_index(listing, unfinished)
                unfinished.rename(folder)
        except OSError as error:
            if not folder.exists():  # otherwise another process was faster
                raise UserError(
                    f"--data_index: cannot write {folder} ({error}); choose a writable folder with "
                    "enough space"
                ) from error
    listing = open_index(folder)
    if checksums(listing) != listing.metadata["checksums"]:
        raise UserError(f"{folder} is damaged: its labels do not fit their checksum; {REMEDY}")
    return listing.metadata["crc32"]


def cached(
    make: Callable[[], Listing],
    what: str,
    source: Mapping[str, Any],
    folder: Path | None = None,
) -> Listing:
    """Return `make()`, or the index of an earlier call in `folder`, which all ranks map.

    what: describes the images, for messages. source: plain values that identify them; an index of
    other ones is refused, and one whose `files` have another size or time. folder: None: each
    process lists for itself. Every rank must call it.
    """
    source = json.loads(json.dumps(source))
    if folder is None:
        return make()

    def with_source() -> Listing:
        listing = make()
        metadata = {**listing.metadata, "source": source, "what": what}
        return Listing(listing.names, listing.arrays, metadata)

    crc32 = from_main_process(partial(_make, folder, what, with_source))
    listing = open_index(folder, crc32)
    _check_source(listing, source, what)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(listing.metadata["made"]))
    text = "%s: %s of %s as of %s; remove that folder to list newer files too"
    get_logger().info(text, folder, plural(len(listing), "image"), what, when)
    return listing


def _check_source(listing: Listing, source: dict[str, Any], what: str) -> None:
    """Raise UserError if an index is of another source, or of files that have changed."""
    folder, old, new = listing.folder, dict(listing.metadata["source"]), dict(source)
    before, now = old.pop("files", {}), new.pop("files", {})
    old.pop("kind", None)
    kind, found = new.pop("kind", None), listing.metadata.get("kind")
    if old != new or (kind and found and kind != found):  # a run that resumes knows its kind
        raise UserError(
            f"{folder} lists {listing.metadata['what']}, not {what}; give another --data_index, or "
            f"delete {folder}"
        )
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        how = "is new" if name not in before else "is gone" if name not in now else "has changed"
        raise UserError(
            f"{name} {how} since {folder} was written ({plural(len(changed), 'file')} of "
            f"{len(now)} differ); remove {folder}, and the next run lists the images again"
        )


def file_states(paths: list[str]) -> dict[str, list[int]]:
    """Return size in bytes and time of the last change in nanoseconds of each file, by path."""
    return {path: [(state := os.stat(path)).st_size, state.st_mtime_ns] for path in paths}
