"""Sigma schedules: the noise levels that a sampler goes down, the last of them 0."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hdit.bounds import Scale, Steps
from hdit.diffusion.beta_schedules import BetaSchedule, respaced, strided
from hdit.protocols import Spec

SIGMA_MIN, SIGMA_MAX = 1e-2, 160.0


class SigmaSchedule(Spec):
    """Base of the sigma schedules."""

    by_timesteps: ClassVar[bool] = False  # whether it is defined by a beta schedule

    def sigma_range(self, schedule: BetaSchedule) -> tuple[float, float]:
        """Lowest and highest noise level, where they are not set."""
        return SIGMA_MIN, SIGMA_MAX

    def __call__(
        self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule
    ) -> Tensor:
        """n noise levels from sigma_max to sigma_min, then 0: (n + 1,) float64."""
        levels = self.levels(n, sigma_min, sigma_max, schedule)
        return torch.cat([levels, levels.new_zeros(1)])

    def levels(self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule) -> Tensor:
        """(n,) float64, decreasing."""
        raise NotImplementedError

    def misfit(
        self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule
    ) -> str | None:
        """Why it cannot have n noise levels from sigma_max to sigma_min, or None if it can."""
        try:
            levels = self(n, sigma_min, sigma_max, schedule)
        except ValueError as error:
            return f"cannot have sampling.steps = {n}: {error}"
        if not (levels.diff() < 0).all():
            return f"has a noise level twice in sampling.steps = {n}; take fewer, or a smaller rho"
        return None


def _down(high: float, low: float, n: int) -> Tensor:
    return torch.linspace(high, low, n, dtype=torch.float64)


class Karras(SigmaSchedule):
    """sigma^(1/rho) is linear (Karras et al., 2022, equation 5)."""

    kind: Literal["karras"] = "karras"
    rho: float = Field(
        7.0, ge=0.1, le=1000, description="steps are denser at low noise for larger rho"
    )

    def levels(self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule) -> Tensor:
        """(n,) float64: the rho-th power of a line from sigma_max^(1/rho) to sigma_min^(1/rho)."""
        return _down(sigma_max ** (1 / self.rho), sigma_min ** (1 / self.rho), n) ** self.rho


class Exponential(SigmaSchedule):
    """ln sigma is linear."""

    kind: Literal["exponential"] = "exponential"

    def levels(self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule) -> Tensor:
        """(n,) float64, evenly spaced in ln sigma."""
        return _down(math.log(sigma_max), math.log(sigma_min), n).exp()


class Polyexponential(SigmaSchedule):
    """ln sigma falls as the rho-th power of a line: steps are denser at low noise for rho > 1."""

    kind: Literal["polyexponential"] = "polyexponential"
    rho: float = Field(1.0, ge=0.01, le=100, description="1 is exponential")

    def levels(self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule) -> Tensor:
        """(n,) float64: ln sigma = low + u^rho (high - low), with u linear from 1 to 0."""
        low, high = math.log(sigma_min), math.log(sigma_max)
        return (low + _down(1, 0, n) ** self.rho * (high - low)).exp()


class VP(SigmaSchedule):
    """Time is linear in the continuous VP process (Song et al., 2021; Karras et al., table 1).

    sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), from t = 1 to 0.001 where no noise
    levels are set.
    """

    kind: Literal["vp"] = "vp"
    beta_d: float = Field(19.9, ge=1e-3, le=100, description="rise of beta from t = 0 to 1")
    beta_min: float = Field(0.1, ge=1e-6, le=100, description="beta at t = 0")

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self.beta_d * t.square() / 2 + self.beta_min * t).sqrt()

    def _t(self, sigma: float) -> float:
        root = self.beta_min**2 + 2 * self.beta_d * math.log1p(sigma**2)
        return (math.sqrt(root) - self.beta_min) / self.beta_d

    def sigma_range(self, schedule: BetaSchedule) -> tuple[float, float]:
        """sigma(0.001) and sigma(1)."""
        low, high = self._sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64)).tolist()
        return low, high

    def levels(self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule) -> Tensor:
        """(n,) float64: sigma(t), with t evenly spaced between the times of the two bounds."""
        return self._sigma(_down(self._t(sigma_max), self._t(sigma_min), n))


class LinearT(SigmaSchedule):
    """Timesteps of the schedule, evenly spaced and rounded to whole ones, as DDPM and DiT sample.

    They reach from the timestep of sigma_min to that of sigma_max. `sections` gives the number of
    timesteps in each of as many equal sections (their sum is the number of steps); `stride` takes
    timesteps at a whole stride from the first, as DDIM does, and so ends before the last.
    """

    kind: Literal["linear_t"] = "linear_t"
    by_timesteps = True
    sections: Annotated[tuple[Steps, ...], Field(strict=False)] | None = None
    stride: bool = False

    def sigma_range(self, schedule: BetaSchedule) -> tuple[float, float]:
        """The noise levels of the beta schedule's first and last timestep."""
        return schedule.sigma_range()

    def misfit(
        self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule
    ) -> str | None:
        """Why it cannot have these noise levels, one being that timesteps do not reach as far."""
        first, last = schedule.sigma_range()
        if sigma_min < first * (1 - 1e-6) or sigma_max > last * (1 + 1e-6):
            return (
                f"noise levels {sigma_min:.5g} to {sigma_max:.5g} leave the timesteps' {first:.5g} "
                f"to {last:.5g}; leave out sampling.sigma_min and sigma_max, or keep them within"
            )
        return super().misfit(n, sigma_min, sigma_max, schedule)

    @model_validator(mode="after")
    def _one_of_sections_and_stride(self) -> Self:
        if self.stride and self.sections is not None:
            raise ValueError("sections have no effect with stride = true; give one of the two")
        return self

    def timesteps(self, n: int, length: int) -> list[int]:
        """n of 0..length-1, increasing. Raises ValueError where there are none such."""
        if n == 1 and self.sections is None:
            return [length - 1]
        if self.stride:
            return strided(length, n)
        if self.sections is not None and sum(self.sections) != n:
            raise ValueError(
                f"sections: {list(self.sections)} add up to {sum(self.sections)} timesteps, "
                f"but there are {n} steps"
            )
        return respaced(length, self.sections or [n])

    def levels(self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule) -> Tensor:
        """(n,) float64: those of `timesteps` between the timesteps nearest to the two bounds."""
        ends = schedule.t(torch.tensor([sigma_min, sigma_max], dtype=torch.float64))
        first, last = ends.round().long().tolist()
        return schedule.sigmas()[first : last + 1][self.timesteps(n, last - first + 1)].flip(0)


class FlowShift(SigmaSchedule):
    """Time t of rectified flow is linear before the shift t -> shift t / (1 + (shift - 1) t).

    As sigma = t/(1 - t), the shift multiplies sigma (Esser et al., 2024, equation 23); 1 is none,
    more spends more steps at high noise, as larger images want.
    """

    kind: Literal["flow"] = "flow"
    shift: Scale = Field(1.0, description="factor on sigma; 1 is none")

    def levels(self, n: int, sigma_min: float, sigma_max: float, schedule: BetaSchedule) -> Tensor:
        """(n,) float64: shift t/(1 - t), with t evenly spaced between the unshifted bounds."""
        low, high = sigma_min / self.shift, sigma_max / self.shift
        t = _down(high / (1 + high), low / (1 + low), n)
        return self.shift * t / (1 - t)


AnySigmas = Annotated[
    Karras | Exponential | Polyexponential | VP | LinearT | FlowShift, Field(discriminator="kind")
]
