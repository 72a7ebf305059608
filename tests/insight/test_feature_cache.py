# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The cache never gives features of other weights, images or settings, nor half a file."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import FakeData

from data_loading.builtin import Digits, Synthetic
from data_loading.sources import DatasetSpec, open_images
from data_loading.split import Part
from errors import UserError
from insight import feature_cache
from insight.feature_cache import FeatureCache, hash_images, hash_weights

KEY = {"weights": "a", "images": "b"}
HELD = {"features": torch.arange(6.0).view(3, 2), "ids": torch.arange(3)}


def photos(folder: Path, source: str = "") -> str | None:
    return hash_images(open_images("auto", DatasetSpec(str(source or folder)), True))


def write(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def test_tensors_come_back_for_their_key_alone(tmp_path):
    cache = FeatureCache(tmp_path)
    assert cache.read(KEY) is None
    path = cache.write(KEY, HELD)
    found = cache.read(dict(reversed(KEY.items())))
    assert all(torch.equal(found[name], HELD[name]) for name in HELD)
    assert found.keys() == HELD.keys()
    assert cache.read(KEY | {"weights": "c"}) is None
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # no temporary file


def test_cache_that_is_off_and_unknown_images_store_nothing(tmp_path):
    for cache, key in ((FeatureCache(None), KEY), (FeatureCache(tmp_path), None)):
        cache.check()
        assert cache.write(key, HELD) is None
        assert cache.read(key) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["cut", "flipped", "renamed", "empty"])
def test_damaged_file_is_computed_again_with_a_warning(fault, tmp_path, log):
    cache = FeatureCache(tmp_path)
    path = cache.write(KEY, HELD)
    content = bytearray(path.read_bytes())
    if fault == "renamed":  # a file of another key under this name
        other = cache.write(KEY | {"more": "x"}, HELD)
        content = bytearray(other.read_bytes())
    elif fault == "flipped":
        content[-3] ^= 1
    path.write_bytes({"cut": content[:-5], "empty": b""}.get(fault, content))
    assert cache.read(KEY) is None
    assert f"{path}: features cannot be used and are computed again" in log.text
    cache.write(KEY, HELD)
    assert torch.equal(cache.read(KEY)["ids"], HELD["ids"])


def test_file_is_complete_before_it_has_its_name(tmp_path, monkeypatch):
    """A process that is killed while it writes left half a file."""

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path).write(KEY, HELD)
    assert FeatureCache(tmp_path).read(KEY) is None


def test_full_disk_is_a_warning(tmp_path, monkeypatch, log):
    def fail(*args):
        raise OSError(28, "No space left on device", str(args[1]))

    monkeypatch.setattr(feature_cache, "write_atomically", fail)
    assert FeatureCache(tmp_path).write(KEY, HELD) is None
    assert "features are not cached: No space left on device" in log.text


def test_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--feature_cache .*give another folder, or none"):
        FeatureCache(tmp_path / "file" / "cache").check()


def test_weights_and_settings_of_layers_count_but_not_the_classifier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    before, whole = hash_weights(net, ["2."]), hash_weights(net)
    with torch.no_grad():
        net[2].weight[0, 0] += 1
    assert hash_weights(net, ["2."]) == before
    assert hash_weights(net) != whole
    net[0].stride = (2, 2)  # which is in no tensor
    assert hash_weights(net, ["2."]) != before
    net[0].stride = (1, 1)
    with torch.no_grad():
        net[0].bias[0] += 1e-6
    assert hash_weights(net, ["2."]) != before


def test_images_in_files_count_by_name_size_and_time(tmp_path):
    for number in range(3):
        write(tmp_path / f"photos/{'cd'[number % 2]}/{number}.png", number)
    first = photos(tmp_path / "photos")
    assert photos(tmp_path / "photos") == first
    path = tmp_path / "photos/c/2.png"
    facts = os.stat(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    changed = photos(tmp_path / "photos")
    assert changed != first
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert photos(tmp_path / "photos") == first
    path.rename(path.with_name("3.png"))
    assert photos(tmp_path / "photos") not in (first, changed)


def test_images_in_an_archive_count_by_the_archive(tmp_path):
    import tarfile
    import zipfile

    write(tmp_path / "1.png", 1)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(tmp_path / "1.png", "c/1.png")
        file.write(tmp_path / "1.png", "d/e/2.png")
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.add(tmp_path / "1.png", "c/1.png")
        file.add(tmp_path / "1.png", "d/2.png")
    for name in ("a.zip", "a.tar"):
        first = photos(tmp_path, tmp_path / name)
        assert first
        assert photos(tmp_path, tmp_path / name) == first
        os.utime(tmp_path / name, ns=(0, 1))
        assert photos(tmp_path, tmp_path / name) != first


def test_images_in_memory_count_by_their_pixels():
    train, other = Digits(True), Digits(True)
    assert hash_images(train) == hash_images(other) != hash_images(Digits(False))
    other.images[0, 0, 0] ^= 1
    assert hash_images(train) != hash_images(other)
    parts = [Part(train, np.array(rows)) for rows in ([0, 1], [1, 0], [0, 1])]
    assert hash_images(parts[0]) == hash_images(parts[2]) != hash_images(parts[1])
    sets = [Synthetic((8, 8), 3, True), Synthetic((8, 8), 3, False), Synthetic((8, 9), 3, True)]
    assert len({hash_images(data) for data in sets}) == 3


def test_images_that_code_makes_are_not_recognized():
    data = FakeData(4)
    assert hash_images(data) is None
    assert hash_images(Part(data, np.arange(2))) is None
