import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdit import randomness
from hdit.randomness import bits, normal, uniform

CPU = torch.device("cpu")
N = 50_000
COUNTERS = np.arange(N)


def test_mix_gives_the_published_numbers_of_splitmix64():
    # seed 1234567, from the reference implementation by Vigna
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + k * golden) % 2**64 for k in (1, 2, 3)]
    assert randomness._mix(np.array(states, np.uint64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


# ---- uniform -------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**63 - 1),
    counters=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8),
)
def test_uniform_lies_in_0_to_1_for_any_seed_and_counter(seed, counters):
    u = uniform(seed, "noise", np.array(counters))
    assert u.dtype == torch.float64
    assert u.shape == (len(counters),)
    assert (u >= 0).all()
    assert (u < 1).all()


def test_uniform_stays_below_1_and_reaches_0_at_the_extreme_bits(monkeypatch):
    extremes = np.array([0, 2**64 - 1], np.uint64)
    monkeypatch.setattr(randomness, "bits", lambda seed, purpose, counters: extremes)
    assert uniform(0, "noise", np.arange(2)).tolist() == [0, 1 - 2**-53]


@given(order=st.permutations(range(12)), cut=st.integers(1, 11))
def test_uniform_is_a_function_of_the_counter_not_of_the_batch(order, cut):
    whole = uniform(3, "noise", np.arange(100, 112))
    counters = 100 + np.array(order)
    parts = [uniform(3, "noise", part) for part in (counters[:cut], counters[cut:])]
    assert torch.equal(torch.cat(parts), whole[order])


def test_uniform_differs_by_seed_purpose_and_counter():
    # 20 x 3 x 500 draws; two of 30,000 numbers of 53 bits coincide with a chance of 1e-7
    draws = [
        uniform(seed, purpose, np.arange(500))
        for seed, purpose in itertools.product(range(20), ["noise", "sigma", "flip"])
    ]
    assert len(torch.cat(draws).unique()) == 30_000


def many(what: str) -> torch.Tensor:
    """N numbers that differ in one of the three arguments."""
    if what == "counters":
        return uniform(0, "noise", COUNTERS)
    if what == "late counters":
        return uniform(0, "noise", 10**9 + COUNTERS)
    if what == "strided counters":
        return uniform(0, "noise", 256 * COUNTERS)
    if what == "seeds":
        return torch.cat([uniform(seed, "noise", np.arange(25)) for seed in range(N // 25)])
    assert what == "purposes"
    return torch.cat([uniform(0, f"purpose {i}", np.arange(25)) for i in range(N // 25)])


SEQUENCES = ["counters", "late counters", "strided counters", "seeds", "purposes"]


# The numbers never change, so these pass always or never; 5 standard deviations, were they random.


@pytest.mark.parametrize("what", SEQUENCES)
def test_uniform_fills_100_bins_evenly(what):
    counts = torch.histc(many(what), 100, 0, 1)
    chi2 = float(((counts - N / 100).square() / (N / 100)).sum())
    # mean 99 and variance 198; far too even is as wrong as far too uneven
    assert abs(chi2 - 99) < 5 * math.sqrt(198)


@pytest.mark.parametrize("what", SEQUENCES)
def test_uniform_has_mean_1_2_and_variance_1_12(what):
    u = many(what)
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / N)
    # E (u - 1/2)^4 = 1/80
    assert abs((u - 1 / 2).square().mean() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / N)


@pytest.mark.parametrize("what", SEQUENCES)
@pytest.mark.parametrize("lag", [1, 2, 25])
def test_uniform_neighbours_are_uncorrelated(what, lag):
    z = (many(what) - 1 / 2) * math.sqrt(12)
    assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(N - lag)


def test_uniform_of_two_seeds_or_purposes_are_uncorrelated():
    z = [
        (uniform(seed, purpose, COUNTERS) - 1 / 2) * math.sqrt(12)
        for seed, purpose in [(0, "noise"), (1, "noise"), (2, "noise"), (0, "sigma"), (1, "flip")]
    ]
    for a, b in itertools.combinations(z, 2):
        assert abs((a * b).mean()) < 5 / math.sqrt(N)


def test_bits_flip_by_half_from_one_counter_to_the_next():
    numbers = bits(0, "noise", COUNTERS[:10_001])
    changed = np.unpackbits((numbers[1:] ^ numbers[:-1]).view(np.uint8).reshape(-1, 8), axis=1)
    # each of the 64 bits: 5 standard deviations of 10,000 fair coins
    assert np.abs(changed.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(10_000)


# ---- normal --------------------------------------------------------------------------------------


def streams(counters, seed: int = 0, purpose: str = "noise") -> list[torch.Generator]:
    return randomness.streams(seed, purpose, np.array(counters), CPU)


def test_normal_of_a_stream_does_not_depend_on_its_batch():
    batch, alone = streams([5, 6, 7, 8]), streams([7])
    for shape in [(3, 8, 8), (3,), (1, 2)]:  # the streams go on from draw to draw
        together = normal(batch, shape)
        assert together.shape == (4, *shape)
        assert together.dtype == torch.float32
        assert torch.equal(together[2:3], normal(alone, shape))


def test_normal_goes_on_with_each_draw():
    stream = streams([0])
    assert not torch.equal(normal(stream, (64,)), normal(stream, (64,)))


def test_normal_differs_by_seed_purpose_and_counter():
    draws = [
        normal(streams(range(10), seed, purpose), (4,))
        for seed, purpose in itertools.product(range(3), ["noise", "sampling"])
    ]
    assert len({tuple(row) for row in torch.cat(draws).tolist()}) == 60


def test_normal_is_standard_and_uncorrelated_between_neighbours():
    z = normal(streams(range(50)), (1000,)).double()
    n = z.numel()
    # 5 standard deviations: E z^2 = 1 and Var z^2 = 2
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(n - 1000)
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / math.sqrt(n - 50)


def test_normal_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(1)
    first = normal(streams([0, 1]), (4,))
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(2)
    assert torch.equal(normal(streams([0, 1]), (4,)), first)
