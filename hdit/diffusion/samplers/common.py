"""What the samplers share: steps of a schedule, evaluations, and the options of several."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from hdit.diffusion.samplers.registry import SamplerSpec
from hdit.protocols import Denoise, NoiseSource, OnStep

# ---- options -------------------------------------------------------------------------------------

SNoise = Annotated[float, Field(ge=0, le=100, description="factor on the noise that is added")]
Eta = Annotated[float, Field(ge=0, le=100, description="0 is an ODE, 1 the reverse SDE")]


class Stochastic(SamplerSpec):
    """Base of the specs with `eta` and `s_noise`."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        options: Any = self  # its fields are those of the function
        if options.eta == 0 and options.s_noise != 1:
            raise ValueError("s_noise has no effect with eta = 0, which adds no noise")
        return self


# ---- steps ---------------------------------------------------------------------------------------


def report(on_step: OnStep | None, step: int, x: Tensor, denoised: Tensor) -> None:
    """Tells `on_step`, if there is one, of the first evaluation of a step."""
    if on_step:
        on_step(step, x, denoised)


def evaluate(
    denoise: Denoise, x: Tensor, sigma: float, step: int = 0, on_step: OnStep | None = None
) -> Tensor:
    """D(x; sigma) of a whole batch (b c h w). Pass step and on_step at the first of a step."""
    denoised = denoise(x, x.new_full((len(x),), sigma))
    report(on_step, step, x, denoised)
    return denoised


def draw(noise: NoiseSource | None, s: float, s_next: float) -> Tensor:
    """Noise for the stretch from s to s_next. Raises ValueError if there is no source."""
    if noise is None:
        raise ValueError("a sampler that adds noise needs a source of it: pass noise=")
    return noise(s, s_next)


def noised(
    x: Tensor, std: float, s_noise: float, noise: NoiseSource | None, s: float, s_next: float
) -> Tensor:
    """x with new noise of this std times s_noise, for the step from s to s_next; none at std 0."""
    return x + draw(noise, s, s_next) * (std * s_noise) if std > 0 else x


def steps_of(sigmas: Tensor, upwards: bool = False) -> list[tuple[float, float]]:
    """(noise level, the next) of each step; going up, to invert, only where a sampler allows it.

    Raises ValueError if the levels are fewer than two or do not decrease.
    """
    steps = list(pairwise(sigmas.tolist()))
    down = all(s > s_next >= 0 for s, s_next in steps)
    up = upwards and all(0 < s < s_next for s, s_next in steps)
    if not steps or not (down or up):
        raise ValueError(
            "a sigma schedule must have at least two noise levels that decrease, the last of them "
            f"at least 0, got {[float(f'{level:.6g}') for level in sigmas.tolist()]}"
        )
    return steps


def towards(denoised: Tensor, x: Tensor, ratio: float) -> Tensor:
    """D + ratio (x - D): exact from s to ratio * s where D does not change on the way."""
    return denoised + ratio * (x - denoised)


def ancestral_step(s: float, s_next: float, eta: float) -> tuple[float, float]:
    """(down, up): go down to `down`, then add noise of std `up` to be at s_next."""
    up = min(s_next, eta * s_next * math.sqrt(s**2 - s_next**2) / s)
    return math.sqrt(s_next**2 - up**2), up


def midpoint_step(denoise: Denoise, x: Tensor, denoised: Tensor, s: float, s_next: float) -> Tensor:
    """From s to s_next with the slope at their geometric mean."""
    middle = math.sqrt(s * s_next)
    x_middle = towards(denoised, x, middle / s)
    slope = (x_middle - evaluate(denoise, x_middle, middle)) / middle
    return x + slope * (s_next - s)
