# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images of a data set as files, for pack.py: their own bytes, or resized and encoded again.

python -c "from data_loading.encode import Encoding; print(Encoding(256, 'webp', 80))"
"""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from PIL import TiffImagePlugin as Tiff
from torch import Tensor

from data_loading.arrays import load_whole, loses_bits
from data_loading.dataset import TransformedDataset
from data_loading.decode import MODES, decode
from data_loading.mixed import Listed
from data_loading.tiff import Raster
from data_loading.transforms import Resize
from errors import UserError, a_type

FORMATS = {"jpeg": ".jpg", "webp": ".webp", "png": ".png"}  # that are written, and extensions
GRAY, DEEP = ("1", "L", "LA", "La"), ("I", "F")  # modes of PIL, or their first letters: `I;16`
NOT_RESIZED = "--size resizes 8-bit gray and RGB alone; drop it, and files are stored as they are"
NOT_STORED = "images without a file are stored as PNG of 8 bits, gray or RGB; give image files"


class Encoded(NamedTuple):
    """Content of an image file, its extension if it was encoded here, '' if not, and the label."""

    content: bytes
    extension: str
    label: Any


@dataclass(frozen=True)
class Encoding:
    """Settings for stored images: `size` of the shorter side of larger ones, None to keep all.

    format, quality: of those that are resized.
    """

    size: int | None = None
    format: str = "jpeg"
    quality: int = 90

    def __call__(self, sample: Any, content: bytes | None) -> tuple[bytes, str]:
        """Return the content of a file and its extension, '' for `content` as it is.

        sample: what `load_image` makes of `content`, or a data set returns, for which content is
        None; it becomes PNG if it is not resized. UserError for other than 8-bit gray and RGB.
        """
        is_large = self.size is not None and min(_sides(sample)) > self.size
        if content is not None and not is_large:
            return content, ""
        if content is not None and _was_deep(sample, content):
            raise UserError(f"its colors have more than 8 bits: {NOT_RESIZED}")
        fix = NOT_STORED if content is None else NOT_RESIZED
        pixels = decode(sample, channels_of(sample, fix))
        if is_large:
            return save(Resize(self.size)(pixels), self.format, self.quality)
        return save(pixels, "png")


def _sides(sample: Any) -> tuple[int, int]:
    if isinstance(sample, Image.Image):
        return sample.size
    if isinstance(sample, Raster):
        array = sample.array
        raise UserError(f"it holds a {array.dtype} array of shape {array.shape}: {NOT_RESIZED}")
    if not isinstance(sample, Tensor) or sample.ndim != 3:
        raise UserError(f"expected a PIL image or a (C, H, W) tensor, got {a_type(sample)}")
    return tuple(sample.shape[1:])


def _was_deep(sample: Any, content: bytes) -> bool:
    """Return True for a color image of which Pillow has kept 8 bits of more."""
    tags = getattr(sample, "tag_v2", {})  # of a TIFF file
    return loses_bits(content) or max(tags.get(Tiff.BITSPERSAMPLE, (8,))) > 8


def channels_of(sample: Image.Image | Tensor, fix: str) -> int:
    """Return the channels to decode to: 1 for gray images, 3 for others.

    UserError, which ends with `fix`, for other than 8-bit gray and RGB.
    """
    if isinstance(sample, Image.Image):
        if sample.mode.startswith(DEEP):
            raise UserError(f"its pixels have more than 8 bits (mode {sample.mode}): {fix}")
        return 1 if sample.mode in GRAY else 3
    if sample.dtype != torch.uint8 or len(sample) not in MODES:
        raise UserError(
            f"got a {sample.dtype} tensor {tuple(sample.shape)}, expected uint8 with 1 or 3 "
            f"channels: {fix}"
        )
    return len(sample)


def save(pixels: Tensor, kind: str, quality: int = 100) -> tuple[bytes, str]:
    """Encode (C, H, W) uint8, gray or RGB; returns the file and its extension.

    quality: of JPEG and WebP, 1 to 100.
    """
    array = pixels.permute(1, 2, 0).contiguous()  # (H, W, C)
    image = Image.fromarray((array[..., 0] if len(pixels) == 1 else array).numpy())
    file, options = io.BytesIO(), {} if kind == "png" else {"quality": quality}
    image.save(file, kind, **options)
    return file.getvalue(), FORMATS[kind]


class EncodedImages(TransformedDataset):
    """Images of `data` as `Encoded`; each is decoded, so that a damaged one is found.

    Keys are (0, index), samples (Encoded, 0, index), an empty `Replacement` for a bad image if
    on_bad is `leave out`, or a UserError.
    """

    def __init__(self, data: Any, encoding: Encoding, on_bad: str = "error") -> None:
        super().__init__(data, _unchanged, seed=0, on_bad=on_bad)
        self.encoding = encoding

    def _read(self, index: int, draw: tuple[int, ...]) -> tuple[Encoded, None]:
        content, label = None, None
        if isinstance(self.dataset, Listed):
            content = self.dataset.read(index)
            sample = load_whole(content)
        else:
            sample, label = self._item(index, draw)
        return Encoded(*self.encoding(sample, content), label), None


def _unchanged(sample: Any) -> Any:
    return sample
