"""Variance-preserving schedules as noise levels: sigma_t = sqrt((1 - abar_t) / abar_t)."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hdit.protocols import Spec


class LinearSchedule(Spec):
    """Betas linear from beta_start to beta_end (Ho et al., 2020), both scaled by 1000/steps."""

    kind: Literal["linear"] = "linear"
    steps: int = Field(1000, gt=1, description="number T of timesteps")
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(2e-2, gt=0, lt=1)

    @model_validator(mode="after")
    def _betas_stay_below_one(self) -> Self:
        largest = max(self.beta_start, self.beta_end) * 1000 / self.steps
        if largest >= 1:
            raise ValueError(
                f"with {self.steps} steps the betas, scaled by 1000/steps, reach {largest:.3g}; "
                "they must stay below 1: take more steps or smaller betas"
            )
        return self

    def sigmas(self, device: torch.device | None = None) -> Tensor:
        """(T,) float64, increasing."""
        return _sigmas(self, device or torch.device("cpu"))

    def sigma_range(self) -> tuple[float, float]:
        return float(self.sigmas()[0]), float(self.sigmas()[-1])

    def t(self, sigma: Tensor) -> Tensor:
        """The timestep at which the noise level is sigma (b,): (b,) float64, linear in ln sigma
        between the table's entries, exact at each of them, clamped to 0..T-1 beyond its ends."""
        table = self.sigmas(sigma.device).log()
        log_sigma = sigma.double().log().contiguous()
        left = torch.searchsorted(table, log_sigma, right=True).clamp(1, self.steps - 1) - 1
        fraction = (log_sigma - table[left]) / (table[left + 1] - table[left])
        return left + fraction.clamp(0, 1)


@lru_cache(maxsize=16)
def _sigmas(spec: LinearSchedule, device: torch.device) -> Tensor:
    scale = 1000 / spec.steps
    start, end = scale * spec.beta_start, scale * spec.beta_end
    betas = torch.linspace(start, end, spec.steps, dtype=torch.float64)
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return torch.expm1(-log_alpha_bar).sqrt().to(device)
