import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import load

from hdit.diffusion.noise import CosineInterpolated, Lognormal, UniformVP, stratify
from hdit.diffusion.vp import LinearSchedule
from hdit.protocols import Signal

SCHEDULE = LinearSchedule()


def signal(size: int, sigma_data: float = 0.5) -> Signal:
    return Signal(3, size, size, 0, sigma_data)


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
    u = torch.tensor(data["u"], dtype=torch.float64)
    sigma = CosineInterpolated()(1 - u, signal(size), SCHEDULE)
    torch.testing.assert_close(
        sigma, torch.tensor(data[name], dtype=torch.float64), rtol=rtol, atol=0
    )


def test_lognormal_matches_the_reference():
    data = load("sigma_density.json")
    u = torch.tensor(data["u"], dtype=torch.float64)
    expected = torch.tensor(data["lognormal(loc=-1.2,scale=1.2)"], dtype=torch.float64)
    actual = Lognormal()(u, signal(64), SCHEDULE)
    # The reference works in float32: 1e-7 + u keeps one digit at u = 0, and five near 1.
    torch.testing.assert_close(actual[0], expected[0], rtol=3e-2, atol=0)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=2e-5, atol=0)


DENSITIES = [
    CosineInterpolated(),
    CosineInterpolated(sigma_min=0.02, sigma_max=80, noise_d_low=16, noise_d_high=128),
    Lognormal(),
    Lognormal(mean=0.3, std=0.7, sigma_min=0.02, sigma_max=90),
    UniformVP(),
]


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
@given(size=st.sampled_from([8, 32, 64, 1024]))
@settings(max_examples=4, deadline=None)
def test_density_increases_and_keeps_its_bounds(density, size):
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    sigma = density(u, signal(size), SCHEDULE)
    low, high = density.sigma_range(SCHEDULE)
    assert sigma.dtype == torch.float64
    assert (sigma.diff() >= 0).all()
    # 1 - p has lost digits in the upper tail of a lognormal, hence not tighter
    assert sigma[0].item() == pytest.approx(low, rel=1e-8)
    assert sigma[-1].item() == pytest.approx(high, rel=1e-8)


def test_lognormal_is_lognormal():
    """Quantiles against erf, which the inverse CDF does not use."""
    sigma = Lognormal(mean=-0.4, std=1.1)(torch.tensor([0.1, 0.5, 0.8]), signal(8), SCHEDULE)
    z = (sigma.log() + 0.4) / 1.1
    u = 0.5 * (1 + torch.erf(z / 2**0.5))
    torch.testing.assert_close(u, torch.tensor([0.1, 0.5, 0.8]).double(), atol=3e-7, rtol=0)


def test_lognormal_bounds_cut_the_tails_and_keep_the_rest_in_proportion():
    bounded = Lognormal(mean=0, std=1, sigma_min=0.5, sigma_max=2)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = bounded(u, signal(8), SCHEDULE)
    # P(sigma < 1) is 1/2 by symmetry; 20,000 draws have a standard error of 0.0035
    assert (sigma < 1).double().mean().item() == pytest.approx(0.5, abs=0.015)
    assert sigma.min() >= 0.5
    assert sigma.max() <= 2


def test_uniform_vp_draws_each_timestep_alike():
    sigma = UniformVP()((torch.arange(3000) + 0.5) / 3000, signal(8), SCHEDULE)
    values, counts = sigma.unique(return_counts=True)
    assert torch.equal(values, SCHEDULE.sigmas())
    assert (counts == 3).all()


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
