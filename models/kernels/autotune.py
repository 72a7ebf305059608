# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Which of several equal computations runs: the fastest on this device, measured once and kept.

python -c "from models.kernels import autotune; print(autotune.cache_file('cpu'))"
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import time
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

FORMS = 1  # raise it with every change of a form: what was measured before counts no more
GAIN = 0.9  # share of the first form's time that another must stay below to be taken
ROUNDS = 5  # of which the shortest counts
PATIENCE = 2.0  # seconds to wait for the lock of the file; then it is written without
CUDA_ONLY = ("native", "triton")  # Triton's interpreter serves tests, under --kernels triton

REAL = (Tensor, torch.nn.Parameter)

Forms = dict[str, Callable]  # name -> function; all equal, and torch's own comes first


class Choices:
    """The form taken for each operation and shape; one for the process, as `torch.backends`."""

    def __init__(self) -> None:
        self.mode = "auto"
        self.taken: dict[tuple, str] = {}
        self.saved: dict[str, dict[str, str]] = {}  # of the run that is resumed, as in `state()`
        self.kept: dict[str, dict[str, str]] = {}  # device type -> what its file holds
        self.seconds: dict[str, dict[str, float]] = {}  # entry -> of each form measured here

    def pick(
        self, op: str, forms: Forms, key: tuple, like: Tensor, sample: Callable[[], tuple]
    ) -> str:
        """The name of the form to run for tensors as `like`; `sample()` is what to measure on."""
        question = (op, like.device.type, like.dtype, key)
        if question not in self.taken:
            if type(like) not in REAL or _get_current_dispatch_mode() is not None:
                return next(iter(forms))  # fake tensors, or somebody counts: no time to measure
            name = self._decide(op, forms, key, like, sample)
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return name  # perhaps only because nothing can be measured now
            self.taken[question] = name
        return self.taken[question]

    def _decide(
        self, op: str, forms: Forms, key: tuple, like: Tensor, sample: Callable[[], tuple]
    ) -> str:
        device, names = like.device, list(forms)
        if self.mode == "triton" and "triton" in names:
            return "triton"
        if not like.is_cuda:
            names = [name for name in names if name not in CUDA_ONLY]
        elif not runs_triton(device):
            names = [name for name in names if name != "triton"]
        if len(names) == 1 or self.mode != "auto":
            return names[0]
        entry = _entry(op, like.dtype, key)
        saved = self.saved.get(_machine(device.type), {}).get(entry)
        if saved in names:
            return saved
        if saved is not None:
            get_logger().warning("kernels: %s has no form %s here, choosing anew", entry, saved)
        kept = self._kept(device.type)
        if kept.get(entry) not in names:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return names[0]  # nothing can be measured into a CUDA graph
            seconds = {names[0]: measure(forms[names[0]], sample(), device)}
            seconds |= {name: self._try(forms[name], sample(), like) for name in names[1:]}
            self.seconds[entry] = seconds
            best = min(seconds, key=seconds.__getitem__)
            kept[entry] = best if seconds[best] < GAIN * seconds[names[0]] else names[0]
            self._keep(device.type, entry, names)
        name = self.kept[device.type][entry]
        agreed = agree(f"{_machine(device.type)} {entry}", name)
        return agreed if agreed in names else name

    def _try(self, form: Callable, args: tuple, like: Tensor) -> float:
        try:
            return measure(form, args, like.device)
        except Exception as error:  # it may not fit this device, shape or memory: others do
            get_logger().debug("kernel left out: %s: %s", type(error).__name__, error)
            return math.inf

    def _kept(self, kind: str) -> dict[str, str]:
        if kind not in self.kept:
            self.kept[kind] = _read(kind)
        return self.kept[kind]

    def _keep(self, kind: str, entry: str, names: list[str]) -> None:
        """Add an entry to the file, or take what another process has added since it was read."""
        try:
            path = cache_file(kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent / ".lock"):
                found = _read(kind)
                if found.get(entry) not in names:
                    found[entry] = self.kept[kind][entry]
                    write_atomically(json.dumps(found, indent=1, sort_keys=True), path)
            self.kept[kind] = found
        except (OSError, RuntimeError) as error:  # no home, or it cannot be written
            get_logger().debug("kernels are measured in every run: %s", error)

    def state(self) -> dict[str, dict[str, str]]:
        """The run's choices, by device and versions, as plain types for its checkpoints."""
        state = {machine: dict(entries) for machine, entries in self.saved.items()}
        for (op, kind, dtype, key), name in self.taken.items() if self.mode == "auto" else ():
            state.setdefault(_machine(kind), {})[_entry(op, dtype, key)] = name
        return state

    def restore(self, state: Mapping[str, Mapping[str, str]], device: torch.device) -> None:
        """Continue with the choices of `state()`, unless the device or a version has changed."""
        self.saved = {machine: dict(entries) for machine, entries in state.items()}
        here = _machine(device.type)
        if self.mode == "auto" and state and here not in state:
            text = "kernels: choosing anew, since the run was on %s and this is %s"
            get_logger().warning(text, " and ".join(state), here)

    def summary(self) -> str:
        """What runs, for the log: `depthwise triton 3, torch 1; product onednn 1`."""
        counts: dict[str, dict[str, int]] = {}
        for (op, *_), name in self.taken.items():
            of_op = counts.setdefault(op, {})
            of_op[name] = of_op.get(name, 0) + 1
        texts = [
            f"{op} {', '.join(f'{name} {count}' for name, count in sorted(of_op.items()))}"
            for op, of_op in sorted(counts.items())
        ]
        return f"{self.mode}: {'; '.join(texts) or 'one form of everything'}"


def _read(kind: str) -> dict[str, str]:
    try:
        return dict(json.loads(cache_file(kind).read_text(encoding="utf-8")))
    except (OSError, RuntimeError, TypeError, ValueError):  # absent, or not ours: written anew
        return {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file; continue without if it takes too long, or nothing can be locked."""
    with open(path, "a") as file:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield


choices = Choices()


def _entry(op: str, dtype: torch.dtype, key: tuple) -> str:
    return " ".join([op, str(dtype).removeprefix("torch."), *map(str, key)])


def size(x: Tensor, *more: int) -> tuple[int, ...]:
    """A key for `run`: the shape, images in powers of two, since a last batch may be smaller.

    Nothing while compiling, when a key would tie the graph to one batch size.
    """
    if torch.compiler.is_compiling():
        return ()
    return 1 << (x.shape[0] - 1).bit_length(), *x.shape[1:], *more


def run(op: str, forms: Forms, key: tuple, *args: Any) -> Any:
    """The operation on `args`, a tensor first, in the form that is fastest for its `key`.

    key: what the speed depends on, apart from device and dtype. Under torch.compile the first
    form runs: what the compiler sees is its to make fast.
    """
    if len(forms) == 1 or torch.compiler.is_compiling():
        return next(iter(forms.values()))(*args)
    return forms[choices.pick(op, forms, key, args[0], lambda: args)](*args)


def set_kernels(mode: str, device: torch.device) -> None:
    """auto: the fastest by measurement; torch: torch's own; triton: Triton's where there is one."""
    if mode not in KERNELS:
        raise UserError(f"--kernels {mode}: expected one of {', '.join(KERNELS)}")
    if mode == "triton" and not runs_triton(device):
        raise UserError(
            f"--kernels triton: Triton does not run on this {device.type} device; use --kernels "
            "auto, or set TRITON_INTERPRET=1 to run the kernels slowly without a GPU"
        )
    choices.mode = mode
    choices.taken.clear()
    choices.saved.clear()


@contextmanager
def only_torch() -> Iterator[None]:
    """Within it torch's own forms run: for what counts or traces torch's operations."""
    before = choices.mode, choices.taken
    choices.mode, choices.taken = "torch", {}
    try:
        yield
    finally:
        choices.mode, choices.taken = before


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels can run there: on CUDA, or anywhere in its interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.no_grad()
def measure(form: Callable, args: tuple, device: torch.device) -> float:
    """Seconds a call takes, at best, after one that compiles and warms up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(1 + ROUNDS):
        wait()
        start = time.perf_counter()
        form(*args)
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def cache_file(kind: str) -> Path:
    """Where choices for a type of device are kept: a file per device and versions."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "convnextv2" / f"{_machine(kind)}.json"


def _machine(kind: str) -> str:
    """The device and the versions that a choice holds for."""
    if kind == "cuda":
        machine = f"{torch.cuda.get_device_name()} triton {_triton_version()}"
    else:
        machine = f"{kind} {_processor()} {torch.get_num_threads()} threads"
    return re.sub(r"[^\w.+]+", "-", f"{machine} torch {torch.__version__} forms {FORMS}")


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
