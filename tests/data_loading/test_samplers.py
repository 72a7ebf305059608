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
from data_loading.samplers import CHUNK, EvalSampler, TrainSampler, check_global_batch, permute
from data_loading.workers import WatchedLoader
from errors import UserError
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


# --- shorter and longer epochs, repeated images -------------------------------------------------


def keys(length: int, epoch: int = 0, seed: int = 0, **options: object) -> list[int]:
    sampler = TrainSampler(length, seed, 0, 1, **options)
    sampler.set_epoch(epoch)
    return indices(sampler)


def test_longer_epoch_continues_with_other_orders():
    """By hand: three images in the orders 2 0 1, 0 1 2 and 1 2 0. The k-th time adds 3 k."""
    assert order(3, 5, 0).tolist() == [2, 0, 1]
    assert [order(3, 5, 0, number).tolist() for number in (1, 2)] == [[0, 1, 2], [1, 2, 0]]
    assert keys(3, seed=5, samples=7) == [2, 0, 1, 3 + 0, 3 + 1, 3 + 2, 6 + 1]
    assert keys(3, epoch=1, seed=5, samples=6) == [1, 2, 0, 3 + 2, 3 + 0, 3 + 1]


def test_shorter_epoch_is_the_beginning_of_a_whole_one():
    """All epochs together see all images, not the same few of them."""
    parts = [keys(100, epoch, samples=10) for epoch in range(100)]
    assert all(part == keys(100, epoch)[:10] for epoch, part in enumerate(parts))
    assert {*itertools.chain(*parts)} == {*range(100)}


def test_repeated_images_are_neighbors_with_keys_of_their_own():
    """By hand: four images in the order 1 3 2 0; an epoch of four has room for 1 three times."""
    assert order(4, 0, 0).tolist() == [1, 3, 2, 0]
    assert keys(4, repeats=3) == [1, 4 + 1, 8 + 1, 3]
    assert keys(4, repeats=2, samples=8) == [1, 5, 3, 7, 2, 6, 0, 4]
    # The second pass begins with 2, which comes for the third and fourth time.
    assert order(4, 0, 0, 1).tolist()[:1] == [2]
    assert keys(4, repeats=2, samples=10)[8:] == [4 * 2 + 2, 4 * 3 + 2]


WEIGHTS = torch.arange(10.0)  # the first image is never drawn


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["shuffle", "weights"])
@pytest.mark.parametrize(("samples", "repeats"), [(4, 1), (25, 1), (8, 3), (72, 3), (40, 2)])
def test_any_epoch_is_the_same_for_all_ranks_and_from_any_place(samples, repeats, weights):
    """Keys of an epoch must differ, since those of equal keys would have equal augmentations."""
    options = {"weights": weights, "samples": samples, "repeats": repeats}
    whole = keys(10, 3, **options)
    assert len(whole) == len({*whole}) == samples
    images = [index % 10 for index in whole]
    for first in range(0, samples, repeats):
        assert len({*images[first : first + repeats]}) == 1
    counts = collections.Counter(images[::repeats])
    if weights is None:
        passes = -(-samples // repeats) / 10
        assert {counts[image] for image in range(10)} <= {math.floor(passes), math.ceil(passes)}
    else:
        assert counts[0] == 0
    for ranks in (2, 4):
        samplers = [TrainSampler(10, 0, rank, ranks, **options) for rank in range(ranks)]
        for start in (0, 2 * ranks if samples > 4 else 0):
            for sampler in samplers:
                sampler.set_epoch(3, start)
            parts = [indices(sampler) for sampler in samplers]
            together = [index for block in zip(*parts, strict=True) for index in block]
            assert together == whole[start : start + (samples - start) // ranks * ranks]
    one = TrainSampler(10, 0, 0, 1, **options)
    for start in range(samples):
        one.set_epoch(3, start)
        assert indices(one) == whole[start:]


def test_longer_epoch_draws_by_weight_in_each_pass():
    """Shares of 10 images are weights / 4.5: rounded down or up in each of 40 passes."""
    counts = collections.Counter(index % 10 for index in keys(10, weights=WEIGHTS, samples=400))
    for image in range(10):
        share = image / 4.5
        assert 40 * math.floor(share) <= counts[image] <= 40 * math.ceil(share)
        assert counts[image] == pytest.approx(40 * share, abs=12)


def test_huge_epochs_begin_anywhere_without_memory():
    with Memory() as memory:
        sampler = TrainSampler(HUGE, 0, 7, 8, samples=3 * HUGE, repeats=2)
        sampler.set_epoch(1, 2 * HUGE + 16)
        found = indices(sampler, 2 * CHUNK)
        assert len(sampler) == (HUGE - 16) // 8
    assert {index // HUGE for index in found} == {2 + 1}  # the second pass, the second time
    assert memory.objects < 2**22
    assert memory.process < 2**26


@pytest.mark.parametrize(
    ("length", "samples", "text"),
    [
        (20, None, r"20 training images, .* takes 32 \(16 x 2 processes\); use --batch_size 10 or "
         "less, or give --num_samples 32 or more"),
        (99, 1, "--num_samples 1, but .* use at most 1 process, or raise it to 32"),
    ],
)  # fmt: skip
def test_epoch_without_one_batch_is_refused(length, samples, text):
    """It would have no step, and end without a word."""
    with pytest.raises(UserError, match=text):
        check_global_batch(TrainSampler(length, 0, 0, 2, samples=samples), 16)
    check_global_batch(TrainSampler(length, 0, 0, 2, samples=32), 16)


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
