# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Random changes of a cropped image: flips, turns, colors, blur and erasing.

python -c "from data_loading.augment import *; print(create_steps((224, 224), Augmentation()))"
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from config.augmentation import ENDED, TRIVIAL, policy_problems
from data_loading.decode import from_pil
from data_loading.erasing import RandomErasing
from errors import UserError

RATIO = (3 / 4, 4 / 3)  # width / height of random crops
SIGMA, RADIUS = (0.1, 2.0), 11  # of the Gaussian blur in pixels, as in timm and SimCLR
# Of the colors of ImageNet in 0..1, a row for each of red, green and blue: fb.resnet.torch,
# datasets/imagenet.lua.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclass(frozen=True)
class Augmentation:
    """Random changes of an image to train on; fields are named like their flags.

    Without arguments they are timm's crop and horizontal flip, and nothing else. fill: color in
    0..1, a value per channel, of the borders that timm's policies leave empty.
    """

    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = RATIO
    train_interpolation: str = "bicubic"
    hflip: float = 0.5
    vflip: float = 0.0
    rot90: float = 0.0
    aa: str | None = None
    color_jitter: float | None = None
    color_jitter_prob: float | None = None
    pca_lighting: float = 0.0
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    fill: Sequence[float] = (0.485, 0.456, 0.406)

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes of `transforms.resize`, one of which is drawn."""
        name = self.train_interpolation
        return ("bilinear", "bicubic") if name == "random" else (name,)

    def geometric(self) -> "Augmentation":
        """Return the crop, flips and right-angle turns alone, as from --aug_off_epoch on."""
        return replace(self, **{name: getattr(Augmentation, name) for name in ENDED})


class RandomFlip:
    """Mirror an image (C, H, W) with probability `p`: along 2 left to right, along 1 top down."""

    def __init__(self, p: float, dim: int) -> None:
        self.p, self.dim = p, dim

    def __call__(self, image: Tensor) -> Tensor:
        return image.flip(self.dim) if random.random() < self.p else image

    def __repr__(self) -> str:
        return f"Random{'Horizontal' if self.dim == 2 else 'Vertical'}Flip(p={self.p})"


class RandomRotate90:
    """Turn a square image (C, S, S) by 90, 180 or 270 degrees with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Tensor) -> Tensor:
        if random.random() >= self.p:
            return image
        return torch.rot90(image, random.randint(1, 3), (1, 2))

    def __repr__(self) -> str:
        return f"RandomRotate90(p={self.p})"


class PcaLighting:
    """Add AlexNet's noise of color and brightness to an RGB image (3, H, W), uint8 or in 0..1.

    It is along the principal components of the colors of ImageNet; std: of its factors.
    """

    def __init__(self, std: float) -> None:
        self.std = std
        self.components = torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES)

    def __call__(self, image: Tensor) -> Tensor:
        factors = torch.tensor([random.gauss(0.0, self.std) for _ in EIGENVALUES])
        noise = (self.components @ factors).view(3, 1, 1)
        if image.is_floating_point():
            return (image + noise).clamp(0, 1)
        return (image + 255 * noise).round().clamp(0, 255).to(image.dtype)

    def __repr__(self) -> str:
        return f"PcaLighting(std={self.std})"


class RandomGaussianBlur:
    """Blur an image of any channels, uint8 or float, with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Tensor) -> Tensor:
        if random.random() >= self.p:
            return image
        return gaussian_blur(image, random.uniform(*SIGMA))

    def __repr__(self) -> str:
        return f"RandomGaussianBlur(p={self.p})"


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """(C, H, W) -> the same blurred, as torchvision's `gaussian_blur` with a kernel of 23 pixels.

    Of smaller images the kernel is as large as reflected borders allow. Sums of shifted images are
    much faster than torchvision's convolution, which is not separable.
    """
    blurred = image.contiguous().float()
    for dim in (1, 2):
        blurred = _blur_along(dim, blurred, sigma)
    return blurred if image.is_floating_point() else blurred.round().to(image.dtype)


def _blur_along(dim: int, image: Tensor, sigma: float) -> Tensor:
    size = image.shape[dim]
    radius = min(RADIUS, size - 1)
    weights = [math.exp(-0.5 * (shift / sigma) ** 2) for shift in range(radius + 1)]
    total = 2 * sum(weights) - weights[0]
    borders = (0, 0, radius, radius) if dim == 1 else (radius, radius, 0, 0)
    padded = F.pad(image[None], borders, mode="reflect")[0]
    result = padded.narrow(dim, radius, size) * (weights[0] / total)
    for shift in range(1, radius + 1):
        both = padded.narrow(dim, radius - shift, size) + padded.narrow(dim, radius + shift, size)
        result.add_(both, alpha=weights[shift] / total)
    return result


def _to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) uint8 of 1 or 3 channels -> PIL image, for timm's and torchvision's policies."""
    if image.dtype != torch.uint8 or len(image) not in (1, 3):
        raise UserError(
            "--aa and --color_jitter act on 8-bit images of 1 or 3 channels, got "
            f"{image.dtype} tensor {tuple(image.shape)}; turn them off: --aa none --color_jitter 0"
        )
    pixels = image.permute(1, 2, 0).contiguous()
    return Image.fromarray((pixels[..., 0] if len(image) == 1 else pixels).numpy())


def _posterize(op: Callable, image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    black = Image.new(image.mode, image.size)
    return op(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else black


def fix_posterize(step: Any) -> None:
    """Replace timm's posterize: Pillow 13 refuses 0 bits, which used to give a black image."""
    policy = getattr(step, "ops", None) or sum(getattr(step, "policy", []), [])
    for op in policy:
        if op.aug_fn.__name__ == "posterize":
            op.aug_fn = partial(_posterize, op.aug_fn)


def _policy_steps(size: tuple[int, int], augmentation: Augmentation) -> list:
    """Return the steps of `aa` and `color_jitter`, which act on PIL images."""
    from timm.data import create_transform

    for problem in policy_problems(augmentation.aa, augmentation.color_jitter):
        raise UserError(problem)
    if augmentation.aa == TRIVIAL:  # black borders, as in torchvision's reference scripts
        each = [
            T.TrivialAugmentWide(interpolation=T.InterpolationMode(mode))
            for mode in augmentation.modes
        ]
        return each if len(each) == 1 else [T.RandomChoice(each)]
    _, *steps, _ = create_transform(  # without its crop, flip and conversion to a tensor
        size, is_training=True, use_prefetcher=True, auto_augment=augmentation.aa, hflip=0,
        color_jitter=augmentation.color_jitter or None,
        color_jitter_prob=augmentation.color_jitter_prob, mean=tuple(augmentation.fill),
        interpolation=augmentation.train_interpolation,
    ).transforms  # fmt: skip
    for step in steps:
        fix_posterize(step)
    return steps


def create_steps(size: tuple[int, int], augmentation: Augmentation) -> list[Callable]:
    """Create what follows the crop to `size` (height, width): only what is on, in timm's order.

    Steps map a (C, H, W) tensor, uint8 or float, to one of its kind and size.
    """
    on = augmentation
    if (on.aa or "none").lower() == "none":
        on = replace(on, aa=None)
    steps: list[Callable] = [RandomFlip(on.hflip, dim=2)]
    steps += [RandomFlip(on.vflip, dim=1)] if on.vflip else []
    steps += [RandomRotate90(on.rot90)] if on.rot90 else []
    steps += [_to_pil, *_policy_steps(size, on), from_pil] if on.aa or on.color_jitter else []
    steps += [PcaLighting(on.pca_lighting)] if on.pca_lighting else []
    steps += [T.RandomGrayscale(on.grayscale_prob)] if on.grayscale_prob else []
    steps += [RandomGaussianBlur(on.gaussian_blur_prob)] if on.gaussian_blur_prob else []
    return steps + ([RandomErasing(on.reprob, on.remode, on.recount)] if on.reprob else [])
