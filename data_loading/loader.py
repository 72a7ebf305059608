# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""From a loader's batch on the host to one on the device, normalised; on CUDA beside the training.

python -c "from data_loading import loader; print(loader.Batches.__doc__)"
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from errors import UserError


class Batches:
    """A loader's batches on `device`: images (N, C, H, W) float, normalised, channels_last.

    uint8 images are 0..255, float ones 0..1. Raises the UserErrors that `Augmented` returned.
    `wait_seconds` sums the time spent waiting for the loader; `bad` says why of the images that
    `--on_bad_image skip` went without, by name. On CUDA the host queues work faster
    than it gets done, so a batch's copy, on a stream of its own, runs beside the step before it.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.loader, self.device = loader, torch.device(device)
        mean_std = torch.tensor([mean, std], dtype=torch.float32, device=self.device)
        self.mean, self.std = mean_std[:, None, :, None, None]  # (1, C, 1, 1) each
        self.wait_seconds = 0.0
        self.bad: dict[str, str] = {}
        self.side = None  # the stream that copies; one, since each has memory of its own
        if self.device.type == "cuda":
            self.side = torch.cuda.Stream(self.device)
            self.side.wait_stream(torch.cuda.current_stream(self.device))  # for mean and std

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """`TrainSampler.set_epoch` of the loader's sampler."""
        self.loader.sampler.set_epoch(epoch, seen)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        start, batches = time.perf_counter(), iter(self.loader)
        while True:
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            *batch, bad = batch
            self.bad |= dict(bad)
            if len(batch[0]):  # an evaluation may have left out all
                yield self._to_device(batch) if self.side is None else self._on_side(batch)
            start = time.perf_counter()

    def again(self, epoch: int, ids: Tensor) -> tuple[Tensor, ...]:
        """The batch of these samples as it was in an epoch, read in this process; or UserError."""
        batch = self.loader.collate_fn([self.loader.samples[epoch, i] for i in ids.tolist()])
        if isinstance(batch, UserError):
            raise batch
        return self._to_device(batch[:3])

    def _to_device(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        images, labels, ids = (part.to(self.device, non_blocking=True) for part in batch)
        return self.normalise(images), labels, ids

    def _on_side(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.side):
            parts = self._to_device(batch)
        here.wait_stream(self.side)
        for part in parts:
            part.record_stream(here)  # else the next batch could take its memory too early
        return parts

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 or float in 0..1 -> float32 with `mean` taken off, over `std`."""
        x = images.to(dtype=torch.float32, memory_format=torch.channels_last)
        x = x if images.is_floating_point() else x / 255
        return (x - self.mean) / self.std
