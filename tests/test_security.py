# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files from outside run no code and write nowhere; ours are as open as the user wants.

pytest tests/test_security.py. Malicious checkpoints: test_checkpoint; bombs and programs that
pose as images: test_decoding.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import archives
import options
import slurm
import submission
from archives import Cifar, Zip, find_cifar, read_tar, unpickle
from benchmarks.cifar_runs import load
from checkpoint import read_checkpoint
from errors import UserError
from tests.test_checkpoint import Malicious
from tests.test_end_to_end import FINETUNE, PRETRAIN, run


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
    monkeypatch.setattr(archives, "LARGEST", 1000)
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for number in range(3):  # together
            member = tarfile.TarInfo(f"data/{number}")
            member.size = 400
            archive.addfile(member, io.BytesIO(bytes(400)))
    with pytest.raises(UserError, match="unpacks to 1200 bytes"):
        read_tar(path, ["data/0"])


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
    submission.make_private(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    submission.make_private(str(tmp_path / "new" / "%j" / "deep"))
    assert everything(tmp_path) == {"job", "new"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made yours alone"):
        submission.make_private(str(tmp_path / "file"))


def test_requeued_job_keeps_the_umask():
    job = slurm.Trainer("main_pretrain", SimpleNamespace(auto_resume=False), 0o027)
    again = job.checkpoint().function
    assert (again.umask, again.args.auto_resume) == (0o027, True)


def test_no_file_of_ours_unpickles_or_unpacks_elsewhere():
    """What reads files from outside has one home each, which the tests above attack."""
    root = Path(archives.__file__).parent
    homes = {
        "pickle.load": {"archives.py"}, "Unpickler": {"archives.py"}, "extractall": set(),
        "yaml.load(": set(), "weights_only=False": {"checkpoint.py"},
        "Image.open(": {"decoding.py"},
        "tarfile.open": {"archives.py"}, "zipfile.ZipFile": {"archives.py"}, "allow_pickle": set(),
    }  # fmt: skip
    files = [*root.glob("*.py"), *root.glob("models/*.py"), *root.glob("benchmarks/*.py")]
    for word, allowed in homes.items():
        found = {path.name for path in files if word in path.read_text(encoding="utf-8")}
        assert found - {"checkpoint.py"} <= allowed, word


def test_scripts_start_where_modules_of_the_same_name_lie(tmp_path):
    """A data folder with a pickle.py or yaml.py in it is no part of the program."""
    for name in ("pickle", "yaml", "zipfile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    script = Path(archives.__file__).parent / "main_pretrain.py"
    words = [sys.executable, script, "--config", "no.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "cannot read it" in done.stderr
