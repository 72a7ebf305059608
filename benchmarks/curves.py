# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure the cost of a step over model size, image size, batch size and mask ratio.

python benchmarks/curves.py --only mask,image --model convnextv2_atto
"""

import argparse
import gc
import re
import statistics
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config.flags import KERNELS

CURVES = {  # what a table is called
    "sizes": "Model size",
    "image": "Image size",
    "batch": "Batch size",
    "mask": "Mask ratio",
}
SIZE_BATCHES = {  # images a step of each size, atto first
    "cpu": [8, 8, 8, 8, 8, 4, 2, 1],
    "cuda": [256, 256, 256, 256, 128, 64, 32, 16],
}
BATCHES = {"cpu": [1, 2, 4, 8, 16, 32], "cuda": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}
STATE = 16  # bytes a float32 parameter takes: itself, its gradient, AdamW's state
ROOM = 1.5  # memory asked for over that, for what a step saves


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"comma separated, in the order to run; {','.join(CURVES)}")
    parser.add_argument("--model", default="convnextv2_tiny", help="of all curves but sizes")
    parser.add_argument("--input_size", type=int, default=224, help="of all curves but image")
    parser.add_argument("--mask_ratio", type=float, default=0.6, help="of all curves but mask")
    parser.add_argument("--batch_size", type=int, help="of image and mask; 8 on CPU, 64 on CUDA")
    parser.add_argument("--sizes", nargs="+", help="atto ... huge; default all eight")
    parser.add_argument(
        "--size_batches",
        type=int,
        nargs="+",
        help=f"images a step for each of --sizes; default {SIZE_BATCHES['cpu']} on CPU, "
        f"{SIZE_BATCHES['cuda']} on CUDA",
    )
    parser.add_argument(
        "--image_sizes", type=int, nargs="+", default=[128, 160, 224, 288, 384, 512]
    )
    parser.add_argument("--batches", type=int, nargs="+", help="1 2 4 ... 32, on CUDA ... 512")
    parser.add_argument(
        "--mask_ratios", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.75, 0.8, 0.9]
    )
    parser.add_argument("--rounds", type=int, help="each times every point; 3 on CPU, 10 on CUDA")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--steps", type=int, help="steps a timing; default 1 on CPU, 5 on CUDA")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default torch's own")
    parser.add_argument("--amp", choices=["none", "bf16"], help="default bf16 on CUDA, else none")
    parser.add_argument("--kernels", choices=KERNELS, default="auto")
    parser.add_argument("--device", help="default cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    parser.set_defaults(quiet=None, settle=2)
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch
from torch import nn

from benchmarks.step import machine, measure, read
from benchmarks.variants import Variant, make_loss, make_variant
from errors import resolve
from models import create_model, fcmae_name
from models.convnextv2 import SIZES, ConvNeXtV2
from models.fcmae import FCMAE, visible_patches
from models.kernels import autotune
from training import stepper

Point = tuple[argparse.Namespace, "Variant | None"]  # its flags; None: no memory for it


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags with defaults filled in; `only` becomes the list of curves."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else list(CURVES)
    if unknown := [name for name in args.only if name not in CURVES]:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(CURVES)}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.sizes = args.sizes or list(SIZES)
    kind = "cuda" if args.device.type == "cuda" else "cpu"
    known = dict(zip(SIZES, SIZE_BATCHES[kind], strict=True))
    args.size_batches = args.size_batches or [known.get(size, 1) for size in args.sizes]
    if len(args.size_batches) != len(args.sizes):
        parser.error(
            f"--size_batches has {len(args.size_batches)} numbers for {len(args.sizes)} sizes; "
            "give one for each of --sizes"
        )
    args.batches = args.batches or BATCHES[kind]
    args.batch_size = args.batch_size or (64 if kind == "cuda" else 8)
    args.rounds = (10 if kind == "cuda" else 3) if args.rounds is None else args.rounds
    args.steps = args.steps or (5 if kind == "cuda" else 1)
    if min(args.rounds, args.steps, args.batch_size, *args.batches, *args.size_batches) < 1:
        parser.error("rounds, steps and batch sizes: expected integers from 1")
    if "mask" in args.only and len(set(args.mask_ratios)) < 2:
        parser.error("--mask_ratios: a line needs two different ones at least")
    args.model = args.model.removeprefix("fcmae_")
    args.amp = stepper.choose_amp(args.amp, None, args.device)
    return args


@cache
def shape_of(model: str) -> FCMAE:
    """Build the FCMAE of a model on the meta device, for its sizes."""
    with torch.device("meta"):
        return create_model(fcmae_name(model))


def flags_of(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    """The flags of one point, with the `grid` and `visible` patches that they give."""
    own = argparse.Namespace(**{**vars(args), **changes})
    own.grid = shape_of(own.model).grid_size(own.input_size, own.input_size)
    own.visible = visible_patches(own.grid[0] * own.grid[1], own.mask_ratio)
    return own


def plan(args: argparse.Namespace) -> dict[str, list[argparse.Namespace]]:
    """Curve -> the flags of its points. What does not fit together is refused here."""
    one = {"batch": args.batch_size}
    for size in args.sizes:
        resolve(size, SIZES, kind="size", importable=False)
    pairs = zip(args.sizes, args.size_batches, strict=True)
    points = {
        "sizes": [{"model": f"convnextv2_{size}", "batch": n, "label": size} for size, n in pairs],
        "image": [{"input_size": n, "label": f"{n} px", **one} for n in args.image_sizes],
        "batch": [{"batch": n, "label": str(n)} for n in args.batches],
        "mask": [{"mask_ratio": r, "label": f"{r:g}", **one} for r in args.mask_ratios],
    }
    return {name: [flags_of(args, **point) for point in points[name]] for name in args.only}


def gmac(encoder: ConvNeXtV2, pixels: int) -> float:
    """Billions of multiplications that linear and convolution layers make on so many pixels."""
    total, stride = 0, encoder.total_stride >> len(encoder.stages)
    for downsample, stage in zip(encoder.downsample_layers, encoder.stages, strict=True):
        stride *= 2
        layers = [*downsample.modules(), *stage.modules()]
        weights = [x.weight.numel() for x in layers if isinstance(x, (nn.Conv2d, nn.Linear))]
        total += pixels // stride**2 * sum(weights)
    return total / 1e9


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, int]:
    """y = a + b x by least squares: a, b, and the index of the point farthest from the line."""
    b, a = statistics.linear_regression(xs, ys)
    gaps = [abs(y - a - b * x) for x, y in zip(xs, ys, strict=True)]
    return a, b, gaps.index(max(gaps))


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    known = re.search(r"MemAvailable:\s*(\d+) kB", read("/proc/meminfo"))
    return 1024 * int(known[1]) if known else 1 << 60


def runs(variant: Variant) -> bool:
    """Take one step; returns False if memory does not suffice."""
    try:
        variant.step()
    except torch.OutOfMemoryError:
        variant.optimizer.zero_grad(set_to_none=True)
        return False
    return True


def measure_size(own: argparse.Namespace) -> str:
    """Return the row of a model size: a packed and a dense step, alternating if both fit."""
    shape = shape_of(own.model)
    need = ROOM * STATE * sum(p.numel() for p in shape.parameters())
    free = free_bytes(own.device)
    groups = [["packed", "dense"]] if 2 * need < free else [["packed"], ["dense"]]
    done: dict[str, tuple[float, int]] = {}  # images/s, bytes an image
    for names in groups if need < free else []:
        variants = [make_variant(name, own.batch, own) for name in names]
        variants = [variant for variant in variants if runs(variant)]
        if variants:
            measure(own, variants)
        done |= {v.name: (v.rate, (v.memory or 0) // v.batch) for v in variants}
        del variants
        free_bytes(own.device)
    both = ("packed", "dense")
    rates = [f"{done[name][0]:.2f}" if name in done else "no memory" for name in both]
    memory = [f"{done[name][1] / 2**20:.1f}" if name in done else "" for name in both]
    ratio = f"**{done['packed'][0] / done['dense'][0]:.2f}**" if len(done) == 2 else ""
    apart = ", one after the other" if len(groups) > 1 and len(done) == 2 else ""
    pixels = own.input_size**2
    macs = [gmac(shape.encoder, n) for n in (own.visible * shape.patch_size**2, pixels)]
    cells = [f"{own.label}{apart}", own.batch, *rates, ratio, *memory, *(f"{m:.3f}" for m in macs)]
    return f"| {' | '.join(map(str, cells))} |"


def measure_sizes(points: list[argparse.Namespace]) -> list[str]:
    """Lines of the table of model sizes."""
    kind = "peak MiB" if points[0].device.type == "cuda" else "MiB saved"
    head = ["", "batch", "packed images/s", "dense images/s", "packed / dense"]
    head += [f"{name}, {kind} an image" for name in ("packed", "dense")]
    head += ["GMAC of visible patches", "GMAC dense"]
    rows = []
    for own in points:
        print(f"size {own.label}, batch {own.batch}", file=sys.stderr)
        rows.append(measure_size(own))
    points[0].note = (
        "Packed: FCMAE; dense: supervised, ours. Each is forward + backward + AdamW. GMAC: of the "
        "encoder, forward, an image."
    )
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]


def measure_points(points: list[argparse.Namespace]) -> list[Point]:
    """A packed step of every point, all with one model, round by round."""
    base = make_variant("packed", points[0].batch, points[0])
    found: list[Point] = []
    for own in points:
        loss = make_loss("packed", base.model, own.batch, own)
        variant = Variant(own.label, own.batch, base.model, base.optimizer, loss)
        found.append((own, variant if runs(variant) else None))
    if variants := [variant for _, variant in found if variant]:
        measure(points[0], variants)
    return found


def table(found: list[Point], reference: str, title: str) -> list[str]:
    """Lines: what an image and a visible patch cost, relative to the row named `reference`."""
    cost = {  # label -> ms an image
        own.label: [1000 * s / own.batch for s in variant.seconds]
        for own, variant in found
        if variant
    }
    reference = reference if reference in cost else next(iter(cost), "")
    patch = {own.label: statistics.median(cost[own.label]) / own.visible for own, v in found if v}
    kind = "peak MiB" if found[0][0].device.type == "cuda" else "MiB saved"
    head = [title.lower(), "batch", "visible patches", "images/s", "ms an image", "min to max"]
    head += ["ms a visible patch", f"relative to {reference}", f"{kind} an image"]
    rows = []
    for own, variant in found:
        cells = [own.label, own.batch, own.visible, "no memory", *[""] * 5]
        if variant:
            ms = cost[own.label]
            cells[3:] = [f"{variant.rate:.2f}", f"{statistics.median(ms):.3f}"]
            cells += [f"{min(ms):.3f} to {max(ms):.3f}", f"{patch[own.label]:.4f}"]
            cells += [f"**{patch[own.label] / patch[reference]:.3f}**"]
            cells += [f"{(variant.memory or 0) / own.batch / 2**20:.1f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]


def describe_fit(found: list[Point]) -> str:
    """Describe the cost of an image as a line over its visible patches."""
    known = [(own, 1000 / variant.rate) for own, variant in found if variant]
    if len({own.visible for own, _ in known}) < 2:
        return "No line: it needs two points that differ in visible patches."
    xs, ys = [own.visible for own, _ in known], [ms for _, ms in known]
    a, b, far = fit_line(xs, ys)
    gap = ys[far] - a - b * xs[far]
    return (
        f"ms an image = a + b * visible, by least squares: a = {a:.3f}, b = {b:.4f}; "
        f"largest deviation {gap:+.3f} ms ({100 * gap / ys[far]:+.1f}%), at {known[far][0].label}. "
        f"a is {100 * a / ys[0]:.0f}% of the cost at {known[0][0].label}; it holds "
        "what no mask makes smaller: decoder, loss, the optimizer's share, and on a CPU the "
        "depthwise convolutions, which there run on the whole map, zero where hidden."
    )


def report(name: str, points: list[argparse.Namespace]) -> str:
    """Measure a curve; returns Markdown."""
    first, last = points[0], ""
    autotune.set_kernels(first.kernels, first.device)  # clears the choices of the curve before
    if name == "sizes":
        lines, title = measure_sizes(points), CURVES[name]
        others = [own.others for own in points if hasattr(own, "others")]
        last = first.note
    else:
        found, title = measure_points(points), f"{CURVES[name]}: {first.model}"
        lines = table(found, {"image": "224 px", "mask": "0.6"}.get(name, ""), CURVES[name])
        others = [first.others] if hasattr(first, "others") else []
        last = describe_fit(found) if name == "mask" else ""
    fixed = {"image": f"{first.input_size} px", "mask": f"mask ratio {first.mask_ratio:g}"}
    settings = [text for kind, text in fixed.items() if kind != name]
    settings += ["float32" if first.amp == "none" else f"autocast {first.amp}"]
    fewer = " (fewer than the 10 of step.py)" if first.rounds < 10 else ""
    busy = max(0.0, statistics.mean(mean for mean, _ in others)) if others else 0.0
    kernels = autotune.autotuner.summary()
    return "\n".join(
        [
            f"### {title}\n",
            f"{', '.join(settings)}; packed step: forward + backward + AdamW; medians of "
            f"{first.rounds} rounds{fewer} after {first.warmup} of warm-up, {first.steps} step(s) "
            "a timing, the points in turn.",
            machine(first.device),
            f"Other programs kept {busy:.2f} cores busy. Kernels: {kernels}.\n",
            *lines,
            *(["", last] if last else []),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        autotune.set_kernels(args.kernels, args.device)
        curves = plan(args)
    except ValueError as error:
        sys.exit(f"benchmarks/curves.py: {error}")
    for name, points in curves.items():
        print(f"curve {name}: {len(points)} points", file=sys.stderr, flush=True)
        text = report(name, points)
        print(text + "\n", flush=True)
        if args.output:  # now, so that finished curves stay if a later one is interrupted
            with args.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n\n")
        free_bytes(args.device)


if __name__ == "__main__":
    main()
