# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A run's engine on chosen batches, and the memory that takes, for dry runs.

python -c "import torch; from training import trial; print(trial.memory(torch.device('cpu')))"
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

from datasets import Batches, collate
from errors import TrainingStopped, UserError
from parallel.process_group import get_world_size as processes
from training import hooks
from training.anomaly import Guard
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.stepper import Stepper

ENDLESS = 1 << 40  # updates to the next log line
PERIOD = 0.002  # seconds between two looks at the memory of this process
NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in errors of no own type
GROUPS, CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
LIMIT_FILES = (  # limit, used, and what of that is cached, of both versions of control groups
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
LOCAL_SIZES += ("OMPI_COMM_WORLD_LOCAL_SIZE",)


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
        self.watchers = {"keeper": CheckpointManager(None), "guard": self.guard}
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
            if isinstance(error, TrainingStopped) or "deterministic" not in str(error):
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
            known = known or any(text in str(error) for text in NO_MEMORY)
            if processes() > 1 or not known:
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
        self.watchers["keeper"].vote.wait()
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
    return resident(), int(free // local_processes())


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def local_processes() -> int:
    """How many of the run's processes share this machine's memory, as far as its launcher says."""
    for name in LOCAL_SIZES:
        found = re.match(r"\d+", os.environ.get(name, ""))  # SLURM's are 4(x2),3 by machine
        if found:
            return max(1, min(int(found[0]), processes()))
    return 1


def free_in_group() -> float:
    """What the control groups of a container or job leave; infinite without a limit.

    A limit may lie on any group above this process's, and the tightest counts.
    """
    free = [float("inf")]
    with suppress(OSError):
        for kinds, path in re.findall(r"^\d+:(.*?):/(.*)$", GROUPS.read_text(), re.MULTILINE):
            kind = "memory" if "memory" in kinds.split(",") else ""  # version 1 has trees by kind
            if kinds and not kind:
                continue
            group = CGROUP / kind / path
            free += [_left(place) for place in (group, *group.parents) if CGROUP in place.parents]
            free.append(_left(CGROUP / kind))
    return max(0.0, min(free))


def _left(group: Path) -> float:
    """Of one group's limit. Pages of files count as used, but are given back when asked for."""
    for limit, used, cached in LIMIT_FILES:
        with suppress(OSError, ValueError):  # "max", or none of this version
            found = re.search(rf"^{cached} (\d+)", (group / "memory.stat").read_text(), re.M)
            free = int((group / limit).read_text()) - int((group / used).read_text())
            return free + (int(found[1]) if found else 0)
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
