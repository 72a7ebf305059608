# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Find the files in a tar file by its headers, without reading their content.

python -c "from data_loading.tar_headers import size_of; print(size_of(bytes(512)))"

A header is a block of 512 bytes; the content follows, padded to whole blocks. All formats: v7,
USTAR, GNU and PAX.
"""

import os
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from data_loading.bad_images import retry_io
from errors import UserError

LOCK = threading.Lock()  # where reading moves the position that threads share
BLOCK = 512
ZEROS = bytes(BLOCK)
BATCH = 1000  # headers that are checked together, or a few more
SMALLEST, LARGEST = 2**12, 2**20  # bytes read at once
MANY = 2**16  # bytes that hold so many headers that they are looked for together
LONGEST = 2**20  # bytes of a long name, or of an extended header
MAX_BYTES = 2**31  # of one image, far more than any that can be decoded
FAR, MOST_DIGITS = 2**62, 18  # bytes and decimal digits of bytes, more than any file has
FILE = ord("0")
FILES = (FILE, 0, ord("7"))  # 0: before USTAR; 7: contiguous
LONG_NAME, LONG_LINK, EXTENDED, GLOBAL, SPARSE = b"LKxgS"
EXTENDED_TOO = ord("X")  # Solaris
BEFORE_A_HEADER = (LONG_NAME, LONG_LINK, EXTENDED, EXTENDED_TOO)
LINKS, FOLDER, DEVICES = b"12", ord("5"), b"346"  # none of them has content
WITHOUT_CONTENT = (*LINKS, FOLDER, *DEVICES)
NOT_COUNTED = (*BEFORE_A_HEADER, GLOBAL, FOLDER, *b"DV")  # D: names in a folder, V: a title
# Places in a header.
NAME, SIZE, CHECKSUM, KIND = slice(0, 100), slice(124, 136), slice(148, 156), 156
MAGIC, PREFIX, MORE = slice(257, 263), slice(345, 500), 482  # MORE: of GNU's sparse files
MORE_IN_NEXT = 504
SPACES = 8 * ord(" ")  # the sum of a checksum's bytes before it is known
USEFUL = (b"path=", b"size=", b"GNU.sparse.")  # in extended headers; most hold only times
SHORT = 128  # bytes of an extended header that holds no more than times
OCTAL = 8 ** np.arange(10, -1, -1)  # of the digits of a size
# Reasons to leave a member out, as in `listing`.
LINK, STORED_SPARSE = "links", "stored as sparse files"
SPECIAL, TOO_LARGE = "devices or of unknown type", "larger than 2 GiB"
COMPRESSED = {  # first bytes -> command that unpacks
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
}
REMEDY = "copy or download it again, or pack it again"


class Members(NamedTuple):
    """Files in a tar file: names as they are stored, first byte and bytes of the content (N,)."""

    names: list[bytes]
    starts: np.ndarray
    sizes: np.ndarray


class Extension(NamedTuple):
    """Name, size and kind that blocks before a header give; None or False if they do not."""

    name: bytes | None = None
    size: int | None = None
    is_sparse: bool = False


class TarHeaders:
    """The headers of a tar file; `left_out` counts the members that are no plain files.

    UserError for a file that is no tar file, is damaged or was cut short, and for one that cannot
    be read; it names the file and the byte.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.left_out: Counter[str] = Counter()
        self.window, self.first, self.width = b"", 0, LARGEST >> 4
        self.jumps: list[int] = []  # of the window, see `_find_jumps`
        self.headers: list[Any] = []  # of a batch: bytes, or (N, 512) arrays
        self.positions, self.sizes = array("q"), array("q")
        self.named: dict[int, bytes] = {}  # place in the batch -> long name
        self.unusable: set[int] = set()
        try:
            self.descriptor = open_file(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; check --data_path") from error
        self.bytes = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, start: int, size: int) -> bytes:
        """Read some bytes of the file, fewer only where it ends."""
        if start >= self.bytes:  # damaged sizes lead to offsets that the system refuses
            return b""
        try:
            return retry_io(partial(read_at, self.descriptor, start, size))
        except (OSError, UserError) as error:  # the former: a folder
            raise UserError(f"{self.path}: byte {start}: {error}") from error

    def members(self) -> Iterator[Members]:
        """Yield the files in batches; a file of more than MAX_BYTES is left out."""
        at: int | None = 0
        while at is not None:
            if len(self.positions) < BATCH:
                at = self._walk(at)
            if len(self.positions) >= BATCH:
                yield self._check()
            else:
                at = self._walk_special(at)
        yield self._check()

    def _walk(self, at: int) -> int:
        """Note headers of plain files from a position on; return that of the next to look at.

        It is a header of another kind, or the first of the next batch.
        """
        while len(self.positions) < BATCH:
            if not 0 <= at - self.first <= len(self.window) - BLOCK:
                self._next_window(at)
            after = self._jump(at) if self.jumps else self._step(at)
            if after == at:
                break
            at = after
        return at

    def _step(self, at: int) -> int:
        """Note the header of a plain file; returns the position of the next, or `at` if none is."""
        offset = at - self.first
        header = self.window[offset : offset + BLOCK]
        if len(header) < BLOCK or header[KIND] != FILE:
            return at
        try:
            size = int(header[SIZE].rstrip(b" \0"), 8)
        except ValueError:
            return at
        if size < 0:
            return at
        self._note(header, at, size)
        return at + BLOCK + (size + 511 & -512)

    def _jump(self, at: int) -> int:
        """Note headers of plain files until the window or their sequence ends, as `_step` does."""
        jumps, count, chain = self.jumps, len(self.jumps), []
        number = first = (at - self.first) // BLOCK
        while number < count and (after := jumps[number]):
            chain.append(number)
            number = after
        if number > first:
            places = np.array(chain)
            self.headers.append(self.blocks[places])
            self.positions.frombytes((places * BLOCK + self.first).tobytes())
            self.sizes.frombytes(self.block_sizes[places].tobytes())
        return at + (number - first) * BLOCK

    def _next_window(self, at: int) -> None:
        """Read more at once where members are small, and less where they are large."""
        skipped = at - self.first - len(self.window)
        if skipped > self.width >> 3:
            self.width = max(self.width >> 1, SMALLEST)
        elif skipped < self.width >> 5:
            self.width = min(self.width << 1, LARGEST)
        self.window, self.first = self.read(at, self.width), at
        self.jumps = self._find_jumps() if self.width >= MANY else []

    def _find_jumps(self) -> list[int]:
        """Return where the next header is if a block is the header of a plain file, otherwise 0.

        In blocks of the window. All of them are taken for headers, as one operation on all is
        faster than one on each header.
        """
        count = len(self.window) // BLOCK
        self.blocks = np.frombuffer(self.window, np.uint8, count * BLOCK).reshape(-1, BLOCK)
        field, kinds = np.ascontiguousarray(self.blocks[:, SIZE]), self.blocks[:, KIND]
        digits, end = field[:, :-1] - np.uint8(ord("0")), field[:, -1]
        self.block_sizes = digits @ OCTAL
        after = np.arange(1, count + 1) + (self.block_sizes + 511 >> 9)
        usable = kinds == FILE
        short = np.flatnonzero((kinds == EXTENDED) & (self.block_sizes <= SHORT) & (after < count))
        contents = self.blocks[short + 1, :SHORT].tobytes() if len(short) else b""
        if not any(word in contents for word in USEFUL):
            usable[short] = True
        usable &= (digits < 8).all(1) & ((end == 0) | (end == ord(" ")))
        return (after * usable).tolist()

    def _walk_special(self, at: int) -> int | None:
        """Note a header of any kind, with those that extend it; None after the last one."""
        extension = Extension()
        while True:
            header = self._block(at)
            if header == ZEROS:
                return self._skip_zeros(at)
            kind, size = header[KIND], self._size(header, at)
            self._note(header, at, size)
            if kind in BEFORE_A_HEADER or kind == GLOBAL:
                extension = self._extend(extension, at, kind, size)
                at += BLOCK + (size + 511 & -512)
                continue
            if extension.size is not None:
                size = self._agreed_size(size, extension.size, at)
            place = len(self.positions) - 1
            self.sizes[place] = size
            if extension.name is not None:
                self.named[place] = extension.name
            if extension.is_sparse:
                self.left_out[STORED_SPARSE] += 1
                self.unusable.add(place)
            elif kind not in FILES:
                self._count_other(kind)
            return self._after(header, at, size)

    def _block(self, at: int) -> bytes:
        offset = at - self.first
        header = self.window[offset : offset + BLOCK] if offset >= 0 else b""
        header = header if len(header) == BLOCK else self.read(at, BLOCK)
        if len(header) < BLOCK:
            self._fail_at_end(at)
        return header

    def _content(self, at: int, size: int, kind: str) -> bytes:
        """Return the content of an extended header or a long name."""
        if size > LONGEST:
            self._fail(at, f"{kind} of {size} bytes, expected at most {LONGEST}; {REMEDY}")
        offset = at + BLOCK - self.first
        content = self.window[offset : offset + size] if offset >= 0 else b""
        content = content if len(content) == size else self.read(at + BLOCK, size)
        if len(content) < size:
            self._fail_at_end(at + BLOCK + size)
        return content

    def _note(self, header: bytes, at: int, size: int) -> None:
        self.headers.append(header)
        self.positions.append(at)
        self.sizes.append(size)

    def _size(self, header: bytes, at: int) -> int:
        if (size := size_of(header)) is None:
            self._note(header, at, 0)
            got = f"the header gives the size {header[SIZE]!r}"
            self._fail(at, f"{got}, expected a number from 0; {REMEDY}")
        return size

    def _extend(self, extension: Extension, at: int, kind: int, size: int) -> Extension:
        """Read what stands before a header."""
        if kind == LONG_LINK:
            return extension
        if kind == LONG_NAME:
            name = self._content(at, size, "a name").partition(b"\0")[0]
            return extension._replace(name=name)
        content = self._content(at, size, "an extended header")
        if not any(word in content for word in USEFUL):
            return extension
        records = self._records(content, at)
        if kind == GLOBAL:
            if records.keys() & {b"path", b"size"}:
                self._fail(at, f"a global header gives one path or size to all; {REMEDY}")
            return extension
        if b"path" in records:
            extension = extension._replace(name=records[b"path"])
        if b"size" in records:
            digits = records[b"size"]
            if not digits.isdigit() or len(digits) > MOST_DIGITS:
                self._fail(at, f"the size {digits[:99]!r} is no number of bytes; {REMEDY}")
            extension = extension._replace(size=int(digits))
        sparse = any(key.startswith(b"GNU.sparse.") for key in records)
        return extension._replace(is_sparse=extension.is_sparse or sparse)

    def _records(self, content: bytes, at: int) -> dict[bytes, bytes]:
        """Read records `LENGTH KEY=VALUE` and a new line, where LENGTH is that of the record."""
        records, place = {}, 0
        while place < len(content) and content[place]:
            digits, space, _ = content[place : place + 20].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            record = content[place + len(digits) + 1 : place + length]
            key, equals, value = record[:-1].partition(b"=")
            if not (space and equals and record.endswith(b"\n") and place + length <= len(content)):
                self._fail(at, f"the extended header is damaged; {REMEDY}")
            records[key] = value
            place += length
        return records

    def _agreed_size(self, size: int, extended: int, at: int) -> int:
        """Return the size of an extended header, which may replace one that is too large."""
        if size != extended <= MAX_BYTES:
            self._fail(at, f"it has {size} bytes in one header and {extended} in another; {REMEDY}")
        return extended

    def _count_other(self, kind: int) -> None:
        if kind in LINKS:
            self.left_out[LINK] += 1
        elif kind == SPARSE:
            self.left_out[STORED_SPARSE] += 1
        elif kind not in NOT_COUNTED:
            self.left_out[SPECIAL] += 1

    def _after(self, header: bytes, at: int, size: int) -> int:
        """Return the position behind a member."""
        at += BLOCK
        if header[KIND] in WITHOUT_CONTENT:
            self.sizes[-1] = 0
            return at
        if header[KIND] == SPARSE:
            place = MORE
            while header[place]:  # blocks that say where the zeros are
                header, place, at = self._block(at), MORE_IN_NEXT, at + BLOCK
        return at + (size + 511 & -512)

    def _skip_zeros(self, at: int) -> int | None:
        """Return the position of what follows the end mark, as in joined tar files, or None."""
        while part := self.read(at, LARGEST):
            if rest := part.lstrip(b"\0"):
                return at + (len(part) - len(rest)) // BLOCK * BLOCK
            at += len(part)
        return None

    def _check(self) -> Members:
        """Check the headers of the batch, and return its files."""
        heads = self.headers[0] if len(self.headers) == 1 else b"".join(self.headers)
        heads = np.frombuffer(heads, np.uint8).reshape(-1, BLOCK)
        positions, sizes = np.array(self.positions), np.array(self.sizes)
        if len(wrong := np.flatnonzero(~has_valid_checksum(heads))):
            self._refuse(heads[wrong[0]].tobytes(), int(positions[wrong[0]]))
        usable = np.isin(heads[:, KIND], FILES)
        usable[list(self.unusable)] = False
        large = usable & (sizes > MAX_BYTES)
        if large.any():
            self.left_out[TOO_LARGE] += int(large.sum())
            usable &= ~large
        places = np.flatnonzero(usable)
        names = names_of(heads if usable.all() else heads[places])
        for place, name in self.named.items():
            if usable[place]:
                names[int(np.searchsorted(places, place))] = name
        text = b"\0".join([*names, b""])
        if text.count(b"\0") > len(names):  # something behind the end of a name
            names = [name.partition(b"\0")[0] for name in names]
            text = b"\0".join([*names, b""])
        if b"/\0" in text:  # folders, as before USTAR
            files = [number for number, name in enumerate(names) if not name.endswith(b"/")]
            names, places = [names[number] for number in files], places[files]
        self._clear()
        return Members(names, positions[places] + BLOCK, sizes[places])

    def _clear(self) -> None:
        for collected in (self.headers, self.named, self.unusable):
            collected.clear()
        self.positions, self.sizes = array("q"), array("q")

    def _refuse(self, header: bytes, at: int) -> NoReturn:
        if at == 0:
            for start, command in COMPRESSED.items():
                if header.startswith(start):
                    raise UserError(f"{self.path}: is compressed; {unpack_by(command, self.path)}")
            raise UserError(
                f"{self.path}: expected a tar file, but it begins with {header[:16]!r}; {REMEDY}"
            )
        raise UserError(
            f"{self.path}: byte {at}: expected a header, but the checksum does not fit: the file "
            f"is damaged, or data follows its end; {REMEDY}"
        )

    def _fail(self, at: int, problem: str) -> NoReturn:
        self._check()  # a damaged header before may be the reason
        raise UserError(f"{self.path}: byte {at}: {problem}")

    def _fail_at_end(self, at: int) -> NoReturn:
        if self.bytes < BLOCK:
            raise UserError(f"{self.path}: expected a tar file, got {self.bytes} bytes; {REMEDY}")
        self._check()
        if at > self.bytes:
            raise UserError(
                f"{self.path}: cut short: it has {self.bytes} bytes, but its last member ends at "
                f"byte {at}; {REMEDY}"
            )
        raise UserError(
            f"{self.path}: byte {at}: expected 1024 zeros at the end, so the file is cut short or "
            f"was not written to its end; {REMEDY}; if nothing is missing, "
            f"truncate -s +1024 {self.path} adds them"
        )


def open_file(path: str) -> int:
    """Open a file for reading; returns its descriptor."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def read_at(descriptor: int, start: int, size: int) -> bytes:
    """Read from a place in a file, fewer bytes only where it ends. Threads may share the file."""
    part = _pread(descriptor, size, start)
    while len(part) < size and (more := _pread(descriptor, size - len(part), start + len(part))):
        part += more
    return part


def _pread(descriptor: int, size: int, start: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, start)
    with LOCK:  # Windows
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, size)


def unpack_by(command: str, path: str) -> str:
    """Return what to do with a compressed tar file."""
    return f"compressed files have no random access: unpack it first, {command} {path}"


def size_of(header: bytes) -> int | None:
    """Return the bytes of content that a header gives; None if it gives no number from 0.

    In octal digits, or as a binary number after the byte 128.
    """
    field = header[SIZE]
    if field[0] == 0x80:
        return min(int.from_bytes(field[1:], "big"), FAR)
    try:
        size = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return size if size >= 0 else None


def has_valid_checksum(heads: np.ndarray) -> np.ndarray:
    """Return whether the sum of each header (N, 512) uint8 is the one that it gives, (N,) bool.

    The eight bytes of the checksum itself count as spaces.
    """
    field = heads[:, CHECKSUM]
    given = np.zeros(len(heads), np.int64)
    for column in field.T:
        digit = column - np.uint8(ord("0"))
        given = np.where(digit < 8, given * 8 + digit, given)
    valid = given == _sum(heads) - _sum(field) + SPACES
    if not valid.all():  # old writers took the bytes as signed
        valid |= given == _sum(heads.view(np.int8)) - _sum(field.view(np.int8)) + SPACES
    return valid


def _sum(rows: np.ndarray) -> np.ndarray:
    return rows.sum(1, dtype=np.int32)


def names_of(heads: np.ndarray) -> list[bytes]:
    """Return the names that headers (N, 512) uint8 store; after a zero may be more."""
    names = np.ascontiguousarray(heads[:, NAME]).view("S100").ravel().tolist()
    for row in np.flatnonzero(heads[:, PREFIX.start]):
        if heads[row, MAGIC].tobytes() == b"ustar\0":  # GNU has times there
            prefix = heads[row, PREFIX].tobytes().partition(b"\0")[0]
            names[row] = prefix + b"/" + names[row]
    return names
