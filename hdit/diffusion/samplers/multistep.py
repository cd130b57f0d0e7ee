"""Samplers that use the evaluations of steps before: one evaluation a step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from hdit.diffusion.samplers.common import (
    Eta,
    SNoise,
    Stochastic,
    evaluate,
    noised,
    steps_of,
    towards,
)
from hdit.diffusion.samplers.registry import sampler
from hdit.protocols import Denoise, NoiseSource, OnStep


@sampler(order=4)
def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: Annotated[int, Field(ge=1, le=4, description="steps whose slopes are used")] = 4,
) -> Tensor:
    """Linear multistep (Adams-Bashforth on an uneven sigmas), `order` up to 4.

    The slope is the polynomial through those of the last steps. The first steps are of lower order,
    which bounds the order of the whole at 2.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"order: must be 1 to 4, got {order}")
    slopes: list[Tensor] = []  # newest first
    levels = sigmas.tolist()
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised = evaluate(denoise, x, s, i, on_step)
        slopes = [(x - denoised) / s, *slopes[: order - 1]]
        known = [levels[i - j] for j in range(len(slopes))]
        for j, slope in enumerate(slopes):
            x = x + slope * _lagrange_integral(known, j, s, s_next)
    return x


def _lagrange_integral(nodes: list[float], j: int, start: float, end: float) -> float:
    """Integral of the j-th Lagrange polynomial; Gauss's rule is exact for up to 4 nodes."""
    middle, half = (start + end) / 2, (end - start) / 2
    total = 0.0
    for at in (middle - half / math.sqrt(3), middle + half / math.sqrt(3)):
        others = (node for k, node in enumerate(nodes) if k != j)
        total += math.prod((at - node) / (nodes[j] - node) for node in others)
    return total * half


@sampler(order=2)
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
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised = evaluate(denoise, x, s, i, on_step)
        if s_next == 0:
            return denoised
        h = math.log(s / s_next)
        estimate = denoised
        if previous is not None:
            old, h_old = previous
            estimate = denoised + (denoised - old) * (h / (2 * h_old))
        x = towards(estimate, x, s_next / s)
        previous = denoised, h
    return x


@sampler(order=2, base=Stochastic)
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: Eta = 1.0,
    s_noise: SNoise = 1.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al., 2022, appendix B.3); eta 0 is an ODE, of order 2."""
    previous: tuple[Tensor, float] | None = None  # (denoised, h) of the step before
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised = evaluate(denoise, x, s, i, on_step)
        if s_next == 0:
            return denoised
        h = math.log(s / s_next)
        g = h * (1 + eta)
        gain = -math.expm1(-g)
        x = towards(denoised, x, math.exp(-g))
        if previous is not None:
            old, h_old = previous
            factor = gain / 2 if solver == "midpoint" else 1 - gain / g
            x = x + (denoised - old) * (factor * h / h_old)
        std = s_next * math.sqrt(-math.expm1(-2 * eta * h))
        x = noised(x, std, s_noise, noise, s, s_next)
        previous = denoised, h
    return x


@sampler(order=3, base=Stochastic)
def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: Eta = 1.0,
    s_noise: SNoise = 1.0,
) -> Tensor:
    """DPM-Solver++(3M) SDE (Crowson et al., 2024, after Lu et al., 2022); eta 0 is an ODE.

    As in k-diffusion, the second difference has half the weight that a method of order 3 gives it:
    with eta 0 the order is 2.
    """
    history: list[tuple[Tensor, float]] = []  # (denoised, h) of the steps before, newest first
    for i, (s, s_next) in enumerate(steps_of(sigmas)):
        denoised = evaluate(denoise, x, s, i, on_step)
        if s_next == 0:
            return denoised
        h = math.log(s / s_next)
        g = h * (1 + eta)
        phi1 = -math.expm1(-g)
        phi2 = 1 - phi1 / g
        phi3 = phi2 / g - 0.5
        x = towards(denoised, x, math.exp(-g))
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
        std = s_next * math.sqrt(-math.expm1(-2 * eta * h))
        x = noised(x, std, s_noise, noise, s, s_next)
        history = [(denoised, h), *history[:1]]
    return x
