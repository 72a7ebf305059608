# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Heads in exported files and in checkpoints that are loaded again.

python -m pytest tests/weights/test_export_heads.py
"""

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

import export
from config.parser import export_parser
from errors import UserError
from models import build_classifier
from models.heads import HEADS
from tests.tiny import SIZE
from weights.export_formats import Network
from weights.fit import fit_weights

HERE, TINY = "tests.weights.test_export_heads", "tests.tiny:classifier"
LOADED = []  # modules that a head of this file was built for


class Fc(nn.Module):
    """A head of the user's own whose layer has timm's name of a whole ConvNeXt head."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        LOADED.append(dim)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Twice(Fc):
    """A head whose last linear layer is not the last one that is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).tanh()


def build(head: str, count: int) -> nn.Module:
    sizes = {"in_chans": 3, "stem_stride": 4, "input_size": (32, 32), "drop_path": 0.0}
    more = {"head": head, "heads": "", "loss": None, "head_init_scale": 1.0}
    more |= {"grad_checkpointing": False, "freeze_backbone": False}
    model = build_classifier(argparse.Namespace(model=TINY, **sizes, **more), count).eval()
    with torch.no_grad():
        for parameter in model.get_submodule("head").parameters():
            parameter.normal_()
    return model


def save(path: Path, model: nn.Module, head: str, count: int, **more: object) -> str:
    flags = {"model": TINY, "head": head, "input_size": (32, 32), "task": "classification"}
    names = [f"c{number}" for number in range(count)]
    content = {"model": model.state_dict(), "args": flags | more.pop("flags", {}), "classes": names}
    torch.save(content | more, path)
    return str(path)


def network(*words: str) -> nn.Module:
    args = export_parser().parse_args([*words, "--to", "safetensors", "--model", TINY])
    return Network(export.build_spec(args))


ROWS = [(name, SIZE[1][-1] if name == "identity" else 3) for name in HEADS]


@pytest.mark.parametrize(("head", "count"), [*ROWS, (f"{HERE}:Fc", 3)])
def test_every_head_is_loaded_again_and_exported(head, count, tmp_path):
    """`head.fc.`, timm's name of the classifier, was taken for `head.`."""
    model = build(head, count)
    state, report = fit_weights(build(head, count), model.state_dict())
    assert state.keys() == model.state_dict().keys()
    assert not report.missing + report.dropped
    path = save(tmp_path / "it.pth", model, head, count)
    found = network(path, *(["--head", head] if ":" in head else []))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(found(images), model(images))


def test_a_head_of_code_runs_only_if_it_is_named(tmp_path):
    """--model used to allow the code of a stored --head too."""
    head = f"{HERE}:Fc"
    path = save(tmp_path / "it.pth", build(head, 3), head, 3)
    heads = {"heads": f"main={head}@norm", "head": ""}
    two = save(tmp_path / "two.pth", build(head, 3), "", 3, flags=heads)
    LOADED.clear()
    with pytest.raises(UserError, match=f"--head {head}, which is code; give --head {head} to"):
        network(path)
    with pytest.raises(UserError, match=r"--head mlp is given, but .*it.pth was trained with"):
        network(path, "--head", "mlp")
    with pytest.raises(UserError, match="--heads main=.* is code; give --heads main="):
        network(two)
    with pytest.raises(UserError, match=r"--head .* is given, but .*two.pth has no --head"):
        network(two, "--head", head)
    assert not LOADED
    with pytest.raises(UserError, match="named_heads.main.fc.weight"):  # which these weights lack
        network(two, "--heads", f"main={head}@norm")
    assert LOADED


REGRESSION = {"flags": {"task": "regression", "loss": "l2"}}
REGRESSION |= {"target_scale": {"mean": [5.0, -100.0], "std": [2.0, 50.0]}}


@pytest.mark.parametrize("head", ["mlp", "mlp(5)", "vit_tanh", "conv", "linear(planes=4)"])
def test_regression_with_any_head_is_exported_in_the_units_of_the_data(head, tmp_path):
    model, images = build(head, 2), torch.rand(2, 3, 32, 32)
    found = network(save(tmp_path / "it.pth", model, head, 2, **REGRESSION))
    expected = model(images) * torch.tensor([2.0, 50.0]) + torch.tensor([5.0, -100.0])
    torch.testing.assert_close(found(images), expected, rtol=1e-4, atol=1e-4)


def test_regression_whose_units_cannot_be_undone_is_refused(tmp_path):
    head = f"{HERE}:Twice"
    path = save(tmp_path / "it.pth", build(head, 2), head, 2, **REGRESSION)
    with pytest.raises(UserError, match=r"head.fc is not the last layer .*--normalize_targets"):
        network(path, "--head", head)
