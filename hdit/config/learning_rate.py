"""Learning rates, as functions of where a run stands.

Those of the first group count steps of the optimizer, and begin with the factor
1 - warmup^(k + 1) at step k, counted from 0; warmup is a rate, 0.99 takes some hundreds of steps.
Those of the second count images, so that a run of another batch size keeps its schedule. A step has
the rate at the middle of the images that it takes: neither the first nor the last step is of no
use, and the sum of rate x images over a warm-up or a cooldown is the same for any batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from hdit.bounds import ImageCount, Share, StepCount
from hdit.limits import MAX_LR
from hdit.protocols import Spec


class Moment(NamedTuple):
    """A step of the optimizer, counted in steps and in images."""

    step: int  # counted from 0
    images: float  # drawn up to the middle of the step's batch
    end: int  # images after which training ends


class LRSpec(Spec):
    """Base of the schedules."""

    @property
    def lowest(self) -> float:
        """The bound below which the rate does not fall, 0 if there is none."""
        return getattr(self, "min_lr", 0.0)

    def __call__(self, at: Moment, lr: float) -> float:
        """The rate of a step, where `lr` is the rate that it is a multiple of."""
        raise NotImplementedError

    def misfits(self, batch_size: int, end: int) -> Iterator[tuple[str, str]]:
        """Yields (key, what is wrong) in a run of such batches and so many images."""
        for key in ("warmup_images", "cooldown_images"):
            count = getattr(self, key, None)
            if count is not None and count < batch_size:
                yield (
                    key,
                    f"must be at least training.batch_size ({batch_size:,}), or it has no effect; "
                    f"got {count:,}",
                )


# ---- in steps ------------------------------------------------------------------------------------


class StepLR(LRSpec):
    """Base of the schedules that count steps of the optimizer."""

    warmup: Share = Field(0.0, description="rate of the exponential warm-up, in steps; 0 is none")

    def __call__(self, at: Moment, lr: float) -> float:
        """The rate of a step, where `lr` is the rate that it begins from."""
        return (1 - self.warmup ** (at.step + 1)) * self.decayed(at.step, lr)

    def decayed(self, step: int, lr: float) -> float:
        """The rate at a step without the warm-up, where `lr` is the rate that it begins from."""
        raise NotImplementedError


class ConstantLR(StepLR):
    """lr throughout, after a warm-up if there is one: `warmup` in steps, or `warmup_images`."""

    kind: Literal["constant"] = "constant"
    warmup_images: ImageCount | None = Field(
        None, description="images of the linear warm-up; none if absent"
    )

    @model_validator(mode="after")
    def _warms_up_once(self) -> Self:
        if self.warmup and self.warmup_images:
            raise ValueError("warmup and warmup_images are two warm-ups; leave out one")
        return self

    def __call__(self, at: Moment, lr: float) -> float:
        """lr, times the warm-up's factor."""
        return ramp(at.images, self.warmup_images) * super().__call__(at, lr)

    def decayed(self, step: int, lr: float) -> float:
        """lr at every step."""
        return lr


class InverseLR(StepLR):
    """lr (1 + k/inv_gamma)^-power at step k, at least min_lr."""

    kind: Literal["inverse"] = "inverse"
    inv_gamma: StepCount = Field(20_000, description="steps in which power 1 halves the rate")
    power: float = Field(1.0, gt=0, le=100, description="how fast the rate falls")
    min_lr: float = Field(0.0, ge=0, le=MAX_LR, description="lowest rate")

    def decayed(self, step: int, lr: float) -> float:
        """max(min_lr, lr (1 + step/inv_gamma)^-power)."""
        return max(self.min_lr, lr * (1 + step / self.inv_gamma) ** -self.power)


class ExponentialLR(StepLR):
    """lr decay^(k/steps) at step k, at least min_lr."""

    kind: Literal["exponential"] = "exponential"
    steps: StepCount = Field(description="in which the rate falls to `decay` of itself")
    decay: float = Field(0.5, gt=0, lt=1, description="factor on the rate in `steps` steps")
    min_lr: float = Field(0.0, ge=0, le=MAX_LR, description="lowest rate")

    def decayed(self, step: int, lr: float) -> float:
        """max(min_lr, lr decay^(step/steps))."""
        return max(self.min_lr, lr * self.decay ** (step / self.steps))


# ---- in images -----------------------------------------------------------------------------------


class ImageLR(LRSpec):
    """Base of the schedules that count images: lr times a factor, from a linear warm-up on."""

    warmup_images: ImageCount | None = Field(
        None, description="images of the linear warm-up; none if absent"
    )

    def __call__(self, at: Moment, lr: float) -> float:
        """lr times the factor."""
        return lr * ramp(at.images, self.warmup_images) * self.factor(at.images, at.end)

    def factor(self, images: float, end: int) -> float:
        """The share of lr after `images` of a run that ends at `end` images, without warm-up."""
        raise NotImplementedError


class _Cooled(ImageLR):
    """Base of those that may fall to `final` of themselves in a line at the end."""

    cooldown_images: ImageCount | None = None
    final: Share = Field(0.0, description="rate at the end, as a share of lr")

    def factor(self, images: float, end: int) -> float:
        """The shape before the cooldown, whose last value falls in a line to `final` of lr."""
        if self.cooldown_images is None:
            return self.shape(images)
        top = self.shape(min(images, end - self.cooldown_images))
        left = ramp(end - images, self.cooldown_images)
        return top * left + min(self.final, top) * (1 - left)

    def shape(self, images: float) -> float:
        """The factor after so many images of a run without end."""
        raise NotImplementedError

    def misfits(self, batch_size: int, end: int) -> Iterator[tuple[str, str]]:
        """Yields (key, what is wrong), of a warm-up that is not over when the cooldown begins."""
        yield from super().misfits(batch_size, end)
        warmup, cooldown = self.warmup_images or 0, self.cooldown_images or 0
        if cooldown and warmup + cooldown > end:
            yield (
                "cooldown_images",
                f"must leave room in training.images ({end:,}) for it and the warm-up: "
                f"{warmup:,} + {cooldown:,} images",
            )


class InverseSqrtLR(_Cooled):
    """lr / sqrt(max(t / reference_images, 1)) after t images (Karras et al., 2024, EDM2, table 6).

    EDM2's 70,000 batches of 2,048 images are reference_images = 143_360_000.
    """

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    reference_images: ImageCount = Field(description="after which the rate begins to fall")
    cooldown_images: ImageCount | None = Field(
        None, description="images at the end in which the rate falls in a line; none if absent"
    )

    def shape(self, images: float) -> float:
        """1 / sqrt(max(images / reference_images, 1))."""
        return max(images / self.reference_images, 1) ** -0.5

    @model_validator(mode="after")
    def _ends_somewhere(self) -> Self:
        if self.final and self.cooldown_images is None:
            raise ValueError("final has no effect without cooldown_images")
        return self


class TrapezoidLR(_Cooled):
    """lr, until it falls in a line over the last cooldown_images (Zhai et al., 2022)."""

    kind: Literal["trapezoid"] = "trapezoid"
    cooldown_images: ImageCount = Field(
        description="images at the end in which the rate falls in a line"
    )

    def shape(self, images: float) -> float:
        """1 throughout."""
        return 1.0


class CosineLR(ImageLR):
    """From lr at the end of the warm-up to `final` of it at the end, by half a cosine.

    Source: Loshchilov & Hutter, 2017, equation 5.
    """

    kind: Literal["cosine"] = "cosine"
    final: Share = Field(0.0, description="rate at the end, as a share of lr")

    def factor(self, images: float, end: int) -> float:
        """final + (1 - final) (1 + cos(pi x)) / 2, where x in [0, 1] is the share that is over."""
        start = self.warmup_images or 0
        over = min(max((images - start) / (end - start), 0), 1) if end > start else 0.0
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * over)) / 2

    def misfits(self, batch_size: int, end: int) -> Iterator[tuple[str, str]]:
        """Yields (key, what is wrong), of a warm-up that is not over before the end."""
        yield from super().misfits(batch_size, end)
        if self.warmup_images and self.warmup_images >= end:
            yield (
                "warmup_images",
                f"must be below training.images ({end:,}), got {self.warmup_images:,}",
            )


def ramp(images: float, length: int | None) -> float:
    """images / length within [0, 1]; 1 without a length."""
    return 1.0 if length is None else min(max(images / length, 0.0), 1.0)


LearningRate = Annotated[
    ConstantLR | InverseLR | ExponentialLR | InverseSqrtLR | CosineLR | TrapezoidLR,
    Field(discriminator="kind"),
]
