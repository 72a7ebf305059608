# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Draw images, reconstructions and what a network looks at; print statistics; report on runs.

python visualize.py --checkpoint runs/demo/pretrain/checkpoint-9.pth --output reconstructions.png
python visualize.py data --data_path photos
python visualize.py stats --data_path photos
python visualize.py runs runs --sort test_acc1
python visualize.py report runs/demo/pretrain
python visualize.py explain runs/demo/finetune --images photos
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import predict_flags
from config.checks import shape_problems
from config.parser import finalize, pretrain_parser
from config.views import OF_EXPLAIN, parse_view
from errors import UserError, format_bytes, plural, print_quickly, problem_of
from insight.runs import print_runs

if __name__ == "__main__":  # parse the flags before torch is loaded, so that --help is fast
    view, args = parse_view()
    if view == "runs":
        sys.exit(print_quickly(print_runs, args))

import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import datasets
from config.flags import (
    LISTED,
    downloads,
    implied_patch,
    is_code,
    is_pretraining,
    needs_path,
)
from config.tasks import OF_TABLES, may_be_table
from data_loading.inputs import Inputs
from data_loading.mixed import MixedImages, reading_order, refuse_overwriting
from data_loading.sources import DatasetSpec
from data_loading.stats import MeasuredDataset, Stats, choose, describe_classes, keep_samples
from data_loading.tables import Columns
from data_loading.transforms import height_and_width
from data_loading.workers import WatchedLoader
from insight.drawing import write_picture
from insight.report_page import write_report
from models import build_fcmae
from parallel.process_group import init_distributed_mode, launch
from training.checkpoint import TrainState
from training.explain import explain_autoencoder, explain_classifier
from training.pictures import TITLES, ReconstructionImages
from training.preview import build_preview, describe, draw_preview
from training.trained_model import TrainedModel, has_decoder, load_trained, read_source
from weights.convert import DECODER, describe_decoder, unwrap
from weights.pretrained import Pretrained, read_pretrained
from weights.saved_run import inherit_flags

AT_ONCE = 8  # images that a worker measures before it reports
MASKS = 8  # of `explain`


def main(args: argparse.Namespace) -> None:
    """Draw with the model and the data of the run that wrote the checkpoint."""
    if not args.checkpoint:
        raise UserError(
            "--checkpoint is missing; give a run of main_pretrain.py, or weights with a decoder"
        )
    device = init_distributed_mode(args.device)
    weights = read_pretrained(args.checkpoint)
    given = {key: value for key, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**find_flags(weights, given))
    data = find_data(args, given)
    refuse_overwriting([Path(args.output)], data, args.checkpoint)
    model = build_fcmae(args).to(device)
    weights.load(model, new=())
    name = "/".join(Path(weights.path).parts[-2:])
    drawing = ReconstructionImages(args, data, device, count=args.num_images, name=name)
    image = drawing.draw(model, TrainState(args.epochs))
    save(image, args.output)
    columns = ", ".join(title.replace("\n", " ") for title in TITLES)
    print(f"{args.output}: {plural(len(drawing.images), 'row')} of {columns}")


def save(image: torch.Tensor, path: str) -> None:
    """Write an image, (3, H, W) in 0 to 1, as a PNG file."""
    write_picture(to_pil_image(image.mul(255).add(0.5).clamp(0, 255).byte()), path)


def draw_data(args: argparse.Namespace) -> None:
    """Draw the images that a training script would see with these flags."""
    init_distributed_mode("cpu")
    typed = [getattr(args, name) for name in ("finetune", "resume") if name in args.typed]
    if source := next(filter(None, typed), ""):  # the flags of a file are complete
        args = inherit_flags(args, read_pretrained(source).saved)
    preview = build_preview(args, args.num_images, args.num_epochs)
    refuse_overwriting([Path(args.output)], preview.dataset)
    write_picture(draw_preview(preview), args.output)
    print(f"{args.output}: {describe(preview)}")


def print_stats(args: argparse.Namespace) -> None:
    """Print statistics of the images of a data set, and the flags to paste."""
    init_distributed_mode("cpu")
    data = open_data(args)
    on_bad = datasets.on_bad_image(False, args)
    dataset = MeasuredDataset(data, args.in_chans, on_bad).map_values(args.value_range)
    chosen = choose(len(data), args.num_images, args.seed)
    order = reading_order(data)
    keys = [(0, int(index)) for index in order[np.isin(order, chosen)]]
    loader = WatchedLoader(dataset, keys, AT_ONCE, args.num_workers, 0, keep_samples)
    stats, hidden = Stats(), not sys.stderr.isatty()
    with tqdm(total=len(chosen), unit=" images", leave=False, disable=hidden) as bar:
        for batch in loader:
            for result in batch:
                stats.add(result)
            bar.update(len(batch))
    *lines, flags = stats.lines()
    print(f"images   {len(stats.sizes):,} of {len(data):,}, in {args.data_path or args.data_set}")
    print("\n".join([*lines, describe_classes(data), flags]))


def open_data(args: argparse.Namespace) -> Any:
    """Return the images of a part of a data set, with labels if it has them."""
    is_train = args.split == "train"
    if needs_path(args.data_set) and not (args.data_path or (args.eval_data_path and not is_train)):
        raise UserError("--data_path is missing; give the folder, table or archive of the data")
    spec = datasets.build_spec(args, columns=datasets.build_columns(args, args.label_column))
    try:
        return datasets.create_dataset(args.data_set, spec, is_train)
    except UserError as error:
        problem = error
    data = datasets.create_unlabeled(args.data_set, spec, is_train, problem)
    print(f"no labels: {problem_of(problem)}", file=sys.stderr)
    return data


def find_flags(pretrained: Pretrained, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all flags: the given ones over those of the run over those that the weights imply."""
    weights = {unwrap(name): value for name, value in pretrained.state.items()}
    source, saved = pretrained.path, dict(pretrained.saved.flags)
    implied = vars(finalize(pretrain_parser().parse_args([]))) | {"eval_data_path": None}
    if not is_pretraining(saved):
        parts = [
            part.strip(".") for part in DECODER if not any(n.startswith(part) for n in weights)
        ]
        if parts:
            raise UserError(
                f"{source} has no {', '.join(parts)}: without a decoder it reconstructs nothing. "
                "Give a run of main_pretrain.py, or pre-trained weights with their decoder"
            )
        implied |= describe_decoder(weights)
    typed = {"model": implied["model"], "stem_stride": 4, **saved, **given}
    implied["patch_size"] = implied_patch(typed["model"], typed["stem_stride"])
    fixed = {"grad_checkpointing": False, "picture_freq": 1, "input_sizes": ""}
    flags = {**implied, **saved, **given, **fixed}
    flags["input_size"] = height_and_width(flags["input_size"])
    for problem in shape_problems(argparse.Namespace(**flags)):
        raise UserError(problem)
    used = ("model",) if "images" in given else ("model", "data_set")
    for key in used:  # a file must not choose which code is imported
        if is_code(flags[key]) and key not in given:
            raise UserError(
                f"{source} names code, {flags[key]}; to run it give --{key} {flags[key]}"
            )
    return flags


def find_data(args: argparse.Namespace, typed: Mapping[str, Any]) -> Any:
    """Return the images of --images, or of the run's data set; typed: flags that were typed."""
    if "images" in typed:
        data = given_images(args, typed)
        datasets.check_columns(data, argparse.Namespace(given=typed, **typed))
        return data
    if downloads(args.data_set) and "data_path" not in typed:
        raise UserError(  # a file must not choose where others are written
            f"{args.checkpoint} downloads {args.data_set}; give the folder with --data_path"
        )
    for name in OF_TABLES:
        if name in typed and not may_be_table(args.data_set):
            raise UserError(f"--{name} is for tables, not for --data_set {args.data_set}; drop it")
    if args.data_index and args.data_set not in LISTED:
        raise UserError(f"--data_index needs image files, not --data_set {args.data_set}; drop it")
    if needs_path(args.data_set) and not args.data_path:
        raise UserError(f"{args.checkpoint} names no images; give --images")
    spec = datasets.build_spec(args, labeled=False)
    data = datasets.create_dataset(args.data_set, spec, train=args.split == "train")
    datasets.check_columns(data, argparse.Namespace(given=typed, **typed))
    return data


def with_labels(
    args: argparse.Namespace, typed: Mapping[str, Any], trained: TrainedModel
) -> MixedImages | None:
    """Return the images of --images if all have labels that the network knows, None otherwise."""
    try:
        data = given_images(args, typed, trained.kind)
    except UserError:  # they need none
        return None
    is_known = data.kind == trained.kind and {*data.classes} <= {*(trained.names or ())}
    return data if is_known and len(data) == len(given_images(args, typed)) else None


def given_images(
    args: argparse.Namespace, typed: Mapping[str, Any], kind: str | None = None
) -> MixedImages:
    """Return the images of --images: image files, and all that --data_path takes.

    kind: of their labels, None for images without.
    """
    image, split, root = map(typed.get, ("image_column", "split_column", "image_root"))
    columns, skips = Columns(image, split=split, root=root or ""), args.on_bad_image == "skip"
    labels = {"kind": kind, "labeled": True} if kind else {"labeled": False}
    spec = DatasetSpec(columns=columns, skip_missing=skips, shuffled=False, **labels)
    return Inputs(spec, train=args.split == "train").open(args.images)


def report(args: argparse.Namespace) -> None:
    """Write the report of one run, or of several side by side."""
    path = write_report(args.runs, args.output)
    print(f"{path}: {plural(len(args.runs), 'run')}, {format_bytes(path.stat().st_size)}")


def explain(args: argparse.Namespace) -> None:
    """Draw where a classifier looks, or where the reconstruction of a pre-trained model errs."""
    device = init_distributed_mode(args.device or "auto")
    flags = predict_flags.flags_of_evaluation(args, OF_EXPLAIN)
    weights = read_source(flags, args.checkpoint)
    is_masked = has_decoder(weights)
    for name in ("target", "layer") if is_masked else ("num_masks", "seed"):
        if getattr(args, name) is not None:
            kind = "classifiers" if is_masked else "pre-trained models with a decoder"
            raise UserError(f"--{name} is for {kind}, which {weights.path} is not; drop it")
    if is_masked:
        picture, what = explain_masked(args, weights, device)
    else:
        if not args.images:
            raise UserError("--images is missing; give images, or all that --data_path takes")
        trained = load_trained(flags, args.checkpoint, device)
        given = {name: vars(args)[name] for name in ("image_column", "split_column", "image_root")}
        reading = {"on_bad_image": args.on_bad_image or "error", "tta": None}
        data = with_labels(args, given, trained) or given_images(args, given)
        refuse_overwriting([Path(args.output)], data, args.checkpoint)
        loader = reading_loader(trained.flags.replace(**reading), data, device)
        picture, what = explain_classifier(
            trained, loader, args.num_images, args.target, args.layer or ""
        )
    save(picture, args.output)
    print(f"{args.output}: {what}")


def explain_masked(
    args: argparse.Namespace, weights: Pretrained, device: torch.device
) -> tuple[torch.Tensor, str]:
    """Draw the error maps of a pre-trained model."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    flags = argparse.Namespace(**find_flags(weights, given))
    data = find_data(flags, given)
    refuse_overwriting([Path(args.output)], data, args.checkpoint)
    loader = reading_loader(flags, data, device)
    model = build_fcmae(flags).to(device).eval()
    weights.load(model, new=())
    return explain_autoencoder(model, loader, args.num_images, flags.seed, args.num_masks or MASKS)


def reading_loader(args: argparse.Namespace, data: Any, device: torch.device) -> Any:
    """Return a loader that reads images as an evaluation does, in this process."""
    return datasets.build_reader(datasets.eval_dataset(data, args), args, device)


VIEWS = {"reconstructions": main, "data": draw_data, "stats": print_stats}
VIEWS |= {"runs": print_runs, "report": report, "explain": explain}

if __name__ == "__main__":
    launch(VIEWS[view], args)
