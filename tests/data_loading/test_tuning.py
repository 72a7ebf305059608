# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The number of loader processes that is found by measurement."""

import gc
import itertools
import logging
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data._utils import pin_memory

import datasets
from config.parser import finetune_parser, parse
from data_loading import tuning
from data_loading.samplers import TrainSampler
from data_loading.tuning import Plan, Tuner, Use, choose
from data_loading.workers import WatchedLoader
from errors import TrainingStopped

BATCH, COUNT = 4, 40


@pytest.mark.parametrize(
    ("plan", "use", "expected"),
    [
        # A step of 1 s needs 6 s of work: 8 processes, a quarter more than would just do.
        (Plan(2), Use(300, 200, 590), Plan(8)),
        (Plan(2), Use(300, 299, 590), Plan(16)),  # as many as there are cores
        (Plan(2), Use(100, 10, 190), Plan(3)),  # at least one more
        (Plan(16), Use(100, 50, 1590), Plan(16)),
        (Plan(4), Use(100, 10, 200), Plan(4, 4)),  # they idle: a burst of steps or a stalled disk
        (Plan(4, 8), Use(100, 10, 200), Plan(4, 8)),
        (Plan(10), Use(100, 0, 150), Plan(2)),
        (Plan(3), Use(100, 1, 150), Plan(3)),  # near enough
        (Plan(2), Use(100, 0, 0.1), Plan(1)),  # never 0: a process can be watched
    ],
)
def test_choose_follows_what_was_measured(plan, use, expected):
    assert choose(plan, use, most=16) == expected


def test_first_measurement_with_slow_first_steps_lowers_nothing():
    times = iter(range(0, 10_000, 10))
    tuner, plan, found = Tuner(8, clock=lambda: next(times)), Plan(8), []
    for batch in range(1 + 3 * tuning.BATCHES):
        if batch == 0:
            tuner.begin(0.0)
        else:
            found.append(tuner.after_batch(plan, 0.0, float(batch), size=1))
    changes = [number for number, each in enumerate(found) if each != plan]
    assert changes[0] == 2 * tuning.BATCHES - 1


def test_full_shared_memory_keeps_the_plan(monkeypatch):
    """More batches than fit would end the run with a bus error."""
    free = 2 * (Plan(4, 4).held - Plan(4).held) * 10
    monkeypatch.setattr(tuning.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr(tuning, "BATCHES", 1)
    for size, expected in ((10, Plan(4, 4)), (11, Plan(4))):
        tuner = Tuner(4, clock=iter([0.0, 100.0]).__next__)
        tuner.begin(0.0)
        assert tuner.after_batch(Plan(4), 50.0, 40.0, size) == expected


class Numbers:
    """Keys as samples."""

    def __getitem__(self, key):
        return torch.tensor(key)


class Scripted:
    """A tuner that changes the plan after some batches, as far as the loader can see."""

    def __init__(self, plans):
        self.plans, self.seen = plans, 0

    def begin(self, worked):
        pass

    def after_batch(self, plan, waited, worked, size):
        self.seen += 1
        assert worked > 0
        return self.plans.get(self.seen, plan)


def make_loader(workers, rank=0, ranks=1, data=None, **options):
    sampler = TrainSampler(COUNT, 3, rank, ranks)
    data = Numbers() if data is None else data
    return WatchedLoader(
        data, sampler, BATCH, workers, drop_last=True, collate_fn=torch.stack, **options
    )


def read(loader, epoch, start=0):
    loader.set_epoch(epoch, start)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("start", [0, 8])
def test_samples_and_their_order_do_not_depend_on_changes_of_the_plan(start):
    for rank in range(2):
        expected, loader = make_loader(0, rank, 2), make_loader(1, rank, 2)
        loader.tuner = Scripted({1: Plan(3), 3: Plan(3, 4), 4: Plan(1), 5: Plan(2), 7: Plan(1)})
        for epoch in range(3):
            whole = read(expected, epoch, start)
            assert read(loader, epoch, start) == whole
            assert len(loader) == len(expected)  # hooks may ask, within an epoch too
        assert [batch.tolist() for batch in loader] == whole  # again, without set_epoch
        assert loader.tuner.seen > 4
        assert loader.shared_memory(10) == loader.plan.held * BATCH * 10


def read_with_changes(count, **options):
    """Read batches while the plan changes `count` times; returns the loader."""
    loader = make_loader(1, **options)
    loader.tuner = Scripted({1 + n: Plan(1 + n % 2, 2 + n % 3) for n in range(count)})
    read(loader, 0)
    return loader


def test_changes_leave_no_file_open():
    counts = []
    for changes in (2, 8):
        loader = read_with_changes(changes)
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
        del loader
    assert counts[1] <= counts[0]


def test_changes_end_the_thread_that_copies_to_page_locked_memory(monkeypatch):
    """A batch of a killed process is cut off, and the thread that receives it would fail."""
    for name, value in (("is_available", True), ("current_accelerator", torch.device("cuda"))):
        monkeypatch.setattr(torch.accelerator, name, lambda *args, value=value: value)
    for name in ("current_device_index", "set_device_index"):
        monkeypatch.setattr(torch.accelerator, name, lambda *args: 0)
    monkeypatch.setattr(pin_memory, "pin_memory", lambda data, device: data)
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    read_with_changes(8, pin_memory=True)
    assert not errors


def test_loader_draws_nothing_from_the_generator_of_the_training():
    before = torch.get_rng_state()
    read_with_changes(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_that_cannot_start_do_not_end_the_run(monkeypatch, caplog):
    """The machine may have a limit of processes that the first ones did not reach."""
    calls, fork = itertools.count(1), os.fork

    def fork_twice():
        if next(calls) == 3:
            raise BlockingIOError("no more processes")
        return fork()

    loader = make_loader(1)
    loader.tuner = Scripted({2: Plan(2)})
    monkeypatch.setattr(os, "fork", fork_twice)
    assert read(loader, 0) == read(make_loader(0), 0)
    assert (loader.plan, loader.tuner) == (Plan(1), None)
    assert caplog.messages == [
        "loader: 2 processes cannot be started: no more processes; it stays at 1"
    ]


LAST = [index for _, index in TrainSampler(COUNT, 3, 0, 1)][-1]


class Deadly(Numbers):
    def __getitem__(self, key):
        if key[1] == LAST:
            os._exit(9)
        return super().__getitem__(key)

    def name_of(self, index):
        return f"image {index}"


def test_workers_of_a_new_plan_are_watched_too():
    loader = make_loader(1, data=Deadly())
    loader.tuner = Scripted({1: Plan(2)})
    with pytest.raises(
        TrainingStopped, match=f"exited with code 9 while it was reading image {LAST}"
    ):
        read(loader, 0)
    assert loader.plan == Plan(2)


class Slow(Numbers):
    def __getitem__(self, key):
        time.sleep(0.01)
        return super().__getitem__(key)


def test_tuner_gets_the_time_of_workers_and_of_waiting():
    loader, calls = make_loader(1, data=Slow()), []
    loader.tuner = SimpleNamespace(
        begin=lambda worked: calls.append((0.0, worked)),
        after_batch=lambda plan, *measured: calls.append(measured) or plan,
    )
    loader.set_epoch(0)
    for _ in loader:
        if len(calls) == 2:
            time.sleep(20 * 0.01)  # a step in which the worker fills its queue
    waited, worked = zip(*(call[:2] for call in calls), strict=True)
    assert sorted(worked) == list(worked)
    assert worked[0] == 0  # before the first batch: short epochs are loaded while it is awaited
    assert worked[-1] >= 0.01 * COUNT
    assert sum(waited) > 0


def test_changes_are_logged(monkeypatch, caplog):
    monkeypatch.setattr(tuning, "BATCHES", 1)
    tuner = Tuner(8, clock=itertools.count(step=1000).__next__)
    tuner.begin(0.0)
    with caplog.at_level(logging.INFO):
        for plan, waited, worked in (
            (Plan(2), 250.0, 1990.0),
            (Plan(4), 250.0, 3000.0),
            (Plan(4, 4), 0.0, 3500.0),
        ):
            tuner.after_batch(plan, waited, worked, 1)
    assert caplog.messages == [
        "loader: 4 processes instead of 2: batches came late in 25% of the time",
        "loader: 4 batches ahead per process instead of 2: batches came late in 25% of the time",
        "loader: 1 process instead of 4: as many as the training needs",
    ]


def test_flag_fixes_the_number_and_evaluation_is_not_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "CORES", 6)
    words = "--data_set DIGITS --model convnextv2_atto --device cpu --output_dir none"
    for given, count, tuned in (("--num_workers 3", 3, False), ("", 6, True)):
        args = parse(finetune_parser(), f"{words} {given}".split())
        train, val, _ = datasets.build_datasets(args)
        loaders = [datasets.build_loader(data, data is train, args, "cpu") for data in (train, val)]
        assert [each.loader.num_workers for each in loaders] == [count, count]
        assert [each.loader.tuner is not None for each in loaders] == [tuned, False]


def test_processes_of_torchrun_share_the_cores(monkeypatch):
    monkeypatch.setattr(tuning, "CORES", 16)
    assert (tuning.most_workers(), tuning.first_workers()) == (16, 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (tuning.most_workers(), tuning.first_workers()) == (2, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert tuning.first_workers() == 1
