# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""How the processes of a run share its weights, gradients and moments, and bring them together.

torchrun --nproc_per_node=2 main_pretrain.py --data_set DIGITS --model convnextv2_atto \
    --stem_stride 1 --input_size 32 --shard zero1
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from errors import UserError, first_few, resolve

# Longer than the default for nccl: ranks may wait for a download or an evaluation.
WAIT_FOR_RANKS = timedelta(hours=1)

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
NUMBERS = (bool, int, float, str, type(None), Tensor)  # what a module may hold beside its parts
PLAIN: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # of those that are spread

# What follows is asked of every tensor, module and optimizer, also where torch is built without
# the modules that define these kinds, or nobody needs the third of a second that they take to load.


def is_spread(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each process has some rows."""
    return hasattr(tensor, "full_tensor")


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")


def is_zero(part: Any) -> bool:
    """Whether it is a ZeroRedundancyOptimizer."""
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
        for model in filter(None, models):
            _check_parameters(model, self.mode)
            if self.mode == "fsdp":
                self._spread(model)

    def _spread(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        _broadcast(chain(model.parameters(), model.buffers()))  # as DistributedDataParallel does
        PLAIN[model] = _without_weights(model)
        # FCMAE's prediction is one, and nothing writes into it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (_size(),))
        half = torch.bfloat16 if self.amp == "bf16" else None
        summed = torch.bfloat16 if self.compress else torch.float32 if half else None
        policy = MixedPrecisionPolicy(half, summed, cast_forward_inputs=False)
        if half:  # running statistics stay in float32, and so must what is used with them
            exact = MixedPrecisionPolicy(None, summed, cast_forward_inputs=False)
            for norm in [module for module in model.modules() if isinstance(module, _BatchNorm)]:
                fully_shard(norm, mesh=mesh, mp_policy=exact, reshard_after_forward=True)
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
    if args.shard == "fsdp" and not has_fsdp():
        raise UserError(f"--shard fsdp needs torch 2.7, this is {torch.__version__}; use zero1")
    if args.sync_bn_group and not args.sync_bn:
        raise UserError("--sync_bn_group without --sync_bn true: give both, or neither")
    if args.sync_bn and given.get("cuda_graphs"):
        raise UserError("--cuda_graphs does not go with --sync_bn; drop one of them")
    if _size() > 1:
        return Sharing(args.shard, device, amp, args.grad_compression == "bf16")
    usual = {"shard": "ddp", "grad_compression": "none", "sync_bn": False}
    for flag in [flag for flag, value in usual.items() if given[flag] != value]:
        text = "--%s %s: one process has nobody to share with"
        logging.getLogger("convnextv2").info(text, flag, given[flag])
    return Sharing("ddp", device, amp)


def has_fsdp() -> bool:
    """Whether torch has all of FSDP2 that is used here."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return dist.is_available() and version >= (2, 7)


def _check_optimizer(opt: str, shard: str) -> None:
    if shard == "ddp":
        return
    from timm.optim import list_optimizers

    name, known = opt.lower(), dict.fromkeys(list_optimizers())
    resolve(name.removeprefix("lookahead_"), known, "optimizer", importable=False)
    alone = not any(part in name for part in TOGETHER)
    if alone if shard == "zero1" else name in BY_ROWS:
        return
    expected = "adamw, lion, sgd and others" if shard == "zero1" else f"one of {', '.join(BY_ROWS)}"
    raise UserError(
        f"--opt {opt} with --shard {shard}: not known to give the same weights when each process "
        f"has but a part of them; expected {expected}, or --shard ddp"
    )


# --- the model ----------------------------------------------------------------------------------


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks of a network: what its lists hold that has parts; of stages, what theirs hold."""
    found = []
    for child in model.children():
        inner = units(child)
        listed = isinstance(model, LISTS) and not isinstance(child, LISTS)
        block = listed and len(inner) < 2 and any(True for _ in child.children())
        found += [child] if block else inner
    return found


@contextlib.contextmanager
def exchange(model: nn.Module, now: bool) -> Iterator[None]:
    """Around a forward: whether its backward brings the processes' gradients together."""
    if _is_fsdp(model):
        model.set_requires_gradient_sync(now)
    waits = isinstance(model, DistributedDataParallel) and not now
    with model.no_sync() if waits else contextlib.nullcontext():
        yield


def _check_parameters(model: nn.Module, shard: str) -> None:
    """What the engines below would say with less words, some of them after the first batch."""
    named, kind, rows = dict(model.named_parameters()), type(model).__name__, shard == "fsdp"
    kinds = sorted({str(parameter.dtype) for parameter in named.values()})
    if shard != "ddp" and len(kinds) > 1:
        raise UserError(
            f"--shard {shard}: {kind} has parameters of {' and '.join(kinds)}, and they can only "
            "be shared if they are all alike; make them so, or use --shard ddp"
        )
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    problems = {
        "that are not contiguous": [name for name, p in named.items() if not p.is_contiguous()],
        "without rows": [name for name, p in named.items() if rows and not p.ndim],
        "under two names": [name for name in every if rows and name not in named],
    }
    for what, names in problems.items() if shard != "ddp" else ():
        if names:
            other = "ddp" if "contiguous" in what else "zero1"
            raise UserError(
                f"--shard {shard}: {kind} has parameters {what}: {first_few(names)}; "
                f"use --shard {other}"
            )


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are empty; a group of processes cannot be copied."""
    synced = [module for module in model.modules() if hasattr(module, "process_group")]
    memo: dict[int, Any] = {id(module.process_group): module.process_group for module in synced}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.new_empty(0), weight.requires_grad)
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"--shard fsdp: {type(model).__name__} cannot be copied ({error}); use --shard zero1"
        ) from error


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Within, a network with all of the weights, which each process may call alone.

    The model itself, unless it is spread; then a copy, with the hooks that it had at first. Every
    process must enter. torch.OutOfMemoryError, on all of them, if one has no memory for it.
    """
    plain = PLAIN.get(model)
    if plain is None:
        yield model
        return
    for ours, theirs in zip(plain.modules(), model.modules(), strict=True):
        numbers = {name: v for name, v in vars(theirs).items() if type(v) in NUMBERS}
        vars(ours).update(numbers)  # `training` is one
        ours._buffers = theirs._buffers
    pairs = list(zip(plain.parameters(), model.parameters(), strict=True))
    try:
        with torch.inference_mode(False), torch.no_grad():  # in which nothing can be gathered
            _take_memory(pairs)
            try:
                for whole, weight in pairs:
                    whole.copy_(full(weight))
            except torch.OutOfMemoryError as error:  # of this process alone: nobody can go on
                raise RuntimeError(f"no memory to gather all weights: {error}") from error
        yield plain
    finally:
        for whole, _ in pairs:
            whole.data = whole.new_empty(0)


def _take_memory(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Before anything is gathered, in the middle of which no process can leave the others."""
    problem = ""
    try:
        for whole, weight in pairs:
            whole.data = whole.new_empty(weight.shape)
    except torch.OutOfMemoryError as error:
        problem = str(error)
    told: list[str] = [""] * _size()
    dist.all_gather_object(told, problem)
    for problem in filter(None, told):
        raise torch.OutOfMemoryError(f"no memory for all weights on each process: {problem}")


def sync_batch_norm(model: nn.Module, args: Any) -> nn.Module:
    """`model` whose BatchNorms take their statistics over several processes, as the flags say."""
    device = next(model.parameters()).device
    if not args.sync_bn:
        return model
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
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
    mine, _ = dist.new_subgroups_by_enumeration(groups, timeout=WAIT_FOR_RANKS)
    return convert_sync_batchnorm(model, mine)


def broadcast_buffers(model: nn.Module) -> None:
    """The main process's on all: running statistics differ, and an evaluation must not."""
    _broadcast(model.buffers())


@torch.no_grad()
def _broadcast(tensors: Iterable[Tensor]) -> None:
    """Rank 0's on all, as bytes: not every engine knows every type, nor gaps between numbers."""
    for tensor in tensors if _size() > 1 else ():
        own = tensor.detach().contiguous().flatten().view(torch.uint8)
        told = own.clone()
        dist.broadcast(told, 0)
        if not torch.equal(told, own):  # nothing can be written to what was expanded
            tensor.copy_(told.view(tensor.dtype).view(tensor.shape))


# --- the optimizer ------------------------------------------------------------------------------


def build(make: Callable[..., Optimizer], groups: list[dict], lr: float, shard: str) -> Optimizer:
    """`make(groups)`; with zero1 each process makes it for its share of the parameters."""
    if shard != "zero1":
        return make(groups)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    share = {"optimizer_class": lambda own, **_: make(own), "lr": lr}
    # What changes of a process's share travels as one tensor.
    return ZeroRedundancyOptimizer(groups, parameters_as_bucket_view=True, **share)


def own_part(part: Any) -> Any:
    """What holds this process's part of the state; `restore` puts it back."""
    return part.optim if is_zero(part) else part


def restore(part: Any, state: dict[str, Any]) -> None:
    """Load what `own_part(part).state_dict()` was."""
    own = own_part(part)
    own.load_state_dict(state)
    if own is not part:  # it gives its groups to its part before each step
        for group, held in zip(part.param_groups, own.param_groups, strict=True):
            group |= {key: value for key, value in held.items() if key != "params"}


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is spread; others are whole anyway."""
    return tensor.to_local() if is_spread(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread. Every process must call it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor
