# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Test-time augmentation: which views there are, and means of outputs over them."""

import itertools

import pytest
import torch
from torchvision import transforms as T
from torchvision.transforms import functional as F

from data_loading.transforms import Resize, create_eval_transform
from data_loading.tta import ONE_VIEW, FiveCrop, Views
from models.parts import KeepOutputs

COPIES = {
    "hflip": lambda x: [x, x.flip(3)],
    "vflip": lambda x: [x, x.flip(2)],
    "rot90": lambda x: [torch.rot90(x, turns, (2, 3)) for turns in range(4)],
}
NAMES = ["hflip", "vflip", "rot90", "hflip vflip", "rot90 hflip", "vflip rot90"]
NAMES += ["vflip rot90 hflip"]


def images_of(height: int = 6, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


def network_of(height: int = 6, width: int = 6) -> torch.nn.Module:
    """A network that sees where each pixel is."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(3 * height * width, 4).double()
    return torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.Tanh())


def copies_of(images: torch.Tensor, names: str) -> list[torch.Tensor]:
    """Every combination of the views, some of them twice."""
    found = [images]
    for name in names.split():
        found = [copy for image in found for copy in COPIES[name](image)]
    return found


@pytest.mark.parametrize("names", NAMES)
def test_mean_is_that_of_single_outputs_of_turned_copies(names):
    images, network = images_of(), network_of()
    expected = torch.stack([network(copy) for copy in copies_of(images, names)]).mean(0)
    found = Views(names.split()).mean_output(network, images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("names", NAMES)
def test_each_distinct_view_is_computed_once(names):
    """`hflip vflip rot90` are 8 views, not 16: a turn by 180 degrees is both flips."""
    images, views = images_of(), Views(names.split())
    distinct = {copy.numpy().tobytes() for copy in copies_of(images, names)}
    seen = [view.contiguous().numpy().tobytes() for view in views.each(images)]
    assert len(seen) == len({*seen}) == views.count
    assert {*seen} == distinct


def test_order_of_the_words_does_not_change_a_bit():
    images, network = images_of(), network_of()
    outputs = {
        tuple(Views(words).mean_output(network, images).flatten().tolist())
        for words in itertools.permutations(["hflip", "vflip", "rot90"])
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("size", "pct", "shape"), [((16, 16), 0.8, (40, 28)), ((12, 20), 0.75, (50, 80))]
)
def test_ten_crop_is_torchvisions(size, pct, shape):
    """On the resized image; the margins are even, so that mirrored center crops coincide."""
    image = torch.randint(256, (3, *shape), generator=torch.Generator().manual_seed(2))
    image, network = image.to(torch.uint8), network_of(*size)
    *steps, _ = create_eval_transform(size, pct).transforms
    crops = F.ten_crop(T.Compose(steps)(image), list(size))
    expected = torch.stack([network(crop[None].double()) for crop in crops]).mean(0)
    stacked = create_eval_transform(size, pct, five_crop=True)(image)
    assert stacked.shape == (3, 5 * size[0], size[1])
    views = Views(["hflip", "five_crop"])
    assert views.count == 10
    found = views.mean_output(network, stacked[None].double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_center_is_the_crop_without_augmentation():
    image = torch.randint(256, (3, 40, 28), generator=torch.Generator().manual_seed(2))
    plain, stacked = (
        create_eval_transform(16, 0.8, five_crop=five)(image.to(torch.uint8))[None]
        for five in (False, True)
    )
    assert torch.equal(Views(["five_crop"]).center(stacked), plain)
    assert torch.equal(Views(["hflip"]).center(plain), plain)
    assert torch.equal(next(Views(["rot90", "five_crop"]).each(stacked)), plain)


def test_crops_keep_the_channels_of_a_pixel_together():
    """Otherwise each image would be rearranged when batches are made and normalized."""
    decoded = torch.zeros(10, 12, 3, dtype=torch.uint8).permute(2, 0, 1)
    assert FiveCrop((8, 8))(decoded).stride() == (1, 24, 3)


def test_five_crops_of_an_image_resized_as_a_whole_are_an_error():
    with pytest.raises(ValueError, match="crop_pct"):
        create_eval_transform(32, five_crop=True)
    assert isinstance(create_eval_transform(32).transforms[0], Resize)


@pytest.mark.parametrize("names", ["rot90", "vflip", "five_crop", "hflip five_crop"])
def test_network_sees_batches_of_the_usual_shape_and_memory_format(names):
    """Other strides would make --compile compile again, and kernels copy."""
    views = Views(names.split())
    images = images_of(views.crops * 6, 6).contiguous(memory_format=torch.channels_last)
    for view in views.each(images):
        assert view.shape == (2, 3, 6, 6)
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_outputs_of_half_precision_are_averaged_in_float32():
    """256 + 1 in bfloat16 is 256."""

    def network(images: torch.Tensor) -> torch.Tensor:
        return (images[:, 0, 0, :1] * 255 + 1).bfloat16()

    images = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    found = Views(["hflip"]).mean_output(network, images)
    assert found.dtype == torch.float32
    assert found.item() == 128.5


def test_single_view_is_the_batch_itself():
    images = images_of()
    assert [view is images for view in ONE_VIEW.each(images)] == [True]
    assert ONE_VIEW.mean_output(lambda x: x, images) is images
    assert ONE_VIEW.repeat(images) is images
    assert ONE_VIEW.count == 1


def test_repeated_batch_has_equal_crops():
    images, views = images_of(), Views(["five_crop"])
    assert [torch.equal(view, images) for view in views.each(views.repeat(images))] == [True] * 5


def test_unknown_view_is_an_error():
    """It would be left out, and the metrics be those of fewer views."""
    with pytest.raises(ValueError, match="unknown view 'hfilp', expected one of hflip, vflip, rot"):
        Views(["rot90", "hfilp"])


def test_some_of_the_outputs_are_averaged_as_all_are():
    """--eval_classes data."""
    images, network, views = images_of(), network_of(), Views(["hflip", "rot90"])
    expected = views.mean_output(network, images)[:, [0, 3]]
    assert torch.equal(views.mean_output(KeepOutputs(network, [0, 3]), images), expected)
