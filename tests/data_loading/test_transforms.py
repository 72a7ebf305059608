# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Crops and resized images are PIL's and torchvision's, and depend on the sample alone."""

import io
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor, resized_crop, to_pil_image

from data_loading.augment import Augmentation
from data_loading.dataset import TransformedDataset
from data_loading.decode import decode, load_image
from data_loading.loader import DeviceLoader
from data_loading.samplers import TrainSampler
from data_loading.transforms import (
    RandomResizedCrop,
    create_eval_transform,
    create_pretrain_transform,
    create_train_transform,
    mean_and_std,
    resize,
)
from data_loading.workers import WatchedLoader

PHOTOS = Path(os.environ.get("PHOTOS", "photos.zip"))  # of any *.JPEG
needs_photos = pytest.mark.skipif(
    not PHOTOS.exists(), reason="no photos here; PHOTOS=photos.zip names some"
)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def smooth(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth colors, edges and some noise, as a photo has."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    pixels[size[1] // 3 :: 7] = 255  # lines
    noise = generator.integers(-20, 21, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def photos() -> list[Image.Image]:
    with zipfile.ZipFile(PHOTOS) as archive:
        files = [archive.read(n) for n in archive.namelist() if n.lower().endswith(".jpeg")]
    assert len(files) >= 20
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]


def check_near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """99.9% of the values differ by 1 at most, and the mean difference is at most 0.1."""
    pairs = zip(ours, theirs, strict=True)
    off = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in pairs])
    assert (off <= 1).float().mean() >= 0.999
    assert off.float().mean() <= 0.1


# --- resize ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FILTERS)
@pytest.mark.parametrize("size", [(224, 224), (64, 96), (400, 300), (40, 30), (1, 1)])
def test_resize_is_that_of_pil(mode, size):
    for in_chans in (1, 3):
        image = smooth((230, 170)).convert("L" if in_chans == 1 else "RGB")
        ours = resize(pil_to_tensor(image), size, mode)
        check_near([ours], [pil_to_tensor(image.resize(size[::-1], FILTERS[mode]))])
        assert ours.shape == (in_chans, *size)
        assert ours.permute(1, 2, 0).is_contiguous()  # so that a batch is joined by copying


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("layout", ["rows", "pixels", "part"])
def test_each_of_any_channels_is_resized_as_pil_does_a_gray_image(channels, layout):
    whole = torch.cat([pil_to_tensor(smooth((80, 60), seed)) for seed in range(4)])[:channels]
    if layout == "pixels":
        whole = whole.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    image = whole[:, 3:53, 5:67] if layout == "part" else whole
    for mode, kind in FILTERS.items():
        sides = [to_pil_image(side).resize((37, 21), kind) for side in image]
        check_near([resize(image, (21, 37), mode)], [torch.cat([*map(pil_to_tensor, sides)])])
        exact = resize(image.float(), (21, 37), mode)
        assert exact.dtype == torch.float32
        assert (resize(image, (21, 37), mode) - exact.clamp(0, 255)).abs().mean() < 0.5


@needs_photos
@pytest.mark.parametrize("mode", FILTERS)
def test_crops_of_photos_are_those_of_pil(mode):
    crop, ours, theirs = RandomResizedCrop((224, 224), (0.08, 1.0), (mode,)), [], []
    for number, image in enumerate(photos()):
        random.seed(number)
        ours.append(crop(pil_to_tensor(image)))
        random.seed(number)
        box = crop.draw_box(*image.size[::-1])
        theirs.append(
            pil_to_tensor(resized_crop(image, *box, (224, 224), T.InterpolationMode(mode)))
        )
    check_near(ours, theirs)


@needs_photos
def test_photos_to_evaluate_are_those_of_pil():
    bicubic, images = T.InterpolationMode.BICUBIC, photos()
    for steps, ours in (
        ([T.Resize(256, bicubic), T.CenterCrop(224)], create_eval_transform(224)),
        ([T.Resize((384, 384), bicubic)], create_eval_transform(384)),
    ):
        theirs = T.Compose([*steps, T.PILToTensor()])
        check_near([ours(pil_to_tensor(i)) for i in images], [theirs(i) for i in images])


@pytest.mark.parametrize("shape", [(300, 300), (301, 200), (200, 333), (64, 64), (63, 65)])
@pytest.mark.parametrize(("size", "pct"), [(64, None), (64, 1.0), ((48, 80), 0.9), ((80, 48), 0.5)])
def test_image_to_evaluate_is_timms(shape, size, pct):
    """Another rounding of the longer side would shift all images by a pixel."""
    from timm.data import create_transform

    image = smooth(shape)
    size = (size, size) if isinstance(size, int) else size
    pct = pct or 224 / 256
    timms = create_transform(size, interpolation="bicubic", crop_pct=pct, use_prefetcher=True)
    check_near([create_eval_transform(size, pct)(pil_to_tensor(image))], [timms(image)])


# --- random crops ---------------------------------------------------------------------------

SHAPES = [(333, 500), (500, 333), (224, 224), (100, 1000), (1000, 100)]  # the last fall back


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.5, 0.6)])
def test_area_ratio_and_position_are_distributed_as_torchvisions(shape, scale):
    """Two-sample Kolmogorov-Smirnov test of each of them; the seeds are fixed."""
    count, crop = 3000, RandomResizedCrop((8, 8), scale)
    random.seed(1)
    ours = np.array([crop.draw_box(*shape) for _ in range(count)], float)
    torch.manual_seed(1)
    image, ratio = torch.empty(1, *shape), [3 / 4, 4 / 3]
    draws = [T.RandomResizedCrop.get_params(image, list(scale), ratio) for _ in range(count)]
    theirs = np.array(draws, float)
    limit = 1.95 * np.sqrt(2 / count)  # p = 0.001
    for mine, other in zip(describe(ours, shape), describe(theirs, shape), strict=True):
        edges = np.sort(np.concatenate([mine, other]))
        share = [np.searchsorted(np.sort(x), edges, side="right") / count for x in (mine, other)]
        assert np.abs(share[0] - share[1]).max() < limit


def describe(boxes: np.ndarray, shape: tuple[int, int]) -> list[np.ndarray]:
    """Area, ratio, and place of the center."""
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert (top + height <= shape[0]).all()
    assert (left + width <= shape[1]).all()
    assert ((height >= 1) & (width >= 1)).all()
    return [height * width, width / height, top + height / 2, left + width / 2]


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (2, 3)])
def test_crop_of_the_smallest_images_is_within_them(shape):
    random.seed(0)
    crop = RandomResizedCrop((8, 8), (0.001, 1.0))
    describe(np.array([crop.draw_box(*shape) for _ in range(500)]), shape)


def test_random_interpolation_takes_both():
    image = pil_to_tensor(smooth((90, 60)))
    crop = RandomResizedCrop((32, 32), (1.0, 1.0), ("bilinear", "bicubic"), ratio=(1.5, 1.5))
    random.seed(0)
    found = {crop(image).numpy().tobytes() for _ in range(20)}
    assert found == {resize(image, (32, 32), mode).numpy().tobytes() for mode in FILTERS}


def test_small_images_are_shifted_over_black():
    """By up to 4 pixels each way, as the official code does at 32 pixels."""
    transform = create_train_transform(32, Augmentation(hflip=0))
    image, seen = torch.full((3, 32, 32), 255, dtype=torch.uint8), set()
    torch.manual_seed(0)
    for _ in range(200):
        rows, columns = ((transform(image)[0] > 0).any(1), (transform(image)[0] > 0).any(0))
        seen |= {int(side.sum()) for side in (rows, columns)}
    assert seen == {28, 29, 30, 31, 32}


def test_colors_of_timm_act_on_the_cropped_image():
    """They get a PIL image of the right size and colors, and their result is not turned."""
    transform = create_train_transform(
        (48, 64), Augmentation(aa="rand-m9", hflip=0, scale=(0.5, 1.0))
    )
    position = [hasattr(step, "ops") for step in transform.transforms].index(True)
    got = []
    transform.transforms[position] = lambda image: got.append(image) or image
    image = pil_to_tensor(smooth((90, 70)))
    random.seed(3)
    result = transform(image)
    random.seed(3)
    assert torch.equal(result, transform.transforms[0](image))
    assert (got[0].size, got[0].mode) == ((64, 48), "RGB")
    assert torch.equal(pil_to_tensor(got[0]), result)


# --- the same images whoever reads them -----------------------------------------------------


class Files(Dataset):
    """Encoded images: JPEG by simplejpeg, PNG by PIL."""

    def __init__(self, count: int) -> None:
        self.files = []
        for number in range(count):
            file = io.BytesIO()
            smooth((70, 50), number).save(file, ("JPEG", "PNG")[number % 2])
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple:
        return load_image(self.files[index]), 0


TRANSFORMS = {
    "pre-training": create_pretrain_transform(40),
    "fine-tuning": create_train_transform(
        40, Augmentation(aa="rand-m9-mstd0.5-inc1", train_interpolation="random", reprob=0.5,
                         recount=2),
    ),
    "small": create_train_transform(32, Augmentation(color_jitter=0.4)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_images_are_the_same_for_any_number_of_workers_and_ranks(name):
    data, epochs = TransformedDataset(Files(16), TRANSFORMS[name], seed=5), []
    for workers, ranks, size in ((0, 1, 16), (1, 1, 4), (2, 2, 3), (0, 4, 2)):
        seen = {}
        for rank in range(ranks):
            loader = WatchedLoader(data, TrainSampler(16, 5, rank, ranks), size, workers)
            batches = DeviceLoader(loader, "cpu", *mean_and_std())
            for epoch in (0, 1):
                batches.set_epoch(epoch)
                for images, _, ids in batches:
                    seen |= {(epoch, int(i)): image for i, image in zip(ids, images, strict=True)}
        epochs.append(seen)
    first, *others = epochs
    assert len(first) == 32
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert not torch.equal(first[0, 3], first[1, 3])


@pytest.mark.slow
def test_images_are_the_same_for_eight_workers():
    data, epochs = TransformedDataset(Files(16), TRANSFORMS["fine-tuning"], seed=5), []
    for workers in (0, 1, 8):
        loader = WatchedLoader(data, TrainSampler(16, 5, 0, 1), 2, workers)
        batches = list(DeviceLoader(loader, "cpu", *mean_and_std()))
        epochs.append(torch.cat([images for images, *_ in batches]))
    assert all(torch.equal(epochs[0], other) for other in epochs[1:])


def test_batch_is_in_the_order_of_the_network():
    """A batch in another order would be copied once more."""
    data = TransformedDataset(Files(4), TRANSFORMS["pre-training"], seed=5)
    loader = WatchedLoader(data, TrainSampler(4, 5, 0, 1), 4)
    images, *_ = next(iter(loader))
    normalized, *_ = next(iter(DeviceLoader(loader, "cpu", *mean_and_std())))
    for batch in (images, normalized):
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_gray_and_color_are_converted_without_pil():
    gray = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    assert torch.equal(decode(gray, 3), gray.repeat(3, 1, 1))
    color = pil_to_tensor(smooth((20, 10)))
    assert torch.equal(decode(color, 1), pil_to_tensor(smooth((20, 10)).convert("L")))
