# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Process group, rank gating and checkpoints under the names of the official code; atomic files.

python -c "import utils; print(utils.find_device())"
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from parallel.process_group import (
    all_gather,
    all_reduce_sum,
    barrier,
    broadcast,
    find_device,
    from_main_process,
    get_logger,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    launch,
    main_process_first,
)  # fmt: skip

# Names that forks of the official code use; they live in parallel/process_group.py.
__all__ = [
    "all_gather", "all_reduce_sum", "auto_load_model", "barrier", "broadcast", "find_device",
    "from_main_process", "get_logger", "get_rank", "get_world_size", "init_distributed_mode",
    "is_main_process", "launch", "link", "main_process_first", "save_model", "write_atomically",
]  # fmt: skip


def save_model(*args: Any, **kwargs: Any) -> None:
    """`training.checkpoint.save_model`."""
    from training import checkpoint

    checkpoint.save_model(*args, **kwargs)


def auto_load_model(*args: Any, **kwargs: Any) -> Any:
    """`training.resume.auto_load_model`."""
    from training import resume

    return resume.auto_load_model(*args, **kwargs)


def write_atomically(content: str | bytes | Callable[[BinaryIO], Any], path: Path) -> None:
    """Write text or bytes, or call a function with the open file; never leaves half a file.

    After it `path` holds either the old content or all of the new. OSError if the disk fails.
    """
    if callable(content):
        return _replace(path, content)
    data = content.encode() if isinstance(content, str) else content
    _replace(path, lambda file: file.write(data))


def _beside(path: Path) -> Path:
    """A name that nobody else writes to: in containers the numbers of processes are often alike."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _replace(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    temporary = _beside(path)
    try:
        with open(temporary, "w+b") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(folder)


def link(source: Path, target: Path) -> None:
    """Give a finished file a second name, by copying where the file system has no hard links."""
    temporary = _beside(target)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as file:
            return _replace(target, lambda copy: shutil.copyfileobj(file, copy))
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # which stays where both were names of one file
