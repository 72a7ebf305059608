# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Convert a checkpoint for timm, transformers, ONNX and others, and check that they can use it.

python export.py runs/demo/finetune --to hf --output my_model
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from config import parser as options
from config.flags import GRAPHS, TARGETS

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported
    parser = options.export_parser()
    args = parser.parse_args()
    for problem in options.export_problems(args):
        parser.error(problem)

import torch
from torch import Tensor

from data_loading.transforms import height_and_width, mean_and_std
from errors import UserError, first_line
from models.convnextv2 import SIZES
from parallel import process_group
from training.checkpoint import write_checkpoint
from weights import export_formats as formats
from weights.convert import describe, to_convnextv2, to_official, to_timm
from weights.export_formats import ExportSpec, Network, save
from weights.files import read_checkpoint
from weights.huggingface import find_labels, read_hf, write_hf
from weights.pretrained import EMA_KEY, large_weights, select_state_dict

OWN_LAYOUT = "ConvNeXt V2 toolkit (the official names)"
FORMATS = {  # target -> function that writes it, function that reads it, package of the reader
    "timm": (lambda spec, path: save(to_timm(spec.state), path), formats.read_timm, "timm"),
    "hf": (write_hf, read_hf, "transformers"),
    "official": (
        lambda spec, path: write_checkpoint({"model": to_official(spec.full_state)}, path),
        formats.read_official,
        "timm",
    ),
    "safetensors": (
        lambda spec, path: save(spec.full_state, path, layout=OWN_LAYOUT),
        formats.read_safetensors,
        "safetensors",
    ),
    "onnx": (formats.write_onnx, formats.read_onnx, "onnxruntime"),
    "torchscript": (formats.write_torchscript, lambda spec, path: torch.jit.load(path), "torch"),
    "pt2": (formats.write_pt2, lambda spec, path: torch.export.load(path).module(), "torch"),
}
LIMIT, HALF_LIMIT = 1e-5, 1e-2  # largest difference over the largest value of the output
DEFAULT_CELLS = 7  # along a side of the last feature map: 224 pixels at stride 32


def build_spec(args: argparse.Namespace) -> ExportSpec:
    """Read the weights that the flags name, and what their run stored about them."""
    key = EMA_KEY if args.use_ema else args.model_key
    checkpoint = read_checkpoint(args.checkpoint, args.sha256, ema=args.use_ema)
    weights = select_state_dict(checkpoint, args.checkpoint, key, args.model_prefix)
    try:
        state, report = to_convnextv2(weights)
        shape = describe(state)
        full_state = to_convnextv2(weights, decoder=True)[0] if report.dropped else state
    except UserError as error:
        raise UserError(f"{args.checkpoint}: {error}") from error
    run = checkpoint.get("args") or {}
    run = vars(run) if isinstance(run, argparse.Namespace) else run  # the official code's flags
    found = shape["depths"], shape["dims"]
    expected = SIZES.get(
        str(run.get("model")).removeprefix("fcmae_").removeprefix("convnextv2_"), found
    )
    if found != expected:
        raise UserError(
            f"{args.checkpoint}: the run trained {run['model']} of depths and widths {expected}, "
            f"but these weights have {found}; the file is incomplete or mixed, give another"
        )
    notes = [f"loaded {len(state)} tensors ({report})", large_weights(state)]
    for note in filter(None, notes):  # standard output is for the result
        print(f"{args.checkpoint}: {note}", file=sys.stderr)
    side = DEFAULT_CELLS * shape["stem_stride"] * 2 ** (len(shape["dims"]) - 1)
    found = {"input_size": side, "crop_pct": None, "imagenet_default_mean_and_std": True}
    for flags in (run, {name: getattr(args, name) for name in found}):
        found |= {name: flags[name] for name in found if flags.get(name) is not None}
    mean, std = mean_and_std(shape["in_chans"], found["imagenet_default_mean_and_std"])
    return ExportSpec(
        state,
        full_state,
        shape,
        size=height_and_width(found["input_size"]),
        mean=mean,
        std=std,
        crop_pct=found["crop_pct"],
        labels=find_labels(args.labels, checkpoint.get("classes"), shape["num_classes"]),
        half=args.half,
        opset=args.opset or ExportSpec.opset,
    )


def check(spec: ExportSpec, target: str, path: Path) -> str:
    """Load what was written with another library and compare outputs; returns the result."""
    (_, read, package), limit = FORMATS[target], HALF_LIMIT if spec.half else LIMIT
    if target not in GRAPHS:
        has_decoder = target in ("official", "safetensors")
        formats.check_round_trip(spec.full_state if has_decoder else spec.state, path)
    try:
        library = f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"written, but NOT checked: {package} is not installed (pip install {package})"
    try:
        difference = largest_difference(spec, target, read(spec, path))
    except Exception as error:  # of any library
        raise UserError(f"{library} cannot use the file: {first_line(error)}") from error
    if not difference <= limit:  # also if it is NaN
        advice = "; try again without --half true" * spec.half
        raise UserError(
            f"the output in {library} differs by {difference:.1e} of the largest value, more than "
            f"{limit:.0e}; the exported file was deleted{advice}"
        )
    return f"checked with {library}, largest difference {difference:.1e} of the largest value"


@torch.no_grad()
def largest_difference(
    spec: ExportSpec, target: str, function: Callable[[Tensor], Tensor]
) -> float:
    """Compare with our network in float64 on random images, relative to the largest value.

    Weights are compared in float64; graphs in float32, with two sizes and batch sizes.
    """
    network, generator = Network(spec).double(), torch.Generator().manual_seed(0)
    (height, width), stride = spec.size, network.model.total_stride
    sizes = [(2, height, width)]
    if target in GRAPHS:
        sizes = [(1, height, width), (3, height + stride, max(width - stride, 2 * stride))]
    differences = []
    for count, *size in sizes:
        images = torch.randn(count, spec.shape["in_chans"], *size, generator=generator)
        expected = network(images.double())
        got = function(images if target in GRAPHS else images.double())
        if got.shape != expected.shape:
            raise UserError(f"output {tuple(got.shape)}, expected {tuple(expected.shape)}")
        differences.append((got - expected).abs().max() / expected.abs().max())
    return torch.stack(differences).max().item()  # NaN if one is


def default_output(spec: ExportSpec, target: str) -> str:
    """Name the output in the current folder, such as convnextv2_tiny-timm.safetensors."""
    kind = "" if target in ("safetensors", *GRAPHS) else f"-{target}"
    return f"{spec.size_name or 'convnextv2'}{kind}{'-half' * spec.half}{TARGETS[target]}"


def main(args: argparse.Namespace) -> None:
    """Write a draft next to the output, check it, and move it to its place."""
    spec = build_spec(args)
    Network(spec, args.checkpoint)  # raises UserError if the weights do not fit
    output = Path(args.output or default_output(spec, args.to))
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; choose another --output, or give --overwrite true")
    if spec.half and (warning := large_weights(spec.state)):
        raise UserError(f"{args.checkpoint}: {warning}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # deprecation of torch's older exporters
            draft = Path(folder) / output.name
            FORMATS[args.to][0](spec, draft)
            result = check(spec, args.to, draft)
            if draft.is_dir():  # other files in the folder stay
                shutil.copytree(draft, output, dirs_exist_ok=True)
            else:
                os.replace(draft, output)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error}); choose another place") from error
    if args.to == "timm":
        print(formats.timm_call(spec, str(output)))
    print(f"{output}: {result}")


if __name__ == "__main__":
    process_group.launch(main, args)
