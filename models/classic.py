# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""ResNet, DenseNet and MLP with the options of ClassyVision that timm lacks.

python -c "from models import create_model; create_model('resnet(num_blocks=[2, 2, 2, 2])')"
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm.models.densenet as timm_densenet
import timm.models.resnet as timm_resnet
from timm.layers import BatchNormAct2d, SEModule
from torch import Tensor, nn

from errors import UserError
from models.anynet import AnyNet, Contract, init_weights, regnet, regnet_y_256gf
from models.arguments import call_network, check_positive


def squeeze_excite(channels: int, reduction: int) -> SEModule:
    """Squeeze-and-excitation with `channels // reduction` channels inside."""
    check_positive("se_reduction_ratio", reduction)
    if channels < reduction:
        raise UserError(
            f"se_reduction_ratio {reduction} leaves no channel of {channels}; try {channels // 2}"
        )
    return SEModule(channels, rd_channels=channels // reduction)


def check_blocks(num_blocks: Any, stages: int | None = None) -> list[int]:
    """Return the numbers of blocks as a list; UserError unless it is one."""
    check_positive("num_blocks", num_blocks)
    if not isinstance(num_blocks, list | tuple) or len(num_blocks) != (stages or len(num_blocks)):
        expected = f"a list of {stages} integers" if stages else "a list of integers"
        raise UserError(f"num_blocks is {num_blocks!r}, expected {expected}")
    return list(num_blocks)


def small_stem(in_chans: int, channels: int) -> nn.Conv2d:
    """3x3 convolution with stride 1, for images of some 32 pixels."""
    return nn.Conv2d(in_chans, channels, kernel_size=3, padding=1, bias=False)


class ResNet(Contract, timm_resnet.ResNet):
    """ResNet and ResNeXt, `images (N, in_chans, H, W) -> logits (N, num_classes)`.

    num_blocks: of the four stages.
    basic_layer: blocks of two convolutions 3x3, as ResNet-18 and 34, instead of bottlenecks.
    base_width_and_cardinality: (4, 32) makes it a ResNeXt 32x4d.
    small_input: a stem of stride 1 without pooling, for images of some 32 pixels.
    final_bn_relu: false leaves out norm and ReLU at the end of the last block.
    use_se, se_reduction_ratio: squeeze-and-excitation at the end of each residual branch.
    zero_init_bn_residuals: residual branches begin at zero.
    Parameters have the names of timm's ResNet.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        basic_layer: bool = False,
        base_width_and_cardinality: Sequence[int] | None = None,
        small_input: bool = False,
        final_bn_relu: bool = True,
        use_se: bool = False,
        se_reduction_ratio: int = 16,
        zero_init_bn_residuals: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
    ) -> None:
        pair = (64, 1) if base_width_and_cardinality is None else base_width_and_cardinality
        check_positive("base_width_and_cardinality", pair)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"base_width_and_cardinality is {pair!r}, expected two numbers")
        if basic_layer and tuple(pair) != (64, 1):
            raise UserError("basic_layer has no base_width_and_cardinality: drop one")

        def attention(channels: int, **unused: Any) -> SEModule:
            return squeeze_excite(channels, se_reduction_ratio)

        super().__init__(
            timm_resnet.BasicBlock if basic_layer else timm_resnet.Bottleneck,
            check_blocks(num_blocks, stages=4),
            num_classes,
            in_chans,
            base_width=pair[0],
            cardinality=pair[1],
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_bn_residuals,
            block_args={"attn_layer": attention if use_se else None},
        )
        last = self.layer4[-1]
        for name in () if final_bn_relu else ("bn2", "act2") if basic_layer else ("bn3", "act3"):
            setattr(last, name, nn.Identity())
        if small_input:
            self.conv1, self.maxpool = small_stem(in_chans, 64), nn.Identity()
            init_weights(self.conv1)
            self.feature_info[0]["reduction"] = 1
            for info in self.feature_info[1:]:
                info["reduction"] //= 4
        self.scale_head(head_init_scale)


class DenseLayer(timm_densenet.DenseLayer):
    """DenseNet layer that may end in squeeze-and-excitation."""

    def __init__(self, in_chans: int, growth_rate: int, expansion: int, reduction: int) -> None:
        super().__init__(in_chans, growth_rate, expansion)
        self.se = squeeze_excite(growth_rate, reduction) if reduction else nn.Identity()

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return self.se(super().forward(x))


class DenseNet(Contract, timm_densenet.DenseNet):
    """DenseNet, `images (N, in_chans, H, W) -> logits (N, num_classes)`.

    num_blocks: layers of the stages; growth_rate: channels that each layer adds.
    init_planes: channels of the stem; timm has 2 * growth_rate.
    expansion: channels inside a layer over growth_rate.
    small_input, final_bn_relu: as in ResNet.
    use_se, se_reduction_ratio: squeeze-and-excitation of the channels that a layer adds.
    Parameters have the names of timm's DenseNet.
    """

    def __init__(
        self,
        num_blocks: Sequence[int] = (6, 12, 24, 16),
        init_planes: int = 64,
        growth_rate: int = 32,
        expansion: int = 4,
        small_input: bool = False,
        final_bn_relu: bool = True,
        use_se: bool = False,
        se_reduction_ratio: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        head_init_scale: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)  # timm's own takes the stem's channels from growth_rate
        sizes = {"init_planes": init_planes, "growth_rate": growth_rate, "expansion": expansion}
        for key, size in sizes.items():
            check_positive(key, size)
        self.in_chans, self.num_features = in_chans, init_planes
        self.features, self.feature_info, self.feature_ends = nn.Sequential(), [], []
        self.layer_shape = (growth_rate, expansion, se_reduction_ratio if use_se else 0)
        self._add_stem(small_input)
        stride = 1 if small_input else 4
        for stage, depth in enumerate(check_blocks(num_blocks)):
            if stage > 0:
                self._mark(stride)
                stride *= 2
                self._add_transition(stage)
            self._add_block(stage + 1, depth)
        norm = BatchNormAct2d(self.num_features) if final_bn_relu else nn.Identity()
        self.features.add_module("norm5", norm)
        self._mark(stride)
        self.head_drop = nn.Identity()
        self.reset_classifier(num_classes, "avg")
        init_weights(self)
        self.scale_head(head_init_scale)

    def _add_stem(self, small_input: bool) -> None:
        channels, pool = self.num_features, nn.MaxPool2d(3, stride=2, padding=1)
        conv = nn.Conv2d(self.in_chans, channels, 7, stride=2, padding=3, bias=False)
        if small_input:
            conv, pool = small_stem(self.in_chans, channels), nn.Identity()
        self.features.add_module("conv0", conv)
        self.features.add_module("norm0", BatchNormAct2d(channels))
        self._mark(1 if small_input else 2)
        self.features.add_module("pool0", pool)

    def _add_transition(self, number: int) -> None:
        before, self.num_features = self.num_features, self.num_features // 2
        transition = timm_densenet.DenseTransition(before, self.num_features, BatchNormAct2d)
        self.features.add_module(f"transition{number}", transition)

    def _add_block(self, number: int, depth: int) -> None:
        block = timm_densenet.DenseBlock(0, self.num_features, *self.layer_shape[1::-1])
        for layer in range(1, depth + 1):
            block.add_module(f"denselayer{layer}", DenseLayer(self.num_features, *self.layer_shape))
            self.num_features += self.layer_shape[0]
        self.features.add_module(f"denseblock{number}", block)

    def _mark(self, reduction: int) -> None:
        """Make the output of the newest layer one of timm's `forward_intermediates`."""
        self.feature_ends.append(len(self.features) - 1)
        name = f"features.{list(self.features._modules)[-1]}"
        info = {"num_chs": self.num_features, "reduction": reduction, "module": name}
        self.feature_info.append(info)


class MLP(Contract, nn.Module):
    """Linear layers with ReLU on all pixels, `images (N, in_chans, H, W) -> (N, num_classes)`.

    hidden_dims: outputs of the layers before the last; an empty list makes a linear classifier.
    input_size: height and width of the images, or one number for both.
    dropout: rate after each hidden layer, and with first_dropout on the pixels as well.
    use_batchnorm: BatchNorm after each hidden layer, and with first_batchnorm on the pixels.
    """

    def __init__(
        self,
        hidden_dims: Sequence[int],
        dropout: float = 0.0,
        first_dropout: bool = False,
        use_batchnorm: bool = False,
        first_batchnorm: bool = False,
        input_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if hidden_dims != []:
            check_positive("hidden_dims", hidden_dims)
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is {dropout}, expected at least 0 and below 1")
        if (first_dropout and not dropout) or (first_batchnorm and not use_batchnorm):
            raise UserError("first_dropout needs dropout, and first_batchnorm needs use_batchnorm")
        height, width = (input_size,) * 2 if isinstance(input_size, int) else input_size
        self.input_shape = (in_chans, height, width)
        self.num_features = math.prod(self.input_shape)
        first = [nn.Dropout(dropout)] if first_dropout else []
        first += [nn.BatchNorm1d(self.num_features)] if first_batchnorm else []
        self.stem = nn.Sequential(nn.Flatten(), *first)
        self.layers = nn.Sequential()
        for width in [hidden_dims] if isinstance(hidden_dims, int) else hidden_dims:
            layer = [nn.Linear(self.num_features, width)]
            layer += [nn.BatchNorm1d(width)] if use_batchnorm else []
            layer += [nn.Dropout(dropout)] if dropout else []
            self.layers.append(nn.Sequential(*layer, nn.ReLU(inplace=True)))
            self.num_features = width
        self.reset_classifier(num_classes)
        self.scale_head(head_init_scale)

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features)."""
        if images.shape[1:] != self.input_shape:
            got, expected = ("x".join(map(str, x)) for x in (images.shape[1:], self.input_shape))
            raise UserError(f"an MLP for images of {expected} got {got}: set --input_size")
        return self.layers(self.stem(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features) -> (N, num_classes), or the features again with `pre_logits`."""
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new last layer for `num_classes`; 0 removes it."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameter names, for timm's `group_parameters`."""
        return {"stem": r"^stem", "blocks": r"^layers\.(\d+)"}


resnext152_32x4d = partial(
    ResNet,
    num_blocks=(3, 8, 36, 3),
    base_width_and_cardinality=(4, 32),
    zero_init_bn_residuals=True,
)
NETWORKS = {
    "anynet": AnyNet,
    "regnet": regnet,
    "regnet_y_256gf": regnet_y_256gf,
    "resnet": ResNet,
    "resnext152_32x4d": resnext152_32x4d,
    "densenet": DenseNet,
    "mlp": MLP,
}


def build_network(name: str, **kwargs: Any) -> nn.Module:
    """Build a network of NETWORKS with checked arguments."""
    return call_network(name, NETWORKS[name], kwargs)
