# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Where the time of a step goes: by the clock of the host, and by events in a CUDA stream."""

import time

import pytest
import torch
from torch import nn

from training.step_clock import PARTS, EventClock, HostClock, StepClock, build_clock
from training.stepper import Stepper


class Time:
    """A clock that moves only when `now` is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def host(monkeypatch):
    host = Time()
    monkeypatch.setattr(time, "perf_counter", host)
    return host


def test_time_between_marks_is_of_the_part_that_ends(host):
    clock = StepClock()
    for part, seconds in (("data", 1.0), ("forward", 2.0), ("rest", 0.5), ("data", 0.5)):
        host.now += seconds
        clock.mark(part)
    host.now += 7.0
    clock.start()  # an evaluation, which belongs to no part
    host.now += 4.0
    clock.mark("backward")
    seconds = clock.read()
    assert seconds == {"data": 1.5, "forward": 2.0, "backward": 4.0, "optimizer": 0.0,
                       "comm": 0.0, "rest": 0.5}  # fmt: skip
    shares = {"time_data": 1.5 / 8, "time_forward": 0.25, "time_backward": 0.5}
    assert clock.shares(seconds) == pytest.approx(shares)  # no part that was never marked


def test_nothing_is_known_before_time_has_passed(host):
    """A share would be a division by zero."""
    clock = StepClock()
    clock.mark("data")
    assert clock.shares(clock.read()) == {}


def test_without_events_only_the_wait_for_data_is_known(host):
    """On MPS the host has long gone on when the forward pass ends."""
    clock = build_clock(torch.device("mps"))
    assert isinstance(clock, HostClock)
    for part in ("data", "forward", "backward", "optimizer"):
        host.now += 1.0
        clock.mark(part)
    assert clock.shares(clock.read()) == {"time_data": 0.25}


class Stream:
    """A device's queue: `queued` is when the work queued so far will end, `now` the time there."""

    now, queued, events = 0.0, 0.0, 0

    def work(self, milliseconds: float) -> None:
        self.queued += milliseconds

    def wait(self) -> None:
        """Let the device run all that is queued."""
        self.now = self.queued

    def make_event(self) -> "Event":
        self.events += 1
        return Event()


class Event:
    """What EventClock needs of torch.cuda.Event; asking for a time that is not known yet fails."""

    def record(self, stream: Stream) -> None:
        self.stream, self.at = stream, stream.queued

    def query(self) -> bool:
        return self.stream.now >= self.at

    def elapsed_time(self, end: "Event") -> float:
        assert self.query()
        assert end.query(), "would fail: the device has not passed the event"
        return end.at - self.at


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def clock(stream) -> EventClock:
    return EventClock(stream.make_event, lambda: stream)


def step(clock: EventClock, stream: Stream, kept_ahead: bool = True) -> None:
    """Queue a step of 1, 2, 4 and 1 ms; the device runs it at once unless the host keeps ahead."""
    for part, work in (("data", 1), ("forward", 2), ("backward", 4), ("optimizer", 1)):
        stream.work(work)
        if not kept_ahead:
            stream.wait()
        clock.mark(part)
    clock.mark("rest")


def test_events_tell_the_time_of_the_device(clock, stream):
    step(clock, stream)
    step(clock, stream)
    stream.wait()  # as reading the meters does
    seconds = clock.read()
    assert seconds == pytest.approx(
        {"data": 2e-3, "forward": 4e-3, "backward": 8e-3, "optimizer": 2e-3, "comm": 0, "rest": 0}
    )
    assert clock.shares(seconds)["time_backward"] == pytest.approx(0.5)


def test_events_that_the_device_has_not_passed_are_left_for_the_next_read(clock, stream):
    """elapsed_time would raise an error, and waiting for them would make the host wait."""
    stream.work(3)
    clock.mark("forward")
    stream.wait()
    stream.work(5)
    clock.mark("backward")
    assert clock.read()["forward"] == pytest.approx(3e-3)
    assert clock.read()["backward"] == 0
    stream.wait()
    assert clock.read()["backward"] == pytest.approx(5e-3)


def test_events_are_used_again(clock, stream):
    """A run would make millions of them."""
    for _ in range(50):
        step(clock, stream)
        stream.wait()
        clock.read()
    assert stream.events <= 7


def test_events_are_read_in_a_run_without_log_lines(clock, stream, monkeypatch):
    """--print_freq 100000: they would fill the memory."""
    monkeypatch.setattr("training.step_clock.MOST_PENDING", 20)
    for _ in range(50):
        step(clock, stream)
        stream.wait()
    assert stream.events <= 30
    assert clock.read()["forward"] == pytest.approx(0.1)


def test_time_outside_of_training_is_left_out(clock, stream):
    step(clock, stream)
    stream.work(1000)  # an evaluation
    stream.wait()
    clock.start()
    stream.work(1)
    clock.mark("data")
    stream.wait()
    assert sum(clock.read().values()) == pytest.approx(9e-3)


def test_events_of_an_epoch_that_was_broken_off_are_dropped(clock, stream):
    """They come before the new start, so their time would be negative."""
    stream.work(3)
    clock.mark("forward")
    stream.work(1000)  # a resume, before the device has run the above
    clock.start()
    stream.work(2)
    clock.mark("data")
    stream.wait()
    seconds = clock.read()
    assert (seconds["forward"], seconds["data"]) == (0, pytest.approx(2e-3))


def test_steps_in_which_the_gpu_runs_out_of_work_are_counted(clock, stream):
    """Once for each step, also where several parts of it count as optimizer."""
    for kept_ahead in (True, False, True, True):
        step(clock, stream, kept_ahead)
        clock.mark("comm")
        clock.mark("optimizer")
    assert clock.caught_up == 1


def test_marks_of_a_step_with_accumulation():
    """And of the time between two micro-batches."""
    layer = nn.Linear(2, 1)
    stepper = Stepper(layer, torch.optim.SGD(layer.parameters(), 0.1), torch.device("cpu"),
                      update_freq=2)  # fmt: skip
    marks: list[str] = []
    stepper.mark = marks.append
    stepper.begin_epoch(2)
    for _ in range(2):
        with stepper.micro_batch():
            loss = layer(torch.ones(1, 2)).mean()
        stepper.step(loss)
    assert marks == ["rest", "forward", "backward", "rest", "forward", "backward", "optimizer"]


@pytest.mark.gpu
def test_events_of_a_gpu_add_up_to_its_time_and_no_mark_waits():
    """With torch's error for operations that make the host wait."""
    device = torch.device("cuda")
    clock, x = build_clock(device), torch.randn(2048, 2048, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before = clock.read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begin.record()
        clock.start()
        for _ in range(5):
            for part in PARTS:
                x = (x @ x).clamp(-1, 1)
                clock.mark(part)
        end.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    total = sum(clock.read().values()) - sum(before.values())
    assert total == pytest.approx(begin.elapsed_time(end) / 1000, rel=0.05)
    assert clock.shares(clock.read()).keys() == {f"time_{part}" for part in PARTS}
