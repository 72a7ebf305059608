# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The benchmark compares equals, and its program prints every row and ratio.

PYTHONPATH=. pytest tests/test_benchmarks.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import step
from benchmarks.dense_masked import DenseMasked, assert_equal_to_packed
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE, random_mask

ROOT = Path(__file__).resolve().parents[1]


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

    assert step.saved_bytes(step.Variant("toy", 1, model, None, loss)) == 32


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
