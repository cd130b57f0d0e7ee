"""Samplers that can raise the noise before each step (Karras et al., 2022, algorithm 2)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from hdit.bounds import Sigma, SigmaOrZero
from hdit.diffusion.samplers.common import (
    SNoise,
    draw,
    evaluate,
    midpoint_step,
    steps_of,
    towards,
)
from hdit.diffusion.samplers.registry import SamplerSpec, sampler
from hdit.protocols import Denoise, NoiseSource, OnStep

SChurn = Annotated[float, Field(ge=0, le=1e6, description="noise added and removed; 0 is an ODE")]
STmin = Annotated[SigmaOrZero, Field(description="no churn at noise levels below")]
STmax = Annotated[Sigma | None, Field(description="no churn at noise levels above")]


class Churned(SamplerSpec):
    """Base of the specs with the options of churn."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        options: Any = self  # its fields are those of the function
        others = options.s_tmin, options.s_tmax, options.s_noise
        if options.s_churn == 0 and others != (0, None, 1):
            raise ValueError("s_tmin, s_tmax and s_noise have no effect without s_churn; set it")
        if options.s_tmax is not None and options.s_tmin > options.s_tmax:
            raise ValueError("s_tmin must be at most s_tmax")
        return self


def _churn(
    x: Tensor,
    s: float,
    s_next: float,
    gamma: float,
    s_noise: float,
    noise: NoiseSource | None,
) -> tuple[Tensor, float]:
    """x raised from s to s (1 + gamma) by new noise (Karras et al., 2022, algorithm 2)."""
    if gamma == 0:
        return x, s
    raised = s * (1 + gamma)
    return x + draw(noise, s, s_next) * (math.sqrt(raised**2 - s**2) * s_noise), raised


def _gammas(
    steps: list[tuple[float, float]], s_churn: float, s_tmin: float, s_tmax: float | None
) -> list[float]:
    """How far each step is raised; s_churn is the sum over the steps within s_tmin..s_tmax."""
    highest = math.inf if s_tmax is None else s_tmax
    gamma = min(s_churn / len(steps), math.sqrt(2) - 1)
    return [gamma if s_tmin <= s <= highest else 0.0 for s, _ in steps]


@sampler(order=1, base=Churned)
def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_churn: SChurn = 0.0,
    s_tmin: STmin = 0.0,
    s_tmax: STmax = None,
    s_noise: SNoise = 1.0,
) -> Tensor:
    """Euler's method on dx/dsigma = (x - D)/sigma (Karras et al., 2022, algorithm 2). Order 1.

    Up an increasing sigma schedule it inverts, as DDIM's inversion does.
    """
    steps = steps_of(sigmas, upwards=True)
    gammas = _gammas(steps, s_churn, s_tmin, s_tmax)
    for i, (s, s_next) in enumerate(steps):
        x, s = _churn(x, s, s_next, gammas[i], s_noise, noise)
        denoised = evaluate(denoise, x, s, i, on_step)
        x = towards(denoised, x, s_next / s)
    return x


@sampler(order=2, base=Churned)
def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_churn: SChurn = 0.0,
    s_tmin: STmin = 0.0,
    s_tmax: STmax = None,
    s_noise: SNoise = 1.0,
) -> Tensor:
    """Heun's method (Karras et al., 2022, algorithm 2): 2 evaluations a step, but 1 to sigma 0.

    Order 2.
    """
    steps = steps_of(sigmas)
    gammas = _gammas(steps, s_churn, s_tmin, s_tmax)
    for i, (s, s_next) in enumerate(steps):
        x, s = _churn(x, s, s_next, gammas[i], s_noise, noise)
        denoised = evaluate(denoise, x, s, i, on_step)
        if s_next == 0:
            return denoised
        x_next = towards(denoised, x, s_next / s)
        slope = (x - denoised) / s
        slope_next = (x_next - evaluate(denoise, x_next, s_next)) / s_next
        x = x + (slope + slope_next) * ((s_next - s) / 2)
    return x


@sampler(order=2, base=Churned)
def dpm2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_churn: SChurn = 0.0,
    s_tmin: STmin = 0.0,
    s_tmax: STmax = None,
    s_noise: SNoise = 1.0,
) -> Tensor:
    """The midpoint method, at the geometric mean (DPM-Solver-2, Lu et al., 2022).

    2 evaluations a step, but 1 to sigma 0. Order 2. k-diffusion: "dpm_2".
    """
    steps = steps_of(sigmas)
    gammas = _gammas(steps, s_churn, s_tmin, s_tmax)
    for i, (s, s_next) in enumerate(steps):
        x, s = _churn(x, s, s_next, gammas[i], s_noise, noise)
        denoised = evaluate(denoise, x, s, i, on_step)
        if s_next == 0:
            return denoised
        x = midpoint_step(denoise, x, denoised, s, s_next)
    return x
