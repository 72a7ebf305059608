# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Operations that the kernels and layers share: linear layers, GRN, packing of visible patches.

python -c "from models.kernels import ops; help(ops.linear)"
"""

from collections.abc import Callable, Sequence
from functools import reduce
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from models.kernels import autotune

CACHE = 2**21  # elements, 8 MiB in float32: the fastest of 2 to 16 MiB on a CPU with 32 MiB


def images_at_once(x: Tensor, elements: int) -> int:
    """Number of images to process together: on a CPU as many as its cache holds, otherwise all.

    elements: of all tensors that one image needs at the same time.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or exporting():
        return x.shape[0]
    return max(1, min(len(x), CACHE // max(elements, 1)))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the parts of a batch."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def total(parts: Sequence[Tensor | None], wide: torch.dtype) -> Tensor | None:
    """Sum of the parts' gradients, if wanted; in bf16 a sum over many would stagnate."""
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    return reduce(torch.add, (t.to(wide) for t in parts))


# Private names of torch 2.6 to 2.14, for which there are no public ones. Without them training
# works as before; only transforms of functions and many gradients at once raise torch's errors.
_functorch = getattr(torch._C, "_functorch", None)
_innermost_transform = getattr(_functorch, "peek_interpreter_stack", lambda: None)
_is_batched = getattr(_functorch, "is_legacy_batchedtensor", lambda grad: False)
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6


def exporting() -> bool:
    """True while torch.jit.trace or torch.export records a graph: it may hold only torch's ops."""
    return torch.jit.is_tracing() or _is_exporting()


def plain_only(x: Any) -> bool:
    """True where only torch's own operations work: exported graphs and transforms of functions.

    torch.fx passes proxies instead of tensors; torch.func's transforms (vmap, grad, jvp ...) and
    forward-mode AD need rules that our autograd functions lack. No work but four look-ups.
    """
    if exporting():
        return True
    if torch.compiler.is_compiling():  # it has rules for them
        return False
    in_forward_ad = getattr(forward_ad, "_current_level", -1) >= 0
    return _innermost_transform() is not None or not isinstance(x, Tensor) or in_forward_ad


def plain_backward(grad: Tensor) -> bool:
    """True if a backward pass must be made of torch's own operations.

    It is for a second derivative, or for many gradients at once: `is_grads_batched=True`.
    """
    if torch.is_grad_enabled() or plain_only(grad):
        return True
    return not torch.compiler.is_compiling() and _is_batched(grad)


def triton_kernels() -> ModuleType:
    """The module of our Triton kernels, imported at the first use: Triton is optional and slow."""
    from models.kernels import triton_kernels

    return triton_kernels


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Cast tensors as autocast casts the inputs of a convolution; float64 stays float64."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    half = torch.get_autocast_dtype(kind)
    return [x if x.dtype == torch.float64 else x.to(half) for x in tensors]


def plain_gradients(function: Callable, inputs: tuple, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a function of torch's own operations, None for inputs that need none.

    Unlike those of our backward passes they can be differentiated again and transformed.
    """
    again = torch.is_grad_enabled()
    wanted = [torch.is_tensor(x) and x.requires_grad for x in inputs]
    with torch.enable_grad():
        # Views: autograd would also follow x itself back to the layers that made it.
        leaves = [x.view_as(x) if yes else x for x, yes in zip(inputs, wanted, strict=True)]
        y = function(*leaves)
    asked = [x for x, yes in zip(leaves, wanted, strict=True) if yes]
    found = iter(torch.autograd.grad(y, asked, grad, create_graph=again))
    return tuple(next(found) if yes else None for yes in wanted)


# --- linear layers -------------------------------------------------------------------------


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in the fastest implementation, forward and backward."""
    if plain_only(x) or bias is None or not has_onednn(x):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return _Affine.apply(x, weight, bias)


class _Affine(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = linear(x, weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # a view could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if plain_backward(dy):
            return plain_gradients(F.linear, (x, weight, bias), dy)
        dx = linear(dy, weight.mT) if ctx.needs_input_grad[0] else None
        dy = dy.flatten(0, -2)
        dweight = weight_grad(dy, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.mT + bias`: x (N, L, C) with weight (N, D, C), or (..., C) with (D, C).

    The fastest implementation may have no gradient: see `affine`.
    """

    def sample() -> tuple[Tensor, Tensor]:  # one choice for all shapes: timing small ones is noise
        return x.new_ones(1024, 384), x.new_ones(1536, 384)

    if torch.compiler.is_compiling() and has_onednn(x):
        return torch.ops.convnextv2.linear(x, weight, bias)
    if not has_onednn(x) or x.numel() == 0:  # oneDNN refuses empty inputs
        return _torch_linear(x, weight, bias)
    return LINEAR[autotune.autotuner.choose("linear", LINEAR, (), x, sample)](x, weight, bias)


def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient dy' x (..., D, C) of a linear layer's weight: dy (..., L, D), x (..., L, C)."""
    wide = dy.shape[-1] > x.shape[-1]
    if wide and has_onednn(x) and not torch.compiler.is_compiling() and dy.shape[-2] >= 512:
        # oneDNN is faster with the shorter side first, by more than a copy of the result takes.
        return linear(x.mT, dy.mT).mT.contiguous()
    return linear(dy.mT, x.mT)


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return x @ weight.mT if bias is None else torch.baddbmm(bias, x, weight.mT)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim == 2:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    pairs = zip(x.split(1), weight.unbind(), strict=True)
    return join([_onednn_linear(image, own, bias) for image, own in pairs])


# In float32 torch calls MKL, which on AMD's Zen 5 reaches half of oneDNN's rate.
LINEAR = {"torch": _torch_linear, "onednn": _onednn_linear}
_ONEDNN = torch.backends.mkldnn.is_available()


def has_onednn(x: Tensor) -> bool:
    """True if oneDNN has a linear layer for such tensors."""
    return _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


# torch.compile would use MKL: a custom operation keeps the choice.
torch.library.custom_op(
    "convnextv2::linear",
    linear,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
).register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[-2]))


# --- global response normalization ---------------------------------------------------------


@torch.fx.wrap  # a graph of torch.fx calls it: the axes of a proxy are not known
def grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """GRN over each image's own positions: x (N, ..., C), gamma and beta (C).

    Sums are in float32 or better. No shape is read: an exported graph has no fixed one.
    """
    scale = 1 + gamma * over_mean(safe_sqrt(sum_of_squares(x)), eps)[0]  # (N, C)
    for _ in range(x.ndim - 2):
        scale = scale.unsqueeze(1)
    if exporting():  # ONNX's addcmul takes no half precision
        return x * scale.to(x.dtype) + beta
    return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))


def sum_of_squares(x: Tensor) -> Tensor:
    """(N, ..., C) -> (N, C) over all positions, in float32 or better.

    Half precision would overflow or stagnate. torch's norm makes no float32 copy of x, but on a
    CPU it is ten times slower than square and sum.
    """
    positions = tuple(range(1, x.ndim - 1))
    if x.device.type != "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        return torch.linalg.vector_norm(x, dim=positions, dtype=torch.float32).square()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # promote_types is traced
    return x.to(wide).square().sum(positions)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    positive = x > 0
    return torch.where(positive, x, 1.0).sqrt() * positive


def over_mean(norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norms (N, C) -> each divided by the mean of its image, and that mean (N, 1)."""
    mean = norm.mean(-1, keepdim=True) + eps
    return norm / mean, mean


# --- packing of visible patches --------------------------------------------------------------


def pack(dense: Tensor, ids: Tensor, h: int, w: int) -> Tensor:
    """Gather the visible patches: (N, h*p, w*p, C), ids (N, V) -> (N, V, p, p, C)."""
    move = _move if plain_only(dense) else _Move.apply
    return move(dense, ids, h, w, True)


def unpack(packed: Tensor, ids: Tensor, h: int, w: int) -> Tensor:
    """Scatter packed patches into zeros: (N, V, p, p, C), ids (N, V) -> (N, h*p, w*p, C)."""
    move = _move if plain_only(packed) else _Move.apply
    return move(packed, ids, h, w, False)


def _move(x: Tensor, ids: Tensor, h: int, w: int, packing: bool) -> Tensor:
    """`pack` or `unpack` by torch's own operations."""
    image = torch.arange(ids.shape[0], device=ids.device)[:, None]
    places = image, torch.div(ids, w, rounding_mode="floor"), ids % w
    if packing:
        return _cells(x.contiguous(), h, w)[places]
    n, _, p, _, dim = x.shape
    if plain_only(x):  # vmap cannot write batched patches into a map that is not
        cells = x.new_zeros(n, h, w, p, p, dim).index_put(places, x)
        return cells.transpose(2, 3).reshape(n, h * p, w * p, dim)
    dense = x.new_zeros(n, h * p, w * p, dim)
    _cells(dense, h, w)[places] = x
    return dense


class _Move(Function):
    """`_move` whose gradient is the opposite move.

    Autograd's own gradient would add up where no two patches overlap.
    """

    @staticmethod
    def forward(x: Tensor, ids: Tensor, h: int, w: int, packing: bool) -> Tensor:
        return _move(x, ids, h, w, packing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ids, *ctx.size, ctx.packing = inputs
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        opposite = unpack if ctx.packing else pack
        return opposite(grad, *ctx.saved_tensors, *ctx.size), None, None, None, None


def _cells(dense: Tensor, h: int, w: int) -> Tensor:
    """(N, h*p, w*p, C) -> a view (N, h, w, p, p, C)"""
    n, height, width, dim = dense.shape
    return dense.view(n, h, height // h, w, width // w, dim).transpose(2, 3)
