# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Profile of a few optimizer steps: a trace for ui.perfetto.dev, and the most expensive operations.

python main_pretrain.py --recipe digits_pretrain --output_dir runs/digits --hook "profiler(steps=3)"
"""

import os
from typing import Any

from torch.profiler import ProfilerActivity, profile

from errors import plural
from parallel.process_group import get_logger
from training.hooks import Hook, Run
from training.log_files import at_least, needs_folder
from utils import write_atomically

ROWS = 10  # of the table


class ProfilerHook(Hook):
    """Profile rank 0: write profile.json, a trace, and profile.txt, its ten most
    expensive operations.

    steps: optimizer steps to profile, within one epoch. skip: steps before, which choose kernels
    and fill caches; in an epoch too short for that, it profiles the end of a later one.
    """

    def __init__(self, steps: int = 3, skip: int = 10) -> None:
        self.steps = at_least(steps, 1, "profiler(steps)")
        self.skip = at_least(skip, 0, "profiler(skip)")
        self.seen, self.recorded, self.profile, self.done = 0, 0, None, False

    def check(self, args: Any) -> None:
        needs_folder(args, "profiler")

    def on_phase_start(self, run: Run) -> None:
        if run.phase == "train" and not self.skip:
            self._start(run)

    def _start(self, run: Run) -> None:
        if self.done or self.profile is not None:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # no lines of its own
        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] * (run.device.type == "cuda")
        self.recorded, self.profile = 0, profile(activities=kinds, record_shapes=True)
        self.profile.start()

    def on_step(self, run: Run) -> None:
        if run.phase != "train" or self.done:
            return
        self.seen += 1
        if self.profile is not None:
            self.recorded += 1
            self.profile.step()
            if self.recorded == self.steps:
                self._finish(run)
        elif self.seen >= self.skip:
            self._start(run)

    def on_phase_end(self, run: Run) -> None:
        if self.recorded and not self.done:
            self._finish(run)
        elif self.profile is not None and not self.done:
            self.profile.stop()
            self.profile = None

    def _finish(self, run: Run) -> None:
        self.profile.stop()
        self.done = True
        trace, table = run.folder / "profile.json", run.folder / "profile.txt"
        self.profile.export_chrome_trace(str(trace))
        order = f"self_{'cuda' if run.device.type == 'cuda' else 'cpu'}_time_total"
        text = self.profile.key_averages().table(sort_by=order, row_limit=ROWS)
        write_atomically(text.encode(), table)
        get_logger().info(
            "%s: a trace of %s for https://ui.perfetto.dev; %s: the ten most expensive "
            "operations\n%s",
            *(trace, plural(self.recorded, "step"), table, text),
        )
        self.profile = None

    def on_end(self, run: Run) -> None:
        if self.profile is not None:
            self.profile.stop()
        if run.is_complete and self.seen and not self.done:
            text = "hook profiler: the run ended before step %d, so there is no profile"
            get_logger().warning(text, self.skip + 1)
