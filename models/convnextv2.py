# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""ConvNeXt V2 and V1 in their sizes, for whole images and for visible patches alone.

python -c "from models import create_model; print(create_model('convnextv2_atto'))"
"""

import operator
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import UserError
from models.kernels import ops
from models.layers import (
    GRN,
    DropPath,
    LayerNorm,
    PatchConv,
    fused_dwconv,
    fused_mlp,
    fused_residual,
    init_weights,
)
from models.sparse import PatchGrid


class Block(nn.Module):
    """ConvNeXt V2 block, dwconv -> norm -> pwconv1 -> GELU -> GRN -> pwconv2, with a residual.

    x: dense (N, H, W, C), or packed (N, V, p, p, C) together with its grid.
    layer_scale_init_value: makes it a block of V1, which has no GRN and multiplies the output of
        pwconv2 by a learned `gamma` (C), which starts with this value.
    """

    checkpointing = False  # in training, save x alone and compute the rest again in backward

    def __init__(
        self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float | None = None
    ) -> None:
        super().__init__()
        is_v1 = layer_scale_init_value is not None
        if is_v1 and not layer_scale_init_value > 0:
            raise UserError(
                f"layer_scale_init_value {layer_scale_init_value}: expected a positive number, or "
                "None for ConvNeXt V2"
            )
        self.dwconv = init_weights(nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim))
        self.norm = LayerNorm(dim)
        self.pwconv1 = init_weights(nn.Linear(dim, 4 * dim))
        self.grn = None if is_v1 else GRN(4 * dim)
        self.pwconv2 = init_weights(nn.Linear(4 * dim, dim))
        scale = torch.full((dim,), float(layer_scale_init_value)) if is_v1 else None
        self.gamma = None if scale is None else nn.Parameter(scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: PatchGrid | None = None) -> Tensor:
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        branch = self._checkpointed if recompute and not ops.plain_only(x) else self._branch
        return fused_residual(x, branch(x, grid), self.drop_path)  # x + drop_path(branch(x, grid))

    def _branch(self, x: Tensor, grid: PatchGrid | None) -> Tensor:
        x = fused_dwconv(x, self.dwconv, self.norm, grid)  # norm(dwconv(x))
        x = fused_mlp(x, self.pwconv1, self.grn, self.pwconv2)  # pwconv2(grn(gelu(pwconv1(x))))
        return x if self.gamma is None else x * self.gamma  # in float32: in fp16 1e-6 * x is 0

    def _checkpointed(self, x: Tensor, grid: PatchGrid | None) -> Tensor:
        weights = [*self.parameters()]
        if any(not isinstance(weight, nn.Parameter) for weight in weights):
            return self._branch(x, grid)  # replaced by torch.func, for this call alone

        def branch(x: Tensor) -> Tensor:
            if any(map(operator.is_not, self.parameters(), weights)):
                raise RuntimeError(
                    "the weights were replaced between forward and backward; call "
                    "set_grad_checkpointing(False) first"
                )
            return self._branch(x, grid)

        # The branch draws no random numbers, so no generator's state is saved.
        return checkpoint(branch, x, use_reentrant=False, preserve_rng_state=False)


def set_grad_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Save only the input of each block and compute the rest again in backward, as in timm."""
    for module in model.modules():
        if isinstance(module, Block):
            module.checkpointing = enable


class ConvNeXtV2(nn.Module):
    """ConvNeXt V2 or V1, `images (N, in_chans, H, W) -> logits (N, num_classes)`.

    depths, dims: blocks and channels of the stages.
    num_classes: 0 gives the normalized features (N, num_features) instead of logits.
    drop_path_rate: rate of the last block; it grows linearly from 0 at the first.
    head_init_scale: factor on the initial classifier; 0.001 for fine-tuning, 1 from scratch.
    stem_stride: 4, or 1 or 2 for small images; also the stem's kernel.
    features_only: a backbone, images -> [maps of the stages `out_indices`], without norm, head and
        deeper stages; see `forward_intermediates`, and `feature_info.channels()`, `.reduction()`.
    layer_scale_init_value: makes it a ConvNeXt V1, with layer scale instead of GRN; 1e-6 there.
    Parameter names and shapes are the official ones. Source: arXiv 2301.00808, appendix A, and
    2201.03545 for V1.
    """

    set_grad_checkpointing = set_grad_checkpointing
    inner_layout = "NHWC"  # of the maps between its modules

    def __init__(
        self,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        stem_stride: int = 4,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        layer_scale_init_value: float | None = None,
    ) -> None:
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise UserError(f"stem_stride {stem_stride}: expected 1, 2 or 4")
        if out_indices is not None and not features_only:
            raise UserError(f"out_indices {out_indices}: needs features_only=True")
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.out_indices = take_stages(out_indices, len(dims))
        if features_only:
            from timm.models import FeatureInfo  # imports slowly

            names = ("num_chs", "reduction", "module")
            rows = [(dim, stem_stride * 2**i, f"stages.{i}") for i, dim in enumerate(dims)]
            info = [dict(zip(names, row, strict=True)) for row in rows]
            self.feature_info = FeatureInfo(info, self.out_indices)
        self.features_only, built = features_only, self.out_indices[-1] + 1
        parts, deeper = ("downsample_layers", "stages"), range(built, len(dims))
        prefixes = ["norm.", "head.", *(f"{part}.{i}." for part in parts for i in deeper)]
        self.left_out = tuple(prefixes) if features_only else ()  # parameters that it lacks
        depths, dims = depths[:built], dims[:built]
        self.depths = tuple(depths)
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.total_stride = stem_stride * 2 ** (len(dims) - 1)

        stem = nn.Sequential(PatchConv(in_chans, dims[0], stem_stride), LayerNorm(dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in zip(dims[:-1], dims[1:], strict=True):
            layer = nn.Sequential(LayerNorm(before), PatchConv(before, after, 2))
            self.downsample_layers.append(layer)

        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(dim, rates.pop(0), layer_scale_init_value) for _ in range(depth)])
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.norm = nn.Identity() if features_only else LayerNorm(dims[-1])
        self.reset_classifier(0 if features_only else num_classes, head_init_scale)

    def reset_classifier(self, num_classes: int, head_init_scale: float = 1.0) -> None:
        """Make a new head for `num_classes`; 0 removes it."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = init_weights(nn.Linear(self.num_features, num_classes))
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)

    def forward_stages(
        self, x: Tensor, grid: PatchGrid | None = None, last: int = -1
    ) -> list[Tensor]:
        """Maps of the stages up to `last`, in the layout of x: dense (N, H, W, C) or packed."""
        maps = []
        steps = list(zip(self.downsample_layers, self.stages, strict=True))[: last + 1 or None]
        for downsample, stage in steps:
            x = downsample(x)
            for block in stage:
                x = block(x, grid)
            maps.append(x)
        return maps

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """(N, in_chans, H, W) -> the last map, and the maps (N, C_i, h_i, w_i) of some stages.

        indices: None for all stages, n for the last n, or a rising list. intermediates_only: return
        the maps alone and do not run deeper stages. The stride of map i is stem_stride * 2**i; rows
        and columns at the bottom and right that fill no whole cell are cut off.
        """
        taken = take_stages(indices, len(self.stages))
        last = taken[-1] if intermediates_only else -1
        maps = self.forward_stages(images.permute(0, 2, 3, 1), last=last)
        chosen = [maps[i].permute(0, 3, 1, 2) for i in taken]
        return chosen if intermediates_only else (maps[-1].permute(0, 3, 1, 2), chosen)

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, C, H/stride, W/stride), channels_last in memory."""
        return self.forward_stages(images.permute(0, 2, 3, 1))[-1].permute(0, 3, 1, 2)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, C, h, w) -> (N, num_classes), or the normalized mean (N, C) with `pre_logits`."""
        if getattr(self.head, "takes_maps", False) and not pre_logits:  # of models/heads.py
            return self.head(self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.norm(features.mean((-2, -1)))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            return self.forward_intermediates(images, self.out_indices, intermediates_only=True)
        return self.forward_head(self.forward_features(images))

    def layer_of(self, name: str, kind: str = "single") -> int:
        """The number of the layer that a parameter belongs to, for layer-wise learning rates.

        kind: `single` makes each block a layer, together with the downsampling before it; `group`
        makes the third stage's blocks layers of three and every other stage one layer. The stem is
        layer 0, the final norm belongs to the last layer and the head is one above.
        """
        sizes = [
            {"single": 1, "group": 3 if i == 2 else d}[kind] for i, d in enumerate(self.depths)
        ]
        layers = [-(-depth // size) for depth, size in zip(self.depths, sizes, strict=True)]
        top, *rest = name.split(".")
        if top not in ("downsample_layers", "stages"):
            return sum(layers) + (top != "norm")
        stage, block = int(rest[0]), int(rest[1]) if top == "stages" else 0
        if top == "downsample_layers" and stage == 0:
            return 0
        return 1 + sum(layers[:stage]) + block // sizes[stage]


def take_stages(indices: int | Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """Numbers of stages, as in timm: all (None), the last n (an int), or a rising list."""
    if indices is None:
        indices = stages
    listed = range(-indices, 0) if isinstance(indices, int) else indices
    taken = [i + stages if i < 0 else i for i in listed]
    if not taken or taken != sorted(set(taken) & set(range(stages))):
        raise UserError(
            f"stages {indices!r}: expected how many of the last, 1 to {stages}, or a rising list "
            f"of numbers from 0 to {stages - 1}"
        )
    return tuple(taken)


SIZES = {  # depths, dims; arXiv 2301.00808, appendix A
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
V1_SIZES = {size: SIZES[size] for size in ("atto", "femto", "pico", "nano", "tiny")} | {
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),  # tiny to xlarge: arXiv 2201.03545, section 3
    "base": SIZES["base"],
    "large": SIZES["large"],
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}

convnextv2_atto = partial(ConvNeXtV2, *SIZES["atto"])
convnextv2_femto = partial(ConvNeXtV2, *SIZES["femto"])
convnextv2_pico = partial(ConvNeXtV2, *SIZES["pico"])
convnextv2_nano = partial(ConvNeXtV2, *SIZES["nano"])
convnextv2_tiny = partial(ConvNeXtV2, *SIZES["tiny"])
convnextv2_base = partial(ConvNeXtV2, *SIZES["base"])
convnextv2_large = partial(ConvNeXtV2, *SIZES["large"])
convnextv2_huge = partial(ConvNeXtV2, *SIZES["huge"])

_ConvNeXt = partial(ConvNeXtV2, layer_scale_init_value=1e-6)
convnext_atto = partial(_ConvNeXt, *V1_SIZES["atto"])
convnext_femto = partial(_ConvNeXt, *V1_SIZES["femto"])
convnext_pico = partial(_ConvNeXt, *V1_SIZES["pico"])
convnext_nano = partial(_ConvNeXt, *V1_SIZES["nano"])
convnext_tiny = partial(_ConvNeXt, *V1_SIZES["tiny"])
convnext_small = partial(_ConvNeXt, *V1_SIZES["small"])
convnext_base = partial(_ConvNeXt, *V1_SIZES["base"])
convnext_large = partial(_ConvNeXt, *V1_SIZES["large"])
convnext_xlarge = partial(_ConvNeXt, *V1_SIZES["xlarge"])
