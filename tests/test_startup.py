# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Scripts answer --help and wrong flags before they import torch; `-X importtime` shows imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import startup

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    "main_pretrain.py",
    "main_finetune.py",
    "submitit_pretrain.py",
    "submitit_finetune.py",
    "visualize.py",
    "export.py",
    "pack.py",
    "predict.py",
    "probe.py",
    "benchmarks/cifar.py",
    "benchmarks/curves.py",
    "benchmarks/gpu.py",
    "benchmarks/gpu_parts.py",
    "benchmarks/loader.py",
    "benchmarks/loader_threads.py",
    "benchmarks/loader_parts.py",
    "benchmarks/masked.py",
    "benchmarks/saving.py",
    "benchmarks/startup.py",
    "benchmarks/step.py",
]
OWN_FLAGS = {"pack.py": "--verify", "export.py": "--opset"}  # of scripts without --device
LOADERS = ("loader", "loader_threads", "loader_parts")
OWN_FLAGS |= {f"benchmarks/{name}.py": "--photos" for name in LOADERS}
HEAVY = {
    "torch",
    "torchvision",
    "transformers",
    "onnx",
    "timm",
    "numpy",
    "PIL",
    "triton",
    "submitit",
    "tensorboard",
}
UNUSED = {"timm", "submitit", "tensorboard", "models.kernels.triton_kernels"}


def start(*words: str) -> tuple[int, str, set[str]]:
    """Run python; returns its exit code, its standard output and the modules that it imported."""
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert lines, done.stderr
    return done.returncode, done.stdout, {line.rpartition("|")[2].strip() for line in lines}


def test_imported_modules_are_seen():
    code, out, loaded = start("-c", "import json.decoder; print('here')")
    assert (code, out) == (0, "here\n")
    assert "json.decoder" in loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_heavy(script):
    code, out, loaded = start(script, "--help")
    assert code == 0
    assert OWN_FLAGS.get(script, "--device") in out
    assert out.count(":\n") >= (1 if script.startswith("benchmarks") else 2)  # groups of flags
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py", "submitit_pretrain.py"])
def test_wrong_flag_is_reported_before_anything_heavy_loads(script):
    code, _, loaded = start(script, "--data_set", "SYNTHETIC", "--modle", "convnextv2_atto")
    assert code == 2
    assert loaded & HEAVY == set()


@pytest.mark.slow
def test_importing_the_mains_loads_nothing_unused():
    """torchvision and torch's optimizers import torch._dynamo and with it triton."""
    code, _, loaded = start("-c", "import main_pretrain, main_finetune")
    assert code == 0
    assert loaded & UNUSED == set()
    assert {"main_pretrain", "main_finetune", "torch", "torchvision"} <= loaded


def test_seconds_are_measured_until_the_text_or_the_exit():
    endless = "import time\nprint('step 1/2', flush=True)\ntime.sleep(1000)"
    assert startup.seconds_to(["-c", endless], "step 1/") > 0
    assert startup.seconds_to(["-c", "print('done')"]) > 0


@pytest.mark.parametrize(("words", "text"), [("print('a')", "b"), ("raise SystemExit('a')", "")])
def test_failing_program_has_no_seconds(words, text):
    with pytest.raises(SystemExit, match="failed:\na"):
        startup.seconds_to(["-c", words], text)


def test_first_round_does_not_count(monkeypatch):
    taken = iter([9.0, 1.0, 3.0, 2.0])
    monkeypatch.setattr(startup, "seconds_to", lambda words, text: next(taken))
    seconds = startup.measure({"row": ([], "")}, rounds=3)
    assert startup.table(seconds).endswith("| row | **2.00** | 1.00 | 3.00 |")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("main_pretrain.py", "--recipe list"),
        ("main_finetune.py", "--help all"),
        ("submitit_pretrain.py", "--data_set DIGITS --dry_run"),
    ],
)
@pytest.mark.parametrize("buffered", [False, True])
def test_list_that_nobody_reads_to_its_end_is_no_error(script, words, buffered):
    """`| head -1` printed a traceback of BrokenPipeError."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *["-u"] * (not buffered), script, *words.split()]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=-1, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
