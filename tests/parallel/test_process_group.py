# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The process group, devices, and the end of a script.

More than one process: test_distributed.py, test_failure.py.
"""

import gc
import logging
import os

import pytest
import torch
import torch.distributed as dist

from errors import TrainingStopped, UserError
from parallel import process_group
from parallel.environment import read_launcher
from parallel.process_group import init_distributed_mode
from parallel.sharding import Parallelism
from tests.groups import free_port

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "OMPI_", "MASTER_")


@pytest.fixture
def clean(monkeypatch):
    """Environment without a launcher; restores it and the logger, closes the group."""
    saved = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    monkeypatch.setattr(process_group.get_logger(), "level", logging.NOTSET)
    yield os.environ
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(saved)


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
    port = free_port()
    clean |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_distributed_mode("cpu", world_size=1)
    assert dist.get_backend() == "gloo"
    layer = torch.nn.Linear(1, 1)
    assert Parallelism("ddp", torch.device("cpu")).wrap(layer) is layer
    assert process_group.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("tasks", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "4"}, {}])
def test_single_task_of_slurm_is_plain_python(clean, tasks):
    """The official code makes a group for it, and fails without MASTER_ADDR."""
    clean |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"} | tasks
    assert read_launcher() is None
    init_distributed_mode("cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("launcher", "got"), [({}, "1 process"), ({"RANK": "0", "WORLD_SIZE": "2"}, "2 process")]
)
def test_world_size_other_than_the_launchers_is_refused(clean, launcher, got):
    clean |= launcher
    with pytest.raises(UserError, match=f"--world_size 4, but {got}.*torchrun --nproc_per_node=4"):
        init_distributed_mode("cpu", world_size=4)
    assert not dist.is_initialized()


def test_missing_device_is_refused():
    with pytest.raises(UserError, match="--device tpus is not available; expected auto, .*cpu"):
        process_group.find_device("tpus")
    assert process_group.find_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda:1 is not available"):
            process_group.find_device("cuda:1")
        assert process_group.find_device("auto").type != "cuda"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """nccl fails on two processes of one GPU with `Duplicate GPU detected`."""
    monkeypatch.setattr(process_group, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert process_group._own_device("cuda", 3, 1) == torch.device("cuda:1")
    with pytest.raises(UserError, match="local rank 2 has no GPU; start at most 2"):
        process_group._own_device("cuda", 3, 2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # srun and mpirun may show each process only its own
    assert process_group._own_device("cuda", 3, 2) == torch.device("cuda:0")


# --- the end of a script --------------------------------------------------------------------


def test_rows_hold_large_ids_exactly_and_parts_without_columns():
    """As float32, id 2**24 + 1 would be another image; `reshape(0, -1)` is an error."""
    ids, values = torch.tensor([2**24 + 1, 3]), torch.tensor([[[0.5, 1.0]], [[2.0, 3.0]]])
    rows = process_group.pack_rows([ids, values, torch.empty(2, 0)])
    assert rows.tolist() == [[2**24 + 1, 0.5, 1.0], [3, 2.0, 3.0]]
    assert process_group.pack_rows([ids[:0], values[:0]]).shape == (0, 3)
    assert process_group.pack_rows([ids], torch.float32).dtype == torch.float32


def test_rows_are_joined_without_any_batch_and_where_float64_exists():
    """A rank without images has no batch, and MPS has no float64."""
    rows = torch.ones(2, 3, dtype=torch.float64)
    assert process_group.join_rows([rows, rows], "cpu").shape == (4, 3)
    assert process_group.join_rows([], "cpu").shape == (0, 0)
    empty = process_group.join_rows([], "mps", width=3)
    assert (empty.shape, empty.device.type, empty.dtype) == ((0, 3), "cpu", torch.float64)


def fail(error: BaseException):
    def main(args):
        raise error

    return main


def test_script_collects_garbage_again():
    """The scripts turn it off for their imports; a run of days without it would fill the memory."""
    seen = []
    gc.disable()
    try:
        process_group.launch(lambda args: seen.append(gc.isenabled()), None)
    finally:
        gc.enable()
    assert seen == [True]
    assert gc.get_freeze_count() > 100_000  # what was imported is not looked at again


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("got 3, expected 4"), 2, "error: got 3, expected 4\n"),
        (TrainingStopped("10 updates in a row"), 1, "error: 10 updates in a row\n"),
        (KeyboardInterrupt(), 130, "interrupted; checkpoints are intact"),
    ],
)
def test_user_errors_are_one_line_and_an_exit_code(capsys, error, code, message):
    with pytest.raises(SystemExit) as stop:
        process_group.launch(fail(error), None)
    output = capsys.readouterr().err
    assert stop.value.code == code
    assert message in output
    assert output.count("\n") == 1


def test_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        process_group.launch(fail(ZeroDivisionError()), None)
