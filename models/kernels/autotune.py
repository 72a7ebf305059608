# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Choose the fastest implementation of an operation by timing on this device, once.

python -c "from models.kernels import autotune; print(autotune.cache_file('cpu'))"
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from config.flags import KERNELS
from errors import UserError
from parallel.process_group import agree, get_logger
from utils import write_atomically

VERSION = 1  # raise it with every change of an implementation: timings before it are ignored
GAIN = 0.9  # take another implementation only below this fraction of the first one's time
ROUNDS = 5  # of timing; the shortest counts
PATIENCE = 2.0  # seconds to wait for the lock of the cache file before writing without it
REAL = (Tensor, torch.nn.Parameter)


class Autotuner:
    """The implementation of each operation and shape; one object for the process.

    implementations: name -> function, all with equal results, torch's own first.
    """

    def __init__(self) -> None:
        self.mode = "auto"
        self.chosen: dict[tuple, str] = {}
        self.restored: dict[str, dict[str, str]] = {}  # of the resumed run, as in `state()`
        self.cached: dict[str, dict[str, str]] = {}  # device type -> content of its cache file
        self.seconds: dict[str, dict[str, float]] = {}  # entry -> times measured here

    def choose(
        self, op: str, implementations: dict, key: tuple, like: Tensor, sample: Callable[[], tuple]
    ) -> str:
        """Name of the implementation for tensors such as `like`; `sample()` is timed."""
        question = (op, like.device.type, like.dtype, key)
        if question not in self.chosen:
            if type(like) not in REAL or _get_current_dispatch_mode() is not None:
                return next(iter(implementations))  # fake tensors or counting modes: no timing
            name = self._decide(op, implementations, key, like, sample)
            if _capturing(like):
                return name  # perhaps only because nothing can be timed now
            self.chosen[question] = name
        return self.chosen[question]

    def _decide(
        self, op: str, implementations: dict, key: tuple, like: Tensor, sample: Callable[[], tuple]
    ) -> str:
        device = like.device
        if self.mode == "triton" and "triton" in implementations:
            return "triton"
        # Triton's interpreter is for tests, under --kernels triton.
        usable = {"native": like.is_cuda, "triton": like.is_cuda and _has_triton()}
        names = [name for name in implementations if usable.get(name, True)]
        if len(names) == 1 or self.mode != "auto":
            return names[0]
        entry = _entry(op, like.dtype, key)
        restored = self.restored.get(_machine(device.type), {}).get(entry)
        if restored in names:
            return restored
        if restored is not None:
            text = "kernels: the run's choice for %s, %s, does not exist here; choosing again"
            get_logger().warning(text, entry, restored)
        if device.type not in self.cached:
            self.cached[device.type] = _read(device.type)
        cached = self.cached[device.type]
        if cached.get(entry) not in names:
            if _capturing(like):
                return names[0]  # nothing can be timed within a CUDA graph
            first, *others = (implementations[name] for name in names)
            times = [measure(first, sample(), device)]
            times += [_try_to_measure(other, sample(), device) for other in others]
            self.seconds[entry] = dict(zip(names, times, strict=True))
            best = min(times)
            cached[entry] = names[times.index(best) if best < GAIN * times[0] else 0]
            self._store(device.type, entry, names)
        name = self.cached[device.type][entry]
        agreed = agree(f"{_machine(device.type)} {entry}", name)
        return agreed if agreed in names else name

    def _store(self, kind: str, entry: str, names: list[str]) -> None:
        """Add an entry to the cache file, or adopt one that another process has added meanwhile."""
        from filelock import FileLock  # takes long to import

        try:
            path = cache_file(kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(".lock"))
            with suppress(OSError, NotImplementedError):  # too slow, or no locks on this disk
                lock.acquire(timeout=PATIENCE, poll_interval=0.01)
            try:
                found = _read(kind)
                if found.get(entry) not in names:
                    found[entry] = self.cached[kind][entry]
                    write_atomically(json.dumps(found, indent=1, sort_keys=True), path)
            finally:
                lock.release()
            self.cached[kind] = found
        except (OSError, RuntimeError) as error:  # no home directory, or it is not writable
            get_logger().debug("kernels are timed in every run: %s", error)

    def state(self) -> dict[str, dict[str, str]]:
        """The run's choices, by device and versions, as plain types for its checkpoints."""
        state = {machine: dict(entries) for machine, entries in self.restored.items()}
        for (op, kind, dtype, key), name in self.chosen.items() if self.mode == "auto" else ():
            state.setdefault(_machine(kind), {})[_entry(op, dtype, key)] = name
        return state

    def restore(self, state: Mapping[str, Mapping[str, str]], device: torch.device) -> None:
        """Continue with the choices of `state()`, unless the device or a version has changed."""
        self.restored = {machine: dict(entries) for machine, entries in state.items()}
        here = _machine(device.type)
        if self.mode == "auto" and state and here not in state:
            text = "kernels: choosing again, since the run was on %s and this is %s"
            get_logger().warning(text, " and ".join(state), here)

    def summary(self) -> str:
        """Choices for the log: `--kernels auto: linear onednn for 1 shape, torch for 2 shapes`."""
        counts = Counter((op, name) for (op, *_), name in self.chosen.items())
        texts: dict[str, list[str]] = {}
        for (op, name), count in sorted(counts.items()):
            shapes = f"{count} shape{'s' * (count > 1)}"
            texts.setdefault(op, []).append(f"{name} for {shapes}")
        text = "; ".join(f"{op} {', '.join(names)}" for op, names in texts.items())
        return f"--kernels {self.mode}: {text or 'no operation has a choice'}"


autotuner = Autotuner()


def shape_key(x: Tensor, *more: int) -> tuple[int, ...]:
    """A key for `dispatch`: the shape, with images rounded up to a power of two.

    The last batch may be smaller. Empty while compiling: a key would fix the graph's batch size.
    """
    if torch.compiler.is_compiling():
        return ()
    return 1 << (x.shape[0] - 1).bit_length(), *x.shape[1:], *more


def dispatch(op: str, implementations: dict[str, Callable], key: tuple, *args: Any) -> Any:
    """Run the fastest implementation of an operation on `args`, a tensor first.

    key: what the speed depends on, apart from device and dtype. Under torch.compile the first
    implementation runs, which the compiler optimizes.
    """
    if len(implementations) == 1 or torch.compiler.is_compiling():
        return next(iter(implementations.values()))(*args)
    return implementations[autotuner.choose(op, implementations, key, args[0], lambda: args)](*args)


def set_kernels(mode: str, device: torch.device) -> None:
    """Set --kernels: auto chooses by timing, torch and triton take their own where they exist."""
    if mode not in KERNELS:
        raise UserError(f"--kernels {mode}: expected one of {', '.join(KERNELS)}")
    if mode == "triton" and not runs_triton(device):
        raise UserError(
            f"--kernels triton: Triton does not run on this {device.type} device; use --kernels "
            "auto, or set TRITON_INTERPRET=1 to run the kernels slowly without a GPU"
        )
    autotuner.mode = mode
    autotuner.chosen.clear()
    autotuner.restored.clear()


@contextmanager
def only_torch() -> Iterator[None]:
    """Use torch's own implementations, for code that counts or traces torch's operations."""
    before = autotuner.mode, autotuner.chosen
    autotuner.mode, autotuner.chosen = "torch", {}
    try:
        yield
    finally:
        autotuner.mode, autotuner.chosen = before


def runs_triton(device: torch.device) -> bool:
    """True on CUDA, or anywhere in Triton's interpreter, if Triton is installed."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def measure(function: Callable, args: tuple, device: torch.device) -> float:
    """Seconds of the fastest of ROUNDS calls, after one that compiles and warms up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(1 + ROUNDS):
        wait()
        start = time.perf_counter()
        function(*args)
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _try_to_measure(function: Callable, args: tuple, device: torch.device) -> float:
    try:
        return measure(function, args, device)
    except Exception as error:  # it may not fit this device, shape or memory
        get_logger().debug("kernel left out: %s: %s", type(error).__name__, error)
        return math.inf


# --- the cache file --------------------------------------------------------------------------


def cache_file(kind: str) -> Path:
    """File of the choices for a type of device: one for each device and versions."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "convnextv2" / f"{_machine(kind)}.json"


def _read(kind: str) -> dict[str, str]:
    try:
        return dict(json.loads(cache_file(kind).read_text(encoding="utf-8")))
    except (OSError, RuntimeError, TypeError, ValueError):  # absent or not ours: to be replaced
        return {}


def _entry(op: str, dtype: torch.dtype, key: tuple) -> str:
    return " ".join([op, str(dtype).removeprefix("torch."), *map(str, key)])


def _machine(kind: str) -> str:
    """Name of the device and versions that a choice is valid for."""
    if kind == "cuda":
        machine = f"{torch.cuda.get_device_name()} triton {_triton_version()}"
    else:
        machine = f"{kind} {_processor()} {torch.get_num_threads()} threads"
    return re.sub(r"[^\w.+]+", "-", f"{machine} torch {torch.__version__} kernels {VERSION}")


def _triton_version() -> str:
    for package in ("triton", "pytorch-triton", "triton-windows"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "none"


@cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    fields = dict(re.findall(r"^(.*?)\s*: (.*)$", text, re.MULTILINE))
    return " ".join(fields.get(key, "") for key in ("model name", "cpu family", "model"))
