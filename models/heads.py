# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Heads for any network: in place of its classifier, or several of them on chosen blocks.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --input_size 32 --head "mlp(64)"
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.calls import Call, accepted, is_named, parse_call, parse_named, parse_sum
from errors import UserError, describe_error, resolve_for
from models.arguments import check_positive, look_up, typed

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}
# Losses that use sigmoids or numbers; all others use softmax. They choose how `Conv` averages.
SIGMOIDS = ("bce", "binary_focal", "asymmetric", "zlpr", "BCEWithLogitsLoss")
SIGMOIDS += ("MultiLabelSoftMarginLoss", "SoftMarginLoss")
NUMBERS = ("l1", "l2", "smooth_l1", "barron", "L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss")
NUMBERS += ("PoissonNLLLoss",)


# --- heads ----------------------------------------------------------------------------------------


def make_dropout(dropout: float) -> nn.Dropout:
    """Return a dropout layer; UserError for a rate that is out of range."""
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}, expected at least 0 and below 1")
    return nn.Dropout(dropout)


class Neck(nn.Module):
    """Features of a network -> (N, D): mean over positions, then norm, L2 norm 1 and dropout.

    Features are a map (N, D, h, w), tokens (N, L, D) or a vector (N, D). `class_token`: take the
    first token, not the mean of those after the first `prefix_tokens`.
    """

    class_token, prefix_tokens = False, 0

    def __init__(self, dim: int, norm: bool, l2: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.l2, self.dropout = l2, make_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.prepare(self.pool(x))

    def pool(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return x[:, 0] if self.class_token else x[:, self.prefix_tokens :].mean(1)
        return x.mean((-2, -1)) if x.ndim == 4 else x

    def prepare(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), after pooling."""
        x = self.norm(x)
        return self.dropout(F.normalize(x, dim=-1) if self.l2 else x)


class Linear(nn.Linear):
    """ClassyVision's `fully_connected`: [1x1 convolution, BatchNorm, act] -> mean -> linear.

    planes: outputs of the convolution; None for none. l2: features of norm 1. norm: LayerNorm of
    the features. zero_init_bias: the bias starts as 0.
    """

    takes_maps = False

    def __init__(
        self,
        dim: int,
        num_classes: int,
        l2: bool = False,
        norm: bool = False,
        dropout: float = 0.0,
        zero_init_bias: bool = False,
        planes: int | None = None,
        act: str = "relu",
    ) -> None:
        if planes is not None:
            check_positive("planes", planes)
        super().__init__(planes or dim, num_classes)
        if zero_init_bias:
            nn.init.zeros_(self.bias)
        self.project = None
        activation = look_up("act", act, ACTIVATIONS)
        if planes:
            layers = nn.Conv2d(dim, planes, 1, bias=False), nn.BatchNorm2d(planes), activation()
            self.project, self.takes_maps = nn.Sequential(*layers), True
        elif act != "relu":
            raise UserError(f"act={act} is for planes; give planes, or drop it")
        self.neck = Neck(planes or dim, norm, l2, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.neck(x if self.project is None else self.project(x)))


class Conv(Linear):
    """ClassyVision's `fully_convolutional_linear`: a linear classifier at each position of a map.

    (N, D, h, w) -> means of the windows of `pool` x `pool` cells, one cell apart -> dropout ->
    linear -> mean over windows. In evaluation it is the mean of their probabilities, softmax or
    sigmoid, and the result is its logit. pool: None for the size of the maps in training, so that
    larger images have several windows; a smaller map in evaluation is one window. activation:
    `softmax`, `sigmoid` or `identity`.
    """

    takes_maps = True

    def __init__(
        self,
        dim: int,
        num_classes: int,
        pool: int | None = None,
        dropout: float = 0.0,
        l2: bool = False,
        norm: bool = False,
        zero_init_bias: bool = False,
        activation: str = "softmax",
    ) -> None:
        super().__init__(dim, num_classes, l2, norm, dropout, zero_init_bias)
        if pool is not None:
            check_positive("pool", pool)
        self.activation, self.pool = look_up("activation", activation, MEANS), pool
        self.window = (pool or 0, pool or 0)  # height and width; 0: the whole map
        if pool is None:  # the size of the maps in training
            self.register_buffer("trained_size", torch.zeros(2, dtype=torch.int64))

    def train(self, mode: bool = True) -> "Conv":
        if self.pool is None and not mode and self.trained_size.device.type != "meta":
            self.window = tuple(self.trained_size.tolist())  # waits for the device
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        size, window = tuple(x.shape[-2:]), self.window
        if self.pool is None and self.training:
            window = (0, 0)
            for i, side in enumerate(size):
                self.trained_size[i] = side
        elif self.training:
            self.check_map(size)
        sides = [min(a, b) if a else b for a, b in zip(window, size, strict=True)]
        x = F.avg_pool2d(x, sides, stride=1).permute(0, 2, 3, 1).flatten(1, 2)  # (N, P, D)
        scores = F.linear(self.neck.prepare(x), self.weight, self.bias)  # (N, P, K)
        if self.training or scores.shape[1] == 1:
            return scores.mean(1)
        return self.activation(scores.to(torch.promote_types(scores.dtype, torch.float32)))

    def check_map(self, size: tuple[int, int]) -> None:
        """Raise UserError if a window is larger than a map of this height and width."""
        if self.pool and self.pool > min(size):
            raise UserError(
                f"pool={self.pool} is larger than the map of {size[0]} x {size[1]} positions; give "
                f"pool={min(size)} or less, larger images, or no pool"
            )


def _mean_softmax(scores: Tensor) -> Tensor:
    """(N, P, K) -> (N, K), the logarithm of the mean probability over P positions."""
    return scores.log_softmax(-1).logsumexp(1) - math.log(scores.shape[1])


def _mean_sigmoid(scores: Tensor) -> Tensor:
    """(N, P, K) -> (N, K), the logit of the mean probability over P positions."""
    return F.logsigmoid(scores).logsumexp(1) - F.logsigmoid(-scores).logsumexp(1)


MEANS = {"softmax": _mean_softmax, "sigmoid": _mean_sigmoid, "identity": lambda x: x.mean(1)}


class MLP(nn.Module):
    """Linear -> act -> dropout -> linear. hidden: default: as many as there are features."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        act: str = "gelu",
        l2: bool = False,
        norm: bool = False,
        zero_init_bias: bool = False,
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_positive("hidden", hidden)
        self.neck = Neck(dim, norm, l2)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = look_up("act", act, ACTIVATIONS)()
        self.drop = make_dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_classes)
        if zero_init_bias:
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(self.neck(x)))))


class ViTTanh(nn.Module):
    """ClassyVision's `vision_transformer_head`: Linear -> tanh -> linear that starts as 0."""

    def __init__(
        self, dim: int, num_classes: int, hidden: int | None = None, l2: bool = False
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_positive("hidden", hidden)
        self.neck = Neck(dim, False, l2)
        self.pre_logits = nn.Linear(dim, hidden)
        self.logits = nn.Linear(hidden, num_classes)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.pre_logits(self.neck(x)).tanh())


class Identity(nn.Module):
    """The features themselves, which must be as many as there are classes."""

    def __init__(self, dim: int, num_classes: int, l2: bool = False) -> None:
        super().__init__()
        if dim != num_classes:
            raise UserError(
                f"there are {dim} features and {num_classes} classes; use linear, or the block "
                "that returns the network's own logits"
            )
        self.neck = Neck(dim, False, l2)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(x)


# name -> (features, classes, options) -> module
HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "norm_linear": partial(Linear, l2=True),
    "mlp": MLP,
    "conv": Conv,
    "vit_tanh": ViTTanh,
    "identity": Identity,
}


@dataclass(frozen=True)
class HeadOptions:
    """Settings that all heads of a network share.

    flag: names the flag in messages. num_classes: None if the data has to tell it; heads of checks
    have as many outputs as features then. activation: default of `Conv`. scale: of the initial
    weights and bias of the last layer. training: the images have the size of those in training.
    """

    flag: str
    num_classes: int | None = None
    activation: str = "softmax"
    scale: float = 1.0
    training: bool = True


def create_head(call: Call, dim: int, options: HeadOptions) -> nn.Module:
    """Build a head of HEADS, or of the user's own, for `dim` features."""
    label, num_classes = f"{options.flag} {call}", options.num_classes or dim
    make, bound = _bind(options.flag, call, dim, num_classes)
    if call.name not in HEADS:
        return _users_head(make, label, bound)
    given, known = bound.arguments, inspect.signature(make).parameters
    for key in [*given][2:]:
        given[key] = typed(label, key, given[key], known[key].annotation)
    if "activation" in known:
        given.setdefault("activation", options.activation)
    try:
        head = make(**given)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for parameter in layers[-1].parameters(recurse=False) if layers else ():
            parameter.mul_(options.scale)
    return head


def _bind(
    flag: str, call: Call, dim: int = 1, num_classes: int = 1
) -> tuple[Callable[..., Any], inspect.BoundArguments]:
    """Find what a call names, and give it its arguments; UserError if it does not take them."""
    make = resolve_for(flag, call.name, HEADS, "head", importable=True)
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError) as error:  # no function, or one of C
        raise UserError(f"{flag} {call}: {error}; give a function or a class") from error
    try:
        return make, signature.bind(dim, num_classes, *call.args, **call.kwargs)
    except TypeError as error:
        raise UserError(f"{flag} {call}: {error}; it takes {accepted(make, 2)}") from error


def _users_head(make: Callable[..., Any], label: str, bound: inspect.BoundArguments) -> nn.Module:
    try:
        head = make(*bound.args, **bound.kwargs)
    except Exception as error:
        raise UserError(f"{label}: {describe_error(error)}") from error
    if not isinstance(head, nn.Module):
        raise UserError(f"{label} returned {type(head).__name__}, expected a torch.nn.Module")
    return head


# --- several heads --------------------------------------------------------------------------------


class NamedHeads(nn.ModuleDict):
    """Heads by name on blocks of a network, whose output becomes theirs: a dict in training.

    In evaluation, and with one head, it is the output of the first head alone. blocks: name of a
    head -> path of its block. channels_last: the blocks whose maps are (N, h, w, C).
    """

    def __init__(
        self, heads: Mapping[str, nn.Module], blocks: Mapping[str, str], channels_last: set[str]
    ) -> None:
        super().__init__(heads)
        self.blocks, self.channels_last, self.found = dict(blocks), channels_last, {}
        self.first_head = next(iter(blocks))

    def attach(self, model: nn.Module) -> None:
        """Add hooks to the blocks and to the network; copies of the network have their own."""
        for block in dict.fromkeys(self.blocks.values()):
            _last_item(model, block).register_forward_hook(partial(self.keep, block))
        model.register_forward_hook(self.run)

    def keep(self, block: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Keep a copy of a block's output, since an activation in place may follow."""
        if not (self.training or block == self.blocks[self.first_head]):
            return
        compiling = torch.compiler.is_compiling()
        if compiling or torch._C._current_graph_task_id() == -1:  # not recomputed in backward
            self.found[block] = output.clone()

    def run(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Return the outputs of the heads in place of the network's."""
        found, self.found = self.found, {}
        outputs = {}
        for name in self if self.training else [self.first_head]:
            block = self.blocks[name]
            if block not in found:
                raise UserError(f"--heads: {block} was not called in this pass; choose another")
            x = found[block]
            outputs[name] = self[name](x.permute(0, 3, 1, 2) if block in self.channels_last else x)
        return outputs if len(outputs) > 1 else outputs[self.first_head]


def _last_item(model: nn.Module, block: str) -> nn.Module:
    """Return the module that makes the output of a block: of a Sequential, its last item.

    With gradient checkpointing, timm's networks call the items and not the Sequential. An item
    that has other places too may be called after this block, so it does not stand for it.
    """
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    module = model.get_submodule(block)
    while type(module).forward is nn.Sequential.forward and len(module) and places[module[-1]] == 1:
        module = module[-1]
    return module


RESERVED = {*dir(nn.ModuleDict()), *dir(NamedHeads)} | {"blocks", "channels_last", "found"}


def parse_heads(text: str) -> dict[str, tuple[Call, str]]:
    """Read `main=linear@norm, aux=conv@stages.2` into name -> (head, block)."""
    found = {}
    for name, value in parse_named(text, "--heads").items():
        head, at, block = value.rpartition("@")
        if not (at and head.strip() and block.strip()):
            raise UserError(
                f"--heads: got {name}={value}, expected {name}=HEAD@BLOCK, as in "
                "aux=linear@stages.2"
            )
        if name in RESERVED:
            raise UserError(f"--heads: a head cannot be called {name!r}; choose another name")
        found[name] = parse_call(head.strip(), "--heads"), block.strip()
    return found


# --- from the flags -------------------------------------------------------------------------------


def is_plain(text: str) -> bool:
    """Return True if --head has the weights and the meaning of a linear classifier."""
    call = parse_call(text, "--head") if text else Call("linear")
    same = {"dropout", "zero_init_bias"}
    return call.name == "linear" and not call.args and call.kwargs.keys() <= same


def _calls(args: Any) -> list[tuple[str, Call]]:
    """Return the flag and the call of each head; none in pre-training."""
    flags = vars(args)
    calls = [("--head", parse_call(args.head, "--head"))] if flags.get("head") else []
    if flags.get("heads"):
        calls += [("--heads", call) for call, _ in parse_heads(args.heads).values()]
    return calls


def has_own_head(args: Any) -> bool:
    """Return True if a head is `package.module:name`, the user's own code."""
    return any(":" in call.name for _, call in _calls(args))


def check_heads(args: Any) -> None:
    """Raise UserError for unknown heads and wrong arguments; heads of the user's are not called."""
    for flag, call in _calls(args):
        if call.name in HEADS:
            with torch.device("meta"):
                create_head(call, 1, HeadOptions(flag))
        else:
            _bind(flag, call)


def implied_activation(loss: str) -> str:
    """Return the activation that a loss implies, of the first head if there are several."""
    text = next(iter(parse_named(loss, "--loss").values())) if is_named(loss) else loss
    name = parse_sum(text, "--loss")[0].name
    return "sigmoid" if name in SIGMOIDS else "identity" if name in NUMBERS else "softmax"
