# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Every head can be evaluated and exported, in units of the data, and no file runs its own code."""

import copy
from argparse import Namespace

import pytest
import torch
from torch import nn

import export
from config.parser import export_parser
from errors import UserError
from models import build_classifier
from models.heads import HEADS
from tests import tiny
from weights import export_formats
from weights.pretrained import Pretrained

WIDTH = tiny.SIZE[1][-1]  # features
MODEL = "--model tests.tiny:classifier"


class Own(nn.Module):
    """A head as a fork may bring, whose layer is called as timm calls ConvNeXt's classifier."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).tanh()


OWN = f"{__name__}:Own"


def network(head: str, classes: int) -> nn.Module:
    args = Namespace(model="tests.tiny:classifier", in_chans=3, stem_stride=4, input_size=(32, 32))
    more = {"drop_path": 0.0, "head_init_scale": 1.0, "grad_checkpointing": False}
    more |= {"head": head, "heads": "", "loss": "l2", "freeze_backbone": False}
    torch.manual_seed(0)
    model = build_classifier(Namespace(**vars(args), **more), classes).eval()
    return model.requires_grad_(False)


def checkpoint(model: nn.Module, head: str, classes: int, **more: object) -> dict:
    args = {"model": "tests.tiny:classifier", "head": head, "loss": "l2", "input_size": 32}
    content = {"model": model.state_dict(), "args": args, **more}
    return content | {"classes": [str(number) for number in range(classes)]}


def exported(content: dict, folder, words: str = "--to pt2") -> nn.Module:
    torch.save(content, folder / "it.pth")
    args = export_parser().parse_args([str(folder / "it.pth"), *words.split()])
    return export_formats.Network(export.build_spec(args))


@pytest.mark.parametrize("head", [*HEADS, "linear(norm=true)", OWN])
def test_every_head_is_evaluated_and_exported(head, tmp_path):
    """`head.fc` was taken for timm's name of a linear classifier, and lost."""
    classes = WIDTH if head == "identity" else 2
    model, images = network(head, classes), torch.rand(1, 3, 32, 32)
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    content = checkpoint(model, head, classes)
    again = copy.deepcopy(model)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    Pretrained("it.pth", content).load(again, new=())  # as --eval does
    assert torch.equal(again(images), model(images))
    graph = exported(content, tmp_path, f"--to pt2 {MODEL} --head {head}")
    torch.testing.assert_close(graph(images), model(images))


@pytest.mark.parametrize("head", ["mlp", "vit_tanh", "norm_linear", OWN])
def test_a_regression_with_any_head_is_exported_in_units_of_the_data(head, tmp_path):
    """Its last layer was not found, and need not be the last step."""
    model, images = network(head, 2), torch.rand(1, 3, 32, 32)
    scale = {"mean": [5.0, -100.0], "std": [2.0, 50.0]}
    content = checkpoint(model, head, 2, target_scale=scale)
    content["args"]["task"] = "regression"
    found = exported(content, tmp_path, f"--to onnx {MODEL} --head {head}")(images)
    expected = model(images) * torch.tensor([2.0, 50.0]) + torch.tensor([5.0, -100.0])
    torch.testing.assert_close(found, expected)
    weights = f"--to safetensors {MODEL} --head {head}"
    if head == OWN:
        with pytest.raises(UserError, match="a step follows its last layer, so a file of weights"):
            exported(content, tmp_path, weights)
    else:
        torch.testing.assert_close(exported(content, tmp_path, weights)(images), expected)


@pytest.mark.parametrize("name", ["head", "heads"])
def test_a_checkpoint_does_not_choose_code_as_a_head(name, tmp_path, monkeypatch):
    """Any --model allowed every head, and what its module does when it is imported."""
    (tmp_path / f"evil_{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = "evil_head:Head" if name == "head" else "main=evil_heads:Head@norm"
    content = checkpoint(network("mlp", 2), "", 2)
    content["args"] |= {name: text}
    for words in ("", "--head mlp", f"--{name} evil_head:Other"):
        with pytest.raises(UserError, match="was trained with"):
            exported(content, tmp_path, f"--to onnx {MODEL} {words}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=f"evil_{name}"):  # it has no Head
        exported(content, tmp_path, f"--to onnx {MODEL} --{name} {text}")
    assert (tmp_path / "run").exists()  # the user asked for it
    content["args"] |= {name: 3}
    with pytest.raises(UserError, match=f"it.pth stores --{name} 3, expected a name; give --"):
        exported(content, tmp_path, f"--to onnx {MODEL}")
