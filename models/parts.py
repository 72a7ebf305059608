# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parts of any network: its stem, its classifier, a frozen backbone, feature maps; eval mode.

python -c "from models import parts; print(parts.STEMS)"
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from errors import UserError, resolve

HEAD_NAMES = ("head", "fc", "classifier", "heads")  # of networks without timm's get_classifier
OWN_STEM = 4  # --stem_stride of the library's own stem, whatever its stride
# Class -> first convolution, of stride 2, and the pooling after it, of stride 2 if there is one.
STEMS = {
    "ResNet": (("conv1", "conv1.0"), "maxpool"),  # the second with three convolutions in the stem
    "DenseNet": (("features.conv0",), "features.pool0"),
    "EfficientNet": (("conv_stem", "features.0.0"), ""),
    "RegNet": (("stem.conv", "stem.0"), ""),
    "MobileNetV2": (("features.0.0",), ""),
    "MobileNetV3": (("conv_stem", "features.0.0"), ""),
}


def find_classifier(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of a model's last layer, such as `head.fc.`; several for two heads.

    Those of `models.heads`, if there are any. Otherwise by timm's convention: the modules of
    `get_classifier()`, or the names in `default_cfg["classifier"]`. Other networks: the last layer
    with a matrix in HEAD_NAMES.
    """
    if prefixes := getattr(model, "head_prefixes", ()):
        return prefixes
    names = {module: name for name, module in model.named_modules() if name}
    if callable(getattr(model, "get_classifier", None)):
        found = model.get_classifier()
        found = found if isinstance(found, tuple | list) else [found]
        known = tuple(f"{names[module]}." for module in found if module in names)
        if known:
            return known
    config = getattr(model, "default_cfg", None)
    if isinstance(config, dict) and config.get("classifier"):
        value = config["classifier"]
        return tuple(f"{name}." for name in ((value,) if isinstance(value, str) else value))
    for top in HEAD_NAMES:
        inside = [n for m, n in names.items() if n == top or n.startswith(f"{top}.")]
        layers = [n for n in inside if getattr(model.get_submodule(n), "weight", None) is not None]
        layers = [n for n in layers if model.get_submodule(n).weight.ndim > 1]
        if layers:
            return (f"{layers[-1]}.",)
    return ()


def find_stem(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that see the image: of timm's `default_cfg`, or the first."""
    config = getattr(model, "default_cfg", None)
    if isinstance(config, dict) and config.get("first_conv"):
        value = config["first_conv"]
        return (value,) if isinstance(value, str) else tuple(value)
    return tuple(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))[:1]


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of the one at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def replace_conv(model: nn.Module, path: str, **changes: Any) -> None:
    """Replace a convolution by a new one with other arguments and random weights."""
    old = model.get_submodule(path)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
    arguments = {name: getattr(old, name) for name in names} | {"bias": old.bias is not None}
    new = nn.Conv2d(**(arguments | changes))
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    replace_module(model, path, new)


def set_stem_stride(model: nn.Module, stride: int) -> None:
    """Change the stem for small images, in the networks of STEMS; others are refused by name.

    1: the stem keeps the resolution. Where a max-pooling follows the first convolution (ResNet,
        DenseNet), this is a 3x3 convolution without pooling, the stem that is usual for CIFAR.
    2: the first convolution alone has stride 2, without the pooling; refused where there is none.
    """
    name, layers = type(model).__name__, dict(model.named_modules())
    convs, pool = STEMS.get(name, ((), ""))
    conv = next((path for path in convs if isinstance(layers.get(path), nn.Conv2d)), "")
    if conv and stride == 2 and not pool:
        raise UserError(
            f"--stem_stride 2: the stem of this {name} has stride 2 already, without pooling; "
            "leave it out, or give 1"
        )
    fits = conv and layers[conv].stride == (2, 2)
    if not fits or (pool and not isinstance(layers.get(pool), nn.MaxPool2d)):
        raise UserError(
            f"--stem_stride {stride}: this {name} has a stem that cannot be changed; leave it out, "
            f"or choose a plain {', '.join(STEMS)}"
        )
    if pool:
        replace_module(model, pool, nn.Identity())
    if stride == 1 and layers[conv].kernel_size == (7, 7):
        replace_conv(model, conv, kernel_size=3, stride=1, padding=1)
    elif stride == 1:
        layers[conv].stride = (1, 1)


def adapt_stem(weight: Tensor, channels: int) -> Tensor:
    """Adapt (D, C, k, k) to other input channels by timm's rule: sum, or repeat and scale.

    With equal channels, or repeated as a whole, the layer computes the same as before.
    """
    found, exact = weight.shape[1], weight.float()
    if channels == 1:
        return exact.sum(1, keepdim=True).to(weight.dtype)
    order = torch.arange(channels) % found
    return (exact[:, order] * (found / channels)).to(weight.dtype)


def freeze_backbone(model: nn.Module) -> None:
    """Train nothing but the classifier; `training_mode` keeps the rest in evaluation mode.

    Parameters that are frozen already stay so: they are those that no head uses.
    """
    model.trained_parts = find_classifier(model)
    if not any(name.startswith(model.trained_parts) for name, _ in model.named_parameters()):
        raise UserError(
            f"--freeze_backbone true: the classifier of {type(model).__name__} is not found; give "
            "it a method get_classifier() that returns its last layer"
        )
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad and name.startswith(model.trained_parts)
        parameter.requires_grad_(trained)


def training_mode(model: nn.Module) -> None:
    """Call `model.train()`; a frozen backbone stays in evaluation mode.

    So its BatchNorm uses and keeps its statistics, and it has no dropout.
    """
    parts = getattr(model, "trained_parts", None)
    model.train(parts is None)
    for prefix in parts or ():
        model.get_submodule(prefix[:-1]).train()
    if parts and hasattr(model, "named_heads"):  # which gives the outputs of all heads in training
        model.named_heads.train()


def features(model: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Run a model and return the outputs of the named modules, by forward hooks.

    They are copies, since an activation that works in place may follow. Of a module that runs
    several times, the last output is returned. `model` is not wrapped in anything.
    """
    modules, found = {n: m for n, m in model.named_modules() if n}, {}
    handles = []
    try:
        for name in names:
            module = resolve(name, modules, "module", importable=False)
            keep = partial(_keep_output, found, name)
            handles.append(module.register_forward_hook(keep))
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{missing[0]} is not called by {type(model).__name__}; choose another")
    return {name: found[name] for name in names}


def _keep_output(found: dict, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    if not isinstance(output, Tensor):
        raise UserError(f"{name} returns {type(output).__name__}, not a tensor; choose another")
    found[name] = output.clone()


def keep_statistics(model: nn.Module) -> bool:
    """Make BatchNorm update its running statistics once a step under gradient checkpointing.

    Otherwise the second forward pass of a block, in backward, would update them again. Returns
    False if there is no BatchNorm.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.register_forward_pre_hook(partial(_pause_statistics, norm.momentum))
    return bool(norms)


def _pause_statistics(momentum: float | None, module: nn.Module, inputs: Any) -> None:
    in_backward = torch._C._current_graph_task_id() != -1
    module.momentum = 0.0 if in_backward else momentum
    if in_backward and module.training:
        module.num_batches_tracked.sub_(1)  # the module itself adds 1


class KeepOutputs(nn.Module):
    """A network with some of its outputs, (N, K) -> (N, those)."""

    def __init__(self, network: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[:, self.places]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model and its parts in eval mode, and back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
