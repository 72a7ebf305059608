# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Everything to test and measure on a GPU, in one go and in a bounded time, with one report.

python benchmarks/gpu.py --output runs/gpu --minutes 8

What is finished is on disk at any time: OUTPUT/report.md joins all tables, OUTPUT/NAME.txt is what
part NAME printed, OUTPUT/cache is what compilers and kernel choices keep for the next run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 8.0  # minutes that the limits below are meant for
TESTS, STEP, CURVES = "-m pytest", "benchmarks/step.py", "benchmarks/curves.py"
OWN = "benchmarks/gpu_parts.py"
TINY, BASE = "--model convnextv2_tiny", "--model convnextv2_base"
EAGER = "--no_compile --only packed,masked,dense,timm"
COMPILED = "--only packed,masked_compiled,dense,dense_compiled,timm_compiled"
OFTEN, FEWER = "--warmup 2 --rounds 8 --steps 5", "--warmup 2 --rounds 6 --steps 4"

PARTS = {  # name: title, minutes at most, what runs; the most important first
    "environment": ("Environment", 0.5, f"{OWN} environment"),
    "gpu_tests": ("Tests marked gpu", 1.5, f"{TESTS} -m gpu"),
    "kernel_tests": ("Tests of the Triton kernels", 1.0, f"{TESTS} tests/test_kernels.py"),
    "tiny": (
        "Step of Tiny, eager",
        2.0,
        f"{STEP} {TINY} {EAGER},infer,timminfer --batch_size 128 256 {OFTEN}",
    ),
    "tiny_compiled": (
        "Step of Tiny beside compiled ones",
        2.0,
        f"{STEP} {TINY} {COMPILED} --batch_size 128 {OFTEN}",
    ),
    "tiny_torch": (
        "Step of Tiny with torch's own kernels, and its matrix products alone",
        0.6,
        f"{STEP} {TINY} --kernels torch --only packed,dense,products --batch_size 128 {OFTEN}",
    ),
    "base": ("Step of Base, eager", 1.2, f"{STEP} {BASE} {EAGER} --batch_size 64 128 {FEWER}"),
    "base_torch": (
        "Step of Base with torch's own kernels",
        0.6,
        f"{STEP} {BASE} --kernels torch --only packed,dense --batch_size 64 128 {FEWER}",
    ),
    "profile": ("Where a step of Tiny spends its time", 0.6, f"{OWN} profile {TINY} --batch 128"),
    "choices": (
        "Forms measured by --kernels auto",
        0.8,
        f"{OWN} choices {TINY} convnextv2_base --batch 128 64",
    ),
    "curves": (
        "Curves",
        1.5,
        f"{CURVES} --only mask,sizes,image,batch --rounds 3 --steps 3",
    ),
    "graphs": ("CUDA graphs in pre-training Atto", 1.2, f"{OWN} graphs"),
    "base_compiled": (
        "Step of Base beside compiled ones",
        2.0,
        f"{STEP} {BASE} {COMPILED} --batch_size 64 {FEWER}",
    ),
}
TOY = {  # what toy size adds to a part or a program; None: it is left out
    "tiny_compiled": None,
    "base_compiled": None,
    "gpu_tests": "tests/test_engines.py",
    "kernel_tests": "-k strides",
    STEP: "--model convnextv2_atto --input_size 64 --batch_size 2 --rounds 1 --warmup 0 --steps 1",
    CURVES: "--only mask,sizes --model convnextv2_atto --sizes atto femto --size_batches 2 2 "
    "--input_size 64 --mask_ratios 0.5 0.75 --batch_size 2 --rounds 1 --steps 1",
    OWN: "--toy --model convnextv2_atto --batch 2",
}


@dataclass
class Part:
    """A process of its own, and what became of it."""

    name: str
    title: str
    limit: float  # seconds at most
    command: list[str]
    state: str = "not begun"
    seconds: float = 0.0

    @property
    def left_out(self) -> bool:
        return self.state.startswith(("left out", "not begun"))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu", help="folder")
    parser.add_argument("--minutes", type=float, default=BUDGET, help="for all parts together")
    parser.add_argument("--only", help=f"comma separated, of {', '.join(PARTS)}")
    parser.add_argument(
        "--limit", nargs="+", default=[], metavar="NAME=SECONDS", help="for single parts"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="every part in toy size, uncompiled")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, run nothing")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; `only` becomes a list of names and `limit` a dict."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.toy:
        parser.error("--device cpu would take hours in full size; add --toy")
    args.output = args.output.resolve()
    args.only = args.only.split(",") if args.only else list(PARTS)
    try:
        pairs = [text.split("=") for text in args.limit]
        args.limit = {name: float(seconds) for name, seconds in pairs}
    except ValueError:
        parser.error(f"--limit {' '.join(args.limit)}: expected NAME=SECONDS")
    if unknown := [name for name in [*args.only, *args.limit] if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    return args


def plan(args: argparse.Namespace) -> list[Part]:
    """The parts to run. Their limits add up to more than the budget, as few use theirs up."""
    parts = []
    for name, (title, minutes, words) in PARTS.items():
        if name not in args.only:
            continue
        program = next(program for program in (TESTS, STEP, CURVES, OWN) if program in words)
        toy = TOY.get(name, TOY.get(program, "")) if args.toy else ""
        command = [sys.executable, *shlex.split(f"{words} {toy or ''}")]
        if program == TESTS:
            command += ["-p", "no:cacheprovider", "--basetemp", f"{args.output}/cache/pytest"]
            command += ["--continue-on-collection-errors", "-rfE"]
        else:
            command += ["--device", args.device, "--output", f"{args.output}/{name}.md"]
        limit = args.limit.get(name, 60 * minutes * args.minutes / BUDGET)
        part = Part(name, title, limit, command)
        if toy is None:
            part.state = "left out: it compiles, which is not for toy size"
        elif program == TESTS and not importlib.util.find_spec("pytest"):
            part.state = "left out: pytest is not installed"
        elif name == "kernel_tests" and not importlib.util.find_spec("triton"):
            part.state = "left out: triton is not installed"
        parts.append(part)
    return parts


def surroundings(output: Path) -> dict[str, str]:
    """Environment of a part: whatever it keeps lies in the output folder."""
    cache = output / "cache"
    own = {
        "XDG_CACHE_HOME": cache,
        "TORCHINDUCTOR_CACHE_DIR": cache / "inductor",
        "TRITON_CACHE_DIR": cache / "triton",
        "PYTHONDONTWRITEBYTECODE": 1,
        "PYTHONUNBUFFERED": 1,
    }
    return os.environ | {key: str(value) for key, value in own.items()}


def run(part: Part, limit: float, output: Path) -> None:
    """The part's process, ended with all it started after `limit` seconds; sets `state`."""
    start = time.monotonic()
    (output / f"{part.name}.md").unlink(missing_ok=True)  # programs append
    with (output / f"{part.name}.txt").open("w", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(part.command)}\n\n")
        log.flush()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=surroundings(output),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # a group of its own, for killpg
        )
        try:
            code = process.wait(timeout=max(limit, 0))
            part.state = "done" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            part.state = f"stopped: it took more than {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    part.seconds = time.monotonic() - start


def section(part: Part, output: Path) -> str:
    """Markdown of a part: its tables, and the end of its log where that says more."""
    lines = [f"## {part.title}", "", f"`{part.name}`: {part.state}, {part.seconds:.0f} s."]
    table, log = (output / f"{part.name}.{kind}" for kind in ("md", "txt"))
    if part.state != "done" or "pytest" in part.command:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[2:][-20:]
        lines += ["", "```", *tail, "```"]
    if table.exists():
        lines += ["", table.read_text(encoding="utf-8").strip()]
    return "\n".join(lines)


def write_report(parts: list[Part], args: argparse.Namespace, seconds: float) -> None:
    """OUTPUT/report.md of what is finished so far."""
    rows = [f"| {p.name} | {p.state} | {p.seconds:.0f} |" for p in parts]
    missing = [f"- {p.name}: {p.state}" for p in parts if p.state != "done"]
    size = " TOY SIZE: its figures mean nothing." if args.toy else ""
    texts = [
        f"# Report of benchmarks/gpu.py\n\n{seconds:.0f} s of {60 * args.minutes:.0f} s.{size}",
        "\n".join(["| part | state | seconds |", "|---|---|---|", *rows]),
        *(section(part, args.output) for part in parts if not part.left_out),
        "\n".join(["## Not done\n", *(missing or ["Nothing."])]),
    ]
    path = args.output / "report.md"
    fresh = path.with_suffix(".new")
    fresh.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    fresh.replace(path)


def main(argv: list[str] | None = None) -> int:
    """1 if a part failed or was stopped, else 0."""
    args = parse_args(argv)
    parts = plan(args)
    if args.dry_run:
        for part in parts:
            print(f"{part.name}: at most {part.limit:.0f} s\n  {shlex.join(part.command)}")
            if part.left_out and part.state != "not begun":
                print(f"  {part.state}")
        return 0
    start, total = time.monotonic(), 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the part
    (args.output / "cache").mkdir(parents=True, exist_ok=True)
    for part in parts:
        passed = time.monotonic() - start
        if part.state == "not begun" and passed >= total:
            part.state = "left out: the time was up"
        if part.state == "not begun":
            limit = min(part.limit, total - passed)
            print(f"[{passed:4.0f} s] {part.name}: at most {limit:.0f} s", flush=True)
            part.state = "running"
            run(part, limit, args.output)
        passed = time.monotonic() - start
        print(f"[{passed:4.0f} s] {part.name}: {part.state}", flush=True)
        write_report(parts, args, passed)
    print(f"report: {args.output / 'report.md'}")
    return int(any(part.state != "done" and not part.left_out for part in parts))


if __name__ == "__main__":
    sys.exit(main())
