"""Ladders of noise levels, and samplers that go down them: one plain function each.

A sampler takes (denoise, x, sigmas): x (b c h w) = x0 + sigmas[0] * noise, and sigmas (n + 1,)
decreasing, float64; the last may be 0. It returns x at sigmas[-1] after n steps. Those that draw
noise take it from `noise(sigma_from, sigma_to)`. lam is -ln(sigma), and h a step in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hdit.protocols import Denoise, NoiseSource, OnStep, Spec

# ---- ladders ------------------------------------------------------------------------------------


class Karras(Spec):
    """sigma^(1/rho) is linear (Karras et al., 2022, equation 5)."""

    kind: Literal["karras"] = "karras"
    rho: float = Field(7.0, gt=0)

    def __call__(self, n: int, sigma_min: float, sigma_max: float) -> Tensor:
        """n noise levels from sigma_max to sigma_min, then 0: (n + 1,) float64."""
        low, high = sigma_min ** (1 / self.rho), sigma_max ** (1 / self.rho)
        return _append_zero(torch.linspace(high, low, n, dtype=torch.float64) ** self.rho)


class Exponential(Spec):
    """ln sigma is linear."""

    kind: Literal["exponential"] = "exponential"

    def __call__(self, n: int, sigma_min: float, sigma_max: float) -> Tensor:
        """n noise levels from sigma_max to sigma_min, then 0: (n + 1,) float64."""
        low, high = math.log(sigma_min), math.log(sigma_max)
        return _append_zero(torch.linspace(high, low, n, dtype=torch.float64).exp())


Ladder = Annotated[Karras | Exponential, Field(discriminator="kind")]


def _append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


# ---- steps that samplers share -------------------------------------------------------------------


def _evaluate(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return denoise(x, x.new_full((len(x),), sigma))


def _draw(noise: NoiseSource | None, sigma: float, sigma_next: float) -> Tensor:
    if noise is None:
        raise ValueError("a stochastic sampler needs a source of noise: pass noise=, or eta=0")
    return noise(sigma, sigma_next)


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(sigmas.tolist()))


# ---- deterministic samplers ----------------------------------------------------------------------


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method on dx/dsigma = (x - D)/sigma (Karras et al., 2022, algorithm 1). Order 1."""
    for i, (s, t) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        x = x + (x - denoised) * ((t - s) / s)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method (Karras et al., 2022, algorithm 1): 2 evaluations a step, but 1 to sigma 0.

    Order 2.
    """
    for i, (s, t) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        slope = (x - denoised) / s
        x_next = x + slope * (t - s)
        if t > 0:
            slope_next = (x_next - _evaluate(denoise, x_next, t)) / t
            x_next = x + (slope + slope_next) * ((t - s) / 2)
        x = x_next
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2). Order 2."""
    previous: tuple[Tensor, float] | None = None  # (denoised, h) of the step before
    for i, (s, t) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if t == 0:
            return denoised
        h = math.log(s / t)
        estimate = denoised
        if previous is not None:
            old, h_old = previous
            estimate = denoised + (denoised - old) * (h / (2 * h_old))
        x = (t / s) * x - math.expm1(-h) * estimate
        previous = denoised, h
    return x


# ---- stochastic samplers -------------------------------------------------------------------------


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al., 2022, appendix B.3); eta 0 is an ODE."""
    previous: tuple[Tensor, float] | None = None  # (denoised, h) of the step before
    for i, (s, t) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if t == 0:
            return denoised
        h = math.log(s / t)
        g = h * (1 + eta)
        gain = -math.expm1(-g)
        x = math.exp(-g) * x + gain * denoised
        if previous is not None:
            old, h_old = previous
            factor = gain / 2 if solver == "midpoint" else 1 - gain / g
            x = x + (denoised - old) * (factor * h / h_old)
        if eta:
            x = x + _draw(noise, s, t) * (t * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise)
        previous = denoised, h
    return x


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(3M) SDE (Crowson et al., 2024, after Lu et al., 2022); eta 0 is an ODE."""
    history: list[tuple[Tensor, float]] = []  # (denoised, h) of the steps before, newest first
    for i, (s, t) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if t == 0:
            return denoised
        h = math.log(s / t)
        g = h * (1 + eta)
        phi1 = -math.expm1(-g)
        phi2 = 1 - phi1 / g
        phi3 = phi2 / g - 0.5
        x = math.exp(-g) * x + phi1 * denoised
        if len(history) == 2:
            (d1, h1), (d2, h2) = history
            r0, r1 = h1 / h, h2 / h
            slope0, slope1 = (denoised - d1) / r0, (d1 - d2) / r1
            first = slope0 + (slope0 - slope1) * (r0 / (r0 + r1))
            second = (slope0 - slope1) / (r0 + r1)
            x = x + phi2 * first - phi3 * second
        elif len(history) == 1:
            d1, h1 = history[0]
            x = x + phi2 * (denoised - d1) * (h / h1)
        if eta:
            x = x + _draw(noise, s, t) * (t * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise)
        history = [(denoised, h), *history[:1]]
    return x


# ---- the settings of each ------------------------------------------------------------------------


class SamplerSpec(Spec):
    """A sampler's function with its options bound."""

    function: ClassVar[Callable[..., Tensor]]

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        noise: NoiseSource | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        options = self.model_dump(exclude={"kind"})
        return type(self).function(denoise, x, sigmas, noise=noise, on_step=on_step, **options)


class Euler(SamplerSpec):
    kind: Literal["euler"] = "euler"
    function = staticmethod(euler)


class Heun(SamplerSpec):
    kind: Literal["heun"] = "heun"
    function = staticmethod(heun)


class DPMpp2M(SamplerSpec):
    kind: Literal["dpmpp_2m"] = "dpmpp_2m"
    function = staticmethod(dpmpp_2m)


class DPMpp2MSDE(SamplerSpec):
    kind: Literal["dpmpp_2m_sde"] = "dpmpp_2m_sde"
    function = staticmethod(dpmpp_2m_sde)
    eta: float = Field(1.0, ge=0, description="0 is an ODE, 1 the reverse SDE")
    s_noise: float = Field(1.0, ge=0, description="factor on the noise that is added")
    solver: Literal["midpoint", "heun"] = "midpoint"


class DPMpp3MSDE(SamplerSpec):
    kind: Literal["dpmpp_3m_sde"] = "dpmpp_3m_sde"
    function = staticmethod(dpmpp_3m_sde)
    eta: float = Field(1.0, ge=0, description="0 is an ODE, 1 the reverse SDE")
    s_noise: float = Field(1.0, ge=0, description="factor on the noise that is added")


Sampler = Annotated[Euler | Heun | DPMpp2M | DPMpp2MSDE | DPMpp3MSDE, Field(discriminator="kind")]
