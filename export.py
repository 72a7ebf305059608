# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Convert a checkpoint for timm, transformers, ONNX and others, and check that they can use it.

python export.py runs/demo/finetune --to hf --output my_model
"""

import argparse
import importlib.metadata
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import checks
from config import parser as options
from config.flags import as_typed, is_code
from config.tool_flags import FOR_ANY_NETWORK, GRAPHS, TARGETS

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported
    parser = options.export_parser()
    args = parser.parse_args()
    for problem in checks.export_problems(args):
        parser.error(problem)

import torch
from torch import Tensor

from data_loading.targets import Scale
from data_loading.transforms import height_and_width, mean_and_std
from errors import UserError, first_line
from models import MODELS, build_classifier, is_known
from models.heads import is_plain
from parallel import process_group
from training.checkpoint import write_checkpoint
from weights import export_formats as formats
from weights.convert import (
    Report,
    describe,
    family,
    size_name,
    to_convnextv2,
    to_official,
    to_timm,
)
from weights.export_formats import ExportSpec, Network, save
from weights.files import check_finite, read_checkpoint
from weights.fit import find_classifier, find_last_layer, fit_weights, undo_scale
from weights.huggingface import as_rgb, find_labels, read_hf, write_hf
from weights.pretrained import EMA_KEY, large_weights, select_state_dict
from weights.saved_run import (
    HEADS,
    NORMALIZATION,
    SavedRun,
    normalized,
    read_saved_run,
    stored_flag,
)

FORMATS = {  # target -> function that writes it, function that reads it, package of the reader
    "timm": (lambda spec, path: save(to_timm(spec.state), path, spec), formats.read_timm, "timm"),
    "hf": (write_hf, read_hf, "transformers"),
    "official": (
        lambda spec, path: write_checkpoint(
            {"model": to_official(spec.full_state), **spec.run}, path
        ),
        formats.read_official,
        "timm",
    ),
    "safetensors": (
        lambda spec, path: save(spec.full_state, path, spec, layout=spec.layout),
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
    saved = read_saved_run(checkpoint, args.checkpoint)
    run = dict(saved.flags)
    trained = str(run.get("model")).removeprefix("fcmae_")
    headed = check_heads(args, saved)
    own = is_known(trained) and (headed or not trained.startswith("convnext"))
    model = args.model or trained * own
    run |= {"nb_classes": saved.head.count} if saved.head.count else {}
    for problem in checks.other_network_problems(args, model) if model else ():
        raise UserError(problem)
    if args.input_size:  # some networks are built for one size
        run["input_size"] = args.input_size
    load = load_own_network if model else load_convnext
    try:
        spec, report = load(weights, run, model)
        spec = in_units_of_the_data(spec, saved.head.scale, run.get("input_size", 224))
    except UserError as error:
        raise UserError(f"{args.checkpoint}: {error}") from error
    notes = [f"loaded {len(spec.state)} tensors ({report})", large_weights(spec.state)]
    notes += contradictions(vars(args), saved.flags)
    for note in filter(None, notes):  # standard output is for the result
        print(f"{args.checkpoint}: {note}", file=sys.stderr)
    shape, side = spec.shape, 224
    if not model:
        side = DEFAULT_CELLS * shape["stem_stride"] * 2 ** (len(shape["dims"]) - 1)
    found = {"input_size": side, "imagenet_default_mean_and_std": True}
    found |= dict.fromkeys(("crop_pct", "mean", "std", "value_range"))
    given = {name: getattr(args, name) for name in found if getattr(args, name) is not None}
    names = {"input_size"} if args.to in GRAPHS else found.keys()  # that the format can store
    names = names - NORMALIZATION.keys() if given.keys() & NORMALIZATION.keys() else names
    stored = {name: stored_flag(saved, name) for name in names - given.keys() if name in run}
    found |= stored | given
    own = found["imagenet_default_mean_and_std"], found["mean"], found["std"]
    mean, std = mean_and_std(shape["in_chans"], *own)
    labels = find_labels(args.labels, checkpoint.get("classes"), shape["num_classes"])
    return replace(
        spec,
        size=height_and_width(found["input_size"]),
        mean=mean,
        std=std,
        **{name: found[name] for name in ("crop_pct", "value_range")},
        labels=labels,
        classes=labels if args.labels else saved.head.names,
        half=args.half,
        opset=args.opset or ExportSpec.opset,
    )


def check_heads(args: argparse.Namespace, saved: SavedRun) -> bool:
    """Return True if a run has other heads than a linear classifier.

    UserError for formats that cannot hold them, and for code that no flag allows to run.
    """
    run = {name: stored_flag(saved, name) for name in HEADS if saved.flags.get(name)}
    for name in HEADS:
        typed, stored = getattr(args, name), run.get(name, "")
        if typed not in (None, stored):
            trained = f"was trained with --{name} {stored}" if stored else f"has no --{name}"
            raise UserError(f"--{name} {typed} is given, but {args.checkpoint} {trained}; drop it")
        if ":" in stored and typed is None:
            raise UserError(
                f"{args.checkpoint} was trained with --{name} {stored}, which is code; give "
                f"--{name} {shlex.quote(stored)} to allow running it"
            )
    names = [*run]
    if not names or (names == ["head"] and is_plain(run["head"])):
        return False
    text = f"{args.checkpoint} was trained with --{names[0]} {run[names[0]]}"
    if args.to not in FOR_ANY_NETWORK:
        raise UserError(
            f"{text}, and --to {args.to} is for a linear classifier; use one of "
            f"{', '.join(FOR_ANY_NETWORK)}"
        )
    if args.half:
        raise UserError(f"{text}, and --half true is for a linear classifier; drop --half")
    return True


def in_units_of_the_data(
    spec: ExportSpec, scale: Scale | None, input_size: int | Sequence[int]
) -> ExportSpec:
    """Return a regression whose last layer undoes the mean and std of its training targets.

    input_size: of images that the network takes.
    """
    if not scale:
        return spec
    head = "head." if spec.network is None else find_last_layer(spec.network, len(scale.mean))
    states = (undo_scale(state, head, scale) for state in (spec.state, spec.full_state))
    new = replace(spec, **dict(zip(("state", "full_state"), states, strict=True)))
    if spec.network is not None:  # its layer may not be the last one that is called
        images = torch.rand(
            2, spec.shape["in_chans"], *height_and_width(input_size), dtype=torch.float64
        )
        old_outputs, outputs = (Network(each).double()(images) for each in (spec, new))
        mean, std = scale.tensors()
        expected = old_outputs * std + mean
        if not (outputs - expected).abs().max() <= LIMIT * expected.abs().max():
            raise UserError(
                f"{head[:-1]} is not the last layer that is called, so its outputs cannot be "
                "exported in the units of the data; train with --normalize_targets false"
            )
    return new


def contradictions(given: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Return a note for each preprocessing flag that replaces another value of the run."""
    names = ("input_size", "crop_pct", *NORMALIZATION, "value_range")
    both = {
        name: (normalized(name, given[name]), normalized(name, run.get(name))) for name in names
    }
    return [
        f"--{name} {as_typed(typed)} is used; the run was trained with {as_typed(saved)}"
        for name, (typed, saved) in both.items()
        if None not in (typed, saved) and typed != saved
    ]


def load_convnext(
    weights: Mapping[str, Tensor], run: Mapping[str, Any], model: None
) -> tuple[ExportSpec, Report]:
    """Convert weights of a ConvNeXt and find its shape in them. run: flags of the run."""
    name = str(run.get("model"))
    try:
        state, report = to_convnextv2(weights)
    except UserError as error:
        hint = f"; they were trained with code, to run it give --model {name}" * is_code(name)
        raise UserError(f"{error}{hint}") from error
    shape = describe(state)
    bare, found = name.removeprefix("fcmae_"), size_name(shape)
    if bare in MODELS and bare != found:
        found = found or f"depths {shape['depths']} and widths {shape['dims']}"
        raise UserError(
            f"the run trained {name}, but these weights are of {found}; the file is incomplete or "
            "mixed, give another"
        )
    full_state = to_convnextv2(weights, decoder=True)[0] if report.dropped else state
    return ExportSpec(state, full_state, shape), report


def load_own_network(
    weights: Mapping[str, Tensor], run: Mapping[str, Any], model: str
) -> tuple[ExportSpec, Report]:
    """Build another classifier than a ConvNeXt V2, for as many classes as its weights have."""
    flags = {"in_chans": run.get("in_chans", 3), "stem_stride": run.get("stem_stride", 4)}
    flags["input_size"] = height_and_width(run.get("input_size", 224))
    fixed = {"drop_path": 0.0, "head_init_scale": 1.0, "grad_checkpointing": False}
    heads = {name: run.get(name, "") for name in ("head", "heads", "loss")}
    args = argparse.Namespace(model=model, **flags, **fixed, **heads, freeze_backbone=False)
    if run.get("nb_classes") and (args.head or args.heads):
        network = build_classifier(args, run["nb_classes"])
        state, report = fit_weights(network, weights)
        shape = {"in_chans": args.in_chans, "num_classes": run["nb_classes"]}
        return ExportSpec(state, state, shape, network), report
    network = build_classifier(args, 2)
    state, report = fit_weights(network, weights)
    heads = [state[f"{n}weight"] for n in find_classifier(network) if f"{n}weight" in state]
    if not heads and any(name.startswith("encoder.") for name in weights):
        raise UserError(
            f"pre-trained weights of {model} have no classifier, and only a ConvNeXt is exported "
            "without one; fine-tune them first (main_finetune.py --finetune)"
        )
    if not heads:
        raise UserError(
            f"--model {model}: its classifier is not found in the weights; give "
            f"{type(network).__name__} a method get_classifier() that returns its last layer"
        )
    shape = {"in_chans": args.in_chans, "num_classes": len(heads[0])}
    network = build_classifier(args, shape["num_classes"])
    return ExportSpec(state, state, shape, network), report


def check(spec: ExportSpec, target: str, path: Path) -> str:
    """Load what was written with another library and compare outputs; returns the result."""
    (_, read, package), limit = FORMATS[target], HALF_LIMIT if spec.half else LIMIT
    if target not in GRAPHS:
        has_decoder = target in ("official", "safetensors")
        expected = spec.full_state if has_decoder else spec.state
        formats.check_round_trip(expected, path, convert=spec.network is None)
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

    Weights are compared in float64; graphs in float32, with two sizes and batch sizes, or for a
    network of the user's own with one size.
    """
    network, generator = Network(spec).double(), torch.Generator().manual_seed(0)
    height, width = spec.size
    sizes = [(2, height, width)]
    if target in GRAPHS and spec.network is not None:
        sizes = [(1, height, width), (3, height, width)]
    elif target in GRAPHS:
        stride = network.model.total_stride
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
    name = size_name(spec.shape) or (family(spec.shape) if spec.network is None else "network")
    return f"{name}{kind}{'-half' * spec.half}{TARGETS[target]}"


def main(args: argparse.Namespace) -> None:
    """Write a draft next to the output, check it, and move it to its place."""
    spec = build_spec(args)
    Network(spec, args.checkpoint)  # raises UserError if the weights do not fit
    check_finite(spec.full_state, args.checkpoint)
    if args.to == "hf" and spec.shape["in_chans"] == 1:
        spec = as_rgb(spec)
        note = "its first layer becomes one for RGB images, which transformers makes of gray ones"
        print(f"{args.checkpoint}: {note}", file=sys.stderr)
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
