# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files from outside run no code and write nowhere; ours are as open as the user wants.

Malicious checkpoints: test_checkpoint; bombs and programs that
pose as images: test_decoding.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import hashlib
import io
import lzma
import os
import pickle
import stat
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import visualize
from benchmarks.cifar_runs import load
from config import parser as options
from data_loading import builtin
from data_loading.builtin import Cifar, Zip, find_cifar, read_tar, unpickle
from errors import UserError
from parallel import slurm, submit
from tests.test_end_to_end import FINETUNE, PRETRAIN, run
from tests.test_layout import product_files
from tests.training.test_checkpoint import Malicious
from weights.files import read_checkpoint


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- tar and zip ----------------------------------------------------------------------------


def tar_of(path: Path, name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Path:
    """One honest member and one of this name and kind."""
    with tarfile.open(path, "w:gz") as archive:
        for own, own_kind in (("data/batch", tarfile.REGTYPE), (name, kind)):
            member = tarfile.TarInfo(own)
            member.type, member.linkname = own_kind, target
            member.size = 4 if own_kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"evil"))
    return path


NAMES = {
    "above": "../evil", "deep above": "data/../../evil", "absolute": "/tmp/evil",
    "of Windows": "C:evil", "above in Windows": "data\\..\\..\\evil",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_tar_member_outside_of_its_folder_is_refused(tmp_path, name):
    path = tar_of(tmp_path / "a.tar.gz", name)
    with pytest.raises(UserError, match="a.tar.gz is refused: its member .* outside of its folder"):
        read_tar(path, ["data/batch"])
    assert everything(tmp_path) == {"a.tar.gz"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["data/link", "data/batch"])
def test_tar_member_that_is_a_link_or_device_is_refused(tmp_path, kind, name):
    path = tar_of(tmp_path / "a.tar.gz", name, kind, target="/etc/passwd")
    with pytest.raises(UserError, match="is a link or a device"):
        read_tar(path, ["data/batch"])


def test_tar_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "LARGEST", 1000)
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for number in range(3):  # together
            member = tarfile.TarInfo(f"data/{number}")
            member.size = 400
            archive.addfile(member, io.BytesIO(bytes(400)))
    with pytest.raises(UserError, match="unpacks to 1200 bytes"):
        read_tar(path, ["data/0"])


@pytest.mark.parametrize("ending", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_tar_header_that_claims_to_be_large_is_not_read(tmp_path, ending, kind):
    """A kilobyte of zeros, as a header of 64 MiB: tarfile would hold it, and a copy."""
    path, size = tmp_path / f"a.tar.{ending}", 2**26
    opener = {"": open, "gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[ending]
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = kind, size
    with opener(path, "wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(2 if ending == "" else 64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match="has headers of more than"):
        read_tar(path, ["data/0"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


@pytest.mark.parametrize("ending", ["", "gz", "bz2", "xz"])
def test_honest_tar_of_any_compression_is_read(tmp_path, ending):
    path, content = tmp_path / "a.tar", {"data/0": b"0" * 3000, "a" * 300: b"1", "b": b""}
    with tarfile.open(path, f"w:{ending}") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert read_tar(path, content) == content
    assert read_tar(path, ["b"]) == {"b": b""}


def test_checkpoint_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """torch stores what it saves; four hundred megabytes of zeros became a pickle to read."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**25))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match="'archive/data.pkl' is compressed"):
        read_checkpoint(path)


def test_compressed_checkpoint_becomes_a_good_one_as_the_message_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.arange(1000)}}, "own.pth")
    with zipfile.ZipFile("own.pth") as own, zipfile.ZipFile("a.pth", "w", 8) as packed:
        for name in own.namelist():
            packed.writestr(name, own.read(name))
    with pytest.raises(UserError, match="is compressed") as refused:
        read_checkpoint("a.pth")
    code = str(refused.value).split('python -c "')[1].rstrip('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(read_checkpoint("stored.pth")["model"]["a"], torch.arange(1000))


def zip_of(path: Path, name: str, link: bool = False) -> Path:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK if link else stat.S_IFREG) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/a/1.jpg", b"")
        archive.writestr(member, b"/etc/passwd")
    return path


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_zip_member_outside_of_its_folder_is_refused(tmp_path, name):
    path = zip_of(tmp_path / "a.zip", name)
    with pytest.raises(UserError, match="outside of its folder"):
        load(path, {"train": 1})
    assert everything(tmp_path) == {"a.zip"}


def test_zip_member_that_is_a_link_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a link"):
        load(zip_of(tmp_path / "a.zip", "train/a/2.jpg", link=True), {"train": 1})


def test_zip_bomb_is_not_unpacked_whatever_size_it_claims(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(2**22))
    for claimed in (2**22, 10):
        data = path.read_bytes().replace(
            (2**22).to_bytes(4, "little"), claimed.to_bytes(4, "little")
        )
        (tmp_path / "b.zip").write_bytes(data)
        with Zip(tmp_path / "b.zip") as archive:
            refused = (UserError, zipfile.BadZipFile)
            with pytest.raises(refused, match="more than 1000 bytes|CRC"):
                archive.read("bomb", largest=1000)


# --- pickles --------------------------------------------------------------------------------


def test_pickle_gets_arrays_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2], "x": b"y"}
    again = unpickle(pickle.dumps(content))
    assert (again.pop("data") == content["data"]).all()
    assert again == {"labels": [1, 2], "x": b"y"}
    for protocol in (0, 2, 5):
        for evil in (Malicious(), {"data": [Malicious()]}, os.system, eval, getattr):
            with pytest.raises(UserError, match="asks for .*could run"):
                unpickle(pickle.dumps(evil, protocol))
    for junk in (b"", b"junk", b"\x80\x04", pickle.dumps(content)[:-9]):
        with pytest.raises(UserError, match="is damaged"):
            unpickle(junk)
    assert everything(tmp_path) == set()


class Forged:
    """An array of pointers, by numpy's own types: reading it reads memory anywhere, and calls it.

    The last number of a type's state says that its bytes are no objects, against its fields.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __reduce__(self) -> tuple:
        fields = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
        if self.what == "type":
            return np.dtype, ("V8", False, True), fields
        pointer = b"\x41\x41\x41\x41\0\0\0\0"
        if self.what == "bytes with fields":
            return np.dtype, ("u1", False, True), fields
        if self.what == "array":
            return np.ndarray, ((1,), Forged("type"), pointer)
        kind = np.dtype("O") if self.what == "array of objects" else Forged("bytes with fields")
        make, empty, _ = np.empty(0, np.uint8).__reduce__()
        return make, empty, (1, (1,), kind, False, pointer)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("what", ["type", "array", "array of objects", "array with fields"])
def test_pickle_cannot_forge_pointers(what, protocol):
    """It ended the process, or ran what lay there."""
    for content in (Forged(what), {"data": Forged(what)}, {"data": [Forged(what)]}):
        with pytest.raises(UserError, match="array|asks for _codecs.encode"):
            unpickle(pickle.dumps(content, protocol))


def test_pickle_gets_no_numpy_type_and_no_array_without_content():
    for odd in (np.zeros(2), np.zeros((2, 2), np.uint8, "F"), np.zeros(2, "S1"), np.dtype("u2")):
        with pytest.raises(UserError, match="expected uint8"):
            unpickle(pickle.dumps({"data": odd}, 4))
    make, empty, state = np.zeros(6, np.uint8).__reduce__()
    for bad in (empty, (*empty, 1)):
        head = pickle.dumps({"data": _Call(make, bad)}, 4)
        with pytest.raises(UserError, match="has no content"):
            unpickle(head)
    for shape in ((7,), (-1, 4), ("x",), None):
        with pytest.raises(UserError, match="is damaged|expected uint8"):
            unpickle(pickle.dumps(_Call(make, empty, (1, shape, *state[2:])), 4))
    for name in (np.ndarray, np.dtype):
        kept = unpickle(pickle.dumps({"x": name}))["x"]
        assert kept.__module__ == "archives"


class _Call:
    """Pickles as a call, and a state for its result."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple:
        return self.parts


class Fake:
    """What torchvision knows of CIFAR-10, for files made here."""

    base_folder, filename, url = "cifar-10-batches-py", "cifar-10-python.tar.gz", "https://x/y"
    meta = {"filename": "batches.meta", "key": "label_names", "md5": ""}
    tgz_md5 = ""


def fake_cifar(root: Path, evil: object = None) -> type:
    """An archive of two batches, checksums included; one of them may hold more than arrays."""
    random = np.random.default_rng(0)
    files = {
        name: pickle.dumps(
            {"data": random.integers(0, 256, (4, 3072), np.uint8), "labels": [3] * 4}
        )
        for name in ("data_batch_1", "test_batch")
    }
    files["batches.meta"] = pickle.dumps({"label_names": ["a", "b"]})
    if evil is not None:
        files["data_batch_1"] = pickle.dumps(evil)
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    kind = type("CIFAR10", (Fake,), {"meta": Fake.meta | {"md5": md5["batches.meta"]}})
    kind.train_list = [["data_batch_1", md5["data_batch_1"]]]
    kind.test_list = [["test_batch", md5["test_batch"]]]
    with tarfile.open(root / kind.filename, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    kind.tgz_md5 = hashlib.md5((root / kind.filename).read_bytes()).hexdigest()
    return kind


def test_cifar_is_read_from_the_archive_and_then_from_the_files(tmp_path):
    kind = fake_cifar(tmp_path)
    first = find_cifar(kind, str(tmp_path), True)
    (tmp_path / kind.filename).unlink()
    again = Cifar(kind, tmp_path, True, download=False)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    for data in (first, again):
        assert (len(data), data[2][1], data.classes) == (4, 3, ("a", "b"))
        red = np.asarray(data[2][0])[..., 0]
        assert (red == pixels[2, :1024].reshape(32, 32)).all()


def test_cifar_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Half a file would be refused by its checksum from then on."""
    kind = fake_cifar(tmp_path)
    monkeypatch.setattr("weights.files.os.replace", lambda *paths: 1 / 0)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        find_cifar(kind, str(tmp_path), True)
    assert everything(tmp_path / kind.base_folder) == set()
    monkeypatch.undo()
    assert len(find_cifar(kind, str(tmp_path), True)) == 4


def test_checkpoint_does_not_choose_where_data_is_downloaded(tmp_path, monkeypatch):
    run_args = {"mask_ratio": 0.6, "model": "convnextv2_atto", "data_set": "CIFAR10"}
    run_args["data_path"] = str(tmp_path / "chosen")
    torch.save({"model": {}, "args": run_args}, tmp_path / "a.pth")
    monkeypatch.setattr(builtin, "download_url", lambda *words: 1 / 0)
    parser = options.visualize_parser()
    args = parser.parse_args(["--checkpoint", str(tmp_path / "a.pth"), "--device", "cpu"])
    with pytest.raises(UserError, match="downloads CIFAR10; give the folder with --data_path"):
        visualize.main(args)
    assert everything(tmp_path) == {"a.pth"}


def test_cifar_with_code_in_it_is_refused_even_with_the_right_checksum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = fake_cifar(tmp_path, Malicious())
    with pytest.raises(UserError, match="data_batch_1 asks for .*system"):
        find_cifar(kind, str(tmp_path), True)
    assert not (tmp_path / "ran").exists()


def test_cifar_file_that_was_changed_is_refused_by_its_checksum(tmp_path):
    kind = fake_cifar(tmp_path)
    find_cifar(kind, str(tmp_path), True)
    (tmp_path / kind.base_folder / "data_batch_1").write_bytes(pickle.dumps({"data": []}))
    with pytest.raises(UserError, match="data_batch_1 is not the published file"):
        find_cifar(kind, str(tmp_path), True)


def test_torchscript_is_no_checkpoint(tmp_path):
    """It is code of its own."""
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), str(path))
    with pytest.raises(UserError, match="a.pt is"):
        read_checkpoint(path)


# --- YAML -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--config", "--recipe"])
@pytest.mark.parametrize(
    "tag",
    [
        '!!python/object/apply:os.system ["touch ran"]',
        '!!python/object/new:subprocess.Popen [["touch", "ran"]]',
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
    ],
)
def test_yaml_with_python_in_it_is_refused(tmp_path, monkeypatch, capsys, flag, tag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(f"epochs: {tag}\n")
    with pytest.raises(SystemExit) as end:
        options.parse(options.pretrain_parser(), [flag, "a.yaml", "--data_set", "DIGITS"])
    assert end.value.code == 2
    assert "could not determine a constructor" in capsys.readouterr().err
    assert everything(tmp_path) == {"a.yaml"}


def test_yaml_bomb_does_not_explode_in_the_message(tmp_path, capsys):
    """Nine lines that stand for a thousand million words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    text = "\n".join(["scale:", *(f"- {line[4:]}" for line in lines)])
    (tmp_path / "a.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(SystemExit):
        options.parse(options.pretrain_parser(), ["--config", str(tmp_path / "a.yaml")])
    assert time.monotonic() - start < 5
    assert len(capsys.readouterr().err) < 1000


@pytest.mark.parametrize("text", ["scale: " + "[" * 5000, "scale: " + "{a: " * 5000])
def test_yaml_that_is_nested_deeply_is_no_traceback(tmp_path, capsys, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        options.parse(options.pretrain_parser(), ["--config", str(tmp_path / "a.yaml")])
    assert end.value.code == 2
    assert "nested too deeply" in capsys.readouterr().err


# --- permissions ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py"])
@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_files_of_a_run_follow_the_umask(tmp_path, script, umask):
    before = os.umask(umask)
    try:
        words = PRETRAIN if "pretrain" in script else FINETUNE
        run(script, *words, "--epochs", 1, "--output_dir", tmp_path / "run")
    finally:
        os.umask(before)
    found = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(found) > 5
    for path in found:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_job_folder_and_its_pickles_are_their_owners_alone(tmp_path):
    """And what the job itself writes has the user's umask again."""
    words = [*PRETRAIN, "--cluster", "local", "--nodes", 1, "--ngpus", 1, "--epochs", 1]
    before = os.umask(0o002)
    try:
        done = run("submitit_pretrain.py", *words, "--job_dir", tmp_path / "jobs" / "%j")
    finally:
        os.umask(before)
    number = done.stdout.split("job ")[1].split(";")[0]
    folder = tmp_path / "jobs" / number
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "jobs").stat().st_mode) == 0o775
    pickles = list(folder.glob("*_submitted.pkl"))
    assert pickles
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in pickles)
    newest, until = folder / "checkpoint-0.pth", time.monotonic() + 100
    while not newest.exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert stat.S_IMODE(newest.stat().st_mode) == 0o664


def test_job_folder_without_a_number_becomes_private(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir(mode=0o777)
    submit.make_private(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    submit.make_private(str(tmp_path / "new" / "%j" / "deep"))
    assert everything(tmp_path) == {"job", "new"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made yours alone"):
        submit.make_private(str(tmp_path / "file"))


def test_requeued_job_keeps_the_umask():
    job = slurm.Trainer("main_pretrain", SimpleNamespace(auto_resume=False), 0o027)
    again = job.checkpoint().function
    assert (again.umask, again.args.auto_resume) == (0o027, True)


def test_no_file_of_ours_unpickles_or_unpacks_elsewhere():
    """What reads files from outside has one home each, which the tests above attack."""
    root = Path(builtin.__file__).parents[1]
    builtin_sets, files_of_weights = "data_loading/builtin.py", "weights/files.py"
    homes = {
        "pickle.load": set(), "Unpickler": {builtin_sets}, "extractall": set(),
        "yaml.load(": set(), "weights_only=False": {files_of_weights},  # in a message
        "Image.open(": {"data_loading/decode.py"}, "tarfile.": {builtin_sets},
        "allow_pickle": set(),
        "zipfile.ZipFile(": {builtin_sets, files_of_weights},  # whose members it only looks at
    }  # fmt: skip
    files = [*product_files(), *root.glob("benchmarks/*.py")]
    for word, allowed in homes.items():
        texts = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in files}
        found = {name for name, text in texts.items() if word in text}
        assert found == allowed, word
    calls = [
        (path.relative_to(root).as_posix(), {word.arg: word.value for word in node.keywords})
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert sum(name == "weights/files.py" for name, _ in calls) == 2
    for name, words in calls:
        assert ast.unparse(words["weights_only"]) == "True", name


def test_scripts_start_where_modules_of_the_same_name_lie(tmp_path):
    """A data folder with a pickle.py or yaml.py in it is no part of the program."""
    for name in ("pickle", "yaml", "zipfile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    script = Path(builtin.__file__).parents[1] / "main_pretrain.py"
    words = [sys.executable, script, "--config", "no.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "cannot read it" in done.stderr
