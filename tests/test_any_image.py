# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Whole runs with images of 1, 4 and 12 channels, 16 bits and floats, from a folder."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune
import main_pretrain
import visualize
from config import parser as options
from errors import UserError
from tests.groups import run_script
from training import run_lock

SIZES = "--input_size 16 --stem_stride 1 --batch_size 4 --num_workers 0 --device cpu --epochs 1 "
SIZES += "--log_dir none --lr 0.01"
CHANGED = "--ratio 0.5 2 --vflip 0.5 --rot90 0.75 --gaussian_blur_prob 0.5 --reprob 0.5"
KINDS = {  # channels, type, values, flags
    "1 channel, 16 bits": (1, np.uint16, (0, 65_000), "--value_range 0 65535"),
    "1 channel, floats": (1, np.float32, (0, 1), ""),
    "4 channels, 16 bits": (4, np.uint16, (0, 65_000), ""),
    "4 channels, 8 bits": (4, np.uint8, (0, 255), ""),
    "12 channels, 16 bits": (12, np.uint16, (0, 9_000), "--value_range 0 10000"),
    "12 channels, floats": (12, np.float32, (-900, 900), "--value_range -1000 1000"),
}


def write(root: Path, kind: str) -> None:
    """Six images of each of two classes, as .npy and TIFF files by turns."""
    tifffile = pytest.importorskip("tifffile")
    channels, dtype, (low, high), _ = KINDS[kind]
    random = np.random.default_rng(0)
    for number in range(12):
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = random.uniform(low, high, (channels, 20, 24)).astype(dtype)
        if number % 3:
            tifffile.imwrite(folder / f"{number}.tif", image, photometric="minisblack")
        else:
            np.save(folder / f"{number}.npy", image)


def run(main: object, words: str) -> None:
    try:
        main.main(options.parse(main.get_args_parser(), words.split()))
    finally:
        run_lock.acquire_run_lock("")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_train_evaluate_and_draw_any_image(kind, tmp_path, monkeypatch, capsys):
    """The flags of the images come with the checkpoint."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set", kind)
    channels, _, _, words = KINDS[kind]
    own = f"--in_chans {channels} --mean 0.4 --std 0.3 {words}"
    run(
        main_pretrain,
        f"{SIZES} --model tests.tiny:fcmae --decoder_embed_dim 8 --data_path set {own} "
        f"--picture_freq 1 --output_dir pre {CHANGED}",
    )
    saved = torch.load("pre/checkpoint-0.pth", weights_only=True)["args"]
    assert (saved["in_chans"], tuple(saved["mean"])) == (channels, (0.4,))
    tune = f"{SIZES} --model tests.tiny:classifier --data_path set --val_split 0.3 --aa none"
    run(
        main_finetune,
        f"{tune} --finetune pre --mixup 0.8 --cutmix 1 {CHANGED} --output_dir fine",
    )
    assert "taken from pre" in capsys.readouterr().out
    stored = torch.load("fine/checkpoint-0.pth", weights_only=True)["args"]
    for name in ("in_chans", "mean", "std", "value_range"):
        assert stored[name] == saved[name], name
    run(main_finetune, f"{tune} --eval --resume fine --output_dir none")
    assert "of 2 classes" in capsys.readouterr().out
    words = "--checkpoint pre --model tests.tiny:fcmae --num_images 2 --device cpu --output a.png"
    visualize.main(options.visualize_parser().parse_args(words.split()))
    assert Path("a.png").stat().st_size > 1000
    assert list(Path("pre/reconstructions").glob("*.png"))


@pytest.mark.slow
def test_visualize_is_a_script_of_several_commands(tmp_path):
    """The mean and std that it prints are flags that a training script takes."""
    write(tmp_path / "set", "12 channels, 16 bits")
    own = ["--data_path", tmp_path / "set", "--in_chans", 12, "--value_range", 0, 10_000]
    run_view = partial(run_script, "visualize.py", ranks=1, folder=tmp_path)
    said = run_view("stats", *own, "--num_workers", 2)
    flags = next(line for line in said.splitlines() if line.startswith("--mean")).split()
    picture = tmp_path / "seen.png"
    words = [*own, *flags, "--input_size", 16, "--stem_stride", 1, "--output", picture]
    assert "4 images in 4 epochs" in run_view("data", *words)
    assert picture.stat().st_size > 1000


def scan(data_path: str, train: bool) -> list:
    """Arrays in units of their own, as a reader of DICOM files returns them."""
    random = np.random.default_rng(train)
    return [(random.integers(-1000, 400, (24, 20), dtype=np.int16), 0) for _ in range(8)]


def test_arrays_of_a_data_set_of_your_own_are_trained_on(tmp_path):
    words = f"{SIZES} --model tests.tiny:fcmae --decoder_embed_dim 8 --in_chans 1 --data_path x"
    words += " --data_set tests.test_any_image:scan --save_ckpt false --output_dir none"
    run(main_pretrain, f"{words} --value_range -1000 400 --picture_freq 0")
    with pytest.raises(UserError, match="int16 values from -9.* give the values that become 0 and"):
        run(main_pretrain, f"{words} --picture_freq 0")


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("--in_chans 4", True),
        ("--in_chans 4 --aa none", False),
        ("--in_chans 4 --aa none --color_jitter 0.4", True),
        ("--value_range 0 65535", True),
        ("--value_range 0 65535 --aa none", False),
        ("--value_range 0 255", False),
        ("--in_chans 1", False),
    ],
)
def test_color_augmentations_of_other_images_are_refused_before_training(words, refused, capsys):
    def parse() -> None:
        options.parse(options.finetune_parser(), ["--data_set", "DIGITS", *words.split()])

    if not refused:
        parse()
        return
    with pytest.raises(SystemExit):
        parse()
    assert "is for 8-bit images of 1 or 3 channels" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--value_range 5 5", "--value_range 9 -9"])
def test_empty_value_range_is_refused(words, capsys):
    for make in (options.pretrain_parser, options.finetune_parser):
        with pytest.raises(SystemExit):
            options.parse(make(), ["--data_set", "DIGITS", *words.split()])
        assert "expected the value that becomes 0, then a larger one" in capsys.readouterr().err
