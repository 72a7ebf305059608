# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Updates that go wrong: what they held is written down, and training goes back to good weights.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --stem_stride 1 --input_size 32 \
    --on_spike rollback --output_dir runs/guarded
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel import sharding
from parallel.process_group import all_gather, get_logger, get_rank, is_main_process
from training.checkpoint import TrainState, is_finite
from training.checkpoint_manager import copy_to_cpu
from training.stepper import Fault, Stepper, autocast
from utils import write_atomically

FILE = "bad_batch.json"
KEPT = 100  # faults in that file
SNAPSHOTS = 100  # updates between two
RUN_AGAIN = 3  # faults between two looks whose batches are run again
REMEDY = (
    "lower --lr or --blr, set --clip_grad 1, raise --spike_factor if spikes are no fault here, or "
    "raise --max_bad_steps"
)

Compute = Callable[..., Tensor]  # (network, batch, update, micro) -> loss


class Guard:
    """Looks at what became of the updates since it looked last.

    parts: network, optimizer, scaler and average or None, which a rollback restores. max_bad_steps:
    faults in a row, or returns with less than `every` updates between, that a run survives. every:
    updates between two snapshots, in host memory, at the next look; None for none: faulty updates
    are only skipped.

        guard.begin_epoch(state, compute)  # compute: the loss of a micro-batch, run anew
        problem = guard.look(state)        # on all ranks; '' if training can go on

    A rollback undoes the updates since the snapshot and does not repeat them: the same batches
    would lead to the same weights. PaLM (arXiv 2204.02311, 5.1) got past its spikes so. Updates
    whose images are not finite are only skipped, since nothing of them is in the weights.
    """

    def __init__(
        self,
        stepper: Stepper,
        parts: Sequence[Any] = (),
        batches: Any = None,
        folder: Path | None = None,
        max_bad_steps: int = 10,
        every: int | None = None,
    ) -> None:
        self.stepper, self.batches, self.folder = stepper, batches, folder
        self.parts = [part for part in parts if part is not None]
        self.max_bad_steps, self.every = max_bad_steps, every
        self.kept: list[Any] = []
        self.returns, self.returned_at = 0, 0  # how often with less than `every` updates between

    def begin_epoch(self, state: TrainState, compute: Compute) -> None:
        """Before its first update, or the first after a resume."""
        self.compute = compute
        if "guard" in state.epoch_sums:
            numbers = state.epoch_sums["guard"]
            self.stepper.restore(numbers)
            self.returns, self.returned_at = numbers["returns"], numbers["returned_at"]
        self.keep(state)

    def state(self) -> dict[str, float]:
        """What `begin_epoch` goes on from, as plain numbers."""
        returned = {"returns": self.returns, "returned_at": self.returned_at}
        return self.stepper.state() | returned

    def keep(self, state: TrainState) -> None:
        """Take a snapshot, if there shall be any: when a checkpoint is saved, and in between."""
        if self.every is None or (self.kept and state.global_step == self.kept_at):
            return
        if self.kept and not all(all_gather(is_finite(self.parts[0]))):  # the next update shows it
            return
        self.kept = []  # two of them at once could be too much
        self.kept = [copy_to_cpu(sharding.own_part(part).state_dict()) for part in self.parts]
        self.kept_at, self.kept_bad = state.global_step, state.bad_steps
        self.kept_numbers = self.stepper.state()

    def look(self, state: TrainState) -> str:
        """Count, log and write down what was skipped; roll back; what the run has to stop for."""
        skipped, faults = self.stepper.read()
        state.bad_steps += skipped
        if not faults:
            if skipped:
                get_logger().info("skipped %d updates while fp16 looks for its scale", skipped)
            if self.every is not None and state.global_step >= self.kept_at + self.every:
                self.keep(state)
            return ""
        what = "an update" if skipped == 1 else f"{skipped} updates"
        where = state.global_step + 1 - faults[0].ago
        get_logger().warning("skipped %s, first number %d: %s", what, where, faults[0])
        places = self._write_down(state, faults)
        if self.batches is not None:
            get_logger().warning("first not finite when run again: %s", "; ".join(places))
        by_images = set(places) == {"images"}
        if self.every is not None and not by_images:
            return self._roll_back(state)
        longest = max(fault.in_a_row for fault in faults)
        if longest <= self.max_bad_steps:
            return ""
        self.stepper.bad_in_a_row = 0  # for who goes on from here with other flags
        return f"{longest} updates in a row went wrong, the last: {faults[-1]}; {REMEDY}"

    def _roll_back(self, state: TrainState) -> str:
        for part, content in zip(self.parts, self.kept, strict=True):
            # A copy, since an optimizer would train on in the original.
            sharding.restore(part, copy_to_cpu(content))
        self.stepper.restore(self.kept_numbers)
        undone = state.global_step - self.kept_at
        recent = self.kept_at < self.returned_at + self.every
        self.returns, self.returned_at = 1 + self.returns * recent, state.global_step
        self.kept_at, self.kept_bad = state.global_step, self.kept_bad + undone
        state.bad_steps = self.kept_bad  # so that updates less these are the ones in the weights
        text = "went back to the last snapshot: the %d updates since are undone; return %d of %d"
        get_logger().warning(text, undone, self.returns, self.max_bad_steps)
        if self.returns <= self.max_bad_steps:
            return ""
        self.returns = 0  # for who goes on from here with other flags
        return (
            f"went back to a snapshot {self.max_bad_steps + 1} times, which did not help; {REMEDY}"
        )

    # --- bad_batch.json ---------------------------------------------------------------------

    def _write_down(self, state: TrainState, faults: list[Fault]) -> list[str]:
        """Into the file; returns what was first not finite, for each fault that was run again."""
        found = []
        for number, fault in enumerate(faults):
            mine = {"rank": get_rank(), "sample_ids": [ids.tolist() for ids in fault.ids]}
            if number < RUN_AGAIN and self.batches is not None:
                try:
                    with sharding.whole_weights(self.parts[0]) as network:
                        mine |= self._run_again(network, state, fault)
                except torch.OutOfMemoryError as error:  # on all ranks alike
                    mine |= {"first_not_finite": None, "note": f"cannot be run again: {error}"}
            entry = {"epoch": state.epoch, "update": state.global_step + 1 - fault.ago}
            entry |= {"fault": str(fault), "loss": _number(fault.loss)}
            entry |= {"usual_loss": _number(fault.usual_loss)}
            entry |= {"grad_norm": _number(fault.grad_norm)}
            found.append(entry | {"ranks": all_gather(mine)})
        if is_main_process() and self.folder is not None:
            try:
                add_to(self.folder / FILE, found)
            except OSError as error:
                get_logger().warning("%s cannot be written: %s", self.folder / FILE, error)
        again = [{rank.get("first_not_finite") for rank in fault["ranks"]} for fault in found]
        named = [places - {None} or {"nothing"} for places in again[:RUN_AGAIN]]
        return ["images" if "images" in places else ", ".join(sorted(places)) for places in named]

    def _run_again(self, network: nn.Module, state: TrainState, fault: Fault) -> dict[str, Any]:
        """Where this rank's micro-batches meet the first value that is not finite, run anew."""
        if any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()):
            note = "not run again: SyncBatchNorm would wait for the other processes"
            return {"first_not_finite": None, "note": note}
        update = state.global_step - fault.ago
        try:
            for micro, ids in enumerate(fault.ids):
                batch = self.batches.again(state.epoch, ids)
                bad = ~torch.isfinite(batch[0]).flatten(1).all(1)
                if bad.any():
                    return {"first_not_finite": "images", "of_samples": batch[2][bad].tolist()}
                compute = partial(self._loss, network, batch, update, micro)
                if found := first_not_finite(network, compute):
                    return {"first_not_finite": found}
        except Exception as error:  # no memory perhaps: to look must not end the run
            note = f"cannot be run again: {type(error).__name__}: {error}"
            return {"first_not_finite": None, "note": note}
        how = ", with weights as files have them" * (network is not self.parts[0])
        return {"first_not_finite": None, "note": f"every value was finite when run again{how}"}

    def _loss(self, *micro_batch: Any) -> Tensor:
        with autocast(self.stepper.device, self.stepper.amp):
            return self.compute(*micro_batch)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # NaN would not be JSON


def add_to(path: Path, faults: list[dict[str, Any]]) -> None:
    """Into a list in a file, each update once, the newest KEPT."""
    try:
        before = json.loads(path.read_text())
        known = {(fault["epoch"], fault["update"]): fault for fault in before}
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # absent, half, or of another
        known = {}
    known |= {(fault["epoch"], fault["update"]): fault for fault in faults}
    lines = [json.dumps(fault) for fault in list(known.values())[-KEPT:]]
    write_atomically("[\n" + ",\n".join(lines) + "\n]\n", path)


def first_not_finite(network: nn.Module, compute: Callable[[], Tensor]) -> str:
    """Where a loss or its gradient first gets a value that is not finite; '' for nowhere.

    compute: the loss, by a call of `network`. In the order of computation: a parameter,
    the output of a module, the loss, then backwards the gradient of such an output or parameter.
    Gradients, buffers and hooks of the network are afterwards what they were.
    """
    found: list[str] = []

    def check(name: str, value: Tensor) -> None:
        if not found and value.is_floating_point() and not torch.isfinite(value).all():
            found.append(name)

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for value in tensors_in(output):
            check(f"output of {name}", value)
            if value.requires_grad:
                value.register_hook(partial(check, f"gradient of the output of {name}"))

    named = dict(network.named_parameters())
    for name, value in named.items():
        check(name, value)
    if found:
        return found[0]
    trained = {name: value for name, value in named.items() if value.requires_grad}
    hooks = [p.register_hook(partial(check, f"gradient of {n}")) for n, p in trained.items()]
    for name, module in network.named_modules():
        name = name or type(module).__name__
        hooks.append(module.register_forward_hook(partial(after, name)))
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        with torch.compiler.set_stance("force_eager"):
            loss = compute()
            check("loss", loss.detach())
            if not found:
                torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    return found[0] if found else ""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def build_guard(
    args: Any, stepper: Stepper, parts: Sequence[Any], batches: Any, folder: Path | None
) -> Guard:
    """`Guard` as the flags say."""
    every = args.snapshot_freq or SNAPSHOTS if args.on_spike == "rollback" else None
    return Guard(stepper, parts, batches, folder, args.max_bad_steps, every)
