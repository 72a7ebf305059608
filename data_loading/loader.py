# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""From a loader's batch on the host to one on the device, normalised; on CUDA beside the training.

python -c "from data_loading import loader; print(loader.DeviceLoader.__doc__)"
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_loading.dataset import Replacement
from data_loading.workers import WatchedLoader
from errors import UserError


class DeviceLoader:
    """A loader's batches on `device`: images (N, C, H, W) float, normalised, channels_last.

    uint8 images are 0..255, float ones 0..1. Raises the UserErrors that `TransformedDataset` returned.
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

    def reload(self, epoch: int, ids: Tensor) -> tuple[Tensor, ...]:
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


def collate(samples: list) -> tuple[Tensor, Tensor, Tensor, list] | UserError:
    """Samples -> images (N, C, H, W), labels (N,), ids (N,), what was `Replacement`: (name, why).

    Or the first UserError among them.
    """
    error = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if error is not None:
        return error
    bad = [fault for sample in samples if isinstance(sample, Replacement) for fault in sample.bad]
    samples = [sample.sample if isinstance(sample, Replacement) else sample for sample in samples]
    samples = [sample for sample in samples if sample is not None]
    if not samples:  # all left out
        return torch.empty(0), torch.empty(0), torch.empty(0), bad
    images, labels, ids = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(ids), bad


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to all processes of a job would end the workers that its last update needs.

    They leave with their run: torch's watchdog sees when that is gone.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def create_loader(
    dataset: Dataset,
    sampler: Sampler,
    batch_size: int,
    num_workers: int = 0,
    pin_mem: bool = False,
    drop_last: bool = False,
    timeout: float = 0,
    collate_fn: Callable[[list], Any] = collate,
) -> WatchedLoader:
    """A DataLoader of `collate`d batches whose workers live as long as it does.

    timeout: seconds that a worker may take for one sample; 0: any time.
    """
    return WatchedLoader(
        dataset,
        num_workers,
        timeout,
        _leave_signals_to_the_run,
        sampler=sampler,
        batch_size=max(1, batch_size),
        pin_memory=pin_mem and torch.cuda.is_available(),  # elsewhere torch only warns
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        collate_fn=collate_fn,
    )
