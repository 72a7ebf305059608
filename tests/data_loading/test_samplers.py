# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The order of images: random, the same for all, and without a list."""

import collections
import itertools
import math
import resource
import sys
import tracemalloc

import pytest
import torch
from torch.utils.data import Dataset

from data_loading.dataset import TransformedDataset
from data_loading.samplers import CHUNK, EvalSampler, TrainSampler, permute
from data_loading.workers import WatchedLoader
from training.dry_run import decode_some

HUGE = 1_300_000_000  # images


def order(length: int, *numbers: int) -> torch.Tensor:
    return permute(torch.arange(length), length, *numbers)


def indices(sampler: TrainSampler, count: int | None = None) -> list[int]:
    return [index for _, index in itertools.islice(sampler, count)]


def chi_square(counts: list[int], kinds: int) -> float:
    """Return the distance of counts from uniform, in standard deviations."""
    expected = sum(counts) / kinds
    counts = counts + [0] * (kinds - len(counts))
    total = sum((count - expected) ** 2 / expected for count in counts)
    return (total - (kinds - 1)) / math.sqrt(2 * (kinds - 1))


# --- each once ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths", [range(1, 301), (1442, 4096, 4097), (65_537, 100_003), (1_281_167,)], ids=str
)
def test_every_image_comes_once(lengths):
    for length in lengths:
        for numbers in ((0, 0), (7, 3)):
            assert torch.equal(order(length, *numbers).sort().values, torch.arange(length)), length


@pytest.mark.parametrize("length", [HUGE, 2**40, 2**40 + 1, 2**62])
def test_part_of_a_huge_order_has_no_image_twice_nor_one_that_is_not_there(length):
    for first in (0, length // 3, length - 20_000):
        part = permute(torch.arange(first, first + 20_000), length, 1, 2)
        assert len(part.unique()) == 20_000
        assert part.min() >= 0
        assert part.max() < length
        assert part.double().mean() / length == pytest.approx(0.5, abs=0.01)  # 5 sigma: 0.0102


def test_nothing_to_order_is_no_error():
    assert order(0, 1).tolist() == []
    assert list(TrainSampler(0, 0, 0, 1)) == []


# --- at random ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 4, 5])
def test_all_orders_of_a_few_are_equally_likely(length):
    kinds = math.factorial(length)
    seen = collections.Counter(tuple(order(length, seed).tolist()) for seed in range(10 * kinds))
    assert chi_square([*seen.values()], kinds) < 4


@pytest.mark.parametrize("length", [7, 9, 23, 49])
def test_half_of_the_orders_are_odd(length):
    """Swaps that make them: rows and columns of a Feistel network can leave out one half."""
    pairs = torch.combinations(torch.arange(length))
    swapped = [int((p[pairs[:, 0]] > p[pairs[:, 1]]).sum()) for p in orders_of(length, 400)]
    assert abs(sum(number % 2 for number in swapped) - 200) < 40  # 4 sigma


def orders_of(length: int, count: int) -> list[torch.Tensor]:
    return [order(length, seed, 1) for seed in range(count)]


@pytest.mark.parametrize("position", [0, 1, 25])
def test_any_image_may_come_at_any_place(position):
    place = torch.tensor([position])
    seen = collections.Counter(int(permute(place, 26, seed, 0)) for seed in range(26 * 20))
    assert chi_square([*seen.values()], 26) < 4


def test_neighbors_in_the_order_are_none_in_the_data():
    length = 100_000
    x = order(length, 0, 0).double() - (length - 1) / 2
    rows = math.isqrt(length - 1) + 1  # of the rectangle that the cells are permuted in
    for lag in (1, 2, 3, rows - 1, rows, rows + 1, -(-length // rows), 1024):
        correlation = (x[lag:] * x[:-lag]).mean() / x.square().mean()
        assert abs(correlation) < 4 / math.sqrt(length), lag
    moved = (order(length, 0, 0) - torch.arange(length)).abs().double().mean()
    assert moved / length == pytest.approx(1 / 3, abs=0.004)  # 5 sigma
    steps = x.diff().abs().mean() / length
    assert steps == pytest.approx(1 / 3, abs=0.004)


def test_classes_of_sorted_data_are_mixed_in_every_batch():
    """Of 1000 classes, a thousand images each, the classes of a batch of 1024."""
    length, size = 1_000_000, 1024
    labels = order(length, 0, 0)[: 500 * size] // 1000
    counts = [len(batch.unique()) for batch in labels.view(500, size)]
    expected = 1000 * (1 - (1 - 1 / 1000) ** size)  # 641
    assert sum(counts) / 500 == pytest.approx(expected, abs=3)
    assert min(counts) > expected - 60


def test_epochs_and_seeds_have_orders_of_their_own():
    length = 50_000
    orders = [order(length, *numbers) for numbers in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))]
    for one, two in itertools.combinations(orders, 2):
        assert (one == two).sum() < 10  # one is expected
        assert abs(torch.corrcoef(torch.stack([one, two]).double())[0, 1]) < 4 / math.sqrt(length)


# --- for all ranks the same, from any place -----------------------------------------------------


@pytest.mark.parametrize("length", [50, 5 * CHUNK + 3, HUGE])
@pytest.mark.parametrize("seen", [0, 16])
def test_ranks_share_one_order_whatever_their_number(length, seen):
    some = min(length - seen - 2, 4 * CHUNK) // 4 * 4
    whole = order(length, 3, 5)[seen:] if length < HUGE else None
    for ranks in (1, 2, 4):
        samplers = [TrainSampler(length, 3, rank, ranks) for rank in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(5, seen)
        parts = [indices(sampler, some // ranks) for sampler in samplers]
        together = [index for indices in zip(*parts, strict=True) for index in indices]
        whole = torch.tensor(together) if whole is None else whole
        assert together == whole[:some].tolist()
        assert next(iter(samplers[-1]))[0] == 5
        assert [len(sampler) for sampler in samplers] == [(length - seen) // ranks] * ranks


def test_resume_goes_on_in_a_huge_epoch_where_it_stopped():
    sampler = TrainSampler(HUGE, 0, 1023, 1024)
    seen = 1024 * 100
    sampler.set_epoch(2)
    before = indices(sampler, 150)
    sampler.set_epoch(2, seen)
    assert indices(sampler, 50) == before[100:]
    sampler.set_epoch(2, HUGE // 1024 * 1024 - 1024)
    assert len(indices(sampler)) == len(sampler) == 1


def test_epoch_that_is_chosen_later_is_not_this_one():
    sampler = TrainSampler(100, 0, 0, 1)
    keys = iter(sampler)
    sampler.set_epoch(1, 50)
    assert [epoch for epoch, _ in keys] == [0] * 100


def test_order_of_an_earlier_version_stays():
    """A run that resumes in the middle of an epoch depends on it."""
    assert order(10, 0, 0).tolist() == ORDER_OF_TEN
    sampler = TrainSampler(HUGE, 0, 1, 2)
    sampler.set_epoch(7, 1000)
    assert indices(sampler, 3) == HUGE_ORDER


ORDER_OF_TEN = [4, 6, 2, 3, 0, 9, 7, 1, 5, 8]
HUGE_ORDER = [343392260, 1014391285, 840933620]


# --- without a list -----------------------------------------------------------------------------


class Endless(Dataset):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 2, 2), index % 251, dtype=torch.uint8), index % 7


class Memory:
    """Bytes that a block takes at most: of Python's objects, and of the process, tensors included.

    The second only above what the process has had before: a list of a billion is seen.
    """

    def __enter__(self) -> "Memory":
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.objects = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        unit = 1 if sys.platform == "darwin" else 1024
        self.process = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) * unit


def test_memory_is_seen():
    with Memory() as memory:
        kept = list(range(1000, 200_000))
    assert memory.objects > 8 * len(kept)


@pytest.mark.parametrize("length", [HUGE, 2**40])
@pytest.mark.parametrize("seen", [0, HUGE // 2])
def test_epoch_begins_and_goes_on_without_memory(length, seen):
    with Memory() as memory:
        sampler = TrainSampler(length, 0, 1023, 1024)
        sampler.set_epoch(3, seen)
        assert len(indices(sampler, 20 * CHUNK)) == 20 * CHUNK
        evaluated = itertools.islice(EvalSampler(length, 1023, 1024), 3)
        assert list(evaluated) == [(0, 1023), (0, 2047), (0, 3071)]
    assert memory.objects < 2**22
    assert memory.process < 2**26


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_and_dry_run_make_no_list_of_all(workers):
    data = TransformedDataset(Endless(HUGE), torch.clone, seed=0)
    with Memory() as memory:
        loader = WatchedLoader(data, TrainSampler(HUGE, 0, 5, 8), 4, workers, drop_last=True)
        assert len(loader) == HUGE // 8 // 4
        images, labels, ids, bad, _ = next(iter(loader))
        tried = len(list(decode_some(loader, seed=0, seconds=0.2)))
        loader = WatchedLoader(data, EvalSampler(HUGE, 5, 8), 4, workers)
        assert next(iter(loader))[2].tolist() == [5, 13, 21, 29]
    assert ids.tolist() == indices(TrainSampler(HUGE, 0, 5, 8), 4)
    assert tried > 0
    assert memory.objects < 2**26  # 100,000 keys that a dry run may try at most
    assert memory.process < 2**28
