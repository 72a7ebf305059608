# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One run in a folder.  pytest tests/test_lock.py"""

from __future__ import annotations

import json
import os
import socket
import threading
import time

import pytest

import lock
from errors import UserError
from lock import Lock, hold_folder


def held_by(folder, **holder) -> None:
    (folder / lock.NAME).write_text(json.dumps({"host": socket.gethostname(), **holder}))


def test_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    child = os.fork()
    if child == 0:
        Lock(tmp_path).take()
        time.sleep(60)
    while not (tmp_path / lock.NAME).exists():
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
    monkeypatch.setattr(lock, "SILENCE", 0.05)
    (tmp_path / lock.NAME).write_text(text)
    Lock(tmp_path).take().release()


def test_other_machine_holds_it_as_long_as_it_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    held_by(tmp_path, host="elsewhere", pid=1)
    alive = threading.Event()

    def beat() -> None:
        while not alive.wait(0.05):
            os.utime(tmp_path / lock.NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
            Lock(tmp_path).take()
    finally:
        alive.set()
        thread.join()
    Lock(tmp_path).take().release()  # silent now


def test_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    held = Lock(tmp_path).take()
    before = (tmp_path / lock.NAME).stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / lock.NAME).stat().st_mtime_ns > before
    held.release()


def test_lock_that_somebody_took_over_is_not_released(tmp_path):
    held = Lock(tmp_path).take()
    held_by(tmp_path, host="elsewhere", pid=1)
    held.release()
    assert (tmp_path / lock.NAME).exists()


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


def test_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    held = Lock(tmp_path).take()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    held.release()


def test_same_process_may_come_back_and_what_a_killed_one_left_is_cleaned(tmp_path):
    (tmp_path / ".checkpoint-3.pth.123.tmp").write_text("half")
    for _ in range(2):
        hold_folder(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
