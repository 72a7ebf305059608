# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Run all GPU tests and measurements in a bounded time and write one report.

python benchmarks/gpu.py --output runs/gpu --minutes 8

What is finished is on disk at any time: OUTPUT/report.md joins all tables, OUTPUT/NAME.txt is what
part NAME printed, OUTPUT/cache is what compilers and kernel choices keep for the next run. A part
that is stopped keeps the tables it had. The report ends with the call that makes up for what was
left out; it may use the same folder, as each call writes a report of its own (report2.md ...).
"""

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ZIP = ROOT.parent / "shared/data/cifar10_jpeg.zip"
GRACE = 10  # seconds that a part has at its limit to write down what it measured
BUDGET = 8.0  # minutes: the limits of the parts down to `choices` add up to them
TESTS, OWN, STEP = "-m pytest", "benchmarks/gpu_parts.py", "benchmarks/step.py"
CURVES, STARTUP = "benchmarks/curves.py", "benchmarks/startup.py"
CIFAR = "benchmarks/cifar.py"
TINY = "--model convnextv2_tiny --batch_size 128 256 --warmup 2 --rounds 10 --steps 3"
BASE = "--model convnextv2_base --batch_size 64 128 --warmup 2 --rounds 10 --steps 2"
EAGER = "--only packed,masked,dense,timm,products"
COMPILED = "--only packed,masked_compiled,dense,timm_compiled"

PARTS = {  # name: title, minutes at most, what runs; the most important first
    "environment": ("Environment", 0.2, f"{OWN} environment"),
    "gpu_tests": ("Tests marked gpu", 0.5, f"{TESTS} -m gpu"),
    "kernel_tests": (
        "Tests of the Triton kernels",
        0.5,
        f"{TESTS} tests/models/kernels/test_triton_kernels.py",
    ),
    "compile": (
        "Compiling the peers",
        1.5,
        f"{OWN} compile --model {2 * 'convnextv2_base '}{2 * 'convnextv2_tiny '}"
        "--batch 64 128 128 256",
    ),
    "tiny": ("Step of Tiny, eager", 1.0, f"{STEP} {TINY} {EAGER},infer,timminfer"),
    "tiny_compiled": (
        "Step of Tiny, compiled peers",
        1.1,
        f"{STEP} {TINY} {COMPILED},infer,timminfer_compiled",
    ),
    "base": ("Step of Base, eager", 1.1, f"{STEP} {BASE} {EAGER}"),
    "base_compiled": ("Step of Base, compiled peers", 1.3, f"{STEP} {BASE} {COMPILED}"),
    "profile": (
        "Where a step of Tiny spends its time",
        0.35,
        f"{OWN} profile --model convnextv2_tiny --batch 128",
    ),
    "choices": (
        "Implementations timed by --kernels auto",
        0.45,
        f"{OWN} choices --model convnextv2_tiny convnextv2_base --batch 128 64",
    ),
    "curves": ("Curves", 1.5, f"{CURVES} --only mask,sizes,image,batch --rounds 3 --steps 3"),
    "ours_compiled": (
        "Step of Tiny, ours compiled",
        1.5,
        f"{STEP} {TINY} --only packed,packed_compiled,dense,dense_compiled,infer,infer_compiled",
    ),
    "tiny_torch": (
        "Step of Tiny with torch's own kernels",
        0.6,
        f"{STEP} {TINY} --kernels torch --only packed,dense,products",
    ),
    "base_torch": (
        "Step of Base with torch's own kernels",
        0.6,
        f"{STEP} {BASE} --kernels torch --only packed,dense,products",
    ),
    "graphs": ("CUDA graphs in pre-training Atto", 1.2, f"{OWN} graphs"),
    "startup": ("Time to start", 2.5, STARTUP),
    "cifar": ("CIFAR-10", 10.0, f"{CIFAR} --data {shlex.quote(str(ZIP))}"),
}
APART = ("startup", "cifar")  # run only where --only names them: they take minutes
COMPILE = ("compile", "tiny_compiled", "base_compiled", "ours_compiled")
TOY = {  # what toy size adds to a part or a program
    "gpu_tests": "tests/test_engines.py",
    "kernel_tests": "-k strides",
    STEP: "--model convnextv2_atto --input_size 64 --batch_size 2 --rounds 1 --warmup 0 --steps 1 "
    "--kernels torch",
    CURVES: "--only mask,sizes --model convnextv2_atto --sizes atto femto --size_batches 2 2 "
    "--input_size 64 --mask_ratios 0.5 0.75 --batch_size 2 --rounds 1 --steps 1",
    OWN: "--toy --model convnextv2_atto --batch 2",
    STARTUP: "--rounds 1 --only visualize",
    CIFAR: "--model 1,1/4,8 --stem_stride 2 --patch_size 4 --seeds 0 --pretrain_epochs 1 "
    "--epochs 1 --pretrain_images 320 --train_images 320 --val_images 100",
}


@dataclass
class Part:
    """A part of the report, which runs in its own process, and its state."""

    name: str
    title: str
    limit: float  # seconds at most
    command: list[str]
    state: str = "not started"
    seconds: float = 0.0

    def timed(self, limit: float) -> list[str]:
        """The command; step.py ends by itself in time, with the rounds it has."""
        minutes = [f"--minutes={limit / 60:.2f}"] if STEP in self.command else []
        return [*self.command, *minutes]

    @property
    def left_out(self) -> bool:
        return self.state.startswith(("left out", "not started"))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu", help="folder")
    parser.add_argument("--minutes", type=float, default=BUDGET, help="for all parts together")
    parser.add_argument(
        "--only",
        help=f"comma separated, of {', '.join(PARTS)}; default all but {', '.join(APART)}",
    )
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
    args.only = args.only.split(",") if args.only else [*PARTS][: -len(APART)]
    try:
        pairs = [text.split("=") for text in args.limit]
        args.limit = {name: float(seconds) for name, seconds in pairs}
    except ValueError:
        parser.error(f"--limit {' '.join(args.limit)}: expected NAME=SECONDS")
    if unknown := [name for name in [*args.only, *args.limit] if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    return args


def reason_against(name: str, program: str, args: argparse.Namespace) -> str:
    """Return the reason why a part cannot run here, or an empty string."""
    needs = ["pytest"] * (program == TESTS) + ["triton"] * (name == "kernel_tests")
    if lacks := [package for package in needs if not importlib.util.find_spec(package)]:
        return f"left out: {lacks[0]} is not installed"
    if name == "cifar" and not ZIP.exists():
        return f"left out: there is no {ZIP}"
    compiles = args.toy and name in COMPILE
    return "left out: it compiles, which is not for toy size" if compiles else ""


def plan(args: argparse.Namespace) -> list[Part]:
    """Return the parts to run; a selection shares the total time."""
    parts = []
    together = min(BUDGET, sum(PARTS[name][1] for name in set(args.only)))
    for name, (title, minutes, words) in PARTS.items():
        if name not in args.only:
            continue
        program = next(p for p in (TESTS, OWN, STEP, CURVES, STARTUP, CIFAR) if p in words)
        toy = TOY.get(name, TOY.get(program, "")) if args.toy else ""
        command = [sys.executable, *shlex.split(f"{words} {toy}")]
        if program == TESTS:
            command += ["-p", "no:cacheprovider", "--basetemp", f"{args.output}/cache/pytest"]
            command += ["--continue-on-collection-errors", "-rfE"]
        else:
            command += ["--device", args.device, "--output", f"{args.output}/{name}.md"]
        if program == CIFAR:  # interrupted, it continues in the next call
            command += ["--results", f"{args.output}/cifar.jsonl"]
        limit = args.limit.get(name, 60 * minutes * args.minutes / together)
        state = reason_against(name, program, args) or "not started"
        parts.append(Part(name, title, limit, command, state))
    return parts


def surroundings(output: Path) -> dict[str, str]:
    """Return the environment of a part, with its caches in the output folder."""
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
    command = part.timed(limit)
    (output / f"{part.name}.md").unlink(missing_ok=True)  # programs append
    with (output / f"{part.name}.txt").open("w", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n\n")
        log.flush()
        process = subprocess.Popen(
            command,
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
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        finally:
            with suppress(ProcessLookupError):  # its child processes may outlive it
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


def again(parts: list[Part], args: argparse.Namespace) -> str:
    """Return the command that runs the parts left out by this one."""
    names = [p.name for p in parts if p.state == "not started" or "out of time" in p.state]
    names += [p.name for p in parts if p.state.startswith("stopped")]
    if not names:
        return ""
    words = f"--output {shlex.quote(str(args.output))} --minutes {args.minutes:g}"
    return f"\nTo run them: `python benchmarks/gpu.py {words} --only {','.join(names)}`"


def write_report(parts: list[Part], args: argparse.Namespace, seconds: float, path: Path) -> None:
    """Write the report of the parts that have finished."""
    rows = [f"| {p.name} | {p.state} | {p.seconds:.0f} |" for p in parts]
    missing = [f"- {p.name}: {p.state}" for p in parts if p.state != "done"] or ["Nothing."]
    size = " TOY SIZE: these figures are meaningless." if args.toy else ""
    texts = [
        f"# Report of benchmarks/gpu.py\n\n{seconds:.0f} s of {60 * args.minutes:.0f} s.{size}",
        "\n".join(["| part | state | seconds |", "|---|---|---|", *rows]),
        *(section(part, args.output) for part in parts if not part.left_out),
        "\n".join(["## Not done\n", *missing, again(parts, args)]).rstrip(),
    ]
    fresh = path.with_suffix(".new")
    fresh.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    fresh.replace(path)


def report_path(output: Path) -> Path:
    """report.md, or report2.md and so on where earlier calls wrote one."""
    paths = (output / f"report{number if number > 1 else ''}.md" for number in count(1))
    return next(path for path in paths if not path.exists())


def main(argv: list[str] | None = None) -> int:
    """1 if a part failed or was stopped, else 0."""
    args = parse_args(argv)
    parts = plan(args)
    if args.dry_run:
        for part in parts:
            print(
                f"{part.name}: at most {part.limit:.0f} s\n  {shlex.join(part.timed(part.limit))}"
            )
            if part.left_out and part.state != "not started":
                print(f"  {part.state}")
        return 0
    start, total, due = time.monotonic(), 60 * args.minutes, 0.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the part
    (args.output / "cache").mkdir(parents=True, exist_ok=True)
    path = report_path(args.output)
    for part in parts:
        passed = time.monotonic() - start
        due += part.limit
        if part.state == "not started" and passed >= total:
            part.state = "left out: out of time"
        if part.state == "not started":
            limit = min(due, total) - passed  # with what parts before it did not need
            limit = min(part.limit, limit) if part.name in args.limit else limit
            print(f"[{passed:4.0f} s] {part.name}: at most {limit:.0f} s", flush=True)
            part.state = "running"
            run(part, limit, args.output)
        passed = time.monotonic() - start
        print(f"[{passed:4.0f} s] {part.name}: {part.state}", flush=True)
        write_report(parts, args, passed, path)
    print(f"report: {path}")
    return int(any(part.state != "done" and not part.left_out for part in parts))


if __name__ == "__main__":
    sys.exit(main())
