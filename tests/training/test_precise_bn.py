# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""BatchNorm statistics of training images: their numbers, and that training does not see them."""

import pytest
import torch
from torch import Tensor, nn

from data_loading.dataset import TransformedDataset
from data_loading.loader import DeviceLoader
from data_loading.samplers import TrainSampler
from data_loading.workers import WatchedLoader
from errors import UserError
from models.heads import NamedHeads
from tests.test_engines import finetune
from training.ema import ModelEma
from training.precise_bn import PreciseBn, check_norms

CPU = torch.device("cpu")
VALUES = (0.3, 0.5, 0.8, 0.2, 0.7, 0.1, 0.4, 0.9, 0.6)


def batches(batch: int, rank: int = 0, ranks: int = 1, workers: int = 0, **epoch) -> DeviceLoader:
    """A training loader of nine images of one pixel, which are normalized to (x - 0.5) / 0.25."""
    data = [(torch.full((1, 1, 1), value), 0) for value in VALUES]
    data = TransformedDataset(data, lambda image: image, seed=0, in_chans=1)
    sampler = TrainSampler(len(VALUES), 5, rank, ranks, **epoch)
    return DeviceLoader(
        WatchedLoader(data, sampler, batch, workers, drop_last=True), CPU, [0.5], [0.25]
    )


def first(number: int, epoch: int) -> Tensor:
    """The first images in the order of an epoch, normalized."""
    sampler = TrainSampler(len(VALUES), 5, 0, 1)
    sampler.set_epoch(epoch)
    chosen = [VALUES[index] for _, index in sampler]
    return (torch.tensor(chosen[:number], dtype=torch.float64) - 0.5) / 0.25


class Net(nn.Module):
    """Two BatchNorm layers with dropout between them, and a counter that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
        self.drop = nn.Dropout(0.9)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.drop(2 * self.first(images) + 1))


def test_statistics_are_those_of_all_images_with_the_variance_between_batches():
    """The mean variance within batches of two would be far too small. 5 images are 3 batches."""
    model = Net()
    PreciseBn(batches(2), 5, CPU).update(model, None, epoch=3)
    images = first(6, epoch=3)
    assert model.first.running_mean.item() == pytest.approx(images.mean().item(), abs=1e-6)
    assert model.first.running_var.item() == pytest.approx(images.var(correction=0).item(), 1e-5)
    # The second sees 2 * (+-1) + 1 of each batch of two, with no dropout: mean 1, variance 4.
    spread = [pair.var(correction=0) for pair in images.split(2)]
    expected = torch.stack([4 * var / (var + 1e-5) for var in spread]).mean().item()
    assert model.second.running_mean.item() == pytest.approx(1, abs=1e-6)
    assert model.second.running_var.item() == pytest.approx(expected, 1e-5)
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.calls == 0
    assert model.first.num_batches_tracked == 0
    assert not model.first._forward_pre_hooks


@pytest.mark.parametrize(("samples", "used"), [(None, 8), (5, 4)])
def test_more_images_than_an_epoch_has_are_an_epoch(samples, used):
    model = Net()
    PreciseBn(batches(2, samples=samples), 1000, CPU).update(model, None, epoch=0)
    assert model.first.running_mean.item() == pytest.approx(first(used, 0).mean().item(), abs=1e-6)


def test_frozen_layers_keep_their_statistics():
    model = Net()
    model.second.eval()
    PreciseBn(batches(2), 8, CPU).update(model, None, epoch=0)
    assert model.first.running_mean.item() != 0
    assert (model.second.running_mean.item(), model.second.running_var.item()) == (0, 1)
    assert not model.second.training


def test_all_heads_are_measured_and_a_layer_that_is_not_called_keeps_its_statistics():
    """Evaluation calls the first head alone: those of the others would become 0/0."""
    model = Net()
    heads = {"main": nn.Flatten(), "aux": nn.BatchNorm2d(1)}
    model.named_heads = NamedHeads(heads, {"main": "second", "aux": "first"}, set())
    model.named_heads.attach(model)
    model.spare = nn.BatchNorm2d(1)
    ema = ModelEma(model, 0.9, CPU)
    nn.init.constant_(model.first.bias, 7.0)
    nn.init.constant_(model.spare.running_mean, 3.0)
    PreciseBn(batches(2), 8, CPU).update(model, ema, epoch=0)
    assert model.named_heads["aux"].running_mean.item() == pytest.approx(7, abs=1e-5)
    assert 0 < model.named_heads["aux"].running_var.item() < 1
    assert ema.module.named_heads["aux"].running_mean.item() == pytest.approx(0, abs=1e-5)
    assert (model.spare.running_mean.item(), model.spare.running_var.item()) == (3, 1)
    assert model.named_heads.training
    assert not ema.module.named_heads.training


def test_ema_gets_the_statistics_of_its_own_weights():
    model = Net()
    ema = ModelEma(model, 0.9, CPU)
    with torch.no_grad():
        model.first.bias.fill_(7.0)  # the second layer sees 2 * 7 more
    PreciseBn(batches(2), 8, CPU).update(model, ema, epoch=0)
    assert model.second.running_mean.item() == pytest.approx(15, abs=1e-5)
    assert ema.module.second.running_mean.item() == pytest.approx(1, abs=1e-6)
    assert not ema.module.first.training


def test_statistics_are_restored_if_a_batch_fails():
    model, loader = Net(), batches(2)
    loader.normalize = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        PreciseBn(loader, 8, CPU).update(model, None, epoch=0)
    assert (model.first.running_mean.item(), model.first.running_var.item()) == (0, 1)
    assert all(module.training for module in model.modules())
    assert not model.first._forward_pre_hooks


def test_network_without_batch_norm_is_refused_by_name():
    with pytest.raises(UserError, match="--precise_bn: Linear has no BatchNorm"):
        check_norms(nn.Linear(2, 2))
    with pytest.raises(UserError, match="Sequential has no BatchNorm with running statistics"):
        check_norms(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)))


def test_training_does_not_see_the_statistics_and_the_checkpoint_has_them(tmp_path):
    words = "--model tests.test_engines:normed --epochs 1 --eval_freq 0.5 --model_ema"
    for name, more in (("without", ""), ("with", "--precise_bn 12")):
        finetune(f"{words} {more} --output_dir {tmp_path / name}")
    one, other = (
        torch.load(tmp_path / name / "checkpoint-0.pth", weights_only=True)
        for name in ("without", "with")
    )
    for key in ("model", "model_ema"):
        for name, value in one[key].items():
            assert torch.equal(value, other[key][name]) == ("running" not in name), name
