# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""torch.hub loads the models from another folder, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from errors import UserError
from models import create_model, list_models
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from weights.convert import to_timm

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, folder: Path, **modules: str) -> subprocess.CompletedProcess:
    """Run code in another folder that may hold modules of its own; ROOT is the repository."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    code = f"import sys, torch\nsys.path.insert(0, '')\nROOT = {str(ROOT)!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def saved(model: torch.nn.Module, folder: Path, key: str = "model") -> str:
    torch.save({key: model.state_dict()}, folder / "checkpoint-0.pth")
    return str(folder / "checkpoint-0.pth")


def load(name: str, **kwargs) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


# --- as a process -----------------------------------------------------------------------


def test_loads_from_another_folder(tmp_path):
    torch.manual_seed(0)
    model = create_model("convnextv2_atto", num_classes=7).eval()
    saved(model, tmp_path)
    code = """
model = torch.hub.load(ROOT, "convnextv2_atto", source="local", checkpoint="checkpoint-0.pth")
print(model(torch.ones(1, 3, 32, 32)).tolist())
for late in ("models.kernels.triton_kernels", "torchvision", "timm", "yaml"):
    print(late in sys.modules, end=" ")
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    logits, late = done.stdout.splitlines()
    expected = model(torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, rtol=1e-5, atol=1e-5)
    assert late.split() == ["False"] * 4  # torch is the only dependency


@pytest.mark.slow
def test_is_listed_and_explained(tmp_path):
    """torch.hub.list takes names of GitHub repositories only: here one in its cache."""
    (tmp_path / "somebody_toolkit_main").symlink_to(ROOT)
    code = """
torch.hub.set_dir(".")
print(torch.hub.list("somebody/toolkit:main", trust_repo=True))
print(torch.hub.help("somebody/toolkit:main", "convnextv2_tiny", trust_repo=True))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    names, *text = done.stdout.splitlines()
    assert sorted(eval(names)) == sorted(n for n in list_models() if n.startswith("convnext"))
    assert text[0].startswith("ConvNeXt V2 Tiny, 28.6M parameters")
    assert any(line.startswith("checkpoint: ") for line in text)


@pytest.mark.slow
def test_module_of_the_user_that_is_not_imported_does_no_harm(tmp_path):
    code = 'torch.hub.load(ROOT, "convnextv2_atto", source="local")'
    done = python(code, tmp_path, utils="1 / 0", models="1 / 0")
    assert done.returncode == 0, done.stderr


# --- checkpoints ------------------------------------------------------------------------


def test_every_model_has_an_entry_point():
    names = [name for name in list_models() if name.startswith("convnext")]
    assert [name for name in vars(hubconf) if name.startswith("convnext")] == names
    for name in names:
        entry = getattr(hubconf, name)
        assert (entry.__name__, name in entry.__doc__) == (name, True)


def test_without_a_checkpoint_a_model_is_as_create_model_makes_it():
    torch.manual_seed(0)
    got = load("convnextv2_atto", num_classes=4, stem_stride=2)
    torch.manual_seed(0)
    expected = create_model("convnextv2_atto", num_classes=4, stem_stride=2)
    assert str(got) == str(expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name
    assert got.training


@pytest.mark.parametrize(
    ("given", "classes"), [({}, 7), ({"num_classes": 3}, 3), ({"num_classes": 0}, 0)]
)
def test_classes_channels_and_stem_follow_the_checkpoint(given, classes, tmp_path):
    source = create_model("convnextv2_atto", num_classes=7, in_chans=1, stem_stride=2)
    model = load("convnextv2_atto", checkpoint=saved(source, tmp_path), **given)
    assert (model.num_classes, model.in_chans, model.total_stride) == (classes, 1, 16)
    images = torch.randn(1, 1, 32, 32)
    assert torch.equal(model.forward_features(images), source.forward_features(images))
    if classes == 7:
        assert torch.equal(model(images), source(images))


def test_pretrained_checkpoint_gives_features(tmp_path):
    source = FCMAE(create_model("convnextv2_atto"), decoder_embed_dim=8)
    path = saved(source, tmp_path)
    model = load("convnextv2_atto", checkpoint=tmp_path)  # the folder of a run
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 320)
    expected = source.encoder.forward_features(images)
    assert torch.equal(model.forward_features(images), expected)
    assert load("convnextv2_atto", checkpoint=path, num_classes=4)(images).shape == (2, 4)
    maps = load("convnextv2_atto", checkpoint=path, features_only=True, out_indices=2)(images)
    assert torch.equal(maps[1], expected)


def test_other_layouts_keys_and_prefixes(tmp_path):
    source = create_model("convnextv2_atto", num_classes=7)
    state = {f"net.{name}": value for name, value in to_timm(source.state_dict()).items()}
    torch.save({"average": state}, tmp_path / "weights.pth")
    how = {"model_key": "average", "model_prefix": "net."}
    model = load("convnextv2_atto", checkpoint=tmp_path / "weights.pth", **how)
    assert torch.equal(model.head.weight, source.head.weight)


def test_checkpoint_of_another_size_is_refused(tmp_path):
    path = saved(ConvNeXtV2((1, 1, 1, 1), (4, 6, 8, 10)), tmp_path)
    with pytest.raises(UserError, match="checkpoint-0.pth does not fit ConvNeXtV2.*missing"):
        load("convnextv2_atto", checkpoint=path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    source = create_model("convnextv2_atto", num_classes=7)
    with torch.no_grad():
        source.norm.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"NaN or Inf in norm\.bias"):
        load("convnextv2_atto", checkpoint=saved(source, tmp_path))
