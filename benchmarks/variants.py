# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A step of one kind that can be timed: ours, dense-masked FCMAE or timm; its time and memory.

PYTHONPATH=. python -c "from benchmarks.variants import make_variant; help(make_variant)"
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.dense_masked import DenseMasked
from models import create_model, fcmae_name
from models.fcmae import random_mask
from training import stepper

CLASSES = 1000
COMPILATIONS = 64  # of a forward that all variants share; torch runs the ninth one uncompiled


@dataclass
class Variant:
    """A step of one kind at one batch size, and what was measured of it.

    optimizer: None for inference, in which `loss` gives the logits.
    """

    name: str
    batch: int
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    loss: Callable[[], Tensor]
    seconds: list[float] = field(default_factory=list)  # a step, one value a round
    memory: int | None = None  # bytes

    def step(self) -> None:
        """Take one step; gradients are freed afterwards, since other variants share the memory."""
        if self.optimizer is None:
            with torch.inference_mode():
                self.loss()
            return
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def rate(self) -> float:
        """Return the images per second, by the median."""
        return self.batch / statistics.median(self.seconds)


def make_variant(name: str, batch: int, args: argparse.Namespace) -> Variant:
    """The variant with parameters of its own, the same for all; images on the device."""
    torch.manual_seed(0)
    kind, _, compiled = name.partition("_")
    if kind.startswith("timm"):
        model = timm.create_model(args.model, num_classes=CLASSES)
        model = model.to(memory_format=torch.channels_last)
    elif kind in ("dense", "infer"):
        model = create_model(args.model, num_classes=CLASSES)
    else:
        model = create_model(fcmae_name(args.model), mask_ratio=args.mask_ratio)
    infers = kind.endswith("infer")
    model = model.to(args.device).train(not infers)
    optimizer = None
    if not infers:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    forward = DenseMasked(model) if kind == "masked" else model
    if compiled:
        torch._dynamo.config.recompile_limit = COMPILATIONS
        forward = torch.compile(forward, dynamic=False)
    return Variant(name, batch, model, optimizer, make_loss(kind, forward, batch, args))


def make_loss(
    kind: str, forward: Callable, batch: int, args: argparse.Namespace
) -> Callable[[], Tensor]:
    """Return the loss; in inference the logits."""
    device, size = args.device, args.input_size
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)
    known = (args.visible,) if kind == "packed" else ()

    def loss() -> Tensor:
        with stepper.autocast(device, args.amp):
            if kind.endswith("infer"):
                return forward(images)
            if kind in ("dense", "timm"):
                return F.cross_entropy(forward(images), labels)
            noise = torch.rand(batch, args.grid[0] * args.grid[1], device=device)
            mask = random_mask(noise, args.visible)
            return forward(images, mask, *known)[0]

    return loss


def saved_bytes(variant: Variant) -> int:
    """Return the bytes that forward saves for backward, without parameters."""
    seen = {p.untyped_storage().data_ptr(): 0 for p in variant.model.parameters()}

    def pack(x: Tensor) -> Tensor:
        seen.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = variant.loss()  # kept until the end: memory that is freed could be counted twice
    del loss
    return sum(seen.values())


def measure_memory(variant: Variant, device: torch.device) -> int | None:
    """Return the bytes of a step. CUDA: the peak of a separate run. CPU: saved for backward."""
    if device.type == "cuda":
        states = variant.optimizer.state.values() if variant.optimizer else ()
        state = [v for s in states for v in s.values()]
        own = [*variant.model.parameters(), *state]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.step()
        resident = sum(t.nbytes for t in own if torch.is_tensor(t) and t.is_cuda)
        return torch.cuda.max_memory_allocated() - before + resident
    # In a compiled variant the hooks would be compiled in and change what is saved.
    skipped = variant.name.endswith("_compiled") or variant.optimizer is None
    return None if skipped else saved_bytes(variant)


def time_steps(variant: Variant, steps: int, device: torch.device) -> float:
    """Return the seconds per step, synchronized with the GPU before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        variant.step()
    wait()
    return (time.perf_counter() - start) / steps
