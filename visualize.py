# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Look at what a pre-trained model imagines behind the mask.

python visualize.py --checkpoint runs/demo/pretrain/checkpoint-9.pth --output imagined.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import parser as options

if __name__ == "__main__":  # --help and typing errors answer before torch is loaded
    args = options.visualize_parser().parse_args()

import torch
from torch import Tensor

import datasets
import utils
from config.flags import FOLDERS
from data_loading.rng import hash_noise
from errors import UserError
from models import build_fcmae
from models.fcmae import FCMAE, random_mask, visible_patches
from weights.files import load_weights, read_checkpoint

GREY = 0.5  # shown where a patch is removed
GAP = 2  # white pixels between pictures
COLUMNS = ("image", "masked", "prediction", "prediction, visible pixels pasted in")


@torch.no_grad()
def reconstructions(
    model: FCMAE, images: Tensor, mask: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Input, masked, prediction, pasted: (N, C, H, W) normalised -> (N, 4, C, H, W) in 0 to 1.

    A model with a per-patch normalised target predicts patches without their mean and variance;
    they are put back from the image itself, since nothing else knows them. mask: 1 = removed.
    """
    was_training = model.training
    model.eval()
    pred = model(images, mask, int((mask[0] == 0).sum()))[1]
    model.train(was_training)
    patches = model.patchify(images)  # (N, L, p*p*C)
    imagined = pred.flatten(2).transpose(1, 2).to(patches.dtype)
    if model.norm_pix_loss:
        spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        imagined = imagined * spread + patches.mean(-1, keepdim=True)
    removed = mask[..., None] > 0
    size = model.grid_size(*images.shape[-2:])
    views = [patches, patches, imagined, torch.where(removed, imagined, patches)]
    pictures = torch.stack([model.unpatchify(view, size) for view in views], dim=1)
    mean, std = (pictures.new_tensor(values).view(1, 1, -1, 1, 1) for values in (mean, std))
    pictures = pictures * std + mean
    hidden = model.unpatchify(removed.to(patches.dtype).expand_as(patches), size) > 0
    pictures[:, 1] = torch.where(hidden, GREY, pictures[:, 1])
    return pictures.clamp(0, 1)


def grid(pictures: Tensor) -> Tensor:
    """(N, 4, C, H, W) in 0 to 1 -> one RGB picture (3, N*(H+gap), 4*(W+gap)), a row an image."""
    from torchvision.utils import make_grid

    n, columns, chans, height, width = pictures.shape
    rgb = pictures if chans == 3 else pictures.mean(2, keepdim=True).expand(-1, -1, 3, -1, -1)
    scale = max(1, 96 // height)  # small images would be stamps on a screen
    flat = rgb.reshape(n * columns, 3, height, width)
    flat = flat.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(flat, nrow=columns, padding=GAP * scale, pad_value=1.0).cpu()


def png(picture: Tensor) -> bytes:
    """A picture (3, H, W) in 0 to 1 as a PNG file."""
    from torchvision.io import encode_png

    return bytes(encode_png((picture * 255).round().to(torch.uint8)).numpy())


def write_png(picture: Tensor, path: Path) -> None:
    """A picture (3, H, W) in 0 to 1 to a PNG file, whose folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error


def build_panel(
    data: Any, model: FCMAE, args: Any, device: torch.device, count: int = 8
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W), evenly spread over `data`, whole and normalised, and masks (N, L).

    A mask depends on the sample alone, so pictures of different epochs compare.
    """
    transform = datasets.build_transform(False, args)
    skip = vars(args).get("on_bad_image") == "skip"  # which an old checkpoint does not say
    on_bad = "replace" if skip else "error"
    whole = datasets.Augmented(data, transform, 0, args.in_chans, on_bad=on_bad)
    count = min(count, len(data))
    picked = [i * len(data) // count for i in range(count)]
    loader = datasets.create_loader(whole, [(0, i) for i in picked], count)
    batches = datasets.Batches(loader, device, *datasets.build_mean_and_std(args))
    images, _, ids = next(iter(batches))
    h, w = model.grid_size(*images.shape[-2:])
    noise = hash_noise(args.seed, 0, ids, h * w)
    return images, random_mask(noise, visible_patches(h * w, model.mask_ratio))


def main(args: argparse.Namespace) -> None:
    """Rebuild the model and data that a pre-training checkpoint was made with, and draw."""
    device = utils.init_distributed_mode(args.device)
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
    spec = datasets.DataSpec(trained.data_path, trained.eval_data_path, **about)
    data = datasets.create_dataset(trained.data_set, spec, train=args.split == "train")
    images, mask = build_panel(data, model.to(device), trained, device, args.num_images)
    mean, std = datasets.build_mean_and_std(trained)
    write_png(grid(reconstructions(model, images, mask, mean, std)), Path(args.output))
    print(f"{args.output}: {len(images)} rows of {', '.join(COLUMNS)}")


if __name__ == "__main__":
    utils.launch(main, args)
