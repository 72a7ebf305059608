# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""How the processes of a run share its weights, gradients and moments, and bring them together.

torchrun --nproc_per_node=2 main_pretrain.py --data_set DIGITS --model convnextv2_atto \
    --stem_stride 1 --input_size 32 --shard zero1
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from errors import UserError

# Of timm's optimizers: parts of the names of those that look at all parameters together, or were
# not tried, so that no process can have some alone (zero1); and those that came out the same where
# each process had but some rows of a parameter (fsdp).
TOGETHER = ("lamb", "kron", "hessian", "lookahead", "bnb", "fused")
BY_ROWS = ("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamc", "adamw", "adan", "adanw")
BY_ROWS += ("adopt", "adoptc", "adoptw", "lamb", "lambc", "lambw", "laprop", "lapropc", "lars")
BY_ROWS += ("lion", "lionc", "madgrad", "madgradw", "momentum", "nadam", "nadamc", "nadamw")
BY_ROWS += ("nesterov", "nesterovw", "radam", "radamw", "rmsprop", "rmsproptf", "rmsproptfw")
BY_ROWS += ("sgd", "sgdc", "sgdw")
LISTS = (nn.Sequential, nn.ModuleList)

# What follows is asked of every tensor, module and optimizer, also where torch is built without
# the modules that define these kinds, or nobody needs the third of a second that they take to load.


def is_spread(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each process has some rows."""
    return hasattr(tensor, "full_tensor")


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")


def _is_zero(part: Any) -> bool:
    return hasattr(part, "consolidate_state_dict")


def _size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Sharing:
    """Who has what: `ddp` everything, `zero1` its share of the moments, `fsdp` its rows of all.

    compress: gradients travel in bf16. One process has nobody to share with, and is `ddp`.
    """

    mode: str
    device: torch.device
    amp: str = "none"
    compress: bool = False

    def spread(self, *models: nn.Module | None) -> None:
        """With fsdp give each process its rows of every parameter, in place: FSDP2, by block.

        Under bf16 the weights travel in it, and gradients in float32 unless compressed.
        """
        if self.mode != "fsdp":
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # FCMAE's prediction is one, and nothing writes into it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (_size(),))
        half = torch.bfloat16 if self.amp == "bf16" else None
        summed = torch.bfloat16 if self.compress else torch.float32 if half else None
        policy = MixedPrecisionPolicy(half, summed, cast_forward_inputs=False)
        for model in filter(None, models):
            for unit in units(model):
                fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model for training: DistributedDataParallel if there is a group, unless `spread`."""
        if _size() == 1 or self.mode == "fsdp":
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        if self.compress:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return wrapped


def build_sharing(args: Any, device: torch.device, amp: str) -> Sharing:
    """`Sharing` as the flags say, if they go together."""
    _check_optimizer(args.opt, args.shard)
    given = {"amp fp16": amp == "fp16", **vars(args)}
    for flag in ("amp fp16", "compile", "cuda_graphs", "model_ema_force_cpu"):
        if args.shard == "fsdp" and given.get(flag):
            raise UserError(f"--{flag} does not go with --shard fsdp; drop it, or --shard zero1")
    if args.shard == "fsdp" and not has_fsdp(device):
        raise UserError(f"--shard fsdp on a CPU needs torch 2.7, this is {torch.__version__}")
    if args.sync_bn_group and not args.sync_bn:
        raise UserError("--sync_bn_group without --sync_bn true: give both, or neither")
    mode = args.shard if _size() > 1 else "ddp"
    if mode != args.shard:
        logging.getLogger("convnextv2").info("--shard %s: one process keeps all", args.shard)
    return Sharing(mode, device, amp, args.grad_compression == "bf16")


def has_fsdp(device: torch.device) -> bool:
    """Whether torch's FSDP2 works there: before 2.7 it cannot do without CUDA's streams."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return dist.is_available() and (device.type != "cpu" or version >= (2, 7))


def _check_optimizer(opt: str, shard: str) -> None:
    name = opt.lower()
    alone = not any(part in name for part in TOGETHER)
    if {"ddp": True, "zero1": alone, "fsdp": name in BY_ROWS}[shard]:
        return
    expected = "adamw, lion, sgd and others" if shard == "zero1" else f"one of {', '.join(BY_ROWS)}"
    raise UserError(
        f"--opt {opt} with --shard {shard}: not known to give the same weights when each process "
        f"has but a part of them; expected {expected}, or --shard ddp"
    )


# --- the model ----------------------------------------------------------------------------------


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks of a network: what its lists hold that has parts, none inside another."""
    found = []
    for child in model.children():
        listed = isinstance(model, LISTS) and not isinstance(child, LISTS)
        found += [child] if listed and any(True for _ in child.children()) else units(child)
    return found


@contextlib.contextmanager
def exchange(model: nn.Module, now: bool) -> Iterator[None]:
    """Around a forward: whether its backward brings the processes' gradients together."""
    if _is_fsdp(model):
        model.set_requires_gradient_sync(now)
    waits = isinstance(model, DistributedDataParallel) and not now
    with model.no_sync() if waits else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within, each process has all of the weights and may call the model alone. All must enter."""
    spreads = [module for module in model.modules() if _is_fsdp(module)]
    for module in spreads:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in spreads:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)


def sync_batch_norm(model: nn.Module, args: Any) -> nn.Module:
    """`model` whose BatchNorms take their statistics over several processes, as the flags say."""
    device = next(model.parameters()).device
    if not args.sync_bn:
        return model
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UserError(f"--sync_bn: {type(model).__name__} has no BatchNorm; drop it")
    if device.type != "cuda":
        raise UserError(f"--sync_bn: torch synchronises BatchNorm on GPUs only, this is {device}")
    return converted(model, args.sync_bn_group)


def converted(model: nn.Module, group: int) -> nn.Module:
    """`model` with SyncBatchNorm in groups of so many processes, 0 for all of them."""
    from timm.layers import convert_sync_batchnorm  # knows those with activations too

    group = group or _size()
    if _size() % group:
        fits = [n for n in range(1, _size() + 1) if _size() % n == 0]
        raise UserError(
            f"--sync_bn_group {group}: {_size()} processes are no multiple of it; expected one of "
            f"{', '.join(map(str, fits))}"
        )
    if _size() == 1:
        return model
    ranks = list(range(_size()))
    groups = [ranks[first : first + group] for first in range(0, len(ranks), group)]
    mine, _ = dist.new_subgroups_by_enumeration(groups)
    return convert_sync_batchnorm(model, mine)


def broadcast_buffers(model: nn.Module) -> None:
    """The main process's on all: running statistics differ, and an evaluation must not."""
    for buffer in model.buffers() if _size() > 1 else ():
        dist.broadcast(buffer, 0)


# --- the optimizer ------------------------------------------------------------------------------


def build(make: Callable[..., Optimizer], groups: list[dict], lr: float, shard: str) -> Optimizer:
    """`make(groups)`; with zero1 each process makes it for its share of the parameters."""
    if shard != "zero1":
        return make(groups)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    kinds = {parameter.dtype for group in groups for parameter in group["params"]}
    flat = len(kinds) == 1  # what changes of a process's share travels as one tensor
    share = {"optimizer_class": lambda own, **_: make(own), "lr": lr}
    return ZeroRedundancyOptimizer(groups, parameters_as_bucket_view=flat, **share)


def own_part(part: Any) -> Any:
    """What holds this process's part of the state, and takes it back."""
    return part.optim if _is_zero(part) else part


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is spread; others are whole anyway."""
    return tensor.to_local() if is_spread(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread. Every process must call it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


# --- whole states, as files have them -----------------------------------------------------------


def whole_state(part: Any) -> Any:
    """`part.state_dict()` as one process would have it; of use on the main process alone.

    Every process must call it.
    """
    if _is_zero(part):
        part.consolidate_state_dict(to=0)
        return part.state_dict() if dist.get_rank() == 0 else {}
    return _whole(part.state_dict())


def _whole(value: Any) -> Any:
    if is_spread(value):
        value = value.full_tensor()  # on every process, for a moment
        return value.cpu() if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_whole(item) for item in value)
    return value


def spread_like(value: Any, like: Tensor) -> Any:
    """A whole tensor as `like` is: this process keeps its rows. What is no such tensor stays."""
    if not is_spread(like) or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict` of whole weights, some of which may be missing."""
    own = model.state_dict()
    fitting = {name: spread_like(value, own[name]) for name, value in weights.items()}
    model.load_state_dict(fitting, strict=False)


def _parameters(state_or_optimizer: Any) -> list[Any]:
    groups = getattr(state_or_optimizer, "param_groups", None) or state_or_optimizer["param_groups"]
    return list(chain.from_iterable(group["params"] for group in groups))


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of a whole state; each process takes what it has a part of."""
    part = own_part(optimizer)
    numbers = dict(zip(_parameters(optimizer), _parameters(saved), strict=True))
    state = {}
    for place, parameter in enumerate(_parameters(part)):
        held = saved["state"].get(numbers[parameter])
        if held is not None:
            state[place] = {key: spread_like(value, parameter) for key, value in held.items()}
    own = part.state_dict()["param_groups"]
    groups = [g | {"params": o["params"]} for g, o in zip(saved["param_groups"], own, strict=True)]
    part.load_state_dict({"state": state, "param_groups": groups})
