# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The process group: joining it, ranks, collectives, and how a script ends.

torchrun --nproc_per_node=2 main_pretrain.py --data_set DIGITS --device cpu --dry_run
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from errors import EXIT_REQUEUE, Preempted, TrainingStopped, UserError
from parallel import failure
from parallel.environment import read_launcher
from parallel.sharding import WAIT_FOR_RANKS

MEET = timedelta(minutes=10)  # in which all processes are started


STOPPED = "stopped"  # key in the launcher's store, which outlives the processes under torchrun


_stores: list[dist.Store] = []  # the launcher's


def get_logger() -> logging.Logger:
    """The toolkit's logger; `init_distributed_mode` makes it quiet on every rank but the first."""
    return logging.getLogger("convnextv2")


def launch(main: Callable[[Any], Any], args: Any) -> None:
    """Run a script's `main`: user errors become one line and exit code 2, the group is closed.

    What ends one of several processes ends all: see parallel/failure.py.
    """
    code = 0
    try:
        main(args)
    except Preempted as stop:  # all at once
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun would start a failure again
            for store in _stores:
                with contextlib.suppress(RuntimeError):  # it is ending too
                    store.set(STOPPED, str(stop))
        if is_main_process():
            print(f"{Path(sys.argv[0]).name}: {stop}", file=sys.stderr)
        code = EXIT_REQUEUE
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        code, message = _explain(error, args)
        if code:
            failure.fail(code, message, error)  # returns only where there are no others
        failure.part()
        if not message:
            raise
        print(message, file=sys.stderr)
    failure.part()
    if dist.is_available() and dist.is_initialized():
        # gloo's threads may wait for the interpreter to let go of their last tensors, and the end
        # of a group waits for them without leaving it to them.
        time.sleep(0.1)
        dist.destroy_process_group()
    if code:
        sys.exit(code)


def _explain(error: BaseException, args: Any) -> tuple[int, str]:
    """Exit code and one line; '' for a bug, whose traceback tells more."""
    if isinstance(error, SystemExit):  # of who knows nothing of other processes
        return error.code if isinstance(error.code, int) else int(error.code is not None), ""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the checkpoints written so far are whole"
    if not isinstance(error, UserError | TrainingStopped):
        return 1, ""
    found = isinstance(error, TrainingStopped) or getattr(args, "dry_run", False)
    message = f"{Path(sys.argv[0]).name}: error{failure.mark()}: {error}"
    return 1 if found else 2, message  # what a dry run looks for is its result


def find_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else CPU; a device that is asked for but absent is an error."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, here in available.items() if here), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", *available):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not available.get(device.type, True) or (device.index or 0) >= count:
        raise UserError(f"--device {name}: no such device here; use --device auto or cpu")
    return device


def init_distributed_mode(
    device: str = "auto",
    dist_url: str = "env://",
    world_size: int = 1,
    local_rank: int = -1,
    dist_on_itp: bool = False,
) -> torch.device:
    """Join the process group that the launcher describes, if any, and return this rank's device.

    Without a launcher (plain `python`) no group is made. `world_size` other than 1 must agree
    with the launcher. gloo serves CPU, nccl serves CUDA.
    """
    found = read_launcher(dist_on_itp, local_rank)
    if world_size > 1 and (found is None or found[1] != world_size):
        got = "no launcher" if found is None else f"a launcher with {found[1]} processes"
        raise UserError(
            f"--world_size {world_size} but {got} was found; start with "
            f"torchrun --nproc_per_node={world_size} and drop --world_size"
        )
    place = find_device(device) if found is None else _join(device, dist_url, *found)
    _set_up_logging()
    return place


def _join(device: str, dist_url: str, rank: int, size: int, local: int) -> torch.device:
    """Make the group, watched over from its first moment; returns this rank's device."""
    store, rank, size = _meet(dist_url, rank, size)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and store.check([STOPPED]):
        raise Preempted(f"{store.get(STOPPED).decode()} (--max-restarts is for failures)")
    _stores.append(store)
    # torchrun's store still holds the addresses of the processes that it started before.
    name = f"attempt {attempt} of {size}"
    if size > 1:
        failure.watch(store, name, rank, size)
    store = dist.PrefixStore(name, store)
    place = _own_device(device, size, local)
    backend = "nccl" if place.type == "cuda" else "gloo"
    limit = {"timeout": WAIT_FOR_RANKS}
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, **limit)
    return place


def _own_device(device: str, size: int, local: int) -> torch.device:
    place = find_device(device)
    if ":" in device and size > 1:
        raise UserError(f"--device {device}: each process takes its own GPU; use --device cuda")
    if place.type == "mps" and size > 1:
        raise UserError("--device mps: MPS has no process group; use --device cpu")
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if "TORCHELASTIC_RUN_ID" in os.environ and local >= count:  # others may give each its own
            raise UserError(
                f"process {local} of this machine finds {count} GPUs, and each takes its own; "
                f"start at most {count} here"
            )
        place = torch.device("cuda", local % count)
        torch.cuda.set_device(place)
    return place


def _meet(dist_url: str, rank: int, size: int) -> tuple[Any, int, int]:
    """The store by which the processes find each other, kept by rank 0."""
    if dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"{size} processes, and nothing says where they meet; set MASTER_ADDR to the machine "
            "of rank 0 for all of them (mpirun -x MASTER_ADDR=HOST), or start with torchrun"
        )
    os.environ.setdefault("MASTER_PORT", "29500")  # torchrun's own
    place = ":".join(os.environ.get(f"MASTER_{name}", "") for name in ("ADDR", "PORT"))
    place = place if dist_url == "env://" else dist_url
    try:
        store, rank, size = next(dist.rendezvous(dist_url, rank, size, timeout=MEET))
    except RuntimeError as error:
        if "imed out" in str(error):
            raise UserError(
                f"rank {rank} has waited for all {size} processes at {place}, {MEET} ({error}): "
                "see what those say that have not come, and what they take for that place"
            ) from error
        if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
            raise
        raise UserError(
            f"rank {rank} cannot open {place}: another "
            "program has that port; end it, or give a free one: torchrun --master_port or "
            "--standalone, elsewhere MASTER_PORT, the same for all processes"
        ) from error
    store.set_timeout(WAIT_FOR_RANKS)
    return store, rank, size


def _set_up_logging() -> None:
    logger = get_logger()
    if not logger.handlers:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)


def get_rank() -> int:
    """This process's number in the group; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """How many processes there are; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """True on the one rank that writes and prints."""
    return get_rank() == 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum of `values` over all ranks, in place; every rank must call it."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value: Any) -> list[Any]:
    """A value of plain type from every rank, in their order; every rank must call it."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The main process's value of plain type, on every rank; every rank must call it."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def from_main_process(work: Callable[[], Any]) -> Any:
    """What `work` returns on the main process, or its error, for all ranks; all must call it."""
    value, problem = None, ""
    if is_main_process():
        try:
            value = work()
        except (UserError, OSError) as error:
            problem = str(error)
    value, problem = broadcast((value, problem))
    if problem:
        raise UserError(problem)
    return value


def main_process_first(work: Callable[[], Any]) -> Any:
    """Do `work` on every rank, after the main process: what that downloads, the others find."""
    done: list[Any] = []
    from_main_process(lambda: done.append(work()))
    return done[0] if done else work()


def agree(question: str, answer: str) -> str:
    """The answer of the rank that gives one first; unlike a broadcast, this waits for no rank."""
    if get_world_size() == 1:
        return answer
    store = dist.PrefixStore("agreed", dist.distributed_c10d._get_default_store())
    with contextlib.suppress(RuntimeError):  # the rank that keeps the store is gone
        return store.compare_set(question, "", answer).decode()
    return answer


def barrier() -> None:
    """Wait until every rank is here."""
    if get_world_size() > 1:
        dist.barrier()
