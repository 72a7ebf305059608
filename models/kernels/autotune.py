# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Choose the fastest implementation of an operation by timing on this device, once.

python -c "from models.kernels import autotune; print(autotune.cache_file('cpu'))"
"""

import importlib.util
import json
import math
import os
import platform
import re
import timeit
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from errors import UserError
from parallel.process_group import agree, get_logger
from utils import write_atomically

VERSION = 2  # raise it with every change of an implementation: timings before it are ignored
GAIN = 0.9  # take another implementation only below this fraction of the first one's time
ROUNDS = 5  # of timing; the shortest counts
PATIENCE = 2.0  # seconds to wait for the lock of the cache file


class Autotuner:
    """The implementation of each operation and shape; one object for the process.

    implementations: name -> function, all with equal results, torch's own first.
    """

    def __init__(self) -> None:
        self.mode = "auto"
        self.chosen: dict[tuple, str] = {}
        self.timed: dict[str, dict[str, str]] = {}  # choices of mode auto: see `state`
        self.seconds: dict[str, dict[str, float]] = {}  # entry -> times measured here

    def choose(
        self, op: str, implementations: dict, key: tuple, like: Tensor, sample: Callable[[], tuple]
    ) -> str:
        """Name of the implementation for tensors such as `like`; `sample()` is timed."""
        fake = type(like) not in (Tensor, torch.nn.Parameter)
        if fake or _get_current_dispatch_mode() is not None:  # such as a counter of operations
            return next(iter(implementations))
        question = (op, like.device.type, like.dtype, key)
        if question not in self.chosen:
            self.chosen[question] = self._decide(op, implementations, key, like, sample)
        return self.chosen[question]

    def _decide(
        self, op: str, implementations: dict, key: tuple, like: Tensor, sample: Callable[[], tuple]
    ) -> str:
        if self.mode == "triton" and "triton" in implementations:
            return "triton"
        # Triton's interpreter is for tests, under --kernels triton.
        usable = {"native": like.is_cuda, "triton": like.is_cuda and _has_triton()}
        names = [name for name in implementations if usable.get(name, True)]
        if len(names) == 1 or self.mode != "auto":
            return names[0]
        device = like.device
        machine = _machine(device.type)
        entry = " ".join([op, str(like.dtype).removeprefix("torch."), *map(str, key)])
        own = self.timed.get(machine, {})
        if own.get(entry) not in names:
            name = _read(device.type).get(entry)
            if name not in names:
                times = {n: measure(implementations[n], sample(), device) for n in names}
                self.seconds[entry] = times
                best = min(names, key=times.get)
                name = best if times[best] < GAIN * times[names[0]] else names[0]
                if max(times.values()) < math.inf:  # a failure may be one of this run alone
                    name = _store(device.type, entry, name, names)
            own = self.timed.setdefault(machine, {})
            own[entry] = agree(f"{machine} {entry}", name)
        return own[entry]

    def state(self) -> dict[str, dict[str, str]]:
        """The run's choices, by device and versions, as plain types for its checkpoints."""
        return {machine: dict(entries) for machine, entries in self.timed.items()}

    def restore(self, state: Mapping[str, Mapping[str, str]], device: torch.device) -> None:
        """Continue with the choices of `state()`, unless the device or a version has changed."""
        self.timed = {machine: dict(entries) for machine, entries in state.items()}
        here = _machine(device.type)
        if self.mode == "auto" and state and here not in state:
            text = "kernels: choosing again, since the run was on %s and this is %s"
            get_logger().warning(text, " and ".join(state), here)

    def summary(self) -> str:
        """Implementations in use: `gelu by torch, linear by onednn (--kernels auto: ...)`.

        An operation can occur twice, since the choice depends on the tensor shape.
        """
        texts = sorted({f"{op} by {name}" for (op, *_), name in self.chosen.items()})
        reason = ": the fastest on this device" if self.mode == "auto" else ""
        return f"{', '.join(texts) or 'none yet'} (--kernels {self.mode}{reason})"


autotuner = Autotuner()


def dispatch(op: str, implementations: dict[str, Callable], more: tuple, *args: Any) -> Any:
    """Run the fastest implementation of an operation on `args`, a tensor (N, ...) first.

    more: integers that the speed depends on, apart from the device, dtype and shape of that tensor.
    Under torch.compile the first implementation runs, which the compiler optimizes.
    """
    if len(implementations) == 1 or torch.compiler.is_compiling():
        return next(iter(implementations.values()))(*args)
    x = args[0]
    images = 1 << (x.shape[0] - 1).bit_length()  # rounded up: the last batch may be smaller
    key = (images, *x.shape[1:], *more)
    return implementations[autotuner.choose(op, implementations, key, x, lambda: args)](*args)


def set_kernels(mode: str, device: torch.device) -> None:
    """Set --kernels: auto chooses by timing, torch and triton take their own where they exist."""
    can_run = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if mode == "triton" and not (can_run and _has_triton()):
        raise UserError(
            f"--kernels triton: Triton does not run on this {device.type} device; use --kernels "
            "auto, or set TRITON_INTERPRET=1 to run the kernels slowly without a GPU"
        )
    autotuner.mode = mode
    autotuner.chosen.clear()
    autotuner.timed.clear()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.no_grad()
def measure(function: Callable, args: tuple, device: torch.device) -> float:
    """Shortest of ROUNDS calls in seconds, after one that compiles; infinity if it fails."""

    def call() -> None:
        function(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()

    try:
        return min(timeit.repeat(call, number=1, repeat=1 + ROUNDS)[1:])
    except Exception as error:  # it may not fit this device, shape or memory
        get_logger().debug("kernel left out: %s: %s", type(error).__name__, error)
        return math.inf


def cache_file(kind: str) -> Path:
    """File of the choices for a type of device: one for each device and versions."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "convnextv2" / f"{_machine(kind)}.json"


def _read(kind: str) -> dict[str, str]:
    try:
        return dict(json.loads(cache_file(kind).read_text(encoding="utf-8")))
    except (OSError, RuntimeError, TypeError, ValueError):  # absent or not ours: to be replaced
        return {}


def _store(kind: str, entry: str, name: str, names: list[str]) -> str:
    """Add a choice to the cache file; returns it, or one that another process added meanwhile."""
    from filelock import FileLock  # takes long to import

    try:
        path = cache_file(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock"), timeout=PATIENCE, poll_interval=0.01):
            found = _read(kind)
            if found.get(entry) not in names:
                found[entry] = name
                write_atomically(json.dumps(found, indent=1, sort_keys=True), path)
            return found[entry]
    except (OSError, RuntimeError) as error:  # no home directory, not writable, or no locks there
        get_logger().debug("kernels are timed in every run: %s", error)
        return name


def _machine(kind: str) -> str:
    """Name of the device and versions that a choice is valid for."""
    if kind == "cuda":
        triton = importlib.import_module("triton").__version__ if _has_triton() else "none"
        machine = f"{torch.cuda.get_device_name()} triton {triton}"
    else:
        machine = f"{kind} {_processor()} {torch.get_num_threads()} threads"
    return re.sub(r"[^\w.+]+", "-", f"{machine} torch {torch.__version__} kernels {VERSION}")


@cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    fields = dict(re.findall(r"^(.*?)\s*: (.*)$", text, re.MULTILINE))
    return " ".join(fields.get(key, "") for key in ("model name", "cpu family", "model"))
