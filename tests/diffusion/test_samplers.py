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
