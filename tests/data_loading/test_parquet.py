# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parquet and Arrow files as Hugging Face publishes them: splits, columns, names, images."""

import gc
import io
import json
import os
import pickle
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_loading import parquet, parquet_columns
from data_loading.decode import BadImage
from data_loading.parquet import ParquetFiles, holds_files, is_random_access, list_files
from data_loading.parquet_columns import find_image_column, list_columns, read_columns
from errors import UserError

LABEL = {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}
FEATURES = {"image": {"_type": "Image"}, "label": LABEL}
FORMATS = ("parquet", "stream", "file")  # the last two of Arrow

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def structs(contents: Sequence[bytes | None], paths: Sequence[str | None] | None = None) -> Any:
    """The column that `datasets` writes for images."""
    paths = paths or [None] * len(contents)
    rows = [{"bytes": each, "path": path} for each, path in zip(contents, paths, strict=True)]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def save(path: Path, columns: dict[str, Any], features: Any = None, rows: int = 1000) -> str:
    """Write a file as `datasets` does. rows: of a row group, or batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        new = pa.ipc.new_file if path.stem.startswith("file") else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return str(path)


def save_as(form: str, folder: Path, columns: dict[str, Any], **more: Any) -> str:
    names = {"parquet": "a.parquet", "stream": "a.arrow", "file": "file.arrow"}
    return save(folder / names[form], columns, **more)


def open_all(files: Sequence[str], **kwargs: Any) -> ParquetFiles:
    found = read_columns(files, **kwargs)
    return ParquetFiles(files, find_image_column(files).name, found.names, found.places)


def allocated() -> int:
    """Bytes that pyarrow holds, without those of errors that other tests caught."""
    gc.collect()
    return pa.total_allocated_bytes()


def contents(files: ParquetFiles) -> list[bytes]:
    return [files.read(number) for number in range(len(files))]


# --- files of a data set ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (  # push_to_hub
            "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet "
            "data/test-00000-of-00001.parquet data/validation-00000-of-00001.parquet",
            {"train": [0, 1], "test": [2], "val": [3]},
        ),
        ("default/train/0000.parquet default/test/0000.parquet", {"train": [0], "test": [1]}),
        ("train/data-00000.arrow val/data-00000.arrow", {"train": [0], "val": [1]}),  # save_to_disk
        ("x-train.arrow x-dev.arrow cache-0123.arrow", {"train": [0], "val": [1]}),  # its cache
        ("train.parquet valid.parquet readme.md", {"train": [0], "val": [1]}),
        ("latest.parquet retrain.parquet trains/b.parquet", {"": [0, 1, 2]}),  # other words
        ("test/train/a.parquet", {"test": [0]}),
        ("a.PARQUET .b.parquet .git/c.parquet __MACOSX/d.parquet", {"": [0]}),
        ("train.parquet unlabeled.parquet", {"train": [0], "": [1]}),
    ],
)
def test_splits_of_a_folder(tmp_path, names, expected):
    """Images of the test split must not be trained on."""
    names = [tmp_path / name for name in names.split()]
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    found = {split: [str(names[place]) for place in places] for split, places in expected.items()}
    assert list_files(str(tmp_path)) == found


def test_a_file_or_a_pattern(tmp_path, monkeypatch):
    for name in ("train-0.parquet", "train-1.parquet", "test-0.parquet", "b[1].parquet"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert list_files("train-1.parquet") == {"train": ["train-1.parquet"]}
    assert list_files("tr*") == {"train": ["train-0.parquet", "train-1.parquet"]}
    assert set(list_files("*-0.parquet")) == {"train", "test"}
    assert list_files("b[1].parquet") == {"": ["b[1].parquet"]}


def test_a_folder_above_is_no_split(tmp_path):
    """The user's own folders may have any names: /data/train/food/data/test-0.parquet."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.parquet").touch()
    assert set(list_files(str(tmp_path / "train"))) == {""}


def test_links_are_followed_once(tmp_path):
    """The cache of the hub consists of links; a link to a folder above would never end."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").touch()
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train-0.parquet").symlink_to(tmp_path / "blobs" / "0123")
    (tmp_path / "set" / "data" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "more.parquet").touch()
    assert list_files(str(tmp_path / "set")) == {
        "train": [str(tmp_path / "set" / "data" / "train-0.parquet")],
        "": [str(tmp_path / "set" / "more.parquet")],
    }


def test_state_of_save_to_disk_names_the_files(tmp_path):
    """An interrupted save leaves files of an earlier one."""
    for number in range(2):
        (tmp_path / f"data-0000{number}-of-00001.arrow").touch()
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert list_files(str(tmp_path)) == {"": [str(tmp_path / "data-00000-of-00001.arrow")]}
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="a selection of rows"):
        list_files(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a.parquet", True),
        ("preview.png readme.md data/train-0.parquet", True),
        ("default/train/0000.arrow", True),
        (".git/a.parquet ant/1.jpg bee/1.jpg", False),
        ("metadata.parquet 1.jpg 2.jpg", False),
        ("readme.md", False),
        ("more", False),
    ],
)
def test_folder_of_parquet_is_recognized(tmp_path, names, expected):
    """A folder of images must not be taken for one because a program left a table in it."""
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert holds_files(str(tmp_path)) is expected


def test_many_class_folders_are_not_searched_for_parquet(tmp_path, monkeypatch):
    """Listing ImageNet twice would double the time of a start."""
    for number in range(100):
        (tmp_path / f"{number:03d}").mkdir()
    scanned, real = [], parquet.scan
    monkeypatch.setattr(parquet, "scan", lambda folder: scanned.append(folder) or real(folder))
    assert not holds_files(str(tmp_path))
    assert len(scanned) == parquet.LOOKED_AT < 50


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("a.txt", "no such .parquet or .arrow files"),
        ("train-0.parquet train-0.arrow", "both .parquet and .arrow"),
        ("a/train-0.parquet b/train-0.parquet", r"2 data sets.*pattern such as '.*/b/\*'"),
    ],
)
def test_refused_folders(tmp_path, names, problem):
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=problem):
        list_files(str(tmp_path))


# --- images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
def test_bytes_labels_and_names(tmp_path, form, kind):
    """Rows of several files and row groups must not be mixed up."""
    images = [[jpeg(10 * file + row) for row in range(5)] for file in range(2)]
    kinds = {
        "struct": structs,
        "binary": pa.array,
        "large": partial(pa.array, type=pa.large_binary()),
    }
    files = [
        save_as(form, tmp_path / str(file), rows=2, columns={
            "label": [file] * 5, "image": kinds[kind](images[file]),
        }, features={"image": {"_type": "Image" if kind == "struct" else "Value"}, "label": LABEL})
        for file in range(2)
    ]  # fmt: skip
    found = read_columns(files)
    assert found.columns["label"].tolist() == [0] * 5 + [1] * 5
    assert found.class_names == {"label": LABEL["names"]}
    stem = Path(files[0]).stem
    expected = [f"{file}/{stem}/{row:08d}.jpg" for file in range(2) for row in range(5)]
    assert [*found.names] == expected == sorted(expected)
    assert [array.dtype for array in found.places.values()] == [np.uint32] * 3
    data = ParquetFiles(files, "image", found.names, found.places)
    assert contents(data) == images[0] + images[1]
    assert is_random_access(files) == (form != "parquet")


def test_images_in_another_order(tmp_path):
    file = save(tmp_path / "a.parquet", {"img": structs([jpeg(n) for n in range(5)])}, rows=2)
    found, order = read_columns([file]), np.array([4, 0, 3])
    places = {name: array[order] for name, array in found.places.items()}
    data = ParquetFiles([file], "img", found.names.take(order), places)
    assert contents(data) == [jpeg(4), jpeg(0), jpeg(3)]
    assert [*data.names] == [f"a/0000000{n}.jpg" for n in (4, 0, 3)]
    assert data.locate(0) == f"{file}, row 4"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["cat/1.png", "ant/1.png"], ["cat/1.png", "ant/1.png"]),
        (["1.PNG", "1.PNG"], ["a/00000000.png", "a/00000001.png"]),  # of two classes
        (["1.png", None], ["a/00000000.png", "a/00000001.jpg"]),
        (["1.png", ""], ["a/00000000.png", "a/00000001.jpg"]),
        (["1.png", "2\0.exe"], ["a/00000000.png", "a/00000001.jpg"]),
        (["ü.png", "a b/2"], ["ü.png", "a b/2"]),
    ],
)
@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_names(tmp_path, paths, names, end):
    """Names order the samples; equal ones would make the order depend on how files are split."""
    file = save(tmp_path / f"a.{end}", {"image": structs([b"0", b"1"], paths)}, rows=1)
    assert [*read_columns([file]).names] == names


def test_names_are_unique_over_all_files(tmp_path):
    files = [
        save(tmp_path / f"{name}.parquet", {"image": structs([b"0"], ["1.jpg"])}) for name in "ab"
    ]
    assert [*read_columns(files).names] == ["a/00000000.jpg", "b/00000000.jpg"]
    assert [*read_columns(files[:1]).names] == ["1.jpg"]


def test_reading_columns_reads_no_images(tmp_path, monkeypatch):
    """The list of a terabyte of images would take hours."""
    images = [os.urandom(10_000) for _ in range(40)]
    columns = {"image": structs(images, [f"{n}.jpg" for n in range(40)]), "label": [*range(40)]}
    file = save(tmp_path / "a.parquet", columns, rows=20)
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    real = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda path: real(Counting(path)))
    found = read_columns([file])
    assert len(found.names) == 40
    assert 0 < sum(read) < 200_000  # the footer is read as 64 kB
    assert min(read) > 0
    sum_before = sum(read)
    ParquetFiles([file], "image", found.names, found.places).read(0)
    assert sum(read) - sum_before > 200_000  # of a row group: the measure works


def test_arrow_is_not_copied_into_memory(tmp_path):
    file = save(tmp_path / "a.arrow", {"image": structs([os.urandom(10_000)] * 100)}, rows=10)
    before = allocated()
    data = open_all([file])
    assert len(data.read(99)) == 10_000
    assert allocated() - before < 100_000


def test_few_row_groups_stay_in_memory(tmp_path):
    """A worker process would end with all images of the data set in memory."""
    images = [os.urandom(10_000) for _ in range(100)]
    data = open_all([save(tmp_path / "a.parquet", {"image": structs(images)}, rows=10)])
    before = allocated()
    assert contents(data) == images
    kept = allocated() - before
    assert 90_000 < kept < 2.5 * 100_000


def test_row_group_is_decoded_once_for_reads_in_order(tmp_path, monkeypatch):
    """Every image would take as long as a row group of them."""
    file = save(tmp_path / "a.parquet", {"image": structs([jpeg(n) for n in range(9)])}, rows=3)
    data, decoded, real = open_all([file]), [], parquet.ParquetFile.images

    def images(self, column, group):
        decoded.append(group)
        return real(self, column, group)

    monkeypatch.setattr(parquet.ParquetFile, "images", images)
    contents(data)
    assert decoded == [0, 1, 2]
    assert [data.read(number) for number in (8, 3)] == [jpeg(8), jpeg(3)]  # of the last two
    assert decoded == [0, 1, 2]
    assert [data.read(number) for number in (0, 3, 8)] == [jpeg(0), jpeg(3), jpeg(8)]
    assert decoded == [0, 1, 2, 0, 2]


@pytest.mark.parametrize("form", FORMATS)
def test_threads_read_the_same(tmp_path, form):
    images = [jpeg(number) for number in range(40)]
    data = open_all([save_as(form, tmp_path, {"image": structs(images)}, rows=4)])
    results: dict[int, bytes] = {}

    def read(first: int) -> None:
        for number in range(40):
            place = (7 * number + first) % 40
            results[100 * first + place] = data.read(place)

    threads = [threading.Thread(target=read, args=[first]) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    assert all(results[key] == images[key % 100] for key in results)


@pytest.mark.parametrize("form", FORMATS)
def test_forked_process_reads_although_a_thread_held_the_lock(tmp_path, form):
    """A worker would wait forever for a lock that nobody in its process holds."""
    data = open_all([save_as(form, tmp_path, {"image": structs([jpeg(0), jpeg(1)])})])
    data.read(0)
    with data._cache.lock:
        child = os.fork()
        if not child:
            code = 1
            signal.alarm(20)  # ends it if it waits
            try:
                code = int(data.read(1) != jpeg(1))
            finally:
                os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("form", FORMATS)
def test_pickled_without_open_files(tmp_path, form):
    """Spawned workers get a copy of it."""
    data = open_all([save_as(form, tmp_path, {"image": structs([os.urandom(10_000)] * 10)})])
    data.read(0)
    sent = pickle.dumps(data)
    assert len(sent) < 5_000
    assert contents(pickle.loads(sent)) == contents(data)


def test_row_without_an_image_is_a_bad_image(tmp_path):
    """--on_bad_image skip has to skip it."""
    data = open_all([save(tmp_path / "a.parquet", {"image": structs([b"0", None])})])
    with pytest.raises(BadImage, match="holds no image"):
        data.read(1)


def test_files_that_changed_after_they_were_listed(tmp_path):
    data = open_all([save(tmp_path / "a.parquet", {"image": structs([b"0"] * 6)}, rows=2)])
    save(tmp_path / "a.parquet", {"image": structs([b"1"])})
    with pytest.raises(UserError, match="has changed"):
        data.read(5)
    with pytest.raises(UserError, match="has changed"):
        data.read(1)
    (tmp_path / "a.parquet").unlink()
    data = pickle.loads(pickle.dumps(data))
    with pytest.raises(UserError, match="no such file"):
        data.read(0)


# --- images outside the files ------------------------------------------------------------------


@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_images_next_to_the_file(tmp_path, end):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.jpg").write_bytes(b"one")
    inside = tmp_path / "train" / "cat" / "1.jpg"
    (tmp_path / "secret").write_bytes(b"secret")
    paths = ["cat/1.jpg", str(inside), "x/../cat/1.jpg", "cat/2.jpg"]
    outside = ["../secret", str(tmp_path / "secret"), "cat/../../secret", "/etc/passwd", "a\0b"]
    images = structs([None] * 9, paths + outside)
    data = open_all([save(tmp_path / "train" / f"a.{end}", {"image": images})])
    assert [data.read(number) for number in range(3)] == [b"one"] * 3
    with pytest.raises(BadImage, match=r"cat/2\.jpg does not exist"):
        data.read(3)
    for number in range(4, 9):
        with pytest.raises(BadImage, match="outside the folder of") as caught:
            data.read(number)
        assert "push_to_hub" in caught.value.remedy


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (["/home/me/1.jpg", "../2.jpg"], "are outside its folder"),
        (["1.jpg", "2.jpg"], r"do not exist \(1.jpg, 2.jpg\)"),
        ([None, None], "neither bytes nor a path"),
    ],
)
@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_no_image_in_the_file_or_next_to_it(tmp_path, paths, problem, end):
    """A data set that was saved without its images fails before training."""
    file = save(tmp_path / f"a.{end}", {"image": structs([None] * 2, paths)})
    with pytest.raises(UserError, match=problem):
        read_columns([file])


# --- columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_columns(tmp_path, form):
    """Cells that become other values would be other labels."""
    columns = {
        "image": structs([b"0", b"1", b"2"]),
        "small": pa.array([1, 2, 3], pa.int8()),
        "large": pa.array([0, 1, 2**64 - 1], pa.uint64()),
        "some": [7, None, 9],
        "half": pa.array([0.5, 1, 2], pa.float32()),
        "number": [0.1, None, float("inf")],
        "decimal": pa.array([1, 2, 3]).cast(pa.decimal128(21, 2)),
        "flag": [True, False, True],
        "flags": [True, None, False],
        "text": ["b", None, " a"],
        "category": pa.array(["x", "y", "x"]).dictionary_encode(),
        "day": pa.array([0, 1, 365], pa.date32()),
        "none": pa.nulls(3),
        "tags": [["a", "b"], [], None],
        "fixed": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2)),
        "boxes": [[[1.0]], [], []],
        "object": [{"a": 1}] * 3,
        "mask": structs([b"3"] * 3),
    }
    file = save_as(form, tmp_path, columns, features=FEATURES, rows=2)
    found = read_columns([file]).columns
    assert [*found] == list_columns([file]) == [*columns][1:-3]
    arrays = {name: found.pop(name) for name in ("small", "half", "number", "decimal", "flag")}
    assert {name: array.dtype.kind for name, array in arrays.items()} == {
        "small": "i", "half": "f", "number": "f", "decimal": "f", "flag": "b",
    }  # fmt: skip
    assert arrays["small"].tolist() == arrays["decimal"].tolist() == [1, 2, 3]
    assert arrays["half"].tolist() == [0.5, 1, 2]
    np.testing.assert_equal(arrays["number"], [0.1, np.nan, np.inf])
    assert arrays["flag"].tolist() == [True, False, True]
    assert found == {
        "large": ["0", "1", "18446744073709551615"],
        "some": ["7", "", "9"],  # not floats
        "flags": ["true", "", "false"],
        "text": ["b", "", " a"],
        "category": ["x", "y", "x"],
        "day": ["1970-01-01", "1970-01-02", "1971-01-01"],
        "none": ["", "", ""],
        "tags": ["a|b", "", ""],
        "fixed": ["1|2", "3|4", "5|6"],
    }


@pytest.mark.skipif(not hasattr(pa, "binary_view"), reason="pyarrow is older")
@pytest.mark.parametrize("form", FORMATS)
def test_views(tmp_path, form):
    """Some programs write texts and bytes as views, a type of its own."""
    views = pa.array([b"0" * 20, b"1"]).cast(pa.binary_view())
    texts = pa.array(["a", "b" * 20]).cast(pa.string_view())
    image = pa.StructArray.from_arrays([views, texts], ["bytes", "path"])
    file = save_as(form, tmp_path, {"image": image, "label": texts})
    found = read_columns([file])
    assert [*found.names] == found.columns["label"] == ["a", "b" * 20]
    assert contents(ParquetFiles([file], "image", found.names, found.places)) == [b"0" * 20, b"1"]


def test_cells_of_several_files(tmp_path):
    """Some files may lack values that others have; one may be empty."""
    cells = [{"n": [1], "f": [True]}, {"n": [None], "f": [None]}, {"n": [2], "f": [False]}]
    cells[1] = {"n": pa.array([None], pa.int64()), "f": pa.array([None], pa.bool_())}
    files = [
        save(tmp_path / f"{n}.parquet", {"image": structs([b"0"]), **each})
        for n, each in enumerate(cells)
    ]
    empty = pq.read_table(files[0]).slice(0, 0)
    pq.write_table(empty, tmp_path / "3.parquet")
    found = read_columns([*files, str(tmp_path / "3.parquet")])
    assert found.columns == {"n": ["1", "", "2"], "f": ["true", "", "false"]}
    found = read_columns([files[2], str(tmp_path / "3.parquet"), files[0]])
    assert found.columns["n"].tolist() == [2, 1]
    assert found.places["file"].tolist() == [0, 2]


def test_names_with_a_dot(tmp_path):
    """pyarrow takes `image.path` for a field of `image` too."""
    columns = {"image.path": ["x"], "image": [b"0"], "a.b": [1]}
    file = save(tmp_path / "a.parquet", columns)
    found = read_columns([file])
    assert (found.columns["image.path"], found.columns["a.b"].tolist()) == (["x"], [1])
    assert ParquetFiles([file], "image", found.names, found.places).read(0) == b"0"


def test_wanted_columns(tmp_path):
    file = save(tmp_path / "a.parquet", {"image": structs([b"0"]), "a": [1], "b": [["|"]]})
    assert [*read_columns([file], wanted=["a"]).columns] == ["a"]
    assert read_columns([file], wanted=[]).columns == {}
    with pytest.raises(UserError, match=r"column b: .*a list without \|"):
        read_columns([file], wanted=["b"])
    with pytest.raises(UserError, match="column image has type struct"):
        read_columns([file], wanted=["image"])


SEQUENCES = [
    {"feature": LABEL, "length": -1, "_type": "Sequence"},
    {"feature": LABEL, "_type": "List"},
    [LABEL],
]


@pytest.mark.parametrize("about", SEQUENCES)
def test_names_of_classes_in_lists(tmp_path, about):
    columns = {"image": structs([b"0"] * 2), "labels": [[0, 2], [1]]}
    file = save(tmp_path / "a.parquet", columns, features={"labels": about})
    found = read_columns([file])
    assert found.columns["labels"] == ["0|2", "1"]
    assert found.class_names == {"labels": ["ant", "bee", "cat"]}


def test_class_names_of_save_to_disk(tmp_path):
    file = save(tmp_path / "train" / "a.arrow", {"image": structs([b"0"]), "label": [2]})
    (tmp_path / "train" / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    assert read_columns([file]).class_names == {"label": ["ant", "bee", "cat"]}
    (tmp_path / "train" / "dataset_info.json").write_text('{"features": ')
    with pytest.raises(UserError, match=r"cannot read .*dataset_info\.json"):
        read_columns([file])


@pytest.mark.parametrize("labels", [["2"], [None, 1]])
def test_class_names_are_of_numbers_alone(tmp_path, labels):
    """They name the places in a head, which text is not."""
    columns = {"image": structs([b"0"] * len(labels)), "label": labels}
    found = read_columns([save(tmp_path / "a.parquet", columns, features=FEATURES)])
    assert found.class_names == {}
    assert found.columns["label"] in (["2"], ["", "1"])


@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_table_of_paths(tmp_path, end):
    columns = {"label": ["a", "b"], "file_name": ["1.jpg", None]}
    file = save(tmp_path / f"a.{end}", columns)
    assert find_image_column([file]) == ("file_name", "path")
    found = read_columns([file], wanted=["label"])
    assert (len(found.names), found.places) == (0, {})
    assert found.columns == {"label": ["a", "b"], "file_name": ["1.jpg", ""]}


@pytest.mark.parametrize(
    ("columns", "features", "expected"),
    [
        ({"mask": "struct", "image": "struct"}, {}, "image"),
        ({"a": "struct"}, {}, "a"),
        ({"JPG": "binary", "other": "binary"}, {}, "JPG"),
        ({"sound": "struct", "scan": "struct"}, {"sound": {"_type": "Audio"}}, "scan"),
        ({"code": "binary", "scan": "struct"}, {"scan": {"_type": "Image"}}, "scan"),
        ({"image": "text", "raw": "binary"}, {}, "raw"),
        ({"text": "text", "path": "text"}, {}, "path"),
    ],
)
def test_column_of_images(tmp_path, columns, features, expected):
    kinds = {"struct": structs([b"0"]), "binary": [b"0"], "text": ["0"]}
    columns = {name: kinds[kind] for name, kind in columns.items()}
    file = save(tmp_path / "a.parquet", columns, features)
    assert find_image_column([file]).name == expected
    assert all(find_image_column([file], name).name == name for name in columns)


@pytest.mark.parametrize(
    ("columns", "given", "problem"),
    [
        ({"a": [b"0"], "b": [b"0"]}, None, "images may be in a, b; give --image_column"),
        ({"a": [1], "c": ["x"]}, None, r"no column holds images; .* a \(int64\), c \(string\)"),
        ({"image": [b"0"], "a": [1]}, "a", "--image_column a: its type is int64; expected bytes"),
        ({"image": [b"0"]}, "imgae", "--image_column: .* Did you mean 'image'"),
        ({"image": [[b"0"]]}, None, r"no column holds images; .* image \(list<"),
    ],
)
def test_unclear_column_of_images(tmp_path, columns, given, problem):
    with pytest.raises(UserError, match=problem):
        read_columns([save(tmp_path / "a.parquet", columns)], given)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"image": [b"0"]}, r"b\.parquet has no column label, but .*a\.parquet has"),
        ({"image": [b"0"], "label": ["x"]}, r"label has type string, but in .* type int64"),
        ({"image": structs([b"0"]), "label": [1]}, "column image has type struct"),
    ],
)
def test_files_of_different_data_sets(tmp_path, other, problem):
    """pandas writes integers with gaps as floats, so that labels of one file become 1.0."""
    first = save(tmp_path / "a.parquet", {"image": [b"0"], "label": [1]})
    with pytest.raises(UserError, match=problem):
        read_columns([first, save(tmp_path / "b.parquet", other)])


def test_class_names_that_differ_or_are_equal(tmp_path):
    columns, other = {"image": [b"0"], "label": [1]}, {**LABEL, "names": ["bee", "ant", "cat"]}
    first = save(tmp_path / "a.parquet", columns, {"label": LABEL})
    with pytest.raises(UserError, match=r"b\.parquet and .*a\.parquet have other class names"):
        read_columns([first, save(tmp_path / "b.parquet", columns, {"label": other})])
    other["names"][0] = "ant"
    with pytest.raises(UserError, match="column label has two classes named 'ant'"):
        read_columns([save(tmp_path / "b.parquet", columns, {"label": other})])


@pytest.mark.parametrize("form", FORMATS)
def test_file_cut_short(tmp_path, form):
    """An interrupted download of a stream would lose images without notice."""
    images = structs([os.urandom(1000) for _ in range(6)])
    path = Path(save_as(form, tmp_path, {"image": images, "label": [1] * 6}, rows=2))
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 8, len(whole) // 2, 20, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cannot read .*copy it again"):
            read_columns([str(path)])


@pytest.mark.parametrize("make", [structs, pa.array])
def test_damaged_arrow_file(tmp_path, make):
    """Arrow does not check where images begin: the process would end without a message."""
    file = Path(save(tmp_path / "a.arrow", {"image": make([bytes([n]) * 99 for n in range(9)])}))
    content = file.read_bytes()
    starts = np.arange(10, dtype=np.int32) * 99
    assert content.count(starts.tobytes()) == 1
    file.write_bytes(content.replace(starts.tobytes(), (starts * 10**6).tobytes()))
    with pytest.raises(UserError, match=r"cannot read .*a\.arrow: .* is damaged"):
        read_columns([str(file)])


def test_damaged_images_are_found_when_they_are_read(tmp_path):
    file = Path(save(tmp_path / "a.parquet", {"image": structs([os.urandom(999)] * 9)}))
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    data = open_all([str(file)])
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: .* is damaged"):
        data.read(0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull gets it"),
        (b"<!doctype html><html>", "HTML page"),
        (b"\x00\x01\x02" * 20, "it begins with b'"),
    ],
)
@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_other_files_with_that_name(tmp_path, content, problem, end):
    (tmp_path / f"a.{end}").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read_columns([str(tmp_path / f"a.{end}")])


@pytest.mark.parametrize("form", FORMATS)
def test_no_rows(tmp_path, form):
    with pytest.raises(UserError, match="no rows; expected one for each image"):
        read_columns([save_as(form, tmp_path, {"image": structs([])})])


@pytest.mark.parametrize("stem", ["a", "file"])
def test_compressed_arrow_is_refused(tmp_path, stem):
    """Each process would unpack all images into memory."""
    table = pa.table({"image": structs([bytes(10_000)] * 9)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    new = pa.ipc.new_file if stem == "file" else pa.ipc.new_stream
    with new(str(tmp_path / "a.arrow"), table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="is compressed"):
        read_columns([str(tmp_path / "a.arrow")])


@pytest.mark.parametrize("make", [structs, pa.array])
def test_row_group_that_does_not_fit_into_memory(tmp_path, monkeypatch, make):
    """The machine would end the workers without a message."""
    file = save(tmp_path / "a.parquet", {"image": make([os.urandom(1000)] * 9 + [jpeg(1)])})
    monkeypatch.setattr(parquet, "MAX_GROUP", 1000)
    with pytest.raises(UserError, match="a row group holds .*row_group_size=1000"):
        read_columns([file])


def test_without_pyarrow(monkeypatch):
    """pyarrow is an optional extra; importing the module needs none."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    module = runpy.run_path(parquet.__file__)
    with pytest.raises(UserError, match=r"need pyarrow 14\.0\.1 .*pip install -U pyarrow; "):
        module["import_pyarrow"]()


def test_old_pyarrow_is_refused(monkeypatch):
    """Before 14.0.1 an Arrow file could run code."""
    parquet.import_pyarrow.cache_clear()
    monkeypatch.setattr(pa, "__version__", "14.0.0")
    with pytest.raises(UserError, match="this is 14.0.0"):
        parquet.import_pyarrow()
    monkeypatch.setattr(pa, "__version__", "26.1.0.dev1+g0123")
    assert parquet_columns.import_pyarrow() is pa
