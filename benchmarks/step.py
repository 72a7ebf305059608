# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Time a training step, ours beside dense-masked FCMAE and timm, in one process.

python benchmarks/step.py --model convnextv2_tiny
"""

from __future__ import annotations

import argparse
import importlib.metadata
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
from benchmarks.products import Products
from models import create_model, fcmae_name, tune
from models.fcmae import random_mask, visible_patches

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
OURS_COMPILED = ("packed_compiled", "dense_compiled", "infer_compiled")
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
CLASSES = 1000


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
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default torch's own")
    parser.add_argument("--amp", choices=["none", "bf16"], help="default bf16 on CUDA, else none")
    parser.add_argument("--kernels", choices=tune.MODES, default="auto", help="of ours")
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
    if "products" in names and "packed" not in names:
        parser.error("--only products: they are those of packed; add it")
    args.only = [name for name in VARIANTS if name in names]
    args.device = torch.device(args.device)
    on_cuda = args.device.type == "cuda"
    args.model = args.model.removeprefix("fcmae_")
    args.batch_size = args.batch_size or ([64, 128, 256] if on_cuda else [4, 8, 16])
    args.steps = args.steps or (10 if on_cuda else 1)
    args.amp = stepper.choose_amp(args.amp, None, args.device)
    tune.set_kernels(args.kernels, args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


@dataclass
class Variant:
    """A step of one kind at one batch size, and what was measured of it.

    optimizer: None for inference, in which `loss` gives the logits.
    """

    name: str
    batch: int
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    loss: Callable[[], Tensor]
    seconds: list[float] = field(default_factory=list)  # a step, one value a round
    memory: int | None = None  # bytes

    def step(self) -> None:
        """Forward, backward, optimizer; gradients are freed, as other variants share the memory."""
        if self.optimizer is None:
            with torch.inference_mode():
                self.loss()
            return
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def rate(self) -> float:
        """Images a second, by the median."""
        return self.batch / statistics.median(self.seconds)


def make_variant(name: str, batch: int, args: argparse.Namespace) -> Variant:
    """The variant with parameters of its own, the same for all; images on the device."""
    torch.manual_seed(0)
    kind, _, compiled = name.partition("_")
    if kind.startswith("timm"):
        model = timm.create_model(args.model, num_classes=CLASSES)
        model = model.to(memory_format=torch.channels_last)
    elif kind in ("dense", "infer"):
        model = create_model(args.model, num_classes=CLASSES)
    else:
        model = create_model(fcmae_name(args.model), mask_ratio=args.mask_ratio)
    infers = kind.endswith("infer")
    model = model.to(args.device).train(not infers)
    optimizer = None
    if not infers:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    forward = DenseMasked(model) if kind == "masked" else model
    if compiled:
        torch.compiler.reset()  # else the second batch size would be compiled for any
        forward = torch.compile(forward, dynamic=False)
    return Variant(name, batch, model, optimizer, make_loss(kind, forward, batch, args))


def make_loss(
    kind: str, forward: Callable, batch: int, args: argparse.Namespace
) -> Callable[[], Tensor]:
    """What a step differentiates; in inference the logits."""
    device, size = args.device, args.input_size
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)
    known = (args.visible,) if kind == "packed" else ()

    def loss() -> Tensor:
        with stepper.autocast(device, args.amp):
            if kind.endswith("infer"):
                return forward(images)
            if kind in ("dense", "timm"):
                return F.cross_entropy(forward(images), labels)
            noise = torch.rand(batch, args.grid[0] * args.grid[1], device=device)
            mask = random_mask(noise, args.visible)
            return forward(images, mask, *known)[0]

    return loss


def fastest_variant(name: str, args: argparse.Namespace) -> Variant:
    """The variant at the batch size that gives it the most images a second."""
    best, best_rate = None, 0.0
    for batch in args.batch_size:
        try:
            variant = make_variant(name, batch, args)
            time_steps(variant, 1, args.device)
            seconds = min(time_steps(variant, args.steps, args.device) for _ in range(3))
        except torch.OutOfMemoryError:
            break
        print(f"{name}, batch {batch}: {batch / seconds:.2f} images/s", file=sys.stderr)
        if batch / seconds > best_rate:
            best, best_rate = variant, batch / seconds
    if best is None:
        sys.exit(f"benchmarks/step.py: {name} has no memory for {args.batch_size} images")
    return best


def make_variants(args: argparse.Namespace) -> list[Variant]:
    """The variants that `args.only` names, each at its own best batch size."""
    variants = [fastest_variant(name, args) for name in args.only if name != "products"]
    if "products" in args.only:
        packed = next(v for v in variants if v.name == "packed")
        replay = Products(packed.step)
        variants.append(Variant("products", packed.batch, packed.model, None, replay))
    return variants


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
        states = variant.optimizer.state.values() if variant.optimizer else ()
        state = [v for s in states for v in s.values()]
        own = [*variant.model.parameters(), *state]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.step()
        resident = sum(t.nbytes for t in own if torch.is_tensor(t) and t.is_cuda)
        return torch.cuda.max_memory_allocated() - before + resident
    # In a compiled variant the hooks would be compiled in and change what is saved.
    skipped = variant.name.endswith("_compiled") or variant.optimizer is None
    return None if skipped else saved_bytes(variant)


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
    below = f"| | images/s | of medians | of minima | of the rounds |\n|---|{'---|' * 4}"
    return "\n".join([*describe(args), "", head, *rows, "", below, *ratios])


def describe(args: argparse.Namespace) -> list[str]:
    """Model, shapes, settings and machine."""
    size, (h, w), (mean, high) = args.input_size, args.grid, args.others
    settings = (
        f"{'float32' if args.amp == 'none' else 'autocast ' + args.amp}, {size} px, {CLASSES} "
        f"classes, patches {h} x {w}, {args.visible} visible; a training step is forward + "
        f"backward + AdamW; batch: the fastest of {', '.join(map(str, args.batch_size))} for each; "
        f"{args.steps} step(s) a timing, {args.rounds} interleaved rounds after {args.warmup} of "
        "warm-up, an untimed step before each timing."
    )
    others = (
        f"Other programs kept {mean:.2f} cores busy, in a timing at most {high:.2f}. Kernels: "
        f"{tune.choices.summary()}."
    )
    return [f"### {args.model}", "", settings, machine(args.device), others, args.checked]


def machine(device: torch.device) -> str:
    """Processors, versions and commit, in a sentence."""
    gpu = f"{torch.cuda.get_device_name()}; " if device.type == "cuda" else ""
    cpu = re.search(r"model name\s*: (.*)", read("/proc/cpuinfo"))
    triton = f", triton {importlib.metadata.version('triton')}" if device.type == "cuda" else ""
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    try:
        model = create_model(fcmae_name(args.model), mask_ratio=args.mask_ratio).to(args.device)
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
