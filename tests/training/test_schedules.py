# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Schedules by name and as text, with ClassyVision's values; the schedule of a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import parser as options
from errors import UserError
from optim_factory import scale_lr
from training.schedules import (
    Curve,
    Schedule,
    build_curves,
    build_schedule,
    lr_rows,
    schedulable,
    warmup_cosine,
)
from training.steps import Steps

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
    flags |= {"recipe": None, "sched": None, "sched_options": None, "momentum": 0.9}
    return SimpleNamespace(**{**flags, "weight_decay": 0.04, "weight_decay_end": None, **changes})


@pytest.mark.parametrize(("steps", "warmup"), [(-1, 10), (0, 0), (3, 3)])
def test_warmup_steps_win_over_epochs(steps, warmup):
    """A dead flag in the official code."""
    args = schedule_flags(warmup_steps=steps)
    schedule = build_schedule(args, optimizer_of_two(), 1.0, steps=Steps.even(5, args.epochs))
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
    schedule = build_schedule(args, optimizer, 0.8, steps=Steps.even(4, args.epochs))
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
        build_schedule(args, optimizer, lr, Steps.even(steps))
    assert ("the run will hardly learn" in caplog.text) == warned
    assert ("--recipe small_data_pretrain" in caplog.text) == warned


# --- schedules by name: ClassyVision's values --------------------------------------------------


def values(text: str, steps: int = 4, epochs: float = 4) -> list[float]:
    """The value at each of the steps of a run."""
    curve = Curve(text, "--sched", epochs)
    return [curve.at(step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant(3)", [3, 3, 3, 3]),
        ("linear(0, 1)", [0, 0.25, 0.5, 0.75]),  # the last step sees 3/4, not 1
        ("cosine(1, 0)", [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("cosine(0, 1)", [0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125)]),  # upwards
        ("polynomial(2, 2)", [2, 1.125, 0.5, 0.125]),
        ("polynomial(base=2, power=1)", [2, 1.5, 1, 0.5]),
        ("exponential(2, 0.0001)", [2, 0.2, 0.02, 0.002]),
        ("step(4, 3, 2, 1)", [4, 3, 2, 1]),
        ("step_with_fixed_gamma(1, 0.1, 1)", [1, 1, 0.1, 0.1]),
        ("step_with_fixed_gamma(1, 0.5, 3)", [1, 0.5, 0.25, 0.125]),
        ("wsd(0.5, 0.25)", [0, 0.5, 1, 1]),
        ("0.5 * linear(0, 2)", [0, 0.25, 0.5, 0.75]),
    ],
)
def test_values_of_a_schedule_by_hand(text, expected):
    assert values(text) == pytest.approx(expected, abs=1e-15)


def test_stable_part_decays_in_a_straight_line():
    """8 steps: 2 of warm-up from 0.5, 2 at 2, 4 down to 1."""
    assert values("wsd(0.25, 0.5, start=0.5, peak=2, end=1)", 8) == pytest.approx(
        [0.5, 1.25, 2, 2, 2, 1.75, 1.5, 1.25]
    )


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("multistep(1, 0.1, 0.01)", [4, 8]),  # without milestones: width ceil(10 / 3)
        ("multistep(1, 0.1, 0.01, milestones=[3, 5])", [3, 5]),
        ("multistep(1, 0.1, 0.01, milestones=[6, 10], epochs=20)", [3, 5]),
        ("step(1, 0.1, 0.01)", [4, 7]),  # by epoch: 3.33 and 6.67 take effect at the next one
    ],
)
def test_value_changes_at_the_start_of_an_epoch(text, changes):
    got = values(text, steps=30, epochs=10)  # 3 steps in an epoch
    first, second = (3 * change for change in changes)
    assert got == [1] * first + [0.1] * (second - first) + [0.01] * (30 - second)


def test_epoch_begins_at_its_first_step_in_a_run_of_part_epochs():
    """Rounding gave this step the value of the epoch before."""
    got = values("linear(0, 1)[epoch]", 757, epochs=757 / 119)
    assert [got.index(value) for value in sorted({*got})] == [*range(0, 757, 119)]


def test_step_words_choose_how_often_a_value_changes():
    """ClassyVision's update_interval; by epoch, an epoch keeps the value of its first step."""
    assert values("linear(0, 1)[epoch]", 4, epochs=2) == [0, 0, 0.5, 0.5]
    assert values("step(1, 2, 3)[step]", 6, epochs=1) == [1, 1, 2, 2, 3, 3]
    assert values("step(1, 2, 3)", 6, epochs=1) == [1] * 6
    both = "linear(0, 1)[0.5, epoch] + constant(1)[0.5, epoch]"
    assert values(both, 8, epochs=4) == [0, 0, 0.5, 0.5, 1, 1, 1, 1]


def test_rounding_does_not_move_a_border():
    """0.29 * 100 is 28.999999999999996; ClassyVision adds 1e-6 to the progress."""
    curve = Curve("multistep(1, 0, milestones=[29])[step]", "--sched", 100)
    assert [curve(0.28), curve(0.29)] == [1, 0]
    assert Curve("step(1, 2)[step]", "--sched", 1)(1 - 1e-9) == 2  # no third value


# --- sums --------------------------------------------------------------------------------------


def test_rescaled_part_has_its_own_progress():
    """The warm-up and cosine of 10 steps: 0, 1/2 of the peak, then the cosine over 8 steps."""
    got = values("linear(0, 1)[0.2] + cosine(1, 0)[0.8]", 10)
    expected = [0, 0.5, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(8))]
    assert got == pytest.approx(expected, abs=1e-12)


def test_fixed_part_has_the_progress_of_the_run():
    """ClassyVision's ViT recipe: 2.927e-3 after the warm-up, whose peak is never reached."""
    curve = Curve("linear(0, 3e-3)[0.1] + cosine(3e-3, 0)[0.9, fixed]", "--sched", 300)
    assert curve(0.05) == pytest.approx(1.5e-3)
    assert curve(0.0999) == pytest.approx(2.997e-3)
    assert curve(0.1) == pytest.approx(1.5e-3 * (1 + math.cos(0.1 * math.pi)))
    assert f"{curve(0.1):.3e}" == "2.927e-03"
    assert curve(0.5) == pytest.approx(1.5e-3)


def test_function_of_ones_own_is_a_schedule():
    assert values("math:pow(2)", 4) == [0, 0.0625, 0.25, 0.5625]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin(1,0)", "--sched: unknown schedule 'cosin'. Did you mean 'cosine'"),
        ("step(1)[0.5] + stp(1)[0.5]", r"\n  step.*\n {17}\^$"),
        ("step()", r"step: got no value; step takes \*values\n"),
        ("multistep()", "multistep: got no value"),
        ("multistep(1, 0.1, milestones=3)", "milestones is 3, expected a list such as"),
        ("step_with_fixed_gamma(1, 0.1, 2.5)", "num_decays is 2.5, expected an integer of at"),
        ("cosine(1)", r"cosine\(1\): .*'end'; cosine takes start, end\n"),
        ("cosine(1, 0, ende=3)", "'ende'; cosine takes start, end\n"),
        ("cosine('a', 0)", "start is 'a', expected a number; cosine takes start, end\n"),
        ("multistep(1, x)", r"values is 'x', .*takes \*values, milestones=None\n"),
        ("linear(0,1)[2]", r"the length is 2, expected a number in \(0,1\]"),
        ("linear(0,1)[0.4, 0.6]", "got 0.4 and 0.6, expected one length"),
        ("linear(0,1)[0.1] + cosine(1,0)[0.8]", "sum to 0.9, expected 1"),
        ("linear(0,1) + cosine(1,0)[0.8]", r"such as linear\(0, 1\)\[0.1\]"),
        ("linear(0,1)[0.1, epoch] + cosine(1,0)[0.9]", "in all of them or in none"),
        ("cosine(1, 0)[fixd]", "unknown word 'fixd'. Did you mean 'fixed'"),
        ("step(1, 2)[step, epoch]", "contradict"),
        ("multistep(1, 2, milestones=[3, 5])", "2 values need 1 milestone in ascending"),
        ("exponential(1, -2)", "no finite number"),
        ("linear(1, -1)", "-0.002 at 50.1% of the run, expected 0 to inf"),
        ("wsd(0.9, 0.5)", "a sum of at most 1"),
        ("cosine(1,0) linear(1,0)", r"expected '\+' or the end\n.*\n {14}\^"),
        ("math:pi", "math:pi cannot be used"),
    ],
)
def test_wrong_schedule_is_an_error_that_says_what_is_wrong(text, message):
    with pytest.raises(UserError, match=message):
        Curve(text, "--sched", 10, (0, math.inf))


@pytest.mark.parametrize(
    ("text", "problem", "place"),
    [
        ("cosine(1,0)[banana]", "unknown word 'banana'", 12),
        ("linear(0,1)[0.5,fixd] + cosine(1,0)[0.5]", "unknown word 'fixd'", 16),
        ("linear(0,1)[0.5] + cosine(1,0)", r"such as cosine\(1, 0\)\[0.1\]", 19),
        ("linear(0,a)", "end is 'a', expected a number", 9),
        ("linear(0,end=nan)", "end is 'nan', expected a number", 13),
        ("constant(1)[0.5] + linear(0,1,2)[0.5]", "too many positional arguments", 19),
        ("1 * linear(0)", "missing a required argument: 'end'", 4),
        ("linear(0,1)[0.1] + cosine(1,0)[0.8]", "sum to 0.9, expected 1", 31),
        ("linear(0,1)[0.5] + linear(1,-1)[0.5]", "expected 0 to inf", 19),
        ("linear(0,1)[0.5, epoch] + cosine(1,0)[0.5]", "or in none", 26),
        ("step(1, 2)[step, epoch]", "contradict", 17),
        ("linear(0,1)[0.4, 0.6]", "expected one length", 17),
        ("step(1)[0.5] + multistep()[0.5]", "got no value", 15),
        ("math:pi", "cannot be used", 0),
    ],
)
def test_an_error_points_at_the_character(text, problem, place):
    with pytest.raises(UserError, match=problem) as error:
        Curve(text, "--sched", 10, (0, math.inf))
    assert str(error.value).endswith(f"\n  {text}\n  {' ' * place}^")


# --- in the optimizer --------------------------------------------------------------------------


def test_learning_rate_is_the_peak_times_the_schedule_and_the_scale_of_the_layer():
    optimizer = optimizer_of_two()
    args = schedule_flags(epochs=2, sched="linear(0, 1)[0.5] + constant(0.5)[0.5]")
    schedule = build_schedule(args, optimizer, 0.8, steps=Steps.even(2, args.epochs))
    seen = []
    for step in range(4):
        seen.append([schedule.apply(step), *(group["lr"] for group in optimizer.param_groups)])
    assert seen == [pytest.approx([x, 0.5 * x, x]) for x in (0, 0.4, 0.4, 0.4)]


def test_other_options_follow_their_schedules_unless_a_group_has_its_own():
    optimizer = optimizer_of_two()
    optimizer.param_groups[0] |= {"betas": (0.7, 0.8), "own_options": ["betas"]}
    flags = ["weight_decay=linear(0.1, 0.3)", "momentum = linear(0.5, 0.9)", "beta2=constant(0.95)"]
    args = schedule_flags(epochs=1, sched_options=[*flags, "eps=constant(1e-6)"])
    schedule = build_schedule(args, optimizer, 1.0, steps=Steps.even(2, args.epochs))
    schedule.apply(1)
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (pytest.approx(0.2), 0.0)
    assert first["betas"] == (0.7, 0.8)
    assert second["betas"] == (pytest.approx(0.7), 0.95)  # as in OneCycleLR, momentum is beta1
    assert second["eps"] == 1e-6
    optimizer.param_groups[0]["own_options"] = ["weight_decay"]
    schedule.apply(0)
    assert first["weight_decay"] == pytest.approx(0.2)


def test_momentum_of_sgd_is_scheduled():
    group = {"params": [nn.Parameter(torch.ones(1))], "lr_scale": 1.0, "decayed": True}
    optimizer = torch.optim.SGD([group], lr=1.0, momentum=0.9)
    args = schedule_flags(epochs=1, sched_options=["momentum=linear(0.5, 0.9)"])
    build_schedule(args, optimizer, 1.0, steps=Steps.even(2, args.epochs)).apply(1)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr=cosine(1,0)"], "use it"),
        (["momentum"], "got 'momentum', expected NAME=SCHEDULE"),
        (["eps=constant(1)", "eps=constant(1)"], "once for each name"),
        (["beta4=constant(1)"], "unknown option 'beta4'. Did you mean 'beta"),
        (["momentum=linear(0.5, 2)"], "--sched_options momentum: .* expected 0 to 1"),
        (["eps=linear(1, -1)"], "--sched_options eps: .* expected 1e-30 to inf"),
        (["weight_decay=cosin(1, 0)"], "--sched_options weight_decay: unknown schedule"),
    ],
)
def test_wrong_option_is_an_error_that_names_it(words, message):
    with pytest.raises(UserError, match=message):
        build_schedule(schedule_flags(sched_options=words), optimizer_of_two(), 1.0, Steps.even(2))


def test_values_of_other_options_are_checked_by_the_optimizer():
    args = schedule_flags(sched_options=["alpha=linear(0.9, -1)"], opt="rmsproptf")
    args.opt_eps = args.opt_betas = None
    with pytest.raises(UserError, match="--sched_options alpha: Invalid alpha value: -0.998"):
        build_curves(args)
    args.sched_options = ["alpha=linear(0.9, 0.99)"]
    assert list(build_curves(args)[1]) == ["alpha"]


def test_snapshots_of_timms_optimizers_are_not_scheduled():
    from timm.optim import Lion

    optimizer = Lion([nn.Parameter(torch.ones(1))], lr=1.0)
    assert "max_lr_snapshot" in optimizer.defaults
    assert sorted(schedulable(optimizer)) == ["beta1", "beta2", "momentum", "weight_decay"]


def test_drawing_marks_the_peak_of_any_schedule():
    args = schedule_flags(epochs=10, sched="linear(0.5, 2)[0.4] + cosine(2, 0)[0.6]")
    schedule = build_schedule(args, optimizer_of_two(), 0.1, steps=Steps.even(10, args.epochs))
    rows = [row.split() for row in lr_rows(schedule, 50)]
    assert {int(row[1]): row[-1] for row in rows if row[-1] in ("peak", "here")} == {
        40: "peak",
        50: "here",
    }
    assert next(row for row in rows if row[1] == "40")[2:4] == ["2.00e-01", "#" * 40]


# --- flags -------------------------------------------------------------------------------------


def parsed(words: str) -> object:
    return options.parse(options.finetune_parser(), f"--data_set DIGITS {words}".split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sched cosine(1,0) --warmup_epochs 3", "--warmup_epochs 3 would be ignored"),
        ("--sched cosine(1,0) --warmup_steps 3", "--warmup_steps 3 would be ignored"),
        ("--sched cosine(1,0) --min_lr 1e-6", "--min_lr 1e-06 would be ignored"),
        ("--sched_options weight_decay=constant(1) --weight_decay 0.1", "--weight_decay 0.1 would"),
        ("--sched_options momentum=constant(1) --momentum 0.8 --opt sgd", "--momentum 0.8 would"),
        ("--sched_options eps=constant(1) --opt_eps 0.1", "--opt_eps 0.1 would be ignored"),
        ("--clip_mode agc", "--clip_mode agc needs --clip_grad"),
        ("--freeze head:0-1 --cuda_graphs", "--cuda_graphs true and --freeze head:0-1"),
    ],
)
def test_flag_that_a_schedule_replaces_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parsed(words)
    assert message in capsys.readouterr().err


def test_args_of_a_run_with_a_schedule_start_the_same_run(tmp_path):
    """They hold every flag, those too that the schedule replaces."""
    words = "--sched cosine(1,0) --sched_options weight_decay=constant(1) --recipe digits_finetune"
    args = parsed(f"{words} --weight_decay 0")
    (tmp_path / "args.yaml").write_text(options.dump_args(args))
    again = parsed(f"--config {tmp_path / 'args.yaml'}")
    assert (again.sched, again.warmup_epochs, again.min_lr) == ("cosine(1,0)", 0.0, 0.0)
    assert again.sched_options == ("weight_decay=constant(1)",)


def test_schedule_replaces_the_warm_up_of_a_recipe_and_the_other_way_round(tmp_path):
    assert parsed("--recipe digits_finetune --sched cosine(1,0)").warmup_epochs == 0
    (tmp_path / "mine.yaml").write_text("sched: cosine(1,0)\n")
    assert parsed(f"--config {tmp_path / 'mine.yaml'} --warmup_epochs 3").sched is None
