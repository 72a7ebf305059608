# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Look at what a pre-trained model imagines behind the mask.

python visualize.py --checkpoint runs/demo/pretrain/checkpoint-9.pth --output imagined.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from config import parser as options
from data_loading import folders
from parallel import process_group
from training.pictures import COLUMNS, build_panel, grid, reconstructions, write_png

if __name__ == "__main__":  # --help and typing errors answer before torch is loaded
    args = options.visualize_parser().parse_args()


import datasets
from config.flags import FOLDERS
from errors import UserError
from models import build_fcmae
from weights.files import load_weights, read_checkpoint


def main(args: argparse.Namespace) -> None:
    """Rebuild the model and data that a pre-training checkpoint was made with, and draw."""
    device = process_group.init_distributed_mode(args.device)
    checkpoint = read_checkpoint(args.checkpoint)
    run = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    if not isinstance(run, dict) or "mask_ratio" not in run:
        raise UserError(f"{args.checkpoint}: expected a checkpoint that main_pretrain.py wrote")
    given = {key: value for key, value in vars(args).items() if value is not None}
    for key in ("model", "data_set"):  # a file must not choose what code is imported
        named = checkpoint["args"].get(key, "")
        if ":" in named and key not in given:
            raise UserError(
                f"{args.checkpoint} names code, {named}; to run it give --{key} {named}"
            )
    named = given.get("data_set", checkpoint["args"].get("data_set"))
    if named in datasets.DOWNLOADED and "data_path" not in given:  # nor where files are written
        raise UserError(f"{args.checkpoint} asks for {named}; say where: --data_path")
    if args.data_index and named not in FOLDERS:
        raise UserError(f"--data_index lists images in folders, {named} has none; drop it")
    ours = {"grad_checkpointing": False}  # nothing is trained
    trained = argparse.Namespace(**{"eval_data_path": None} | checkpoint["args"] | given | ours)
    model = build_fcmae(trained)
    load_weights(model, checkpoint["model"], args.checkpoint)
    about = {"input_size": trained.input_size, "data_index": args.data_index}
    spec = folders.DatasetSpec(trained.data_path, trained.eval_data_path, **about)
    data = datasets.create_dataset(trained.data_set, spec, train=args.split == "train")
    images, mask = build_panel(data, model.to(device), trained, device, args.num_images)
    mean, std = datasets.build_mean_and_std(trained)
    write_png(grid(reconstructions(model, images, mask, mean, std)), Path(args.output))
    print(f"{args.output}: {len(images)} rows of {', '.join(COLUMNS)}")


if __name__ == "__main__":
    process_group.launch(main, args)
