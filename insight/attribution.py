# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Where a network looks: Grad-CAM of a classifier, error maps of a masked autoencoder.

python visualize.py explain runs/finetune --images photos
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_loading.rng import mask_noise
from errors import UserError, first_few, resolve
from models.attach import is_channels_last, trace
from models.fcmae import FCMAE, visible_patches
from models.parts import find_classifier


def find_map(network: nn.Module, size: tuple[int, int, int], name: str = "") -> tuple[str, bool]:
    """Return the module that gives the last feature map, and True if the map is (N, h, w, C).

    It is the last that is called with an output of four dimensions and more than one cell, outside
    of the classifier. size: channels, height and width of the images. name: of a module to take
    instead. UserError for networks of tokens, which have no such map after their stem.
    """
    shapes, _ = trace(network, size)
    if name:
        resolve(name, dict.fromkeys(shapes), "module", importable=False)
        if not is_map(shapes[name]):
            raise UserError(f"--layer {name} gives {shapes[name]}, expected a map (N, C, h, w)")
        return name, is_channels_last(network, name, shapes[name], size)
    heads = find_classifier(network)
    called = {path: x for path, x in shapes.items() if not f"{path}.".startswith(heads or ("/",))}
    spatial = [path for path, shape in called.items() if is_map(shape) or is_tokens(shape)]
    found = spatial[-1] if spatial else ""
    if not found or not is_map(called[found]):
        maps = [path for path in spatial if is_map(called[path])]
        known = first_few(maps[-5:], 5) or "no module here"
        raise UserError(
            f"{type(network).__name__} ends in tokens or features, not in a map (N, C, h, w), "
            f"which Grad-CAM needs; give --layer NAME, of {known}"
        )
    return found, is_channels_last(network, found, called[found], size)


def is_map(shape: Any) -> bool:
    """Return True for the shape of a map with more than one cell in either layout."""
    return shape is not None and len(shape) == 4 and shape[2] > 1 and max(shape[1], shape[3]) > 1


def is_tokens(shape: Any) -> bool:
    """Return True for the shape of tokens (N, L, C)."""
    return shape is not None and len(shape) == 3 and shape[1] > 1


def grad_cam(
    network: nn.Module, images: Tensor, layer: str, last: bool, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return maps (N, h, w) of at least 0, and the outputs (N, K), of a network in eval mode.

    A map is relu(sum over channels of a * A), where A is the output of `layer` and a the mean over
    positions of the gradient of the target's output (arXiv 1610.02391, equations 1 and 2). last: A
    is (N, h, w, C). targets: outputs to explain, (N,); None: the largest of each image.
    """
    kept: dict[str, Tensor] = {}
    handle = network.get_submodule(layer).register_forward_hook(partial(_cut, kept))
    try:
        with torch.enable_grad():
            outputs = network(images)
    finally:
        handle.remove()
    chosen = outputs.argmax(1) if targets is None else targets
    total = outputs.gather(1, chosen[:, None]).sum()
    (gradient,) = torch.autograd.grad(total, kept["map"])
    feature = kept["map"].detach()
    if last:
        feature, gradient = feature.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * feature).sum(1).relu(), outputs.detach()


def _cut(kept: dict[str, Tensor], module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Make the output a leaf, so that nothing before it is differentiated.

    What follows gets a copy, since it may work in place.
    """
    kept["map"] = output.detach().requires_grad_()
    return kept["map"].clone()


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w) of at least 0 -> (N, *size) in 0 to 1, each divided by its largest value."""
    maps = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest, 0.0)


def covering_masks(noise: Tensor, visible: int, count: int) -> Tensor:
    """(N, L) noise -> `count` masks (count, N, L), 1 = removed, that remove each patch.

    Each mask leaves `visible` patches. In the order of the noise, mask m removes those from m L /
    count on, so that all patches are removed equally often, up to 1. UserError if `count` is too
    small for that.
    """
    length = noise.shape[1]
    removed = length - visible
    if (needed := -(-length // removed)) > count:
        raise UserError(
            f"--num_masks {count}: {removed} of {length} patches are hidden at a time, so {needed} "
            f"masks are needed to hide each; give --num_masks {needed}"
        )
    rank = noise.argsort(1).argsort(1)  # (N, L), place of each patch
    starts = torch.arange(count, device=noise.device) * length // count
    return ((rank - starts[:, None, None]) % length < removed).float()


@torch.no_grad()
def error_map(model: FCMAE, images: Tensor, ids: Tensor, seed: int, count: int) -> Tensor:
    """(N, C, H, W) normalized -> (N, H, W) mean error of each pixel over the masks that hide it.

    The error is that of --recon_loss on the target of the training, so with --norm_pix_loss in
    units of the standard deviation of a patch. Masks depend on seed and ids (N,) alone.
    """
    h, w = model.grid_size(*images.shape[-2:])
    noise = mask_noise(seed, 0, ids, h * w)
    masks = covering_masks(noise, visible := visible_patches(h * w, model.mask_ratio), count)
    total, times = 0.0, masks.sum(0)  # (N, L)
    for mask in masks:
        _, prediction, _ = model(images, mask, visible)
        errors = model.pixel_errors(images, prediction)  # (N, L, p*p*C)
        total = total + errors * mask[..., None]
    mean = total / times[..., None]
    return model.unpatchify(mean, (h, w)).mean(1)
