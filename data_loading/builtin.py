# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Datasets that need no folder of images: CIFAR, 8x8 digits and synthetic discs.

python -c "from data_loading.builtin import Digits; print(len(Digits(train=True)))"
"""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from data_loading.rng import fold_in
from errors import UserError
from parallel.process_group import is_main_process, main_process_first

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def cifar(kind: type[CIFAR10], data_path: str, train: bool) -> CIFAR10:
    """Open torchvision's CIFAR in data_path; the main process downloads it if it is not there.

    torchvision compares the MD5 of every file to the published one before it unpickles it.
    """
    root = Path(data_path).expanduser()

    def find() -> CIFAR10:
        try:
            return kind(str(root), train, download=is_main_process())
        except Exception as error:  # also of the network; the other ranks wait for this rank
            raise UserError(
                f"{kind.__name__}: cannot read {root / kind.base_folder} or download {kind.url} "
                f"({type(error).__name__}: {error}); place that archive, or the folder in it, in "
                f"{root}"
            ) from error

    return main_process_first(find)


class Digits(Dataset):
    """1797 gray 8x8 digits (assets/README.md); every fifth of each class is for validation."""

    classes = tuple("0123456789")

    def __init__(self, train: bool):
        with np.load(ASSETS / "digits.npz") as file:
            images, labels = file["images"], file["labels"]
        # Position of each within its class.
        nth = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
        chosen = (nth % 5 != 4) if train else (nth % 5 == 4)
        self.images = (images[chosen].astype(np.uint16) * 255 // 16).astype(np.uint8)  # was 0..16
        self.targets = labels[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


class Synthetic(Dataset):
    """Discs on noise; the label is the hue, which also tints the noise: any crop shows it."""

    def __init__(self, size: tuple[int, int], nb_classes: int, train: bool):
        self.size, self.train = size, train
        self.classes = tuple(f"hue{k}" for k in range(nb_classes))
        self.targets = [index % nb_classes for index in range(len(self))]

    def __len__(self) -> int:
        return 1024 if self.train else 256

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        (height, width), label = self.size, self.targets[index]
        random = np.random.default_rng(fold_in(int(self.train), index))
        color = 255 * np.array(colorsys.hsv_to_rgb(label / len(self.classes), 1, 1))
        radius = random.uniform(0.25, 0.45) * min(height, width)
        y = np.arange(height)[:, None] + 0.5 - random.uniform(radius, height - radius)
        x = np.arange(width)[None, :] + 0.5 - random.uniform(radius, width - radius)
        opacity = np.where(y**2 + x**2 <= radius**2, 0.8, 0.2)[..., None]  # (H, W, 1)
        noise = random.uniform(0, 255, size=(height, width, 1))
        pixels = (opacity * color + (1 - opacity) * noise).astype(np.uint8)  # (H, W, 3)
        return Image.fromarray(pixels), label
