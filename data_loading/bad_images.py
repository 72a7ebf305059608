# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images that cannot be used: reads are retried, bad images reported and listed in a file.

python -c "from data_loading.bad_images import BadImages; print(BadImages.__doc__)"
"""

import errno
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from errors import UserError, first_few, plural
from parallel.process_group import all_gather, get_logger, is_main_process
from utils import write_atomically

ESCAPES = {ord(char): repr(char)[1:-1] for char in "\t\n\r"}  # one line per image

# Errors that are the file's own fault, so that a retry is pointless. None: raised by a decoder.
# EINVAL, EOVERFLOW: a decoder seeks to a nonsensical offset in a damaged file.
PERMANENT = {None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM}
PERMANENT |= {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EOVERFLOW, errno.ENXIO}
WAITS = (0.1, 0.4, 1.5)  # seconds before each retry


def is_transient(error: BaseException) -> bool:
    """Return True for an OSError of the machine or its file system, not of one file."""
    return isinstance(error, OSError) and error.errno not in PERMANENT


def retry_io(read: Callable[[], Any]) -> Any:
    """Return `read()`, retried if the machine failed and not the file; UserError if all tries fail.

    An OSError that is the file's own fault is raised at once.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if not is_transient(error):
                raise
            if wait is None:
                raise UserError(
                    f"cannot be read ({error}), tried {len(WAITS) + 1} times. The machine or its "
                    "file system failed, not the image, so --on_bad_image skip does not skip it. "
                    "Check ulimit -n, memory, disk and network, then start again"
                ) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def as_lines(found: Mapping[str, str]) -> list[str]:
    """Return the lines of bad_images.txt for some images, name -> reason, in order of the names."""
    escaped = {name.translate(ESCAPES): why.translate(ESCAPES) for name, why in found.items()}
    return [f"{name}\t{why}\n" for name, why in sorted(escaped.items())]


class BadImages:
    """Images that a run skips; `write` logs each once and lists it in bad_images.txt.

    Loaders collect them in `bad`, name -> reason. A resumed run does not read again what was read
    before its checkpoint, so call `write` before each save.
    """

    def __init__(self, folder: Path | None, *loaders: Any, active: bool = True) -> None:
        self.path = folder / "bad_images.txt" if folder else None
        self.loaders = [loader for loader in loaders if loader is not None]
        self.active, self.text = active, ""
        self.listed: set[str] = set()
        self.gathered: dict[str, str] = {}  # from all ranks, so that none is sent again
        if active and self.path and is_main_process() and self.path.exists():
            self.text = self.path.read_text("utf-8", "surrogateescape")
            self.listed = {line.split("\t")[0] for line in self.text.split("\n")}

    def write(self) -> int:
        """List new images and return the number of all. Every rank must call it."""
        if not self.active:
            return 0
        mine = {name: why for loader in self.loaders for name, why in loader.bad.items()}
        for found in all_gather({name: mine[name] for name in mine.keys() - self.gathered}):
            self.gathered |= found
        if is_main_process():  # with all of them: an earlier write may have failed
            self._list()
        return len(self.gathered)

    def _list(self) -> None:
        found = {name.translate(ESCAPES): why for name, why in sorted(self.gathered.items())}
        new = {name: why for name, why in found.items() if name not in self.listed}
        if not new:
            return
        text = self.text + "".join(as_lines(new))
        try:
            if self.path:
                write_atomically(text.encode("utf-8", "surrogateescape"), self.path)
        except OSError as error:  # the next call tries again
            return get_logger().warning("cannot write %s: %s", self.path, error)
        self.text, self.listed = text, self.listed | new.keys()
        get_logger().warning(
            "%s cannot be used: %s. Training replaces them, evaluation leaves them out; %s",
            plural(len(new), "image"),
            first_few(f"{name} ({why})" for name, why in new.items()),
            f"see {self.path}" if self.path else "they are not listed in a file",
        )
