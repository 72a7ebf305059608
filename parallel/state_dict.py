# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Full state dicts of sharded models and optimizers, as a single process would save them.

torchrun --nproc_per_node=2 main_pretrain.py --recipe digits_pretrain --shard zero1

The optimizer state is numbered by parameter, as in torch's own optimizers, so that a run with any
--shard, on any number of processes, can resume from it. torch.distributed.checkpoint.state_dict
names it by module instead, and takes an extra step where no state exists yet. The method
ZeroRedundancyOptimizer.consolidate_state_dict packs bytes one by one: minutes for a large model.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import UserError
from parallel.process_group import get_world_size, is_main_process
from parallel.sharding import full_tensor, is_dtensor, is_zero, load_local_state, local_optimizer

COUNTERS = ("params", "step", "lookahead_step", "k")  # entries of groups that are no options


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply `function` to the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [map_tensors(value, function) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


def tensor_leaves(tree: Any) -> list[Tensor]:
    """Return the tensors in nested dicts, lists and tuples."""
    leaves: list[Tensor] = []
    map_tensors(tree, leaves.append)
    return leaves


def copy_to_cpu(tree: Any) -> Any:
    """Copy nested tensors to host memory, where training does not change them."""
    return map_tensors(tree, lambda tensor: tensor.detach().to("cpu", copy=True))


def full_state_dict(module_or_optimizer: Any) -> dict[str, Any]:
    """Return the state dict with full tensors on the main process, without tensors on the others.

    All processes must call it.
    """
    if is_zero(module_or_optimizer):
        return _gather_zero(module_or_optimizer)
    return map_tensors(module_or_optimizer.state_dict(), _gather)


def _gather(tensor: Tensor) -> Tensor | None:
    """Gather a DTensor to host memory; copy a view of a bucket, which a file would hold whole."""
    full = full_tensor(tensor)
    if not is_main_process():
        return None
    is_view = full.untyped_storage().nbytes() > full.nbytes
    return full.to("cpu", copy=is_view) if is_view or is_dtensor(tensor) else full


def _gather_zero(optimizer: Any) -> dict[str, Any]:
    """Return the states of all ranks on the main one, sent parameter by parameter."""
    numbers = {parameter: n for n, parameter in enumerate(_parameters(optimizer.param_groups))}
    state = {numbers[p]: held for p, held in local_optimizer(optimizer).state.items()}
    if not is_main_process():
        for item in state.items():
            dist.send_object_list([map_tensors(item, Tensor.cpu)], 0)
        dist.send_object_list([None], 0)
        return {}
    for rank in range(1, get_world_size()):
        state |= dict(iter(partial(_receive, rank), None))
    groups = [g | {"params": [numbers[p] for p in g["params"]]} for g in optimizer.param_groups]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _receive(rank: int) -> Any:
    received = [None]
    dist.recv_object_list(received, rank)
    return received[0]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load full weights, some of which may be missing; each process keeps its shard."""
    current = model.state_dict()
    sharded = {name: _shard_like(value, current[name]) for name, value in weights.items()}
    model.load_state_dict(sharded, strict=False)


def optimizer_name(optimizer: Optimizer) -> str:
    """Return the name of the optimizer's class, without the wrapper of zero1."""
    return type(local_optimizer(optimizer)).__name__


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any], source: str) -> None:
    """Load a full optimizer state; each process keeps its shard.

    Learning rate, weight decay and betas stay as the flags set them. UserError if the state is of
    another optimizer or of other parameter groups; `source` names its file.
    """
    name = optimizer_name(optimizer)
    if saved.get("name", name) != name:
        raise UserError(f"{source}: saved by {saved['name']}, this run uses {name}; change --opt")
    own_groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    ours, theirs = ([len(g["params"]) for g in groups] for groups in (own_groups, saved_groups))
    if ours != theirs:
        raise UserError(
            f"{source}: its optimizer has parameter groups of {theirs} tensors, this run has "
            f"{ours}; resume with the same --layer_decay, --layer_decay_type, --weight_decay, "
            "--no_weight_decay, --param_group and --freeze"
        )
    local = local_optimizer(optimizer)
    numbers = dict(zip(_parameters(own_groups), _parameters(saved_groups), strict=True))
    state = {}
    for place, parameter in enumerate(_parameters(local.param_groups)):
        held = saved["state"].get(numbers[parameter])
        if held is not None:
            state[place] = {key: _shard_like(value, parameter) for key, value in held.items()}
    groups = []
    for group, own, held in zip(
        saved_groups, own_groups, local.state_dict()["param_groups"], strict=True
    ):
        options = {key: value for key, value in own.items() if key not in COUNTERS}
        groups.append(group | options | {"params": held["params"]})
    load_local_state(optimizer, saved | {"state": state, "param_groups": groups})


def _shard_like(value: Any, like: Tensor) -> Any:
    """Shard a full tensor as `like`, if that is a DTensor of the same shape."""
    if not is_dtensor(like) or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _parameters(groups: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in groups))
