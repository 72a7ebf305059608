# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoint files that are damaged, and disks that fail."""

import argparse
import contextlib
import copy
import errno
import os
import random
import re
import resource
import signal
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import chaos
from config import parser as options
from errors import Preempted, TrainingStopped, UserError
from tests.training.test_checkpoint import Run, names
from tests.training.test_checkpoint_manager import Quiet, drive, wait_for
from training.checkpoint import TrainState, write_checkpoint
from training.checkpoint_manager import (
    AsyncWriter,
    CheckpointManager,
    build_checkpoint_manager,
)
from training.meters import Means
from training.resume import compare_args, find_resume_point
from training.steps import Steps
from utils import explain, save_model, write_atomically
from weights.files import check_archive, read_checkpoint

CORRUPTIONS = 500


def corrupt(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One of the ways in which a file goes wrong."""
    kind = draw.choice(["cut", "zeros", "flip", "flips", "tail of zeros", "swap", "junk", "twice"])
    at = draw.randrange(len(data))
    if kind == "cut":
        return kind, data[:at]
    if kind == "zeros":
        length = draw.randrange(1, 5000)
        return kind, data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
    if kind == "tail of zeros":  # allocated, never written
        return kind, data[:at] + bytes(len(data) - at)
    if kind in ("flip", "flips"):
        changed = bytearray(data)
        for _ in range(1 if kind == "flip" else 20):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return kind, bytes(changed)
    if kind == "swap":
        return kind, data[at:] + data[:at]
    if kind == "junk":
        return kind, data + draw.randbytes(draw.randrange(1, 300))
    return kind, data[:at] + data[at // 2 :]  # copied twice in part


def same(ours: object, theirs: object) -> bool:
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return repr(ours) == repr(theirs)  # NaN is not equal to itself


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_corruption_crashes_or_loads_wrong_values(tmp_path, log):
    """What is read in place of the newest is it, bit for bit, or the one before."""
    before = Run(seed=9).save(tmp_path, 9)
    newest = Run(seed=10).save(tmp_path, 10)
    data = newest.read_bytes()
    content = copy.deepcopy(read_checkpoint(newest))  # which is mapped from the file
    draw, set_aside = random.Random(0), 0
    for number in range(CORRUPTIONS):
        kind, damaged = corrupt(data, draw)
        newest.write_bytes(damaged)
        chosen = find_resume_point(tmp_path).source
        if chosen == str(newest):
            assert same(read_checkpoint(newest), content), (number, kind)
        else:
            assert chosen == str(before)
            aside = tmp_path / "checkpoint-10.pth.damaged"
            assert aside.read_bytes() == damaged
            aside.unlink()
            set_aside += 1
    assert set_aside > 0.75 * CORRUPTIONS  # padding and what follows the zip may be anything
    warnings = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    assert len(warnings) == set_aside
    assert all("checkpoint-10.pth" in text and "\n" not in text for text in warnings)


def test_foreign_file_in_the_place_of_the_newest_is_set_aside(tmp_path, log):
    """A whole one, of another program, once ended the run at every start."""
    Run().save(tmp_path, 3)
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, tmp_path / "checkpoint-4.pth")
    assert find_resume_point(tmp_path).source == str(tmp_path / "checkpoint-3.pth")
    assert names(tmp_path) == {"checkpoint-3.pth", "checkpoint-4.pth.damaged"}
    torch.save({}, tmp_path / "checkpoint-4.pth")
    find_resume_point(tmp_path)
    assert "checkpoint-4.pth.damaged1" in names(tmp_path)


def test_nothing_is_set_aside_where_nothing_is_left(tmp_path):
    Run().save(tmp_path, 3).write_bytes(b"PK")
    with pytest.raises(UserError, match="no run can resume from .*3.pth is truncated"):
        find_resume_point(tmp_path)
    assert names(tmp_path) == {"checkpoint-3.pth"}


def test_each_flipped_bit_in_a_record_and_each_truncation_is_found(tmp_path, log):
    """The run resumes from the checkpoint before. Flips in a zip's padding are harmless."""
    before = Run(seed=9).save(tmp_path, 9)
    newest = Run(seed=10).save(tmp_path, 10)
    data, draw = newest.read_bytes(), random.Random(0)
    with zipfile.ZipFile(newest) as archive:
        ends = [(_start(data, record), record.file_size) for record in archive.infolist()]
    variants = []
    for start, size in ends:
        for _ in range(5):
            flipped = bytearray(data)
            flipped[start + draw.randrange(size)] ^= 1 << draw.randrange(8)
            variants.append(bytes(flipped))
    variants += [data[: draw.randrange(len(data))] for _ in range(50)]
    for damaged in variants:
        newest.write_bytes(damaged)
        assert find_resume_point(tmp_path).source == str(before)
        (tmp_path / "checkpoint-10.pth.damaged").unlink()


def _start(data: bytes, record: zipfile.ZipInfo) -> int:
    """Where the content of a zip's record starts: after its header, name and padding."""
    header = record.header_offset
    lengths = (int.from_bytes(data[at : at + 2], "little") for at in (header + 26, header + 28))
    return header + 30 + sum(lengths)


# --- flags of a resumed run -----------------------------------------------------------------


def test_seed_may_change_between_epochs_and_not_within_one():
    """The order of what is left of it would be another: images come twice, or never."""
    assert compare_args({"seed": 0}, {"seed": 1}, "it") == ["--seed 1 (was 0)"]
    pretraining = {"mask_ratio": 0.6}  # which has no --finetune
    for more, hint in ({}, r" \(--finetune loads only its weights\)$"), (pretraining, "$"):
        with pytest.raises(UserError, match=f"--seed 0 and cannot resume .* --output_dir{hint}"):
            compare_args(more | {"seed": 0}, more | {"seed": 1}, "it", in_epoch=True)


def test_data_may_grow_between_epochs_and_not_within_one():
    TrainState(epoch=3, images=26).recount_steps(Steps.even(4, 9, 6), 27)
    with pytest.raises(UserError, match="epoch 4 began with 26 images and cannot resume with 27"):
        TrainState(epoch=3, samples_in_epoch=12, images=26).recount_steps(Steps.even(4, 9, 6), 27)


def test_newest_within_an_epoch_is_what_saw_most_whatever_an_update_takes(tmp_path):
    """Update 10 of batch 2 is behind update 6 of batch 4."""
    run = Run()
    for seen, updates in ((20, 10), (24, 6)):
        state = TrainState(epoch=1, global_step=updates, samples_in_epoch=seen)
        save_model(tmp_path, run.parts(), state, {"args": {}})
    assert find_resume_point(tmp_path).source.endswith("checkpoint-1-seen-24.pth")


def test_changed_flags_are_listed_and_those_of_another_run_are_refused():
    saved = {"model": "convnextv2_atto", "lr": 0.1, "epochs": 5, "output_dir": "a", "opt": "sgd"}
    given = saved | {"model": "fcmae_convnextv2_atto", "lr": 0.2, "output_dir": "b", "new": 1}
    assert compare_args(saved, given, "x.pth") == ["--lr 0.2 (was 0.1)"]
    assert compare_args({"max_minutes": 9.0}, {"max_minutes": None}, "x.pth") == [
        "--max_minutes not set (was 9.0)"
    ]
    for name, value in (("model", "convnextv2_tiny"), ("opt", "adamw")):
        with pytest.raises(UserError, match=f"x.pth was trained with --{name} .*cannot resume"):
            compare_args(saved, saved | {name: value}, "x.pth")


# --- disks ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", list(chaos.RUNS))
def test_run_goes_on_while_its_folder_is_gone_and_saves_when_it_is_back(tmp_path, script):
    folder, gone = tmp_path / "run", tmp_path / "gone"
    child = chaos.start(script, folder, "--epochs", "500", "--max_save_failures", "100")
    wait_for("epoch 2/500", folder)
    folder.rename(gone)
    wait_for("could not save, 2 times in a row", folder)
    gone.rename(folder)
    last = max(int(text) for text in _epochs(folder))
    wait_for(f"epoch {last + 3}/500", folder)
    os.kill(child, signal.SIGTERM)
    assert chaos.finish(child) == 75
    last = max(int(text) for text in _epochs(folder))
    chaos.complete(script, folder, "--epochs", str(last + 2))
    lines = (folder / "log.txt").read_text().splitlines()
    assert len(lines) == last + 2  # each epoch once, those of the bad time too


def _epochs(folder: Path) -> list[str]:
    import re

    return re.findall(r"epoch ([0-9]+)/500", folder.with_suffix(".txt").read_text())


def test_run_stops_after_so_many_failures_with_what_it_had(tmp_path):
    folder, gone = tmp_path / "run", tmp_path / "gone"
    child = chaos.start("main_pretrain", folder, "--epochs", "500", "--max_save_failures", "2")
    wait_for("epoch 2/500", folder)
    folder.rename(gone)
    assert chaos.finish(child) == 1
    said = folder.with_suffix(".txt").read_text()
    assert "3 saves in a row failed" in said
    assert "Traceback" not in said
    gone.rename(folder)
    assert read_checkpoint(find_resume_point(folder).source)["state"]["epoch"] >= 1


def test_full_disk_leaves_the_old_checkpoints_and_no_half_ones(tmp_path):
    child = os.fork()
    if child == 0:
        import resource

        Run().save(tmp_path, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            Run().save(tmp_path, 2)
        except (OSError, RuntimeError):  # the latter from torch.save
            os._exit(5)
        os._exit(0)
    assert chaos.finish(child) == 5
    assert names(tmp_path) == {"checkpoint-1.pth"}
    assert read_checkpoint(tmp_path / "checkpoint-1.pth")["state"]["epoch"] == 2


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_disk_that_fills_within_a_tensor_does_not_end_the_run(tmp_path, share):
    """torch.save raises RuntimeError there, and the error of the disk is lost."""
    weights = {"a": torch.zeros(300_000), "b": torch.zeros(300_000)}
    cut = tmp_path / "cut.pth"
    write_checkpoint(weights, tmp_path / "whole.pth")
    limit = int(share * (tmp_path / "whole.pth").stat().st_size)
    child = os.fork()
    if child == 0:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            AsyncWriter(False)(weights, lambda content: write_checkpoint(content, cut))
        except OSError:
            os._exit(5)
        finally:
            os._exit(6)
    assert chaos.finish(child) == 5
    assert names(tmp_path) == {"whole.pth"}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_error_of_the_disk_is_shown_and_not_that_of_torch(tmp_path, share, in_background):
    """A full disk read `RuntimeError: unexpected pos 3029504 vs 3029392`."""
    weights, path = {"a": torch.zeros(300_000), "b": torch.zeros(300_000)}, tmp_path / "a.pth"
    writer = AsyncWriter(in_background)

    def write() -> None:
        writer(weights, lambda content: write_checkpoint(content, path))
        writer.wait()

    with largest_file(int(share * 2_400_000)), pytest.raises(OSError, match="large") as found:
        write()
    assert (found.value.errno, found.value.strerror) == (errno.EFBIG, "File too large")
    assert found.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_failed_save_says_what_was_written_what_to_do_and_what_is_intact(tmp_path, log):
    run, args = Run(), parse_args(tmp_path)
    manager = build_checkpoint_manager(args, tmp_path, run.parts())
    with largest_file(2000):
        manager.end_epoch(TrainState(epoch=1))
    assert log.messages.pop().endswith("; this run has no checkpoint yet)")
    log.clear()
    manager.end_epoch(TrainState(epoch=1))
    with largest_file(2000):
        manager.end_epoch(TrainState(epoch=2))
    assert log.messages == [
        f"could not save, 1 time in a row (File too large while writing {tmp_path}/checkpoint-1"
        ".pth; raise the largest size of a file (ulimit -f); checkpoint-0.pth and earlier "
        "checkpoints are intact)"
    ]
    build_checkpoint_manager(args, tmp_path / "gone", run.parts()).end_epoch(TrainState(epoch=3))
    assert log.messages[-1].endswith("put it back; earlier checkpoints are intact)")


def parse_args(folder: Path) -> argparse.Namespace:
    words = ["--data_set", "DIGITS", "--output_dir", str(folder)]
    return options.parse(options.pretrain_parser(), words)


def test_full_disk_is_explained_with_the_space_that_is_free(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a.pth"))
    assert re.fullmatch(
        rf"No space left on device while writing {tmp_path}/a.pth, \d+ MiB are free; delete files "
        "on that disk that nobody needs, or lower --save_ckpt_num",
        explain(full),
    )
    assert explain(OSError("TypeError: of a value")) == "TypeError: of a value"
    gone = OSError(errno.ENOENT, "No such file or directory", "gone/b.pth")
    assert explain(gone).endswith("while writing gone/b.pth; its folder is gone: put it back")


class Saves:
    """Save function for `CheckpointManager`: fails as asked, then records its content."""

    def __init__(self, *fail: bool, error: Exception | None = None) -> None:
        self.fail, self.found, self.error = list(fail), [], error or OSError("full")

    def __call__(self, state: TrainState, writer: AsyncWriter, **options: object) -> None:
        writer({"best": dict(state.best), "improved": options.get("improved")}, self.write)

    def write(self, content: dict) -> None:
        if self.fail and self.fail.pop(0):
            raise self.error
        self.found.append(content)


def epochs(
    checkpoints: CheckpointManager, count: int, *accuracies: float, last: bool = False
) -> TrainState:
    """Run so many epochs of one step each."""
    state = TrainState()
    with checkpoints:
        for epoch in range(1, count + 1):
            state.global_step += 1
            checkpoints.after_step(state, Means(["loss"], "cpu"), Quiet())
            state.epoch = epoch
            value = accuracies[epoch - 1] if accuracies else None
            checkpoints.end_epoch(state, {"best": value}, last=last and epoch == count)
    return state


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr("training.checkpoint_manager.PAUSE", 0.0)


@pytest.mark.parametrize("in_background", [False, True])
def test_failures_are_counted_whatever_the_epochs_between(in_background):
    """An epoch that writes nothing is no successful save; nor is one that has only started."""
    saves = Saves(*[True] * 99)
    manager = CheckpointManager(saves, every_epochs=2, max_failures=3, in_background=in_background)
    with pytest.raises(TrainingStopped, match="4 saves in a row failed"):
        epochs(manager, 40)


def test_epoch_whose_save_ends_the_run_is_reported():
    """Its accuracy, perhaps of hours, was shown nowhere."""
    reports, manager = [], CheckpointManager(Saves(True), max_failures=0)
    with pytest.raises(TrainingStopped, match="1 save in a row failed"):
        manager.end_epoch(TrainState(epoch=1), report=lambda: reports.append("shown"))
    assert reports == ["shown"]


@pytest.mark.parametrize("in_background", [False, True])
def test_any_error_of_a_write_is_a_failed_save(in_background, log):
    """A lack of memory, or a value that torch.save does not know, must not end the run."""
    saves = Saves(True, error=TypeError("cannot pickle 'generator' object\nmore"))
    epochs(CheckpointManager(saves, in_background=in_background), 2)
    assert len(saves.found) == 1
    text = "could not save, 1 time in a row (TypeError: cannot pickle 'generator' object; earlier"
    assert text in log.text


@pytest.mark.parametrize("in_background", [False, True])
def test_end_of_training_is_saved_or_the_run_fails(no_pause, in_background):
    saves = Saves(True, True)
    epochs(CheckpointManager(saves, 9, in_background=in_background), 1, last=True)
    assert len(saves.found) == 1
    manager = CheckpointManager(Saves(*[True] * 99), 9, in_background=in_background)
    with pytest.raises(TrainingStopped, match="but could not be saved: full"):
        epochs(manager, 1, last=True)


@pytest.mark.parametrize("in_background", [False, True])
def test_best_that_could_not_be_written_is_no_best(in_background):
    """Else nothing below it would ever be written, and what is called best stays older."""
    saves = Saves(False, True)
    manager = CheckpointManager(saves, 1, in_background=in_background)
    assert epochs(manager, 3, 50.0, 90.0, 70.0).best == {"best": 70.0}
    assert [content["best"]["best"] for content in saves.found] == [50, 70]
    assert [content["improved"] for content in saves.found] == [["best"], ["best"]]


def test_failed_save_within_the_first_epoch_keeps_the_best_of_the_resumed_run():
    state = TrainState(global_step=1, samples_in_epoch=4, best={"best": 50.0})
    with CheckpointManager(Saves(True), every_steps=1) as checkpoints:
        checkpoints.after_step(state, Means(["loss"], "cpu"), Quiet())
    assert state.best == {"best": 50.0}


def test_weights_that_are_refused_are_not_saved_again_at_once(no_pause, log):
    calls = []

    def refuse(**options: object) -> None:
        calls.append(options)
        raise UserError("the weights are not finite")

    manager, state = CheckpointManager(refuse, max_failures=0), TrainState(epoch=1)
    manager.end_epoch(state)
    with pytest.raises(TrainingStopped, match="could not be saved: the weights are not"):
        manager.end_epoch(state, last=True)
    assert len(calls) == 2


def test_stop_that_cannot_save_says_so(no_pause):
    def stop(checkpoints: CheckpointManager, state: TrainState) -> None:
        checkpoints.signals.reason = "SIGTERM"
        with checkpoints:
            checkpoints.end_epoch(state)

    state, saves = TrainState(epoch=1), Saves(False, *[True] * 99)
    checkpoints = CheckpointManager(saves, 1, max_failures=2)
    checkpoints.end_epoch(state)
    with pytest.raises(Preempted, match="last save failed: full"):
        stop(checkpoints, state)
    with pytest.raises(TrainingStopped, match="nothing of this run could be saved"):
        stop(CheckpointManager(Saves(*[True] * 99), 1, max_failures=2), state)


def test_folder_that_cannot_be_synchronized_is_no_failure(tmp_path, monkeypatch):
    """Some file systems over a network refuse it with EINVAL, after the file is written."""
    fsync = os.fsync

    def refuse(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(number)

    monkeypatch.setattr("utils.os.fsync", refuse)
    write_atomically("text", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "text"


def test_disk_that_fails_once_does_not_make_an_old_best_the_newest(tmp_path, monkeypatch):
    Run().save(tmp_path, 3).rename(tmp_path / "checkpoint-best.pth")
    newest = Run().save(tmp_path, 9)
    failures = [OSError(errno.ESTALE, "Stale file handle")]

    def stale(path: Path, checksums: bool) -> None:
        if failures and path.name == "checkpoint-best.pth":
            raise failures.pop()
        check_archive(path, checksums)

    monkeypatch.setattr("training.resume.PAUSE", 0.0)
    monkeypatch.setattr("weights.files.check_archive", stale)
    assert find_resume_point(tmp_path).source == str(newest)
    assert failures == []
    assert names(tmp_path) == {"checkpoint-9.pth", "checkpoint-best.pth"}


@pytest.mark.parametrize("name", ["checkpoint-1.pth", "checkpoint-best.pth"])
def test_disk_that_does_not_answer_damages_no_checkpoint(tmp_path, monkeypatch, name):
    """The run neither sets the newest aside nor continues from an older one."""
    Run().save(tmp_path, 0)
    Run().save(tmp_path, 1).rename(tmp_path / name)

    def stale(path: Path, checksums: bool) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as broken:
        waits: list[float] = []
        broken.setattr("training.resume.time.sleep", waits.append)
        broken.setattr("weights.files.check_archive", stale)
        with pytest.raises(UserError, match=f"{name} cannot be read now .*Stale.*try again"):
            find_resume_point(tmp_path)
    assert find_resume_point(tmp_path).source.endswith(name)


def test_checkpoint_without_permission_is_named_at_once(tmp_path, monkeypatch):
    """Trying again does not help."""
    Run().save(tmp_path, 1)

    def refused(path: Path, checksums: bool) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    waits: list[float] = []
    monkeypatch.setattr("training.resume.time.sleep", waits.append)
    monkeypatch.setattr("weights.files.check_archive", refused)
    with pytest.raises(UserError, match="checkpoint-1.pth is not readable; check its permissions"):
        find_resume_point(tmp_path)
    assert sum(waits) == 0
    assert (tmp_path / "checkpoint-1.pth").exists()


def test_file_that_a_run_went_on_from_stays(tmp_path):
    for epoch in range(4):
        source = str(tmp_path / "checkpoint-0.pth")
        Run().save(tmp_path, epoch, keep=1, source=source)
    assert names(tmp_path) == {"checkpoint-0.pth", "checkpoint-3.pth"}


def test_saves_that_fail_are_counted_in_a_row():
    saves = Saves(True, False, True, True, True)
    with pytest.raises(TrainingStopped, match="3 saves in a row failed, the last with: full"):
        drive(CheckpointManager(saves, every_steps=1, max_failures=2), 10)
    assert saves.fail == []
    assert len(saves.found) == 1


# --- in the background ----------------------------------------------------------------------


def test_copy_is_written_and_not_what_training_has_changed_since():
    may_write, written, weights = threading.Event(), {}, torch.zeros(3)

    def write(content: dict) -> None:
        assert may_write.wait(60)
        written.update(content)

    writer = AsyncWriter(in_background=True)
    writer({"model": {"a": weights}, "state": {"epoch": 1}}, write)
    weights.fill_(7.0)  # training continues
    may_write.set()
    assert writer.wait()
    assert written["model"]["a"].tolist() == [0, 0, 0]
    assert not writer.wait()


@pytest.mark.parametrize("error", [OSError("full"), KeyError("full")])
def test_error_of_the_background_is_raised_when_it_is_waited_for(error):
    def write(content: dict) -> None:
        raise error

    writer = AsyncWriter(in_background=True)
    writer({}, write)
    with pytest.raises(OSError, match="full"):
        writer.wait()
    writer({}, lambda content: None)
    writer.wait()


@pytest.mark.slow
@pytest.mark.parametrize("script", list(chaos.RUNS))
def test_run_that_saves_in_the_background_ends_the_same(tmp_path, script):
    chaos.complete(script, tmp_path / "plain")
    chaos.complete(script, tmp_path / "beside", "--async_save")
    mine, theirs = chaos.digest(tmp_path / "beside"), chaos.digest(tmp_path / "plain")
    assert mine.pop("TensorBoard") == theirs.pop("TensorBoard")
    assert mine["log.txt"] == theirs["log.txt"]
    assert mine.keys() == theirs.keys()
    ours, plain = (
        torch.load(tmp_path / name / "checkpoint-2.pth", weights_only=True)
        for name in ("beside", "plain")
    )
    assert ours.pop("args") != plain.pop("args")
    assert same(ours, plain)
