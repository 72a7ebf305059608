# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The fingerprint of a data set: equal for equal data, another one for other data, and quick."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from data_loading import fingerprint as module
from data_loading.files import Names
from data_loading.fingerprint import describe_source, fingerprint
from data_loading.images import Images
from data_loading.index import Listing
from data_loading.mixed import MixedImages
from data_loading.sources import DatasetSpec, open_images
from data_loading.split import split
from tests import tiny


@pytest.fixture
def photos(tmp_path) -> Path:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(path)
    return tmp_path / "photos"


def opened(path: Path, **more) -> Images:
    return open_images("auto", DatasetSpec(str(path), **more), True)


def test_same_images_have_the_same_fingerprint_in_another_place(photos, tmp_path):
    first = fingerprint(opened(photos))
    moved = photos.rename(tmp_path / "elsewhere")
    assert fingerprint(opened(moved)) == first
    assert len(first) == 16
    indexed = opened(moved, data_index=str(tmp_path / "lists"))
    assert fingerprint(indexed) == first  # memory-mapped


@pytest.mark.parametrize("change", ["new", "gone", "renamed", "relabeled", "unlabeled"])
def test_other_data_has_another_fingerprint(photos, change):
    before, more = fingerprint(opened(photos)), {}
    path = photos / "cat" / "1.png"
    if change == "new":
        Image.new("RGB", (4, 4)).save(photos / "dog" / "9.png")
    elif change == "gone":
        path.unlink()
    elif change == "renamed":
        path.rename(photos / "cat" / "7.png")
    elif change == "relabeled":
        path.rename(photos / "dog" / "2.png")
    else:
        more = {"labeled": False}
    assert fingerprint(opened(photos, **more)) != before


def test_sizes_that_an_archive_lists_count(photos, tmp_path):
    marks = []
    for color in ("red", "green"):
        path = tmp_path / f"{color}.zip"
        with zipfile.ZipFile(path, "w") as file:
            for name in ("cat/1.png", "dog/1.png"):
                file.writestr(name, (photos / name).read_bytes() + b"\0" * (color == "green"))
        marks.append(fingerprint(opened(path)))
    assert marks[0] != marks[1]


def test_part_and_mixture_depend_on_what_was_chosen(photos):
    data = opened(photos)
    parts = [fingerprint(split(data, 0.5, train)) for train in (True, False)]
    mixed = [fingerprint(MixedImages([data, data], shares)) for shares in ((1, 1), (1, 2))]
    assert len({fingerprint(data), *parts, *mixed}) == 5
    assert describe_source(split(data, 0.5, True)) == str(photos)
    assert describe_source(MixedImages([data, data])) == f"{photos}, {photos}"


def test_data_sets_without_a_list_are_known_by_length_and_targets():
    spec = DatasetSpec("", input_size=(8, 8))
    digits = [datasets.create_dataset("DIGITS", spec, train) for train in (True, False)]
    marks = {fingerprint(each) for each in (*digits, tiny.Colors(7), tiny.Colors(8))}
    assert len(marks) == 4
    assert fingerprint(tiny.Colors(7)) == fingerprint(tiny.Colors(7))
    assert describe_source(tiny.Colors(7)) == ""


class Names10M:
    """Reads no file: a list of so many images is enough."""

    def __init__(self, listing: Listing) -> None:
        self.listing, self.names = listing, listing.names

    def __len__(self) -> int:
        return len(self.listing)


def many(count: int, changed: int | None = None) -> Images:
    text = np.full((count, 12), ord("a"), np.uint8)
    text[:, -1] = 0
    if changed is not None:
        text[changed, 0] = ord("b")
    targets = np.zeros(count, np.int32)
    names = Names(text.reshape(-1), np.arange(count + 1) * 12)
    facts = {"kind": "class", "classes": ["a"]}
    return Images(Names10M, Listing(names, {"targets": targets}, facts), "many")


def test_ten_million_images_are_not_hashed_as_a_whole(monkeypatch):
    """A start would take longer with each image, which --data_index promises it does not."""
    hashed = []

    class Digest:
        def update(self, data) -> None:
            hashed.append(len(data))

    module._add(Digest(), many(10_000_000))
    assert sum(hashed) < 2 * module.WHOLE + 10_000
    assert max(hashed) <= module.WHOLE


def test_blocks_of_a_large_array_cover_its_ends(monkeypatch):
    monkeypatch.setattr(module, "WHOLE", 100)
    monkeypatch.setattr(module, "BLOCKS", 4)
    monkeypatch.setattr(module, "BLOCK", 12)
    first = fingerprint(many(100))
    assert fingerprint(many(100)) == first
    assert fingerprint(many(100, changed=0)) != first
    assert fingerprint(many(100, changed=99)) != first
    assert fingerprint(many(101)) != first
