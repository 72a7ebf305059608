# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The order of samples: a function of seed and epoch, never a stored list.

python -c "from data_loading import samplers; print(*samplers.TrainSampler(9, 0, 0, 2))"
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from data_loading.rng import fold_in, scramble
from errors import UserError, plural

CHUNK = 4096  # keys computed at once: fewer cost more per key, more delay the first key
OFFSETS = 1 << 20  # few enough that place + offset is exact in float64


def keys_at(
    positions: range,
    length: int,
    seed: int,
    epoch: int,
    cumulative: Tensor | None = None,
    repeats: int = 1,
    passes: int = 1,
) -> Iterator[tuple[int, int]]:
    """Yield keys (epoch, index) at positions of an epoch's order, in constant memory.

    Each sample comes `repeats` times in a row, with an index of its own each time, as for `draw`.
    Positions from `repeats * length` on begin a further pass over all samples, in another order.
    cumulative: as for `draw`, None to take each sample once a pass. passes: of the whole epoch.
    """
    for first in range(0, len(positions), CHUNK):
        chunk = positions[first : first + CHUNK]
        places = torch.arange(chunk.start, chunk.stop, chunk.step)
        repeat, places = places % repeats, places // repeats
        number, places = places // length, places % length  # of the pass, and the place in it
        hashes = _hash_passes(number, seed, epoch)
        if cumulative is None:
            items = _permute(places, length, hashes)
        else:
            items = draw(places, cumulative, hashes)
        draws = (items // length * passes + number) * repeats + repeat
        indices = items % length + draws * length
        yield from ((epoch, index) for index in indices.tolist())


def _hash_passes(numbers: Tensor, seed: int, epoch: int) -> Tensor:
    """(N,) numbers of passes, from 0 -> (ROUNDS + 1, N) hashes of them, as of `_hash_rounds`."""
    passes, places = numbers.unique(return_inverse=True)
    seeds = [(seed, epoch, number) if number else (seed, epoch) for number in passes.tolist()]
    return torch.stack([_hash_rounds(*each) for each in seeds], 1)[:, places]


def cumulate(weights: Tensor) -> Tensor:
    """(N,) weights, one above 0 -> (N,) float64 running sum of their shares of N."""
    sums = weights.double().cumsum(0)
    return sums * (len(sums) / sums[-1])


def draw(positions: Tensor, cumulative: Tensor, hashes: Tensor) -> Tensor:
    """(N,) positions of a pass -> (N,) samples there, drawn by weight (systematic sampling).

    The shares of the samples fill [0, length). A position draws the sample whose share holds the
    item that `permute` gives it, plus an offset in (0, 1), random for the pass. So a sample is
    drawn as often as its share says, rounded down or up, and equal weights give the order of
    `permute`. cumulative: of `cumulate`. The n-th draw of a sample in a pass, from 0, has the
    length added n times, so that keys differ. hashes: (ROUNDS + 1, N), of the passes.
    """
    length, places = len(cumulative), _permute(positions, len(cumulative), hashes)
    offset = ((hashes[ROUNDS] % OFFSETS).double() + 0.5) / OFFSETS
    last = int(torch.searchsorted(cumulative, cumulative[-1:]))  # none after it has a weight
    items = torch.searchsorted(cumulative, places.double() + offset, right=True).clamp(max=last)
    before = torch.where(items > 0, cumulative[(items - 1).clamp(min=0)], 0.0)
    return items + (places - (before - offset).ceil().long()) * length


class TrainSampler(Sampler):
    """Keys (epoch, index) of one rank: every world_size-th position of the epoch's order.

    The b-th batches of all ranks together are one block of that order for any number of ranks.
    weights: (length,) to draw samples by them. samples: of an epoch, over all ranks; None: as many
    as the data has. repeats: times that a sample comes in a row; an epoch has as many samples as
    without.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int,
        world_size: int,
        weights: Tensor | None = None,
        samples: int | None = None,
        repeats: int = 1,
    ):
        self.length, self.seed = length, seed
        self.rank, self.world_size = rank, world_size
        self.samples, self.repeats = length if samples is None else samples, repeats
        self.passes = max(1, -(-self.samples // max(length * repeats, 1)))
        self.epoch, self.start, self.stop, self.skipped = 0, 0, self.samples, 0
        self.cumulative = None if weights is None else cumulate(weights)

    def set_epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> None:
        """Choose the order, and the part of it from `start`, after samples used before, to `stop`.

        stop: None for the end of the epoch.
        """
        self.epoch, self.start, self.skipped = epoch, start, 0
        self.stop = self.samples if stop is None else stop

    def skip(self, count: int) -> None:
        """Leave out the next `count` samples of each rank; the length stays as it is."""
        self.skipped += count * self.world_size

    def __len__(self) -> int:
        return (self.stop - self.start) // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        end = self.start + len(self) * self.world_size
        mine = range(self.start + self.skipped, end)[self.rank :: self.world_size]
        order = self.length, self.seed, self.epoch, self.cumulative, self.repeats, self.passes
        return keys_at(mine, *order)


def check_global_batch(sampler: TrainSampler, batch_size: int, grown: bool = False) -> None:
    """Raise UserError if an epoch is shorter than one batch of all ranks.

    grown: by --progressive_batch.
    """
    images, ranks = sampler.samples, plural(sampler.world_size, "process")
    needed, fits = batch_size * sampler.world_size, images // sampler.world_size
    if images >= needed:
        return
    got = plural(images, "training image")
    more = f"give --num_samples {needed} or more for longer epochs"
    if images != sampler.length:
        got, more = f"--num_samples {images}", f"raise it to {needed}"
    fix = f"use --batch_size {fits} or less" if fits else f"use at most {plural(images, 'process')}"
    fix = "pass --progressive_batch false, which keeps it smaller" if grown else fix
    raise UserError(
        f"{got}, but one global batch takes {needed} ({batch_size} x {ranks}); {fix}, or {more}"
    )


def balance(labels: Tensor) -> Tensor:
    """(N,) labels or (N, K) zeros and ones -> (N,) weights: 1 / images of the class.

    Of several classes the rarest decides; images without a label form a class of their own.
    """
    if labels.ndim == 1:
        return 1 / torch.bincount(labels)[labels].double()
    classes, counts = rarest_classes(labels)
    return 1 / counts[classes].double()


def rarest_classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) zeros and ones -> the rarest class of each image (N,), images of each class (K + 1,).

    Images without a label form a class of their own, the last.
    """
    present = torch.cat([labels.bool(), ~labels.bool().any(1, keepdim=True)], 1)
    counts = present.sum(0)
    return torch.where(present, 1 / counts.double(), 0.0).argmax(1), counts


class EvalSampler(Sampler):
    """Keys (0, index): every image once over all ranks, without padding.

    dist_eval: False gives all images to rank 0.
    """

    def __init__(self, length: int, rank: int, world_size: int, dist_eval: bool = True):
        alone = range(length) if rank == 0 else range(0)
        self.indices = range(rank, length, world_size) if dist_eval else alone

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


ROUNDS = 16  # with 12, some orders of seven items come up more often than others


def permute(positions: Tensor, length: int, *numbers: int) -> Tensor:
    """(N,) int64 positions -> (N,) items there in a random permutation of [0, length).

    numbers: the seed. Nothing is stored: any part of any order, up to a length of 2^62, takes O(N).
    This is the generalized Feistel cipher of Black and Rogaway (2002, eprint.iacr.org/2001/012). It
    permutes the cells of the smallest nearly square rectangle with at least `length` cells; a
    position that lands beyond `length` is permuted again.
    """
    return _permute(positions, length, _hash_rounds(*numbers)[:, None].expand(-1, len(positions)))


def _hash_rounds(*numbers: int) -> Tensor:
    """Hash the seed of an order: (ROUNDS + 1,) int64, for `_permute`, and the last for `draw`."""
    return torch.tensor([fold_in(*numbers, number) for number in range(ROUNDS + 1)])


def _permute(positions: Tensor, length: int, hashes: Tensor) -> Tensor:
    """`permute` with hashes (at least ROUNDS, N) of the seed of each position."""
    rows = math.isqrt(max(length, 1) - 1) + 1
    rows += rows % 2  # odd sides would give only even permutations
    sides = rows, -(-length // rows)
    found = _permute_cells(positions, sides, hashes)
    while len(outside := (found >= length).nonzero().flatten()):
        found[outside] = _permute_cells(found[outside], sides, hashes[:, outside])
    return found


def _permute_cells(cells: Tensor, sides: tuple[int, int], hashes: Tensor) -> Tensor:
    """Shift rows and columns in turn, each by a hash of the other."""
    place = [cells // sides[1], cells % sides[1]]
    for number, key in enumerate(hashes[:ROUNDS]):
        this, side = number % 2, sides[number % 2]
        step = (scramble(place[1 - this] + key) & 0xFFFFFFFF) * side >> 32  # in [0, side)
        moved = place[this] + step
        place[this] = moved - side * (moved >= side)
    return place[0] * sides[1] + place[1]
