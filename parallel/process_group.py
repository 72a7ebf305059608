# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The process group: launching a script, joining the group, ranks and collectives.

torchrun --nproc_per_node=2 main_pretrain.py --data_set DIGITS --device cpu --dry_run
"""

import contextlib
import gc
import io
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from errors import EXIT_REQUEUE, Preempted, TrainingStopped, UserError, plural
from parallel import failure
from parallel.console import ConsoleLog, TerminalHandler, get_logger, note
from parallel.environment import read_launcher

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # for all processes to start
# Longer than nccl's default: other ranks wait while rank 0 downloads or saves.
WAIT_FOR_RANKS = timedelta(hours=1)
STOPPED = "stopped"  # key in the launcher's store, which torchrun keeps when it restarts processes

_stores: list[dist.Store] = []  # the launcher's, if there is one
_watches: list[failure.Watch] = []  # of this process, if there are other ranks


def launch(main: Callable[[Any], Any], args: Any) -> None:
    """Run a script's `main` and exit with its code; a UserError is printed as one line.

    An error of one rank ends all of them: see parallel/failure.py.
    """
    gc.enable()  # the scripts turn it off for their imports
    gc.freeze()  # and what they imported is never looked at again, nor copied by loader workers
    code = 0
    try:
        main(args)
    except Preempted as stop:  # on all ranks
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun would restart the processes
            for store in _stores:
                with contextlib.suppress(RuntimeError):  # the store may be closed already
                    store.set(STOPPED, str(stop))
        if is_main_process():
            print(f"{Path(sys.argv[0]).name}: {stop}", file=sys.stderr)
            note(str(stop))
        code = EXIT_REQUEUE
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        code, message = _explain(error, args)
        for watch in _watches if code else ():
            watch.fail(code, message, error)  # does not return
        if code:
            note(message or traceback.format_exc().rstrip())
        if not message:
            raise
        print(message, file=sys.stderr)
    finally:
        while _watches:
            _watches.pop().leave()
    if dist.is_available() and dist.is_initialized():
        # gloo's threads may need the GIL to free their last tensors, and the end of the group
        # waits for them while it holds the GIL.
        time.sleep(0.1)
        dist.destroy_process_group()
    if code:
        sys.exit(code)


def _explain(error: BaseException, args: Any) -> tuple[int, str]:
    """Return the exit code and a one-line message, '' for a bug, which needs its traceback."""
    if isinstance(error, SystemExit):  # from a user's code
        return error.code if isinstance(error.code, int) else int(error.code is not None), ""
    if isinstance(error, KeyboardInterrupt):  # in the epoch loop it is a request to save and stop
        return 130, "interrupted; checkpoints are intact"
    if not isinstance(error, UserError | TrainingStopped):
        return 1, ""
    # An error that a dry run finds is its result and not wrong usage.
    result = isinstance(error, TrainingStopped) or getattr(args, "dry_run", False)
    rank = "".join(f" [rank {watch.rank}]" for watch in _watches)
    message = f"{Path(sys.argv[0]).name}: error{rank}: {error}"
    return 1 if result else 2, message


def find_device(name: str = "auto") -> torch.device:
    """Return the device `name`; `auto` is CUDA, else MPS, else CPU. UserError if it is absent."""
    found = ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if torch.cuda.is_available():
        found = ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count())), *found]
    if name not in ("auto", *found):
        raise UserError(f"--device {name} is not available; expected auto, {', '.join(found)}")
    return torch.device(found[0] if name == "auto" else name)


def init_distributed_mode(
    device: str = "auto",
    dist_url: str = "env://",
    world_size: int = 1,
    local_rank: int = -1,
    dist_on_itp: bool = False,
) -> torch.device:
    """Join the launcher's process group, if there is one, and return this rank's device.

    Plain `python` makes no group. A `world_size` above 1 must be that of the launcher. The backend
    is gloo on CPU and nccl on CUDA.
    """
    found = read_launcher(dist_on_itp, local_rank)
    started = found[1] if found else 1
    if world_size not in (1, started):
        raise UserError(
            f"--world_size {world_size}, but {plural(started, 'process')} started; start them with "
            f"torchrun --nproc_per_node={world_size} and drop --world_size"
        )
    own_device = find_device(device) if found is None else _join(device, dist_url, *found)
    _set_up_logging()
    return own_device


def _join(device: str, dist_url: str, rank: int, size: int, local: int) -> torch.device:
    """Create the process group and watch it for failures; returns this rank's device."""
    store, rank, size = _rendezvous(dist_url, rank, size)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and store.check([STOPPED]):
        raise Preempted(f"{store.get(STOPPED).decode()} (--max-restarts is for failures)")
    _stores.append(store)
    # torchrun's store still holds the addresses of the processes before a restart.
    name = f"attempt {attempt} of {size}"
    if size > 1:
        _watches.append(failure.Watch(store, name, rank, size))
    store = dist.PrefixStore(name, store)
    own_device = _own_device(device, size, local)
    dist.init_process_group(
        "nccl" if own_device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=WAIT_FOR_RANKS,
    )
    return own_device


def _own_device(device: str, size: int, local: int) -> torch.device:
    own = find_device(device)
    if size > 1 and (":" in device or own.type == "mps"):
        raise UserError(f"--device {device} is for a single process; use --device cuda or cpu")
    if own.type == "cuda":
        count = torch.cuda.device_count()
        # srun and mpirun may show each process only its own GPU, torchrun shows all.
        if "TORCHELASTIC_RUN_ID" in os.environ and local >= count:
            raise UserError(f"local rank {local} has no GPU; start at most {count} per node")
        own = torch.device("cuda", local % count)
        torch.cuda.set_device(own)
    return own


def _rendezvous(dist_url: str, rank: int, size: int) -> tuple[Any, int, int]:
    """Return (store, rank, number of processes); rank 0 serves the store."""
    if dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"MASTER_ADDR is not set for {size} processes; set it to the host of rank 0 "
            "(mpirun -x MASTER_ADDR=HOST), or start with torchrun"
        )
    os.environ.setdefault("MASTER_PORT", "29500")  # torchrun's default
    address = dist_url
    if dist_url == "env://":
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(dist.rendezvous(dist_url, rank, size, timeout=RENDEZVOUS_TIMEOUT))
    except (RuntimeError, ValueError) as error:
        reason = f"not all joined within {RENDEZVOUS_TIMEOUT}; check their output and MASTER_ADDR"
        if "EADDRINUSE" in str(error):
            reason = "the port is in use; set a free MASTER_PORT, the same for all processes"
        elif not isinstance(error, dist.DistError):
            reason = "give tcp://HOST:PORT or file:///FILE, or set MASTER_ADDR and MASTER_PORT"
        raise UserError(
            f"rank {rank}: rendezvous of {size} processes at {address} failed: {reason} ({error})"
        ) from error
    store.set_timeout(WAIT_FOR_RANKS)
    return store, rank, size


def _set_up_logging() -> None:
    logger = get_logger()
    if not logger.handlers:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
        logger.addHandler(TerminalHandler(sys.stdout))
        logger.propagate = False
    if is_main_process() and not any(isinstance(x, ConsoleLog) for x in logger.handlers):
        logger.addHandler(ConsoleLog())
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)


def remember(key: str, value: str) -> None:
    """Keep a text in the launcher's store, for the processes that torchrun may start again."""
    for store in _stores:
        store.set(key, value)


def recall(key: str) -> str:
    """Return the text that processes before a restart by torchrun remembered, or ''."""
    for store in _stores:
        if store.check([key]):
            return store.get(key).decode()
    return ""


def get_rank() -> int:
    """Return this process's rank, 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """True on rank 0, which writes and prints."""
    return get_rank() == 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum `values` over all ranks in place; every rank must call it."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value: Any) -> list[Any]:
    """Return the picklable value of each rank, in order; every rank must call it."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor | None:
    """Concatenate the rows (N, D) of all ranks on rank 0, None on others; all must call it.

    N may differ, and be 0; rank 0 holds all rows twice for a moment, and others only their own.
    """
    if get_world_size() == 1:
        return rows
    lengths = all_gather(len(rows))
    padded = rows.new_zeros(max(lengths), rows.shape[1])  # gather needs equal sizes
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths] if is_main_process() else None
    dist.gather(padded, parts)
    if parts is None:
        return None
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def pack_rows(parts: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """Join tensors (N, ...) of a batch as columns of (N, W), without waiting for the device.

    float64 holds ids and class numbers exactly; rows of MPS, which lacks it, are moved to the CPU.
    """
    columns = [part.reshape(len(part), math.prod(part.shape[1:])) for part in parts]
    return torch.cat([part.to(_place_for(dtype, part.device)).to(dtype) for part in columns], 1)


def join_rows(
    parts: Sequence[Tensor],
    device: torch.device | str,
    width: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Concatenate rows of `pack_rows` from `device`, of which there may be none.

    width: of the rows; None: agreed on by all ranks, so every rank must call it.
    """
    if width is None:
        width = max(all_gather(parts[0].shape[1] if parts else 0))
    return torch.cat([torch.empty(0, width, dtype=dtype, device=_place_for(dtype, device)), *parts])


def _place_for(dtype: torch.dtype, device: torch.device | str) -> torch.device:
    """Return the device, or the CPU if the device does not have the dtype."""
    device = torch.device(device)
    missing = device.type == "mps" and dtype == torch.float64
    return torch.device("cpu") if missing else device


def broadcast(value: Any) -> Any:
    """Return rank 0's picklable value on every rank; every rank must call it."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def from_main_process(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0; return its result, or raise its error, on all. All must call it."""
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
    """Run `work` on rank 0 first, then on the others, so that only rank 0 downloads."""
    done: list[Any] = []
    from_main_process(lambda: done.append(work()))
    return done[0] if done else work()


def agree(question: str, answer: str) -> str:
    """Return the answer of the first rank that calls this; unlike a broadcast, no rank waits."""
    if get_world_size() == 1:
        return answer
    store = dist.PrefixStore("agreed", dist.distributed_c10d._get_default_store())
    with contextlib.suppress(RuntimeError):  # rank 0 and its store are gone
        return store.compare_set(question, "", answer).decode()
    return answer


def count_ranks(place: str, number: int) -> int:
    """Add `number` to the count of ranks at a place, and return it; no rank waits."""
    if get_world_size() == 1:
        return 1
    store = dist.PrefixStore("counted", dist.distributed_c10d._get_default_store())
    with contextlib.suppress(RuntimeError):  # rank 0 and its store are gone
        return store.add(place, number)
    return 0
