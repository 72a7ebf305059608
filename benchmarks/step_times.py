# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure what the shares of the time in the log cost: training steps with and without them.

python benchmarks/step_times.py --model convnextv2_atto
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnextv2_atto", help="one of the eight sizes")
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="each times steps of both kinds")
    parser.add_argument("--steps", type=int, default=10, help="in each timing")
    parser.add_argument("--print_freq", type=int, default=20, help="steps between two readings")
    parser.add_argument("--device", help="default cuda where there is one, else cpu")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch

from engine_pretrain import train_one_epoch
from models import create_model, fcmae_name
from optim_factory import create_optimizer
from training.anomaly import AnomalyGuard
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.hooks import Reporter
from training.schedules import Schedule
from training.setup import TrainLoop
from training.step_clock import StepClock, no_mark
from training.stepper import Stepper, choose_amp
from training.steps import Steps

ENDLESS = 1 << 40  # steps


class Repeated:
    """The same batch of noise, `times` times; calls `mark` as DeviceLoader does."""

    mark: Callable[[str], None] = staticmethod(no_mark)

    def __init__(self, size: int, side: int, device: torch.device) -> None:
        images = torch.randn(size, 3, side, side, device=device)
        images = images.to(memory_format=torch.channels_last)
        self.batch = images, torch.zeros(size, device=device), torch.arange(size, device=device)
        self.times = 1

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple]:
        for _ in range(self.times):
            self.mark("rest")
            self.mark("data")
            yield self.batch


class Unmeasured(StepClock):
    """A clock that measures nothing."""

    mark = staticmethod(no_mark)


class Trainer:
    """Trains FCMAE by the engine of main_pretrain.py, with or without shares of the time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.model = create_model(fcmae_name(args.model)).to(self.device)
        optimizer = create_optimizer(self.model, lr=1e-4)
        amp = choose_amp(None, None, self.device)
        self.stepper = Stepper(self.model, optimizer, self.device, amp)
        self.schedule = Schedule(optimizer, ENDLESS, 1e-4, warmup=0)
        self.batches = Repeated(args.batch_size, args.input_size, self.device)
        self.print_freq, self.shares = args.print_freq, {}

    def seconds_a_step(self, steps: int, measured: bool) -> float:
        """Time an epoch of so many steps."""
        state = TrainState()
        reporter = Reporter([], self.device, state, Steps.even(ENDLESS), self.print_freq)
        if not measured:
            reporter.speed.clock = Unmeasured()
        guard = AnomalyGuard(self.stepper, max_bad_steps=ENDLESS)
        manager = CheckpointManager(None)
        loop = TrainLoop(self.stepper, self.schedule, state, guard, reporter, manager, seed=0)
        self.batches.times = steps
        start = time.perf_counter()
        train_one_epoch(self.model, self.model, self.batches, loop)  # reads the meters at its end
        seconds = time.perf_counter() - start
        if measured:
            self.shares = reporter.phase_speed
        return seconds / steps


def seconds_of_marks(device: torch.device, steps: int = 2000) -> float:
    """Return the seconds of the host for the marks of one step, without the step."""
    reporter = Reporter([], device, TrainState(), Steps.even(ENDLESS), ENDLESS)
    mark = reporter.speed.clock.mark
    start = time.perf_counter()
    for _ in range(steps):
        for part in ("rest", "data", "rest", "forward", "backward", "optimizer"):
            mark(part)
    return (time.perf_counter() - start) / steps


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags with defaults filled in."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if min(args.rounds, args.steps, args.batch_size, args.print_freq) < 1:
        parser.error("--rounds, --steps, --batch_size and --print_freq: expected 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Print the report."""
    args = parse_args(argv)
    trainer = Trainer(args)
    trainer.seconds_a_step(args.steps, True)  # compiles, chooses kernels, fills caches
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(args.rounds):
        for measured in (True, False) if number % 2 else (False, True):
            found[measured].append(trainer.seconds_a_step(args.steps, measured))
    ratios = [one / other for one, other in zip(found[True], found[False], strict=True)]
    marks, step = seconds_of_marks(trainer.device), statistics.median(found[False])
    rows = [("with shares of the time", found[True]), ("without", found[False])]
    print(
        f"### fcmae_{args.model}, {args.batch_size} images of {args.input_size} px, {args.device}"
    )
    print("\n| | ms a step: median | min | max |\n|---|---|---|---|")
    for name, seconds in rows:
        median, low, high = statistics.median(seconds), min(seconds), max(seconds)
        print(f"| {name} | {1000 * median:.2f} | {1000 * low:.2f} | {1000 * high:.2f} |")
    print(f"\nRatio of the rounds: median {statistics.median(ratios):.4f}, ", end="")
    print(f"{min(ratios):.4f} to {max(ratios):.4f}. The marks of a step alone: ", end="")
    print(f"{1e6 * marks:.1f} us of the host, {100 * marks / step:.4f}% of a step.")
    shares = {name: x for name, x in trainer.shares.items() if name.startswith("time_")}
    print("Shares:", ", ".join(f"{name[5:]} {100 * x:.1f}%" for name, x in shares.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
