# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What launchers say, and where processes meet.

torchrun, srun and local ranks: test_utils.py; a real srun: slurm/test_jobs.py.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import pytest

from parallel.environment import first_host, read_launcher
from tests.test_end_to_end import PRETRAIN, ROOT, assert_same, run, weights

STEP = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
STEP |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[3-4]"}
MPIRUN = {f"OMPI_COMM_WORLD_{n}": v for n, v in (("RANK", "1"), ("SIZE", "4"), ("LOCAL_RANK", "1"))}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "OMPI_", "MASTER_", "PMIX_")


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """No launcher; what it adds is gone afterwards."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    monkeypatch.setattr(os, "environ", mine)
    return mine


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-3,7],m2", "n1"),
        ("m2,n[1-3]", "m2"),
        ("n[08-11,20]-ib[2-3]", "n08-ib2"),
        ("gpu-a100-[003]", "gpu-a100-003"),
        ("r1.site.org,r2.site.org", "r1.site.org"),
    ],
)
def test_first_host_is_that_of_scontrol(nodes, first):
    assert first_host(nodes) == first
    if shutil.which("scontrol"):
        words = ["scontrol", "show", "hostnames", nodes]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert not done.stdout or done.stdout.split()[0] == first


def test_steps_of_a_job_do_not_meet_at_one_port(environment):
    ports = set()
    for job, step in (("7", "0"), ("7", "1"), ("8", "0"), ("8", "1")):
        environment.pop("MASTER_PORT", None)
        environment |= STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        assert read_launcher() == (1, 2, 0)
        ports.add(environment["MASTER_PORT"])
    assert environment["MASTER_ADDR"] == "n3"
    assert len(ports) == 4
    assert all(20000 <= int(port) < 30000 for port in ports)  # systems give away those above 32768


@pytest.mark.parametrize(
    "more", [{"SLURM_PTY_PORT": "4242"}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["terminal", "alone"]
)
def test_program_typed_into_a_shell_of_srun_is_alone(environment, more):
    """It waited for processes that nobody had started."""
    environment |= STEP | more
    assert read_launcher() is None
    assert "MASTER_ADDR" not in environment


def test_mpirun_inside_slurm_is_mpirun(environment):
    """It starts its processes from a step of SLURM, one on each node, whose variables they see."""
    environment |= STEP | MPIRUN | {"SLURM_JOB_NODELIST": "n[3-4]", "PMIX_NAMESPACE": "12@1"}
    assert read_launcher() == (1, 4, 1)
    assert environment["MASTER_ADDR"] == "n3"


def test_mpirun_on_one_machine_meets_there(environment):
    environment |= MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert read_launcher() == (1, 4, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_torchrun_inside_mpirun_is_torchrun(environment):
    environment |= MPIRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert read_launcher() == (0, 2, 0)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here")
def test_mpirun_trains_as_torchrun_does(tmp_path):
    words = [*PRETRAIN, "--batch_size", 3, "--epochs", 1, "--output_dir"]
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", 2, sys.executable]
    command = [*mpirun, ROOT / "main_pretrain.py", *words, tmp_path / "mpirun"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    run("main_pretrain.py", *words, tmp_path / "torchrun", torchrun=2)
    newest = "checkpoint-0.pth"
    assert_same(weights(tmp_path / "mpirun" / newest), weights(tmp_path / "torchrun" / newest))


def test_port_in_use_is_one_line_that_says_what_to_do(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run("main_pretrain.py", *PRETRAIN, expect=2, env=launcher | meeting)
    assert f"rank 0 cannot open 127.0.0.1:{port}: another program has that port" in done.stderr
    assert "MASTER_PORT" in done.stderr
    assert "Traceback" not in done.stderr
