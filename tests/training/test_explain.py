# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pictures of `visualize.py explain`: colors, the class that is explained, and titles."""

from types import SimpleNamespace

import pytest
import torch

from data_loading.dataset import TransformedDataset
from data_loading.labels import Head
from data_loading.loader import DeviceLoader
from data_loading.workers import WatchedLoader
from insight.attribution import enlarge, error_map, grad_cam
from tests import tiny
from training import explain
from training.explain import describe, explain_classifier, find_target, heat_colors, overlay
from training.pictures import to_show
from training.trained_model import TrainedModel

NAMES = ("ant", "bee", "cat")


def trained(kind: str = "class", names: tuple[str, ...] | None = NAMES) -> TrainedModel:
    torch.manual_seed(0)
    network = tiny.classifier(num_classes=3, stem_stride=1, head_init_scale=100.0).eval()
    weights, head = SimpleNamespace(path="it.pth"), Head("it.pth", names, 3, kind)
    return TrainedModel(SimpleNamespace(loss="ce"), network, weights, head, names, kind, None)


def loader(count: int = 6) -> DeviceLoader:
    """Images of 16 x 16."""
    data = TransformedDataset(tiny.Colors(count), lambda image: image[:, 2:18, 2:18], 0)
    return DeviceLoader(WatchedLoader(data, [], 1), "cpu", [0.5] * 3, [0.25] * 3)


@pytest.fixture
def drawn(monkeypatch) -> SimpleNamespace:
    """What is drawn last: images and heat maps in turn, with their texts."""
    seen = SimpleNamespace()

    def draw(cells, texts, paths, columns, title):
        seen.pictures, seen.heat = torch.stack(cells[::2]), torch.stack(cells[1::2])
        seen.names, seen.texts = paths[::2], texts[1::2]
        return torch.zeros(3, 1, 1)

    monkeypatch.setattr(explain, "draw_images", draw)
    return seen


def test_large_values_are_red_and_small_ones_blue():
    """With the colors the other way round a map would show where the network does not look."""
    small, middle, large = heat_colors(torch.tensor([[[0.0, 0.5, 1.0]]]))[0, :, 0].T.tolist()
    assert (small, middle, large) == ([0, 0, 0.5], [0.5, 1, 0.5], [0.5, 0, 0])


def test_target_is_a_class_by_name_or_by_number():
    model = trained()
    assert [find_target(text, model) for text in ("cat", "1", None)] == [2, 1, None]
    assert find_target("2", trained(names=None)) == 2
    assert find_target("1", trained(names=("1", "0", "2"))) == 0  # a name comes first
    assert find_target(None, trained("number")) == 0


def test_titles_have_the_probability_of_the_explained_class():
    outputs = torch.tensor([[1.0, 3.0, 2.0]]).log()
    assert describe(outputs, trained(), None) == ["bee 0.50"]
    assert describe(outputs, trained(), 2) == ["cat 0.33"]


@pytest.mark.parametrize("target", [None, "cat"])
def test_maps_are_those_of_the_target_or_of_the_predicted_class(target, drawn, monkeypatch):
    monkeypatch.setattr(explain, "AT_ONCE", 4)
    model, images = trained(), loader()
    _, said = explain_classifier(model, images, 6, target, "")
    assert said == "Grad-CAM of stages.3.0"
    x, *_ = images.reload(0, torch.arange(6))
    wanted = model.network(x).argmax(1) if target is None else torch.full((6,), 2)
    maps, outputs = grad_cam(model.network, x, "stages.3.0", True, wanted)
    pictures = to_show(x, images.mean, images.std)
    torch.testing.assert_close(drawn.heat, overlay(pictures, enlarge(maps, (16, 16))))
    torch.testing.assert_close(drawn.pictures, pictures)
    chances = outputs.softmax(1).gather(1, wanted[:, None])[:, 0].tolist()
    pairs = zip(wanted.tolist(), chances, strict=True)
    assert drawn.texts == [f"{NAMES[label]} {chance:.2f}" for label, chance in pairs]


def test_images_are_spread_over_the_data(drawn):
    """The first ones alone may all be of one class."""
    explain_classifier(trained(), loader(9), 3, None, "")
    assert drawn.names == ["number 0", "number 3", "number 6"]


def test_error_maps_have_a_scale_each_and_the_masks_of_the_seed(drawn):
    torch.manual_seed(0)
    shape = {"patch_size": 8, "decoder_embed_dim": 8, "mask_ratio": 0.5}
    model = tiny.fcmae(in_chans=3, stem_stride=1, drop_path_rate=0.0, **shape).eval()
    images = loader(4)
    _, said = explain.explain_autoencoder(model, images, 4, seed=7, masks=3)
    assert said == "error maps over 3 masks"
    x, _, ids = images.reload(0, torch.arange(4))
    errors = error_map(model, x, ids, 7, 3)
    assert drawn.texts == [f"mean error {value:.3g}" for value in errors.mean((1, 2)).tolist()]
    patches = torch.nn.functional.avg_pool2d(errors[:, None], 8)[:, 0]
    heat = (patches / patches.amax((1, 2), keepdim=True)).repeat_interleave(8, 1)
    pictures = to_show(x, images.mean, images.std)
    torch.testing.assert_close(drawn.heat, overlay(pictures, heat.repeat_interleave(8, 2)))
