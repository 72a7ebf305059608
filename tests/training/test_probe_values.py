# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Values of the probes of pre-training by hand: the loss on fixed images, and who is scored."""

import json

import pytest
import torch

from data_loading.rng import mask_noise
from insight.health import describe_layers, layer_sums
from models.fcmae import random_mask, visible_patches
from tests.training.test_probes import COLORS, Bare, folder_of, made, parse
from training import probes
from training.checkpoint import TrainState
from training.probe_data import choose, open_pair

COUNT = "--probes tests.training.test_probes:count_features"


def test_loss_is_the_mean_over_the_fixed_images_without_drop_path(monkeypatch):
    """Also in chunks of other sizes, with the masks of the images' numbers, at every probe."""
    monkeypatch.setattr(probes, "CHUNK", 3)  # of 7 images
    own, model = made(f"{COLORS} --probe_every 1 --drop_path 0.9 --norm_pix_loss false")
    for parameter in model.parameters():  # at first the network predicts nearly nothing
        parameter.data.mul_(8 if parameter.ndim > 1 else 1)
    images, _, ids = own.fixed.loader.reload(0, torch.arange(7))
    visible = visible_patches(4, model.mask_ratio)
    with torch.no_grad():
        expected = model.eval()(images, random_mask(mask_noise(0, 0, ids, 4), visible), visible)[0]
    model.train()
    for epoch in (1, 2):
        found = own.measure(model, TrainState(epoch, global_step=epoch))["holdout_loss"]
        assert found == pytest.approx(expected.item(), rel=1e-5)
    assert model.training


def test_activations_are_those_of_the_first_images_in_chunks_of_any_size(monkeypatch):
    """The last chunk alone would be measured."""
    own, model = made(f"{COLORS} --probe_every 1")
    own.fixed.measured = 5  # of 7 images
    images = own.fixed.loader.reload(0, torch.arange(5))[0]
    monkeypatch.setattr(probes, "CHUNK", 3)
    with torch.no_grad():
        expected = describe_layers(layer_sums(model.eval(), images))
        found = describe_layers(own.fixed.layers(model, "none"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_no_image_is_learned_from_and_scored():
    own, model = made(f"{COLORS} {COUNT}")
    found = own.measure(model, TrainState(1, global_step=1))
    assert found["probe_count_features_train"] == own.data.train_count
    places = [set(places.tolist()) for _, places in own.data.loader.loader.dataset.sets]
    assert [len(each) for each in places] == [own.data.train_count, own.data.test_count]


def test_classes_of_the_test_images_are_found_by_their_names(tmp_path):
    """val/ without the first class had the labels of other classes."""
    folder_of(tmp_path / "train", {"ant": 2, "bee": 2, "cat": 2})
    folder_of(tmp_path / "val", {"bee": 1, "cat": 1})
    args = parse(f"{COLORS} --probe_data {tmp_path}")
    train, test = open_pair(args, args.probe_data, None)
    assert [label for _, label, _ in (train[0, n] for n in range(6))] == [0, 0, 1, 1, 2, 2]
    assert [test[0, n][1] for n in range(2)] == [1, 2]


def test_images_without_labels_are_drawn_from_all():
    """The first ones of a sorted folder are of one kind."""
    assert max(choose(Bare(), 10).tolist()) > 15


def test_gradient_norms_have_the_names_of_their_stages():
    own, model = made(f"{COLORS} --probe_every 1")
    state = TrainState(1, global_step=3, probed={"norms": [1.0, 2.0, 3.0, 4.0, 5.0]})
    found = own.measure(model, state)
    names = ["decoder", *(f"stage{number}" for number in range(1, 5))]
    assert [found[f"grad_norm_{name}"] for name in names] == [1, 2, 3, 4, 5]


def test_epoch_without_a_probe_costs_nothing():
    own, model = made(f"{COLORS} --probe_every 4 --epochs 7")
    assert own.after_epoch(model, TrainState(2), {"train_loss": 1.0}, None) == {"train_loss": 1.0}


def test_resumed_run_goes_by_its_earlier_epochs(tmp_path):
    """Its first loss would count as the first one of the run."""
    rows = [json.dumps({"epoch": epoch, "train_loss": 1.0}) for epoch in range(5)]
    (tmp_path / "log.txt").write_text("\n".join(rows) + "\n")
    own, model = made(f"{COLORS} --probe_every 4 --epochs 7")
    found = own.after_epoch(model, TrainState(6), {"train_loss": 1.0}, tmp_path)
    assert [alarm[:6] for alarm in found["alarms"]] == ["stall:"]


def test_run_that_ends_within_an_epoch_is_probed_there():
    own, _ = made(f"{COLORS} --probe_every 4 --epochs 7")
    inside = {"global_step": 9, "epoch_start": 8, "steps_per_epoch": 4, "samples_in_epoch": 6}
    assert own.is_due(TrainState(2, **inside, phase_end=6))
    assert not own.is_due(TrainState(2, **inside))  # its evaluation is still to come
