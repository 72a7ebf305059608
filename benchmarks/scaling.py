# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Steps on several processes, measured and by a model, up to 1,024 GPUs; what big data costs.

python benchmarks/scaling.py --model convnextv2_atto --processes 1 2 4 --output runs/scaling.md

Parts: `steps` times the toolkit's step on gloo processes of this machine, beside as many processes
that do not know of each other, and fits the model to it. `gpus` extends the model, with hardware
that the flags assume: it measures nothing. `data` and `log` time what could grow with the data set
and with the number of ranks.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PARTS = ("steps", "gpus", "data", "log")
FRESH = 3  # processes of which the median counts, if there are as many --rounds
EPOCHS = 100  # lines of log.txt that are timed


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="comma separated parts")
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    here = parser.add_argument_group("steps, measured here")
    here.add_argument("--model", default="convnextv2_atto")
    here.add_argument("--mode", choices=["pretrain", "finetune"], default="pretrain")
    here.add_argument("--input_size", type=int, default=224, help="of `gpus` too")
    here.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="one thread each")
    here.add_argument("--batch_size", type=int, default=8, help="of a process, in weak scaling")
    here.add_argument("--total", type=int, default=8, help="of all processes, in strong scaling")
    here.add_argument("--rounds", type=int, default=10, help="each times every case once")
    here.add_argument("--steps", type=int, default=3, help="of a timing")
    here.add_argument("--quiet", type=float, help="repeat while others keep more cores busy")
    gpus = parser.add_argument_group("GPUs, assumed: the defaults resemble nodes of 8 H100")
    gpus.add_argument("--peak_tflops", type=float, default=989, help="of bf16, without sparsity")
    gpus.add_argument("--share", type=float, default=0.2, help="of that which a step reaches")
    gpus.add_argument("--block_ms", type=float, default=0.5, help="at least, for launches, a block")
    gpus.add_argument("--memory_tb_s", type=float, default=2.5, help="TB/s that AdamW reaches")
    gpus.add_argument("--gpus_per_node", type=int, default=8)
    gpus.add_argument("--node_gb_s", type=float, default=300, help="GB/s a GPU sends in a node")
    gpus.add_argument("--node_us", type=float, default=5, help="latency there, microseconds")
    gpus.add_argument("--network_gb_s", type=float, default=40, help="GB/s a GPU sends out of it")
    gpus.add_argument("--network_us", type=float, default=10, help="latency there, microseconds")
    gpus.add_argument("--between", choices=["ring", "tree"], default="ring", help="through nodes")
    gpus.add_argument("--gradient_bytes", type=int, choices=[2, 4], default=4, help="2: as bf16")
    gpus.add_argument("--hidden", type=float, default=0.8, help="share of the exchange, at most")
    gpus.add_argument("--gpu_batch", type=int, default=64, help="images a GPU, in weak scaling")
    data = parser.add_argument_group("data and log, measured here")
    data.add_argument(
        "--samples", type=int, nargs="+", default=[1_281_167, 100_000_000, 1_300_000_000]
    )
    data.add_argument("--ranks", type=int, default=1024)
    data.add_argument("--print_freq", type=int, default=20, help="updates between log lines")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and typing errors answer before torch is loaded

import torch

from benchmarks.gpu_parts import table
from benchmarks.scaling_model import RECIPES, gpu_tables
from benchmarks.scaling_steps import Team, report_steps
from benchmarks.step import machine


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; `only` becomes a list of parts, `processes` begins with one."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := [name for name in args.only if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(PARTS)}")
    args.processes = sorted({1, *args.processes})
    args.fresh = min(FRESH, args.rounds)
    if args.processes[0] < 1 or min(args.rounds, args.steps, args.batch_size) < 1:
        parser.error("processes, rounds, steps and batch size: expected whole numbers from 1")
    if uneven := [n for n in args.processes if args.total % n]:
        parser.error(f"--total {args.total} images are no whole number for {uneven[0]} processes")
    if not 0 < args.share <= 1 or not 0 <= args.hidden <= 1:
        parser.error("--share, --hidden: expected numbers from 0 to 1")
    return args


def ask_fresh(args: argparse.Namespace, what: str, **about: Any) -> dict[str, float]:
    """Medians of what new processes answer, one after the other: memory is a process's own."""
    answers = []
    for _ in range(args.fresh):
        with Team(1, args) as team:
            answers += team.ask(what, **about)
    return {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}


def report_data(args: argparse.Namespace) -> str:
    """Markdown: the last rank's sampler and the index of files for each number of samples."""
    samplers, indexes = [], []
    for length in args.samples:
        print(f"data of {length:,} samples", file=sys.stderr, flush=True)
        found = ask_fresh(args, "sampler", length=length, ranks=args.ranks)
        cells = [f"{1e3 * found[what]:.2f}" for what in ("start", "resume")]
        cells += [f"{found['memory'] / 2**20:.1f}", f"{found['rate']:,.0f}"]
        samplers.append([f"{length:,}", *cells])
        found = ask_fresh(args, "index", length=length)
        cells = [f"{found['bytes'] / 1e9:.2f}", f"{1e3 * found['open']:.2f}"]
        cells += [f"{1e6 * found['find']:.1f}", f"{found['memory'] / 2**20:.1f}"]
        indexes.append([f"{length:,}", *cells])
    begin = ["samples", "ms to the first key", "ms to the first after half of them", "growth, MiB"]
    lines = [
        "### Large data sets",
        "",
        f"Medians of {args.fresh} processes. Growth: of the process at its largest, from just "
        "before.",
        machine(torch.device("cpu")),
        "",
        f"`TrainSampler` of rank {args.ranks - 1} of {args.ranks}:",
        "",
        table([*begin, "keys/s"], samplers),
        "",
        "An index of files, mapped, and a thousand paths found in it for the first time. The file "
        "has holes where no path is looked for, so that the disk has no part in the times:",
        "",
        table(["samples", "GB", "ms to open", "us a path", "growth, MiB"], indexes),
    ]
    return "\n".join(lines)


def report_log(args: argparse.Namespace) -> str:
    """Markdown: what the log costs an update, and in an epoch of all samples."""
    print("log", file=sys.stderr, flush=True)
    found = ask_fresh(args, "log", print_freq=args.print_freq, epochs=EPOCHS)
    often, meters = args.print_freq, found["meters"]
    costs = {  # what -> seconds, updates between two
        "an update without a log line, every rank": (found["update"], 1),
        "means and speed at a log line, every rank, exchange aside": (meters, often),
        "the line itself, rank 0": (found["line"] - meters, often),
        "TensorBoard, rank 0": (found["TensorBoard"] - meters, often),
        "end of an epoch: log.txt, rank 0": (found["log.txt"], math.inf),
    }
    rows = [
        [name, f"{1e6 * seconds:.1f}", f"{1e6 * seconds / every:.2f}"]
        for name, (seconds, every) in costs.items()
    ]
    samples, total = max(args.samples), RECIPES["pretrain"][1]
    updates = samples // total
    seconds = updates * sum(seconds / every for seconds, every in costs.values())
    size = updates // often * found["TensorBoard bytes"]
    lines = [
        "### Cost of the log",
        "",
        f"A log line every {often} updates; medians of {args.fresh} processes.",
        machine(torch.device("cpu")),
        "",
        table(["", "us a time", "us an update"], rows),
        "",
        f"{samples:,} samples in updates of {total}, one epoch: {updates:,} updates, "
        f"{updates // often:,} log lines, {seconds:.1f} s for the log on rank 0, "
        f"{size / 1e6:.1f} MB of TensorBoard, {found['log.txt bytes']:.0f} bytes in log.txt.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)  # as in the processes it starts
    reports = (report_steps, gpu_tables, report_data, report_log)
    for name, report in zip(PARTS, reports, strict=True):
        if name not in args.only:
            continue
        print(text := report(args) + "\n", flush=True)
        if args.output:  # at once: what is finished stays if a later part fails
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
