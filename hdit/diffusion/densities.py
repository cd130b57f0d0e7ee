"""Densities of training noise levels, as increasing inverse CDFs u in [0, 1] -> sigma (float64)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from hdit.bounds import Scale, Sigma
from hdit.diffusion.beta_schedules import BetaSchedule
from hdit.diffusion.context import Context, DependentSpec, Problem
from hdit.diffusion.parametrization import FLOW_SIGMA_MAX
from hdit.protocols import DataShape

TAIL = 1e-7  # probability cut off where a density has an end without a bound


def stratify(rand: Tensor, position: Tensor, total: int) -> Tensor:
    """(position + rand) / total: one u in each of `total` strata, for images at these positions.

    rand (b,) uniform in [0, 1) and position (b,) in 0..total-1, of the batch over all processes.
    """
    return (position + rand) / total


class DensitySpec(DependentSpec):
    """Base of the densities."""

    by_timesteps: ClassVar[bool] = False  # whether it is defined by a beta schedule
    fix: ClassVar[str] = "take another density"  # where it leaves the range of the denoiser

    def __call__(self, u: Tensor, shape: DataShape, schedule: BetaSchedule) -> Tensor:
        """u (b,) in [0, 1] -> sigma (b,) float64, increasing in u."""
        raise NotImplementedError

    def sigma_range(self, shape: DataShape, schedule: BetaSchedule) -> tuple[float, float]:
        """The lowest and the highest noise level that it gives."""
        low, high = self(torch.tensor([0.0, 1.0]), shape, schedule).tolist()
        return low, high

    def check(self, context: Context) -> Iterator[Problem]:
        """Yields (key, what is wrong): noise levels outside the range of the denoiser."""
        start, end = self.sigma_range(context.shape, context.beta_schedule)
        yield from (("", text) for text in context.misfits(start, end, self.fix))


class WithBounds(DensitySpec):
    """Base of the densities between two noise levels; `usual` are those where none are set."""

    sigma_min: Sigma | None = Field(None, description="the usual one if absent")
    sigma_max: Sigma | None = Field(None, description="the usual one if absent")
    usual: ClassVar[tuple[float | None, float | None]]
    fix = "set sigma_min and sigma_max within it"

    def bounds(self) -> tuple[float | None, float | None]:
        """(lowest, highest) noise level, or None where there is no bound."""
        return self.sigma_min or self.usual[0], self.sigma_max or self.usual[1]

    def interval(self) -> tuple[float, float]:
        """The same, of a density that is never without a bound."""
        low, high = self.bounds()
        assert low is not None, f"{type(self).__name__}.usual has no lowest level"
        assert high is not None, f"{type(self).__name__}.usual has no highest level"
        return low, high

    def resolved(self, context: Context) -> Self:
        """Fills in the usual bounds, but those of the denoiser where these are closer."""
        low, high, _ = context.valid_range
        start, end = self.usual
        return self.filled(
            sigma_min=max(start or 0.0, low) or None,
            sigma_max=None if end is None and high == math.inf else min(end or high, high),
        )


class Bounded(WithBounds):
    """Base of the densities that are a distribution F cut at sigma_min and sigma_max.

    sigma is the quantile of a probability that goes from F(sigma_min) to F(sigma_max). Where a
    bound is absent, a probability of 1e-7 is cut off instead. Every probability comes with its
    complement, so that a bound far out in either tail is kept to the last digits.
    """

    usual: ClassVar[tuple[float | None, float | None]] = (None, None)

    def probabilities(self, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        """-> (that of a noise level below sigma, that of one above)."""
        raise NotImplementedError

    def quantile(self, below: Tensor, above: Tensor, sigma_data: float) -> Tensor:
        """The inverse of `probabilities`."""
        raise NotImplementedError

    def __call__(self, u: Tensor, shape: DataShape, schedule: BetaSchedule) -> Tensor:
        u = u.double()
        tail = u.new_tensor([TAIL, 1 - TAIL])
        low, high = tail, tail.flip(0)  # (below, above) at each end
        sigma_min, sigma_max = self.bounds()
        if sigma_min is not None:
            low = torch.stack(self.probabilities(u.new_tensor(sigma_min), shape.sigma_data))
        if sigma_max is not None:
            high = torch.stack(self.probabilities(u.new_tensor(sigma_max), shape.sigma_data))
        below, above = (torch.lerp(a, b, u) for a, b in zip(low, high, strict=True))
        sigma = self.quantile(below, above, shape.sigma_data)
        return sigma.clamp(sigma_min or 0, sigma_max)  # a probability may be too small for a float


def _normal_cdf(z: Tensor) -> Tensor:
    """torch.special.ndtr keeps four digits at -7, this all of them."""
    return torch.erfc(-z / math.sqrt(2)) / 2


def _normal_quantile(below: Tensor, above: Tensor) -> Tensor:
    """From the smaller of the two, which has its digits."""
    z = torch.special.ndtri(torch.minimum(below, above))
    return torch.where(below < above, z, -z)


class Lognormal(Bounded):
    """ln sigma is normal (Karras et al., 2022)."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = Field(-1.2, ge=-20, le=20, description="of ln sigma")
    std: float = Field(1.2, gt=0, le=20, description="of ln sigma")

    def probabilities(self, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        """Phi(z) and Phi(-z) of z = (ln sigma - mean)/std."""
        z = (sigma.log() - self.mean) / self.std
        return _normal_cdf(z), _normal_cdf(-z)

    def quantile(self, below: Tensor, above: Tensor, sigma_data: float) -> Tensor:
        """exp(mean + std z), with z the normal quantile of `below`."""
        return torch.exp(self.mean + self.std * _normal_quantile(below, above))


class SplitLognormal(Bounded):
    """ln sigma is normal with one standard deviation below its mode and another above it.

    k-diffusion: "split-lognormal", which is neither stratified nor cut.
    """

    kind: Literal["split_lognormal"] = "split_lognormal"
    mode: float = Field(-1.2, ge=-20, le=20, description='of ln sigma; k-diffusion: "loc"')
    std_low: float = Field(1.2, gt=0, le=20, description='below the mode; k-diffusion: "scale_1"')
    std_high: float = Field(1.2, gt=0, le=20, description='above the mode; k-diffusion: "scale_2"')

    def _twice_halves(self) -> tuple[float, float]:
        """Twice the probability below the mode, and above it."""
        total = self.std_low + self.std_high
        return 2 * self.std_low / total, 2 * self.std_high / total

    def probabilities(self, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        """Those of two half normals of ln sigma that meet at the mode."""
        twice_low, twice_high = self._twice_halves()
        x = sigma.log() - self.mode
        low = twice_low * _normal_cdf(x / self.std_low)
        high = twice_high * _normal_cdf(-x / self.std_high)
        return torch.where(x < 0, low, 1 - high), torch.where(x < 0, 1 - low, high)

    def quantile(self, below: Tensor, above: Tensor, sigma_data: float) -> Tensor:
        """exp(mode + std z), with std_low or std_high by the side of the mode."""
        twice_low, twice_high = self._twice_halves()
        low = self.std_low * torch.special.ndtri((below / twice_low).clamp(max=0.5))
        high = self.std_high * torch.special.ndtri((above / twice_high).clamp(max=0.5))
        return torch.exp(self.mode + low - high)  # one of the two is 0


class LogLogistic(Bounded):
    """ln sigma is logistic.

    k-diffusion: "loglogistic", which without bounds goes from 0 to infinity.
    """

    kind: Literal["loglogistic"] = "loglogistic"
    loc: float | None = Field(
        None, ge=-20, le=20, description="of ln sigma; ln sigma_data if absent"
    )
    scale: float = Field(0.5, gt=0, le=20, description="of ln sigma")

    def probabilities(self, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        """sigmoid(z) and sigmoid(-z) of z = (ln sigma - loc)/scale."""
        z = (sigma.log() - self._loc(sigma_data)) / self.scale
        return torch.sigmoid(z), torch.sigmoid(-z)

    def quantile(self, below: Tensor, above: Tensor, sigma_data: float) -> Tensor:
        """exp(loc + scale ln(below/above))."""
        return torch.exp(self._loc(sigma_data) + self.scale * (below / above).log())

    def resolved(self, context: Context) -> Self:
        """Fills in its bounds, and loc of ln sigma_data where it is absent."""
        return super().resolved(context).filled(loc=self._loc(context.shape.sigma_data))

    def _loc(self, sigma_data: float) -> float:
        return math.log(sigma_data) if self.loc is None else self.loc


class LogUniform(WithBounds):
    """ln sigma is uniform."""

    kind: Literal["loguniform"] = "loguniform"
    usual = (1e-2, 160.0)

    def __call__(self, u: Tensor, shape: DataShape, schedule: BetaSchedule) -> Tensor:
        low, high = (math.log(bound) for bound in self.interval())
        return torch.exp(low + u.double() * (high - low))


class VDiffusion(Bounded):
    """atan(sigma/sd) is uniform: the cosine schedule (Salimans & Ho, 2022).

    k-diffusion: "v-diffusion" and "cosine".
    """

    kind: Literal["v_diffusion"] = "v_diffusion"
    usual = (1e-3, 1e3)

    def probabilities(self, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        """(2/pi) atan(sigma/sd) and (2/pi) atan(sd/sigma)."""
        below, above = torch.atan(sigma / sigma_data), torch.atan(sigma_data / sigma)
        return below * (2 / math.pi), above * (2 / math.pi)

    def quantile(self, below: Tensor, above: Tensor, sigma_data: float) -> Tensor:
        """sd tan(pi/2 below)."""
        below, above = (p * (math.pi / 2) for p in (below, above))
        return sigma_data * torch.where(below < above, below.tan(), 1 / above.tan())


class UniformFlow(Bounded):
    """The time t = sigma/(1 + sigma) of rectified flow is uniform (Liu et al., 2023)."""

    kind: Literal["uniform_flow"] = "uniform_flow"
    usual = (1e-3, FLOW_SIGMA_MAX)

    def probabilities(self, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        """t = sigma/(1 + sigma), and 1 - t = 1/(1 + sigma)."""
        return sigma / (1 + sigma), 1 / (1 + sigma)

    def quantile(self, below: Tensor, above: Tensor, sigma_data: float) -> Tensor:
        """sigma = t/(1 - t)."""
        return below / above


class LogitNormalFlow(Lognormal):
    """The logit of the time t of rectified flow is normal (Esser et al., 2024, equation 19).

    As sigma = t/(1 - t), ln sigma is that logit: this is a lognormal with other defaults.
    """

    kind: Literal["logit_normal_flow"] = "logit_normal_flow"  # type: ignore[assignment]
    mean: float = Field(0.0, ge=-20, le=20, description="of logit t")
    std: float = Field(1.0, gt=0, le=20, description="of logit t")
    usual = (None, FLOW_SIGMA_MAX)


class CosineInterpolated(WithBounds):
    """Shifted cosine schedules: that of noise_d_low at high noise, of noise_d_high at low noise.

    Source: Hoogeboom et al., 2023, equation 5; with sigma_data as in Crowson et al., 2024.
    k-diffusion: "cosine-interpolated", whose noise_d_low is 32 for smaller images too.
    """

    kind: Literal["cosine_interpolated"] = "cosine_interpolated"
    usual = (1e-3, 1e3)
    noise_d_low: Scale | None = Field(None, description="pixels; min(32, image) if absent")
    noise_d_high: Scale | None = Field(None, description="pixels; the image's side if absent")

    def __call__(self, u: Tensor, shape: DataShape, schedule: BetaSchedule) -> Tensor:
        size = max(shape.height, shape.width)
        low, high = self._noise_d(size)
        return shape.sigma_data * torch.exp(
            u * self._log_ratio(u, low / size, shape.sigma_data)
            + (1 - u) * self._log_ratio(u, high / size, shape.sigma_data)
        )

    def resolved(self, context: Context) -> Self:
        """Fills in its bounds, and noise_d_low and noise_d_high by the size of the image."""
        low, high = self._noise_d(max(context.shape.height, context.shape.width))
        return super().resolved(context).filled(noise_d_low=low, noise_d_high=high)

    def _noise_d(self, size: int) -> tuple[float, float]:
        """(noise_d_low, noise_d_high) for images of this size."""
        return self.noise_d_low or float(min(32, size)), self.noise_d_high or float(size)

    def _log_ratio(self, u: Tensor, r: float, sigma_data: float) -> Tensor:
        """ln(sigma/sd) of the cosine schedule shifted by r = d/size."""
        start, end = (math.atan(r * bound / sigma_data) for bound in self.interval())
        return torch.log(torch.tan(start + u.double() * (end - start)) / r)


class UniformVP(DensitySpec):
    """Each timestep of the schedule with equal probability (Ho et al., 2020)."""

    kind: Literal["uniform_vp"] = "uniform_vp"
    by_timesteps = True

    def __call__(self, u: Tensor, shape: DataShape, schedule: BetaSchedule) -> Tensor:
        t = (u.double() * schedule.steps).long().clamp(max=schedule.steps - 1)
        return schedule.sigmas(u.device)[t]


Density = Annotated[
    CosineInterpolated
    | Lognormal
    | SplitLognormal
    | LogLogistic
    | LogUniform
    | VDiffusion
    | UniformFlow
    | LogitNormalFlow
    | UniformVP,
    Field(discriminator="kind"),
]
