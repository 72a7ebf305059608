# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Speed in log lines and log.txt: images a second, shares, MFU, advice; and in whole runs."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

import main_finetune
import main_pretrain
from config import parser as options
from data_loading.stages import ByEpoch
from tests.training.test_step_clock import Stream, Time
from training import log_files, run_lock
from training.advice import Adviser, Use
from training.checkpoint import TrainState
from training.hooks import Reporter
from training.report import SPEED
from training.speed import Speed, build_speed
from training.step_clock import EventClock, no_mark
from training.steps import Steps

CPU = torch.device("cpu")


@pytest.fixture
def host(monkeypatch):
    host = Time()
    monkeypatch.setattr(time, "perf_counter", host)
    return host


def run_steps(speed: Speed, host: Time, steps: int, data: float, seconds: float = 1.0) -> None:
    """Steps of 4 images, of which the wait for data takes a fraction."""
    for _ in range(steps):
        host.now += data * seconds
        speed.clock.mark("data")
        host.now += (1 - data) * seconds
        speed.clock.mark("forward")
        speed.after_batch(4)
        speed.after_step()


def test_values_of_lines_and_of_a_phase(host):
    """An epoch is the mean of its steps, not of its lines."""
    speed = Speed(CPU)
    run_steps(speed, host, 3, data=0.5)
    first = speed.line(epoch=0)
    assert first == {"images_per_s": 4.0, "time_data": 0.5, "time_forward": 0.5}
    assert speed.line(epoch=0) == first  # as for the line after the first step
    speed.end_line()
    run_steps(speed, host, 1, data=0.0, seconds=3.0)
    assert speed.line(epoch=0)["time_data"] == 0.0
    whole = speed.end_phase(epoch=0)
    assert whole == {"images_per_s": 16 / 6, "time_data": 0.25, "time_forward": 0.75}
    host.now += 100.0  # an evaluation
    speed.begin_phase()
    run_steps(speed, host, 1, data=0.25)
    assert speed.end_phase(epoch=1)["images_per_s"] == 4.0


def test_mfu_by_hand(host):
    """4 images a second of 30 FLOPs each, and 90 in epochs of larger images, of 1200 FLOP/s."""
    speed = Speed(CPU, flops=ByEpoch({0: 30.0, 2: 90.0}), peak=1200.0)
    run_steps(speed, host, 2, data=0.0)
    assert [speed.line(epoch)["mfu"] for epoch in (0, 1, 2)] == [0.1, 0.1, 0.3]
    for other in (Speed(CPU, flops=ByEpoch({0: 30.0})), Speed(CPU, peak=1200.0)):
        assert "mfu" not in other.line(0)


def test_advice_is_logged_once_and_belongs_to_its_phase(host, log):
    speed = Speed(CPU, Adviser(Use()))
    speed.begin_phase()
    for _ in range(8):
        run_steps(speed, host, 20, data=0.5)
        speed.line(0)
        speed.end_line()
    (message,) = log.messages
    assert message.startswith("advice: the loader is the limit: steps wait for data in 50% of the ")
    assert speed.end_phase(0)["advice"] == [message.removeprefix("advice: ")]
    speed.begin_phase()
    assert "advice" not in speed.end_phase(1)


def steps_on_a_device(can_skip: bool) -> Speed:
    """Speed after steps whose work the device had done before the host queued the rest."""
    stream, speed = Stream(), Speed(CPU)
    speed.clock = EventClock(stream.make_event, lambda: stream)
    speed.watch(SimpleNamespace(can_skip=can_skip, mark=no_mark))
    speed.begin_phase()
    for _ in range(5):
        for part in ("forward", "backward", "optimizer"):
            stream.work(1.0)
            stream.wait()
            speed.clock.mark(part)
        speed.after_step()
    speed.line(0)
    return speed


def test_host_is_blamed_only_if_it_could_keep_ahead():
    """With an optimizer that waits for each step, the GPU is always done with backward."""
    assert steps_on_a_device(can_skip=True).load.caught_up == 5
    assert steps_on_a_device(can_skip=False).load.caught_up is None


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("--batch_size 8", "batch_size", 8),
        ("--batch_size 8", "update_freq", 3),
        ("--num_workers 2", "num_workers", 2),
        ("", "num_workers", None),
        ("--decode fast", "decode", "fast"),
        ("--data_set auto --data_path x --ram_cache", "ram_cache", True),
        ("--data_set auto --data_path x", "files", True),
        ("", "files", False),
        ("--compile", "compile", True),
        ("--grad_compression bf16", "grad_compression", "bf16"),
    ],
)
def test_advice_knows_the_flags(words, name, expected):
    """Or it would recommend what is there."""
    words = f"--data_set DIGITS --batch_size 8 {words}".split()
    args = options.parse(options.pretrain_parser(), words)
    speed = build_speed(args, CPU, Steps.even(10, effective_batch=24))
    assert getattr(speed.adviser.use, name) == expected


def test_log_txt_has_the_speed_of_an_epoch_and_the_checkpoint_has_not(tmp_path, host):
    """Two equal runs would have different checkpoints."""
    state = TrainState(stats={"train_loss": 1.0, "epoch": 0})
    hook = log_files.JsonHook(tmp_path, state)
    reporter = Reporter([hook], CPU, state, Steps.even(1), 1)
    batches = SimpleNamespace()
    reporter.begin_epoch(["loss"], batches)
    run_steps(reporter.speed, host, 1, data=0.25)
    batches.mark("rest")
    reporter.end_phase({})
    reporter.end_epoch()
    assert json.loads((tmp_path / "log.txt").read_text()) == {
        "train_loss": 1.0, "epoch": 0, "images_per_s": 4.0, "time_data": 0.25, "time_forward": 0.75,
    }  # fmt: skip
    assert state.stats == {"train_loss": 1.0, "epoch": 0}


SMALL = (
    "--data_set tests.tiny:colors --data_path x --input_size 16 --stem_stride 1 --batch_size 6 "
    "--lr 0.01 --num_workers 0 --device cpu --kernels torch --print_freq 1 --epochs 1"
)


@pytest.mark.parametrize(
    "main",
    [pytest.param(main_pretrain, marks=pytest.mark.slow), main_finetune],
    ids=lambda main: main.__name__,
)
def test_a_run_tells_where_its_time_goes(main, tmp_path):
    """In the lines, in TensorBoard and in log.txt, by the same names, as shares of the whole."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kind = "fcmae --decoder_embed_dim 8" if main is main_pretrain else "classifier --disable_eval"
    words = f"{SMALL} --model tests.tiny:{kind} --save_ckpt false --output_dir {tmp_path}"
    try:
        main.main(options.parse(main.get_args_parser(), words.split()))
    finally:
        run_lock.acquire_run_lock("")
    row = json.loads((tmp_path / "log.txt").read_text())
    shares = {name: value for name, value in row.items() if name.startswith("time_")}
    assert shares.keys() == {"time_data", "time_forward", "time_backward", "time_optimizer"}
    assert all(0 < share < 1 for share in shares.values())
    assert sum(shares.values()) < 1  # the rest is meters, log lines and hooks
    assert row["images_per_s"] > 0
    assert row.keys().isdisjoint({"mfu", "advice"})
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert {f"train/{name}" for name in (*shares, "images_per_s")} <= set(tags)
    lines = [
        line for line in (tmp_path / "console.log").read_text().splitlines() if "  step " in line
    ]
    assert len(lines) == 4
    for word in ("  data ", "%  forward ", "%  backward ", "%  optimizer ", "%  memory "):
        assert all(word in line for line in lines)
    assert set(shares) <= set(SPEED)
