# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One run in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import chaos
from errors import TrainingStopped, UserError
from training import run_lock
from training.checkpoint import TrainState
from training.checkpoint_manager import Keeper
from training.hooks import JsonHook, Reporter
from training.run_lock import Lock, hold_folder


def held_by(folder, **holder) -> None:
    """By a process of this machine, as far as nothing else is said."""
    (folder / run_lock.NAME).write_text(json.dumps(run_lock._identity() | holder))


@contextlib.contextmanager
def signs_of_life(folder):
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
    """Run it in a child, which ends with 0, or with 3 where it is refused."""
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


def ends_with(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    child = os.fork()
    if child == 0:
        Lock(tmp_path).take()
        time.sleep(60)
    while not (tmp_path / run_lock.NAME).exists():
        time.sleep(0.01)
    try:
        with pytest.raises(UserError, match=f"in use by process {child} on {socket.gethostname()}"):
            Lock(tmp_path).take()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    Lock(tmp_path).take().release()  # the dead hold nothing
    assert list(tmp_path.iterdir()) == []


def test_number_of_a_dead_process_that_another_has_now_holds_nothing(tmp_path):
    held_by(tmp_path, pid=os.getppid(), start="12345")
    Lock(tmp_path).take().release()


def test_living_process_of_this_machine_holds_it(tmp_path):
    held_by(tmp_path, pid=os.getppid(), start="")
    with pytest.raises(UserError, match="in use"):
        Lock(tmp_path).take()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x"}'])
def test_half_a_lock_holds_nothing(tmp_path, text, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE", 0.05)
    (tmp_path / run_lock.NAME).write_text(text)
    Lock(tmp_path).take().release()


def test_other_machine_holds_it_as_long_as_it_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE", 0.5)
    held_by(tmp_path, host="elsewhere", pid=1)
    with (
        signs_of_life(tmp_path),
        pytest.raises(UserError, match="in use by process 1 on elsewhere"),
    ):
        Lock(tmp_path).take()
    Lock(tmp_path).take().release()  # silent now


@pytest.mark.parametrize("key", ["boot", "namespace"])
def test_name_of_a_machine_may_be_that_of_another_or_of_a_container(tmp_path, monkeypatch, key):
    """Its process has a number that nobody has here, and was taken for dead."""
    monkeypatch.setattr(run_lock, "SILENCE", 0.5)
    held_by(tmp_path, pid=2**22 + 1, **{key: "another"})
    with signs_of_life(tmp_path), pytest.raises(UserError, match="in use by process"):
        Lock(tmp_path).take()
    Lock(tmp_path).take().release()  # silent now


def test_process_that_is_dead_but_not_yet_waited_for_holds_nothing(tmp_path):
    """A container without init, a notebook: the parent of a killed run never asks how it ended."""
    child = os.fork()
    if child == 0:
        Lock(tmp_path).take()
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        wait_for(lambda: run_lock._stat(child)[0] == "Z")
        Lock(tmp_path).take().release()
    finally:
        os.waitpid(child, 0)


def test_process_of_which_the_kernel_tells_nothing_is_alive(tmp_path, monkeypatch):
    """/proc with hidepid: another user's run was taken for one that began at another time."""
    held_by(tmp_path, pid=os.getppid())
    monkeypatch.setattr(run_lock, "_stat", lambda pid: [])
    with pytest.raises(UserError, match="in use"):
        Lock(tmp_path).take()


def test_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    held = Lock(tmp_path).take()
    before = (tmp_path / run_lock.NAME).stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / run_lock.NAME).stat().st_mtime_ns > before
    held.release()


def test_lock_that_somebody_took_over_is_not_released(tmp_path):
    held = Lock(tmp_path).take()
    held_by(tmp_path, host="elsewhere", pid=1)
    held.release()
    assert (tmp_path / run_lock.NAME).exists()


def test_two_that_come_at_once_do_not_both_get_it(tmp_path):
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            try:
                Lock(tmp_path).take()
            except UserError:
                os._exit(3)
            time.sleep(1.5)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(("owner", "name"), [(run_lock, "_is_alive"), (os, "replace")])
def test_slower_of_two_that_find_a_dead_holder_leaves_the_faster_ones_lock(tmp_path, owner, name):
    """It unlinked the file that it had judged, which was the faster one's by then: both held it."""
    held_by(tmp_path, pid=2**22 + 1)
    real = getattr(owner, name)

    def late(*about: object) -> object:
        """A scheduler, a slow NFS: after the look, or before the deed."""
        answer = real(*about) if owner is run_lock else None
        (tmp_path / "judged").touch()
        time.sleep(0.4)
        return answer if owner is run_lock else real(*about)

    def take(way: Callable[..., object] = real) -> None:
        setattr(owner, name, way)
        Lock(tmp_path).take()
        time.sleep(1)

    children = [fork(lambda: take(late))]
    wait_for((tmp_path / "judged").exists)
    children += [fork(take), fork(take)]
    assert sorted(map(ends_with, children)) == [0, 3, 3]


def test_what_was_killed_while_it_took_over_does_not_stand_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE", 0.2)
    held_by(tmp_path, pid=2**22 + 1)
    (tmp_path / f"{run_lock.NAME}.claim").write_text(
        json.dumps(run_lock._identity() | {"pid": 2**22 + 1})
    )
    Lock(tmp_path).take().release()
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    held = Lock(tmp_path).take()
    assert json.loads((tmp_path / run_lock.NAME).read_text())["pid"] == os.getpid()
    held.release()


def test_same_process_may_come_back_and_what_a_killed_one_left_is_cleaned(tmp_path):
    (tmp_path / ".checkpoint-3.pth.123.tmp").write_text("half")
    draft = tmp_path / f"{run_lock.NAME}.host.123"
    draft.write_text("{}")
    os.utime(draft, (1e9, 1e9))
    for _ in range(2):
        hold_folder(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.NAME]


def test_what_somebody_writes_just_now_is_not_cleaned(tmp_path):
    """Another run that asks for the folder: its draft would vanish under its hands."""
    (tmp_path / f"{run_lock.NAME}.host.123").write_text("{}")
    hold_folder(str(tmp_path))
    assert (tmp_path / f"{run_lock.NAME}.host.123").exists()


# --- a lock that was lost -------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "SILENCE", 0.5)


def ask_again_and_again() -> None:
    for _ in range(200):
        time.sleep(0.02)
        run_lock.check()


def stopped_run(folder, monkeypatch) -> int:
    """A child that holds the folder and asks now and then; it stands still when this returns."""

    def work() -> None:
        hold_folder(str(folder))
        with pytest.raises(TrainingStopped, match="was taken over by .* while this one stood"):
            ask_again_and_again()
        assert run_lock.is_lost()

    child = fork(work)
    wait_for((folder / run_lock.NAME).exists)
    os.kill(child, signal.SIGSTOP)
    wait_for(lambda: run_lock._stat(child)[0] == "T")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")  # else it is seen to live
    return child


def test_run_that_stood_still_while_another_took_over_notices(tmp_path, quick, monkeypatch):
    """A suspended job, a frozen machine: it went on to write, and beat for the new holder."""
    child = stopped_run(tmp_path, monkeypatch)
    held = Lock(tmp_path).take()
    held.stopped.set()
    held.thread.join()
    before = os.stat(held.path).st_mtime_ns
    os.kill(child, signal.SIGCONT)
    assert ends_with(child) == 0
    assert os.stat(held.path).st_mtime_ns == before
    assert run_lock._parse(held.path.read_text()) == held.mine
    held.release()


def test_run_that_stood_still_while_another_came_and_went_notices(tmp_path, quick, monkeypatch):
    child = stopped_run(tmp_path, monkeypatch)
    Lock(tmp_path).take().release()
    os.kill(child, signal.SIGCONT)
    assert ends_with(child) == 0


def test_lock_that_vanished_with_its_folder_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    folder = hold_folder(str(tmp_path / "run"))
    folder.rename(tmp_path / "gone")
    time.sleep(0.2)
    folder.mkdir()
    wait_for((folder / run_lock.NAME).exists)
    wait_for(lambda: [path.name for path in folder.iterdir()] == [run_lock.NAME])
    run_lock.check()
    assert run_lock._parse((folder / run_lock.NAME).read_text())["pid"] == os.getpid()
    hold_folder("")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("script", list(chaos.RUNS))
def test_training_ends_when_another_run_has_the_folder(tmp_path, quick, script):
    """It would delete the other's checkpoints, and repeat its lines in log.txt."""
    folder = tmp_path / "run"
    child = chaos.start(script, folder, "--epochs", "60", "--save_ckpt_every_steps", "1000")
    wait_for(lambda: (folder / "log.txt").exists())
    held_by(tmp_path, host="elsewhere", pid=1)
    os.replace(tmp_path / run_lock.NAME, folder / run_lock.NAME)
    assert chaos.finish(child) == 1
    said = folder.with_suffix(".txt").read_text()
    assert f"{folder} was taken over by process 1 on elsewhere while this one stood still" in said
    assert "Traceback" not in said
    assert (folder / run_lock.NAME).exists()


@pytest.fixture
def taken(tmp_path):
    """A folder that this process held until another took it over."""
    folder = hold_folder(str(tmp_path))
    held_by(folder, host="elsewhere", pid=1)
    yield folder
    hold_folder("")


class Nothing:
    """A guard that has seen nothing wrong, meters that have nothing to say."""

    def look(self, state: TrainState) -> str:
        return ""

    def keep(self, state: TrainState) -> None:
        pass

    def state(self) -> dict:
        return {}


def test_save_is_refused_in_a_folder_that_is_another_runs(taken):
    saved = []
    with (
        Keeper(lambda state, writer, **_: saved.append(state)) as keeper,
        pytest.raises(TrainingStopped, match="taken over by process 1 on elsewhere"),
    ):
        keeper.end_epoch(TrainState(epoch=1))
    assert saved == []


def test_run_that_knows_does_not_train_on_until_its_next_save(taken):
    """An epoch may be a day."""
    run_lock.held[0].look()  # as the thread does
    state = TrainState(updates=3, seen=12)
    with Keeper(lambda **_: None) as keeper, pytest.raises(TrainingStopped, match="taken over"):
        keeper.after_update(state, Nothing(), Nothing())


def test_epoch_of_a_run_that_stood_still_does_not_get_into_the_others_log(taken):
    state = TrainState(epoch=1, updates=3)
    reporter = Reporter([JsonHook(taken, state)], torch.device("cpu"), state, 9, 3, 1)
    with pytest.raises(TrainingStopped, match="taken over"):
        reporter.end_epoch({"epoch": 0})
    assert not (taken / "log.txt").exists()
