# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""FCMAE around any convolutional network, by exact masked dense operations.

python -c "import timm; from models.masked import *; MaskedFCMAE(timm.create_model('resnet18'))"

Hidden cells are treated as the padding around an image: zeros for a convolution, left out of a
maximum. Statistics of norms and global means are those of the visible cells. A feature map carries
its mask in a tensor subclass, so the network runs its own code; an operation without an exact
masked form is refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, first_line
from models.convnextv2 import set_grad_checkpointing
from models.fcmae import FCMAE
from models.parts import evaluating
from models.sparse import PatchGrid

PROBE = 64  # pixels along the side of an image that finds the stride of a network


class MaskedFCMAE(FCMAE):
    """FCMAE around a convolutional network of another kind.

    encoder: a network with `forward_features`, images -> the last map (N, D, h, w), of any size of
        images, and `reset_classifier`. Its own parameter names follow `encoder.`. Other arguments
        and the output: as of `FCMAE`.
    """

    @staticmethod
    def remove_head(encoder: nn.Module) -> tuple[int, int, int]:
        """Remove the head, and measure the network with small images, whole and masked."""
        encoder.reset_classifier(0)
        first = next((m for m in encoder.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise UserError(f"{type(encoder).__name__} has no convolution; choose another --model")
        side = PROBE
        with evaluating(encoder):
            images = first.weight.new_zeros(1, first.in_channels, side, side)
            features = call_encoder(encoder, images)
            shape = tuple(getattr(features, "shape", ()))
            stride = side // shape[-1] if len(shape) == 4 else 0
            if not stride or shape[-2:] != (side // stride,) * 2:
                got = f"features of shape {shape}" if shape else type(features).__name__
                raise UserError(
                    f"{type(encoder).__name__} makes {got} of a test image of {side} x {side} "
                    "pixels, expected a map (1, channels, h, w) whose stride divides them; choose "
                    "another --model"
                )
            try_backward(encoder, first.weight.new_zeros(1, first.in_channels, *[2 * stride] * 2))
        for parameter in encoder.parameters():  # what only a head would use
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        return first.in_channels, features.shape[1], stride

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks of the encoder, as far as it can, and of the decoder in backward."""
        self.encoder.set_grad_checkpointing(enable)
        if enable:  # some networks recompute other operations than they ran
            like = next(self.encoder.parameters())
            try:
                with evaluating(self.encoder):
                    side = 2 * self.stride
                    try_backward(self.encoder, like.new_zeros(1, self.in_chans, side, side))
            except RuntimeError as error:
                raise UserError(
                    f"--grad_checkpointing: {type(self.encoder).__name__} cannot recompute its "
                    "masked operations; drop it"
                ) from error
            for parameter in self.encoder.parameters():
                parameter.grad = None
        set_grad_checkpointing(self.decoder, enable)

    def forward_encoder(self, images: Tensor, mask: Tensor, visible: int | None = None) -> Tensor:
        """As of `FCMAE`: features of visible patches, zero where removed."""
        grid = PatchGrid(mask, self.grid_size(*images.shape[-2:]), visible)
        images = masked(cleaned(masked(images, grid)), grid, clean=True)
        return cleaned(self.encoder.forward_features(images))


def try_backward(encoder: nn.Module, images: Tensor) -> None:
    """Run forward and backward on an image of 2 x 2 patches, two of them hidden."""
    grid = PatchGrid(images.new_tensor([[[0.0, 1.0], [1.0, 0.0]]]), visible=2)
    cleaned(call_encoder(encoder, masked(images, grid, clean=True))).sum().backward()


def call_encoder(encoder: nn.Module, images: Tensor) -> Tensor:
    """Call `forward_features`; a UserError names the module that has no exact masked form.

    Images without a mask test that the network takes images of any size.
    """
    inside: list[str] = []
    handles = [
        handle
        for name, module in encoder.named_modules()
        for handle in (
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)),
            module.register_forward_hook(lambda *_: inside.pop() and None),
        )
    ]
    try:
        return encoder.forward_features(images)
    except Exception as error:  # of any library
        places = [f"{x} ({type(encoder.get_submodule(x)).__name__})" for x in inside[-1:] if x]
        problem = ": ".join([*places, first_line(error)])
        if not isinstance(images, MaskedMap):
            height, width = images.shape[-2:]
            problem = (
                "it must take images of any size, without attention over positions, and cannot "
                f"take a test image of {height} x {width} pixels: {problem}"
            )
        raise UserError(
            f"{type(encoder).__name__} cannot be pre-trained by FCMAE: {problem}; choose another "
            "--model"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


class MaskedMap(Tensor):
    """Feature map (N, C, H, W), or after a permute (N, H, W, C), with the grid of its patches.

    clean: hidden cells are zero. Operations on single cells leave anything there; those that look
    at neighbors clean their input first, so nothing flows from a hidden cell to a visible one.
    """

    grid: PatchGrid
    memory: list[bool]  # the one value of `clean`, shared by views of the same memory
    channels_last: bool

    @property
    def clean(self) -> bool:
        return self.memory[0]

    @clean.setter
    def clean(self, value: bool) -> None:
        self.memory[0] = value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in FACTS or getattr(func, "__name__", "") == "__get__":  # such as x.shape
                return func(*args, **kwargs)
            if func in ON_CELLS:
                return _on_cells(func, args, kwargs)
            if func not in MASKED:
                raise UserError(f"no exact masked form of {_name(func)}")
            return MASKED[func](func, *args, **kwargs)


def _name(func: Any) -> str:
    return getattr(func, "__qualname__", str(func)).rpartition(".")[2]


def masked(x: Tensor, grid: PatchGrid, clean: bool = False, last: bool = False) -> MaskedMap:
    """Attach a grid to a feature map."""
    x = x.as_subclass(MaskedMap)
    x.grid, x.memory, x.channels_last = grid, [clean], last
    return x


def like(x: Tensor, source: MaskedMap, clean: bool = False) -> MaskedMap:
    """Attach the grid and the layout of another map."""
    return masked(x, source.grid, clean, source.channels_last)


def view(x: Tensor, source: MaskedMap, last: bool | None = None) -> MaskedMap:
    """Attach what another map has to a view of it: a change in place concerns both."""
    x = masked(x, source.grid, last=source.channels_last if last is None else last)
    x.memory = source.memory
    return x


def visible(x: MaskedMap) -> Tensor:
    """Return a bool tensor that broadcasts over x, True where a cell is visible."""
    h, w = x.grid.size
    height, width = x.shape[1:3] if x.channels_last else x.shape[2:4]
    if height % h or width % w or height // h != width // w:
        raise UserError(f"a map of {height} x {width} cells does not divide into {h} x {w} patches")
    cells = (x.grid.slots >= 0).repeat_interleave(height // h, 1).repeat_interleave(width // w, 2)
    return cells[..., None] if x.channels_last else cells[:, None]


def plain(x: Any) -> Any:
    """Return a map as a plain tensor, other values as they are."""
    return x.as_subclass(Tensor) if isinstance(x, MaskedMap) else x


def cleaned(x: Tensor, hidden: float = 0.0) -> Tensor:
    """Return the map as a plain tensor with a value in its hidden cells."""
    if not isinstance(x, MaskedMap):
        return x
    return plain(x) if x.clean and hidden == 0 else torch.where(visible(x), plain(x), hidden)


def pack(x: MaskedMap) -> Tensor:
    """(N, C, H, W) -> (N, C, V), the visible cells of every image."""
    visible(x)  # raises UserError if the map does not divide into patches
    packed = x.grid.pack(plain(x) if x.channels_last else plain(x).permute(0, 2, 3, 1))
    return packed.flatten(1, 3).transpose(1, 2)


def unpack(packed: Tensor, source: MaskedMap) -> MaskedMap:
    """(N, C, V) -> a clean map in the layout of another one."""
    n, channels, count = packed.shape
    patches = source.grid.ids.shape[1]
    side = math.isqrt(count // patches)
    cells = packed.transpose(1, 2).reshape(n, patches, side, side, channels)
    dense = source.grid.unpack(cells)
    return like(dense if source.channels_last else dense.permute(0, 3, 1, 2), source, clean=True)


def _on_cells(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operation that takes each cell on its own."""
    maps = [x for x in (*args, *kwargs.values()) if isinstance(x, MaskedMap)]
    keeps_zero = ON_CELLS[func]
    if func in SUMS:  # of maps alone
        keeps_zero = len(maps) == len(args)
    elif func in QUOTIENTS:  # 0 / 0 is NaN
        keeps_zero = isinstance(args[0], MaskedMap) and len(maps) == 1
    elif func is F.hardtanh:
        low, high = (*args[1:3], *HARDTANH[len(args) - 1 :])[:2]
        keeps_zero = kwargs.get("min_val", low) <= 0 <= kwargs.get("max_val", high)
    clean, first = keeps_zero and all(x.clean for x in maps), plain(maps[0])
    version = 0 if first.is_inference() else first._version
    result = func(*map(plain, args), **{name: plain(x) for name, x in kwargs.items()})
    changed = first.is_inference() or first._version != version
    if not (changed or func in ALIASES or result.data_ptr() == first.data_ptr()):
        return like(result, maps[0], clean)
    maps[0].clean &= clean
    return view(result, maps[0])


def _conv2d(func: Any, x: MaskedMap, weight: Tensor, *args: Any, **kwargs: Any) -> MaskedMap:
    single = weight.shape[-2:] == (1, 1)
    return like(func(plain(x) if single else cleaned(x), weight, *args, **kwargs), x)


def _batch_norm(
    func: Any, x: MaskedMap, running_mean: Any, running_var: Any, weight: Any = None,
    bias: Any = None, training: bool = False, *args: Any, **kwargs: Any,
) -> MaskedMap:  # fmt: skip
    parts = (running_mean, running_var, weight, bias, training, *args)
    if not training:
        return like(func(plain(x), *parts, **kwargs), x)
    return unpack(func(pack(x), *parts, **kwargs), x)


def _per_image_norm(func: Any, x: MaskedMap, *args: Any, **kwargs: Any) -> MaskedMap:
    return unpack(func(pack(x), *args, **kwargs), x)


def _layer_norm(
    func: Any, x: MaskedMap, normalized_shape: Any, *args: Any, **kwargs: Any
) -> MaskedMap:
    if not x.channels_last or len(normalized_shape) != 1:
        raise UserError("no exact masked form of layer_norm over positions")
    return like(func(plain(x), normalized_shape, *args, **kwargs), x)


def _linear(func: Any, x: MaskedMap, *args: Any, **kwargs: Any) -> MaskedMap:
    if not x.channels_last:
        raise UserError("no exact masked form of linear over positions")
    return like(func(plain(x), *args, **kwargs), x)


def _max_pool2d(func: Any, x: MaskedMap, *args: Any, **kwargs: Any) -> MaskedMap:
    pooled = like(func(cleaned(x, -math.inf), *args, **kwargs), x)
    return like(cleaned(pooled), x, clean=True)  # no infinity stays, or gradients would be NaN


def _avg_pool2d(
    func: Any, x: MaskedMap, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> MaskedMap:  # fmt: skip
    shape = (kernel_size, stride, padding, ceil_mode, count_include_pad)
    pooled = func(cleaned(x), *shape, divisor_override)
    if not (count_include_pad or divisor_override):
        share = func(visible(x).to(pooled.dtype), *shape)  # of the window that is visible
        pooled = pooled / torch.where(share > 0, share, 1.0)
    return like(pooled, x)


def _adaptive_avg_pool2d(func: Any, x: MaskedMap, output_size: Any) -> Tensor:
    if output_size not in (1, (1, 1), [1, 1]) or x.channels_last:
        raise UserError(f"no exact masked form of adaptive_avg_pool2d to {output_size}")
    return pack(x).mean(2)[:, :, None, None]


def _mean(func: Any, x: MaskedMap, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    dims = {d % 4 for d in ((dim,) if isinstance(dim, int) else dim or ())}
    if dims == {3 if x.channels_last else 1}:  # over channels
        return like(func(plain(x), dim, keepdim, **kwargs), x) if keepdim else _no_mean(dim)
    if dims != ({1, 2} if x.channels_last else {2, 3}):
        _no_mean(dim)
    mean = pack(x).mean(2, **kwargs)
    if not keepdim:
        return mean
    return mean[:, None, None] if x.channels_last else mean[:, :, None, None]


def _no_mean(dim: Any) -> Any:
    raise UserError(f"no exact masked form of a mean over dim {dim}")


def _cat(func: Any, tensors: Any, dim: int = 0) -> MaskedMap:
    maps = [x for x in tensors if isinstance(x, MaskedMap)]
    if len(maps) != len(tensors) or dim % 4 != (3 if maps[0].channels_last else 1):
        raise UserError(f"no exact masked form of cat over dim {dim}")
    return like(func([plain(x) for x in tensors], dim), maps[0], all(x.clean for x in maps))


def _split(
    func: Any, x: MaskedMap, size: Any = None, dim: int = 0, **names: Any
) -> tuple[MaskedMap, ...]:
    (size,) = names.values() or (size,)  # split_size, split_size_or_sections or chunks
    if dim % 4 != (3 if x.channels_last else 1):
        raise UserError(f"no exact masked form of {_name(func)} over dim {dim}")
    return tuple(view(part, x) for part in func(plain(x), size, dim))


def _getitem(func: Any, x: MaskedMap, index: Any) -> MaskedMap:
    whole = slice(None)
    others = index[:1] + index[2:] if isinstance(index, tuple) else (index,)
    if x.channels_last or any(part is not ... and part != whole for part in others):
        raise UserError(f"no exact masked form of the index {index}")
    return view(func(plain(x), index), x)


def _expand_as(func: Any, x: Tensor, other: Tensor) -> Tensor:
    if isinstance(x, MaskedMap):
        raise UserError("no exact masked form of expand_as")
    return func(x, plain(other))


def _permute(func: Any, x: MaskedMap, *dims: Any) -> MaskedMap:
    order = dims[0] if isinstance(dims[0], tuple | list) else dims
    kinds = {(0, 2, 3, 1): (False, True), (0, 3, 1, 2): (True, False), (0, 1, 2, 3): None}
    before, after = kinds.get(tuple(d % 4 for d in order)) or (x.channels_last,) * 2
    if before != x.channels_last:
        raise UserError(f"no exact masked form of permute to {tuple(order)}")
    return view(func(plain(x), order), x, after)


# Operations on single cells, and if they keep zeros.
ON_CELLS: dict[Callable, bool] = dict.fromkeys(
    (
        *(F.relu, F.relu6, F.hardtanh, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, F.mish),
        *(F.dropout, torch.relu, torch.relu_, torch.tanh, Tensor.relu, Tensor.relu_, Tensor.tanh),
        *(Tensor.mul, Tensor.mul_, Tensor.div, Tensor.div_, torch.mul, torch.div),
        *(Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.__truediv__),
        *(Tensor.clone, Tensor.detach, Tensor.contiguous, Tensor.to, Tensor.float, Tensor.double),
        *(Tensor.half, Tensor.bfloat16, Tensor.type_as, Tensor.neg),
    ),
    True,
)
ALIASES = {Tensor.detach, Tensor.contiguous, Tensor.to, Tensor.float, Tensor.double, Tensor.half}
ALIASES |= {Tensor.bfloat16, Tensor.type_as}  # may share memory
QUOTIENTS = {Tensor.div, Tensor.div_, torch.div, Tensor.__truediv__}
HARDTANH = (-1.0, 1.0)  # default bounds
SUMS = {torch.add, torch.sub, Tensor.add, Tensor.add_, Tensor.sub, Tensor.sub_}
SUMS |= {Tensor.__add__, Tensor.__iadd__, Tensor.__radd__, Tensor.__sub__}
others = (torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, F.hardsigmoid, F.softplus)
ON_CELLS |= dict.fromkeys((*others, torch.exp, Tensor.exp, F.prelu, *SUMS), False)
# Facts about a tensor, and new tensors, which have no cells.
FACTS = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones),
    *(Tensor.element_size, Tensor.__hash__, Tensor.requires_grad_, Tensor.get_device),
}
# Operations that look at several cells.
MASKED: dict[Callable, Callable] = {
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.instance_norm: _per_image_norm,
    F.group_norm: _per_image_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    F.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    Tensor.mean: _mean,
    torch.mean: _mean,
    torch.cat: _cat,
    torch.split: _split,
    Tensor.split: _split,
    torch.chunk: _split,
    Tensor.chunk: _split,
    torch.permute: _permute,
    Tensor.permute: _permute,
    Tensor.__getitem__: _getitem,
    Tensor.expand_as: _expand_as,
}
