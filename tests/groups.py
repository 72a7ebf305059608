# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Processes of a group, started once for all the tests of a file that need them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parallel import process_group

TIME_LIMIT_S = 120
Job = Callable[[int, Path], Any]  # (rank, folder) -> plain types and tensors


def run_ranks(jobs: Sequence[Job], ranks: int, folder: Path) -> Path:
    """So many gloo ranks run every job, in this order, and leave what they returned there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        running = mp.spawn(_main, (ranks, port, jobs, folder), nprocs=ranks, join=False)
    deadline = time.monotonic() + TIME_LIMIT_S
    while not running.join(timeout=1):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            pytest.fail(f"the ranks wait for each other: {TIME_LIMIT_S} s are over")
    return folder


def _main(rank: int, ranks: int, port: int, jobs: Sequence[Job], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    assert process_group.init_distributed_mode("cpu").type == "cpu"
    results = {job.__name__: job(rank, folder) for job in jobs}
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def results_of(folder: Path) -> list[dict[str, Any]]:
    """What each rank's jobs returned."""
    ranks = range(len(list(folder.glob("rank-*.pt"))))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in ranks]
