# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files from outside run no code and write nothing; our files have the permissions of the umask.

Malicious checkpoints: test_checkpoint; bombs and programs that
pose as images: test_decoding.
"""

import ast
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

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

import visualize
from benchmarks import cifar_runs
from benchmarks.cifar_runs import load
from config import parser as options
from data_loading import builtin
from data_loading.labels import class_names
from errors import UserError
from parallel import submit
from tests.test_end_to_end import FINETUNE, PRETRAIN, run
from tests.test_layout import product_files
from tests.training.test_checkpoint import Malicious
from weights.files import read_checkpoint


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- archives -----------------------------------------------------------------------------------


def test_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    """torch never compresses; 400 MB of zeros used to be unpacked."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**25))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match="'archive/data.pkl' is compressed"):
        read_checkpoint(path)


NAMES = {
    "above": "../evil.jpg", "deep above": "train/a/../../evil.jpg", "absolute": "/tmp/evil.jpg",
    "of Windows": "C:evil.jpg", "above in Windows": "train\\..\\..\\evil.jpg",
    "link": "train/a/0.jpg",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_zip_is_read_into_memory_and_writes_no_file(tmp_path, name):
    """Neither names outside of its folder nor links have an effect: they are no images."""
    path, member = tmp_path / "a.zip", zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK if name == NAMES["link"] else stat.S_IFREG) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"/etc/passwd")
    with pytest.raises(UserError, match="holds 0 classes|the file is text, not an image"):
        load(path, {"train": 1})
    assert everything(tmp_path) == {"a.zip"}


def test_zip_bomb_is_not_unpacked_whatever_size_it_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_runs, "MAX_BYTES", 1000)
    path, name = tmp_path / "a.zip", "train/a/0.jpg"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(2**22))
    for claimed in (2**22, 10):
        sizes = (number.to_bytes(4, "little") for number in (2**22, claimed))
        (tmp_path / "b.zip").write_bytes(path.read_bytes().replace(*sizes))
        with pytest.raises(UserError, match=f"{name} unpacks to more than 1000 bytes|CRC"):
            load(tmp_path / "b.zip", {"train": 1})


# --- CIFAR ----------------------------------------------------------------------------------


def fake_cifar(monkeypatch, root: Path, evil: object = None) -> Path:
    """A small archive in place of CIFAR-10's, checksums included; `evil` replaces a batch."""
    random, root = np.random.default_rng(0), root / "data"
    files = {
        name: {"data": random.integers(0, 256, (4, 3072), np.uint8), "labels": [3] * 4}
        for name in ("data_batch_1", "test_batch")
    }
    files["batches.meta"] = {"label_names": ["a", "b", "c", "d"]}
    files = {name: pickle.dumps(content) for name, content in files.items()}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    if evil is not None:
        files["data_batch_1"] = pickle.dumps(evil)
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    digest = hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", digest)
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])

    def offline(*words: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", offline)
    return root


def cifar(root: Path) -> CIFAR10:
    return builtin.cifar(CIFAR10, str(root), True)


def test_cifar_is_read_from_the_archive_and_then_from_the_folder(tmp_path, monkeypatch):
    root = fake_cifar(monkeypatch, tmp_path)
    first = cifar(root)
    (root / CIFAR10.filename).unlink()
    again = cifar(root)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    for data in (first, again):
        assert (len(data), data[2][1]) == (4, 3)
        assert class_names(data) == ["a", "b", "c", "d"]
        red = np.asarray(data[2][0])[..., 0]
        assert (red == pixels[2, :1024].reshape(32, 32)).all()


@pytest.mark.parametrize("main_process", [True, False])
def test_cifar_file_with_another_checksum_is_not_unpickled(tmp_path, monkeypatch, main_process):
    """Neither by the process that may download nor by the others."""
    monkeypatch.chdir(tmp_path)
    root = fake_cifar(monkeypatch, tmp_path)
    cifar(root)
    (root / CIFAR10.filename).unlink()
    (root / CIFAR10.base_folder / "data_batch_1").write_bytes(pickle.dumps(Malicious()))
    monkeypatch.setattr(builtin, "is_main_process", lambda: main_process)
    with pytest.raises(UserError, match="CIFAR10: cannot read .*; place that archive"):
        cifar(root)
    assert not (tmp_path / "ran").exists()


def test_cifar_archive_with_another_batch_is_not_unpickled(tmp_path, monkeypatch):
    """Even if the archive's own checksum fits."""
    monkeypatch.chdir(tmp_path)
    root = fake_cifar(monkeypatch, tmp_path, Malicious())
    with pytest.raises(UserError, match="not found or corrupted"):
        cifar(root)
    assert not (tmp_path / "ran").exists()


def test_damaged_cifar_archive_is_refused(tmp_path, monkeypatch):
    root = fake_cifar(monkeypatch, tmp_path)
    archive = root / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(UserError, match="no network"):  # it would be downloaded again
        cifar(root)
    assert everything(root) == {CIFAR10.filename}


def test_checkpoint_does_not_choose_where_data_is_downloaded(tmp_path, monkeypatch):
    run_args = {"mask_ratio": 0.6, "model": "convnextv2_atto", "data_set": "CIFAR10"}
    run_args["data_path"] = str(tmp_path / "chosen")
    torch.save({"model": {"a": torch.ones(1)}, "args": run_args}, tmp_path / "a.pth")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda *words: 1 / 0)
    parser = options.visualize_parser()
    args = parser.parse_args(["--checkpoint", str(tmp_path / "a.pth"), "--device", "cpu"])
    with pytest.raises(UserError, match="downloads CIFAR10; give the folder with --data_path"):
        visualize.main(args)
    assert everything(tmp_path) == {"a.pth"}


def test_torchscript_is_not_a_checkpoint(tmp_path):
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
    """Nine lines that expand to a billion words."""
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
    assert "cannot read the file: maximum recursion depth" in capsys.readouterr().err


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


@pytest.mark.slow
def test_job_folder_and_its_pickles_are_private(tmp_path):
    """Files that the job writes have the user's umask again."""
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


def test_job_folder_without_a_number_becomes_private(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "job"
    folder.mkdir(mode=0o777)
    submit.make_private(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    submit.make_private(str(tmp_path / "new" / "%j" / "deep"))
    assert everything(tmp_path) == {"job", "new"}
    (tmp_path / "file").write_text("")
    words = ["--data_set", "DIGITS", "--cluster", "debug", "--job_dir", str(tmp_path / "file")]
    monkeypatch.setattr(sys, "argv", ["submitit_pretrain.py", *words])
    with pytest.raises(SystemExit):
        submit.run("main_pretrain", options.pretrain_parser())
    assert "cannot write into --job_dir: [Errno 17]" in capsys.readouterr().err


OWN_DATA = ("benchmarks/loader.py", "benchmarks/sources.py")


def test_no_file_of_ours_unpickles_or_unpacks_elsewhere():
    """Each way to read foreign files is used in one file only, which the tests above attack."""
    root = Path(builtin.__file__).parents[1]
    files_of_weights, benchmark = "weights/files.py", "benchmarks/cifar_runs.py"
    homes = {
        "pickle.load": set(), "Unpickler": set(), "extractall": set(),
        "yaml.load(": set(), "weights_only=False": {files_of_weights},  # in a message
        "Image.open(": {
            "data_loading/decode.py", "benchmarks/loader.py",
            "insight/report_pictures.py",  # PNG files of a run, and of at most 50 million pixels
        },
        "allow_pickle": set(),
        # of weights, of which only the members are looked at, and of images
        "zipfile.ZipFile(": {benchmark, files_of_weights, "data_loading/zips.py", *OWN_DATA},
        "tarfile.open(": {"benchmarks/listing.py", "benchmarks/sources.py"},  # to write, and count
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


def test_scripts_ignore_modules_in_the_current_folder(tmp_path):
    """A pickle.py or yaml.py in a data folder is not imported."""
    for name in ("pickle", "yaml", "zipfile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    script = Path(builtin.__file__).parents[1] / "main_pretrain.py"
    words = [sys.executable, script, "--config", "no.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "cannot read the file" in done.stderr
