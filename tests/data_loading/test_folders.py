# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lists of image files, in memory and memory-mapped from an index."""

import errno
import io
import json
import os
import pickle
import shutil
import socket
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torchvision.datasets import DatasetFolder

import visualize
from config import parser as options
from data_loading import folders, formats, labels, listing, sources
from data_loading import index as index_files
from data_loading.dataset import TransformedDataset
from data_loading.formats import extensions
from data_loading.images import Images
from data_loading.index import open_index
from data_loading.samplers import EvalSampler
from data_loading.sources import DatasetSpec, Part, open_part
from data_loading.transforms import create_eval_transform
from data_loading.workers import WatchedLoader
from errors import UserError
from parallel import process_group
from tests import tiny
from tests.groups import run_script

# Folders and names that sort differently as paths, as parts, as bytes, and as str.
TREE = [
    *("ant/b.png", "ant/a.png", "ant/a.d/x.png", "ant/a/y.png", "ant/a/b/z.png", "ant/a-b/1.png"),
    *("ant/a.png.d/q.png", "ant/Z.PNG", "ant/a b\n.png", "ant/\tc.jpeg", "ant/é.png", "ant/a.JPG"),
    *("ant bee/1.jpg", "ant.bee/1.jpg", "bee/2/3/4/5.tif", "bee/2.tif", "bee/10.tif"),
    *("\udcff\udc80/\udce9.png", "\ue000/\U0001f600.png", "\U0001f600/\ue000.png"),
    "Ünï/\udcff.gif",
]
ROOT = Path(folders.__file__).parents[1]
NO_IMAGES = ["ant/notes.txt", "ant/a/x.jpg.part", "list.txt"]


def plant(root: Path, files: list[str] = TREE) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def list_images(root: Path | str, labeled: bool, place: Path | None = None) -> Images:
    spec = DatasetSpec(str(root), labeled=labeled)
    return open_part(Part("image_folder", str(root), spec, train=True), place)


def pairs(images: Images) -> list[tuple[str, int | None]]:
    return [images.samples[number] for number in range(len(images))]


@pytest.fixture(params=["in memory", "in an index"])
def place(request, tmp_path) -> Path | None:
    return None if request.param == "in memory" else tmp_path / "lists" / "train.index"


# --- which images --------------------------------------------------------------------------------


def test_classes_and_images_are_those_of_torchvision(tmp_path, place):
    root = plant(tmp_path / "data", TREE + NO_IMAGES)
    other = plant(tmp_path / "other", ["linked/9.png", "linked/8.png"])
    (root / "bee" / "away").symlink_to(other, target_is_directory=True)
    (root / "cat").symlink_to(other / "linked", target_is_directory=True)
    (root / "bee" / "file.png").symlink_to(other / "nowhere.png")
    (root / "ant" / "folder.png").mkdir()
    theirs = DatasetFolder(str(root), str, extensions())
    index = list_images(root, True, place)
    assert pairs(index) == sorted(theirs.samples, key=lambda pair: parts(pair[0]))
    assert list(index.classes) == theirs.classes
    assert labels.class_names(index) == theirs.classes


def test_images_are_in_order_folder_by_folder(tmp_path, place):
    root = plant(tmp_path / "data", [*TREE, *NO_IMAGES, "0.png", "a.png", "ant.png", "bee.gif"])
    other = plant(tmp_path / "other", ["linked/9.png"])
    (root / "bee" / "away").symlink_to(other, target_is_directory=True)
    walk = (os.path.join(top, n) for top, _, ns in os.walk(root, followlinks=True) for n in ns)
    index = list_images(root, False, place)
    paths = [p for p in walk if p.lower().endswith(extensions())]
    assert pairs(index) == [(p, None) for p in sorted(paths, key=parts)]
    assert index.classes is None
    assert labels.class_names(index) is None


def parts(path: str) -> list[bytes]:
    return os.fsencode(path).split(b"/")


def relative(index: Images, root: Path) -> list[str]:
    return [path.removeprefix(f"{root}/") for path, _ in pairs(index)]


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target, target_is_directory=True)


def test_link_that_leads_upward_counts_no_image_twice(tmp_path, place):
    """An image was listed 41 times, and with two links the list had no end."""
    root = plant(tmp_path / "data", ["a/1.png", "a/deep/2.png", "b/3.png"])
    outside = plant(tmp_path / "outside", ["x/4.png", "x/y/5.png"])
    link(root / "a" / "again", root)
    link(root / "a" / "deep" / "class", root / "a")
    link(root / "a" / "self", root / "a" / "self")
    link(root / "b" / "away", outside / "x")
    link(outside / "x" / "y" / "up", outside)
    link(outside / "x" / "y" / "home", root)
    link(root / "b" / "root of all", Path("/"))
    index = list_images(root, True, place)
    expected = ["a/1.png", "a/deep/2.png", "b/3.png", "b/away/4.png", "b/away/y/5.png"]
    assert relative(index, root) == expected
    assert relative(list_images(root, False), root) == expected
    assert index.listing.metadata["left_out"] == {listing.LISTED: 5, listing.NOWHERE: 1}


def test_folder_with_many_names_is_listed_once_a_class(tmp_path):
    """Two classes may share a folder; within a class each real folder counts once."""
    root = plant(tmp_path / "data", ["a/1.png", "a/deep/2.png", "b/3.png"])
    other = plant(tmp_path / "other", ["x/4.png", "x/y/5.png"])
    for name in ("a/b1", "a/b2", "c"):
        link(root / name, other / "x")
    link(root / "a" / "b0", other / "x" / "y")
    link(root / "a" / "again", root / "a" / "deep")
    link(root / "d", root / "b")
    index = list_images(root, True)
    a = ["a/1.png", "a/b0/5.png", "a/b1/4.png", "a/deep/2.png"]
    assert relative(index, root) == [*a, "b/3.png", "c/4.png", "c/y/5.png", "d/3.png"]
    assert index.listing.metadata["shared"] == 3
    listed = relative(list_images(root, False), root)
    assert listed == ["a/1.png", "a/b0/5.png", "a/deep/2.png", "b/3.png", "c/4.png"]


def test_images_with_two_labels_by_links_are_counted(tmp_path, place):
    """The same pixels had two labels, without a word."""
    root = plant(tmp_path / "data", ["a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/.old/5.png"])
    other = plant(tmp_path / "other", ["6.png", "7.png", "8.png"])
    link(root / "a" / "own.png", root / "a" / "1.png")  # with one label
    link(root / "a" / "old.png", root / "b" / ".old" / "5.png")  # which b does not list
    link(root / "a" / "gone.png", other / "gone.png")
    link(root / "a" / "three.png", Path("../b/3.png"))
    link(root / "b" / "six.png", other / "6.png")
    link(root / "b" / "seven.png", other / "7.png")
    link(root / "c" / "3.png", root / "b" / "3.png")  # counted already
    link(root / "c" / "6.png", other / "6.png")
    link(root / "d", other)  # shares 6.png and 7.png
    link(tmp_path / "alias.png", other / "7.png")
    link(root / "e" / "chain.png", tmp_path / "alias.png")  # counted already
    link(root / "e" / "four.png", tmp_path / "four.png")
    link(tmp_path / "four.png", root / "b" / "4.png")
    data = list_images(root, True, place)
    assert len(data) == 6 + 4 + 2 + 3 + 2
    assert data.describe_list() == (
        "; left out 1 file or folder: 1 hidden or system; in two classes, by links: 4 images"
    )
    assert list_images(root, False).listing.metadata["shared"] == 0


def test_link_into_a_hidden_folder_is_followed(tmp_path):
    """The walk does not visit it by its own path, as in a store of deduplicated folders."""
    root = plant(tmp_path / "data", ["a/1.png", ".store/x/2.png", ".store/x/y/3.png"])
    link(root / "a" / "x", root / ".store" / "x")
    link(root / "a" / "z", root / ".store" / "x" / "y")
    assert relative(list_images(root, True), root) == ["a/1.png", "a/x/2.png", "a/z/3.png"]
    assert relative(list_images(root, False), root) == ["a/1.png", "a/x/2.png", "a/z/3.png"]


@pytest.mark.parametrize("target", ["gone", "loop", ".", ".."])
def test_class_that_links_to_nowhere_or_upward_is_an_error(tmp_path, target, place):
    """A class was missing without a word."""
    root = plant(tmp_path / "data", ["a/1.png", "b/2.png"])
    (root / "loop").symlink_to(target)
    where = "nowhere" if target in ("gone", "loop") else "a folder above"
    text = f"data: links to {where} instead of class folders: loop; correct or remove them"
    with pytest.raises(UserError, match=text):
        list_images(root, True, place)
    assert len(list_images(root, False)) == 2


HIDDEN = [".ipynb_checkpoints/1.png", ".Trash-1000/files/2.png", "@eaDir/3.png", "__MACOSX/4.png"]
HIDDEN += ["$RECYCLE.BIN/5.png", "System Volume Information/6.png", "lost+found/7.png"]
HIDDEN += ["#recycle/8.png", "._1.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"]
HIDDEN += ["recup_dir.1/f123.png", "Recup_dir.27/f4.png", "#snapshot/1.png", "@Recycle/2.png"]
HIDDEN += ["@Recently-Snapshot/3.png", "RECYCLER/4.png", "found.000/5.png", "@tmp/6.png"]
HIDDEN += ["Network Trash Folder/7.png", "Temporary Items/8.png", "__pycache__/a.pyc", "Icon\r"]
HIDDEN += ["ehthumbs.db"]


def test_hidden_and_system_folders_are_no_data(tmp_path, place):
    """`.ipynb_checkpoints` was a class, and a thumbnail of a NAS an image."""
    nested = [f"a/{name}" for name in HIDDEN] + [f"b/deep/{name}" for name in HIDDEN]
    root = plant(tmp_path / "data", ["a/1.png", "b/deep/2.png", *HIDDEN, *nested])
    link(root / ".cache", tmp_path / "nowhere")
    link(root / ".store", tmp_path)
    index = list_images(root, True, place)
    assert relative(index, root) == ["a/1.png", "b/deep/2.png"]
    assert index.classes == ["a", "b"]
    assert relative(list_images(root, False), root) == ["a/1.png", "b/deep/2.png"]
    assert index.listing.metadata["left_out"] == {listing.SYSTEM: 3 * len(HIDDEN) + 2}
    again = list_images(root, True, place)
    text = "; left out 80 files and folders: 80 hidden or system"
    assert again.describe_list() == text


def test_what_is_not_used_is_counted_by_kind(tmp_path, place):
    """Of 100 photos of a phone and 4 others a run used 4, without a word."""
    files = [f"a/{n}.HEIC" for n in range(100)] + ["a/1.jpg", "b/2.jpg", "0.jpg", "list.txt"]
    files += [f"a/{n}.xml" for n in range(3)] + ["a/README", "b/x.tar.gz", "b/v.a-long-name-of-it"]
    root = plant(tmp_path / "data", files)
    link(root / "b" / "gone", tmp_path / "nowhere")
    link(root / "b" / "more.txt", root / "list.txt")
    with pytest.MonkeyPatch.context() as patch:  # whatever is installed here
        patch.setattr(listing, "extensions", lambda: formats.EXTENSIONS)
        data = list_images(root, True, place)
    assert data.describe_list() == (
        "; left out 110 files and folders: 100 .heic (not readable here: pip install pillow-heif), "
        "3 .xml, 2 .txt, 2 without extension, 1 .gz and 2 more"
    )
    left_out = data.listing.metadata["left_out"]
    assert (left_out[listing.OUTSIDE], left_out[listing.NOWHERE]) == (1, 1)


def test_only_some_extensions_are_counted_one_by_one(tmp_path):
    root = plant(tmp_path, ["a/1.png", *(f"a/scan.{n:04d}" for n in range(300))])
    plant(root, [f"b/scan.{n:04d}" for n in range(300)])
    left_out = list_images(root, False).listing.metadata["left_out"]
    assert len(left_out) == listing.MAX_KINDS + 1
    assert left_out[listing.OTHERS] == 2 * (300 - listing.MAX_KINDS)
    names = ("a.h", "a.", "a." + "b" * 11, "a." + "b" * 12)
    unnamed = listing.NO_EXTENSION
    assert [*map(listing.reason_of, names)] == [".h", unnamed, "." + "b" * 11, unnamed]


def test_one_thing_that_is_left_out_is_told_in_the_singular():
    described = [
        listing.describe_left_out({kind: n}) for kind in (".txt", "hidden") for n in (1, 2)
    ]
    assert described == [
        "; left out 1 file: 1 .txt",
        "; left out 2 files: 2 .txt",
        "; left out 1 file or folder: 1 hidden",
        "; left out 2 files and folders: 2 hidden",
    ]


def test_list_without_images_says_what_was_found(tmp_path):
    root = plant(tmp_path, ["a/1.cr2", "a/2.cr2"])
    for labeled in (True, False):
        with pytest.raises(UserError, match="no images.*; left out 2 files: 2 .cr2"):
            list_images(root, labeled)


def test_index_of_an_earlier_version_says_nothing_of_what_it_left_out(tmp_path):
    root, folder = plant(tmp_path / "data", ["a/1.png", "a/2.txt"]), tmp_path / "train.index"
    metadata = list_images(root, True, folder).listing.metadata
    old = {key: metadata[key] for key in metadata if key not in ("left_out", "crc32")}
    (folder / "index.json").write_text(json.dumps(old | {"crc32": index_files._crc32(old)}))
    assert list_images(root, True, folder).describe_list() == ""


def test_is_a_sequence_of_path_and_label(tmp_path):
    root = plant(tmp_path, ["a/1.png", "a/2.png", "b/1.png"])
    index = list_images(root, True).samples
    assert len(index) == 3
    assert index[-1] == index[2] == (f"{root}/b/1.png", 1)
    assert list(index) == [(f"{root}/a/1.png", 0), (f"{root}/a/2.png", 0), (f"{root}/b/1.png", 1)]
    assert index[np.int64(1)] == (f"{root}/a/2.png", 0)
    for number in (3, -4, 10**12):
        with pytest.raises(IndexError):
            index[number]


def test_unreadable_folder_is_skipped_and_logged(tmp_path, monkeypatch, log):
    root, scan = plant(tmp_path, ["a/1.png", "a/secret/2.png", "b/3.png"]), listing.scan

    def guarded(folder: str):
        if folder.endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(listing, "scan", guarded)
    index = list_images(root, True)
    assert len(index) == 2
    assert index.listing.metadata["left_out"] == {listing.UNREADABLE: 1}
    assert f"skipped folder {root}/a/secret: [Errno 13] Permission denied" in log.text


def test_disk_that_does_not_answer_empties_no_list(tmp_path, monkeypatch):
    root, scan, tried = plant(tmp_path / "data", ["a/1.png", "b/3.png"]), listing.scan, []

    def failing(folder: str):
        if folder.endswith("b"):
            tried.append(folder)
            raise OSError(errno.ESTALE, "Stale file handle", folder)
        return scan(folder)

    monkeypatch.setattr(listing, "scan", failing)
    monkeypatch.setattr("data_loading.bad_images.WAITS", (0.0, 0.0))
    with pytest.raises(UserError, match="Stale file handle.*tried"):
        list_images(root, True, tmp_path / "lists" / "train.index")
    assert len(tried) == 3
    assert not (tmp_path / "lists").exists()


@pytest.mark.parametrize("files", [["a/1.png", "hollow/x.txt", "void/y"], ["1.png"], []])
def test_nothing_is_left_of_a_list_without_images(tmp_path, files, place):
    root = plant(tmp_path / "data", files)
    root.mkdir(exist_ok=True)
    expected = "data has no class folders; expected one folder of images per class"
    if files[1:]:
        expected = "data: no images in 2 class folders: hollow, void; expected some of .jpg"
    with pytest.raises(UserError, match=expected):
        list_images(root, True, place)
    if not files:
        with pytest.raises(UserError, match="data: no images; expected some of .jpg"):
            list_images(root, False, place)
    assert place is None or not place.parent.exists()


# --- in an index --------------------------------------------------------------------------------


def test_list_is_written_once_and_logged(tmp_path, monkeypatch, log):
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    first = list_images(root, True, file)
    assert f"{file}: listing the class folders of {root}, once" in log.text
    plant(root, ["ant/new.png"])
    with monkeypatch.context() as gone:
        gone.setattr(listing, "scan", None)
        again = list_images(root, True, file)
    assert pairs(again) == pairs(first)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(again.listing.metadata["made"]))
    expected = f"{file}: {len(TREE)} images of the class folders of {root} as of {made}; remove "
    assert expected in log.messages[-1]
    shutil.rmtree(file)
    assert len(list_images(root, True, file)) == len(first) + 1


def test_index_equals_the_list_in_memory_and_is_mapped_by_spawned_workers(tmp_path):
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    mapped, kept = list_images(root, True, file), list_images(root, True)
    assert pairs(mapped) == pairs(kept)
    for array in (mapped.names.text, mapped.names.ends, mapped.targets):
        assert isinstance(array, np.memmap)
    assert not isinstance(kept.names.text, np.memmap)
    sent = pickle.dumps(mapped.listing)
    assert len(sent) < 300 < len(mapped.names.text) + mapped.names.ends.nbytes
    sent = pickle.dumps(mapped)
    assert len(sent) < 1000
    for index in (pickle.loads(sent), pickle.loads(pickle.dumps(kept))):
        assert pairs(index) == pairs(kept)
        assert index.classes == kept.classes


def test_replaced_index_is_refused(tmp_path, monkeypatch):
    """By workers that start later, and by ranks that see the index of an earlier run."""
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    sent = pickle.dumps(list_images(root, True, file))
    shutil.rmtree(file)
    list_images(root, True, file)  # of the same images
    with pytest.raises(UserError, match="train.index is not the list that this run started with"):
        pickle.loads(sent)
    monkeypatch.setattr(index_files, "from_main_process", lambda work: work() ^ 1)
    with pytest.raises(UserError, match="it was replaced, or this machine sees an old copy"):
        list_images(root, True, file)


def test_index_of_another_folder_or_kind_is_refused(tmp_path):
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    list_images(root, True, file)
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert list_images(tmp_path / "link", True, file).samples[0][0].startswith(f"{tmp_path}/link/")
    other = plant(tmp_path / "other")
    with pytest.raises(UserError, match=f"lists the class folders of {root}, not .* of {other};"):
        list_images(other, True, file)
    with pytest.raises(UserError, match=f"of {root}, not the images in {root};"):
        list_images(root, False, file)


def test_damaged_index_is_refused(tmp_path):
    """Every byte of the JSON and of the headers, and every third length of the files."""
    root, folder = plant(tmp_path / "data"), tmp_path / "train.index"
    expected = pairs(list_images(root, True, folder))
    for name, metadata in (
        ("index.json", None),
        ("names.npy", 128),
        ("ends.npy", 128),
        ("targets.npy", 128),
    ):
        file, whole = folder / name, (folder / name).read_bytes()
        places = range(len(whole[:metadata]))
        damaged = [
            whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in places
        ]
        damaged += [whole[:length] for length in range(0, len(whole), 3)]
        for content in damaged:
            file.write_bytes(content)
            if content == whole.replace(b"'<i", b"'=i"):
                assert pairs(list_images(root, True, folder)) == expected  # it means the same
                continue
            with pytest.raises(
                UserError, match="train.index cannot be used: .*; remove it, and the"
            ):
                list_images(root, True, folder)
        file.write_bytes(whole)
    assert pairs(list_images(root, True, folder)) == expected


def test_wrong_files_are_named(tmp_path):
    root, folder = plant(tmp_path / "data"), tmp_path / "train.index"
    list_images(root, True, folder)
    metadata = json.loads((folder / "index.json").read_text())
    for name in ("names.npy", "ends.npy", "targets.npy"):
        array = np.load(folder / name)
        for other in (array[:-1], array[1:], array.astype(np.int8)):
            np.save(folder / name, other)
            with pytest.raises(UserError, match="cannot be used: .* not fit index.json"):
                open_index(folder)
        np.save(folder / name, array)
    open_index(folder)
    (folder / "index.json").write_text(json.dumps(metadata | {"version": 1}))
    with pytest.raises(UserError, match="cannot be used: index.json has version 1, expected 3"):
        open_index(folder)
    with pytest.raises(UserError, match="no such file on this machine; .* that all machines share"):
        open_index(tmp_path / "absent.index")


def test_index_of_an_earlier_version_is_refused(tmp_path):
    """It was a single file."""
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    file.write_bytes(b"\x89images\n" + bytes(99))
    with pytest.raises(
        UserError, match="train.index cannot be used: .*; remove it, and the next run"
    ):
        list_images(root, True, file)


def test_break_while_listing_leaves_nothing(tmp_path, monkeypatch):
    root, scan = plant(tmp_path / "data"), listing.scan

    def broken(folder: str):
        return scan(folder) if "bee" not in folder else 1 / 0

    monkeypatch.setattr(listing, "scan", broken)
    with pytest.raises(ZeroDivisionError):
        list_images(root, True, tmp_path / "train.index")
    monkeypatch.setattr(listing, "scan", scan)
    monkeypatch.setattr(index_files, "write_index", lambda *content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list_images(root, True, tmp_path / "train.index")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_place_that_cannot_be_written_is_named(tmp_path):
    root = plant(tmp_path / "data")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"--data_index: .*cannot write .*taken/train.index \("):
        list_images(root, True, tmp_path / "taken" / "train.index")


@pytest.mark.parametrize("name", ["names.npy", "ends.npy"])
def test_incomplete_copy_gives_no_wrong_path(tmp_path, name):
    """A copy that broke off: of its full size, with zeros where nothing has arrived."""
    root, folder = plant(tmp_path / "data"), tmp_path / "train.index"
    expected, content = pairs(list_images(root, True, folder)), (folder / name).read_bytes()
    for first in range(128, len(content) - 40, 7):
        (folder / name).write_bytes(content[:first] + bytes(40) + content[first + 40 :])
        if name == "ends.npy" and first + 40 >= len(content) - 8:  # the end of names.npy is lost
            with pytest.raises(UserError, match="not fit index.json"):
                open_index(folder)
            continue
        damaged, errors = open_index(folder), set()
        for number, pair in enumerate(expected):
            try:
                assert f"{root}/{damaged.names[number]}" == pair[0]
            except UserError as error:
                errors.add(str(error))
        assert errors == {
            f"{folder} is damaged; remove it, and the next run lists the images again"
        }


def test_two_writers_at_the_same_time_do_not_share_files(tmp_path, monkeypatch):
    """Two machines may list at the same time; the first index that is complete stays."""
    root, folder, scan = plant(tmp_path / "data"), tmp_path / "train.index", listing.scan
    others = []

    def slow(path: str):
        if path.endswith("bee") and not others:
            others.append(None)
            others.append(list_images(root, True, folder).listing.metadata["crc32"])
        return scan(path)

    monkeypatch.setattr(listing, "scan", slow)
    expected = pairs(list_images(root, True))
    shutil.rmtree(folder)
    others.clear()
    index = list_images(root, True, folder)
    assert pairs(index) == expected
    assert index.listing.metadata["crc32"] == others[1]
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == ["train.index"]


def test_names_that_are_no_text_are_logged(tmp_path, monkeypatch, capsys):
    """Bytes that are not UTF-8, on a terminal that expects it."""
    root = plant(tmp_path / "\udcff", ["a/1.png"])
    logger, terminal = process_group.get_logger(), io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(sys, "stdout", terminal)
    process_group.init_distributed_mode("cpu")
    list_images(root, True, tmp_path / "x")
    terminal.flush()
    assert (
        f"listing the class folders of {tmp_path}/\\udcff, once".encode()
        in terminal.buffer.getvalue()
    )
    assert capsys.readouterr().err == ""


# --- in little memory -----------------------------------------------------------------------------


def test_incomplete_copy_gives_no_wrong_label(tmp_path):
    """Zeros in place of labels are those of the first class."""
    root, folder = plant(tmp_path / "data"), tmp_path / "train.index"
    list_images(root, True, folder)
    file = folder / "targets.npy"
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match="labels do not fit their checksum; remove it, and the"):
        list_images(root, True, folder)


def generate(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Replace the disk by 1000 classes, whose paths are not kept."""
    names = [f"class{label:04d}" for label in range(1000)]

    def paths(walk: listing.FolderWalk) -> Iterator[str]:
        yield from (f"{walk.top}/{n:09d}.jpg" for n in range(count // 1000))

    monkeypatch.setattr(sources, "find_source", sources._folder)
    monkeypatch.setattr(folders, "class_folders", lambda *words: names)
    monkeypatch.setattr(listing.FolderWalk, "in_order", paths)


def test_memory_to_open_an_index_does_not_grow_with_the_images(tmp_path, monkeypatch):
    kept = []
    for count in (10_000, 200_000):
        generate(monkeypatch, count)
        folder = tmp_path / f"{count}"
        list_images("/data", True, folder)
        tracemalloc.start()
        index = open_index(folder)
        assert index.names[count - 1] == f"class0999/{count // 1000 - 1:09d}.jpg"
        assert index.arrays["targets"][count - 1] == 999
        kept.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert kept[1] < 1.2 * kept[0] + 10_000
    assert kept[1] < 600_000  # the names of 1000 classes, and the JSON with them


def test_list_in_memory_takes_a_path_and_twelve_bytes_an_image(monkeypatch):
    generate(monkeypatch, 100_000)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = list_images("/data", labeled=True)
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert kept < 100_000 * (len("class0000/000000000.jpg") + 1 + 12) + 400_000
    assert len(index) == 100_000


# --- datasets and scripts -----------------------------------------------------------------


def photos(root: Path, classes: str, count: int) -> Path:
    noise = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_mapped_images_are_read_and_named_by_workers(tmp_path):
    root = photos(tmp_path / "data", "abc", 3)
    (root / "b" / "1.png").write_bytes(b"")
    data = list_images(root, True, tmp_path / "train.index")
    transform = create_eval_transform(4)
    whole = TransformedDataset(data, transform, 0, nb_classes=3, on_bad="leave out")
    loader = WatchedLoader(whole, EvalSampler(9, 0, 1), 2, num_workers=2)
    batches = list(loader)
    assert [label for _, labels, *_ in batches for label in labels] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [name for *_, bad, _ in batches for name, _ in bad] == [f"{root}/b/1.png"]
    assert whole.name_of(8) == f"image {root}/c/2.png"


@pytest.mark.parametrize("data_set", ["DIGITS", "CIFAR10", "SYNTHETIC", "tests.tiny:colors"])
def test_flag_is_refused_where_there_are_no_folders(data_set, capsys):
    words = ["--data_set", data_set, "--data_path", "x", "--data_index", "lists"]
    for parser in (options.pretrain_parser(), options.finetune_parser()):
        with pytest.raises(SystemExit):
            options.parse(parser, words)
        expected = f"--data_index is for image files, not for --data_set {data_set}"
        assert expected in capsys.readouterr().err


def test_visualize_refuses_data_index_without_folders(tmp_path):
    model = {"model": tiny.fcmae(3, 1, 0.0).state_dict()}
    torch.save(model | {"args": {"mask_ratio": 0.6, "data_set": "DIGITS"}}, tmp_path / "a.pth")
    words = ["--model", "tests.tiny:fcmae"]
    words += ["--checkpoint", str(tmp_path / "a.pth"), "--device", "cpu", "--data_index", "lists"]
    with pytest.raises(UserError, match="--data_index needs image files, not --data_set DIGITS"):
        visualize.main(options.visualize_parser().parse_args(words))


FINETUNE = ["--model", "tests.tiny:classifier", "--input_size", "16", "--stem_stride", "1"]
FINETUNE += ["--batch_size", "2", "--epochs", "1", "--warmup_epochs", "0"]
FINETUNE += ["--device", "cpu", "--aa", "none", "--log_dir", "none", "--kernels", "torch"]


def rank_main(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process_group.init_distributed_mode("cpu")
    if rank == 1:
        index_files.write_index = None  # only the main process writes
    lists = [list_images(folder / "data", True, folder / "train.index") for _ in range(2)]
    found = [[(path, int(label)) for path, label in pairs(each)] for each in lists]
    try:
        list_images(folder / "other", True, folder / "other.index")
    except UserError as error:
        found.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_main_process_lists_for_all(tmp_path):
    root, _ = plant(tmp_path / "data"), plant(tmp_path / "other", ["a/1.png", "hollow/2.txt"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, (port, tmp_path), nprocs=2, start_method="fork")
    expected = [list(pair) for pair in pairs(list_images(root, True))]
    for rank in range(2):
        *lists, error = json.loads((tmp_path / f"{rank}.json").read_text())
        assert lists == [expected, expected]
        assert "no images in 1 class folder: hollow" in error


@pytest.mark.slow
def test_run_writes_and_uses_an_index_of_each_split(tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        photos(tmp_path / "data" / split, "abc", count)
    words = [*FINETUNE, "--data_path", tmp_path / "data", "--num_workers", 1]
    words += ["--data_index", tmp_path / "lists", "--output_dir", tmp_path / "run"]
    printed = run_script("main_finetune.py", *words, ranks=1, folder=tmp_path)
    assert printed.count("listing the class folders of") == 2
    made = sorted(path.name for path in (tmp_path / "lists").iterdir())
    assert made == ["train.index", "val.index"]
