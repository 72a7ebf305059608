# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The layers of ConvNeXt V2, channels-last, and the fused operations that replace several.

python -c "import torch; from models.layers import GRN; print(GRN(8)(torch.ones(1, 2, 2, 8)).shape)"
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.kernels import ops
from models.kernels.depthwise import depthwise_norm
from models.kernels.grn_mlp import grn_mlp
from models.kernels.mlp import mlp
from models.sparse import PatchGrid

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # statistics in float32 under autocast, unlike (x-u)^2


class GRN(nn.Module):
    """Global response normalization of an image's own positions, `(N, ..., C) -> (N, ..., C)`.

    Sums run over every axis between the first and the last: all cells of a dense map
    `(N, H, W, C)`, all visible cells of a packed one `(N, V, p, p, C)`. Identity at initialization.
    Source: arXiv 2301.00808, algorithm 1.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.grn(x, self.gamma.flatten(), self.beta.flatten(), self.eps)


@torch.fx.wrap  # a graph of torch.fx calls it: the axes of a proxy are not known
def draw_kept(x: Tensor, prob: float) -> Tensor:
    """1 for each image of x (N, ...) that is kept and 0 for those dropped, (N, 1, ...)."""
    return x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - prob)


class DropPath(nn.Module):
    """Drop the residual branch of an image with probability `prob` and rescale the others."""

    def __init__(self, prob: float = 0.0) -> None:
        super().__init__()
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.drops():
            return x
        return x * draw_kept(x, self.prob) * self.factor()

    def drops(self) -> bool:
        """True in training, unless the probability is 0."""
        return self.training and self.prob > 0

    def factor(self) -> float:
        """The factor of what is kept."""
        return 1 / max(1 - self.prob, 1e-6)  # probability 1 keeps nothing: 0 / 0 would be NaN


class PatchConv(nn.Conv2d):
    """Convolution whose stride is its kernel, `(..., H, W, C) -> (..., H/k, W/k, D)`.

    It never crosses a patch border, so that it serves dense maps and packed patches alike. Rows
    and columns that fill no whole square at the bottom and right are cut off, as by `nn.Conv2d`,
    whose parameters it has.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int) -> None:
        super().__init__(dim_in, dim_out, kernel_size=kernel, stride=kernel)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        k = self.kernel_size[0]
        if k == 1:
            return ops.affine(x, self.weight.flatten(1), self.bias)
        if ops.plain_only(x) and (not isinstance(x, Tensor) or x.ndim == 4):
            # Without arithmetic on shapes in the graph; proxies of torch.fx are dense maps.
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        *lead, height, width, dim = x.shape
        h, w = height // k, width // k
        if h == 0 or w == 0:
            raise UserError(
                f"a map of {height} x {width} cells is smaller than the {k} x {k} of the next "
                "layer; use larger images or a smaller stem_stride"
            )
        x = x[..., : h * k, : w * k, :].reshape(*lead, h, k, w, k, dim)
        x = x.transpose(-4, -3).reshape(*lead, h, w, k * k * dim)  # (..., h, w, k*k*C)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (D, k*k*C)
        return ops.affine(x, weight, self.bias)


def init_weights(layer: nn.Module) -> nn.Module:
    """Initialize a layer: weights with std 0.02, cut at 2, biases zero; returns the layer.

    Called once, where the layer is created. With the default std of 1.0 the official pre-training
    started at a loss of 2e10.
    """
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def fused_dwconv(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module, grid: PatchGrid | None = None
) -> Tensor:
    """`norm(conv(x))` of a dense map, or of a packed map and its grid, in the layout of x.

    Removed patches count as zeros, like the padding around an image.
    """
    fusible = _can_fuse(x, conv, nn.Conv2d) and _can_fuse(x, norm, nn.LayerNorm)
    if fusible and _is_depthwise(conv):
        places = () if grid is None else (grid.ids, grid.slots)
        weights = (conv.weight, conv.bias, norm.weight, norm.bias)
        return depthwise_norm(x, *weights, norm.eps, *places)
    dense = x if grid is None else grid.unpack(x)
    y = conv(dense.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return norm(y if grid is None else grid.pack(y))


def fused_mlp(x: Tensor, fc1: nn.Linear, grn: GRN | None, fc2: nn.Linear) -> Tensor:
    """`fc2(grn(gelu(fc1(x))))` of x (N, ..., C); grn: None in ConvNeXt V1."""
    if grn is None:
        if not (_can_fuse(x, fc1, nn.Linear) and _can_fuse(x, fc2, nn.Linear)):
            return fc2(F.gelu(fc1(x)))
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    kinds = ((fc1, nn.Linear), (grn, GRN), (fc2, nn.Linear))
    if not all(_can_fuse(x, module, kind) for module, kind in kinds):
        return fc2(grn(F.gelu(fc1(x))))
    of_grn = (grn.gamma.flatten(), grn.beta.flatten(), grn.eps)
    return grn_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, *of_grn)


def fused_residual(x: Tensor, branch: Tensor, drop_path: DropPath) -> Tensor:
    """`x + drop_path(branch)` in one pass."""
    if not (_can_fuse(branch, drop_path, DropPath) and drop_path.drops()):
        return x + drop_path(branch)
    with torch.autocast(x.device.type, enabled=False):  # it would copy the branch to float32 first
        return torch.addcmul(x, branch, draw_kept(branch, drop_path.prob), value=drop_path.factor())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _can_fuse(x: Tensor, module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if a fused operation may replace the module on x: it is unchanged and has no hooks."""
    if type(module) is not kind or getattr(module, "bias", True) is None or ops.plain_only(x):
        return False
    hooked = nn.modules.module._has_any_global_hook() or any(getattr(module, n) for n in _HOOKS)
    return not hooked and "forward" not in vars(module)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """True for one channel a group, stride 1, an odd square kernel and zero padding around it."""
    rows, columns = conv.kernel_size
    square = rows == columns and rows % 2 == 1 and conv.padding == (rows // 2, rows // 2)
    ones = conv.stride == conv.dilation == (1, 1) and conv.weight.shape[1] == 1
    same = conv.groups == conv.out_channels and conv.padding_mode == "zeros"
    return square and ones and same
