# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Advice on what limits the speed of a run: the loader, the batch, the host or communication.

python -c "from training.advice import *; print(advise(Load({'data': 6, 'forward': 4}, 90), Use()))"
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

# From these shares on it is worth a sentence:
WAITS_FOR_DATA = 0.2  # of the time
COMMUNICATES = 0.25  # of the time
HOST_IS_LATE = 0.5  # of the steps
FREE_MEMORY = 0.5  # of the GPU

SKIPPED = 20  # steps at the start, which compile and choose kernels
STEPS, SECONDS = 50, 20.0  # that a piece of advice is based on, at least


@dataclass(frozen=True)
class Load:
    """Time and memory of some optimizer steps.

    seconds: of each part, as StepClock has them. caught_up: steps at whose end the GPU had nothing
    left to do; None where that is not known. memory: fraction of the GPU's that is used; None on
    other devices.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    caught_up: int | None = None
    memory: float | None = None

    def __add__(self, other: "Load") -> "Load":
        seconds = Counter(self.seconds)
        seconds.update(other.seconds)
        caught_up = None
        if other.caught_up is not None:
            caught_up = (self.caught_up or 0) + other.caught_up
        return Load(seconds, self.steps + other.steps, caught_up, other.memory)

    def share(self, part: str) -> float:
        """Return the fraction of the time that a part took."""
        return self.seconds.get(part, 0.0) / max(sum(self.seconds.values()), 1e-9)


@dataclass(frozen=True)
class Use:
    """Flags of a run that advice depends on.

    num_workers: None if it is measured. files: the images are files, in folders or others.
    """

    batch_size: int = 64
    update_freq: int = 1
    num_workers: int | None = None
    cores: int = 1  # of this process
    files: bool = True
    decode: str = "exact"
    ram_cache: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    grad_compression: str = "none"


def advise(load: Load, use: Use) -> tuple[str, str] | None:
    """Return (what limits the speed, a sentence on it and what to do), None if nothing is clear."""
    if load.share("data") >= WAITS_FOR_DATA:
        return "loader", _about_loader(load, use)
    late = load.caught_up is not None and load.caught_up >= HOST_IS_LATE * max(load.steps, 1)
    has_memory = load.memory is not None and load.memory < FREE_MEMORY
    if late and has_memory:
        return "batch", _about_batch(load, use)
    if late:
        return "host", _about_host(load, use)
    if has_memory and use.update_freq > 1:
        return "batch", (
            f"the batch is small: a step has {use.update_freq} forward passes, and "
            f"{1 - load.memory:.0%} of the GPU memory is free; raise --batch_size, now "
            f"{use.batch_size}, and lower --update_freq as much, or give --effective_batch"
        )
    if load.share("comm") >= COMMUNICATES:
        return "communication", _about_communication(load, use)
    return None


def _about_loader(load: Load, use: Use) -> str:
    text = f"the loader is the limit: steps wait for data in {load.share('data'):.0%} of the time; "
    if use.num_workers is not None and use.num_workers < use.cores:
        return text + (
            f"drop --num_workers {use.num_workers}, and the number of loader processes is measured "
            f"(a process has {use.cores} CPU cores here)"
        )
    if not use.files:
        return f"{text}try more CPU cores or less augmentation"
    more = ["--decode fast"] * (use.decode == "exact") + ["--ram_cache"] * (not use.ram_cache)
    return f"{text}try {', '.join([*more, 'smaller images (pack.py --size)'])} or more CPU cores"


def _late(load: Load) -> str:
    return f"at the end of {load.caught_up / load.steps:.0%} of the steps the GPU had no work left"


def _about_batch(load: Load, use: Use) -> str:
    return (
        f"the batch is too small for the GPU: {_late(load)}, and {1 - load.memory:.0%} of its "
        f"memory is free; raise --batch_size, now {use.batch_size}"
    )


def _about_host(load: Load, use: Use) -> str:
    text = f"the host is the limit: {_late(load)}, since Python launches kernels too slowly; "
    flags = ["--cuda_graphs"] * (use.update_freq == 1) + ["--compile"]
    flags = [flag for flag in flags if not getattr(use, flag[2:])]
    return text + (f"try {' or '.join(flags)}" if flags else "try fewer hooks, or a faster CPU")


def _about_communication(load: Load, use: Use) -> str:
    flags = ["--grad_compression bf16"] * (use.grad_compression == "none")
    flags += ["a larger --batch_size", "--update_freq 2 or more"]
    return (
        "communication is the limit: steps wait for gradients of other processes in "
        f"{load.share('comm'):.0%} of the time; try {' or '.join(flags)}; perhaps one process is "
        "slower than the others"
    )


class Adviser:
    """Collects what log lines measure, and gives each piece of advice once."""

    def __init__(self, use: Use) -> None:
        self.use, self.load = use, Load()
        self.skipped, self.given = 0, set()

    def after_line(self, load: Load) -> str:
        """Return a sentence if by now one is well founded and new, else ''."""
        if self.skipped < SKIPPED:
            self.skipped += load.steps
            return ""
        self.load += load
        if self.load.steps < STEPS or sum(self.load.seconds.values()) < SECONDS:
            return ""
        found, self.load = advise(self.load, self.use), Load()
        if found is None or found[0] in self.given:
            return ""
        self.given.add(found[0])
        return found[1]
