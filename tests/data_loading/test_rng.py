# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Random numbers as functions of seed, epoch and sample."""

import random

import numpy as np
import pytest
import torch

from data_loading.rng import fold_in, fold_in_each, mask_noise, seed_all, seed_cpu

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(z: int) -> int:
    """Return the output for a state, as the reference in C."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def signed(z: int) -> int:
    return z % WORD - WORD * (z % WORD >= WORD // 2)


def test_mix_is_splitmix64():
    """Published first outputs for the seeds 0 and 1234567, without their last bit."""
    assert fold_in(0) == 0xE220A8397B1DCDAF >> 1
    assert fold_in(1234567) == 6457827717110365317 >> 1


def test_mix_never_changes():
    """Other constants would change masks and augmentations in resumed runs."""
    assert fold_in(0, 1) == 1534736266818221247
    assert fold_in(1, 0) == 3395948882924712079
    state = 0
    for number in (3, 1, 4, 1, 5):
        state = splitmix((state + number + GOLDEN) % WORD)
    assert fold_in(3, 1, 4, 1, 5) == state >> 1


def test_mix_tells_order_and_number_of_its_arguments_apart():
    values = [fold_in(*n) for n in [(0,), (0, 0), (1,), (0, 1), (1, 0), (1, 1), (2,), (0, 0, 1)]]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)  # a seed for torch and numpy


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**31, 799)])
def test_noise_is_splitmix64_of_seed_epoch_and_id(seed, epoch):
    ids = [0, 1, 5, 1281166, 2**40]
    expected = []
    for number in ids:
        row = splitmix((number * GOLDEN + fold_in(seed, epoch)) % WORD)
        expected.append([signed(splitmix((row + k * GOLDEN) % WORD)) for k in (1, 2, 3, 4)])
    assert mask_noise(seed, epoch, torch.tensor(ids), 4).tolist() == expected


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    ids = torch.tensor([9, 4, 11, 4])
    rows = mask_noise(1, 2, ids, 6)
    assert torch.equal(rows[1], rows[3])
    for i, number in enumerate(ids):
        assert torch.equal(mask_noise(1, 2, number[None], 6)[0], rows[i])
    assert torch.equal(mask_noise(1, 2, ids, 3), rows[:, :3])


def test_noise_does_not_touch_or_read_the_generators():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = mask_noise(0, 0, torch.arange(3), 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(mask_noise(0, 0, torch.arange(3), 4), first)


def test_noise_differs_by_seed_epoch_and_sample():
    ids = torch.arange(50)
    rows = [mask_noise(seed, epoch, ids, 4) for seed in (0, 1) for epoch in (0, 1)]
    values = torch.cat(rows).flatten()
    assert len(values.unique()) == len(values) == 4 * 50 * 4


def test_noise_is_uniform_and_neighbors_are_independent():
    noise = mask_noise(0, 0, torch.arange(9800), 49)
    share = noise.double() / 2**63  # -1 to 1, mean 0, std 0.577
    assert share.mean().abs() < 0.005  # five times 0.577 / sqrt(480200)
    assert share.std().item() == pytest.approx(3**-0.5, abs=0.005)
    assert (share[:-1] * share[1:]).mean().abs() < 0.0025  # std 1/3 / sqrt(480151)
    assert (share[:, :-1] * share[:, 1:]).mean().abs() < 0.0025
    lowest = torch.bincount(noise.argmin(1), minlength=49)  # 200 each, std 14
    assert lowest.min() > 130
    assert lowest.max() < 270


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_all_sets_every_generator():
    """The official code does not seed `random`, which RandAugment uses."""
    seed_all(3, 1)
    first = draws()
    assert draws() != first
    seed_all(3, 1)
    assert draws() == first
    seed_all(1, 3)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_cheap_seeds_of_a_sample_give_the_same_draws_and_leave_devices_alone(monkeypatch):
    """`torch.manual_seed` took longer than a small image."""
    seed_all(3, 1)
    first = draws()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds all devices"))
    seed_cpu(3, 1)
    assert draws() == first
    seed_cpu(3, 2)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


COINS = {
    "random": lambda count: [random.getrandbits(1) for _ in range(count)],
    "numpy": lambda count: np.random.randint(0, 2, count).tolist(),
    "torch": lambda count: torch.randint(0, 2, (count,)).tolist(),
}


@pytest.mark.parametrize("pair", [("random", "numpy"), ("numpy", "torch"), ("random", "torch")])
def test_libraries_throw_independent_coins(pair):
    """NumPy and torch are both Mersenne Twisters: a shared seed gave `randint` the same bits."""
    table = np.zeros((2, 2))
    for sample in range(500):
        seed_all(0, 1, sample)
        for a, b in zip(*(COINS[name](8) for name in pair), strict=True):
            table[a, b] += 1
    expected = table.sum(0) * table.sum(1)[:, None] / table.sum()
    chi_square = ((table - expected) ** 2 / expected).sum()  # of one degree of freedom
    assert chi_square < 10.8  # p = 0.001


@pytest.mark.slow
def test_uniform_draws_of_the_libraries_are_uncorrelated():
    """Of the same sample, and of neighbors."""
    values = []
    for sample in range(4000):
        seed_all(7, 0, sample)
        values.append(draws())
    table = torch.tensor(values, dtype=torch.float64)
    table = torch.cat([table[1:], table[:-1]], 1)  # (3999, 6): also the sample before
    correlation = torch.corrcoef(table.T) - torch.eye(6)
    assert correlation.abs().max() < 0.064  # four times 1 / sqrt(3999)


def test_many_words_give_the_seeds_of_each():
    """Otherwise --val_split would hold out other images than earlier versions."""
    words = np.array([0, 1, 7, 2**32 - 1, 2**62])
    for numbers in ((), (3,), (0x5EED, 2**40)):
        assert fold_in_each(words, *numbers).tolist() == [fold_in(*numbers, int(w)) for w in words]
