# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Each augmentation is the operation that it is named after, as often as its flag says."""

import copy
import random
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from config import parser as options
from config import views
from data_loading import augment
from data_loading.augment import Augmentation, PcaLighting, RandomRotate90, create_steps
from data_loading.dataset import TransformedDataset
from data_loading.decode import from_pil
from data_loading.erasing import Erased, RandomErasing
from data_loading.loader import DeviceLoader
from data_loading.rng import seed_cpu
from data_loading.samplers import TrainSampler
from data_loading.transforms import (
    PRETRAIN,
    RandomResizedCrop,
    build_augmentation,
    create_pretrain_transform,
    create_train_transform,
    mean_and_std,
)
from data_loading.workers import WatchedLoader
from errors import UserError

SIZE = (24, 24)
OFF = Augmentation(hflip=0.0)
COLORS = {"aa": "3a", "color_jitter": 0.4, "pca_lighting": 0.1, "grayscale_prob": 0.5}


def pixels(channels: int = 3, size: tuple[int, int] = SIZE, dtype=torch.uint8) -> Tensor:
    """Smooth colors with noise, in the memory order of decoders."""
    generator = torch.Generator().manual_seed(channels)
    coarse = torch.rand(1, channels, 4, 5, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0]
    image = (0.9 * image + 0.1 * torch.rand(channels, *size, generator=generator)).clamp(0, 1)
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return (255 * image).byte() if dtype == torch.uint8 else image


def only(**options) -> list:
    """The steps of a single augmentation."""
    flip, *steps = create_steps(SIZE, Augmentation(hflip=0.0, **options))
    assert repr(flip) == "RandomHorizontalFlip(p=0.0)"
    return steps


def apply(steps: list, image: Tensor, seed: int = 0) -> Tensor:
    seed_cpu(seed)
    for step in steps:
        image = step(image)
    return image


# --- the order, and defaults ----------------------------------------------------------------


def test_steps_are_those_that_are_on_in_timms_order():
    every = Augmentation(
        vflip=0.1, rot90=0.2, gaussian_blur_prob=0.3, reprob=0.4, color_jitter_prob=0.6, **COLORS
    )
    names = [getattr(s, "__name__", type(s).__name__) for s in create_steps(SIZE, every)]
    assert names == [
        "RandomFlip", "RandomFlip", "RandomRotate90", "_to_pil", "AutoAugment", "RandomApply",
        "from_pil", "PcaLighting", "RandomGrayscale", "RandomGaussianBlur", "RandomErasing",
    ]  # fmt: skip
    assert [type(step).__name__ for step in create_steps(SIZE, Augmentation())] == ["RandomFlip"]


@pytest.mark.parametrize("options", [{}, {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25}])
def test_images_of_the_defaults_are_those_of_crop_flip_timm_and_erasing(options):
    """A further draw, or another order, would change the images of all runs."""
    from timm.data import create_transform

    base = PRETRAIN if not options else Augmentation()
    make = create_train_transform if options else create_pretrain_transform
    transform = make(48, Augmentation(**{**vars(base), **options}))
    timm = create_transform(
        48, is_training=True, use_prefetcher=True, color_jitter=None, hflip=0,
        auto_augment=options.get("aa"), interpolation="bicubic", mean=tuple(mean_and_std()[0]),
    ).transforms[1:-1]  # fmt: skip
    for step in timm:
        augment.fix_posterize(step)
    for seed in range(40):
        image = pixels(size=(60, 70))
        seed_cpu(seed)
        mine = transform(image)
        seed_cpu(seed)
        theirs = RandomResizedCrop((48, 48), base.scale)(image)
        theirs = theirs.flip(2) if random.random() < 0.5 else theirs
        if timm:
            picture = Image.fromarray(theirs.permute(1, 2, 0).contiguous().numpy())
            for step in timm:
                picture = step(picture)
            theirs = RandomErasing(0.25, "pixel", 1)(from_pil(picture))
        assert torch.equal(mine, theirs)
        assert isinstance(mine, Erased) == isinstance(theirs, Erased)
        if isinstance(mine, Erased):
            pairs = zip(mine.patches, theirs.patches, strict=True)
            assert all(torch.equal(a.noise, b.noise) and a[:2] == b[:2] for a, b in pairs)


CHANCES = ("vflip", "rot90", "grayscale_prob", "gaussian_blur_prob")


@pytest.mark.parametrize("name", [*CHANCES, "color_jitter_prob", "reprob"])
def test_an_augmentation_of_probability_0_is_none_and_of_1_is_always(name):
    more = {"color_jitter": 0.4} if name == "color_jitter_prob" else {}
    for seed in range(20):
        image = pixels()
        assert torch.equal(apply(only(**{name: 0.0}, **more), image, seed), image)
        after = apply(only(**{name: 1.0}, **more), image, 20 + seed)
        assert isinstance(after, Erased) if name == "reprob" else after is not image
        if name in ("vflip", "rot90", "grayscale_prob", "color_jitter_prob"):
            assert not torch.equal(after, image)


@pytest.mark.parametrize("name", CHANCES)
def test_an_augmentation_is_as_frequent_as_its_flag_says(name):
    image, count = pixels(), 2000
    (step,) = only(**{name: 0.3})
    seed_cpu(7)
    changed = sum(step(image) is not image for _ in range(count))  # a blur by 0.1 pixels is none
    assert abs(changed / count - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5


# --- flips and turns ------------------------------------------------------------------------

KINDS = [(1, torch.uint8), (3, torch.uint8), (3, torch.float), (12, torch.float), (5, torch.uint8)]


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_flips_turns_and_blur_are_for_all_images(channels, dtype):
    image = pixels(channels, dtype=dtype)
    (flip,) = only(vflip=1.0)
    assert torch.equal(flip(image), image.flip(1))
    (turn,) = only(rot90=1.0)
    turned = {tuple(torch.rot90(image, k, (1, 2)).flatten().tolist()) for k in (1, 2, 3)}
    seed_cpu(0)
    assert {tuple(turn(image).flatten().tolist()) for _ in range(30)} == turned
    (blur,) = only(gaussian_blur_prob=1.0)
    assert (blur(image).dtype, blur(image).shape) == (dtype, image.shape)


def test_all_directions_are_as_frequent_with_075():
    image = torch.tensor([[[0, 1], [3, 2]]], dtype=torch.uint8)  # [0, 0] tells the turn
    turn = RandomRotate90(0.75)
    seed_cpu(3)
    found = Counter(turn(image)[0, 0, 0].item() for _ in range(4000))
    assert {*found} == {0, 1, 2, 3}
    assert all(abs(count - 1000) < 4 * (4000 * 3 / 16) ** 0.5 for count in found.values())


def test_crops_have_the_asked_ratios():
    crop = create_pretrain_transform(8, Augmentation(ratio=(2.0, 3.0))).transforms[0]
    seed_cpu(0)
    boxes = [crop.draw_box(500, 700) for _ in range(500)]
    ratios = [width / height for _, _, height, width in boxes]
    assert min(ratios) > 1.4  # where ten draws do not fit, of the whole image
    assert np.mean([1.97 < ratio < 3.05 for ratio in ratios]) > 0.9


# --- colors and blur ------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0])
@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_blur_is_that_of_torchvision(sigma, channels, dtype):
    image = pixels(channels, (40, 31), dtype)
    ours = augment.gaussian_blur(image, sigma)
    theirs = TF.gaussian_blur(image, [23, 23], [sigma, sigma])
    off = (ours.double() - theirs.double()).abs()
    if dtype == torch.uint8:  # where a value is at .5, sums in another order may round otherwise
        assert off.max() <= 1
        assert (off > 0).double().mean() < 0.002
    else:
        assert off.max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (12, 3), (8, 8)])
def test_blur_of_images_smaller_than_its_kernel_keeps_flat_ones(size):
    """torchvision refuses them."""
    image = torch.full((2, *size), 117, dtype=torch.uint8)
    assert torch.equal(augment.gaussian_blur(image, 2.0), image)
    spot = torch.zeros(1, *size)
    spot[0, 0, 0] = 1
    assert 0 < augment.gaussian_blur(spot, 1.0)[0, 0, 0] <= 1


def test_blur_draws_its_width_between_a_tenth_and_two_pixels():
    (step,), seen = only(gaussian_blur_prob=1.0), []
    image = torch.zeros(1, 23, 23)
    image[0, 11, 11] = 1
    seed_cpu(0)
    for _ in range(400):
        center = step(image)[0, 11, 11].item()  # 1 / (2 pi sigma^2) for wide kernels
        seen.append(center)
    assert min(seen) == pytest.approx(augment.gaussian_blur(image, 2.0)[0, 11, 11].item(), rel=0.05)
    assert max(seen) == pytest.approx(1.0)
    half = augment.gaussian_blur(image, 1.05)[0, 11, 11].item()
    assert 0.4 < np.mean(np.array(seen) > half) < 0.6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float])
def test_lighting_is_the_formula_of_alexnet(dtype):
    """rgb += [p1 p2 p3] (a1 l1, a2 l2, a3 l3), with factors a of standard deviation STD."""
    image, seen = pixels(dtype=dtype), []
    for seed in range(20):
        seed_cpu(seed)
        ours = PcaLighting(0.3)(image)
        seed_cpu(seed)
        factors = [random.gauss(0, 0.3) for _ in range(3)]
        vectors, values = np.array(augment.EIGENVECTORS), np.array(augment.EIGENVALUES)
        noise = sum(factors[i] * values[i] * vectors[:, i] for i in range(3)).reshape(3, 1, 1)
        scale = 255 if dtype == torch.uint8 else 1
        exact = np.clip(image.double().numpy() + scale * noise, 0, scale)
        limit = 0.501 if dtype == torch.uint8 else 1e-6
        assert np.abs(ours.double().numpy() - exact).max() < limit
        assert ours.dtype == dtype
        seen.append(factors[0])
    assert 0.15 < np.std(seen) < 0.45


def test_principal_components_are_orthonormal():
    """A typo in the nine numbers would hardly be seen."""
    vectors = torch.tensor(augment.EIGENVECTORS)
    assert torch.allclose(vectors.T @ vectors, torch.eye(3), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float])
def test_gray_is_that_of_torchvision(dtype):
    image = pixels(dtype=dtype)
    gray = apply(only(grayscale_prob=1.0), image)
    assert torch.equal(gray, TF.rgb_to_grayscale(image, 3))
    assert torch.equal(gray[0], gray[2])


def test_jitter_is_that_of_torchvision_as_often_as_asked():
    image, count = pixels(), 600
    steps, jitter = only(color_jitter=0.4, color_jitter_prob=0.7), T.ColorJitter(0.4, 0.4, 0.4)
    seen = 0
    for seed in range(count):
        ours = apply(steps, image, seed)
        seed_cpu(seed)
        is_on = torch.rand(1).item() < 0.7
        theirs = from_pil(jitter(TF.to_pil_image(image))) if is_on else image
        assert torch.equal(ours, theirs)
        seen += is_on
    assert abs(seen / count - 0.7) < 0.08


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_trivial_augment_is_that_of_torchvision(mode, channels):
    steps = only(aa="ta_wide", train_interpolation=mode)
    theirs = T.TrivialAugmentWide(interpolation=T.InterpolationMode(mode))
    image, seen = pixels(channels), set()
    for seed in range(100):
        ours = apply(steps, image, seed)
        seed_cpu(seed)
        assert torch.equal(ours, from_pil(theirs(TF.to_pil_image(image))))
        seen.add(ours.numpy().tobytes())
    assert len(seen) > 50


def test_trivial_augment_draws_its_interpolation():
    (_, choice, _) = only(aa="ta_wide", train_interpolation="random")
    modes = [step.interpolation.value for step in choice.transforms]
    assert modes == ["bilinear", "bicubic"]


def test_three_augment_is_solarize_gray_or_blur():
    """And color jitter follows, as in DeiT III."""
    (_, policy, _) = only(aa="3a")
    names = [[op.name for op in ops] for ops in policy.policy]
    assert names == [["Solarize"], ["Desaturate"], ["GaussianBlurRand"]]
    (_, policy, jitter, _) = only(aa="3a", color_jitter=0.3)
    assert tuple(jitter.brightness) == (0.7, 1.3)


@pytest.mark.parametrize(("mode", "count"), [("bilinear", 1), ("bicubic", 1), ("random", 2)])
def test_operations_of_a_policy_resample_as_the_crop_does(mode, count):
    (_, policy, _) = only(aa="rand-m9", train_interpolation=mode)
    for op in policy.ops:
        found = op.kwargs["resample"]
        found = found if isinstance(found, tuple) else (found,)
        assert len(found) == count
        assert mode in ("random", found[0].name.lower())


@pytest.mark.parametrize("options", [{"aa": "ta_wide"}, {"color_jitter": 0.4}, {"aa": "3a"}])
@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.float), (4, torch.uint8)])
def test_policies_name_the_images_that_they_are_for(options, channels, dtype):
    with pytest.raises(UserError, match=r"8-bit images of 1 or 3 channels, got torch\.\w+ tensor"):
        apply(only(**options), pixels(channels, dtype=dtype))


# --- the same for any number of workers -----------------------------------------------------

WHOLE = Augmentation(
    vflip=0.5, rot90=0.5, gaussian_blur_prob=0.5, reprob=0.5, color_jitter_prob=0.7,
    train_interpolation="random", ratio=(0.5, 2.0), **COLORS,
)  # fmt: skip
TRIVIAL = Augmentation(aa="ta_wide", train_interpolation="random", pca_lighting=0.2)


class Tensors:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return pixels(size=(30 + index, 40)), 0


@pytest.mark.parametrize("augmentation", [WHOLE, TRIVIAL])
@pytest.mark.parametrize("make", [create_pretrain_transform, create_train_transform])
def test_images_depend_on_the_seed_epoch_and_sample_alone(augmentation, make):
    data, epochs = TransformedDataset(Tensors(), make(32, augmentation), seed=5), []
    for workers, ranks, size in ((0, 1, 12), (1, 2, 3)):
        seen = {}
        for rank in range(ranks):
            loader = WatchedLoader(data, TrainSampler(12, 5, rank, ranks), size, workers)
            batches = DeviceLoader(loader, "cpu", *mean_and_std())
            for epoch in (0, 1):
                torch.rand(3), random.random(), np.random.rand()
                batches.set_epoch(epoch)
                for images, _, ids in batches:
                    seen |= {(epoch, int(i)): image for i, image in zip(ids, images, strict=True)}
        epochs.append(seen)
    first, other = epochs
    assert len(first) == 24
    assert first.keys() == other.keys()
    assert all(torch.equal(first[key], other[key]) for key in first)
    assert not torch.equal(first[0, 3], first[1, 3])


@pytest.mark.parametrize("augmentation", [WHOLE, TRIVIAL])
def test_steps_can_be_sent_to_a_worker(augmentation):
    """Workers may be spawned."""
    transform = create_train_transform(32, augmentation)
    for seed in range(5):
        images = []
        for same in (transform, copy.deepcopy(transform)):
            seed_cpu(seed)
            images.append(same(pixels(size=(40, 50))))
        assert torch.equal(*images)


# --- the flags of the docs ------------------------------------------------------------------


def test_commands_of_the_docs_change_images_as_they_say():
    page = Path(__file__).parents[2] / "docs/data.md"
    text = page.read_text(encoding="utf-8").partition("## Augmentation\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line[:1] != "#"]
    steps = []
    for line in lines:
        _, script, *words = shlex.split(line)
        if script == "visualize.py":
            args = views.parse_data(words[1:])
        else:
            make = options.pretrain_parser if "pretrain" in script else options.finetune_parser
            args = options.parse(make(), words)
        is_pretraining = "mask_ratio" in vars(args)
        create = create_pretrain_transform if is_pretraining else create_train_transform
        transform = create(args.input_size, build_augmentation(args))
        seed_cpu(0)
        assert transform(pixels(size=(70, 90))).shape[1:] == args.input_size
        names = [getattr(s, "__name__", type(s).__name__) for s in transform.transforms[2:]]
        steps.append([name for name in names if name not in ("_to_pil", "from_pil")])
    assert steps == [
        ["RandomFlip", "RandomRotate90"],
        ["RandomFlip", "RandomRotate90", "RandomErasing"],
        ["AutoAugment", "ColorJitter"],
        ["TrivialAugmentWide", "RandomErasing"],
        ["RandomApply", "RandomGrayscale", "RandomGaussianBlur", "RandomErasing"],
        ["ColorJitter", "PcaLighting"],
        ["RandomRotate90", "TrivialAugmentWide", "RandomGaussianBlur", "RandomErasing"],
    ]
