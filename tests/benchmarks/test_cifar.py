# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The CIFAR-10 benchmark: its three runs, its rule of equal time, its data and its refusals."""

import io
import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import cifar
from benchmarks.cifar_runs import InMemory, classifier, equal_epochs, load
from errors import UserError
from tests.test_end_to_end import run

ROOT = Path(__file__).resolve().parents[2]
REAL = cifar.get_args_parser().get_default("data")
TOY = (
    "--device cpu --model 1,1/4,8 --stem_stride 2 --patch_size 4 --decoder_embed_dim 8 "
    "--pretrain_images 16 --train_images 16 --val_images 10 --pretrain_epochs 2 --epochs 2 "
    "--pretrain_batch_size 8 "
    "--batch_size 4 --drop_path 0.1 --cutmix 1 --cutout 4 --seeds 0 3"
)


def program(*words: object, expect: int = 0) -> subprocess.CompletedProcess:
    """Run it with the toy's settings and these."""
    return run("benchmarks/cifar.py", *TOY.split(), *words, expect=expect)


def cells(text: str, title: str) -> list[str]:
    """The first row of a table that starts with the title."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@pytest.mark.slow
def test_program_compares_the_three_runs_and_equal_seeds_agree(toy_zip, tmp_path):
    output, results = tmp_path / "table.md", tmp_path / "runs.jsonl"
    first = program("--data", toy_zip, "--output", output)
    assert output.read_text(encoding="utf-8").strip() == first.stdout.strip()
    table = {name: cells(first.stdout, title) for name, title in cifar.RUNS.items()}
    assert table["pretrained"][0] == "2 + 2"
    assert table["scratch"][0] == "0 + 2"
    longer = int(re.fullmatch(r"0 \+ (\d+)", table["longer"][0])[1])
    assert longer > 2
    for row in table.values():
        each = [float(value) for value in row[2].split(", ")]
        assert len(each) == 2
        assert all(0 <= value <= 100 for value in each)
        assert float(row[1].strip("*")) == pytest.approx(sum(each) / 2, abs=0.01)
    for name in ("scratch", "longer"):
        ahead = first.stdout.split("pre-trained is ahead of")[1]
        gap = float(table["pretrained"][1].strip("*")) - float(table[name][1].strip("*"))
        assert float(cells(ahead, cifar.RUNS[name])[0].strip("*")) == pytest.approx(gap, abs=0.02)

    again = ("--data", toy_zip, "--longer_epochs", longer, "--results", results)
    second, third = program(*again), program(*again)
    assert {name: cells(second.stdout, cifar.RUNS[name])[:3] for name in table} == {
        name: row[:3] for name, row in table.items()
    }
    assert third.stdout == second.stdout
    assert "pre-training 1/2" in second.stderr
    assert third.stderr == ""  # nothing was run again
    assert len(results.read_text(encoding="utf-8").splitlines()) == 6


@pytest.mark.slow
def test_network_of_a_library_is_compared_without_the_longer_run(toy_zip):
    words = ("--data", toy_zip, "--model", "timm:resnet18", "--patch_size", "8")
    done = program(*words, "--stem_stride", "1", "--longer_epochs", "0", "--seeds", "0")
    assert cells(done.stdout, cifar.RUNS["pretrained"])[0] == "2 + 2"
    assert cells(done.stdout, cifar.RUNS["scratch"])[0] == "0 + 2"
    assert cifar.RUNS["longer"] not in done.stdout


def test_equal_time_rounds_up_and_leaves_slow_first_epochs_out():
    """4 epochs of 3 s (the first took 60) are 12 s, and 12 / 5 is 2.4 epochs from scratch."""
    assert equal_epochs([60.0, 3.0, 3.0, 3.0], [90.0, 5.0, 5.0], epochs=3) == 3 + 3
    assert equal_epochs([2.0, 2.0], [4.0, 4.0], epochs=2) == 2 + 1


def test_bad_zip_ends_in_one_line_and_exit_code_2(toy_zip, tmp_path):
    broken = tmp_path / "half.zip"
    broken.write_bytes(toy_zip.read_bytes()[:5000])
    done = program("--data", broken, expect=2)
    assert done.stderr == (
        f"cifar.py: error: --data {broken}: File is not a zip file; expected a zip with "
        "16 in train/CLASS/*.jpg and 10 in val/CLASS/*.jpg\n"
    )


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": 20, "val": 10}, "holds 2 classes in train/, the smallest of 9 images; expected"),
        ({"train": 17, "val": 10}, "expected a zip with 17 in train"),
        ({"test": 2}, "holds 0 classes in test/"),
    ],
)
def test_zip_without_enough_images_is_refused(toy_zip, counts, message):
    with pytest.raises(UserError, match=message):
        load(toy_zip, counts)


def test_damaged_image_and_missing_file_are_refused(tmp_path):
    path = tmp_path / "damaged.zip"
    with pytest.raises(UserError, match="no such file; expected a zip with 1 in train"):
        load(path, {"train": 1})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/bird/0.jpg", b"no picture")
    with pytest.raises(UserError, match="the file is text, not an image"):
        load(path, {"train": 1})


def test_other_classes_in_val_are_refused(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as archive:
        archive.writestr("train/bird/0.jpg", file.getvalue())
        archive.writestr("val/car/0.jpg", file.getvalue())
    with pytest.raises(UserError, match="other classes or sizes in train than in val"):
        load(tmp_path / "mixed.zip", {"train": 1, "val": 1})


def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror():
    """Pixel values name their place, so a crop tells where it was cut."""
    images = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, 3).repeat(64, 0)
    loader = InMemory(images, np.arange(64), 64, torch.device("cpu"), seed=0, pad=1)
    padded = np.pad(images[0, :, :, 0], 1, "reflect")
    windows = [padded[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    known = {w.tobytes() for w in windows} | {w[:, ::-1].tobytes() for w in windows}

    def crops(epoch: int) -> tuple[list[bytes], list[int]]:
        loader.set_epoch(epoch)
        ((pixels, labels, ids),) = loader
        red = pixels[:, 0] * loader.std[0] + loader.mean[0]
        assert labels.tolist() == ids.tolist()
        return [c.numpy().tobytes() for c in (255 * red).round().to(torch.uint8)], ids.tolist()

    first, order = crops(0)
    assert set(first) == known  # 64 draws of 18
    assert sorted(order) == list(range(64))
    assert crops(1) != (first, order)
    assert crops(0) == (first, order)


def test_cutout_hides_a_square_of_that_side():
    images = np.full((32, 12, 12, 3), 255, np.uint8)
    loader = InMemory(images, np.zeros(32, int), 32, torch.device("cpu"), seed=0, cutout=4)
    ((pixels, _, _),) = loader
    hidden = (pixels == 0).all(1)  # (N, H, W)
    assert hidden.any(2).sum(1).max() == 4
    assert hidden.any(1).sum(1).max() == 4
    assert (hidden.sum((1, 2)) == hidden.any(2).sum(1) * hidden.any(1).sum(1)).all()


def test_evaluation_sees_every_image_once_as_it_is(toy_zip):
    images, labels = load(toy_zip, {"val": 10})["val"]
    parts = list(InMemory(images, labels, 4, torch.device("cpu")))
    assert [len(part[0]) for part in parts] == [4, 4, 2]
    assert torch.cat([part[2] for part in parts]).tolist() == list(range(10))
    assert torch.cat([part[1] for part in parts]).tolist() == 5 * [0] + 5 * [1]
    pixels = torch.cat([part[0] for part in parts]).permute(0, 2, 3, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(pixels * std + mean, torch.from_numpy(images) / 255, atol=1e-6)


@pytest.mark.parametrize("model", ["1,1/4", "1,a/4,8", "1,1/4,8/2,2", "0,1/4,8"])
def test_model_that_is_no_list_of_blocks_and_channels_is_refused(model):
    args = cifar.get_args_parser().parse_args(["--model", model, "--stem_stride", "2"])
    with pytest.raises(UserError, match="expected a name, or like 1,2,2/24,48,96"):
        classifier(args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch_size 5 --cutmix 1", "--batch_size 5: mixup mixes pairs; make it even"),
        ("--output no_such/table.md", "no_such/table.md: there is no folder no_such; make it"),
        ("--pretrain_batch_size 64", "a batch of 64, but --pretrain_images 40; lower it"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(words, message):
    argv = "--device cpu --pretrain_images 40 --train_images 40 --batch_size 4 " + words
    with pytest.raises(UserError, match=message):
        cifar.fill_in(cifar.get_args_parser().parse_args(argv.split()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"run": "scratch", "seed": 0, "settings": "--epochs 1"}',
            "of other settings, --epochs 1",
        ),
        ('{"run": "scr', "not of this program"),
        ('{"loss": 1}', "not of this program"),
    ],
)
def test_results_that_do_not_belong_are_refused(tmp_path, text, message):
    path = tmp_path / "runs.jsonl"
    path.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        cifar.finished(path, "--epochs 2")
    assert cifar.finished(tmp_path / "new.jsonl", "--epochs 2") == {}


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not here")
def test_the_real_zip_holds_what_the_defaults_ask_for():
    data = load(REAL, {"train": 20000, "val": 10000})
    for split, each in (("train", 2000), ("val", 1000)):
        images, labels = data[split]
        assert images.shape == (10 * each, 32, 32, 3)
        assert images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [each] * 10
