# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Data-parallel modes of a model and its optimizer: DDP, ZeRO-1 and FSDP2.

torchrun --nproc_per_node=2 main_pretrain.py --recipe digits_pretrain --shard zero1
"""

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from config.calls import parse_call
from errors import UserError, first_few, plural
from parallel.process_group import WAIT_FOR_RANKS, all_gather, get_logger, get_world_size

# Parts of names of optimizers that look at all parameters together, or that are untested with
# zero1, where each process updates only some of the parameters.
NOT_ZERO1 = ("lamb", "kron", "hessian", "lookahead", "bnb", "fused")
# Optimizers that give the same weights with fsdp, where each process holds rows of a parameter.
FSDP_OPTIMIZERS = ("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamc", "adamw", "adan")
FSDP_OPTIMIZERS += ("adanw", "adopt", "adoptc", "adoptw", "lamb", "lambc", "lambw", "laprop")
FSDP_OPTIMIZERS += ("lapropc", "lars", "lion", "lionc", "madgrad", "madgradw", "momentum", "nadam")
FSDP_OPTIMIZERS += ("nadamc", "nadamw", "nesterov", "nesterovw", "radam", "radamw", "rmsprop")
FSDP_OPTIMIZERS += ("rmsproptf", "rmsproptfw", "sgd", "sgdc", "sgdw")
HAS_FSDP = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
NOT_FSDP = ("amp fp16", "compile", "cuda_graphs", "model_ema_force_cpu")
LISTS = (nn.Sequential, nn.ModuleList)


# Recognized by attributes: importing torch's sharding modules takes 0.3 s, and some builds of torch
# lack them.


def is_dtensor(tensor: Any) -> bool:
    """True for a DTensor, of which each process holds some rows."""
    return hasattr(tensor, "full_tensor")


def is_zero(optimizer: Any) -> bool:
    """True for a ZeroRedundancyOptimizer."""
    return hasattr(optimizer, "consolidate_state_dict")


def is_fsdp(module: nn.Module) -> bool:
    """True for a module that `fully_shard` has sharded."""
    return hasattr(module, "set_requires_gradient_sync")


@dataclass(frozen=True)
class Parallelism:
    """Data-parallel mode: ddp replicates, zero1 shards optimizer state, fsdp shards everything.

    compress: average gradients in bf16. A single process always uses ddp.
    """

    mode: str
    device: torch.device
    amp: str = "none"
    compress: bool = False

    def shard(self, *models: nn.Module | None) -> None:
        """With fsdp shard the parameters of `models` in place, block by block.

        Under --amp bf16 weights are gathered in bf16; gradients are reduced in float32, or in
        bf16 with `compress`.
        """
        for model in filter(None, models):
            _check_parameters(model, self.mode)
            if self.mode == "fsdp":
                self._fully_shard(model)

    def _fully_shard(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # As DistributedDataParallel does:
        broadcast_tensors(chain(model.parameters(), model.buffers()))
        # FCMAE returns its prediction as a view, and nothing writes into it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (get_world_size(),))
        half = torch.bfloat16 if self.amp == "bf16" else None
        reduced = torch.bfloat16 if self.compress else torch.float32 if half else None
        policy = MixedPrecisionPolicy(half, reduced, cast_forward_inputs=False)
        if half:  # BatchNorm's running statistics are float32, so its weights must be too
            exact = MixedPrecisionPolicy(None, reduced, cast_forward_inputs=False)
            for norm in [module for module in model.modules() if isinstance(module, _BatchNorm)]:
                fully_shard(norm, mesh=mesh, mp_policy=exact, reshard_after_forward=True)
        for unit in units(model):
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model for training, in DistributedDataParallel unless fsdp or alone."""
        if get_world_size() == 1 or self.mode == "fsdp":
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        if self.compress:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return wrapped


def build_parallelism(args: Any, device: torch.device, amp: str) -> Parallelism:
    """Return the `Parallelism` of the flags; refuse flags that do not work together."""
    _check_optimizer(parse_call(args.opt, "--opt").name, args.shard)
    flags = {"amp fp16": amp == "fp16", **vars(args)}
    if args.shard == "fsdp":
        for flag in filter(flags.get, NOT_FSDP):
            raise UserError(f"--{flag} does not work with --shard fsdp; drop it, or --shard zero1")
        if not HAS_FSDP:
            raise UserError(f"--shard fsdp needs torch 2.7, this is {torch.__version__}; use zero1")
    if get_world_size() > 1:
        return Parallelism(args.shard, device, amp, args.grad_compression == "bf16")
    for flag, default in (("shard", "ddp"), ("grad_compression", "none"), ("sync_bn", False)):
        if flags[flag] != default:
            get_logger().info("--%s %s has no effect with a single process", flag, flags[flag])
    return Parallelism("ddp", device, amp)


def _check_optimizer(opt: str, shard: str) -> None:
    if get_world_size() > 1 and "hessian" in opt.lower():
        raise UserError(
            f"--opt {opt} works in a single process only, since its second derivatives are not "
            "averaged over processes; use another such as adamw"
        )
    if shard == "ddp":
        return
    works = opt.lower() in FSDP_OPTIMIZERS
    if shard == "zero1":
        works = not any(part in opt.lower() for part in NOT_ZERO1)
    if not works:
        raise UserError(
            f"--opt {opt} is not known to give the same weights with --shard {shard}; use one such "
            "as adamw, lion or sgd, or --shard ddp"
        )


def units(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: the innermost items of its lists that have children."""
    found = []
    for child in model.children():
        inner = units(child)
        listed = isinstance(model, LISTS) and not isinstance(child, LISTS)
        block = listed and len(inner) < 2 and any(True for _ in child.children())
        found += [child] if block else inner
    return found


@contextlib.contextmanager
def sync_gradients(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Wrap a forward; its backward averages gradients over all processes only if `enabled`."""
    if is_fsdp(model):
        model.set_requires_gradient_sync(enabled)
    no_sync = isinstance(model, DistributedDataParallel) and not enabled
    with model.no_sync() if no_sync else contextlib.nullcontext():
        yield


def before_gradient_sync(loss: Tensor, call: Callable[[], None]) -> None:
    """Let `loss.backward()` call `call` when it has computed all gradients of this process.

    That is before it waits for their averages over all processes: autograd calls what was queued
    first, and DistributedDataParallel queues its wait once the last gradient is ready.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback  # as FSDP2 does
    loss.register_hook(lambda grad: queue(call))


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over all processes: of parameters outside DistributedDataParallel."""
    for parameter in parameters if get_world_size() > 1 else ():
        if parameter.grad is None:  # other processes may have one
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= get_world_size()


def check_gradients(model: nn.Module) -> None:
    """Raise UserError if parameters got no gradient where DistributedDataParallel needs them all.

    Its own error comes a step later, and with numbers instead of names.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return
    named = model.module.named_parameters()
    unused = [name for name, p in named if p.requires_grad and p.grad is None]
    if unused:
        raise UserError(
            f"{plural(len(unused), 'parameter')} got no gradient: {first_few(unused)}. With "
            "several ranks all must contribute to the loss in every step: use them in forward, "
            "freeze them with requires_grad_(False), or remove them from the model"
        )


def _check_parameters(model: nn.Module, shard: str) -> None:
    """Refuse parameters on which torch fails only while training; it refuses others by itself."""
    named = dict(model.named_parameters())
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shared = [name for name in names if name not in named]
    strided = [name for name, parameter in named.items() if not parameter.is_contiguous()]
    problem = f"--shard {shard}: {type(model).__name__} has parameters"
    if shard == "fsdp" and shared:
        raise UserError(f"{problem} under two names: {first_few(shared)}; use --shard zero1")
    if shard == "zero1" and strided:
        raise UserError(f"{problem} that are not contiguous: {first_few(strided)}; use --shard ddp")


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Give `model` its full weights inside the block, so that each process may call it alone.

    All processes must enter. With fsdp this also takes off FSDP2's hooks: they would gather the
    weights in each forward, rounded to bf16 under --amp bf16, and wait there for processes that
    have no batch left. Hooks added inside the block are removed at its end. If one process lacks
    the memory, MemoryError is raised on all.
    """
    if not is_fsdp(model):
        yield model
        return
    full = _gather_parameters(model)
    kinds = ("_parameters", "_forward_pre_hooks", "_forward_hooks")
    modules = [(vars(each), {kind: vars(each)[kind] for kind in kinds}) for each in model.modules()]
    try:
        for attributes, sharded in modules:
            own = sharded["_parameters"].items()
            attributes["_parameters"] = {name: full.get(weight) for name, weight in own}
            for kind in kinds[1:]:
                hooks = sharded[kind].items()
                attributes[kind] = OrderedDict((n, h) for n, h in hooks if not _is_fsdp_hook(h))
        yield model
    finally:
        for attributes, sharded in modules:
            attributes.update(sharded)


def _is_fsdp_hook(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


@torch.inference_mode(False)  # collectives of DTensors do not work in it
@torch.no_grad()
def _gather_parameters(model: nn.Module) -> dict[Tensor, nn.Parameter]:
    """Return a full copy of each parameter. All memory is taken before the first collective."""
    full, problem = {}, ""
    try:
        for weight in model.parameters():
            copy = to_local(weight).new_empty(weight.shape)
            full[weight] = nn.Parameter(copy, weight.requires_grad)
    except torch.OutOfMemoryError as error:
        problem = str(error)
    problems = list(filter(None, all_gather(problem)))
    if problems:
        raise MemoryError(f"not enough memory for all weights: {problems[0]}")
    for weight, copy in full.items():
        copy.copy_(full_tensor(weight))
    return full


def sync_batch_norm(model: nn.Module, args: Any) -> nn.Module:
    """Convert BatchNorm to SyncBatchNorm if the flags say so."""
    if not args.sync_bn:
        return model
    device = next(model.parameters()).device
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(f"--sync_bn: {type(model).__name__} has no BatchNorm; drop it")
    if device.type != "cuda":
        raise UserError(f"--sync_bn works on GPUs only, the device is {device}; drop it")
    return convert_batch_norm(model, args.sync_bn_group)


def convert_batch_norm(model: nn.Module, group: int) -> nn.Module:
    """Convert BatchNorm to SyncBatchNorm over groups of `group` processes, 0 for all of them."""
    from timm.layers import convert_sync_batchnorm  # converts BatchNormAct2d too

    size = get_world_size()
    group = group or size
    if size % group:
        raise UserError(
            f"--sync_bn_group {group} does not divide the {size} processes; use a divisor of "
            f"{size}, or 0 for all of them"
        )
    if size == 1:
        return model
    mine, _ = dist.new_subgroups(group, timeout=WAIT_FOR_RANKS)
    replaced = dict(model.named_modules(remove_duplicate=False))
    model = convert_sync_batchnorm(model, mine)
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not replaced[name]:  # keep the hooks of --heads and gradient checkpointing
            attributes = vars(replaced[name]).items()
            vars(module).update({key: value for key, value in attributes if "_hook" in key})
    return model


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values to all ranks."""
    for tensor in tensors if get_world_size() > 1 else ():
        values = tensor.contiguous()
        dist.broadcast(values, 0)
        tensor.copy_(values)


def wrap_optimizer(
    make: Callable[..., Optimizer], groups: list[dict], lr: float, shard: str
) -> Optimizer:
    """Return `make(groups)`; with zero1 each process makes it for its share of the parameters."""
    if shard != "zero1":
        return make(groups)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # As bucket views, the updated parameters of a process are sent as one tensor.
    return ZeroRedundancyOptimizer(
        groups, lambda own, **_: make(own), parameters_as_bucket_view=True, lr=lr
    )


def local_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that holds this process's state; other objects as they are."""
    return optimizer.optim if is_zero(optimizer) else optimizer


def load_local_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a former `local_optimizer(optimizer).state_dict()`; also for models and others."""
    local = local_optimizer(optimizer)
    local.load_state_dict(state)
    if local is not optimizer:  # which overwrites the local groups before each step
        for group, held in zip(optimizer.param_groups, local.param_groups, strict=True):
            group |= {key: value for key, value in held.items() if key != "params"}


def to_local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a DTensor, other tensors as they are."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a DTensor, return other tensors as they are. All processes must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor
