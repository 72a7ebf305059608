# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lock of a run's output folder: a lease file with heartbeats, safe on shared file systems.

python -c "from training.run_lock import acquire_run_lock; acquire_run_lock('runs/locked')"
"""

from __future__ import annotations

import atexit
import contextlib
import time
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from errors import TrainingStopped, UserError
from parallel.process_group import from_main_process, get_logger

NAME = ".lock"
BEAT = 5.0  # seconds between heartbeats
SILENCE = 60.0  # seconds without a heartbeat after which another run may take the folder over

_held: list[SoftFileLease] = []  # by this process, at most one


def acquire_run_lock(path: str) -> Path | None:
    """Create the folder and lock it until the process ends or calls this again; '' for no folder.

    Rank 0 holds the lock for all ranks. A lock whose process died on this host is taken over at
    once, any other after SILENCE without a heartbeat.
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
    except (OSError, LeaseSettingsMismatch) as error:
        raise UserError(
            f"--output_dir {folder}: cannot write there ({getattr(error, 'strerror', error)}); "
            "choose a folder you own or free some space"
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
    """Acquire the lease; Timeout as soon as another run shows a heartbeat."""
    before = _last_change(lease)

    def in_use() -> bool:
        return _last_change(lease) not in (None, before)

    with contextlib.suppress(Timeout):
        lease.acquire(timeout=1, cancel_check=in_use)
        return
    text = "%s: waiting up to %.0f s for a heartbeat of %s"
    get_logger().info(text, lease.lock_file, SILENCE, _owner(lease))
    try:
        lease.acquire(timeout=2 * SILENCE, cancel_check=in_use)
    except Timeout:
        if in_use() or lease.owner is not None:
            raise
        lease.break_lock()  # an empty file: the machine crashed while writing it
        lease.acquire(timeout=1)


def _last_change(lease: SoftFileLease) -> tuple[int, int] | None:
    """(inode, time) of the lock file, which each heartbeat changes; None without a file."""
    with contextlib.suppress(OSError):
        found = Path(lease.lock_file).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _owner(lease: SoftFileLease) -> str:
    """Process and host of the lock's holder, for messages."""
    owner = lease.owner
    if owner is None:
        return "another process"
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}"  # filelock adds "?pidns-"


def describe_holder(folder: Path) -> str | None:
    """Process and host of the live run that holds the folder, None without one; changes nothing.

    Waits for a heartbeat, for at most 2.5 * BEAT seconds, if the folder has a lock file.
    """
    lease = _lease(folder)
    holder, before, end = _owner(lease), _last_change(lease), time.monotonic() + 2.5 * BEAT
    if before is not None:
        get_logger().info("%s: waiting %.0f s for a heartbeat of %s", folder, 2.5 * BEAT, holder)
    while (now := _last_change(lease)) is not None and time.monotonic() < end:
        if now != before:
            return holder
        time.sleep(BEAT / 20)
    return None


def is_lost() -> bool:
    """True if the heartbeats of this process found that it lost its lock."""
    return any(lease.compromise is not None and _find_loss(lease) for lease in _held)


def check() -> None:
    """Raise TrainingStopped on all ranks if rank 0 lost the lock; every rank must call it."""
    if reason := from_main_process(_check):
        raise TrainingStopped(reason)


def _check() -> str:
    for lease in _held:
        if reason := _find_loss(lease):
            return reason
        if lease.compromise is not None and lease.owner is not None:
            with contextlib.suppress(OSError):  # heartbeats stopped while the disk was away
                lease.release(force=True)
                lease.acquire(timeout=1)
    return ""


def _find_loss(lease: SoftFileLease) -> str:
    """Reason why the lock is not ours any more; '' if it is, or if the disk does not answer."""
    path, owner = Path(lease.lock_file), lease.owner
    with contextlib.suppress(OSError):
        removed = not path.exists() and path.parent.is_dir()
        if removed or (owner is not None and owner.token != lease.token):
            return (
                f"{path.parent} was taken over by {_owner(lease)} while this run stood still, or "
                f"its {NAME} was removed; this run ends and writes nothing more"
            )
    return ""


def _release() -> None:
    """Remove the lock file, unless it is another run's by now."""
    while _held:
        with contextlib.suppress(OSError):
            _held.pop().release(force=True)
