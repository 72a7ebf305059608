# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""WebDataset shards: which member is the image of a sample, and columns from its label files."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_loading.tar import TarFiles, list_tar
from errors import UserError


def write(path: Path, files: dict[str, object]) -> str:
    """Write a tar file; dicts become JSON, other values text."""
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            if not isinstance(content, bytes):
                text = json.dumps(content) if name.endswith(".json") else str(content)
                content = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return str(path)


def columns(tmp_path: Path, files: dict[str, object], *wanted: str) -> dict:
    return list_tar([write(tmp_path / "a.tar", files)], True, wanted or None).columns


def names(tmp_path: Path, *files: str) -> tuple[list[str], dict[str, int]]:
    found = list_tar([write(tmp_path / "a.tar", dict.fromkeys(files, 1))], False)
    return list(found.names), dict(found.left_out)


def test_image_of_a_sample_is_the_one_whose_extension_follows_the_key(tmp_path):
    found, left_out = names(tmp_path, "0.seg.png", "0.jpg", "0.cls", "a.b/1.jpg", "a.b/1.depth.png")
    assert found == ["0.jpg", "a.b/1.jpg"]
    assert left_out == {".seg.png": 1, ".depth.png": 1}


def test_names_with_dots_are_images_where_no_labels_are(tmp_path):
    """`n01440764_10026.5.jpg` would have the key n01440764_10026 in a WebDataset."""
    files = ["n01440764/n01440764_10026.5.jpg", "n01440764/n01440764_10026.6.jpg", "0.seg.png"]
    assert names(tmp_path, *files) == (files, {})


def test_notes_of_no_image_make_no_webdataset(tmp_path):
    found, left_out = names(tmp_path, "readme.txt", "labels.json", "a.1.jpg", "b.jpg")
    assert found == ["a.1.jpg", "b.jpg"]
    assert left_out == {".txt": 1, ".json": 1}


def test_label_files_of_images_are_not_counted_as_left_out(tmp_path):
    files = ["0.jpg", "0.cls", "0.json", "0.txt", "1.cls", "1.npz"]
    assert names(tmp_path, *files) == (["0.jpg"], {".cls": 1, ".npz": 1})


def test_labels_in_one_shard_make_all_shards_a_webdataset(tmp_path):
    first = write(tmp_path / "a.tar", {"0.jpg": "", "0.cls": 1})
    second = write(tmp_path / "b.tar", {"0.jpg": "b", "0.seg.png": ""})
    found = list_tar([first, second], False)
    assert list(found.names) == ["0.jpg", "0.jpg"]
    assert found.left_out == {".seg.png": 1}
    assert TarFiles([first, second], found.names, found.places).read(1) == b"b"
    with pytest.raises(UserError, match=r"1 of 2 images have no .cls file: \S*b.tar/0;"):
        list_tar([first, second], True)


def test_two_images_of_one_sample_are_refused(tmp_path):
    """One of them is a mask, perhaps; taking both would train on it."""
    files = {f"{n}.{end}": 1 for n in range(7) for end in ("jpg", "png", "cls")}
    with pytest.raises(UserError, match=r"7 samples with several images: \S*/0, .* and 2 more"):
        columns(tmp_path, files)


def test_columns_of_all_kinds(tmp_path):
    record = {"n": 3, "x": 1.5, "name": "cat", "ok": True, "tags": ["a", "b"], "box": [1, 2.5]}
    nested = {"deep": {"a": 1}, "pairs": [[1, 2]], "nothing": None, "none": []}
    files = {"0.jpg": "", "0.json": record | nested, "0.cls": "7\n", "0.txt": "\ufeffA cat.\n"}
    files |= {"1.jpg": "", "1.json": record | nested | {"n": -4, "x": 2}, "1.cls": 8, "1.txt": "ä"}
    found = columns(tmp_path, files)
    assert list(found) == ["cls", "box", "n", "name", "none", "ok", "tags", "x", "txt"]
    for name, dtype, values in [
        ("cls", np.int64, [7, 8]),
        ("n", np.int64, [3, -4]),
        ("x", np.float64, [1.5, 2.0]),
        ("ok", np.bool_, [True, True]),
    ]:
        assert found[name].dtype == dtype
        assert found[name].tolist() == values
    assert found["name"] == ["cat", "cat"]
    assert found["tags"] == ["a|b", "a|b"]
    assert found["box"] == ["1|2.5", "1|2.5"]
    assert found["none"] == ["", ""]
    assert found["txt"] == ["A cat.", "ä"]


def test_columns_are_in_the_order_of_the_images(tmp_path):
    """Also where the labels are elsewhere in the shard, and in several shards."""
    random = np.random.default_rng(0)
    paths, expected = [], []
    for shard in range(3):
        numbers = random.permutation(20)
        files = {f"{n}.cls": int(n + 100 * shard) for n in random.permutation(20)}
        files |= {f"{n}.jpg": "" for n in numbers}
        expected += [int(n + 100 * shard) for n in numbers]
        paths.append(write(tmp_path / f"{shard}.tar", files))
    assert list_tar(paths, True).columns["cls"].tolist() == expected


def test_names_of_classes_as_text(tmp_path):
    files = {"0.jpg": "", "0.cls": "dog", "1.jpg": "", "1.cls": "great white shark\n"}
    assert columns(tmp_path, files) == {"cls": ["dog", "great white shark"]}


def test_labels_are_not_read_if_they_are_not_needed(tmp_path):
    path = write(tmp_path / "a.tar", {"0.jpg": "", "0.cls": b"\xff", "1.jpg": ""})
    found = list_tar([path], False)
    assert found.columns == {}
    assert len(found.names) == 2


def test_last_of_equal_label_files_counts(tmp_path):
    path = write(tmp_path / "a.tar", {"0.jpg": "", "0.cls": 1})
    with tarfile.open(path, "a") as file:
        member = tarfile.TarInfo("./0.cls")
        member.size = 1
        file.addfile(member, io.BytesIO(b"2"))
    assert list_tar([path], True).columns["cls"].tolist() == [2]


def test_missing_files_are_counted_and_named(tmp_path):
    files = {f"{n}.jpg": "" for n in range(10)} | {"3.cls": 1}
    with pytest.raises(UserError, match=r"9 of 10 images have no .cls file: .*/5 and 4 more"):
        columns(tmp_path, files)


def test_missing_entries_are_counted_and_named(tmp_path):
    files = {f"{n}.jpg": "" for n in range(9)} | {f"{n}.json": {"a": n} for n in range(9)}
    files |= {"7.json": {"a": None, "b": 1}}
    with pytest.raises(UserError, match=r"1 of 9 images have no entry a in .*: \S*/7; c"):
        columns(tmp_path, files)
    with pytest.raises(UserError, match="8 of 9 images have no entry b in their .json file"):
        columns(tmp_path, files, "b")


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (3, "cat", r"whole numbers \(3 for \S*/0\).*text \(cat for \S*/1\)"),
        (True, 1, r"true or false \(True for \S*/0\).*whole numbers \(1 for \S*/1\)"),
        ("a", 1.5, r"text \(a for \S*/0\).*numbers \(1.5 for \S*/1\)"),
    ],
)
def test_several_types_in_a_column_are_refused(first, second, found, tmp_path):
    files = {"0.jpg": "", "0.json": {"a": first}, "1.jpg": "", "1.json": {"a": second}}
    with pytest.raises(UserError, match="a of the .json files is of several types") as caught:
        columns(tmp_path, files)
    first_found, second_found = found.split(".*")
    caught.match(first_found)
    caught.match(second_found)


def test_mixed_classes_are_refused(tmp_path):
    files = {"0.jpg": "", "0.cls": "3", "1.jpg": "", "1.cls": "cat"}
    with pytest.raises(UserError, match="cls of the .cls files is of several types"):
        columns(tmp_path, files)


def test_other_columns_than_those_wanted_need_not_be_right(tmp_path):
    files = {"0.jpg": "", "0.json": {"label": 1, "tag_a": 1, "tag_b": 0, "exif": "x"}, "0.txt": "a"}
    files |= {"1.jpg": "", "1.json": {"label": 2, "tag_a": 0, "tag_b": 1, "exif": 3}}
    assert columns(tmp_path, files, "label")["label"].tolist() == [1, 2]
    assert list(columns(tmp_path, files, "tag_*")) == ["tag_a", "tag_b"]
    files["1.json"] = "[broken"
    files["0.cls"], files["1.cls"] = 5, 6
    assert columns(tmp_path, files, "cls")["cls"].tolist() == [5, 6]


def test_column_given_twice_is_refused(tmp_path):
    files = {"0.jpg": "", "0.cls": 1, "0.json": {"cls": 2}}
    with pytest.raises(UserError, match="cls is given twice, by .json and by .cls files"):
        columns(tmp_path, files)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("0.json", b"{", "a.tar/0.json is no JSON: "),
        ("0.json", b"[" * 10**5, "a.tar/0.json is no JSON: "),
        ("0.json", b"[1]", "a.tar/0.json has a list .1., expected an object such as"),
        ("0.json", b"9" * 5000, "a.tar/0.json is no JSON: "),  # more digits than Python takes
        ("0.txt", b"\xff", "a.tar/0.txt is no text in UTF-8: "),
        ("0.cls", b"\xff", "a.tar/0.cls is no text in UTF-8: "),
        ("0.cls", b" \n", "a.tar/0.cls is empty, expected a class"),
        ("0.txt", bytes(2**24 + 1), "a.tar/0.txt has 16777217 bytes, expected at most 16777216"),
    ],
)
def test_label_files_that_cannot_be_understood(name, content, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        columns(tmp_path, {"0.jpg": "", name: content})


def test_numbers_of_more_than_64_bits_become_text(tmp_path):
    files = {"0.jpg": "", "0.json": {"id": 2**64}, "1.jpg": "", "1.json": {"id": 1}}
    assert columns(tmp_path, files)["id"] == [str(2**64), "1"]
