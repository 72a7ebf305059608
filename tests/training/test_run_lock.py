# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One run in a folder: the lock is refused, taken over, lost and released."""

import contextlib
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from filelock import SoftFileLease

from benchmarks import chaos
from errors import TrainingStopped, UserError
from training import run_lock
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.hooks import Reporter
from training.log_files import JsonHook
from training.run_lock import acquire_run_lock, describe_holder
from training.steps import Steps

WATCHED = SimpleNamespace(check=lambda state: "", snapshot=lambda state: None, state=dict)
WATCHED.recent = torch.zeros(2, 1)  # as a meter


@pytest.fixture(autouse=True)
def fast(monkeypatch) -> Iterator[None]:
    """Short heartbeats; no lock survives its test."""
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "SILENCE", 1.0)
    yield
    acquire_run_lock("")


def lock_from_elsewhere(folder: Path, host: str = "elsewhere") -> Path:
    """Replace the lock file of a folder by that of a process on another host."""
    with tempfile.TemporaryDirectory() as place:
        lease = SoftFileLease(Path(place) / run_lock.NAME, lease_duration=run_lock.SILENCE)
        with mock.patch("socket.gethostname", return_value=host), lease:
            text = Path(lease.lock_file).read_bytes()
    path = folder / f"{run_lock.NAME}.new"
    path.write_bytes(text)
    return path.replace(folder / run_lock.NAME)


@contextlib.contextmanager
def heartbeats(folder: Path) -> Iterator[None]:
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(0.05):
            os.utime(folder / run_lock.NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def fork(work: Callable[[], None]) -> int:
    """Run it in a child, which exits with 0, or with 3 if the lock is refused."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            work()
            status = 0
        except UserError:
            status = 3
        finally:
            os._exit(status)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def killed_holder(folder: Path) -> int:
    """Process number of a run that held the folder and was killed; nobody has waited for it."""

    def die() -> None:
        acquire_run_lock(str(folder))
        os.kill(os.getpid(), signal.SIGKILL)

    child = fork(die)
    wait_for(lambda: process_state(child) == "Z")
    return child


# --- refused and taken over -----------------------------------------------------------------


def test_second_run_is_refused_and_the_message_names_the_holder(tmp_path):
    def hold() -> None:
        acquire_run_lock(str(tmp_path))
        time.sleep(60)

    child = fork(hold)
    wait_for((tmp_path / run_lock.NAME).exists)
    try:
        match = f"in use by process {child} on {socket.gethostname()}; choose another --output_dir"
        with pytest.raises(UserError, match=match):
            acquire_run_lock(str(tmp_path))
        assert describe_holder(tmp_path) == f"process {child} on {socket.gethostname()}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_lock_of_a_killed_run_on_this_host_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE", 1000.0)
    os.waitpid(killed_holder(tmp_path), 0)
    acquire_run_lock(str(tmp_path))
    acquire_run_lock("")
    assert list(tmp_path.iterdir()) == []


def test_process_number_that_belongs_to_a_new_process_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE", 1000.0)
    child = killed_holder(tmp_path)
    os.waitpid(child, 0)
    path = tmp_path / run_lock.NAME  # process 1 lives, but started at another time
    path.write_text(path.read_text().replace(f"pid={child}\n", "pid=1\n"))
    acquire_run_lock(str(tmp_path))


def test_killed_run_whose_parent_does_not_wait_for_it_holds_the_lock_for_a_while(tmp_path):
    """A container without init, a notebook: the process number still exists."""
    child = killed_holder(tmp_path)
    try:
        acquire_run_lock(str(tmp_path))
    finally:
        os.waitpid(child, 0)


@pytest.mark.parametrize("text", ["", "{", '{"host": "elsewhere", "pid": 1}'])
def test_half_a_lock_holds_nothing(tmp_path, text):
    """A machine crashed while writing it, or an earlier version of the toolkit wrote it."""
    (tmp_path / run_lock.NAME).write_text(text)
    acquire_run_lock(str(tmp_path))
    run_lock.check()


@pytest.mark.parametrize("host", ["elsewhere", f"{socket.gethostname()}?pidns-1"])
def test_other_host_or_container_holds_the_lock_while_its_heartbeats_last(tmp_path, host):
    """Process numbers of a container of the same name mean nothing here."""
    path = lock_from_elsewhere(tmp_path)
    path.write_text(path.read_text().replace("elsewhere", host))
    name = f"process {os.getpid()} on {host.partition('?')[0]}"
    with heartbeats(tmp_path):
        assert describe_holder(tmp_path) == name
        with pytest.raises(UserError, match=f"in use by {name}"):
            acquire_run_lock(str(tmp_path))
    before = path.read_text()
    os.utime(path, (time.time() - run_lock.SILENCE,) * 2)  # the last heartbeat
    assert describe_holder(tmp_path) is None
    assert path.read_text() == before
    acquire_run_lock(str(tmp_path))


def test_folder_without_a_lock_has_no_holder(tmp_path):
    assert describe_holder(tmp_path / "absent") is None


@pytest.mark.parametrize("dead", [False, True])
def test_one_of_several_that_come_at_once_gets_the_lock(tmp_path, dead):
    """Over the lock of a killed run too: all of them see that it is dead."""
    if dead:
        os.waitpid(killed_holder(tmp_path), 0)

    def hold() -> None:
        acquire_run_lock(str(tmp_path))
        (tmp_path / f"got-{os.getpid()}").touch()
        wait_for((tmp_path / "all refused").exists)

    children = [fork(hold) for _ in range(6)]
    wait_for(lambda: sum(process_state(child) == "Z" for child in children) == 5)
    (tmp_path / "all refused").touch()
    assert sorted(map(exit_code, children)) == [0, 3, 3, 3, 3, 3]
    assert len(list(tmp_path.glob("got-*"))) == 1


def test_heartbeats_change_the_time_of_the_file(tmp_path):
    acquire_run_lock(str(tmp_path))
    before = (tmp_path / run_lock.NAME).stat().st_mtime_ns
    wait_for(lambda: (tmp_path / run_lock.NAME).stat().st_mtime_ns > before)


def test_same_process_may_come_back_and_half_written_files_are_removed(tmp_path):
    (tmp_path / ".checkpoint-3.pth.123.tmp").write_text("half")
    for _ in range(2):
        acquire_run_lock(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.NAME]


def test_no_output_dir_is_no_folder(tmp_path, monkeypatch):
    """The official '' was the current folder, whose checkpoints were then resumed."""
    monkeypatch.chdir(tmp_path)
    assert acquire_run_lock("") is None
    assert list(tmp_path.iterdir()) == []


def test_output_dir_is_made_with_its_parents_and_left_as_it_was(tmp_path):
    for _ in range(2):
        folder = acquire_run_lock(str(tmp_path / "a" / "b"))
        assert {path.name for path in folder.iterdir()} - {"kept"} == {".lock"}
        (folder / "kept").write_text("")


def test_output_dir_that_cannot_be_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir .*file.*: cannot write there"):
        acquire_run_lock(str(tmp_path / "file" / "run"))


# --- a lock that was lost -------------------------------------------------------------------


def suspended_run(folder: Path) -> int:
    """A child that holds the folder and checks now and then; it is suspended when this returns."""

    def work() -> None:
        acquire_run_lock(str(folder))
        with pytest.raises(
            TrainingStopped, match="was taken over by .* while this run was suspended"
        ):
            wait_for(lambda: run_lock.check())
        assert exit_is_clean()

    def exit_is_clean() -> bool:
        acquire_run_lock("")
        return True

    child = fork(work)
    wait_for((folder / run_lock.NAME).exists)
    os.kill(child, signal.SIGSTOP)
    wait_for(lambda: process_state(child) == "T")
    return child


def test_suspended_run_notices_that_another_took_over(tmp_path):
    """A suspended job, a frozen machine: it went on to write, and beat for the new holder."""
    child = suspended_run(tmp_path)
    acquire_run_lock(str(tmp_path))
    os.kill(child, signal.SIGCONT)
    assert exit_code(child) == 0
    run_lock.check()  # it left our lock alone
    assert not run_lock.is_lost()


def test_suspended_run_notices_that_another_came_and_went(tmp_path):
    child = suspended_run(tmp_path)
    acquire_run_lock(str(tmp_path))
    acquire_run_lock("")
    os.kill(child, signal.SIGCONT)
    assert exit_code(child) == 0


def test_lock_is_kept_while_its_folder_is_away(tmp_path):
    """Unmounted, or moved and moved back."""
    folder = acquire_run_lock(str(tmp_path / "run"))
    folder.rename(tmp_path / "away")
    time.sleep(4 * run_lock.BEAT)
    assert not run_lock.is_lost()
    run_lock.check()
    (tmp_path / "away").rename(folder)
    run_lock.check()
    before = (folder / run_lock.NAME).stat().st_mtime_ns
    wait_for(lambda: (folder / run_lock.NAME).stat().st_mtime_ns > before)


def test_heartbeats_start_again_after_a_disk_that_did_not_answer(tmp_path, monkeypatch):
    folder = acquire_run_lock(str(tmp_path))
    with monkeypatch.context() as broken:
        broken.setattr(os, "utime", mock.Mock(side_effect=OSError(5, "Input/output error")))
        wait_for(lambda: run_lock._held[0].compromise is not None)
        assert not run_lock.is_lost()
    run_lock.check()
    before = (folder / run_lock.NAME).stat().st_mtime_ns
    wait_for(lambda: (folder / run_lock.NAME).stat().st_mtime_ns > before)


@pytest.mark.parametrize("script", list(chaos.RUNS))
def test_training_ends_when_another_run_has_the_folder(tmp_path, script):
    """It would delete the other's checkpoints, and repeat its lines in log.txt."""
    folder = tmp_path / "run"
    child = chaos.start(script, folder, "--epochs", "60", "--save_ckpt_every_steps", "1000")
    wait_for(lambda: (folder / "log.txt").exists())
    lock_from_elsewhere(folder)
    assert chaos.finish(child) == 1
    said = folder.with_suffix(".txt").read_text()
    assert re.search(f"{folder} was taken over by process [0-9]+ on elsewhere", said)
    assert "Traceback" not in said
    assert (folder / run_lock.NAME).exists()


@pytest.fixture
def taken(tmp_path) -> Path:
    """A folder that this process held until another took it over."""
    folder = acquire_run_lock(str(tmp_path))
    lock_from_elsewhere(folder)
    return folder


def test_save_is_refused_in_a_folder_that_is_another_runs(taken):
    saved = []
    with (
        CheckpointManager(lambda state, writer, **_: saved.append(state)) as checkpoints,
        pytest.raises(TrainingStopped, match=r"taken over by process \d+ on elsewhere"),
    ):
        checkpoints.end_epoch(TrainState(epoch=1))
    assert saved == []


def test_run_that_lost_its_lock_does_not_train_until_its_next_save(taken):
    """An epoch may take a day."""
    wait_for(run_lock.is_lost)
    state = TrainState(global_step=3, samples_in_epoch=12)
    with (
        CheckpointManager(lambda **_: None) as checkpoints,
        pytest.raises(TrainingStopped, match="taken over"),
    ):
        checkpoints.after_step(state, WATCHED, WATCHED)


def test_suspended_run_writes_nothing_into_the_log_of_another(taken):
    state = TrainState(epoch=1, global_step=3, stats={"epoch": 0})
    reporter = Reporter([JsonHook(taken, state)], torch.device("cpu"), state, Steps.even(3, 3), 1)
    with pytest.raises(TrainingStopped, match="taken over"):
        reporter.end_epoch()
    assert not (taken / "log.txt").exists()


def test_lock_of_another_run_is_not_released(taken):
    acquire_run_lock("")
    assert (taken / run_lock.NAME).exists()
