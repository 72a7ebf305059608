# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Process group and checkpoints under the names of the official code; atomic files.

python -c "import utils; print(utils.get_rank())"
"""

import contextlib
import csv
import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from parallel.process_group import (  # noqa: F401  names that forks of the official code use
    get_logger,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    launch,
)

REMEDIES = {  # of what a disk refuses
    errno.ENOSPC: "delete files on that disk that nobody needs, or lower --save_ckpt_num",
    errno.EDQUOT: "delete files of yours that nobody needs, or lower --save_ckpt_num",
    errno.EFBIG: "raise the largest size of a file (ulimit -f)",
    errno.EROFS: "the disk is read-only: have it mounted for writing",
    errno.ENOENT: "its folder is gone: put it back",
    errno.EACCES: "make its folder writable for you",
}


def save_model(folder: Path, parts: Any, state: Any, entries: Any, **options: Any) -> None:
    """`collect_checkpoint`, then `write_checkpoints` on the main process; every rank calls it."""
    from training import checkpoint

    content = checkpoint.collect_checkpoint(parts, state, entries)
    if content is not None:
        checkpoint.write_checkpoints(folder, content, **options)


def auto_load_model(*args: Any, **kwargs: Any) -> Any:
    """Call `training.resume.auto_load_model`."""
    from training import resume

    return resume.auto_load_model(*args, **kwargs)


def write_atomically(content: str | bytes | Callable[[BinaryIO], Any], path: Path) -> None:
    """Write text or bytes, or call a function with the open file; never leaves half a file.

    `path` then holds either the old content or all of the new. If the disk fails, an OSError with
    its own text and `path`.
    """
    temporary, failures = _temporary(path), []
    try:
        with open(temporary, "w+b") as file:
            if callable(content):
                content(_Watched(file, failures))
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        cause = next((each for each in (*failures, error) if isinstance(each, OSError)), None)
        if cause is None or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    folder = os.open(path.parent, os.O_DIRECTORY)
    try:
        os.fsync(folder)  # the rename must survive a power cut
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not on all file systems
            raise
    finally:
        os.close(folder)


def as_csv(names: Iterable[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return rows below a line of column names; bytes of names that are no UTF-8 as \\x.."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*names], *rows])
    return text.getvalue().encode(errors="backslashreplace")


def write_csv(names: Iterable[str], rows: Iterable[Sequence[Any]], path: Path) -> None:
    """Write rows below a line of column names, atomically."""
    write_atomically(as_csv(names, rows), path)


class _Watched:
    """An open file that notes the errors of its writes: torch.save raises another one instead."""

    def __init__(self, file: BinaryIO, failures: list[OSError]) -> None:
        self.file, self.failures = file, failures

    def write(self, data: Any) -> int:
        """Write, and note an error."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.failures.append(error)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def explain(error: OSError) -> str:
    """Return an error of the disk with the file that was being written, and a remedy."""
    if error.errno is None or error.filename is None:
        return str(error)
    text, path = f"{error.strerror} while writing {error.filename}", Path(error.filename)
    remedy = REMEDIES.get(error.errno, "")
    if error.errno == errno.ENOSPC:
        with contextlib.suppress(OSError):
            text += f", {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free"
    return f"{text}; {remedy}" if remedy else text


def nearest(path: Path) -> Path:
    """Return the path if it exists, otherwise the nearest parent that does."""
    return next(place for place in (path, *path.resolve().parents) if place.exists())


def _temporary(path: Path) -> Path:
    """Return a unique name next to `path`; process numbers are often equal in containers."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def link(source: Path, target: Path) -> None:
    """Give a finished file a second name; copy it where the file system has no hard links."""
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as file:
            return write_atomically(lambda copy: shutil.copyfileobj(file, copy), target)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # os.replace keeps it if both were names of one file
