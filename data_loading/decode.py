# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""From a file to the picture that a person would see, or a BadImage that says why not.

python -c "from data_loading import decode; print(decode.load_image('assets/reconstructions.png'))"
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL import TiffImagePlugin as Tiff
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from errors import UserError

MODES = {1: "L", 3: "RGB"}  # channels -> what PIL calls them
# PIL would open others too: of EPS it has Ghostscript run the program that the file is.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
EXTENSIONS = (  # of files to look for in folders; what they are their content says
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".ppm", ".pgm",
    ".pbm", ".pnm", ".tif", ".tiff",
)  # fmt: skip
PIXELS = 2**28  # that an image may have: 16,384 x 16,384, which is 1 GB to work on
# What a damaged file raises, in PIL and in the decoders below it.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
UNREADABLE += (Image.DecompressionBombError,)
SIGNED = 2  # a sample format of TIFF
ORIENTATION = 0x0112  # of EXIF: how the camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(UserError):
    """One image cannot be used, for a reason; `--on_bad_image skip` does without it."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


def load_image(path: str) -> Image.Image:
    """Decode a whole file, of an animation the first picture, in its own mode; or BadImage.

    `decode` makes it RGB or grey.
    """
    with open(path, "rb") as file:
        return load_image_file(file)


def load_image_file(file: BinaryIO) -> Image.Image:
    """`load_image` of an open file."""
    try:
        image = _open(file)
        image.load()
    except (MemoryError, BadImage, *UNREADABLE):  # the first says nothing about the file
        raise
    except Exception as error:  # a damaged file leads PIL astray in many ways
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return image


def _open(file: BinaryIO) -> Image.Image:
    """Its header; PIL's own limit of pixels makes way for ours, here and where crops ask for it."""
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(file, formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = PIXELS
    width, height = image.size
    if width * height > PIXELS:
        raise BadImage(
            f"it has {width} x {height} pixels, above the limit of {PIXELS}: a decompression bomb, "
            "or to be made smaller first"
        )
    return image


def decode(sample: Any, in_chans: int) -> Image.Image | Tensor:
    """Make `sample` an RGB or grey PIL image, or a checked (in_chans, H, W) tensor.

    An image is turned as its EXIF says, and lies on white where it is transparent.
    """
    if isinstance(sample, Tensor):
        bytes_ = sample.dtype == torch.uint8
        if not (bytes_ or sample.is_floating_point()) or sample.ndim != 3:
            raise UserError(f"expected (C, H, W) uint8 or float, got {describe(sample)}")
        if not (bytes_ and in_chans in MODES and len(sample) in MODES):
            if len(sample) != in_chans:
                raise UserError(f"expected --in_chans {in_chans}, got {describe(sample)}")
            return sample if bytes_ else sample.float()
        sample = to_pil_image(sample)
    if not isinstance(sample, Image.Image):
        raise UserError(f"expected a PIL image or a tensor, got {type(sample).__name__}")
    if in_chans not in MODES:
        raise UserError(
            f"--in_chans {in_chans} needs a dataset of ({in_chans}, H, W) tensors, got a PIL image "
            f"of mode {sample.mode}; give --data_set package.module:function, or --in_chans 3"
        )
    sample.load()  # TIFF and PNG know their orientation only then
    turn, image = _turn(sample), _eight_bits(sample)
    return _on_white(image if turn is None else image.transpose(turn), MODES[in_chans])


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a damaged EXIF block does not make the picture any worse
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of one with more bits the upper 8, since PIL's own conversion cuts off above 255."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    if image.mode == "F":
        raise BadImage("got an image of floats, whose range is unknown; expected 8 or 16 bits")
    if SIGNED in tags.get(Tiff.SAMPLEFORMAT, ()):
        raise BadImage("got signed pixels, whose range is unknown; expected 8 or 16 bits from 0")
    if tags and image.mode == "I":
        raise BadImage("got 32 bits a pixel, whose range is unknown; expected 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    deep = np.asarray(image)  # (H, W)
    bits = tags.get(Tiff.BITSPERSAMPLE, (16,))[0]
    grey = (deep >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(Tiff.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        grey = 255 - grey
    hidden = image.info.get("transparency")  # a value, of 16 bits too
    if isinstance(hidden, int):
        grey[deep == hidden] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    """What lies under transparent pixels was never meant to be seen; pages are white."""
    if image.mode not in ("RGBA", "RGBa", "LA", "PA") and "transparency" not in image.info:
        return image.convert(mode)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert(mode)


def describe(tensor: Tensor) -> str:
    """`uint8 tensor (3, 8, 8)`"""
    return f"{str(tensor.dtype).removeprefix('torch.')} tensor {tuple(tensor.shape)}"
