# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Encoded images in shared memory, once for all processes of a machine (--ram_cache).

python main_pretrain.py --data_path photos --ram_cache --dry_run

The file in /dev/shm loses its name before it is filled, so its memory is free as soon as the
processes that use it have ended, in whatever way.
"""

import mmap
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_loading.bad_images import retry_io
from data_loading.decode import BadImage
from data_loading.files import Files
from data_loading.images import Images
from data_loading.index import Listing
from data_loading.mixed import Listed
from data_loading.split import Part
from errors import UserError, format_bytes, plural
from parallel.process_group import all_gather, get_logger, get_rank

SHARED, MEMORY = Path("/dev/shm"), Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
THREADS, CHUNK = 16, 64  # that fill the memory; images at a time
USABLE = 0.9  # of the free memory; batches of loader processes need some too
PORTIONS, QUIET = 50, 10.0  # of the images, read one after the other; seconds between log lines


class HeldFiles(Files):
    """Images in a shared memory file; those that are not in it are read from where they are.

    path: of the file, which begins with (N + 1,) int64, where each image begins and the last ends,
    and (N,) uint8, 1 for images that it holds.
    """

    def __init__(self, files: Files, path: str) -> None:
        self.files, self.names = files, files.names
        with open(path, "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ends = np.frombuffer(self.memory, np.int64, len(files) + 1)
        self.held = np.frombuffer(self.memory, np.uint8, len(files), self.ends.nbytes)

    def read(self, number: int) -> bytes:
        """Return the content of an image file."""
        if not self.held[number]:
            return self.files.read(number)
        return self.memory[self.ends[number] : self.ends[number + 1]]

    def locate(self, number: int) -> str:
        """Return where an image is without the cache."""
        return self.files.locate(number)


def open_held(open_files: Callable[[Listing], Files], path: str, listing: Listing) -> HeldFiles:
    """Open images in shared memory; open_files: opens them without it."""
    return HeldFiles(open_files(listing), path)


def hold_in_ram(dataset: Any, what: str, dry_run: bool = False) -> None:
    """Read the images of a data set, or of a part of one, into shared memory.

    what: for messages, such as `train`. dry_run: only compare their size with the free memory.
    UserError if it is too small, or if /dev/shm is missing. Every rank must call it.
    """
    if not SHARED.is_dir():
        raise UserError(f"--ram_cache needs {SHARED}, which Linux has; drop --ram_cache")
    parts, leader, copies = list(_parts_of(dataset)), _leader(), []

    def measure() -> int:
        copies.extend(_Copy(images.files, numbers) for images, numbers in parts)
        size = sum(copy.bytes for copy in copies)
        _check(size, what)
        return size

    began = time.monotonic()
    size = _on(leader, measure)
    if dry_run:
        text = "%s: --ram_cache would hold %s of image files on each machine, %s free"
        return get_logger().info(text, what, format_bytes(size), format_bytes(free_memory()))
    text = "%s: reading %s of image files into shared memory, once on each machine"
    get_logger().info(text, what, format_bytes(size))
    paths = _on(leader, lambda: [copy.create() for copy in copies])
    try:
        opened = _everywhere(lambda: [os.open(path, os.O_RDWR) for path in paths])
    finally:
        for copy in copies:
            copy.unlink()
    shown = began
    for portion in range(PORTIONS):  # ranks wait for each other for one hour at most
        _on(leader, partial(_fill, copies, opened, portion))
        if time.monotonic() - shown > QUIET:
            shown = time.monotonic()
            get_logger().info("%s: read %.0f%%", what, 100 * (portion + 1) / PORTIONS)
    for (images, _), file in zip(parts, opened, strict=True):
        # Spawned workers open it by this path, since they inherit neither memory nor files.
        path = f"/proc/{os.getpid()}/fd/{file}"
        images.open_files = partial(open_held, images.open_files, path)
        images.files = images.open_files(images.listing)
    number = plural(sum(len(numbers) for _, numbers in parts), "image")
    get_logger().info("%s: read %s in %.0f s", what, number, time.monotonic() - began)
    return None


def _parts_of(dataset: Any) -> list[tuple[Images, np.ndarray]]:
    """Return the sources of a data set, and the numbers of the images of each that are used."""
    used = np.arange(len(dataset))
    if isinstance(dataset, Part):
        dataset, used = dataset.dataset, np.unique(dataset.indices)
    if not isinstance(dataset, Listed):
        raise UserError("--ram_cache holds image files, and the data set has none; drop it")
    if isinstance(dataset, Images):
        return [(dataset, used)]
    starts = dataset.starts
    ranges = np.searchsorted(used, starts)
    return [
        (images, used[ranges[number] : ranges[number + 1]] - starts[number])
        for number, images in enumerate(dataset.parts)
    ]


class _Copy:
    """A shared memory file with some images of `files`; made by one process of a machine."""

    def __init__(self, files: Files, numbers: np.ndarray) -> None:
        self.files, self.numbers, self.path, self.threads = files, numbers, "", THREADS
        if (order := files.order()) is not None:
            self.numbers, self.threads = order[np.isin(order, numbers)], 1
        self.held = np.zeros(len(files), np.uint8)
        sizes = np.zeros(len(files), np.int64)
        self._in_threads(partial(_size, files), sizes, self.numbers)
        begin = 9 * len(files) + 8
        self.ends = np.concatenate([[0], np.cumsum(sizes)]) + begin
        self.bytes = int(self.ends[-1])

    def create(self) -> str:
        """Create the file, which takes no memory yet; returns its path."""
        self.path = str(SHARED / f"convnextv2-{secrets.token_hex(8)}")
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(file, self.bytes)
        finally:
            os.close(file)
        return self.path

    def unlink(self) -> None:
        """Remove the name of the file; those that have it open keep it."""
        with suppress(OSError):
            os.unlink(self.path)

    def fill(self, file: int, portion: int) -> None:
        """Write one of PORTIONS; images that cannot be read are left to whoever asks for them."""
        numbers = np.array_split(self.numbers, PORTIONS)[portion]
        self._in_threads(partial(self._copy, file), self.held, numbers)
        if portion == PORTIONS - 1:
            _write(file, self.ends.tobytes(), 0)
            _write(file, self.held.tobytes(), self.ends.nbytes)

    def _in_threads(
        self, work: Callable[[int], Any], results: np.ndarray, numbers: np.ndarray
    ) -> None:
        """Run `work` for each number, and set its result."""

        def run(chunk: np.ndarray) -> None:
            results[chunk] = [work(number) for number in chunk.tolist()]

        chunks = [numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK)]
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in pool.map(run, chunks):
                pass

    def _copy(self, file: int, number: int) -> bool:
        try:
            content = retry_io(partial(self.files.read, number))
        except (BadImage, OSError):
            return False
        if not content or len(content) != self.ends[number + 1] - self.ends[number]:
            return False
        _write(file, content, int(self.ends[number]))
        return True


def _fill(copies: Sequence[_Copy], opened: Sequence[int], portion: int) -> None:
    for copy, file in zip(copies, opened, strict=True):
        copy.fill(file, portion)


def _size(files: Files, number: int) -> int:
    try:
        return retry_io(partial(files.size, number))
    except (BadImage, OSError):  # reported when the image is read
        return 0


def _write(file: int, content: bytes, place: int) -> None:
    """Write all bytes at a place; OSError if memory runs out, which a memory map would kill."""
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written


def _check(size: int, what: str) -> None:
    """Raise UserError if the free memory of this machine is too small."""
    memory, shared = free_memory(), shutil.disk_usage(SHARED).free
    if size <= USABLE * min(memory, shared):
        return
    fix = "resize the images once (pack.py --size), or drop --ram_cache"
    if size <= USABLE * memory:
        fix = f"enlarge {SHARED} (docker run --shm-size, mount -o remount,size=...), {fix}"
    raise UserError(
        f"--ram_cache: {what} has {format_bytes(size)} of image files, and {USABLE:.0%} of the "
        f"free {format_bytes(memory)} of memory and {format_bytes(shared)} of {SHARED} may be "
        f"used; {fix}"
    )


def free_memory() -> int:
    """Return the bytes that this machine, or the container, has free."""
    free = int(re.search(r"MemAvailable: +(\d+)", MEMORY.read_text())[1]) * 1024
    with suppress(OSError, ValueError, TypeError):  # no limit of a container, or of another kind
        limit, used = (int((CGROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        stat = (CGROUP / "memory.stat").read_text()
        cached = int(re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)[1])  # given up first
        free = min(free, limit - used + cached)
    return free


def _leader() -> int:
    """Return the rank that reads for all of this machine, or container."""
    mine = f"{socket.gethostname()} {os.stat(SHARED).st_dev}"
    return all_gather(mine).index(mine)


def _on(leader: int, work: Callable[[], Any]) -> Any:
    """Run `work` on the leader of each machine, and return its result on all of its ranks."""
    return _gather(work if leader == get_rank() else None)[leader]


def _everywhere(work: Callable[[], Any]) -> Any:
    return _gather(work)[get_rank()]


def _gather(work: Callable[[], Any] | None) -> Sequence[Any]:
    """Return the results of all ranks; an error of one is raised on all."""
    value, problem = None, ""
    try:
        value = work() if work else None
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"--ram_cache: {SHARED}: {error.strerror}; enlarge it, or drop --ram_cache"
    found = all_gather((value, problem))
    if problems := [problem for _, problem in found if problem]:
        raise UserError(problems[0])
    return [value for value, _ in found]
