# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One optimizer update: autocast, accumulation, scaling, clipping, finite check, step.

python -c "from training.stepper import Stepper; print(Stepper.__doc__)"
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import UserError
from parallel import sharding
from parallel.process_group import all_reduce_sum, get_logger, get_world_size

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP, MEMORY = 20, 100  # updates: before a loss can be a spike, and in the mean it is held to


def choose_amp(amp: str | None, use_amp: bool | None, device: torch.device) -> str:
    """`bf16`, `fp16` or `none`: as asked for, else bf16 on CUDA and none elsewhere.

    `use_amp` true takes bf16, and fp16 on a GPU that has no bf16.
    """
    on_cuda = device.type == "cuda"
    has_bf16 = not on_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not has_bf16:
        raise UserError("--amp bf16: this GPU has no bf16; use --amp fp16")
    if amp is not None:
        return amp
    if use_amp or (use_amp is None and on_cuda):
        return "bf16" if has_bf16 else "fp16"
    return "none"


def autocast(device: torch.device, amp: str, cache: bool = True) -> torch.autocast:
    """The autocast context of a precision that `choose_amp` returned."""
    dtype, enabled = DTYPES.get(amp), amp != "none"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=cache)


@dataclass(frozen=True)
class Update:
    """What became of a closed group, on the device: who reads it waits for the device."""

    taken: Tensor  # bool; False when a loss or gradient was not finite, or the loss a spike
    grad_norm: Tensor  # before clipping


@dataclass(frozen=True)
class Fault:
    """An update that was skipped, and not because fp16 looks for its scale."""

    ago: int  # updates; 1 for the last
    in_a_row: int  # number of it in its row
    ids: list[Tensor]  # (N,) of this rank's samples in each micro-batch
    loss: float  # mean over all ranks, NaN if one was not finite
    grad_norm: float
    usual_loss: float  # running mean

    def __str__(self) -> str:
        if math.isnan(self.loss):
            return "loss is not finite"
        if not math.isfinite(self.grad_norm):
            return "gradient is not finite"
        return f"loss {self.loss:.4g} is a spike, {self.usual_loss:.4g} is usual"


class Stepper:
    """Turns micro-batches into optimizer updates.

    update_freq: micro-batches in a group; the last group of an epoch may hold fewer.
    clip_grad: largest gradient norm, None for no limit.
    spike_factor: a loss above so many times its running mean is a spike; 0 for no limit.

        stepper.begin_epoch(len(batches))
        with stepper.micro_batch():
            loss = ...                   # the mean over this micro-batch
        update = stepper.step(loss, ids)       # None until the group closes
        skipped, faults = stepper.read()       # at log lines, and before a checkpoint

    torch's fused optimizers skip a step by themselves, so that the host reads nothing between
    `read`s. With any other it waits for each update, to know whether that was finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: str = "none",
        update_freq: int = 1,
        clip_grad: float | None = None,
        spike_factor: float = 0.0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.amp = amp
        self.update_freq = update_freq
        self.clip_grad = clip_grad
        self.spike_factor = spike_factor
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.own = sharding.local_optimizer(optimizer)
        self.can_skip = getattr(self.own, "_step_supports_amp_scaling", False)
        self.skips_alone = False  # before its first step fused SGD would skip on to no momentum
        if not self.can_skip:
            name = type(self.own).__name__
            get_logger().info("%s cannot skip a step by itself: the host waits for each", name)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # since the last `read`
        self.losses = torch.zeros((), dtype=torch.int64, device=device)
        self.usual_loss = torch.zeros((), device=device)
        self.bad_in_a_row = 0  # up to the last `read`
        self.records: list[tuple[list[Tensor], Tensor]] = []  # of the updates since: ids, values

    def begin_epoch(self, num_batches: int) -> None:
        """`num_batches` micro-batches to come; no group is open."""
        self.left = num_batches
        self._open_group()

    def _open_group(self) -> None:
        self.group_size = min(self.update_freq, self.left)
        self.micro = 0  # number of the current micro-batch within its group
        self.loss, self.ids = torch.zeros((), device=self.device), []
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around forward and loss: autocast, and no gradient exchange unless the group closes."""
        closes = self.micro + 1 == self.group_size
        with sharding.sync_gradients(self.model, closes), autocast(self.device, self.amp):
            yield

    def step(self, loss: Tensor, ids: Tensor | None = None) -> Update | None:
        """Backward; with the last micro-batch of a group also the optimizer step.

        The group's gradient is the mean over the micro-batches it really holds. If its loss or
        gradient is not finite on any rank, or its loss a spike, every rank skips the step.
        ids: of the samples, for `read` to name.
        """
        self.loss += loss.detach() / self.group_size
        self.ids += [] if ids is None else [ids]
        second_order = getattr(self.own, "is_second_order", False)  # adahessian
        self.scaler.scale(loss / self.group_size).backward(create_graph=second_order)
        self.micro += 1
        self.left -= 1
        if self.micro < self.group_size:
            return None
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        norm = sharding.full_tensor(norm)
        taken = self._close_group(norm.detach(), *self._agree(norm))
        self._open_group()
        return Update(taken, norm.detach())

    def _agree(self, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean loss, whether each loss is finite, whether the norm is) over all ranks."""
        bad = torch.stack([~torch.isfinite(self.loss), ~torch.isfinite(norm)])
        told = torch.cat([self.loss.nan_to_num(0.0, 0.0, 0.0)[None], bad.to(self.loss.dtype)])
        loss, bad_loss, bad_norm = all_reduce_sum(told).unbind()
        return loss / get_world_size(), bad_loss == 0, bad_norm == 0

    def _close_group(self, norm: Tensor, loss: Tensor, loss_ok: Tensor, norm_ok: Tensor) -> Tensor:
        """Take the step or skip it, and note what became of it; returns whether it was taken."""
        spike = self._is_spike(loss)
        taken = loss_ok & norm_ok & ~spike
        self._step_if(taken)
        # With a finite loss the scaler may only be looking for a scale that fp16 can hold.
        scale = self.scaler.scale(torch.ones((), device=self.device))
        fault = ~taken & (~loss_ok | spike | (scale <= 1))
        told = torch.where(loss_ok, loss, math.nan)
        self.records.append((self.ids, torch.stack([taken, fault, told, norm, self.usual_loss])))
        self.skipped += ~taken
        self.losses += taken
        share = 1 / self.losses.clamp(1, MEMORY)
        self.usual_loss += torch.where(taken, (loss - self.usual_loss) * share, 0.0)
        self.scaler.update()
        return taken

    def _is_spike(self, loss: Tensor) -> Tensor:
        if not self.spike_factor:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        known = (self.losses >= WARM_UP) & (self.usual_loss > 0)
        return known & (loss > self.spike_factor * self.usual_loss)

    def _step_if(self, taken: Tensor) -> None:
        """The optimizer step; the gradients are unscaled, so the scaler has no part in it."""
        if self.skips_alone:
            self.own.found_inf = (~taken).float()
            self.optimizer.step()
            del self.own.found_inf
        elif taken:  # here the host waits
            self.optimizer.step()
            self.skips_alone = self.can_skip

    def state(self) -> dict[str, float]:
        """What the next `read`s will need to know of the updates so far, as plain numbers."""
        usual = {"losses": int(self.losses), "usual_loss": float(self.usual_loss)}
        return usual | {"bad_in_a_row": self.bad_in_a_row}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state()`."""
        self.losses.fill_(state["losses"])
        self.usual_loss.fill_(state["usual_loss"])
        self.bad_in_a_row = state["bad_in_a_row"]
        self.skips_alone = False  # moments may be as before the first step

    def read(self) -> tuple[int, list[Fault]]:
        """How many updates were skipped since the last `read`, and those that are faults."""
        records, self.records = self.records, []
        self.skipped.zero_()
        rows = torch.stack([row for _, row in records]).tolist() if records else []
        faults = []
        for place, (taken, bad, *values) in enumerate(rows):
            self.bad_in_a_row = 0 if taken else self.bad_in_a_row + int(bad)
            if bad:
                ids, ago = records[place][0], len(rows) - place
                faults.append(Fault(ago, self.bad_in_a_row, ids, *values))
        return sum(not taken for taken, *_ in rows), faults
