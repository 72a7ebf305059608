# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""--ram_cache: the same images from shared memory, read once, and none of it stays."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import parser as options
from data_loading import ram_cache
from data_loading.decode import BadImage
from data_loading.folders import FolderFiles
from data_loading.ram_cache import HeldFiles, hold_in_ram
from data_loading.sources import DatasetSpec, open_images
from data_loading.split import split
from datasets import build_datasets
from errors import UserError, format_bytes
from tests.groups import results_of, run_ranks, run_script
from tests.test_end_to_end import assert_same, run, weights

pytestmark = pytest.mark.skipif(not ram_cache.SHARED.is_dir(), reason="needs /dev/shm")


def make_photos(root: Path) -> Path:
    for seed, name in enumerate(f"{label}/{n}.png" for label in "ab" for n in range(6)):
        pixels = np.random.default_rng(seed).integers(0, 256, (8 + seed, 9, 3), dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return root


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


def opened(path: object):
    return open_images("auto", DatasetSpec(str(path)), True)


def contents(data) -> list[bytes]:
    return [data.read(number) for number in range(len(data))]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the images that are read from a folder from now on."""
    found, real = [], FolderFiles.read
    monkeypatch.setattr(FolderFiles, "read", lambda *args: found.append(args[1]) or real(*args))
    return found


def test_images_are_read_once(photos, monkeypatch):
    data = opened(photos)
    before, found = contents(data), reads(monkeypatch)
    hold_in_ram(data, "train")
    assert sorted(found) == [*range(12)]
    for images in (data, pickle.loads(pickle.dumps(data))):  # the latter as in a spawned worker
        assert contents(images) == before
        assert images.samples[3] == (str(photos / "a/3.png"), 0)
    assert len(found) == 12


def test_other_sources(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("a/1.png", "b/2.png"):
            file.write(photos / name, name)
    for source in (tmp_path / "a.zip", f"{tmp_path / 'a.zip'},{photos}"):
        data = opened(source)
        before = contents(data)
        hold_in_ram(data, "train")
        parts = getattr(data, "parts", [data])
        assert all(isinstance(part.files, HeldFiles) and part.files.held.all() for part in parts)
        assert contents(data) == before


def test_only_images_that_are_used_are_held(photos, monkeypatch):
    """Both parts of --val_split are of the same images."""
    data = opened(photos)
    before, part = contents(data), split(data, 0.4, True)
    found = reads(monkeypatch)
    hold_in_ram(part, "train")
    assert sorted(found) == part.indices.tolist()
    assert 0 < len(found) < 12
    assert np.flatnonzero(data.files.held).tolist() == part.indices.tolist()
    assert contents(data) == before


def test_part_of_several_sources(photos):
    data = opened(f"{photos},{photos / 'a'}/../../photos")
    part = split(data, 0.5, False)
    before = contents(data)
    hold_in_ram(part, "val")
    held = np.concatenate([images.files.held for images in data.parts])
    assert np.flatnonzero(held).tolist() == part.indices.tolist()
    assert contents(data) == before


def test_memory_has_no_name_when_it_is_filled(photos, monkeypatch):
    """A run that is killed would leave it in /dev/shm otherwise."""
    fill, seen = ram_cache._Copy.fill, []

    def check(copy, file, portion) -> None:
        seen.append((copy.path, os.path.exists(copy.path), os.fstat(file).st_blocks))
        fill(copy, file, portion)

    monkeypatch.setattr(ram_cache._Copy, "fill", check)
    monkeypatch.setattr(ram_cache, "PORTIONS", 1)
    data = opened(photos)
    hold_in_ram(data, "train")
    ((path, exists, blocks),) = seen
    assert path.startswith("/dev/shm/convnextv2-")
    assert (exists, blocks) == (False, 0)
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("memory", "shared", "fix"),
    [(1000, 10**9, "1000 B of memory and 953.7 MiB of /dev/shm may be used; resize"),
     (10**9, 1000, "953.7 MiB of memory and 1000 B of /dev/shm may be used; enlarge /dev/shm")],
)  # fmt: skip
def test_too_little_memory_is_an_error(memory, shared, fix, photos, monkeypatch):
    usage = ram_cache.shutil.disk_usage("/")
    monkeypatch.setattr(ram_cache, "free_memory", lambda: memory)
    monkeypatch.setattr(ram_cache.shutil, "disk_usage", lambda path: usage._replace(free=shared))
    data = opened(photos)
    found = reads(monkeypatch)
    with pytest.raises(UserError, match=f"--ram_cache: train has .* KiB of image files.*{fix}"):
        hold_in_ram(data, "train")
    assert found == []


def test_memory_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(ram_cache, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(ram_cache, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    2000 kB\n")
    assert ram_cache.free_memory() == 2000 * 1024
    for name, text in (("max", "max"), ("current", "900"), ("stat", "file 9\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert ram_cache.free_memory() == 2000 * 1024
    (tmp_path / "memory.max").write_text("1000\n")
    assert ram_cache.free_memory() == 150


def test_memory_that_runs_out_is_an_error(photos, monkeypatch):
    """Writing through a memory map would kill the process by SIGBUS."""

    def full(*words) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="/dev/shm: No space left on device; enlarge it, or drop"):
        hold_in_ram(opened(photos), "train")


def test_ranks_meet_while_the_images_are_read(photos, monkeypatch, log):
    """They wait for each other for one hour at most, and reading may take longer."""
    monkeypatch.setattr(ram_cache, "PORTIONS", 4)
    monkeypatch.setattr(ram_cache, "QUIET", -1)
    found, counts, gather = reads(monkeypatch), [], ram_cache.all_gather

    def meet(value):
        counts.append(len(found))
        return gather(value)

    monkeypatch.setattr(ram_cache, "all_gather", meet)
    data = opened(photos)
    hold_in_ram(data, "train")
    assert counts[-4:] == [3, 6, 9, 12]
    assert all(f"train: read {share}%" in log.text for share in (25, 50, 75, 100))
    assert data.files.held.tolist() == [1] * 12


def test_dry_run_reports_the_size(photos, monkeypatch, log):
    data = opened(photos)
    found, held = reads(monkeypatch), data.files
    hold_in_ram(data, "train", dry_run=True)
    assert (found, data.files) == ([], held)
    size = sum(path.stat().st_size for path in photos.rglob("*.png")) + 9 * 12 + 8
    text = f"train: --ram_cache would hold {format_bytes(size)} of image files on each machine, "
    assert text in log.text


def test_bad_images_are_reported_as_without_the_cache(photos):
    data = opened(photos)
    (photos / "a" / "1.png").unlink()
    (photos / "a" / "2.png").write_bytes(b"")
    (photos / "a" / "3.png").write_bytes(b"<html>")
    hold_in_ram(data, "train")
    assert data.files.held.tolist() == [1, 0, 0] + [1] * 9
    with pytest.raises(FileNotFoundError):
        data.read(1)
    for number, text in ((2, "the file is empty"), (3, "the file is an HTML page")):
        with pytest.raises(BadImage, match=text):
            data[number]


def test_flags(photos, capsys):
    parse, parser = options.parse, options.finetune_parser
    with pytest.raises(SystemExit):
        parse(parser(), ["--data_set", "DIGITS", "--ram_cache"])
    assert "--ram_cache is for image files, not for --data_set DIGITS" in capsys.readouterr().err
    words = ["--data_path", str(photos), "--val_split", "0.3"]
    for flag, held in (([], False), (["--ram_cache"], True), (["--ram_cache", "--dry_run"], False)):
        train, val, _ = build_datasets(parse(parser(), words + flag))
        for data in (train, val):
            assert isinstance(data.dataset.dataset.files, HeldFiles) is held


def hold(rank: int, folder: Path) -> dict:
    """Hold the images of a folder on one of several ranks."""
    with pytest.MonkeyPatch.context() as patch:
        data = opened(folder / "photos")
        found = reads(patch)
        hold_in_ram(data, "train")
        here = len(found)
        return {
            "read": here,
            "file": os.stat(data.open_files.args[1]).st_ino,
            "images": contents(data),
            "more": len(found) - here,
        }


def test_ranks_of_a_machine_share_one_copy(photos):
    ranks = [found["hold"] for found in results_of(run_ranks([hold], 2, photos.parent))]
    assert [rank["read"] for rank in ranks] == [12, 0]
    assert ranks[0]["file"] == ranks[1]["file"]
    assert ranks[0]["images"] == ranks[1]["images"] == contents(opened(photos))
    assert [rank["more"] for rank in ranks] == [0, 0]


def fail(rank: int, folder: Path) -> str:
    """Find too little memory on the rank that reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ram_cache, "free_memory", lambda: 10**9 * rank)
        try:
            hold_in_ram(opened(folder / "photos"), "train")
        except UserError as error:
            return str(error)
    return ""


def test_error_of_one_rank_is_raised_on_all(photos):
    ranks = [found["fail"] for found in results_of(run_ranks([fail], 2, photos.parent))]
    assert ranks[0] == ranks[1]
    assert "free 0 B of memory and" in ranks[0]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py"])
def test_weights_are_the_same(script, photos, tmp_path):
    words = ["--input_size", 16, "--stem_stride", 1, "--epochs", 1, "--lr", 0.01]
    words += ["--warmup_epochs", 0, "--device", "cpu", "--data_path", photos, "--model"]
    if script == "main_pretrain.py":
        words += ["tests.tiny:fcmae64", "--decoder_embed_dim", 8]
    else:
        words += ["tests.tiny:classifier64", "--val_split", 0.3]
    found = []
    for more in (["--num_workers", 0], ["--ram_cache"], ["--ram_cache", "--num_workers", 2]):
        folder = tmp_path / f"run-{len(found)}"
        run(script, *words, "--batch_size", 4, *more, "--output_dir", folder)
        found.append(weights(folder / "checkpoint-0.pth"))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    more = ["--ram_cache", "--num_workers", 1, "--batch_size", 2, "--output_dir", tmp_path / "two"]
    run_script(script, *words, *more, ranks=2, folder=tmp_path)
    two = weights(tmp_path / "two" / "checkpoint-0.pth")
    for name, value in found[0].items():
        assert (value - two[name]).abs().max() < 1e-6, name
