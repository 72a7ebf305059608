# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What --data_path may be: it is recognized, and its images are the same whatever holds them."""

import csv
import io
import json
import os
import pickle
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from config import parser as options
from config.parser import absolute_paths
from config.paths import split_sources
from data_loading.dataset import TransformedDataset
from data_loading.files import Names, sort_by_name
from data_loading.images import Images
from data_loading.sources import DatasetSpec, open_images
from data_loading.split import split
from data_loading.tables import Columns
from datasets import build_weights
from errors import UserError
from training.resume import compare_args

CLASSES = ("ant", "ant-2", "bee")  # "ant-2/1" sorts ahead of "ant/1" as text


def pack_zip(root: Path, archive: Path, names: list[str], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(archive, "w", method) as file:
        for name in names:
            file.write(root / name, name)
    return archive


@pytest.fixture
def photos(tmp_path):
    """Class folders with nested images of different sizes."""
    root = tmp_path / "photos"
    noise = np.random.default_rng(0)
    for name in CLASSES:
        for number in (2, 10, 1):
            path = root / name / ("deep/" * (number == 10)) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = noise.integers(0, 256, (8 + number, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return root


def names_of(root: Path) -> list[str]:
    found = [path.relative_to(root).as_posix() for path in root.rglob("*.png")]
    return sorted(found, reverse=True)  # the order of a file must not matter


def write_table(root: Path, path: Path, prefix: str = "") -> Path:
    with open(path, "w", newline="") as file:
        rows = [(prefix + name, name.split("/")[0]) for name in names_of(root)]
        csv.writer(file).writerows([("image", "label"), *rows])
    return path


def forms(photos: Path, tmp_path: Path) -> dict[str, Path]:
    """Return the same images as a folder, a table and zip files."""
    names = names_of(photos)
    packed = tmp_path / "packed.zip"
    return {
        "folder": photos,
        "table": write_table(photos, photos / "rows.csv"),
        "table elsewhere": write_table(photos, tmp_path / "rows.tsv.csv", "photos/./"),
        "zip": pack_zip(photos, packed, names),
        "packed zip": pack_zip(photos, tmp_path / "b.zip", names, zipfile.ZIP_DEFLATED),
        "zip of a folder": pack_zip(tmp_path, tmp_path / "c.zip", [f"photos/{n}" for n in names]),
    }


def content(data: Images) -> list[tuple]:
    return [(data[i][0].tobytes(), data[i][1]) for i in range(len(data))]


def test_images_are_the_same_whatever_holds_them(photos, tmp_path):
    """Order, labels, classes and the images that --val_split holds out decide the weights."""
    found = {}
    for form, path in forms(photos, tmp_path).items():
        data = open_images("auto", DatasetSpec(str(path)), True)
        held = content_of(split(data, 0.3, train=False), data)
        found[form] = (content(data), list(data.classes), data.kind, held)
    assert len(found["folder"][0]) == 9
    assert found["folder"][1] == ["ant", "ant-2", "bee"]
    for form, data in found.items():
        assert data[:3] == found["folder"][:3], form
        if form != "table elsewhere":  # which has other names
            assert data[3] == found["folder"][3], form


def content_of(part, data: Images) -> list[tuple]:
    return [(data[int(i)][0].tobytes(), data[int(i)][1]) for i in part.indices]


def test_pretraining_has_the_order_of_fine_tuning(photos, tmp_path):
    for path in forms(photos, tmp_path).values():
        labeled, plain = (
            open_images("auto", DatasetSpec(str(path), labeled=labeled), True)
            for labeled in (True, False)
        )
        assert [c[0] for c in content(plain)] == [c[0] for c in content(labeled)]
        assert plain.targets is None
        assert plain.classes is None


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "validation"), ("train", "test")])
@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
def test_parts_are_found_by_their_folders(names, form, photos, tmp_path):
    root = tmp_path / "both"
    for name in names:
        (root / name).mkdir(parents=True)
    (photos / "ant").rename(root / names[0] / "ant")
    (photos / "bee").rename(root / names[1] / "bee")
    path = root
    if form == "zip":
        path = pack_zip(tmp_path, tmp_path / "both.zip", [f"both/{n}" for n in names_of(root)])
    if form == "tar":
        path = tmp_path / "both.tar"
        with tarfile.open(path, "w") as file:
            file.add(root, "both")
    train, val = (open_images("auto", DatasetSpec(str(path)), part) for part in (True, False))
    assert (train.classes, val.classes) == (["ant"], ["bee"])
    assert train.own_split == val.own_split == f"folder {names[1]}/"
    assert list(train.names) == ["ant/1.png", "ant/2.png", "ant/deep/10.png"]
    whole_name = "both/" * (form != "folder") + f"{names[0]}/ant/1.png"  # in messages
    assert train.samples[0][0] == f"{path}/{whole_name}"
    whole = open_images("folder", DatasetSpec(str(path), labeled=False), True)
    assert len(whole) == 6


def test_class_may_be_called_train(photos, tmp_path):
    (photos / "ant").rename(photos / "train")
    pack = pack_zip(photos, tmp_path / "a.zip", names_of(photos))
    for path in (photos, pack):
        assert open_images("auto", DatasetSpec(str(path)), True).classes == [*CLASSES[1:], "train"]


def test_evaluation_is_never_the_training_images(photos, tmp_path):
    for path in forms(photos, tmp_path).values():
        with pytest.raises(UserError, match="which images are for evaluation.*--val_split 0.1"):
            open_images("auto", DatasetSpec(str(path)), False)
        own = open_images("auto", DatasetSpec("/nowhere", str(path)), False)
        assert len(own) == 9


def test_images_without_labels_are_refused_in_fine_tuning(tmp_path):
    root = tmp_path / "flat"
    root.mkdir()
    for number in range(3):
        Image.new("RGB", (4, 4)).save(root / f"{number}.png")
    pack = pack_zip(root, tmp_path / "flat.zip", names_of(root))
    with pytest.raises(UserError, match="flat.zip: 3 images of 3 are in no class folder: 2.png"):
        open_images("auto", DatasetSpec(str(pack)), True)
    with pytest.raises(UserError, match="flat has no class folders; expected one folder of images"):
        open_images("auto", DatasetSpec(str(root)), True)
    for path in (root, pack):
        assert len(open_images("auto", DatasetSpec(str(path), labeled=False), True)) == 3


def test_what_is_no_image_of_a_zip_file_is_left_out(photos, tmp_path):
    archive = pack_zip(photos, tmp_path / "a.zip", names_of(photos))
    with zipfile.ZipFile(archive, "a") as file:
        for name in ("__MACOSX/ant/._1.png", "ant/.hidden.png", "ant/notes.txt", "ant/Thumbs.db"):
            file.writestr(name, b"")
        link = zipfile.ZipInfo("ant/link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
        file.mkdir("empty") if hasattr(file, "mkdir") else file.writestr("empty/", b"")
    data = open_images("auto", DatasetSpec(str(archive)), True)
    assert (len(data), data.classes) == (9, list(CLASSES))
    assert data.describe_list() == (
        "; left out 5 files and folders: 3 hidden or system, 1 .txt, 1 linking to a file"
    )


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_that_was_replaced_counts_once(photos, tmp_path):
    archive = pack_zip(photos, tmp_path / "a.zip", [*names_of(photos), "ant/1.png"])
    with zipfile.ZipFile(archive, "a") as file:
        file.write(photos / "bee" / "2.png", "ant/1.png")
    data = open_images("auto", DatasetSpec(str(archive)), True)
    assert len(data) == 9
    assert data[0][0].size == (9, 10)


BAD_MEMBERS = {
    "outside": ("../a/1.png", "1 member would be outside of the folder"),
    "absolute": ("/a/1.png", "1 member would be outside of the folder"),
}


@pytest.mark.parametrize(("name", "said"), BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_member_cannot_leave_its_folder(name, said, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(UserError, match=said):
        open_images("auto", DatasetSpec(str(tmp_path / "a.zip"), labeled=False), True)


def test_member_cannot_unpack_beyond_its_size(tmp_path):
    """A bomb: its directory says 10 bytes, its content has 100 million."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.png", bytes(10**8))
    whole = path.read_bytes()
    path.write_bytes(whole.replace((10**8).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    data = open_images("auto", DatasetSpec(str(path), labeled=False), True)
    with pytest.raises(UserError, match="damaged in the zip file"):
        data.files.read(0)


def test_damaged_zip_files_are_user_errors(photos, tmp_path):
    archive = pack_zip(photos, tmp_path / "a.zip", names_of(photos))
    whole = archive.read_bytes()
    data = open_images("auto", DatasetSpec(str(archive)), True)
    start = int(data.listing.arrays["header_offset"][4])
    archive.write_bytes(whole[: start + 60] + b"?" + whole[start + 61 :])
    with pytest.raises(UserError, match="damaged in the zip file: its checksum does not fit"):
        data.files.read(4)
    archive.write_bytes(bytes(8) + whole)
    fresh = open_images("auto", DatasetSpec(str(archive)), True)
    assert len(fresh) == 9  # as unzip reads it
    with pytest.raises(UserError, match="has changed since its images were listed"):
        data.files.read(4)
    archive.write_bytes(whole[:-30])
    with pytest.raises(UserError, match="it is no whole zip file; copy or download it again"):
        open_images("auto", DatasetSpec(str(archive)), True)


def test_zip_file_that_changed_needs_a_new_index(photos, tmp_path):
    archive = pack_zip(photos, tmp_path / "a.zip", names_of(photos))
    spec = DatasetSpec(str(archive), data_index=str(tmp_path / "lists"))
    first = open_images("auto", spec, True)
    again = open_images("auto", spec, True)
    assert content(again) == content(first)
    assert isinstance(again.listing.arrays["crc"], np.memmap)
    sent = pickle.dumps(again)
    assert content(pickle.loads(sent)) == content(first)
    pack_zip(photos, archive, names_of(photos)[1:])
    with pytest.raises(UserError, match="a.zip has changed since .*train.index was written"):
        open_images("auto", spec, True)
    table = str(write_table(photos, photos / "rows.csv"))
    with pytest.raises(UserError, match="train.index lists the zip file .*a.zip, not the table"):
        open_images("auto", DatasetSpec(table, data_index=spec.data_index), True)


def test_table_is_listed_once_too(photos, tmp_path, monkeypatch):
    path = write_table(photos, photos / "rows.csv")
    spec = DatasetSpec(str(path), data_index=str(tmp_path / "lists"))
    first = open_images("auto", spec, True)
    monkeypatch.setattr("data_loading.sources.read_table", None)
    again = open_images("auto", spec, True)
    assert content(again) == content(first)
    assert again.line_of(0) == first.line_of(0) == f"line 7 of {path}"
    other = DatasetSpec(str(path), data_index=spec.data_index, columns=Columns(labels=("image",)))
    with pytest.raises(UserError, match="give another --data_index"):
        open_images("auto", other, True)


def test_order_does_not_depend_on_the_order_of_the_source():
    names = [b"b/1", b"a/2", b"a-b/1", b"a/10", b"a", b"a/b/c", b"\xff/1", b"a/2"]
    order = sort_by_name(Names.pack(names))
    assert [names[i] for i in order] == sorted(names, key=lambda name: name.split(b"/"))
    assert list(order).index(1) < list(order).index(7)  # rows of the same image keep their order
    assert sort_by_name(Names.pack(sorted(names, key=lambda name: name.split(b"/")))) is None


def test_names_can_be_chosen_by_place():
    names = Names.pack([b"a", b"bc", os.fsencode("d\udcffé")])
    assert list(names) == ["a", "bc", "d\udcffé"]
    assert list(names.take(np.array([2, 0, 0]))) == ["d\udcffé", "a", "a"]
    assert list(names.take(np.array([], np.int64))) == []


# --- several sources ----------------------------------------------------------------------------


def test_sources_are_joined_by_class_name(photos, tmp_path):
    """Labels of the second source must not be those of the first with the same number."""
    other = tmp_path / "more"
    for name in ("bee", "cat"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(other / name / "1.png")
    pack = pack_zip(other, tmp_path / "more.zip", names_of(other))
    data = open_images("auto", DatasetSpec(f"{photos},{pack}"), True)
    assert data.classes == ["ant", "ant-2", "bee", "cat"]
    assert data.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
    assert [data[i][1] for i in range(11)] == data.targets.tolist()
    assert data[9][0].size == (4, 4)
    assert data.samples[10] == (f"{pack}/cat/1.png", 3)
    assert data.weights is None
    assert "9 images of" in data.describe_list()


def test_weights_are_shares_of_the_draws(photos, tmp_path):
    pack = pack_zip(photos / "bee", tmp_path / "bee.zip", ["1.png", "2.png"])
    spec = DatasetSpec(f"{photos}:0.75,{pack}:0.25", labeled=False)
    data = open_images("auto", spec, True)
    assert data.weights.tolist() == pytest.approx([0.75 / 9] * 9 + [0.125] * 2)
    assert "for 75% of the draws" in data.describe_list()
    assert data.targets is None
    dataset = TransformedDataset(data, lambda image: image, 0)
    assert build_weights(dataset, "shuffle").tolist() == data.weights.tolist()
    with pytest.raises(UserError, match="--sampling balanced and the weights of --data_path"):
        build_weights(dataset, "balanced")


def test_sources_have_an_index_each(photos, tmp_path):
    pack = pack_zip(photos, tmp_path / "a.zip", names_of(photos))
    spec = DatasetSpec(f"{photos},{pack}", data_index=str(tmp_path / "lists"))
    for _ in range(2):
        data = pickle.loads(pickle.dumps(open_images("auto", spec, True)))
        assert content(data)[:9] == content(data)[9:]
    made = {path.name for path in (tmp_path / "lists").iterdir()}
    assert made == {"train-1.index", "train-2.index"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{a}:0.7,{a}", "expected PATH:WEIGHT with a weight above 0"),
        ("{a}:0.7,{a}:x", "got '.*photos:x' in"),
        ("{a}:1,{a}:0", "expected PATH:WEIGHT"),
        ("{a},/nowhere", "--data_path /nowhere: no such file or folder"),
    ],
)
def test_wrong_sources_are_named(text, said, photos):
    with pytest.raises(UserError, match=said):
        open_images("auto", DatasetSpec(text.format(a=photos)), True)


def test_path_with_a_comma_is_one_path(photos):
    moved = photos.rename(photos.with_name("a,b:1"))
    assert len(open_images("auto", DatasetSpec(str(moved)), True)) == 9
    assert split_sources("x-{a,b}.tar,y") == [("x-{a,b}.tar", None), ("y", None)]


def test_stored_flags_can_be_used_from_any_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, expected in {
        "photos": f"{tmp_path}/photos",
        "photos:0.5,rows.csv:0.125": f"{tmp_path}/photos:0.5,rows.csv:0.125",
        "photos/{a..c}.tar": f"{tmp_path}/photos/{{a..c}}.tar",
        "*.tar": f"{tmp_path}/*.tar",
        "nowhere/*.tar": "nowhere/*.tar",
        "pets": "pets",
    }.items():
        assert absolute_paths({"data_path": text})["data_path"] == expected


# --- what a reader found ------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["table", "zip", "folder"])
def test_index_of_a_run_is_that_of_its_continuation(form, photos, tmp_path):
    """The kind of the labels is known only after the first run, and its lists were refused."""
    path = str(forms(photos, tmp_path)[form])
    for kind in (None, "class"):
        spec = DatasetSpec(path, data_index=str(tmp_path / "lists"), kind=kind)
        assert len(open_images("auto", spec, True)) == 9
    if form == "table":
        other = DatasetSpec(path, data_index=str(tmp_path / "lists"), kind="multi")
        with pytest.raises(UserError, match="give another --data_index"):
            open_images("auto", other, True)


def test_numbers_as_classes_have_one_order(tmp_path):
    """As text 10 comes before 2; and 1 and 01 had another order in each process."""
    root = tmp_path / "photos"
    for name in ("10", "2", "1", "01"):
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(png())
    for path in forms(root, tmp_path.joinpath()).values():
        data = open_images("auto", DatasetSpec(str(path)), True)
        assert list(data.classes) == ["01", "1", "2", "10"]


def test_shards_of_a_pattern_are_separated_by_their_names(tmp_path):
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", {f"a/{name}.png": png(), f"b/{name}.png": png()})
    for pattern in ("*.tar", "{train-0,train-1,val-0}.tar"):
        spec = DatasetSpec(str(tmp_path / pattern))
        assert [len(open_images("auto", spec, part)) for part in (True, False)] == [4, 2]
    only = DatasetSpec(str(tmp_path / "val-0.tar"))
    assert len(open_images("auto", only, True)) == 2  # a file that was named is used


def test_split_of_a_webdataset_acts_with_chosen_labels(tmp_path):
    members = {}
    for number, part in enumerate(["train", "train", "val", "train"]):
        members[f"{number}.png"] = png(number)
        members[f"{number}.json"] = json.dumps({"name": "ab"[number % 2], "split": part}).encode()
    path = str(write_tar(tmp_path / "x.tar", members))
    for columns in (Columns(labels=("name",)), Columns(labels=("name",), split="split")):
        train, val = (
            open_images("auto", DatasetSpec(path, columns=columns), part) for part in (True, False)
        )
        assert (list(train.names), list(val.names)) == (["0.png", "1.png", "3.png"], ["2.png"])
    plain = DatasetSpec(path, labeled=False, columns=Columns(split="split"))
    assert len(open_images("auto", plain, True)) == 3
    for columns in (Columns(labels=("nme",)), Columns(split="fold")):
        with pytest.raises(UserError, match="no such column; it has name, split|unknown column"):
            open_images("auto", DatasetSpec(path, columns=columns), True)


def test_archive_next_to_class_folders_is_left_out(photos):
    write_tar(photos / "old.tar", {"x/1.png": png(), "y/1.png": png()})
    (photos / "meta.parquet").write_bytes(b"PAR1")
    data = open_images("auto", DatasetSpec(str(photos)), True)
    assert data.classes == list(CLASSES)
    assert "1 .tar" in data.describe_list()


def test_names_of_other_programs_in_zip_files(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("./p/übung/0.png", "./p/b\\1.png"):
            file.writestr(name, png())
    content = path.read_bytes()
    flag = zipfile.ZipInfo("ü")._encodeFilenameFlags()[1]
    path.write_bytes(content.replace(flag.to_bytes(2, "little") + b"\0\0", bytes(4)))
    data = open_images("auto", DatasetSpec(str(path)), True)
    assert (data.classes, list(data.names)) == (["b", "übung"], ["b/1.png", "übung/0.png"])


def test_training_folder_alone_in_a_zip_file(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("set/train/a/0.png", "set/train/b/0.png"):
            file.writestr(name, png())
    for layout in ("auto", "IMNET"):
        assert open_images(layout, DatasetSpec(str(path)), True).classes == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.zip", b"PK\3\4 cut short", "it is no whole zip file; copy or download it again"),
        ("a.bin", b"?", "--eval_data_path .*a.bin: expected a folder"),
        ("a.txt", b"my dog.png a\n", "spaces separate cells; write .csv"),
        ("a.csv", b"image,label\na\\1.png,x\n", "paths need / in place of"),
    ],
)
def test_messages_name_the_fix(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content if name != "a.txt" else b"1.png a\n" + content)
    with pytest.raises(UserError, match=said):
        open_images("auto", DatasetSpec("x", str(tmp_path / name)), False)


def write_parquet(path: Path, labels: list, names: list[str], lists: bool = True) -> Path:
    """Write images with (lists of) numbers of named classes, as Hugging Face does."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    label = {"names": names, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}}
    features["labels"] = {"feature": label, "_type": "Sequence"} if lists else label
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in range(len(labels))]
    table = pyarrow.table({"image": images, "labels": labels})
    about = json.dumps({"info": {"features": features}})
    parquet.write_table(table.replace_schema_metadata({"huggingface": about}), path)
    return path


def test_lists_of_named_classes_are_several_labels(tmp_path):
    """Lists of one number each were one class, or a yes or no."""
    path = write_parquet(tmp_path / "a.parquet", [[0], [1], [1], [0]], ["cat", "dog", "emu"])
    for kind in (None, "multi"):
        data = open_images("auto", DatasetSpec(str(path), kind=kind), True)
        assert (data.kind, list(data.classes)) == ("multi", ["cat", "dog", "emu"])
        assert data.targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(UserError, match="labels holds lists of classes; use --task multi_label"):
        open_images("auto", DatasetSpec(str(path), kind="class"), True)
    for wrong in ([[0], [3]], [[0], [-1]]):
        write_parquet(path, wrong, ["cat", "dog", "emu"])
        with pytest.raises(
            UserError, match="1.png: labels is (3|-1), expected numbers from 0 to 2"
        ):
            open_images("auto", DatasetSpec(str(path)), True)


@pytest.mark.parametrize(
    ("source", "flag", "said"),
    [
        ("photos.zip", "--split_column x", "--split_column: .* has no columns; drop it"),
        ("x.tar", "--image_root x", "--image_root: .* holds the images itself; drop it"),
        ("x.tar", "--image_column x", "--image_column: .* holds the images itself; drop it"),
    ],
)
@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_flags_of_columns_are_never_ignored(source, flag, said, script, photos, tmp_path):
    pack_zip(photos, tmp_path / "photos.zip", names_of(photos))
    records = {f"{n}.cls": b"0" if n else b"1" for n in range(4)}
    write_tar(tmp_path / "x.tar", {**{f"{n}.png": png(n) for n in range(4)}, **records})
    words = ["--data_path", str(tmp_path / source), *flag.split(), "--num_workers", "0"]
    parser = getattr(options, f"{script}_parser")()
    args = options.parse(parser, [*words, *["--aa", "none"] * (script == "finetune")])
    build = partial(datasets.build_dataset, True)
    build = build if script == "finetune" else datasets.build_pretrain_dataset
    with pytest.raises(UserError, match=said if script == "finetune" else "drop it"):
        build(args)


def test_table_of_numbers_asks_for_regression(tmp_path, caplog):
    (tmp_path / "1.png").write_bytes(png())
    for price in ("7.5", "7"):
        (tmp_path / "a.csv").write_text(f"image,price\n1.png,{price}\n1.png,8\n")
        caplog.clear()
        words = ["--data_path", str(tmp_path / "a.csv")]
        datasets.build_dataset(True, options.parse(options.finetune_parser(), words))
        assert ("numbers to predict, give --task regression" in caplog.text) is (price == "7.5")


CASES = ["Cat", "cat", "dog"]


@pytest.mark.parametrize(
    ("holding", "named"),
    [({"a.zip": CASES}, True), ({"a.csv": CASES}, True), ({"a.zip": CASES[1:]}, False),
     ({"a.zip": CASES[1:], "b.csv": CASES[:1]}, True)],
)  # fmt: skip
def test_classes_that_differ_only_in_case_are_named(holding, named, tmp_path, caplog):
    """Two spellings of one class in two sources were two classes, and nothing said so."""
    (tmp_path / "1.png").write_bytes(png(1))
    for name, classes in holding.items():
        if name.endswith(".csv"):
            rows = ["image,label", *(f"1.png,{each}" for each in classes)]
            (tmp_path / name).write_text("\n".join(rows))
        else:
            with zipfile.ZipFile(tmp_path / name, "w") as file:
                for each in classes:
                    file.writestr(f"{each}/1.png", png(1))
    words = ["--data_path", ",".join(str(tmp_path / name) for name in holding)]
    data, count = datasets.build_dataset(True, options.parse(options.finetune_parser(), words))
    assert count == len({*sum(holding.values(), [])})
    said = "train: classes with nearly the same name: Cat and cat; if they mean the same, give "
    assert (said in caplog.text) is named


def test_shares_of_sources_cannot_change_within_an_epoch():
    saved, now = ({"data_path": f"a:{share},b:0.5"} for share in (0.5, 0.7))
    assert len(compare_args(saved, now, "it.pth")) == 1
    with pytest.raises(UserError, match="--data_path a:0.5,b:0.5 and cannot resume with"):
        compare_args(saved, now, "it.pth", in_epoch=True)
    moved = {"data_path": "/new/a:0.5,/new/b:0.5"}
    assert len(compare_args(saved, moved, "it.pth", in_epoch=True)) == 1
