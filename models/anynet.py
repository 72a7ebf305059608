# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""AnyNet, stages of blocks with free depths and widths, and RegNet, its widths by a formula.

python -c "from models import create_model; create_model('anynet(depths=[1], widths=[8])')"
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import Parameter, Signature, signature
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    DropPath,
    calculate_drop_path_rates,
    get_act_layer,
)
from timm.models import group_parameters
from timm.models.regnet import (
    Bottleneck,
    RegStage,
    adjust_widths_groups_comp,
    create_shortcut,
    generate_regnet,
)
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from errors import UserError
from models.arguments import check_positive, look_up, per_stage

ACTIVATIONS = {"relu": "relu", "silu": "silu"}  # timm's names
STEMS = {  # kernel, stride, max pooling
    "res_stem_cifar": (3, 1, False),
    "res_stem_in": (7, 2, True),
    "simple_stem_in": (3, 2, False),
}


def vanilla(in_chs: int, out_chs: int, stride: int, **layers: Any) -> nn.Sequential:
    """Two convolutions 3x3, each with norm and activation, without a residual."""
    layers = {key: layers[key] for key in ("act_layer", "norm_layer")}
    first = ConvNormAct(in_chs, out_chs, 3, stride=stride, **layers)
    return nn.Sequential(first, ConvNormAct(out_chs, out_chs, 3, **layers))


def res_basic(
    in_chs: int,
    out_chs: int,
    stride: int,
    dilation: tuple[int, int],
    drop_path_rate: float,
    act_layer: str,
    norm_layer: Callable[..., nn.Module],
) -> BasicBlock:
    """The block of ResNet-18: two convolutions 3x3 with a residual."""
    return BasicBlock(
        in_chs,
        out_chs,
        stride,
        create_shortcut("conv1x1", in_chs, out_chs, 1, stride, norm_layer=norm_layer),
        act_layer=get_act_layer(act_layer),
        norm_layer=norm_layer,
        drop_path=DropPath(drop_path_rate),
    )


BLOCKS = {
    "vanilla": vanilla,
    "res_basic": res_basic,
    "res_bottleneck": Bottleneck,
    "res_bottleneck_linear": partial(Bottleneck, linear_out=True, downsample=None),
}


class Contract:
    """Methods that training expects of a network and timm's classes lack."""

    def layer_of(self, name: str, kind: str = "single") -> int:
        """Layer of a parameter for layer-wise learning rates: the stem is 0, the head the last.

        kind: `single` makes each block a layer, `group` each stage.
        """
        coarse = {"single": False, "group": True}[kind]
        layers = self.__dict__.setdefault("_layers", {})
        if kind not in layers:
            layers[kind] = group_parameters(self, self.group_matcher(coarse), reverse=True)
        return layers[kind].get(name, max(layers[kind].values()))

    def scale_head(self, scale: float) -> None:
        """Multiply the initial weights and bias of the classifier, if there is one."""
        head = self.get_classifier()
        if isinstance(head, nn.Linear):
            with torch.no_grad():
                for parameter in head.parameters():
                    parameter.mul_(scale)


def init_weights(model: nn.Module, zero_init_last: bool = False) -> None:
    """He initialization of convolutions by fan-out, as in ClassyVision: groups do not change it.

    zero_init_last: the last norm of residual branches is zero, but not in blocks without a
        shortcut, which would be silent.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        is_residual = isinstance(module, BasicBlock | Bottleneck) and module.downsample is not None
        if zero_init_last and is_residual:
            module.zero_init_last()


def norm_and_activation(epsilon: float, momentum: float, activation: str) -> dict[str, Any]:
    """Arguments of timm's layers."""
    check_positive("bn_epsilon", epsilon, float)
    if not 0 <= momentum <= 1:
        raise UserError(f"bn_momentum is {momentum}, expected 0 to 1")
    norm = partial(nn.BatchNorm2d, eps=epsilon, momentum=momentum)
    return {"act_layer": look_up("activation", activation, ACTIVATIONS), "norm_layer": norm}


class AnyNet(Contract, nn.Module):
    """AnyNet, `images (N, in_chans, H, W) -> logits (N, num_classes)`.

    depths, widths: blocks and channels of the stages.
    strides: of the first block of each stage; one number stands for all stages, here and below.
    group_widths: channels of a group in the 3x3 convolutions of bottleneck blocks; None: one group.
    bottleneck_multipliers: their channels over the stage's; None: 1.
    use_se, se_ratio: squeeze-and-excitation in bottleneck blocks, and its channels over those that
        enter the block; None: yes and 0.25, as in ClassyVision.
    stem_type, block_type, activation: names in STEMS, BLOCKS and ACTIVATIONS.
    zero_init_last: residual branches begin at zero.
    Parameters have the names of timm's RegNet. Source: arXiv 2003.13678.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        group_widths: int | Sequence[int] | None = None,
        bottleneck_multipliers: float | Sequence[float] | None = None,
        strides: int | Sequence[int] = 2,
        stem_type: str = "simple_stem_in",
        stem_width: int = 32,
        block_type: str = "res_bottleneck",
        activation: str = "relu",
        use_se: bool | None = None,
        se_ratio: float | None = None,
        bn_epsilon: float = 1e-5,
        bn_momentum: float = 0.1,
        zero_init_last: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        stages = len(depths) if isinstance(depths, list | tuple) else 1
        depths = per_stage("depths", depths, stages)
        widths = per_stage("widths", widths, stages)
        strides = per_stage("strides", strides, stages)
        check_positive("stem_width", stem_width)
        block_type = block_type.removesuffix("_block")  # as ClassyVision writes them
        make_block = look_up("block_type", block_type, BLOCKS)
        if block_type == "vanilla" and (drop_path_rate or zero_init_last):
            raise UserError(f"{block_type} blocks have no residual: drop drop_path, zero_init_last")
        inputs = (stem_width, *widths)
        options = bottleneck_options(
            block_type, inputs, group_widths, bottleneck_multipliers, use_se, se_ratio
        )
        kernel, stride, pools = look_up("stem_type", stem_type, STEMS)
        layers = norm_and_activation(bn_epsilon, bn_momentum, activation)

        self.stem = ConvNormAct(in_chans, stem_width, kernel, stride=stride, **layers)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pools else nn.Identity()
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, option in enumerate(options):
            shape = (depths[i], inputs[i], widths[i], strides[i], 1, rates[i])
            self.add_module(f"s{i + 1}", RegStage(*shape, make_block, **option, **layers))
        self.stage_names = [f"s{i + 1}" for i in range(stages)]
        self.num_features = widths[-1]
        self.head = ClassifierHead(self.num_features, num_classes)
        init_weights(self, zero_init_last)
        self.scale_head(head_init_scale)

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, h, w)."""
        x = self.pool(self.stem(images))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, C, h, w) -> (N, num_classes), or the mean (N, C) with `pre_logits`."""
        return self.head(features, pre_logits=pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new last layer for `num_classes`; 0 removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the input of each block and compute the rest again in backward."""
        for name in self.stage_names:
            getattr(self, name).grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameter names, for timm's `group_parameters`."""
        return {"stem": r"^stem", "blocks": r"^s(\d+)" if coarse else r"^s(\d+)\.b(\d+)"}


def bottleneck_options(
    block_type: str,
    inputs: tuple[int, ...],
    group_widths: int | Sequence[int] | None,
    multipliers: float | Sequence[float] | None,
    use_se: bool | None,
    se_ratio: float | None,
) -> list[dict[str, Any]]:
    """Arguments of each stage's bottleneck blocks; other blocks have none, and refuse any.

    inputs: channels of the stem and of all stages.
    """
    widths, stages = inputs[1:], len(inputs) - 1
    if "bottleneck" not in block_type:
        options = {"group_widths": group_widths, "bottleneck_multipliers": multipliers}
        options |= {"use_se": use_se or None, "se_ratio": se_ratio}
        for key in (key for key, value in options.items() if value is not None):
            raise UserError(f"{block_type} blocks have no {key}: drop it, or use res_bottleneck")
        return [{}] * stages
    if use_se is False and se_ratio is not None:
        raise UserError(f"use_se is false, so se_ratio {se_ratio} does nothing: drop one")
    ratio = 0.0 if use_se is False else 0.25 if se_ratio is None else se_ratio
    if ratio and round(ratio * min(inputs)) < 1:
        raise UserError(f"se_ratio {ratio} leaves no channel of {min(inputs)}: raise it")
    multipliers = 1.0 if multipliers is None else multipliers
    ratios = per_stage("bottleneck_multipliers", multipliers, stages, float)
    inner = [round(width * ratio) for width, ratio in zip(widths, ratios, strict=True)]
    groups = per_stage("group_widths", inner if group_widths is None else group_widths, stages)
    for i, (channels, group) in enumerate(zip(inner, groups, strict=True)):
        if channels % group or not channels:
            low = channels // group * group
            near = f"{low} or {low + group}" if low else group
            raise UserError(
                f"stage {i + 1}: {widths[i]} channels x bottleneck multiplier {ratios[i]:g} = "
                f"{channels}, expected a multiple of the group width {group}, such as {near}"
            )
    rows = zip(groups, ratios, strict=True)
    return [{"group_size": g, "bottle_ratio": r, "se_ratio": ratio} for g, r in rows]


COMPUTED = ("depths", "widths", "group_widths", "bottleneck_multipliers")  # by the formula


def regnet(
    depth: int,
    w_0: int,
    w_a: float,
    w_m: float,
    group_width: int,
    bottleneck_multiplier: float = 1.0,
    **options: Any,
) -> AnyNet:
    """RegNet: `depth` blocks whose widths follow `w_0 + w_a * block`, in powers of `w_m`.

    Widths are rounded to multiples of 8 and then of the group width, as in ClassyVision and pycls
    (torchvision rounds otherwise). options: those of AnyNet that the formula leaves open.
    """
    shape = regnet_shape(depth, w_0, w_a, w_m, group_width, bottleneck_multiplier)
    return AnyNet(**dict(zip(COMPUTED, shape, strict=True)), **options)


def regnet_shape(
    depth: int, w_0: int, w_a: float, w_m: float, group_width: int, bottleneck_multiplier: float
) -> tuple[list[Any], ...]:
    """Depths, widths, group widths and bottleneck multipliers of the stages of a RegNet."""
    for key, value in {"depth": depth, "w_0": w_0, "group_width": group_width}.items():
        check_positive(key, value)
    check_positive("bottleneck_multiplier", bottleneck_multiplier, float)
    if w_0 % 8 or w_a < 0 or w_m <= 1:
        raise UserError(
            f"w_0 {w_0}, w_a {w_a}, w_m {w_m}: expected w_0 a multiple of 8, w_a at least 0, w_m "
            "above 1"
        )
    blocks, stages, groups = generate_regnet(w_a, w_0, w_m, depth, group_width)
    sizes, ratios = sorted(set(blocks)), [bottleneck_multiplier] * stages
    return (
        [blocks.count(x) for x in sizes],
        *adjust_widths_groups_comp(sizes, ratios, groups),
        ratios,
    )


def _signature() -> Signature:
    """The signature of `regnet` with AnyNet's options by name, for `call_network` and help()."""
    own = [*signature(regnet).parameters.values()][:-1]
    others = [
        x for x in signature(AnyNet).parameters.values() if x.name not in (*COMPUTED, "strides")
    ]
    return Signature([*own, *(x.replace(kind=Parameter.KEYWORD_ONLY) for x in others)])


regnet.__signature__ = _signature()
regnet_y_256gf = partial(regnet, depth=27, w_0=640, w_a=124.47, w_m=2.04, group_width=848)
