# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""--decode fast: the crops of exact decoding, from fewer pixels, and never fewer than it needs."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from data_loading import jpeg
from data_loading.augment import Augmentation
from data_loading.dataset import TransformedDataset
from data_loading.decode import WithBox, decode, decode_for, load_image
from data_loading.transforms import (
    RandomResizedCrop,
    create_pretrain_transform,
    create_train_transform,
)
from errors import UserError

needs_simplejpeg = pytest.mark.skipif(jpeg.simplejpeg is None, reason="needs simplejpeg")
COUNT, SIZE = 24, 32


def photo(number: int, size: tuple[int, int], format_: str = "JPEG", **options) -> bytes:
    """A smooth image, so that a crop hardly depends on how it was made smaller."""
    generator, file = np.random.default_rng(number), io.BytesIO()
    coarse = Image.fromarray(generator.integers(0, 256, (2, 3, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, format_, **options)
    return file.getvalue()


class Photos(Dataset):
    def __init__(self, *args, **options) -> None:
        self.files = [photo(number, *args, **options) for number in range(COUNT)]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple:
        return load_image(self.files[index]), 0


def read_both(data: Dataset, transform, in_chans: int = 3) -> list[tuple]:
    """(exact, fast) of each image."""
    exact, fast = (TransformedDataset(data, transform, 1, in_chans) for _ in range(2))
    fast.decode_fast()
    return [(exact[0, i][0], fast[0, i][0]) for i in range(COUNT)]


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


TRANSFORMS = {
    "pre-training": create_pretrain_transform(SIZE),
    "fine-tuning": create_train_transform(SIZE, Augmentation(scale=(0.1, 0.9), vflip=0.5)),
    "small": create_train_transform(SIZE),
}


@needs_simplejpeg
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_crop_shows_what_the_exact_one_shows(name, orientation, in_chans):
    """A box of the size before it was decoded, or not turned, would show another part."""
    options = {"exif": exif(orientation)} if orientation > 1 else {}
    pairs = read_both(Photos((330, 250), **options), TRANSFORMS[name], in_chans)
    for exact, fast in pairs:
        assert fast.shape == exact.shape == (in_chans, SIZE, SIZE)
        assert (exact.int() - fast.int()).abs().float().mean() < 10  # 40 of another part
    assert not all(torch.equal(exact, fast) for exact, fast in pairs)


@needs_simplejpeg
def test_what_is_not_far_larger_than_the_crop_keeps_its_bits():
    small = create_pretrain_transform(SIZE, Augmentation(scale=(0.2, 0.3)))
    for data in (Photos((70, 60)), Photos((330, 250), "PNG"), Photos((330, 250), "WEBP")):
        assert all(torch.equal(exact, fast) for exact, fast in read_both(data, small))


@needs_simplejpeg
@pytest.mark.parametrize("size", [(330, 250), (250, 331), (1201, 903), (40, 900), (63, 64)])
def test_box_is_that_of_the_exact_image_and_has_enough_pixels(size):
    crop, data, factors = RandomResizedCrop((SIZE, 40), (0.05, 1.0)), photo(0, size), set()
    for seed in range(60):
        random.seed(seed)
        whole = crop.draw_box(size[1], size[0])
        random.seed(seed)
        with decode_for(crop):
            image = load_image(data)
        height, width = image.shape[1:]
        factor = round(size[1] / height)
        assert factor in (1, 2, 4, 8)
        assert (height, width) == (-(-size[1] // factor), -(-size[0] // factor))
        factors.add(factor)
        top, left, rows, columns = image.box
        off = np.array(image.box) * factor - whole
        assert np.abs(off[:2]).max() <= factor / 2
        assert -factor < off[2:].min() <= off[2:].max() <= 0
        assert top + rows <= height
        assert left + columns <= width
        assert factor == 1 or (rows >= SIZE and columns >= 40)
        assert factor == 8 or whole[2] < 2 * factor * SIZE or whole[3] < 2 * factor * 40
    assert factors != {1} or max(size) < 80 or min(size) < 64


def test_without_simplejpeg_it_is_refused(monkeypatch):
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    data = TransformedDataset(Photos((40, 30)), TRANSFORMS["pre-training"], 0)
    with pytest.raises(UserError, match="--decode fast needs simplejpeg: pip install simplejpeg"):
        data.decode_fast()


@needs_simplejpeg
def test_exact_decoding_draws_no_box():
    assert type(load_image(photo(0, (330, 250)))) is torch.Tensor
    with decode_for(RandomResizedCrop((SIZE, SIZE), (0.5, 1.0))):
        image = decode(load_image(photo(0, (330, 250))), 1)
    assert isinstance(image, WithBox)
    assert type(image[:, :9]) is torch.Tensor  # a data set that cuts it gets another crop
