# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Transforms for pre-training, training and evaluation, from tensors to tensors.

python -c "from data_loading import transforms; print(transforms.create_eval_transform(224))"
"""

import math
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.functional import crop

from config.sizes import SMALL, default_crop_pct
from data_loading.augment import RATIO, Augmentation, create_steps
from data_loading.decode import WithBox
from data_loading.tta import FiveCrop
from errors import UserError, plural

# Transforms map a (C, H, W) tensor, uint8 or float, to a (C, height, width) tensor of its kind.
IMAGENET, PRETRAIN = Augmentation(), Augmentation(scale=(0.2, 1.0))  # defaults of timm, of MAE


def resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(C, H, W) uint8 or float -> (C, *size), antialiased as in Pillow; mode: bilinear, bicubic.

    torch is fastest where the channels of a pixel lie next to each other, as decoders write them.
    """
    if tuple(image.shape[1:]) == size:
        return image
    strides = image.shape[1] * image.stride(1), *image.stride()  # image[None] has another first one
    batch = image.as_strided((1, *image.shape), strides)
    batch = batch.contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size, mode=mode, antialias=True)[0]


class Resize:
    """Bicubic resize: to a size (height, width), or of the shorter side to an int."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        if not isinstance(self.size, int):
            return resize(image, self.size, "bicubic")
        height, width = image.shape[1:]
        longer = int(self.size * max(height, width) / min(height, width))  # as torchvision
        size = (self.size, longer) if height <= width else (longer, self.size)
        return resize(image, size, "bicubic")

    def __repr__(self) -> str:
        return f"Resize(size={self.size})"


class ResizeToCover:
    """Bicubic resize that keeps the aspect ratio, to at least `size` (height, width)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        sides = image.shape[1:]
        ratio = min(side / least for side, least in zip(sides, self.size, strict=True))
        height, width = (round(side / ratio) for side in sides)  # as timm
        return resize(image, (height, width), "bicubic")

    def __repr__(self) -> str:
        return f"ResizeToCover(size={self.size})"


class RandomResizedCrop:
    """Cut out a random part and resize it to `size`, as torchvision and timm do.

    scale: range of the share of the area; ratio: range of width / height, drawn as a logarithm;
    modes: of `resize`, one of them is drawn.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: Sequence[float],
        modes: Sequence[str] = ("bicubic",),
        ratio: Sequence[float] = RATIO,
    ) -> None:
        self.size, self.scale, self.modes, self.ratio = size, tuple(scale), tuple(modes), ratio

    def draw_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) of a crop; a center crop if ten draws do not fit."""
        logarithms = [math.log(value) for value in self.ratio]
        for _ in range(10):
            area = height * width * random.uniform(*self.scale)
            ratio = math.exp(random.uniform(*logarithms))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return _below(height - h + 1), _below(width - w + 1), h, w
        h = min(height, round(width / self.ratio[0]))
        w = min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image: Tensor) -> Tensor:
        box = image.box if isinstance(image, WithBox) else self.draw_box(*image.shape[1:])
        top, left, height, width = box
        mode = random.choice(self.modes) if len(self.modes) > 1 else self.modes[0]
        part = image[:, top : top + height, left : left + width]
        return resize(part, self.size, mode)

    def __repr__(self) -> str:
        return (
            f"RandomResizedCrop({self.size}, scale={self.scale}, ratio={self.ratio}, "
            f"modes={self.modes})"
        )


def _below(count: int) -> int:
    return int(count * random.random())  # several times as fast as random.randrange


class RandomShift:
    """Resize to `size` and shift by up to 4 pixels each way, over black."""

    def __init__(self, size: tuple[int, int], modes: Sequence[str]) -> None:
        self.size, self.modes = size, tuple(modes)

    def draw_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the whole image."""
        return 0, 0, height, width

    def __call__(self, image: Tensor) -> Tensor:
        image = resize(image, self.size, random.choice(self.modes))
        rows, columns = (_overlap(side, random.randint(-4, 4)) for side in self.size)
        shifted = image.new_zeros(*self.size, len(image)).permute(2, 0, 1)
        shifted[:, rows[0], columns[0]] = image[:, rows[1], columns[1]]
        return shifted

    def __repr__(self) -> str:
        return f"RandomShift({self.size}, modes={self.modes})"


def _overlap(side: int, shift: int) -> tuple[slice, slice]:
    """Return where a side lies after a shift, and the part of it that is still inside."""
    low, high = max(0, shift), min(side, side + shift)
    return slice(low, high), slice(low - shift, high - shift)


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Expand an int to a square (height, width)."""
    height, width = (size, size) if isinstance(size, int) else (*size, *size)[:2]
    return height, width


def mean_and_std(
    in_chans: int = 3,
    imagenet_default: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[list, list]:
    """Return the per-channel mean and std for images in 0..1: ImageNet's, or Inception's 0.5.

    mean, std: values to return instead; one value is for all channels.
    """
    if (mean is None) != (std is None):
        raise UserError("--mean and --std belong together; give both or neither")
    if mean is not None and std is not None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, in_chans):
                raise UserError(
                    f"--{name} has {plural(len(values), 'value')}, expected one, or one for each "
                    f"of {plural(in_chans, 'channel')}"
                )
        return tuple(list(v) if len(v) == in_chans else [*v] * in_chans for v in (mean, std))
    mean, std = (
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if imagenet_default else ([0.5] * 3,) * 2
    )
    if in_chans == 3:
        return list(mean), list(std)
    return [sum(mean) / 3] * in_chans, [sum(std) / 3] * in_chans


def build_mean_and_std(args: Any) -> tuple[list, list]:
    """Return the per-channel mean and std of the flags; those of old runs lack --mean and --std."""
    own = vars(args).get("mean"), vars(args).get("std")
    return mean_and_std(args.in_chans, args.imagenet_default_mean_and_std, *own)


def build_augmentation(args: Any) -> Augmentation:
    """Build the augmentation of the flags; those of old runs lack some, which were off."""
    names = (
        "scale", "ratio", "train_interpolation", "hflip", "vflip", "rot90", "aa", "color_jitter",
        "color_jitter_prob", "pca_lighting", "grayscale_prob", "gaussian_blur_prob", "reprob",
        "remode", "recount",
    )  # fmt: skip
    own = {name: getattr(args, name) for name in names if name in vars(args)}
    return Augmentation(fill=build_mean_and_std(args)[0], **own)


def create_pretrain_transform(
    input_size: int | Sequence[int], augmentation: Augmentation = PRETRAIN
) -> T.Compose:
    """Create random resized crop and horizontal flip, as in MAE and FCMAE, and what else is on."""
    size = height_and_width(input_size)
    return T.Compose([_random_crop(size, augmentation), *create_steps(size, augmentation)])


def create_train_transform(
    input_size: int | Sequence[int], augmentation: Augmentation = IMAGENET
) -> T.Compose:
    """Create the augmentation of timm's ImageNet training, and what else is on.

    Up to 32 pixels, a random shift (padding 4) replaces the random resized crop, as in the official
    code, unless scale or ratio differ from timm's defaults.
    """
    size, default = height_and_width(input_size), (tuple(IMAGENET.scale), tuple(IMAGENET.ratio))
    if max(size) <= SMALL and (tuple(augmentation.scale), tuple(augmentation.ratio)) == default:
        crop: Any = RandomShift(size, augmentation.modes)
    else:
        crop = _random_crop(size, augmentation)
    return T.Compose([crop, *create_steps(size, augmentation)])


def _random_crop(size: tuple[int, int], augmentation: Augmentation) -> RandomResizedCrop:
    return RandomResizedCrop(size, augmentation.scale, augmentation.modes, augmentation.ratio)


def _crop_ends(image: Tensor, ratio: float) -> Tensor:
    """Crop the long side to at most `ratio` times the short side.

    Otherwise 20,000 x 10 pixels would be resized to 512,000 x 256 before the center crop.
    """
    height, width = image.shape[1:]
    longest = math.ceil(ratio * min(height, width))
    top, left = (max(0, (side - longest) // 2) for side in (height, width))
    if not (top or left):
        return image
    return crop(image, top, left, height - 2 * top, width - 2 * left)


def create_eval_transform(
    input_size: int | Sequence[int], crop_pct: float | None = None, five_crop: bool = False
) -> T.Compose:
    """Create a bicubic resize of the shorter side to size / crop_pct and a center crop.

    Without crop_pct it is `default_crop_pct` of the size; if that is None too, the whole image is
    resized to the size. five_crop: the corners too, as `FiveCrop` stacks them.
    """
    size = height_and_width(input_size)
    pct = crop_pct or default_crop_pct(size)
    if pct is None and five_crop:
        raise ValueError(f"five_crop needs a crop_pct below 1 at {size}, and the default is None")
    if pct is None:
        return T.Compose([Resize(size)])
    height, width = (math.floor(side / pct) for side in size)
    whole = Resize(height) if height == width else ResizeToCover((height, width))
    ratio = 16 * max(size) / min(size)  # far more than the center crop keeps
    cut = FiveCrop(size) if five_crop else T.CenterCrop(size)
    return T.Compose([partial(_crop_ends, ratio=ratio / pct), whole, cut])
