# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""pack.py: a pack is its source again, whatever interrupts it, and damage to it is found."""

import csv
import importlib
import io
import json
import pickle
import shlex
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import Timeout
from PIL import Image

import pack
from config import parser as options
from config import tool_flags
from data_loading import packs, parquet
from data_loading.dataset import TransformedDataset
from data_loading.encode import EncodedImages, Encoding
from data_loading.images import Images
from data_loading.pack_writer import PartWriter, member_names
from data_loading.ram_cache import hold_in_ram
from data_loading.sources import DatasetSpec, open_images
from data_loading.split import keep_fraction, split
from data_loading.tables import Columns
from datasets import build_datasets, build_weights, create_dataset
from errors import UserError
from tests import tiny
from tests.groups import start_script
from training import run_lock

CLASSES = ("ant", "ant-2", "bee.1")


def draw(path: Path, seed: int, size: tuple[int, int] = (9, 11), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Class folders with images of several formats and sizes."""
    names = [f"{c}/{n}" for c in CLASSES for n in ("2.jpg", "10.png", "deep/1.webp", "0.1.jpg")]
    for seed, name in enumerate(names):
        draw(tmp_path / "photos" / name, seed, (9 + seed, 11))
    return tmp_path / "photos"


@pytest.fixture
def both(tmp_path, photos) -> Path:
    """The same with train/ and val/."""
    root = tmp_path / "both"
    shutil.copytree(photos, root / "train")
    shutil.copytree(photos / "ant", root / "val" / "ant")
    return root


def packed(*words: object) -> None:
    """Run pack.py in this process."""
    words = [*map(str, words)]
    if "--num_workers" not in words:
        words += ["--num_workers", "0"]
    parser = options.pack_parser()
    args = parser.parse_args(words)
    problems = [*tool_flags.pack_problems(args, vars(parser.parse_args([args.source])))]
    if problems:
        raise UserError(problems[0])
    pack.main(args)


def opened(path: object, train: bool = True, **options) -> Images:
    return open_images("auto", DatasetSpec(str(path), **options), train)


def content(data) -> dict:
    """What a run sees of a data set."""
    return {
        "names": data.encoded_names(),
        "bytes": [data.read(number) for number in range(len(data))],
        "targets": None if data.targets is None else (data.targets.dtype, data.targets.tolist()),
        "classes": data.classes and [*data.classes],
        "kind": data.kind,
        "weights": None if data.weights is None else data.weights.tolist(),
        "split": bool(data.own_split),
    }


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def table(photos: Path, header: str, row: Callable[[int, str], list]) -> Path:
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.*") if p.is_file())
    path = photos / "rows.csv"
    with open(path, "w", newline="") as file:
        rows = [[name, *row(number, name)] for number, name in enumerate(names)]
        csv.writer(file).writerows([["image", *header.split()], *rows])
    return path


# --- a pack is its source again -------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_parts_of_folders_are_kept(train, both, tmp_path):
    packed(both, tmp_path / "out", "--shard_size", 5)
    images = opened(tmp_path / "out", train)
    assert content(images) == content(opened(both, train))
    assert content(pickle.loads(pickle.dumps(images)))["bytes"] == content(images)["bytes"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == [
        "train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar"
    ]  # fmt: skip


def write_files(form: str, folder: Path, photos: Path) -> None:
    """Write train-0 and val-0 with labels: as tar files with class folders, and in other forms."""
    folder.mkdir()
    for part, names in (("train", ("ant", "ant-2")), ("val", ("ant",))):
        files = [(name, photos / name / "2.jpg") for name in names]
        if form == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            images = [{"bytes": file.read_bytes(), "path": f"{name}.jpg"} for name, file in files]
            table = pyarrow.table({"image": images, "label": [name for name, _ in files]})
            path = folder / f"{part}-0.parquet"
            importlib.import_module("pyarrow.parquet").write_table(table, path)
            continue
        with tarfile.open(folder / f"{part}-0.tar", "w") as archive:
            for number, (name, file) in enumerate(files):
                stem = f"{name}/2" if form == "tar" else str(number)
                archive.add(file, f"{stem}.jpg")
                if form == "webdataset":
                    label = tarfile.TarInfo(f"{stem}.json")
                    text = json.dumps({"label": name}).encode()
                    label.size = len(text)
                    archive.addfile(label, io.BytesIO(text))


@pytest.mark.parametrize("form", ["tar", "webdataset", "parquet"])
def test_parts_that_file_names_give_are_kept(form, photos, tmp_path):
    """The images of val-0 were left out, since the list of labels forgot the names of the files."""
    source = tmp_path / "files"
    write_files(form, source, photos)
    packed(source, tmp_path / "out")
    for train in (True, False):
        ours, theirs = content(opened(tmp_path / "out", train)), content(opened(source, train))
        assert ours == theirs
        assert ours["split"]
    assert len(ours["names"]) == 1


def test_source_without_parts_is_split_as_before(photos, tmp_path):
    """--val_split and --label_fraction choose by the names of the images."""
    packed(photos, tmp_path / "out", "--shard_size", 7)
    ours, theirs = opened(tmp_path / "out"), opened(photos)
    assert content(ours) == content(theirs)
    for train in (True, False):
        parts = [split(data, 0.4, train).indices.tolist() for data in (ours, theirs)]
        assert parts[0] == parts[1]
    parts = [keep_fraction(data, 0.5, 0, "class").indices.tolist() for data in (ours, theirs)]
    assert parts[0] == parts[1]
    with pytest.raises(UserError, match="which images are for evaluation"):
        opened(tmp_path / "out", train=False)
    own = open_images("auto", DatasetSpec("/nowhere", str(tmp_path / "out")), False)
    assert content(own) == content(theirs)


@pytest.mark.parametrize(
    ("header", "row", "words", "columns", "kind"),
    [
        ("label", lambda n, name: [name.split("/")[0]], "", Columns(), None),
        ("label", lambda n, name: ["|".join(CLASSES[: n % 4])], "", Columns(), None),
        (
            "x y w split",
            lambda n, name: [n / 3, -n, n % 5 + 1, "train" if n % 4 else "val"],
            "--label_column x y --task regression --weight_column w",
            Columns(labels=("x", "y"), weight="w"),
            "number",
        ),
    ],
    ids=["classes", "several", "numbers"],
)
def test_labels_of_tables_are_kept(header, row, words, columns, kind, photos, tmp_path):
    path = table(photos, header, row)
    packed(path, tmp_path / "out", *words.split())
    theirs = content(open_images("auto", DatasetSpec(str(path), kind=kind, columns=columns), True))
    assert content(opened(tmp_path / "out")) == theirs
    assert theirs["kind"] == (kind or ("multi" if "|" in path.read_text() else "class"))
    assert (theirs["weights"] is not None) == ("w" in header.split())


@pytest.mark.filterwarnings("error")
def test_mapped_numbers_give_no_warning(photos, tmp_path):
    """torch warned of read-only memory in each worker."""
    path = table(photos, "x w", lambda n, name: [n / 3, n])
    words = "--label_column x --task regression --weight_column w"
    packed(path, tmp_path / "out", *words.split())
    words = ["--data_path", str(tmp_path / "out"), "--disable_eval", "--sampling", "weighted"]
    data = build_datasets(options.parse(options.finetune_parser(), words))[0]
    torch.set_warn_always(True)  # by default torch warns once
    try:
        assert data[0, 0][1].shape == (1,)
        assert build_weights(data, "weighted").sum() == sum(range(12))
    finally:
        torch.set_warn_always(False)


def test_rows_with_the_same_image_share_it(photos, tmp_path):
    path = table(photos, "label", lambda n, name: [n % 2])
    with open(path, "a") as file:
        file.write("ant/2.jpg,1\nbee.1/2.jpg,0\n")
    packed(path, tmp_path / "out")
    assert content(opened(tmp_path / "out")) == content(opened(path))
    with tarfile.open(tmp_path / "out" / "images-000000.tar") as file:
        assert len(file.getnames()) == len(set(file.getnames())) == len(opened(path)) - 2


def test_zip_and_mixed_sources(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("ant/2.jpg", "ant-2/2.jpg"):
            file.write(photos / name, name)
    source = f"{tmp_path / 'a.zip'}:0.7,{photos}:0.3"
    packed(source, tmp_path / "out")
    ours, theirs = content(opened(tmp_path / "out")), content(opened(source))
    assert ours == theirs
    assert ours["weights"][0] == pytest.approx(0.35)
    packed(tmp_path / "out", tmp_path / "again")
    for pack_of_it in ("out", "again"):  # drawn by the shares, as the sources are
        weights = [
            build_weights(TransformedDataset(opened(path), torch.clone, 0), "shuffle")
            for path in (tmp_path / pack_of_it, source)
        ]
        assert torch.equal(*weights)
    with tarfile.open(tmp_path / "out" / "images-000000.tar") as file:
        assert {"ant/2.jpg", "ant/2-2.jpg"} < set(file.getnames())


def test_parquet_names_pack_py(photos, tmp_path, log, capsys):
    """Its shuffled reads are slow; packing reads it in order."""
    pyarrow = pytest.importorskip("pyarrow")
    files = sorted(photos.glob("*/*.jpg"))
    images = [{"bytes": f.read_bytes(), "path": f"{n}.jpg"} for n, f in enumerate(files)]
    rows = {"image": images, "label": [file.parent.name for file in files]}
    path = tmp_path / "photos.parquet"
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table(rows), path)
    theirs = content(opened(path))
    assert f"pack it once: python pack.py {path} FOLDER" in log.text
    packed(path, tmp_path / "out")
    assert content(opened(tmp_path / "out")) == theirs
    shown = capsys.readouterr().out
    assert "6 images to pack" in shown
    assert "pack it once" not in shown


def test_each_row_group_of_parquet_is_decoded_once(photos, tmp_path, monkeypatch):
    """Rows may be shuffled: in order of the names each image would decode a row group."""
    pyarrow = pytest.importorskip("pyarrow")
    files = sorted(photos.glob("*/*.jpg"))
    paths = [f"{number * 5 % 6}.jpg" for number in range(6)]
    pairs = zip(files, paths, strict=True)
    rows = [{"bytes": file.read_bytes(), "path": path} for file, path in pairs]
    table = pyarrow.table({"image": rows, "label": [file.parent.name for file in files]})
    path = tmp_path / "photos.parquet"
    importlib.import_module("pyarrow.parquet").write_table(table, path, row_group_size=1)
    theirs = content(opened(path))
    decoded, images = [], parquet.ParquetFile.images
    monkeypatch.setattr(
        parquet.ParquetFile,
        "images",
        lambda file, column, group: decoded.append(group) or images(file, column, group),
    )
    monkeypatch.setattr(pack, "SAMPLES", 1)
    packed(path, tmp_path / "out", "--shard_size", 4)
    assert decoded == [*range(6)]
    assert content(opened(tmp_path / "out")) == theirs
    data = opened(path)
    decoded.clear()
    hold_in_ram(data, "train")
    assert decoded == [*range(6), *range(6)]  # for the sizes, and to copy them
    assert content(data) == theirs


def test_two_images_of_one_name(tmp_path):
    """Shards of a WebDataset may number their images from 0."""
    for number in range(2):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as file:
            draw(tmp_path / f"{number}.png", number)
            for name, data in (
                ("0.png", (tmp_path / f"{number}.png").read_bytes()),
                ("0.cls", b"%d" % number),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    source = str(tmp_path / "s-{0..1}.tar")
    packed(source, tmp_path / "out")
    ours = content(opened(tmp_path / "out"))
    assert ours == content(opened(source))
    assert ours["bytes"][0] != ours["bytes"][1]
    with tarfile.open(tmp_path / "out" / "images-000000.tar") as file:
        assert file.getnames() == ["0.png", "0-2.png"]


@pytest.mark.parametrize(
    ("header", "row", "words", "kind"),
    [
        ("label", lambda n, name: [name.split("/")[0]], "", None),
        ("label", lambda n, name: ["|".join(CLASSES[: n % 4])], "", None),
        ("x y", lambda n, name: [n / 3, -n], "--label_column x y --task regression", "number"),
    ],
    ids=["classes", "several", "numbers"],
)
def test_label_files_are_a_webdataset(header, row, words, kind, photos, tmp_path):
    """The shards alone, without the list, have all labels."""
    path = table(photos, header, row)
    packed(path, tmp_path / "out", "--label_files", "--shard_size", 5, *words.split())
    columns = Columns(labels=("x", "y") if kind else ())
    spec = DatasetSpec(str(tmp_path / "out" / "*.tar"), kind=kind, columns=columns)
    ours, theirs = content(open_images("auto", spec, True)), content(opened(tmp_path / "out"))
    assert len(ours["bytes"]) == 12
    found = dict(zip(ours["bytes"], ours["targets"][1], strict=True))
    for image, label in zip(theirs["bytes"], theirs["targets"][1], strict=True):
        assert found[image] == label
    assert (ours["classes"], ours["kind"]) == (theirs["classes"], theirs["kind"])


def test_pretraining_reads_a_pack_without_labels(photos, tmp_path):
    packed(photos, tmp_path / "out")
    ours, theirs = (opened(p, labeled=False) for p in (tmp_path / "out", photos))
    assert content(ours) == content(theirs)
    assert ours.targets is None


def test_images_without_labels(photos, tmp_path):
    flat = photos / "ant"
    shutil.rmtree(flat / "deep")
    with pytest.raises(UserError, match="or pack the images without labels: --unlabeled$"):
        packed(flat, tmp_path / "out")
    packed(flat, tmp_path / "out", "--unlabeled")
    packed(flat, tmp_path / "same", "--data_set", "folder")
    for name in ("out", "same"):
        ours, theirs = (opened(path, labeled=False) for path in (tmp_path / name, flat))
        assert content(ours) == content(theirs)
        with pytest.raises(UserError, match="was packed with --unlabeled true"):
            opened(tmp_path / name)


def test_data_set_of_your_own(tmp_path):
    """Its images have no files: the pixels are kept, as PNG."""
    words = ("--data_set", "tests.tiny:colors")
    packed("nothing", tmp_path / "out", *words)
    for train, length in ((True, 26), (False, 7)):
        ours, theirs = opened(tmp_path / "out", train), tiny.colors("", train)
        assert [len(ours), *ours.classes] == [length, "red", "green", "blue"]
        for number in range(length):
            image, label = ours[number]
            assert label == theirs[number][1]
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            assert torch.equal(pixels, theirs[number][0])
    packed("nothing", tmp_path / "plain", *words, "--unlabeled", "--part", "train")
    assert len(opened(tmp_path / "plain", labeled=False)) == 26
    with pytest.raises(UserError, match="has files of train, and none for evaluation"):
        opened(tmp_path / "plain", train=False, labeled=False)


class Odd(torch.utils.data.Dataset):
    """A data set of float images."""

    classes = ("a",)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 4, 4), 0


def odd(data_path: str, train: bool) -> Odd:
    return Odd()


def test_images_that_no_file_holds_are_refused(tmp_path):
    with pytest.raises(UserError, match="image number 0: got a torch.float32 tensor"):
        packed("nothing", tmp_path / "out", "--data_set", "tests.test_pack:odd", "--part", "train")


# --- encoding -------------------------------------------------------------------------------------


def test_larger_images_are_resized_by_their_shorter_side(photos, tmp_path):
    draw(photos / "ant" / "10.jpg", 9, (40, 90))  # next to 10.png
    Image.new("L", (30, 50), 77).save(photos / "ant" / "gray.png")
    packed(photos, tmp_path / "out", "--size", 12, "--quality", 95)
    ours, theirs = opened(tmp_path / "out"), opened(photos)
    assert ours.encoded_names() == theirs.encoded_names()
    assert ours.targets.tolist() == theirs.targets.tolist()
    for number, name in enumerate(ours.names):
        image = Image.open(io.BytesIO(ours.read(number)))
        original = Image.open(photos / name)
        if min(original.size) <= 12:
            assert ours.read(number) == (photos / name).read_bytes()
            continue
        assert (image.format, min(image.size), image.mode) == ("JPEG", 12, original.mode)
        size = [round(side * 12 / min(original.size)) for side in original.size]
        assert np.abs(np.subtract(image.size, size)).max() <= 1
    with tarfile.open(tmp_path / "out" / "images-000000.tar") as file:
        names = file.getnames()
    assert {"ant/10.jpg", "ant/10-2.png", "ant/gray.jpg"} < {*names}
    assert len({name.rpartition(".")[0] for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "kind", "ending"), [("jpeg", "JPEG", ".jpg"), ("webp", "WEBP", ".webp")]
)
def test_formats(name, kind, ending):
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    sizes = []
    for quality in (20, 95):
        data, extension = Encoding(20, name, quality)(image, b"x")
        assert (Image.open(io.BytesIO(data)).format, extension) == (kind, ending)
        assert Image.open(io.BytesIO(data)).size == (26, 20)
        sizes.append(len(data))
    assert sizes[0] < sizes[1]
    smooth = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    found = Image.open(io.BytesIO(Encoding(24, name, 95)(smooth, b"x")[0]))
    expected = np.asarray(smooth.resize((32, 24), Image.BICUBIC), float)
    assert np.abs(np.asarray(found, float) - expected).mean() < 1.5
    assert Encoding(None, name, 90)(image, b"x") == (b"x", "")
    assert Encoding(30, name, 90)(image, b"x") == (b"x", "")


def test_deep_pixels_are_never_stored_in_8_bits(tmp_path):
    path = tmp_path / "a" / "1.png"
    path.parent.mkdir()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(path)
    packed(tmp_path / "a", tmp_path / "out", "--unlabeled")
    assert opened(tmp_path / "out", labeled=False).read(0) == path.read_bytes()
    with pytest.raises(UserError, match=r"1.png: its pixels have more than 8 bits \(mode I;16\)"):
        packed(tmp_path / "a", tmp_path / "small", "--unlabeled", "--size", 10)
    with pytest.raises(UserError, match="image number 0: .* without a file are stored as PNG of 8"):
        raise EncodedImages([(Image.open(path), 0)], Encoding())[0, 0]


@pytest.mark.parametrize("form", ["ppm", "tiff"])
def test_color_of_16_bits_is_never_cut_to_8(form, tmp_path):
    """Pillow decodes its upper 8 bits, and says nothing of it."""
    deep = np.random.default_rng(0).integers(0, 2**16, (20, 20, 3), dtype=np.uint16)
    path = tmp_path / "a" / f"1.{form}"
    path.parent.mkdir()
    if form == "tiff":
        pytest.importorskip("tifffile").imwrite(path, deep, photometric="rgb")
    else:
        path.write_bytes(b"P6 20 20 65535\n" + deep.astype(">u2").tobytes())
    packed(tmp_path / "a", tmp_path / "out", "--unlabeled", "--size", 20)  # not smaller
    assert opened(tmp_path / "out", labeled=False).read(0) == path.read_bytes()
    with pytest.raises(UserError, match="more than 8 bits: --size resizes 8-bit gray and RGB"):
        packed(tmp_path / "a", tmp_path / "small", "--unlabeled", "--size", 10)


def test_turned_photos_are_upright_once(tmp_path):
    """EXIF says that the camera was turned; a resized file is upright and says nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "a" / "1.jpg", 0, (20, 40), exif=exif)
    packed(tmp_path / "a", tmp_path / "out", "--unlabeled", "--size", 10)
    data = opened(tmp_path / "out", labeled=False).read(0)
    assert Image.open(io.BytesIO(data)).size == (10, 20)
    assert not Image.open(io.BytesIO(data)).getexif()


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 4, 5, 12, 13])
@pytest.mark.parametrize("size", [(4, None), (None, 5000)], ids=["images", "bytes"])
def test_interrupted_pack_equals_an_uninterrupted_one(after, size, both, tmp_path, monkeypatch):
    (both / "train" / "ant" / "5.png").write_bytes(b"no image")
    (both / "train" / "bee.1" / "9.png").write_bytes(b"no image")
    parser = options.pack_parser()
    shared = [str(both), "replaced", "--on_bad_image", "skip", "--num_workers", "0"]
    args = [parser.parse_args(shared) for _ in range(2)]
    for each, name in zip(args, ("whole", "broken"), strict=True):
        each.dest, each.shard_size = str(tmp_path / name), size
    pack.main(args[0])
    add, count = PartWriter.add, 0

    def stop(*words) -> bool:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return add(*words)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "add", stop)
        with pytest.raises(SystemExit) as end:
            pack.main(args[1])
    assert end.value.code == 130
    with pytest.raises(UserError, match="is an unfinished pack; run the command of pack.py again"):
        opened(tmp_path / "broken")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("*.tar")}
    pack.main(args[1])
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")
    for name, changed in before.items():  # was not written again
        assert (tmp_path / "broken" / name).stat().st_mtime_ns == changed
    listed = (tmp_path / "whole" / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0].rpartition("/")[2] for line in listed] == ["5.png", "9.png"]


@pytest.mark.slow
def test_killed_pack_continues(tmp_path):
    """After a kill there is half a shard, and the lock of a process that is gone."""
    words = ["nothing", tmp_path / "out", "--data_set", "tests.tiny:stalls", "--shard_size", 4]
    words += ["--num_workers", 0, "--part", "train"]
    output = tmp_path / "output.txt"
    # All 26 images are read for the estimate, then a batch of 16, and 4 of the next one.
    (process,) = start_script("pack.py", words, [(output, output)], {"STALL": "train:46"})
    while process.is_alive() and "asleep" not in (output.exists() and output.read_text() or ""):
        time.sleep(0.05)
    process.kill()
    process.join()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"train-000002.tar", "train-000003.tar.part", "pack.json"}
    packed(*words)
    packed(words[0], tmp_path / "whole", *words[2:])
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_number_of_processes_changes_no_byte(both, tmp_path):
    for workers in (0, 2):
        packed(both, tmp_path / str(workers), "--shard_size", 5, "--num_workers", workers)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


def test_finished_pack_is_left_alone(photos, tmp_path, capsys):
    packed(photos, tmp_path / "out")
    before = files_of(tmp_path / "out")
    packed(photos, tmp_path / "out")
    assert "the pack is finished; nothing to do" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == before


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "found"),
    [
        (
            "train-000001.tar",
            700,
            "train-000001.tar: ant-2/deep/1.webp: damaged: its CRC-32 differs",
        ),
        ("train-000001.tar", 3, "train-000001.tar: its SHA-256 differs, outside the images"),
        ("val-000000.tar", -3, "val-000000.tar: its SHA-256 differs, outside the images"),
        ("index/train/names.npy", -3, "index/train/names.npy: missing, or its SHA-256 differs"),
        ("index/val/index.json", 9, "index/val/index.json: missing, or its SHA-256 differs"),
    ],
)
def test_flipped_byte_is_found_and_named(name, place, found, both, tmp_path, capsys):
    packed(both, tmp_path / "out", "--shard_size", 7)
    packed(tmp_path / "out", "--verify")
    assert "16 images in 3 shards are whole" in capsys.readouterr().out
    path = tmp_path / "out" / name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"1 fault in .*{found}"):
        packed(tmp_path / "out", "--verify")


def test_shard_that_was_cut_short_is_refused_before_training(photos, tmp_path):
    packed(photos, tmp_path / "out", "--shard_size", 5)
    path = tmp_path / "out" / "images-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    text = "1 shard of 3 missing or not of the size in pack.json: images-000001.tar; copy the pack"
    with pytest.raises(UserError, match=text):
        opened(tmp_path / "out")
    with pytest.raises(UserError, match=r"1 fault in .*000001.tar: \d+ bytes, expected \d+ bytes"):
        packed(tmp_path / "out", "--verify")
    path.unlink()
    with pytest.raises(UserError, match=text):
        opened(tmp_path / "out")
    other = tmp_path / "out" / "images-000000.tar"  # another fault is named too
    data = bytearray(other.read_bytes())
    data[600] ^= 1
    other.write_bytes(data)
    with pytest.raises(UserError, match=r"2 faults in .*CRC-32 differs, .*000001.tar: missing"):
        packed(tmp_path / "out", "--verify")


def test_pack_that_names_files_outside_is_refused(photos, tmp_path):
    packed(photos, tmp_path / "out")
    path = tmp_path / "out" / packs.NAME
    about = json.loads(path.read_text())
    about["parts"]["images"]["shards"][0]["name"] = "../photos.tar"
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match="names other parts or files outside the pack"):
        opened(tmp_path / "out")
    path.write_text(json.dumps({**about, "version": 99}))
    with pytest.raises(UserError, match="has version 99, expected 1"):
        opened(tmp_path / "out")
    path.write_text("{")
    with pytest.raises(UserError, match="pack.json cannot be used: "):
        opened(tmp_path / "out")


def test_labels_that_were_damaged_are_refused(photos, tmp_path):
    packed(photos, tmp_path / "out")
    path = tmp_path / "out" / "index" / "images" / "targets.npy"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged: it does not fit"):
        opened(tmp_path / "out")


def test_bad_image_stops_the_pack(photos, tmp_path):
    (photos / "ant" / "1.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"ant/1.jpg \(the file is an HTML page.*on_bad_image skip"):
        packed(photos, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_skip_continues_a_pack_that_a_bad_image_stopped(photos, tmp_path, monkeypatch):
    """The message of the error says to give --on_bad_image skip, after hours of packing."""
    (photos / "bee.1" / "10.png").write_bytes(b"<html>")
    monkeypatch.setattr(pack, "SAMPLES", 1)  # or the estimate would find it
    words = (photos, tmp_path / "out", "--shard_size", 3)
    with pytest.raises(UserError, match="or skip such images: --on_bad_image skip"):
        packed(*words)
    first = tmp_path / "out" / "images-000000.tar"
    before = first.stat().st_mtime_ns
    packed(*words, "--on_bad_image", "skip")
    assert len(opened(tmp_path / "out")) == 11
    assert first.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"--on_bad_image skip \(now error\)"):
        packed(*words)


def test_source_of_bad_images_alone_is_an_error(tmp_path):
    for number in range(2):
        (tmp_path / "a" / f"{number}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match="no image can be used; see bad_images.txt"):
        packed(tmp_path / "a", tmp_path / "out", "--unlabeled", "--on_bad_image", "skip")
    bad = tmp_path / "out" / "bad_images.txt"
    assert len(bad.read_text().splitlines()) == 2
    for number in range(2):
        draw(tmp_path / "a" / f"{number}.jpg", number)
    packed(tmp_path / "a", tmp_path / "out", "--unlabeled", "--on_bad_image", "skip")
    assert not bad.exists()


def test_errors_name_no_flag_of_other_scripts(photos, both, tmp_path):
    """--val_split is none of pack.py."""
    with pytest.raises(UserError, match="no column of splits; give what holds these .*SOURCE$"):
        packed(photos, tmp_path / "out", "--part", "val")
    with pytest.raises(UserError, match="as SOURCE; or pack the training images alone: --part tr"):
        packed(f"{both},{photos}", tmp_path / "out")


def test_names_that_lead_outside_are_refused(photos, tmp_path):
    (tmp_path / "rows.csv").write_text("image,label\nphotos/ant/2.jpg,0\n../x.jpg,1\n")
    draw(tmp_path.parent / "x.jpg", 0)
    with pytest.raises(UserError, match="1 of 2 paths lead out of the folder.*: ../x.jpg; write"):
        packed(tmp_path / "rows.csv", tmp_path / "out")


def test_member_names():
    names = [b"/data/a.jpg", b"./b//c.png", b"b/c.jpg", b"b/c.png", b"b/c-2.jpg", b"\xff.jpg"]
    found = ["data/a.jpg", "b/c.png", "b/c.jpg", "b/c-2.png", "b/c-2.jpg", "\udcff.jpg"]
    assert member_names(names, by_stem=False) == found
    found = ["data/a.jpg", "b/c.png", "b/c-3.jpg", "b/c-4.png", "b/c-2.jpg", "\udcff.jpg"]
    assert member_names(names, by_stem=True) == found
    names = [b"a.b/c.d.jpg", b"a.b/c_d.png", b"e"]
    assert member_names(names, True, dots=False) == ["a.b/c_d.jpg", "a.b/c_d-2.png", "e"]


def test_names_of_any_bytes_are_stored(tmp_path):
    """Long names and other alphabets, as other programs read them."""
    names = ["x" * 180 + ".png", "\u00e9t\u00e9/\u96ea.png"]
    for seed, name in enumerate(names):
        draw(tmp_path / "a" / name, seed)
    packed(tmp_path / "a", tmp_path / "out", "--unlabeled")
    with tarfile.open(tmp_path / "out" / "images-000000.tar") as file:
        assert sorted(file.getnames()) == sorted(names)
        for name in names:
            assert file.extractfile(name).read() == (tmp_path / "a" / name).read_bytes()
    plain = opened(tmp_path / "out" / "images-000000.tar", labeled=False)  # without the index
    assert content(plain) == content(opened(tmp_path / "a", labeled=False))


def test_place_that_is_no_pack_is_refused(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for dest, text in (
        (tmp_path / "full", r"holds other files \(notes.txt\) and no pack"),
        (tmp_path / "full" / "notes.txt", "is a file; give a folder"),
        (photos / "out", "lies in .*photos, which is packed"),
    ):
        with pytest.raises(UserError, match=text):
            packed(photos, dest)
    with pytest.raises(UserError, match="is no pack: it has no pack.json"):
        packed(tmp_path / "full", "--verify")


def test_place_of_another_pack_py_is_refused(photos, tmp_path, monkeypatch):
    def held(lease) -> None:
        raise Timeout("")

    monkeypatch.setattr(run_lock, "_wait_for", held)
    with pytest.raises(UserError, match="out is in use by .*; choose another DEST, or stop that"):
        packed(photos, tmp_path / "out")


def test_other_flags_or_images_are_refused(photos, tmp_path):
    packed(photos, tmp_path / "out", "--size", 12)
    with pytest.raises(UserError, match=r"flags: --size 12 \(now 10\), --quality 90 \(now 5\)"):
        packed(photos, tmp_path / "out", "--size", 10, "--quality", 5)
    with pytest.raises(UserError, match=r"flags: --shard_size 1000MB \(now 5\); give the same"):
        packed(photos, tmp_path / "out", "--size", 12, "--shard_size", 5)
    draw(photos / "ant" / "77.png", 1)
    with pytest.raises(UserError, match=r"begun with other flags: --size 12 \(now 10\); give"):
        packed(photos, tmp_path / "out", "--size", 10)
    with pytest.raises(UserError, match=r"than the source has now \(images: 13 images\); give"):
        packed(photos, tmp_path / "out", "--size", 12)


def test_disk_without_space_is_refused(photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match="KiB are needed, 9.8 KiB are free; choose another disk"):
        packed(photos, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    packed(photos, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert 10_000 < size < 50_000


def test_disk_that_becomes_full_keeps_finished_shards(photos, tmp_path, monkeypatch):
    real, count = packed, 0
    add = PartWriter.add

    def full(*words) -> bool:
        nonlocal count
        count += 1
        if count > 7:
            raise OSError(28, "No space left on device")
        return add(*words)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "add", full)
        with pytest.raises(UserError, match=r"cannot write \(No space left on device\); free some"):
            real(photos, tmp_path / "out", "--shard_size", 3)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    packed(photos, tmp_path / "out", "--shard_size", 3)
    assert content(opened(tmp_path / "out")) == content(opened(photos))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("photos", "DEST is missing; give the folder of the pack"),
        ("photos --verify --size 3", "--size is for packing; drop it, or give DEST"),
        ("photos out --quality 80", "--quality is for resized images; give --size too"),
        ("photos out --data_set folder --label_files", "--label_files is for labels, and --data"),
        ("photos out --unlabeled --label_files", "--label_files is for labels, and --unlabeled"),
        ("photos out --unlabeled --task regression", "--task is for labels, and --unlabeled"),
    ],
)
def test_flags_that_cannot_work(words, text):
    with pytest.raises(UserError, match=text):
        packed(*words.split())


@pytest.mark.parametrize("text", ["0", "12kB", "1.5GB", "-3", "many"])
def test_wrong_shard_sizes(text, capsys):
    with pytest.raises(SystemExit):
        options.pack_parser().parse_args(["a", "b", "--shard_size", text])
    assert "expected images per shard such as 10000, or a size such as" in capsys.readouterr().err


def test_weights_of_a_pack_are_used(photos, tmp_path):
    """--sampling weighted needs a column in other sources."""
    path = table(photos, "label w", lambda n, name: [name.split("/")[0], n])
    packed(path, tmp_path / "out", "--label_column", "label", "--weight_column", "w")
    words = ["--sampling", "weighted", "--data_path"]
    parse = options.parse
    args = parse(options.finetune_parser(), [*words, str(tmp_path / "out")])
    data = create_dataset(args.data_set, DatasetSpec(args.data_path), True)
    assert sorted(data.weights) == [*range(12)]
    with pytest.raises(SystemExit):
        parse(options.finetune_parser(), [*words, str(photos)])


def test_commands_of_the_docs(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    page = Path(__file__).parents[1] / "docs" / "data.md"
    lines = page.read_text().partition("## Packing")[2].partition("```sh")[2].splitlines()
    commands = [line for line in lines if line.startswith("python pack.py")]
    for line in commands[:3]:
        packed(*shlex.split(line, comments=True)[2:])
    assert len(commands) >= 3
    assert content(opened("packed")) == content(opened("photos"))
    assert opened("small").encoded_names() == opened("photos").encoded_names()
