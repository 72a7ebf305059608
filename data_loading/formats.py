# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Image formats that can be read here, and descriptions of files that are in none of them.

python -c "from data_loading.formats import describe_file; print(describe_file(b'<html>'))"
"""

import importlib
import io
from contextlib import suppress
from functools import cache
from typing import BinaryIO

from PIL import Image

# PIL would open others too, and for EPS run Ghostscript, which executes the file's program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
EXTENSIONS = (  # of the files to list in folders; their content decides the format
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".ppm", ".pgm",
    ".pbm", ".pnm", ".tif", ".tiff", ".npy",
)  # fmt: skip
# Formats that only some installations can read: their extensions, and what they need.
OPTIONAL = {
    "AVIF": ((".avif", ".avifs"), "pip install 'pillow>=11.3'"),
    "HEIF": ((".heic", ".heics", ".heif", ".heifs", ".hif"), "pip install pillow-heif"),
}
AVIF_BRANDS, HEIF_BRANDS = (b"avif", b"avis"), (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
HEAD = 512  # bytes that are enough to tell what a file is
PNG = b"\x89PNG\r\n\x1a\n"
NPY = b"\x93NUMPY"
USED_CHUNKS = (b"tRNS", b"eXIf")  # optional PNG chunks that decoding uses: transparency, EXIF


@cache
def formats() -> tuple[str, ...]:
    """Return PIL's names of the formats that can be read here."""
    return FORMATS + tuple(name for name, is_there in optional_formats().items() if is_there)


@cache
def extensions() -> tuple[str, ...]:
    """Return the extensions of the image files to list."""
    there = [OPTIONAL[name][0] for name, is_there in optional_formats().items() if is_there]
    return sum(there, EXTENSIONS)


@cache
def optional_formats() -> dict[str, bool]:
    """Return which formats of `OPTIONAL` can be read; pillow-heif is registered if installed."""
    found = dict.fromkeys(OPTIONAL, False)
    with suppress(ImportError):  # Pillow is older
        found["AVIF"] = importlib.import_module("PIL.AvifImagePlugin").SUPPORTED
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
        found["HEIF"] = True
    return found


def how_to_read(extension: str) -> str:
    """Return ` (not readable here: pip install ...)` for an optional format, '' for others."""
    needs = [need for ends, need in OPTIONAL.values() if extension in ends]
    return f" (not readable here: {needs[0]})" if needs else ""


def describe_file(head: bytes) -> tuple[str, str]:
    """Describe a file that is no image, by its first bytes; returns (description, remedy).

    The remedy is '' if there is no better one than to replace the file.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "the file is empty", ""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "the file is a Git LFS pointer, not the image", "git lfs pull gets it"
    if head.startswith(b"/annex/objects/") or b".git/annex/objects/" in head[:200]:
        return "the file is a git-annex pointer, not the image", "git annex get . gets it"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "the file is an HTML page, not an image", "download it again"
    if head[4:8] == b"ftyp" and head[8:12] in AVIF_BRANDS + HEIF_BRANDS:
        name = "AVIF" if head[8:12] in AVIF_BRANDS else "HEIF"
        if optional_formats()[name]:
            return f"the file is a damaged {name} image", ""
        return f"the file is a {name} image, which cannot be read here", OPTIONAL[name][1]
    if not head.strip(b"\0"):
        return "the file begins with zeros, as after an interrupted copy", ""
    start = head[:24]
    if start.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        return f"the file is text, not an image: it begins with {start.decode()!r}", ""
    Image.init()
    accepts = {name: Image.OPEN[name][1] for name in formats()}
    if name := next((name for name, accept in accepts.items() if accept(head) is True), None):
        return f"the file begins as a {name} image, but it is damaged or incomplete", ""
    return f"expected {', '.join(formats())}; the file begins with {head[:12]!r}", ""


def read_head(file: str | BinaryIO) -> bytes:
    """Return the first bytes of a file."""
    if hasattr(file, "read"):
        file.seek(0)
        return file.read(HEAD)
    with open(file, "rb") as opened:
        return opened.read(HEAD)


def without_unused_chunks(file: str | BinaryIO) -> BinaryIO:
    """Copy a PNG file without the optional chunks that are not used; nothing is decompressed."""
    if not hasattr(file, "read"):
        with open(file, "rb") as opened:
            return without_unused_chunks(opened)
    size = file.seek(0, 2)
    file.seek(len(PNG))
    copy = io.BytesIO(PNG)
    copy.seek(len(PNG))
    while len(header := file.read(8)) == 8:  # length and kind
        length = int.from_bytes(header[:4], "big") + 4  # with its checksum
        if header[4:5].islower() and header[4:] not in USED_CHUNKS:  # lowercase: optional
            file.seek(length, 1)
        else:  # a damaged length may be 4 GiB
            copy.write(header + file.read(min(length, size)))
    copy.seek(0)
    return copy
