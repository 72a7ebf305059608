# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Decode image files as a viewer shows them; a file that cannot be decoded is a BadImage.

python -c "from data_loading import decode; decode.load_image('assets/reconstructions.png').show()"
"""

import io
import re
import struct
import traceback
import zlib
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL import TiffImagePlugin as Tiff
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data_loading.formats import PNG, describe_file, formats, read_head, without_unused_chunks
from errors import UserError

MODES = {1: "L", 3: "RGB"}  # channels -> mode of PIL
MAX_PIXELS = 2**28  # 16,384 x 16,384 pixels, which take 1 GB as RGBA
# Errors that PIL and its decoders raise for a damaged file.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
UNREADABLE += (Image.DecompressionBombError,)
SIGNED = 2  # a TIFF sample format


class BadImage(UserError):
    """An image cannot be used, for `reason`; `--on_bad_image skip` skips it.

    Datasets may raise it too. remedy: for a person who does not skip it.
    """

    def __init__(self, message: str, reason: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.reason, self.remedy = reason or message, remedy or "replace or remove it"


def load_image(file: str | BinaryIO | bytes) -> Image.Image:
    """Decode a file in its own mode, the first frame of an animation; `decode` converts it.

    file: a path, an open file, or the content. Raises BadImage, or an OSError, for a file that
    cannot be read.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        return _load_or_retry_png(file)
    except UnidentifiedImageError as error:
        description, remedy = describe_file(read_head(file))
        raise BadImage(description, remedy=remedy) from error
    except (MemoryError, OSError, BadImage):  # lack of memory is not the file's fault
        raise
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _load_or_retry_png(file: str | BinaryIO) -> Image.Image:
    """Decode a file; a PNG that PIL refuses is tried again without optional chunks.

    Their checksum may be wrong, or texts and a color profile larger than PIL's limits for them.
    """
    try:
        return _load(file)
    except (ValueError, UnidentifiedImageError) as error:
        if isinstance(error, BadImage) or not read_head(file).startswith(PNG):
            raise
        return _load(without_unused_chunks(file))


def _load(file: str | BinaryIO) -> Image.Image:
    """Decode a file. MAX_PIXELS replaces PIL's limit, which PIL would also check when it crops."""
    try:
        Image.MAX_IMAGE_PIXELS = None
        image = Image.open(file, formats=formats())
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(
                f"it has {width} x {height} pixels, above the limit of {MAX_PIXELS}: it may be a "
                "decompression bomb; resize it if it is genuine"
            )
        image.load()
    finally:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    return image


def is_of_decoder(error: Exception) -> bool:
    """Return True if `error` was raised while PIL, or this module, opened or decoded a file."""
    if not isinstance(error, UNREADABLE):
        return False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module in (__name__, "PIL.ImageFile") or re.fullmatch(r"PIL\.\w+ImagePlugin", module):
            return True
        if (module, function) == ("PIL.Image", "open"):
            return True
    return False


def decode(sample: Any, in_chans: int) -> Image.Image | Tensor:
    """Convert `sample` to an RGB or gray PIL image, or to a checked (in_chans, H, W) tensor.

    The EXIF orientation is applied, and transparent pixels become white.
    """
    if isinstance(sample, Tensor):
        is_uint8, got = sample.dtype == torch.uint8, f"{sample.dtype} tensor {tuple(sample.shape)}"
        if not (is_uint8 or sample.is_floating_point()) or sample.ndim != 3:
            raise UserError(f"expected (C, H, W) uint8 or float, got {got}")
        if not (is_uint8 and in_chans in MODES and len(sample) in MODES):
            if len(sample) != in_chans:
                raise UserError(f"expected --in_chans {in_chans}, got {got}")
            return sample if is_uint8 else sample.float()
        sample = to_pil_image(sample)
    if not isinstance(sample, Image.Image):
        raise UserError(f"expected a PIL image or a tensor, got {type(sample).__name__}")
    if in_chans not in MODES:
        raise UserError(
            f"--in_chans {in_chans} needs a dataset of ({in_chans}, H, W) tensors, got a PIL image "
            f"of mode {sample.mode}; give --data_set package.module:function, or --in_chans 3"
        )
    sample.load()  # TIFF and PNG have their orientation only after it
    with suppress(Exception):  # a damaged EXIF block, which is rewritten after the pixels
        if sample.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            sample = sample.copy()  # a dataset may return the same object again
            ImageOps.exif_transpose(sample, in_place=True)
    return _on_white(_eight_bits(sample), MODES[in_chans])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keep the upper 8 bits of deeper images; PIL's own conversion would clip above 255."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    signed = SIGNED in tags.get(Tiff.SAMPLEFORMAT, ())
    if image.mode == "F" or signed or (tags and image.mode == "I"):
        raise BadImage(
            "got float, signed or 32-bit pixels of unknown range; expected 8 or 16 bits from 0"
        )
    if not image.mode.startswith("I"):
        return image
    deep = np.asarray(image)  # (H, W)
    bits = tags.get(Tiff.BITSPERSAMPLE, (16,))[0]
    gray = (deep >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(Tiff.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        gray = 255 - gray
    transparent = image.info.get("transparency")  # a 16-bit value
    if isinstance(transparent, int):
        gray[deep == transparent] = 255
    return Image.fromarray(gray)


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    """Paste onto white: the color of transparent pixels is arbitrary."""
    if image.mode not in ("RGBA", "RGBa", "LA", "PA") and "transparency" not in image.info:
        return image.convert(mode)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert(mode)
