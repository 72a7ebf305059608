# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Choose the fastest implementation of an operation by timing on this device, once.

python -c "from models.kernels import autotune; print(autotune.cache_file('cpu'))"
"""

import atexit
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from config.cores import cpu_name
from errors import UserError
from parallel.process_group import agree, get_logger
from utils import write_atomically

VERSION = 2  # raise it with every change of an implementation: timings before it are ignored
GAIN = 0.9  # take another implementation only below this fraction of the first one's time
STABLE = 5  # rounds of timing without news, after which the answer is final
ROUNDS = 50  # at most
NEWS = 0.95  # a time below this fraction of the shortest one before is news
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
        self.unsaved: dict[str, dict[str, str]] = {}  # type of device -> entries for its file

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
                args = sample()
                times, stable = measure({n: implementations[n] for n in names}, args, device)
                self.seconds[entry] = times
                name = fastest(times)
                if stable:
                    atexit.register(self.save)
                    self.unsaved.setdefault(device.type, {})[entry] = name
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

    def save(self) -> None:
        """Add the choices that were measured since the last call to their cache file."""
        atexit.unregister(self.save)
        unsaved, self.unsaved = self.unsaved, {}
        for kind, entries in unsaved.items():
            _store(kind, entries)

    def summary(self) -> str:
        """Implementations in use: `gelu by torch, linear by onednn (--kernels auto: ...)`.

        An operation can occur twice, since the choice depends on the tensor shape.
        """
        texts = sorted({f"{op} by {name}" for (op, *_), name in self.chosen.items()})
        reason = ": the fastest on this device" if self.mode == "auto" else ""
        return f"{', '.join(texts)} (--kernels {self.mode}{reason})"


autotuner = Autotuner()


def dispatch(op: str, implementations: dict[str, Callable], more: tuple, *args: Any) -> Any:
    """Run the fastest implementation of an operation on `args`, a tensor (N, ...) first.

    more: integers that the speed depends on, apart from the device, dtype and shape of that tensor.
    One choice serves all sizes up to the same power of two, channels excepted: images, heights and
    widths may differ at every call. Under torch.compile the first implementation runs, which the
    compiler optimizes.
    """
    if len(implementations) == 1 or torch.compiler.is_compiling():
        return next(iter(implementations.values()))(*args)
    x = args[0]
    key = (*map(round_up, x.shape[:-1]), x.shape[-1], *more)
    return implementations[autotuner.choose(op, implementations, key, x, lambda: args)](*args)


def round_up(size: int) -> int:
    """The smallest power of two that is not below `size`; 0 stays 0."""
    return 1 << (size - 1).bit_length() if size else 0


def set_kernels(mode: str, device: torch.device) -> None:
    """Set --kernels: auto chooses by timing, torch and triton take their own where they exist."""
    can_run = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if mode == "triton" and not (can_run and _has_triton()):
        raise UserError(
            f"--kernels triton: Triton does not run on this {device.type} device; use --kernels "
            "auto, or set TRITON_INTERPRET=1 to run the kernels slowly without a GPU"
        )
    autotuner.save()
    autotuner.mode = mode
    autotuner.chosen.clear()
    autotuner.timed.clear()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fastest(seconds: dict[str, float]) -> str:
    """Name of the shortest time; the first one unless another is clearly shorter."""
    first, best = next(iter(seconds)), min(seconds, key=seconds.get)
    return best if seconds[best] < GAIN * seconds[first] else first


@torch.no_grad()
def measure(
    implementations: dict[str, Callable], args: tuple, device: torch.device
) -> tuple[dict[str, float], bool]:
    """Shortest call of each in seconds, infinity if it fails; and True if the answer is stable.

    A round calls each once, so that another program slows down all of them. The first round, which
    compiles, is not counted. The answer is stable after STABLE rounds that do not change it and in
    which no time becomes clearly shorter. If one fails, it may do so in this run alone.
    """
    seconds = dict.fromkeys(implementations, math.inf)
    failed, unchanged = set(), 0
    for number in range(1 + ROUNDS):
        before = dict(seconds)
        for name in [name for name in implementations if name not in failed]:
            try:
                start = time.perf_counter()
                implementations[name](*args)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    seconds[name] = min(seconds[name], time.perf_counter() - start)
            except Exception as error:  # it may not fit this device, shape or memory
                get_logger().debug("kernel left out: %s: %s", type(error).__name__, error)
                failed.add(name)
                seconds[name] = math.inf
        news = any(seconds[name] < NEWS * before[name] for name in seconds)
        unchanged = 0 if news or fastest(seconds) != fastest(before) else unchanged + 1
        if unchanged == STABLE:
            break
    return seconds, unchanged == STABLE and not failed


def cache_file(kind: str) -> Path:
    """File of the choices for a type of device: one for each device and versions."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "convnextv2" / f"{_machine(kind)}.json"


def _read(kind: str) -> dict[str, str]:
    try:
        return dict(json.loads(cache_file(kind).read_text(encoding="utf-8")))
    except (OSError, RuntimeError, TypeError, ValueError):  # absent or not ours: to be replaced
        return {}


def _store(kind: str, entries: dict[str, str]) -> None:
    """Add choices to the cache file, which other processes may have changed meanwhile."""
    from filelock import FileLock  # takes long to import

    try:
        path = cache_file(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock"), timeout=PATIENCE, poll_interval=0.01):
            found = _read(kind)
            if not entries.items() <= found.items():
                write_atomically(json.dumps(found | entries, indent=1, sort_keys=True), path)
    except (OSError, RuntimeError) as error:  # no home directory, not writable, or no locks there
        get_logger().debug("kernels are timed in every run: %s", error)


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
    return cpu_name(numbers=True)
