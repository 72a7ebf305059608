# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Draw the reconstructions of a pre-trained model.

python visualize.py --checkpoint runs/demo/pretrain/checkpoint-9.pth --output reconstructions.png
"""

import argparse
import os
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from config.checks import shape_problems
from config.parser import finalize, pretrain_parser, visualize_parser

if __name__ == "__main__":  # parse the flags before torch is loaded, so that --help is fast
    args = visualize_parser().parse_args()

from torchvision.utils import save_image

import datasets
from config.flags import (
    LISTED,
    downloads,
    implied_patch,
    is_code,
    is_pretraining,
    needs_path,
)
from data_loading.files import Names
from data_loading.folders import FolderFiles, list_folder
from data_loading.images import Images
from data_loading.index import Listing
from data_loading.sources import DatasetSpec
from data_loading.transforms import height_and_width
from errors import UserError, plural
from models import build_fcmae
from parallel.process_group import init_distributed_mode, launch
from training.checkpoint import TrainState
from training.pictures import TITLES, ReconstructionImages
from weights.convert import DECODER, describe_decoder, unwrap
from weights.pretrained import Pretrained, read_pretrained


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
    model = build_fcmae(args).to(device)
    weights.load(model, new=())
    name = "/".join(Path(weights.path).parts[-2:])
    drawing = ReconstructionImages(args, data, device, count=args.num_images, name=name)
    image = drawing.draw(model, TrainState(args.epochs))
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        save_image(image, args.output)
    except OSError as error:
        raise UserError(f"cannot write --output {args.output}: {error.strerror}") from error
    columns = ", ".join(title.replace("\n", " ") for title in TITLES)
    print(f"{args.output}: {plural(len(drawing.images), 'row')} of {columns}")


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


def find_data(args: argparse.Namespace, typed: Collection[str]) -> Any:
    """Return the images of --images, or of the run's data set; typed: names of typed flags."""
    if "images" in typed:
        return image_files(args.images)
    if downloads(args.data_set) and "data_path" not in typed:
        raise UserError(  # a file must not choose where others are written
            f"{args.checkpoint} downloads {args.data_set}; give the folder with --data_path"
        )
    if args.data_index and args.data_set not in LISTED:
        raise UserError(f"--data_index needs image files, not --data_set {args.data_set}; drop it")
    if needs_path(args.data_set) and not args.data_path:
        raise UserError(f"{args.checkpoint} names no images; give --images with files or folders")
    spec = DatasetSpec(
        args.data_path,
        args.eval_data_path,
        args.input_size,
        data_index=args.data_index,
        columns=datasets.build_columns(args),
        labeled=False,
    )
    return datasets.create_dataset(args.data_set, spec, train=args.split == "train")


def image_files(paths: Iterable[str]) -> Images:
    """Return image files, and all images below folders, as a data set."""
    found: list[str] = []
    for path in map(os.path.expanduser, paths):
        if os.path.isdir(path):
            found += (os.path.join(path, name) for name in list_folder(path, labeled=False).names)
        elif os.path.exists(path):
            found.append(path)
        else:
            raise UserError(f"--images {path}: no such file or folder")
    names = Names.pack(map(os.fsencode, found))
    return Images(partial(FolderFiles, ""), Listing(names, {}, {}), "--images")


if __name__ == "__main__":
    launch(main, args)
