# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The commands of docs/predict.md, and of docs/insight.md on explanations, do what they say."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import create_model
from tests.groups import TIME_LIMIT_S, exit_codes, start_script
from tests.test_docs import FENCE, ROOT
from tests.test_predict import CLASSES, write_images

pytestmark = pytest.mark.slow

SHAPE = {"in_chans": 3, "stem_stride": 1, "input_size": [16, 16], "model": "convnextv2_atto"}


def commands() -> list[str]:
    pages = [(ROOT / "docs/predict.md").read_text(encoding="utf-8")]
    text = (ROOT / "docs/insight.md").read_text(encoding="utf-8")
    pages.append(text.partition("\n## What a network looks at\n")[2].partition("\n## ")[0])
    blocks = [block for page in pages for name, block in FENCE.findall(page) if name]
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    assert len(lines) > 8
    return lines


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("documented")
    torch.manual_seed(0)
    (folder / "runs/finetune").mkdir(parents=True)
    (folder / "runs/pretrain").mkdir()
    state = create_model("convnextv2_atto", num_classes=3, stem_stride=1).state_dict()
    held = {"model": state, "model_ema": state, "classes": CLASSES, "outputs": 3}
    held["args"] = SHAPE | {"task": "classification", "loss": "ce"}
    for name in ("checkpoint-best.pth", "checkpoint-best-ema.pth"):
        torch.save(held, folder / "runs/finetune" / name)
    names = [f"{name}/{n}.jpg" for name in CLASSES for n in range(3)]
    write_images(folder / "photos", names)
    shutil.copytree(folder / "photos", folder / "labeled/val")
    shutil.make_archive(str(folder / "photos"), "zip", folder, "photos")
    rows = ["image,label", *(f"../photos/{name},{name[:3]}" for name in names)]
    (folder / "table").mkdir()
    (folder / "table/photos.csv").write_text("\n".join(rows))
    shape = {"stem_stride": 1, "patch_size": 8, "decoder_embed_dim": 8}
    model = create_model("fcmae_convnextv2_atto", **shape)
    flags = {**SHAPE, **shape, "mask_ratio": 0.6, "decoder_depth": 1, "norm_pix_loss": True}
    flags |= {"seed": 0, "epochs": 1, "data_set": "auto", "data_path": str(folder / "photos")}
    saved = {"model": model.state_dict(), "args": flags}
    torch.save(saved, folder / "runs/pretrain/checkpoint-0.pth")
    return folder


def run(command: str, folder: Path, tmp_path: Path) -> str:
    """Run a line of the documents; returns what it printed."""
    if "|" in command:  # a shell's
        done = subprocess.run(
            command.replace("python predict.py", f"{sys.executable} {ROOT}/predict.py"),
            shell=True,
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    words = shlex.split(command)
    ranks = 2 if words[0] == "torchrun" else 1
    first = next(n for n, word in enumerate(words) if word.endswith(".py"))
    outputs = [tmp_path / f"{rank}.txt" for rank in range(ranks)]
    rest = [*words[first + 1 :], "--device", "cpu"]
    processes = start_script(words[first], rest, [(x, x) for x in outputs], cwd=folder)
    assert exit_codes(processes, TIME_LIMIT_S) == [0] * ranks, outputs[0].read_text()
    return outputs[0].read_text()


@pytest.mark.parametrize("command", commands())
def test_documented_commands_run(command, place, tmp_path):
    if "parquet" in command:
        pytest.importorskip("pyarrow")
    said = run(command, place, tmp_path)
    words = shlex.split(command)
    if "--output" in words:
        out = place / words[words.index("--output") + 1]
        assert out.stat().st_size > 0
        assert not out.with_name(f"{out.name}.parts").exists()
    elif "explain" in words:
        assert ("Grad-CAM of" if "finetune" in command else "error maps over 8 masks") in said
    else:
        assert said.count("photos/") >= 9
