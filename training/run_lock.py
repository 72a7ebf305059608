# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One run in a folder: a lock that a dead process does not hold, on shared file systems too.

python -c "from training.run_lock import hold_folder; hold_folder('runs/locked')"
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import TrainingStopped, UserError
from parallel.process_group import from_main_process, get_logger

NAME = ".lock"
BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # after so many without one, a holder on another machine is dead
PLACE = ("host", "boot", "namespace")  # where these are equal, process numbers mean the same

held: list[Lock] = []  # of this process's run, which is one at most


def hold_folder(path: str) -> Path | None:
    """Make the folder, check that files can be written there, and keep other runs out of it.

    '' means no folder at all. On the main process; its errors are everybody's. The lock goes with
    the process, or with its next run.
    """
    while held:
        held.pop().release()
    if not path:
        return None
    folder = Path(path)
    from_main_process(lambda: _hold(folder))
    return folder


def _hold(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder).take()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot write there ({error.strerror}); "
            "choose a folder you own or free some space"
        ) from error
    held.append(lock)
    atexit.register(lock.release)
    for left in folder.glob(".*.tmp"):  # half written by a run that was killed
        left.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        lock.clean()


def is_lost() -> bool:
    """Whether this process knows that another run took its folder over."""
    return any(lock.lost for lock in held)


def check() -> None:
    """TrainingStopped, on all ranks, if another run took the folder over; all must call it."""
    reason = from_main_process(lambda: "".join(lock.look() for lock in held))
    if reason:
        raise TrainingStopped(reason)


class Lock:
    """The right to write into a folder, from `take` to `release`.

    The file says who holds it and where; a thread touches it every BEAT. In the same place the
    process tells whether the holder lives; elsewhere (another machine or container, whatever its
    name) whether the time of the file changes: no clocks are compared.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.own = folder / f"{NAME}.{secrets.token_hex(8)}"  # a name that nobody else uses
        self.claim = folder / f"{NAME}.claim"  # of who is about to take over
        self.mine = _identity()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.looked, self.lost = time.monotonic(), ""  # when last; who took it over

    def take(self) -> Lock:
        """Hold the lock; UserError if another run does. A silent holder elsewhere is waited for."""
        with self._draft():
            while not self._place(self.path):
                text = _read(self.path)
                holder = _parse(text)
                if holder == self.mine:  # taken over just now, or of a run of this process
                    break
                if self._lives(holder):
                    raise UserError(
                        f"{self.path.parent} is in use by {_name(holder)}; "
                        "choose another --output_dir, or stop that run"
                    )
                self._take_over(text)
        self.looked = time.monotonic()
        self.thread.start()
        return self

    def release(self) -> None:
        """Let others write; what somebody else took over is left to them."""
        self.stopped.set()
        if self.mine["pid"] != os.getpid():  # a fork
            return
        self.thread.join(BEAT)
        with contextlib.suppress(OSError):
            if _parse(_read(self.path)) == self.mine:
                self.path.unlink()

    def look(self) -> str:
        """What there is to say if another run has taken the folder over; '' as long as it is ours.

        Others do so when this process or machine stands still for longer than SILENCE.
        """
        stood_still = time.monotonic() - self.looked > SILENCE
        with contextlib.suppress(OSError):
            holder = _parse(_read(self.path))
            over = stood_still and self.path.parent.is_dir() and not self.path.exists()
            if over or (holder and holder != self.mine):
                self.lost = (
                    f"{self.path.parent} was taken over by "
                    f"{'a run that is over' if over else _name(holder)} while this one stood "
                    "still; it writes no more, what is there belongs to the other"
                )
        self.looked = time.monotonic()
        return self.lost

    def clean(self) -> None:
        """Remove what others left who were killed in `take`."""
        newest = self.path.stat().st_mtime - SILENCE
        for left in self.path.parent.glob(f"{NAME}.*"):
            if left.stat().st_mtime < newest:  # else somebody may be at it
                left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _draft(self) -> Iterator[None]:
        """`own` is there, whole."""
        try:
            self.own.write_text(json.dumps(self.mine))
            yield
        finally:
            self.own.unlink(missing_ok=True)

    def _place(self, path: Path) -> bool:
        """Give `own` a second name, if nobody has that: by a link, which is one step on NFS too."""
        try:
            os.link(self.own, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with open(path, "x") as file:
                    file.write(json.dumps(self.mine))
            except FileExistsError:
                return False
        return True

    def _take_over(self, judged: str) -> None:
        """Put `own` in place of a dead holder's file, but not of a new one that is there since.

        One at a time: nobody comes between the look and the deed.
        """
        if not self._place(self.claim):
            text = _read(self.claim)
            if not self._beats(self.claim):
                self._drop_claim(text)
            return
        try:
            if self.path.exists() and _read(self.path) == judged:
                os.replace(self.own, self.path)
        finally:
            self.claim.unlink(missing_ok=True)

    def _drop_claim(self, judged: str) -> None:
        """Take away what somebody left who was killed right then; another's claim is put back."""
        aside = self.own.with_name(f"{self.own.name}.claim")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.claim, aside)
            if _read(aside) != judged:
                with contextlib.suppress(OSError):
                    os.link(aside, self.claim)
            aside.unlink()

    def _lives(self, holder: dict[str, Any]) -> bool:
        if _is_here(holder):
            return _is_alive(holder)
        text = "%s: looking for %.0f s at most whether %s gives signs of life"
        get_logger().info(text, self.path, SILENCE, _name(holder))
        return self._beats(self.path)

    def _beats(self, path: Path) -> bool:
        """Whether a file's time changes within SILENCE."""
        first, until = _time(path), time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(min(0.2, SILENCE / 10))
            now = _time(path)
            if now is None:  # released
                return False
            if now != first:
                return True
        return False

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT) and not self.look():
            with contextlib.suppress(OSError):  # a full or vanished disk is the saver's affair
                if self.path.exists():
                    os.utime(self.path)
                else:
                    with self._draft():
                        self._place(self.path)


def _identity() -> dict[str, Any]:
    """Who this process is, and where its number counts."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    start = "".join(_stat(os.getpid())[19:20])
    place = {"host": socket.gethostname(), "boot": boot, "namespace": namespace}
    return place | {"pid": os.getpid(), "start": start}


def _read(path: Path) -> str:
    """The text of a lock; '' if it is gone."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _time(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _parse(text: str) -> dict[str, Any]:
    """The holder in a lock's text; empty where a machine died while writing it."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    """For messages; a file with half a text names nobody."""
    return f"process {holder.get('pid')} on {holder.get('host')}" if holder else "somebody"


def _stat(pid: int) -> list[str]:
    """State, start and more of a process, from its third field on; empty if not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether a holder's process number is one of this machine and container."""
    mine = _identity()
    return all(holder.get(key) == mine[key] for key in PLACE)


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process, in this place, that holds a lock still runs."""
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:
        pass
    except (KeyError, TypeError, OverflowError, OSError):
        return False
    fields = _stat(holder["pid"])
    if not fields:  # another system, or one that hides the processes of others
        return True
    return fields[0] not in "ZX" and holder.get("start") in ("", None, fields[19])


def holder(folder: Path) -> str:
    """Whose run holds the folder, as far as this machine can tell at once; '' for nobody's."""
    found = _parse(_read(folder / NAME))
    return "" if not found or (_is_here(found) and not _is_alive(found)) else _name(found)
