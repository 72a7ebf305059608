# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Batches of a data loader copied to the device and normalized there.

python -c "from data_loading import loader; print(loader.DeviceLoader.__doc__)"
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from data_loading.tta import ONE_VIEW, Views
from data_loading.workers import WatchedLoader
from errors import UserError
from parallel.process_group import get_logger

FAR = 5.0  # standard deviations


class DeviceLoader:
    """A loader's batches on `device`: images (N, C, H, W) float, normalized, channels_last.

    The loader's images are uint8 in 0..255 or float in 0..1. Random erasing acts on the normalized
    ones. Raises the UserErrors that `TransformedDataset` returned. `mark("rest")` is called when a
    batch is asked for and `mark("data")` when it is ready, so that training can measure the wait;
    `bad` maps the images that `--on_bad_image skip` skipped to reasons. On CUDA a batch is copied
    on a stream of its own, so that the copy overlaps with the step before it. views: those of each
    image, over which an evaluation averages.
    """

    def __init__(
        self,
        loader: WatchedLoader,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
        views: Views = ONE_VIEW,
    ):
        self.loader, self.device, self.views = loader, torch.device(device), views
        self.mean, self.std = list(mean), list(std)
        self.mean_std = {  # of images up to 1 and up to 255: (2, C)
            white: torch.tensor([[white * x for x in values] for values in (mean, std)]).to(device)
            for white in (1.0, 255.0)
        }
        self.mark: Callable[[str], None] = lambda part: None
        self.bad: dict[str, str] = {}
        self.range_is_known = False
        self.copy_stream = None
        if self.device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(self.device)  # one: each has a memory pool
            self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))  # for mean and std

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> None:
        """Call `TrainSampler.set_epoch` of the loader's sampler; choose the epoch's batch size."""
        self.loader.set_epoch(epoch, start, stop)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _, batch in self.pairs():
            if batch is not None:  # an evaluation may have left out all
                yield batch

    def pairs(self) -> Iterator[tuple[tuple, tuple[Tensor, Tensor, Tensor] | None]]:
        """Yield each batch of `collate`, and what iteration gives of it; None without images."""
        self.mark("rest")
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            self.bad |= dict(batch[3])
            found = None
            if len(batch[0]):
                self._check_range(batch[0])
                found = self._to_device(batch)
            self.mark("data")
            yield batch, found
            self.mark("rest")

    def reload(self, epoch: int, ids: Tensor) -> tuple[Tensor, ...]:
        """Read the batch of these samples as it was in an epoch, in this process."""
        batch = self.loader.collate_fn([self.loader.dataset[epoch, i] for i in ids.tolist()])
        if isinstance(batch, UserError):
            raise batch
        self.bad |= dict(batch[3])
        return self._copy(batch)

    def _check_range(self, images: Tensor) -> None:
        """Warn, at the first batch, if mean and std are not those of the images."""
        if self.range_is_known:
            return
        self.range_is_known = True
        far = (self.normalize(images.to(self.device)).abs() > FAR).float().mean().item()
        if far > 0.1:
            low, high = (limit.item() for limit in images.aminmax())
            kind = "float images" if images.is_floating_point() else "images of 0 to 255"
            get_logger().warning(
                "mean and std do not fit the %s of the first batch, from %.4g to %.4g: %.0f%% of "
                "the values are over %g standard deviations away. Expected floats in 0 to 1, or "
                "uint8, which is scaled to 0 to 1; or give --mean and --std that fit",
                *(kind, low, high, 100 * far, FAR),
            )

    def _copy(self, batch: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Copy a batch of `collate`; returns normalized images with their patches, labels, ids."""
        *parts, _, patches = batch
        images, labels, ids, noise = (
            part.to(self.device, non_blocking=True) for part in (*parts, patches.noise)
        )
        images = self.normalize(images)
        sizes = [images.shape[1] * height * width for *_, height, width in patches.places]
        for place, values in zip(patches.places, noise.split(sizes), strict=True):
            number, top, left, height, width = place
            erased = images[number, :, top : top + height, left : left + width]
            erased.copy_(values.view(erased.shape))
        return images, labels, ids

    def _to_device(self, batch: tuple[Any, ...]) -> tuple[Tensor, ...]:
        if self.copy_stream is None:
            return self._copy(batch)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copy_stream):
            parts = self._copy(batch)
        current.wait_stream(self.copy_stream)
        for part in parts:
            part.record_stream(current)  # otherwise the next batch could reuse its memory too early
        return parts

    def normalize(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 or float in 0..1 -> float32, (x - mean) / std."""
        count, channels, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(count * height, width * channels)
        mean, std = self.mean_std[1 if images.is_floating_point() else 255].repeat(1, width)
        result = torch.empty_like(rows, dtype=torch.float32)
        at_once = height if rows.device.type == "cpu" else len(rows)  # an image fits into the cache
        for part, place in zip(rows.split(at_once), result.split(at_once), strict=True):
            place.copy_(part).sub_(mean).div_(std)
        return result.view(count, height, width, channels).permute(0, 3, 1, 2)
