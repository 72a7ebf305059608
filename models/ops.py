# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Matrix products and the block's MLP with its gradients, each in the form that is fastest here.

python -c "import torch; from models.ops import product; print(product(torch.eye(2), torch.eye(2)))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from models import tune

# --- how a computation is split, replaced and differentiated twice ------------------------


def images_at_once(x: Tensor, elements: int) -> int:
    """A CPU works on as many images as its cache holds: no image needs another beside it.

    elements: of an image, where it is widest. 4 MiB at once; on a GPU, and for the compiler, all.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or exporting():
        return len(x)
    return max(1, min(len(x), 2**20 // elements))


def join(parts: Sequence[Tensor]) -> Tensor:
    """The images of all parts, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6


def exporting() -> bool:
    """Whether a graph for elsewhere is drawn, in which only torch's own operations may stand."""
    return torch.jit.is_tracing() or _is_exporting()


def plain_gradients(function: Callable, inputs: tuple, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `function` in each of `inputs`, None where none is asked for.

    They can be differentiated again, which those of our own backward passes cannot.
    """
    asked = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), asked, grad, create_graph=True))
    return tuple(next(found) if any(x is y for y in asked) else None for x in inputs)


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
    if y.shape[-1] > x.shape[-1] and y.shape[-2] >= 512:
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
    pairs = zip(x.unbind(), weight.unbind(), strict=True)
    return torch.stack([_onednn_product(image, own, bias) for image, own in pairs])


# torch hands float32 products to MKL, which on AMD's Zen 5 reaches half of oneDNN's rate.
PRODUCT = {"torch": _torch_product, "onednn": _onednn_product}


_ONEDNN = torch.backends.mkldnn.is_available()


def has_onednn(x: Tensor) -> bool:
    """Whether products of such tensors have a second form."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32
    return fits and _ONEDNN


def _fastest_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    def sample() -> tuple[Tensor, Tensor]:  # one answer for all shapes: small ones are noise
        return torch.ones(1024, 384), torch.ones(1536, 384)

    return PRODUCT[tune.choices.pick("product", PRODUCT, (), x, sample)](x, weight, bias)


# The compiler, which knows MKL alone, takes it as it is.
_product_op = torch.library.custom_op(
    "convnextv2::product",
    _fastest_product,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
_product_op.register_fake(lambda x, w, bias: x.new_empty(*x.shape[:-1], w.shape[-2]))


# --- the block's MLP ---------------------------------------------------------------------
#
# x (N, L, C), w1 (K, C), b1 (K), w2 (C, K), b2 (C), gamma (K), beta (K) -> y (N, L, C). With
# h = x w1' + b1, a = gelu(h), G (N, K) the length of a over an image's positions and
# s = 1 + gamma G / mean(G):  y = (a s) w2' + (b2 + w2 beta). Where an image has more positions
# than the layer has channels, s goes into the weights of the image, else into a.


def vector_length(x: Tensor) -> Tensor:
    """(N, L, C) -> (N, C), the Euclidean length over L, in float32 or better.

    Half precision would overflow or stagnate in the sum. Where the length is 0 so is its
    gradient; that of a plain square root is infinite. On a CPU ten times faster than torch's norm.
    """
    return _root(_energy(x))


def relative_length(length: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(N, K) lengths -> each over the image's mean, and that mean (N, 1)."""
    mean = length.mean(-1, keepdim=True) + eps
    return length / mean, mean


def plain_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """y in torch's own differentiable operations."""
    a = F.gelu(F.linear(x, w1, b1.to(x.dtype)))
    return F.linear(grn(a, gamma, beta, eps), w2, b2.to(x.dtype))


def grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Global response normalisation of (N, L, C), gamma and beta (C); sums in float32 or better."""
    scale = 1 + gamma * relative_length(vector_length(x), eps)[0]
    return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype)[:, None])


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, L, C), and what the gradients need: h (N, L, K) and G (N, K)."""
    h = product(x, w1, b1.to(x.dtype))
    bias = (b2 + beta.to(w2.dtype) @ w2.mT).to(x.dtype)
    outs, lengths = [], []
    for part in h.split(images_at_once(h, h[0].numel())):
        a, energy = tune.run("gelu", GELU, _size(part), part)
        lengths.append(_root(energy))
        scale = (1 + gamma * relative_length(lengths[-1], eps)[0]).to(a.dtype)[:, None]
        if per_image_weights(a, w2):
            outs.append(product(a, w2 * scale, bias))
        else:
            outs.append(product(a.mul_(scale), w2, bias))
    return join(outs), h, join(lengths)


def per_image_weights(h: Tensor, w2: Tensor) -> bool:
    """Whether scaling weights (C, K) for every image is less work than scaling a (N, L, K)."""
    return h.shape[1] > w2.shape[0]


def mlp_gradients(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    h: Tensor,
    length: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Of `mlp` in x, w1, b1, w2, b2, gamma and beta."""
    images = images_at_once(h, h[0].numel())
    parts = []
    for dy_, x_, h_, length_ in zip(*(t.split(images) for t in (dy, x, h, length)), strict=True):
        key = _size(h_)
        dh, *rest = tune.run("mlp gradients", TAIL, key, h_, dy_, w2, gamma, length_, eps)
        parts.append((product(dh, w1.mT), gram(dh.flatten(0, 1), x_.flatten(0, 1)), *rest))
    dxs, *sums = zip(*parts, strict=True)
    dw1, db1, dw2, dgamma = (reduce(torch.add, own) for own in sums)
    db2 = dy.sum((0, 1), dtype=length.dtype)
    dw2 = dw2.addr(db2.to(dw2.dtype), beta.to(dw2.dtype))
    return join(dxs), dw1, db1, dw2, db2, dgamma, db2 @ w2.to(db2.dtype)


def _torch_tail(
    h: Tensor, dy: Tensor, w2: Tensor, gamma: Tensor, length: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From dy back to h: dh (N, L, K), db1 (K), dw2 without beta's share, dgamma (K)."""
    a = F.gelu(h)
    scale = (1 + gamma * relative_length(length, eps)[0]).to(a.dtype)[:, None]
    if per_image_weights(h, w2):
        each = gram(dy, a)  # (N, C, K)
        dw2 = (each * scale).sum(0)
        dscale = (each * w2).sum(1)
        da = product(dy, (w2 * scale).mT)
    else:
        da = product(dy, w2.mT)
        dscale = (da * a).sum(1)
        dw2 = gram(dy.flatten(0, 1), (a * scale).flatten(0, 1))
        da = da * scale
    direction, dgamma = _through_length(dscale.to(length.dtype), gamma, length, eps)
    da.addcmul_(a, direction.to(a.dtype)[:, None])  # nothing above needs da itself again
    dh = torch.ops.aten.gelu_backward(da, h)
    return dh, dh.sum((0, 1), dtype=length.dtype), dw2, dgamma


def _triton_tail(
    h: Tensor, dy: Tensor, w2: Tensor, gamma: Tensor, length: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_torch_tail`, in two passes that recompute a on the way."""
    from models import kernels

    scale = 1 + gamma * relative_length(length, eps)[0]
    da = product(dy, w2.mT)
    dscale, scaled = kernels.scale_grad(da, h, scale)
    dw2 = gram(dy.flatten(0, 1), scaled.flatten(0, 1))
    direction, dgamma = _through_length(dscale, gamma, length, eps)
    dh, db1 = kernels.gelu_grad(da, h, scale, direction)
    return dh, db1, dw2, dgamma


def _through_length(
    dscale: Tensor, gamma: Tensor, length: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """ds (N, K) -> what a is multiplied by in da (N, K), and dgamma (K)."""
    relative, mean = relative_length(length, eps)
    drelative = dscale * gamma
    spread = (drelative * length).sum(-1, keepdim=True) / (mean**2 * length.shape[-1])
    dlength = drelative / mean - spread
    alive = length > 0
    direction = torch.where(alive, dlength / torch.where(alive, length, 1.0), 0.0)
    return direction, (dscale * relative).sum(0)


def _energy(a: Tensor) -> Tensor:
    return a.to(torch.promote_types(a.dtype, torch.float32)).square().sum(1)


def _root(energy: Tensor) -> Tensor:
    alive = energy > 0
    return torch.where(alive, energy, 1.0).sqrt() * alive


def _torch_gelu(h: Tensor) -> tuple[Tensor, Tensor]:
    a = F.gelu(h)
    return a, _energy(a)


def _triton_gelu(h: Tensor) -> tuple[Tensor, Tensor]:
    from models import kernels

    return kernels.gelu_energy(h)


def _size(h: Tensor) -> tuple[int, int, int]:
    """Of a wide tensor; images in powers of two, since an epoch's last batch may be smaller."""
    return 1 << (len(h) - 1).bit_length(), *h.shape[1:]


GELU = {"torch": _torch_gelu, "triton": _triton_gelu}
TAIL = {"torch": _torch_tail, "triton": _triton_tail}
