"""Samplers, which go down a sigma schedule: one plain function each.

A sampler takes (denoise, x, sigmas): x (b c h w) = x0 + sigmas[0] * noise, and sigmas (n + 1,)
decreasing, float64; the last may be 0. It returns x at sigmas[-1] after n steps. Those that draw
noise take it from `noise(sigma_from, sigma_to)`. In the formulas s is a noise level and s_next the
one after it, lam is -ln(sigma), and h a step in lam. To add one, write its function in the module
of its family under `@sampler`, and name it here.
"""

from hdit.diffusion.samplers.ancestral import (
    ddim,
    ddpm,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler_ancestral,
)
from hdit.diffusion.samplers.churned import dpm2, euler, heun
from hdit.diffusion.samplers.dpm_solver import dpm_adaptive, dpm_fast
from hdit.diffusion.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms
from hdit.diffusion.samplers.predictor_corrector import unipc
from hdit.diffusion.samplers.registry import Sampler, SamplerSpec, sampler, spec_of

__all__ = [
    "Sampler",
    "SamplerSpec",
    "ddim",
    "ddpm",
    "dpm2",
    "dpm2_ancestral",
    "dpm_adaptive",
    "dpm_fast",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "sampler",
    "spec_of",
    "unipc",
]
