# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images in a zip file, read in any order without unpacking it.

python main_pretrain.py --data_path photos.zip --dry_run
"""

import os
import stat
import struct
import zipfile
import zlib
from collections import Counter
from contextlib import suppress

import numpy as np

from data_loading.decode import BadImage
from data_loading.files import Files, Found, Names, reason_to_leave_out
from data_loading.index import Listing
from data_loading.listing import ARRAY, arrays_of_images
from errors import UserError, first_few, plural

HEADER = struct.Struct("<4s5H3I2H")  # of a member, ahead of its name
MAX_BYTES = 2**31  # of an image file
UTF8 = 1 << 11  # the flag of names in UTF-8
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def list_zip(path: str) -> Found:
    """List the images of a zip file by its directory; nothing is unpacked.

    UserError if it is damaged, encrypted or packed by a method other than deflate.
    """
    try:
        with zipfile.ZipFile(path) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            for member in members:
                member.filename = _clean(member)
    except (OSError, zipfile.BadZipFile, UnicodeError) as error:
        raise UserError(
            f"cannot read {path}: {error}; expected a whole zip file: copy or download it again"
        ) from error
    _refuse_outside(path, members)
    left_out: Counter[str] = Counter()
    latest = {member.filename: member for member in members}  # a name twice: the last counts
    images = []
    for name, member in latest.items():
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        reason = "linking to a file" if is_link else reason_to_leave_out(name)
        if reason:
            left_out[reason] += 1
        else:
            images.append(member)
    if arrays := arrays_of_images(member.filename for member in images):
        left_out[ARRAY] += len(arrays)
        images = [member for member in images if member.filename not in arrays]
    _check(path, images)
    fields = ("header_offset", "compress_size", "file_size", "CRC", "compress_type")
    places = {
        name.lower(): np.array([getattr(member, name) for member in images], np.int64)
        for name in fields
    }
    names = Names.pack(os.fsencode(member.filename) for member in images)
    return Found(names, places, left_out=left_out)


def _clean(member: zipfile.ZipInfo) -> str:
    """Return the name of a member, read as UTF-8 if it can be, with slashes."""
    name = member.filename
    if not member.flag_bits & UTF8:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    start, *parts = name.replace("\\", "/").split("/")
    kept = [part for part in parts if part not in ("", ".")]
    return "/".join([*([] if start == "." else [start]), *kept])


def _refuse_outside(path: str, members: list[zipfile.ZipInfo]) -> None:
    names = [member.filename for member in members]
    outside = [name for name in names if name.startswith("/") or ".." in name.split("/")]
    if outside:
        raise UserError(
            f"{path}: {plural(len(outside), 'member')} would be outside of the folder that it is "
            f"unpacked in: {first_few(outside)}; pack it again with relative names"
        )


def _check(path: str, members: list[zipfile.ZipInfo]) -> None:
    """Raise UserError for members that cannot be read."""
    locked = [member.filename for member in members if member.flag_bits & 1]
    packed = [member.filename for member in members if member.compress_type not in METHODS]
    large = [member.filename for member in members if member.file_size > MAX_BYTES]
    for found, problem, fix in (
        (locked, "encrypted", "pack it again without a password"),
        (packed, "packed by another method than deflate", "pack it again (zip -r)"),
        (large, "larger than 2 GiB", "remove them"),
    ):
        if found:
            count = plural(len(found), "image")
            raise UserError(f"{path}: {count} in it {problem}: {first_few(found)}; {fix}")


class ZipFiles(Files):
    """Images in a zip file; a member is never unpacked beyond the size in the directory.

    listing: its arrays have what `list_zip` finds.
    """

    def __init__(self, path: str, listing: Listing) -> None:
        self.path, self.names, self.places = path, listing.names, listing.arrays
        self.above = listing.metadata.get("above", "")
        self.opened: tuple[int, int] | None = None  # process, file descriptor

    def _open(self) -> int:
        if self.opened is None or self.opened[0] != os.getpid():
            self.opened = os.getpid(), os.open(self.path, os.O_RDONLY)
        return self.opened[1]

    def read(self, number: int) -> bytes:
        """Return the content of an image file; BadImage if it is damaged."""
        start, packed, size, crc, method = (
            int(self.places[name][number])
            for name in ("header_offset", "compress_size", "file_size", "crc", "compress_type")
        )
        file = self._open()
        header = os.pread(file, HEADER.size, start)
        if len(header) < HEADER.size or not header.startswith(b"PK\3\4"):
            raise UserError(f"{self.path} has changed since its images were listed; start again")
        *_, name_length, extra_length = HEADER.unpack(header)
        content = os.pread(file, packed, start + HEADER.size + name_length + extra_length)
        if method == zipfile.ZIP_DEFLATED:
            with suppress(zlib.error):  # then the checksum does not fit
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(1, size))
        if len(content) != size or zlib.crc32(content) != crc:
            raise BadImage("it is damaged in the zip file: its checksum does not fit")
        return content

    def size(self, number: int) -> int:
        """Return the bytes of an image file."""
        return int(self.places["file_size"][number])

    def locate(self, number: int) -> str:
        """Return `photos.zip/cat/1.jpg`."""
        return f"{self.path}/{self.above}{self.names[number]}"
