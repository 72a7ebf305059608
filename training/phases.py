# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Phases of a run: training up to the next evaluation, or to the end of an epoch or of the run.

python -c "from training.phases import Phases, Steps; print(Phases(Steps.even(10), 0.5).next)"
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.process_group import broadcast
from training.checkpoint import TrainState
from training.hooks import Reporter
from training.steps import Steps


@dataclass(frozen=True)
class Phase:
    """Training without an interruption by an evaluation."""

    stop: int | None  # images of the epoch at which it ends; None at the end of the epoch
    evaluates: bool  # at its end
    is_last: bool  # of the run


@dataclass(frozen=True)
class Phases:
    """When a run evaluates and when it ends, in optimizer steps.

    steps: of the run. eval_freq: epochs between evaluations, perhaps a
    fraction; one follows the last step in any case. patience: evaluations in a row without a metric
    that is better by `min_delta`, which end the run; None for any number.

        while not phases.done(state):
            phase = phases.next(state)
            ...                               # train up to `phase.stop`
            phases.end(phase, state, reporter)

    All of it follows from the `TrainState`, so a resumed run has the phases of one that was not
    interrupted; an evaluation that a killed run has missed comes first.
    """

    steps: Steps
    eval_freq: float = 1.0
    patience: int | None = None
    min_delta: float = 0.0

    def done(self, state: TrainState) -> bool:
        """Return True after the last phase of the run, or if it has stopped early."""
        finished = self.steps.before(state.epoch) + self._count(state.epoch, state.phase_end)
        return finished >= self.steps.total or self.stopped_early(state)

    def stopped_early(self, state: TrainState) -> bool:
        """Return True if the metric has not become better for `patience` evaluations."""
        return self.patience is not None and state.since_best >= self.patience

    def next(self, state: TrainState) -> Phase:
        """Return the phase that follows the last finished one; it may have begun already."""
        first, (size, images) = self.steps.before(state.epoch), self.steps.of(state.epoch)
        end = min(size, self.steps.total - first)  # of the run or the epoch
        evaluations = self._evaluations(state.epoch)
        finished = self._count(state.epoch, state.phase_end)
        step = min(step for step in {*evaluations, end} if step > finished)
        left = max(0, step - self._count(state.epoch, state.samples_in_epoch))
        stop = state.samples_in_epoch + left * images
        is_last = first + step >= self.steps.total
        whole = step == size
        return Phase(None if whole else stop, is_last or step in evaluations, is_last)

    def end(self, phase: Phase, state: TrainState, reporter: Reporter) -> dict[str, Any]:
        """Advance the state to the end of a phase; returns the entries of log.txt that name it.

        The end of an epoch has its number, counted from 0, another phase the number of epochs done.
        """
        if phase.stop is None:
            state.end_epoch(self.steps)
            return {"epoch": state.epoch - 1}
        state.phase_end = state.samples_in_epoch
        state.epoch_sums["means"] = reporter.means.state()  # the next phase continues them
        return {"after_epochs": state.position, "step": state.global_step}

    def ends_run(self, phase: Phase, state: TrainState, best: Mapping[str, float | None]) -> bool:
        """Count the evaluation of a phase for `patience`; returns True if the run ends here.

        best: checkpoint name -> metric: the weights and the EMA weights, of which either may be
        better. Every rank must call it, and gets the answer of rank 0.
        """
        if phase.evaluates:
            state.count_without_better(best, self.min_delta)
        stops = self.stopped_early(state)
        return phase.is_last or (self.patience is not None and broadcast(stops))

    def _count(self, epoch: int, images: int) -> int:
        """Return the optimizer steps that these images of an epoch take."""
        return -(-images // self.steps.of(epoch)[1])

    def _evaluations(self, epoch: int) -> set[int]:
        """Return the steps of an epoch after which there is an evaluation."""
        size, freq = self.steps.of(epoch)[0], self.eval_freq
        times = round(1 / freq) if freq < 1 else 0
        if times and abs(times * freq - 1) < 0.02:  # 0.33 is a third
            freq = 1 / times
        period, first = max(freq * size, 1.0), epoch * size
        numbers = range(int(first / period), int((first + size) / period) + 2)
        return {step for n in numbers if 0 < (step := round(n * period) - first) <= size}


def build_phases(args: Any, steps: Steps) -> Phases:
    """Build the phases from the flags; pre-training, which does not evaluate, has epochs alone."""
    flags = vars(args)
    names = ("eval_freq", "patience", "min_delta")
    own = {name: flags[name] for name in names if name in flags}
    return Phases(steps, **own)
