# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Mixup and cutmix of batches on the device, up to an epoch.

python -c "from data_loading.mixing import Mixing; print(Mixing.__doc__)"
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError


@dataclass(frozen=True)
class Mixing:
    """timm's mixup and cutmix, (images, labels, epoch) -> (mixed images, soft labels).

    mixup: timm's `Mixup`. kind: of the targets; zeros and ones of several classes are mixed as they
    are. off_epoch: first epoch, counted from 0, with images as they are; 0: none. Labels are
    smoothed in all epochs.
    """

    mixup: Any
    kind: str = "class"
    off_epoch: int = 0

    def is_on(self, epoch: int) -> bool:
        """Return True for an epoch with mixed images."""
        return not 0 < self.off_epoch <= epoch

    def __call__(self, images: Tensor, targets: Tensor, epoch: int = 0) -> tuple[Tensor, Tensor]:
        self.mixup.mixup_enabled = self.is_on(epoch)
        if self.kind == "class":
            return self.mixup(images, targets)
        # timm's for a class per image gives shares; here the classes are the images themselves
        self.mixup.num_classes = len(images)
        mixed, shares = self.mixup(images, torch.arange(len(images), device=images.device))
        return mixed, shares.to(targets.dtype) @ targets


def build_mixup(args: Any, nb_classes: int, kind: str = "class") -> Mixing | None:
    """Build what --mixup and --cutmix ask for, or None; kind: of the targets."""
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        return None
    if kind == "number":
        raise UserError("--mixup and --cutmix mix classes, and the data has numbers; drop them")
    from timm.data import Mixup

    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing if kind == "class" else 0.0,
        num_classes=nb_classes,
    )
    return Mixing(mixup, kind, vars(args).get("mixup_off_epoch", 0))
