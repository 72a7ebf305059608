# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Worker process of benchmarks/scaling.py: measures what a line of JSON asks for, answers in JSON.

echo '{"what": "sampler", "length": 1281167, "ranks": 1024}' | python benchmarks/scaling_worker.py
"""

import argparse
import itertools
import json
import logging
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from parallel import process_group

CLASSES = 1000
KEYS = 200_000  # keys of a sampler that are timed
UPDATES, EPOCHS = 2000, 100  # steps and epochs of the timed log
LOOKUPS, WIDTH = 1000, 18  # paths to look up in an index; bytes of a path
ENDLESS = 1 << 40  # batches of an epoch


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnextv2_atto")
    parser.add_argument("--mode", choices=["pretrain", "finetune"], default="pretrain")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--meet", default="", help="address of the process group; default none")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor

from data_loading.files import Names
from data_loading.index import Listing, open_index, write_json
from data_loading.loader import DeviceLoader
from data_loading.samplers import TrainSampler
from engine_pretrain import masked_loss
from models import create_model, fcmae_name
from models.kernels import autotune
from optim_factory import create_optimizer
from parallel.sharding import Parallelism
from training.checkpoint import TrainState
from training.hooks import Hook, Reporter
from training.log_files import JsonHook
from training.log_lines import LineHook
from training.preemption import RankVote
from training.stepper import Stepper
from training.steps import Steps
from training.tensorboard import TensorboardHook

CPU = torch.device("cpu")


class Trainer:
    """The toolkit's training step on images in memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        autotune.set_kernels("auto", CPU)
        torch.manual_seed(0)
        if args.mode == "pretrain":
            bare = create_model(fcmae_name(args.model))
            self.loss = lambda network, images, _, ids: masked_loss(
                network, bare, images, ids, 0, 0
            )
        else:
            bare = create_model(args.model, num_classes=CLASSES)
            self.loss = lambda network, images, labels, _: F.cross_entropy(network(images), labels)
        optimizer = create_optimizer(bare, lr=1e-4)
        self.model = Parallelism("ddp", CPU).wrap(bare.train())
        self.stepper = Stepper(self.model, optimizer, CPU)
        self.stepper.begin_epoch(ENDLESS)
        self.size = args.input_size

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Take one optimizer step."""
        with self.stepper.micro_batch():
            loss = self.loss(self.model, *batch)
        self.stepper.step(loss, batch[2])

    def time(self, images: int, exchange: bool, count: int) -> float:
        """Return the seconds of a step of `images`; exchange: all-reduce the gradients."""
        x = torch.randn(images, 3, self.size, self.size)
        x = x.contiguous(memory_format=torch.channels_last)
        batch = x, torch.randint(CLASSES, (images,)), torch.arange(images)
        silent = process_group.get_world_size() > 1 and not exchange
        with self.model.no_sync() if silent else nullcontext():
            seconds = seconds_a_call(partial(self.step, batch), count)
        self.stepper.read()  # it keeps a record of each step until it is read
        return seconds


def seconds_a_call(work: Callable[[], Any], count: int) -> float:
    """Return the seconds of a call, after an untimed one, on all ranks at the same time."""
    work()
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count


def all_reduce(size: int, count: int) -> float:
    """Return the seconds of an all-reduce of `size` bytes over the group."""
    values = torch.zeros(size // 4)
    return seconds_a_call(lambda: dist.all_reduce(values), count)


def control(count: int) -> dict[str, float]:
    """Return the seconds of the control messages: in each step, and at a log line."""
    vote = RankVote()
    batches = DeviceLoader([], CPU, [0.0] * 3, [1.0] * 3)
    reporter = Reporter([], CPU, TrainState(), Steps.even(ENDLESS), 1)
    means = reporter.begin_epoch(["loss", "grad_norm"], batches)
    found = {
        "vote": seconds_a_call(lambda: vote.exchange(False, False), count),
        "meters": seconds_a_call(means.read, count),
    }
    vote.wait()
    return found


# --- costs that grow with data or ranks, each in a fresh process ----------------------------------


def peak_memory() -> int:
    """Return the peak memory of this process in bytes.

    On Linux from /proc: the value of getrusage includes the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sampler_cost(length: int, ranks: int) -> dict[str, float]:
    """Measure the last rank's sampler: seconds to start and to resume, keys/s, peak memory."""
    before, start = peak_memory(), time.perf_counter()
    sampler = TrainSampler(length, 0, ranks - 1, ranks)
    sampler.set_epoch(3)
    keys = iter(sampler)
    next(keys)
    found = {"start": time.perf_counter() - start}
    taken = 1 + sum(1 for _ in itertools.islice(keys, KEYS))
    found["rate"] = taken / (time.perf_counter() - start)
    start = time.perf_counter()
    sampler.set_epoch(3, length // 2 // ranks * ranks)
    next(iter(sampler))
    return found | {"resume": time.perf_counter() - start, "memory": peak_memory() - before}


def sparse_index(folder: Path, length: int, known: range) -> None:
    """Write an index of `length` images, of which only the entries in `known` take disk space."""
    folder.mkdir()
    paths = open_memmap(folder / "names.npy", "w+", np.uint8, (WIDTH * length,))
    offsets = open_memmap(folder / "ends.npy", "w+", np.int64, (length + 1,))
    for number in [*known, length - 1]:
        first, after = WIDTH * number, WIDTH * (number + 1)
        paths[first:after] = list(path_of(number).encode() + b"\0")
        offsets[number : number + 2] = first, after
    write_json(Listing(Names(paths, offsets), {}, {}), folder)


def path_of(number: int) -> str:
    """Return a path of WIDTH - 1 letters."""
    return f"{number // 1000:09d}/{number % 1000:03d}.jpg"


def index_cost(length: int) -> dict[str, float]:
    """Measure an index: seconds to open it and to find a path, its bytes, peak memory."""
    known = range(0, length, max(1, length // LOOKUPS))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.index"
        sparse_index(file, length, known)
        before, start = peak_memory(), time.perf_counter()
        index = open_index(file)
        found = {
            "open": time.perf_counter() - start,
            "bytes": sum(part.stat().st_size for part in file.iterdir()),
        }
        start = time.perf_counter()
        right = all(index.names[number] == path_of(number) for number in known)
        found["find"] = (time.perf_counter() - start) / len(known)
    assert right, "found another path than was written"
    return found | {"memory": peak_memory() - before}


def log_cost(print_freq: int) -> dict[str, float]:
    """Measure the log: seconds per step without a line, per line with each hook, per epoch."""
    state, batches = TrainState(), DeviceLoader([], CPU, [0.0] * 3, [1.0] * 3)
    lines, logger, found = max(3, UPDATES // print_freq), process_group.get_logger(), {}
    before = logger.handlers
    with tempfile.TemporaryDirectory() as name, Path(name, "log").open("w") as log:
        folder = Path(name)
        logger.handlers = [logging.StreamHandler(log)]  # as under a scheduler
        board, json_hook = TensorboardHook(folder / "board", state), JsonHook(folder, state)
        for kind, hooks in {"meters": [], "line": [LineHook(1)], "TensorBoard": [board]}.items():
            quiet, found[kind] = time_updates(hooks, batches, lines, print_freq)
            found.setdefault("update", quiet)  # without hooks
        board.on_end(None)
        logger.handlers = before
        size = sum(path.stat().st_size for path in (folder / "board").iterdir())
        found["TensorBoard bytes"] = size / lines
        state.stats = {"train_loss": 0.5, "train_grad_norm": 0.1, "train_lr": 1e-3, "epoch": 1}
        reporter = Reporter([json_hook], CPU, state, Steps.even(ENDLESS), print_freq)
        found["log.txt"] = seconds_a_call(reporter.end_epoch, EPOCHS)
        found["log.txt bytes"] = json_hook.path.stat().st_size / (EPOCHS + 1)
    return found


def time_updates(
    hooks: list[Hook], batches: DeviceLoader, lines: int, print_freq: int
) -> tuple[float, float]:
    """Return the seconds of logging a step (without a log line, with one), without the longest."""
    reporter = Reporter(hooks, CPU, TrainState(), Steps.even(ENDLESS), print_freq)
    means = reporter.begin_epoch(["loss", "grad_norm"], batches)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(lines * print_freq):
        means.update(64, loss=torch.ones(()), grad_norm=torch.ones(()))
        reporter.state.global_step += 1
        start = time.perf_counter()
        reporter.after_batch(64)
        logged = reporter.after_step(1e-3)
        seconds[logged].append(time.perf_counter() - start)
    without, with_one = (
        (sum(s) - max(s, default=0)) / max(1, len(s) - 1) for s in seconds.values()
    )
    return without, with_one


ANSWERS = {
    "cpu": time.process_time,
    "all_reduce": all_reduce,
    "control": control,
    "sampler": sampler_cost,
    "index": index_cost,
    "log": log_cost,
}


def serve(args: argparse.Namespace) -> None:
    """Answer the requests on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the toolkit goes to standard error
    torch.set_num_threads(1)
    process_group.init_distributed_mode("cpu", args.meet or "env://")
    steps: list[Trainer] = []
    for line in sys.stdin:
        about = json.loads(line)
        what = about.pop("what")
        if what == "step":
            steps = steps or [Trainer(args)]
            answer = steps[0].time(**about)
        else:
            answer = ANSWERS[what](**about)
        print(json.dumps(answer), file=answers, flush=True)


def main(argv: list[str] | None = None) -> None:
    serve(get_args_parser().parse_args(argv))


if __name__ == "__main__":
    main()
