# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""report.html in the folder of a run, written while it trains and at its end.

python main_pretrain.py --recipe digits_pretrain --output_dir runs/digits --report true
"""

import time
from pathlib import Path

from insight.report_page import NAME, write_report
from parallel.process_group import get_logger
from training import run_lock
from training.hooks import Hook, Run

LEAST_SHARE = 50  # the training between two refreshes takes so many times as long as one of them


class HtmlReport(Hook):
    """Writes report.html when an epoch begins whose predecessors are saved, and at the end.

    It must precede the hooks that write files, since hooks end in reverse order: the last report
    includes all of them. A refresh that would take more than 2% of the time is left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds, self.written_at = 0.0, -float("inf")  # of the last report, by `time`

    def on_phase_start(self, run: Run) -> None:
        waited = time.monotonic() - self.written_at
        if run.phase == "train" and run.state.epoch and waited >= LEAST_SHARE * self.seconds:
            self.write()

    def on_end(self, run: Run) -> None:
        if run.state.global_step and self.write():
            get_logger().info("%s: curves, images and notes of this run", self.folder / NAME)

    def write(self) -> bool:
        """Write the report, unless another run has taken over the folder; True if it is written."""
        if run_lock.is_taken_over():
            return False
        start = time.monotonic()
        write_report([self.folder])
        self.written_at = time.monotonic()
        self.seconds = self.written_at - start
        return True
