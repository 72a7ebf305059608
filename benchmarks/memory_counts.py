# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Count or measure the bytes of a training step, and estimate them for any number of GPUs.

PYTHONPATH=. python -c "from benchmarks.memory_counts import per_gpu; help(per_gpu)"
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import create_model, fcmae_name
from models.convnextv2 import Block
from models.fcmae import random_mask, visible_patches
from models.kernels import autotune, ops
from optim_factory import get_parameter_groups
from parallel.sharding import units
from training.stepper import autocast

MASK_RATIO, PATCH = 0.6, 32
SHARDS = ("ddp", "zero1", "fsdp")
FULL, HALF = 4, 2  # bytes of a number, in float32 and bf16
Shape = tuple[int, ...]

# --- estimate ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Bytes as a linear function of the images per GPU."""

    fixed: float
    each: float

    def at(self, images: float) -> float:
        return self.fixed + images * self.each


@dataclass(frozen=True)
class Work:
    """Bytes of all tensors except parameters and their gradients.

    saved: between forward and backward. peak: the maximum of these lines, because another operation
    has the peak when there are more images.
    """

    saved: Line
    peak: tuple[Line, ...]

    def at_peak(self, images: float) -> float:
        return max(line.at(images) for line in self.peak)


@dataclass(frozen=True)
class Step:
    """Sizes of one GPU's training step, from which `per_gpu` estimates its memory.

    units: shapes of the parameters that fsdp gathers together: the root's, then each block's.
    groups: sizes of the parameters in each group of the optimizer.
    full: with float32 parameters. gathered: in the step's precision, as fsdp gathers them.
    half: trains in bf16. ema: keeps EMA weights.
    """

    units: tuple[tuple[Shape, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    full: Work
    gathered: Work
    half: bool
    ema: bool


def per_gpu(step: Step, shard: str, gpus: int, images: int) -> dict[str, float]:
    """Bytes by kind on the GPU that holds the most, for `images` on each GPU.

    working: the peak beyond `saved`, or the copy of the weights that updating EMA takes, if that is
    more.
    """
    sizes = [[size_of(shape) for shape in unit] for unit in step.units]
    kept = stepped = sum(map(sum, sizes))  # numbers of this GPU, and those with optimizer state
    work, gathered = step.full, 0.0
    if shard == "zero1":
        stepped = zero1_fraction(step.groups, gpus)
    if shard == "fsdp" and gpus > 1:
        kept = stepped = sum(fsdp_fraction(shape, gpus) for unit in step.units for shape in unit)
        gathered = fsdp_gathered([sum(unit) for unit in sizes], HALF if step.half else FULL)
        work = step.gathered
    saved = work.saved.at(images)
    ema = FULL * kept * step.ema
    return {
        "weights": FULL * kept,
        "gradients": FULL * kept,
        "optimizer": 2 * FULL * stepped,
        "EMA": ema,
        "gathered": gathered,
        "saved": saved,
        "working": max(work.at_peak(images) - saved, ema - gathered - saved),
    }


def size_of(shape: Shape) -> int:
    """Return the number of elements of a tensor."""
    return torch.Size(shape).numel()


def zero1_fraction(groups: Iterable[Iterable[int]], gpus: int) -> int:
    """Parameters whose optimizer state lies on the GPU that holds the most.

    ZeroRedundancyOptimizer assigns whole tensors, the largest of a group first, to the GPU that has
    the least so far.
    """
    taken = [0] * gpus
    for group in groups:
        for size in sorted(group, reverse=True):
            taken[taken.index(min(taken))] += size
    return max(taken)


def fsdp_fraction(shape: Shape, gpus: int) -> int:
    """Elements of a parameter on one GPU: its rows of the first axis, rounded up."""
    return -(-shape[0] // gpus) * size_of(shape[1:])


def fsdp_gathered(sizes: list[int], number: int) -> float:
    """Bytes of other GPUs' parameters and gradients that a GPU holds temporarily.

    The root's parameters and gradients stay. The largest block adds its parameters, the prefetched
    ones of the next block, its gradients, and a float32 copy of these for the reduction.
    """
    root, *blocks = sizes
    return 2 * number * root + (3 * number + FULL) * max(blocks)


def images_that_fit(step: Step, shard: str, gpus: int, memory: float) -> int:
    """Return the largest micro-batch that fits into `memory` bytes per GPU, or 0."""
    low, high = 0, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        fits = sum(per_gpu(step, shard, gpus, middle).values()) <= memory
        low, high = (middle, high) if fits else (low, middle)
    return low


# --- counting on fake tensors ---------------------------------------------------------------


class Live(TorchDispatchMode):
    """Count the bytes of tensors created in this mode and still alive: now, and the peak."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: 0 for x in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, name: int) -> None:
        self.now -= self.sizes.pop(name)


def saved_by(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the bytes of distinct storages that `forward` saves for backward, and its loss.

    Parameters are not counted. Blocks that fsdp gathered are already freed again.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = local(x).untyped_storage()
        storages[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
    known = {local(x).untyped_storage()._cdata for x in model.parameters()}
    total = sum(x.nbytes() for name, x in storages.items() if name not in known)
    storages.clear()  # `pack` may live as long as what it packed
    return total, loss


def local(x: Tensor) -> Tensor:
    """Return this process's rows of a tensor that fsdp shards."""
    return x.to_local() if hasattr(x, "to_local") else x


@dataclass(frozen=True)
class Task:
    """A training step. kind: `pretrain` or `finetune`; size: side of the images in pixels."""

    model: str
    kind: str
    size: int
    checkpointing: bool
    half: bool

    def build(self) -> nn.Module:
        """Build the network in training mode."""
        name = fcmae_name(self.model) if self.kind == "pretrain" else self.model
        model = create_model(name)
        model.set_grad_checkpointing(self.checkpointing)
        return model.train()

    def forward(self, model: nn.Module, images: int) -> Callable[[], Tensor]:
        """Return a function that computes the loss of `images` random images."""
        x = torch.rand(images, 3, self.size, self.size)
        patches = (self.size // PATCH) ** 2
        visible = visible_patches(patches, MASK_RATIO)
        mask = random_mask(torch.rand(images, patches), visible)
        labels = torch.zeros(images, dtype=torch.int64)

        def loss() -> Tensor:
            with autocast(torch.device("cpu"), "bf16" if self.half else "none"):
                if self.kind == "pretrain":
                    return model(x, mask, visible)[0]
                return F.cross_entropy(model(x), labels)

        return loss


@contextlib.contextmanager
def as_on_cuda(model: nn.Module) -> Iterator[None]:
    """Let a CPU compute as CUDA does: the batch at once, CUDA's kernels and autocast rules.

    CUDA's autocast runs LayerNorm in float32; the blocks' norms do so themselves.
    """
    of_blocks = {id(block.norm) for block in model.modules() if isinstance(block, Block)}
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm) and id(m) not in of_blocks]
    hooks = [norm.register_forward_pre_hook(lambda _, args: (args[0].float(),)) for norm in norms]
    at_once = mock.patch.object(ops, "images_at_once", lambda x, elements: x.shape[0])
    try:
        # On fake tensors the mode triton runs torch's implementations for CUDA.
        with at_once, mock.patch.object(autotune.autotuner, "mode", "triton"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def count(task: Task, images: int, cuda: bool = True, gathered: bool = False) -> tuple[int, int]:
    """Return the bytes (saved, peak) of `Work`, counted on fake tensors."""
    with torch.device("meta"):
        model = task.build()
    if gathered and task.half:
        model.bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        forward = task.forward(model, images)
        with as_on_cuda(model) if cuda else contextlib.nullcontext():
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            known = [x for p in model.parameters() for x in (p, p.grad)]
            with Live(known) as live:
                saved, loss = saved_by(model, forward)
                loss.backward()
    return saved, live.peak


def count_work(task: Task, cuda: bool = True, gathered: bool = False) -> Work:
    """Return the `Work` of a task, from lines through few and many images."""
    lines = []
    for images in ((1, 2), (64, 128)):
        low, high = (count(task, number, cuda, gathered) for number in images)
        lines.append([line(images, pair) for pair in zip(low, high, strict=True)])
    (saved, peak_of_few), (_, peak_of_many) = lines
    return Work(saved, (peak_of_few, peak_of_many))


def line(images: tuple[int, int], values: tuple[float, float]) -> Line:
    """Return the line through two points."""
    each = (values[1] - values[0]) / (images[1] - images[0])
    return Line(values[0] - each * images[0], each)


def count_step(task: Task, cuda: bool = True, fsdp: bool = True) -> Step:
    """Return the `Step` of a task; fsdp: count its gathered parameters too."""
    with torch.device("meta"):
        model = task.build()
    blocks = [list(unit.parameters()) for unit in units(model)]
    in_blocks = {id(p) for block in blocks for p in block}
    root = [p for p in model.parameters() if id(p) not in in_blocks]
    groups = get_parameter_groups(model, weight_decay=0.05)
    full = count_work(task, cuda)
    return Step(
        units=tuple(tuple(tuple(p.shape) for p in unit) for unit in (root, *blocks)),
        groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
        full=full,
        gathered=count_work(task, cuda, gathered=True) if fsdp and task.half else full,
        half=task.half,
        ema=task.kind == "finetune",
    )


# --- measuring -------------------------------------------------------------------------------


def distinct(tensors: Iterable[Any]) -> int:
    """Return the bytes of the local storages of tensors, each counted once."""
    storages = [local(x).untyped_storage() for x in tensors if torch.is_tensor(x)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, forward: Callable[[], Tensor]
) -> dict[str, int]:
    """Measure this process's bytes between backward and optimizer step, and saved for backward.

    model: the module that `forward` calls, also wrapped by DistributedDataParallel or sharded.
    optimizer: also a ZeroRedundancyOptimizer.
    """
    forward().backward()
    optimizer.step()
    optimizer.zero_grad()
    saved, loss = saved_by(model, forward)
    loss.backward()
    parameters = list(model.parameters())
    state = getattr(optimizer, "optim", optimizer).state.values()  # zero1: the local optimizer
    return {
        "weights": distinct(parameters),
        "gradients": distinct(p.grad for p in parameters),
        "optimizer": distinct(x for each in state for x in each.values()),
        "saved": saved,
    }
