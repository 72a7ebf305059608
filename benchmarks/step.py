# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Time a training step and compare it with dense-masked FCMAE and timm, in one process.

python benchmarks/step.py --model convnextv2_tiny
"""

import argparse
import importlib.metadata
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
START = time.monotonic()  # --minutes counts from here, imports and compilation included

from config.flags import KERNELS

VARIANTS = {  # what a row is called
    "packed": "FCMAE, packed (ours)",
    "packed_compiled": "FCMAE, packed (ours), compiled",
    "masked": "FCMAE, dense-masked, eager",
    "masked_compiled": "FCMAE, dense-masked, compiled",
    "dense": "fine-tune, ours, eager",
    "dense_compiled": "fine-tune, ours, compiled",
    "timm": "fine-tune, timm, eager channels_last",
    "timm_compiled": "fine-tune, timm, compiled channels_last",
    "infer": "inference, ours, eager",
    "infer_compiled": "inference, ours, compiled",
    "timminfer": "inference, timm, eager channels_last",
    "timminfer_compiled": "inference, timm, compiled channels_last",
    "products": "the matrix products of FCMAE, packed (ours), alone",
}
OURS_COMPILED = ("packed_compiled", "dense_compiled")  # on a CPU slower than eager
DEFAULT = [name for name in VARIANTS if name not in OURS_COMPILED]
RATIOS = (
    ("packed", "masked"),
    ("packed", "masked_compiled"),
    ("packed_compiled", "masked_compiled"),
    ("packed", "dense"),
    ("dense", "timm"),
    ("dense", "timm_compiled"),
    ("dense_compiled", "timm_compiled"),
    ("infer", "timminfer"),
    ("infer", "timminfer_compiled"),
    ("infer_compiled", "timminfer_compiled"),
    ("packed", "products"),
)
MEMORY_RATIOS = (("packed", "masked"), ("dense", "timm"))
MAKING = 0.65  # fraction of --minutes for compiling variants and trying batches


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnextv2_tiny", help="one of the eight sizes")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--mask_ratio", type=float, default=0.6)
    parser.add_argument(
        "--batch_size",
        type=int,
        nargs="+",
        help="each variant takes the fastest of these; default 4 8 16 on CPU, 64 128 256 on CUDA",
    )
    parser.add_argument("--rounds", type=int, default=10, help="each times every variant once")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--steps", type=int, help="steps a timing; default 1 on CPU, 10 on CUDA")
    parser.add_argument(
        "--settle", type=int, help="untimed steps before each timing; default 3 on CPU, 1 on CUDA"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default torch's own")
    parser.add_argument("--amp", choices=["none", "bf16"], help="default bf16 on CUDA, else none")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="of ours")
    parser.add_argument("--device", help="default cuda where there is one, else cpu")
    parser.add_argument("--only", help=f"comma separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--no_compile", action="store_true", help="leave compiled variants out")
    parser.add_argument("--quiet", type=float, help="repeat while other programs use more cores")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="then report the batches and rounds so far"
    )
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import timm
import torch

from benchmarks.dense_masked import check_against_packed
from benchmarks.products import Products
from benchmarks.variants import CLASSES, Variant, make_variant, measure_memory, time_steps
from models import create_model, fcmae_name
from models.fcmae import visible_patches
from models.kernels import autotune
from training import stepper


class TimeIsUp(BaseException):
    """Raised by signals; no `except Exception` of a compiler catches it."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags with defaults filled in; `only` becomes the list of variants."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else DEFAULT
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(VARIANTS)}")
    if args.no_compile:
        names = [name for name in names if not name.endswith("_compiled")]
    if not names or args.rounds < 1:
        parser.error("nothing to measure: see --only, --no_compile and --rounds")
    if "products" in names and "packed" not in names:
        parser.error("--only products: they are those of packed; add it")
    args.only = [name for name in VARIANTS if name in names]
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(args.device or cuda)
    on_cuda = args.device.type == "cuda"
    args.model = args.model.removeprefix("fcmae_")
    args.batch_size = args.batch_size or ([64, 128, 256] if on_cuda else [4, 8, 16])
    args.steps = args.steps or (10 if on_cuda else 1)
    args.settle = (1 if on_cuda else 3) if args.settle is None else args.settle
    args.amp = stepper.choose_amp(args.amp, None, args.device)
    autotune.set_kernels(args.kernels, args.device)
    args.missing = []  # sentences, of what has no row or was not tried
    args.end = START + 60 * args.minutes
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def stop(number: int, frame: Any) -> None:
    """Handler of SIGALRM, which ends the trying of batches, and SIGTERM, which ends all."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise TimeIsUp(number)


def try_variant(name: str, batch: int, args: argparse.Namespace) -> tuple[Variant, float]:
    """The variant, compiled and warm, and its images a second."""
    variant = make_variant(name, batch, args)
    time_steps(variant, 1, args.device)
    rate = batch / min(time_steps(variant, args.steps, args.device) for _ in range(3))
    print(f"{name}, batch {batch}: {rate:.2f} images/s", file=sys.stderr, flush=True)
    return variant, rate


def make_variants(args: argparse.Namespace) -> list[Variant]:
    """The variants that `args.only` names, each at its own best batch size.

    `args.missing` tells what was left out and why. All have a size before any tries the next.
    """
    best: dict[str, tuple[Variant, float]] = {}
    names = [name for name in args.only if name != "products"]
    points = [(name, batch) for batch in args.batch_size for name in names]
    try:
        if math.isfinite(args.end):  # repeated: what is raised within a destructor is lost
            left = START + MAKING * (args.end - START) - time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), 1)
        while points:
            name, batch = points[0]
            try:
                variant, rate = try_variant(name, batch, args)
            except Exception as error:  # of a compiler, or no memory: the others go on
                leave_out(name, f"batch {batch}", error, args)
            else:
                if name not in best or rate > best[name][1]:
                    best[name] = variant, rate
            points.pop(0)
    except TimeIsUp as up:
        args.end = 0.0 if up.args[0] == signal.SIGTERM else args.end
        for name, batch in points:
            leave_out(name, f"batch {batch}", "out of time", args)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    variants = [best[name][0] for name in names if name in best]
    if "products" in args.only and "packed" in best:
        variants += make_products(best["packed"][0], args)
    return variants


def make_products(packed: Variant, args: argparse.Namespace) -> list[Variant]:
    """The limit that the step's matrix products set; nothing where they cannot be repeated."""
    try:
        replay = Products(packed.step)
        if not replay.calls:
            raise RuntimeError("the step makes none that is known")
        replay()
    except (Exception, TimeIsUp) as error:
        up = isinstance(error, TimeIsUp)
        args.end = 0.0 if up else args.end
        leave_out("products", f"batch {packed.batch}", "out of time" if up else error, args)
        return []
    return [Variant("products", packed.batch, packed.model, None, replay)]


def leave_out(name: str, what: str, why: object, args: argparse.Namespace) -> None:
    """Print a text to stderr and keep it for the report."""
    if isinstance(why, Exception):
        lines = str(why).strip().splitlines()
        why = f"{type(why).__name__}: {lines[0][:200] if lines else ''}"
    args.missing.append(f"{VARIANTS[name]}, {what}: {why}")
    print(f"left out: {args.missing[-1]}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, variants: list[Variant], end: float = math.inf) -> None:
    """Warm-up, memory, then rounds: one at least, no more than end before `end`.

    Each round starts one variant later, so that none has a fixed place.
    """
    others: list[float] = []
    try:
        for number in range(args.warmup if end else 0):
            for variant in variants:
                seconds = time_steps(variant, 1, args.device)
                print(f"warm-up {number}: {variant.name} {seconds:.2f} s", file=sys.stderr)
        for variant in variants:
            variant.memory = measure_memory(variant, args.device)
        for number in range(args.rounds):
            print(f"round {number}", file=sys.stderr)
            start, turn = time.monotonic(), number % len(variants)
            others += [time_quietly(v, args) for v in variants[turn:] + variants[:turn]]
            if 2 * time.monotonic() - start > end:
                break
    except TimeIsUp:
        print("stopped: the time is up", file=sys.stderr)
    done = min((len(v.seconds) for v in variants if v.seconds), default=0)
    for variant in variants:
        del variant.seconds[done:]  # of a round that was not finished
    args.others = (statistics.mean(others), max(others)) if others else (0.0, 0.0)


def time_quietly(variant: Variant, args: argparse.Namespace) -> float:
    """Time a variant, repeatedly while other programs exceed --quiet; returns their busy cores."""
    for _ in range(args.settle):  # caches and free memory are those of another variant
        variant.step()
    for _ in range(1 if args.quiet is None else 20):
        busy = others_busy()
        seconds = time_steps(variant, args.steps, args.device)
        share = (others_busy() - busy) / (args.steps * seconds)
        if args.quiet is None or share <= args.quiet:
            break
        time.sleep(3)
    variant.seconds.append(seconds)
    return share


def read(path: str) -> str:
    """A file's text, empty where there is none."""
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def others_busy() -> float:
    """Return the CPU seconds of other processes since boot; 0 if unknown."""
    ticks = sum(map(int, read("/proc/stat").split()[1:4]))  # user, nice, system
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time() if ticks else 0.0


def report(args: argparse.Namespace, variants: list[Variant]) -> str:
    """Return Markdown: settings, machine, rows and ratios."""
    kind = "peak MiB" if args.device.type == "cuda" else "saved for backward, MiB"
    named = {v.name: v for v in variants}
    rows, ratios = [], []
    for v in variants:
        memory = "" if v.memory is None else f"{v.memory / 2**20:.0f}"
        times = (statistics.median(v.seconds), min(v.seconds), max(v.seconds))
        cells = " | ".join(f"{1000 * t:.1f}" for t in times)
        rows.append(f"| {VARIANTS[v.name]} | {v.batch} | {v.rate:.2f} | {cells} | {memory} |")
    for top, low in RATIOS:
        if top in named and low in named:
            a, b = named[top], named[low]
            pairs = zip(a.seconds, b.seconds, strict=True)
            each = [a.batch / mine / (b.batch / theirs) for mine, theirs in pairs]
            best = a.batch / min(a.seconds) / (b.batch / min(b.seconds))
            ratios.append(
                f"| {VARIANTS[top]} / {VARIANTS[low]} | {a.rate:.2f} / {b.rate:.2f} "
                f"| **{a.rate / b.rate:.2f}** | {best:.2f} | {min(each):.2f} to {max(each):.2f} |"
            )
    for top, low in MEMORY_RATIOS:
        if top in named and low in named and named[top].memory:
            mine, theirs = (named[n].memory / named[n].batch / 2**20 for n in (top, low))
            ratios.append(
                f"| {VARIANTS[top]} / {VARIANTS[low]}, MiB an image | {mine:.1f} / {theirs:.1f} "
                f"| **{mine / theirs:.2f}** | | |"
            )
    head = f"| | batch | images/s | ms a step: median | min | max | {kind} |\n|---|{'---|' * 6}"
    lost = [f"\nLeft out: {text}." for text in args.missing]
    below = f"| | images/s | of medians | of minima | of the rounds |\n|---|{'---|' * 4}"
    return "\n".join([*describe(args, variants), "", head, *rows, "", below, *ratios, *lost])


def describe(args: argparse.Namespace, variants: list[Variant]) -> list[str]:
    """Model, shapes, settings and machine."""
    size, (h, w), (mean, high) = args.input_size, args.grid, args.others
    rounds = str(done := len(variants[0].seconds))
    if done < args.rounds:
        rounds += f" of {args.rounds} (out of time)"
    settings = (
        f"{'float32' if args.amp == 'none' else 'autocast ' + args.amp}, {size} px, {CLASSES} "
        f"classes, patches {h} x {w}, {args.visible} visible; a training step is forward + "
        f"backward + AdamW; batch: the fastest of {', '.join(map(str, args.batch_size))} for each; "
        f"{args.steps} step(s) a timing, {rounds} interleaved rounds after {args.warmup} of "
        f"warm-up, {args.settle} untimed steps before each timing."
    )
    others = (
        f"Other programs kept {mean:.2f} cores busy, in a timing at most {high:.2f}. Kernels: "
        f"{autotune.autotuner.summary()}."
    )
    return [f"### {args.model}", "", settings, machine(args.device), others, args.checked]


def machine(device: torch.device) -> str:
    """Processors, versions and commit, in a sentence."""
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    cpu = re.search(r"model name\s*: (.*)", read("/proc/cpuinfo"))
    try:
        triton = f", triton {importlib.metadata.version('triton')}" if gpu else ""
    except importlib.metadata.PackageNotFoundError:
        triton = ", no triton"
    return (
        f"{gpu}{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}{triton}, "
        f"timm {timm.__version__}, python {platform.python_version()}, commit {commit()}."
    )


def commit() -> str:
    """Of this repository, with a note where tracked files differ; `unknown` without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def prepare(args: argparse.Namespace) -> None:
    """The grid and the number of visible patches; compare the two FCMAE before any is timed."""
    torch.manual_seed(0)
    try:
        model = create_model(fcmae_name(args.model), mask_ratio=args.mask_ratio).to(args.device)
        args.grid = model.grid_size(args.input_size, args.input_size)
        args.visible = visible_patches(args.grid[0] * args.grid[1], model.mask_ratio)
    except ValueError as error:
        sys.exit(f"benchmarks/step.py: {error}")
    args.checked = check_against_packed(model, args.input_size, args.visible, args.device)


def main(argv: list[str] | None = None) -> int:
    """1 if a variant has no row, else 0. SIGTERM ends it early, with what is measured so far."""
    args = parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    try:
        prepare(args)
        variants = make_variants(args)
    except TimeIsUp:
        variants = []
    if variants:
        measure(args, variants, args.end)
    variants = [variant for variant in variants if variant.seconds]
    if not variants:
        sys.exit("benchmarks/step.py: nothing was measured")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the report takes no time
    print(text := report(args, variants))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")
    rows = {"products", *(variant.name for variant in variants)}
    return int(not rows.issuperset(args.only))


if __name__ == "__main__":
    sys.exit(main())
