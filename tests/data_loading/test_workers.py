# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images that cannot be used and loader processes that die or hang."""

import errno
import gc
import os
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import Dataset, Subset

import datasets
from benchmarks import chaos
from data_loading.bad_images import BadImages
from data_loading.dataset import FRAMES, TRIES, TransformedDataset, collate
from data_loading.decode import BadImage
from data_loading.folders import FolderFiles, list_folder
from data_loading.images import Images
from data_loading.loader import DeviceLoader
from data_loading.samplers import EvalSampler, TrainSampler
from data_loading.sources import DatasetSpec, open_images
from data_loading.workers import IDLE, TIMED_OUT, WatchedLoader
from engine_finetune import evaluate
from errors import TrainingStopped, UserError
from tests import tiny
from tests.groups import run_script
from tests.test_end_to_end import ROOT, SMALL, log, weights

COUNT, BAD = 12, (2, 3, 7)


def noisy(image: torch.Tensor) -> torch.Tensor:
    """A transform that draws, as augmentations do."""
    return image + torch.randint(0, 9, image.shape, dtype=torch.uint8)


def make_photos(root: Path, count: int = COUNT, bad: tuple = BAD) -> Path:
    """Noise with a red of its own each, some of them without content; every third in a class."""
    noise = np.random.default_rng(0)
    for index in range(count):
        folder = root / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index:02d}.png"
        pixels = noise.integers(0, 200, (24, 24, 3), dtype=np.uint8)
        pixels[..., 0] = 9 * index
        Image.fromarray(pixels).save(path)
        if index in bad:
            path.write_bytes(b"")
    return root


def names(root: Path, bad: tuple = BAD) -> list[str]:
    return sorted(str(root / "abc"[index % 3] / f"{index:02d}.png") for index in bad)


def images(root: Path) -> Images:
    return Images(partial(FolderFiles, str(root)), list_folder(str(root), False), str(root))


def augmented(root: Path, on_bad: str) -> TransformedDataset:
    listing = list_folder(str(root), labeled=False)
    order = sorted(range(len(listing)), key=lambda number: Path(listing.names[number]).name)
    files = Images(partial(FolderFiles, str(root)), listing.take(np.array(order)), str(root))
    return TransformedDataset(files, noisy, seed=3, on_bad=on_bad)


def batches_of(data: Dataset, workers: int = 0, size: int = 4, timeout: float = 0) -> DeviceLoader:
    loader = WatchedLoader(data, TrainSampler(len(data), 3, 0, 1), size, workers, timeout=timeout)
    return DeviceLoader(loader, "cpu", [0.0] * 3, [1.0] * 3)


# --- images ---------------------------------------------------------------------------------


def spoil(path: Path, fault: str) -> None:
    whole = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "of zero bytes":
        path.write_bytes(b"")
    elif fault == "text":
        path.write_text("<html>404: Not Found</html>")
    elif fault == "directory":
        path.mkdir()
    elif fault == "link to nothing":
        path.symlink_to(path.with_name("nowhere.png"))
    elif fault == "floats":
        Image.new("F", (4, 4), 2).save(path, "TIFF")
    else:
        assert fault == "vanished"


FAULTS = [
    "truncated",
    "of zero bytes",
    "text",
    "directory",
    "link to nothing",
    "floats",
    "vanished",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_file_is_named_or_replaced(tmp_path, fault):
    make_photos(tmp_path, bad=())
    kinds = ("error", "replace", "leave out")
    strict, replacing, leaving = (augmented(tmp_path, kind) for kind in kinds)
    path = tmp_path / "b" / "04.png"
    spoil(path, fault)  # after the folder was read
    error = strict[0, 4]
    assert isinstance(error, UserError)
    assert str(error).startswith(f"cannot read image {path} (")
    assert "--on_bad_image skip" in str(error)
    other, bad = replacing[0, 4]
    assert [name for name, _ in bad] == [str(path)]
    assert other[2] == 4
    assert other[0].float().mean() > 40
    nothing, bad = leaving[0, 4]
    assert nothing is None
    assert [name for name, _ in bad] == [str(path)]
    assert not isinstance(replacing[0, 5], UserError)


def test_directory_named_like_an_image_is_only_a_directory(tmp_path):
    make_photos(tmp_path / "sets", bad=())
    (tmp_path / "sets" / "a" / "folder.png").mkdir()
    for labeled in (True, False):
        assert len(list_folder(str(tmp_path / "sets"), labeled)) == COUNT


def test_replacement_depends_on_seed_epoch_and_index_alone(tmp_path):
    make_photos(tmp_path)
    epochs = []
    for workers, size in ((0, 4), (2, 4), (1, 3)):
        batches, seen = batches_of(augmented(tmp_path, "replace"), workers, size), {}
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            for images, _, ids in batches:
                seen |= {(epoch, int(i)): image for i, image in zip(ids, images, strict=True)}
        assert sorted(batches.bad) == names(tmp_path)
        epochs.append(seen)
    first, *others = epochs
    assert len(first) == 2 * COUNT  # under their own numbers
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)
    red = {key: int(image[0].min() * 255 + 0.5) // 9 for key, image in first.items()}
    assert all(red[0, index] == index for index in range(COUNT) if index not in BAD)
    chosen = [[red[epoch, index] for index in BAD] for epoch in (0, 1)]
    assert chosen[0] != chosen[1]
    assert not {*chosen[0], *chosen[1]} & set(BAD)
    own = first[0, chosen[0][0]]
    assert not torch.equal(first[0, BAD[0]], own)  # augmented in its own way


TRANSIENT = [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EINTR]
TRANSIENT += [errno.EAGAIN, errno.ETIMEDOUT]


class Stalling(Dataset):
    """Reading a file fails so many times with this error."""

    def __init__(self, number: int, times: int, file: str = "a.png") -> None:
        self.number, self.times, self.file = number, times, file

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        noise = torch.randint(0, 200, (1,)).item()
        if self.times > 0:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number), self.file)
        return Image.new("RGB", (4, 4), (noise, 0, 0)), 0


@pytest.mark.parametrize("number", TRANSIENT)
@pytest.mark.parametrize("on_bad", ["error", "replace", "leave out"])
def test_machine_that_fails_does_not_make_a_bad_image(monkeypatch, number, on_bad):
    """A file server that restarts would empty the data set under --on_bad_image skip."""
    waits = []
    monkeypatch.setattr("data_loading.bad_images.time.sleep", waits.append)
    whole = TransformedDataset(Stalling(number, 0), noisy, 0, on_bad=on_bad)[0, 4]
    again = TransformedDataset(Stalling(number, 3), noisy, 0, on_bad=on_bad)[0, 4]
    assert torch.equal(whole[0], again[0])  # drawn again from the same seed
    assert 0 < sum(waits) < 5
    error = TransformedDataset(Stalling(number, 99), noisy, 0, on_bad=on_bad)[0, 4]
    assert isinstance(error, UserError)
    assert not isinstance(error, BadImage)
    assert str(error).startswith("image number 4: cannot be read ([Errno ")
    assert "tried 4 times" in str(error)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EINVAL])
@pytest.mark.parametrize(
    ("file", "bad"), [("listed.raw", True), ("other.PNG", True), ("labels.csv", False)]
)
def test_what_the_system_says_of_a_file_is_not_waited_for(monkeypatch, number, file, bad):
    """It is a bad image if the file is one, else an error of the data set's own code."""
    monkeypatch.setattr("data_loading.bad_images.time.sleep", lambda seconds: 1 / 0)
    files = Stalling(number, 1, file)
    files.samples = [(Path("listed.raw"), 0)] * 9
    error = TransformedDataset(files, noisy, 0)[0, 4]
    assert isinstance(error, BadImage) == bad
    assert ("The data set raised it:" in str(error)) != bad


FORMS = {  # an entry of `samples`, and what the image is called
    "path and label": (("a/1.png", 0), "a/1.png"), "list": (["a/1.png", 0], "a/1.png"),
    "text": ("a/1.png", "a/1.png"), "Path": (Path("a/1.png"), "a/1.png"),
    "Path and label": ((Path("a/1.png"), 0), "a/1.png"), "dict": ({"path": "a/1.png"}, "number 4"),
    "label first": ((0, "a/1.png"), "number 4"), "nothing": ((), "number 4"),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "name"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("on_bad", ["error", "leave out"])
def test_image_is_named_whatever_the_data_set_calls_samples(entry, name, on_bad):
    """Of a text it was the first letter, and a dict ended the run with a KeyError."""

    class Files(Dataset):
        samples = [entry] * 9

        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> None:
            raise BadImage("bad")

    data = TransformedDataset(Files(), noisy, 0, on_bad=on_bad)
    if on_bad == "error":
        assert str(data[0, 4]).startswith(f"cannot read image {name} (")
    else:
        ((found, reason),) = data[0, 4].bad
        assert (found.removeprefix("image "), reason) == (name, "bad")
    Files.samples = Files.samples[:2]  # something else then
    assert data.name_of(4) == "image number 4"


def test_too_many_bad_images_are_an_error(tmp_path):
    make_photos(tmp_path, bad=tuple(range(COUNT)))
    error = augmented(tmp_path, "replace")[0, 4]
    assert isinstance(error, UserError)
    assert f"image {tmp_path}/b/04.png cannot be used, nor can {TRIES} others" in str(error)


def test_bad_label_or_channel_count_is_no_bad_image(tmp_path):
    """They are faults of the flags: with all samples replaced they would never be seen."""
    make_photos(tmp_path, bad=())
    files = images(tmp_path)
    data = TransformedDataset(files, noisy, 0, 4, on_bad="replace")
    assert "--in_chans 4" in str(data[0, 0])
    data = TransformedDataset([(torch.zeros(3, 4, 4), 7)], noisy, 0, 3, 5, on_bad="replace")
    assert "label 7" in str(data[0, 0])


def test_evaluation_leaves_out_and_counts_nothing_twice(tmp_path):
    make_photos(tmp_path)
    data = augmented(tmp_path, "leave out")
    loader = WatchedLoader(data, EvalSampler(COUNT, 0, 1), batch_size=2)
    batches = DeviceLoader(loader, "cpu", [0.0] * 3, [1.0] * 3)
    ids = [ids.tolist() for _, _, ids in batches]  # 2 and 3 were a batch
    assert ids == [[0, 1], [4, 5], [6], [8, 9], [10, 11]]
    assert sorted(batches.bad) == names(tmp_path)


def test_evaluation_without_a_single_image_is_an_error_and_not_nan(tmp_path):
    make_photos(tmp_path, bad=tuple(range(COUNT)))
    loader = WatchedLoader(augmented(tmp_path, "leave out"), EvalSampler(COUNT, 0, 1), batch_size=5)
    batches = DeviceLoader(loader, "cpu", [0.0] * 3, [1.0] * 3)
    model = torch.nn.Flatten()
    with pytest.raises(UserError, match=r"no image to evaluate on.*a/00.png \("):
        evaluate(batches, model, torch.device("cpu"), "none")


def test_error_still_wins_over_what_was_replaced(tmp_path):
    make_photos(tmp_path)
    data, error = augmented(tmp_path, "replace"), UserError("x")
    assert collate([data[0, 2], error]) is error


class Told:
    """A loader with these bad images."""

    def __init__(self, **bad: str) -> None:
        self.bad = bad


def test_each_image_is_listed_once_over_epochs_and_restarts(tmp_path, log):
    train, val = Told(b="why"), Told(v="cut")
    bad = BadImages(tmp_path, train, None, val)
    assert bad.write() == 2
    train.bad |= {"a": "gone"}
    assert bad.write() == 3
    bad.write()
    path = tmp_path / "bad_images.txt"
    assert path.read_text() == "b\twhy\nv\tcut\na\tgone\n"
    again = Told(a="gone", c="new")
    BadImages(tmp_path, again).write()
    assert path.read_text().splitlines()[2:] == ["a\tgone", "c\tnew"]
    logged = [record.getMessage() for record in log.records]
    assert [text.split(" cannot")[0] for text in logged] == ["2 images", "1 image", "1 image"]
    assert "b (why), v (cut). Training replaces them" in logged[0]


def test_what_all_processes_know_is_not_sent_again(tmp_path, monkeypatch):
    """A thousand of them would bring together all bad images of the run at every save."""
    sent, train = [], Told(a="x")

    def gather(mine: dict[str, str]) -> list[dict[str, str]]:
        sent.append(mine)
        return [mine, {"b": "of the other"}] if len(sent) == 1 else [mine]

    monkeypatch.setattr("data_loading.bad_images.all_gather", gather)
    bad = BadImages(tmp_path, train)
    assert bad.write() == 2
    train.bad |= {"b": "seen here too", "c": "y"}
    assert [bad.write(), bad.write()] == [3, 3]
    assert sent == [{"a": "x"}, {"c": "y"}, {}]
    assert (tmp_path / "bad_images.txt").read_text() == "a\tx\nb\tof the other\nc\ty\n"


def test_odd_names_stay_one_line_each(tmp_path):
    odd = {"two\nlines": "1", "tab\there": "a\nb", os.fsdecode(b"latin-\xe9"): "2", "ü": "3"}
    breaks = {f"a{char}b": f"c{char}d" for char in "\x0b\x0c\x1c\x85\u2028\u2029"}  # for Python
    for _ in range(3):
        BadImages(tmp_path, Told(**odd, **breaks)).write()
    lines = (tmp_path / "bad_images.txt").read_bytes().rstrip(b"\n").split(b"\n")
    assert sorted(lines) == sorted(
        [b"two\\nlines\t1", b"tab\\there\ta\\nb", b"latin-\xe9\t2", "ü\t3".encode()]
        + [f"{name}\t{why}".encode() for name, why in breaks.items()]
    )


def test_without_a_folder_or_skip_nothing_is_written(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    BadImages(None, Told(a="x")).write()
    assert "they are not listed" in log.text
    assert BadImages(tmp_path, Told(a="x"), active=False).write() == 0
    assert list(tmp_path.iterdir()) == []


def test_full_disk_costs_the_list_and_not_the_run(tmp_path, monkeypatch, log):
    def full(*words):
        raise OSError("no space left")

    bad = BadImages(tmp_path, Told(a="x"))
    with monkeypatch.context() as broken:
        broken.setattr("data_loading.bad_images.write_atomically", full)
        bad.write()
    assert "no space left" in log.text
    bad.write()
    assert (tmp_path / "bad_images.txt").read_text() == "a\tx\n"


# --- the scripts ----------------------------------------------------------------------------

SIZES = [*SMALL, "--batch_size", 6, "--on_bad_image", "skip", "--log_dir", "none"]
SIZES += ["--opt", "sgd", "--lr", 0.1]  # Adam would enlarge differences of gradients near zero
COMMANDS = {
    "main_pretrain.py": [
        *["--data_set", "folder", "--model", "tests.tiny:fcmae", "--picture_freq", 0],
    ],
    "main_finetune.py": ["--model", "tests.tiny:classifier", "--data_set", "image_folder"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_run_continues_without_bad_images_and_lists_them(tmp_path, script):
    """The same weights and the same list for any number of workers and processes."""
    train, val = make_photos(tmp_path / "train", 26), make_photos(tmp_path / "val", 7, (1, 2))
    words = [*COMMANDS[script], *SIZES, "--data_path", train]
    listed = names(train)
    # In float64, since sums over two processes have another order, which Adam magnifies.
    words += ["--model", f"tests.tiny:{'classifier' if 'finetune' in script else 'fcmae'}64"]
    if "finetune" in script:
        words += ["--eval_data_path", val, "--aa", "none"]
        listed = sorted(listed + names(val, (1, 2)))

    def run(folder: Path, *more: object, ranks: int = 1) -> str:
        return run_script(script, *words, *more, ranks=ranks, folder=folder.parent)

    one, two = tmp_path / "one", tmp_path / "two"
    assert "cannot be used" in run(one, "--output_dir", one, "--num_workers", 2)
    run(two, "--output_dir", two, "--batch_size", 3, ranks=2)
    for folder in (one, two):
        lines = (folder / "bad_images.txt").read_text().splitlines()
        assert sorted(line.split("\t")[0] for line in lines) == listed
    ours, theirs = (weights(folder / "checkpoint-1.pth") for folder in (one, two))
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-9), name
    before = (one / "bad_images.txt").read_text()
    run(one, "--output_dir", one, "--epochs", 3)
    assert (one / "bad_images.txt").read_text() == before
    if "finetune" in script:
        test = log(one)[1]["test_loss"]
        printed = run(one, "--eval", "--resume", one / "checkpoint-1.pth")
        assert f"checkpoint-1.pth: top-1 {log(one)[1]['test_acc1']:.2f}%" in printed
        assert " on 5 images" in printed
        assert f"loss {test:.4f}" in printed
        assert "val/c/02.png" in printed


class Mortal(Images):
    """Images of which the one with number LAST to be read ends the process."""

    reads = 0

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.reads += 1
        if self.reads == int(os.environ.get("LAST", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def mortal(data_path: str, train: bool) -> Mortal:
    return Mortal(partial(FolderFiles, data_path), list_folder(data_path, True), data_path)


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune"])
def test_list_survives_a_kill_within_an_epoch(tmp_path, monkeypatch, script):
    """A resumed run does not read again what was read before the last save."""
    bad = tuple(range(0, 24, 2))
    train, folder = make_photos(tmp_path / "train", 24, bad), tmp_path / "run"
    words = ["--data_set", "tests.data_loading.test_workers:mortal", "--data_path", str(train)]
    words += ["--save_ckpt_every_steps", "1", "--update_freq", "1", "--epochs", "1"]
    words += ["--on_bad_image", "skip"]
    if script == "main_finetune":
        words += ["--mixup", "0", "--aa", "none", "--nb_classes", "3", "--disable_eval"]
        words += ["--model_ema_eval", "false"]
    else:
        words += ["--picture_freq", "0"]  # which are read before training
    monkeypatch.setenv("LAST", "22")  # bad ones are read and another in their place
    assert chaos.finish(chaos.start(script, folder, *words)) == -signal.SIGKILL
    saved = list(folder.glob("checkpoint-0-*.pth"))
    before = (folder / "bad_images.txt").read_text().splitlines()
    assert saved
    assert before
    monkeypatch.delenv("LAST")
    chaos.complete(script, folder, *words)
    lines = (folder / "bad_images.txt").read_text().splitlines()
    assert lines[: len(before)] == before
    assert sorted(line.split("\t")[0] for line in lines) == names(train, bad)


# --- processes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_sample_that_holds_a_worker_is_named(tmp_path):
    words = [*COMMANDS["main_finetune.py"], *SMALL, "--data_set", "tests.tiny:hangs"]
    words += ["--num_workers", 2, "--data_timeout", 2, "--output_dir", "none"]
    printed = run_script("main_finetune.py", *words, ranks=1, folder=tmp_path, expect=1)
    (line,) = [line for line in printed.splitlines() if "error:" in line]
    assert "Traceback" not in printed
    assert "hangs: reading image photos/5.jpg took longer than --data_timeout 2 s" in line


class Slow(Dataset):
    """Samples that each take some time, but for the first `quick` of them."""

    samples = [(f"{index}.png", 0) for index in range(24)]

    def __init__(self, seconds: float, quick: int = 0) -> None:
        self.seconds, self.quick = seconds, quick

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Image.Image:
        time.sleep(self.seconds * (index >= self.quick))
        return Image.new("RGB", (4, 4))


def watched(
    seconds: float, batch_size: int, workers: int, quick: int = 0, **options: object
) -> WatchedLoader:
    """A loader of the 24 samples of `Slow`, in their order."""
    data = TransformedDataset(Slow(seconds, quick), noisy, 0)
    keys = [(0, index) for index in range(24)]
    return WatchedLoader(data, keys, batch_size, workers, **options)


def test_limit_is_per_sample_and_not_per_batch():
    loader = watched(0.1, 24, 1, timeout=2)
    assert len(list(loader)) == 1


def end(process: object) -> None:
    process.kill()
    process.join()


def test_worker_that_is_killed_during_a_step_is_reported_with_the_next_batch():
    loader = watched(1000, 3, 1, quick=3)
    batches = iter(loader)
    next(batches)
    while loader.reading[0, 1] == IDLE:
        time.sleep(0.01)
    end(loader.processes[0])  # nothing is raised here, nor in the step
    text = r"was killed by signal 9 \(Killed\) while it was reading image .*png\. .*--num_workers"
    with pytest.raises(TrainingStopped, match=text):
        next(batches)


def test_worker_that_is_killed_between_epochs_is_reported_in_the_next():
    loader = watched(0, 24, 1)
    assert len(list(loader)) == 1
    end(loader.processes[0])
    with pytest.raises(TrainingStopped, match="was killed .* while it was idle"):
        list(loader)


class Deaf(Slow):
    """A read that no signal ends, as on a file system that does not answer."""

    def __getitem__(self, index: int) -> Image.Image:
        if index == 3:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            time.sleep(1000)
        return super().__getitem__(index)


@pytest.mark.slow
def test_worker_that_ignores_the_limit_ends_the_run():
    data = TransformedDataset(Deaf(0), noisy, 0)
    loader = WatchedLoader(data, [(0, index) for index in range(24)], 3, 2, timeout=1)
    with pytest.raises(TrainingStopped, match="hangs: reading .* than --data_timeout 1"):
        list(loader)
    for process in loader.processes:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL


def test_workers_that_do_not_answer_between_epochs_are_replaced(monkeypatch):
    loader = watched(0, 24, 1)
    assert len(list(loader)) == 1
    before = loader.processes[:]
    os.kill(before[0].pid, signal.SIGSTOP)
    assert len(list(loader)) == 1
    assert loader.processes != before


def raises(*parts: object) -> Iterator[object]:
    """Yield parts, or raise those that are exceptions."""
    for part in parts:
        if isinstance(part, Exception):
            raise part
        yield part


def test_broken_connection_to_a_dead_process_names_the_process():
    """A batch arrived, but its pixels were to be fetched from a process that had died since."""
    loader = watched(0, 4, 1)
    next(iter(loader))
    loader.processes[0].kill()
    loader.interrupted, loader.loader = False, raises("a batch", ConnectionResetError("by peer"))
    with pytest.raises(TrainingStopped, match=r"process \(pid [0-9]+\) was killed by signal 9"):
        list(loader)
    loader.processes, loader.interrupted, loader.loader = [], False, raises(OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        list(loader)


def collate_and_lose(samples: list) -> object:
    """Collate one batch to a thing that cannot be sent: multiprocessing would drop it."""
    return open(os.devnull) if samples[0][2] == 6 else collate(samples)


def test_batch_that_cannot_be_sent_ends_the_run(capfd):
    """DataLoader would wait for it forever."""
    with pytest.raises(TrainingStopped, match="could not send a batch, .* /dev/shm may be full"):
        list(watched(0, 3, 2, collate_fn=collate_and_lose))
    assert "a loader process cannot send a batch: TypeError(" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
    ],
    ids=["of the system", "of torch"],
)
@pytest.mark.parametrize("place", ["start", "batch"])
def test_too_many_open_files_are_named(error, place, monkeypatch):
    """It was a traceback that advised to edit the program."""
    loader = watched(0, 4, 2)
    monkeypatch.setattr("data_loading.workers.EXIT_S", 0)
    if place == "start":
        monkeypatch.setattr(loader, "_make", None)
        monkeypatch.setattr(loader, "_open", lambda: next(raises(error)))
    else:
        monkeypatch.setattr(loader, "_start", lambda: raises("a batch", error))
    with pytest.raises(TrainingStopped, match="too many open files .* from 2 loader .*ulimit -n"):
        list(loader)


LIMITS = [16, 24, 28, 32, 36, 40, 48]
LOW = """
import os, resource, signal, sys
from tests.data_loading.test_workers import LIMITS, watched
for limit in LIMITS:
    if os.fork():
        print(os.wait()[1])
        sys.stdout.flush()
        continue
    signal.alarm(50)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        print(len(list(watched(0, 2, 4, timeout=60))), "batches", end=" ")
    except Exception as error:
        print(type(error).__name__, *str(error).split(), end=" ")
    break
"""


@pytest.fixture(scope="module")
def low_limits() -> dict[int, str]:
    """Return {limit of open files: what a process of its own printed, and its exit code}."""
    command = [sys.executable, "-c", LOW]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return dict(zip(LIMITS, done.stdout.splitlines(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_low_limit_of_open_files_ends_the_run_at_once_or_does_not_matter(limit, low_limits):
    said, _, code = low_limits[limit].rpartition(" ")
    assert code == "0", low_limits[limit]
    assert said == "12 batches" or said.startswith("TrainingStopped"), said
    assert said == "12 batches" or "ulimit -n" in said


def test_wait_for_a_batch_can_be_ended(monkeypatch):
    """A signal was ignored until a batch came."""
    monkeypatch.setattr("data_loading.workers.POLL", 0.1)
    loader, calls = watched(1000, 3, 1, quick=3), []

    def stop(arrived: bool) -> None:
        calls.append(arrived)
        if len(calls) == 2:
            raise KeyboardInterrupt

    loader.on_wait = stop
    batches = iter(loader)
    while loader.reading[0, 1] == IDLE:  # the first batch is there, or will be at once
        next(batches)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert calls == [False, False]


def test_batch_that_comes_after_a_wait_is_told(monkeypatch):
    loader, calls = watched(0, 12, 1), []
    loader.on_wait = calls.append
    late = RuntimeError(f"{TIMED_OUT} after 2 seconds")
    steps = iter([late, late, "first", "second", late, "third"])

    class Batches:
        def __next__(self) -> str:
            step = next(steps)
            return next(raises(step))

    monkeypatch.setattr(loader, "_start", Batches)
    assert list(loader) == ["first", "second", "third"]
    assert calls == [False, False, True, False, True]


def test_epoch_that_is_broken_off_does_not_disturb_the_next():
    loader = watched(0.02, 6, 1, timeout=4)
    for _ in range(2):
        assert next(iter(loader))[2].tolist() == list(range(6))
    assert [batch[2].tolist() for batch in loader] == [[*range(i, i + 6)] for i in (0, 6, 12, 18)]


def test_loader_that_is_garbage_ends_its_busy_workers():
    """They ignore the signal by which DataLoader would end them, after some seconds each."""
    loader = watched(1000, 3, 2, quick=3)
    batches = iter(loader)
    next(batches)
    processes, loader.itself = loader.processes, (loader, batches)
    del loader, batches
    gc.collect()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2


def test_signals_of_a_scheduler_do_not_end_workers():
    """The run still needs batches to finish its step and save."""
    loader = watched(0, 1, 1)
    batches = iter(loader)
    next(batches)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        os.kill(loader.processes[0].pid, number)
    assert len(list(batches)) == 23


IN_USE = """
import sys
from tests.data_loading.test_workers import watched
loaders = [iter(watched(seconds, 2, 2, quick=2)) for seconds in (0, 1000)]
sys.modules["in use"] = loaders, [next(loader) for loader in loaders]
"""


@pytest.mark.slow
def test_program_ends_although_loaders_are_in_use():
    """Their processes ignore the signal by which multiprocessing ends them before it waits."""
    command = [sys.executable, "-c", IN_USE]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=100, capture_output=True)
    assert done.stderr == b""


def test_worker_that_hangs_is_gone_after_a_run_that_was_killed(monkeypatch):
    """Evaluation was ended by SIGTERM, but a worker slept on in its sample."""
    monkeypatch.setattr("data_loading.workers.POLL", 0.1)
    loader, (reader, writer) = watched(1000, 1, 2), os.pipe()
    if (run := os.fork()) == 0:
        try:
            next(iter(loader))
        finally:
            os._exit(1)
    os.close(writer)  # what is left are those of the run and its workers
    deadline = time.monotonic() + 60
    while (loader.reading[:, 1] == IDLE).any() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers, busy, _ = loader.reading.T.tolist()
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert IDLE not in busy
    gone, _, _ = select.select([reader], [], [], 60)
    if not gone:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    assert gone
    os.close(reader)


@pytest.mark.slow
@pytest.mark.parametrize(("split", "words"), [("val", ["--eval"]), ("val", []), ("train", [])])
def test_script_and_its_hanging_workers_end_with_the_first_signal(tmp_path, split, words):
    model = {"model": tiny.classifier(num_classes=3, stem_stride=1).state_dict()}
    torch.save(model, tmp_path / "a.pth")
    words = [*COMMANDS["main_finetune.py"], *SMALL, *words, "--output_dir", "none"]
    words += ["--data_set", "tests.tiny:stalls", "--finetune", tmp_path / "a.pth"]
    words += ["--num_workers", "2"]
    run = subprocess.Popen(
        [sys.executable, "main_finetune.py", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"STALL": f"{split}:1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any("asleep" in line for line in run.stdout)
    run.terminate()
    run.communicate(timeout=100)  # until none of them has its output open
    assert run.returncode == (-signal.SIGTERM if "--eval" in words else 75)


def make_error(kind: type[Exception]) -> None:
    raise kind("a bug")


class Buggy(Slow):
    """A data set whose own code fails."""

    def __init__(self, kind: type[Exception]) -> None:
        super().__init__(0)
        self.kind = kind

    def __getitem__(self, index: int) -> Image.Image:
        make_error(self.kind)


BUGS = [ValueError, RuntimeError, KeyError, IndexError, SyntaxError, EOFError, zlib.error]
BUGS += [OSError, UnidentifiedImageError]  # such as of a file of labels, or of the network


@pytest.mark.parametrize("kind", BUGS)
@pytest.mark.parametrize("on_bad", ["error", "replace", "leave out"])
def test_error_of_a_data_set_is_no_bad_image(kind, on_bad):
    """A run went on with other images in the place of all that a bug had spoiled."""
    error = TransformedDataset(Buggy(kind), noisy, 0, on_bad=on_bad)[0, 4]
    assert isinstance(error, UserError)
    assert not isinstance(error, BadImage)
    first, second, *lines = str(error).splitlines()
    assert first.startswith(f"image 4.png: {kind.__name__}: ")
    assert second == "The data set raised it:"
    assert lines[0].startswith(f'  File "{__file__}", line ')
    assert lines[0].endswith(", in __getitem__")
    assert [line.strip() for line in lines if "File" not in line and "^" not in line] == [
        "make_error(self.kind)",
        'raise kind("a bug")',
    ]


def test_error_of_a_data_set_is_short_in_a_worker_too():
    with pytest.raises(UserError, match="RuntimeError: a bug") as error:
        list(batches_of(TransformedDataset(Buggy(RuntimeError), noisy, 0), 1))
    assert len(str(error.value).splitlines()) < 9


def test_deep_traceback_of_a_data_set_is_cut_in_its_middle():
    class Deep(Slow):
        def __getitem__(self, index: int) -> Image.Image:
            return self.deeper(index)

        def deeper(self, index: int) -> Image.Image:
            return self[index + 1] if index < 50 else 1 // 0

    text = str(TransformedDataset(Deep(0), noisy, 0)[0, 4])
    assert text.count(", in ") == FRAMES
    assert text.count("\n  ...\n") == 1
    assert "1 // 0" in text.splitlines()[-2]


@pytest.mark.parametrize("fault", ["truncated", "of zero bytes", "text", "long texts", "vanished"])
@pytest.mark.parametrize("lazy", [False, True])
def test_file_that_a_data_set_cannot_decode_itself_is_a_bad_image(tmp_path, fault, lazy):
    """It opens the files with PIL, which raises ValueError and others too."""
    make_photos(tmp_path, bad=())
    path = tmp_path / "b" / "04.png"
    if fault == "long texts":
        info = PngInfo()
        info.add_text("comment", "x" * 2**21, zip=True)
        Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    else:
        spoil(path, fault)

    class Own(Slow):
        def __getitem__(self, index: int) -> Image.Image:
            image = Image.open(path)
            return image if lazy else image.convert("RGB")

    assert isinstance(TransformedDataset(Own(0), noisy, 0)[0, 4], BadImage)


DECODERS = {"PIL.ImageFile": "load", "PIL.XyzImagePlugin": "read", "PIL.Image": "open"}
DAMAGES = [OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error]


@pytest.mark.parametrize("kind", [*DAMAGES, Image.DecompressionBombError])
def test_error_of_a_decoder_is_a_bad_image_whatever_its_kind(kind):
    """PIL raises them for files that a data set of one's own opens."""
    for module, function in {**DECODERS, "PIL.Image2": "open"}.items():
        inside = {"__name__": module, "kind": kind}
        exec(f"def {function}(index):\n    raise kind('damaged')", inside)
        data = type("Own", (Slow,), {"__getitem__": lambda self, i, f=inside[function]: f(i)})(0)
        error = TransformedDataset(data, noisy, 0)[0, 4]
        assert isinstance(error, BadImage) == (module in DECODERS)
        assert "damaged" in str(error)


def test_wrong_use_of_pil_is_an_error_of_the_data_set():
    class Own(Slow):
        def __getitem__(self, index: int) -> Image.Image:
            return Image.new("RGB", (4, 4)).crop((3, 0, 1, 4))

    error = TransformedDataset(Own(0), noisy, 0, on_bad="replace")[0, 4]
    assert not isinstance(error, BadImage)
    assert "in crop" in str(error)


def test_deleted_image_of_a_subset_is_a_bad_image(tmp_path):
    """It has no `samples`, and a run with --on_bad_image skip ended."""
    make_photos(tmp_path / "a", bad=())
    files = torchvision.datasets.ImageFolder(tmp_path)
    part = Subset(files, range(8))
    Path(files.samples[4][0]).unlink()
    (_, reason), *_ = TransformedDataset(part, noisy, 0, on_bad="leave out")[0, 4].bad
    assert "No such file" in reason

    class Labels(Slow):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.open(files.samples[0][0]), len(Path("labels.csv").read_text())

    error = TransformedDataset(Labels(0), noisy, 0, on_bad="leave out")[0, 4]
    assert not isinstance(error, BadImage)
    assert "labels.csv" in str(error)


def test_image_that_an_old_index_lists_is_not_blamed(tmp_path):
    """It said to replace an image that had been removed on purpose."""
    root, index = make_photos(tmp_path / "data", bad=()), tmp_path / "lists" / "train.index"
    spec = DatasetSpec(str(root), labeled=False, data_index=str(index.parent))
    files = open_images("folder", spec, True)
    Path(files.samples[4][0]).unlink()
    text = str(TransformedDataset(files, noisy, 0)[0, 4])
    assert f"(it does not exist, but {index} lists it); the list is old: remove {index}, " in text
    assert "replace" not in text
    skipped = TransformedDataset(files, noisy, 0, on_bad="leave out")[0, 4]
    assert skipped.bad == [(files.samples[4][0], f"it does not exist, but {index} lists it")]


def test_flags_reach_the_loader(tmp_path):
    make_photos(tmp_path)
    flags = {"data_set": "folder", "data_path": str(tmp_path), "input_size": (16, 16), "seed": 0}
    flags |= {"in_chans": 3, "hflip": 0.5, "scale": (0.2, 1.0), "batch_size": 4, "pin_mem": False}
    flags |= {"data_index": "", "split_column": None, "image_column": None, "image_root": ""}
    flags |= {"sampling": "shuffle", "num_samples": None, "aug_repeats": 1}
    flags["imagenet_default_mean_and_std"] = True
    for seconds, expected in ((None, 1800), (7.0, 7), (0.0, 0)):
        args = SimpleNamespace(
            **flags, num_workers=1, on_bad_image="skip", data_timeout=seconds, dist_eval=True
        )
        data = datasets.build_pretrain_dataset(args)
        assert data.on_bad == "replace"
        for train in (True, False):
            assert datasets.build_loader(data, train, args, "cpu").loader.timeout == expected
    assert datasets.on_bad_image(False, args) == "leave out"


def test_batches_that_get_lost_on_their_way_are_noticed(monkeypatch):
    """torch looks after its thread for pinned memory only without `timeout`; nobody else would."""
    monkeypatch.setattr("data_loading.workers.POLL", 0.2)
    data = TransformedDataset([(Image.new("RGB", (8, 8)), 0)] * 4, noisy, seed=3)
    loader = WatchedLoader(data, EvalSampler(4, 0, 1), 2, num_workers=1, timeout=0.5)
    batches = iter(loader)
    next(batches)
    monkeypatch.setattr(loader.loader._iterator, "_try_get_data", lambda timeout: (False, None))
    with pytest.raises(TrainingStopped, match="no batch arrived .* /dev/shm"):
        next(batches)


def test_interrupted_epoch_leaves_no_reading_and_no_waiting_behind(monkeypatch):
    """The next epoch would be ended for an image that a killed worker read, or a lost batch."""
    loader = WatchedLoader([], EvalSampler(0, 0, 1), 6, num_workers=2, timeout=1.0)
    loader.reading[1] = torch.tensor([20400, 3, 0])
    loader.interrupted, loader.waited = True, 1000.0
    found = []
    monkeypatch.setattr(loader, "_start", lambda: found.append(loader.waited) or iter(()))
    assert list(loader) == []
    assert found == [0.0]
    assert (loader.reading == IDLE).all()


def test_slow_batch_is_not_called_lost():
    """A batch may take far longer than a sample, and a worker seems idle between two samples."""
    loader = WatchedLoader([], EvalSampler(0, 0, 1), 6, num_workers=2, timeout=1.0)
    loader.waited = 1000.0
    loader.reading[:] = torch.tensor([1, IDLE, 0])  # idle for a long time
    loader.reading[1, 2] = int(time.monotonic()) + 10  # just now
    loader._check(RuntimeError(TIMED_OUT))
    loader.reading[1, 2] = 0
    with pytest.raises(TrainingStopped, match="no batch arrived within 1004 s"):
        loader._check(RuntimeError(TIMED_OUT))
