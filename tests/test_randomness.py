import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdit import randomness
from hdit.randomness import bits, keys, normal, uniform

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


def streams(counters, seed: int = 0, purpose: str = "noise") -> torch.Tensor:
    return keys(seed, purpose, np.array(counters), CPU)


def test_keys_are_the_bits_of_the_counters():
    made = streams(range(1000), 3)
    assert made.dtype == torch.int64
    assert np.array_equal(made.numpy().view(np.uint64), bits(3, "noise", np.arange(1000)))


@given(
    batch=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
    shape=st.sampled_from([(), (1,), (3,), (2, 5), (3, 8, 8)]),
    draw=st.integers(0, 2**63 - 1),
)
def test_normal_is_a_function_of_the_counter_the_draw_and_the_place(batch, shape, draw):
    together = normal(streams(batch), shape, draw)
    assert together.shape == (len(batch), *shape)
    assert together.dtype == torch.float32
    longer = normal(streams(batch[-1:]), (200,), draw)
    assert torch.equal(together[-1].flatten(), longer[0, : math.prod(shape)])


def test_normal_has_the_first_draw_unless_told():
    assert torch.equal(normal(streams([1]), (9,)), normal(streams([1]), (9,), 0))


def test_normal_differs_by_seed_purpose_counter_and_draw():
    draws = [
        normal(streams(range(10), seed, purpose), (4,), draw)
        for seed, purpose, draw in itertools.product(
            range(3), ["noise", "sampling"], [0, 1, 2**32, 2**62]
        )
    ]
    assert len({tuple(row) for row in torch.cat(draws).tolist()}) == 240


def test_normal_refuses_a_draw_that_is_negative():
    with pytest.raises(ValueError, match="draw in 0"):
        normal(streams([1]), (9,), -1)


# Again 5 standard deviations, were the numbers random; they never change.


@pytest.fixture(scope="module")
def many_normals():
    """(50, 20, 4000) float64: streams, draws, places."""
    batch = streams(range(50))
    return torch.stack([normal(batch, (4000,), draw) for draw in range(20)], 1).double()


def test_normal_has_the_moments_of_a_standard_normal(many_normals):
    n = many_normals.numel()
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(many_normals.pow(power).mean() - mean) < 5 * math.sqrt(variance / n)


def test_normal_has_the_distribution_of_a_standard_normal(many_normals):
    """Kolmogorov and Smirnov's test: a gap of 1.95 / sqrt(n) is passed by chance once in 1,000."""
    ordered, n = many_normals.flatten().sort().values, many_normals.numel()
    cdf, steps = torch.special.ndtr(ordered), torch.arange(n + 1).double() / n
    gap = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert gap < 1.95 / math.sqrt(n)


def test_normal_has_the_tails_of_a_standard_normal(many_normals):
    n = many_normals.numel()
    for beyond in (2, 3, 4):
        p = torch.special.ndtr(torch.tensor(-beyond, dtype=torch.float64)).item()
        for side in (many_normals, -many_normals):
            assert abs((side > beyond).sum() - n * p) < 5 * math.sqrt(n * p)


def test_normal_of_streams_draws_and_places_is_uncorrelated(many_normals):
    """The numbers themselves, and their squares: the two of a pair share a radius."""
    z = many_normals
    squares = (z.square() - 1) / math.sqrt(2)
    for x in (z, squares):
        lagged = [(x[1:], x[:-1]), (x[:, 1:], x[:, :-1])]
        lagged += [(x[..., lag:], x[..., :-lag]) for lag in (1, 2, 3, 4, 64)]
        for a, b in lagged:
            assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


def test_normal_of_pairs_of_one_radius_is_independent(many_normals):
    """Quadrants and halves of the circle of the two numbers that two words make."""
    x, y = many_normals.flatten().view(-1, 2).unbind(1)
    angle = torch.atan2(y, x) / math.tau % 1
    counts = torch.histc(angle, 64, 0, 1)
    chi2 = float(((counts - len(x) / 64).square() / (len(x) / 64)).sum())
    assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)
    radius = (x.square() + y.square()) / 2  # exponential, so uniform is:
    counts = torch.histc((-radius).exp(), 64, 0, 1)
    chi2 = float(((counts - len(x) / 64).square() / (len(x) / 64)).sum())
    assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)


def test_normal_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(1)
    first = normal(streams([0, 1]), (4,))
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(2)
    assert torch.equal(normal(streams([0, 1]), (4,)), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_normal_on_a_gpu_is_that_of_a_cpu_and_waits_for_nothing():
    cuda = torch.device("cuda")
    normal(keys(0, "noise", np.arange(2), cuda), (64,))  # compiles, and allocates
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = keys(5, "noise", np.arange(9), cuda)
        noise = normal(on_gpu, (3, 32, 32), 7)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(on_gpu.cpu(), streams(range(9), 5))
    # As in tests/kernels/test_philox.py: a few roundings of the largest number there can be.
    torch.testing.assert_close(
        noise.cpu(), normal(streams(range(9), 5), (3, 32, 32), 7), rtol=0, atol=3.6e-6
    )
