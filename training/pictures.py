# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Reconstruction images: input, masked input, baseline and prediction, a row per input.

python visualize.py --checkpoint runs/demo/pretrain --output reconstructions.png
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid

import datasets
from data_loading.rng import mask_noise
from models.fcmae import FCMAE, random_mask, visible_patches
from parallel import sharding
from parallel.process_group import is_main_process
from training.checkpoint import TrainState
from training.stepper import autocast

GRAY = 0.5  # shown where a column has no pixels
TITLES = (
    "input",
    "seen by\nthe network",
    "baseline:\npatch means",
    "reconstruction",
    "reconstruction\n+ visible",
)
CAPTION = "{}\nmasked loss {:.4f}; of the baseline, each hidden patch's own mean: {:.4f}"
MIN_WIDTH = 128  # pixels of a column, so that its title fits; smaller images are enlarged
INK = "#303030"  # color of the titles


class ReconstructionImages:
    """Reconstructions of the same images behind the same masks, every `--picture_freq` epochs.

    It picks `count` images evenly from `data`. A mask depends only on the seed and the sample, so
    images of different epochs can be compared.
    """

    def __init__(
        self,
        args: Any,
        data: Any,
        device: torch.device,
        amp: str = "none",
        count: int = 8,
        name: str = "",
    ) -> None:
        """name: of what is drawn, for the caption; default: the epoch."""
        self.picture_freq, self.epochs, self.seed = args.picture_freq, args.epochs, args.seed
        self.device, self.amp, self.name = device, amp, name
        self.mean, self.std = datasets.build_mean_and_std(args)
        dataset = datasets.eval_dataset(data, args, datasets.on_bad_image(True, args))
        count = min(count, len(data))
        self.ids = torch.arange(count) * len(data) // count
        self.loader = datasets.build_reader(dataset, args, device)
        self.images: Tensor | None = None  # (N, C, H, W), normalized

    def read(self, model: FCMAE) -> None:
        """Read the images. The first drawing does it, since signals are handled by then."""
        images, _, ids = self.loader.reload(0, self.ids)
        h, w = model.grid_size(*images.shape[-2:])
        noise = mask_noise(self.seed, 0, ids, h * w)
        self.mask = random_mask(noise, visible_patches(h * w, model.mask_ratio))  # (N, L)
        self.images = images

    def draw(self, model: FCMAE, state: TrainState) -> Tensor | None:
        """Draw (3, H, W) on rank 0 if the run shows images after this epoch; otherwise None.

        Every rank must call it, since sharded weights are gathered.
        """
        epoch = state.position  # the number of finished epochs
        is_end = epoch == self.epochs or state.samples_in_epoch > 0  # perhaps within an epoch
        due = self.picture_freq and (is_end or epoch % self.picture_freq == 0)
        if not due or epoch == 0 or not state.at_phase_end:
            return None
        with sharding.unsharded(model) as network, autocast(self.device, self.amp):
            if not is_main_process():
                return None
            if self.images is None:
                self.read(network)
            mean, std = scale_to_show(self.mean, self.std)
            views, *losses = reconstruct(network, self.images, self.mask, mean, std)
            return grid(views, CAPTION.format(self.name or f"epoch {epoch:g}", *losses))


def scale_to_show(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """Return what to scale normalized images by, so that they can be shown in 0 to 1.

    Gray and RGB are shown as they are. Other images may be dark, or their channels very different:
    each channel is shown from 2 standard deviations below its mean to 2 above.
    """
    count = len(mean)
    return (mean, std) if count in (1, 3) else ([0.5] * count, [0.25] * count)


def as_rgb(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 3, H, W): the first three channels, or the mean of one or two."""
    if images.shape[1] >= 3:
        return images[:, :3]
    return images.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def to_show(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized (N, C, H, W) -> (N, 3, H, W) in 0 to 1; mean and std: of the normalization."""
    mean, std = (images.new_tensor(x).view(-1, 1, 1) for x in scale_to_show(mean, std))
    return as_rgb((images * std + mean).clamp(0, 1))


@torch.no_grad()
def reconstruct(
    model: FCMAE, images: Tensor, mask: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, float, float]:
    """Normalized (N, C, H, W) and mask (N, L), 1 = removed -> (N, 5, C, H, W) in 0 to 1, losses.

    The five are those of TITLES. The loss ignores visible patches, so their prediction has no
    meaning and is not shown. With `norm_pix_loss` the model predicts patches without their mean
    and variance, which are taken from the input: even an untrained network shows rough shapes.
    The baseline shows how much that is: the mean of each hidden patch over pixels and channels.
    The losses are those of the model and of the baseline.
    """
    was_training = model.training
    model.eval()
    loss, pred, _ = model(images, mask, int((mask[0] == 0).sum()))  # pred (N, p*p*C, h, w)
    model.train(was_training)
    patches, (h, w) = model.patchify(images), model.grid_size(*images.shape[-2:])  # (N, L, p*p*C)
    pred = pred.flatten(2).transpose(1, 2).to(patches.dtype)
    means = patches.mean(-1, keepdim=True).expand_as(patches)
    guess = torch.zeros_like(patches) if model.norm_pix_loss else means  # as a prediction
    guess = guess.transpose(1, 2).unflatten(2, (h, w))
    if model.norm_pix_loss:
        pred = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + means
    removed = model.unpatchify(mask[..., None].expand_as(patches), (h, w)) > 0
    baseline_loss = model.forward_loss(images, guess, mask)
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    pred, means, images = (
        part * std + mean
        for part in (model.unpatchify(pred, (h, w)), model.unpatchify(means, (h, w)), images)
    )
    columns = [images, torch.where(removed, GRAY, images)]
    columns += [torch.where(removed, part, GRAY) for part in (means, pred)]
    columns += [torch.where(removed, pred, images)]
    return torch.stack(columns, dim=1).clamp(0, 1), loss.item(), baseline_loss.item()


def grid(views: Tensor, caption: str = "") -> Tensor:
    """Lay out (N, 5, C, H, W) in 0 to 1 as one RGB image (3, H, W): titles, N rows, a caption."""
    n, columns, chans, height, width = views.shape
    scale = -(-MIN_WIDTH // width)
    rgb = as_rgb(views.reshape(n * columns, chans, height, width))
    cells = F.interpolate(rgb, scale_factor=scale)
    width *= scale
    size = min(width, 2 * MIN_WIDTH) // 8  # of the font
    gap = size // 2
    rows = make_grid(cells, nrow=columns, padding=gap, pad_value=1.0).cpu()
    titles = Image.new("RGB", (rows.shape[2], 3 * size), "white")
    draw, font = ImageDraw.Draw(titles), ImageFont.load_default(size)
    for column, title in enumerate(TITLES):
        middle = gap + column * (width + gap) + width // 2
        style = {"font": font, "anchor": "md", "align": "center", "fill": INK}
        draw.multiline_text((middle, 3 * size - gap // 2), title, **style)
    below = Image.new("RGB", (rows.shape[2], 3 * size), "white")
    ImageDraw.Draw(below).multiline_text((gap, gap // 2), caption, font=font, fill=INK)
    parts = [to_tensor(titles), rows] + [to_tensor(below)] * bool(caption)
    return torch.cat(parts, dim=1)
