# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Compare FCMAE steps of networks of timm and torchvision with the same steps without masking.

python benchmarks/masked.py --models timm:resnet50 --output benchmarks/RESULTS.md
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODELS = ("timm:resnet18", "timm:resnet50", "timm:resnext50_32x4d", "timm:regnety_004")
MODELS += ("timm:efficientnet_b0", "timm:densenet121")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names as for --model")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, help="default 16 on CPU, 128 on CUDA")
    parser.add_argument("--steps", type=int, help="default 1 on CPU, 20 on CUDA")
    parser.add_argument("--rounds", type=int, default=5, help="each takes both kinds of steps")
    parser.add_argument("--device", help="default cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path, help="markdown file to append the table to")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch
from torch import Tensor

from benchmarks.step import machine
from benchmarks.variants import Variant, time_steps
from models import create_model, fcmae_name
from models.fcmae import random_mask, visible_patches
from training import stepper


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags with defaults filled in."""
    args = get_args_parser().parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = args.device.type == "cuda"
    args.batch_size = args.batch_size or (128 if on_cuda else 16)
    args.steps = args.steps or (20 if on_cuda else 1)
    args.amp = stepper.choose_amp(None, None, args.device)
    return args


def make_variant(name: str, masks: bool, args: argparse.Namespace) -> Variant:
    """FCMAE steps; without masks the encoder computes whole images, and all else is the same."""
    torch.manual_seed(0)
    model = create_model(fcmae_name(name)).to(args.device).train()
    if not masks:
        model.forward_encoder = lambda images, *_: model.encoder.forward_features(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    size, device = args.input_size, args.device
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    patches = (size // model.patch_size) ** 2
    visible = visible_patches(patches, model.mask_ratio)

    def loss() -> Tensor:
        mask = random_mask(torch.rand(len(images), patches, device=device), visible)
        with stepper.autocast(device, args.amp):
            return model(images, mask, visible)[0]

    return Variant("masked" if masks else "plain", args.batch_size, model, optimizer, loss)


def measure(name: str, args: argparse.Namespace) -> list[Variant]:
    """Time both kinds of steps in turn."""
    variants = [make_variant(name, masks, args) for masks in (False, True)]
    for variant in variants:
        variant.step()
    for number in range(args.rounds):
        for variant in variants[:: -1 if number % 2 else 1]:
            variant.seconds.append(time_steps(variant, args.steps, args.device))
    rates = ", ".join(f"{v.name} {v.rate:.1f} images/s" for v in variants)
    print(f"{name}: {rates}", file=sys.stderr)
    return variants


def report(args: argparse.Namespace, found: dict[str, list[Variant]]) -> str:
    """Markdown: a row for each network."""
    lines = ["| network | plain: images/s | masked: images/s | min | max | to plain |"]
    lines.append(f"|---|{'---|' * 5}")
    for name, (plain, masked) in found.items():
        low, high = (masked.batch / pick(masked.seconds) for pick in (max, min))
        ratio = statistics.median(plain.seconds) / statistics.median(masked.seconds)
        cells = f"{plain.rate:.1f} | {masked.rate:.1f} | {low:.1f} | {high:.1f} | **{ratio:.2f}**"
        lines.append(f"| `{name}` | {cells} |")
    settings = (
        f"FCMAE steps of {args.batch_size} images of {args.input_size} px, "
        f"{'float32' if args.amp == 'none' else 'autocast ' + args.amp}, {args.rounds} rounds. "
        "Plain: the encoder sees whole images; decoder, loss, backward and optimizer are the same."
    )
    return "\n".join(["## Masked networks", "", settings, machine(args.device), "", *lines])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print(text := report(args, {name: measure(name, args) for name in args.models}))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    main()
