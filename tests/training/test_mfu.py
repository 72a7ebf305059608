# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""FLOPs of training, and the peak speeds of GPUs by the names that drivers give them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models import create_model
from models.fcmae import visible_patches
from training import costs, speed
from training.mfu import PEAKS, peak_flops

T = 1e12


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "none", 67),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA B200", "bf16", 2250),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("Tesla V100S-PCIE-32GB", "fp16", 130),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA RTX A6000", "bf16", 154.8),
        ("NVIDIA GeForce RTX 3090", "bf16", 71.2),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4070 Ti", "none", 40.1),
        ("NVIDIA GeForce RTX 5090", "fp16", 209.6),
    ],
)
def test_peaks_by_the_names_of_drivers(name, precision, expected):
    assert peak_flops(name, precision) == pytest.approx(expected * T)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",  # a part of one
        "NVIDIA A10G",
        "NVIDIA H800",
        "NVIDIA T400",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3080 Ti",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_other_products_with_similar_names_are_not_known(name):
    """The MFU would be wrong, and nobody would see it."""
    assert peak_flops(name, "bf16") is None


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "Tesla T4"])
def test_precision_that_a_gpu_lacks_has_no_peak(name):
    assert peak_flops(name, "bf16") is None
    assert peak_flops(name, "tf32") is None


def test_lower_precision_is_never_slower():
    for name, speeds in PEAKS.items():
        known = [x for x in speeds if x is not None]
        assert known == sorted(known), name


def args_for(**flags) -> SimpleNamespace:
    defaults = {"in_chans": 3, "input_size": (32, 32), "input_sizes": "", "model": "m"}
    return SimpleNamespace(**defaults | flags)


@pytest.fixture
def known_device(monkeypatch):
    monkeypatch.setattr(costs, "find_peak", lambda args, device: 1.0)


def test_flops_by_hand(known_device):
    """16 x 8 weights for each of 4 x 4 positions: a product is two operations, in three passes."""
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Flatten())
    flops = costs.training_flops(args_for(in_chans=8, input_size=(4, 4)), net)
    assert flops == {0: 3 * 2 * 16 * 8 * 16}
    assert next(net.parameters()).device.type == "cpu"  # counted on a copy


def test_flops_of_each_size(known_device):
    args = args_for(input_sizes="16:0,32:5")
    flops = costs.training_flops(args, nn.Conv2d(3, 4, 1))
    assert flops[5] == 4 * flops[0]


def test_masked_patches_cost_nothing(known_device):
    """A step of FCMAE must not look four times as efficient as it is, since most is masked."""
    sparse, dense = (
        costs.training_flops(
            args_for(input_size=(224, 224)),
            create_model("fcmae_convnextv2_atto", mask_ratio=ratio, decoder_embed_dim=8),
        )[0]
        for ratio in (0.6, 0.01)
    )
    visible = visible_patches(49, 0.6) / visible_patches(49, 0.01)
    assert sparse / dense == pytest.approx(visible, abs=0.05)  # the decoder sees all patches


def test_flops_are_not_known_of_frozen_networks_and_without_a_peak(known_device, monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    assert costs.training_flops(args_for(freeze=["0:0-1"]), net) is None
    net[0].requires_grad_(False)
    assert costs.training_flops(args_for(), net) is None
    monkeypatch.undo()
    assert costs.training_flops(args_for(), nn.Conv2d(3, 4, 1)) is None  # a CPU has no peak


def test_network_that_needs_data_is_named(known_device, log):
    class Reads(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * float(x.sum())

    assert costs.training_flops(args_for(model="mine"), Reads(3, 4, 1)) is None
    (message,) = log.messages
    assert message.startswith("mine: mfu is not known, since its FLOPs cannot be counted (")


@pytest.mark.parametrize(
    ("flags", "tf32", "expected"),
    [
        ({"amp": "none"}, False, 19.5),
        ({"amp": "none"}, True, 156),
        ({"amp": "bf16"}, False, 312),
        ({"amp": None}, False, 312),
    ],
)
def test_peak_is_that_of_the_precision(flags, tf32, expected, monkeypatch):
    """float32 runs as TF32 if torch is told so."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    precision = "high" if tf32 else "highest"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    args = SimpleNamespace(use_amp=None, **flags)
    assert speed.find_peak(args, torch.device("cuda")) == expected * T
    assert speed.find_peak(args, torch.device("cpu")) is None
