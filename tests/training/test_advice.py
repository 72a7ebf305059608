# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Advice on what limits the speed: each rule, from numbers alone, and when a run gives it."""

from dataclasses import replace

import pytest

from config import parser as options
from training.advice import Adviser, Load, Use, advise

BALANCED = {"data": 1.0, "forward": 30.0, "backward": 60.0, "optimizer": 9.0}
LATE_DATA = BALANCED | {"data": 50.0}
GPU = Load(BALANCED, steps=100, caught_up=0, memory=0.9)


def limit(load: Load, use: Use | None = None) -> str | None:
    found = advise(load, use or Use())
    return found and found[0]


@pytest.mark.parametrize(
    ("load", "use", "expected"),
    [
        (Load(BALANCED, 100), Use(), None),
        (Load(), Use(), None),
        (Load(LATE_DATA, 100), Use(), "loader"),
        (Load(BALANCED | {"data": 26.0}, 100), Use(), "loader"),
        (Load(BALANCED | {"data": 24.0}, 100), Use(), None),
        (GPU, Use(), None),
        (replace(GPU, caught_up=80), Use(), "host"),
        (replace(GPU, caught_up=40), Use(), None),
        (replace(GPU, caught_up=80, memory=0.2), Use(), "batch"),
        (replace(GPU, memory=0.2), Use(), None),  # the GPU is busy all the same
        (replace(GPU, memory=0.2), Use(update_freq=4), "batch"),
        (GPU, Use(update_freq=4), None),  # for want of memory
        (replace(GPU, seconds=BALANCED | {"comm": 50.0}), Use(), "communication"),
        (Load(BALANCED | {"comm": 20.0}, 100), Use(), None),
        # A GPU that waits for data has no work left either:
        (replace(GPU, seconds=LATE_DATA, caught_up=100), Use(), "loader"),
    ],
)
def test_what_limits_the_speed(load, use, expected):
    assert limit(load, use) == expected


def test_sentence_on_the_loader_names_the_flags_that_are_left():
    def about(**flags) -> str:
        return advise(Load(LATE_DATA, 100), Use(**flags))[1]

    assert about(num_workers=1, cores=8) == (
        "the loader is the limit: steps wait for data in 34% of the time; drop --num_workers 1, "
        "and the number of loader processes is measured (a process has 8 CPU cores here)"
    )
    assert about(num_workers=8, cores=8).endswith(
        "34% of the time; try --decode fast, --ram_cache, smaller images (pack.py --size) or more "
        "CPU cores"
    )
    assert about(files=False).endswith("time; try more CPU cores or less augmentation")
    assert about(decode="fast", ram_cache=True).endswith(
        "34% of the time; try smaller images (pack.py --size) or more CPU cores"
    )


def test_sentence_on_the_host_names_the_flags_that_are_left():
    load = replace(GPU, caught_up=80)
    begin = "the host is the limit: at the end of 80% of the steps the GPU had no work left, since "
    begin += "Python launches kernels too slowly; "
    found = {
        Use(): "try --cuda_graphs or --compile",
        Use(compile=True): "try --cuda_graphs",
        Use(update_freq=2): "try --compile",  # --cuda_graphs is refused with accumulation
        Use(cuda_graphs=True, compile=True): "try fewer hooks, or a faster CPU",
    }
    assert {use: advise(load, use)[1] for use in found} == {
        use: begin + end for use, end in found.items()
    }


def test_sentences_on_the_batch():
    late = replace(GPU, caught_up=80, memory=0.2)
    assert advise(late, Use(batch_size=8))[1] == (
        "the batch is too small for the GPU: at the end of 80% of the steps the GPU had no work "
        "left, and 80% of its memory is free; raise --batch_size, now 8"
    )
    assert advise(replace(GPU, memory=0.2), Use(batch_size=8, update_freq=4))[1] == (
        "the batch is small: a step has 4 forward passes, and 80% of the GPU memory is free; raise "
        "--batch_size, now 8, and lower --update_freq as much, or give --effective_batch"
    )


@pytest.mark.parametrize(
    ("compression", "flags"), [("none", "--grad_compression bf16 or "), ("bf16", "")]
)
def test_sentence_on_communication(compression, flags):
    load = replace(GPU, seconds=BALANCED | {"comm": 100.0})
    assert advise(load, Use(grad_compression=compression))[1] == (
        "communication is the limit: steps wait for gradients of other processes in 50% of the "
        f"time; try {flags}a larger --batch_size or --update_freq 2 or more; perhaps one process "
        "is slower than the others"
    )


def test_every_flag_in_the_advice_exists():
    loads = [Load(LATE_DATA, 1), replace(GPU, caught_up=90), replace(GPU, caught_up=90, memory=0)]
    loads += [replace(GPU, seconds=BALANCED | {"comm": 99.0})]
    uses = [Use(), Use(num_workers=0, cores=2), Use(update_freq=3)]
    words = " ".join(advise(load, use)[1] for load in loads for use in uses).split()
    flags = {word.strip(".,;()") for word in words if word.startswith("--")} - {
        "--size"
    }  # pack.py's
    known = {*options.pretrain_parser()._option_string_actions}
    known &= {*options.finetune_parser()._option_string_actions}
    assert flags <= known
    assert len(flags) >= 7


def line(data: float, steps: int = 20, seconds: float = 10.0) -> Load:
    return Load({"data": data * seconds, "forward": (1 - data) * seconds}, steps)


def test_advice_comes_once_and_not_from_the_first_steps():
    """Those compile, choose kernels and find out how many loader processes are needed."""
    adviser = Adviser(Use())
    assert adviser.after_line(line(0.9)) == ""  # steps 1 to 20
    assert [bool(adviser.after_line(line(0.5))) for _ in range(4)] == [False, False, True, False]
    assert [adviser.after_line(line(0.5)) for _ in range(6)] == [""] * 6  # it is known by now


def test_advice_needs_enough_steps_and_enough_time():
    adviser = Adviser(Use())
    found = [adviser.after_line(line(0.5, steps=100, seconds=1.0)) for _ in range(25)]
    assert [bool(text) for text in found] == [False] * 20 + [True] + [False] * 4
    adviser = Adviser(Use())
    found = [adviser.after_line(line(0.5, steps=1, seconds=100.0)) for _ in range(75)]
    assert [bool(text) for text in found].index(True) == 20 + 50 - 1


def test_one_slow_line_is_no_reason_for_advice():
    adviser = Adviser(Use())
    shares = [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0]
    assert [adviser.after_line(line(share)) for share in shares] == [""] * 9


def test_loads_add_up():
    both = Load({"data": 1.0}, 2, 1, 0.1) + Load({"data": 2.0, "comm": 1.0}, 3, 2, 0.5)
    assert both == Load({"data": 3.0, "comm": 1.0}, 5, 3, 0.5)
    assert (Load() + Load({}, 1)).caught_up is None
