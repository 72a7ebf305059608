# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Hooks by name, for --hook; the reporter of a run with the hooks that the flags choose.

python -c "from training.hook_table import HOOKS; print(*HOOKS)"
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.calls import Call, accepted, parse_call
from config.flags import is_pretraining
from config.parser import dump_args
from errors import UserError, a_type, describe_error, resolve_for
from models.heads import implied_activation
from parallel.process_group import get_logger, is_main_process
from training.checkpoint import TrainState
from training.costs import CostsHook
from training.export_hook import ExportHook
from training.hooks import Hook, Reporter, Run
from training.html_report import HtmlReport
from training.log_files import ConfusionHook, CsvHook, ImageHook, JsonHook, ScheduleHook
from training.log_lines import BarHook, LineHook
from training.predictions import PredictionsHook
from training.profiler import ProfilerHook
from training.speed import build_speed
from training.steps import Steps
from training.tensorboard import (
    GraphHook,
    HistogramHook,
    HparamsHook,
    TensorboardHook,
    log_folder,
)
from training.trackers import build_tracker
from training.worst_images import WorstImages
from utils import write_atomically

HOOKS: dict[str, Callable[..., Hook]] = {
    "costs": CostsHook,
    "csv": CsvHook,
    "export": ExportHook,
    "graph": GraphHook,
    "histograms": HistogramHook,
    "hparams": HparamsHook,
    "predictions": PredictionsHook,
    "profiler": ProfilerHook,
    "schedule": ScheduleHook,
}
_NO_HOOK = f"expected a subclass of {Hook.__module__}.Hook, or a function that returns such a hook"
IN_EVALUATION = ("costs", "predictions")  # those that act with --eval, besides a user's


def find_hooks(args: Any) -> dict[str, tuple[Call, Callable[..., Hook]]]:
    """Return the call and the class of each --hook by its name, which is that of its state.

    --profile is the same as --hook profiler, and leaves the arguments to that if both are given.
    """
    found: dict[str, tuple[Call, Callable[..., Hook]]] = {}
    texts = list(args.hook or ())
    given = any(parse_call(text, "--hook").name == "profiler" for text in texts)
    if vars(args).get("profile") and not (given or vars(args).get("eval")):
        texts.append("profiler")
    for text in texts:
        call = parse_call(text, "--hook")
        make = resolve_for("--hook", call.name, HOOKS, "hook", importable=True)
        if not callable(make):
            raise UserError(f"--hook {call.name} is {a_type(make)}, expected a class of hooks")
        if isinstance(make, type) and not issubclass(make, Hook):
            raise UserError(f"--hook {call.name} is no hook; {_NO_HOOK}")
        name, number = call.name, 2
        while name in found:
            name, number = f"{call.name} {number}", number + 1
        if name != call.name and call.name in HOOKS:
            raise UserError(f"--hook {call.name} is given twice; give it once")
        found[name] = call, make
        try:
            inspect.signature(make).bind(*call.args, **call.kwargs)
        except TypeError as error:
            raise UserError(f"--hook {call}: {error}; it takes {accepted(make)}") from error
        except ValueError:  # no signature
            pass
    return found


def idle_hooks(args: Any) -> list[str]:
    """Return the names of the hooks that are for training, with --eval, which has none."""
    names = find_hooks(args) if vars(args).get("eval") else ()
    return [name for name in names if name in HOOKS and name not in IN_EVALUATION]


def create_hooks(args: Any) -> dict[str, Hook]:
    """Create the hooks of --hook and --tracker that this rank calls, by name."""
    idle, evaluates = idle_hooks(args), vars(args).get("eval")
    hooks = {name: _create(*found) for name, found in find_hooks(args).items() if name not in idle}
    if is_main_process() and not evaluates and (tracker := build_tracker(args)):
        hooks[tracker.call.name] = tracker
    return {name: hook for name, hook in hooks.items() if is_main_process() or hook.every_rank}


def _create(call: Call, make: Callable[..., Hook]) -> Hook:
    try:
        hook = make(*call.args, **call.kwargs)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--hook {call}: {describe_error(error)}") from error
    if not isinstance(hook, Hook):
        raise UserError(f"--hook {call.name} gives {a_type(hook)}; {_NO_HOOK}")
    return hook


def check_hooks(args: Any) -> None:
    """Raise UserError, before data is listed, for hooks that cannot work with the flags.

    Classes of the user's own are found here, with their arguments, and hooks of them created later;
    a function is also called here. Hooks of training do nothing with --eval, which may have the
    flags of a run from its args.yaml.
    """
    check_built_in_hooks(args)
    for name, (call, make) in find_hooks(args).items():
        if name not in HOOKS and not isinstance(make, type):  # its result may be no hook
            _create(call, make)
    if not vars(args).get("eval"):
        build_tracker(args)


def check_built_in_hooks(args: Any) -> None:
    """Raise UserError for hooks of this table that cannot work with the flags."""
    idle = idle_hooks(args)
    for name, (call, make) in find_hooks(args).items():
        if name in HOOKS and name not in idle:
            _create(call, make).check(args)


def build_reporter(
    args: Any,
    folder: Path | None,
    device: torch.device,
    state: TrainState,
    steps: Steps,
    top5: bool = True,
    classes: Sequence[str] | None = None,
    flops: Mapping[int, float] | None = None,
) -> Reporter:
    """Build the reporter; on entering it, rank 0 opens the hooks that the flags choose.

    top5: show top-5 accuracies, which say nothing with five classes or fewer. classes: their names.
    flops: of training on one image, by epoch, for the MFU.
    """
    worst = None
    if folder and not is_pretraining(vars(args)):
        worst = WorstImages(implied_activation(vars(args).get("loss") or "ce"), classes)
    return Reporter(
        [],
        device,
        state,
        steps=steps,
        print_freq=args.print_freq,
        open_hooks=partial(_build_hooks, args, folder, top5, classes),
        observers=create_hooks(args),
        run=Run(args, folder, state, device, classes),
        speed=build_speed(args, device, steps, flops),
        worst=worst,
    )


def build_eval_reporter(
    args: Any, device: torch.device, model: nn.Module, classes: Sequence[str] | None
) -> Reporter:
    """Build the reporter of --eval, which calls the hooks of --hook alone."""
    reporter = Reporter.quiet(device)
    folder = Path(args.output_dir) if args.output_dir else None
    reporter.run = Run(args, folder, reporter.state, device, classes, model)
    reporter.observers = create_hooks(args)
    reporter.open_hooks = lambda reporter: list(reporter.observers.values())
    return reporter


def _build_hooks(
    args: Any,
    folder: Path | None,
    top5: bool,
    classes: Sequence[str] | None,
    reporter: Reporter,
) -> list[Hook]:
    state, steps = reporter.state, reporter.steps
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty()  # else `> train.log` needs the lines
    bar = args.progress == "bar" or (args.progress == "auto" and on_terminal)
    hooks: list[Hook] = [LineHook(args.epochs, top5, shown=not (bar and on_terminal))]
    get_logger().info("epochs count from 1 in these lines, from 0 in log.txt and in file names")
    at_epoch_end = steps.within(state.global_step)[0] == 0 and state.samples_in_epoch > 0
    logs, files = log_folder(args.log_dir, folder), []
    try:
        if folder:
            write_atomically(dump_args(args), folder / "args.yaml")  # for --config
            files = [ConfusionHook(folder, classes), JsonHook(folder, state), ImageHook(folder)]
            at_epoch_end |= files[1].misses
            files += [reporter.record] if reporter.record else []
        if logs:
            hooks.append(TensorboardHook(logs, state, at_epoch_end))
    except OSError as error:
        raise UserError(
            f"the run cannot write its logs ({error}); choose another --output_dir or --log_dir, "
            "or free some space"
        ) from error
    bars = [BarHook(args.epochs, state, steps.total)] if bar else []
    pages = [HtmlReport(folder)] if folder and args.report else []  # ends after the other files
    return [*bars, *hooks, *pages, *reporter.observers.values(), *files]
