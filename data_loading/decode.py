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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL import TiffImagePlugin as Tiff
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data_loading import jpeg
from data_loading.formats import PNG, describe_file, formats, read_head, without_unused_chunks
from errors import UserError

MODES = {1: "L", 3: "RGB"}  # channels -> mode of PIL
MAX_PIXELS = 2**28  # 16,384 x 16,384 pixels, which take 1 GB as RGBA
# Errors that PIL and its decoders raise for a damaged file.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
UNREADABLE += (Image.DecompressionBombError,)
SIGNED = 2  # a TIFF sample format
AT_ONCE = 2**18  # bytes to read from a file before it is known what it holds
FACTORS = (8, 4, 2)  # by which JPEG files are decoded smaller, others are slow


class BadImage(UserError):
    """An image cannot be used, for `reason`; `--on_bad_image skip` skips it.

    Datasets may raise it too. remedy: for a person who does not skip it.
    """

    def __init__(self, message: str, reason: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.reason, self.remedy = reason or message, remedy or "replace or remove it"


class WithBox(Tensor):
    """An image that `decode_for` decoded, with the box of the crop that was drawn for it."""

    box: tuple[int, int, int, int]  # top, left, height, width
    __torch_function__ = torch._C._disabled_torch_function_impl  # operations return plain tensors


def keep_box(image: Tensor, source: Tensor) -> Tensor:
    """Return an image with the box of the one that it was made of, if that has one."""
    if isinstance(source, WithBox):
        image = image.as_subclass(WithBox)
        image.box = source.box
    return image


_CROP: ContextVar[Any] = ContextVar("crop", default=None)


@contextmanager
def decode_for(crop: Any) -> Iterator[None]:
    """Let `load_image` decode large JPEG files at 1/2, 1/4 or 1/8 of their size.

    crop: `draw_box(height, width)` draws its box first, so that it has `size` pixels at least.
    """
    token = _CROP.set(crop)
    try:
        yield
    finally:
        _CROP.reset(token)


def load_image(file: str | bytes | BinaryIO) -> Image.Image | Tensor:
    """Decode a file, given by its path, content or file object, for `decode`.

    Returns an upright (C, H, W) uint8 tensor of an ordinary JPEG, and a PIL image in its own mode
    of any other file: the first frame of an animation. Raises BadImage, or an OSError, for a file
    that cannot be read.
    """
    try:
        data = _read_jpeg(file)
        if data and (pixels := _load_jpeg(data)) is not None:
            return pixels
        file = io.BytesIO(data or file) if data or isinstance(file, bytes) else file
        return _load_or_retry_png(file)
    except UnidentifiedImageError as error:
        description, remedy = describe_file(read_head(file))
        raise BadImage(description, remedy=remedy) from error
    except (MemoryError, OSError, BadImage):  # lack of memory is not the file's fault
        raise
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _read_jpeg(file: str | bytes | BinaryIO) -> bytes | None:
    """Return the content of a JPEG file; None for another one."""
    if isinstance(file, bytes):
        return file if file.startswith(jpeg.START) else None
    if hasattr(file, "read"):
        file.seek(0)
        return _read_on(file)
    with open(file, "rb", buffering=0) as opened:
        return _read_on(opened)


def _read_on(file: BinaryIO) -> bytes | None:
    data = file.read(AT_ONCE)
    if not data.startswith(jpeg.START):
        return None
    return data + file.read()


def _load_jpeg(data: bytes) -> Tensor | None:
    """Decode an ordinary JPEG; None if PIL must do it."""
    header = jpeg.read_header(data, MAX_PIXELS)
    if header is None:
        return None
    turns = orientation_of(_open(io.BytesIO(data))) if jpeg.has_metadata(data) else 1
    crop = _CROP.get()
    if crop is None:
        pixels = jpeg.decode_jpeg(data, header)
        return None if pixels is None else jpeg.turn(pixels, turns)
    height, width = header[1::-1] if jpeg.is_transposed(turns) else header[:2]
    box = crop.draw_box(height, width)  # top, left, height, width
    fits = min(box[2] // crop.size[0], box[3] // crop.size[1])
    factor = next((factor for factor in FACTORS if factor <= fits), 1)
    pixels = jpeg.decode_jpeg(data, header, factor)
    if pixels is None:
        return None
    image = jpeg.turn(pixels, turns).as_subclass(WithBox)
    place, sides = (round(x / factor) for x in box[:2]), (side // factor for side in box[2:])
    image.box = *place, *sides
    return image


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
    image = _open(file)
    image.load()
    return image


def _open(file: str | BinaryIO) -> Image.Image:
    """Read the header. MAX_PIXELS replaces PIL's limit, which PIL also checks when it crops."""
    try:
        Image.MAX_IMAGE_PIXELS = None
        image = Image.open(file, formats=formats())
    finally:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    width, height = image.size
    if width * height == 1:
        raise BadImage("it is a single pixel, as a placeholder on a web page is")
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"it has {width} x {height} pixels, above the limit of {MAX_PIXELS}: it may be a "
            "decompression bomb; resize it if it is genuine"
        )
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


def decode(sample: Any, in_chans: int) -> Tensor:
    """Convert a PIL image, or a checked tensor, to (in_chans, H, W) uint8, or float for float.

    The EXIF orientation is applied, and transparent pixels become white.
    """
    if isinstance(sample, Tensor):
        return _with_channels(sample, in_chans)
    if not isinstance(sample, Image.Image):
        raise UserError(f"expected a PIL image or a tensor, got {type(sample).__name__}")
    if in_chans not in MODES:
        raise UserError(
            f"--in_chans {in_chans} needs a dataset of ({in_chans}, H, W) tensors, got a PIL image "
            f"of mode {sample.mode}; give --data_set package.module:function, or --in_chans 3"
        )
    sample.load()  # TIFF and PNG have their orientation only after it
    turns = orientation_of(sample)
    return jpeg.turn(from_pil(on_white(_eight_bits(sample), MODES[in_chans])), turns)


def from_pil(image: Image.Image) -> Tensor:
    """Convert a gray or RGB image to (C, H, W) uint8, with the channels of a pixel together."""
    pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, C)
    return (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _with_channels(image: Tensor, in_chans: int) -> Tensor:
    """Convert between gray and RGB; a tensor of other kinds must have `in_chans` channels."""
    is_uint8 = image.dtype == torch.uint8
    if image.ndim != 3 or not (is_uint8 or image.is_floating_point()):
        raise UserError(f"expected (C, H, W) uint8 or float, got {_describe(image)}")
    channels = len(image)
    if channels == in_chans:
        return image if is_uint8 else image.float()
    if not (is_uint8 and in_chans in MODES and channels in MODES):
        raise UserError(f"expected --in_chans {in_chans}, got {_describe(image)}")
    return keep_box(image.expand(3, -1, -1) if in_chans == 3 else _to_gray(image), image)


def _describe(image: Tensor) -> str:
    return f"{image.dtype} tensor {tuple(image.shape)}"


def _to_gray(image: Tensor) -> Tensor:
    return from_pil(to_pil_image(image).convert("L"))


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none or the EXIF block is damaged."""
    with suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def has_unknown_range(image: Image.Image) -> bool:
    """Return True for float, signed and 32-bit pixels."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    signed = SIGNED in tags.get(Tiff.SAMPLEFORMAT, ())
    return image.mode == "F" or signed or bool(tags and image.mode == "I")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keep the upper 8 bits of deeper images; PIL's own conversion would clip above 255."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    if has_unknown_range(image):
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


def on_white(image: Image.Image, mode: str) -> Image.Image:
    """Paste onto white: the color of transparent pixels is arbitrary."""
    if image.mode not in ("RGBA", "RGBa", "LA", "PA") and "transparency" not in image.info:
        return image if image.mode == mode else image.convert(mode)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert(mode)
