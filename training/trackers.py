# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Experiment trackers: Weights & Biases, trackio, and others with the same calls.

python main_finetune.py --recipe digits_finetune --tracker "wandb(mode=offline)" --project digits
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from config.calls import Call, parse_call
from config.flags import is_pretraining
from config.parser import absolute_paths
from config.sizes import as_one_flag
from errors import UserError, a_type, describe_error, resolve_for
from training.checkpoint import TrainState
from training.hooks import Hook, Run
from training.report import Record, small_stats


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"cannot import it ({error}); pip install {name}, or drop --tracker"
        ) from error


# Name -> function that returns an object with `init`, whose result has `log` and `finish`.
TRACKERS: dict[str, Callable[[], Any]] = {
    "wandb": partial(_import, "wandb"),
    "trackio": partial(_import, "trackio"),
}


class TrackerHook(Hook):
    """Send flags, values of log lines and epochs, and images to an experiment tracker.

    call: of TRACKERS or `package.module:function`, with further arguments of its `init`. A run that
    resumes continues the tracker's run: the checkpoint holds its name and id.
    """

    def __init__(self, call: Call, project: str, tags: Sequence[str] | None) -> None:
        self.call, self.project, self.tags = call, project, list(tags or [])
        self.module = _find(call)
        self.accepted = inspect.signature(self.module.init).parameters
        self.open = any(word.kind is word.VAR_KEYWORD for word in self.accepted.values())
        unknown = [name for name in call.kwargs if not (self.open or name in self.accepted)]
        if unknown or call.args:
            wrong = f"has no argument {unknown[0]}" if unknown else "takes arguments by name"
            raise UserError(
                f"--tracker {call}: init of {call.name} {wrong}; accepted: "
                f"{', '.join(self.accepted)}"
            )
        self.own: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.own)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own = dict(state)

    def on_start(self, run: Run) -> None:
        words = {"project": self.project, "config": flags_of(run.args)}
        words["resume"] = "allow" if self.own else "never"
        words |= {"dir": str(run.folder)} if run.folder else {}
        words |= {"name": run.folder.name} if run.folder else {}
        words |= {"job_type": "pretrain" if is_pretraining(vars(run.args)) else "finetune"}
        words |= {"tags": self.tags} if self.tags else {}
        words |= self.own | self.call.kwargs
        if "tags" in words and not self._takes("tags"):  # trackio has none
            words["config"] |= {"tags": words.pop("tags")}
        self.tracked = self.module.init(**{n: x for n, x in words.items() if self._takes(n)})
        self.own = {
            name: str(getattr(self.tracked, name))
            for name in ("name", "id")
            if self._takes(name) and getattr(self.tracked, name, None)
        }

    def _takes(self, name: str) -> bool:
        return self.open or name in self.accepted

    def on_log(self, record: Record, state: TrainState) -> None:
        values = {f"train/{n}": x for n, x in record.items() if n not in ("step", "steps")}
        self._log(values, state)

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        found = {name: x for name, x in small_stats(stats).items() if name.startswith("test_")}
        values = {f"test/{name[5:]}": x for name, x in found.items() if not isinstance(x, list)}
        means = {f"epoch/{n}": x for n, x in stats.items() if n.startswith("train_")}
        place = {name: stats[name] for name in ("epoch", "after_epochs") if name in stats}
        self._log(values | means | place, state)

    def on_image(self, name: str, image: Tensor, state: TrainState) -> None:
        if not hasattr(self.module, "Image"):
            return
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        self._log({name: self.module.Image(pixels)}, state)

    def _log(self, values: dict[str, Any], state: TrainState) -> None:
        values = {n: x for n, x in values.items() if not (type(x) is float and math.isnan(x))}
        self.tracked.log(values, step=state.global_step)

    def on_end(self, run: Run) -> None:
        self.tracked.finish()


def _find(call: Call) -> Any:
    """Return the object with `init`, of TRACKERS or of the user's function."""
    make = resolve_for("--tracker", call.name, TRACKERS, "tracker", importable=True)
    label = f"--tracker {call.name}"
    if not callable(make):
        raise UserError(f"{label} is {a_type(make)}, expected a function")
    try:
        module = make()
    except Exception as error:  # of the user's own
        raise UserError(f"{label}: {describe_error(error)}") from error
    if not callable(getattr(module, "init", None)):
        got = a_type(module)
        raise UserError(f"{label} returned {got}, expected an object with a function init")
    return module


def flags_of(args: Any) -> dict[str, Any]:
    """Return the flags as JSON's types."""
    values = as_one_flag(absolute_paths(vars(args))).items()
    return {name: list(x) if isinstance(x, tuple) else x for name, x in values}


def build_tracker(args: Any) -> TrackerHook | None:
    """Build the hook of --tracker; None without the flag."""
    if not args.tracker:
        return None
    call = parse_call(args.tracker, "--tracker")
    return TrackerHook(call, args.project, args.tags)
