# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Test-time augmentation: several views of each image, and the mean of a network's outputs.

python -c "from data_loading.tta import Views; print(Views(['hflip', 'five_crop']).count)"
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop

from config.tta import tta_views

# Quarter turns, and True for a horizontal flip before them, that a view adds to the image itself.
TURNS = {"hflip": [(0, True)], "vflip": [(2, True)], "rot90": [(n, False) for n in (1, 2, 3)]}
CROPS = 5


class FiveCrop:
    """Cut out the center and the four corners of `size` (height, width).

    (C, H, W) -> (C, 5 * height, width): the crops stacked along the height, the center first.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        *corners, center = five_crop(image, self.size)
        pixels = [part.permute(1, 2, 0) for part in (center, *corners)]
        return torch.cat(pixels).permute(2, 0, 1)  # channels next to each other, as decoded

    def __repr__(self) -> str:
        return f"FiveCrop(size={self.size})"


@dataclass(frozen=True)
class Views:
    """The views of an image over which the outputs of a network are averaged.

    names: hflip, vflip, rot90 and five_crop; none for the image alone. All combinations of them are
    views, each counted once: `hflip vflip` gives 4, `hflip rot90` 8, and `vflip` adds none to that.
    Images are (N, C, H, W), or with five_crop (N, C, 5*H, W), as `FiveCrop` stacks them. rot90
    needs H = W.
    """

    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in (*TURNS, "five_crop"):
                got = f"unknown view {name!r}"
                raise ValueError(f"{got}, expected one of {', '.join(TURNS)}, five_crop")

    @property
    def crops(self) -> int:
        """Number of crops that the transform stacks along the height."""
        return CROPS if "five_crop" in self.names else 1

    @property
    def turns(self) -> list[tuple[int, bool]]:
        """Quarter turns of each crop, each with True for a horizontal flip before them."""
        found = {(0, False)}
        for name in self.names:
            more = TURNS.get(name, [])
            # A flip inverts the sense of the turns before it.
            found |= {((n - k if f else n + k) % 4, f != m) for n, f in more for k, m in found}
        return sorted(found)

    @property
    def count(self) -> int:
        """Number of views of an image, and of forward passes for it."""
        return self.crops * len(self.turns)

    def __str__(self) -> str:
        return f"{self.count} views of each image: --tta {' '.join(self.names)}"

    def center(self, images: Tensor) -> Tensor:
        """Return the images themselves, (N, C, H, W): with five_crop their center crops."""
        return images.chunk(self.crops, dim=2)[0] if self.crops > 1 else images

    def repeat(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, crops*H, W), all crops equal: a batch to measure speed with."""
        return torch.cat([images] * self.crops, dim=2) if self.crops > 1 else images

    def each(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the views (N, C, H, W) of a batch one by one, channels_last, the center first."""
        if self.count == 1:
            yield images
            return
        for crop in images.chunk(self.crops, dim=2):
            for turns, is_flipped in self.turns:
                view = crop.flip(3) if is_flipped else crop
                view = view.rot90(turns, (2, 3)) if turns else view
                yield view.contiguous(memory_format=torch.channels_last)

    def mean_output(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return the mean of the outputs (N, K) over the views, summed in at least float32.

        A single view has the outputs of the network as they are. The network sees a view of all
        images at a time, so it takes as much memory as for one view.
        """
        outputs = (network(view) for view in self.each(images))
        total = next(outputs)
        if self.count == 1:
            return total
        total = total.to(torch.promote_types(total.dtype, torch.float32))
        for output in outputs:
            total = total + output
        return total / self.count


ONE_VIEW = Views()  # the image alone


def build_views(args: Any) -> Views:
    """Build the views that --tta names."""
    return Views(tta_views(args))
