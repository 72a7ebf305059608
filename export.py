# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Write a checkpoint as timm, transformers, ONNX and others read it, and have them read it.

python export.py runs/demo/finetune --to hf --output my_model
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import parser as options
from config.flags import GRAPHS, TARGETS
from parallel import process_group

if __name__ == "__main__":  # --help and typing errors answer before torch is loaded
    parser = options.export_parser()
    args = parser.parse_args()
    for problem in options.export_problems(args):
        parser.error(problem)

import torch
from torch import Tensor

from data_loading.transforms import height_and_width, mean_and_std
from errors import UserError
from weights import export_formats, huggingface
from weights.convert import describe, to_convnextv2
from weights.export_formats import (
    Network,
    Subject,
    as_dict,
    check_round_trip,
    check_shape,
    first,
    timm_call,
)
from weights.files import read_checkpoint
from weights.huggingface import find_labels
from weights.pretrained import EMA_KEY, pick_weights, wild_weights

FORMATS = {  # target -> who writes it, who reads it back, and the package that does so there
    "timm": (export_formats.write_timm, export_formats.read_timm, "timm"),
    "hf": (huggingface.write_hf, huggingface.read_hf, "transformers"),
    "official": (export_formats.write_official, export_formats.read_official, "timm"),
    "safetensors": (
        export_formats.write_safetensors,
        export_formats.read_safetensors,
        "safetensors",
    ),
    "onnx": (export_formats.write_onnx, export_formats.read_onnx, "onnxruntime"),
    "torchscript": (export_formats.write_torchscript, export_formats.read_torchscript, "torch"),
    "pt2": (export_formats.write_pt2, export_formats.read_pt2, "torch"),
}
LIMIT, HALF_LIMIT = 1e-5, 1e-2  # largest difference, over the largest value of the output
PUBLISHED_CELLS = 7  # along a side of the last map: 224 pixels where the stride is 32


# --- what is exported ---------------------------------------------------------------------------


def build_subject(args: Any) -> Subject:
    """The weights that the flags name, and what the run that made them knew."""
    key = EMA_KEY if args.use_ema else args.model_key
    checkpoint = read_checkpoint(args.checkpoint, args.sha256, average=args.use_ema)
    weights = pick_weights(checkpoint, args.checkpoint, key, args.model_prefix)
    try:
        state, report = to_convnextv2(weights)
        shape = describe(state)
        whole = to_convnextv2(weights, decoder=True)[0] if report.dropped else state
    except UserError as error:
        raise UserError(f"{args.checkpoint}: {error}") from error
    run = as_dict(checkpoint.get("args"))
    check_shape(args.checkpoint, shape, str(run.get("model")).removeprefix("fcmae_"))
    report.loaded = list(state)
    print(f"{args.checkpoint}: {report}", file=sys.stderr)  # standard output is for the result
    if wild := wild_weights(state):
        print(f"{args.checkpoint}: {wild}", file=sys.stderr)
    side = PUBLISHED_CELLS * shape["stem_stride"] * 2 ** (len(shape["dims"]) - 1)
    default_mean = first(
        args.imagenet_default_mean_and_std, run.get("imagenet_default_mean_and_std"), True
    )
    mean, std = mean_and_std(shape["in_chans"], default_mean)
    return Subject(
        state,
        whole,
        shape,
        size=height_and_width(first(args.input_size, run.get("input_size"), side)),
        mean=mean,
        std=std,
        crop_pct=first(args.crop_pct, run.get("crop_pct")),
        labels=find_labels(args.labels, as_dict(checkpoint).get("classes"), shape["num_classes"]),
        half=args.half,
        opset=args.opset or Subject.opset,
    )


# --- whether it is good --------------------------------------------------------------------------


def check(subject: Subject, target: str, path: Path) -> str:
    """Have the consumer of a target read what was written; what came of it, for the last line."""
    (_, read, package), limit = FORMATS[target], HALF_LIMIT if subject.half else LIMIT
    if target not in GRAPHS:
        has_decoder = target in ("official", "safetensors")
        check_round_trip(subject.whole if has_decoder else subject.state, path)
    try:
        consumer = f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"written, but NOT checked, since it is not installed: pip install {package}"
    try:
        difference = largest_difference(subject, target, read(subject, path))
    except Exception as error:  # whatever the consumer raises: its file is no use
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{consumer} cannot use what was written: {reason}") from error
    if not difference <= limit:  # NaN is not
        raise UserError(
            f"{consumer} gives another output, by {difference:.1e} of the largest value where "
            f"{limit:.0e} is allowed; nothing was kept"
            + "; without --half true it may be right"
            * subject.half
        )
    return f"good, largest difference {difference:.1e} of the largest value, against {consumer}"


@torch.no_grad()
def largest_difference(
    subject: Subject, target: str, function: Callable[[Tensor], Tensor]
) -> float:
    """Of `function` from our own network in float64, over the largest value, on random images.

    Weights are compared in float64, graphs in float32 and at two sizes and batches.
    """
    height, width = subject.size
    sizes = [(2, height, width)]
    if target in GRAPHS:
        other = height + subject.stride, max(width - subject.stride, 2 * subject.stride)
        sizes = [(1, height, width), (3, *other)]
    network, generator = Network(subject).double(), torch.Generator().manual_seed(0)
    differences = []
    for count, *size in sizes:
        images = torch.randn(count, subject.shape["in_chans"], *size, generator=generator)
        expected = network(images.double())
        got = function(images if target in GRAPHS else images.double())
        if got.shape != expected.shape:
            raise UserError(f"output {tuple(got.shape)}, expected {tuple(expected.shape)}")
        differences.append(((got - expected).abs().max() / expected.abs().max()).item())
    return math.nan if any(map(math.isnan, differences)) else max(differences)


# --- files ---------------------------------------------------------------------------------------


def default_output(subject: Subject, target: str) -> str:
    """convnextv2_tiny-timm.safetensors and so on, in the current folder."""
    name = subject.size_name or "convnextv2"
    kind = "" if target in ("safetensors", *GRAPHS) else f"-{target}"
    return f"{name}{kind}{'-half' * subject.half}{TARGETS[target]}"


def publish(draft: Path, output: Path) -> None:
    """Move what is good to its place; of a folder file by file, so that others in it stay."""
    if not draft.is_dir():
        os.replace(draft, output)
        return
    output.mkdir(exist_ok=True)
    for file in draft.iterdir():
        os.replace(file, output / file.name)


def main(args: argparse.Namespace) -> None:
    """Write beside the place, have it checked, and only then move it there."""
    subject = build_subject(args)
    Network(subject, args.checkpoint)  # fits, or says what does not
    output = Path(args.output or default_output(subject, args.to))
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} is there already; choose another --output, or --overwrite true")
    if output.exists() and output.is_dir() != (args.to == "hf"):
        raise UserError(f"{output} is {'a' if output.is_dir() else 'no'} folder; choose another")
    if subject.half and wild_weights(subject.state):
        raise UserError(f"{args.checkpoint}: {wild_weights(subject.state)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
            draft = Path(folder) / output.name
            FORMATS[args.to][0](subject, draft)
            verdict = check(subject, args.to, draft)
            publish(draft, output)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error}); choose another place") from error
    if args.to == "timm":
        print(timm_call(subject, str(output)))
    print(f"{output}: {verdict}")


if __name__ == "__main__":
    process_group.launch(main, args)
