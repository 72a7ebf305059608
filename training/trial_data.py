# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A run's images decoded and its loaders timed, for dry runs; `trial` does the same for the engine.

python -c "from training import trial_data; print(trial_data.rate_of.__doc__)"
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset

from data_loading.dataset import Replacement
from data_loading.rng import fold_in
from data_loading.samplers import keys_at
from data_loading.workers import WatchedLoader
from errors import TrainingStopped, UserError
from parallel.process_group import get_rank, get_world_size

ENDLESS = 1 << 40  # batches
MOST = 100_000  # images that a process tries: more than it can read in the time it has


@dataclass
class Decoded:
    """What became of the images that were tried on this rank."""

    good: list[tuple] = field(default_factory=list)  # some of them
    faults: list[str] = field(default_factory=list)  # what is wrong with others
    without: dict[str, str] = field(default_factory=dict)  # name -> why `--on_bad_image skip` skips
    tried: int = 0


class _Each(Dataset):
    """`data`, whose errors are values: a check wants them all."""

    def __init__(self, data: Any) -> None:
        self.data, self.name_of = data, data.name_of

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        try:
            return self.data[key]
        except Exception as error:  # of somebody's own data set: with a traceback in a run
            return UserError(f"{self.name_of(key[1])}: {type(error).__name__}: {error}")


def _only(samples: list) -> Any:
    return samples[0]


def decode_some(loader: WatchedLoader, seed: int, seconds: float, keep: int = 64) -> Decoded:
    """This rank's share of a loader's images in random order, until time is up.

    Read by as many processes as the run will have, so that a sample that kills or holds one is
    named. Up to `keep` good ones are kept.
    """
    data, found = loader.dataset, Decoded()
    mine = range(get_rank(), len(data), get_world_size())[:MOST]
    keys = list(keys_at(mine, len(data), fold_in(seed, 1), 0))
    workers = min(loader.num_workers, len(keys))
    one_by_one = WatchedLoader(
        _Each(data), keys, 1, workers, timeout=loader.timeout, collate_fn=_only
    )
    began = time.perf_counter()
    try:
        for (_, index), sample in zip(keys, one_by_one, strict=True):
            found.tried += 1
            _note(found, data.name_of(index), sample, keep)
            if time.perf_counter() - began > seconds:
                break
    except TrainingStopped as error:
        found.tried += 1
        found.faults.append(str(error))
    del one_by_one
    gc.collect()  # else a broken loader, held by its own error, would end in another's process
    return found


def _note(found: Decoded, name: str, sample: Any, keep: int) -> None:
    if isinstance(sample, Replacement):
        found.without |= dict(sample.bad)
        sample = sample.sample
    if sample is None:
        return
    if isinstance(sample, UserError):
        found.faults.append(str(sample))
    elif sample[0].is_floating_point() and not sample[0].isfinite().all():
        found.faults.append(f"{name} holds values that are not finite")
    elif len(found.good) < keep:
        found.good.append(sample)


class Stream:
    """So many of the loader's batches, over as many epochs as it takes.

    `began` is when the first `skipped` were done, in which workers have a start.
    """

    wait_seconds = 0.0

    def __init__(
        self,
        batches: Any,
        set_epoch: Callable[[int], None],
        skipped: int = 0,
        times: int = ENDLESS,
    ) -> None:
        self.batches, self.set_epoch = batches, set_epoch
        self.skipped, self.times = skipped, skipped + times
        self.began = time.perf_counter()

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for epoch in itertools.count():
            self.set_epoch(epoch)
            for batch in self.batches:
                yield batch
                count += 1
                if count == self.skipped:
                    self.began = time.perf_counter()
                if count == self.times:
                    return


def rate_of(stream: Stream, ahead: int, seconds: float) -> float:
    """Images/s of this process's loader, once what its workers hold ready is gone."""
    start, began, images = time.perf_counter(), None, 0
    for count, batch in enumerate(stream):
        now = time.perf_counter()
        if began is None:
            began = now if count >= ahead or now - start > 2 * seconds else None
            continue
        images += 0 if isinstance(batch, UserError) else len(batch[0])  # a bad one is told before
        if now - began > seconds:
            break
    return images / (now - began)
