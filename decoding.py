# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""From a file to the picture that a person would see, or a BadImage that says why not.

python -c "import decoding; print(decoding.decode(decoding.load_image('assets/imagined.png'), 1))"
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from errors import UserError

MODES = {1: "L", 3: "RGB"}  # channels -> what PIL calls them
# PIL would open others too: of EPS it has Ghostscript run the program that the file is.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
# What a damaged file raises, in PIL and in the decoders below it.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
UNREADABLE += (Image.DecompressionBombError,)
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

    `decode` makes it RGB or grey. Above 179 million pixels PIL takes it for a bomb.
    """
    with open(path, "rb") as file:
        return load_image_file(file)


def load_image_file(file: BinaryIO) -> Image.Image:
    """`load_image` of an open file."""
    try:
        image = Image.open(file, formats=FORMATS)
        image.load()
    except (MemoryError, *UNREADABLE):  # the first says nothing about the file
        raise
    except Exception as error:  # a damaged file leads PIL astray in many ways
        raise BadImage(f"{type(error).__name__}: {error}") from error
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
    return _on_white(_eight_bits(_upright(sample)), MODES[in_chans])


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # TIFF and PNG know their orientation only then
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a damaged EXIF block does not make the picture any worse
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion cuts off above 255
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("got an image of floats, whose range is unknown; expected 8 or 16 bits")
    return image


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
