# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Ranks and addresses from the variables of launchers.

A real srun: slurm/test_jobs.py.
"""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from errors import UserError
from parallel.environment import first_host, read_launcher
from parallel.process_group import init_distributed_mode
from tests.test_end_to_end import PRETRAIN, ROOT, assert_same, run, weights

STEP = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
STEP |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[3-4]"}
MPIRUN = {f"OMPI_COMM_WORLD_{n}": v for n, v in (("RANK", "1"), ("SIZE", "4"), ("LOCAL_RANK", "1"))}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "OMPI_", "MASTER_", "PMIX_")


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """Environment without a launcher, restored afterwards."""
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
def test_first_host_agrees_with_scontrol(nodes, first):
    assert first_host(nodes) == first
    if shutil.which("scontrol"):
        words = ["scontrol", "show", "hostnames", nodes]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert not done.stdout or done.stdout.split()[0] == first


def test_steps_of_a_job_use_different_ports(environment):
    ports = set()
    for job, step in (("7", "0"), ("7", "1"), ("8", "0"), ("8", "1")):
        environment.pop("MASTER_PORT", None)
        environment |= STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        assert read_launcher() == (1, 2, 0)
        ports.add(environment["MASTER_PORT"])
    assert environment["MASTER_ADDR"] == "n3"
    assert len(ports) == 4
    assert all(20000 <= int(port) < 30000 for port in ports)  # outgoing ones are above 32768


@pytest.mark.parametrize(
    "more", [{"SLURM_PTY_PORT": "4242"}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["terminal", "alone"]
)
def test_program_in_a_shell_of_srun_is_a_single_process(environment, more):
    """It must not wait for processes that do not exist."""
    environment |= STEP | more
    assert read_launcher() is None
    assert "MASTER_ADDR" not in environment


def test_mpirun_inside_slurm_is_mpirun(environment):
    """Its processes also see the variables of the SLURM step that starts them."""
    environment |= STEP | MPIRUN | {"SLURM_JOB_NODELIST": "n[3-4]", "PMIX_NAMESPACE": "12@1"}
    assert read_launcher() == (1, 4, 1)
    assert environment["MASTER_ADDR"] == "n3"


def test_mpirun_on_one_machine_uses_its_address(environment):
    environment |= MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert read_launcher() == (1, 4, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_torchrun_inside_mpirun_is_torchrun(environment):
    environment |= MPIRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert read_launcher() == (0, 2, 0)


def test_torchrun_is_understood(environment):
    environment |= {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert read_launcher() == (5, 8, 1)
    assert read_launcher(local_rank=3) == (5, 8, 1)


@pytest.mark.parametrize(("flag", "local"), [(3, 3), (-1, 0)])
def test_local_rank_flag_replaces_a_missing_variable(environment, flag, local):
    environment |= {"RANK": "5", "WORLD_SIZE": "8"}
    assert read_launcher(local_rank=flag) == (5, 8, local)
    assert environment["LOCAL_RANK"] == str(local)


SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "31337",
}


def test_srun_is_understood(environment):
    """The official code never read SLURM_NTASKS and divided by the number of GPUs, perhaps 0."""
    environment |= SRUN | {
        "SLURM_STEP_NODELIST": "n[08-11]",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }
    assert read_launcher() == (3, 4, 1)
    assert environment["MASTER_ADDR"] == "n08"  # not the machine where srun was started
    assert environment["MASTER_PORT"] == "21337"  # 20000 + 31337 % 10000


def test_given_address_is_preferred_to_that_of_slurm(environment):
    environment |= SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    assert read_launcher() == (3, 4, 1)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("here", "1234")


def test_torchrun_inside_slurm_is_torchrun(environment):
    environment |= SRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert read_launcher() == (1, 2, 1)


@pytest.mark.parametrize("asked", [True, False])
def test_open_mpi_is_understood(environment, asked):
    """Also without the flag: each process would train alone, into one folder."""
    names = ("RANK", "SIZE", "LOCAL_RANK")
    environment |= {f"OMPI_COMM_WORLD_{n}": v for n, v in zip(names, "682", strict=True)}
    assert read_launcher(dist_on_itp=asked) == (6, 8, 2)
    assert "MASTER_ADDR" not in environment  # unknown: rank 0 is on another machine
    with pytest.raises(UserError, match="MASTER_ADDR is not set for 8 processes.*-x MASTER_ADDR"):
        init_distributed_mode("cpu", dist_on_itp=asked)


def test_world_size_of_the_flag_must_be_that_of_the_launcher(environment):
    with pytest.raises(UserError, match=r"--world_size 2, but 1 .* torchrun --nproc_per_node=2"):
        init_distributed_mode("cpu", world_size=2)
    environment |= {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    with pytest.raises(UserError, match=r"--world_size 2, but 3 processes started"):
        init_distributed_mode("cpu", world_size=2)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nosuch://x", "No rendezvous handler for nosuch://"),
        ("host", "No rendezvous handler for ://"),
        ("tcp://127.0.0.1", "port number missing"),
        ("env://", "invalid literal for int.* 'port'"),
    ],
)
def test_wrong_address_is_refused(environment, address, said):
    environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "here", "MASTER_PORT": "port"}
    place = {"env://": "here:port"}.get(address, address)
    with pytest.raises(UserError, match=rf"{place} failed: give tcp://HOST:PORT or .* \(.*{said}"):
        init_distributed_mode("cpu", dist_url=address)


@pytest.mark.parametrize("absent", ["RANK", "SIZE", "LOCAL_RANK"])
def test_missing_variable_of_open_mpi_is_named(environment, absent):
    names = {"RANK", "SIZE", "LOCAL_RANK"} - {absent}
    environment |= {f"OMPI_COMM_WORLD_{name}": "1" for name in names}
    with pytest.raises(UserError, match=f"OMPI_COMM_WORLD_{absent} is not set; start with mpirun"):
        init_distributed_mode("cpu", dist_on_itp=True)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here")
def test_mpirun_trains_as_torchrun_does(tmp_path):
    words = [*PRETRAIN, "--batch_size", 3, "--epochs", 1, "--output_dir"]
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", 2, sys.executable]
    command = [*mpirun, ROOT / "main_pretrain.py", *words, tmp_path / "mpirun"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    run("main_pretrain.py", *words, tmp_path / "torchrun", torchrun=2)
    newest = "checkpoint-0.pth"
    assert_same(weights(tmp_path / "mpirun" / newest), weights(tmp_path / "torchrun" / newest))


def test_port_in_use_is_a_one_line_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run("main_pretrain.py", *PRETRAIN, expect=2, env=launcher | meeting)
    assert f"at 127.0.0.1:{port} failed: the port is in use" in done.stderr
    assert "MASTER_PORT" in done.stderr
    assert "Traceback" not in done.stderr
