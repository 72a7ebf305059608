# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure and model training steps on several processes; measure the cost of big data.

python benchmarks/scaling.py --model convnextv2_atto --processes 1 2 4 --output runs/scaling.md

Parts: `steps` times the toolkit's step on gloo processes of this machine, compares it with as many
independent processes, and fits a model to it. `gpus` applies the model to hardware described by the
flags, up to 1,024 GPUs, without measuring. `data` and `log` time the parts whose cost could grow
with the data set and the number of ranks.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PARTS = ("steps", "gpus", "data", "log")
FRESH = 3  # processes per measurement; the median counts


def number(expected: str, kind: type, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return a parser of a flag's value for argparse."""

    def read(text: str) -> Any:
        try:
            if fits(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")

    return read


WHOLE = number("a whole number from 1", int, lambda n: n >= 1)
POSITIVE = number("a number above 0", float, lambda x: x > 0)
FROM_ZERO = number("a number from 0", float, lambda x: x >= 0)
REACHED = number("a fraction above 0, at most 1", float, lambda x: 0 < x <= 1)
HIDDEN = number("a fraction from 0 to 1", float, lambda x: 0 <= x <= 1)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="comma separated parts")
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    numbers = {
        "steps, measured here": [
            ("--input_size", WHOLE, 224, "side of the images in pixels, also for `gpus`"),
            ("--processes", WHOLE, [1, 2, 4], "with one thread each; 1 is always included"),
            ("--batch_size", WHOLE, 8, "images per process in weak scaling"),
            ("--total", WHOLE, 8, "images of all processes in strong scaling"),
            ("--rounds", WHOLE, 10, "rounds; each times every case once"),
            ("--steps", WHOLE, 3, "steps per timing"),
            ("--quiet", FROM_ZERO, None, "repeat while other programs keep more cores busy"),
        ],
        "GPUs, assumed: the defaults resemble nodes of 8 H100": [
            ("--peak_tflops", POSITIVE, 989, "peak bf16 TFLOP/s without sparsity"),
            ("--share", REACHED, 0.2, "fraction of the peak that a step reaches"),
            ("--block_ms", FROM_ZERO, 0.5, "least milliseconds per block, for launching kernels"),
            ("--memory_tb_s", POSITIVE, 2.5, "memory bandwidth of AdamW in TB/s"),
            ("--gpus_per_node", WHOLE, 8, "GPUs per node, each with its own network adapter"),
            ("--node_gb_s", POSITIVE, 300, "GB/s that a GPU sends within a node"),
            ("--node_us", FROM_ZERO, 5, "latency within a node in microseconds"),
            ("--network_gb_s", POSITIVE, 40, "GB/s that a GPU sends to other nodes"),
            ("--network_us", FROM_ZERO, 10, "latency between nodes in microseconds"),
            ("--hidden", HIDDEN, 0.8, "most communication that overlaps with backward"),
            ("--gpu_batch", WHOLE, 64, "images per GPU in weak scaling"),
        ],
        "data and log, measured here": [
            ("--samples", WHOLE, [1_281_167, 100_000_000, 1_300_000_000], "data set sizes"),
            ("--ranks", WHOLE, 1024, "ranks; the last one's sampler is timed"),
            ("--print_freq", WHOLE, 20, "optimizer steps between log lines"),
        ],
    }
    groups = [parser.add_argument_group(title) for title in numbers]
    for group, flags in zip(groups, numbers.values(), strict=True):
        for flag, kind, default, text in flags:
            many = "+" if isinstance(default, list) else None
            group.add_argument(flag, type=kind, nargs=many, default=default, help=text)
    steps, gpus, _ = groups
    steps.add_argument("--model", default="convnextv2_atto", help="`gpus` shows all sizes")
    steps.add_argument(
        "--mode", choices=["pretrain", "finetune"], default="pretrain", help="`gpus` shows both"
    )
    gpus.add_argument("--between", choices=["ring", "tree"], default="tree", help="between nodes")
    gpus.add_argument("--gradient_bytes", type=int, choices=[2, 4], default=4, help="2: bf16")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch

from benchmarks.gpu_parts import table
from benchmarks.scaling_model import RECIPES, gpu_tables, network
from benchmarks.scaling_steps import Team, report_steps
from benchmarks.step import machine
from errors import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags; `only` becomes a list of parts, and `processes` starts with 1."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := [name for name in args.only if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(PARTS)}")
    args.processes = sorted({1, *args.processes})
    if uneven := [n for n in args.processes if args.total % n]:
        parser.error(f"--total {args.total} images do not divide among {uneven[0]} processes")
    if min(args.samples) < args.ranks:
        parser.error(f"--samples {min(args.samples)}: fewer than --ranks {args.ranks}")
    try:
        if "steps" in args.only:
            network(args.model, args.mode)
        if {"steps", "gpus"} & {*args.only}:
            network("convnextv2_atto", "pretrain").grid_size(args.input_size, args.input_size)
    except UserError as error:
        parser.error(str(error))
    return args


def ask_fresh(args: argparse.Namespace, what: str, **about: Any) -> dict[str, float]:
    """Return the medians of FRESH new processes, since peak memory is per process."""
    answers = []
    for _ in range(FRESH):
        with Team(1, args) as team:
            answers += team.ask(what, **about)
    return {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}


def report_data(args: argparse.Namespace) -> str:
    """Return Markdown: costs of the sampler and the file index for each data set size."""
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
    begin = ["samples", "ms to the first key", "ms to resume in the middle", "memory growth, MiB"]
    return f"""### Large data sets

Measured, medians of {FRESH} processes. Memory growth: increase of the peak.
{machine(torch.device("cpu"))}

`TrainSampler` of rank {args.ranks - 1} of {args.ranks}; keys/s over the first keys, at most \
200,000:

{table([*begin, "keys/s"], samplers)}

A memory-mapped index of files, in which a thousand paths are looked up for the first time. The \
file is sparse, so the times do not include the disk:

{table(["samples", "GB", "ms to open", "us per path", "memory growth, MiB"], indexes)}"""


def report_log(args: argparse.Namespace) -> str:
    """Return Markdown: cost of the log per optimizer step, and in an epoch of all samples."""
    print("log", file=sys.stderr, flush=True)
    found = ask_fresh(args, "log", print_freq=args.print_freq)
    often, meters = args.print_freq, found["meters"]
    costs = {  # item -> (seconds, optimizer steps between two)
        "optimizer step without a log line, every rank": (found["update"], 1),
        "means and speed at a log line, every rank, without communication": (meters, often),
        "log line, rank 0": (found["line"] - meters, often),
        "TensorBoard, rank 0": (found["TensorBoard"] - meters, often),
        "end of an epoch: log.txt, rank 0": (found["log.txt"], math.inf),
    }
    rows = [
        [name, f"{1e6 * seconds:.1f}", f"{1e6 * seconds / every:.2f}"]
        for name, (seconds, every) in costs.items()
    ]
    samples, total = max(args.samples), RECIPES["pretrain"][1]
    updates = samples // total
    seconds = found["log.txt"] + updates * sum(s / every for s, every in costs.values())
    return f"""### Cost of the log

Measured, medians of {FRESH} processes, a log line every {often} optimizer steps. Only rank 0 \
writes, so more ranks add only the reduction of the means, which `steps` times.
{machine(torch.device("cpu"))}

{table(["", "us each", "us per optimizer step"], rows)}

By these costs an epoch of {samples:,} samples in batches of {total} ({updates:,} steps, \
{updates // often:,} log lines) spends {seconds:.1f} s for the log on rank 0, with \
{updates // often * found["TensorBoard bytes"] / 1e6:.1f} MB of TensorBoard and \
{found["log.txt bytes"]:.0f} bytes in log.txt."""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)  # as in the worker processes
    reports = (report_steps, gpu_tables, report_data, report_log)
    for name, report in zip(PARTS, reports, strict=True):
        if name not in args.only:
            continue
        print(text := report(args) + "\n", flush=True)
        if args.output:  # now, so that finished parts stay if a later one fails
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
