# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Stateless randomness: the numbers that identify a draw, e.g. (seed, epoch, id), seed it.

python -c "from data_loading import rng; print(rng.fold_in(0, 1))"
"""

import os
import random

import numpy as np
import torch
from torch import Tensor

from errors import UserError

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64, Steele et al. 2014
_WORD = (1 << 64) - 1


def fold_in(*numbers: int) -> int:
    """Hash integers to a 63-bit seed."""
    return _state(*numbers) >> 1


def _state(*numbers: int) -> int:
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * _FACTORS[0]) & _WORD
        state = ((state ^ (state >> 27)) * _FACTORS[1]) & _WORD
        state ^= state >> 31
    return state


def fold_in_each(words: np.ndarray, *numbers: int) -> np.ndarray:
    """(N,) integers of at least 0 -> (N,) uint64, `fold_in(*numbers, word)` of each of them."""
    state = np.uint64(_state(*numbers))
    x = words.astype(np.uint64) + state + np.uint64(_GOLDEN)  # wraps, as & _WORD does
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def scramble(x: Tensor) -> Tensor:
    """Apply the splitmix64 finaliser to int64 (products wrap; right shifts extend the sign)."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def mask_noise(seed: int, epoch: int, ids: Tensor, count: int) -> Tensor:
    """(N,) int64 sample ids -> (N, count) int64 noise, a function of (seed, epoch, id) alone.

    Works on every device without a host sync. A sample's mask does not depend on the number of
    ranks or workers, or on its batch.
    """
    rows = scramble(ids[:, None] * _signed(_GOLDEN) + fold_in(seed, epoch))
    return scramble(rows + torch.arange(1, count + 1, device=ids.device) * _signed(_GOLDEN))


def seed_all(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from the numbers that identify a draw."""
    torch.manual_seed(fold_in(*numbers))
    seed_cpu(*numbers)


def seed_cpu(*numbers: int) -> None:
    """Seed Python, NumPy and torch's CPU generator, as `seed_all` does, in 10 microseconds.

    `torch.manual_seed` looks at all devices, which takes more than a decoder of small images. Each
    generator gets a seed of its own: NumPy and torch use the same kind, so that a shared seed gives
    both the same coin.
    """
    seed = fold_in(*numbers)
    torch.default_generator.manual_seed(seed)
    np.random.seed(fold_in(seed, 1) & 0xFFFFFFFF)
    random.seed(fold_in(seed, 2))


CUBLAS = (":4096:8", ":16:8")  # workspaces with which cuBLAS is deterministic


def make_deterministic(asked: bool, device: torch.device) -> None:
    """If asked for, make torch bit-for-bit reproducible from here on, or let it raise.

    Call it before the first matrix product on a GPU: cuBLAS reads its workspace once.
    """
    if not asked:
        return
    if device.type == "mps":
        raise UserError("--deterministic: torch does not support it on mps; use --device cpu")
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS[0])
    if device.type == "cuda" and workspace not in CUBLAS:
        raise UserError(
            f"--deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace}, with which cuBLAS is not "
            f"deterministic; unset it, or set it to {' or '.join(CUBLAS)}"
        )
    torch.backends.cudnn.benchmark = False  # timings, and so its choices, differ between runs
    torch.use_deterministic_algorithms(True)
