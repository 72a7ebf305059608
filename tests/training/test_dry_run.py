# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What --dry_run finds, and that it leaves no trace."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
from config import parser as options
from errors import TrainingStopped, UserError
from optim_factory import Schedule
from parallel import process_group
from tests.test_end_to_end import FINETUNE, PRETRAIN, run
from tests.tiny import Colours
from training import dry_run, trial
from training.run_lock import Lock, hold_folder
from training.trial import Repeated, Trial, largest_that_fits, memory, peak_of, readable, size_of

CPU = torch.device("cpu")
MAINS = {"pretrain": (main_pretrain, PRETRAIN), "finetune": (main_finetune, FINETUNE)}


class Unreadable(Colours):
    """Of the training images 3 and 4 cannot be read, of those for evaluation 1."""

    def __init__(self, length: int, bad: tuple) -> None:
        super().__init__(length)
        self.bad = bad

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise OSError("cannot identify it")
        return super().__getitem__(index)


def unreadable(data_path: str, train: bool) -> Unreadable:
    return Unreadable(26, (3, 4)) if train else Unreadable(7, (1,))


def no_val(data_path: str, train: bool) -> Unreadable:
    return Unreadable(26, ()) if train else Unreadable(3, (0, 1, 2))


class SlowVal(Colours):
    """Images for evaluation that come from far away."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.02 if self.length == 60 else 0)
        return super().__getitem__(index)


def slow_val(data_path: str, train: bool) -> SlowVal:
    return SlowVal(26 if train else 60)


class Broken(Colours):
    """Two images that raise what somebody's own data set may raise, none of ours."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in (3, 4):
            raise ZeroDivisionError("no such thing")
        return super().__getitem__(index)


def broken(data_path: str, train: bool) -> Broken:
    return Broken(26 if train else 3)


@pytest.fixture
def short(monkeypatch):
    """Measurements of a moment: their numbers matter to no test."""
    monkeypatch.setattr(dry_run, "SECONDS", 0.05)


@pytest.fixture
def said(monkeypatch, capsys):
    """A function: all that was said so far, by log lines and errors."""
    monkeypatch.setattr(process_group.get_logger(), "propagate", True)  # else pytest adds a handler
    monkeypatch.setattr(
        process_group.get_logger(), "handlers", []
    )  # a run makes one for this capsys
    text = []

    def read() -> str:
        text.extend(capsys.readouterr())
        return "".join(text)

    return read


def dry(kind: str, *words: object) -> int:
    """Exit code of a dry run in this process."""
    main, base = MAINS[kind]
    args = options.parse(main.get_args_parser(), [*base, *map(str, words), "--dry_run"])
    try:
        process_group.launch(main.main, args)
    except SystemExit as stop:
        return stop.code
    return 0


def tree(folder: Path) -> dict[str, tuple]:
    """Every file with its contents and time."""
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths}


# --- all right --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ranks", "workers"), [("pretrain", 1, 2), ("finetune", 2, 0), ("finetune", 1, 2)]
)
def test_a_good_run_is_0_and_the_report_is_the_main_process_s(kind, ranks, workers, tmp_path):
    base, folder = MAINS[kind][1], tmp_path / "runs" / "new"
    flags = ["--batch_size", 3, "--output_dir", folder, "--dry_run", "--num_workers", workers]
    done = run(f"main_{kind}.py", *base, *flags, ranks=ranks)
    labels = "train start update parameters rate memory model loader together disk time"
    for label in labels.split() + ["val", "evaluation"] * (kind == "finetune"):
        assert done.stdout.count(f"\n{label.ljust(12)} ") == 1, (label, done.stdout)
    assert "nothing would fail" in done.stdout
    assert "step 1/" not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_folder_of_a_run_that_goes_on_elsewhere_is_left_as_it_is(short, said, tmp_path):
    """A lock taken over, a checkpoint renamed or a picture drawn would harm that run."""
    words = ["--output_dir", tmp_path, "--log_dir", "none", "--save_ckpt_num", 9]
    args = options.parse(main_pretrain.get_args_parser(), [*PRETRAIN, *map(str, words)])
    main_pretrain.main(args)
    newest = tmp_path / "checkpoint-1.pth"
    newest.write_bytes(newest.read_bytes()[:500])  # cut off by a crash
    hold_folder("")  # the run is over
    before = tree(tmp_path)
    assert dry("pretrain", *words, "--epochs", 4) == 0
    assert "trying the one before" in said()
    assert "checkpoint-0.pth, at epoch 1, update 4 of 16" in said()
    assert tree(tmp_path) == before

    lock = Lock(tmp_path).take()
    lock.stopped.set()  # so that its time stands still
    time.sleep(0.01)
    before = tree(tmp_path)
    assert dry("pretrain", *words, "--epochs", 4) == 1
    assert "is in use by process" in said()
    assert tree(tmp_path) == before
    lock.release()


@pytest.mark.parametrize("alive", [True, False])
def test_lock_of_another_machine_is_a_fault_only_if_its_run_lives(
    short, said, tmp_path, monkeypatch, alive
):
    """A run takes over what a machine that died left; no clocks are compared."""
    monkeypatch.setattr(dry_run, "LOOK", 2.0 if alive else 0.2)
    file, over = tmp_path / ".lock", threading.Event()
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": "1"}))

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(file)

    if alive:
        threading.Thread(target=beat, daemon=True).start()
    code = dry("pretrain", "--output_dir", tmp_path)
    over.set()
    assert code == int(alive)
    assert ("is in use by process 7 on elsewhere" in said()) == alive
    assert ("process 7 on elsewhere holds" in said()) != alive
    assert file.exists()


def test_report_says_what_the_run_will_do(short, said):
    words = ["--epochs", 10, "--update_freq", 2, "--warmup_epochs", 2, "--min_lr", 0.001]
    assert dry("finetune", *words, "--layer_decay", 0.5, "--model_ema", "--model_ema_eval") == 0
    assert "26 images of 3 classes; 26 decoded, all good" in said()
    assert "7 images of 3 classes, as train has them; 7 decoded, all good" in said()
    assert "random weights, at epoch 0, update 0 of 20" in said()
    assert "12 images = 6 x 2 micro-batches x 1 processes; 20 in the whole run" in said()
    assert "rate times 0.0312 to 1 by layer" in said()  # stem, 4 blocks, head: 0.5 ** 5
    assert "update  3  1.00e-02  ######################################## peak" in said()
    assert "update 19  1.00e-03  ####" in said()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_that_the_run_goes_without_are_told_and_no_fault(short, said, workers):
    words = ["--data_set", "tests.training.test_dry_run:unreadable", "--on_bad_image", "skip"]
    assert dry("finetune", *words, "--num_workers", workers) == 0
    assert "26 decoded, 2 bad, replaced" in said()
    assert "replaced: image number 3 (OSError: cannot identify it), image number 4 (" in said()
    assert "7 decoded, 1 bad, left out" in said()
    assert "nothing would fail" in said()


def test_a_set_of_which_nothing_is_left_would_fail(short, said):
    words = ["--data_set", "tests.training.test_dry_run:no_val", "--on_bad_image", "skip"]
    assert dry("finetune", *words) == 1
    assert "none of 3 val images can be used" in said()


@pytest.mark.parametrize("workers", [0, 2])
def test_time_of_evaluation_is_that_of_its_loader_where_that_is_slower(short, said, workers):
    """Six thousand images at the model's rate are a moment, from there two minutes."""
    words = ["--data_set", "tests.training.test_dry_run:slow_val", "--num_workers", workers]
    assert dry("finetune", *words) == 0
    found = re.search(r"evaluation +([\d.]+) images/s by the model, ([\d.]+) by the loader", said())
    model, loader = map(float, found.groups())
    assert 1 < loader < min(50 * max(workers, 1) * 1.5, model)
    assert ": the loader is what takes the time" in said().split("by the model")[1]


# --- what would fail ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    picture = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    for split, names in {"train": "ab", "val": "a"}.items():
        for name in names:
            (root / "differ" / split / name).mkdir(parents=True)
            for number in range(6):
                picture.save(root / "differ" / split / name / f"{number}.png")
    shutil.copytree(root / "differ" / "train", root / "broken" / "a")
    (root / "broken" / "a" / "b" / "4.png").write_bytes(b"no picture")
    torch.save({"model": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, root / "resnet.pth")
    (root / "file").write_text("a file")
    return root


FAULTS = {  # name -> script, flags, what must be said
    "bad image": ("pretrain", "--data_set folder --data_path {0}/broken", "1 of 12 train images"),
    "own data set": (
        "pretrain",
        "--data_set tests.training.test_dry_run:broken",
        "ZeroDivisionError",
    ),
    "missing class": ("finetune", "--data_set IMNET --data_path {0}/differ", "only in train: b"),
    "weights": ("finetune", "--finetune {0}/resnet.pth", "conv1.weight"),
    "nothing divides": ("pretrain", "--effective_batch 10", "not a multiple of --batch_size 6"),
    "too few images": ("pretrain", "--batch_size 27", "--batch_size 26 or less"),
    "folder is a file": ("pretrain", "--output_dir {0}/file/run", "is a file"),
    "not finite": ("finetune", "--data_set tests.tiny:poisoned --disable_eval", "not finite"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_planted_fault_is_named_and_the_exit_code_is_1(case, planted, short, said):
    kind, words, named = FAULTS[case]
    assert dry(kind, *words.format(planted).split()) == 1
    assert "error: " in said()
    assert named in said()
    assert "nothing would fail" not in said()


def test_every_fault_is_listed_and_not_only_the_first(planted, short, said, monkeypatch, tmp_path):
    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: Usage(1000))
    words = ["--data_set", "folder", "--data_path", planted / "broken", "--output_dir", tmp_path]
    assert dry("pretrain", *words) == 1
    assert "1. 1 of 12 train images: cannot read image" in said()
    assert "b/4.png" in said()
    assert "2. checkpoints need" in said()
    assert "1000 B are free: lower --save_ckpt_num" in said()


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_sample_that_kills_or_holds_its_reader_is_named(fault):
    """It would kill the check itself, or hold it for ever, if that read it."""
    words = [*FINETUNE, "--data_set", f"tests.tiny:{fault}", "--num_workers", 2, "--dry_run"]
    words += ["--data_timeout", 2] if fault == "hangs" else []
    done = run("main_finetune.py", *words, expect=1)
    assert "Traceback" not in done.stderr
    assert "dry run: would fail: 1 of " in done.stderr
    assert "image photos/5.jpg" in done.stderr


def test_a_batch_that_does_not_fit_is_not_even_tried(short, said, monkeypatch):
    """On a CPU the system would end the process, without a word."""
    sizes = []
    real = Trial.step
    monkeypatch.setattr(Trial, "step", lambda s, n, t=1: sizes.append(n) or real(s, n, t))
    monkeypatch.setattr(dry_run, "memory", lambda device: (0, 1000))
    assert dry("pretrain", "--batch_size", 24) == 1
    assert "--batch_size 24 does not fit" in said()
    assert max(sizes) == 6


def test_a_fault_is_exit_code_1_of_a_process(planted):
    words = ["--data_set", "IMNET", "--data_path", planted / "differ", "--dry_run"]
    run("main_finetune.py", *FINETUNE, *words, expect=1)


def test_a_dry_run_of_an_evaluation_is_refused(capsys):
    with pytest.raises(SystemExit):
        dry("finetune", "--eval", "--resume", "a.pth")
    assert "--dry_run true tries a training run" in capsys.readouterr().err


# --- what it measures with ------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("asked", [2, 8, 64])
@pytest.mark.parametrize("truth", [0, 1, 5, 63, 64, 65, 130, 999, 5000])
def test_largest_batch_is_found_to_a_sixteenth(truth, asked, unit):
    tried = []
    found = largest_that_fits(lambda n: tried.append(n) or n <= truth, asked, 1001, unit)
    best = min(truth, 1001) // unit * unit
    assert found % unit == 0
    assert best - max(unit, best // 15) <= found <= best
    assert len(tried) <= 16
    assert max(tried) <= 1001


class Small:
    """As much of a stepper and its batches as a trial needs, with room for ten images."""

    device, update_freq = CPU, 1

    def __init__(self, error: Exception) -> None:
        self.error, self.weight = error, torch.zeros(1, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.weight])
        self.normalise = torch.Tensor.float
        self.scaler = torch.amp.GradScaler("cpu")

    def read(self) -> tuple[int, list]:
        return 0, []

    def train(self, batches, **rest) -> None:
        for images, _, _ in batches:
            loss = self.weight.sum() * len(images)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)  # which it does once before an update
            if len(images) > 10:
                raise self.error
            self.scaler.update()

    def trial(self) -> Trial:
        samples = [(torch.zeros(3, 4, 4, dtype=torch.uint8), 0, n) for n in range(4)]
        return Trial(self.train, self, self, samples)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("x: can't allocate memory"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],  # fmt: skip
)
def test_memory_that_ran_out_is_an_answer(error):
    trial = Small(error).trial()
    assert [trial.fits(n) for n in (1, 10, 11, 40, 10)] == [True, True, False, False, True]


def test_other_errors_are_no_answer():
    with pytest.raises(RuntimeError, match="shapes"):
        Small(RuntimeError("shapes do not fit")).trial().fits(11)
    refused = RuntimeError("f does not have a deterministic implementation. More")
    with pytest.raises(UserError, match="--deterministic: f does not have"):
        Small(refused).trial().fits(11)


def test_reason_to_stop_is_not_taken_for_a_refusal_of_torch():
    """A sample's name may hold any word."""
    stopped = TrainingStopped("a loader process died; it held image deterministic/1.png")
    with pytest.raises(TrainingStopped, match="it held image"):
        Small(stopped).trial().fits(11)


GROUPS = {  # what /proc/self/cgroup says, the files by group, and what is free
    "job's": ("0::/slurm/job_7/step_0/task_0\n", {"slurm/job_7": (1000, 300, 200)}, 900),
    "tightest": ("0::/a/b\n", {"a/b": (1000, 0, 0), "a": (500, 100, 0), "": (900, 0, 0)}, 400),
    "own, no other": ("0::/a/b\n", {"a/b": (1000, 0, 0), "a": ("max", 100, 0)}, 1000),
    "container": ("0::/\n", {"": (800, 0, 0)}, 800),
    "seen from outside": ("0::/docker/abc\n", {"": (800, 0, 0)}, 800),
    "over its limit": ("0::/a\n", {"a": (800, 900, 0)}, 0),
    "none": ("0::/a\n", {}, math.inf),
    "version 1": (
        "5:cpu,cpuacct:/x\n4:memory:/slurm/job_7/step_0\n0::/a\n",
        {"memory/slurm/job_7": (1000, 300, 100), "memory": (2**63 - 4096, 0, 0), "x": (1, 0, 0)},
        800,
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_tightest_control_group_above_counts(case, tmp_path, monkeypatch):
    """SLURM limits the job, and the process is three groups below."""
    said, groups, free = GROUPS[case]
    (tmp_path / "said").write_text(said)
    for name, (limit, used, cached) in groups.items():
        group, first = tmp_path / "root" / name, case == "version 1"
        group.mkdir(parents=True, exist_ok=True)
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{limit}\n")
        (group / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{used}\n")
        line = f"{'total_' * first}inactive_file {cached}\n"
        (group / "memory.stat").write_text(f"anon 5\n{line}")
    monkeypatch.setattr(trial, "GROUPS", tmp_path / "said")
    monkeypatch.setattr(trial, "CGROUP", tmp_path / "root")
    assert trial.free_in_group() == free
    monkeypatch.setattr(trial, "GROUPS", tmp_path / "nothing")
    assert trial.free_in_group() == math.inf


def test_memory_is_shared_by_the_processes_that_the_launcher_starts_here(monkeypatch):
    for name in trial.LOCAL_SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trial, "processes", lambda: 8)
    assert trial.local_processes() == 1
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert trial.local_processes() == 2
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2),3")  # srun's own say
    assert trial.local_processes() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert trial.local_processes() == 5
    monkeypatch.setattr(trial, "processes", lambda: 1)  # a single one in a job of many
    assert trial.local_processes() == 1


def test_batches_of_any_size_hold_their_own_copy():
    """Mixup works in place: the same tensor again would be mixed twice."""
    images = torch.ones(2, 3, 4, 4)
    for batch in Repeated((images, images, images), 3):
        assert batch[0].sum() == 96
        batch[0].mul_(0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells memory there")
def test_peak_counts_what_lived_for_a_moment():
    used, free = memory(CPU)
    assert 0 < used < used + free < 2**60
    megabytes = 200
    peak = peak_of(CPU, lambda: [torch.ones(megabytes * 2**18), time.sleep(0.05)])
    assert megabytes * 0.9 < (peak - used) / 2**20 < megabytes * 1.3


def test_size_of_a_checkpoint_is_that_of_its_file(tmp_path):
    content = {"model": {"a": torch.ones(1000, 10)}, "state": {"epoch": 1}}
    torch.save(content, tmp_path / "file.pth")
    assert abs(size_of(content) - (tmp_path / "file.pth").stat().st_size) < 1000
    assert [readable(n) for n in (5, 1536, 3 * 2**30)] == ["5 B", "1.5 KiB", "3.0 GiB"]


def test_rates_are_those_of_the_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kwargs = {"updates_per_epoch": 7, "epochs": 3, "warmup_epochs": 1, "lr": 1.0, "min_lr": 0.1}
    schedule = Schedule(optimizer, **kwargs)
    rows = [row.split() for row in dry_run.rate_rows(schedule, 9)]
    updates = [int(row[1]) for row in rows]
    assert updates == sorted({0, 6, 20, 9, *(21 * k // 10 for k in range(10))})
    assert all(math.isclose(float(r[2]), schedule.rate(int(r[1])), rel_tol=0.01) for r in rows)
    assert [row[-1] for row in rows if int(row[1]) in (6, 9)] == ["peak", "here"]
