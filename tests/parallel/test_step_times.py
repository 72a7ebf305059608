# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Times of a step on several ranks: what counts as communication, and means over all ranks."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.sharding import Parallelism
from tests.groups import results_of, run_ranks
from training.speed import Speed
from training.stepper import Stepper

CPU = torch.device("cpu")
SECONDS = 30.0  # of a rank that waits in vain


def wait_for(path: Path) -> None:
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.01)


def make_stepper(update_freq: int = 1) -> Stepper:
    torch.manual_seed(0)
    net = Parallelism("ddp", CPU).wrap(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return Stepper(net, optimizer, CPU, update_freq=update_freq)


def step(stepper: Stepper, x: torch.Tensor) -> None:
    with stepper.micro_batch():
        loss = stepper.model(x).mean()
    stepper.step(loss)


def ranks_wait(rank: int, folder: Path) -> list:
    """Rank 1 begins its backward pass once rank 0 has marked the end of its own.

    If the mark came after the wait for rank 1, both would wait for each other.
    """
    stepper, marked, found = make_stepper(), folder / "marked", []

    def mark(part: str) -> None:
        if part == "backward" and rank == 0:
            found.append([p.grad is not None for p in stepper.model.parameters()])
            marked.touch()
        found.append(part)

    stepper.mark = mark
    stepper.begin_epoch(1)
    with stepper.micro_batch():
        loss = stepper.model(torch.full((2, 3), rank + 1.0)).mean()
    if rank == 1:
        wait_for(marked)
    stepper.step(loss)
    return found


def ranks_accumulate(rank: int, folder: Path) -> list:
    """Only the last micro-batch of a step communicates."""
    stepper, found = make_stepper(update_freq=2), []
    stepper.mark = found.append
    stepper.begin_epoch(2)
    for _ in range(2):
        step(stepper, torch.ones(2, 3))
    return found


def ranks_average(rank: int, folder: Path) -> dict:
    """Rank 0 waits for data for 1 s of 4, rank 1 for 3."""
    speed = Speed(CPU)
    speed.begin_phase()
    speed.clock.seconds |= {"data": 1.0 + 2 * rank, "forward": 3.0 - 2 * rank}
    speed.clock.marked |= {"data", "forward"}
    return {name: value for name, value in speed.line(0).items() if name != "images_per_s"}


def ranks_train_the_same(rank: int, folder: Path) -> dict:
    """Weights after steps with and without marks."""
    found = {}
    for marks in (True, False):
        stepper = make_stepper()
        if marks:
            Speed(CPU).watch(stepper)
        else:
            stepper.communicates = False  # no call before the gradients are averaged
        stepper.begin_epoch(3)
        for number in range(3):
            step(stepper, torch.full((2, 3), number + 1.0 + rank))
        found[str(marks)] = [p.detach().clone() for p in stepper.model.parameters()]
    dist.barrier()
    return found


JOBS = (ranks_wait, ranks_accumulate, ranks_average, ranks_train_the_same)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(run_ranks(JOBS, 2, tmp_path_factory.mktemp("ranks")))


def test_communication_is_what_backward_does_not_hide(results):
    """From the last gradient of this process to the averages, and the check of the loss."""
    first, second = (found["ranks_wait"] for found in results)
    parts = ["rest", "forward", "backward", "comm", "optimizer", "comm", "optimizer"]
    assert second == parts
    gradients = first.pop(2)  # when backward was marked
    assert first == parts
    assert all(gradients)


def test_micro_batches_that_send_nothing_have_no_communication(results):
    for found in (each["ranks_accumulate"] for each in results):
        assert found[:3] == ["rest", "forward", "backward"]
        assert found[3:] == [
            "rest",
            "forward",
            "backward",
            "comm",
            "optimizer",
            "comm",
            "optimizer",
        ]


def test_shares_are_means_over_all_ranks(results):
    for found in (each["ranks_average"] for each in results):
        assert found == {"time_data": 0.5, "time_forward": 0.5}


def test_marks_change_no_bit(results):
    for found in (each["ranks_train_the_same"] for each in results):
        for ours, plain in zip(found["True"], found["False"], strict=True):
            assert torch.equal(ours, plain)
