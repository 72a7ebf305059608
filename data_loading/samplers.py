# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The order of samples: a function of seed and epoch, never a stored list.

python -c "from data_loading import samplers; print(*samplers.TrainSampler(9, 0, 0, 2))"
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from data_loading.rng import fold_in, scramble

CHUNK = 4096  # keys that are computed at once: fewer take longer each, more the first of them


def keys_at(
    positions: range, length: int, seed: int, epoch: int, shuffle: bool = True
) -> Iterator[tuple[int, int]]:
    """Keys (epoch, index) at some positions of an epoch's order, in little memory at any length."""
    for first in range(0, len(positions), CHUNK):
        part = positions[first : first + CHUNK]
        indices = torch.arange(part.start, part.stop, part.step)
        if shuffle:
            indices = permute(indices, length, seed, epoch)
        yield from ((epoch, index) for index in indices.tolist())


class TrainSampler(Sampler):
    """Keys (epoch, index) of one rank: every world_size-th position of the epoch's order.

    All ranks' b-th batches together are one block of that order, whatever the number of ranks.
    """

    def __init__(self, length: int, seed: int, rank: int, world_size: int, shuffle: bool = True):
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch, self.seen = 0, 0

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Choose the order; skip its first `seen` images, which all ranks used before a resume."""
        self.epoch, self.seen = epoch, seen

    def __len__(self) -> int:
        return (self.length - self.seen) // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        end = self.seen + len(self) * self.world_size
        mine = range(self.seen, end)[self.rank :: self.world_size]
        return keys_at(mine, self.length, self.seed, self.epoch, self.shuffle)


class EvalSampler(Sampler):
    """Keys (0, index): every image once over all ranks, no padding; all on rank 0 if not shared."""

    def __init__(self, length: int, rank: int, world_size: int, dist_eval: bool = True):
        alone = range(length) if rank == 0 else range(0)
        self.indices = range(rank, length, world_size) if dist_eval else alone

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


ROUNDS = 16  # 12 give some orders of seven things more often than others, 16 do not


def permute(positions: Tensor, length: int, *numbers: int) -> Tensor:
    """(N,) int64 positions -> (N,) what is there in the random order of [0, length) of `numbers`.

    Nothing is kept: any part of any order can be had at once, up to a length of 2^62. This is the
    generalized Feistel cipher of Black and Rogaway (2002, eprint.iacr.org/2001/012): it permutes
    the cells of the least rectangle that has `length` and is about square; what lands on a cell
    too many is permuted again until it does not.
    """
    rows = math.isqrt(max(length, 1) - 1) + 1
    rows += rows % 2  # odd sides would give even permutations alone
    sides = rows, -(-length // rows)
    keys = [fold_in(*numbers, number) for number in range(ROUNDS)]
    found = _permute_cells(positions, sides, keys)
    while len(outside := (found >= length).nonzero().flatten()):
        found[outside] = _permute_cells(found[outside], sides, keys)
    return found


def _permute_cells(cells: Tensor, sides: tuple[int, int], keys: list[int]) -> Tensor:
    """Rows and columns move in turn, each by a hash of the other."""
    place = [cells // sides[1], cells % sides[1]]
    for number, key in enumerate(keys):
        this, side = number % 2, sides[number % 2]
        step = (scramble(place[1 - this] + key) & 0xFFFFFFFF) * side >> 32  # in [0, side)
        moved = place[this] + step
        place[this] = moved - side * (moved >= side)
    return place[0] * sides[1] + place[1]
