# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Hooks and a tracker as a user may bring them: --hook tests.fakes:Counter(start=3) and so on."""

import logging
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from errors import TrainingStopped
from parallel.process_group import get_logger
from training import run_lock
from training.hooks import Hook, Run

CALLS: list[tuple] = []  # of the tracker, in order


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect the lines that a script run in this process logs, then release its folder."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    get_logger().addHandler(handler)
    try:
        yield messages
    finally:
        get_logger().removeHandler(handler)
        run_lock.acquire_run_lock("")


class Counter(Hook):
    """Notes the points, and counts steps over resumed runs."""

    def __init__(self, start: int = 0) -> None:
        self.steps, self.points, self.batches = start, [], []

    def on_start(self, run: Run) -> None:
        self.points.append(f"start at {self.steps}")

    def on_phase_start(self, run: Run) -> None:
        self.points.append(f"{run.phase}{run.split}")

    def on_step(self, run: Run) -> None:
        self.steps += run.phase == "train"
        self.points.append("step")
        self.batches.append(run.last_batch)

    def on_phase_end(self, run: Run) -> None:
        self.points.append(f"{run.phase}{run.split} loss {run.scalars['loss']:g}")

    def on_end(self, run: Run) -> None:
        self.points.append(f"complete {run.is_complete}")

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]


class Weights(Hook):
    """Notes the weights of the head at the start, and in each phase."""

    def note(self, run: Run) -> None:
        CALLS.append((run.phase, run.split, run.model.head.weight.tolist()))

    on_start = on_phase_start = note


class Disturbing(Hook):
    """Draws random numbers and sets seeds at every point."""

    def disturb(self, *_: object) -> None:
        torch.manual_seed(torch.randint(100, ()).item())
        np.random.seed(np.random.randint(100))
        random.seed(random.random())

    on_start = on_phase_start = on_step = on_phase_end = on_log = on_epoch = on_save = disturb


class Failing(Hook):
    """Fails at one point."""

    def __init__(self, point: str, kind: str = "ZeroDivisionError", every_rank: bool = False):
        self.point, self.kind, self.every_rank = point, kind, every_rank

    def __getattribute__(self, name: str):
        if name.startswith("on_") and name == self.point:
            return self.fail
        return super().__getattribute__(name)

    def fail(self, *_: object) -> None:
        import errors

        raise getattr(errors, self.kind, ZeroDivisionError)("of a hook")


class NoHook:
    """Is not a hook."""


def number(value: int = 3) -> int:
    """Return no hook."""
    return value


def counter(start: int) -> Counter:
    """Return a hook."""
    return Counter(start)


class FakeRun:
    """The tracker's run."""

    name = "own name"
    id = "id7"

    def log(self, values: dict, step: int) -> None:
        CALLS.append(("log", values, step))

    def finish(self) -> None:
        CALLS.append(("finish",))


class FakeTracker:
    """A tracker whose init has no tags, as that of trackio."""

    def init(self, project, name=None, id=None, config=None, resume="never", mode="online"):
        values = {"project": project, "name": name, "id": id, "resume": resume, "mode": mode}
        CALLS.append(("init", values, config))
        return FakeRun()

    def Image(self, pixels):
        return "image", pixels.shape, pixels.max()


def tracker() -> FakeTracker:
    """Return a tracker."""
    return FakeTracker()


class Dies(Hook):
    """Ends the process after so many steps: by SIGKILL, or by an error."""

    def __init__(self, step: int, error: str = "") -> None:
        self.step, self.error = step, error

    def on_step(self, run: Run) -> None:
        if run.phase == "train" and run.state.global_step == self.step:
            if self.error:
                raise TrainingStopped(self.error)
            os.kill(os.getpid(), signal.SIGKILL)
