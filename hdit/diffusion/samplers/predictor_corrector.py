"""UniPC, whose evaluations correct the step before and predict the next."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hdit.diffusion.samplers.common import evaluate, steps_of, towards
from hdit.diffusion.samplers.registry import sampler
from hdit.protocols import Denoise, NoiseSource, OnStep


@sampler(order=3)
def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: Annotated[
        int, Field(ge=1, le=3, description="of the predictor; the corrector adds one")
    ] = 2,
) -> Tensor:
    """UniPC, a predictor and corrector of `order` up to 3 (Zhao et al., 2023; data form, B2).

    Each evaluation corrects the x that it was made at and then serves the next prediction. The
    first steps, and the last ones of a sigma schedule that ends in 0, are of lower order.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"order: must be 1 to 3, got {order}")
    steps = steps_of(sigmas)
    known: list[tuple[Tensor, float]] = []  # (denoised, s) of the steps before, newest first
    before, used = x, 0  # x at the step before, and the order of its prediction
    for i, (s, s_next) in enumerate(steps):
        denoised = evaluate(denoise, x, s, i, on_step)
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
    moved = towards(denoised, x, s_next / s)
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
