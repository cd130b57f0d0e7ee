"""Samplers that go down further than the next noise level, and then add noise up to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import Field
from torch import Tensor

from hdit.diffusion.context import Context, Problem
from hdit.diffusion.samplers.common import (
    Eta,
    SNoise,
    Stochastic,
    ancestral_step,
    draw,
    evaluate,
    midpoint_step,
    noised,
    report,
    steps_of,
    towards,
)
from hdit.diffusion.samplers.registry import SamplerSpec, sampler
from hdit.diffusion.vlb import Variance, learned_log_variance, moments_with, posterior_variances
from hdit.protocols import Denoise, NoiseSource, OnStep


class ReverseProcess(SamplerSpec):
    """Base of the spec of `ddpm`, whose variance is learned if the model learns one."""

    def resolved(self, context: Context) -> Self:
        """Fills in the variance where it is absent: learned if the model learns one, else lower."""
        return self.filled(variance="learned" if context.learned_variance else "lower")

    def check(self, context: Context) -> Iterator[Problem]:
        """Yields (key, what is wrong): a learned variance of a model that learns none."""
        options: Any = self  # its fields are those of the function
        if options.variance == "learned" and not context.learned_variance:
            yield (
                "variance",
                "must be 'lower' or 'upper', got 'learned': the model learns none "
                "(diffusion.learned_variance)",
            )


@sampler(order=1, base=Stochastic)
def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: Eta = 1.0,
    s_noise: SNoise = 1.0,
) -> Tensor:
    """Euler's method with the noise of the reverse process; eta 0 is `euler`. Order 1.

    eta 1 is DDPM with the lower variance (Ho et al., 2020), any other eta is DDIM's.
    """
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised = evaluate(denoise, x, s, i, on_step)
        down, up = ancestral_step(s, s_next, eta)
        x = towards(denoised, x, down / s)
        x = noised(x, up, s_noise, noise, s, s_next)
    return x


@sampler(order=1)
def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: Annotated[
        float, Field(ge=0, le=1, description="0 draws no noise, 1 is DDPM's variance")
    ] = 0.0,
) -> Tensor:
    """DDIM (Song et al., 2021, equation 12), which in these coordinates is Euler's ancestral step.

    x / sqrt(1 + sigma^2) is its x; with eta 0 it draws no noise. Order 1.
    """
    return euler_ancestral(denoise, x, sigmas, noise=noise, on_step=on_step, eta=eta)


@sampler(order=1, base=ReverseProcess)
def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    variance: Annotated[
        Variance | None, Field(description="'learned' where the model learns it, else 'lower'")
    ] = None,
) -> Tensor:
    """Ancestral sampling of the reverse process (Ho et al., 2020, algorithm 2).

    The variance of a step is the posterior's ("lower"), beta's ("upper"; the names are of the
    bounds in section 3.2), or between them as the model learnt it (Nichol & Dhariwal, 2021,
    equation 15), for which `denoise` must have `moments`. No noise on the step to 0.
    """
    moments = moments_with(denoise, variance or "lower")
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised, v = moments(x, x.new_full((len(x),), s))
        report(on_step, i, x, denoised)
        x = towards(denoised, x, (s_next / s) ** 2)
        if s_next > 0:
            low, high = posterior_variances(s, s_next)
            log_variance = learned_log_variance(v, math.log(low), math.log(high))
            x = x + draw(noise, s, s_next) * (log_variance / 2).exp()
    return x


@sampler(order=2, base=Stochastic)
def dpm2_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: Eta = 1.0,
    s_noise: SNoise = 1.0,
) -> Tensor:
    """`dpm2` with ancestral noise. 2 evaluations a step, but 1 to sigma 0. Order 2 with eta 0.

    k-diffusion: "dpm_2_ancestral". Where eta above 1 takes a step down to 0, this adds noise up to
    the next level all the same, and k-diffusion's does not.
    """
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised = evaluate(denoise, x, s, i, on_step)
        down, up = ancestral_step(s, s_next, eta)
        x = denoised if down == 0 else midpoint_step(denoise, x, denoised, s, down)
        x = noised(x, up, s_noise, noise, s, s_next)
    return x


@sampler(order=2, base=Stochastic)
def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: Eta = 1.0,
    s_noise: SNoise = 1.0,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al., 2022, algorithm 1) with ancestral noise.

    2 evaluations a step, but 1 to sigma 0. Order 2 with eta 0.
    """
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised = evaluate(denoise, x, s, i, on_step)
        down, up = ancestral_step(s, s_next, eta)
        if down > 0:
            middle = math.sqrt(s * down)
            denoised = evaluate(denoise, towards(denoised, x, middle / s), middle)
        x = towards(denoised, x, down / s)
        x = noised(x, up, s_noise, noise, s, s_next)
    return x


@sampler(order=2, base=Stochastic)
def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: Eta = 1.0,
    s_noise: SNoise = 1.0,
    r: Annotated[
        float, Field(ge=1e-6, lt=1, description="where in the step the second evaluation is")
    ] = 0.5,
) -> Tensor:
    """SDE-DPM-Solver++ of two stages (after Lu et al., 2022, and DPM-Solver-2); eta 0 is an ODE.

    2 evaluations a step, but 1 to sigma 0; the second at the fraction r of the step in lam. Order 2
    with eta 0. The noise of both must be of one path in sigma, as BrownianPath gives it.
    """
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised = evaluate(denoise, x, s, i, on_step)
        if s_next == 0:
            return denoised
        middle = s ** (1 - r) * s_next**r
        down, up = ancestral_step(s, middle, eta)
        x_middle = towards(denoised, x, down / s)
        x_middle = noised(x_middle, up, s_noise, noise, s, middle)
        at_middle = evaluate(denoise, x_middle, middle)
        denoised = denoised + (at_middle - denoised) / (2 * r)
        down, up = ancestral_step(s, s_next, eta)
        x = towards(denoised, x, down / s)
        x = noised(x, up, s_noise, noise, s, s_next)
    return x
