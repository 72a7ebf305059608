# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Data sets, transforms, samplers and loaders."""

import colorsys
import logging
import pickle
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import datasets
from data_loading import builtin
from data_loading.augment import Augmentation
from data_loading.dataset import TransformedDataset, collate
from data_loading.decode import BadImage, decode
from data_loading.erasing import RandomErasing
from data_loading.labels import Head
from data_loading.loader import DeviceLoader
from data_loading.mixing import build_mixup
from data_loading.rng import seed_all
from data_loading.samplers import EvalSampler, TrainSampler
from data_loading.transforms import (
    RandomResizedCrop,
    create_eval_transform,
    create_pretrain_transform,
    create_train_transform,
    mean_and_std,
)
from data_loading.workers import WatchedLoader
from errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def make_args(**changes):
    flags = {
        "data_set": "DIGITS", "data_path": "", "eval_data_path": None, "nb_classes": None,
        "input_size": (16, 16), "in_chans": 3, "color_jitter": None, "aa": "rand-m9-mstd0.5-inc1",
        "train_interpolation": "bicubic", "reprob": 0.25, "remode": "pixel", "recount": 1,
        "disable_eval": False, "crop_pct": None, "hflip": 0.5, "scale": (0.08, 1.0), "seed": 0,
        "batch_size": 4,
        "num_workers": 0, "pin_mem": True, "dist_eval": True, "imagenet_default_mean_and_std": True,
        "on_bad_image": "error", "decode": "exact", "data_timeout": None, "data_index": "",
        "val_split": 0.0, "task": "auto", "sampling": "shuffle", "normalize_targets": True,
        "image_column": None, "label_column": None, "split_column": None, "weight_column": None,
        "image_root": "", "num_samples": None, "aug_repeats": 1, "label_fraction": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**(flags | changes))


def picture(height=20, width=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def unnamed(data_path, train):
    return [(picture(), 0)]


def make_folders(root, classes, images=2):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            picture(seed=10 * number + i).save(root / name / f"{i}.png")
    return root


class Listed(Dataset):
    def __init__(self, samples):
        self.items = samples

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


# --- data sets ------------------------------------------------------------------------------


def test_digits_split_leaks_no_image_and_no_class():
    train, val = builtin.Digits(True), builtin.Digits(False)
    assert (len(train), len(val)) == (1442, 355)
    assert np.bincount(val.targets).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert train.images.max() == 255
    first_val = np.load(ROOT / "assets" / "digits.npz", allow_pickle=False)
    fifth_zero = first_val["images"][first_val["labels"] == 0][4]
    assert (val.images[val.targets.index(0)] == fifth_zero.astype(int) * 255 // 16).all()


def test_imnet_counts_classes_on_disk_not_1000(tmp_path):
    make_folders(tmp_path / "train", "abc")
    make_folders(tmp_path / "val", "abc")
    train, val, nb_classes = datasets.build_datasets(
        make_args(data_set="IMNET", data_path=tmp_path)
    )
    assert (nb_classes, len(train), len(val)) == (3, 6, 6)
    with pytest.raises(UserError, match=r"--nb_classes 1000.* 3 classes"):
        datasets.build_dataset(
            True, make_args(data_set="IMNET", data_path=tmp_path, nb_classes=1000)
        )


def test_val_builds_without_train_data_for_eval(tmp_path):
    make_folders(tmp_path / "val", "ab")
    _, nb_classes = datasets.build_dataset(False, make_args(data_set="IMNET", data_path=tmp_path))
    assert nb_classes == 2


def test_missing_val_class_cannot_shift_labels(tmp_path, caplog):
    make_folders(tmp_path / "train", ["ant", "bee", "cat"])
    make_folders(tmp_path / "val", ["ant", "cat"])
    args = make_args(data_set="IMNET", data_path=tmp_path)
    with caplog.at_level(logging.INFO):
        train, val, nb_classes = datasets.build_datasets(args)
    assert (train.classes, val.classes, nb_classes) == (["ant", "bee", "cat"],) * 2 + (3,)
    assert sorted({val[0, i][1] for i in range(len(val))}) == [0, 2]
    assert "val has no images of 1 of the 3 classes: bee" in caplog.text
    make_folders(tmp_path / "val", ["dog"])
    with pytest.raises(UserError, match="does not know: dog; val lacks classes of train: bee"):
        datasets.build_datasets(args)


def test_labels_are_positions_in_the_head_of_the_weights(tmp_path):
    """With labels in the order of the folders, a renamed folder gave 0% instead of 100%."""
    for split in ("train", "val"):
        make_folders(tmp_path / split, ["ant", "bee", "cat"])
    args = make_args(data_set="IMNET", data_path=tmp_path)
    head = Head("it.pth", ["cat", "ant", "bee"], 3)
    for resumes in (True, False):
        train, val, _ = datasets.build_datasets(args, head, resumes)
        assert train.classes == val.classes == head.names
        for data in (train, val):  # two images of each class
            assert [data[0, i][1] for i in range(6)] == [1, 1, 2, 2, 0, 0]
    val, nb_classes = datasets.build_dataset(False, args, Head("it.pth", [*"abcd", *head.names], 7))
    assert ([val[0, i][1] for i in (0, 2, 4)], nb_classes) == ([5, 6, 4], 7)


def test_head_without_names_is_kept_by_number_in_training_and_evaluation(tmp_path):
    """ImageNet's head on folders 0 to 999 was sorted as text in training only."""
    names = [str(i) for i in range(12)]
    for split in ("train", "val"):
        make_folders(tmp_path / split, names)
    args = make_args(data_set="IMNET", data_path=tmp_path)
    train, val, _ = datasets.build_datasets(args, Head("it.pth", None, 12))
    only_val, _ = datasets.build_dataset(False, args, Head("it.pth", None, 12))
    assert train.classes == val.classes == names
    for data in (train, val, only_val):
        names_of = [data.dataset.names[2 * i].split("/")[0] for i in range(12)]
        assert [data[0, 2 * i][1] for i in range(12)] == [*map(int, names_of)]
    old, _, _ = datasets.build_datasets(args, Head("it.pth", None, 12), resumes=True)
    assert old.classes == sorted(names)  # a run of an earlier version keeps its order


def test_number_of_classes_without_names_is_that_of_the_run():
    args = make_args(data_set="tests.test_datasets:unnamed")
    head = Head("it.pth", None, 3)
    train, _, nb_classes = datasets.build_datasets(args, head, resumes=True)
    assert nb_classes == train.nb_classes == 3
    args.nb_classes = 4
    with pytest.raises(UserError, match=r"--nb_classes 4, but it.pth has 3 classes"):
        datasets.build_datasets(args, head, resumes=True)
    assert datasets.build_datasets(args, head)[2] == 4  # a new run needs a new head


def test_other_classes_need_a_new_head_and_cannot_resume(tmp_path):
    for split in ("train", "val"):
        make_folders(tmp_path / split, ["ant", "bee", "zebra"])
    args = make_args(data_set="IMNET", data_path=tmp_path)
    head = Head("it.pth", ["cat", "ant", "bee"], 3)
    train, val, _ = datasets.build_datasets(args, head)
    assert train.classes == val.classes == ["ant", "bee", "zebra"]
    with pytest.raises(UserError, match="does not know: zebra; train lacks classes of it.pth: cat"):
        datasets.build_datasets(args, head, resumes=True)


def test_synthetic_and_folder_need_no_surprise_classes(tmp_path):
    args = make_args(data_set="SYNTHETIC", nb_classes=4)
    train, val, nb_classes = datasets.build_datasets(args)
    assert (len(train), len(val), nb_classes) == (1024, 256, 4)
    with pytest.raises(UserError, match="has no labels"):
        datasets.build_dataset(True, make_args(data_set="folder", data_path=tmp_path))


def test_synthetic_label_survives_crops_flips_and_rotations():
    crop = create_pretrain_transform(24, Augmentation(scale=(0.08, 1.0)))
    colors = [colorsys.hsv_to_rgb(k / 10, 1, 1) for k in range(10)]
    colors = torch.tensor(colors) - torch.tensor(colors).mean(1, keepdim=True)
    val = builtin.Synthetic((24, 40), 10, train=False)
    val = TransformedDataset(val, crop, seed=0, nb_classes=10)
    right = 0
    for i in range(200):
        image, label, _ = val[0, i]
        mean = torch.rot90(image, i % 4, (1, 2)).float().mean((1, 2))
        right += int(torch.cosine_similarity(colors, (mean - mean.mean())[None]).argmax()) == label
    assert right >= 190


def test_synthetic_differs_between_splits_but_not_between_reads():
    train, val = (builtin.Synthetic((8, 12), 10, flag) for flag in (True, False))
    assert train[3][0].size == (12, 8)
    assert train[3][0].tobytes() == train[3][0].tobytes()
    assert train[3][0].tobytes() != val[3][0].tobytes()


def test_unlabeled_folder_finds_nested_images_in_order(tmp_path):
    make_folders(tmp_path, ["b", "a/deep"])
    picture().save(tmp_path / "c.JPEG")
    (tmp_path / "notes.txt").write_text("no image")
    args = make_args(data_set="folder", data_path=str(tmp_path), scale=(0.2, 1.0))
    data = datasets.build_pretrain_dataset(args)
    names = [path.removeprefix(f"{tmp_path}/") for path, _ in data.dataset.samples]
    assert names == ["a/deep/0.png", "a/deep/1.png", "b/0.png", "b/1.png", "c.JPEG"]
    image, label, index = data[0, 4]
    assert (image.dtype, tuple(image.shape), label, index) == (torch.uint8, (3, 16, 16), 0, 4)


def test_data_set_from_a_module_needs_no_edit(monkeypatch):
    module = types.ModuleType("my_sets")
    samples = [(torch.full((5, 9, 9), k, dtype=torch.uint8), k) for k in range(3)]
    module.five = lambda data_path, train: Listed(samples)
    monkeypatch.setitem(sys.modules, "my_sets", module)
    args = make_args(data_set="my_sets:five", in_chans=5, aa="none", reprob=1.0)
    with pytest.raises(UserError, match="--nb_classes"):
        datasets.build_dataset(True, args)
    data, nb_classes = datasets.build_dataset(
        True, SimpleNamespace(**vars(args) | {"nb_classes": 3})
    )
    assert nb_classes == 3
    assert data[0, 1][0].shape == (5, 16, 16)
    two, _ = datasets.build_dataset(True, SimpleNamespace(**vars(args) | {"nb_classes": 2}))
    assert "label 2; expected 0 to 1" in str(two[0, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_set": "IMNET"}, "--data_path is not given"),
        ({"data_set": "IMNET", "data_path": "/nowhere"}, "no such file or folder"),
        ({"data_set": "IMNET", "data_path": ROOT / "assets"}, "image_folder.*--data_set folder"),
        (
            {"data_set": "image_folder", "data_path": ROOT / "assets"},
            "one folder of images per class",
        ),
        ({"data_set": "DIGIT"}, "Did you mean 'DIGITS'"),
        ({"aa": "foo"}, "--aa foo"),
        ({"color_jitter": 0.4}, "no effect with --aa"),
        ({"nb_classes": 3}, "--nb_classes 3, but the train data has 10 classes"),
        (
            {"data_set": "tests.test_datasets:unnamed"},
            "--data_set tests.test_datasets:unnamed has no class names",
        ),
    ],
)
def test_bad_input_is_one_line_that_helps(changes, message):
    with pytest.raises(UserError, match=message) as error:
        datasets.build_dataset(True, make_args(**changes))
    assert "\n" not in str(error.value)


def test_empty_folders_are_user_errors(tmp_path):
    make_folders(tmp_path / "sets", "ab")
    (tmp_path / "sets" / "hollow").mkdir()
    (tmp_path / "void").mkdir()
    for data_set in ("image_folder", "folder", "auto"):
        args = make_args(data_set=data_set, data_path=tmp_path / "void")
        with pytest.raises(UserError, match="void: no images"):
            datasets.build_pretrain_dataset(args)
    args = make_args(data_set="image_folder", data_path=tmp_path / "sets")
    assert len(datasets.build_pretrain_dataset(args)) == 4  # which uses no classes
    with pytest.raises(UserError, match="hollow"):
        datasets.build_dataset(True, args)
    with pytest.raises(UserError, match="--eval_data_path is not given"):
        datasets.build_dataset(False, args)


def test_failed_download_says_where_files_belong(tmp_path, monkeypatch):
    def offline(*words):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    for name, folder in [("CIFAR", "cifar-100-python"), ("CIFAR10", "cifar-10-batches-py")]:
        text = rf"cannot read {tmp_path}/{folder} or download .*no network.*; place .* {tmp_path}"
        with pytest.raises(UserError, match=text):
            datasets.build_dataset(True, make_args(data_set=name, data_path=str(tmp_path)))


def test_start_line_tells_images_classes_size_and_what_is_left_out(tmp_path, log):
    """Of 100 photos of a phone and 4 others a run used 4, without a word."""
    make_folders(tmp_path / "train", ["ant", "bee"])
    make_folders(tmp_path / "val", ["ant", "bee"], images=1)
    for number in range(100):
        (tmp_path / "train" / "ant" / f"{number}.jp2").write_bytes(b"")
    args = make_args(data_set="IMNET", data_path=tmp_path, input_size=(16, 24))
    datasets.build_datasets(args)
    train, val = (f"the class folders of {tmp_path}/{part}" for part in ("train", "val"))
    size, left_out = "used at 16 x 24 pixels", "left out 100 files: 100 .jp2"
    assert log.messages == [
        f"train: 4 images of 2 classes (ant, bee) from {train}, {size}; {left_out}",
        f"val: 2 images of 2 classes (ant, bee) from {val}, {size}",
    ]
    log.clear()
    datasets.build_pretrain_dataset(args)
    source = f"the images in {tmp_path}/train"
    assert log.messages == [f"train: 4 images from {source}, {size}; {left_out}"]
    log.clear()
    datasets.build_dataset(True, make_args(nb_classes=1, data_set="tests.test_datasets:unnamed"))
    assert log.messages[0] == "train: 1 image of 1 class, used at 16 x 16 pixels"


def test_folder_of_another_level_is_a_warning(tmp_path, log):
    """One class: loss 0 and 100% from the first epoch on."""
    make_folders(tmp_path / "train" / "photos", "ab")
    flags = {"data_path": tmp_path, "disable_eval": True}
    datasets.build_datasets(make_args(data_set="IMNET", **flags))
    (warning,) = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert warning == (
        "train: all images are of one class, 'photos', so there is nothing to learn; give the "
        "folder that directly holds one folder of images per class"
    )
    make_folders(tmp_path / "val" / "photos", "a")
    log.clear()
    datasets.build_datasets(make_args(data_set="image_folder", **flags))
    assert "train: the classes are called train, val, like parts of a data set" in log.messages[1]
    log.clear()
    datasets.build_pretrain_dataset(make_args(data_set="IMNET", **flags))  # without labels
    assert [record.levelname for record in log.records] == ["INFO"]


# --- decoding and transforms ----------------------------------------------------------------


def test_every_pil_mode_decodes_to_rgb_and_gray():
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"):
        image = picture().convert("RGB").convert(mode) if mode != "LA" else picture().convert("LA")
        for channels in (1, 3):
            assert decode(image, channels).shape == (channels, 20, 30)
    red = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert decode(red, 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_sixteen_bit_image_is_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    assert decode(deep, 1).tolist() == [[[0, 1, 128, 255]]]


def test_channel_counts_are_checked_not_guessed():
    with pytest.raises(UserError, match="--in_chans 4"):
        decode(picture(), 4)
    with pytest.raises(UserError, match=r"--in_chans 4, got torch.uint8 tensor \(5, 2, 2\)"):
        decode(torch.zeros(5, 2, 2, dtype=torch.uint8), 4)
    with pytest.raises(UserError, match="uint8 or float"):
        decode(torch.zeros(3, 2, 2, dtype=torch.int32), 3)


@pytest.mark.parametrize("size", [(8, 8), (24, 32), (48, 40)])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "3a", "none", ""])
def test_train_transform_yields_uint8_of_the_size(size, in_chans, aa):
    jitter = 0.4 if aa in ("3a", "none", "") else None
    args = make_args(input_size=size, in_chans=in_chans, aa=aa, color_jitter=jitter, reprob=0.9)
    data, _ = datasets.build_dataset(True, args)
    pickle.loads(pickle.dumps(data.transform))  # workers may be spawned
    for index in range(30):
        image, label, number = data[0, index]
        assert image.dtype == torch.uint8
        assert image.shape == (in_chans, *size)
        assert (type(label), number) == (int, index)


@pytest.mark.parametrize(
    "aa", ["rand-m10-n5-p1.0-inc1", "rand-m10-n5-p1.0", "original", "augmix-m10"]
)
def test_strongest_augmentation_does_not_crash_in_pillow(aa):
    transform = create_train_transform(8, Augmentation(aa=aa))
    data = TransformedDataset(Listed([(picture(8, 8), 0)]), transform, 0)
    for epoch in range(60):  # Pillow 13 refuses the posterize that timm's magnitude 10 asks for
        assert data[epoch, 0][0].shape == (3, 8, 8)


def test_scale_acts_at_small_sizes_too():
    shift = create_train_transform(32, Augmentation(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)))
    assert "RandomShift(" in str(shift)
    for options in ({"scale": (0.5, 1.0)}, {"ratio": (1.0, 1.0)}):
        crop = create_train_transform(32, Augmentation(**options)).transforms[0]
        assert isinstance(crop, RandomResizedCrop)
        assert vars(crop).items() >= options.items()


def test_pretraining_crops_small_images_too(tmp_path):
    """The shift of the official code is that of its fine-tuning."""
    make_folders(tmp_path, ["a"])
    args = make_args(data_path=str(tmp_path), data_set="folder", input_size=32, aa=None, reprob=0)
    assert args.scale == (0.08, 1.0)
    transform = datasets.build_pretrain_dataset(args).transform
    assert isinstance(transform.transforms[0], RandomResizedCrop)
    assert [type(step).__name__ for step in transform.transforms[1:]] == ["RandomFlip"]


@pytest.mark.parametrize(
    ("size", "crop_pct", "resized"),
    [
        (224, None, 256),  # 224 / 256
        ((64, 96), None, None),
        (224, 1.0, 224),
        (384, 0.95, 404),  # floor(384 / 0.95): official ignores crop_pct here
        (384, None, (384, 384)),  # squashed
        (32, None, (32, 32)),
        (32, 0.8, 40),
    ],
)
def test_crop_pct_acts_at_every_size(size, crop_pct, resized):
    transform = create_eval_transform(size, crop_pct)
    image = transform(decode(picture(300, 420), 3))
    assert image.dtype == torch.uint8
    assert image.shape == (3, *((size, size) if isinstance(size, int) else size))
    assert resized is None or f"size={resized})" in str(transform)


def test_eval_of_small_images_of_any_size_collates():
    transform = create_eval_transform(16)
    shapes = {transform(decode(picture(h, w), 3)).shape for h, w in [(5, 9), (40, 8), (16, 16)]}
    assert shapes == {(3, 16, 16)}


def test_eval_center_keeps_the_aspect_ratio():
    image = Image.new("RGB", (100, 50))  # width 100: left half black, right half white
    image.paste((255, 255, 255), (50, 0, 100, 50))
    out = create_eval_transform((64, 96), crop_pct=1.0)(decode(image, 3))
    assert out[0, 32, 40].item() == 0
    assert out[0, 32, 55].item() == 255


def erased_batch(images: torch.Tensor, *erasing, mean=(0.5,) * 3, std=(0.5,) * 3) -> torch.Tensor:
    """Load (N, C, H, W) as training does; returns the normalized batch."""
    erase = RandomErasing(*erasing)
    data = TransformedDataset(Listed([(x, 0) for x in images]), erase, seed=0)
    loader = WatchedLoader(data, EvalSampler(len(data), 0, 1), len(data))
    ((x, _, _),) = list(DeviceLoader(loader, "cpu", mean, std))
    return x


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing_equals_timms_on_normalized_images(mode, kind):
    """And leaves the other pixels bit-exact."""
    from timm.data.random_erasing import RandomErasing as Timms

    images = torch.arange(5 * 3 * 16 * 16).reshape(5, 3, 16, 16).remainder(256).to(kind)
    images = images / 255 if kind.is_floating_point else images
    x = erased_batch(images, 1.0, mode, 3)
    for number, image in enumerate(images):
        half = 0.5 if kind.is_floating_point else 127.5
        expected = (image - half) / half
        seed_all(0, 0, number)
        torch.rand(())  # the decision to erase
        assert torch.equal(x[number], Timms(1.0, mode=mode, max_count=3, device="cpu")(expected))


def test_noise_of_random_erasing_has_a_standard_deviation_of_1():
    """In uint8 a third of the values was clipped, which left 0.72."""
    x = erased_batch(torch.full((40, 3, 64, 64), 255, dtype=torch.uint8), 1.0, "pixel", 1)
    noise = x[x != 1]  # white is 1 after normalizing
    assert len(noise) > 50_000
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)


def test_erased_images_travel_as_uint8():
    """As float32 they would take four times as much shared memory."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    erased = RandomErasing(1.0, "pixel", 1)(image)
    images, _, ids, _, patches = collate([(image, 0, 4), (erased, 0, 7)])
    assert (images.dtype, type(images)) == (torch.uint8, torch.Tensor)
    assert ids.tolist() == [4, 7]
    ((number, _, _, height, width),) = patches.places
    assert (number, len(patches.noise)) == (1, 3 * height * width)
    assert len(patches.noise) <= 3 * 32 * 32 / 3 + 3 * 32  # at most a third of the image
    assert RandomErasing(0.0, "pixel", 1)(image) is image


def test_erased_image_is_the_same_in_any_batch():
    args = make_args(reprob=0.5, batch_size=2, data_set="DIGITS", input_size=32, aa="none")
    data, _ = datasets.build_dataset(True, args)
    loader = datasets.build_loader(data, True, args, "cpu")
    loader.set_epoch(3)
    for _, (images, _, ids) in zip(range(4), loader, strict=False):
        for image, number in zip(images, ids, strict=True):
            assert torch.equal(loader.reload(3, number[None])[0][0], image)


def test_flips_follow_the_flag():
    sample = [(picture(8, 8), 0)]
    outs = []
    for hflip in (0.0, 1.0):
        transform = create_pretrain_transform(8, Augmentation(scale=(1.0, 1.0), hflip=hflip))
        transform.transforms[0].ratio = (1.0, 1.0)
        outs.append(TransformedDataset(Listed(sample), transform, 0)[0, 0][0])
    assert torch.equal(outs[0].flip(2), outs[1])


def test_mean_and_std_of_gray_is_the_average():
    assert mean_and_std(3) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert mean_and_std(3, imagenet_default=False) == ([0.5] * 3, [0.5] * 3)
    mean, std = mean_and_std(2)
    assert mean == pytest.approx([0.449] * 2)
    assert std == pytest.approx([0.226] * 2)


# --- randomness and order -------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_index_only():
    data, _ = datasets.build_dataset(True, make_args(aa="augmix-m5", reprob=1.0))
    other, _ = datasets.build_dataset(True, make_args(aa="augmix-m5", reprob=1.0, seed=1))

    def parts(data, epoch):
        (images, _, _, _, patches) = collate([data[epoch, 7]])
        return images.tolist(), patches.places, patches.noise.tolist()

    first = parts(data, 2)
    torch.rand(3), np.random.rand(3), data[0, 1]
    assert parts(data, 2) == first
    for again in (parts(data, 3), parts(other, 2)):
        assert all(a != b for a, b in zip(again, first, strict=True))


@pytest.mark.slow
def test_workers_do_not_change_tensors():
    epochs = []
    for num_workers in (0, 2):
        args = make_args(num_workers=num_workers, batch_size=300)
        data, _ = datasets.build_dataset(True, args)
        batches = datasets.build_loader(data, True, args, "cpu")
        seen = []
        for epoch in (0, 5):  # persistent workers must honor the second epoch too
            batches.set_epoch(epoch)
            seen += list(batches)
        epochs.append(seen)
        assert len(batches) == 4  # 1442 images
    for one, two in zip(*epochs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(epochs[0][0][2], epochs[0][4][2])


@pytest.mark.gpu
@pytest.mark.parametrize("pin_mem", [False, True])
def test_batches_on_a_gpu_are_those_on_the_cpu(pin_mem):
    """The copy overlaps with earlier work: no batch may be read or overwritten too early."""
    args = make_args(batch_size=100, pin_mem=pin_mem)
    data, _ = datasets.build_dataset(True, args)
    on_cpu, on_gpu = (datasets.build_loader(data, True, args, place) for place in ("cpu", "cuda"))
    for epoch in (0, 1):
        on_cpu.set_epoch(epoch)
        on_gpu.set_epoch(epoch)
        work, sums = torch.randn(2000, 2000, device="cuda"), []
        for images, labels, ids in on_gpu:
            work = (work @ work).clamp(-1, 1)  # keeps the GPU behind the host
            sums.append([part.double().sum() for part in (images.square(), labels, ids)])
        expected = [[p.double().sum() for p in (x.square(), y, ids)] for x, y, ids in on_cpu]
        got = torch.tensor(sums, dtype=torch.float64)
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0)


def test_ranks_share_the_order_of_one_process():
    one = TrainSampler(50, seed=3, rank=0, world_size=1)
    two = [TrainSampler(50, seed=3, rank=r, world_size=2) for r in range(2)]
    for sampler in (one, *two):
        sampler.set_epoch(4)
    whole, parts = list(one), [list(sampler) for sampler in two]
    assert {key for part in parts for key in part} == set(whole)
    for b in range(3):  # the same images in each update of 16
        block = {key for part in parts for key in part[8 * b : 8 * b + 8]}
        assert block == set(whole[16 * b : 16 * b + 16])
    one.set_epoch(5)
    assert list(one)[0][0] == 5
    assert [i for _, i in one] != [i for _, i in whole]


def test_uneven_length_gives_every_rank_as_many():
    samplers = [TrainSampler(11, 0, rank, 3) for rank in range(3)]
    assert [len(list(sampler)) for sampler in samplers] == [len(s) for s in samplers] == [3, 3, 3]


def test_resume_within_an_epoch_repeats_and_skips_nothing():
    sampler = TrainSampler(20, 0, 0, 1)
    whole = list(sampler)
    sampler.set_epoch(0, start=8)
    assert list(sampler) == whole[8:]
    assert len(sampler) == 12


def test_evaluation_counts_every_image_once():
    parts = [list(EvalSampler(10, rank, 4)) for rank in range(4)]
    assert sorted(index for part in parts for _, index in part) == list(range(10))
    alone = [len(list(EvalSampler(10, rank, 4, dist_eval=False))) for rank in range(4)]
    assert alone == [10, 0, 0, 0]


def test_eval_loader_drops_nothing_and_keeps_order():
    args = make_args(batch_size=50)
    data, _ = datasets.build_dataset(False, args)
    batches = [ids for _, _, ids in datasets.build_loader(data, False, args, "cpu")]
    assert list(map(len, batches)) == [75] * 4 + [55]  # 1.5 times as large, as official
    assert torch.cat(batches).tolist() == list(range(355))


def test_batch_larger_than_the_data_is_refused():
    data = TransformedDataset(Listed([(picture(), 0)] * 5), create_eval_transform(8), 0)
    with pytest.raises(UserError, match=r"5 training images.* 6 \(6 x 1 .*--batch_size 5 or less"):
        datasets.build_loader(data, True, make_args(batch_size=6), "cpu")


# --- each flag reaches what is built --------------------------------------------------------------


@pytest.mark.parametrize(("imagenet", "mean"), [(True, [0.485, 0.456, 0.406]), (False, [0.5] * 3)])
def test_fill_colors_of_augmentation_follow_mean_and_std(imagenet, mean):
    args = make_args(imagenet_default_mean_and_std=imagenet)
    *_, augment, _, _ = datasets.build_transform(True, args).transforms
    fills = {operation.kwargs["fillcolor"] for operation in augment.ops if operation.kwargs}
    assert fills == {tuple(round(255 * value) for value in mean)}


def test_own_mean_and_std_reach_batches_and_augmentation():
    args = make_args(in_chans=1, mean=(0.25,), std=(2.0,))
    augment = next(s for s in datasets.build_transform(True, args).transforms if hasattr(s, "ops"))
    fills = {operation.kwargs["fillcolor"] for operation in augment.ops if operation.kwargs}
    assert fills == {(64,)}
    data, _ = datasets.build_dataset(False, args)
    loader = datasets.build_loader(data, False, args, "cpu")
    assert loader.normalize(torch.tensor([[[[0, 255]]]]).byte()).tolist() == [[[[-0.125, 0.375]]]]


def test_mean_of_8_bit_values_gets_a_warning(caplog, monkeypatch):
    """Images of 0 to 255 are scaled to 0 to 1 first; a mean of 123 would make all of them black."""
    monkeypatch.setattr(logging.getLogger("convnextv2"), "propagate", True)
    for mean, warned in ((123.675, True), (0.485, False)):
        caplog.clear()
        args = make_args(mean=(mean,), std=(0.2,))
        loader = datasets.build_loader(datasets.build_dataset(True, args)[0], True, args, "cpu")
        loader.set_epoch(0)
        next(iter(loader))
        assert ("do not fit the images of 0 to 255 of the first batch" in caplog.text) is warned


def test_values_for_another_number_of_channels_are_refused():
    with pytest.raises(UserError, match="--std has 2 values, expected one, or one for each of 3"):
        mean_and_std(3, True, (0.1,), (0.1, 0.2))
    with pytest.raises(UserError, match="belong together"):
        mean_and_std(3, True, (0.1,))


def test_split_index_and_size_reach_the_data_set(tmp_path):
    train, other = (make_folders(tmp_path / name, "ab") for name in ("train", "other"))
    index = tmp_path / "index"
    flags = {"data_set": "image_folder", "data_path": str(train), "data_index": str(index)}
    args = make_args(**flags, eval_data_path=str(other))
    val, _ = datasets.build_dataset(False, args)
    assert str(val.dataset.samples[0][0]).startswith(str(other))
    assert [path.name for path in index.iterdir()] == ["val.index"]
    datasets.build_pretrain_dataset(make_args(**flags))
    assert sorted(path.name for path in index.iterdir()) == ["train.index", "val.index"]

    synthetic = make_args(data_set="SYNTHETIC", input_size=(24, 16), nb_classes=7)
    for data in (
        datasets.build_dataset(True, synthetic)[0],
        datasets.build_pretrain_dataset(synthetic),
    ):
        assert data.dataset[0][0].size == (16, 24)


def test_pretraining_images_depend_on_the_seed():
    first, other = (datasets.build_pretrain_dataset(make_args(seed=seed)) for seed in (1, 2))
    assert (first.seed, other.seed) == (1, 2)
    assert not torch.equal(first[0, 3][0], other[0, 3][0])


@pytest.mark.parametrize(("is_train", "on_bad"), [(True, "replace"), (False, "leave out")])
def test_bad_images_of_evaluation_are_never_replaced(is_train, on_bad):
    data, _ = datasets.build_dataset(is_train, make_args(on_bad_image="skip"))
    assert data.on_bad == on_bad


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("pin_mem", [False, True])
def test_memory_is_pinned_if_asked_and_if_there_is_a_gpu(pin_mem, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = make_args(pin_mem=pin_mem)
    data, _ = datasets.build_dataset(False, args)
    assert datasets.build_loader(data, False, args, "cpu").loader.loader.pin_memory is (
        pin_mem and cuda
    )


def test_loader_normalizes_gray_images_by_one_mean():
    args = make_args(in_chans=1, aa="none")
    data, _ = datasets.build_dataset(True, args)
    loader = datasets.build_loader(data, True, args, "cpu")
    assert len(loader.mean) == len(loader.std) == 1
    assert next(iter(loader))[0].shape == (4, 1, 16, 16)


@pytest.mark.parametrize(("dist_eval", "images"), [(True, [178, 177]), (False, [355, 0])])
def test_dist_eval_shares_the_images_out(dist_eval, images, monkeypatch):
    args = make_args(dist_eval=dist_eval)
    data, _ = datasets.build_dataset(False, args)
    monkeypatch.setattr(datasets, "get_world_size", lambda: 2)
    for rank, count in enumerate(images):
        monkeypatch.setattr(datasets, "get_rank", lambda rank=rank: rank)
        loader = datasets.build_loader(data, False, args, "cpu")
        assert len(loader.loader.sampler) == count


def test_mixup_smooths_over_the_classes_of_the_data():
    none = {"mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None}
    shared = {"mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "smoothing": 0.2}
    assert build_mixup(make_args(**none, **shared), 4) is None
    for flag in ({"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": [0.2, 0.3]}):
        mixup = build_mixup(make_args(**{**none, **flag}, **shared), 4)
        _, labels = mixup(torch.zeros(2, 3, 8, 8), torch.tensor([3, 3]))
        torch.testing.assert_close(labels, torch.tensor([[0.05, 0.05, 0.05, 0.85]] * 2))


# --- errors and devices ---------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_names_its_file(tmp_path, num_workers):
    make_folders(tmp_path, "a", images=3)
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    args = make_args(data_set="image_folder", data_path=tmp_path, batch_size=1)
    data, _ = datasets.build_dataset(True, args)
    loader = WatchedLoader(data, EvalSampler(3, 0, 1), 1, num_workers)
    batches = iter(DeviceLoader(loader, "cpu", *mean_and_std()))
    next(batches)
    with pytest.raises(UserError, match=r"cannot read image .*a/1\.png .*truncated.*replace"):
        next(batches)


def test_text_posing_as_an_image_names_its_file(tmp_path):
    (tmp_path / "x.jpg").write_text("not a picture")
    args = make_args(data_set="folder", data_path=tmp_path)
    assert "x.jpg" in str(datasets.build_pretrain_dataset(args)[0, 0])


def test_a_bug_in_a_transform_is_not_called_an_unreadable_image():
    def broken(image):
        raise ValueError("bug")

    with pytest.raises(ValueError, match="^bug$"):
        TransformedDataset(Listed([(picture(), 0)]), broken, 0)[0, 0]


LABELS = {  # of the third kind of data set: what is said of the label
    "text": ("ant", "the label str 'ant', expected an integer from 0 to 4"),
    "float": (1.7, "the label float 1.7, expected"),
    "whole float": (1.0, "the label float 1.0, expected"),
    "numpy float": (np.float32(1.7), "the label float32 "),
    "one-hot": (torch.eye(5)[1], r"the label Tensor of shape \(5,\), expected"),
    "vector of one": (torch.tensor([3]), r"the label Tensor of shape \(1,\), expected"),
    "array": (np.array([3]), r"the label ndarray of shape \(1,\), expected"),
    "float tensor": (torch.tensor(1.7), r"the label Tensor tensor\(1.7"),
    "list": ([3], r"the label list \[3\], expected"),
    "dict": ({"label": 3}, "the label dict {'label': 3}, expected"),
    "nothing": (None, r"it has no label; expected \(image, label\)"),
    "too large": (5, "label 5; expected 0 to 4"),
    "negative": (-1, "label -1; expected 0 to 4"),
    "long text": ("x" * 10**6, "the label str 'xxx"),
}


@pytest.mark.parametrize(("label", "message"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("on_bad", ["error", "replace", "leave out"])
def test_label_that_is_no_class_is_an_error(label, message, on_bad):
    """A run trained on int(1.7), and a text was called a bad image."""
    data = Listed([(picture(), label)])
    data = TransformedDataset(data, create_eval_transform(8), 0, nb_classes=5, on_bad=on_bad)
    error = data[0, 0]
    assert isinstance(error, UserError)
    assert not isinstance(error, BadImage)
    assert re.match(f"image number 0: (got )?{message}", str(error))
    assert len(str(error)) < 200


@pytest.mark.parametrize(
    "label", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3).byte()]
)
def test_label_may_be_any_kind_of_integer(label):
    data = Listed([(picture(), label), [picture(), label]])
    data = TransformedDataset(data, create_eval_transform(8), 0, nb_classes=5)
    for index in range(2):
        _, got, _ = data[0, index]
        assert (type(got), got) == (int, 3)


def test_tuple_of_three_is_an_error_with_its_types():
    """It was called a bad image, and with --on_bad_image skip the run replaced all images."""
    for nb_classes in (5, None):
        item = {"image": picture(), "label": 3}
        data = TransformedDataset(
            Listed([item]), create_eval_transform(8), 0, nb_classes=nb_classes
        )
        text = "got a dict with the keys image, label, expected (image, label); correct __getitem__"
        assert text in str(data[0, 0])
    for item in ((picture(), 3, {"id": 1}), [picture()], ()):
        data = TransformedDataset(
            Listed([item]), create_eval_transform(8), 0, nb_classes=5, on_bad="replace"
        )
        kinds = ", ".join(type(part).__name__ for part in item)
        text = f"image number 0: got a {type(item).__name__} of {len(item)} ({kinds}), expected (im"
        assert str(data[0, 0]).startswith(text)


class Broken:
    """A label without meaning, which cannot be looked at."""

    def __getattr__(self, name):
        raise AssertionError(name)


@pytest.mark.parametrize(
    "item",
    [
        (picture(), {"boxes": [1, 2]}), (picture(), [[1], [2]]), (picture(), "cat"),
        (picture(), torch.eye(40)), (picture(), None), (picture(), 3, "id"), [picture()],
        (picture(), Broken()), picture(),
    ],
    ids=lambda item: str(type(item)),
)  # fmt: skip
def test_pretraining_does_not_look_at_labels(item):
    """Data sets like CelebA, VOC and COCO could not be used."""
    data = TransformedDataset(Listed([item]), create_eval_transform(8), 0)
    image, label, index = data[0, 0]
    assert (image.shape, label, index) == ((3, 8, 8), 0, 0)
    assert collate([data[0, 0]])[1].tolist() == [0]


def test_color_augmentation_of_floats_is_refused():
    transform = create_train_transform(8, Augmentation(aa="rand-m9"))
    result = TransformedDataset(Listed([(torch.rand(3, 8, 8), 0)]), transform, 0)[0, 0]
    assert isinstance(result, UserError)
    assert "--aa none" in str(result)


def test_batches_normalize_like_totensor_and_normalize():
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).remainder(256).to(torch.uint8)
    samples = Listed([(image, 1) for image in images])
    data = TransformedDataset(samples, keep, 0, nb_classes=2)
    loader = WatchedLoader(data, EvalSampler(2, 0, 1), 2)
    batches = DeviceLoader(loader, "cpu", *mean_and_std())
    marks: list[str] = []
    batches.mark = marks.append
    ((x, labels, ids),) = list(batches)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in mean_and_std())
    torch.testing.assert_close(x, (images / 255 - mean) / std)
    torch.testing.assert_close(batches.normalize(images / 255), x)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (labels.tolist(), ids.tolist(), labels.dtype) == ([1, 1], [0, 1], torch.int64)
    assert marks == ["rest", "data", "rest"]  # asked for, ready, and asked for the next


def ramp(low, high):
    """Two images with values from low to high."""
    return torch.linspace(low, high, 2 * 3 * 64).view(2, 3, 8, 8)


RANGES = {  # a batch of float images, and the range that is told
    "0..255": (ramp(0, 255), "0 to 255"),
    "0..10000": (ramp(0, 10_000), "0 to 1e+04"),
    "standardized": (ramp(-2.1, 2.6), "-2.1 to 2.6"),
    "-1..1": (ramp(-1, 1), "-1 to 1"),
    "dark": (torch.eye(8).expand(2, 3, 8, 8)[..., :1, :] * ramp(254, 255), "0 to 255"),
    "0..1": (ramp(0, 1), None),
    "overshoot": (ramp(-0.12, 1.12), None),
    "erased": (torch.cat([ramp(0, 1)[:, :, 1:], ramp(-1, 2)[:, :, :1]], 2), None),
    "uint8": (ramp(0, 255).to(torch.uint8), None),
}


@pytest.mark.parametrize(("images", "told"), RANGES.values(), ids=RANGES)
def test_range_of_float_images_is_checked_at_the_first_batch(images, told, log):
    """Images in 0..255 or 0..10000 trained without a word, far from the mean and std."""
    data = TransformedDataset(Listed([(image, 0) for image in images]), keep, 0)
    batches = DeviceLoader(WatchedLoader(data, EvalSampler(2, 0, 1), 2), "cpu", *mean_and_std())
    for _ in range(2):
        list(batches)
    warnings = [text.partition(":")[0] for text in log.messages]
    low, _, high = (told or "").partition(" to ")
    text = f"mean and std do not fit the float images of the first batch, from {low} to {high}"
    assert warnings == [text] * (told is not None)


def test_own_mean_and_std_of_float_images_are_no_mistake(log):
    """Images in 0..10000 with their own mean and std were called wrong."""
    for mean, std, wrong in (([5000.0] * 3, [2900.0] * 3, False), ([0.5] * 3, [0.2] * 3, True)):
        log.messages.clear()
        data = TransformedDataset(Listed([(image, 0) for image in ramp(0, 10_000)]), keep, 0)
        list(DeviceLoader(WatchedLoader(data, EvalSampler(2, 0, 1), 2), "cpu", mean, std))
        assert bool(log.messages) == wrong


def keep(image):
    return image


def test_collate_passes_an_error_on_instead_of_a_batch():
    error = UserError("x")
    assert collate([(torch.zeros(1), 0, 0), error]) is error
