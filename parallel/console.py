# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The logger, its lines on the terminal, and their copy in a run's console.log.

In console.log a warning begins with `warning: `, so that the report finds it.

python main_pretrain.py --data_set DIGITS --epochs 1 --output_dir runs/a; cat runs/a/console.log
"""

import contextlib
import logging
import shlex
import sys
import time
from pathlib import Path

NAME = "console.log"
WARNING = "warning: "
KEPT = 1 << 20  # bytes of lines that wait for a folder, or for a disk that is full


def get_logger() -> logging.Logger:
    """Return the toolkit's logger; after `init_distributed_mode` only rank 0 logs below ERROR."""
    return logging.getLogger("convnextv2")


class TerminalHandler(logging.StreamHandler):
    """Writes lines to stdout, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # loaded with the first bar
        with tqdm.tqdm.external_write_mode(self.stream) if tqdm else contextlib.nullcontext():
            super().emit(record)


class ConsoleLog(logging.Handler):
    """Appends lines to console.log; those that come before its folder is known wait for it.

    A disk that fails is reported once and does not end the run: the lines wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.waiting, self.reported = b"", False

    def open(self, folder: Path) -> None:
        """Write to `folder` from now on, after a line with the time and the command."""
        self.path = folder / NAME
        began = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n"
        self.waiting, before = began.encode("utf-8", "backslashreplace"), self.waiting
        self._append(before)

    def emit(self, record: logging.LogRecord) -> None:
        mark = WARNING if record.levelno == logging.WARNING else ""
        self.write(mark + self.format(record))

    def write(self, text: str) -> None:
        """Append a line."""
        with self.lock:
            self._append(f"{text}\n".encode("utf-8", "backslashreplace"))

    def _append(self, lines: bytes) -> None:
        self.waiting = (self.waiting + lines)[-KEPT:]
        if self.path is None:
            return
        try:
            # Unbuffered, so that what a full disk refused is known; opened each time, since the
            # folder may have been moved away and back.
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
        except OSError as error:
            if not self.reported:
                self.reported = True
                text = "cannot write %s (%s); the run continues, and its lines are kept for later"
                get_logger().warning(text, self.path, error.strerror)


def open_console_log(folder: Path | None) -> None:
    """Start console.log in a run's folder, on the main process; None: there is no folder."""
    for handler in _console_logs():
        if folder is None:
            get_logger().removeHandler(handler)
        else:
            handler.open(folder)


def note(text: str) -> None:
    """Write to console.log alone, since the terminal shows it in another way."""
    for handler in _console_logs():
        handler.write(text)


def _console_logs() -> list[ConsoleLog]:
    return [each for each in get_logger().handlers if isinstance(each, ConsoleLog)]
