# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The table of ClassyVision's options: each row has flags that work, or a reason."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import models
from config import parser
from models.heads import check_heads
from optim_factory import build_optimizer_call, build_rules
from training.hook_table import check_hooks
from training.hooks import Hook
from training.schedules import build_curves
from training.setup import check_task

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from-classy-vision.md"
ROWS = re.findall(r"^\| ((?!ClassyVision \||-).+?) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
# Words of the page -> code that exists: `package.module:function` stands for four things.
OWN = {
    "--model package.module:function": "--model tests.tiny:other",
    "--loss package.module:Loss": "--loss tests.tiny:Temperature",
    "--metrics package.module:function": f"--metrics {__name__}:metric",
    "package.module:function(2)": f"{__name__}:power(2)",
    "package.module:MyHook": f"{__name__}:MyHook",
}


class MyHook(Hook):
    def __init__(self, arg: int) -> None:
        self.arg = arg


def metric(scores: torch.Tensor, targets: torch.Tensor) -> float:
    return 0.0


def power(progress: float, exponent: float) -> float:
    return (1 - progress) ** exponent


def spans(cell: str) -> list[str]:
    """Flags that a cell shows; a reason may name some too."""
    found = re.findall(r"`([^`]+)`", cell) if not cell.startswith("—") else []
    return [span for span in found if span.startswith("--")]


COMMANDS = [span for _, cell in ROWS for span in spans(cell)]


def parse(words: str) -> parser.FrozenNamespace:
    typed = shlex.split(words)
    folder = [] if "--data_path" in typed or "--data_set" in typed else ["--data_path", "images"]
    return parser.parse(parser.finetune_parser(), [*typed, *folder])


def test_every_row_has_flags_or_a_reason():
    assert len(ROWS) > 100
    for name, cell in ROWS:
        assert bool(spans(cell)) != cell.startswith("—"), name
        assert not cell.startswith("—") or len(cell.split()) > 3, name


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_a_row_are_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("epochs: 90\n")
    for words, existing in OWN.items():
        command = command.replace(words, existing)
    args = parse(command)
    models.check_model(args)
    for check in (build_optimizer_call, build_rules, build_curves, check_heads, check_hooks):
        check(args)
    check_task(args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [x for x in COMMANDS if "--model " in x or "--head" in x if ":function" not in x]
)
def test_networks_of_a_row_are_built(command):
    args = parse(command if "--model" in command else f"{command} --model timm:resnet18")
    classes = args.nb_classes or 10
    with torch.device("meta"):
        model = models.build_classifier(args, classes)
        images = torch.empty(2, 3, *args.input_size)
        assert model.eval()(images).shape == (2, classes)


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[Path]:
    """The two YAML files of the page, and the hook that they name."""
    blocks = re.findall(r"```yaml\n(# (\S+): .*?)```", PAGE.read_text(), re.DOTALL)
    for text, name in blocks:
        (tmp_path / name).write_text(text)
    (hook,) = re.findall(r"```python\n(.*?)```", (PAGE.parent / "hooks.md").read_text(), re.DOTALL)
    (tmp_path / "my_fork").mkdir()
    (tmp_path / "my_fork/hooks.py").write_text(hook)
    monkeypatch.syspath_prepend(tmp_path)
    yield [tmp_path / name for _, name in blocks]
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_fork"]:
        del sys.modules[name]


def test_configurations_of_the_page_build_their_runs(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None))
    resnet, efficientnet = (
        parser.parse(parser.finetune_parser(), ["--config", str(path)]) for path in files
    )
    assert (resnet.model, efficientnet.model) == ("timm:resnet18", "torchvision:efficientnet_b0")
    for args in (resnet, efficientnet):
        check_heads(args)
        check_hooks(args)
        check_task(args)
        build_curves(args)
        with torch.device("meta"):
            model = models.build_classifier(args, 10)
            found = model(torch.empty(2, 3, *args.input_size))
        assert {name: tuple(x.shape) for name, x in found.items()} == {
            "main": (2, 10),
            "aux": (2, 10),
        }
