# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Randomness as a function, launchers, run state.

Checkpoints: training/test_checkpoint.py; more than one process: parallel/test_distributed.py.
"""

from __future__ import annotations

import logging
import os
import random
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_loading.rng import fold_in, mask_noise, seed_all
from errors import TrainingStopped, UserError
from parallel import process_group
from parallel.environment import read_launcher
from parallel.process_group import init_distributed_mode
from parallel.sharding import Parallelism

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "OMPI_", "MASTER_")


@pytest.fixture
def clean(monkeypatch):
    """No launcher, no process group; logger and environment as they were, afterwards."""
    saved = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    monkeypatch.setattr(process_group.get_logger(), "propagate", True)
    monkeypatch.setattr(process_group.get_logger(), "handlers", [])
    monkeypatch.setattr(process_group.get_logger(), "level", logging.NOTSET)
    yield os.environ
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(saved)


# --- randomness -----------------------------------------------------------------------------

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(z: int) -> int:
    """Output for a state, as the reference in C has it."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def signed(z: int) -> int:
    return z % WORD - WORD * (z % WORD >= WORD // 2)


def test_mix_is_splitmix64():
    """Published first outputs for the seeds 0 and 1234567, without their last bit."""
    assert fold_in(0) == 0xE220A8397B1DCDAF >> 1
    assert fold_in(1234567) == 6457827717110365317 >> 1


def test_mix_never_changes():
    """Other constants would be other masks and other augmentations in every resumed run."""
    assert fold_in(0, 1) == 1534736266818221247
    assert fold_in(1, 0) == 3395948882924712079
    state = 0
    for number in (3, 1, 4, 1, 5):
        state = splitmix((state + number + GOLDEN) % WORD)
    assert fold_in(3, 1, 4, 1, 5) == state >> 1


def test_mix_tells_order_and_number_of_its_arguments_apart():
    values = [fold_in(*n) for n in [(0,), (0, 0), (1,), (0, 1), (1, 0), (1, 1), (2,), (0, 0, 1)]]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)  # a seed for torch and numpy


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**31, 799)])
def test_noise_is_splitmix64_of_seed_epoch_and_id(seed, epoch):
    ids = [0, 1, 5, 1281166, 2**40]
    expected = []
    for number in ids:
        row = splitmix((number * GOLDEN + fold_in(seed, epoch)) % WORD)
        expected.append([signed(splitmix((row + k * GOLDEN) % WORD)) for k in (1, 2, 3, 4)])
    assert mask_noise(seed, epoch, torch.tensor(ids), 4).tolist() == expected


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    ids = torch.tensor([9, 4, 11, 4])
    rows = mask_noise(1, 2, ids, 6)
    assert torch.equal(rows[1], rows[3])
    for i, number in enumerate(ids):
        assert torch.equal(mask_noise(1, 2, number[None], 6)[0], rows[i])
    assert torch.equal(mask_noise(1, 2, ids, 3), rows[:, :3])


def test_noise_does_not_touch_or_read_the_generators():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = mask_noise(0, 0, torch.arange(3), 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(mask_noise(0, 0, torch.arange(3), 4), first)


def test_noise_differs_by_seed_epoch_and_sample():
    ids = torch.arange(50)
    rows = [mask_noise(seed, epoch, ids, 4) for seed in (0, 1) for epoch in (0, 1)]
    values = torch.cat(rows).flatten()
    assert len(values.unique()) == len(values) == 4 * 50 * 4


def test_noise_is_uniform_and_neighbours_are_independent():
    noise = mask_noise(0, 0, torch.arange(9800), 49)
    share = noise.double() / 2**63  # -1 to 1, mean 0, std 0.577
    assert share.mean().abs() < 0.005  # five times 0.577 / sqrt(480200)
    assert share.std().item() == pytest.approx(3**-0.5, abs=0.005)
    assert (share[:-1] * share[1:]).mean().abs() < 0.0025  # std 1/3 / sqrt(480151)
    assert (share[:, :-1] * share[:, 1:]).mean().abs() < 0.0025
    lowest = torch.bincount(noise.argmin(1), minlength=49)  # 200 each, std 14
    assert lowest.min() > 130
    assert lowest.max() < 270


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_all_sets_every_generator():
    """Official code never seeded `random`, which RandAugment uses."""
    seed_all(3, 1)
    first = draws()
    assert draws() != first
    seed_all(3, 1)
    assert draws() == first
    seed_all(1, 3)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


# --- launchers ------------------------------------------------------------------------------


def parse(**flags):
    return read_launcher(**{"dist_on_itp": False, "local_rank": -1} | flags)


def test_plain_python_makes_no_group(clean):
    assert init_distributed_mode("cpu") == torch.device("cpu")
    assert not dist.is_initialized()
    assert (
        process_group.get_rank(),
        process_group.get_world_size(),
        process_group.is_main_process(),
    ) == (0, 1, True)
    assert process_group.get_logger().level == logging.INFO


def test_group_of_one_is_a_group(clean):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_distributed_mode("cpu", world_size=1)
    assert dist.get_backend() == "gloo"
    layer = torch.nn.Linear(1, 1)
    assert Parallelism("ddp", torch.device("cpu")).wrap(layer) is layer
    assert process_group.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]


def test_torchrun_is_understood(clean):
    clean |= {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert parse() == (5, 8, 1)
    assert parse(local_rank=3) == (5, 8, 1)


@pytest.mark.parametrize(("flag", "local"), [(3, 3), (-1, 0)])
def test_local_rank_flag_serves_launchers_that_do_not_set_it(clean, flag, local):
    clean |= {"RANK": "5", "WORLD_SIZE": "8"}
    assert parse(local_rank=flag) == (5, 8, local)
    assert clean["LOCAL_RANK"] == str(local)


SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "31337",
}


def test_srun_is_understood(clean):
    """The official code never read SLURM_NTASKS and divided by the number of GPUs, perhaps 0."""
    clean |= SRUN | {"SLURM_STEP_NODELIST": "n[08-11]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    assert parse() == (3, 4, 1)
    assert clean["MASTER_ADDR"] == "n08"  # not the machine that srun was typed on
    assert clean["MASTER_PORT"] == "21337"  # 20000 + 31337 % 10000: the same in every task


def test_given_address_wins_over_that_of_slurm(clean):
    clean |= SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    assert parse() == (3, 4, 1)
    assert (clean["MASTER_ADDR"], clean["MASTER_PORT"]) == ("here", "1234")


@pytest.mark.parametrize("tasks", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "4"}, {}])
def test_single_task_of_slurm_is_plain_python(clean, tasks):
    """A plain `python` inside salloc was forced into a group and died without MASTER_ADDR."""
    clean |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"} | tasks
    assert parse() is None
    init_distributed_mode("cpu")
    assert not dist.is_initialized()


def test_torchrun_inside_slurm_is_torchrun(clean):
    clean |= SRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert parse() == (1, 2, 1)


@pytest.mark.parametrize("asked", [True, False])
def test_open_mpi_is_understood(clean, asked):
    """Without the flag each process trained alone, into one folder."""
    names = ("RANK", "SIZE", "LOCAL_RANK")
    clean |= {f"OMPI_COMM_WORLD_{n}": v for n, v in zip(names, "682", strict=True)}
    assert parse(dist_on_itp=asked) == (6, 8, 2)
    assert "MASTER_ADDR" not in clean  # rank 0 is on another machine, and nobody says which
    with pytest.raises(UserError, match="8 processes, and nothing says where .*-x MASTER_ADDR"):
        init_distributed_mode("cpu", dist_on_itp=asked)


@pytest.mark.parametrize("absent", ["RANK", "SIZE", "LOCAL_RANK"])
def test_missing_variable_of_open_mpi_is_named(clean, absent):
    names = {"RANK", "SIZE", "LOCAL_RANK"} - {absent}
    clean |= {f"OMPI_COMM_WORLD_{name}": "1" for name in names}
    with pytest.raises(UserError, match=f"OMPI_COMM_WORLD_{absent} is not set; start with mpirun"):
        init_distributed_mode("cpu", dist_on_itp=True)


@pytest.mark.parametrize(
    ("launcher", "got"),
    [({}, "no launcher"), ({"RANK": "0", "WORLD_SIZE": "2"}, "a launcher with 2 processes")],
)
def test_world_size_that_the_launcher_contradicts_is_refused(clean, launcher, got):
    clean |= launcher
    with pytest.raises(UserError, match=f"--world_size 4 but {got}.*torchrun --nproc_per_node=4"):
        init_distributed_mode("cpu", world_size=4)
    assert not dist.is_initialized()


def test_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device tpus: expected auto, cpu, cuda"):
        process_group.find_device("tpus")
    assert process_group.find_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda:1: no such device here"):
            process_group.find_device("cuda:1")
        assert process_group.find_device("auto").type != "cuda"


# --- the end of a script --------------------------------------------------------------------


def fail(error: BaseException):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("got 3, expected 4"), 2, "error: got 3, expected 4\n"),
        (TrainingStopped("10 updates in a row"), 1, "error: 10 updates in a row\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_users_see_one_line_and_an_exit_code(capsys, error, code, message):
    with pytest.raises(SystemExit) as stop:
        process_group.launch(fail(error), None)
    told = capsys.readouterr().err
    assert stop.value.code == code
    assert message in told
    assert told.count("\n") == 1


def test_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        process_group.launch(fail(ZeroDivisionError()), None)


# --- devices ---------------------------------------------------------------------------------


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """Two on one GPU ended in nccl's `Duplicate GPU detected`."""
    monkeypatch.setattr(process_group, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert process_group._own_device("cuda", 3, 1) == torch.device("cuda:1")
    with pytest.raises(UserError, match="process 2 of this machine finds 2 GPUs.*at most 2 here"):
        process_group._own_device("cuda", 3, 2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # srun and mpirun may show each process its own
    assert process_group._own_device("cuda", 3, 2) == torch.device("cuda:0")
