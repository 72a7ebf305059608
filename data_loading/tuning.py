# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The number of loader processes, and of batches ahead, found by measurement.

python -c "from data_loading.tuning import *; print(choose(Plan(2), Use(9, 4, 17), most=8))"
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from config.flags import CORES
from errors import plural
from parallel.environment import local_world_size
from parallel.process_group import get_logger

FIRST = 10  # processes to begin with, at most
DEEPEST = 8  # batches that a process prepares ahead, at most
LATE = 0.03  # share of the time without a batch from which on it is worth a change
BUSY = 0.8  # share of their time that processes work if they are too few
SPARE = 1.25  # of the processes that would just keep up
SECONDS = (10.0, 300.0)  # of the first and of the longest measurement
SHARED_MEMORY = Path("/dev/shm")  # holds batches of loader processes on Linux; Docker: 64 MB
BATCHES = 20  # of a measurement, at least


@dataclass(frozen=True)
class Plan:
    """The processes of a loader, and the batches that each of them prepares ahead."""

    workers: int
    ahead: int = 2  # as DataLoader's prefetch_factor

    @property
    def held(self) -> int:
        """Batches in memory, with the one in use."""
        return self.workers * self.ahead + 1


@dataclass(frozen=True)
class Use:
    """Seconds of a measurement, those without a batch, and those of work of all processes."""

    seconds: float = 0.0
    waited: float = 0.0
    worked: float = 0.0

    def __add__(self, other: "Use") -> "Use":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Use(*(one + two for one, two in pairs))


def most_workers() -> int:
    """Return the CPU cores of a process; those of torchrun on a machine share its cores."""
    return max(1, CORES // processes_here())


def processes_here() -> int:
    """Return the processes of torchrun on this machine; other launchers give each its own cores."""
    return local_world_size(1)


def first_workers() -> int:
    """Return the number of processes to begin with."""
    return min(FIRST, most_workers())


def free_shared_memory() -> float:
    """Return the bytes that a process may add to what it holds there."""
    if not SHARED_MEMORY.is_dir():  # other systems have another kind of it
        return math.inf
    return shutil.disk_usage(SHARED_MEMORY).free / 2 / processes_here()


def choose(plan: Plan, use: Use, most: int, may_lower: bool = True) -> Plan:
    """Return the plan for the rest of a run that was measured with `plan`.

    Batches that came late need more processes, up to `most`, if all of them are busy, and otherwise
    more batches ahead. Where half of the processes would do, they are fewer.
    """
    training = max(use.seconds - use.waited, 1e-9)
    enough = max(1, math.ceil(SPARE * use.worked / training))
    if use.waited > LATE * use.seconds:
        if use.worked > BUSY * use.seconds * plan.workers:
            return replace(plan, workers=min(most, max(enough, plan.workers + 1)))
        return replace(plan, ahead=min(DEEPEST, 2 * plan.ahead))
    lower = may_lower and plan.workers >= 2 * enough
    return replace(plan, workers=enough) if lower else plan


class Tuner:
    """Measures a loader while it is used, and says when another plan is better.

    The first measurement, with slow first steps, never lowers the number of processes. Samples and
    their order do not depend on the plan, only the time.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most, self.clock = most, clock
        self.span, self.is_first = SECONDS[0], True
        self._restart()

    def _restart(self) -> None:
        self.use, self.batches = Use(), 0

    def begin(self, worked: float) -> None:
        """Note that the first batch of an iteration has arrived.

        worked: as for `after_batch`, before the iteration.
        """
        self.last = self.clock(), worked

    def after_batch(self, plan: Plan, waited: float, worked: float, size: int) -> Plan:
        """Return the plan for the next batches, when one is used up and the next has arrived.

        waited: seconds without a batch; worked: of all processes since they started; size: bytes of
        a batch.
        """
        now = self.clock()
        self.use += Use(now - self.last[0], waited, worked - self.last[1])
        self.last, self.batches = (now, worked), self.batches + 1
        if self.use.seconds < self.span or self.batches < BATCHES:
            return plan
        found = choose(plan, self.use, self.most, may_lower=not self.is_first)
        if (found.held - plan.held) * size > free_shared_memory():
            found = plan
        if found != plan:
            get_logger().info("%s", describe(plan, found, self.use))
        self.span, self.is_first = min(2 * self.span, SECONDS[1]), False
        self._restart()
        return found


def describe(old: Plan, new: Plan, use: Use) -> str:
    """Return a line for the log about a change."""
    late = f"batches came late in {use.waited / use.seconds:.0%} of the time"
    if new.ahead != old.ahead:
        return f"loader: {new.ahead} batches ahead per process instead of {old.ahead}: {late}"
    reason = late if new.workers > old.workers else "as many as the training needs"
    return f"loader: {plural(new.workers, 'process')} instead of {old.workers}: {reason}"
