# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Ordinary JPEG files decoded by simplejpeg: the pixels of PIL in less time.

python -c "from data_loading import jpeg; print(jpeg.decode_jpeg.__doc__)"
"""

from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError

try:
    import simplejpeg
except ImportError:  # then PIL decodes all
    simplejpeg = None

START = b"\xff\xd8\xff"
SPACES = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}  # of the file -> of the pixels
APP1, SCAN = 0xE1, 0xDA  # markers of EXIF or XMP, and of the pixels
TURNS = {  # EXIF orientation -> transposed?, then dimensions of (C, H, W) to flip
    2: (False, (2,)), 3: (False, (1, 2)), 4: (False, (1,)), 5: (True, ()), 6: (True, (2,)),
    7: (True, (1, 2)), 8: (True, (1,)),
}  # fmt: skip


def require_simplejpeg() -> None:
    """Raise UserError if simplejpeg is not installed."""
    if simplejpeg is None:
        raise UserError("--decode fast needs simplejpeg: pip install simplejpeg")


class Header(NamedTuple):
    """Size of an image as it is stored, before it is turned, and the kind of its pixels."""

    height: int
    width: int
    space: str


def read_header(data: bytes, max_pixels: int) -> Header | None:
    """Read the header of a file that `decode_jpeg` can decode.

    None for what PIL must decode or refuse: CMYK, one pixel, more than `max_pixels`, a damaged
    header, other formats, and everything where simplejpeg is not installed.
    """
    if simplejpeg is None or not data.startswith(START):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    known = space in SPACES and 1 < height * width <= max_pixels
    return Header(height, width, SPACES[space]) if known else None


def decode_jpeg(data: bytes, header: Header, factor: int = 1) -> Tensor | None:
    """Decode to (C, H, W) uint8, gray or RGB, with the bits that PIL gives; None if it is damaged.

    The EXIF orientation is not applied. factor: 2, 4 or 8 for sides of 1 / factor, rounded up.
    """
    least = {}
    if factor > 1:
        least = {"min_height": -(-header.height // factor), "min_width": -(-header.width // factor)}
    try:
        pixels = simplejpeg.decode_jpeg(data, header.space, **least)  # (H, W, C)
    except ValueError:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def has_metadata(data: bytes) -> bool:
    """Return True if a JPEG file may have an EXIF orientation."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in (APP1, SCAN):
            return marker == APP1
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True  # an odd file


def is_transposed(orientation: int) -> bool:
    """Return True if `turn` swaps height and width."""
    return TURNS.get(orientation, (False, ()))[0]


def turn(image: Tensor, orientation: int) -> Tensor:
    """(C, H, W) as the camera stored it -> upright; others than 2 to 8 leave it."""
    transposed, sides = TURNS.get(orientation, (False, ()))
    image = image.transpose(1, 2) if transposed else image
    return image.flip(sides) if sides else image
