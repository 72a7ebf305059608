# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One optimizer step: autocast, gradient accumulation, loss scaling, clipping, finite check.

python -c "from training.stepper import Stepper; help(Stepper)"

In plain PyTorch, as long as every loss and gradient is finite, `Stepper` does this:

    optimizer.zero_grad()
    for micro in range(update_freq):
        images, labels, _ = next(batches)
        last = micro + 1 == update_freq
        with contextlib.nullcontext() if last else model.no_sync():  # reduce gradients once
            with torch.autocast(device.type, dtype):
                loss = criterion(model(images), labels)
        scaler.scale(loss / update_freq).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from errors import UserError
from parallel import sharding
from parallel.process_group import all_reduce_sum, get_logger, get_world_size
from training.step_clock import no_mark
from weights.fit import find_classifier

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARMUP_STEPS = 20  # steps before a loss can count as a spike
RUNNING_STEPS = 100  # steps in the running mean of the loss


def choose_amp(amp: str | None, use_amp: bool | None, device: torch.device) -> str:
    """Return `amp` if given; otherwise `bf16` on CUDA and `none` elsewhere.

    use_amp: true asks for bf16, or fp16 on a GPU without bf16, on any device; false for `none`.
    """
    on_cuda = device.type == "cuda"
    has_bf16 = not on_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not has_bf16:
        raise UserError("--amp bf16: this GPU does not support bf16; use --amp fp16")
    if amp is not None:
        return amp
    if use_amp or (use_amp is None and on_cuda):
        return "bf16" if has_bf16 else "fp16"
    return "none"


def autocast(device: torch.device, amp: str, cache: bool = True) -> torch.autocast:
    """Autocast to the precision that `choose_amp` returned."""
    dtype, enabled = DTYPES.get(amp), amp != "none"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=cache)


class SavedBuffers:
    """A copy of a model's buffers, which undoes what the forward passes of a skipped step did.

    Running statistics that took in a NaN would stay NaN. Nothing is read from the device. Buffers
    that a forward pass creates or resizes are caches and stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, {}
        named = list(_writable_buffers(model))
        for dtype in {buffer.dtype for _, buffer in named}:
            names, buffers = zip(*(pair for pair in named if pair[1].dtype == dtype), strict=True)
            self.before |= zip(names, _split_like(_join(buffers), buffers), strict=True)

    @torch.no_grad()
    def restore_unless(self, taken: Tensor) -> None:
        """Restore the buffers if `taken`, a bool tensor, is False."""
        if not self.before:
            return
        pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for name, buffer in _writable_buffers(self.model):
            before = self.before.get(name)
            if before is not None and (before.shape, before.dtype) == (buffer.shape, buffer.dtype):
                pairs.setdefault(buffer.dtype, []).append((buffer, before))
        for same_dtype in pairs.values():  # joined, so that a GPU gets few kernels
            buffers, before = zip(*same_dtype, strict=True)
            values = torch.where(taken, _join(buffers), _join(before))
            torch._foreach_copy_(buffers, _split_like(values, buffers))


def _writable_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and buffers, except expanded ones, which nothing can write to."""
    return ((name, buffer) for name, buffer in model.named_buffers() if 0 not in buffer.stride())


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _split_like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _last_layer(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the classifier, or of FCMAE's prediction, perhaps in a wrapper."""
    inner = model
    while isinstance(inner, nn.Module):
        last = find_classifier(inner) or ("pred.",)
        found = [p for name, p in inner.named_parameters() if name.startswith(last)]
        if found:
            return found
        inner = getattr(inner, "module", getattr(inner, "model", None))  # of ddp, of Graphed
    raise UserError(
        f"--clip_mode agc: found no classifier in {type(model).__name__}; use --clip_mode norm"
    )


@torch.no_grad()
def clip_adaptively(parameters: Sequence[nn.Parameter], factor: float, eps: float = 1e-3) -> None:
    """Clip each unit's gradient to `factor` times the norm of its weights, which counts as `eps`.

    Adaptive gradient clipping of NFNets, as `timm.utils.agc`, whose function has no DTensors. A
    unit is a row of a matrix or kernel, or a whole bias.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            largest = _unit_norms(parameter).clamp(min=eps) * factor
            norms = _unit_norms(parameter.grad)
            scale = torch.where(norms < largest, 1.0, largest / norms.clamp(min=1e-6))
            sharding.to_local(parameter.grad).mul_(scale)


def _unit_norms(tensor: Tensor) -> Tensor:
    """Norms of the rows that this process has, (C, 1, ...), or of a whole vector, ()."""
    if tensor.ndim <= 1:
        return sharding.full_tensor(tensor.norm())
    rows = sharding.to_local(tensor)
    return torch.linalg.vector_norm(rows, dim=tuple(range(1, tensor.ndim)), keepdim=True)


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step, on the device; reading it synchronizes."""

    taken: Tensor  # bool; False if a loss or gradient was not finite or the loss was a spike
    grad_norm: Tensor  # before clipping


@dataclass(frozen=True)
class BadStep:
    """A skipped optimizer step, except those skipped while fp16 searches for its loss scale."""

    steps_ago: int  # 1 is the last step
    in_a_row: int  # consecutive bad steps up to this one
    ids: list[Tensor]  # (N,) sample ids of this rank, one tensor for each micro-batch
    loss: float  # mean over all ranks; NaN if it was not finite on one of them
    grad_norm: float
    running_loss: float  # mean of the last losses

    def __str__(self) -> str:
        if math.isnan(self.loss):
            return "loss is not finite"
        if not math.isfinite(self.grad_norm):
            return "gradient is not finite"
        return f"loss {self.loss:.4g} is a spike (running mean {self.running_loss:.4g})"


@dataclass(eq=False)
class Stepper:
    """Turn micro-batches into optimizer steps.

    update_freq: micro-batches per optimizer step; the last step of an epoch may have fewer.
    clip_grad: limit of the gradients; None for no limit.
    clip_mode: `norm` limits the norm of all gradients; `value` limits each number in them; `agc`
        limits the norm of each unit, a row of a matrix, to this fraction of its weights' norm,
        except in the last layer, as in timm.
    spike_factor: a loss above this many times its running mean is a spike; 0 for no limit.
    criterion: the loss, which may have parameters and buffers of its own; None: it has none.

        stepper.begin_epoch(len(data_loader))
        with stepper.micro_batch():
            loss = ...                        # the mean over this micro-batch
        result = stepper.step(loss, ids)      # None until the accumulation window closes
        skipped, bad = stepper.read()         # at log lines and before a checkpoint

    `mark` is called with the name of each part of a step when it ends, as StepClock.mark.

    torch's fused optimizers skip a step on the device, so the host reads nothing from it between
    two `read`s. With other optimizers the host waits for the finite check of each step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    amp: str = "none"
    update_freq: int = 1
    clip_grad: float | None = None
    spike_factor: float = 0.0
    clip_mode: str = "norm"
    criterion: nn.Module | None = None

    def __post_init__(self) -> None:
        own = [] if self.criterion is None else [self.criterion]
        self.modules = nn.ModuleList([self.model, *own])
        self.loss_parameters = [p for loss in own for p in loss.parameters()]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.frozen: list[nn.Parameter] = []
        self.adaptive: list[nn.Parameter] = []  # parameters that --clip_mode agc clips
        if self.clip_mode == "agc":
            last = set(map(id, _last_layer(self.model)))
            self.adaptive = [p for p in self.parameters if id(p) not in last]
        self.watched: list[list[nn.Parameter]] = []  # whose gradient norms a probe shows
        self.watched_norms: Tensor | None = None  # theirs, (n,), in the last step of a phase
        self.local_optimizer = sharding.local_optimizer(self.optimizer)
        # adahessian; it differentiates the scaled gradients and would not unscale the result
        self.second_order = getattr(self.local_optimizer, "is_second_order", False)
        if self.second_order and self.amp == "fp16":
            raise UserError(
                "--opt adahessian does not work with --amp fp16; use --amp bf16 or none"
            )
        self.can_skip = getattr(self.local_optimizer, "_step_supports_amp_scaling", False)
        self.mark: Callable[[str], None] = no_mark
        # With fsdp it is spread over forward and backward, and no mark can separate it.
        self.communicates = get_world_size() > 1 and not sharding.is_fsdp(self.model)
        # Not at the first step: if it were skipped, fused SGD would not initialize its momentum.
        self.skips_on_device = False
        if not self.can_skip:
            get_logger().info(
                "%s cannot skip a step on the device: the host waits for each step",
                type(self.local_optimizer).__name__,
            )
        # Steps skipped since the last `read`; losses in the running mean; the mean itself.
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.num_losses = torch.zeros((), dtype=torch.int64, device=self.device)
        self.running_loss = torch.zeros((), device=self.device)
        self.bad_in_a_row = 0  # at the last `read`
        self.records: list[tuple[list[Tensor], Tensor]] = []  # (ids, values) since the last `read`

    def begin_epoch(self, num_batches: int) -> None:
        """Start an epoch with `num_batches` micro-batches left; drop open accumulation windows."""
        self.batches_left = num_batches
        self._open_window()

    def freeze(self, parameters: list[nn.Parameter]) -> bool:
        """Leave out these parameters in the coming steps; returns True if they are other ones.

        The optimizer skips them, since they have no gradient. A parameter group must be frozen as a
        whole: fused SGD creates the momentum of a group at once.
        """
        changed = [*map(id, parameters)] != [*map(id, self.frozen)]
        self.frozen = parameters
        if changed:
            self.skips_on_device = False  # a group may take its first step
        return changed

    def drop_window(self) -> None:
        """Drop the micro-batches of an open window, from the model's buffers too."""
        if self.micro and self.saved_buffers is not None:
            self.saved_buffers.restore_unless(torch.tensor(False, device=self.device))
        self._open_window()

    def _open_window(self) -> None:
        self.window = min(self.update_freq, self.batches_left)  # micro-batches in this step
        self.micro = 0  # index of the current micro-batch in the window
        self.loss, self.ids = torch.zeros((), device=self.device), []
        self.saved_buffers: SavedBuffers | None = None
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Wrap forward and loss in autocast; only the last micro-batch reduces gradients."""
        self.mark("rest")
        if self.micro == 0:  # not earlier: a rollback may replace the buffers between two steps
            self.saved_buffers = SavedBuffers(self.modules)
        last = self.micro + 1 == self.window
        with sharding.sync_gradients(self.model, last), autocast(self.device, self.amp):
            yield
        self.mark("forward")

    def step(self, loss: Tensor, ids: Tensor | None = None) -> StepResult | None:
        """Run backward and, after the last micro-batch of the window, the optimizer step.

        The gradient is the mean over the micro-batches in the window. If a loss or gradient is not
        finite on any rank, or the loss is a spike, every rank skips the step, and the model's
        buffers are what they were before its forward passes.
        ids: (N,) of the samples, for the report of `read`.
        """
        self.loss += loss.detach() / self.window
        self.ids += [] if ids is None else [ids]
        self._backward(self.scaler.scale(loss / self.window))
        self.micro += 1
        self.batches_left -= 1
        if self.micro < self.window:
            return None
        if any(parameter.grad is None for parameter in self.parameters):
            sharding.check_gradients(self.model)
        for parameter in self.frozen:
            parameter.grad = None
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(grads)
        if self.watched and self.batches_left == 0:
            self.watched_norms = torch.stack([*map(self._norm_of, self.watched)])
        if self.clip_grad is not None:
            self._clip(grads, norm)
        norm = sharding.full_tensor(norm).detach()
        taken = self._finish_step(norm)
        self._open_window()
        self.mark("optimizer")
        return StepResult(taken, norm)

    def _backward(self, loss: Tensor) -> None:
        """Run backward; after the last micro-batch of a window all gradients are averages.

        DistributedDataParallel averages them while backward computes others. What is left when the
        last one is computed, and only that, is time for communication.
        """
        is_last = self.micro + 1 == self.window
        if self.communicates and is_last:
            sharding.before_gradient_sync(loss, partial(self.mark, "backward"))
        loss.backward(create_graph=self.second_order)
        if is_last:
            sharding.average_gradients(self.loss_parameters)  # which are not in the model
        self.mark("comm" if self.communicates and is_last else "backward")

    def _norm_of(self, parameters: list[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of these parameters, as a tensor on the device."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            return torch.zeros((), device=self.device)
        return sharding.full_tensor(nn.utils.get_total_norm(grads)).detach().to(self.device)

    def _clip(self, grads: list[Tensor], norm: Tensor) -> None:
        """Clip the gradients in place; `norm` is theirs."""
        if self.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        elif self.clip_mode == "value":
            for grad in map(sharding.to_local, grads):
                grad.clamp_(-self.clip_grad, self.clip_grad)
        else:
            clip_adaptively(self.adaptive, self.clip_grad)

    def _finish_step(self, norm: Tensor) -> Tensor:
        """Take or skip the step and record its values; returns a bool tensor, True if taken."""
        bad = torch.stack([~torch.isfinite(self.loss), ~torch.isfinite(norm)])
        values = torch.cat([self.loss.nan_to_num(0.0, 0.0, 0.0)[None], bad.to(self.loss.dtype)])
        if self.communicates:
            self.mark("optimizer")
        loss, bad_losses, bad_norms = all_reduce_sum(values).unbind()  # over all ranks
        if self.communicates:
            self.mark("comm")
        loss, loss_ok = loss / get_world_size(), bad_losses == 0
        spike = self._is_spike(loss)
        taken = loss_ok & (bad_norms == 0) & ~spike
        self._step_if(taken)
        if self.saved_buffers is not None:
            self.saved_buffers.restore_unless(taken)
        # With a finite loss, an overflow may only mean that fp16 needs a smaller loss scale.
        scale = self.scaler.scale(torch.ones((), device=self.device))
        bad = ~taken & (~loss_ok | spike | (scale <= 1))
        loss_or_nan = torch.where(loss_ok, loss, math.nan)
        values = torch.stack([taken, bad, loss_or_nan, norm, self.running_loss])
        self.records.append((self.ids, values))
        self.skipped += ~taken
        self.num_losses += taken
        weight = 1 / self.num_losses.clamp(1, RUNNING_STEPS)
        self.running_loss += torch.where(taken, (loss - self.running_loss) * weight, 0.0)
        self.scaler.update()
        return taken

    def _is_spike(self, loss: Tensor) -> Tensor:
        if not self.spike_factor:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        warm = (self.num_losses >= WARMUP_STEPS) & (self.running_loss > 0)
        return warm & (loss > self.spike_factor * self.running_loss)

    def _step_if(self, taken: Tensor) -> None:
        """Step the optimizer if `taken`, without the scaler: the gradients are unscaled already."""
        if self.skips_on_device:
            self.local_optimizer.found_inf = (~taken).float()
            self.optimizer.step()
            del self.local_optimizer.found_inf
        elif taken:  # the host waits here
            self.optimizer.step()
            self.skips_on_device = self.can_skip

    def state(self) -> dict[str, float]:
        """Return the running mean and counters as plain numbers, for a checkpoint."""
        return {  # keys of the first version, so that checkpoints of all versions load
            "losses": int(self.num_losses),
            "usual_loss": float(self.running_loss),
            "bad_in_a_row": self.bad_in_a_row,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Restore `state()`."""
        self.num_losses.fill_(state["losses"])
        self.running_loss.fill_(state["usual_loss"])
        self.bad_in_a_row = state["bad_in_a_row"]
        self.skips_on_device = False  # the restored optimizer may not have stepped yet

    def read(self) -> tuple[int, list[BadStep]]:
        """Return (skipped steps since the last `read`, the bad ones of them); synchronizes."""
        records, self.records = self.records, []
        self.skipped.zero_()
        rows = torch.stack([row for _, row in records]).tolist() if records else []
        bad_steps = []
        for index, (taken, bad, *values) in enumerate(rows):
            self.bad_in_a_row = 0 if taken else self.bad_in_a_row + int(bad)
            if bad:
                ids, steps_ago = records[index][0], len(rows) - index
                bad_steps.append(BadStep(steps_ago, self.bad_in_a_row, ids, *values))
        return sum(not taken for taken, *_ in rows), bad_steps
