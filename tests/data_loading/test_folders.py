# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lists of images, in memory and in files that are mapped."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torchvision.datasets import DatasetFolder

import datasets
import visualize
from config import parser as options
from data_loading import folders
from data_loading.dataset import TransformedDataset
from data_loading.decode import EXTENSIONS
from data_loading.folders import FIRST, FileIndex, list_images, open_index, write_index
from data_loading.loader import create_loader
from data_loading.samplers import EvalSampler
from data_loading.transforms import create_eval_transform
from errors import UserError
from parallel import process_group
from tests.test_end_to_end import run

# Folders and names that sort differently as paths, as parts, as bytes, and as str.
TREE = [
    *("ant/b.png", "ant/a.png", "ant/a.d/x.png", "ant/a/y.png", "ant/a/b/z.png", "ant/a-b/1.png"),
    *("ant/a.png.d/q.png", "ant/Z.PNG", "ant/a b\n.png", "ant/\tc.jpeg", "ant/é.png", "ant/.jpg"),
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


def pairs(index: FileIndex) -> list[tuple[str, int]]:
    return [index[number] for number in range(len(index))]


def in_memory(groups: dict[str | None, list[str]], root: str = "/data") -> FileIndex:
    file = io.BytesIO()
    write_index(file, root, groups.items())
    return FileIndex(file.getvalue(), root)


@pytest.fixture(params=["in memory", "in a file"])
def place(request, tmp_path) -> Path | None:
    return None if request.param == "in memory" else tmp_path / "lists" / "train.index"


# --- what there is ------------------------------------------------------------------------------


def test_classes_are_in_torchvisions_order(tmp_path, place):
    root = plant(tmp_path / "data", TREE + NO_IMAGES)
    other = plant(tmp_path / "other", ["linked/9.png", "linked/8.png"])
    (root / "bee" / "away").symlink_to(other, target_is_directory=True)
    (root / "cat").symlink_to(other / "linked", target_is_directory=True)
    (root / "bee" / "file.png").symlink_to(other / "nowhere.png")
    (root / "ant" / "folder.png").mkdir()
    theirs = DatasetFolder(str(root), str, EXTENSIONS)
    index = list_images(root, True, place)
    assert pairs(index) == theirs.samples
    assert list(index.classes) == theirs.classes
    assert datasets.class_map(folders.ImageFiles(index)) == theirs.class_to_idx


def test_images_without_labels_are_in_order_of_their_paths(tmp_path, place):
    root = plant(tmp_path / "data", [*TREE, *NO_IMAGES, "0.png", "a.png", "ant.png", "bee.gif"])
    other = plant(tmp_path / "other", ["linked/9.png"])
    (root / "bee" / "away").symlink_to(other, target_is_directory=True)
    walk = (os.path.join(top, n) for top, _, ns in os.walk(root, followlinks=True) for n in ns)
    index = list_images(root, False, place)
    assert pairs(index) == [(p, 0) for p in sorted(walk) if p.lower().endswith(EXTENSIONS)]
    assert index.classes is None
    assert datasets.class_map(folders.ImageFiles(index)) is None


def test_link_to_a_folder_above_ends(tmp_path):
    root = plant(tmp_path, ["a/1.png"])
    (root / "a" / "again").symlink_to(root, target_is_directory=True)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    theirs = DatasetFolder(str(root), str, EXTENSIONS)
    assert pairs(list_images(root, True)) == theirs.samples
    assert len({path for path, _ in list_images(root, False)}) == len(theirs)


def test_is_a_sequence_of_path_and_label():
    index = in_memory({"a": ["a/1", "a/2"], "b": ["b/1"]})
    assert len(index) == 3
    assert index[-1] == index[2] == ("/data/b/1", 1)
    assert list(index) == [("/data/a/1", 0), ("/data/a/2", 0), ("/data/b/1", 1)]
    assert index[np.int64(1)] == ("/data/a/2", 0)
    for number in (3, -4, 10**12):
        with pytest.raises(IndexError):
            index[number]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_paths_are_found_across_blocks(monkeypatch, size):
    groups = {"a": [f"a/{'x' * (n % 20)}{n}" for n in range(50)], "b": ["b/é\n", "b/\udcff"]}
    whole = in_memory(groups)
    monkeypatch.setattr(folders, "BLOCK", size)
    assert in_memory(groups).data == whole.data
    assert pairs(whole) == [(f"/data/{p}", n) for n, name in enumerate("ab") for p in groups[name]]


def test_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch, log):
    root, scan = plant(tmp_path, ["a/1.png", "a/secret/2.png", "b/3.png"]), folders._scan

    def guarded(folder: str):
        if folder.endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(folders, "_scan", guarded)
    assert len(list_images(root, True)) == 2
    assert f"what is in {root}/a/secret is not used: [Errno 13] Permission denied" in log.text


def test_disk_that_does_not_answer_empties_no_list(tmp_path, monkeypatch):
    root, scan, tried = plant(tmp_path / "data", ["a/1.png", "b/3.png"]), folders._scan, []

    def failing(folder: str):
        if folder.endswith("b"):
            tried.append(folder)
            raise OSError(errno.ESTALE, "Stale file handle", folder)
        return scan(folder)

    monkeypatch.setattr(folders, "_scan", failing)
    monkeypatch.setattr("data_loading.bad_images.WAITS", (0.0, 0.0))
    with pytest.raises(UserError, match="Stale file handle.*tried"):
        list_images(root, True, tmp_path / "lists" / "train.index")
    assert len(tried) == 3
    assert list((tmp_path / "lists").iterdir()) == []


@pytest.mark.parametrize("files", [["a/1.png", "hollow/x.txt", "void/y"], ["1.png"], []])
def test_nothing_is_left_of_a_list_without_images(tmp_path, files, place):
    root = plant(tmp_path / "data", files)
    root.mkdir(exist_ok=True)
    expected = "no images in 2 class folders: hollow, void" if files[1:] else "no class folders"
    with pytest.raises(UserError, match=f"data: {expected}; expected one folder of images a class"):
        list_images(root, True, place)
    if not files:
        with pytest.raises(UserError, match="data: no images; expected some of .jpg"):
            list_images(root, False, place)
    assert place is None or list(place.parent.iterdir()) == []


# --- in a file ----------------------------------------------------------------------------------


def test_list_is_made_once_and_says_so(tmp_path, monkeypatch, log):
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    first = list_images(root, True, file)
    assert f"{file}: listing the images of {root}, once" in log.text
    plant(root, ["ant/new.png"])
    with monkeypatch.context() as gone:
        gone.setattr(folders, "_scan", None)
        again = list_images(root, True, file)
    assert pairs(again) == pairs(first)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(first.made))
    expected = f"{file}: {len(TREE)} images of {root} as of {made}; files that came since are seen "
    assert expected in log.messages[-1]
    file.unlink()
    assert len(list_images(root, True, file)) == len(first) + 1


def test_file_holds_the_same_as_memory_and_is_mapped_by_spawned_workers(tmp_path):
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    mapped, kept = list_images(root, True, file), list_images(root, True)
    assert pairs(mapped) == pairs(kept)
    assert isinstance(kept.data, bytes)
    assert not isinstance(mapped.data, bytes)
    sent = pickle.dumps(mapped)
    assert len(sent) < 500 < len(file.read_bytes())
    for index in (pickle.loads(sent), pickle.loads(pickle.dumps(kept))):
        assert pairs(index) == pairs(kept)
        assert index.classes == kept.classes


def test_another_list_in_its_place_is_no_part_of_a_run(tmp_path, monkeypatch):
    """For workers that start later, and for ranks that see the file of an earlier run."""
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    sent = pickle.dumps(list_images(root, True, file))
    plant(root, ["ant/new.png"])
    file.unlink()
    list_images(root, True, file)
    with pytest.raises(UserError, match="train.index is not the list that this run began with"):
        pickle.loads(sent)
    monkeypatch.setattr(folders, "from_main_process", lambda work: work() ^ 1)
    with pytest.raises(UserError, match="made anew since, or this machine sees an old one"):
        list_images(root, True, file)


def test_list_may_move_with_its_data_no_further_than_a_link(tmp_path):
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    list_images(root, True, file)
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert list_images(tmp_path / "link", True, file)[0][0].startswith(f"{tmp_path}/link/")
    other = plant(tmp_path / "other")
    with pytest.raises(UserError, match=f"lists the class folders of {root}, not .* of {other};"):
        list_images(other, True, file)
    with pytest.raises(UserError, match=f"of {root}, not images without labels in {root};"):
        list_images(root, False, file)


def test_damaged_list_is_refused(tmp_path):
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    list_images(root, True, file)
    whole = file.read_bytes()
    about = whole.index(b'{"root"')
    damaged = [whole[:length] for length in range(0, len(whole), 5)] + [whole + b"x"]
    for place in [*range(FIRST), *range(about, len(whole))]:
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(UserError, match="train.index cannot be used: .*; remove it, and the"):
            list_images(root, True, file)
    file.write_bytes(whole)
    assert len(list_images(root, True, file)) == len(TREE)


def test_newer_format_and_other_files_are_named(tmp_path):
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    list_images(root, True, file)
    whole = file.read_bytes()
    for content, reason in [
        (whole[:8] + b"\2" + whole[9:], "its format has version 2, expected 1"),
        (b"PK" + whole, "it is no index of images, or truncated"),
        (b"", "cannot mmap an empty file"),
        (whole[:-3], f"it is truncated or damaged: {len(whole) - 3} bytes, expected {len(whole)}"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot be used: {reason}"):
            open_index(file, root)
    with pytest.raises(UserError, match="no such file on this machine; .* a folder that all share"):
        open_index(tmp_path / "absent.index", root)


def test_break_while_listing_leaves_nothing(tmp_path, monkeypatch):
    root, scan = plant(tmp_path / "data"), folders._scan

    def broken(folder: str):
        return scan(folder) if "bee" not in folder else 1 / 0

    monkeypatch.setattr(folders, "_scan", broken)
    with pytest.raises(ZeroDivisionError):
        list_images(root, True, tmp_path / "lists" / "train.index")
    assert list((tmp_path / "lists").iterdir()) == []


def test_place_that_cannot_be_written_is_named(tmp_path):
    root = plant(tmp_path / "data")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"--data_index: .*taken/train.index cannot be written \("):
        list_images(root, True, tmp_path / "taken" / "train.index")


def test_hole_in_a_list_is_no_path(tmp_path):
    """A copy that was cut short: of its full size, with zeros where nothing has arrived."""
    root, file = plant(tmp_path / "data"), tmp_path / "train.index"
    whole, content = list_images(root, True, file), file.read_bytes()
    for first in range(FIRST, content.index(b'{"root"') - 40, 7):
        holed = content[:first] + bytes(40) + content[first + 40 :]
        damaged, said = FileIndex(holed, root, file), set()
        for number in range(len(whole)):
            try:
                path, _ = damaged[number]
            except UserError as error:
                said.add(str(error))
            else:
                assert "\0" not in path
        assert said == {f"{file}: the list is damaged; remove it, and the next run makes it anew"}


def test_writers_at_the_same_time_do_not_share_a_file(tmp_path, monkeypatch):
    """Two containers whose processes have the same number: one lists while the other begins."""
    root, file, scan = plant(tmp_path / "data"), tmp_path / "train.index", folders._scan
    others = []

    def slow(folder: str):
        if folder.endswith("bee") and not others:
            others.append(None)
            folders._make(file, str(root), True)
            file.rename(tmp_path / "other.index")
        return scan(folder)

    monkeypatch.setattr(folders, "_scan", slow)
    expected = pairs(list_images(root, True))
    others.clear()
    assert pairs(list_images(root, True, file)) == expected
    assert pairs(open_index(tmp_path / "other.index", root)) == expected


def test_what_killed_writers_left_goes_a_day_later(tmp_path):
    root, file = plant(tmp_path / "data"), tmp_path / "[lists]" / "train.index"
    names = [".train.index.1-ab.tmp", ".train.index.2-cd.tmp", ".val.index.3-ef.tmp"]
    plant(file.parent, names)
    for name in (names[0], names[2]):
        os.utime(file.parent / name, (0, time.time() - 2 * 86400))
    list_images(root, True, file)
    assert sorted(path.name for path in file.parent.iterdir()) == [*names[1:], "train.index"]


def test_names_that_are_no_text_are_logged(tmp_path):
    """Bytes that are not UTF-8, in a terminal that wants it."""
    root = plant(tmp_path / "\udcff", ["a/1.png"])
    code = "import sys, utils, file_index, pathlib; process_group.init_distributed_mode('cpu'); "
    code += f"file_index.list_images({str(root)!r}, True, pathlib.Path({str(tmp_path / 'x')!r}))"
    own = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=own, capture_output=True)
    assert done.stderr == b""
    assert f"listing the images of {tmp_path}/\\udcff, once".encode() in done.stdout


# --- without memory -----------------------------------------------------------------------------


def generated(count: int):
    """1000 classes and their paths, none of which is kept."""
    for label in range(1000):
        yield f"class{label:04d}", (f"class{label:04d}/{n:09d}.jpg" for n in range(count // 1000))


def cost(file: Path, count: int) -> tuple[int, int]:
    """Most bytes of Python's objects to write an index of so many paths, and those to open it."""
    tracemalloc.start()
    with open(file, "w+b") as opened:
        write_index(opened, "/data", generated(count))
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    index = open_index(file, "/data")
    assert index[count - 1] == (f"/data/class0999/{count // 1000 - 1:09d}.jpg", 999)
    kept = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return written, kept


def test_memory_to_write_and_open_does_not_grow_with_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "BLOCK", 2**16)
    small, large = (cost(tmp_path / "x.index", count) for count in (10_000, 200_000))
    for little, much in zip(small, large, strict=True):
        assert much < 1.2 * little + 10_000
    assert large[1] < 400_000  # the names of 1000 classes; as a list, 30 MB


def test_index_in_memory_takes_a_path_and_eight_bytes_an_image():
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    file = io.BytesIO()
    write_index(file, "/data", generated(100_000))
    index = FileIndex(file.getvalue(), "/data")
    del file
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert kept < 100_000 * (len("class0000/000000000.jpg") + 1 + 8) + 400_000
    assert len(index) == 100_000


# --- the data sets, the scripts -----------------------------------------------------------------


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
    data = folders.ImageFiles(list_images(root, True, tmp_path / "train.index"))
    transform = create_eval_transform(4)
    whole = TransformedDataset(data, transform, 0, nb_classes=3, on_bad="leave out")
    loader = create_loader(whole, EvalSampler(9, 0, 1), 2, num_workers=2)
    batches = list(loader)
    assert [label for _, labels, _, _ in batches for label in labels] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [name for *_, bad in batches for name, _ in bad] == [f"{root}/b/1.png"]
    assert whole.name_of(8) == f"image {root}/c/2.png"


@pytest.mark.parametrize("data_set", ["DIGITS", "CIFAR10", "SYNTHETIC", "tests.tiny:colours"])
def test_flag_is_refused_where_there_are_no_folders(data_set, capsys):
    words = ["--data_set", data_set, "--data_path", "x", "--data_index", "lists"]
    for parser in (options.pretrain_parser(), options.finetune_parser()):
        with pytest.raises(SystemExit):
            options.parse(parser, words)
        expected = f"--data_index lists images in folders, --data_set {data_set} has none"
        assert expected in capsys.readouterr().err


def test_pictures_of_other_data_refuse_the_flag(tmp_path):
    torch.save({"args": {"mask_ratio": 0.6, "data_set": "DIGITS"}}, tmp_path / "a.pth")
    words = ["--checkpoint", str(tmp_path / "a.pth"), "--device", "cpu", "--data_index", "lists"]
    with pytest.raises(UserError, match="lists images in folders, DIGITS has none"):
        visualize.main(options.visualize_parser().parse_args(words))


FINETUNE = ["--model", "tests.tiny:classifier", "--input_size", "16", "--stem_stride", "1"]
FINETUNE += ["--batch_size", "2", "--epochs", "1", "--warmup_epochs", "0"]
FINETUNE += ["--device", "cpu", "--aa", "none", "--log_dir", "none", "--kernels", "torch"]


def rank_main(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process_group.init_distributed_mode("cpu")
    if rank == 1:
        folders.write_index = None  # which is the main process's
    found = [pairs(list_images(folder / "data", True, folder / "train.index")) for _ in range(2)]
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
    mp.spawn(rank_main, (port, tmp_path), nprocs=2)
    expected = [list(pair) for pair in pairs(list_images(root, True))]
    for rank in range(2):
        *lists, error = json.loads((tmp_path / f"{rank}.json").read_text())
        assert lists == [expected, expected]
        assert "no images in 1 class folders: hollow" in error


def test_run_trains_and_evaluates_by_lists_as_without(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        photos(tmp_path / "data" / split, "abc", count)
    words = [*FINETUNE, "--data_path", tmp_path / "data", "--num_workers", 1]
    lists = ["--data_index", tmp_path / "lists"]
    said = [
        run("main_finetune.py", *words, *more, "--output_dir", tmp_path / name).stdout
        for name, more in (("without", []), ("with", lists))
    ]
    assert [text.count("listing the images of") for text in said] == [0, 2]
    made = sorted(path.name for path in (tmp_path / "lists").iterdir())
    assert made == ["train.index", "val.index"]
    logs = {(tmp_path / name / "log.txt").read_text() for name in ("without", "with")}
    assert len(logs) == 1
