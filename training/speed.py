# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Speed of training: images a second, shares of the time, MFU, and advice on what limits it.

python main_pretrain.py --recipe digits_pretrain --output_dir runs/digits --print_freq 5
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from config.flags import LISTED
from config.sizes import batch_sizes
from data_loading.stages import ByEpoch
from data_loading.tuning import most_workers
from parallel.process_group import all_reduce_sum, get_logger, get_world_size
from training.advice import Adviser, Load, Use
from training.mfu import peak_flops
from training.report import Record
from training.step_clock import NAMES, build_clock
from training.stepper import Stepper, choose_amp
from training.steps import Steps


@dataclass(frozen=True)
class Mark:
    """A point in time: seconds of the host's clock, and sums since the start of the run."""

    time: float
    images: int
    steps: int
    caught_up: int | None
    seconds: Mapping[str, float]  # of each part of a step


class Speed:
    """Measures the speed between two log lines, and over a phase of training.

    Times are means over all processes. flops: of training on one image, by epoch; peak: FLOP/s that
    this device reaches at most. Without both, nothing is said about the MFU. adviser: None for no
    advice.
    """

    def __init__(
        self,
        device: torch.device,
        adviser: Adviser | None = None,
        flops: ByEpoch | None = None,
        peak: float | None = None,
    ) -> None:
        self.device, self.adviser, self.flops, self.peak = device, adviser, flops, peak
        self.clock = build_clock(device)
        self.images, self.steps = 0, 0
        self.host_waits = False  # in each step, so that it never keeps ahead of the device
        self.begin_phase()

    def watch(self, stepper: Stepper) -> None:
        """Measure the steps of this stepper."""
        stepper.mark = self.clock.mark
        self.host_waits = not stepper.can_skip

    def begin_phase(self) -> None:
        """Begin the training of an epoch, or of a part of it."""
        self.clock.start()
        self.advice: list[str] = []
        self.phase = self._now()
        self.begin_window()

    def begin_window(self) -> None:
        """Begin the time until the next log line."""
        self.window = self._now()

    def _now(self) -> Mark:
        caught_up = None if self.host_waits else self.clock.caught_up
        return Mark(time.perf_counter(), self.images, self.steps, caught_up, self.clock.read())

    def after_batch(self, images: int) -> None:
        """Count the images of a micro-batch, those of all processes."""
        self.images += images

    def after_step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1

    def line(self, epoch: int) -> Record:
        """Return the values of a log line; every rank must call it once it has read the meters.

        epoch: counted from 0. Later advice is based on the last line before `end_line`.
        """
        now = self._now()
        self.load = self._load(self.window, now)
        return self._values(self.load, self.window, now, epoch)

    def end_line(self) -> None:
        """Begin the next window, and log advice that has become clear by now."""
        if self.adviser is not None and (sentence := self.adviser.after_line(self.load)):
            self.advice.append(sentence)
            get_logger().info("advice: %s", sentence)
        self.begin_window()

    def end_phase(self, epoch: int) -> Record:
        """Return the values of the phase for log.txt; every rank must call it as `line`."""
        now = self._now()
        values = self._values(self._load(self.phase, now), self.phase, now, epoch)
        return values | ({"advice": self.advice} if self.advice else {})

    def _load(self, start: Mark, end: Mark) -> Load:
        own = [end.seconds[part] - start.seconds[part] for part in NAMES]
        if get_world_size() > 1:  # means of all processes, as for the images
            own = all_reduce_sum(torch.tensor(own, device=self.device) / get_world_size()).tolist()
        caught_up = None if end.caught_up is None else end.caught_up - (start.caught_up or 0)
        seconds = dict(zip(NAMES, own, strict=True))
        return Load(seconds, end.steps - start.steps, caught_up, self._memory())

    def _values(self, load: Load, start: Mark, end: Mark, epoch: int) -> Record:
        rate = (end.images - start.images) / max(end.time - start.time, 1e-9)
        found = {"images_per_s": rate} | self.clock.shares(load.seconds)
        if self.flops and self.peak:
            found["mfu"] = rate * self.flops.at(epoch) / (self.peak * get_world_size())
        return found

    def _memory(self) -> float | None:
        if self.device.type != "cuda":
            return None
        total = torch.cuda.get_device_properties(self.device).total_memory
        return torch.cuda.max_memory_allocated(self.device) / total


def build_speed(
    args: Any, device: torch.device, steps: Steps, flops: Mapping[int, float] | None = None
) -> Speed:
    """Build the `Speed` of a run; flops: of training on one image, by epoch, None if not known."""
    flags = vars(args)
    own = {each.name: flags[each.name] for each in fields(Use) if each.name in flags}
    files = flags.get("data_set", "auto") in LISTED
    use = Use(**own | {"cores": most_workers(), "files": files})
    if "batch_size" in flags:
        *_, size = batch_sizes(args).values()
        freq = max(1, steps.base[1] // (size * get_world_size()))
        use = replace(use, batch_size=size, update_freq=freq)
    return Speed(device, Adviser(use), ByEpoch(flops) if flops else None, find_peak(args, device))


def find_peak(args: Any, device: torch.device) -> float | None:
    """Return the FLOP/s that a device reaches at most in the precision of the flags, if known."""
    if device.type != "cuda":
        return None
    precision = choose_amp(args.amp, args.use_amp, device)
    if precision == "none" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return peak_flops(torch.cuda.get_device_name(device), precision)
