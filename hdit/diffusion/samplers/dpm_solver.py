"""DPM-Solver with steps of orders 1 to 3 in the noise, which chooses its noise levels itself.

Source: Lu et al., 2022, arXiv 2206.00927. lam is -ln(sigma), (b,) float64: images may be at levels
of their own.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hdit.diffusion.broadcast import per_image
from hdit.diffusion.samplers.common import report
from hdit.diffusion.samplers.registry import sampler
from hdit.errors import SolverError
from hdit.protocols import Denoise, NoiseSource, OnStep


def _solver_step(
    denoise: Denoise, x: Tensor, eps: Tensor, lam: Tensor, h: Tensor, order: int, r: float = 0.5
) -> tuple[Tensor, Tensor]:
    """A step of DPM-Solver-`order` (Lu et al., 2022, algorithms 1 and 2) by h (b,) from lam (b,).

    eps = (x - D)/sigma at lam. -> (x at lam + h, the eps at the fraction r of an order above 1).
    """

    def at(fraction: float) -> Tensor:
        return (-(lam + fraction * h)).exp()

    def gain(fraction: float) -> Tensor:
        return torch.expm1(fraction * h)

    def moved(fraction: float) -> Tensor:
        return x - per_image(at(fraction) * gain(fraction), x) * eps

    if order == 1:
        return moved(1), eps
    eps_r = _eps(denoise, moved(r), at(r))
    if order == 2:
        return moved(1) - per_image(at(1) * gain(1) / (2 * r), x) * (eps_r - eps), eps_r
    return _third_order(denoise, x, eps, eps_r, lam, h, r), eps_r


def _third_order(
    denoise: Denoise, x: Tensor, eps: Tensor, eps_r: Tensor, lam: Tensor, h: Tensor, r: float
) -> Tensor:
    """DPM-Solver-3, given the eps at its first stage r; its second is at 2r."""
    r2 = 2 * r
    middle, end = (-(lam + r2 * h)).exp(), (-(lam + h)).exp()
    gain2, gain = torch.expm1(r2 * h), torch.expm1(h)
    x_middle = x - per_image(middle * gain2, x) * eps
    x_middle = x_middle - per_image(middle * (r2 / r) * (gain2 / (r2 * h) - 1), x) * (eps_r - eps)
    eps_middle = _eps(denoise, x_middle, middle)
    x = x - per_image(end * gain, x) * eps
    return x - per_image(end / r2 * (gain / h - 1), x) * (eps_middle - eps)


def _eps(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """sigma (b,) float64 -> the slope (x - D)/sigma."""
    return (x - denoise(x, sigma.to(x.dtype))) / per_image(sigma, x)


def _ends(sigmas: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """lam at the start and at the last positive level, for each image: (b,) float64."""
    last = sigmas[sigmas > 0][-1]
    if len(sigmas) < 2 or last > sigmas[0]:
        raise ValueError(
            "a sigma schedule must have at least two noise levels that decrease, got "
            f"{sigmas[0].item():.6g} to {sigmas[-1].item():.6g} in {len(sigmas)}"
        )
    start, end = (-s.double().log().to(x.device).expand(len(x)) for s in (sigmas[0], last))
    return start, end


@sampler(order=3)
def dpm_fast(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver-fast (Lu et al., 2022, section 3.4): an evaluation for each step of the schedule.

    Of the sigma schedule it takes the number of steps and both ends; in between go steps of order
    3, and one or two of lower order last, even in lam. A sigma schedule that ends in 0 takes its
    last evaluation there; k-diffusion's ends before, and can add noise.
    """
    to_zero = bool(sigmas[-1] == 0)
    thirds, rest = divmod(len(sigmas) - 1 - to_zero, 3)
    orders = [3] * thirds + [rest] if rest else [3] * (thirds - 1) + [2, 1]
    lam, end = _ends(sigmas, x)
    h = (end - lam) / len(orders)
    for i, order in enumerate(orders if (h > 0).all() else []):
        sigma = (-lam).exp()
        eps = _eps(denoise, x, sigma)
        report(on_step, i, x, x - per_image(sigma, x) * eps)
        x, _ = _solver_step(denoise, x, eps, lam, h, order, 1 / 3 if order == 3 else 0.5)
        lam = lam + h
    return denoise(x, (-lam).exp().to(x.dtype)) if to_zero else x


def _step_length(lam: Tensor, end: Tensor, h: Tensor, going: Tensor) -> Tensor:
    """h (b,), but not beyond the end. Raises SolverError if one that is going has shrunk to 0."""
    step = torch.minimum(h, end - lam)
    if (step[going] < 1e-8).any():
        raise SolverError(
            f"the solver came to a stop at sigma {(-lam[going]).exp().max().item():.6g}: the "
            "denoiser is not smooth, or not finite; try a larger rtol, or another sampler"
        )
    return step


def _two_orders(
    denoise: Denoise, x: Tensor, eps: Tensor, lam: Tensor, h: Tensor, order: int
) -> tuple[Tensor, Tensor]:
    """x at lam + h by the order below `order`, and by it; they share their evaluations."""
    r = 0.5 if order == 2 else 1 / 3
    x_low, eps_r = _solver_step(denoise, x, eps, lam, h, order - 1, r)
    if order == 2:
        return x_low, _solver_step(denoise, x, eps, lam, h, 2, r)[0]
    return x_low, _third_order(denoise, x, eps, eps_r, lam, h, r)


@sampler(order=3)
def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: Literal[2, 3] = 3,
    rtol: Annotated[float, Field(ge=1e-9, le=10)] = 0.05,
    atol: Annotated[float, Field(ge=1e-9, le=10)] = 0.0078,
    h_init: Annotated[float, Field(ge=1e-6, le=100, description="first step, of ln sigma")] = 0.05,
) -> Tensor:
    """DPM-Solver-12 or -23 with steps of adaptive length (Lu et al., 2022, appendix C).

    Of the sigma schedule it takes both ends; one that ends in 0 is left by one more evaluation.
    Its tolerances choose the steps: sampling.steps and the schedule's shape do not matter.
    rtol and atol bound the difference of the two orders in a step, its root mean square over an
    image; each image has steps of its own, so that it does not depend on the others in its batch.
    k-diffusion takes both over the whole batch, ends before 0, and can add noise. Raises
    SolverError where steps shrink to nothing.
    """
    if order not in (2, 3):
        raise ValueError(f"order: must be 2 or 3, got {order}")
    lam, end = _ends(sigmas, x)
    h = torch.full_like(lam, h_init)
    low = x  # of the lower order, at the last accepted step
    i = 0
    while (going := lam < end - 1e-5).any():
        step = torch.where(going, _step_length(lam, end, h, going), 1e-3)  # any, at their end
        sigma = (-lam).exp()
        eps = _eps(denoise, x, sigma)
        report(on_step, i, x, x - per_image(sigma, x) * eps)
        x_low, x_high = _two_orders(denoise, x, eps, lam, step, order)
        scale = torch.maximum(x_low.abs(), low.abs()).mul(rtol).clamp(min=atol)
        error = ((x_low - x_high) / scale).flatten(1).square().mean(1).sqrt().double()
        growth = 1 + (((error + 1e-8) ** (-1 / order)) - 1).atan()
        accepted = going & (growth >= 0.81)
        x = torch.where(accepted[:, None, None, None], x_high, x)
        low = torch.where(accepted[:, None, None, None], x_low, low)
        lam = torch.where(accepted, lam + step, lam)
        h = torch.where(going, step * growth.nan_to_num(0.1), h)
        i += 1
    if sigmas[-1] == 0:
        return denoise(x, (-lam).exp().to(x.dtype))
    return x
