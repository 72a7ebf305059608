# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Reconstruction images: the columns by hand, their layout, when a run draws them."""

import re

import pytest
import torch

from config import parser as options
from data_loading import builtin
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from training import pictures
from training.checkpoint import TrainState
from training.pictures import GRAY, ReconstructionImages, grid, reconstruct

CPU = torch.device("cpu")


def toy(in_chans: int = 3, norm_pix_loss: bool = True) -> FCMAE:
    """A toy FCMAE of stride 8 whose prediction is not 0."""
    torch.manual_seed(0)
    encoder = ConvNeXtV2((1, 1, 1, 1), (4, 6, 8, 10), in_chans, stem_stride=1)
    model = FCMAE(encoder, decoder_embed_dim=12, norm_pix_loss=norm_pix_loss)
    torch.nn.init.normal_(model.pred.weight)
    return model.train()


@pytest.mark.parametrize(
    ("in_chans", "size"), [(3, (16, 16)), (3, (8, 24)), (1, (24, 16)), (1, (8, 16))]
)
def test_each_column_is_gray_where_it_shows_nothing(in_chans, size):
    model = toy(in_chans)
    mean, std = [0.4, 0.5, 0.6][:in_chans], [0.1, 0.2, 0.3][:in_chans]
    truth = torch.rand(2, in_chans, *size)
    scale = torch.tensor([mean, std])[:, None, :, None, None]  # (2, 1, C, 1, 1)
    images = (truth - scale[0]) / scale[1]
    mask = torch.zeros(2, size[0] * size[1] // 64)
    mask[0, 1], mask[1, 0] = 1, 1
    hidden = torch.zeros(2, in_chans, *size, dtype=torch.bool)
    hidden[0, :, :8, 8:16] = hidden[1, :, :8, :8] = True  # patch 1 and patch 0 of a row
    views = reconstruct(model, images, mask, mean, std)[0]
    assert views.shape == (2, 5, in_chans, *size)
    whole, masked, baseline, reconstruction, pasted = views.unbind(1)
    assert torch.allclose(whole, truth, atol=1e-6)
    assert torch.equal(masked, torch.where(hidden, GRAY, whole))
    assert (reconstruction[~hidden] == GRAY).all()
    assert (baseline[~hidden] == GRAY).all()
    assert torch.equal(pasted, torch.where(hidden, reconstruction, whole))
    assert not torch.allclose(reconstruction[hidden], whole[hidden], atol=0.05)
    assert model.training  # as before


def test_prediction_gets_mean_and_deviation_of_its_patch_back():
    """A prediction of 0 is the mean of each patch; of 1, its mean and one deviation."""
    model = toy(in_chans=1)
    images = torch.zeros(1, 1, 8, 16)
    images[..., :4, 8:] = 1.0  # half of the right patch: mean 0.5, variance 16 / 63
    for prediction in (0.0, 1.0):
        with torch.no_grad():
            model.pred.weight.zero_()
            model.pred.bias.fill_(prediction)
        shown = [
            reconstruct(model, images, torch.tensor([mask]), [0.25], [0.5])[0][0, 3, 0]
            for mask in ([1.0, 0.0], [0.0, 1.0])
        ]
        right = 0.5 + prediction * (16 / 63) ** 0.5
        assert torch.allclose(shown[0][:, :8], torch.tensor(0.25 + 0.5 * prediction * 1e-3))
        assert torch.allclose(shown[1][:, 8:], torch.tensor(0.25 + 0.5 * right))


def test_prediction_of_plain_pixels_is_only_denormalized():
    model = toy(in_chans=3, norm_pix_loss=False)
    with torch.no_grad():
        model.pred.weight.zero_()
        model.pred.bias.view(8, 8, 3)[:] = torch.tensor([1.0, -1.0, 9.0])  # channels innermost
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.125, 0.25]
    shown = reconstruct(model, torch.randn(1, 3, 16, 16), mask, mean, std)[0][0, 3, :, :8, :8]
    assert shown.mean((1, 2)).tolist() == pytest.approx([0.75, 0.375, 1.0])  # the last is clipped


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_baseline_is_the_mean_of_each_hidden_patch(norm_pix_loss):
    """A network that predicts the mean looks no better, and has the same loss."""
    model = toy(in_chans=1, norm_pix_loss=norm_pix_loss)
    images = torch.zeros(1, 1, 8, 16)
    images[..., :4, 8:] = (
        1.0  # half of the right patch, hidden: mean 0.5, unbiased variance 16 / 63
    )
    with torch.no_grad():
        model.pred.weight.zero_()
        model.pred.bias.fill_(0.0 if norm_pix_loss else 0.5)
    views, loss, baseline = reconstruct(model, images, torch.tensor([[0.0, 1.0]]), [0.25], [0.5])
    assert views[0, 2, 0, :, 8:].flatten().tolist() == pytest.approx([0.25 + 0.5 * 0.5] * 64)
    assert torch.allclose(views[0, 2], views[0, 3], atol=1e-6)
    expected = 63 / 64 if norm_pix_loss else 0.25  # of the mean, in units of the variance or not
    assert (loss, baseline) == (pytest.approx(expected, rel=1e-4),) * 2


def test_caption_has_the_epoch_and_both_losses(monkeypatch):
    """An untrained network's picture looks trained, since mean and contrast come from the input."""
    captions = []
    monkeypatch.setattr(pictures, "grid", lambda views, caption: captions.append(caption))
    args = options.parse(options.pretrain_parser(), [*WORDS, "--picture_freq", "1"])
    model, data = toy(), builtin.Digits(train=False)
    for name in ("", "photos/checkpoint-1.pth"):
        ReconstructionImages(args, data, CPU, name=name).draw(model, TrainState(2))
    for caption, name in zip(captions, ("epoch 2", "photos/checkpoint-1.pth"), strict=True):
        losses = re.fullmatch(
            rf"{name}\nmasked loss ([\d.]+); of the baseline, each hidden patch's own mean: "
            r"([\d.]+)",
            caption,
        )
        assert float(losses[1]) > float(losses[2])
        assert float(losses[2]) == pytest.approx(191 / 192, abs=0.01)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 5, 3, 128, 128), (3, 3 * 16 + 2 * (128 + 8) + 8, 5 * (128 + 8) + 8)),
        ((2, 5, 1, 32, 64), (3, 3 * 16 + 2 * (64 + 8) + 8, 5 * (128 + 8) + 8)),  # enlarged
        ((1, 5, 3, 224, 160), (3, 3 * 20 + 224 + 2 * 10, 5 * (160 + 10) + 10)),
    ],
)
def test_grid_has_titles_above_a_row_for_each_image(shape, expected):
    views = torch.full(shape, 0.75)
    views[-1, 4] = 0.25
    drawn = grid(views)
    assert drawn.shape == expected
    assert drawn[:, -1, -1].tolist() == [1, 1, 1]  # the gap
    assert drawn[:, -20, -20].tolist() == [0.25] * 3  # last row, last column
    rows = shape[0] * (shape[3] * (2 if shape[4] == 64 else 1))
    titles = drawn[0, : expected[1] - rows - 20]
    columns = titles.chunk(5, dim=1)
    dark = [(column < 0.5).nonzero()[:, 1].double() for column in columns]
    assert all(len(pixels) > 50 for pixels in dark)  # a title above each column
    for pixels, column in zip(dark, columns, strict=True):  # centered
        middle = (pixels.min() + pixels.max()).item() / 2
        assert middle == pytest.approx(column.shape[1] / 2, abs=8)
        assert pixels.max() - pixels.min() < column.shape[1] - 10  # and narrower than it
    longest = pictures.CAPTION.format(
        "pretrain-convnextv2_atto-20261129-1530/checkpoint-99.pth", 1, 1
    )
    captioned = grid(views, longest)
    assert torch.equal(captioned[:, : expected[1]], drawn)
    below = captioned[0, expected[1] :] < 0.5
    assert below.any(1).sum() > 5
    assert below.nonzero()[:, 1].max() < expected[2] - 5  # it fits


WORDS = ["--data_set", "DIGITS", "--input_size", "16", "--stem_stride", "1", "--seed", "3"]


def test_images_and_masks_do_not_depend_on_how_many_are_drawn():
    args = options.parse(options.pretrain_parser(), WORDS)
    data, model = builtin.Digits(train=False), toy()
    four, two = (ReconstructionImages(args, data, CPU, count=count) for count in (4, 2))
    assert four.images is None  # read within the training loop, where signals are handled
    four.read(model)
    two.read(model)
    assert four.images.shape == (4, 3, 16, 16)
    assert four.mask.sum(1).tolist() == [3] * 4  # floor(4 * 0.4) = 1 of 4 stays visible
    assert torch.equal(four.images[[0, 2]], two.images)  # sample 0 and the one in the middle
    assert torch.equal(four.mask[[0, 2]], two.mask)


def test_images_are_normalized_by_the_mean_and_std_of_the_run():
    args = options.parse(options.pretrain_parser(), [*WORDS, "--mean", "0.25", "--std", "0.5"])
    drawing = ReconstructionImages(args, builtin.Digits(train=False), CPU, count=1)
    drawing.read(toy())
    assert (drawing.mean, drawing.std) == ([0.25] * 3, [0.5] * 3)
    assert drawing.images.min() == -0.5  # black


@pytest.mark.parametrize(("freq", "drawn"), [(2, [2, 4, 5]), (10, [5]), (0, [])])
def test_run_draws_every_so_many_epochs_and_after_the_last(freq, drawn):
    words = [*WORDS, "--picture_freq", str(freq), "--epochs", "5"]
    args = options.parse(options.pretrain_parser(), words)
    model = toy()
    images = ReconstructionImages(args, builtin.Digits(train=False), CPU)
    found = {epoch: images.draw(model, TrainState(epoch)) for epoch in range(6)}
    assert images.draw(model, TrainState(2, samples_in_epoch=6)) is None  # resumed in an epoch
    assert [epoch for epoch, image in found.items() if image is not None] == drawn
    assert all(found[epoch].shape == found[5].shape for epoch in drawn)
