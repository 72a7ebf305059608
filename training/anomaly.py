# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Bad optimizer steps (NaN, Inf, loss spikes): report them, and skip them or roll back.

python main_pretrain.py --recipe digits_pretrain --on_spike rollback --output_dir runs/guarded
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import plural
from parallel import sharding
from parallel.process_group import all_gather, get_logger, get_rank, is_main_process
from parallel.state_dict import copy_to_cpu, tensor_leaves
from training.checkpoint import TrainableParts, TrainState, all_finite
from training.stepper import BadStep, Stepper, autocast
from utils import write_atomically

FILE = "bad_batch.json"
MAX_ENTRIES = 100  # in that file
SNAPSHOT_FREQ = 100  # optimizer steps between two snapshots
MAX_DIAGNOSED = 3  # bad steps between two checks whose batches are run again
REMEDY = (
    "lower --lr or --blr, set --clip_grad 1, raise --spike_factor if loss spikes do no harm, "
    "or raise --max_bad_steps"
)

ComputeLoss = Callable[..., Tensor]  # (network, batch, step, micro) -> loss


@dataclass(eq=False)
class AnomalyGuard:
    """Check recent steps for NaN, Inf and loss spikes.

    parts: model, optimizer and others, which a rollback restores.
    max_bad_steps: consecutive bad steps, or rollbacks with fewer than `snapshot_freq` steps between
        them, that a run survives.
    snapshot_freq: optimizer steps between two snapshots in host memory; None: bad steps are skipped
        and nothing is rolled back.

        guard.begin_epoch(state, compute_loss)
        problem = guard.check(state)       # on all ranks; '' if training can continue

    A rollback drops the steps since the last snapshot and continues with the next batches: the same
    batches would lead to the same weights (PaLM did so, arXiv 2204.02311, section 5.1). Steps with
    non-finite images are only skipped, since they have not changed the weights.
    """

    stepper: Stepper
    parts: Sequence[Any] = ()
    data_loader: Any = None
    folder: Path | None = None
    max_bad_steps: int = 10
    snapshot_freq: int | None = None

    def __post_init__(self) -> None:
        self.snapshots: list[Any] = []  # one for each part
        self.rollbacks = 0  # in a row, with fewer than `snapshot_freq` steps between two
        self.last_rollback = 0  # global step

    def begin_epoch(self, state: TrainState, compute_loss: ComputeLoss) -> None:
        """Prepare for an epoch, or for the rest of it after a resume."""
        self.compute_loss = compute_loss
        if "guard" in state.epoch_sums:
            saved = state.epoch_sums["guard"]
            self.stepper.restore(saved)
            self.rollbacks, self.last_rollback = saved["returns"], saved["returned_at"]
        self.snapshot(state)

    def snapshot(self, state: TrainState) -> None:
        """Copy all parts to host memory, if rollbacks are enabled and all weights are finite."""
        if self.snapshot_freq is None or (
            self.snapshots and state.global_step == self.snapshot_step
        ):
            return
        weights = map(sharding.to_local, self.parts[0].parameters())
        if self.snapshots and not all(all_gather(all_finite(weights))):
            return  # the next step will be bad
        self.snapshots = []  # free the old one first
        self.snapshots = [
            copy_to_cpu(sharding.local_optimizer(part).state_dict()) for part in self.parts
        ]
        self.snapshot_step, self.snapshot_bad_steps = state.global_step, state.bad_steps
        self.snapshot_counters = self.stepper.state()

    def check(self, state: TrainState) -> str:
        """Count and report skipped steps, roll back if needed; returns why training must stop.

        Stores the counters in `state`, for a checkpoint.
        """
        problem = self._check(state)
        if self.stepper.watched_norms is not None:
            state.probed["norms"] = self.stepper.watched_norms.tolist()
        # Keys of the first version, so that checkpoints of all versions load.
        rollbacks = {"returns": self.rollbacks, "returned_at": self.last_rollback}
        state.epoch_sums["guard"] = self.stepper.state() | rollbacks
        return problem

    def _check(self, state: TrainState) -> str:
        skipped, bad = self.stepper.read()
        state.bad_steps += skipped
        steps = plural(skipped, "step")
        if not bad:
            if skipped:
                get_logger().info("skipped %s: fp16 reduced its loss scale", steps)
            freq = self.snapshot_freq
            if freq is not None and state.global_step >= self.snapshot_step + freq:
                self.snapshot(state)
            return ""
        first = state.global_step + 1 - bad[0].steps_ago
        get_logger().warning("skipped %s, first at step %d: %s", steps, first, bad[0])
        sources = dict.fromkeys(self._report(state, bad))  # in their order
        if self.data_loader is not None:
            get_logger().warning("first non-finite value in a rerun: %s", "; ".join(sources))
        if self.snapshot_freq is not None and set(sources) != {"images"}:
            return self._roll_back(state)
        longest = max(step.in_a_row for step in bad)
        if longest <= self.max_bad_steps:
            return ""
        self.stepper.bad_in_a_row = 0  # a resumed run, perhaps with other flags, starts from zero
        return f"{plural(longest, 'bad step')} in a row, the last one: {bad[-1]}; {REMEDY}"

    def _roll_back(self, state: TrainState) -> str:
        for part, content in zip(self.parts, self.snapshots, strict=True):
            # Restore a copy: an optimizer would continue to train on the original tensors.
            sharding.load_local_state(part, copy_to_cpu(content))
        self.stepper.restore(self.snapshot_counters)
        dropped = state.global_step - self.snapshot_step
        recent = self.snapshot_step < self.last_rollback + self.snapshot_freq
        self.rollbacks, self.last_rollback = 1 + self.rollbacks * recent, state.global_step
        self.snapshot_step = state.global_step
        self.snapshot_bad_steps += dropped
        state.bad_steps = self.snapshot_bad_steps  # global_step - bad_steps: steps in the weights
        get_logger().warning(
            "rolled back to the last snapshot: %s dropped; rollback %d of at most %d",
            plural(dropped, "step"),
            self.rollbacks,
            self.max_bad_steps,
        )
        if self.rollbacks <= self.max_bad_steps:
            return ""
        self.rollbacks = 0  # a resumed run, perhaps with other flags, starts from zero
        return f"rolled back {plural(self.max_bad_steps + 1, 'time')} without success; {REMEDY}"

    # --- bad_batch.json ---------------------------------------------------------------------

    def _report(self, state: TrainState, bad: list[BadStep]) -> list[str]:
        """Write bad_batch.json; returns the first non-finite value of each step that was rerun."""
        entries = []
        for number, step in enumerate(bad):
            mine = {"rank": get_rank(), "sample_ids": [ids.tolist() for ids in step.ids]}
            if number < MAX_DIAGNOSED and self.data_loader is not None:
                try:
                    with sharding.unsharded(self.parts[0]) as network:
                        mine |= self._diagnose(network, state, step)
                except MemoryError as error:  # on all ranks
                    mine |= {"first_not_finite": None, "note": f"cannot be rerun: {error}"}
            entry = {
                "epoch": state.epoch,
                "update": state.global_step + 1 - step.steps_ago,
                "fault": str(step),
                "loss": _number(step.loss),
                "running_loss": _number(step.running_loss),
                "grad_norm": _number(step.grad_norm),
            }
            entries.append(entry | {"ranks": all_gather(mine)})
        if is_main_process() and self.folder is not None:
            try:
                append_entries(self.folder / FILE, entries)
            except OSError as error:
                get_logger().warning("%s cannot be written: %s", self.folder / FILE, error)
        found = [
            {rank.get("first_not_finite") for rank in entry["ranks"]} - {None}
            for entry in entries[:MAX_DIAGNOSED]
        ]
        return ["images" if "images" in f else ", ".join(sorted(f)) or "nothing" for f in found]

    def _diagnose(self, network: nn.Module, state: TrainState, step: BadStep) -> dict[str, Any]:
        """Rerun this rank's micro-batches up to the first value that is not finite."""
        if any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()):
            note = "not rerun: SyncBatchNorm would wait for the other processes"
            return {"first_not_finite": None, "note": note}
        try:
            for micro, ids in enumerate(step.ids):
                batch = self.data_loader.reload(state.epoch, ids)
                bad = ~torch.isfinite(batch[0]).flatten(1).all(1)
                if bad.any():
                    return {"first_not_finite": "images", "of_samples": batch[2][bad].tolist()}
                number = state.global_step - step.steps_ago
                compute = partial(self._compute, network, batch, number, micro)
                if found := first_not_finite(network, compute, self.stepper.criterion):
                    return {"first_not_finite": found}
        except Exception as error:  # such as out of memory: a diagnosis must not end the run
            note = f"cannot be rerun: {type(error).__name__}: {error}"
            return {"first_not_finite": None, "note": note}
        how = " with the gathered float32 weights" * sharding.is_fsdp(network)
        return {"first_not_finite": None, "note": f"every value was finite in a rerun{how}"}

    def _compute(self, network: nn.Module, batch: Any, step: int, micro: int) -> Tensor:
        with autocast(self.stepper.device, self.stepper.amp):
            return self.compute_loss(network, batch, step, micro)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # NaN is not valid JSON


def append_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """Add to the JSON list in a file; each step appears once, the newest MAX_ENTRIES stay."""
    try:
        by_step = {
            (entry["epoch"], entry["update"]): entry for entry in json.loads(path.read_text())
        }
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # absent, truncated or foreign
        by_step = {}
    by_step |= {(entry["epoch"], entry["update"]): entry for entry in entries}
    lines = [json.dumps(entry) for entry in list(by_step.values())[-MAX_ENTRIES:]]
    write_atomically("[\n" + ",\n".join(lines) + "\n]\n", path)


def first_not_finite(
    network: nn.Module, compute: Callable[[], Tensor], criterion: nn.Module | None = None
) -> str:
    """Name the first non-finite value of a forward and backward pass; '' if there is none.

    compute: calls `network` and returns the loss. Order: parameters, outputs of modules, the loss,
    then gradients of outputs and parameters. Leaves gradients, buffers and hooks of the network as
    they were, and buffers of the criterion.
    """
    found: list[str] = []

    def check(name: str, value: Tensor) -> None:
        if not found and value.is_floating_point() and not torch.isfinite(value).all():
            found.append(name)

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for value in tensor_leaves(output):
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
    modules = nn.ModuleList([network] if criterion is None else [network, criterion])
    buffers = [(buffer, buffer.clone()) for buffer in modules.buffers()]
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


def build_guard(
    args: Any, stepper: Stepper, parts: TrainableParts, data_loader: Any, folder: Path | None
) -> AnomalyGuard:
    """Build an `AnomalyGuard` from the flags."""
    freq = args.snapshot_freq or SNAPSHOT_FREQ if args.on_spike == "rollback" else None
    return AnomalyGuard(stepper, parts.present(), data_loader, folder, args.max_bad_steps, freq)
