# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Time a training step, ours beside dense-masked FCMAE and timm, in one process.

python benchmarks/step.py --model convnextv2_tiny
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stepper
from benchmarks.dense_masked import DenseMasked, check_against_packed
from models import create_model, fcmae_name
from models.fcmae import random_mask, visible_patches

VARIANTS = {  # what a row is called
    "packed": "FCMAE, packed (ours)",
    "packed_compiled": "FCMAE, packed (ours), compiled",
    "masked": "FCMAE, dense-masked, eager",
    "masked_compiled": "FCMAE, dense-masked, compiled",
    "dense": "supervised, ours, eager",
    "dense_compiled": "supervised, ours, compiled",
    "timm": "supervised, timm, eager channels_last",
    "timm_compiled": "supervised, timm, compiled channels_last",
}
DEFAULT = [name for name in VARIANTS if name not in ("packed_compiled", "dense_compiled")]
RATIOS = (
    ("packed", "masked"),
    ("packed", "masked_compiled"),
    ("packed_compiled", "masked_compiled"),
    ("dense", "timm"),
    ("dense", "timm_compiled"),
    ("dense_compiled", "timm_compiled"),
    ("packed", "dense"),
)
CLASSES = 1000


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnextv2_tiny", help="one of the eight sizes")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, help="for all; default 8 on CPU, 128 on CUDA")
    parser.add_argument("--rounds", type=int, default=10, help="each times every variant once")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--steps", type=int, help="steps a timing; default 1 on CPU, 10 on CUDA")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default torch's own")
    parser.add_argument("--amp", choices=["none", "bf16"], help="default bf16 on CUDA, else none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help=f"comma separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--no_compile", action="store_true", help="leave compiled variants out")
    parser.add_argument("--quiet", type=float, help="repeat while others keep more cores busy")
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    return parser


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
    args.only = [name for name in VARIANTS if name in names]
    args.device = torch.device(args.device)
    on_cuda = args.device.type == "cuda"
    args.model = args.model.removeprefix("fcmae_")
    args.batch_size = args.batch_size or (128 if on_cuda else 8)
    args.steps = args.steps or (10 if on_cuda else 1)
    args.amp = stepper.choose_amp(args.amp, None, args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


@dataclass
class Variant:
    """A model with its optimizer and its loss, and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    seconds: list[float] = field(default_factory=list)  # a step, one value a round
    memory: int | None = None  # bytes

    def step(self) -> None:
        """Forward, backward, optimizer; gradients are freed, as other variants share the memory."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_variants(args: argparse.Namespace) -> list[Variant]:
    """The variants that `args.only` names, each with parameters of its own, on the same images."""
    device, size, batch = args.device, args.input_size, args.batch_size
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)

    def make(name: str) -> Variant:
        torch.manual_seed(0)
        kind, _, compiled = name.partition("_")
        if kind == "timm":
            model = timm.create_model(args.model, num_classes=CLASSES)
            model = model.to(memory_format=torch.channels_last)
        elif kind == "dense":
            model = create_model(args.model, num_classes=CLASSES)
        else:
            model = create_model(fcmae_name(args.model))
        model = model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

        forward = DenseMasked(model) if kind == "masked" else model
        forward = torch.compile(forward) if compiled else forward
        known = (args.visible,) if kind == "packed" else ()

        def loss() -> Tensor:
            with stepper.autocast(device, args.amp):
                if kind in ("dense", "timm"):
                    return F.cross_entropy(forward(images), labels)
                noise = torch.rand(batch, args.grid[0] * args.grid[1], device=device)
                mask = random_mask(noise, args.visible)
                return forward(images, mask, *known)[0]

        return Variant(name, model, optimizer, loss)

    return [make(name) for name in args.only]


def saved_bytes(variant: Variant) -> int:
    """What forward saves for backward: distinct storages, parameters aside."""
    seen = {p.untyped_storage().data_ptr(): 0 for p in variant.model.parameters()}

    def pack(x: Tensor) -> Tensor:
        seen.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = variant.loss()  # kept to the end: what is freed could be counted as one
    del loss
    return sum(seen.values())


def measure_memory(variant: Variant, device: torch.device) -> int | None:
    """Bytes, in a step. CUDA: what a run of it alone would peak at. CPU: saved for backward."""
    if device.type == "cuda":
        state = [v for s in variant.optimizer.state.values() for v in s.values()]
        own = [*variant.model.parameters(), *state]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.step()
        resident = sum(t.nbytes for t in own if torch.is_tensor(t) and t.is_cuda)
        return torch.cuda.max_memory_allocated() - before + resident
    # In a compiled variant the hooks would be compiled in and change what is saved.
    return None if variant.name.endswith("_compiled") else saved_bytes(variant)


def time_steps(variant: Variant, steps: int, device: torch.device) -> float:
    """Seconds a step; a GPU's queue is empty at both ends."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        variant.step()
    wait()
    return (time.perf_counter() - start) / steps


def measure(args: argparse.Namespace, variants: list[Variant]) -> None:
    """Warm-up, memory, then rounds; each starts one variant later, so none has a fixed place."""
    for number in range(args.warmup):
        for variant in variants:
            seconds = time_steps(variant, 1, args.device)
            print(f"warm-up {number}: {variant.name} {seconds:.2f} s", file=sys.stderr)
    for variant in variants:
        variant.memory = measure_memory(variant, args.device)
    others = []
    for number in range(args.rounds):
        print(f"round {number}", file=sys.stderr)
        turn = number % len(variants)
        for variant in variants[turn:] + variants[:turn]:
            variant.step()  # not timed: caches and free memory are those of the one before
            for _ in range(1 if args.quiet is None else 20):
                busy = others_busy()
                seconds = time_steps(variant, args.steps, args.device)
                share = (others_busy() - busy) / (args.steps * seconds)
                if args.quiet is None or share <= args.quiet:
                    break
                time.sleep(3)
            variant.seconds.append(seconds)
            others.append(share)
    args.others = statistics.mean(others), max(others)


def read(path: str) -> str:
    """A file's text, empty where there is none."""
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def others_busy() -> float:
    """CPU seconds that other processes have used since boot; 0 where it is not known."""
    ticks = sum(map(int, read("/proc/stat").split()[1:4]))  # user, nice, system
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time() if ticks else 0.0


def report(args: argparse.Namespace, variants: list[Variant]) -> str:
    """Markdown: what was measured, where, the rows and the ratios."""
    kind = "peak MiB" if args.device.type == "cuda" else "saved for backward, MiB"
    rows, ratios = [], []
    for v in variants:
        middle = statistics.median(v.seconds)
        memory = "not measured, compiled" if v.memory is None else f"{v.memory / 2**20:.0f}"
        times = " | ".join(f"{1000 * t:.1f}" for t in (middle, min(v.seconds), max(v.seconds)))
        rows.append(f"| {VARIANTS[v.name]} | {args.batch_size / middle:.2f} | {times} | {memory} |")
    seconds = {v.name: v.seconds for v in variants}
    rate = {name: args.batch_size / statistics.median(s) for name, s in seconds.items()}
    for top, low in RATIOS:
        if top in rate and low in rate:
            each = [b / a for a, b in zip(seconds[top], seconds[low], strict=True)]
            ratios.append(
                f"| {VARIANTS[top]} / {VARIANTS[low]} | {rate[top]:.2f} / {rate[low]:.2f} "
                f"| **{rate[top] / rate[low]:.2f}** | {min(each):.2f} to {max(each):.2f} |"
            )
    head = f"| | images/s | ms a step: median | min | max | {kind} |\n|---|---|---|---|---|---|"
    below = "| | images/s | ratio of medians | ratios of the rounds |\n|---|---|---|---|"
    return "\n".join([*describe(args), "", head, *rows, "", below, *ratios])


def describe(args: argparse.Namespace) -> list[str]:
    """Model, shapes, settings and machine."""
    gpu = f"{torch.cuda.get_device_name()}; " if args.device.type == "cuda" else ""
    cpu = re.search(r"model name\s*: (.*)", read("/proc/cpuinfo"))
    size, (h, w), (mean, high) = args.input_size, args.grid, args.others
    settings = (
        f"{'float32' if args.amp == 'none' else 'autocast ' + args.amp}, images ({args.batch_size},"
        f" 3, {size}, {size}), {CLASSES} classes, patches {h} x {w}, {args.visible} visible; "
        f"forward + backward + AdamW, {args.steps} step(s) a timing, {args.rounds} interleaved "
        f"rounds after {args.warmup} of warm-up, an untimed step before each timing."
    )
    machine = (
        f"{gpu}{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, other programs kept {mean:.2f} cores busy (in a timing"
        f" at most {high:.2f}); torch {torch.__version__}, timm {timm.__version__}, python "
        f"{platform.python_version()}, commit {commit()}."
    )
    return [f"### {args.model}", "", settings, machine, args.checked]


def commit() -> str:
    """Of this repository, with a note where tracked files differ; empty without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    try:
        model = create_model(fcmae_name(args.model)).to(args.device)
        args.grid = model.grid_size(args.input_size, args.input_size)
        args.visible = visible_patches(args.grid[0] * args.grid[1], model.mask_ratio)
    except ValueError as error:
        sys.exit(f"benchmarks/step.py: {error}")
    args.checked = check_against_packed(model, args.input_size, args.visible, args.device)
    del model
    variants = make_variants(args)
    measure(args, variants)
    print(text := report(args, variants))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    main()
