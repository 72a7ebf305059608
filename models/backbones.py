# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Networks of timm and torchvision as `timm:NAME` and `torchvision:NAME`, with one interface.

python main_finetune.py --model timm:resnet18 --stem_stride 1 --data_set DIGITS --input_size 32

Every network has `forward_features(images)`, `forward_head(features, pre_logits=False)`,
`num_features`, `layer_of(name, kind)`, `set_grad_checkpointing(enable)`, `get_classifier()` and
`reset_classifier(num_classes)`. Those of timm lack only `layer_of`; torchvision's get all of them,
as bound functions, so that the names of parameters stay the library's.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config.calls import parse_call
from errors import UserError, did_you_mean, first_line, resolve
from models.parts import (
    OWN_STEM,
    find_classifier,
    find_stem,
    replace_conv,
    replace_module,
    set_stem_stride,
)

# Arguments that flags set, or that would read files: nobody gives them in `timm:NAME(...)`.
BY_FLAG = {"num_classes": "nb_classes", "in_chans": "in_chans", "drop_path_rate": "drop_path"}
BY_FLAG |= {"stochastic_depth_prob": "drop_path", "img_size": "input_size"}
BY_FLAG |= {"image_size": "input_size", "input_size": "input_size", "weights": "pretrained"}
BY_FLAG |= {"pretrained": "pretrained", "checkpoint_path": "finetune"}
REFUSED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable")
REFUSED += ("no_jit", "features_only", "out_indices", "progress", "weights_backbone")


# --- names and construction -----------------------------------------------------------------------


def parse_name(name: str) -> tuple[str, str, str, dict[str, Any]]:
    """Read `timm:resnet18.a1_in1k(drop_rate=0.1)` into library, network, tag and arguments.

    A UserError names the closest networks, or the flag in place of an argument.
    """
    call = parse_call(name, "--model")
    library, _, network = call.name.partition(":")
    network, _, tag = network.partition(".")
    if not network:
        raise UserError(f"--model {name}: give a name, as in {library}:resnet18")
    resolve(network, _networks(library), f"network of {library}", importable=False)
    if tag:
        resolve(tag, _tags(library, network), f"weights of {library}:{network}", importable=False)
    if call.args:
        raise UserError(f"--model {name}: give its arguments as key=value")
    for key in call.kwargs:
        if key in BY_FLAG:
            raise UserError(f"--model {name}: give --{BY_FLAG[key]}, not the argument {key}")
        if key in REFUSED:
            raise UserError(f"--model {name}: {key} is not possible here; drop it")
    return library, network, tag, call.kwargs


@cache
def _networks(library: str) -> dict[str, None]:
    if library == "timm":
        import timm

        return dict.fromkeys(timm.list_models())
    from torchvision import models

    return dict.fromkeys(models.list_models(models))  # classifiers only


def _tags(library: str, network: str) -> dict[str, None]:
    """Return the names of the weights that a library has for a network."""
    if library == "timm":
        import timm

        names = [name.partition(".") for name in timm.list_pretrained(f"{network}.*")]
        return dict.fromkeys(tag for base, _, tag in names if base == network)
    from torchvision import models

    return dict.fromkeys(models.get_model_weights(network).__members__)


def create(
    name: str,
    in_chans: int = 3,
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    stem_stride: int = OWN_STEM,
    head_init_scale: float = 1.0,
    input_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Build a network of a library with random weights.

    stem_stride: see `set_stem_stride`. input_size: height and width, for networks that need them.
    """
    library, network, _, options = parse_name(name)
    build = {"timm": _build_timm, "torchvision": _build_torchvision}[library]
    model = build(network, options, in_chans, num_classes, drop_path_rate, input_size)
    if stem_stride != OWN_STEM:
        set_stem_stride(model, stem_stride)
    with torch.no_grad():
        for prefix in find_classifier(model):
            for parameter in model.get_submodule(prefix[:-1]).parameters():
                parameter.mul_(head_init_scale)
    return model


def call_library(name: str, function: Callable[..., nn.Module], options: dict, **fixed: Any) -> Any:
    """Call a function of a library; its errors become a UserError that names the model.

    TypeErrors about arguments in `fixed` pass.
    """
    try:
        try:
            return function(**fixed, **options)
        except NotImplementedError:  # on the meta device: torchvision's RegNet reads tensors
            with torch.device("cpu"):
                return function(**fixed, **options)
    except Exception as error:  # of any library
        if isinstance(error, TypeError) and any(f"'{key}'" in str(error) for key in fixed):
            raise
        unknown = [key for key in options if f"'{key}'" in str(error)]
        hint = ""
        if isinstance(error, TypeError) and unknown:
            known = _arguments_of(function)
            words = did_you_mean(unknown[0], known), f"Expected one of {', '.join(known)}"
            hint = " " + " ".join(filter(None, words))
        raise UserError(f"--model {name}: {first_line(error)}.{hint}") from error


def _arguments_of(function: Callable[..., nn.Module]) -> list[str]:
    """Return the arguments of the class that a function builds, without those that flags set."""
    with torch.device("meta"):
        try:
            names = inspect.signature(type(function())).parameters
        except Exception:  # RegNet again, or a network that needs its size
            return []
    optional = [name for name, word in names.items() if word.default is not word.empty]
    return [name for name in optional if name not in (*BY_FLAG, *REFUSED)]


def _build_timm(
    network: str,
    options: dict[str, Any],
    in_chans: int,
    num_classes: int,
    drop_path_rate: float,
    input_size: tuple[int, int] | None,
) -> nn.Module:
    import timm

    name, config = f"timm:{network}", timm.get_pretrained_cfg(network)
    own_size = tuple(config.input_size[1:]) if config else None
    fixed: dict[str, Any] = {"in_chans": in_chans, "num_classes": num_classes}
    fixed |= {"drop_path_rate": drop_path_rate}
    if input_size and config and config.fixed_input_size:
        fixed["img_size"] = input_size
    model = None
    while model is None:
        try:
            model = call_library(name, partial(timm.create_model, network), options, **fixed)
        except TypeError as error:  # the network has no such argument
            lacking = next(key for key in fixed if f"'{key}'" in str(error))
            if lacking == "img_size" and input_size != own_size:
                got = f"--input_size {input_size[0]} {input_size[1]}"
                raise UserError(
                    f"{got}: {name} has a fixed size; give {own_size[0]}, or another --model"
                ) from error
            if lacking not in ("img_size", "drop_path_rate"):
                raise UserError(f"--model {name}: {first_line(error)}") from error
            del fixed[lacking]
    if drop_path_rate and not any(getattr(m, "drop_prob", None) for m in model.modules()):
        raise UserError(f"--drop_path {drop_path_rate}: {name} has no stochastic depth; drop it")
    model.layer_maps = {}
    model.layer_of = MethodType(layer_of, model)
    return model


def _build_torchvision(
    network: str,
    options: dict[str, Any],
    in_chans: int,
    num_classes: int,
    drop_path_rate: float,
    input_size: tuple[int, int] | None,
) -> nn.Module:
    from torchvision import models

    name, fixed = f"torchvision:{network}", {"num_classes": num_classes}
    if network in ("googlenet", "inception_v3"):
        fixed |= {"aux_logits": False, "init_weights": True, "transform_input": in_chans == 3}
    if network.startswith("vit_") and input_size:
        if input_size[0] != input_size[1]:
            raise UserError(f"--input_size {input_size}: {name} takes squares; give one number")
        fixed |= {"image_size": input_size[0]}
    if network.startswith("maxvit_") and input_size:
        fixed |= {"input_size": input_size}
    fixed = {key: value for key, value in fixed.items() if key not in options}
    model = call_library(name, models.get_model_builder(network), options, **fixed)
    if in_chans != 3:
        if getattr(model, "transform_input", False):
            raise UserError(f"--in_chans {in_chans}: {name}(transform_input=True) takes 3 channels")
        (path,) = find_stem(model)
        replace_conv(model, path, in_channels=in_chans)
    _set_drop_path(model, drop_path_rate, name)
    model.classifier_path = find_classifier(model)[0][:-1]
    last = model.get_submodule(model.classifier_path)
    model.num_features = last.weight.shape[1]  # of a linear layer, or SqueezeNet's convolution
    model.layer_maps = {}
    for function in METHODS:
        setattr(model, function.__name__, MethodType(function, model))
    return model


def _set_drop_path(model: nn.Module, rate: float, name: str) -> None:
    """Scale the stochastic depth of a network of torchvision, so that its largest is `rate`."""
    from torchvision.ops import StochasticDepth

    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    largest = max((layer.p for layer in layers), default=0.0)
    if rate and not largest:
        raise UserError(f"--drop_path {rate}: {name} has no stochastic depth; drop it")
    for layer in layers:
        layer.p *= rate / largest if largest else 1.0


# --- layers, for layer-wise learning rates --------------------------------------------------------


def layer_of(self: nn.Module, name: str, kind: str = "single") -> int:
    """Return the number of the layer that a parameter belongs to; the stem is 0, the head the top.

    kind: `single` makes each block a layer, `group` each stage. Names that the network did not have
    when it was built are parts of a new head.
    """
    if kind not in self.layer_maps:
        layers = _map_timm(self, kind) or _map_blocks(self, kind)
        self.layer_maps[kind] = layers, max(layers.values())
    layers, top = self.layer_maps[kind]
    return layers.get(name, top)


def _map_timm(model: nn.Module, kind: str) -> dict[str, int]:
    """Return parameter -> layer by timm's `group_matcher`, {} for networks of torchvision."""
    from timm.models import group_parameters

    if hasattr(model, "classifier_path"):
        return {}
    try:
        matcher = model.group_matcher(coarse=kind == "group")
        layers = group_parameters(model, matcher, reverse=True)
    except (AttributeError, AssertionError, NotImplementedError, TypeError) as error:
        raise _no_map(model) from error
    classifier = find_classifier(model)
    heads = [layer for name, layer in layers.items() if name.startswith(classifier)]
    top = max(layers.values(), default=0)
    if top < 2 or any(value != top for value in heads):
        raise _no_map(model)
    return layers


def _no_map(model: nn.Module) -> UserError:
    return UserError(
        f"--layer_decay: {type(model).__name__} has no order of blocks that is known here; use "
        "--layer_decay 1"
    )


@cache
def _containers() -> tuple[type, ...]:
    """Return the types of modules that hold blocks; torchvision's blocks are other ones."""
    from torchvision.models.maxvit import MaxVitBlock
    from torchvision.models.vision_transformer import Encoder

    return nn.Sequential, nn.ModuleList, nn.ModuleDict, Encoder, MaxVitBlock


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, _containers()) and any(True for _ in module.children())


def _holds_blocks(module: nn.Module) -> bool:
    parts = module.children() if isinstance(module, _containers()) else ()
    return any(_is_block(part) or _holds_blocks(part) for part in parts)


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules in order: blocks, and what lies between them."""
    for name, child in module.named_children():
        if _holds_blocks(child):
            yield from _units(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a network of torchvision; the first unit is the stem."""
    return {name: unit for name, unit in [*_units(model)][1:] if _is_block(unit)}


def _map_blocks(model: nn.Module, kind: str) -> dict[str, int]:
    """Return parameter -> layer by the order of the blocks.

    What lies between two blocks belongs to the second, what follows the last belongs to it, and
    tokens and positions belong to the stem.
    """
    blocks, layer, stage = _blocks(model), 0, ""
    if len(blocks) < 2:
        raise _no_map(model)
    by_stage = kind == "group" and len({name.rpartition(".")[0] for name in blocks}) > 1
    starts: dict[str, int] = {}
    waiting: list[str] = []
    head = model.classifier_path.partition(".")[0]
    for name in [name for name, _ in _units(model) if name.partition(".")[0] != head]:
        waiting.append(name)
        if name in blocks:
            layer += not (by_stage and name.rpartition(".")[0] == stage)
            stage = name.rpartition(".")[0]
        if name in blocks or layer == 0:
            starts |= dict.fromkeys(waiting, layer)
            waiting = []
    starts |= dict.fromkeys(waiting, layer) | {head: layer + 1}
    paths = {name: [n for n in starts if f"{name}.".startswith(f"{n}.")] for name in _names(model)}
    return {name: starts[found[0]] if found else 0 for name, found in paths.items()}


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


# --- methods of torchvision's networks ------------------------------------------------------------


def forward_features(self: nn.Module, images: Tensor) -> Tensor:
    """(N, C, H, W) -> the last map before pooling, or the tokens (N, L, D) of a transformer."""
    if hasattr(self, "class_token"):
        x = self._process_input(images)
        return self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), x], 1))
    x = self._transform_input(images) if hasattr(self, "_transform_input") else images
    tail = _tail(self)
    for layer in self.children():
        if layer is tail[0]:
            break
        for part in layer if isinstance(layer, nn.ModuleList) else [layer]:
            x = part(x)
    return x.relu() if type(self).__name__ == "DenseNet" else x


def forward_head(self: nn.Module, features: Tensor, pre_logits: bool = False) -> Tensor:
    """Features -> (N, num_classes), or with `pre_logits` the input of the classifier."""
    pooling, head = _tail(self)[:-1], _tail(self)[-1]
    last, x = self.get_classifier(), features
    layers = [*head.children()] if isinstance(head, nn.Sequential) else [head]
    if hasattr(self, "class_token"):
        x = x[:, 0]
    elif not (pooling or any(isinstance(m, nn.AdaptiveAvgPool2d) for m in layers)):
        x = x.mean((-2, -1))
    for layer in pooling:
        x = layer(x)
    if pooling and not any(isinstance(layer, nn.Flatten) for layer in layers):
        x = x.flatten(1)
    for layer in layers:
        if pre_logits and layer is last:
            break
        x = layer(x)
    return x.mean((-2, -1)) if x.ndim == 4 else x


def _tail(model: nn.Module) -> list[nn.Module]:
    """Return the modules that make logits of the last map: perhaps pooling, and the head."""
    names = [name for name, _ in model.named_children()]
    head = model.classifier_path.partition(".")[0]
    start = names.index("avgpool" if "avgpool" in names else head)
    return [model.get_submodule(name) for name in names[start:]]


def set_grad_checkpointing(self: nn.Module, enable: bool = True) -> None:
    """Save only the input of each block and compute the rest again in backward."""
    blocks = _blocks(self)
    if not blocks:
        raise UserError(f"--grad_checkpointing: {type(self).__name__} has no blocks; drop it")
    for block in blocks.values():
        block.__dict__.pop("forward", None)
        if enable:
            block.forward = MethodType(_checkpointed, block)


def _checkpointed(self: nn.Module, *inputs: Any) -> Any:
    forward = partial(type(self).forward, self)
    if not (self.training and torch.is_grad_enabled()):
        return forward(*inputs)
    # The list that DenseNet passes to its layers grows before they are recomputed.
    inputs = tuple(list(x) if isinstance(x, list) else x for x in inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)


def get_classifier(self: nn.Module) -> nn.Module:
    """Return the last layer."""
    return self.get_submodule(self.classifier_path)


def reset_classifier(self: nn.Module, num_classes: int) -> None:
    """Make a new last layer for `num_classes`; 0 removes it."""
    new = nn.Identity()
    if num_classes and isinstance(self.get_classifier(), nn.Conv2d):
        new = nn.Conv2d(self.num_features, num_classes, kernel_size=1)
    elif num_classes:
        new = nn.Linear(self.num_features, num_classes)
    new.to(next(self.parameters()))
    replace_module(self, self.classifier_path, new)


METHODS = (forward_features, forward_head, layer_of, set_grad_checkpointing)
METHODS += (get_classifier, reset_classifier)
