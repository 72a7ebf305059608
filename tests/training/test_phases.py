# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""When a run evaluates and ends, and that neither changes its training; early stopping."""

import json
from pathlib import Path

import pytest
import torch

import engine_finetune
import main_finetune
from config.parser import finetune_parser, parse
from errors import Preempted
from tests.test_engines import finetune, pretrain
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager, NoMoreBatches
from training.hooks import Reporter
from training.phases import Phases
from training.precise_bn import PreciseBn
from training.report import SPEED, count_epochs, describe_end, describe_time
from training.schedules import build_schedule
from training.steps import Steps


def walk(phases: Phases, **start: int) -> list[tuple]:
    """Return (global step, evaluates, is_last) at the end of each phase of a run."""
    state, found = TrainState(**start), []
    state.recount_steps(phases.steps, images=100)
    while not phases.done(state):
        phase = phases.next(state)
        if phase.stop is None:
            state.end_epoch(phases.steps)
            state.global_step = phases.steps.before(state.epoch)
        else:
            images = phases.steps.of(state.epoch)[1]
            state.global_step += (phase.stop - state.samples_in_epoch) // images
            state.samples_in_epoch = state.phase_end = phase.stop
        found.append((state.global_step, phase.evaluates, phase.is_last))
    return found


@pytest.mark.parametrize(
    ("epochs", "freq", "expected"),
    [
        (2, 1, [(10, True), (20, True)]),
        (3, 2, [(10, False), (20, True), (30, True)]),  # one always at the end
        (2, 9, [(10, False), (20, True)]),
        (1, 0.25, [(2, True), (5, True), (8, True), (10, True)]),  # 2.5, 5, 7.5, 10 rounded
        (1, 0.33, [(3, True), (7, True), (10, True)]),  # a third, so the end is not missed
        (1, 1e-9, [(step, True) for step in range(1, 11)]),  # at most one a step
        (2, 1.5, [(10, False), (15, True), (20, True)]),
        (1.5, 1, [(10, True), (15, True)]),
        (0.25, 1, [(2, True)]),
        (0.001, 1, [(1, True)]),  # at least one step
        (2.5, 0.5, [(5, True), (10, True), (15, True), (20, True), (25, True)]),
    ],
)
def test_evaluations_follow_these_steps(epochs, freq, expected):
    found = walk(Phases(Steps.even(10, epochs, 8), freq))
    assert [(step, evaluates) for step, evaluates, _ in found] == expected
    assert [is_last for *_, is_last in found] == [False] * (len(expected) - 1) + [True]


def test_resumed_run_has_the_phases_that_are_left():
    phases = Phases(Steps.even(10, 2, 8), 0.5)
    every = walk(phases)
    assert every == [(5, True, False), (10, True, False), (15, True, False), (20, True, True)]
    # Within a phase, at the end of one without its evaluation, and after the evaluation.
    assert walk(phases, epoch=1, samples_in_epoch=24) == every[2:]
    assert walk(phases, epoch=1, samples_in_epoch=40) == every[2:]
    assert walk(phases, epoch=1, samples_in_epoch=40, phase_end=40) == every[3:]
    # A batch of 16, after 40 images with one of 8: 5 steps an epoch, of which 3 count as done.
    assert walk(Phases(Steps.even(5, 2, 16), 0.5), epoch=1, samples_in_epoch=40, phase_end=40) == [
        (10, True, True)
    ]
    assert walk(phases, epoch=2) == []
    fewer = Phases(Steps.even(10, 1, 8))  # epochs than the run has done
    assert walk(fewer, epoch=1, samples_in_epoch=8) == []


def test_phase_ends_with_a_whole_step_of_the_new_batch_size():
    """A part of a batch would be left out, and the phase would never end."""
    state = TrainState(epoch=0, samples_in_epoch=20)
    state.recount_steps(Steps.even(6, 1, 16), images=100)  # 20 images are two steps of 16
    phase = Phases(Steps.even(6, 1, 16), 0.5).next(state)
    assert phase.stop == 20 + 16


def test_patience_counts_evaluations_without_a_better_metric():
    state = TrainState()
    phases = Phases(Steps.even(10, 100, 8), patience=2, min_delta=0.5)
    stops = []
    for best, ema in ((50.0, 49.0), (50.4, 49.0), (50.6, None), (50.0, 49.4), (50.0, 49.6)):
        stops.append(phases.ends_run(phases.next(state), state, {"best": best, "best-ema": ema}))
        state.end_epoch(phases.steps)
    assert stops == [False] * 5  # 50.6 is better than 50 by 0.6, and later 49.6 than 49 by 0.6
    assert state.since_best == 0
    for value in (float("nan"), 50.6):
        stops.append(phases.ends_run(phases.next(state), state, {"best": value}))
    assert stops[5:] == [False, True]
    assert phases.done(state)  # so a resumed run trains no further
    patient = Phases(phases.steps, patience=3)
    assert not patient.done(state)
    lower = TrainState(lower_is_better=True)
    for value, expected in ((1.0, 0), (0.9, 1), (0.4, 0)):
        lower.count_without_better({"best": value}, 0.2)
        assert lower.since_best == expected


def test_words_for_parts_of_epochs():
    assert (count_epochs(0, 2.5), count_epochs(2, 2.5), count_epochs(3, 2.5)) == (
        "1/3",
        "3/3",
        "3/3",
    )
    state = TrainState(1, 15, samples_in_epoch=40, steps_per_epoch=10, epoch_start=10)
    assert describe_end(state, 2.5) == "1.5 of 2.5 epochs done"
    assert describe_end(TrainState(2), 3) == "epoch 2/3 done"
    assert describe_end(TrainState(1), 1.6) == "epoch 1/2 done"  # as its steps are counted
    assert (describe_time(2), describe_time(1.5)) == ("in epoch 2", "after 1.5 epochs")


# --- runs of a tiny model: 26 images, 4 steps an epoch ---------------------------------------


def rows(folder: Path) -> list[dict]:
    """Lines of log.txt, without what two equal runs do not share."""
    lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in SPEED} for line in lines]


def last(folder: Path) -> dict:
    state = max(
        (torch.load(path, weights_only=True) for path in folder.glob("checkpoint-[0-9]*.pth")),
        key=lambda content: content["state"]["global_step"],
    )
    return state


def assert_same_run(one: Path, other: Path) -> None:
    first, second = last(one), last(other)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    different = {key for key in first["state"] if first["state"][key] != second["state"][key]}
    assert different == set()
    assert rows(one) == rows(other)


def test_evaluation_within_an_epoch_changes_no_weight(tmp_path):
    """It leaves the network in training mode and the order of images, drop path and mixup alone."""
    words = "--epochs 1.5 --drop_path 0.3 --mixup 0.5 --reprob 0.5 --update_freq 3 --batch_size 2"
    for name, more in (("rare", "--eval_freq 9"), ("often", "--eval_freq 0.3 --print_freq 1")):
        finetune(f"{words} {more} --model_ema --output_dir {tmp_path / name}")
    rare, often = last(tmp_path / "rare"), last(tmp_path / "often")
    for key in ("model", "model_ema"):
        for name, value in rare[key].items():
            assert torch.equal(value, often[key][name]), name
    # 13 micro-batches, so 5 steps an epoch, the last with one of them: after 1.5, 3, 4.5, 6 and
    # 7.5 steps, rounded to even ones
    found = [(row.get("step"), row.get("after_epochs")) for row in rows(tmp_path / "often")]
    assert found == [(2, 0.4), (3, 0.6), (4, 0.8), (None, None), (6, 1.2), (8, 1.6)]
    assert [row.get("epoch") for row in rows(tmp_path / "rare")] == [0, None]
    assert "test_acc1" not in rows(tmp_path / "rare")[0]
    train = [[row["train_loss"] for row in rows(tmp_path / name)] for name in ("rare", "often")]
    assert train[0] == [train[1][3], train[1][5]]  # of the whole epoch


class Killed(BaseException):
    """Ends a run like SIGKILL: nothing is saved."""


KILLED = "--epochs 1 --eval_freq 0.5 --patience 9 --save_ckpt_every_steps 1 --print_freq 1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    finetune(f"{KILLED} --output_dir {folder}")
    return folder


@pytest.mark.parametrize("moment", ["evaluation", "save", "report", "step"])
def test_run_killed_at_an_evaluation_ends_with_the_same_bits(whole, tmp_path, monkeypatch, moment):
    """It repeats an evaluation that was not saved, and counts and logs each of them once."""
    killed = tmp_path
    owner, name, number = {
        "evaluation": (main_finetune, "evaluate", 1),
        "save": (CheckpointManager, "end_epoch", 2),
        "report": (Reporter, "end_epoch", 1),
        "step": (CheckpointManager, "after_step", 3),
    }[moment]
    real, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killing)
        with pytest.raises(Killed):
            finetune(f"{KILLED} --output_dir {killed}")
    finetune(f"{KILLED} --output_dir {killed}")
    assert_same_run(whole, killed)
    assert [row.get("after_epochs") for row in rows(killed)] == [0.5, None]


def test_best_checkpoint_of_the_middle_of_an_epoch_resumes(tmp_path, monkeypatch):
    """It must not count as older than the end of the epoch before."""
    values = iter([10.0, 20.0, 90.0])  # after 0.5, 1 and 1.5 epochs

    def evaluate(*args):
        return {"loss": 1.0, "acc1": next(values)}  # StopIteration after three

    monkeypatch.setattr(main_finetune, "evaluate", evaluate)
    with pytest.raises((StopIteration, RuntimeError)):
        finetune(f"--epochs 2 --eval_freq 0.5 --output_dir {tmp_path}")
    best = torch.load(tmp_path / "checkpoint-best.pth", weights_only=True)["state"]
    assert (best["epoch"], best["samples_in_epoch"], best["best_epochs"]) == (1, 12, {"best": 1.5})
    values = iter([30.0])
    finetune(f"--epochs 2 --eval_freq 0.5 --output_dir {tmp_path}")
    assert [row.get("after_epochs", row.get("epoch")) for row in rows(tmp_path)] == [
        *(0.5, 0),
        *(1.5, 1),
    ]


def test_run_stops_early_says_so_and_does_not_train_on(tmp_path, monkeypatch, capsys):
    values = iter([50.0, 60.0, 60.5, 60.0, 70.0, 60.0])
    monkeypatch.setattr(main_finetune, "evaluate", lambda *_: {"loss": 1.0, "acc1": next(values)})
    words = f"--epochs 9 --patience 2 --min_delta 1 --save_ckpt_freq 9 --output_dir {tmp_path}"
    finetune(words)
    assert (tmp_path / "checkpoint-3.pth").exists()  # whatever --save_ckpt_freq is
    expected = "4 of 9 epochs done, stopped early (--patience 2): no better acc1 in 2 evaluations"
    text = capsys.readouterr().out
    assert expected in text
    assert "best top-1 60.50% in epoch 3" in text
    finetune(words)
    assert len(rows(tmp_path)) == 4
    finetune(words.replace("--patience 2", "--patience 3 --epochs 6"))  # 70 is better
    assert [row["test_acc1"] for row in rows(tmp_path)] == [50, 60, 60.5, 60, 70, 60]


@pytest.mark.slow
def test_fraction_of_an_epoch_continues_where_it_ended(tmp_path):
    """A finished part of an epoch is no finished epoch: its images must not be skipped."""
    finetune(f"--epochs 2 --output_dir {tmp_path / 'whole'} --sched constant(1)")
    words = f"--output_dir {tmp_path / 'parts'} --sched constant(1)"
    finetune(f"--epochs 1.5 {words}")
    assert (tmp_path / "parts" / "checkpoint-1-seen-12.pth").exists()
    finetune(f"--epochs 2 {words}")
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    assert [row.get("epoch") for row in rows(tmp_path / "parts")] == [0, None, 1]


def test_schedule_of_part_epochs_ends_at_the_last_step():
    """2.4 epochs of 4 steps are 10 steps; the second epoch of a schedule begins at step 4."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    def rates(words: str) -> list[float]:
        args = parse(finetune_parser(), f"--data_set DIGITS --epochs 2.4 {words}".split())
        schedule = build_schedule(args, optimizer, 1.0, Steps.even(4, args.epochs))
        assert schedule.total == 10
        return [schedule.rate(step) for step in range(10)]

    found = rates("--min_lr 0.25 --warmup_epochs 0.5")
    assert (found[0], found[1], found[9]) == (0.5, 1.0, 0.25)
    found = rates("--sched multistep(1,0.5,0.1,milestones=[1,2])")
    assert found == [1.0] * 4 + [0.5] * 4 + [0.1] * 2


def test_pretraining_takes_part_of_an_epoch_and_draws_its_picture(tmp_path, capsys):
    pretrain(f"--epochs 1.5 --picture_freq 1 --output_dir {tmp_path}")
    assert [(row.get("epoch"), row.get("after_epochs")) for row in rows(tmp_path)] == [
        (0, None),
        (None, 1.5),
    ]
    pictures = sorted(path.name for path in (tmp_path / "reconstructions").iterdir())
    assert pictures == ["epoch-0.png", "epoch-1.png"]
    assert "1.5 of 1.5 epochs done; train_loss" in capsys.readouterr().out
    pretrain(f"--epochs 1.5 --picture_freq 1 --output_dir {tmp_path}")  # is done
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("where", ["evaluation", "precise_bn"])
def test_run_asked_to_stop_in_an_evaluation_repeats_it(tmp_path, monkeypatch, where):
    """As if no batch came: what is saved is the step before, with its means counted once."""
    words = "--model tests.test_engines:normed --epochs 1 --eval_freq 0.5 --precise_bn 6"
    finetune(f"{words} --output_dir {tmp_path / 'whole'}")
    owner, name = {
        "evaluation": (main_finetune, "evaluate"),
        "precise_bn": (PreciseBn, "update"),
    }[where]

    def stop(*_) -> None:
        raise NoMoreBatches("no batch comes")

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, stop)
        with pytest.raises(Preempted):
            finetune(f"{words} --output_dir {tmp_path / 'stopped'}")
    assert (tmp_path / "stopped" / "checkpoint-0-seen-12.pth").exists()
    finetune(f"{words} --output_dir {tmp_path / 'stopped'}")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_loss_is_in_training_mode_after_an_evaluation_that_failed():
    criterion = engine_finetune.Criterion("tests.test_engines:Running()")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError):
        engine_finetune.evaluate(
            (1 / 0 for _ in range(1)), model, torch.device("cpu"), "none", criterion
        )
    assert criterion.training
