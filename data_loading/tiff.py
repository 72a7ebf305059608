# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""TIFF files of any number of channels and any depth, read by tifffile.

python -c "from data_loading.tiff import read_tiff; help(read_tiff)"
"""

import io
import logging
import math
import zlib
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from data_loading.decode import MAX_PIXELS, BadImage
from errors import UserError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
MAX_BYTES = 4 * MAX_PIXELS  # of the pixels of a file: as many as Pillow takes for RGBA
# TIFF's numbers. Others hold images of other formats, with sizes of their own.
COMPRESSIONS = {1: "none", 5: "LZW", 8: "Deflate", 32946: "Deflate", 32773: "PackBits"}
COMPRESSIONS |= {50000: "Zstandard"}
DEFLATE, BY_IMAGECODECS = (8, 32946), (5, 50000)
DEFLATE_RATIO = 1032  # at most so many bytes unpack from one
WHITE_IS_ZERO, PHOTOMETRIC = 0, (0, 1, 2)  # gray in two directions, RGB; all with other channels
AXES = {"YXS": True, "SYX": False, "CYX": False}  # channels last? For others the shape tells
ORIENTATION = 274


class Raster(NamedTuple):
    """Pixels of a file: (H, W), (H, W, C) or (C, H, W); channels_last: None if the shape tells."""

    array: np.ndarray
    channels_last: bool | None = None
    orientation: int = 1  # as in EXIF


def read_tiff(data: bytes) -> Raster:
    """Return the pixels of a TIFF file.

    Channels may be samples of a page, or pages. UserError without tifffile, BadImage for a damaged
    file, or for one that could unpack to more than 1 GiB.
    """
    tifffile = _import_tifffile()
    try:  # the XML of an OME file is not parsed: it may name further files
        with tifffile.TiffFile(io.BytesIO(data), is_ome=False) as file:
            series = file.series[0]
            _check(series, data)
            array, first = series.asarray(maxworkers=1), series.keyframe
            if first.photometric == WHITE_IS_ZERO and array.dtype.kind == "u":
                array = np.iinfo(array.dtype).max - array
            tag = first.tags.get(ORIENTATION)
            is_last = AXES.get(series.axes)
            return Raster(array, is_last, int(tag.value) if tag else 1)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes tifffile raise nearly anything
        raise BadImage(f"{type(error).__name__}: {error}") from error


def is_installed() -> bool:
    """Return True if tifffile can be imported."""
    return find_spec("tifffile") is not None


def _import_tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            "this TIFF file needs tifffile: pip install tifffile. Pillow reads 8 bits of 1 or 3 "
            "channels"
        ) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of odd tags; errors are raised
    return tifffile


def _check(series: Any, data: bytes) -> None:
    """Raise BadImage for pixels of unknown kinds, or that are not in the file or unpack to more."""
    page = series.keyframe
    if page.compression not in COMPRESSIONS:
        known = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise BadImage(f"its compression is {_name(page.compression)}, expected {known}")
    if page.compression in BY_IMAGECODECS and find_spec("imagecodecs") is None:
        name = COMPRESSIONS[page.compression]
        raise UserError(f"this TIFF file, compressed by {name}, needs: pip install imagecodecs")
    if page.photometric not in PHOTOMETRIC:
        raise BadImage(f"its colors are {_name(page.photometric)}, expected gray or RGB channels")
    size = math.prod(series.shape) * series.dtype.itemsize
    chunk = math.prod(page.chunks) * series.dtype.itemsize
    if max(size, chunk) > MAX_BYTES or page.imagelength * page.imagewidth > MAX_PIXELS:
        shape = " x ".join(map(str, series.shape))
        raise BadImage(f"it has {shape} values, above the limit of {MAX_BYTES} bytes")
    unpacks = page.compression in DEFLATE
    for part in series.pages:
        if part is None:
            raise BadImage("a page is missing")
        for start, count in zip(part.dataoffsets, part.databytecounts, strict=True):
            if start + count > len(data):
                raise BadImage("the file is truncated")
            if unpacks and count * DEFLATE_RATIO > MAX_BYTES:
                _check_deflated(data[start : start + count])


def _check_deflated(segment: bytes) -> None:
    unpacker = zlib.decompressobj()
    unpacker.decompress(segment, MAX_BYTES)
    if unpacker.unconsumed_tail:
        raise BadImage(f"a part of it unpacks to more than {MAX_BYTES} bytes")


def _name(number: Any) -> str:
    return getattr(number, "name", str(number))
