# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Scripts and gloo ranks for tests, forked from a server process that imports everything once."""

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import secrets
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

from parallel import process_group

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 300  # a run that takes longer hangs
PRELOAD = ["pytest", "timm.optim", "torch.distributed.fsdp", "torch.distributed.optim"]
PRELOAD += ["main_pretrain", "main_finetune", "visualize", "export", "predict", "tests.tiny"]
PRELOAD += ["torch.utils.tensorboard", "safetensors.torch"]
Job = Callable[[int, Path], Any]  # (rank, folder) -> plain types and tensors


def fork_context() -> Any:
    """Return the multiprocessing context of the server; it starts with the first call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")  # it and the next one are read with the import
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import torch
        multiprocessing.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def free_port() -> int:
    """Return a port that nobody uses, below those of outgoing connections."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            port = secrets.randbelow(10_000) + 10_000
            free.bind(("127.0.0.1", port))
            return port


def become_rank(rank: int, size: int, port: int) -> None:
    """Set the variables of a launcher in this process."""
    os.environ |= rank_variables(rank, size, port)
    become_main_process()


def rank_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment variables that a launcher sets."""
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in variables.items()}


def redirect(number: int, path: Path) -> None:
    """Append what this process writes to file descriptor `number` to a file."""
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, number)
    setattr(sys, {1: "stdout", 2: "stderr"}[number], os.fdopen(number, "w", buffering=1))


def run_ranks(jobs: Sequence[Job], ranks: int, folder: Path) -> Path:
    """Run every job on `ranks` gloo ranks, in this order; `results_of` reads their results."""
    _start(_run_jobs, (ranks, free_port(), jobs, folder), ranks)
    return folder


def run_script(script: str, *words: object, ranks: int, folder: Path, expect: int = 0) -> str:
    """Run a training script on `ranks` gloo ranks without a launcher; returns rank 0's output.

    folder: for the outputs. expect: exit code of all ranks.
    """
    outputs = [folder / f"output-{rank}.txt" for rank in range(ranks)]
    for output in outputs:
        output.unlink(missing_ok=True)
    processes = start_script(script, words, [(output, output) for output in outputs])
    codes = exit_codes(processes, TIME_LIMIT_S)
    assert codes == [expect] * ranks, "\n".join(map(str, [codes, *map(Path.read_text, outputs)]))
    return outputs[0].read_text()


def start_script(
    script: str,
    words: Sequence[object],
    outputs: Sequence[tuple[Path, Path]],
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
) -> list[Any]:
    """Start a script as `python SCRIPT WORDS` does, 3 s faster; returns the process of each rank.

    outputs: files for stdout and stderr, for each rank. env: more environment variables.
    """
    port, context = free_port(), fork_context()
    mask = os.umask(0o022)
    os.umask(mask)
    processes = []
    for rank, files in enumerate(outputs):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        variables |= rank_variables(rank, len(outputs), port) if len(outputs) > 1 else {}
        args = (variables, mask, cwd, files, script, [str(word) for word in words])
        processes.append(context.Process(target=_run_script, args=args))
        processes[-1].start()
    return processes


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


def _run_script(
    variables: dict[str, str],
    mask: int,
    cwd: Path,
    outputs: tuple[Path, Path],
    script: str,
    words: list[str],
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.umask(mask)
    os.chdir(cwd)
    for number, path in zip((1, 2), outputs, strict=True):
        redirect(number, path)
    become_main_process()
    sys.argv = [script, *words]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def become_main_process() -> None:
    """Use one thread, and start loader workers as a new Python does, not by the server."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)
