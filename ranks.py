# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Processes of one run that end together: when one fails or is gone, the others hear of it.

torchrun --nproc_per_node=2 main_pretrain.py --data_set DIGITS --device cpu --batch_size 9999
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from errors import UserError

JOIN = 120.0  # seconds in which all connect to rank 0, once they have met
GRACE = 3.0  # seconds in which a rank may end by itself, after another did: all may fail alike
CLEANUP = 10.0  # seconds for what gives folders free and ends loader processes
LINE = "line to rank 0"  # key in the store
DONE = b"done"
# A network that is away for less than ten minutes ends nothing; a lost machine does after that.
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 20}  # seconds, seconds, times

_watches: list[Watch] = []  # this process's, if there are other ranks


def watch(store: Any, rank: int, size: int) -> None:
    """Connect every rank with rank 0, over the store by which they meet; all must call it.

    From then on an error, or the death, of one ends all.
    """
    part()
    _watches.clear()
    if size == 1:
        return
    lines = _accept(store, size) if rank == 0 else {_connect(store, rank): 0}
    _watches.append(Watch(rank, lines))
    atexit.register(part)
    os.register_at_fork(after_in_child=_forget)


def mark() -> str:
    """` [rank 3]` for messages; '' for a process alone."""
    return "".join(f" [rank {each.rank}]" for each in _watches)


def end_all(code: int, message: str, error: BaseException) -> None:
    """Say `message`, or else the traceback, and end all ranks; returns only if this is alone."""
    for each in _watches:
        each.fail(code, message, error)


def tell(code: int, what: str) -> None:
    """Have all other ranks end with `code`; this one ends by itself."""
    for each in _watches:
        each.tell(code, what)


def part() -> None:
    """This rank is done, well: whatever becomes of the others, or of it, ends nobody."""
    for each in _watches:
        each.close()


class Watch:
    """A line from each rank to rank 0, on which nothing is said until one fails.

    The system closes the lines of a process that ends, however it does, so that nobody sends
    signs of life, and a process that stands still is no dead one.
    """

    def __init__(self, rank: int, lines: dict[socket.socket, int]) -> None:
        """lines: to each other rank on rank 0, elsewhere to that alone."""
        self.rank, self.lines = rank, lines
        self.over, self.heard = threading.Event(), threading.Event()
        self.ending = threading.Lock()
        self.first = 0, ""  # exit code and message, of the rank that failed first
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def fail(self, code: int, message: str, error: BaseException) -> NoReturn:
        """End all ranks, for this one's error, or for another's which was only felt here."""
        if _is_felt(error) and self.heard.wait(GRACE):
            self._end(*self.first)
        kind = type(error).__name__
        why = str(error) or kind if message else f"{kind}: {error}"
        self.tell(code, f"has failed: {' '.join(why.split())[:1000]}")
        self._end(code, message or self._traceback(error))

    def tell(self, code: int, what: str) -> None:
        """Have the others end with `code`, because of what happened to this rank."""
        self.over.set()
        self._say(f"{code} rank {self.rank} {what}".encode(errors="replace"))

    def close(self) -> None:
        """Leave the watch."""
        self.over.set()
        self._say(DONE)
        self.thread.join(GRACE)

    def _say(self, text: bytes) -> None:
        """The last word on all lines; what was said before on a line stays its last word."""
        for line in self.lines:
            with contextlib.suppress(OSError):
                line.sendall(text)
                line.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as open_lines:
            for line in self.lines:
                open_lines.register(line, selectors.EVENT_READ)
            while open_lines.get_map():
                for key, _ in open_lines.select():
                    text = _last_word(key.fileobj)
                    open_lines.unregister(key.fileobj)
                    if self.over.is_set():
                        return
                    if text != DONE:
                        return self._follow(text, self.lines[key.fileobj])

    def _follow(self, text: bytes, rank: int) -> None:
        """End as another rank did; '' is what a rank says that cannot say anything any more."""
        silent = f"1 rank {rank} is gone without a word: killed, out of memory, or its machine lost"
        text = text or silent.encode()
        self._say(text)
        code, _, why = text.decode(errors="replace").partition(" ")
        self.first = int(code), f"{Path(sys.argv[0]).name}: error [rank {self.rank}]: {why}"
        self.heard.set()
        if not self.over.wait(GRACE):
            self._end(*self.first)

    def _end(self, code: int, message: str) -> NoReturn:
        self.ending.acquire()  # for good: a process ends once
        with contextlib.suppress(OSError):  # nobody may listen
            print(message, file=sys.stderr, flush=True)
        leave(code)

    def _traceback(self, error: BaseException) -> str:
        lines = "".join(traceback.format_exception(error)).splitlines()
        return "\n".join(f"[rank {self.rank}] {line}" for line in lines)


def leave(code: int) -> NoReturn:
    """End now, in order, but without what may wait for other ranks, such as to close a group."""
    atexit.unregister(part)
    limit = threading.Timer(CLEANUP, os._exit, [code])
    limit.daemon = True
    limit.start()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _is_felt(error: BaseException) -> bool:
    """Whether this is what a rank gets to see of another one's end."""
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return of_gloo or isinstance(error, dist.DistError)


def _last_word(line: socket.socket) -> bytes:
    """What comes until the line is closed; nothing if it breaks."""
    try:
        return b"".join(iter(lambda: line.recv(4096), b""))
    except OSError:
        return b""


def _forget() -> None:
    """In a fork, such as a loader's process: its copies would keep a dead rank's lines open."""
    for each in _watches:
        for line in each.lines:
            line.close()
    _watches.clear()


# --- how the lines come to be ---------------------------------------------------------------


def _accept(store: Any, size: int) -> dict[socket.socket, int]:
    """The lines of ranks 1 to size - 1. Who does not know the word that the store has is nobody."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    word, lines = secrets.token_hex(16), {}
    with socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=both) as server:
        server.settimeout(JOIN)
        store.set(LINE, f"{socket.gethostname()} {server.getsockname()[1]} {word}")
        while len(lines) < size - 1:
            try:
                line, _ = server.accept()
            except TimeoutError as error:
                absent = sorted(set(range(1, size)) - set(lines.values()))
                raise UserError(
                    f"rank 0 has waited {JOIN:.0f} s for ranks {absent}, which had come: see what "
                    "they say, and whether they can connect to this machine at any port"
                ) from error
            known, rank = _greeting(line, word)
            if known:
                lines[_keep_alive(line)] = rank
            else:
                line.close()
    return lines


def _greeting(line: socket.socket, word: str) -> tuple[bool, int]:
    """Whether the word was given, and by which rank."""
    line.settimeout(5)
    text, length = b"", len(word) + 8
    with contextlib.suppress(OSError):
        while len(text) < length and (more := line.recv(length - len(text))):
            text += more
    known = len(text) == length and secrets.compare_digest(text[:-8], word.encode())
    return known, int(text[-8:]) if known else -1


def _connect(store: Any, rank: int) -> socket.socket:
    host, port, word = store.get(LINE).decode().split()
    host = getattr(store.underlying_store, "host", host)  # by which this rank has found rank 0
    try:
        line = socket.create_connection((host, int(port)), timeout=JOIN)
    except OSError as error:
        raise UserError(
            f"rank {rank} cannot connect to rank 0 at {host}, port {port} ({error}); processes of "
            "a run need to reach each other at any port"
        ) from error
    line.sendall(f"{word}{rank:8d}".encode())
    return _keep_alive(line)


def _keep_alive(line: socket.socket) -> socket.socket:
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not everywhere
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line
