# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images in tar files and WebDataset shards, read at any place without unpacking.

python -c "from data_loading.tar import expand; print(expand('data_loading/{tar,decode}.py'))"
"""

import glob
import itertools
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from config.flags import CORES
from data_loading import webdataset
from data_loading.bad_images import is_transient
from data_loading.files import Files, Found, Names
from data_loading.formats import extensions
from data_loading.listing import (
    ARRAY,
    MAX_KINDS,
    OTHERS,
    SYSTEM,
    arrays_of_images,
    describe_left_out,
    is_system,
    reason_of,
)
from data_loading.tar_headers import (
    BLOCK,
    FILES,
    KIND,
    Members,
    TarHeaders,
    open_file,
    read_at,
    size_of,
    unpack_by,
)
from errors import UserError, first_few, plural

UNPACK = {  # endings of compressed tar files -> command that unpacks
    (".tar.gz", ".tgz", ".taz"): "gunzip",
    (".tar.bz2", ".tbz2", ".tbz", ".tb2"): "bunzip2",
    (".tar.xz", ".txz", ".tar.lzma", ".tlz"): "unxz",
    (".tar.zst", ".tzst", ".tar.zstd"): "unzstd",
    (".tar.lz4",): "unlz4",
}
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
MOST_PATHS = 10**7  # of a pattern
REPLACED = "replaced by a later one of the same name"
MOST_PROCESSES, MOST_FOLDERS = 32, 10**5  # the latter: that are remembered
OPEN_SHARDS = 256  # at most, in each process
CHANGED = "was cut short or changed since it was listed; restore it, or list it again"


def expand(pattern: str) -> list[str]:
    """Return the tar files that a path, `shard-{0000..0123}.tar` or a pattern such as `*.tar` name.

    In the order of the braces, and of the names that match a pattern. UserError if there are none,
    if some do not exist, and for compressed ones.
    """
    if os.path.exists(pattern):
        paths = [pattern]
    else:
        listed = list(dict.fromkeys(_expand_braces(pattern)))
        found = [sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
                 for path in listed]  # fmt: skip
        paths = list(dict.fromkeys(itertools.chain.from_iterable(found)))
        if not paths:
            raise UserError(f"{pattern}: no such files; check --data_path")
    for endings, command in UNPACK.items():
        if packed := [path for path in paths if path.lower().endswith(endings)]:
            raise UserError(f"{first_few(packed)}: {unpack_by(command, packed[0])}")
    missing = [path for path in paths if not os.path.exists(path)]
    if missing and len(paths) == 1:
        raise UserError(f"{pattern}: no such file; check --data_path")
    if missing:
        raise UserError(
            f"{pattern}: {len(missing)} of {plural(len(paths), 'shard')} do not exist: "
            f"{first_few(missing, 5)}; add them, or give fewer"
        )
    return paths


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yield the paths of a pattern with braces, as bash does: `{00..12}`, `{0..9..3}`, `{a,b}`."""
    parts: list[Sequence[str]] = []
    for place, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if place % 2 == 0:
            parts.append([part])
        elif found := RANGE.fullmatch(part):
            parts.append(_numbers(*found.groups()))
        else:
            parts.append(part.split(",") if "," in part else ["{" + part + "}"])
    total = np.prod([len(part) for part in parts], dtype=float)
    if total > MOST_PATHS:
        raise UserError(f"{pattern}: {total:.0f} files, expected at most {MOST_PATHS}")
    return map("".join, itertools.product(*parts))


def _numbers(first: str, last: str, step: str | None) -> list[str]:
    """Return the numbers of a range as text, of one width if one of them begins with a zero."""
    padded = any(re.match(r"-?0\d", text) for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    start, end, stride = int(first), int(last), abs(int(step or 1)) or 1
    if abs(end - start) // stride > MOST_PATHS:
        raise UserError(f"{{{first}..{last}}}: expected at most {MOST_PATHS} files")
    sign = 1 if end >= start else -1
    return [f"{number:0{width}d}" for number in range(start, end + sign, sign * stride)]


class Shard(NamedTuple):
    """The images of one shard, in the order of the file."""

    text: np.ndarray  # (bytes,) uint8, names with a zero behind each
    blocks: np.ndarray  # (N,) uint32 or uint64: the first of the content
    sizes: np.ndarray  # (N,) uint32: bytes of the content
    left_out: Counter[str]
    samples: webdataset.Samples | None  # None: the shard has no label files


def list_tar(shards: Sequence[str], labeled: bool, columns: Sequence[str] | None = None) -> Found:
    """List the images of tar files, in the order of the files and of their members.

    If label files (`0001.cls`, `.json`, `.txt`) have the keys of images, the shards are a
    WebDataset: only images whose extension follows the key are taken. Otherwise all images are.
    labeled: read the label files; columns: only these, or those that match patterns like `tag_*`.
    The places are `shard`, `block` and `size`, as `TarFiles` takes them.

    UserError if there are no images, if a file is no tar file, damaged or cut short, if a name
    leads outside, and for labels that some images lack or that have several types.
    """
    parts = _in_processes(partial(_list_shard, labeled=labeled, columns=columns), shards)
    left_out: Counter[str] = Counter()
    for part in parts:
        _count_all(left_out, part.left_out)
    found: dict[str, Any] = {}
    if any(part.samples and part.samples.labels for part in parts):
        parts = [
            _only_main(shard, part, left_out) for shard, part in zip(shards, parts, strict=True)
        ]
        webdataset.refuse_doubles(part.samples for part in parts)
        found = webdataset.join_columns([part.samples for part in parts]) if labeled else {}
    for part in parts:
        _count_all(left_out, part.samples.others if part.samples else {})
    if not any(len(part.sizes) for part in parts):
        raise UserError(
            f"{first_few(shards)}: no images; expected some of {' '.join(extensions())}"
            f"{describe_left_out(left_out)}"
        )
    return Found(_join_names(parts), _join_places(parts), found, {}, left_out)


def _only_main(shard: str, part: Shard, left_out: Counter[str]) -> Shard:
    """Leave out images such as `0001.seg.png`."""
    names = _names(part.text)
    samples = part.samples or webdataset.group(shard, _split(names), {})
    if len(samples.main) == len(names):
        return part._replace(samples=samples)
    for number in np.setdiff1d(np.arange(len(names)), samples.main):
        name = names.encoded(number)
        _count(left_out, os.fsdecode(name[len(webdataset.key_of(name)) :]).lower(), 1)
    taken = names.take(samples.main)
    return part._replace(
        text=taken.text,
        blocks=part.blocks[samples.main],
        sizes=part.sizes[samples.main],
        samples=samples,
    )


def _split(names: Names) -> list[bytes]:
    return names.text.tobytes().split(b"\0")[:-1]


def _names(text: np.ndarray) -> Names:
    """Return the names of a text with a zero behind each."""
    return Names(text, np.concatenate([[0], np.flatnonzero(text == 0) + 1]))


def _join_names(parts: Sequence[Shard]) -> Names:
    ends = np.zeros(1 + sum(len(part.sizes) for part in parts), np.int64)
    place = 1
    for part in parts:
        after = place + len(part.sizes)
        ends[place:after] = _names(part.text).ends[1:] + ends[place - 1]
        place = after
    return Names(np.concatenate([part.text for part in parts]), ends)


def _join_places(parts: Sequence[Shard]) -> dict[str, np.ndarray]:
    numbers = np.arange(len(parts), dtype=np.min_scalar_type(len(parts)))
    return {
        "shard": np.repeat(numbers, [len(part.sizes) for part in parts]),
        "block": np.concatenate([part.blocks for part in parts]),
        "size": np.concatenate([part.sizes for part in parts]),
    }


def _in_processes(work: Any, shards: Sequence[str]) -> list[Shard]:
    """Return the results of all shards, from several processes where there are cores for them."""
    processes = min(len(shards), CORES, MOST_PROCESSES)
    inside = multiprocessing.current_process().daemon  # may not have processes of its own
    unsafe = sys.platform == "darwin" or not hasattr(os, "fork")
    if processes < 2 or inside or unsafe:
        return [work(shard) for shard in shards]
    context = multiprocessing.get_context("fork")  # others would import torch, for seconds
    with ProcessPoolExecutor(processes, context) as pool:
        try:
            return list(pool.map(work, shards))
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that listed {first_few(shards)} was killed, as when memory runs out: "
                "check memory (free -g), then start again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _list_shard(shard: str, labeled: bool, columns: Sequence[str] | None) -> Shard:
    lister = _Lister(shard)
    for members in lister.headers.members():
        lister.add(members)
    return lister.finish(labeled, columns)


class _Lister:
    """Collects the images and label files of a shard."""

    def __init__(self, shard: str) -> None:
        self.shard, self.headers = shard, TarHeaders(shard)
        self.left_out: Counter[str] = Counter()
        self.endings: dict[bytes, bool] = {}  # of names; True: of images
        self.folders: dict[bytes, bool] = {}  # True: one of the system
        self.texts: list[bytes] = []
        self.arrays: list[np.ndarray] = []  # (3, N) int64: hashes of the names, starts, sizes
        self.labels: webdataset.Places = {extension: {} for extension in webdataset.LABELS}

    def add(self, members: Members) -> None:
        """Sort the files of a batch of headers."""
        names, text, has_dots = self._clean(members.names)
        numbers: Sequence[int] = range(len(names))
        if self._has_system_folders(names) or has_dots:
            hidden = [self._is_hidden(name) for name in names]
            _count(self.left_out, SYSTEM, sum(hidden))
            numbers = [number for number in numbers if not hidden[number]]
        if len(numbers) < len(names) or not self._are_images(names, text):
            are_images = self._find_images(names)
            self._add_others(members, names, [n for n in numbers if not are_images[n]])
            numbers = [number for number in numbers if are_images[number]]
            names = [names[number] for number in numbers]
            text = _join(names)
        if names:
            self.texts.append(text[1:])
            places = np.array(numbers)
            hashes = np.fromiter(map(hash, names), np.int64, len(names))
            self.arrays.append(np.stack([hashes, members.starts[places], members.sizes[places]]))

    def _clean(self, names: list[bytes]) -> tuple[list[bytes], bytes, bool]:
        """Remove what may be in a path without a meaning, such as `./`.

        Returns also `_join` of the names, and whether a part of one begins with a dot.
        """
        text = _join(names)
        if b"\0./" in text:
            names = [name[2:].lstrip(b"/") if name[:2] == b"./" else name for name in names]
            text = _join(names)
        if is_odd := _is_odd(text):
            names = [self._clean_one(name) for name in names]
            text = _join(names)
        return names, text, is_odd and _is_odd(text)

    def _clean_one(self, name: bytes) -> bytes:
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if (name.startswith(b"/") or b".." in parts) and _is_used(_ending(name)):
            raise UserError(
                f"{self.shard}: the member {os.fsdecode(name)!r} has an absolute path or one with "
                "'..', expected one within the archive; pack it again: tar -cf SHARD -C FOLDER ."
            )
        return b"/".join(parts)

    def _find_images(self, names: list[bytes]) -> list[bool]:
        endings = [_ending(name) for name in names]
        for ending in {*endings} - self.endings.keys():
            self.endings[ending] = _is_image(ending)
        found = [self.endings[ending] for ending in endings]
        if len(self.endings) > 10 * MAX_KINDS:  # names without extension are endings too
            self.endings.clear()
        return found

    @staticmethod
    def _are_images(names: list[bytes], text: bytes) -> bool:
        """Return True if all names end as the first of them; False does not say anything."""
        if names and _is_image(ending := _ending(names[0])):
            return text.count(ending + b"\0") == len(names)
        return False

    def _has_system_folders(self, names: list[bytes]) -> bool:
        folders = {name.rpartition(b"/")[0] for name in names}
        if len(self.folders) > MOST_FOLDERS:
            self.folders = {}
        for folder in folders - self.folders.keys():
            self.folders[folder] = any(map(is_system, os.fsdecode(folder).split("/")))
        return any(self.folders[folder] for folder in folders)

    def _is_hidden(self, name: bytes) -> bool:
        folder, _, base = name.rpartition(b"/")
        return self.folders[folder] or base.startswith(b".")

    def _add_others(self, members: Members, names: list[bytes], numbers: Iterable[int]) -> None:
        """Note label files, and count what is no image."""
        starts, sizes = members.starts.tolist(), members.sizes.tolist()
        for number in numbers:
            name = names[number]
            dot = name.find(b".", name.rfind(b"/") + 1)
            places = self.labels.get(name[dot:].lower())
            if places is None:
                _count(self.left_out, reason_of(os.fsdecode(name.rpartition(b"/")[2])), 1)
            else:
                places[name[:dot]] = starts[number], sizes[number]

    def finish(self, labeled: bool, columns: Sequence[str] | None) -> Shard:
        """Return the images, each name once: a later member replaces an earlier one."""
        text = np.frombuffer(b"".join(self.texts), np.uint8)
        hashes, starts, sizes = np.concatenate([np.zeros((3, 0), np.int64), *self.arrays], axis=1)
        names = _names(text)
        self.arrays.clear()
        self.texts.clear()
        if len(replaced := _replaced(names, hashes)):
            kept = np.setdiff1d(np.arange(len(names)), replaced)
            names, starts, sizes = names.take(kept), starts[kept], sizes[kept]
            _count(self.left_out, REPLACED, len(replaced))
        if b".npy\0" in names.text.tobytes() and (arrays := arrays_of_images(names)):
            kept = np.array([n for n, name in enumerate(names) if name not in arrays], np.int64)
            names, starts, sizes = names.take(kept), starts[kept], sizes[kept]
            _count(self.left_out, ARRAY, len(arrays))
        _count_all(self.left_out, self.headers.left_out)
        samples = (
            self._group(_split(names), labeled, columns) if any(self.labels.values()) else None
        )
        blocks = starts // BLOCK
        small = blocks.max(initial=0) < 2**32  # shards of less than 2 TiB
        blocks = blocks.astype(np.uint32 if small else np.uint64)
        return Shard(names.text, blocks, sizes.astype(np.uint32), self.left_out, samples)

    def _group(
        self, names: list[bytes], labeled: bool, columns: Sequence[str] | None
    ) -> webdataset.Samples:
        samples = webdataset.group(self.shard, names, self.labels)
        if labeled and samples.labels:
            keys = [webdataset.key_of(names[number]) for number in samples.main]
            read = self.headers.read
            samples.columns = webdataset.read_columns(self.shard, keys, self.labels, read, columns)
        return samples


def _ending(name: bytes) -> bytes:
    return name[name.rfind(b".") :]


def _join(names: list[bytes]) -> bytes:
    """Join names with a zero before and behind each."""
    return b"\0".join([b"", *names, b""])


def _is_odd(text: bytes) -> bool:
    """Return whether, in the text of `_join`, a part of a path is empty or begins with a dot."""
    letters = np.frombuffer(text, np.uint8)
    before, after = letters[:-1], letters[1:]
    starts = (before == 0) | (before == ord("/"))
    return bool((starts & ((after == ord(".")) | (after == ord("/")))).any())


def _is_image(ending: bytes) -> bool:
    return os.fsdecode(ending).lower() in extensions()


def _is_used(ending: bytes) -> bool:
    return _is_image(ending) or ending.lower() in webdataset.LABELS


def _count(left_out: Counter[str], reason: str, number: int) -> None:
    """Count what is left out; extensions beyond the first hundred are counted together."""
    if number:
        known = reason in left_out or len(left_out) < MAX_KINDS or reason[0] != "."
        left_out[reason if known else OTHERS] += number


def _count_all(left_out: Counter[str], counts: Mapping[str, int]) -> None:
    for reason, number in counts.items():
        _count(left_out, reason, number)


def _replaced(names: Names, hashes: np.ndarray) -> np.ndarray:
    """Return the numbers of the names that occur again later."""
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():  # as nearly always
        return np.zeros(0, np.int64)
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(np.diff(hashes[order]) == 0)
    same: dict[bytes, list[int]] = {}
    for number in np.unique(order[np.concatenate([again, again + 1])]):
        same.setdefault(names.encoded(number), []).append(number)
    return np.array([number for numbers in same.values() for number in numbers[:-1]], np.int64)


class _Descriptor:
    """A file open for reading, closed with the last reference to it: no thread reads it then."""

    def __init__(self, path: str) -> None:
        self.number = open_file(path)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class TarFiles(Files):
    """Images in tar files.

    places: (N,) arrays: `shard`, the number of the file in `shards`; `block`, where the content
    begins, in blocks of 512 bytes; `size` of the content in bytes. above: folders in the archives
    that `names` do not have.
    """

    def __init__(
        self, shards: Sequence[str], names: Names, places: dict[str, np.ndarray], above: str = ""
    ) -> None:
        self.shards, self.names, self.places, self.above = list(shards), names, places, above
        self.open = lru_cache(OPEN_SHARDS)(_Descriptor)

    def __reduce__(self) -> tuple:
        return TarFiles, (self.shards, self.names, self.places, self.above)

    def read(self, number: int) -> bytes:
        """Return an image file; UserError if its shard has changed, OSError if the disk fails."""
        shard, block, size = (int(self.places[name][number]) for name in ("shard", "block", "size"))
        path = self.shards[shard]
        try:
            opened = self.open(path)  # stays open while this refers to it
            header = read_at(opened.number, (block - 1) * BLOCK, BLOCK)
            content = read_at(opened.number, block * BLOCK, size)
        except OSError as error:
            if is_transient(error):
                raise
            raise UserError(f"{path}: {error.strerror}; it {CHANGED}") from error
        if len(header) < BLOCK or len(content) < size:
            raise UserError(f"{path}: ends before byte {block * BLOCK + size}: it {CHANGED}")
        if header[KIND] not in FILES or size_of(header) != size:
            raise UserError(
                f"{path}: byte {(block - 1) * BLOCK}: not the listed image: it {CHANGED}"
            )
        return content

    def size(self, number: int) -> int:
        """Return the bytes of an image file."""
        return int(self.places["size"][number])

    def locate(self, number: int) -> str:
        """Return `shards/shard-0003.tar/cat/1.jpg`."""
        shard = self.shards[int(self.places["shard"][number])]
        return f"{shard}/{self.above}{self.names[number]}"
