# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A run where Python lacks what Windows and macOS lack, and starts workers as they do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HIDE = """
import os, signal, sys
sys.modules["resource"] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "setitimer", "ITIMER_REAL"):
    delattr(signal, name)
for name in ("sched_getaffinity", "setpriority", "O_DIRECTORY", "fork"):
    delattr(os, name)
"""
START = """
import multiprocessing, sys
import torch.utils.data._utils.signal_handling as handling
handling._set_SIGCHLD_handler = lambda: None  # torch asks for the name of the platform
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.path.insert(0, ROOT)
    import runpy
    sys.argv = [f"{script}.py", *words]
    runpy.run_module(script, run_name="__main__")
"""
SMALL = "--input_size 16 --stem_stride 1 --batch_size 6 --epochs 1 --num_workers 1 --device cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model"), [("main_pretrain", "fcmae"), ("main_finetune", "classifier")]
)
def test_run_without_the_signals_and_modules_of_linux(script, model, tmp_path):
    """`import resource` and signal.SIGCHLD ended the first step on Windows."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    words = f"{SMALL} --model tests.tiny:{model} --data_set tests.tiny:colors --log_dir none"
    words = f"{words} --aa none --data_timeout 60" if "fine" in script else words
    words = [*words.split(), "--output_dir", str(tmp_path / "run")]
    code = f"ROOT, script, words = {str(ROOT)!r}, {script!r}, {words!r}{START}"
    (tmp_path / "start.py").write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, str(tmp_path / "start.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = torch.load(tmp_path / "run" / "checkpoint-0.pth", weights_only=True)
    assert checkpoint["state"]["epoch"] == 1
