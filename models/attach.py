# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Give a network other heads: in place of its classifier, or several on chosen blocks.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --input_size 32 \\
    --heads "main=linear@norm, aux=conv@stages.2"
"""

import contextlib
import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from config.calls import Call, parse_call
from errors import UserError, did_you_mean, first_few, first_line, plural
from models.heads import (
    Conv,
    HeadOptions,
    NamedHeads,
    Neck,
    create_head,
    implied_activation,
    parse_heads,
)
from models.layers import PatchConv
from models.parts import find_classifier, replace_module
from parallel.process_group import get_logger

# --- in place of the classifier -------------------------------------------------------------------


def replace_classifier(
    model: nn.Module, call: Call, size: tuple[int, int, int], options: HeadOptions
) -> None:
    """Put a head in the place of the classifier; its parameters keep that prefix.

    size: channels, height and width of the images. A head that takes maps gets the last one, before
    pooling.
    """
    _remember_layers(model)
    flag, name = options.flag, type(model).__name__
    paths = [prefix[:-1] for prefix in find_classifier(model)]
    if len(paths) != 1 or not isinstance(model.get_submodule(paths[0]), nn.Linear):
        kinds = [type(model.get_submodule(path)).__name__ for path in paths]
        got = f"{first_few(kinds) or 'none'}, expected one Linear"
        raise UserError(
            f"{flag} {call}: the classifier of {name} is {got}; use --heads main={call}@BLOCK"
        )
    path, dim = paths[0], model.get_submodule(paths[0]).in_features
    head = create_head(call, dim, options)
    if getattr(head, "takes_maps", False):
        path = _give_maps(model, path, f"{flag} {call}")
        shape = trace(model, size)[0].get(path, ())
        if len(shape or ()) != 4:
            got = f"features of shape {shape}" if shape else "no features"
            raise UserError(
                f"{flag} {call} needs a map (N, C, h, w), and {name} has {got}; use linear or mlp"
            )
        is_last = not hasattr(model, "inner_layout") and is_channels_last(model, path, shape, size)
        head = create_head(call, shape[3 if is_last else 1], options)
        _check_map(head, call, shape[1:3] if is_last else shape[2:], options)
        if is_last:
            head.register_forward_pre_hook(_to_channels_first)
    fit_to_network(model, head)
    replace_module(model, path, head)
    model.head_prefixes = (f"{path}.",)
    if getattr(head, "takes_maps", False):
        _freeze_unused(model, size)


def _give_maps(model: nn.Module, path: str, label: str) -> str:
    """Make a network call its classifier with a map; returns the path of the classifier."""
    stand_in = MapIdentity()
    if getattr(model, "inner_layout", ""):  # a ConvNeXt: see its forward_head
        replace_module(model, path, stand_in)
        return path
    reset = getattr(model, "reset_classifier", None)
    if reset is not None and "global_pool" in inspect.signature(reset).parameters:  # timm
        try:
            reset(0, "")
        except Exception as error:  # networks that cannot do without pooling, each in its own way
            problem = f"{type(model).__name__} cannot leave out its pooling ({first_line(error)})"
            raise UserError(f"{label}: {problem}; use linear or mlp") from error
        replace_module(model, path, stand_in)
        return path
    if not hasattr(model, "forward_features"):
        raise UserError(
            f"{label}: {type(model).__name__} has no forward_features(images), which gives the "
            "map; use --heads main=conv@BLOCK"
        )
    top = path.partition(".")[0]
    if hasattr(model, "classifier_path"):  # torchvision: no layers between pooling and classifier
        model.classifier_path = path = top
    replace_module(model, path, stand_in)
    model.head_path = path
    model.forward = MethodType(_forward_map, model)
    return path


class MapIdentity(nn.Identity):
    """Takes the place of a head that takes maps, until their shape is known."""

    takes_maps = True


def _forward_map(self: nn.Module, images: Tensor) -> Tensor:
    return self.get_submodule(self.head_path)(self.forward_features(images))


def _to_channels_first(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].permute(0, 3, 1, 2),)


# --- on chosen blocks -----------------------------------------------------------------------------


def add_heads(
    model: nn.Module,
    heads: Mapping[str, tuple[Call, str]],
    size: tuple[int, int, int],
    options: HeadOptions,
) -> None:
    """Add named heads on blocks; the classifier stays only if a head is on it.

    size: channels, height and width of the images. Parameters that no head needs are frozen.
    """
    _remember_layers(model)
    classifier = find_classifier(model)
    shapes, _ = trace(model, size)
    blocks = {name: find_block(model, block, shapes) for name, (_, block) in heads.items()}
    own = [p for p in classifier if any(_contains(b, p) for b in blocks.values())]
    built = {}
    for name, (call, _) in heads.items():
        shape = shapes[blocks[name]]
        is_first = len(shape) == 4 and not is_channels_last(model, blocks[name], shape, size)
        head = create_head(call, shape[1 if is_first else -1], options)
        if getattr(head, "takes_maps", False) and len(shape) != 4:
            maps = [path for path in _outline(model) if len(shapes.get(path) or ()) == 4]
            fix = f", or a block such as {first_few(maps[-3:])}" if maps else ""
            raise UserError(
                f"--heads: {call} needs a map (N, C, h, w), and {blocks[name]} gives {shape}; use "
                f"linear or mlp{fix}"
            )
        _check_map(head, call, shape[2:] if is_first else shape[1:3], options)
        fit_to_network(model, head)
        built[name] = head
    last = {b for b in blocks.values() if is_channels_last(model, b, shapes[b], size)}
    model.named_heads = NamedHeads(built, blocks, last)
    for prefix in set(classifier) - set(own):
        replace_module(model, prefix[:-1], nn.Identity())
    model.left_out = (*getattr(model, "left_out", ()), *sorted(set(classifier) - set(own)))
    model.head_prefixes = (*(f"named_heads.{name}." for name in built), *own)
    model.named_heads.attach(model)
    _freeze_unused(model, size)


def _contains(block: str, classifier: str) -> bool:
    """Return True if a block is the classifier, given by its prefix, or within or around it."""
    return f"{block}.".startswith(classifier) or classifier.startswith(f"{block}.")


def find_block(
    model: nn.Module, name: str, shapes: Mapping[str, Any], flag: str = "--heads"
) -> str:
    """Return the path of a block that gives features; of a list of blocks, its last one.

    shapes: of the outputs of modules, as of `trace`. UserError, which names the flag, for a block
    that a network lacks or does not call.
    """
    known = {path for path, _ in model.named_modules() if path}
    if name not in known:
        outline = first_few(_outline(model), 40)
        hint = f"{did_you_mean(name, known)} Blocks: {outline}".strip()
        raise UserError(f"{flag}: unknown block {name!r}. {hint}")
    path = name
    while path not in shapes and isinstance(model.get_submodule(path), nn.Sequential):
        children = [key for key, _ in model.get_submodule(path).named_children()]
        if not children:
            break
        path = f"{path}.{children[-1]}"
    if path not in shapes:
        raise UserError(f"{flag}: {name} is not called by {type(model).__name__}; choose another")
    if shapes[path] is None or not 2 <= len(shapes[path]) <= 4:
        raise UserError(
            f"{flag}: {name} gives {shapes[path] or 'no tensor'}, expected a map (N, C, h, w), "
            "tokens (N, L, C) or features (N, C); choose another block"
        )
    return path


def _outline(model: nn.Module) -> list[str]:
    """Return the paths of a network's parts and of the items of its lists, in order."""
    paths = []
    for name, child in model.named_children():
        paths.append(name)
        if isinstance(child, nn.Sequential | nn.ModuleList):
            paths += [f"{name}.{key}" for key, _ in child.named_children()]
    return paths


# --- shapes of features ---------------------------------------------------------------------------


def trace(model: nn.Module, size: tuple[int, int, int]) -> tuple[dict[str, Any], list[str]]:
    """Return shapes of the outputs of all modules that are called, and unused parameters.

    Nothing is computed, unless a network cannot do without it. A shape is None if the output is no
    tensor. size: channels, height and width of the images.
    """
    try:
        return _trace(model, size, fake=True)
    except UserError:
        raise
    except Exception as error:  # of any network, which may look at the values of tensors
        if next(model.parameters()).device.type == "meta":
            raise UserError(
                f"{type(model).__name__} cannot be called to find its features: {first_line(error)}"
            ) from error
    return _trace(model, size, fake=False)


def _trace(
    model: nn.Module, size: tuple[int, int, int], fake: bool
) -> tuple[dict[str, Any], list[str]]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes: dict[str, Any] = {}
    modes = {module: module.training for module in model.modules()}
    hooks = [
        module.register_forward_hook(partial(_note_shape, shapes, name), prepend=True)
        for name, module in model.named_modules()
        if name
    ]
    model.eval()
    if heads := getattr(model, "named_heads", None):
        heads.training = True  # all of them, not those of evaluation alone
    context = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    try:
        with torch.device("cpu") if fake else contextlib.nullcontext(), context:
            weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
            device = "cpu" if fake else next(iter(weights.values())).device
            if fake:
                weights = {name: _fake(x).requires_grad_(True) for name, x in weights.items()}
                buffers = {name: _fake(x) for name, x in buffers.items()}
            images = torch.zeros(2, *size, device=device)
            with torch.enable_grad():
                output = torch.func.functional_call(model, weights | buffers, (images,))
                unused = _unused(output, weights)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return shapes, unused


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _note_shape(shapes: dict, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    shapes[name] = tuple(output.shape) if isinstance(output, Tensor) else None


def _unused(output: Any, weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that no output depends on."""
    parts = output.values() if isinstance(output, Mapping) else [output]
    trained = {name: x for name, x in weights.items() if x.requires_grad}
    total = sum(part.sum() for part in parts if isinstance(part, Tensor) and part.requires_grad)
    if not isinstance(total, Tensor):
        return []
    gradients = torch.autograd.grad(total, [*trained.values()], allow_unused=True)
    return [name for name, x in zip(trained, gradients, strict=True) if x is None]


def _freeze_unused(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Freeze the parameters that no head depends on: DistributedDataParallel needs gradients."""
    unused = trace(model, size)[1]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    if unused and next(model.parameters()).device.type != "meta":
        text = "%s after the heads are not used, and not trained: %s"
        get_logger().warning(text, plural(len(unused), "tensor"), first_few(unused))


def is_channels_last(
    model: nn.Module, path: str, shape: Sequence[int], size: Sequence[int]
) -> bool:
    """Return True if a module gives maps (N, h, w, C), and not (N, C, h, w) or no maps.

    shape: of its output, whose sides tell it: those of a map are in proportion to those of the
    images. size: channels, height and width of the images.
    """
    module = model.get_submodule(path)
    if len(shape) != 4 or (isinstance(module, nn.Conv2d) and not isinstance(module, PatchConv)):
        return False
    if layout := getattr(model, "inner_layout", ""):
        return layout == "NHWC"
    wanted = math.log(size[1] / size[2])
    first, last = (
        abs(math.log(a / b) - wanted) for a, b in ((shape[2], shape[3]), (shape[1], shape[2]))
    )
    return last < first


def _check_map(head: nn.Module, call: Call, size: tuple[int, ...], options: HeadOptions) -> None:
    """Raise UserError if windows of `conv` are larger than the map in training."""
    if options.training and isinstance(head, Conv):
        try:
            head.check_map(size)
        except UserError as error:
            raise UserError(f"{options.flag} {call}: {error}") from error


def fit_to_network(model: nn.Module, head: nn.Module) -> None:
    """Give a head the data type of a network, and the tokens that its own classifier uses."""
    head.to(next(model.parameters()).dtype)
    for neck in [module for module in head.modules() if isinstance(module, Neck)]:
        neck.class_token = getattr(model, "global_pool", "") == "token"
        neck.class_token |= hasattr(model, "class_token")  # of torchvision
        neck.prefix_tokens = getattr(model, "num_prefix_tokens", 0)


def _remember_layers(model: nn.Module) -> None:
    """Let a network number its layers for --layer_decay while it has its own classifier.

    One that cannot refuses --layer_decay afterwards too.
    """
    for kind in ("single", "group") if hasattr(model, "layer_of") else ():
        try:
            model.layer_of("", kind)
        except UserError as error:
            model.layer_of = partial(_refuse, error)


def _refuse(error: UserError, *unused: Any) -> None:
    raise error


# --- from the flags -------------------------------------------------------------------------------


def build_heads(args: Any, model: nn.Module, num_classes: int | None) -> None:
    """Give a network the heads of the flags, in place of its own classifier.

    num_classes: None if the data has to tell it, for checks.
    """
    flags = vars(args)
    head, heads = flags.get("head"), flags.get("heads")
    if not (head or heads):
        return
    size = (args.in_chans, *args.input_size)
    shared = num_classes, implied_activation(flags.get("loss") or "ce"), args.head_init_scale
    shared += (not flags.get("eval", True),)  # without that flag: to export
    if head:
        call = parse_call(head, "--head")
        replace_classifier(model, call, size, HeadOptions("--head", *shared))
    else:
        add_heads(model, parse_heads(heads), size, HeadOptions("--heads", *shared))
