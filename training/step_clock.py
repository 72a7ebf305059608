# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Where the time of training steps goes, measured without making the host wait for the device.

python -c "from training.step_clock import StepClock; help(StepClock)"
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "optimizer", "comm")
REST = "rest"  # meters, EMA, hooks, log lines, checkpoints
NAMES = (*PARTS, REST)
MOST_PENDING = 4096  # events that wait to be read, before the finished ones are


class StepClock:
    """Sums the seconds of the parts of a step, by the clock of the host.

        clock.start()
        ...                        # wait for a batch
        clock.mark("data")         # what lies between two marks belongs to the second one's part
        ...                        # forward pass
        clock.mark("forward")
        clock.read()               # {"data": 1.5, "forward": 2.5, ...}, the sums since `start`

    It fits a CPU, where an operation has ended when its call returns. measures: the parts whose
    seconds are right; marked: those that have been marked.
    """

    measures = PARTS

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self.marked: set[str] = set()
        self.caught_up: int | None = None  # steps, see EventClock; None: not known
        self.start()

    def start(self) -> None:
        """Leave out the time since the last mark."""
        self.last = time.perf_counter()

    def mark(self, part: str) -> None:
        """Add the time since the last mark to a part, one of NAMES."""
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now
        self.marked.add(part)

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the clock was made."""
        return dict(self.seconds)

    def shares(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return `time_data` and so on, the fractions of the time, for the parts that are known.

        A process alone has no communication. Nothing is known if no time has passed.
        """
        total = sum(seconds.values())
        known = [part for part in self.measures if part in self.marked and total > 0]
        return {f"time_{part}": seconds[part] / total for part in known}


class HostClock(StepClock):
    """The same for a device that computes while the host runs ahead, and has no events to record.

    Only the wait for data is known: the host waits for it too.
    """

    measures = ("data",)


class EventClock(StepClock):
    """The same on the time line of a CUDA stream, by events that are recorded in it.

    `mark` records an event and waits for nothing. `read` adds up those that the device has passed
    by now, which after reading a value of the device are all of them.
    `caught_up` counts the optimizer steps in which the device had run all of the backward pass when
    the host had queued the work that follows it: it had no other work left.

    make: returns an event with `record(stream)`, `query` and `elapsed_time` (milliseconds), as
    torch.cuda.Event(enable_timing=True). stream: returns the stream. Events are used again once
    they are read.
    """

    def __init__(self, make: Callable[[], Any], stream: Callable[[], Any]) -> None:
        self.make, self.stream, self.free = make, stream, []
        self.pending: deque[tuple[str, Any]] = deque()
        super().__init__()
        self.caught_up = 0

    def _record(self) -> Any:
        event = self.free.pop() if self.free else self.make()
        event.record(self.stream())
        return event

    def start(self) -> None:
        self.read()
        self.pending.clear()  # of an epoch that was broken off
        self.last, self.backward = self._record(), None

    def mark(self, part: str) -> None:
        if part == "optimizer" and self.backward is not None:
            self.caught_up += self.backward.query()
            self.backward = None
        event = self._record()
        self.pending.append((part, event))
        self.marked.add(part)
        if part == "backward":
            self.backward = event
        elif part == REST and len(self.pending) > MOST_PENDING:
            self.read()

    def read(self) -> dict[str, float]:
        while self.pending and self.pending[0][1].query():
            part, event = self.pending.popleft()
            self.seconds[part] += self.last.elapsed_time(event) / 1000
            self.free.append(self.last)
            self.last = event
        return super().read()


def build_clock(device: torch.device) -> StepClock:
    """Return the clock for the steps of a device."""
    if device.type == "cpu":
        return StepClock()
    if device.type == "cuda":
        make = partial(torch.cuda.Event, enable_timing=True)
        return EventClock(make, partial(torch.cuda.current_stream, device))
    return HostClock()


def no_mark(part: str) -> None:
    """Stand in for `StepClock.mark` where nothing is measured."""
