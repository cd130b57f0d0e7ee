"""Variance-preserving schedules as noise levels: sigma_t = sqrt((1 - abar_t) / abar_t)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from hdit.limits import MAX_STEPS
from hdit.protocols import Spec


class BetaSchedule(Spec):
    """T timesteps, each with a noise level; timestep 0 has the lowest."""

    steps: int = Field(1000, gt=1, le=MAX_STEPS, description="number T of timesteps")

    def betas(self) -> Tensor:
        """(T,) float64: abar_t is the running product of 1 - beta."""
        raise NotImplementedError

    def sigmas(self, device: torch.device | None = None) -> Tensor:
        """(T,) float64, increasing."""
        return _sigmas(self, device or torch.device("cpu"))

    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level: those of timesteps 0 and T-1."""
        return float(self.sigmas()[0]), float(self.sigmas()[-1])

    def t(self, sigma: Tensor) -> Tensor:
        """The timestep at which the noise level is sigma (b,): (b,) float64, linear in ln sigma
        between the table's entries, exact at each of them, clamped to 0..T-1 beyond its ends."""
        table = self.sigmas(sigma.device).log()
        log_sigma = sigma.double().log().contiguous()
        left = torch.searchsorted(table, log_sigma, right=True).clamp(1, self.steps - 1) - 1
        fraction = (log_sigma - table[left]) / (table[left + 1] - table[left])
        return left + fraction.clamp(0, 1)

    def sigma(self, t: Tensor) -> Tensor:
        """The inverse of `t`: the noise level at timestep t (b,), clamped to 0..T-1 -> float64."""
        table = self.sigmas(t.device)
        t = t.double().clamp(0, self.steps - 1)
        left = t.long().clamp(max=self.steps - 2)
        between = torch.lerp(table[left].log(), table[left + 1].log(), t - left).exp()
        return torch.where(t == t.round(), table[t.round().long()], between)


class LinearSchedule(BetaSchedule):
    """Betas linear from beta_start to beta_end (Ho et al., 2020), both scaled by 1000/steps."""

    kind: Literal["linear"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1, description="first beta, at 1000 steps")
    beta_end: float = Field(2e-2, gt=0, lt=1, description="last beta, at 1000 steps")

    @model_validator(mode="after")
    def _betas_stay_below_one(self) -> Self:
        largest = max(self.beta_start, self.beta_end) * 1000 / self.steps
        if largest >= 1:
            raise ValueError(
                f"with {self.steps} steps the betas, scaled by 1000/steps, reach {largest:.3g}; "
                "they must stay below 1: take more steps or smaller betas"
            )
        return self

    def betas(self) -> Tensor:
        """(T,) float64, evenly spaced from beta_start to beta_end, times 1000/steps."""
        scale = 1000 / self.steps
        start, end = scale * self.beta_start, scale * self.beta_end
        return torch.linspace(start, end, self.steps, dtype=torch.float64)


class CosineSchedule(BetaSchedule):
    """abar(t) ~ cos^2 of (t/T + shift)/(1 + shift) pi/2, betas cut at beta_max.

    Source: Nichol & Dhariwal, 2021, equation 17.
    """

    kind: Literal["cosine"] = "cosine"
    shift: float = Field(0.008, ge=0, le=1, description="keeps the first betas from vanishing")
    beta_max: float = Field(0.999, gt=0, lt=1, description="largest beta")

    def betas(self) -> Tensor:
        """(T,) float64: 1 - abar(t + 1)/abar(t), at most beta_max."""
        t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        alpha_bar = torch.cos((t + self.shift) / (1 + self.shift) * (math.pi / 2)).square()
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.beta_max)


def _linear_if_unnamed(value: Any) -> Any:
    return {"kind": "linear", **value} if isinstance(value, dict) else value


AnyBetaSchedule = Annotated[
    LinearSchedule | CosineSchedule,
    Field(discriminator="kind"),
    BeforeValidator(_linear_if_unnamed),
]


@lru_cache(maxsize=16)
def _sigmas(table: BetaSchedule, device: torch.device) -> Tensor:
    log_alpha_bar = torch.log1p(-table.betas()).cumsum(0)
    return torch.expm1(-log_alpha_bar).sqrt().to(device)


def respaced(steps: int, counts: Sequence[int]) -> list[int]:
    """Timesteps of 0..steps-1, increasing: counts[i] of them spread over the i-th equal section.

    Each section contributes its first and last timestep and, rounded half to even, those between
    (Nichol & Dhariwal, 2021, and DiT's sampling). Raises ValueError where a section is too short.
    """
    size, extra = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 0 < count <= length:
            raise ValueError(
                f"cannot take {count} timesteps of {length}"
                + (f", a section of {steps}" if len(counts) > 1 else "")
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # accumulated as the reference does: its rounding depends on it
        start += length
    return kept


def strided(steps: int, count: int) -> list[int]:
    """`count` timesteps of 0..steps-1 at a whole stride from 0 (Song et al., 2021, DDIM).

    Raises ValueError where no whole stride gives that number.
    """
    possible = {len(range(0, steps, stride)): stride for stride in range(steps - 1, 0, -1)}
    if count in possible:
        return list(range(0, steps, possible[count]))
    near = sorted(possible, key=lambda n: abs(n - count))[:2]
    raise ValueError(
        f"no whole stride through {steps} timesteps gives {count} of them; "
        f"the nearest are {' and '.join(map(str, sorted(near)))}"
    )
