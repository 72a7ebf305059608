# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure the seconds from the start of a script to its --help and to its first step.

python benchmarks/startup.py --output benchmarks/RESULTS.md
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HELP = [
    "main_pretrain.py",
    "main_finetune.py",
    "submitit_pretrain.py",
    "submitit_finetune.py",
    "visualize.py",
    "benchmarks/step.py",
    "benchmarks/cifar.py",
]
TRAIN = "--model convnextv2_atto --data_set SYNTHETIC --batch_size 8 --epochs 1 --print_freq 1"
FIRST_UPDATE = "step 1/"  # of the log line after it


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--device", default="cpu", help="of the training")
    parser.add_argument("--only", default="", help="only rows that have this in their name")
    parser.add_argument("--output", type=Path, help="markdown file to append the table to")
    return parser


def make_rows(device: str) -> dict[str, tuple[list[str], str]]:
    """Return name of a row -> (arguments of `python`, output to wait for)."""
    rows = {"import torch, nothing else": (["-c", "import torch"], "")}
    rows |= {f"{script} --help": ([script, "--help"], "") for script in HELP}
    words = [*TRAIN.split(), "--progress", "lines", "--device", device]
    for script in ("main_pretrain.py", "main_finetune.py"):
        rows[f"{script}, Atto, to the end of the first step"] = ([script, *words], FIRST_UPDATE)
    return rows


def seconds_to(words: list[str], text: str = "") -> float:
    """Seconds until `python` with these words prints `text`, or has ended, without one."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the loader's workers end with it
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text and text in line:
            seconds = time.perf_counter() - start
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return seconds
    if process.wait() or text:
        sys.exit(f"benchmarks/startup.py: python {' '.join(words)} failed:\n{''.join(lines)}")
    return time.perf_counter() - start


def measure(rows: dict[str, tuple[list[str], str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each row in each round, after a round that fills the disk's cache."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(1 + rounds):
        for name, (words, text) in rows.items():
            taken = seconds_to(words, text)
            print(f"round {number}: {name} {taken:.2f} s", file=sys.stderr)
            seconds[name] += [taken] if number else []
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown: a row for each name."""
    lines = ["| | seconds: median | min | max |", "|---|---|---|---|"]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(f"| {name} | **{median:.2f}** | {min(values):.2f} | {max(values):.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    rows = {name: row for name, row in make_rows(args.device).items() if args.only in name}
    if not rows or args.rounds < 1:
        parser.error("nothing to measure: see --only and --rounds")
    seconds = measure(rows, args.rounds)

    import torch

    from benchmarks.step import machine

    settings = f"Wall time, warm disk cache, {args.rounds} rounds. Training: `{TRAIN}`."
    lines = ["### Start-up", "", settings, machine(torch.device(args.device)), "", table(seconds)]
    print(text := "\n".join(lines))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    main()
