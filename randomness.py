# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Randomness as a function of numbers and not a state: what identifies a draw seeds it.

python -c "import randomness; print(randomness.mix(0, 1))"
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64, Steele et al. 2014
_WORD = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Hash whole numbers to 63 bits: the seed of whatever `numbers` identify."""
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * _FACTORS[0]) & _WORD
        state = ((state ^ (state >> 27)) * _FACTORS[1]) & _WORD
        state ^= state >> 31
    return state >> 1


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _scramble(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 tensors, whose products wrap and whose shifts keep sign."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def hash_noise(seed: int, epoch: int, ids: Tensor, count: int) -> Tensor:
    """(N,) int64 sample ids -> (N, count) int64 noise that depends on nothing else.

    Works on every device without a host sync, so a sample's mask is the same whatever the
    number of ranks, workers or the batch it falls into.
    """
    rows = _scramble(ids[:, None] * _signed(_GOLDEN) + mix(seed, epoch))
    return _scramble(rows + torch.arange(1, count + 1, device=ids.device) * _signed(_GOLDEN))


def seed_all(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from the numbers that identify a draw."""
    import numpy as np

    seed = mix(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
