# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Features of a frozen network for every image of a loader, on all ranks of a process group.

python -c "from insight.features import extract; help(extract)"
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.convnextv2 import ConvNeXtV2
from models.parts import evaluating
from parallel import sharding
from parallel.process_group import all_gather, gather_rows, is_main_process


class Features(NamedTuple):
    """Pooled features of images in the order of the data set, each image once."""

    ids: Tensor  # (N,) int64, numbers of the images in the data set, rising
    features: Tensor  # (N, D) float32
    labels: Tensor  # (N,) int64, or (N, K) float32


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the encoder of a masked autoencoder, or the network itself.

    UserError for a network without `forward_features`, which says what its features are.
    """
    encoder = getattr(model, "encoder", model) if hasattr(model, "mask_ratio") else model
    if not hasattr(encoder, "forward_features"):
        raise UserError(
            f"{type(encoder).__name__} has no forward_features(images), so its features are not "
            "known; add it, as docs/forking.md describes"
        )
    return encoder


def as_input(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return images in the data type of the encoder's weights."""
    return images.to(next(encoder.parameters()).dtype)


def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """(N, C, H, W) whole images -> (N, D) float32: what the classifier of fine-tuning gets.

    That is the normalized mean of the last map. Pre-training has no final norm: the norm of a new
    classifier takes its place, so that features are those of the first step of fine-tuning. The
    layers of a network's own head before its last one are part of it.
    """
    encoder = encoder_of(model)
    maps = encoder.forward_features(as_input(encoder, images))
    if isinstance(encoder, ConvNeXtV2):
        pooled = encoder.norm(maps.float().mean((-2, -1)))
        bare = isinstance(encoder.norm, nn.Identity)
        return F.layer_norm(pooled, pooled.shape[1:], eps=1e-6) if bare else pooled.float()
    if hasattr(encoder, "forward_head"):
        return encoder.forward_head(maps, pre_logits=True).flatten(1).float()
    return maps.float().mean((-2, -1))


@torch.no_grad()
def extract(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    pool: Callable[[nn.Module, Tensor], Tensor] = pooled_features,
) -> Features | None:
    """Return the features of all ranks' images on rank 0, on `device`; None on other ranks.

    Those of MPS are on the CPU, since it has no float64 and no eigenvalues.

    Every rank must call it with batches of its own (images, labels, ids) on `device`, as of
    `DeviceLoader`; a rank may have fewer than others, or none. An image that several have counts
    once. model: not wrapped; it runs in eval mode, which is undone. dtype: of autocast, None for
    float32. pool: (model, images) -> (N, D). UserError if there is no image at all.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    device = torch.device(device)
    with sharding.unsharded(model) as network, evaluating(network):
        for images, labels, ids in batches:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                parts.append((ids, pool(network, images), labels))
    return _gather(parts, device)


def _gather(parts: list[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> Features | None:
    """Join the parts of all ranks on rank 0, in the order of the ids."""
    shapes = [(part.dtype, part.shape[1:]) for part in parts[0]] if parts else None
    shapes = next(filter(None, all_gather(shapes)), None)  # of a rank that has images
    if shapes is None:
        raise UserError("there is no image to take features of; check the data")
    joined = []
    for column, (dtype, shape) in enumerate(shapes):
        empty = torch.empty(0, *shape, dtype=dtype, device=device)
        own = torch.cat([empty, *(part[column] for part in parts)])
        joined.append(gather_rows(own[:, None] if own.ndim == 1 else own))
    if not is_main_process():
        return None
    ids, order = joined[0][:, 0].sort(stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    features, labels = (rows[order][first] for rows in joined[1:])
    if device.type == "mps":
        ids, first, features, labels = (x.cpu() for x in (ids, first, features, labels))
    return Features(ids[first], features, labels if shapes[2][1] else labels[:, 0])
