# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Profile of a few optimizer steps: a trace for ui.perfetto.dev, and the most expensive operations.

python main_pretrain.py --recipe digits_pretrain --output_dir runs/digits --profile
"""

import gzip
import os
import shutil
from pathlib import Path
from typing import Any

from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from errors import plural
from parallel.process_group import get_logger, is_main_process
from training.hooks import Hook, Run
from training.log_files import at_least, needs_folder
from utils import write_atomically

ROWS = 10  # of the table
LARGE = 20 * 2**20  # bytes of a trace from which on it is compressed; Perfetto reads both


class ProfilerHook(Hook):
    """Profile rank 0: write profile.json, a trace, and profile.txt, its ten most
    expensive operations.

    steps: optimizer steps to profile, within one epoch. skip: steps before, which choose kernels
    and fill caches; in an epoch too short for that, it profiles the end of a later one. In the
    trace a step is called ProfilerStep# with its number in the run, from 1.
    """

    def __init__(self, steps: int = 3, skip: int = 10) -> None:
        self.steps = at_least(steps, 1, "profiler(steps)")
        self.skip = at_least(skip, 0, "profiler(skip)")
        self.seen, self.recorded, self.profile, self.done = 0, 0, None, False
        self.files = ""  # as the log names them

    def check(self, args: Any) -> None:
        needs_folder(args, "profiler", flag="--profile" * bool(vars(args).get("profile")))

    def on_phase_start(self, run: Run) -> None:
        if run.phase == "train" and not self.skip:
            self._start(run)

    def _start(self, run: Run) -> None:
        if self.done or self.profile is not None:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines of its own
        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] * (run.device.type == "cuda")
        always = {"schedule": lambda step: ProfilerAction.RECORD}  # with one, it names the steps
        self.recorded, self.profile = 0, profile(activities=kinds, record_shapes=True, **always)
        self.profile.step_num = run.state.global_step + 1
        self.profile.start()

    def on_step(self, run: Run) -> None:
        if run.phase != "train" or self.done:
            return
        self.seen += 1
        if self.profile is not None:
            self.recorded += 1
            if self.recorded == self.steps:
                self._finish(run)
            else:
                self.profile.step()
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
        table = run.folder / "profile.txt"
        trace = write_trace(self.profile, run.folder)
        order = f"self_{'cuda' if run.device.type == 'cuda' else 'cpu'}_time_total"
        rows = [x for x in self.profile.key_averages() if not x.key.startswith("ProfilerStep")]
        text = EventList(rows).table(sort_by=order, row_limit=ROWS)
        write_atomically(text.encode(), table)
        self.files = (
            f"{trace}: a trace of {plural(self.recorded, 'step')} for https://ui.perfetto.dev; "
            f"{table}: the ten most expensive operations"
        )
        get_logger().info("%s\n%s", self.files, text)
        self.profile = None

    def on_end(self, run: Run) -> None:
        if self.profile is not None:
            self.profile.stop()
        if self.files:
            get_logger().info("%s", self.files)
        elif run.is_complete and self.seen and not self.done:
            text = "hook profiler: the run ended before step %d, so there is no profile"
            get_logger().warning(text, self.skip + 1)


def write_trace(profiled: profile, folder: Path) -> Path:
    """Write profile.json, or profile.json.gz if it is large; returns its path."""
    path = folder / "profile.json"
    compressed = path.with_suffix(".json.gz")
    compressed.unlink(missing_ok=True)  # of a run before
    profiled.export_chrome_trace(str(path))
    if path.stat().st_size < LARGE:
        return path
    with path.open("rb") as plain, gzip.open(compressed, "wb") as file:
        shutil.copyfileobj(plain, file)
    path.unlink()
    return compressed


def profile_probe(probe: Any, size: int) -> None:
    """Profile steps of a dry run if --profile asks for it; every rank must call it.

    probe: the StepProbe; size: images in a batch.
    """
    if not probe.run.args.profile:
        return
    hook = ProfilerHook(skip=2)
    times = (hook.skip + hook.steps) * probe.run.loop.stepper.update_freq
    if is_main_process():
        probe.run.folder.mkdir(parents=True, exist_ok=True)
    probe.train(probe.batches(size, times), [hook] * is_main_process())
