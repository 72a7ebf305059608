# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Steps of epochs that differ, and the learning rate that follows them: worked by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from config import parser as options
from config.sizes import batch_sizes
from training.checkpoint import TrainState
from training.phases import Phases
from training.schedules import build_schedule, lr_rows
from training.steps import Steps, build_steps

# 96 images of 16 pixels in steps of 32, after two epochs of 32 pixels in steps of 8.
GROWING = Steps(4, {0: (3, 32), 2: (12, 8)})


def schedule_of(steps: Steps, words: str):
    words = f"--data_set DIGITS --epochs {steps.epochs} {words}".split()
    args = options.parse(options.finetune_parser(), words)
    weights = torch.nn.Parameter(torch.zeros(1))
    group = {"params": [weights], "lr_scale": 1.0, "decayed": True}
    return build_schedule(args, torch.optim.SGD([group], momentum=0.9), 1.0, steps)


def test_steps_are_counted_by_epoch():
    assert (GROWING.total, GROWING.base) == (30, (12, 8))
    assert [GROWING.before(epochs) for epochs in (0, 1, 1.5, 2, 2.25, 3, 4)] == [
        0, 3, 4, 6, 9, 18, 30,
    ]  # fmt: skip
    assert [GROWING.within(step) for step in (0, 2, 3, 5, 6, 17, 18, 29)] == [
        (0, 3), (2, 3), (0, 3), (2, 3), (0, 12), (11, 12), (0, 12), (11, 12),
    ]  # fmt: skip
    assert [GROWING.of(epoch) for epoch in (0, 1, 2, 9)] == [(3, 32)] * 2 + [(12, 8)] * 2
    assert [GROWING.factor(step) for step in (0, 5, 6, 29)] == [4, 4, 1, 1]
    assert [GROWING.progress(step) for step in (0, 1, 3, 6, 7, 30)] == [0, 4, 12, 24, 25, 48]


def test_steps_of_a_part_of_an_epoch_are_rounded():
    assert Steps.even(4, 2.4).total == 10
    assert Steps.even(4, 0.01).total == 1
    assert Steps(2.5, {0: (3, 32), 2: (12, 8)}).total == 12


def test_rate_follows_the_epochs_and_the_batch():
    """Warm-up in the first epoch, 12 steps of the base; then half a cosine over the other 36."""
    schedule = schedule_of(GROWING, "--warmup_epochs 1 --min_lr 0")
    assert (schedule.total, schedule.warmup) == (30, 3)

    def cosine(done: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * done / 35))

    expected = {0: 4 * 1 / 12, 1: 4 * 5 / 12, 2: 4 * 9 / 12, 3: 4 * 1, 4: 4 * cosine(4)}
    expected |= {6: cosine(12), 7: cosine(13), 17: cosine(23), 28: cosine(34), 29: 0.0}
    for step, rate in expected.items():
        assert schedule.apply(step) == pytest.approx(rate, abs=1e-12), step
        assert schedule.optimizer.param_groups[0]["lr"] == schedule.rate(step)
    even = schedule_of(Steps.even(12, 4, 8), "--warmup_epochs 1 --min_lr 0")
    later = [schedule.rate(step) for step in range(6, 30)]
    assert later == pytest.approx([even.rate(step) for step in range(24, 48)], abs=1e-12)


def test_warm_up_in_steps_counts_steps():
    schedule = schedule_of(GROWING, "--warmup_steps 6 --min_lr 0")
    assert schedule.rate(0) == pytest.approx(4 / 24)
    assert schedule.rate(6) == 1.0


def test_other_schedules_follow_the_epochs_too():
    words = (
        "--weight_decay 0.1 --weight_decay_end 0.3 --sched multistep(1,0.5,0.25,milestones=[1,3])"
    )
    schedule = schedule_of(GROWING, f"{words} --sched_options momentum=linear(0,0.8)")
    rates = [schedule.rate(step) for step in (0, 2, 3, 5, 6, 17, 18, 29)]
    assert rates == [4, 4, 2, 2, 0.5, 0.5, 0.25, 0.25]
    assert schedule.decay(29) == pytest.approx(0.3)
    assert schedule.decay(6) == pytest.approx(0.3 - 0.2 * 0.5 * (1 + math.cos(math.pi * 24 / 47)))
    schedule.apply(6)
    assert schedule.optimizer.param_groups[0]["momentum"] == pytest.approx(0.4)


def test_the_peak_of_a_growing_run_is_marked():
    rows = list(lr_rows(schedule_of(GROWING, "--warmup_epochs 1"), 0))
    (peak,) = (row for row in rows if row.endswith("peak"))
    assert peak.split()[:3] == ["step", "3", "4.00e+00"]


@pytest.mark.parametrize(
    ("sizes", "batch", "expected"),
    [
        ("128:0,160:50,224:80", 64, {0: 192, 50: 112, 80: 64}),  # times 3.06 and 1.96, in quarters
        ("112:0,224:80", 24, {0: 96, 80: 24}),
        ("192:0,200:9", 8, {0: 8, 9: 8}),
        ("64x128:0,128:9", 8, {0: 16, 9: 8}),
    ],
)
def test_batches_grow_with_the_area(sizes, batch, expected):
    words = f"--data_set DIGITS --input_size {sizes} --batch_size {batch} --progressive_batch"
    args = options.parse(options.finetune_parser(), words.split())
    assert batch_sizes(args) == expected
    assert batch_sizes(args.replace(progressive_batch=False)) == {0: batch}
    for processes in (2, 3, 8):  # so a step has as many images, however they are shared
        whole = batch_sizes(args.replace(batch_size=processes * batch))
        assert whole == {epoch: processes * size for epoch, size in expected.items()}


@pytest.mark.parametrize("script", [options.pretrain_parser, options.finetune_parser])
def test_batch_that_cannot_be_divided_is_refused(script, capsys):
    words = "--data_set DIGITS --input_size 64:0,224:2 --progressive_batch --batch_size 12"
    with pytest.raises(SystemExit):
        options.parse(script(), words.split())
    assert "--batch_size 12: expected a multiple of 8, so that" in capsys.readouterr().err


class Loader:
    """As many batches as 96 images are."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes, self.epoch = sizes, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 96 // self.sizes[self.epoch]


def test_steps_of_a_run_are_those_of_its_loader(log):
    args = SimpleNamespace(
        epochs=4, batch_size=4, input_size=(32, 32), input_sizes="16:0,32:2", progressive_batch=True
    )
    loader = Loader(batch_sizes(args))
    assert build_steps(args, loader, update_freq=2) == GROWING
    assert loader.epoch == 0
    assert log.messages == [
        "from epoch 1 on: 32 images in a step (16 per process and forward pass), 3 steps an "
        "epoch, learning rate x 4",
        "from epoch 3 on: 8 images in a step (4 per process and forward pass), 12 steps an "
        "epoch, learning rate x 1",
    ]
    log.clear()
    args.progressive_batch = False
    assert build_steps(args, Loader({0: 4}), update_freq=2) == Steps.even(12, 4, 8)
    assert log.messages == []


def test_phases_and_progress_of_a_growing_run():
    state, phases, found = TrainState(), Phases(GROWING, eval_freq=0.5), []
    state.recount_steps(GROWING, images=96)
    while not phases.done(state):
        phase = phases.next(state)
        begun = state.samples_in_epoch
        if phase.stop is None:
            phases.end(phase, state, SimpleNamespace())
            state.global_step = GROWING.before(state.epoch)
        else:
            state.global_step += (phase.stop - begun) // GROWING.of(state.epoch)[1]
            state.samples_in_epoch = state.phase_end = phase.stop
        found.append((state.global_step, round(state.position, 2), phase.evaluates))
    assert found == [
        (2, 0.67, True), (3, 1, True), (4, 1.33, True), (6, 2, True),  # 1.5 of 3 steps, rounded
        (12, 2.5, True), (18, 3, True), (24, 3.5, True), (30, 4, True),
    ]  # fmt: skip


def test_progress_is_recounted_for_another_batch():
    """40 of 96 images of epoch 1 are two steps of 32; in smaller steps they were five."""
    state = TrainState(1, 17, bad_steps=4, samples_in_epoch=40)
    state.recount_steps(GROWING, images=96)
    assert (state.global_step, state.epoch_start, state.steps_per_epoch) == (5, 3, 3)
    assert (state.effective_batch, state.bad_steps) == (8, 1)
    assert state.position == pytest.approx(1.666667)
