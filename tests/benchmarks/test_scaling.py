# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The model of many processes in numbers worked out by hand, and the program at toy size."""

import argparse
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scaling, scaling_model, scaling_steps, scaling_worker
from benchmarks.scaling_model import Cluster, Link, Training, Work, assumed_training
from models import create_model
from models.convnextv2 import SIZES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def case(mode: str = "pretrain", model: str = "convnextv2_tiny", words: str = "") -> Training:
    return assumed_training(model, mode, scaling.parse_args(words.split()))


def test_ring_by_hand():
    """4 members: 3 steps that add and 3 that hand on, each of 100 bytes of 400."""
    link = Link(latency=2.0, bandwidth=50.0)
    assert link.seconds(400, 4) == pytest.approx(6 * 2 + 6 * 100 / 50)
    assert link.seconds(400, 4, messages=3) == pytest.approx(3 * 6 * 2 + 6 * 100 / 50)
    assert link.seconds(400, 1) == 0


def test_tree_has_fewer_steps_and_as_many_bytes():
    """To 16 members and back: 4 levels each way."""
    ring, tree = Link(1.0, math.inf), Link(1.0, math.inf, tree=True)
    assert (ring.seconds(400, 16), tree.seconds(400, 16)) == (30, 8)
    assert Link(0.0, 50.0, tree=True).seconds(400, 16) == Link(0.0, 50.0).seconds(400, 16)


def test_nodes_exchange_parts_by_hand():
    """2 nodes of 4: 6/4 of 400 bytes within at 100 a second, then 2/2 of 100 between at 10."""
    cluster = Cluster(Link(1.0, 100.0), Link(3.0, 10.0), per_node=4)
    assert cluster.seconds(400, 8) == pytest.approx(6 * 1 + 6 + 2 * 3 + 10)
    assert cluster.seconds(400, 4) == cluster.inside.seconds(400, 4)


@pytest.mark.parametrize(("mib", "messages"), [(0.5, 1), (1, 1), (1.5, 2), (26, 2), (27, 3)])
def test_messages_are_buckets_of_the_wrapper(mib, messages):
    """One of 1 MiB, then of 25 MiB each."""
    assert scaling_model.buckets(mib * 2**20) == messages


def test_fit_finds_latency_and_bandwidth():
    """Of which 4 members share 2 cores."""
    link = Link(2e-4, 1.5e9, cores=2)
    points = [(4**exponent, n) for exponent in range(5, 13) for n in (2, 4)]
    sizes, members = zip(*points, strict=True)
    found = scaling_model.fit_link(sizes, members, [link.seconds(*point) for point in points], 2)
    assert found.latency == pytest.approx(link.latency)
    assert found.bandwidth == pytest.approx(link.bandwidth)


def test_fit_takes_no_negative_numbers():
    """Seconds that fall with size: the line through them would have a negative slope."""
    found = scaling_model.fit_link([1000, 2000, 3000], [2, 2, 2], [3e-3, 2e-3, 1e-3], 2)
    assert found.bandwidth == math.inf
    assert found.latency > 0


def test_fit_finds_seconds_of_image_and_step():
    work = scaling_model.fit_work([2, 4, 8], [0.5, 0.8, 1.4])
    assert (work.image, work.fixed) == (pytest.approx(0.15), pytest.approx(0.2))


def test_errors_are_relative():
    """+10% and -50%: sqrt((0.01 + 0.25) / 2)."""
    usual, largest = scaling_model.relative_errors([1.1, 2], [1, 4])
    assert (usual, largest) == (pytest.approx(math.sqrt(0.13)), pytest.approx(0.5))


@pytest.mark.parametrize(("seconds", "longer"), [(5.0, 3.0), (1.0, 0.2)])
def test_no_more_is_hidden_than_backward_lasts(seconds, longer):
    """Backward is 2 of 3 seconds; of an exchange of 5, 80% would be 4."""
    own = Training(Work(3.0, 0.0), Link(0.0, 4 / seconds), numbers=1, hidden=0.8)
    assert own.exchange(2) == pytest.approx(seconds)
    assert own.seconds(2, 1) == pytest.approx(3 + longer)


def test_processes_that_share_cores_by_hand():
    """4 on 2 cores: 2 times as long for 1 + 2 * 3 seconds, and for 6 latencies and 6 bytes."""
    link = Link(1.0, 1.0, cores=2)
    here = Training(Work(2.0, 1.0), link, numbers=1, hidden=0.5, slowdown={1: 1.0, 4: 2.0})
    assert here.exchange(4) == pytest.approx(2 * (6 + 6))
    assert here.seconds(4, 3) == pytest.approx(2 * 7 + max(0.5 * 24, 24 - 2 * 6 * 2 / 3))
    assert here.seconds(1, 3) == pytest.approx(7)


def test_gradients_sent_as_bf16_are_half_the_bytes_in_as_many_messages():
    """The wrapper's buckets are of what it has, float32."""
    whole, half = (case(words=f"--gradient_bytes {n}") for n in (4, 2))
    assert half.size == whole.size / 2
    assert half.messages == whole.messages == scaling_model.buckets(whole.size) > 1


def test_infinite_network_costs_nothing():
    endless = "--node_gb_s inf --network_gb_s inf --node_us 0 --network_us 0"
    for mode in ("pretrain", "finetune"):
        assert case(mode, words=endless).weak(1024, 1) == 1


@pytest.mark.parametrize("mode", ["pretrain", "finetune"])
@pytest.mark.parametrize("size", ["atto", "huge"])
def test_more_gpus_are_never_more_efficient(size, mode):
    own = case(mode, f"convnextv2_{size}")
    counts = (1, *scaling_model.GPUS)
    for efficiencies in ([own.weak(n, 64) for n in counts], [own.strong(n, 4096) for n in counts]):
        assert efficiencies[0] == 1
        assert efficiencies == sorted(efficiencies, reverse=True)
    fewest = [own.fewest(n) for n in counts]
    assert fewest == sorted(fewest)


def test_fewest_images_are_just_enough():
    own = case()
    images = own.fewest(64)

    def reached(n: int) -> float:
        return n * own.work.image / own.seconds(64, n)

    assert reached(images - 1) < 0.9 <= reached(images)


def test_a_step_of_one_gpu_by_hand():
    """1 GMAC = 6 GFLOP a step; 10% of 60 TFLOP/s: 1 ms an image, 12 + 1 blocks at 2 ms."""
    own = case(model="convnextv2_atto", words="--peak_tflops 60 --share 0.1 --block_ms 2")
    gmac = scaling_model.forward_gmac("convnextv2_atto", "pretrain", 224)
    assert own.work.image == pytest.approx(gmac * 1e-3)
    assert own.work.passes(1) == pytest.approx(0.026)
    assert own.work.fixed == pytest.approx(32 * own.size / 4 / 2.5e12)


def test_bytes_of_atto_by_hand():
    """A block of width d: 8 d^2 + 50 d + 2 d + 4 d + 8 d + d numbers."""
    dims, depths = (40, 80, 160, 320), (2, 2, 6, 2)

    def block(d: int) -> int:
        return 8 * d * d + 65 * d

    encoder = sum(n * block(d) for n, d in zip(depths, dims, strict=True))
    encoder += 3 * 16 * 40 + 40 + 2 * 40  # stem and its norm
    encoder += sum(2 * d + 4 * d * 2 * d + 2 * d for d in dims[:3])
    head = 2 * 320 + 320 * 1000 + 1000
    decoder = 320 * 512 + 512 + 512 + block(512) + 512 * 3072 + 3072
    assert scaling_model.parameters("convnextv2_atto", "finetune") == encoder + head
    assert scaling_model.parameters("convnextv2_atto", "pretrain") == encoder + decoder
    assert case("finetune", "convnextv2_atto", "--gradient_bytes 2").size == 2 * (encoder + head)


@pytest.mark.parametrize("mode", ["pretrain", "finetune"])
def test_multiplications_are_those_that_torch_counts(mode):
    """Its counter sees the depthwise convolutions of pre-training on the whole map."""
    name = {"pretrain": "fcmae_convnextv2_atto", "finetune": "convnextv2_atto"}[mode]
    network, mask = create_model(name).eval(), torch.tensor([[1.0, 1, 1, 0]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 64, 64), *([mask, 1] if mode == "pretrain" else []))
    hidden = 0  # multiplications of 49 weights a channel at the cells of three patches
    if mode == "pretrain":
        for stage, (depth, dim) in enumerate(zip(*SIZES["atto"], strict=True)):
            hidden += depth * dim * 49 * 3 * (8 >> stage) ** 2
    ours = scaling_model.forward_gmac("convnextv2_atto", mode, 64)
    assert counter.get_total_flops() / 2 == pytest.approx(ours * 1e9 + hidden)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only step", "--only step: expected some of steps, gpus, data, log"),
        ("--processes 1 3 --total 8", "--total 8 images do not divide among 3 processes"),
        ("--rounds 0", "--rounds: 0: expected a whole number from 1"),
        ("--processes 1 two", "--processes: two: expected a whole number from 1"),
        ("--share 20", "--share: 20: expected a fraction above 0, at most 1"),
        ("--hidden nan", "--hidden: nan: expected a fraction from 0 to 1"),
        ("--network_gb_s 0", "--network_gb_s: 0: expected a number above 0"),
        ("--quiet -1", "--quiet: -1: expected a number from 0"),
        ("--samples 100 7", "--samples 7: fewer than --ranks 1024"),
        ("--input_size 100", "not a whole number of 32 x 32 patches; try 96 x 96"),
        ("--model convnextv2_tny", "Did you mean 'fcmae_convnextv2_tiny'"),
    ],
)
def test_scaling_refuses(words, message, capsys):
    with pytest.raises(SystemExit):
        scaling.parse_args(words.split())
    assert message in capsys.readouterr().err


def test_process_that_ended_is_told():
    with scaling_steps.Team(1, scaling.parse_args([])) as team:
        team.members[0].kill()
        team.members[0].wait()
        with pytest.raises(SystemExit, match="a process asked for 'cpu' ended"):
            team.ask("cpu")


def tables(markdown: str, title: str) -> list[list[list[str]]]:
    """The cells of each table, without its head, of the section whose heading starts so."""
    section = markdown.partition(f"### {title}")[2].partition("\n### ")[0]
    found = re.findall(r"(?:^\|.*\n?)+", section, re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in text.splitlines()[2:]] for text in found]


def test_steps_and_gpus_in_toy_size(tmp_path):
    output = tmp_path / "runs/table.md"
    words = "--only steps,gpus --input_size 64 --processes 1 2 --batch_size 1 --total 2 --rounds 1"
    command = f"{sys.executable} benchmarks/scaling.py {words} --steps 1 --output {output}"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert text.strip() == done.stdout.strip()

    steps, messages = tables(text, "Steps on several processes: convnextv2_atto, pretrain")
    points = [["weak", "1", "1"], ["weak", "2", "1"], ["strong", "1", "2"], ["strong", "2", "1"]]
    assert [row[:3] for row in steps] == points
    assert all(float(cell) > 0 for row in steps if row[1] == "2" for cell in row[3:6])
    gradients = scaling_model.parameters("convnextv2_atto", "pretrain") / 256
    sizes = [*(4**exponent for exponent in range(8)), round(gradients)]
    control = [*scaling_steps.CONTROL.values()]
    assert [row[0] for row in messages] == [*(f"{size} KiB" for size in sizes), *control]

    gpus = tables(text, "Many GPUs, estimated")
    assert [[row[0] for row in table] for table in gpus] == [list(SIZES)] * 6
    assert all(len(row) == 3 + len(scaling_model.GPUS) for table in gpus[:2] for row in table)
    assert "Estimated, not measured" in text


def test_data_and_log_in_toy_size(monkeypatch, capsys):
    """In this process; a new one each would only take longer."""

    def ask(args: argparse.Namespace, what: str, **about: int) -> dict[str, float]:
        return scaling_worker.ANSWERS[what](**about)

    monkeypatch.setattr(scaling, "ask_fresh", ask)
    scaling.main(["--only", "data,log", "--samples", "50000", "70000"])
    text = capsys.readouterr().out
    samplers, indexes = tables(text, "Large data sets")
    assert [row[0] for row in samplers] == [row[0] for row in indexes] == ["50,000", "70,000"]
    (log,) = tables(text, "Cost of the log")
    assert len(log) == 5
    assert "70,000 samples in batches of 4096 (17 steps, 0 log lines)" in text
