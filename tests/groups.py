# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Gloo ranks for tests, forked from a server process that imports everything once."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from config import parser as options
from parallel import process_group

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 120
PRELOAD = ["pytest", "timm.optim", "torch.distributed.fsdp", "torch.distributed.optim"]
PRELOAD += ["main_pretrain", "main_finetune", "tests.tiny"]
Job = Callable[[int, Path], Any]  # (rank, folder) -> plain types and tensors


def fork_context() -> Any:
    """Return the multiprocessing context of the server; it starts with the first call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def become_rank(rank: int, size: int, port: int, output: Path | None = None) -> None:
    """Set the variables of a launcher in this process, and write its output into a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if output is not None:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def run_ranks(jobs: Sequence[Job], ranks: int, folder: Path) -> Path:
    """Run every job on `ranks` gloo ranks, in this order; `results_of` reads their results."""
    _start(_run_jobs, (ranks, free_port(), jobs, folder), ranks)
    return folder


def run_script(script: str, *words: object, ranks: int, folder: Path, expect: int = 0) -> str:
    """Run a training script on `ranks` gloo ranks without a launcher; returns rank 0's output.

    folder: for the outputs. expect: exit code of all ranks.
    """
    words, port, context = [str(word) for word in words], free_port(), fork_context()
    outputs = [folder / f"output-{rank}.txt" for rank in range(ranks)]
    each = [(rank, ranks, port, output, script, words) for rank, output in enumerate(outputs)]
    processes = [context.Process(target=_run_main, args=args) for args in each]
    for process in processes:
        process.start()
    codes = exit_codes(processes, TIME_LIMIT_S)
    assert codes == [expect] * ranks, "\n".join(map(str, [codes, *map(Path.read_text, outputs)]))
    return outputs[0].read_text()


def exit_codes(processes: Sequence[Any], seconds: float) -> list[int | None]:
    """Wait for processes; returns their exit codes, None for those that had to be killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def results_of(folder: Path) -> list[dict[str, Any]]:
    """Return {name of a job: its result} of each rank."""
    ranks = range(len(list(folder.glob("rank-*.pt"))))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in ranks]


def _start(function: Callable[..., None], args: tuple[Any, ...], ranks: int) -> None:
    fork_context()
    running = mp.start_processes(function, args, ranks, join=False, start_method="forkserver")
    deadline = time.monotonic() + TIME_LIMIT_S
    while not running.join(timeout=1):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            pytest.fail(f"the ranks still run after {TIME_LIMIT_S} s")


def _run_jobs(rank: int, ranks: int, port: int, jobs: Sequence[Job], folder: Path) -> None:
    become_rank(rank, ranks, port)
    assert process_group.init_distributed_mode("cpu").type == "cpu"
    results = {job.__name__: job(rank, folder) for job in jobs}
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def _run_main(
    rank: int, ranks: int, port: int, output: Path, script: str, words: list[str]
) -> None:
    become_rank(rank, ranks, port, output)
    if ranks == 1:
        del os.environ["RANK"]  # as plain python
    sys.argv = [script, *words]
    main = importlib.import_module(Path(script).stem)
    process_group.launch(main.main, options.parse(main.get_args_parser(), words))
