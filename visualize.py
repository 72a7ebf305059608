# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Draw the reconstructions of a pre-trained model.

python visualize.py --checkpoint runs/demo/pretrain/checkpoint-9.pth --output reconstructions.png
"""

import argparse
from pathlib import Path

from config.parser import visualize_parser

if __name__ == "__main__":  # parse the flags before torch is loaded, so that --help is fast
    args = visualize_parser().parse_args()

from torchvision.utils import save_image

import datasets
from config.flags import FOLDERS
from data_loading.folders import DatasetSpec
from errors import UserError
from models import build_fcmae
from parallel.process_group import init_distributed_mode, launch
from training.checkpoint import TrainState
from training.pictures import TITLES, ReconstructionImages
from weights.files import load_weights, read_checkpoint


def main(args: argparse.Namespace) -> None:
    """Draw with the model and the data of the run that wrote the checkpoint."""
    if not args.checkpoint:
        raise UserError("--checkpoint is missing; give a checkpoint or folder of main_pretrain.py")
    device = init_distributed_mode(args.device)
    checkpoint = read_checkpoint(args.checkpoint)
    run = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    if not isinstance(run, dict) or "mask_ratio" not in run:
        raise UserError(f"{args.checkpoint}: expected a checkpoint that main_pretrain.py wrote")
    given = {key: value for key, value in vars(args).items() if value is not None}
    for key in ("model", "data_set"):  # a file must not choose which code is imported
        name = run.get(key, "")
        if ":" in name and key not in given:
            raise UserError(f"{args.checkpoint} names code, {name}; to run it give --{key} {name}")
    data_set = given.get("data_set", run.get("data_set"))
    if data_set in datasets.DOWNLOADED and "data_path" not in given:  # nor where files are written
        raise UserError(f"{args.checkpoint} downloads {data_set}; give the folder with --data_path")
    if args.data_index and data_set not in FOLDERS:
        raise UserError(f"--data_index needs image folders, not --data_set {data_set}; drop it")
    new = {"eval_data_path": None, "on_bad_image": "error"}  # flags that old checkpoints lack
    fixed = {"grad_checkpointing": False, "picture_freq": 1}
    args = argparse.Namespace(**{**new, **run, **given, **fixed})
    model = build_fcmae(args).to(device)
    load_weights(model, checkpoint["model"], args.checkpoint)
    sources = {"eval_data_path": args.eval_data_path, "data_index": args.data_index}
    spec = DatasetSpec(args.data_path, input_size=args.input_size, **sources)
    data = datasets.create_dataset(args.data_set, spec, train=args.split == "train")
    drawing = ReconstructionImages(args, data, model, device, count=args.num_images)
    image = drawing.draw(model, TrainState(args.epochs))
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        save_image(image, args.output)
    except OSError as error:
        raise UserError(f"cannot write --output {args.output}: {error.strerror}") from error
    columns = ", ".join(title.replace("\n", " ") for title in TITLES)
    print(f"{args.output}: {len(drawing.images)} rows of {columns}")


if __name__ == "__main__":
    launch(main, args)
