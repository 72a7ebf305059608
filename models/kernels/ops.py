# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Matrix products in the form that is fastest here, GRN, and what all own backward passes share.

python -c "from models.kernels import ops; print(ops.product.__doc__)"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import autotune

# --- how a computation is split, replaced and differentiated twice ------------------------


CACHE = 2**21  # elements, 8 MiB in float32: the fastest of 2 to 16 MiB on a processor with 32


def images_at_once(x: Tensor, elements: int) -> int:
    """A CPU works on as many images as its cache holds: no image needs another beside it.

    elements: of all that lives at once for an image. On a GPU, and for the compiler, all images.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or exporting():
        return x.shape[0]  # which an exported graph may leave open, and len() would not
    return max(1, min(len(x), CACHE // max(elements, 1)))


def join(parts: Sequence[Tensor]) -> Tensor:
    """The images of all parts, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6


def exporting() -> bool:
    """Whether a graph for elsewhere is drawn, in which only torch's own operations may stand."""
    return torch.jit.is_tracing() or _is_exporting()


def can_fuse(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether our own function may stand for the module: not if someone changed or watches it.

    A graph for elsewhere takes the modules too.
    """
    if type(module) is not kind or getattr(module, "bias", True) is None or exporting():
        return False
    own = (getattr(module, name) for name in _HOOKS)
    of_all = (getattr(nn.modules.module, f"_global{name}") for name in _HOOKS)
    return not any(own) and not any(of_all) and "forward" not in vars(module)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def no_view(x: Tensor) -> Tensor:
    """x as a result that may be changed in place, which views made in a Function may not."""
    return torch.ops.aten._unsafe_view(x, x.shape)


def plain_gradients(function: Callable, inputs: tuple, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `function` in each of `inputs`, None where none is asked for.

    They can be differentiated again, which those of our own backward passes cannot.
    """
    wanted = [torch.is_tensor(x) and x.requires_grad for x in inputs]
    # Asked for x itself, torch would go on into what x was made of, perhaps from the same weights.
    ends = [x.view_as(x) if yes else x for x, yes in zip(inputs, wanted, strict=True)]
    asked = [x for x, yes in zip(ends, wanted, strict=True) if yes]
    found = iter(torch.autograd.grad(function(*ends), asked, grad, create_graph=True))
    return tuple(next(found) if yes else None for yes in wanted)


# --- products ----------------------------------------------------------------------------


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.mT + bias`: x (N, L, C) with weight (N, D, C), or (..., C) with (D, C).

    Its fastest form may have no gradient: use `layers.affine` for one that has.
    """
    if not has_onednn(x):
        return _torch_product(x, weight, bias)
    if torch.compiler.is_compiling():
        return torch.ops.convnextv2.product(x, weight, bias)
    return _fastest_product(x, weight, bias)


def gram(y: Tensor, x: Tensor) -> Tensor:
    """y (..., L, D), x (..., L, C) -> y' x (..., D, C): the gradient of a weight."""
    wide = y.shape[-1] > x.shape[-1]
    if wide and has_onednn(x) and not torch.compiler.is_compiling() and y.shape[-2] >= 512:
        # oneDNN is faster with the shorter side first, by more than a copy of the result takes.
        return product(x.mT, y.mT).mT.contiguous()
    return product(y.mT, x.mT)


def _torch_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return x @ weight.mT if bias is None else torch.baddbmm(bias, x, weight.mT)


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim == 2:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    pairs = zip(x.split(1), weight.unbind(), strict=True)
    return join([_onednn_product(image, own, bias) for image, own in pairs])


# torch hands float32 products to MKL, which on AMD's Zen 5 reaches half of oneDNN's rate.
PRODUCT = {"torch": _torch_product, "onednn": _onednn_product}


_ONEDNN = torch.backends.mkldnn.is_available()


def has_onednn(x: Tensor) -> bool:
    """Whether products of such tensors have a second form."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32
    return fits and _ONEDNN


def _fastest_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    def sample() -> tuple[Tensor, Tensor]:  # one answer for all shapes: small ones are noise
        return x.new_ones(1024, 384), x.new_ones(1536, 384)

    if x.numel() == 0:  # oneDNN knows no empty products
        return _torch_product(x, weight, bias)
    return PRODUCT[autotune.choices.pick("product", PRODUCT, (), x, sample)](x, weight, bias)


# The compiler, which knows MKL alone, takes it as it is.
_product_op = torch.library.custom_op(
    "convnextv2::product",
    _fastest_product,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
_product_op.register_fake(lambda x, w, bias: x.new_empty(*x.shape[:-1], w.shape[-2]))


# --- global response normalisation ---------------------------------------------------------


def grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Of each image's own positions: x (N, ..., C), gamma and beta (C); sums in float32 or better.

    No shape is read, so that none stands in an exported graph.
    """
    scale = 1 + gamma * relative_length(root(energy(x)), eps)[0]  # (N, C)
    for _ in range(x.ndim - 2):
        scale = scale.unsqueeze(1)
    if exporting():  # ONNX's addcmul takes no half precision
        return x * scale.to(x.dtype) + beta
    return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))


def energy(x: Tensor) -> Tensor:
    """(N, ..., C) -> (N, C), the sum of squares over all between, in float32 or better.

    Half precision would overflow or stagnate. torch's norm widens no tensor, but on a CPU it is ten
    times slower than square and sum.
    """
    places = tuple(range(1, x.ndim - 1))
    if x.device.type != "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        return torch.linalg.vector_norm(x, dim=places, dtype=torch.float32).square()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # promote_types is traced
    return x.to(wide).square().sum(places)


def root(energy: Tensor) -> Tensor:
    """The square root, whose gradient is 0 at 0 and not infinite."""
    alive = energy > 0
    return torch.where(alive, energy, 1.0).sqrt() * alive


def relative_length(length: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(N, C) lengths -> each over the image's mean, and that mean (N, 1)."""
    mean = length.mean(-1, keepdim=True) + eps
    return length / mean, mean
