# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Hooks for the terminal: log lines and a progress bar.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --stem_stride 1 --progress bar
"""

from parallel.console import note
from parallel.process_group import get_logger
from training.checkpoint import TrainState
from training.hooks import Hook, Run
from training.report import (
    Record,
    count_epochs,
    describe_end,
    format_record,
    format_short,
    format_stats,
)


class LineHook(Hook):
    """Log a line after the first step, every `print_freq` steps and every epoch.

    top5: show top-5 accuracies. shown: False if a progress bar is on the terminal, so that the
    lines of steps go to console.log alone.
    """

    def __init__(self, epochs: float, top5: bool = True, shown: bool = True) -> None:
        self.epochs, self.top5, self.shown = epochs, top5, shown

    def on_first_step(self, record: Record, state: TrainState) -> None:
        self.on_log(record, state)

    def on_log(self, record: Record, state: TrainState) -> None:
        epoch, step = count_epochs(state.epoch, self.epochs), f"{record['step']}/{record['steps']}"
        line = f"epoch {epoch}  step {step}  {format_record(record)}"
        if self.shown:
            get_logger().info("%s", line)
        else:
            note(line)

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        line = format_stats(stats, self.top5)
        get_logger().info("%s  %s", describe_end(state, self.epochs), line)


class BarHook(Hook):
    """Show one progress bar for the whole run, the values first: they stay when it is narrow."""

    def __init__(self, epochs: float, state: TrainState, total: int) -> None:
        from tqdm import tqdm

        self.epochs, self.values = epochs, ""
        self.bar = tqdm(
            desc=self._text(state),
            total=total,
            initial=state.global_step,
            bar_format="{desc}  {percentage:3.0f}% |{bar}|",
            dynamic_ncols=True,
            leave=False,
        )

    def _text(self, state: TrainState) -> str:
        return f"epoch {count_epochs(state.epoch, self.epochs)}{self.values}"

    def on_step(self, run: Run) -> None:
        self.bar.set_description_str(self._text(run.state), refresh=False)
        self.bar.update(run.state.global_step - self.bar.n)

    def on_first_step(self, record: Record, state: TrainState) -> None:
        self.on_log(record, state)

    def on_log(self, record: Record, state: TrainState) -> None:
        self.values = f"  {format_short(record)}"
        self.bar.set_description_str(self._text(state))

    def on_end(self, run: Run) -> None:
        self.bar.close()
