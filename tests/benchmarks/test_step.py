# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The benchmark compares equals, and its program prints every row and ratio."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import step, variants
from benchmarks.dense_masked import DenseMasked, assert_equal_to_packed
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE, random_mask

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def toy() -> tuple[FCMAE, torch.Tensor, torch.Tensor]:
    """A float64 FCMAE, images of 2 x 3 patches and a mask that leaves two visible."""
    torch.manual_seed(0)
    model = FCMAE(ConvNeXtV2((1, 1, 2, 1), (4, 6, 8, 10)), decoder_embed_dim=12).double()
    mask = random_mask(torch.rand(3, 6), 2).double()
    return model, torch.randn(3, 3, 64, 96, dtype=torch.float64), mask


def test_dense_masked_is_the_packed_network():
    model, images, mask = toy()
    gaps = assert_equal_to_packed(model, images, mask, 1e-9)
    assert len(gaps) == 2 + len(list(model.parameters()))
    packed = model.forward_encoder(images, mask)
    assert torch.allclose(DenseMasked(model).forward_encoder(images, mask), packed, atol=1e-12)


@pytest.mark.parametrize("name", ["encoder.stages.0.0.grn.beta", "encoder.stages.3.0.norm.weight"])
def test_the_check_before_timing_can_fail(name, monkeypatch):
    """A dense-masked network with one wrong parameter is found out."""
    model, images, mask = toy()
    honest = DenseMasked.forward

    def wrong(self, images, mask):
        with torch.no_grad():
            self.model.get_parameter(name).add_(0.01)
        return honest(self, images, mask)

    monkeypatch.setattr(DenseMasked, "forward", wrong)
    with pytest.raises(AssertionError):
        assert_equal_to_packed(model, images, mask, 1e-6)


def test_mask_that_is_left_out_is_found(monkeypatch):
    """Without its mask GRN would sum over hidden cells, as it does in mmpretrain."""
    model, images, mask = toy()

    def everything(visible, x):
        return torch.ones_like(x[..., :1])

    monkeypatch.setattr("benchmarks.dense_masked.stage_mask", everything)
    with pytest.raises(AssertionError, match="prediction"):
        assert_equal_to_packed(model, images, mask, 1e-6)


def test_bytes_saved_count_each_storage_once():
    """x is saved twice, as a whole and as a view; the parameter not at all: 8 float32."""
    x = torch.ones(8)
    model = torch.nn.Linear(1, 1)

    def loss():
        return (model.weight[0, 0] * x).sum() + (model.weight[0, 0] * x[:4]).sum()

    assert variants.saved_bytes(variants.Variant("toy", 1, model, None, loss)) == 32


def test_unknown_variant_is_refused(capsys):
    with pytest.raises(SystemExit):
        step.parse_args(["--only", "packed,tim"])
    assert "--only tim: expected some of packed," in capsys.readouterr().err


def test_program_prints_rows_and_ratios(tmp_path):
    output = tmp_path / "table.md"
    command = (
        f"{sys.executable} benchmarks/step.py --model convnextv2_atto --input_size 64 "
        f"--batch_size 2 --rounds 1 --warmup 0 --no_compile --device cpu --output {output}"
    )
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ("packed", "masked", "dense", "timm")
    for name in names:
        assert done.stdout.count(f"\n| {step.VARIANTS[name]} | ") == 1, name
    for top, below in (("packed", "masked"), ("dense", "timm"), ("packed", "dense")):
        assert f"| {step.VARIANTS[top]} / {step.VARIANTS[below]} | " in done.stdout
    assert "compiled" not in done.stdout
    assert output.read_text(encoding="utf-8").strip() == done.stdout.strip()


TOY = "--model convnextv2_atto --input_size 64 --batch_size 2 4 --warmup 0 --device cpu"


def run_here(words: str, tmp_path: Path) -> tuple[int, str]:
    """Exit code and table of the program in this process, its signals put back."""
    numbers = (signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    output = tmp_path / "table.md"
    try:
        code = step.main([*f"{TOY} {words}".split(), "--output", str(output)])
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    return code, output.read_text(encoding="utf-8")


def at_call(number: int, action: Callable[[], object], real: Callable) -> Callable:
    """`real`, with the action before one of its calls."""
    calls = itertools.count(1)

    def wrapped(*args):
        if next(calls) == number:
            action()
        return real(*args)

    return wrapped


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_program_reports_the_whole_rounds_it_has(monkeypatch, tmp_path):
    """Two variants, so SIGTERM before the sixth timing leaves two of nine rounds."""
    monkeypatch.setattr(step, "time_quietly", at_call(6, sigterm, step.time_quietly))
    code, text = run_here("--only packed,dense --rounds 9", tmp_path)
    assert code == 0
    assert "2 of 9 (out of time) interleaved rounds" in text
    assert f"| {step.VARIANTS['packed']} / {step.VARIANTS['dense']} | " in text


def test_stopped_before_every_batch_was_tried_it_times_one_round(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "try_variant", at_call(3, sigterm, step.try_variant))
    monkeypatch.setattr(step, "time_quietly", at_call(3, sigterm, step.time_quietly))
    code, text = run_here("--only packed,dense --rounds 9", tmp_path)
    assert code == 0
    assert "1 of 9 (out of time) interleaved rounds" in text
    for name in ("packed", "dense"):
        assert f"| {step.VARIANTS[name]} | 2 | " in text
        assert f"Left out: {step.VARIANTS[name]}, batch 4: out of time." in text


def test_after_its_minutes_no_round_begins(monkeypatch, tmp_path):
    def past() -> None:
        monkeypatch.setattr(step.time, "monotonic", lambda: step.START + 6e4)

    monkeypatch.setattr(step, "time_quietly", at_call(3, past, step.time_quietly))
    code, text = run_here("--only packed --rounds 9 --minutes 900", tmp_path)
    assert code == 0
    assert "3 of 9 (out of time) interleaved rounds" in text


def test_time_that_is_up_ends_a_long_compilation(monkeypatch, tmp_path):
    """The alarm comes while the second variant is being made; the first has its row."""
    real = step.make_variant

    def make_variant(name, *more):
        if name == "dense":
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(60)
        return real(name, *more)

    monkeypatch.setattr(step, "make_variant", make_variant)
    code, text = run_here("--only packed,dense --rounds 2 --minutes 900", tmp_path)
    assert code == 1
    assert f"Left out: {step.VARIANTS['dense']}, batch 2: out of time." in text
    assert "2 interleaved rounds" in text


def test_products_that_cannot_be_repeated_leave_only_their_row_out(monkeypatch, tmp_path, capsys):
    def fail(replay):
        raise RuntimeError("no such kernel\nmore of it")

    monkeypatch.setattr(step.Products, "__call__", fail)
    code, text = run_here("--only packed,products --rounds 1", tmp_path)
    assert code == 0
    assert f"| {step.VARIANTS['products']} |" not in text
    assert re.search(r"Left out: the matrix products .*: RuntimeError: no such kernel\.", text)
    assert "left out: the matrix products" in capsys.readouterr().err


def test_a_peer_that_fails_stops_no_other(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(variants.timm, "create_model", fail)
    code, text = run_here("--only packed,timm --rounds 1", tmp_path)
    assert code == 1
    assert f"Left out: {step.VARIANTS['timm']}, batch 4: RuntimeError: broken." in text
    assert f"| {step.VARIANTS['packed']} | " in text
