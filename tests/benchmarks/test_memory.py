# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Estimated memory is the memory that processes really hold."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.memory_counts import (
    Line,
    Live,
    Step,
    Task,
    Work,
    count,
    count_work,
    distinct,
    fsdp_fraction,
    images_that_fit,
    line,
    per_gpu,
    saved_by,
    zero1_fraction,
)
from tests.groups import fork_context

pytestmark = pytest.mark.slow

ATTO = "convnextv2_atto"
# A root of 3 + 2 x 4 numbers, blocks of 5 and 5 x 2; groups of the optimizer of 8 + 10 and 3 + 5.
WORK = Work(Line(100, 7), (Line(150, 8), Line(50, 12)))
TOY = Step(
    units=(((3,), (2, 4)), ((5,),), ((5, 2),)),
    groups=((8, 10), (3, 5)),
    full=WORK,
    gathered=Work(Line(0, 7), (Line(20, 8),)),
    half=True,
    ema=True,
)


def test_estimate_by_hand_calculation():
    """26 numbers of four bytes; at 10 images the peak is 150 + 80, at 100 it is 50 + 1200."""
    assert per_gpu(TOY, "ddp", 4, 10) == {
        "weights": 104,
        "gradients": 104,
        "optimizer": 208,
        "EMA": 104,
        "gathered": 0,
        "saved": 170,
        "working": 60,
    }
    assert per_gpu(TOY, "ddp", 4, 100)["working"] == 1250 - 800
    assert per_gpu(TOY, "ddp", 4, 0)["working"] == 50  # 150 - 100


def test_zero1_fraction_is_that_of_the_gpu_that_holds_the_most():
    """10 and 8 go to two GPUs, 5 to the second, which has 13, and 3 to the first, which has 13."""
    assert zero1_fraction(TOY.groups, 2) == 13
    assert zero1_fraction(TOY.groups, 3) == 10
    assert per_gpu(TOY, "zero1", 2, 1)["optimizer"] == 13 * 8
    assert per_gpu(TOY, "zero1", 2, 1)["weights"] == 104


def test_fsdp_fractions_are_rows_rounded_up():
    shapes = ((3,), (2, 4), (5, 2), (1, 1, 1, 9))
    assert [fsdp_fraction(shape, 2) for shape in shapes] == [2, 4, 6, 9]
    held = per_gpu(TOY, "fsdp", 2, 1)
    assert held["weights"] == held["EMA"] == (2 + 4 + 3 + 6) * 4
    assert held["optimizer"] == 2 * held["gradients"] == 2 * held["weights"]
    assert held["gathered"] == 2 * 2 * 11 + 10 * (3 * 2 + 4)
    assert (held["saved"], held["working"]) == (7, 21)
    assert per_gpu(TOY, "fsdp", 1, 1) == per_gpu(TOY, "ddp", 1, 1)


def test_ema_update_copies_the_weights():
    """After a step: the copy of 26 numbers takes more than the 20 bytes of the peak."""
    idle = Work(Line(0, 1), (Line(20, 1),))
    step = Step(TOY.units, TOY.groups, idle, idle, half=True, ema=True)
    assert sum(per_gpu(step, "ddp", 1, 0).values()) == (4 + 1 + 1) * 104
    assert sum(per_gpu(step, "ddp", 1, 90).values()) == (4 + 1) * 104 + 110


@pytest.mark.parametrize(("memory", "images"), [(669, 0), (678, 1), (520 + 1250, 100), (1e3, 35)])
def test_most_images_that_fit(memory, images):
    """ddp: 520 bytes independent of the images, then 150 + 8 n or, from 25 on, 50 + 12 n."""
    assert images_that_fit(TOY, "ddp", 1, memory) == images


def test_bytes_in_use_are_those_of_storages_that_are_alive():
    outside = torch.ones(10)
    with Live([outside]) as live:
        outside.view(2, 5).add_(1)  # nothing new
        assert (live.now, live.peak) == (0, 0)
        first = torch.ones(10)
        second = first + 1
        assert live.now == 80
        del first
        assert live.now == 40
        third = second[:5]
        del second
        assert live.now == 40  # a view keeps its storage
        del third
    assert (live.now, live.peak) == (0, 80)


def test_saved_are_distinct_storages_but_no_parameters():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)

    def forward():
        y = layer(x)  # saves x and the weight
        return (y * y.view(3, 4)).sum()  # saves y twice

    assert saved_by(layer, forward)[0] == 2 * 3 * 4 * 4
    assert distinct([x, x.T, layer.weight, None, "text"]) == 48 + 64


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_counts_on_fake_tensors_equal_those_on_real_ones(kind, checkpointing):
    """Saved bytes, and the peak."""
    task = Task(ATTO, kind, 64, checkpointing, half=False)
    model = task.build()
    forward = task.forward(model, 3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Live([x for p in model.parameters() for x in (p, p.grad)]) as live:
        forward().backward()
    saved, peak = count(task, 3, cuda=False)
    assert saved == saved_by(model, forward)[0]
    assert peak == pytest.approx(live.peak, rel=0.01)


def test_bytes_grow_by_lines():
    """Saved bytes exactly; the peak is the higher one of two lines."""
    task = Task(ATTO, "finetune", 128, checkpointing=True, half=True)
    work = count_work(task)
    for images in (1, 3, 12, 40, 200):
        saved, peak = count(task, images)
        assert work.saved.at(images) == saved
        assert work.at_peak(images) == pytest.approx(peak, rel=0.03)
    assert line((2, 4), (10, 16)) == Line(4, 3)


def test_checkpointing_saves_less_than_half():
    """An image of Atto had 5.2 and 10.6 MB; stem, downsampling and inputs of blocks are left."""
    for kind, most in (("pretrain", 0.45), ("finetune", 0.4)):
        plain, again = (count(Task(ATTO, kind, 224, ck, half=True), 8)[0] for ck in (False, True))
        assert again < most * plain


def test_estimate_is_what_processes_hold(monkeypatch):
    """On one process and two, with each sharding, in float32 and in bf16 with checkpointing."""
    fork_context()  # spawned processes would import torch again
    forked = partial(memory.mp.start_processes, start_method="forkserver")
    monkeypatch.setattr(memory.mp, "spawn", forked)
    tasks = [
        Task(ATTO, "pretrain", 64, checkpointing=False, half=False),
        Task(ATTO, "finetune", 64, checkpointing=True, half=True),
    ]
    rows, worst = memory.check(tasks)
    assert len(rows) == len(tasks) * len(memory.WAYS)
    assert worst < 0.01


def test_tables_have_every_row(monkeypatch):
    monkeypatch.setattr(memory, "count_step", lambda task, fsdp: TOY)
    words = "--sizes atto tiny --gpus 1 2 8 --cards 1e-6 2.5e-6"
    text = memory.estimates(memory.get_args_parser().parse_args(words.split()))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    resident, images, total, fit, sizes = tables
    ways = ["ddp, any number", "zero1, 2 GPUs", "zero1, 8 GPUs", "fsdp, 2 GPUs", "fsdp, 8 GPUs"]
    assert [row.split(" | ")[1] for row in resident[2:]] == ways * 2
    for rows in (images, total, fit):
        names = [row.strip("| ").split(" | ")[:2] for row in rows[2:]]
        assert [again for _, again in names] == ["no", "yes"] * 4
        assert [name.split(",")[1] for name, _ in names[::2]] == [
            " 224 px", " 224 px", " 384 px", " 512 px"
        ]  # fmt: skip
    assert all(name in total[0] and name in fit[0] for name in ways)
    assert fit[2].startswith("| pre-training, 224 px | no | 35 / 160 |")  # 1000 and 2500 bytes
    assert [row.split(" | ")[0] for row in sizes[2:]] == ["| atto", "| tiny"]
