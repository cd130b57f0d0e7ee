"""Samplers, which go down a sigma schedule: one plain function each.

A sampler takes (denoise, x, sigmas): x (b c h w) = x0 + sigmas[0] * noise, and sigmas (n + 1,)
decreasing, float64; the last may be 0. It returns x at sigmas[-1] after n steps. Those that draw
noise take it from `noise(sigma_from, sigma_to)`. In the formulas s is a noise level and s_next the
one after it, lam is -ln(sigma), and h a step in lam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hdit.diffusion.dpm_solver import dpm_adaptive, dpm_fast
from hdit.diffusion.vlb import (
    Variance,
    learned_log_variance,
    moments_with,
    posterior_variances,
)
from hdit.protocols import Denoise, NoiseSource, OnStep, Spec

# ---- steps that samplers share -------------------------------------------------------------------


def _evaluate(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return denoise(x, x.new_full((len(x),), sigma))


def _draw(noise: NoiseSource | None, s: float, s_next: float) -> Tensor:
    if noise is None:
        raise ValueError("a sampler that adds noise needs a source of it: pass noise=")
    return noise(s, s_next)


def _steps(sigmas: Tensor, upwards: bool = False) -> list[tuple[float, float]]:
    """(noise level, the next) of each step; going up, to invert, only where a sampler allows it."""
    steps = list(pairwise(sigmas.tolist()))
    down = all(s > s_next >= 0 for s, s_next in steps)
    up = upwards and all(0 < s < s_next for s, s_next in steps)
    if not steps or not (down or up):
        raise ValueError(
            "a sigma schedule must have at least two noise levels that decrease, the last of them "
            f"at least 0, got {[float(f'{level:.6g}') for level in sigmas.tolist()]}"
        )
    return steps


def _towards(denoised: Tensor, x: Tensor, ratio: float) -> Tensor:
    """D + ratio (x - D): exact from s to ratio * s where D does not change on the way."""
    return denoised + ratio * (x - denoised)


def _ancestral(s: float, s_next: float, eta: float) -> tuple[float, float]:
    """(down, up): go down to `down`, then add noise of std `up` to be at s_next."""
    up = min(s_next, eta * s_next * math.sqrt(s**2 - s_next**2) / s)
    return math.sqrt(s_next**2 - up**2), up


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
    return x + _draw(noise, s, s_next) * (math.sqrt(raised**2 - s**2) * s_noise), raised


def _gammas(
    steps: list[tuple[float, float]], s_churn: float, s_tmin: float, s_tmax: float
) -> list[float]:
    """How far each step is raised; s_churn is the sum over the steps within s_tmin..s_tmax."""
    gamma = min(s_churn / len(steps), math.sqrt(2) - 1)
    return [gamma if s_tmin <= s <= s_tmax else 0.0 for s, _ in steps]


# ---- of Euler's family ---------------------------------------------------------------------------


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method on dx/dsigma = (x - D)/sigma (Karras et al., 2022, algorithm 2). Order 1.

    Up an increasing sigma schedule it inverts, as DDIM's inversion does.
    """
    steps = _steps(sigmas, upwards=True)
    gammas = _gammas(steps, s_churn, s_tmin, s_tmax)
    for i, (s, s_next) in enumerate(steps):
        x, s = _churn(x, s, s_next, gammas[i], s_noise, noise)
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        x = _towards(denoised, x, s_next / s)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method (Karras et al., 2022, algorithm 2): 2 evaluations a step, but 1 to sigma 0.

    Order 2.
    """
    steps = _steps(sigmas)
    gammas = _gammas(steps, s_churn, s_tmin, s_tmax)
    for i, (s, s_next) in enumerate(steps):
        x, s = _churn(x, s, s_next, gammas[i], s_noise, noise)
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if s_next == 0:
            return denoised
        x_next = _towards(denoised, x, s_next / s)
        slope = (x - denoised) / s
        slope_next = (x_next - _evaluate(denoise, x_next, s_next)) / s_next
        x = x + (slope + slope_next) * ((s_next - s) / 2)
    return x


def dpm2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """The midpoint method, at the geometric mean (DPM-Solver-2, Lu et al., 2022).

    2 evaluations a step, but 1 to sigma 0. Order 2. k-diffusion: "dpm_2".
    """
    steps = _steps(sigmas)
    gammas = _gammas(steps, s_churn, s_tmin, s_tmax)
    for i, (s, s_next) in enumerate(steps):
        x, s = _churn(x, s, s_next, gammas[i], s_noise, noise)
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if s_next == 0:
            return denoised
        x = _midpoint(denoise, x, denoised, s, s_next)
    return x


def _midpoint(denoise: Denoise, x: Tensor, denoised: Tensor, s: float, s_next: float) -> Tensor:
    """From s to s_next with the slope at their geometric mean."""
    middle = math.sqrt(s * s_next)
    x_middle = _towards(denoised, x, middle / s)
    slope = (x_middle - _evaluate(denoise, x_middle, middle)) / middle
    return x + slope * (s_next - s)


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep (Adams-Bashforth on an uneven sigmas), `order` up to 4.

    The slope is the polynomial through those of the last steps. The first steps are of lower order,
    which bounds the order of the whole at 2.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"order: must be 1 to 4, got {order}")
    slopes: list[Tensor] = []  # newest first
    levels = sigmas.tolist()
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
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


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method with the noise of the reverse process; eta 0 is `euler`. Order 1.

    eta 1 is DDPM with the lower variance (Ho et al., 2020), any other eta is DDIM's.
    """
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        down, up = _ancestral(s, s_next, eta)
        x = _towards(denoised, x, down / s)
        if up > 0:
            x = x + _draw(noise, s, s_next) * (up * s_noise)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al., 2021, equation 12), which in these coordinates is Euler's ancestral step.

    x / sqrt(1 + sigma^2) is its x; with eta 0 it draws no noise. Order 1.
    """
    return euler_ancestral(denoise, x, sigmas, noise=noise, on_step=on_step, eta=eta)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    variance: Variance = "lower",
) -> Tensor:
    """Ancestral sampling of the reverse process (Ho et al., 2020, algorithm 2).

    The variance of a step is the posterior's ("lower"), beta's ("upper"; the names are of the
    bounds in section 3.2), or between them as the model learnt it (Nichol & Dhariwal, 2021,
    equation 15), for which `denoise` must have `moments`. No noise on the step to 0.
    """
    moments = moments_with(denoise, variance)
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised, v = moments(x, x.new_full((len(x),), s))
        if on_step:
            on_step(i, x, denoised)
        x = _towards(denoised, x, (s_next / s) ** 2)
        if s_next > 0:
            low, high = posterior_variances(s, s_next)
            log_variance = learned_log_variance(v, math.log(low), math.log(high))
            x = x + _draw(noise, s, s_next) * (log_variance / 2).exp()
    return x


def dpm2_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """`dpm2` with ancestral noise. 2 evaluations a step, but 1 to sigma 0. Order 2 with eta 0.

    k-diffusion: "dpm_2_ancestral".
    """
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        down, up = _ancestral(s, s_next, eta)
        x = denoised if down == 0 else _midpoint(denoise, x, denoised, s, down)
        if up > 0:
            x = x + _draw(noise, s, s_next) * (up * s_noise)
    return x


# ---- of DPM-Solver's family ----------------------------------------------------------------------


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al., 2022, algorithm 1) with ancestral noise.

    2 evaluations a step, but 1 to sigma 0. Order 2 with eta 0.
    """
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        down, up = _ancestral(s, s_next, eta)
        if down > 0:
            middle = math.sqrt(s * down)
            denoised = _evaluate(denoise, _towards(denoised, x, middle / s), middle)
        x = _towards(denoised, x, down / s)
        if up > 0:
            x = x + _draw(noise, s, s_next) * (up * s_noise)
    return x


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """SDE-DPM-Solver++ of two stages (after Lu et al., 2022, and DPM-Solver-2); eta 0 is an ODE.

    2 evaluations a step, but 1 to sigma 0; the second at the fraction r of the step in lam. Order 2
    with eta 0. The noise of both must be of one path, as BrownianPath gives it.
    """
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if s_next == 0:
            return denoised
        middle = s ** (1 - r) * s_next**r
        down, up = _ancestral(s, middle, eta)
        x_middle = _towards(denoised, x, down / s)
        if up > 0:
            x_middle = x_middle + _draw(noise, s, middle) * (up * s_noise)
        at_middle = _evaluate(denoise, x_middle, middle)
        denoised = denoised + (at_middle - denoised) / (2 * r)
        down, up = _ancestral(s, s_next, eta)
        x = _towards(denoised, x, down / s)
        if up > 0:
            x = x + _draw(noise, s, s_next) * (up * s_noise)
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
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if s_next == 0:
            return denoised
        h = math.log(s / s_next)
        estimate = denoised
        if previous is not None:
            old, h_old = previous
            estimate = denoised + (denoised - old) * (h / (2 * h_old))
        x = _towards(estimate, x, s_next / s)
        previous = denoised, h
    return x


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
    """SDE-DPM-Solver++(2M) (Lu et al., 2022, appendix B.3); eta 0 is an ODE, of order 2."""
    previous: tuple[Tensor, float] | None = None  # (denoised, h) of the step before
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if s_next == 0:
            return denoised
        h = math.log(s / s_next)
        g = h * (1 + eta)
        gain = -math.expm1(-g)
        x = _towards(denoised, x, math.exp(-g))
        if previous is not None:
            old, h_old = previous
            factor = gain / 2 if solver == "midpoint" else 1 - gain / g
            x = x + (denoised - old) * (factor * h / h_old)
        if eta:
            std = s_next * math.sqrt(-math.expm1(-2 * eta * h))
            x = x + _draw(noise, s, s_next) * (std * s_noise)
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
    """DPM-Solver++(3M) SDE (Crowson et al., 2024, after Lu et al., 2022); eta 0 is an ODE.

    As in k-diffusion, the second difference has half the weight that a method of order 3 gives it:
    with eta 0 the order is 2.
    """
    history: list[tuple[Tensor, float]] = []  # (denoised, h) of the steps before, newest first
    for i, (s, s_next) in enumerate(_steps(sigmas)):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if s_next == 0:
            return denoised
        h = math.log(s / s_next)
        g = h * (1 + eta)
        phi1 = -math.expm1(-g)
        phi2 = 1 - phi1 / g
        phi3 = phi2 / g - 0.5
        x = _towards(denoised, x, math.exp(-g))
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
            std = s_next * math.sqrt(-math.expm1(-2 * eta * h))
            x = x + _draw(noise, s, s_next) * (std * s_noise)
        history = [(denoised, h), *history[:1]]
    return x


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: int = 2,
) -> Tensor:
    """UniPC, a predictor and corrector of `order` up to 3 (Zhao et al., 2023; data form, B2).

    Each evaluation corrects the x that it was made at and then serves the next prediction. The
    first steps, and the last ones of a sigma schedule that ends in 0, are of lower order.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"order: must be 1 to 3, got {order}")
    steps = _steps(sigmas)
    known: list[tuple[Tensor, float]] = []  # (denoised, s) of the steps before, newest first
    before, used = x, 0  # x at the step before, and the order of its prediction
    for i, (s, s_next) in enumerate(steps):
        denoised = _evaluate(denoise, x, s)
        if on_step:
            on_step(i, x, denoised)
        if known:
            x = _unified(before, known[:used], s, denoised)
        known = [(denoised, s), *known[: order - 1]]
        left = len(steps) - i if steps[-1][1] == 0 else order
        before, used = x, min(order, len(known), left)
        x = _unified(x, known[:used], s_next)
    return x


def _unified(
    x: Tensor, known: list[tuple[Tensor, float]], s_next: float, at_next: Tensor | None = None
) -> Tensor:
    """From x at the newest known level to s_next: UniP, or UniC where D at s_next is known too."""
    denoised, s = known[0]
    moved = _towards(denoised, x, s_next / s)
    h = math.inf if s_next == 0 else math.log(s / s_next)
    others = [(d, math.log(s / level) / h) for d, level in known[1:]]  # (D, place in the step)
    if at_next is not None:
        others.append((at_next, 1.0))
    if not others:
        return moved
    weights = _unified_weights([place for _, place in others], h)
    for weight, (d, place) in zip(weights, others, strict=True):
        moved = moved - math.expm1(-h) * weight / place * (d - denoised)
    return moved


def _unified_weights(places: list[float], h: float) -> list[float]:
    """Solves sum_k weight_k place_k^(j-1) = b_j (Zhao et al., equations 5 to 7, B2(h) = e^h - 1).

    Alone, a point has weight 1/2: any weight near it is of the same order.
    """
    if len(places) == 1:
        return [0.5]
    phi, factorial, b = math.expm1(-h) / -h - 1, 1.0, []
    for j in range(1, len(places) + 1):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= j + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor([[p**j for p in places] for j in range(len(places))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()


# ---- the settings of each ------------------------------------------------------------------------


class SamplerSpec(Spec):
    """A sampler's function with its options bound."""

    function: ClassVar[Callable[..., Tensor]]
    nominal_order: ClassVar[int]  # of convergence, without noise

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        noise: NoiseSource | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        options = self.model_dump(exclude={"kind"}, exclude_none=True)
        return type(self).function(denoise, x, sigmas, noise=noise, on_step=on_step, **options)


class Churned(SamplerSpec):
    s_churn: float = Field(0.0, ge=0, description="noise added and removed; 0 is an ODE")
    s_tmin: float = Field(0.0, ge=0, description="no churn at noise levels below")
    s_tmax: float | None = Field(None, gt=0, description="no churn at noise levels above")
    s_noise: float = Field(1.0, ge=0, description="factor on the noise that is added")

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.s_churn == 0 and (self.s_tmin, self.s_tmax, self.s_noise) != (0, None, 1):
            raise ValueError("s_tmin, s_tmax and s_noise have no effect without s_churn; set it")
        if self.s_tmax is not None and self.s_tmin > self.s_tmax:
            raise ValueError("s_tmin must be at most s_tmax")
        return self


class Stochastic(SamplerSpec):
    eta: float = Field(1.0, ge=0, description="0 is an ODE, 1 the reverse SDE")
    s_noise: float = Field(1.0, ge=0, description="factor on the noise that is added")

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.eta == 0 and self.s_noise != 1:
            raise ValueError("s_noise has no effect with eta = 0, which adds no noise")
        return self


class Euler(Churned):
    kind: Literal["euler"] = "euler"
    function, nominal_order = staticmethod(euler), 1


class Heun(Churned):
    kind: Literal["heun"] = "heun"
    function, nominal_order = staticmethod(heun), 2


class DPM2(Churned):
    kind: Literal["dpm2"] = "dpm2"
    function, nominal_order = staticmethod(dpm2), 2


class LMS(SamplerSpec):
    kind: Literal["lms"] = "lms"
    function, nominal_order = staticmethod(lms), 4
    order: int = Field(4, ge=1, le=4, description="steps whose slopes are used")


class EulerAncestral(Stochastic):
    kind: Literal["euler_ancestral"] = "euler_ancestral"
    function, nominal_order = staticmethod(euler_ancestral), 1


class DPM2Ancestral(Stochastic):
    kind: Literal["dpm2_ancestral"] = "dpm2_ancestral"
    function, nominal_order = staticmethod(dpm2_ancestral), 2


class DDIM(SamplerSpec):
    kind: Literal["ddim"] = "ddim"
    function, nominal_order = staticmethod(ddim), 1
    eta: float = Field(0.0, ge=0, le=1, description="0 draws no noise, 1 is DDPM's variance")


class DDPM(SamplerSpec):
    kind: Literal["ddpm"] = "ddpm"
    function, nominal_order = staticmethod(ddpm), 1
    variance: Variance | None = Field(
        None, description="'learned' where the model learns it, else 'lower'"
    )


class DPMpp2SAncestral(Stochastic):
    kind: Literal["dpmpp_2s_ancestral"] = "dpmpp_2s_ancestral"
    function, nominal_order = staticmethod(dpmpp_2s_ancestral), 2


class DPMppSDE(Stochastic):
    kind: Literal["dpmpp_sde"] = "dpmpp_sde"
    function, nominal_order = staticmethod(dpmpp_sde), 2
    r: float = Field(0.5, gt=0, lt=1, description="where in the step the second evaluation is")


class DPMpp2M(SamplerSpec):
    kind: Literal["dpmpp_2m"] = "dpmpp_2m"
    function, nominal_order = staticmethod(dpmpp_2m), 2


class DPMpp2MSDE(Stochastic):
    kind: Literal["dpmpp_2m_sde"] = "dpmpp_2m_sde"
    function, nominal_order = staticmethod(dpmpp_2m_sde), 2
    solver: Literal["midpoint", "heun"] = "midpoint"


class DPMpp3MSDE(Stochastic):
    kind: Literal["dpmpp_3m_sde"] = "dpmpp_3m_sde"
    function, nominal_order = staticmethod(dpmpp_3m_sde), 3


class UniPC(SamplerSpec):
    kind: Literal["unipc"] = "unipc"
    function, nominal_order = staticmethod(unipc), 3
    order: int = Field(2, ge=1, le=3, description="of the predictor; the corrector adds one")


class DPMFast(SamplerSpec):
    kind: Literal["dpm_fast"] = "dpm_fast"
    function, nominal_order = staticmethod(dpm_fast), 3


class DPMAdaptive(SamplerSpec):
    """Its tolerances choose the steps: sampling.steps and sampling.sigmas' shape do not matter."""

    kind: Literal["dpm_adaptive"] = "dpm_adaptive"
    function, nominal_order = staticmethod(dpm_adaptive), 3
    order: Literal[2, 3] = 3
    rtol: float = Field(0.05, gt=0)
    atol: float = Field(0.0078, gt=0)
    h_init: float = Field(0.05, gt=0, description="first step, of ln sigma")


Sampler = Annotated[
    Euler
    | Heun
    | DPM2
    | LMS
    | EulerAncestral
    | DPM2Ancestral
    | DDIM
    | DDPM
    | DPMpp2SAncestral
    | DPMppSDE
    | DPMpp2M
    | DPMpp2MSDE
    | DPMpp3MSDE
    | UniPC
    | DPMFast
    | DPMAdaptive,
    Field(discriminator="kind"),
]
