# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pictures of `visualize.py explain`: each image, and where the network looks or errs.

python visualize.py explain runs/finetune --images photos --target cat
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_loading.labels import class_names
from data_loading.loader import DeviceLoader
from data_loading.split import list_values
from errors import UserError, did_you_mean, first_few
from insight.attribution import enlarge, error_map, find_map, grad_cam
from insight.drawing import draw_images
from insight.predictions import (
    best_classes,
    cell,
    in_units,
    name_of,
    number,
    probabilities,
    read_target,
)
from models.fcmae import FCMAE
from training.pictures import to_show
from training.trained_model import TrainedModel

AT_ONCE = 16  # images
STRENGTH = 0.5  # of the colors over the image


def heat_colors(heat: Tensor) -> Tensor:
    """(N, H, W) in 0 to 1 -> (N, 3, H, W) colors from blue over green to red."""
    centers = heat.new_tensor([3.0, 2.0, 1.0]).view(3, 1, 1)
    return (1.5 - (4 * heat[:, None] - centers).abs()).clamp(0, 1)


def overlay(images: Tensor, heat: Tensor) -> Tensor:
    """(N, 3, H, W) and heat (N, H, W), both in 0 to 1 -> images under the colors of the heat."""
    gray = images.mean(1, keepdim=True)
    return (1 - STRENGTH) * gray + STRENGTH * heat_colors(heat)


def find_target(text: str | None, trained: TrainedModel) -> int | None:
    """Return the output that --target names, a class or its number; None for the predicted one."""
    names, count = trained.names, trained.head.count
    if text is None:
        return 0 if trained.kind == "number" else None
    if names and text in names:
        return list(names).index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    hint = did_you_mean(text, names or ()) or f"Known: {first_few(names or range(count), 10)}"
    raise UserError(f"--target {text}: {trained.weights.path} has no such class. {hint}")


def read_images(loader: DeviceLoader, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return `count` images spread over the data, (N, C, H, W), their ids and their paths."""
    dataset = loader.loader.dataset
    count = min(count, len(dataset))
    images, _, ids = loader.reload(0, torch.arange(count) * len(dataset) // count)
    if not len(images):
        raise UserError("none of the images can be read; give others with --images")
    return images, ids, [dataset.path_of(n) for n in ids.tolist()]


def true_texts(data: Any, ids: Tensor) -> list[str]:
    """Return `true: cat` for each image of a data set by its label, '' if it lists no labels."""
    if (targets := list_values(data, "targets")) is None:
        return [""] * len(ids)
    kind, names = getattr(data, "kind", None) or "class", class_names(data)
    rows = [np.atleast_1d(targets[number]).tolist() for number in ids.tolist()]
    return [f"true: {cell(read_target(row, kind, names)) or '-'}" for row in rows]


def explain_classifier(
    trained: TrainedModel, loader: DeviceLoader, count: int, target: str | None, layer: str
) -> tuple[Tensor, str]:
    """Draw images with their Grad-CAM: (3, height, width) in 0 to 1, and what was drawn.

    target: class to explain, None for the predicted one. layer: module that gives the map.
    """
    index = find_target(target, trained)
    images, ids, paths = read_images(loader, count)
    layer, last = find_map(trained.network, tuple(images.shape[1:]), layer)
    maps, outputs = [], []
    for part in images.split(AT_ONCE):
        targets = None if index is None else torch.full((len(part),), index, device=part.device)
        found = grad_cam(trained.network, part, layer, last, targets)
        maps.append(enlarge(found[0], part.shape[-2:]))
        outputs.append(found[1])
    pictures = to_show(images, loader.mean, loader.std)
    seen = overlay(pictures, torch.cat(maps))
    texts = describe(torch.cat(outputs), trained, index)
    known = true_texts(loader.loader.dataset.dataset, ids)
    score = "predicted number" if trained.kind == "number" else "score of the class"
    title = f"Grad-CAM of {layer}: red raises the {score}; each map has its own scale"
    picture = draw_pairs((pictures, known), (seen, texts), paths, title)
    return picture, f"Grad-CAM of {layer}"


def describe(outputs: Tensor, trained: TrainedModel, index: int | None) -> list[str]:
    """Return a title for each image: the explained class and its probability, or the number."""
    if trained.kind == "number":
        values = in_units(outputs, trained.head.scale)[:, index]
        return [f"{name_of(index, trained.names)} {number(x)}" for x in values.tolist()]
    best, _ = best_classes(outputs, trained.activation)
    chosen = best.clamp(min=0) if index is None else torch.full_like(best, index)  # (N, 1)
    found = probabilities(outputs, trained.activation).gather(1, chosen)
    pairs = zip(chosen[:, 0].tolist(), found[:, 0].tolist(), strict=True)
    return [f"{name_of(label, trained.names)} {chance:.2f}" for label, chance in pairs]


def explain_autoencoder(
    model: FCMAE, loader: DeviceLoader, count: int, seed: int, masks: int
) -> tuple[Tensor, str]:
    """Draw images with their error maps: (3, height, width) in 0 to 1, and what was drawn."""
    images, ids, paths = read_images(loader, count)
    parts = zip(images.split(AT_ONCE), ids.split(AT_ONCE), strict=True)
    errors = torch.cat([error_map(model, part, own, seed, masks) for part, own in parts])
    h, w = model.grid_size(*images.shape[-2:])
    patches = errors.unflatten(2, (w, -1)).unflatten(1, (h, -1)).mean((2, 4))  # (N, h, w)
    pictures, side = to_show(images, loader.mean, loader.std), model.patch_size
    heat = patches / patches.amax((1, 2), keepdim=True)
    heat = heat.repeat_interleave(side, 1).repeat_interleave(side, 2)
    means = [f"mean error {x:.3g}" for x in errors.mean((1, 2)).tolist()]
    title = f"Error of each patch while it is hidden, mean of {masks} masks; red: the largest"
    left, right = (pictures, [""] * len(paths)), (overlay(pictures, heat), means)
    return draw_pairs(left, right, paths, title), f"error maps over {masks} masks"


def draw_pairs(
    left: tuple[Tensor, Sequence[str]],
    right: tuple[Tensor, Sequence[str]],
    paths: Sequence[str],
    title: str,
) -> Tensor:
    """Draw images with their maps to the right, two pairs a row: (3, height, width) in 0 to 1.

    left, right: (N, 3, H, W) in 0 to 1, and N texts. paths: of the images.
    """
    images, texts = (
        [each for pair in zip(*both, strict=True) for each in pair]
        for both in zip(left, right, strict=True)
    )
    return draw_images(images, texts, [name for path in paths for name in (path, "")], 4, title)
