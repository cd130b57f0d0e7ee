import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from known_answers import load

from hdit.diffusion.beta_schedules import CosineSchedule, LinearSchedule
from hdit.diffusion.brownian import DEPTH, BrownianPath
from hdit.diffusion.sigmas import Exponential, Karras, LinearT
from hdit.errors import SolverError

TICKS = 2**DEPTH
SIGMA_MAX = 80.0


def normals(seed: int, *shape: int):
    """Standard normal tensors by index."""

    def normal(i: int) -> torch.Tensor:
        assert 0 <= i < TICKS
        generator = torch.Generator().manual_seed(seed * TICKS + i)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal


def units():
    """A dimension for each normal variable, up to 200 of them: dot products of what is linear in
    them are exact covariances."""
    seen = {}

    def unit(i: int) -> torch.Tensor:
        return torch.eye(200, dtype=torch.float64)[seen.setdefault(i, len(seen))]

    return unit


def sigma_at(tick: int) -> float:
    return SIGMA_MAX * (tick / TICKS) ** 7


levels = st.integers(0, TICKS).map(sigma_at)
stretches = st.tuples(levels, levels).filter(lambda pair: pair[0] != pair[1])
lightly = settings(max_examples=25, deadline=None)

PAIRS = [(160.0, 50.0), (50.0, 10.0), (160.0, 10.0), (10.0, 160.0), (10.0, 0.01)]


def reference_noise(key: str):
    record = load("brownian_tree.json")[key]
    noise = {tuple(json.loads(f"[{pair[1:-1]}]")): torch.tensor(v) for pair, v in record.items()}
    assert list(noise) == PAIRS
    return noise


def our_noise():
    path = BrownianPath(normals(7, 2, 3), 160.0)
    return {pair: path(*pair) for pair in PAIRS}


@pytest.mark.parametrize(
    ("noise", "atol"),
    [(reference_noise("seed7"), 1e-4), (reference_noise("seeds[7,8]"), 1e-4), (our_noise(), 2e-3)],
    ids=["the reference, seed 7", "the reference, seeds 7 and 8", "ours"],
)
def test_noise_of_the_reference_and_ours_is_that_of_one_path_in_sigma(noise, atol):
    """Antisymmetric, and additive with sigma as the time, of increments of about 10.

    The reference's is float32, and its tree bisects to 1e-6; ours is that of the nearest ticks,
    which are off by 2e-4 of a noise level at most.
    """

    def increment(a: float, b: float) -> torch.Tensor:
        return noise[a, b].double() * math.sqrt(abs(a - b))

    assert torch.equal(noise[10.0, 160.0], -noise[160.0, 10.0])
    total = increment(160.0, 50.0) + increment(50.0, 10.0)
    torch.testing.assert_close(total, increment(160.0, 10.0), rtol=0, atol=atol)


@lightly
@given(a=levels, b=levels, c=levels, seed=st.integers(0, 2**20))
def test_noise_adds_up_and_changes_its_sign_with_the_direction(a, b, c, seed):
    assume(len({a, b, c}) == 3)
    path = BrownianPath(normals(seed, 5), SIGMA_MAX)

    def increment(a: float, b: float) -> torch.Tensor:
        return path(a, b) * math.sqrt(abs(a - b) / SIGMA_MAX)

    torch.testing.assert_close(
        increment(a, b) + increment(b, c), increment(a, c), rtol=0, atol=1e-12
    )
    assert torch.equal(path(a, b), -path(b, a))


@lightly
@given(first=stretches, second=stretches)
def test_noise_has_the_covariance_of_a_brownian_path(first, second):
    """Variance 1, and the share that two stretches have in common: 0 where they are disjoint."""
    path = BrownianPath(units(), SIGMA_MAX)
    (a, b), (c, d) = first, second
    common = max(0, min(max(a, b), max(c, d)) - max(min(a, b), min(c, d)))
    sign = math.copysign(1, (b - a) * (d - c))
    one, other = path(*first), path(*second)
    assert one.square().sum().item() == pytest.approx(1, abs=1e-10)
    expected = sign * common / math.sqrt(abs(b - a) * abs(d - c))
    assert (one @ other).item() == pytest.approx(expected, abs=1e-10)


def test_noise_of_the_steps_of_a_sigma_schedule_is_standard_normal_and_independent():
    """20,000 elements: standard errors 0.0071 of a mean or correlation, 0.01 of a variance."""
    path = BrownianPath(normals(3, 20_000), SIGMA_MAX)
    sigmas = Karras()(8, 0.01, SIGMA_MAX, LinearSchedule()).tolist()
    noise = torch.stack([path(a, b) for a, b in pairwise(sigmas)])
    assert noise.mean(1).abs().max() < 4 * 0.0071
    assert (noise.var(1) - 1).abs().max() < 4 * 0.01
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 4 * 0.0071
    assert (noise.abs() < 1).double().mean().item() == pytest.approx(math.erf(0.5**0.5), abs=0.01)


@lightly
@given(asked=st.lists(stretches, min_size=2, max_size=6), data=st.data())
def test_noise_does_not_depend_on_what_was_asked_before(asked, data):
    path = BrownianPath(normals(5, 3), SIGMA_MAX)
    for pair in data.draw(st.permutations(asked)):
        assert torch.equal(path(*pair), BrownianPath(normals(5, 3), SIGMA_MAX)(*pair))


def test_noise_differs_between_seeds():
    one, other = (BrownianPath(normals(seed, 3), SIGMA_MAX)(80.0, 1.0) for seed in (1, 2))
    assert not torch.isclose(one, other).any()


def test_path_draws_each_normal_at_most_twice_on_the_way_down_a_sigma_schedule():
    """What the step before has drawn is kept: each draw is of the size of the images."""
    asked = []
    path = BrownianPath(lambda i: asked.append(i) or torch.zeros(1), SIGMA_MAX)
    sigmas = Karras()(50, 0.01, SIGMA_MAX, LinearSchedule()).tolist()
    for a, b in pairwise(sigmas):
        path(a, b)
    assert max(asked.count(i) for i in asked) <= 2


@lightly
@given(sigma=st.floats(0, SIGMA_MAX))
def test_ticks_are_even_in_the_seventh_root_of_sigma(sigma):
    tick = BrownianPath(units(), SIGMA_MAX).tick
    assert isinstance(tick(sigma), int)
    assert abs(tick(sigma) - TICKS * (sigma / SIGMA_MAX) ** (1 / 7)) <= 0.5 + 1e-9


def test_noise_in_float32_is_that_in_float64_to_the_lowest_levels():
    """W is 1e-3 at sigma 1e-3 where it is 1 at 1,000: its increments keep their digits."""
    sigmas = Karras()(1000, 1e-3, 1000.0, LinearSchedule()).tolist()
    normal = normals(2, 8)
    single = BrownianPath(lambda i: normal(i).float(), 1000.0)
    double = BrownianPath(normal, 1000.0)
    for a, b in pairwise(sigmas):
        torch.testing.assert_close(single(a, b).double(), double(a, b), rtol=0, atol=2e-4)


def test_path_reaches_from_sigma_max_to_0():
    path = BrownianPath(normals(1, 3), SIGMA_MAX)
    assert torch.equal(path(0.0, SIGMA_MAX), normals(1, 3)(0))  # W(0) = 0
    assert path(0.01, 0.0).isfinite().all()
    assert torch.equal(path(SIGMA_MAX * (1 + 1e-12), 0.0), path(SIGMA_MAX, 0.0))


@pytest.mark.parametrize("sigma", [-1e-9, SIGMA_MAX * 1.001, math.inf, math.nan])
@pytest.mark.parametrize("swapped", [False, True])
def test_path_refuses_noise_levels_out_of_its_range(sigma, swapped):
    pair = (sigma, 1.0) if swapped else (1.0, sigma)
    with pytest.raises(ValueError, match="the path reaches from 0 to sigma_max 80, got sigma"):
        BrownianPath(normals(1, 3), SIGMA_MAX)(*pair)


@pytest.mark.parametrize("pair", [(1.0, 1.0), (1.0, 1.0 - 1e-6)])
def test_path_refuses_noise_levels_within_one_tick(pair):
    with pytest.raises(SolverError, match=r"noise levels .* too close .* take fewer steps"):
        BrownianPath(normals(1, 3), SIGMA_MAX)(*pair)


@pytest.mark.parametrize(
    ("sigma_schedule", "n", "schedule"),
    [
        (Karras(), 4000, LinearSchedule()),
        (Exponential(), 4000, LinearSchedule()),
        (LinearT(), 1000, LinearSchedule()),
        (LinearT(), 1000, CosineSchedule()),  # to sigma 20,291
    ],
    ids=["karras", "exponential", "linear betas", "cosine"],
)
def test_ticks_are_close_enough_for_each_step(sigma_schedule, n, schedule):
    sigmas = sigma_schedule(n, *sigma_schedule.sigma_range(schedule), schedule).tolist()
    tick = BrownianPath(units(), sigmas[0]).tick
    assert all(tick(a) > tick(b) for a, b in pairwise(sigmas))
