# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Runs that resume with other processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from errors import EXIT_REQUEUE, plural
from tests.groups import run_script
from tests.test_end_to_end import COLORS, ROOT
from tests.training.test_checkpoint_manager import wait_for

pytestmark = pytest.mark.slow

# 26 images, 6 in an optimizer step with any number of processes.
SMALL = [
    *["--model", "tests.tiny:fcmae", *COLORS, "--decoder_embed_dim", "8", "--input_size", "16"],
    *["--stem_stride", "1", "--batch_size", "3", "--lr", "0.01", "--num_workers", "0"],
    *["--device", "cpu", "--picture_freq", "0", "--log_dir", "none", "--kernels", "torch"],
]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_run_resumes_with_another_number_of_processes_with_the_same_result(tmp_path, before, after):
    """It continues after the images it has seen and keeps the effective batch."""

    def train(folder: str, ranks: int, *words: object, expect: int = 0) -> str:
        words = [*SMALL, "--epochs", "2", "--save_ckpt_every_steps", "1", *words]
        words += ["--update_freq", 2 // before, "--output_dir", tmp_path / folder]
        return run_script("main_pretrain.py", *words, ranks=ranks, folder=tmp_path, expect=expect)

    train("whole", before)
    train("run", before, "--max_minutes", "1e-6", expect=EXIT_REQUEUE)
    state = torch.load(_newest(tmp_path / "run"), weights_only=True)["state"]
    assert 0 < state["samples_in_epoch"] < 24
    assert state["samples_in_epoch"] % 6 == 0
    output = train("run", after)
    freq = 2 // after
    sizes = f"3 images x {plural(freq, 'micro-batch')} x {plural(after, 'process')}"
    assert f"effective batch 6 = {sizes}" in output
    assert "effective batch stays 6, as in the run that is resumed" in output
    ours, theirs = (weights(tmp_path / name / "checkpoint-1.pth") for name in ("run", "whole"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)
    logs = [(tmp_path / name / "log.txt").read_text().splitlines() for name in ("run", "whole")]
    for mine, whole in zip(*map(_losses, logs), strict=True):
        assert mine == pytest.approx(whole, rel=1e-5)


def _newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime_ns)


def _losses(lines: list[str]) -> list[float]:
    return [json.loads(line)["train_loss"] for line in lines]


def test_torchrun_restarts_the_processes_when_one_is_killed(tmp_path):
    folder = tmp_path / "run"
    words = [*SMALL, "--epochs", "400", "--print_freq", "1", "--output_dir", folder]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:4", "--max-restarts=3"]
    launcher += ["--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    launcher += ["--rdzv-conf=last_call_timeout=2", "--monitor-interval=0.2"]
    with open(folder.with_suffix(".txt"), "w") as output:
        process = subprocess.Popen(
            [*launcher, str(ROOT / "main_pretrain.py"), *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for("epoch 3/400 done", folder)
            os.kill(_workers(process.pid)[1], signal.SIGKILL)
            wait_for("resumed from .*checkpoint-", folder)
            last = int(
                re.findall(r"epoch ([0-9]+)/400 done", folder.with_suffix(".txt").read_text())[-1]
            )
            wait_for(f"epoch {last + 3}/400 done", folder)
            for worker in _workers(process.pid):
                os.kill(worker, signal.SIGTERM)
            time.sleep(0.1)
        finally:
            process.terminate()
            process.wait(60)
    epochs = [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]
    assert epochs == list(range(len(epochs)))
    assert len(epochs) > last


def test_torchrun_does_not_restart_a_run_that_was_asked_to_stop(tmp_path):
    """torchrun treats every exit code as a failure: --max_minutes would be reached four times."""
    words = [*SMALL, "--epochs", "400", "--max_minutes", "1e-6", "--output_dir", tmp_path]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", str(ROOT / "main_pretrain.py"), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.count("parameters,") == 1
    assert "resumed" not in done.stdout
    assert "stopped by --max_minutes 1e-06" in done.stderr
    assert "(--max-restarts is for failures)" in done.stderr
    assert "exitcode  : 75" in done.stderr


def _workers(launcher: int) -> list[int]:
    """Return the process numbers of the launcher's ranks, in order."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = path.parent.name, path.read_text().rpartition(")")[2].split()[1]
            command = (path.parent / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        if int(parent) == launcher and "main_pretrain.py" in command:
            found.append(int(pid))
    return sorted(found)
