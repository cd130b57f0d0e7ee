import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdit.diffusion.beta_schedules import (
    BetaSchedule,
    CosineSchedule,
    LinearSchedule,
    respaced,
    strided,
)


def sigmas_of(betas: list[float]) -> torch.Tensor:
    """By cumulative products in plain Python floats."""
    bar, sigmas = 1.0, []
    for beta in betas:
        bar *= 1 - beta
        sigmas.append(math.sqrt((1 - bar) / bar))
    return torch.tensor(sigmas, dtype=torch.float64)


@pytest.mark.parametrize("steps", [50, 250, 1000, 4000])
def test_sigmas_are_those_of_the_ddpm_table(steps):
    """Ho et al., 2020: 1e-4 to 2e-2 in 1000 steps; with T steps 1000/T times that."""
    first, last = 1e-4 * 1000 / steps, 2e-2 * 1000 / steps
    expected = sigmas_of([first + (last - first) * i / (steps - 1) for i in range(steps)])
    # 1 - abar cancels in the plain products: 1e-16 of 2.5e-5 at the first of 4,000 steps
    torch.testing.assert_close(LinearSchedule(steps=steps).sigmas(), expected, rtol=2e-11, atol=0)


def test_sigma_range_of_ddpm_is_the_published_one():
    assert LinearSchedule().sigma_range() == pytest.approx((0.0100, 157.41), rel=1e-4)


@pytest.mark.parametrize("steps", [10, 1000, 4000])
@pytest.mark.parametrize(("shift", "beta_max"), [(0.008, 0.999), (0.0, 0.99)])
def test_cosine_sigmas_are_those_of_nichol_and_dhariwal(steps, shift, beta_max):
    """Equation 17: abar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), betas clipped."""

    def f(t: int) -> float:
        return math.cos((t / steps + shift) / (1 + shift) * math.pi / 2) ** 2

    betas = [min(1 - f(t + 1) / f(t), beta_max) for t in range(steps)]
    schedule = CosineSchedule(steps=steps, shift=shift, beta_max=beta_max)
    # beta_1 = 1 - f(1)/f(0) is 1.5e-7 at T = 4000 without shift, known to 1e-16
    torch.testing.assert_close(schedule.sigmas(), sigmas_of(betas), rtol=1e-8, atol=0)


def test_cosine_sigmas_without_shift_are_the_tangent_but_for_the_clipped_end():
    """abar is cos^2 of the angle, hence sigma its tangent."""
    sigmas = CosineSchedule(shift=0.0).sigmas()
    t = torch.arange(1, 1000, dtype=torch.float64)
    torch.testing.assert_close(sigmas[:-1], torch.tan(t / 1000 * math.pi / 2), rtol=1e-8, atol=0)
    alpha_bar = 1 / (1 + sigmas.square())  # the last beta is 0.999 and not 1
    assert (alpha_bar[-1] / alpha_bar[-2]).item() == pytest.approx(1e-3, rel=1e-8)


def schedules(steps: int) -> list[BetaSchedule]:
    # the last betas of so few steps would pass 1
    linear = LinearSchedule(steps=steps, beta_end=min(2e-2, 0.9 * steps / 1000))
    return [linear, CosineSchedule(steps=steps)]


ANY_SCHEDULE = st.sampled_from([s for steps in (2, 3, 10, 250, 1000) for s in schedules(steps)])


@pytest.mark.parametrize("steps", [2, 10, 250, 1000, 4000])
def test_t_and_sigma_are_exact_at_every_entry_of_the_table(steps):
    index = torch.arange(steps, dtype=torch.float64)
    for schedule in schedules(steps):
        assert torch.equal(schedule.t(schedule.sigmas()), index)
        assert torch.equal(schedule.sigma(index), schedule.sigmas())


@given(schedule=ANY_SCHEDULE, fractions=st.lists(st.floats(0, 1), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_sigma_is_the_inverse_of_t_and_increases(schedule, fractions):
    t = torch.tensor(fractions, dtype=torch.float64) * (schedule.steps - 1)
    sigma = schedule.sigma(t)
    # a step of ln sigma is 3e-3 or more, of values up to 10 that are known to 2e-15
    torch.testing.assert_close(schedule.t(sigma), t, rtol=0, atol=1e-11)
    # t near 1000 is known to 6e-14 of a step, of which the cosine's last is 3.5 in ln sigma
    torch.testing.assert_close(schedule.sigma(schedule.t(sigma)), sigma, rtol=1e-12, atol=0)
    ordered = sigma[t.argsort()]
    # At a whole timestep it is the table's, beside it exp(ln): off by as many digits as above.
    assert (ordered.diff() >= -2e-15 * ordered[1:]).all()
    low, high = schedule.sigma_range()
    assert low * (1 - 1e-14) <= sigma.min()
    assert sigma.max() <= high * (1 + 1e-14)


@given(schedule=ANY_SCHEDULE, where=st.floats(0, 1), share=st.floats(0.01, 0.99))
@settings(max_examples=25, deadline=None)
def test_t_is_linear_in_the_log_of_sigma_between_entries(schedule, where, share):
    left = round(where * (schedule.steps - 2))
    below, above = schedule.sigmas()[left : left + 2].tolist()
    sigma = torch.tensor([below ** (1 - share) * above**share], dtype=torch.float64)
    assert schedule.t(sigma).item() == pytest.approx(left + share, abs=1e-11)
    at = torch.tensor([left + share], dtype=torch.float64)
    assert schedule.sigma(at).item() == pytest.approx(sigma.item(), rel=1e-12)  # as above


@pytest.mark.parametrize("schedule", schedules(1000), ids=lambda schedule: schedule.kind)
def test_t_and_sigma_are_clamped_beyond_the_table(schedule):
    low, high = schedule.sigma_range()
    assert schedule.t(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]
    assert schedule.sigma(torch.tensor([-3.0, 999.2, 1e9])).tolist() == [low, high, high]


def test_t_of_float32_noise_levels_is_off_by_their_rounding_alone():
    schedule = LinearSchedule()
    t = schedule.t(schedule.sigmas().float())
    # 6e-8 of sigma, where a step of ln sigma is 5e-3 or more
    torch.testing.assert_close(t, torch.arange(1000, dtype=torch.float64), rtol=0, atol=1.2e-5)


# ---- fewer timesteps -----------------------------------------------------------------------------


def test_respaced_timesteps_of_dit_reach_from_0_to_999():
    kept = respaced(1000, [250])
    assert (kept[:4], kept[-1], len(kept)) == ([0, 4, 8, 12], 999, 250)  # a stride of 999/249


def gaps(timesteps: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(timesteps)]


@given(steps=st.integers(6, 300), shares=st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_respaced_takes_its_count_of_each_section_from_end_to_end(steps, shares):
    n, start = len(shares), 0
    lengths = [len(range(i, steps, n)) for i in range(n)]  # even as can be, the longer ones first
    counts = [max(1, round(share * size)) for share, size in zip(shares, lengths, strict=True)]
    kept = respaced(steps, counts)
    assert len(kept) == sum(counts)
    for size, count in zip(lengths, counts, strict=True):
        section = [t for t in kept if start <= t < start + size]
        assert len(section) == count
        assert section[0] == start
        assert section[-1] == (start + size - 1 if count > 1 else start)
        spread = gaps(section)
        assert not spread or max(spread) - min(spread) <= 1, "all but even"
        start += size


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([11], "cannot take 11 timesteps of 10"),
        ([5, 6], "cannot take 6 timesteps of 5, a section of 10"),
        ([0], "cannot take 0 timesteps"),
        ([3, -1], "cannot take -1 timesteps"),
    ],
)
def test_respaced_beyond_a_section_says_how_long_it_is(counts, message):
    with pytest.raises(ValueError, match=message):
        respaced(10, counts)


@given(steps=st.integers(2, 300), stride=st.integers(1, 299))
@settings(max_examples=40, deadline=None)
def test_strided_goes_from_0_at_one_stride_as_far_as_it_can(steps, stride):
    count = math.ceil(steps / min(stride, steps - 1))
    kept = strided(steps, count)
    assert (len(kept), kept[0]) == (count, 0)
    (gap,) = set(gaps(kept))
    assert kept[-1] < steps <= kept[-1] + gap


def test_strided_of_ddim_is_the_published_one():
    assert strided(1000, 50) == list(range(0, 1000, 20))


@pytest.mark.parametrize("count", [400, 501, 1001, 1])
def test_strided_without_such_a_stride_says_so(count):
    with pytest.raises(ValueError, match=f"stride through 1000 timesteps gives {count} of them"):
        strided(1000, count)
