# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Reconstruction images: input, mask and prediction side by side.

python visualize.py --checkpoint runs/demo/pretrain --output reconstructions.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import datasets
from data_loading.rng import mask_noise
from data_loading.workers import WatchedLoader
from errors import UserError
from models.fcmae import FCMAE, random_mask, visible_patches

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
    whole = datasets.TransformedDataset(data, transform, 0, args.in_chans, on_bad=on_bad)
    count = min(count, len(data))
    picked = [i * len(data) // count for i in range(count)]
    loader = WatchedLoader(whole, [(0, i) for i in picked], count)
    mean, std = datasets.mean_and_std(args.in_chans, args.imagenet_default_mean_and_std)
    batches = datasets.DeviceLoader(loader, device, mean, std)
    images, _, ids = next(iter(batches))
    h, w = model.grid_size(*images.shape[-2:])
    noise = mask_noise(args.seed, 0, ids, h * w)
    return images, random_mask(noise, visible_patches(h * w, model.mask_ratio))
