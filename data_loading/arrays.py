# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images of any number of channels and any depth: .npy files, TIFF files, arrays, tensors.

python -c "import numpy; from data_loading import arrays; print(arrays.from_array(numpy.eye(2), 1))"
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from data_loading import jpeg, tiff
from data_loading.decode import (
    MODES,
    BadImage,
    decode,
    has_unknown_range,
    keep_box,
    load_image,
    on_white,
    orientation_of,
)
from data_loading.formats import NPY, PNG
from errors import UserError, plural

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
WITH_ALPHA = {2: "LA", 4: "RGBA"}  # channels -> mode of PIL
LUMA = (0.299, 0.587, 0.114)  # red, green, blue in a gray value: ITU-R 601-2, as in Pillow
BYTE = (0, 255)  # value range of 8-bit images
ROUNDING = 1e-6  # that floats may be outside of 0 to 1
Range = Sequence[float] | None  # the values that become 0 and 1


class Encoded:
    """An image file; the number of channels and the value range decide how it is decoded."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, in_chans: int, value_range: Range) -> Image.Image | Tensor | tiff.Raster:
        """Return what `load_image` does, or all channels in full depth."""
        is_plain = in_chans in MODES and value_range is None
        if self.data.startswith(NPY):
            return tiff.Raster(read_npy(self.data))
        if self.data.startswith(tiff.MAGIC):
            return _read_tiff(self.data, is_plain)
        if not is_plain:
            raise BadImage(
                "it has 16 bits and several channels, of which Pillow reads 8 bits",
                remedy="convert it to TIFF or .npy",
            )
        return load_image(self.data)


def load_file(data: bytes) -> Image.Image | Tensor | Encoded:
    """Decode an image file for `to_pixels`, or leave that to it; raises as `load_image`."""
    is_open = data.startswith((NPY, *tiff.MAGIC)) or loses_bits(data)
    return Encoded(data) if is_open else load_image(data)


def load_whole(data: bytes) -> Image.Image | Tensor | tiff.Raster:
    """Decode an image file in its own channels; raises as `load_image`."""
    sample = load_file(data)
    return sample.read(3, None) if isinstance(sample, Encoded) else sample


def to_pixels(sample: Any, in_chans: int, value_range: Range = None) -> Tensor:
    """Convert a sample of a data set to (in_chans, H, W) uint8, or float32 in 0 to 1.

    sample: of `load_file`, a PIL image, an array as `from_array` takes it, or a (C, H, W) tensor.
    With a value range all channels are read in full depth. Raises as `decode`.
    """
    if isinstance(sample, Encoded):
        sample = sample.read(in_chans, value_range)
    if isinstance(sample, Image.Image) and (in_chans not in MODES or value_range):
        sample = _all_channels(sample, in_chans)
    if isinstance(sample, Tensor) and sample.dtype == torch.uint8 and value_range == BYTE:
        return decode(sample, in_chans)
    if isinstance(sample, Tensor) and value_range and sample.ndim == 3:
        values = sample.float() if sample.is_floating_point() else sample
        pixels = values.permute(1, 2, 0).numpy()
        return keep_box(_convert(pixels, in_chans, value_range), sample)
    if isinstance(sample, np.ndarray):
        return from_array(sample, in_chans, value_range)
    if isinstance(sample, tiff.Raster):
        image = from_array(sample.array, in_chans, value_range, sample.channels_last)
        return jpeg.turn(image, sample.orientation)
    return decode(sample, in_chans)


def from_array(
    array: np.ndarray, in_chans: int, value_range: Range = None, channels_last: bool | None = None
) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) array -> (in_chans, H, W) uint8, or float32 in 0 to 1.

    value_range: the values that become 0 and 1; those outside are clipped. Without it uint8 stays
    as it is, uint16 is divided by 65535, and floats must be in 0 to 1. channels_last: None if the
    shape tells. Gray becomes RGB and RGB gray where `in_chans` asks for it. BadImage for other
    values, UserError for another number of channels, or if the shape does not tell their place.
    """
    if array.ndim == 3 and channels_last is not None:
        array = array if channels_last else array.transpose(1, 2, 0)
    else:
        array = _channels_last(array, in_chans)
    return _convert(array, in_chans, value_range)


def _convert(array: np.ndarray, in_chans: int, value_range: Range) -> Tensor:
    """(H, W, C) array -> (in_chans, H, W) as `from_array`."""
    if array.dtype.kind not in "buif":
        raise BadImage(f"it holds {array.dtype} values, expected integers or floats")
    count = array.shape[2]
    if count != in_chans and not {count, in_chans} <= {*MODES}:
        raise UserError(
            f"it has {plural(count, 'channel')}, expected --in_chans {in_chans}; give --in_chans "
            f"{count} if all images have as many, or convert it"
        )
    pixels = _scale(array, value_range)
    image = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)
    if len(image) == in_chans:
        return image
    if image.dtype == torch.uint8:
        return decode(image, in_chans)
    if in_chans == 3:
        return image.expand(3, -1, -1)
    return (image * image.new_tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)


def read_npy(data: bytes) -> np.ndarray:
    """Return the array of a .npy file, without a copy; BadImage for pickled or missing values."""
    file = io.BytesIO(data)
    try:
        read_header = HEADERS[npy.read_magic(file)]
        shape, is_fortran, dtype = read_header(file)
    except MemoryError:
        raise
    except Exception as error:  # NumPy parses the header as Python's literals, and raises anything
        raise BadImage(f"its header is damaged, or of another version: {error}") from error
    if dtype.hasobject:
        raise BadImage("it holds pickled objects, which can run code", remedy="save numbers")
    if min(shape, default=1) < 1:
        raise BadImage(f"it is empty: its header says shape {shape}")
    start, needed = file.tell(), math.prod(shape) * dtype.itemsize
    if needed != len(data) - start:
        raise BadImage(
            f"its header says {dtype} of shape {shape}, which takes {needed} bytes, but "
            f"{len(data) - start} follow"
        )
    order = "F" if is_fortran else "C"
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)


def _read_tiff(data: bytes, is_plain: bool) -> Image.Image | tiff.Raster:
    """Read with Pillow if it can, and 8 bits of 1 or 3 channels are enough, or with tifffile."""
    if not is_plain:
        return tiff.read_tiff(data)
    try:
        image = load_image(data)
    except BadImage as error:
        if not tiff.is_installed():
            remedy = "if it has other than 1, 3 or 4 channels: pip install tifffile"
            raise BadImage(error.reason, remedy=remedy) from error
        return tiff.read_tiff(data)
    return tiff.read_tiff(data) if has_unknown_range(image) else image


def loses_bits(data: bytes) -> bool:
    """Return True for color images of 16 bits of which Pillow keeps 8: PNG and PPM."""
    if data.startswith(PNG):
        return data[24:25] == b"\x10" and data[25:26] != b"\0"
    found = re.match(rb"P[36](?:\s+#[^\n]*)*\s+\d+\s+\d+\s+(\d+)\s", data[:256])
    return found is not None and int(found[1]) > 255


def _all_channels(image: Image.Image, in_chans: int) -> tiff.Raster:
    """Return a PIL image, alpha included, or gray in full depth."""
    image.load()
    turns = orientation_of(image)
    if image.mode[0] in "IF":  # gray: 16 bits, or more
        return tiff.Raster(np.asarray(image), True, turns)
    if in_chans in MODES:
        return tiff.Raster(np.asarray(on_white(image, MODES[in_chans])), True, turns)
    mode = WITH_ALPHA.get(in_chans, "")
    has_alpha = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    if not (mode and has_alpha):
        count = len(image.getbands())
        raise UserError(
            f"it has {plural(count, 'channel')} (mode {image.mode}), expected --in_chans "
            f"{in_chans}; give --in_chans {count} if all images have as many, or convert it"
        )
    return tiff.Raster(np.asarray(image.convert("RGBA").convert(mode)), True, turns)


def _channels_last(array: np.ndarray, in_chans: int) -> np.ndarray:
    """Return a (H, W, C) view of an array, where C is in_chans, or gray for RGB or vice versa."""
    if array.ndim == 2 and in_chans in MODES:
        return array[..., None]
    fitting = (in_chans,), (MODES if in_chans in MODES else ())
    for counts in fitting if array.ndim == 3 else ():
        first, last = array.shape[0] in counts, array.shape[2] in counts
        if first and last:
            raise UserError(
                f"its shape {array.shape} may be (C, H, W) or (H, W, C); give it another size, or "
                "read it by a data set of your own: --data_set package.module:function"
            )
        if first or last:
            return array.transpose(1, 2, 0) if first else array
    raise UserError(
        f"its shape is {array.shape}, expected (H, W, {in_chans}) or ({in_chans}, H, W)"
        f"{' or (H, W)' * (in_chans in MODES)} for --in_chans {in_chans}; give its number of "
        "channels by --in_chans, or convert it"
    )


def _scale(array: np.ndarray, value_range: Range) -> np.ndarray:
    """Map values to uint8 in 0 to 255, or float32 in 0 to 1."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "f" and not np.isfinite(array).all():
        raise BadImage("it holds NaN or Inf", remedy="replace those values")
    if array.dtype == np.uint8 and (value_range is None or tuple(value_range) == BYTE):
        return array
    if value_range is not None:
        low, high = value_range
        wide = np.float64 if size > 2 and kind in "ui" or size > 4 else np.float32
        values = (array.astype(wide) - low) / (high - low)
        return values.clip(0, 1).astype(np.float32)
    if kind == "u" and size == 2:
        return array.astype(np.float32) / 65535
    least, most = array.min(), array.max()
    if kind == "f" and least >= -ROUNDING and most <= 1 + ROUNDING:
        return array.astype(np.float32)
    expected = "0 to 1" if kind == "f" else "8 or 16 bits from 0"
    raise BadImage(
        f"it holds {array.dtype} values from {least:.6g} to {most:.6g}, expected {expected}",
        remedy="give the values that become 0 and 1: --value_range LOW HIGH",
    )
