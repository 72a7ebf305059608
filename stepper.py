# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One optimizer update: autocast, accumulation, scaling, clipping, finite check, step.

python -c "import stepper, torch; print(stepper.choose_amp(None, None, torch.device('cpu')))"
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import TrainingStopped, UserError
from utils import get_logger, get_world_size

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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

    taken: Tensor  # bool; False when a loss or gradient was not finite
    grad_norm: Tensor  # before clipping


class Stepper:
    """Turns micro-batches into optimizer updates.

    update_freq: micro-batches in a group; the last group of an epoch may hold fewer.
    clip_grad: largest gradient norm, None for no limit.
    max_bad_steps: skipped updates in a row that a run survives.

        stepper.begin_epoch(len(batches))
        with stepper.micro_batch():
            loss = ...                   # the mean over this micro-batch
        update = stepper.step(loss)      # None until the group closes
        skipped = stepper.check()        # at log lines, and before a checkpoint

    torch's fused optimizers skip a step by themselves, so that the host reads nothing between
    `check`s. With any other it waits for each update, to know whether that was finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: str = "none",
        update_freq: int = 1,
        clip_grad: float | None = None,
        max_bad_steps: int = 10,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.amp = amp
        self.update_freq = update_freq
        self.clip_grad = clip_grad
        self.max_bad_steps = max_bad_steps
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.can_skip = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.skips_alone = False  # before its first step fused SGD would skip on to no momentum
        if not self.can_skip:
            name = type(optimizer).__name__
            get_logger().info("%s cannot skip a step by itself: the host waits for each", name)
        kind = {"dtype": torch.int64, "device": device}
        self.skipped, self.longest = torch.zeros((), **kind), torch.zeros((), **kind)
        self.bad_in_a_row = torch.zeros((), **kind)

    def begin_epoch(self, num_batches: int, state: dict[str, int] | None = None) -> None:
        """`num_batches` micro-batches to come; no group is open. state: to go on from."""
        self.left = num_batches
        if state:
            self.bad_in_a_row.fill_(state["bad_in_a_row"])
        self._open_group()

    def _open_group(self) -> None:
        self.group_size = min(self.update_freq, self.left)
        self.micro = 0  # number of the current micro-batch within its group
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around forward and loss: autocast, and no gradient exchange unless the group closes."""
        closes = self.micro + 1 == self.group_size
        waits = isinstance(self.model, DistributedDataParallel) and not closes
        alone = self.model.no_sync() if waits else contextlib.nullcontext()
        with alone, autocast(self.device, self.amp):
            yield

    def step(self, loss: Tensor) -> Update | None:
        """Backward; with the last micro-batch of a group also the optimizer step.

        The group's gradient is the mean over the micro-batches it really holds. If its loss or
        gradient is not finite on any rank, every rank skips the step.
        """
        self.finite &= torch.isfinite(loss.detach())
        second_order = getattr(self.optimizer, "is_second_order", False)  # adahessian
        self.scaler.scale(loss / self.group_size).backward(create_graph=second_order)
        self.micro += 1
        self.left -= 1
        if self.micro < self.group_size:
            return None
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        loss_is_finite, norm_is_finite = self._agree(self.finite, torch.isfinite(norm))
        taken = loss_is_finite & norm_is_finite
        self._step_if(taken)
        # With a finite loss the scaler may only be looking for a scale that fp16 can hold.
        scale = self.scaler.scale(torch.ones((), device=self.device))
        self._count(~taken, hopeless=~(loss_is_finite & (scale > 1)))
        self.scaler.update()
        self._open_group()
        return Update(taken, norm.detach())

    def _agree(self, *flags: Tensor) -> tuple[Tensor, ...]:
        """Each flag as it is on all ranks together."""
        verdict = torch.stack(flags).to(torch.int32)
        if get_world_size() > 1:
            dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return verdict.bool().unbind()

    def _step_if(self, taken: Tensor) -> None:
        """The optimizer step; the gradients are unscaled, so the scaler has no part in it."""
        if self.skips_alone:
            self.optimizer.found_inf = (~taken).float()
            self.optimizer.step()
            del self.optimizer.found_inf
        elif taken:  # here the host waits
            self.optimizer.step()
            self.skips_alone = self.can_skip

    def _count(self, bad: Tensor, hopeless: Tensor) -> None:
        self.skipped += bad
        self.bad_in_a_row = (self.bad_in_a_row + hopeless) * bad
        self.longest = torch.maximum(self.longest, self.bad_in_a_row)

    def state(self) -> dict[str, int]:
        """What `check` will need to know of the updates so far, as plain numbers."""
        return {"bad_in_a_row": int(self.bad_in_a_row)}

    def check(self) -> int:
        """Updates skipped since the last `check`; an error if too many were so in a row."""
        skipped, in_a_row = torch.stack([self.skipped, self.longest]).tolist()
        self.skipped.zero_()
        self.longest.zero_()
        if skipped:
            what = "an update" if skipped == 1 else f"{skipped} updates"
            get_logger().warning("skipped %s: loss or gradient is not finite", what)
        if in_a_row > self.max_bad_steps:
            raise TrainingStopped(
                f"{in_a_row} updates in a row had a loss or gradient that is not "
                "finite; lower --lr or --blr, set --clip_grad 1, or raise --max_bad_steps"
            )
        return skipped
