"""Samplers against the schedulers of diffusers, which are written in VP coordinates.

Both go down the same timesteps with the same network. The tolerance is that of diffusers' tables,
which are float32 whatever the dtype of x.
"""

import math

import pytest
import torch
from known_answers import hfill

from hdit.diffusion.beta_schedules import LinearSchedule
from hdit.diffusion.denoiser import Denoiser
from hdit.diffusion.parametrization import EpsVP
from hdit.diffusion.samplers import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, unipc
from hdit.diffusion.sigmas import LinearT
from hdit.protocols import Cond

diffusers = pytest.importorskip("diffusers", reason="the extra [dev] brings diffusers, the oracle")

pytestmark = pytest.mark.filterwarnings(  # diffusers with NumPy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SHAPE = (2, 3, 4, 4)
BETAS = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
SCHEDULE = LinearSchedule()


def eps(x, t):
    """A network that is linear neither in x nor in t."""
    return torch.sin(1.3 * x) + 0.4 * x + 0.3 * torch.cos(t / 200)


def network(x, c_noise, cond):
    return eps(x, c_noise[:, None, None, None])


def network_with_variance(x, c_noise, cond):
    return torch.cat([network(x, c_noise, cond), torch.tanh(x) - 0.2], dim=1)


def x_vp():
    return hfill(SHAPE, 5000, 1.7).double()


def noise_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def theirs(scheduler, n, backbone=network, **options):
    scheduler.set_timesteps(n)
    x = x_vp() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = backbone(x, torch.full((len(x),), float(t), dtype=x.dtype), Cond())
        drawn = {name: value() if callable(value) else value for name, value in options.items()}
        x = scheduler.step(output, t, x, **drawn).prev_sample
    return x


def ours(sampler, timesteps, backbone=network, learned=False, **options):
    """From the same x, over the noise levels of these timesteps and then 0."""
    denoiser = Denoiser(backbone, EpsVP(), "timestep", 0.5, SCHEDULE, learned_variance=learned)
    levels = SCHEDULE.sigmas()[torch.as_tensor(timesteps)]
    sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    x = x_vp() * math.hypot(1, sigmas[0].item())
    return sampler(denoiser.bind(Cond()), x, sigmas, **options)


@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_that_of_diffusers(n, eta):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    noise = noise_of(1)
    variance_noise = {"eta": eta, "variance_noise": noise} if eta else {}
    expected = theirs(scheduler, n, **variance_noise)
    timesteps = scheduler.timesteps
    sigmas = LinearT(stride=True)(n, *SCHEDULE.sigma_range(), SCHEDULE)
    torch.testing.assert_close(sigmas[:-1], SCHEDULE.sigmas()[timesteps], rtol=0, atol=0)
    actual = ours(ddim, timesteps, noise=noise_of(1), eta=eta)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize(
    ("variance", "name"),
    [("lower", "fixed_small"), ("upper", "fixed_large"), ("learned", "learned_range")],
)
def test_ddpm_is_that_of_diffusers(n, variance, name):
    scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type=name)
    learned = variance == "learned"
    backbone = network_with_variance if learned else network
    generator = torch.Generator().manual_seed(2)
    expected = theirs(scheduler, n, backbone, generator=generator)
    actual = ours(
        ddpm, scheduler.timesteps, backbone, learned, noise=noise_of(2), variance=variance
    )
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("n", [10, 50])
def test_dpmpp_2m_is_that_of_diffusers(n):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", lower_order_final=False, final_sigmas_type="zero"
    )
    expected = theirs(scheduler, n)
    actual = ours(dpmpp_2m, scheduler.timesteps)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpmpp_2m_sde_is_that_of_diffusers(solver):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="sde-dpmsolver++",
        solver_type=solver,
        lower_order_final=False,
        final_sigmas_type="zero",
    )
    expected = theirs(scheduler, 20, variance_noise=noise_of(3))
    actual = ours(dpmpp_2m_sde, scheduler.timesteps, noise=noise_of(3), solver=solver)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 5, 30])
def test_unipc_is_that_of_diffusers(order, n):
    scheduler = diffusers.UniPCMultistepScheduler(
        **BETAS, solver_order=order, lower_order_final=True, final_sigmas_type="zero"
    )
    expected = theirs(scheduler, n)
    actual = ours(unipc, scheduler.timesteps, order=order)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)
