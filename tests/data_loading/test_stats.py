# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Statistics of a data set equal those that NumPy computes over all pixels at once."""

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from config import views
from data_loading.stats import Spread, Stats, choose, describe_classes
from errors import UserError
from tests.tiny import Colors


def make(root, kind: str) -> tuple[list[str], np.ndarray]:
    """Write images of several sizes; returns flags, and all pixels (C, P) as float64."""
    random, pixels = np.random.default_rng(0), []
    for number in range(7):
        folder = root / "ab"[number > 4]
        folder.mkdir(exist_ok=True)
        shape = 3 + number, 5 + 2 * number
        if kind == "photos":
            image = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / f"{number}.png")
            pixels.append(image.reshape(-1, 3).T / 255)
        elif kind == "16 bits":
            image = random.integers(0, 65_536, (4, *shape), dtype=np.uint16)
            np.save(folder / f"{number}.npy", image)
            pixels.append(image.reshape(4, -1) / 65_535)
        else:
            image = random.normal(0, 300, (*shape, 12)).astype(np.float32)
            np.save(folder / f"{number}.npy", image)
            scaled = (image.astype(np.float64) + 1000) / 2000
            pixels.append(scaled.clip(0, 1).reshape(-1, 12).T)
    flags = {"photos": "", "16 bits": "--in_chans 4"}
    words = flags.get(kind, "--in_chans 12 --value_range -1000 1000").split()
    return words, np.concatenate(pixels, 1)


def printed(words: list, capsys: pytest.CaptureFixture) -> list[str]:
    visualize.print_stats(views.parse_stats(list(map(str, words))))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["photos", "16 bits", "floats"])
def test_stats_are_those_of_all_pixels(kind, workers, tmp_path, capsys):
    words, pixels = make(tmp_path, kind)
    lines = printed(["--data_path", tmp_path, "--num_workers", workers, *words], capsys)
    flags = lines[-1].split()
    count = len(pixels)
    assert flags[0] == "--mean"
    assert [float(x) for x in flags[1 : 1 + count]] == pytest.approx(pixels.mean(1), rel=1e-4)
    assert [float(x) for x in flags[2 + count :]] == pytest.approx(pixels.std(1), rel=1e-4)
    table = [[float(x) for x in line.split()] for line in lines[4 : 4 + count]]
    assert [row[3] for row in table] == pytest.approx(pixels.min(1), abs=1e-5)
    assert [row[4] for row in table] == pytest.approx(pixels.max(1), abs=1e-5)
    assert lines[0].startswith("images   7 of 7, in ")
    assert "smallest 5 x 3, median 11 x 6, largest 17 x 9 (width x height)" in lines[1]
    name = {"photos": "RGB, 8 bits", "16 bits": "4 channels, uint16"}.get(kind)
    assert lines[2] == f"kinds    {name or '12 channels, float32'} (7)"
    assert lines[-2] == "classes  2: rarest b (2 images), most common a (5 images)"


def test_spread_is_stable_far_from_zero():
    """E[x^2] - E[x]^2 of such values is 0 or negative in float64."""
    random = np.random.default_rng(1)
    parts = [1e8 + random.normal(0, 1, (2, 5, 4 + n)) for n in range(6)]
    total = Spread.of(torch.from_numpy(parts[0]))
    for part in parts[1:]:
        total = total.join(Spread.of(torch.from_numpy(part)))
    pixels = np.concatenate([part.reshape(2, -1) for part in parts], 1)
    assert total.std == pytest.approx(pixels.std(1), rel=1e-6)
    assert total.mean == pytest.approx(pixels.mean(1), rel=1e-15)


def test_sample_depends_on_the_seed_alone():
    assert choose(9, None, 0) == choose(9, 20, 0) == range(9)
    first = choose(1000, 10, 0)
    assert first == choose(1000, 10, 0) != choose(1000, 10, 1)
    assert len({*first}) == 10


def test_constant_channel_has_a_std_to_divide_by():
    stats = Stats(Spread.of(torch.zeros(1, 4, 4)))
    assert stats.flags() == "--mean 0 --std 1e-05"


def test_images_without_labels_and_bad_ones_are_reported(tmp_path, capsys):
    make(tmp_path, "photos")
    (tmp_path / "a" / "0.png").write_bytes(b"<html>")
    words = ["--data_path", tmp_path / "a", "--num_workers", 0]
    with pytest.raises(UserError, match="0.png"):
        printed(words, capsys)
    lines = printed([*words, "--on_bad_image", "skip"], capsys)
    assert lines[0].startswith("images   4 of 5")
    assert any(line.startswith("left out 1 bad image: ") and "HTML" in line for line in lines)
    assert lines[-2] == "classes  the data lists no labels"
    wrong = ["--data_path", tmp_path / "a", "--in_chans", 4, "--num_workers", 0]
    with pytest.raises(UserError, match="expected --in_chans 4"):
        printed([*wrong, "--num_images", 1], capsys)
    with pytest.raises(UserError, match="no such file or folder"):
        printed(["--data_path", tmp_path / "nowhere"], capsys)
    with pytest.raises(UserError, match="--data_path is missing"):
        printed([], capsys)


def test_data_without_labels_is_called_so_without_a_remedy(tmp_path, capsys):
    """It said `expected one folder of images per class; left out 5 files`, and used all of them."""
    make(tmp_path, "photos")
    words = ["--data_path", str(tmp_path / "a"), "--num_workers", "0"]
    visualize.print_stats(views.parse_stats(words))
    assert capsys.readouterr().err == f"no labels: {tmp_path}/a has no class folders\n"


def test_named_column_of_labels_is_never_left_out(tmp_path, capsys):
    make(tmp_path, "photos")
    (tmp_path / "rows.csv").write_text("image,kind\na/1.png,x\na/2.png,y\n")
    words = ["--data_path", tmp_path / "rows.csv", "--num_workers", 0]
    assert printed(words, capsys)[0].startswith("images   2 of 2")
    with pytest.raises(UserError, match="--label_column: .*colour"):
        printed([*words, "--label_column", "colour"], capsys)


def test_classes_of_rows_are_counted():
    data = Colors(4)
    data.kind, data.targets = "multi", torch.tensor([[1, 0, 1]] * 3 + [[0, 1, 1]])
    text = "classes  3: rarest green (1 image), most common blue (4 images)"
    assert describe_classes(data) == text
    data.targets = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert describe_classes(data) == "classes  3, 2 images each"
