# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The optimizer steps of a run: their number in each epoch, and the images in each step.

python -c "from training.steps import Steps; print(Steps.even(10, 2.5).total)"
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from config.sizes import batch_sizes
from data_loading.loader import DeviceLoader
from data_loading.stages import ByEpoch
from optim_factory import count_steps
from parallel.process_group import get_logger, get_world_size


def count_total(epochs: float, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a run, at least one; `epochs` may be a fraction."""
    return max(1, round(epochs * steps_per_epoch))


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run, by epoch.

    epochs: of the run, perhaps a fraction. parts: first epoch, counted from 0, -> (steps of an
    epoch, images in a step over all ranks). Those of the last part are the base of the learning
    rate.
    """

    epochs: float
    parts: Mapping[int, tuple[int, int]]

    @classmethod
    def even(cls, steps_per_epoch: int, epochs: float = 1, effective_batch: int = 1) -> "Steps":
        """Return those of a run whose epochs are equal."""
        return cls(epochs, {0: (steps_per_epoch, effective_batch)})

    @property
    def total(self) -> int:
        """Optimizer steps of the run, at least one."""
        return max(1, self.before(self.epochs))

    @property
    def base(self) -> tuple[int, int]:
        """(steps of an epoch, images in a step) of the last part."""
        return self.parts[max(self.parts)]

    def of(self, epoch: int) -> tuple[int, int]:
        """(steps, images in a step) of an epoch."""
        return ByEpoch(self.parts).at(epoch)

    def before(self, epochs: float) -> int:
        """Return the steps of so many epochs from the beginning; a part of a step is rounded."""
        spans = pairwise([*self.parts, math.inf])
        return round(
            sum((min(epochs, end) - first) * self.parts[first][0]
                for first, end in spans if first < epochs)
        )  # fmt: skip

    def within(self, step: int) -> tuple[int, int]:
        """(number of a step in its epoch, steps of that epoch); both steps count from 0."""
        first = self._part_of(step)
        per_epoch = self.parts[first][0]
        return (step - self.before(first)) % per_epoch, per_epoch

    def progress(self, step: int) -> float:
        """Return what the first `step` steps have covered, in steps of the last part.

        It grows by as much in every epoch: by more in each step where an epoch has fewer.
        """
        if len(self.parts) == 1:
            return step
        first = self._part_of(step)
        position = first + (step - self.before(first)) / self.parts[first][0]
        return position * self.base[0]

    def factor(self, step: int) -> float:
        """Return the images of a step, counted from 0, over those of a step of the last part."""
        return self.parts[self._part_of(step)][1] / self.base[1]

    def _part_of(self, step: int) -> int:
        """Return the first epoch of the part with a step."""
        return max(first for first in self.parts if self.before(first) <= max(step, 0))


def build_steps(args: Any, loader: DeviceLoader, update_freq: int) -> Steps:
    """Count the steps of a run whose batches `loader` makes."""
    parts = {}
    for epoch, size in batch_sizes(args).items():
        loader.set_epoch(epoch)
        steps = count_steps(len(loader), update_freq)
        parts[epoch] = steps, size * update_freq * get_world_size()
    loader.set_epoch(0)
    steps = Steps(args.epochs, parts)
    for epoch, (count, images) in parts.items() if len(parts) > 1 else ():
        factor = images / steps.base[1]
        get_logger().info(
            "from epoch %d on: %d images in a step (%d per process and forward pass), %d steps an "
            "epoch, learning rate x %g",
            *(epoch + 1, images, batch_sizes(args)[epoch], count, factor),
        )
    return steps
