"""Learning rates, as functions of the optimizer's step k, counted from 0.

All begin with the factor 1 - warmup^(k + 1); warmup is a rate, 0.99 takes some hundreds of steps.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hdit.bounds import Share, StepCount
from hdit.limits import MAX_LR
from hdit.protocols import Spec


class LRSpec(Spec):
    """Base of the schedules."""

    warmup: Share = Field(0.0, description="rate of the exponential warm-up; 0 is none")

    @property
    def lowest(self) -> float:
        """The bound below which the rate does not fall, 0 if there is none."""
        return getattr(self, "min_lr", 0.0)

    def __call__(self, step: int, lr: float) -> float:
        """The rate at a step, where `lr` is the rate that it begins from."""
        return (1 - self.warmup ** (step + 1)) * self.decayed(step, lr)

    def decayed(self, step: int, lr: float) -> float:
        """The rate at a step without the warm-up, where `lr` is the rate that it begins from."""
        raise NotImplementedError


class ConstantLR(LRSpec):
    """lr throughout."""

    kind: Literal["constant"] = "constant"

    def decayed(self, step: int, lr: float) -> float:
        """lr at every step."""
        return lr


class InverseLR(LRSpec):
    """lr (1 + k/inv_gamma)^-power, at least min_lr."""

    kind: Literal["inverse"] = "inverse"
    inv_gamma: StepCount = Field(20_000, description="steps in which power 1 halves the rate")
    power: float = Field(1.0, gt=0, le=100, description="how fast the rate falls")
    min_lr: float = Field(0.0, ge=0, le=MAX_LR, description="lowest rate")

    def decayed(self, step: int, lr: float) -> float:
        """max(min_lr, lr (1 + step/inv_gamma)^-power)."""
        return max(self.min_lr, lr * (1 + step / self.inv_gamma) ** -self.power)


class ExponentialLR(LRSpec):
    """lr decay^(k/steps), at least min_lr."""

    kind: Literal["exponential"] = "exponential"
    steps: StepCount = Field(description="in which the rate falls to `decay` of itself")
    decay: float = Field(0.5, gt=0, lt=1, description="factor on the rate in `steps` steps")
    min_lr: float = Field(0.0, ge=0, le=MAX_LR, description="lowest rate")

    def decayed(self, step: int, lr: float) -> float:
        """max(min_lr, lr decay^(step/steps))."""
        return max(self.min_lr, lr * self.decay ** (step / self.steps))


LearningRate = Annotated[ConstantLR | InverseLR | ExponentialLR, Field(discriminator="kind")]
