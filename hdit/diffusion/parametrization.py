"""What the network predicts: D(x; sigma) = c_skip x + c_out F(c_in x, c_noise).

Each parametrization gives the coefficients at sigma (b,); sd is sigma_data. The noise label c_noise
is a setting of its own, because a backbone's embedding expects a range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from hdit.diffusion.beta_schedules import BetaSchedule
from hdit.protocols import Spec

FLOW_SIGMA_MAX = 999.0  # at time 0.999


class Scales(NamedTuple):
    """Each (b,), in sigma's dtype."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


class Predicts(Spec):
    """Base of the parametrizations."""

    by_timesteps: ClassVar[bool] = False  # whether it is defined by a beta schedule

    def sigma_range(self, schedule: BetaSchedule) -> tuple[float, float]:
        """The noise levels at which the parametrization is defined."""
        return 0.0, math.inf

    def start(self, sigma_max: float) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return sigma_max


class EDM(Predicts):
    """Karras et al., 2022, table 1: F has unit variance in and out at every sigma."""

    kind: Literal["edm"] = "edm"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Scales:
        r = (sigma.square() + sigma_data**2).sqrt()
        return Scales((sigma_data / r).square(), sigma * sigma_data / r, 1 / r)


class V(Predicts):
    """F predicts v (Salimans & Ho, 2022): EDM with the sign of F turned; VP's own v at sd 1."""

    kind: Literal["v"] = "v"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Scales:
        c_skip, c_out, c_in = EDM()(sigma, sigma_data)
        return Scales(c_skip, -c_out, c_in)


class EpsVP(Predicts):
    """F predicts the noise from the variance-preserving x / sqrt(1 + sigma^2) (Ho et al., 2020)."""

    kind: Literal["eps_vp"] = "eps_vp"
    by_timesteps = True

    def __call__(self, sigma: Tensor, sigma_data: float) -> Scales:
        return Scales(sigma.new_ones(sigma.shape), -sigma, 1 / (sigma.square() + 1).sqrt())

    def sigma_range(self, schedule: BetaSchedule) -> tuple[float, float]:
        """The noise levels of the beta schedule's first and last timestep."""
        return schedule.sigma_range()

    def start(self, sigma_max: float) -> float:
        """sqrt(sigma_max^2 + 1), the standard deviation at which VP's own x has unit variance."""
        return math.sqrt(sigma_max**2 + 1)  # VP's own x has unit variance there


class X0(Predicts):
    """F predicts x0 itself."""

    kind: Literal["x0"] = "x0"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Scales:
        one = sigma.new_ones(sigma.shape)
        return Scales(0 * one, one, 1 / (sigma.square() + sigma_data**2).sqrt())


class Flow(Predicts):
    """F predicts the velocity noise - x0 of rectified flow (Liu et al., 2023).

    Its input is (1 - t) x0 + t noise, with time t = sigma/(1 + sigma) up to 0.999.
    """

    kind: Literal["flow"] = "flow"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Scales:
        c = 1 / (1 + sigma)
        return Scales(c, -sigma * c, c)

    def sigma_range(self, schedule: BetaSchedule) -> tuple[float, float]:
        """0 to 999, which is time 0.999."""
        return 0.0, FLOW_SIGMA_MAX


Parametrization = Annotated[EDM | V | EpsVP | X0 | Flow, Field(discriminator="kind")]


def log_quarter(sigma: Tensor, sigma_data: float, table: BetaSchedule | None) -> Tensor:
    """ln(sigma)/4 (Karras et al., 2022)."""
    return sigma.log() / 4


def timestep(sigma: Tensor, sigma_data: float, table: BetaSchedule | None) -> Tensor:
    """t(sigma) of the table, scaled to 0..999; without a table 999 (2/pi) atan(sigma/sd)."""
    if table is None:
        return 999 * atan(sigma, sigma_data, table)
    return table.t(sigma) * (999 / (table.steps - 1))


def atan(sigma: Tensor, sigma_data: float, table: BetaSchedule | None) -> Tensor:
    """(2/pi) atan(sigma/sd), in 0..1."""
    return (sigma / sigma_data).atan() * (2 / math.pi)


def flow_t(sigma: Tensor, sigma_data: float, table: BetaSchedule | None) -> Tensor:
    """sigma/(1 + sigma), the time of rectified flow, in 0..1."""
    return sigma / (1 + sigma)


CNoise = Literal["log_quarter", "timestep", "atan", "flow_t"]
C_NOISES: dict[str, Callable[[Tensor, float, BetaSchedule | None], Tensor]] = {
    "log_quarter": log_quarter,
    "timestep": timestep,
    "atan": atan,
    "flow_t": flow_t,
}
"""c_noise by name: (sigma (b,), sigma_data, the table of a VP parametrization or None) -> (b,)."""
