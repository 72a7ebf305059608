# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Runs that are killed, preempted and stopped, and go on.

A fork of this process runs a script: it needs no second to load torch, and can be killed anywhere.
"""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import chaos
from errors import EXIT_REQUEUE, Preempted, TrainingStopped
from training import checkpoint_manager
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager, NoMoreBatches
from training.meters import Means
from training.preemption import StopSignals
from training.steps import Steps

INSTANTS = 10  # of each script
SCRIPTS = list(chaos.RUNS)


@pytest.fixture(
    scope="module", params=[SCRIPTS[0], pytest.param(SCRIPTS[1], marks=pytest.mark.slow)]
)
def whole(request, tmp_path_factory) -> tuple[str, Path, float]:
    """A script, the folder of a run of it that nobody touched, and how long it took."""
    place = tmp_path_factory.mktemp(request.param)
    chaos.complete(request.param, place / "warm")
    began = time.monotonic()
    chaos.complete(request.param, place / "whole")
    return request.param, place / "whole", time.monotonic() - began


def test_digest_sees_what_it_must(whole, tmp_path):
    """An empty one would be equal whatever happens."""
    script, folder, _ = whole
    found = chaos.digest(folder)
    assert {"checkpoint-2.pth", "log.txt", "TensorBoard"} <= found.keys()
    assert "train/loss" in found["TensorBoard"]
    chaos.complete(script, tmp_path / "other", "--seed", "1")
    different = chaos.differences(chaos.digest(tmp_path / "other"), found)
    assert {"checkpoint-2.pth", "log.txt", "TensorBoard"} <= set(different)


@pytest.mark.slow
def test_killed_anywhere_and_started_again_it_ends_bit_for_bit_the_same(whole, tmp_path):
    """In an epoch, in a group, in evaluation, while saving: weights, EMA, moments, best, logs."""
    script, folder, seconds = whole
    expected, draw, in_time = chaos.digest(folder), random.Random(script), 0
    for number in range(5 * INSTANTS):
        here = tmp_path / f"{number}"
        at = draw.uniform(0, seconds)
        killed = chaos.attempt(script, here, at)
        in_time += killed
        seconds *= 1 if killed else 0.7  # the machine has become faster since it was timed
        assert not chaos.differences(chaos.digest(here), expected), f"killed after {at:.3f} s"
        shutil.rmtree(here)
        if in_time == INSTANTS:
            return
    raise AssertionError(f"of {5 * INSTANTS} runs only {in_time} were killed before their end")


def test_killed_before_it_could_tidy_up_it_does_so_when_started_again(whole, tmp_path):
    """Between the last save and the end of those within its epoch: nothing came after it."""
    script, folder, _ = whole
    here = tmp_path / "run"
    shutil.copytree(folder, here)
    last = here / "checkpoint-2.pth"
    shutil.copy(last, here / "checkpoint-2-seen-16.pth")
    chaos.complete(script, here)
    assert not chaos.differences(chaos.digest(here), chaos.digest(folder))


@pytest.mark.slow
def test_killed_again_and_again_it_still_arrives(whole, tmp_path):
    script, folder, seconds = whole
    draw = random.Random(script)
    for _ in range(5):
        child = chaos.start(script, tmp_path / "run")
        time.sleep(draw.uniform(0.3, 0.9) * seconds)
        os.kill(child, signal.SIGKILL)
        chaos.finish(child)
    chaos.complete(script, tmp_path / "run")
    assert not chaos.differences(chaos.digest(tmp_path / "run"), chaos.digest(folder))


# --- asked to stop --------------------------------------------------------------------------


def wait_for(text: str, folder: Path) -> None:
    """Until the run in `folder` has said it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        said = folder.with_suffix(".txt")
        if said.exists() and re.search(text, said.read_text()):
            return
        time.sleep(0.005)
    raise AssertionError(f"never said {text!r}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_signal_saves_at_the_next_update_and_asks_to_be_requeued(whole, tmp_path, kind):
    script, folder, _ = whole
    slow = ("--save_ckpt_every_steps", "100", "--epochs", "300")
    child = chaos.start(script, tmp_path / "run", *slow)
    wait_for("epoch 2/300", tmp_path / "run")
    os.kill(child, getattr(signal, kind))
    assert chaos.finish(child) == EXIT_REQUEUE == 75
    said = (tmp_path / "run.txt").read_text()
    stopped = f"stopped by {kind} (?:in|after) epoch [0-9]+, step ([0-9]+); checkpoint saved. "
    stopped += "Exit code 75: "
    steps = int(re.search(f"{stopped}rerun the same command to continue", said)[1])
    chaos.complete(script, tmp_path / "run", "--epochs", str(steps // 3 + 2))
    assert f", step {steps}\n" in (tmp_path / "run.txt").read_text()  # resumed from there


@pytest.mark.slow
def test_time_that_is_up_stops_as_a_signal_does_and_the_rest_is_the_same(whole, tmp_path):
    script, folder, seconds = whole
    minutes = str(seconds / 60 / 20)
    stops = 0
    while chaos.finish(chaos.start(script, tmp_path / "run", "--max_minutes", minutes)) == 75:
        stops += 1
        assert stops < 50
    assert stops > 0
    chaos.complete(script, tmp_path / "run")
    mine, theirs = chaos.digest(tmp_path / "run"), chaos.digest(folder)
    assert mine["log.txt"] == theirs["log.txt"]
    assert mine["TensorBoard"] == theirs["TensorBoard"]


def test_second_signal_leaves_at_once(tmp_path):
    child = os.fork()
    if child == 0:
        with StopSignals(None, None):
            (tmp_path / "ready").touch()
            while True:
                time.sleep(0.01)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGTERM)  # passed on by a launcher: still the first
    time.sleep(1.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert chaos.finish(child) == 128 + signal.SIGTERM


def test_first_signal_after_the_time_is_over_lets_the_save_finish():
    """The scheduler's warning may come in the same minute."""
    signals = StopSignals(None, max_minutes=1e-9)
    assert signals.read() == (False, True)
    time.sleep(1.2)
    signals._handle(signal.SIGTERM, None)  # would have left the process
    assert signals.reason == "--max_minutes 1e-09"


@pytest.mark.parametrize(
    "kinds", [("SIGTERM", "SIGUSR2"), ("SIGUSR2", "SIGTERM"), ("SIGUSR2", "SIGUSR2")]
)
def test_warning_of_a_scheduler_does_not_end_the_save_that_its_other_signal_began(kinds):
    """SLURM preempts by SIGTERM and up to half a minute later sends what --signal asks for."""
    with StopSignals(None, None) as signals:
        os.kill(os.getpid(), getattr(signal, kinds[0]))
        signals.terminated -= 30
        os.kill(os.getpid(), getattr(signal, kinds[1]))
        assert signals.read() == (False, True)
        assert signals.reason == kinds[0]


def test_handlers_are_those_of_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with CheckpointManager(None):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


class Ranks:
    """Two managers in one process that share a store, as two ranks do."""

    def __init__(self, monkeypatch) -> None:
        self.store, self.counts = {}, {}
        monkeypatch.setattr(checkpoint_manager, "agree", self.agree)
        monkeypatch.setattr(checkpoint_manager, "count_ranks", self.count)
        self.managers = [CheckpointManager(None) for _ in range(2)]
        self.loaders = [SimpleNamespace(loader=SimpleNamespace()) for _ in range(2)]
        for manager, loader in zip(self.managers, self.loaders, strict=True):
            manager.watch(None, loader)
        monkeypatch.setattr(checkpoint_manager, "get_world_size", lambda: 2)

    def agree(self, question: str, answer: str) -> str:
        self.store[question] = self.store.get(question) or answer
        return self.store[question]

    def count(self, place: str, number: int) -> int:
        self.counts[place] = self.counts.get(place, 0) + number
        return self.counts[place]

    def stops(self, rank: int, arrived: bool) -> bool:
        """True if the rank stops while it waits for a batch, or when one arrives after all."""
        try:
            self.loaders[rank].loader.on_wait(arrived)
        except NoMoreBatches:
            return True
        return False


WAIT, GET = False, True


@pytest.mark.parametrize(
    ("events", "stopped"),
    [
        ([(0, WAIT), (0, WAIT), (0, WAIT)], []),  # the other one still trains
        ([(0, WAIT), (1, WAIT), (0, WAIT)], [1, 2]),  # all wait
        ([(0, WAIT), (1, WAIT), (0, GET)], [1, 2]),  # too late
        ([(0, WAIT), (1, GET), (0, WAIT), (1, WAIT), (0, WAIT)], [3, 4]),
        ([(0, WAIT), (0, GET), (1, WAIT), (1, WAIT), (0, WAIT), (1, WAIT)], [4, 5]),
        ([(0, WAIT), (0, GET), (0, WAIT), (1, WAIT), (0, WAIT)], [3, 4]),
    ],
)
def test_ranks_that_wait_for_a_batch_stop_together(events, stopped, monkeypatch):
    """One that stopped alone would leave the others waiting in a collective."""
    ranks = Ranks(monkeypatch)
    assert not any(ranks.stops(*event) for event in events)  # nobody asked them to
    for manager in ranks.managers:
        manager.signals.reason = "SIGTERM"
    assert [n for n, event in enumerate(events) if ranks.stops(*event)] == stopped


STALL = ("--data_set", "tests.tiny:stalls", "--num_workers", "1", "--print_freq", "1")
STALL += ("--save_ckpt_every_steps", "100", "--epochs", "2")
SECOND = "epoch 2/2  step 1/3"
PLACES = {  # script, images read before it stalls, the last line until then, what is saved
    "first batch": ("main_pretrain", "train:0", "peak lr", ""),
    "within a step": ("main_pretrain", "train:36", SECOND, "checkpoint-1-seen-8.pth"),
    "new epoch": ("main_finetune", "train:24", "epoch 1/2 done", "checkpoint-0.pth"),
    "evaluation": ("main_finetune", "val:7", "epoch 1/2  step 3/3", "checkpoint-0-seen-24.pth"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_first_signal_saves_though_no_batch_comes(tmp_path, monkeypatch, place):
    """It was ignored until a batch came, and the run was killed without a save."""
    monkeypatch.setattr("data_loading.workers.POLL", 0.2)
    script, stall, line, saved = PLACES[place]
    run = tmp_path / "run"
    monkeypatch.setenv("STALL", stall)
    words = STALL + ("--picture_freq", "0") * (script == "main_pretrain")
    child = chaos.start(script, run, *words)
    try:
        wait_for(line, run)
        time.sleep(0.5)  # usually the run waits for the batch by now; if not, it saves all the same
    finally:
        os.kill(child, signal.SIGTERM)
    assert chaos.finish(child) == EXIT_REQUEUE, run.with_suffix(".txt").read_text()
    said = run.with_suffix(".txt").read_text()
    assert ("checkpoint saved" if saved else "before the first step") in said
    assert (not saved) or (run / saved).exists()
    monkeypatch.delenv("STALL")
    chaos.complete(script, run, *words)
    chaos.complete(script, tmp_path / "whole", *words)
    assert not chaos.differences(chaos.digest(run), chaos.digest(tmp_path / "whole"))


# --- when to save ---------------------------------------------------------------------------


class Quiet:
    """A guard that found nothing wrong."""

    def check(self, state: TrainState) -> str:
        return ""

    def snapshot(self, state: TrainState) -> None:
        pass


def drive(checkpoints: CheckpointManager, steps: int) -> None:
    state = TrainState()
    with checkpoints:
        for _ in range(steps):
            state.global_step += 1
            state.samples_in_epoch += 4
            checkpoints.after_step(state, Means(["loss"], "cpu"), Quiet())


def steps_saved(steps: int, **options: float) -> list[int]:
    """Steps at which a manager with these options saves."""
    saved: list[int] = []
    manager = CheckpointManager(lambda state, **_: saved.append(state.global_step), **options)
    drive(manager, steps)
    return saved


def test_stop_while_no_batch_comes_counts_bad_steps_and_reads_nothing():
    """It reran them with images from the disk that hangs, and forgot that the run must end."""
    guard, saved = SimpleNamespace(data_loader="hangs"), []
    guard.stepper = SimpleNamespace(drop_window=lambda: None)
    guard.check = lambda state: "" if guard.data_loader else "11 bad steps in a row"
    checkpoints, state = CheckpointManager(lambda state, **_: saved.append(state)), TrainState(0, 1)

    def run() -> None:
        with checkpoints:
            checkpoints.after_step(state, Means(["loss"], "cpu"), guard)
            raise NoMoreBatches

    with pytest.raises(TrainingStopped, match="11 bad steps in a row"):
        run()
    assert [each.global_step for each in saved] == [1]


@pytest.mark.parametrize("place", ["start", "within a step", "evaluation", "new epoch"])
def test_stop_while_no_batch_comes_saves_the_last_step(place, monkeypatch):
    """Not the images of an unfinished step, nor an epoch that is not evaluated."""
    saved, listed, dropped, failures = [], [], [], []

    def save(state: TrainState, **_: object) -> None:
        if failures:
            raise failures.pop()
        saved.append(state)

    guard = SimpleNamespace(stepper=SimpleNamespace(drop_window=lambda: dropped.append(1)))
    guard.check = lambda state: ""
    checkpoints = CheckpointManager(save, before_save=lambda: listed.append(1))
    monkeypatch.setattr(checkpoint_manager, "PAUSE", 0.0)
    state, meters = TrainState(2, 6, epoch_sums={"guard": 7}), Means(["loss"], "cpu")
    sums = {}

    def run() -> None:
        with checkpoints:
            if place == "start":
                raise NoMoreBatches
            meters.update(4, loss=torch.tensor(2.0))
            state.global_step, state.samples_in_epoch = 7, 4
            checkpoints.after_step(state, meters, guard)
            sums.update(meters.state())
            if place == "within a step":
                meters.update(2, loss=torch.tensor(9.0))
                state.samples_in_epoch += 2
            else:
                meters.total()  # which moves the sums
                sums.update(meters.state())
                state.end_epoch(Steps.even(1))
            if place == "new epoch":
                checkpoints.end_epoch(state)
            failures.append(OSError("full"))  # once: the last save is repeated
            raise NoMoreBatches

    with pytest.raises(Preempted) as stop:
        run()
    if place == "start":
        assert "stopped before the first step, since no batch came; nothing to save" in str(stop)
        assert saved == []
        return
    assert "checkpoint saved. Exit code 75: rerun the same command" in str(stop)
    found, expected = saved[-1], (3, 7, 0) if place == "new epoch" else (2, 7, 4)
    assert (found.epoch, found.global_step, found.samples_in_epoch) == expected
    assert len(listed) == len(saved) == 1 + (place == "new epoch")
    assert dropped == [1]
    means = {} if place == "new epoch" else {"means": sums}
    assert found.epoch_sums == {"guard": 7} | means
    if place == "evaluation":
        assert state.epoch_sums == {"guard": 7}


def test_saves_every_so_many_steps():
    assert steps_saved(10, every_steps=3) == [3, 6, 9]


def test_saves_by_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(
        "training.checkpoint_manager.time.monotonic",
        lambda: now.__setitem__(0, now[0] + 20) or now[0],
    )
    saved = steps_saved(12, every_minutes=2)
    assert len(saved) >= 2
    assert len(set(saved)) == len(saved)
    assert all(b - a > 1 for a, b in zip(saved, saved[1:], strict=False))


def test_stop_without_a_folder_says_that_nothing_is_saved():
    manager = CheckpointManager(None)
    manager.signals.reason = "SIGTERM"
    with pytest.raises(
        Preempted, match="nothing saved: the same command starts from the beginning"
    ):
        drive(manager, 1)
