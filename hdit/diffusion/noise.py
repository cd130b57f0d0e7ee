"""Densities of training noise levels, as increasing inverse CDFs u in [0, 1] -> sigma (float64)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hdit.diffusion.vp import LinearSchedule
from hdit.protocols import Signal, Spec

TAIL = 1e-7  # probability cut off at each end of a lognormal without bounds


def stratify(rand: Tensor, position: Tensor, total: int) -> Tensor:
    """(position + rand) / total: one u in each of `total` strata, for images at these positions.

    rand (b,) uniform in [0, 1) and position (b,) in 0..total-1, of the batch over all processes.
    """
    return (position + rand) / total


class CosineInterpolated(Spec):
    """Shifted cosine schedules: that of noise_d_low at high noise, of noise_d_high at low noise.

    Source: Hoogeboom et al., 2023, equation 5; with sigma_data as in Crowson et al., 2024.
    """

    kind: Literal["cosine_interpolated"] = "cosine_interpolated"
    sigma_min: float = Field(1e-3, gt=0)
    sigma_max: float = Field(1e3, gt=0)
    noise_d_low: float | None = Field(None, gt=0, description="pixels; min(32, image) if absent")
    noise_d_high: float | None = Field(None, gt=0, description="pixels; the image's side if absent")

    def __call__(self, u: Tensor, signal: Signal, schedule: LinearSchedule) -> Tensor:
        size = max(signal.height, signal.width)
        low, high = self.noise_d_low or min(32, size), self.noise_d_high or size
        return signal.sigma_data * torch.exp(
            u * self._log_ratio(u, low / size, signal.sigma_data)
            + (1 - u) * self._log_ratio(u, high / size, signal.sigma_data)
        )

    def _log_ratio(self, u: Tensor, r: float, sigma_data: float) -> Tensor:
        """ln(sigma/sd) of the cosine schedule shifted by r = d/size."""
        start = math.atan(r * self.sigma_min / sigma_data)
        end = math.atan(r * self.sigma_max / sigma_data)
        return torch.log(torch.tan(start + u.double() * (end - start)) / r)

    def sigma_range(self, schedule: LinearSchedule) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max


class Lognormal(Spec):
    """ln sigma is normal (Karras et al., 2022), cut at the bounds where there are any."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = Field(-1.2, ge=-20, le=20, description="of ln sigma")
    std: float = Field(1.2, gt=0, le=20, description="of ln sigma")
    sigma_min: float | None = Field(None, gt=0)
    sigma_max: float | None = Field(None, gt=0)

    def __call__(self, u: Tensor, signal: Signal, schedule: LinearSchedule) -> Tensor:
        low, high = (
            self._probability(self.sigma_min, TAIL),
            self._probability(self.sigma_max, 1 - TAIL),
        )
        z = torch.special.ndtri(low + u.double() * (high - low))
        return torch.exp(self.mean + self.std * z)

    def _probability(self, sigma: float | None, default: float) -> float:
        if sigma is None:
            return default
        return 0.5 * math.erfc((self.mean - math.log(sigma)) / (self.std * math.sqrt(2)))

    def sigma_range(self, schedule: LinearSchedule) -> tuple[float, float]:
        z = float(torch.special.ndtri(torch.tensor(1 - TAIL, dtype=torch.float64)))
        low = math.exp(self.mean - self.std * z) if self.sigma_min is None else self.sigma_min
        high = math.exp(self.mean + self.std * z) if self.sigma_max is None else self.sigma_max
        return low, high


class UniformVP(Spec):
    """Each timestep of the schedule with equal probability (Ho et al., 2020)."""

    kind: Literal["uniform_vp"] = "uniform_vp"

    def __call__(self, u: Tensor, signal: Signal, schedule: LinearSchedule) -> Tensor:
        t = (u.double() * schedule.steps).long().clamp(max=schedule.steps - 1)
        return schedule.sigmas(u.device)[t]

    def sigma_range(self, schedule: LinearSchedule) -> tuple[float, float]:
        return schedule.sigma_range()


Density = Annotated[CosineInterpolated | Lognormal | UniformVP, Field(discriminator="kind")]
