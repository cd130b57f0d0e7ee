import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import load

from hdit.data.batches import Layout
from hdit.diffusion.beta_schedules import CosineSchedule, LinearSchedule
from hdit.diffusion.densities import (
    TAIL,
    CosineInterpolated,
    Density,
    DensitySpec,
    LogitNormalFlow,
    LogLogistic,
    Lognormal,
    LogUniform,
    SplitLognormal,
    UniformFlow,
    UniformVP,
    VDiffusion,
    stratify,
)
from hdit.protocols import DataShape

SCHEDULE = LinearSchedule()
KINDS = get_args(get_args(Density)[0])


def shape(size: int, sigma_data: float = 0.5) -> DataShape:
    return DataShape(3, size, size, 0, sigma_data)


def float64(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "rtol"),
    [
        ("cosine-interpolated(image 256,low 32,high 256,sd .5,min 1e-3,max 1e3)", 256, 2e-5),
        ("cosine-interpolated(image 1024,low 32,high 1024,sd .5)", 1024, 2e-5),
        ("cosine-interpolated(image 32,low 32,high 32,sd .5)", 32, 1e-4),  # fp32 there, near u=0
        ("cosine-interpolated f64(image 256,low 32,high 256,sd .5)", 256, 1e-9),
    ],
)
def test_cosine_interpolated_matches_the_reference_at_1_minus_u(name, size, rtol):
    data = load("sigma_density.json")
    u = float64(data["u"])
    sigma = CosineInterpolated()(1 - u, shape(size), SCHEDULE)
    torch.testing.assert_close(sigma, float64(data[name]), rtol=rtol, atol=0)


def test_lognormal_matches_the_reference():
    data = load("sigma_density.json")
    u = float64(data["u"])
    expected = float64(data["lognormal(loc=-1.2,scale=1.2)"])
    actual = Lognormal()(u, shape(64), SCHEDULE)
    # The reference works in float32: 1e-7 + u keeps one digit at u = 0, and five near 1.
    torch.testing.assert_close(actual[0], expected[0], rtol=3e-2, atol=0)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "density", "sigma_data", "rtol"),
    [
        # rounded to float32, of float64 values
        (
            "loglogistic(loc=log(.5),scale=.5,min .01,max 80)",
            LogLogistic(sigma_min=0.01, sigma_max=80),
            0.5,
            1e-7,
        ),
        ("loguniform(min .01,max 160)", LogUniform(), 0.5, 1e-6),
        # float32 throughout: near 1 the error of an angle grows by sigma/sd, 480 at u = 0.999
        ("v-diffusion(sd .5,min 1e-3,max 1e3)", VDiffusion(), 0.5, 5e-5),
        ("v-diffusion(sd 1,min 0,max inf)", VDiffusion(sigma_min=1e-9, sigma_max=1e9), 1.0, 5e-5),
    ],
)
def test_density_matches_the_reference(name, density, sigma_data, rtol):
    data = load("sigma_density.json")
    actual = density(float64(data["u"]), shape(64, sigma_data), SCHEDULE)
    # atol: sigma_min 1e-9 stands for 0
    torch.testing.assert_close(actual, float64(data[name]), rtol=rtol, atol=2e-9)


def test_loglogistic_matches_the_reference_but_for_its_tails():
    """Without bounds sigma is 0 at u = 0 in the reference; ours leaves out 1e-7 on either side."""
    data = load("sigma_density.json")
    u, expected = (
        float64(data[k]) for k in ("u", "loglogistic(loc=log(.5),scale=.5,min 0,max inf)")
    )
    actual = LogLogistic()(u, shape(64), SCHEDULE)
    assert expected[0] == 0
    assert actual[0].item() == pytest.approx(0.5 * (TAIL / (1 - TAIL)) ** 0.5, rel=1e-9)
    # which moves u by at most 1e-7, and ln sigma by 0.5 * 1e-7 / (u (1 - u)): 5e-5 at u = 0.999
    torch.testing.assert_close(actual[1:], expected[1:], rtol=6e-5, atol=0)


def test_split_lognormal_matches_the_reference_at_the_u_of_its_draws():
    """The reference draws |n| and the side; P(|n| of a normal > z) = erfc(z / sqrt 2)."""
    expected = load("sigma_density.json")[
        "split-lognormal(loc .2,scale1 1.3,scale2 .6; |n|=[1,.5,.5,2,2],u=[.1,.1,.9,.3,.7])"
    ]
    below = 1.3 / (1.3 + 0.6)
    p = [
        below * math.erfc(z / 2**0.5) if side < below else 1 - (1 - below) * math.erfc(z / 2**0.5)
        for z, side in zip([1, 0.5, 0.5, 2, 2], [0.1, 0.1, 0.9, 0.3, 0.7], strict=True)
    ]
    u = (float64(p) - TAIL) / (1 - 2 * TAIL)
    density = SplitLognormal(mode=0.2, std_low=1.3, std_high=0.6)
    # theirs is float32
    torch.testing.assert_close(
        density(u, shape(64), SCHEDULE), float64(expected), rtol=1e-6, atol=0
    )


# ---- against the distributions in closed form ----------------------------------------------------


def normal_cdf(z: float) -> float:
    return math.erfc(-z / 2**0.5) / 2


def split_normal_cdf(x: float, low: float, high: float) -> float:
    """Of two half normals that meet at 0 with the same density."""
    if x < 0:
        return 2 * low / (low + high) * normal_cdf(x / low)
    return 1 - 2 * high / (low + high) * normal_cdf(-x / high)


def flow_time(sigma: float) -> float:
    return sigma / (1 + sigma)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# kind -> (the spec's settings for a location m and a scale s, the CDF of sigma at these)
FAMILIES: dict[type, tuple[Callable[..., dict], Callable[..., float]]] = {
    Lognormal: (
        lambda m, s: {"mean": m, "std": s},
        lambda x, m, s, sd: normal_cdf((math.log(x) - m) / s),
    ),
    SplitLognormal: (
        lambda m, s: {"mode": m, "std_low": s, "std_high": 1.7 * s},
        lambda x, m, s, sd: split_normal_cdf(math.log(x) - m, s, 1.7 * s),
    ),
    LogLogistic: (
        lambda m, s: {"loc": m, "scale": s},
        lambda x, m, s, sd: 1 / (1 + (x / math.exp(m)) ** (-1 / s)),
    ),
    LogUniform: (lambda m, s: {}, lambda x, m, s, sd: math.log(x)),
    VDiffusion: (lambda m, s: {}, lambda x, m, s, sd: math.atan2(x, sd)),
    UniformFlow: (lambda m, s: {}, lambda x, m, s, sd: flow_time(x)),
    LogitNormalFlow: (
        lambda m, s: {"mean": m, "std": s},
        lambda x, m, s, sd: normal_cdf((logit(flow_time(x)) - m) / s),
    ),
}


def test_every_density_is_tested_against_its_distribution():
    assert {*FAMILIES, CosineInterpolated, UniformVP} == set(KINDS)


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)
@given(
    m=st.floats(-2, 2),
    s=st.floats(0.3, 2),
    start=st.floats(-4, 3),
    width=st.floats(0.3, 4),
    sigma_data=st.sampled_from([0.5, 1.0]),
)
@settings(max_examples=12, deadline=None)
def test_density_is_its_distribution_cut_at_the_bounds(kind, m, s, start, width, sigma_data):
    """At random bounds, within 4 standard deviations where 1 - F keeps its digits."""
    low, high = math.exp(m + s * start), math.exp(m + s * min(start + width, 4))
    settings_of, cdf_of = FAMILIES[kind]
    density = kind(**settings_of(m, s), sigma_min=low, sigma_max=high)
    u = torch.linspace(0, 1, 25, dtype=torch.float64)
    sigma = density(u, shape(8, sigma_data), SCHEDULE)
    assert sigma.dtype == torch.float64
    assert (sigma.diff() > 0).all()
    assert density.sigma_range(shape(8, sigma_data), SCHEDULE) == pytest.approx(
        (low, high), rel=1e-9
    )
    cdf = [cdf_of(x, m, s, sigma_data) for x in (low, *sigma.tolist(), high)]
    first, *inner, last = cdf
    # F(high) - F(low) is at least 2e-5, and each F is exact to some 1e-16
    torch.testing.assert_close((float64(inner) - first) / (last - first), u, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "density",
    [
        Lognormal(mean=2, std=0.8, sigma_min=0.01),
        Lognormal(mean=-3, std=0.8, sigma_max=157.4),
        SplitLognormal(std_high=0.5, sigma_max=80),
        LogLogistic(scale=0.1, sigma_max=157.4),
        LogitNormalFlow(mean=-0.3),
        LogitNormalFlow(mean=0.5, std=0.6),
        VDiffusion(sigma_max=1e12),
        UniformFlow(sigma_max=1e12),
    ],
    ids=repr,
)
def test_density_keeps_a_bound_far_out_in_a_tail(density):
    """1e-6 is what a config allows a density beyond the range of its parametrization."""
    low, high = density.sigma_range(shape(8), SCHEDULE)
    if density.sigma_min is not None:
        assert low == pytest.approx(density.sigma_min, rel=1e-6)
    if density.sigma_max is not None:
        assert high == pytest.approx(density.sigma_max, rel=1e-6)


@given(
    low=st.floats(1e-3, 1),
    ratio=st.floats(1.5, 1e4),
    d_low=st.floats(4, 64),
    d_high=st.floats(4, 1024),
    sigma_data=st.sampled_from([0.5, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_cosine_interpolated_increases_between_its_bounds(low, ratio, d_low, d_high, sigma_data):
    high = low * ratio
    density = CosineInterpolated(
        sigma_min=low, sigma_max=high, noise_d_low=d_low, noise_d_high=d_high
    )
    where = shape(64, sigma_data)
    sigma = density(torch.linspace(0, 1, 101), where, SCHEDULE)
    assert sigma.dtype == torch.float64
    assert (sigma.diff() > 0).all()
    assert density.sigma_range(where, SCHEDULE) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("d", [16, 64, 256])
def test_cosine_interpolated_between_equal_ends_is_the_shifted_cosine_schedule(d):
    """atan(d/size sigma/sd) is uniform between its values at the bounds (Hoogeboom et al.)."""
    density = CosineInterpolated(noise_d_low=d, noise_d_high=d)
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    angle = (density(u, shape(64), SCHEDULE) / 0.5 * (d / 64)).atan()
    expected = torch.lerp(angle[0], angle[-1], u)
    # the angles are of order 1 and exact; those of the reference have another test
    torch.testing.assert_close(angle, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "low"), [(8, 8), (32, 32), (256, 32)])
def test_cosine_interpolated_by_default_shifts_no_image_below_32_pixels(size, low):
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    by_default = CosineInterpolated()(u, shape(size), SCHEDULE)
    named = CosineInterpolated(noise_d_low=low, noise_d_high=size)(u, shape(size), SCHEDULE)
    assert torch.equal(by_default, named)
    if size <= 32:
        torch.testing.assert_close(by_default, VDiffusion()(u, shape(size), SCHEDULE))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("size", [8, 256])
def test_density_by_default_increases_from_end_to_end(kind, size):
    density: DensitySpec = kind()
    sigma = density(torch.linspace(0, 1, 1001, dtype=torch.float64), shape(size), SCHEDULE)
    low, high = density.sigma_range(shape(size), SCHEDULE)
    assert (sigma.diff() >= 0).all()
    assert (sigma[0].item(), sigma[-1].item()) == (low, high)
    assert 0 < low < 1 < high < math.inf


@pytest.mark.parametrize(
    "kind", [Lognormal, SplitLognormal, LogLogistic], ids=lambda kind: kind.__name__
)
def test_density_without_a_bound_leaves_out_a_ten_millionth_there(kind):
    settings_of, cdf_of = FAMILIES[kind]
    chosen, where = settings_of(-0.7, 0.6), (shape(8), SCHEDULE)
    low, high = kind(**chosen).sigma_range(*where)
    # 1 - 1e-7 has 9 digits of the tail
    assert cdf_of(low, -0.7, 0.6, 0.5) == pytest.approx(1e-7, rel=1e-8)
    assert 1 - cdf_of(high, -0.7, 0.6, 0.5) == pytest.approx(1e-7, rel=1e-8)
    below, above = kind(**chosen, sigma_max=0.4), kind(**chosen, sigma_min=0.4)
    assert below.sigma_range(*where) == pytest.approx((low, 0.4), rel=1e-9)
    assert above.sigma_range(*where) == pytest.approx((0.4, high), rel=1e-9)


# ---- timesteps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SCHEDULE, CosineSchedule(), LinearSchedule(steps=300)])
def test_uniform_vp_draws_each_timestep_alike(schedule):
    n = schedule.steps
    sigma = UniformVP()((torch.arange(3 * n) + 0.5) / (3 * n), shape(8), schedule)
    values, counts = sigma.unique(return_counts=True)
    assert torch.equal(values, schedule.sigmas())
    assert (counts == 3).all()
    assert UniformVP().sigma_range(shape(8), schedule) == schedule.sigma_range()


# ---- strata --------------------------------------------------------------------------------------


def test_stratify_matches_the_reference():
    expected = load("sigma_density.json")["stratified(u=.25,n=4,groups=3)"]
    for group, values in expected.items():
        position = torch.arange(int(group), 12, 3)
        u = stratify(torch.full((4,), 0.25), position, 12)
        torch.testing.assert_close(u, torch.tensor(values), atol=1e-7, rtol=0)


@given(total=st.integers(1, 64), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_stratify_puts_one_draw_into_each_stratum(total, seed):
    rand = torch.rand(total, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = stratify(rand, torch.arange(total), total)
    assert torch.equal((u * total).floor().long(), torch.arange(total))


@given(
    processes=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    size=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_stratify_covers_the_global_batch_however_it_is_shared(processes, accumulate, size, seed):
    total = processes * accumulate * size
    rng = torch.Generator().manual_seed(seed)
    seen: list[torch.Tensor] = []
    for rank in range(processes):
        layout = Layout(total, accumulate, processes, rank)
        for step in range(accumulate):
            position = torch.from_numpy(layout.positions(step))
            rand = torch.rand(size, generator=rng, dtype=torch.float64)
            seen.append(stratify(rand, position, total))
    strata = (torch.cat(seen) * total).floor().long()
    assert torch.equal(strata.sort().values, torch.arange(total))


@pytest.mark.parametrize(
    "density",
    [
        Lognormal(mean=0, std=0.1, sigma_min=0.01, sigma_max=100),
        SplitLognormal(std_low=3, std_high=0.1, sigma_min=1e-3, sigma_max=100),
    ],
    ids=repr,
)
def test_density_stays_within_bounds_whose_probability_no_float_can_hold(density):
    sigma = density(torch.linspace(0, 1, 101), shape(8), SCHEDULE)
    assert (sigma.diff() >= 0).all()
    assert sigma.min() >= density.sigma_min
    assert sigma.max() <= density.sigma_max
