# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One run in a folder: a lock that a dead process does not hold, on shared file systems too.

python -c "import lock, pathlib; lock.Lock(pathlib.Path('.')).take().release()"
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from errors import UserError
from utils import from_main_process

NAME = ".lock"
BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # after so many without one, a holder on another machine is dead


def hold_folder(path: str) -> Path | None:
    """Make the folder, check that files can be written there, and keep other runs out of it.

    '' means no folder at all. On the main process; its errors are everybody's. The lock goes with
    the process.
    """
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
    atexit.register(lock.release)
    for left in folder.glob(".*.tmp"):  # half written by a run that was killed
        left.unlink(missing_ok=True)


class Lock:
    """The right to write into a folder, from `take` to `release`.

    The file holds host, process and start of its holder; a thread touches it every BEAT. On the
    same machine the process tells whether the holder lives; of another machine, whether the
    time of the file changes: no clocks are compared.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.stopped = threading.Event()
        self.mine = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}
        )

    def take(self) -> Lock:
        """Hold the lock; UserError if another run does. A silent holder elsewhere is waited for."""
        while not self._create():
            holder = self._read()
            if holder == json.loads(self.mine):  # a run of this process that is over
                break
            if _is_alive(holder) if holder.get("host") == socket.gethostname() else self._beats():
                raise UserError(
                    f"{self.path.parent} is in use by process {holder.get('pid')} on "
                    f"{holder.get('host')}; choose another --output_dir, or stop that run"
                )
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def release(self) -> None:
        """Let others write; what somebody else took over is left to them."""
        self.stopped.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.mine:
                self.path.unlink()

    def _create(self) -> bool:
        """Make the file, whole from its first moment: by a link, which NFS does in one step too."""
        draft = self.path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}")
        draft.write_text(self.mine)
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return self._create_alone()
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _create_alone(self) -> bool:
        try:
            with open(self.path, "x") as file:
                file.write(self.mine)
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any]:
        try:
            held = json.loads(self.path.read_text())
        except (OSError, ValueError):  # gone, or half written by a machine that died
            return {}
        return held if isinstance(held, dict) else {}

    def _beats(self) -> bool:
        """Whether the file's time changes within SILENCE."""
        first, until = self._time(), time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENCE / 10))
            now = self._time()
            if now is None:  # released
                return False
            if now != first:
                return True
        return False

    def _time(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return None

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT):
            with contextlib.suppress(OSError):  # a full or vanished disk is the saver's affair
                os.utime(self.path)


def _start_of(pid: int) -> str:
    """When a process began, in the kernel's ticks: numbers are given again. '' if not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process on this machine that holds a lock still runs."""
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:
        pass
    except (KeyError, TypeError, OSError):
        return False
    return not holder.get("start") or holder["start"] == _start_of(holder["pid"])


def holder(folder: Path) -> str:
    """Whose run holds the folder, as far as this machine can tell at once; '' for nobody's."""
    held = Lock(folder)._read()
    here = held.get("host") == socket.gethostname()
    if not held or (here and not _is_alive(held)):
        return ""
    return f"process {held.get('pid')} on {held.get('host')}"
