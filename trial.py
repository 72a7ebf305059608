# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A run's engine on chosen batches, and the memory that takes, for dry runs.

python -c "import torch, trial; print(trial.memory(torch.device('cpu')))"
"""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hooks
from datasets import Batches, collate
from errors import UserError
from guard import Guard
from keeper import Keeper
from stepper import Stepper
from utils import TrainState
from utils import get_world_size as processes

ENDLESS = 1 << 40  # updates to the next log line
PERIOD = 0.002  # seconds between two looks at the memory of this process
CGROUP = Path("/sys/fs/cgroup")


class Repeated:
    """A batch so many times, as `Batches` would give them."""

    wait_seconds = 0.0

    def __init__(self, batch: tuple[Tensor, ...], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(self.times):
            yield tuple(part.clone() for part in self.batch)  # mixup works in place


class Trial:
    """The engine's epochs on chosen batches, with no hook and no checkpoint."""

    def __init__(
        self,
        train_epoch: Callable[..., dict],
        stepper: Stepper,
        batches: Batches,
        samples: list[tuple],
    ) -> None:
        self.train_epoch, self.stepper, self.batches = train_epoch, stepper, batches
        self.device = stepper.device
        self.samples = collate(samples)[:3]  # images, labels, ids
        self.guard = Guard(stepper)  # counts only
        self.watchers = {"keeper": Keeper(None), "guard": self.guard}
        self.skipped = 0  # updates that were not finite

    def batch(self, size: int) -> tuple[Tensor, ...]:
        """Of so many images on the device, the same again and again if there are fewer."""
        rows = torch.arange(size) % len(self.samples[0])
        images, labels, ids = (part[rows].to(self.device) for part in self.samples)
        return self.batches.normalise(images), labels, ids

    def run(self, batches: Any) -> float:
        """Train on all of them; returns the seconds."""
        state = TrainState()
        reporter = hooks.Reporter([], self.device, state, ENDLESS, ENDLESS, ENDLESS)
        began = time.perf_counter()
        try:
            self.train_epoch(batches=batches, state=state, reporter=reporter, **self.watchers)
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise UserError(f"--deterministic: {str(error).partition('.')[0]}") from error
        self.guard.look(state)
        self.skipped += state.bad_steps
        return time.perf_counter() - began

    def step(self, size: int, times: int = 1) -> float:
        """So many micro-batches of a size."""
        return self.run(Repeated(self.batch(size), times))

    def fits(self, size: int) -> bool:
        """Whether a step has memory enough."""
        try:
            self.step(size, min(2, self.stepper.update_freq))
        except (RuntimeError, MemoryError) as error:  # torch on a CPU has no type for it
            known = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if processes() > 1 or not (known or "can't allocate memory" in str(error)):
                raise  # other processes would wait for this one
        else:
            return True
        self.stepper.optimizer.zero_grad(set_to_none=True)
        with suppress(AssertionError):  # of a scaler that has not unscaled yet
            self.stepper.scaler.update()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def end(self) -> str:
        """Nothing is left under way between the processes; what went wrong in updates."""
        self.watchers["keeper"].agreement.wait()
        if not self.skipped or self.stepper.scaler.is_enabled():  # fp16 looks for its scale
            return ""
        return f"{self.skipped} updates had a loss or gradient that is not finite"


# --- memory and sizes ----------------------------------------------------------------------------


def memory(device: torch.device) -> tuple[int, int] | None:
    """(used by this process, free for it) in bytes; None where there is no way to know."""
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - used
        return used, torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu" or not Path("/proc/self/statm").exists():
        return None
    found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    free = min(int(found[1]) * 1024 if found else 0, free_in_group())
    return resident(), free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_in_group() -> float:
    """What the control group of a container or job leaves; infinite without a limit.

    Pages of files count as used there, but are given back when memory is asked for.
    """
    with suppress(OSError):
        paths = re.findall(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        for group in (CGROUP / paths[0] if paths else CGROUP, CGROUP):
            if (group / "memory.max").exists():
                limit = (group / "memory.max").read_text().strip()
                if limit == "max":
                    continue
                used = int((group / "memory.current").read_text())
                cached = re.search(
                    r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M
                )
                return int(limit) - used + (int(cached[1]) if cached else 0)
    return float("inf")


def peak_of(device: torch.device, work: Callable[[], Any]) -> int:
    """Most bytes in use while `work` goes on: of torch's tensors on CUDA, else of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    seen, over = [resident()], threading.Event()

    def watch() -> None:
        while not over.wait(PERIOD):
            seen.append(resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return max(seen)


def largest_that_fits(fits: Callable[[int], bool], asked: int, most: int, unit: int = 1) -> int:
    """The largest multiple of `unit` up to `most` that fits, to a sixteenth; 0 for none.

    Doubled or halved from `asked` until both sides are known, then bisected.
    """
    most = most // unit * unit
    low, high, size = 0, most + unit, min(asked, most)  # low fits, high does not
    while low < size < high and (low == 0 or high > most):
        if fits(size):
            low, size = size, min(2 * size, most)
        else:
            high, size = size, size // 2 // unit * unit
    while high - low > max(unit, low // 16):
        middle = max((low + high) // 2 // unit, low // unit + 1) * unit
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def readable(size: float) -> str:
    """1536 -> 1.5 KiB"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class Counter(io.RawIOBase):
    """A file that only counts its bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """As any file's."""
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes


def size_of(content: Any) -> int:
    """Bytes that torch.save makes of it."""
    file = Counter()
    torch.save(content, file)
    return file.bytes
