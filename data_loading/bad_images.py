# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images that cannot be used: retried, reported, listed.

python -c "from data_loading.bad_images import BadImages; print(BadImages.__doc__)"
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import Preempted, UserError
from parallel.process_group import all_gather, get_logger, is_main_process
from utils import write_atomically

ESCAPES = {ord(char): repr(char)[1:-1] for char in "\t\n\r"}  # a line is a file


# What the system says of a file, for good; None: a decoder says it. Damaged files lead decoders to
# places where none is (EINVAL, EOVERFLOW).
OF_THE_FILE = {None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM}


OF_THE_FILE |= {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EOVERFLOW, errno.ENXIO}


WAITS = (0.1, 0.4, 1.5)  # seconds, before what the machine failed in is tried again


def retry_io(read: Callable[[], Any]) -> Any:
    """`read()`, again if not the file but the machine failed; UserError if it still does."""
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if error.errno in OF_THE_FILE:
                raise
            if wait is None:
                raise UserError(
                    f"cannot be read ({error}), tried {len(WAITS) + 1} times; not the image failed "
                    "but the machine or its file system, so --on_bad_image skip does not go on "
                    "without it: see to that (ulimit -n, memory, disk, network), and start again"
                ) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


class BadImages:
    """The images that a run does without: told in the log, and listed in bad_images.txt, once each.

    Workers report with their batches; `write` brings together what all ranks were told.

        with BadImages(folder, batches, val_batches) as bad:
            ...
            bad.write()  # on every rank, before each save: who goes on does not see them again
    """

    def __init__(self, folder: Path | None, *batches: Any, active: bool = True) -> None:
        self.path = folder / "bad_images.txt" if folder else None
        self.batches = [one for one in batches if one is not None]
        self.active, self.listed = active, ""
        self.told: set[str] = set()
        self.known: dict[str, str] = {}  # to all ranks, so that nobody sends it again
        if active and self.path and is_main_process() and self.path.exists():
            self.listed = self.path.read_bytes().decode("utf-8", "surrogateescape")
            self.told = {line.split("\t")[0] for line in self.listed.split("\n")} - {""}

    def __enter__(self) -> BadImages:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None or issubclass(kind, Preempted):  # both of which happen on all ranks at once
            self.write()

    def write(self) -> int:
        """List what is new; returns how many there are. Every rank must call it."""
        if not self.active:
            return 0
        mine = {name: why for batches in self.batches for name, why in batches.bad.items()}
        found: dict[str, str] = {}
        for part in all_gather({name: mine[name] for name in mine.keys() - self.known}):
            found |= part
        self.known |= found
        if is_main_process():  # all of them: the last list may not have been written
            self._tell({name.translate(ESCAPES): why for name, why in sorted(self.known.items())})
        return len(self.known)

    def _tell(self, found: dict[str, str]) -> None:
        new = {name: why for name, why in found.items() if name not in self.told}
        if not new:
            return
        lines = [f"{name}\t{why.translate(ESCAPES)}\n" for name, why in new.items()]
        text, where = self.listed + "".join(lines), f"listed in {self.path}"
        try:
            if self.path:
                write_atomically(text.encode("utf-8", "surrogateescape"), self.path)
        except OSError as error:  # at the end of the next epoch again
            return get_logger().warning("%s cannot be written: %s", self.path, error)
        self.listed, self.told = text, self.told | new.keys()
        get_logger().warning(
            "%d images cannot be used, %s; training takes others in their place, evaluation leaves "
            "them out; %s",
            len(new),
            ", ".join(f"{name} ({why})" for name, why in list(new.items())[:3])
            + ", ..." * (len(new) > 3),
            where if self.path else "without --output_dir there is no list of them",
        )
