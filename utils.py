# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Process group and checkpoints under the names of the official code; atomic files.

python -c "import utils; print(utils.get_rank())"
"""

import errno
import os
import secrets
import shutil
from collections.abc import Callable
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

    `path` then holds either the old content or all of the new. OSError if the disk fails.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "w+b") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
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
