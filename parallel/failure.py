# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""An error of one rank ends all ranks of a run, and each prints the reason.

torchrun --nproc_per_node=2 main_pretrain.py --data_set DIGITS --device cpu --batch_size 9999
"""

import atexit
import contextlib
import os
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from parallel.console import note

# Keys in the store: the first error as "<exit code> rank <number> has failed: <reason>", the number
# of ranks that have printed it or are done, and the number of ranks that no longer use the store.
FAILED, PRINTED, DONE = "failed", "printed", "done"
POLL_S = 1.0  # interval between checks of the store
GRACE_S = 3.0  # time for a rank to end with its own error, since all may fail alike
LOST_S = 30.0  # time to wait for ranks that may be killed, done or hanging
CLEANUP_S = 10.0  # time for exit functions, which release the run folder and end loader workers
STORE_LOST = "1 rank 0 is gone: killed, out of memory, or its machine lost"


class Watch:
    """A thread that ends this rank when another one fails; `fail` ends the others.

    store: the store of all ranks, used under `name`. Without a watch, ranks wait for a failed one
    in the next collective, with nccl until its timeout; torchrun only ends those of its machine.
    """

    def __init__(self, store: Any, name: str, rank: int, size: int) -> None:
        self.store, self.rank, self.size = _own_client(store, name), rank, size
        self.over, self.ending = threading.Event(), threading.Lock()
        threading.Thread(target=self._poll, daemon=True).start()

    def fail(self, code: int, message: str, error: BaseException) -> NoReturn:
        """End all ranks. Print `message`, or the traceback if it is '', of an error of this rank.

        If another rank failed first, its error is printed before `message` and instead of a
        traceback, which may be a consequence. If both have the same message, the first one and
        rank 0 print it, since people read the output of rank 0.
        """
        self._stop_polling()
        kind = "" if message else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:1000]
        first = own = f"{code} rank {self.rank} has failed: {reason}"
        with contextlib.suppress(RuntimeError):  # rank 0 and its store are gone
            first = self.store.compare_set(FAILED, "", own).decode()
        same = bool(message) and first.endswith(f" has failed: {reason}")
        first_code = code if first == own or same else self._print_error(first)
        if first == own or (message and (self.rank == 0 or not same)):
            lines = "".join(traceback.format_exception(error)).rstrip()
            text = message or textwrap.indent(lines, f"[rank {self.rank}] ")
            note(text)
            print(text, file=sys.stderr, flush=True)
        self._end(code if message else first_code)

    def leave(self) -> None:
        """Mark this rank as done; rank 0, which may serve the store, waits for the others."""
        self._stop_polling()
        self._count(PRINTED, wait=False)
        self._count(DONE, wait=self.rank == 0)

    def _stop_polling(self) -> None:
        self.over.set()
        self.ending.acquire()  # and keep it: the thread may be about to end this process

    def _end(self, code: int) -> NoReturn:
        """End after all ranks have printed the error: launchers kill them when the first ends."""
        if self._count(PRINTED, wait=True):
            self._count(DONE, wait=self.rank == 0)
        exit_now(code)

    def _count(self, key: str, wait: bool) -> bool:
        """Count this rank at `key`; wait until all are counted, False if some are not in time."""
        deadline = time.monotonic() + LOST_S
        with contextlib.suppress(RuntimeError):
            count = self.store.add(key, 1)
            while wait and count < self.size:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05 if self.rank == 0 else POLL_S / 4)
                count = self.store.add(key, 0)
            return True
        return False

    def _poll(self) -> None:
        while not self.over.wait(POLL_S):
            try:
                if not self.store.check([FAILED]):
                    continue
                first, grace = self.store.get(FAILED).decode(), GRACE_S
            except RuntimeError:
                first, grace = STORE_LOST, LOST_S
            if not self.over.wait(grace) and self.ending.acquire(blocking=False):
                self._end(self._print_error(first))

    def _print_error(self, first: str) -> int:
        """Print the error of another rank; returns its exit code."""
        code, _, reason = first.partition(" ")
        line = f"{Path(sys.argv[0]).name}: error [rank {self.rank}]: {reason}"
        note(line)
        with contextlib.suppress(OSError):  # stderr may be closed
            print(line, file=sys.stderr, flush=True)
        return int(code)


def _own_client(store: Any, name: str) -> Any:
    """Return another connection to the store, since the main thread may block the first one."""
    import torch.distributed as dist  # slurm.py imports this module, and submits without torch

    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        store = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"watch of {name}", store)


def exit_now(code: int) -> NoReturn:
    """Run the exit functions and end without Python's shutdown.

    The shutdown may wait for other ranks to close the process group, or for gloo's thread to free a
    tensor while that thread waits for the GIL.
    """
    limit = threading.Timer(CLEANUP_S, os._exit, [code])
    limit.daemon = True
    limit.start()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
