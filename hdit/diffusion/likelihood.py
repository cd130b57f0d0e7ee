"""Log-likelihood of images under the probability-flow ODE (Song et al., 2021, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hdit.errors import SolverError
from hdit.protocols import Denoise


class Likelihood(NamedTuple):
    """ln p(x) of each image of a batch, and what it took to compute."""

    nats: Tensor  # (b,) ln of the density of x, summed over dimensions
    evaluations: int  # of the denoiser and of its gradient


def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    probe: Tensor,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Likelihood:
    """ln p(x) of x (b c h w) at noise level sigma_min, by the change of variables up to sigma_max.

    There the density is taken as N(0, sigma_max^2). The divergence is Hutchinson's estimate with
    one `probe` for the whole way, shaped as x: of 1 and -1 at random (Rademacher), unbiased over
    them, exact where the Jacobian of the denoiser is diagonal. Solved in ln(sigma) by `dopri5`,
    whose steps are those that the hardest image of the batch needs: rtol and atol bound the error
    of one step, as a root mean square over x and ln p together.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min must be above 0 and below sigma_max, got {sigma_min:g} and {sigma_max:g}"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("needs gradients of the denoiser: call it outside torch.inference_mode")
    b, size = len(x), x[0].numel()
    probe = probe.to(x)
    evaluations = 0

    def slope(log_sigma: float, state: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            at = state[:, :size].view_as(x).detach().requires_grad_()
            flow = at - denoise(at, at.new_full((b,), math.exp(log_sigma)))
            [vjp] = torch.autograd.grad((flow * probe).sum(), at)
        divergence = (vjp * probe).flatten(1).sum(1)
        return torch.cat([flow.detach().flatten(1), divergence[:, None]], dim=1)

    start = torch.cat([x.flatten(1), x.new_zeros(b, 1)], dim=1)  # (b size+1)
    end = dopri5(slope, start, math.log(sigma_min), math.log(sigma_max), rtol, atol)
    noise, change = end[:, :size], end[:, size]
    prior = -(noise / sigma_max).square().sum(1) / 2
    prior = prior - size * (math.log(sigma_max) + math.log(2 * math.pi) / 2)
    return Likelihood(prior + change, evaluations)


def dequantize(images: Tensor, u: Tensor) -> Tensor:
    """uint8 (b c h w), and as many u uniform in [0, 1) -> about -1..1, in the dtype of u.

    Uniform over the bin of each value, whose middle is the value's own place in training.
    """
    return (images.to(u.dtype) + u - 0.5) / 127.5 - 1


def bits_per_dim(nats: Tensor, size: int) -> Tensor:
    """Of 8-bit images with `size` values, whose dequantized density has this logarithm: (b,)."""
    return -nats / (size * math.log(2)) + math.log2(127.5)


# Dormand & Prince, 1980: times, stages, and the weights of orders 5 and 4.
TIMES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
FIFTH = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
FOURTH = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)


def dopri5(
    slope: Callable[[float, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    rtol: float,
    atol: float,
) -> Tensor:
    """y (b n) at `end` of dy/dt = slope(t, y), by the method of Dormand and Prince of order 5.

    A step is taken where the root mean square of every row's error, over atol + rtol |y|, is at
    most 1. Raises SolverError where steps shrink to nothing.
    """
    t, h = start, (end - start) / 20
    k1 = slope(t, y)
    while t < end:
        last = h >= end - t
        h = min(h, end - t)
        if not last and h < 1e-10 * (end - start):
            raise SolverError(
                f"the solver came to a stop at {t:.6g} of {start:.6g} to {end:.6g}: the slope is "
                "not smooth, or not finite; try a larger tolerance"
            )
        k = [k1]
        for time, stage in zip(TIMES[1:], STAGES[1:], strict=True):
            k.append(slope(t + time * h, y + h * _combine(stage, k)))
        y_next = y + h * _combine(FIFTH, k)
        k.append(slope(t + h, y_next))
        difference = y_next - (y + h * _combine(FOURTH, k))
        scale = atol + rtol * torch.maximum(y.abs(), y_next.abs())
        error = float((difference / scale).square().mean(1).sqrt().max())
        if error <= 1:
            t, y, k1 = end if last else t + h, y_next, k[-1]
        growth = 0.9 * error**-0.2 if error > 0 else 10.0
        h *= min(max(growth, 0.2), 10.0) if math.isfinite(error) else 0.2
    return y


def _combine(weights: tuple[float, ...], k: list[Tensor]) -> Tensor:
    total = torch.zeros_like(k[0])
    for weight, slope in zip(weights, k, strict=True):
        if weight:
            total = total + weight * slope
    return total
