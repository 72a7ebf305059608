# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lock of a run's output folder: a lease file with heartbeats, which works on shared file systems.

python -c "from training.run_lock import acquire_run_lock; acquire_run_lock('runs/locked')"
"""

import atexit
import contextlib
import os
import time
from pathlib import Path

from filelock import SoftFileLease, Timeout

from config.run_files import LOCK as NAME
from config.run_files import SILENCE
from errors import TrainingStopped, UserError
from parallel.process_group import from_main_process, get_logger

BEAT = 5.0  # seconds between heartbeats

_held: list[SoftFileLease] = []  # by this process, at most one


def acquire_run_lock(path: str) -> Path | None:
    """Create the folder and lock it until the process ends or calls this again; '' for no folder.

    Rank 0 holds the lock for all ranks. The lock of a process that died on this host is taken over
    at once, any other after SILENCE without a heartbeat. A run whose lock file is removed, by hand
    or by another run, ends at its next check.
    """
    _release()
    folder = Path(path) if path else None
    if folder is not None:
        from_main_process(lambda: _acquire(folder))
    return folder


def _acquire(folder: Path) -> None:
    lease = _lease(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _wait_for(lease)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by {_owner(lease)}; choose another --output_dir, or stop that run"
        ) from error
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot write there ({error.strerror}); choose a folder you "
            "own or free some space"
        ) from error
    _held.append(lease)
    atexit.register(_release)
    with contextlib.suppress(OSError):
        for leftover in folder.glob(".*.tmp"):  # half-written files of a run that was killed
            leftover.unlink(missing_ok=True)


def _lease(folder: Path) -> SoftFileLease:
    return SoftFileLease(
        folder / NAME, lease_duration=SILENCE, heartbeat_interval=BEAT, thread_local=False
    )


def _wait_for(lease: SoftFileLease) -> None:
    """Acquire the lease; raise Timeout as soon as the lock file shows a heartbeat."""
    before = _last_heartbeat(lease)

    def in_use() -> bool:
        return _last_heartbeat(lease) not in (None, before)

    if before is not None:
        text = "%s is held by %s; taking it over if that is dead, after %.0f s at most"
        get_logger().info(text, lease.lock_file, _owner(lease), SILENCE)
    try:
        lease.acquire(timeout=2 * SILENCE, cancel_check=in_use)
    except Timeout:
        if in_use() or lease.owner is not None:
            raise
        lease.break_lock()  # an empty file, left by a machine that crashed while writing it
        lease.acquire(timeout=1)


def _last_heartbeat(lease: SoftFileLease) -> float | None:
    """Return the time of the lock file, which each heartbeat sets; None without a file."""
    with contextlib.suppress(OSError):
        return os.stat(lease.lock_file).st_mtime
    return None


def _owner(lease: SoftFileLease) -> str:
    """Return process and host of the lock's holder, for messages."""
    owner = lease.owner
    if owner is None:
        return "another process"
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}"  # filelock adds "?pidns-"


def describe_holder(folder: Path) -> str | None:
    """Return process and host of the live run that uses the folder, or None; changes nothing.

    A run counts as alive for SILENCE after its last heartbeat, by this host's clock.
    """
    lease = _lease(folder)
    heartbeat = _last_heartbeat(lease)
    alive = heartbeat is not None and time.time() - heartbeat < SILENCE
    return _owner(lease) if alive else None


def is_lost() -> bool:
    """Return True if the heartbeats of this process found that it lost its lock."""
    return any(lease.compromise is not None and _find_loss(lease) for lease in _held)


def is_taken_over() -> bool:
    """Return True if this process, on rank 0, has lost its folder; reads the lock file."""
    return any(map(_find_loss, _held))


def check() -> None:
    """Raise TrainingStopped on all ranks if rank 0 lost the lock; every rank must call it."""
    if reason := from_main_process(_check):
        raise TrainingStopped(reason)


def _check() -> str:
    """Return why the lock is lost, '' if it is not; restart heartbeats that the disk ended."""
    for lease in _held:
        if lease.compromise is not None and lease.owner is not None and not _find_loss(lease):
            # If another run takes the lock in between, as it could before, this run ends.
            with contextlib.suppress(OSError):
                lease.release(force=True)
                lease.acquire(timeout=1)
        return _find_loss(lease)
    return ""


def _find_loss(lease: SoftFileLease) -> str:
    """Return why the lock is lost; '' if it is not, or if the disk does not answer."""
    path, owner = Path(lease.lock_file), lease.owner
    with contextlib.suppress(OSError):
        removed = not path.exists() and path.parent.is_dir()
        if removed or (owner is not None and owner.token != lease.token):
            return (
                f"{path.parent} was taken over by {_owner(lease)} while this run was suspended, "
                f"or its {NAME} was removed; this run ends and writes nothing more"
            )
    return ""


def _release() -> None:
    """Remove the lock file, unless another run holds it by now."""
    while _held:
        with contextlib.suppress(OSError):
            _held.pop().release(force=True)
