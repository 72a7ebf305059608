# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Read rank and world size from the environment of torchrun, submitit, srun or mpirun.

python -c "from parallel import environment; print(environment.first_host('n[08-11,20],m2'))"
"""

import os
import re
import signal
import zlib

from errors import UserError

OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK"))
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
WARNINGS = ("SIGUSR1", "SIGUSR2", "SIGTERM")  # that a scheduler sends before it kills
WARNINGS = tuple(getattr(signal, name) for name in WARNINGS if hasattr(signal, name))  # on Windows
FIRST_PORT, PORTS = 20000, 10000  # below the ports of outgoing connections


def read_launcher(dist_on_itp: bool = False, local_rank: int = -1) -> tuple[int, int, int] | None:
    """Return (rank, world size, local rank), None for plain `python`.

    Set MASTER_ADDR and MASTER_PORT if they are missing and can be derived.
    """
    env = os.environ
    if not dist_on_itp and "RANK" in env and "WORLD_SIZE" in env:  # torchrun, submitit
        env.setdefault("LOCAL_RANK", str(max(local_rank, 0)))
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    # Before srun: inside a SLURM job mpirun starts its processes by srun.
    elif dist_on_itp or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        names = OPEN_MPI
        for name in names:
            if name not in env:
                raise UserError(f"--dist_on_itp true: {name} is not set; start with mpirun")
        if env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == env["OMPI_COMM_WORLD_SIZE"]:
            env.setdefault("MASTER_ADDR", "127.0.0.1")
        elif "SLURM_JOB_NODELIST" in env:
            env.setdefault("MASTER_ADDR", first_host(env["SLURM_JOB_NODELIST"]))
        env.setdefault("MASTER_PORT", port_of(zlib.crc32(env.get("PMIX_NAMESPACE", "").encode())))
    # SLURM_PROCID is also set in a job's shells, where a program runs alone: in the batch script,
    # and in a terminal started by srun, which has SLURM_PTY_PORT.
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PTY_PORT" not in env:
        names = SRUN
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "127.0.0.1")
        env.setdefault("MASTER_ADDR", first_host(nodes))
        step = int(env.get("SLURM_STEP_ID", "0"))
        env.setdefault("MASTER_PORT", port_of(int(env["SLURM_JOB_ID"]) + 7919 * step))
    else:
        return None
    rank, size, local = (int(env[name]) for name in names)
    return rank, size, local


def local_world_size(world_size: int) -> int:
    """Return the number of processes on this machine, as torchrun says; otherwise of all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def port_of(number: int) -> str:
    """Map a job's number to a port, the same for all its processes and rarely that of another."""
    return str(FIRST_PORT + number % PORTS)


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's short form: n08 of `n[08-11,20],m2`."""
    group = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", group[0] if group else nodes)
