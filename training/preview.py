# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A picture of the images that a training script sees: a row per image, a column per epoch.

python visualize.py data --data_path photos --mixup 0.8 --output seen.png
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import datasets
from config.flags import is_pretraining
from config.sizes import describe_sizes
from data_loading.dataset import TransformedDataset
from data_loading.labels import describe_label
from data_loading.loader import DeviceLoader
from data_loading.mixing import build_mixup
from data_loading.rng import mask_noise, seed_all
from errors import UserError, plural
from models import build_fcmae
from models.fcmae import random_mask, visible_patches
from optim_factory import choose_update_freq
from training.pictures import GRAY, INK, MIN_WIDTH, to_show
from training.steps import build_steps

SHARE = 0.005  # of a class in a mixed label, below which it is not named


@dataclass
class Preview:
    """Rows of images as the network gets them, in 0 to 1, None where an epoch lacks one.

    dataset: of the images. names: of the rows. images: of each row, (C, H, W) in each epoch. texts:
    below them.
    """

    dataset: TransformedDataset
    names: list[str]
    caption: str
    images: list[list[Tensor | None]] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)


def build_preview(args: Any, count: int, epochs: int) -> Preview:
    """Load some training images as main_pretrain.py or main_finetune.py would in some epochs.

    With mixup or cutmix they are the first of epoch 1, mixed with the others of their batches as in
    a run of one process.
    """
    mixup = None
    if is_pretraining(vars(args)):
        dataset = datasets.build_pretrain_dataset(args)
    else:
        dataset, nb_classes = datasets.build_dataset(True, args)
        mixup = build_mixup(args, nb_classes, dataset.kind)
    count, caption = min(count, len(dataset)), f"{describe_sizes(args)}, --seed {args.seed}"
    if mixup is not None:
        cells = _mixed(dataset, mixup, args, count, epochs)
        caption += "; mixed, with the shares of the classes"
    else:
        ids = torch.arange(count) * len(dataset) // count
        cells = _plain(dataset, args, ids, epochs)
    if is_pretraining(vars(args)):
        caption += f"; gray patches are hidden, --mask_ratio {args.mask_ratio:g}"
    columns = list(cells)
    rows = sorted(columns[0]) if mixup is None else list(columns[0])
    preview = Preview(dataset, [name_row(dataset, row) for row in rows], caption)
    missing = None, "not in this epoch"
    for row in rows:
        found = [column.get(row, missing) for column in columns]
        preview.images.append([image for image, _ in found])
        preview.texts.append([text for _, text in found])
    return preview


def name_row(dataset: TransformedDataset, index: int) -> str:
    """Return the last three parts of the path of an image, or `image number 7`."""
    path = dataset.path_of(index)
    return dataset.name_of(index) if path == f"number {index}" else "/".join(path.split("/")[-3:])


Cells = dict[int, tuple[Tensor, str]]  # number of an image -> what is seen of it, and its text


def _plain(dataset: TransformedDataset, args: Any, ids: Tensor, epochs: int) -> Iterator[Cells]:
    """Yield the images of each epoch, without patches that pre-training hides."""
    mean, std = datasets.build_mean_and_std(args)
    loader = datasets.build_reader(dataset, args, "cpu")
    patch = find_patch(args) if is_pretraining(vars(args)) else 0
    for epoch in range(epochs):
        images, labels, found = loader.reload(epoch, ids)
        shown = to_show(images, mean, std)
        if patch:
            shown = hide(shown, mask_of(args, patch, epoch, found, images.shape[-2:]))
            texts = [""] * len(found)
        else:
            texts = [describe_label(dataset, label) for label in labels]
        yield dict(zip(found.tolist(), zip(shown, texts, strict=True), strict=True))


def find_patch(args: Any) -> int:
    """Return the side of a mask patch; of other networks than ConvNeXt their own."""
    return args.patch_size or build_fcmae(args).patch_size


def mask_of(args: Any, patch: int, epoch: int, ids: Tensor, size: Sequence[int]) -> Tensor:
    """Return the masks (N, h, w) of pre-training, True for patches that are hidden."""
    h, w = size[0] // patch, size[1] // patch
    noise = mask_noise(args.seed, epoch, ids, h * w)
    return random_mask(noise, visible_patches(h * w, args.mask_ratio)).view(-1, h, w) > 0


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """(N, C, H, W) with gray where the mask (N, h, w) is True."""
    times = images.shape[2] // mask.shape[1], images.shape[3] // mask.shape[2]
    mask = mask.repeat_interleave(times[0], 1).repeat_interleave(times[1], 2)
    return torch.where(mask[:, None], GRAY, images)


def _mixed(
    dataset: TransformedDataset, mixup: Any, args: Any, count: int, epochs: int
) -> Iterator[Cells]:
    """Yield the first images of the first epoch, mixed as in each epoch."""
    mean, std = datasets.build_mean_and_std(args)
    loader = datasets.build_loader(dataset, True, args, "cpu")
    given = args.update_freq, args.effective_batch
    update_freq = choose_update_freq(*given, args.batch_size, 1)
    steps = build_steps(args, loader, update_freq)
    wanted: list[int] = []
    for epoch in range(epochs):
        found: Cells = {}
        for number, ids in enumerate(_batches(loader, epoch)):
            numbers = [index % len(dataset) for index in ids]
            wanted = wanted or list(dict.fromkeys(numbers))[:count]
            if not set(wanted) & set(numbers):
                continue
            images, labels, _ = loader.reload(epoch, torch.tensor(ids))
            step = steps.before(epoch) + number // update_freq
            seed_all(args.seed, step, number % update_freq, 0)  # as engine_finetune.py
            images, labels = mixup(images, labels, epoch)
            shown = to_show(images, mean, std)
            for place, index in enumerate(numbers):
                if index in wanted and index not in found:
                    text = describe_mixture(dataset, labels[place], args.smoothing)
                    found[index] = shown[place], text
            if len(found) == len(wanted):
                break
        yield {index: found[index] for index in wanted if index in found}


def _batches(loader: DeviceLoader, epoch: int) -> Iterator[list[int]]:
    """Yield the numbers of the images of each full batch of an epoch."""
    loader.set_epoch(epoch)
    keys, size = iter(loader.loader.sampler), loader.loader.batch_sizes.at(epoch)
    while len(batch := [index for _, index in islice(keys, size)]):
        if len(batch) == size:
            yield batch


def describe_mixture(dataset: TransformedDataset, label: Tensor, smoothing: float) -> str:
    """Return lines of the classes of a mixed label (K,) and their shares without smoothing."""
    if dataset.kind == "class":
        label = (label - smoothing / len(label)) / (1 - smoothing)
    shares = sorted(((share, place) for place, share in enumerate(label.tolist())), reverse=True)
    names = dataset.classes or [f"class {place}" for place in range(len(label))]
    return "\n".join(f"{names[place]} {share:.2f}" for share, place in shares if share > SHARE)


def draw_preview(preview: Preview) -> Image.Image:
    """Draw all rows with their names, the texts below the images, and the number of each epoch."""
    shapes = [image.shape[1:] for row in preview.images for image in row if image is not None]
    if not shapes:
        raise UserError("no image to draw; give another --seed, or --num_epochs 1")
    largest = max(shapes, key=math.prod)  # sizes may differ by epoch
    height, width = (side * -(-MIN_WIDTH // largest[1]) for side in largest)
    size = max(12, min(width, 2 * MIN_WIDTH) // 10)  # of the font
    line, gap = round(1.6 * size), size // 2
    below = max(len(text.splitlines()) for row in preview.texts for text in row)
    row_height = line + height + line * below + gap
    columns = len(preview.images[0])
    whole, font = gap + columns * (width + gap), ImageFont.load_default(size)
    letters = int((whole - 2 * gap) / font.getlength("abcdefghij") * 10)
    caption = textwrap.wrap(preview.caption, letters)
    bottom = line + gap + len(preview.images) * row_height
    canvas = Image.new("RGB", (whole, bottom + line * len(caption)), "white")
    draw = ImageDraw.Draw(canvas)

    def write(text: str, x: int, y: int, room: int, anchor: str = "lt") -> None:
        while draw.textlength(text, font) > room and len(text) > 4:
            text = f"{text.rstrip('…')[:-1]}…"
        draw.text((x, y), text, INK, font, anchor)

    for column in range(columns):
        middle = gap + column * (width + gap) + width // 2
        write(f"epoch {column + 1}", middle, gap, width, "mt")
    for number, images in enumerate(preview.images):
        top = line + gap + number * row_height
        write(preview.names[number], gap, top, whole - 2 * gap)
        for column, image in enumerate(images):
            left = gap + column * (width + gap)
            if image is not None:
                cell = to_pil_image(image).resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(cell, (left, top + line - gap // 2))
            for place, text in enumerate(preview.texts[number][column].splitlines()):
                write(text, left, top + line * (place + 1) + height, width)
    for number, text in enumerate(caption):
        write(text, gap, bottom + line * number, whole - 2 * gap)
    return canvas


def describe(preview: Preview) -> str:
    """Return `4 images in 4 epochs`."""
    columns = len(preview.images[0])
    return f"{plural(len(preview.images), 'image')} in {plural(columns, 'epoch')}"
