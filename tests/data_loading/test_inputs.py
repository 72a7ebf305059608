# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images that a command names: patterns, files and sources, in their order."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from data_loading.arrange import DatasetSpec
from data_loading.inputs import Inputs, image_files, in_input_order
from data_loading.mixed import refuse_overwriting
from errors import UserError

UNLABELED = Inputs(DatasetSpec(labeled=False, shuffled=False), "image_folder")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/1.png", "a/3.png", "a/x/4.png", "odd[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    Path("b/notes.txt").write_text("no table")
    return tmp_path


def names(*paths: str) -> list[str]:
    return [path for path, _ in in_input_order(UNLABELED.open(paths)).samples]


def test_patterns_are_sorted_and_leave_out_other_files():
    assert names("b/*") == ["b/1.png", "b/2.png"]
    assert names("a/**/*.png", "b/2.png") == ["a/3.png", "a/x/4.png", "b/2.png"]
    assert names("[ab]/[13].png") == ["a/3.png", "b/1.png"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file():
    assert names("odd[1].png") == ["odd[1].png"]


def test_inputs_stay_in_order():
    assert names("b/2.png", "a", "b/1.png") == ["b/2.png", "a/3.png", "a/x/4.png", "b/1.png"]


def test_files_in_a_row_are_one_part():
    """A data set for each of millions of files would take gigabytes."""
    data = UNLABELED.open(["b/2.png", "b/1.png", "a", "a/3.png"])
    assert [len(part) for part in data.parts] == [2, 2, 1]


def test_rows_of_a_table_keep_their_order():
    Path("rows.csv").write_text("image\nb/2.png\na/3.png\nb/1.png\n")
    assert names("rows.csv") == ["b/2.png", "a/3.png", "b/1.png"]
    assert names("a", "rows.csv") == ["a/3.png", "a/x/4.png", "b/2.png", "a/3.png", "b/1.png"]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("b", "b/2.png"),
        ("b/*", "b/1.png"),
        ("a", "a/x/4.png"),
        ("rows.csv", "rows.csv"),
        ("row?.csv", "rows.csv"),
        ("rows.csv", "b/2.png"),
        ("tars", "tars/b.tar"),
        ("tars/{a,b}.tar", "tars/a.tar"),
        ("b.zip", "b.zip"),
    ],
)
def test_files_that_are_read_are_not_overwritten(given, path):
    """Shards, and tables named by a pattern, were replaced by predictions."""
    Path("rows.csv").write_text("image\nb/2.png\n")
    Path("tars").mkdir()
    for name in "ab":
        with tarfile.open(f"tars/{name}.tar", "w") as file:
            file.add("b/1.png", f"{name}/1.png")
    with zipfile.ZipFile("b.zip", "w") as file:
        file.write("b/1.png")
    data = in_input_order(UNLABELED.open([given]))
    with pytest.raises(UserError, match=f"--output would overwrite {path}, an input; give another"):
        refuse_overwriting([Path("new.csv"), Path(path)], data)
    shutil.copy("b/1.png", "own.png")
    refuse_overwriting([Path("own.png"), Path("b/notes.txt"), Path("tars")], data)


def test_a_checkpoint_is_not_overwritten():
    data = UNLABELED.open(["b"])
    refuse_overwriting([Path("a/3.png")], data, "a")  # a run
    with pytest.raises(UserError, match="would overwrite a/3.png"):
        refuse_overwriting([Path("a/3.png")], data, "a/../a/3.png")


def test_paths_that_nobody_has_looked_at_can_be_missing():
    data = image_files(["b/1.png", "none.png"])
    assert data[0][0].size == (8, 8)
    with pytest.raises(FileNotFoundError):
        data[1]


def test_what_cannot_be_opened_is_named_as_it_was_given():
    for path, message in {
        "c/*.png": r"--images c/\*.png: no file matches this pattern",
        "none": "--images none: no such file or folder",
    }.items():
        with pytest.raises(UserError, match=message):
            names(path)
    labeled = Inputs(DatasetSpec(shuffled=False), "image_folder", flag="INPUT")
    with pytest.raises(UserError, match="INPUT b/1.png has no labels; give a table or class fol"):
        labeled.open(["b/1.png"])
