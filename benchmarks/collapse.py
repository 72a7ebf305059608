# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pre-train a small network in good health and with planted faults, and draw what probes measure.

python benchmarks/collapse.py --folder runs/collapse --output assets/collapse.png

Each run is one of main_pretrain.py; one that is there already is only drawn. The faults: GRN is
removed, and the learning rate is 50 and 500 times too large.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw, ImageFont

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE

LR = 1e-3
RUNS = {  # title -> network, learning rate
    "healthy": ("healthy", LR),
    "without GRN": ("without_grn", LR),
    "learning rate x 50": ("healthy", 50 * LR),
    "learning rate x 500": ("healthy", 500 * LR),
}
COLORS = dict(zip(RUNS, ("#1b7f4d", "#2f6fd0", "#d1641d", "#7a3fb5"), strict=True))
PANELS = ("train_loss", "rank_me", "feature_distance", "dead_channels", "probe_knn", "probe_linear")
WIDTH, HEIGHT, GAP = 300, 170, 44  # pixels of a panel
INK, FAINT = "#303030", "#c8c8c8"


def healthy(in_chans: int, stem_stride: int, drop_path_rate: float, **kwargs: Any) -> FCMAE:
    """An FCMAE around a ConvNeXt V2 of 0.3 million parameters."""
    shape = {"in_chans": in_chans, "stem_stride": stem_stride, "drop_path_rate": drop_path_rate}
    return FCMAE(ConvNeXtV2((1, 1, 2, 1), (16, 32, 64, 128), **shape), **kwargs)


def without_grn(**kwargs: Any) -> FCMAE:
    """The same network, where nothing makes channels compete."""
    model = healthy(**kwargs)
    for block in (block for stage in model.encoder.stages for block in stage):
        block.grn = None
    return model


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/collapse"), help="of the runs")
    parser.add_argument("--data_path", default="", help="images; default: the embedded digits")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--probe_every", type=int, default=2)
    parser.add_argument("--more", default="", help="other flags of main_pretrain.py")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS], help="runs to do")
    parser.add_argument("--output", type=Path, help="PNG file to draw")
    return parser


def train(title: str, args: argparse.Namespace) -> Path:
    """Run main_pretrain.py, unless the run is there; returns its folder."""
    network, lr = RUNS[title]
    folder = args.folder / title.replace(" ", "-")
    if not (folder / "log.txt").exists():
        data = ["--data_path", args.data_path] if args.data_path else ["--data_set", "DIGITS"]
        words = f"--model benchmarks.collapse:{network} --lr {lr} --epochs {args.epochs} "
        words += f"--probe_every {args.probe_every} --input_size 32 --stem_stride 1 --hflip 0 "
        words += "--decoder_embed_dim 64 --warmup_epochs 1 --num_workers 0 --picture_freq 0 "
        words += f"--batch_size 32 --spike_factor 0 --log_dir none {args.more}"
        command = [sys.executable, "main_pretrain.py", *words.split(), *data]
        subprocess.run([*command, "--output_dir", folder.resolve()], cwd=ROOT, check=True)
    return folder


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the values of each epoch of a run."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def points(log: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return (epochs done, value) where the log has a value."""
    return [(row["epoch"] + 1, row[name]) for row in log if row.get(name) is not None]


def draw_panel(name: str, logs: dict[str, list[dict[str, Any]]]) -> Image.Image:
    """Draw the curves of one value, a color for each run."""
    panel = Image.new("RGB", (WIDTH + 2 * GAP, HEIGHT + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    curves = {title: points(log, name) for title, log in logs.items()}
    first = [y for _, y in next(iter(curves.values()))]
    limit = 2 * max(first) if any(first) else math.inf  # a loss of 1e7 would hide the other curves
    curves = {title: [(x, min(y, limit)) for x, y in curve] for title, curve in curves.items()}
    values = [y for curve in curves.values() for _, y in curve] or [0.0]
    last = max((x for curve in curves.values() for x, _ in curve), default=1)
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    step = 10 ** math.floor(math.log10(high - low))
    step = step if (high - low) / step > 3 else step / 2 if (high - low) / step > 1.5 else step / 5

    def place(x: float, y: float) -> tuple[float, float]:
        return GAP + WIDTH * x / last, GAP + HEIGHT * (1 - (y - low) / (high - low))

    for n in range(math.ceil(low / step), math.floor(high / step) + 1):
        draw.line([place(0, n * step), place(last, n * step)], fill=FAINT)
        x, y = place(0, n * step)
        draw.text((x - 5, y), f"{n * step:.6g}", font=font, fill=INK, anchor="rm")
    for title, curve in curves.items():
        draw.line([place(*point) for point in curve], fill=COLORS[title], width=2, joint="curve")
    draw.text((GAP, GAP - 10), name, font=ImageFont.load_default(15), fill=INK, anchor="lb")
    draw.text((GAP + WIDTH, GAP + HEIGHT + 6), f"epoch {last:g}", font=font, fill=INK, anchor="rt")
    return panel


def draw_runs(logs: dict[str, list[dict[str, Any]]]) -> Image.Image:
    """Draw all panels in two rows, and the titles of the runs in their colors."""
    panels = [draw_panel(name, logs) for name in PANELS]
    width, height = panels[0].size
    columns = len(panels) // 2
    whole = Image.new("RGB", (columns * width, 2 * height + GAP // 2), "white")
    for number, panel in enumerate(panels):
        whole.paste(panel, (number % columns * width, GAP // 2 + number // columns * height))
    draw, font, x = ImageDraw.Draw(whole), ImageFont.load_default(16), GAP
    for title in logs:
        draw.line([(x, 20), (x + 24, 20)], fill=COLORS[title], width=4)
        draw.text((x + 32, 20), title, font=font, fill=INK, anchor="lm")
        x += 60 + int(draw.textlength(title, font=font))
    return whole


def main(args: argparse.Namespace) -> None:
    """Train, print the last values and alarms of each run, and draw the curves."""
    logs = {}
    for title in args.only:
        logs[title] = log = read(train(title, args))
        last = [(name, points(log, name)) for name in PANELS]
        print(f"| {title} | " + " | ".join(f"{n} {x[-1][1]:.3g}" for n, x in last if x) + " |")
        for alarm in dict.fromkeys(text for row in log for text in row.get("alarms", ())):
            print(f"    {alarm}")
    if args.output:
        draw_runs(logs).quantize(32).save(args.output, optimize=True)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
