import math

import pytest
import torch
from known_answers import check_record, hfill, load

from hdit.diffusion import samplers
from hdit.diffusion.samplers import Exponential, Karras

SHAPE = (2, 3, 4, 4)


def gaussian(sd: float = 0.5):
    """The exact denoiser of data that is N(0, sd^2) in every element."""
    return lambda x, sigma: x * (sd**2 / (sd**2 + sigma**2))[:, None, None, None]


def gaussian_solution(x: torch.Tensor, sigma: float, end: float, sd: float = 0.5) -> torch.Tensor:
    """The probability-flow ODE of that data, from sigma down to end, in closed form."""
    return x * math.sqrt((sd**2 + end**2) / (sd**2 + sigma**2))


class ScriptedNoise:
    """The i-th call gives the i-th noise of the vectors; remembers what it was asked."""

    def __init__(self, dtype: torch.dtype):
        self.calls, self.dtype = [], dtype

    def __call__(self, sigma: float, sigma_next: float) -> torch.Tensor:
        self.calls.append((sigma, sigma_next))
        return hfill(SHAPE, 6000 + len(self.calls) - 1, 1.7).to(self.dtype)


@pytest.mark.parametrize("case", ["smin0.01_smax160", "smin0.002_smax80"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("key", "function", "options"),
    [
        ("euler", samplers.euler, {}),
        ("heun", samplers.heun, {}),
        ("dpmpp_2m", samplers.dpmpp_2m, {}),
        *[
            (
                f"dpmpp_2m_sde_{solver}_eta{eta}",
                samplers.dpmpp_2m_sde,
                {"eta": eta, "solver": solver},
            )
            for solver in ("midpoint", "heun")
            for eta in (0, 1)
        ],
        *[(f"dpmpp_3m_sde_eta{eta}", samplers.dpmpp_3m_sde, {"eta": eta}) for eta in (0, 0.5, 1)],
    ],
)
def test_sampler_matches_the_reference(key, function, options, dtype, case):
    record = load("samplers.json")["cases"][f"{str(dtype).removeprefix('torch.')}_{case}"][key]
    low, high = (float(part[4:]) for part in case.split("_"))  # sigmas[0] is high to float32
    ladder = {(0.01, 160.0): "karras(10,.01,160,rho7)", (0.002, 80.0): "karras(10,.002,80,rho7)"}
    sigmas = torch.tensor(load("schedules_ema_lr.json")[ladder[low, high]]).double()
    x = (hfill(SHAPE, 5000, 1.7) * high).to(dtype)
    noise = ScriptedNoise(dtype)
    out = function(gaussian(), x, sigmas, noise=noise, **options)
    rtol, atol = (1e-5, 5e-5) if dtype == torch.float32 else (1e-9, 1e-9)
    check_record(out, record, atol, rtol)
    if "noise_calls" in record and options:
        torch.testing.assert_close(
            noise.calls, [tuple(c) for c in record["noise_calls"]], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize(
    ("name", "ladder", "args"),
    [
        ("karras(10,.01,160,rho7)", Karras(), (10, 0.01, 160)),
        ("karras(10,.002,80,rho7)", Karras(), (10, 0.002, 80)),
        ("karras(5,.01,160,rho3)", Karras(rho=3), (5, 0.01, 160)),
        ("exponential(10,.01,160)", Exponential(), (10, 0.01, 160)),
    ],
)
def test_ladder_matches_the_reference(name, ladder, args):
    expected = torch.tensor(load("schedules_ema_lr.json")[name], dtype=torch.float64)
    torch.testing.assert_close(ladder(*args), expected, rtol=3e-6, atol=0)  # theirs is float32


@pytest.mark.parametrize(
    ("function", "order"),
    [
        (samplers.euler, 1),
        (samplers.heun, 2),
        (samplers.dpmpp_2m, 2),
        (lambda *a: samplers.dpmpp_2m_sde(*a, eta=0), 2),
        (lambda *a: samplers.dpmpp_3m_sde(*a, eta=0), 2),  # its first step is of order 1
    ],
)
def test_sampler_converges_to_the_exact_solution_at_its_order(function, order):
    """Slope of the error between 40 and 80 steps, on the Gaussian denoiser in float64."""
    x = hfill(SHAPE, 5000, 1.7).double() * 20
    errors = []
    for n in (40, 80):
        sigmas = Exponential()(n, 0.05, 20)[:-1]
        end = function(gaussian(), x, sigmas)
        errors.append((end - gaussian_solution(x, 20, 0.05)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_exact_solution_matches_the_reference():
    case = load("samplers.json")["cases"]["float64_smin0.01_smax160"]
    x = (hfill(SHAPE, 5000, 1.7) * 160.0).double()
    check_record(gaussian_solution(x, 160, 0.0), case["exact_x0"], 1e-9)


@pytest.mark.parametrize("function", [samplers.dpmpp_2m_sde, samplers.dpmpp_3m_sde])
def test_sde_sampler_gives_the_variance_of_the_data(function):
    """4,096 independent pixels of N(0, 0.25): the standard error of the std is 0.0055."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, 32, 32)

    def noise(sigma: float, sigma_next: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sigmas = Karras()(50, 0.01, 80)
    x = function(gaussian(), noise(0, 0) * 80, sigmas, noise=noise)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("function", [samplers.dpmpp_2m_sde, samplers.dpmpp_3m_sde])
def test_sde_sampler_without_noise_says_so(function):
    with pytest.raises(ValueError, match="noise"):
        function(gaussian(), torch.ones(SHAPE), Karras()(3, 0.1, 10))


@pytest.mark.parametrize("spec", [samplers.Euler(), samplers.Heun(), samplers.DPMpp2M()])
def test_sampler_on_a_ladder_of_one_level_denoises_once(spec):
    x = hfill(SHAPE, 1).double()
    out = spec(gaussian(), x, Karras()(1, 2.0, 2.0))
    torch.testing.assert_close(out, x * 0.25 / 4.25)


def test_sampler_reports_each_step_and_passes_its_options():
    seen, noise = [], ScriptedNoise(torch.float64)
    spec = samplers.DPMpp2MSDE(eta=0.5, solver="heun")
    x, sigmas = hfill(SHAPE, 1).double() * 10, Karras()(5, 0.1, 10)
    out = spec(gaussian(), x, sigmas, noise=noise, on_step=lambda i, x, d: seen.append(i))
    assert seen == [0, 1, 2, 3, 4]
    direct = samplers.dpmpp_2m_sde(
        gaussian(), x, sigmas, noise=ScriptedNoise(torch.float64), eta=0.5, solver="heun"
    )
    assert torch.equal(out, direct)


@pytest.mark.parametrize("ladder", [Karras(), Karras(rho=2), Exponential()])
def test_ladder_goes_from_max_to_min_then_zero(ladder):
    sigmas = ladder(17, 0.02, 75.0)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == 18
    assert (sigmas.diff() < 0).all()
    assert sigmas[[0, -2, -1]].tolist() == pytest.approx([75.0, 0.02, 0.0], rel=1e-12)
