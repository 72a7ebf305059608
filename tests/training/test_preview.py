# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pictures of training images show what a training script's loop gets, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import engine_pretrain
import main_finetune
import main_pretrain
import visualize
from config import views
from config.parser import parse
from data_loading.mixing import Mixing
from errors import UserError
from training import preview
from training.pictures import GRAY, as_rgb, scale_to_show, to_show

COMMON = "--data_set tests.tiny:colors --data_path x --input_size 16 --stem_stride 1 --seed 3 "
COMMON += "--num_workers 0 --device cpu"
TRAIN = "--epochs 2 --lr 0.001 --log_dir none --output_dir none --batch_size 8"


def recorded_batches(main, engine, name, words, monkeypatch) -> list:
    """Run a training script; returns the arguments of each call of a function of its engine."""
    calls, real = [], getattr(engine, name)

    def record(*args):
        calls.append([x.clone() if isinstance(x, torch.Tensor) else x for x in args])
        return real(*args)

    monkeypatch.setattr(engine, name, record)
    main.main(parse(main.get_args_parser(), words.split()))
    return calls


def test_pretraining_masks_and_crops_are_those_of_the_run(monkeypatch):
    words = f"{COMMON} {TRAIN} --model tests.tiny:fcmae --decoder_embed_dim 8"
    calls = recorded_batches(main_pretrain, engine_pretrain, "masked_loss", words, monkeypatch)
    real = {}
    for _, _, images, ids, seed, epoch in calls:
        noise = engine_pretrain.mask_noise(seed, epoch, ids, 4)
        mask = engine_pretrain.random_mask(noise, 1).view(-1, 2, 2)
        for index, image, hidden in zip(ids.tolist(), images, mask, strict=True):
            real[epoch, index] = image, hidden.repeat_interleave(8, 0).repeat_interleave(8, 1) > 0
    args = views.parse_data(f"{COMMON} --model tests.tiny:fcmae --num_images 26".split())
    shown = preview.build_preview(args, 26, 2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in datasets.build_mean_and_std(args))
    compared = 0
    for index, row in enumerate(shown.images):
        for epoch, image in enumerate(row):
            if (epoch, index) in real:  # others are in no full batch
                pixels, hidden = real[epoch, index]
                expected = torch.where(hidden, GRAY, (pixels * std + mean).clamp(0, 1))
                torch.testing.assert_close(image, expected)
                compared += 1
    assert compared == 2 * 24
    assert shown.names[7] == "image number 7"
    assert "--mask_ratio 0.6" in shown.caption


def test_mixed_images_and_labels_are_those_of_the_run(monkeypatch):
    mixing = "--model tests.tiny:classifier --mixup 0.8 --cutmix 1 --batch_size 4 --update_freq 2"
    words = f"{COMMON} {TRAIN} {mixing} --disable_eval"
    seen = []
    real = Mixing.__call__

    def record(self, *inputs):
        mixed = real(self, *inputs)
        seen.append([x.clone() for x in mixed])
        return mixed

    monkeypatch.setattr(Mixing, "__call__", record)
    main_finetune.main(parse(main_finetune.get_args_parser(), words.split()))
    training, seen[:] = list(seen), []
    args = views.parse_data(f"{COMMON} {mixing}".split())
    shown = preview.build_preview(args, 3, 2)
    mean, std = datasets.build_mean_and_std(args)
    known = {}
    for images, labels in training:
        for image, label in zip(to_show(images, mean, std), labels, strict=True):
            known[image.numpy().tobytes()] = label
    cells = [image for row in shown.images for image in row if image is not None]
    assert len(cells) >= 5
    assert all(image.numpy().tobytes() in known for image in cells)
    label = known[shown.images[0][0].numpy().tobytes()]
    share = ((label.max() - 0.1 / 3) / 0.9).item()
    assert f"{share:.2f}" in shown.texts[0][0]


def test_labels_without_mixing_are_class_names():
    args = views.parse_data(
        f"{COMMON} --script finetune --aa none --model tests.tiny:classifier".split()
    )
    shown = preview.build_preview(args, 26, 1)
    assert [text for (text,) in shown.texts[:4]] == ["red", "green", "blue", "red"]


@pytest.mark.parametrize("channels", [1, 3, 4, 12])
def test_any_number_of_channels_is_drawn(channels, tmp_path):
    random = np.random.default_rng(0)
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", random.random((channels, 20, 24), np.float32))
    words = f"--data_path {tmp_path} --in_chans {channels} --input_size 16 24 --stem_stride 1"
    words += f" --output {tmp_path}/out/a.png --num_images 2 --num_epochs 3"
    visualize.draw_data(views.parse_data(words.split()))
    picture = Image.open(tmp_path / "out/a.png")
    assert picture.width > 3 * 128
    assert len(picture.getcolors(maxcolors=10**6)) > 100


def test_other_channels_are_shown_around_their_mean():
    """Reflectances of 0.02 were nearly black."""
    assert scale_to_show([0.02] * 4, [0.01] * 4) == ([0.5] * 4, [0.25] * 4)
    assert scale_to_show([0.4], [0.2]) == ([0.4], [0.2])
    images = torch.rand(2, 5, 4, 4)
    assert torch.equal(as_rgb(images), images[:, :3])
    assert torch.equal(as_rgb(images[:, :2])[:, 1], images[:, :2].mean(1))


def test_picture_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    words = f"{COMMON} --model tests.tiny:fcmae --output {tmp_path}/file/a.png"
    with pytest.raises(UserError, match="--output .*: "):
        visualize.draw_data(views.parse_data(words.split()))


def test_numbers_are_those_of_the_data(tmp_path):
    """They are normalized for training, and 0 came back as 1.034e-06."""
    for number in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{number * 10},{number / 7}" for number in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["image,x,y", *rows]))
    words = f"--data_path {tmp_path}/t.csv --task regression --label_column x y --input_size 32"
    shown = preview.build_preview(views.parse_data(words.split()), 4, 1)
    assert [text for (text,) in shown.texts] == ["0, 0", "10, 0.1429", "20, 0.2857", "30, 0.4286"]
    assert shown.names[2].endswith("/2.png")


def test_sizes_that_change_with_the_epoch_are_drawn(tmp_path):
    words = f"{COMMON} --model tests.tiny:fcmae --num_epochs 3 --num_images 2 --epochs 4"
    words = words.replace("--input_size 16", "--input_size 16:0,24:1,32:2")
    shown = preview.build_preview(views.parse_data(words.split()), 2, 3)
    assert [image.shape[1:] for image in shown.images[0]] == [(16, 16), (24, 24), (32, 32)]
    assert preview.draw_preview(shown).width > 3 * 128
