# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Weights and moments as files have them, whole, from and to processes that each have a part.

torchrun --nproc_per_node=2 main_pretrain.py --data_set DIGITS --model convnextv2_atto \
    --stem_stride 1 --input_size 32 --shard zero1 --output_dir runs/zero1
python main_pretrain.py --data_set DIGITS --model convnextv2_atto --stem_stride 1 \
    --input_size 32 --output_dir runs/zero1  # goes on from it
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.sharding import is_spread, is_zero, own_part, restore


def whole_state(part: Any) -> Any:
    """`part.state_dict()` as one process would have it, on the main process; {} or less elsewhere.

    Every process must call it.
    """
    return _whole(_gathered(part) if is_zero(part) else part.state_dict(), _is_main())


def _is_main() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _gathered(optimizer: Any) -> dict[str, Any]:
    """The state of which each process has a part; all get to see it, one tensor at a time."""
    numbers = {parameter: number for number, parameter in enumerate(_parameters(optimizer))}
    mine = {numbers[parameter]: held for parameter, held in own_part(optimizer).state.items()}
    forms = [{}] * dist.get_world_size()
    dist.all_gather_object(forms, _form(mine))
    device, state = next(iter(numbers)).device, {}
    for owner, form in enumerate(forms):
        state |= _told(form, mine if owner == dist.get_rank() else None, owner, device)
    groups = [g | {"params": [numbers[p] for p in g["params"]]} for g in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


def _form(value: Any) -> Any:
    """A tensor without its numbers; what is not worth a message of its own stays."""
    if isinstance(value, dict):
        return {key: _form(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_form(item) for item in value]
    if isinstance(value, Tensor):
        return value.to("meta") if value.ndim else value.cpu()
    return value


def _told(form: Any, value: Any, owner: int, device: torch.device) -> Any:
    """`value` of one process, on the main one. It is None on others, which have its form alone."""
    if isinstance(form, dict):
        return {k: _told(f, value and value[k], owner, device) for k, f in form.items()}
    if isinstance(form, list):
        return [_told(f, value and value[n], owner, device) for n, f in enumerate(form)]
    if not (isinstance(form, Tensor) and form.is_meta):
        return form
    if owner == 0:
        return value
    here = (
        torch.empty(form.shape, dtype=form.dtype, device=device)
        if value is None
        else value.to(device).contiguous()
    )
    dist.broadcast(here, owner)
    return here.cpu() if dist.get_rank() == 0 else None


def _whole(value: Any, keep: bool) -> Any:
    if isinstance(value, Tensor):
        spread = is_spread(value)
        value = value.full_tensor() if spread else value  # on every process, for a moment
        if not keep:
            return None
        of_bucket = value.untyped_storage().nbytes() > value.nbytes  # a file would hold all of it
        return value.to("cpu", copy=of_bucket) if spread or of_bucket else value
    if isinstance(value, dict):
        return {key: _whole(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_whole(item, keep) for item in value)
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
    restore(optimizer, saved | {"state": state, "param_groups": groups})
