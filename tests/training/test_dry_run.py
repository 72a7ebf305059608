# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""--dry_run: it reports what a run will do, finds what would fail, and leaves the run alone."""

import math
import multiprocessing
import os
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
from config import parser as options
from data_loading.decode import BadImage
from data_loading.loader import DeviceLoader
from data_loading.samplers import EvalSampler
from data_loading.tta import ONE_VIEW
from data_loading.workers import WatchedLoader
from parallel import process_group
from parallel.state_dict import tensor_leaves
from tests.groups import free_port
from tests.test_end_to_end import FINETUNE, PRETRAIN
from tests.tiny import Colors
from training import dry_run, run_lock
from training.dry_run import PlannedRun, StepProbe, format_bytes
from training.schedules import Schedule
from training.setup import TrainLoop

CPU = torch.device("cpu")
NO_FOLDER = ["--output_dir", "none"]  # else the disk of a new one is checked too
MAINS = {
    "pretrain": (main_pretrain, [*PRETRAIN, *NO_FOLDER]),
    "finetune": (main_finetune, [*FINETUNE, *NO_FOLDER]),
}


class Unreadable(Colors):
    """Images whose numbers are in `bad` cannot be read."""

    def __init__(self, length: int, bad: tuple) -> None:
        super().__init__(length)
        self.bad = bad

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise BadImage("cannot identify it")
        return super().__getitem__(index)


def unreadable(data_path: str, train: bool) -> Unreadable:
    return Unreadable(26, (3, 4)) if train else Unreadable(7, (1,))


def no_val(data_path: str, train: bool) -> Unreadable:
    return Unreadable(26, ()) if train else Unreadable(3, (0, 1, 2))


class Broken(Colors):
    """Two images raise an exception that only a user's own data set raises."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in (3, 4):
            raise ZeroDivisionError("no such thing")
        return super().__getitem__(index)


def broken(data_path: str, train: bool) -> Broken:
    return Broken(26 if train else 3)


class Floats(Colors):
    """Images four times as large."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = super().__getitem__(index)
        return image / 255, label


def floats(data_path: str, train: bool) -> Floats:
    return Floats(26)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Measure for a moment only: no test depends on the numbers."""
    monkeypatch.setattr(dry_run, "SECONDS", 0.05)


@pytest.fixture
def said(capsys):
    """A function that returns all output so far, log lines and errors."""
    text = []

    def read() -> str:
        text.extend(capsys.readouterr())
        return "".join(text)

    return read


def dry(kind: str, *words: object) -> int:
    """Dry-run a script in this process; returns its exit code."""
    main, base = MAINS[kind]
    args = options.parse(main.get_args_parser(), [*base, *map(str, words), "--dry_run"])
    try:
        process_group.launch(main.main, args)
    except SystemExit as stop:
        return stop.code
    finally:
        for worker in multiprocessing.active_children():  # as at the end of a process
            worker.kill()
    return 0


def tree(folder: Path) -> dict[str, tuple]:
    """Every file with its content and time, but not the time of the lock: its owner updates it."""
    paths = sorted(folder.rglob("*"))
    times = {path: path.stat().st_mtime_ns for path in paths if path.name != run_lock.NAME}
    return {str(p): (times.get(p), p.read_bytes() if p.is_file() else b"") for p in paths}


# --- no problem -------------------------------------------------------------------------------


def rank_main(rank: int, port: int, folder: Path, words: list) -> None:
    """A fork of this process becomes one of two ranks, which writes into `folder`."""
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        process_group.get_logger().handlers = []
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        code = dry("finetune", *words)
    finally:
        os._exit(code)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True])
def test_two_processes_agree_and_only_rank_0_reports(fault, tmp_path):
    port, words = free_port(), ["--batch_size", 3, "--output_dir", tmp_path / "runs" / "new"]
    words += ["--data_set", "tests.training.test_dry_run:broken"] * fault
    words += ["--dist_eval", "false"]  # rank 1 has no images to evaluate
    children = [os.fork(), 0]
    if children[0] == 0:
        rank_main(0, port, tmp_path, words)
    children[1] = os.fork()
    if children[1] == 0:
        rank_main(1, port, tmp_path, words)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    out, other = ((tmp_path / f"stdout-{rank}").read_text() for rank in (0, 1))
    assert codes == [int(fault)] * 2, (tmp_path / "stderr-0").read_text()
    assert other == ""
    assert "6 images = 3 x 1 accumulation step x 2 processes" in out
    labels = set(re.findall(r"^([a-z]+)  +\S", out, re.MULTILINE))
    measured = {"model", "loader", "together", "evaluation", "time"}
    assert labels == {*LABELS, "val", "evaluation"} ^ (measured | {"skipped"} if fault else set())
    if fault:
        assert "skipped      speed and time: the data has problems" in out
        assert "ZeroDivisionError: no such thing" in out + (tmp_path / "stderr-0").read_text()
    assert ("no problems found" in out) != fault
    assert not (tmp_path / "runs").exists()


LABELS = [
    "train",
    "start",
    "step",
    "parameters",
    "lr",
    "memory",
    "model",
    "loader",
    "together",
    "time",
    "disk",
]


def test_pretraining_is_tried_and_leaves_no_trace(said, tmp_path):
    flags = ["--num_workers", 1, "--output_dir", tmp_path / "runs" / "new", "--amp", "fp16"]
    assert dry("pretrain", *flags) == 0
    found = re.findall(r"^([a-z]+) +\S", said().partition("to --output_dir\n")[2], re.MULTILINE)
    labels = ["train", "picture", *LABELS[1:], "dry"]
    labels.insert(labels.index("time"), "probes")
    assert found == labels
    assert re.search(r"probes +about 0:00:\d\d each, of \d+ images, 2 times in the run", said())
    assert "step 1/" not in said()
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_picture_that_cannot_be_drawn_is_found(said, monkeypatch):
    """It would have failed after the first ten epochs."""

    def fail(*inputs: object) -> None:
        raise ZeroDivisionError("no font")

    monkeypatch.setattr("training.pictures.grid", fail)
    assert dry("pretrain") == 1
    assert "no picture can be drawn (ZeroDivisionError: no font); --picture_freq 0" in said()
    assert dry("pretrain", "--picture_freq", 0) == 0


def test_folder_of_a_run_is_left_as_it_is(said, monkeypatch, tmp_path):
    """Taking over a lock, renaming a checkpoint or drawing an image would harm that run."""
    monkeypatch.setattr(run_lock, "BEAT", 0.2)
    words = ["--output_dir", tmp_path, "--log_dir", "none", "--save_ckpt_num", 9]
    args = options.parse(main_pretrain.get_args_parser(), [*PRETRAIN, *map(str, words)])
    main_pretrain.main(args)
    newest = tmp_path / "checkpoint-1.pth"
    newest.write_bytes(newest.read_bytes()[:500])  # cut off by a crash
    before = tree(tmp_path)
    assert dry("pretrain", *words, "--epochs", 4) == 1  # this process holds the lock
    assert "continuing from " in said()
    assert "checkpoint-0.pth, after epoch 1, step 4 of 16" in said()
    assert "is in use by process" in said()
    assert tree(tmp_path) == before
    run_lock.acquire_run_lock("")  # the run is over


@pytest.mark.parametrize("holder", ["process 7 on elsewhere", None])
def test_folder_is_a_problem_only_if_a_living_run_holds_it(holder, monkeypatch, tmp_path):
    monkeypatch.setattr(run_lock, "describe_holder", lambda folder: holder)
    problems = []
    run = SimpleNamespace(folder=tmp_path, args=SimpleNamespace(log_dir=None))
    dry_run.check_folder(problems, run)
    in_use = f"--output_dir {tmp_path} is in use by {holder}; choose another folder, or wait "
    in_use += "60 s if that run was killed"
    assert problems == [in_use] * bool(holder)


def test_report_says_what_the_run_will_do(said):
    words = ["--epochs", 10, "--update_freq", 2, "--warmup_epochs", 2, "--min_lr", 0.001]
    words += ["--layer_decay", 0.5, "--model_ema", "--model_ema_eval", "--mixup", 0.8]
    assert dry("finetune", *words) == 0
    assert "26 images of 3 classes; decoded 26: 0 bad, 0 replaced" in said()
    assert "7 images of 3 classes; decoded 7: 0 bad, 0 replaced" in said()
    assert "random weights, in epoch 1, step 0 of 20" in said()
    assert "12 images = 6 x 2 accumulation steps x 1 process; 20 steps in the run" in said()
    assert "learning rate x 0.0312 to 1 by layer" in said()  # stem, 4 blocks, head: 0.5 ** 5
    assert "step  3  1.00e-02  ######################################## peak" in said()
    assert "step 19  1.00e-03  ####" in said()


def test_memory_and_speed_are_those_of_the_largest_images(said, monkeypatch):
    """The images of the first epoch are small."""
    shapes = []
    real = dry_run.StepProbe.batches

    def batches(self, size, times=1):
        shapes.append(tuple(self.samples[0].shape[1:]))
        return real(self, size, times)

    loaded = []
    rate = dry_run.loader_rate
    monkeypatch.setattr(
        dry_run, "loader_rate", lambda b, s: loaded.append(next(b)[0].shape[1:]) or rate(b, 0.1)
    )
    monkeypatch.setattr(dry_run.StepProbe, "batches", batches)
    assert dry("pretrain", "--input_size", "16:0,24:1", "--epochs", 2) == 0
    assert {*shapes} == {*loaded} == {(3, 24, 24)}
    assert "used at 16 x 16 pixels, after 1 epoch 24 x 24" in said()
    assert "with images of the last size, 0:00:0" in said()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_reported_and_no_problem(workers, said):
    words = ["--data_set", "tests.training.test_dry_run:unreadable", "--on_bad_image", "skip"]
    assert dry("finetune", *words, "--num_workers", workers) == 0
    assert "decoded 26: 0 bad, 2 replaced" in said()
    assert "replaced: image number 3 (cannot identify it), image number 4 (" in said()
    assert "decoded 7: 0 bad, 1 left out" in said()
    assert "no problems found" in said()


def test_a_data_set_without_a_usable_image_is_a_problem(said):
    words = ["--data_set", "tests.training.test_dry_run:no_val", "--on_bad_image", "skip"]
    assert dry("finetune", *words) == 1
    assert "none of 3 val images can be used" in said()


# --- problems -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    picture = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    for split, names in {"train": "ab", "val": "ac"}.items():
        for name in names:
            (root / "differ" / split / name).mkdir(parents=True)
            for number in range(6):
                picture.save(root / "differ" / split / name / f"{number}.png")
    shutil.copytree(root / "differ" / "train", root / "broken" / "a")
    shutil.copytree(root / "differ" / "train", root / "one" / "train" / "photos")
    (root / "broken" / "a" / "b" / "4.png").write_bytes(b"no picture")
    torch.save({"model": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, root / "resnet.pth")
    (root / "file").write_text("a file")
    return root


PROBLEMS = {  # name -> script, flags, part of the message
    "bad image": ("pretrain", "--data_set folder --data_path {0}/broken", "1 of 12 train images"),
    "own data set": (
        "pretrain",
        "--data_set tests.training.test_dry_run:broken",
        "2 of 26 train images: image number 3: ZeroDivisionError: no such thing, image number 4: ",
    ),
    "one class": (
        "finetune",
        "--data_set IMNET --data_path {0}/one --disable_eval",
        "1. train: all images are of one class, 'photos'",
    ),
    "missing class": ("finetune", "--data_set IMNET --data_path {0}/differ", "does not know: c"),
    "weights": ("finetune", "--finetune {0}/resnet.pth", "conv1.weight"),
    "nothing divides": ("pretrain", "--effective_batch 10", "not a multiple of --batch_size 6"),
    "too few images": ("pretrain", "--batch_size 27", "--batch_size 26 or less"),
    "folder is a file": ("pretrain", "--output_dir {0}/file/run", "cannot write in {0}/file;"),
    "not finite": ("finetune", "--data_set tests.tiny:poisoned --disable_eval", "not finite"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_problem_is_named_and_the_exit_code_is_1(case, planted, said):
    kind, words, named = PROBLEMS[case]
    assert dry(kind, *words.format(planted).split()) == 1
    assert "error: " in said()
    assert named.format(planted) in said()
    assert "no problems found" not in said()


def test_error_of_a_data_set_is_shown_with_its_traceback_once(said):
    assert dry("pretrain", *PROBLEMS["own data set"][1].split()) == 1
    assert said().count("The data set raised it:\n") == 1
    assert f'  File "{__file__}", line ' in said()


@pytest.mark.slow
def test_batches_that_do_not_fit_in_shared_memory_are_a_problem(said, monkeypatch):
    """Docker's 64 MB: a loader process could not send its first batches."""
    Usage, asked = namedtuple("Usage", "total used free"), []
    free = 5 * 6 * 3 * 16 * 16 - 1

    def set_usage(*sizes: int) -> None:
        def usage(path: Path) -> Usage:
            asked.append(str(path))
            return Usage(*sizes)

        monkeypatch.setattr(dry_run.shutil, "disk_usage", usage)

    set_usage(2 * free, free, free)
    assert dry("pretrain", "--num_workers", 2) == 1
    assert (
        "/dev/shm     22.5 KiB for batches of loader processes, 22.5 KiB of 45.0 KiB free" in said()
    )
    assert (
        "1. /dev/shm: 22.5 KiB for batches of loader processes, 22.5 KiB of 45.0 KiB free; enlarge"
        in said()
    )
    assert "skipped      speed and time: batches do not fit in /dev/shm" in said()
    assert asked[0] == "/dev/shm"
    set_usage(0, 0, 3 * free)
    words = ["--data_set", "tests.training.test_dry_run:floats", "--num_workers", 2]
    assert dry("pretrain", *words) == 1
    assert "1. /dev/shm: 90.0 KiB for batches of loader processes, 67.5 KiB of" in said()
    asked.clear()
    assert dry("pretrain", "--num_workers", 0) == 0  # nothing is sent
    assert "/dev/shm" not in asked


def test_full_shared_memory_is_named_first_and_makes_no_bad_image(said, monkeypatch):
    """`1 of 1 train images` was a loader process that could not send it."""
    usage = namedtuple("Usage", "total used free")(2**26, 2**26, 0)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(dry_run, "itemgetter", lambda _: lambda samples: lambda: samples)
    assert dry("pretrain", "--num_workers", 1) == 1
    assert "decoded 0: 0 bad" in said()
    first, second = said().partition("error: dry run: 2 problems found:\n")[2].splitlines()[:2]
    assert first.startswith("  1. /dev/shm: 13.5 KiB for batches of loader processes, 0 B of 64.0")
    assert second.startswith("  2. train images: a loader process could not send a batch")


def test_shared_memory_is_that_of_the_larger_batches_of_evaluation(said, monkeypatch):
    monkeypatch.setattr(dry_run, "SECONDS", 0.01)
    assert dry("finetune", "--num_workers", 1) == 0
    assert "/dev/shm     20.2 KiB for batches of loader" in said()  # 3 x 9 images of 768 bytes


def test_five_crops_take_five_times_the_shared_memory_and_are_measured(said, monkeypatch):
    monkeypatch.setattr(dry_run, "SECONDS", 0.01)
    batches, evaluate = [], main_finetune.evaluate

    def noting(loader, *args):
        batches.append((loader.views.count, next(loader.batches)[0].shape))
        return evaluate(loader, *args)

    monkeypatch.setattr(main_finetune, "evaluate", noting)
    words = ["--num_workers", 1, "--tta", "hflip", "five_crop", "--crop_pct", 0.8]
    assert dry("finetune", *words) == 0
    assert "/dev/shm     101.2 KiB for batches of loader" in said()
    assert {*batches} == {(10, (7, 3, 5 * 16, 16))}


def test_grown_batches_are_of_small_images(said, monkeypatch):
    """Shared memory was that of the largest batch with the largest images."""
    monkeypatch.setattr(dry_run, "SECONDS", 0.01)
    words = ["--input_size", "16:0,32:1", "--batch_size", 8, "--progressive_batch"]
    assert dry("pretrain", *words, "--num_samples", 60, "--num_workers", 1) == 0
    assert "/dev/shm     72.0 KiB for batches of loader" in said()  # 3 x 8 images of 3072 bytes
    assert "the largest batch that fits is 8, " in said()  # 16 would be 64 images in epoch 1


def test_every_problem_is_listed(planted, said, monkeypatch, tmp_path):
    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: Usage(1000))
    monkeypatch.setattr(dry_run.importlib.util, "find_spec", lambda name: None)
    words = ["--data_set", "folder", "--data_path", planted / "broken", "--output_dir", tmp_path]
    assert dry("pretrain", *words) == 1
    listed = said().partition("error: dry run: 3 problems found:\n")[2].splitlines()
    assert listed[0].startswith("  1. 1 of 12 train images: cannot read image")
    assert "b/4.png" in listed[0]
    assert listed[1].startswith("  2. tensorboard is not installed: pip install tensorboard")
    assert listed[2].startswith("  3. checkpoints need")
    assert "1000 B are free; lower --save_ckpt_num" in listed[2]


def test_steps_with_nan_do_not_hide_other_problems(planted, said):
    assert dry("pretrain", "--lr", "1e30", "--output_dir", planted / "file" / "run") == 1
    text = said()
    assert "of the steps tried had NaN, Inf or a loss spike; lower --lr or --blr" in text
    assert f"cannot write in {planted / 'file'};" in text


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_an_image_that_kills_or_blocks_its_reader_is_named(fault, said):
    """If the dry run itself read it, it would be killed, or wait forever."""
    words = ["--data_set", f"tests.tiny:{fault}", "--num_workers", 2]
    words += ["--data_timeout", 2] if fault == "hangs" else []
    assert dry("finetune", *words) == 1
    assert "Traceback" not in said()
    assert re.search(r"dry run: \d problems? found:\n  1. \w+ images: a loader process", said())
    assert "image photos/5.jpg" in said()
    assert not re.search("[1-9] bad", said())


def test_a_dry_run_of_an_evaluation_is_refused(capsys):
    with pytest.raises(SystemExit):
        dry("finetune", "--eval", "--resume", "a.pth")
    assert "--dry_run true and --eval true cannot be combined" in capsys.readouterr().err


# --- parts ----------------------------------------------------------------------------------------


class Small:
    """As much of a run as a probe needs, with memory for ten images, 16 MiB each."""

    device, update_freq = CPU, 1

    def __init__(self, error: Exception) -> None:
        self.error, self.optimizer = error, torch.optim.SGD([torch.zeros(1)])
        self.normalize = torch.Tensor.float
        self.scaler = torch.amp.GradScaler("cpu")
        self.loader = SimpleNamespace(sampler=SimpleNamespace(samples=100))

    def read(self) -> tuple[int, list]:
        return 0, []

    def state(self) -> dict:
        return {}

    def train(self, batches, loop) -> None:
        for images, _, _ in batches:
            self.work = torch.ones(len(images) * 2**22)
            if len(images) > 10:
                raise self.error
            del self.work

    def probe(self, batch_size: int = 6, **flags: bool) -> StepProbe:
        args = SimpleNamespace(batch_size=batch_size, compile=False, cuda_graphs=False)
        vars(args).update(flags)
        others = ("schedule", "state", "guard", "reporter", "checkpoints", "seed")
        loop = TrainLoop(self, **dict.fromkeys(others))
        samples = [(torch.zeros(3, 4, 4, dtype=torch.uint8), 0, n) for n in range(4)]
        return StepProbe(PlannedRun(args, None, "", loop, self.train, self), samples)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("x: can't allocate memory"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],  # fmt: skip
)
def test_a_step_without_enough_memory_is_a_problem(error):
    problems = []
    assert dry_run.check_memory(problems, Small(error).probe(10, compile=True)) == 10
    assert dry_run.check_memory(problems, Small(error).probe(11, compile=True)) == 0
    assert problems == ["--batch_size 11 does not fit; try a smaller model"]


def test_other_errors_end_the_dry_run():
    with pytest.raises(RuntimeError, match="shapes"):
        dry_run.check_memory([], Small(RuntimeError("shapes do not fit")).probe(11, compile=True))


@pytest.mark.parametrize(
    ("asked", "unit", "sizes"),
    [
        *[(1, 1, [1, 1]), (2, 1, [1, 2]), (16, 1, [2, 4]), (80, 1, [10, 20])],
        *[(2, 2, [2, 2]), (6, 2, [2, 4]), (28, 2, [2, 4]), (80, 2, [10, 20])],
    ],
)
def test_largest_batch_follows_from_two_small_steps(asked, unit, sizes, monkeypatch):
    """A process of 500 bytes, 100 bytes more for each image, and 9,500 of 10,000 bytes to use."""
    probe, tried = Small(MemoryError()).probe(), []
    monkeypatch.setattr(probe, "peak", lambda n: tried.append(n) or 500 + 100 * n)
    monkeypatch.setattr(probe, "used_and_free", lambda: (500, 10_000))
    probe.samples, probe.batch_multiple = [torch.zeros(1, 1)], unit
    largest, how = dry_run.estimate_largest(probe, asked)
    assert largest == 95 // unit * unit
    assert tried == sizes
    assert how == "estimated from 100 B per image and 9.8 KiB free per process"


def test_free_memory_of_a_cpu_is_what_linux_says(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "MEMORY", tmp_path / "meminfo")
    dry_run.MEMORY.write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    2000 kB\n")
    monkeypatch.setattr(dry_run, "get_world_size", lambda: 4)
    used, free = Small(MemoryError()).probe().used_and_free()
    assert free == 500 * 1024
    assert used > 2**20  # of this process


@pytest.mark.parametrize(
    ("asked", "room", "size", "advice"),
    [
        (64, 64, 64, "no problem"),  # as estimated
        (96, 96, 96, "no problem"),  # more than estimated
        (96, 90, 0, "try 95"),
        (64, 60, 0, "try a smaller model"),  # less than estimated
    ],
)
def test_on_one_gpu_the_batch_itself_is_tried(asked, room, size, advice, monkeypatch):
    """There a lack of memory is an exception, and the estimate may be wrong."""
    probe = Small(MemoryError()).probe(asked)

    def peak(images: int, times: int = 1) -> int:
        if images > room:
            raise torch.OutOfMemoryError("full")
        return 500 + 100 * images

    monkeypatch.setattr(probe, "peak", peak)
    monkeypatch.setattr(probe, "used_and_free", lambda: (500, 10_000))
    probe.samples, probe.device = [torch.zeros(1, 1)], torch.device("cuda")
    problems = []
    assert dry_run.check_memory(problems, probe) == size
    assert problems == [f"--batch_size {asked} does not fit; {advice}"] * (size == 0)


def test_on_several_gpus_a_batch_that_does_not_fit_is_not_tried(monkeypatch, said):
    """Other processes would wait for one that ran out of memory."""
    probe, tried = Small(MemoryError()).probe(96), []
    probe.samples, probe.device = [torch.zeros(1, 1)], torch.device("cuda")
    monkeypatch.setattr(probe, "peak", lambda n, times=1: tried.append(n) or 500 + 100 * n)
    monkeypatch.setattr(probe, "used_and_free", lambda: (500, 10_000))
    monkeypatch.setattr(dry_run, "get_world_size", lambda: 2)
    problems = []
    assert dry_run.check_memory(problems, probe) == 50  # half of the images; 95 would fit
    assert tried == [12, 24, 50]
    assert problems == ["--batch_size 96 does not fit; try 50"]


def test_an_image_takes_at_least_its_own_memory(monkeypatch):
    """Steps of a few images may show no growth at all."""
    probe = Small(MemoryError()).probe()
    monkeypatch.setattr(probe, "peak", lambda n: 1000)
    monkeypatch.setattr(probe, "used_and_free", lambda: (1000, 40_000))
    assert dry_run.estimate_largest(probe, 8)[0] == 2 + 38_000 // (3 * 4 * 4 * 4)


def test_repeated_batches_are_copies():
    """Mixup works in place: without a copy it would mix the same images twice."""
    batches = Small(MemoryError()).probe().batches(6, times=3)
    assert len(batches) == 3
    for images, _, ids in batches:
        assert images.sum() == 0
        assert ids.tolist() == [0, 1, 2, 3, 0, 1]
        images += 1


def test_size_of_a_checkpoint_is_that_of_its_file(tmp_path):
    tensors = {"a": torch.ones(1000, 10), "b": [torch.ones(90_000, dtype=torch.half)]}
    content = {"model": tensors, "model_ema": None, "state": {"epoch": 1}}
    torch.save(content, tmp_path / "file.pth")
    size = sum(tensor.nbytes for tensor in tensor_leaves(content))
    assert size == pytest.approx((tmp_path / "file.pth").stat().st_size, rel=0.01)


def test_bytes_have_a_unit():
    texts = ["5 B", "1.5 KiB", "1.0 MiB", "3.0 GiB", "2048.0 TiB", "0 B"]
    assert [format_bytes(n) for n in (5, 1536, 2**20, 3 * 2**30, 2**51, 0)] == texts


def test_learning_rates_are_those_of_the_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = Schedule(optimizer, total=21, lr=1.0, min_lr=0.1, warmup=7)
    rows = [row.split() for row in dry_run.lr_rows(schedule, 9)]
    steps = [int(row[1]) for row in rows]
    assert steps == sorted({0, 6, 20, 9, *(21 * k // 10 for k in range(10))})
    assert all(math.isclose(float(r[2]), schedule.rate(int(r[1])), rel_tol=0.01) for r in rows)
    assert [row[-1] for row in rows if int(row[1]) in (6, 9)] == ["peak", "here"]


class ClockedLoader:
    """Epochs of 4 batches of 10 images; after `ready` batches each takes a second of `now`."""

    def __init__(self, ready: int) -> None:
        self.ready, self.now, self.orders = ready, 0.0, []
        self.loader = SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        self.orders.append(epoch)

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        for _ in range(4):
            self.ready -= 1
            self.now += 1e-3 if self.ready >= 0 else 1
            yield torch.zeros(10), torch.zeros(10)


def test_loader_rate_leaves_out_what_workers_hold_ready(monkeypatch):
    """Each epoch has an order of its own: a repeated one may be in the disk's cache."""
    loader = ClockedLoader(ready=5)
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: loader.now))
    assert dry_run.loader_rate(dry_run.endless(loader), seconds=4.0) == pytest.approx(10)
    assert loader.orders == [0, 1, 2, 3]


def test_rank_without_images_reads_none():
    empty = DeviceLoader(WatchedLoader([], EvalSampler(4, 1, 2, dist_eval=False), 1), CPU, [0], [1])
    assert dry_run.loader_rate(dry_run.endless(empty), seconds=1.0) == 0


class AllLeftOut:
    """Evaluation batches of images that cannot be decoded: there is a length, but no batch."""

    loader = SimpleNamespace(sampler=EvalSampler(4, 0, 1))
    asked = 0

    def __len__(self):
        return 2

    def __iter__(self):
        self.asked += 1
        assert self.asked == 1, "asked again"
        return iter(())


def test_rank_whose_images_are_all_left_out_ends():
    """It would search for a batch forever, and the other ranks wait for it."""
    assert list(dry_run.endless(AllLeftOut())) == []


def test_loader_rate_does_not_wait_for_a_slow_loader(monkeypatch):
    """A batch may take minutes: two are enough."""
    loader = ClockedLoader(ready=0)
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: loader.now))
    assert dry_run.loader_rate(dry_run.endless(loader), seconds=0.1) == 10
    assert loader.now == 2


@pytest.mark.parametrize(("loader", "slower", "seconds"), [(5.0, "loader", 20), (1e9, "model", 5)])
def test_evaluation_lasts_as_long_as_its_slower_half(loader, slower, seconds, monkeypatch):
    """Ten batches of 2 images a second by the model; evaluated twice, with EMA weights too."""
    monkeypatch.setattr(dry_run, "calls_per_second", lambda work, seconds: 10.0)
    monkeypatch.setattr(dry_run, "loader_rate", lambda batches, seconds: loader)
    lines = []
    monkeypatch.setattr(dry_run, "log_result", lambda label, text: lines.append(text))
    probe = Small(MemoryError()).probe(dist_eval=True, model_ema_eval=True, eval_freq=1)
    probe.run.data_loader_val = SizedLoader(range(100), batch_size=2)
    assert dry_run.measure_evaluation(probe) == 2 * seconds
    assert lines[0].endswith(f"limited by the {slower}: 0:00:{seconds:02d}")


def test_time_is_that_of_the_epochs_left(monkeypatch):
    """100 batches of 6 images at 60 images/s and 5 s of evaluation; 20 epochs, 2.5 are done."""
    planned = Small(MemoryError()).probe(epochs=20).run
    planned.data_loader_train = SizedLoader(range(600))
    planned.loop.state = SimpleNamespace(epoch=2, samples_in_epoch=300)
    lines = []
    monkeypatch.setattr(dry_run, "log_result", lambda label, text: lines.append(text))
    dry_run.log_time(planned, 60.0, 5.0)
    assert lines == ["0:00:15 per epoch, 0:04:22 for the 17.5 epochs left, without saves"]


class SizedLoader:
    """A loader of 100 batches."""

    views = ONE_VIEW

    def __init__(self, dataset: range, batch_size: int = 6) -> None:
        sampler = SimpleNamespace(samples=len(dataset))
        self.loader = SimpleNamespace(dataset=dataset, batch_size=batch_size, sampler=sampler)

    def __len__(self) -> int:
        return 100


@pytest.mark.parametrize("within_epoch", [None, 5])
def test_disk_space_is_that_of_all_files_at_once(within_epoch, tmp_path, monkeypatch):
    """Of 2400 bytes each: 3 numbered, the best, one being written; the best EMA weights apart."""
    content = {"model": torch.zeros(500), "model_ema": {"a": torch.zeros(100)}}
    flags = {"epochs": 10, "save_ckpt_freq": 1, "save_ckpt_num": 3}
    flags |= {"save_ckpt_every_steps": within_epoch, "save_ckpt_every_minutes": None}
    planned = Small(MemoryError()).probe(**flags).run
    planned.folder, planned.data_loader_val = tmp_path, object()
    planned.loop.state = SimpleNamespace(epoch=0)
    planned.loop.checkpoints = SimpleNamespace(save=lambda state, writer: writer(content, None))
    (tmp_path / "checkpoint-0.pth").write_bytes(b"0" * 1000)
    os.link(tmp_path / "checkpoint-0.pth", tmp_path / "checkpoint-best.pth")
    needed = (5 if within_epoch is None else 7) * 2400 + 400 - 1000
    for free, problems in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(
            dry_run.shutil, "disk_usage", lambda path, n=free: SimpleNamespace(free=n)
        )
        found = []
        dry_run.check_disk(found, planned)
        assert len(found) == problems
