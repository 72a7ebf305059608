# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Schedules by name and as text, with ClassyVision's values; the schedule of a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import parser as options
from optim_factory import scale_lr
from training.schedules import Schedule, build_schedule, warmup_cosine

# --- warm-up and cosine, the default ----------------------------------------------------------


def test_lr_at_every_update_by_hand():
    """4 updates up to 8, then half a cosine down to 2 over the 4 steps between 5 updates."""
    half = math.sqrt(0.5)  # cos(pi / 4)
    expected = [2, 4, 6, 8, 8, 5 + 3 * half, 5, 5 - 3 * half, 2]
    got = [warmup_cosine(update, 8.0, 2.0, warmup=4, total=9) for update in range(9)]
    assert got == pytest.approx(expected, rel=1e-12)
    assert got[-1] == 2.0  # exactly


def test_no_warm_up_starts_at_the_peak_and_ends_at_the_minimum():
    values = [warmup_cosine(update, 1.0, 0.0, warmup=0, total=3) for update in range(3)]
    assert values == [1.0, pytest.approx(0.5), 0.0]


def test_update_past_the_end_stays_at_the_minimum():
    assert warmup_cosine(50, 1.0, 0.25, warmup=2, total=10) == 0.25


def optimizer_of_two() -> torch.optim.Optimizer:
    """A decayed group at half the rate, and one without decay."""
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], "lr_scale": 0.5, "decayed": True},
        {"params": [nn.Parameter(torch.ones(1))], "lr_scale": 1.0, "decayed": False},
    ]
    return torch.optim.AdamW(groups, lr=123.0, weight_decay=0.9)


def test_rate_and_decay_reach_every_group_before_the_first_update():
    optimizer = optimizer_of_two()
    schedule = Schedule(
        optimizer,
        total=10,
        lr=0.8,
        min_lr=0.1,
        warmup=2,
        weight_decay=0.2,
    )
    assert schedule.apply(0) == pytest.approx(0.4)  # the official first update had a rate of 0
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.4])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert schedule.apply(1) == 0.8
    assert schedule.apply(9) == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.05


def schedule_flags(**changes: float) -> SimpleNamespace:
    flags = {"epochs": 9, "min_lr": 0.0, "warmup_epochs": 2, "warmup_steps": -1, "opt": "adamw"}
    flags |= {"recipe": None, "sched": None, "sched_options": None}
    return SimpleNamespace(**{**flags, "weight_decay": 0.04, "weight_decay_end": None, **changes})


@pytest.mark.parametrize(("steps", "warmup"), [(-1, 10), (0, 0), (3, 3)])
def test_warmup_steps_win_over_epochs(steps, warmup):
    """A dead flag in the official code."""
    args = schedule_flags(warmup_steps=steps)
    schedule = build_schedule(args, optimizer_of_two(), 1.0, steps_per_epoch=5)
    assert schedule.apply(0) == (1 / warmup if warmup else 1.0)
    assert schedule.apply(max(warmup - 1, 0)) == 1.0
    assert schedule.apply(warmup + 1) < 1.0


def test_weight_decay_moves_to_its_end_and_spares_what_is_not_decayed():
    """Another dead flag in the official code."""
    optimizer = optimizer_of_two()
    schedule = Schedule(
        optimizer,
        total=3,
        lr=1.0,
        warmup=2,  # of the learning rate alone
        weight_decay=0.04,
        weight_decay_end=0.4,
    )
    seen = []
    for update in range(3):
        schedule.apply(update)
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
    assert [decayed for decayed, _ in seen] == pytest.approx([0.04, 0.22, 0.4])
    assert [spared for _, spared in seen] == [0.0, 0.0, 0.0]
    assert seen[-1][0] == 0.4  # exactly


def test_weight_decay_stays_where_it_is_without_an_end():
    optimizer = optimizer_of_two()
    schedule = Schedule(optimizer, total=6, lr=1.0, weight_decay=0.04)
    for update in range(6):
        schedule.apply(update)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.04)


def test_warm_up_over_the_whole_run_is_said(log):
    Schedule(optimizer_of_two(), total=10, lr=1.0, warmup=10)
    assert "warm-up of 10 steps, but the run has 10" in log.text


def test_last_update_has_the_minimum_after_almost_a_whole_run_of_warm_up():
    assert warmup_cosine(9, 1.0, 0.25, warmup=9, total=10) == 0.25


def test_flags_reach_the_schedule():
    args = schedule_flags(epochs=3, min_lr=0.1, warmup_epochs=1, weight_decay_end=0.4)
    optimizer = optimizer_of_two()
    schedule = build_schedule(args, optimizer, 0.8, steps_per_epoch=4)
    assert [schedule.apply(0), schedule.apply(3), schedule.apply(11)] == [0.2, 0.8, 0.1]
    assert optimizer.param_groups[0]["weight_decay"] == 0.4


@pytest.mark.parametrize(
    ("words", "steps", "warned"),
    [
        ("--batch_size 32", 18, True),  # the defaults on 100 images: the loss stayed above 0.9
        ("--recipe small_data_pretrain", 400, False),  # 30 images
        ("--batch_size 32 --lr 1e-3", 18, True),
        ("--batch_size 32 --lr 1e-3", 30, False),
        ("--lr 0", 18, False),  # deliberately
        ("--opt lion --lr 1e-3", 18, True),
        ("--opt lambw --lr 1e-3", 18, True),
        ("--opt sgd --lr 1e-4", 18, False),  # its steps depend on the gradients
    ],
)
def test_run_that_can_hardly_learn_is_told(words, steps, warned, caplog):
    words = ["--data_path", "x", *words.split()]
    args = options.parse(options.pretrain_parser(), words)
    args = args.replace(epochs=1)
    lr = scale_lr(args.lr, args.blr, args.batch_size)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    with caplog.at_level("WARNING"):
        build_schedule(args, optimizer, lr, steps)
    assert ("the run will hardly learn" in caplog.text) == warned
    assert ("--recipe small_data_pretrain" in caplog.text) == warned
