"""Types of settings, each a number with its bounds or a name with its rule."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from hdit.limits import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_LR,
    MAX_RELATIVE_WIDTH,
    MAX_SIDE,
    MAX_STEPS,
    MAX_WIDTH,
    MIN_RELATIVE_WIDTH,
)


def _no_zero_byte(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not have a zero byte, which no file or package has in its name")
    return text


Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_zero_byte)]
"""A path or another name, which are never empty. 4096 bytes are the longest path of Linux."""
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
"""A side of an image or of a part of one, in pixels or tokens."""
Width = Annotated[int, Field(gt=0, le=MAX_WIDTH)]
"""The width of a layer, in channels."""
WidthOrZero = Annotated[int, Field(ge=0, le=MAX_WIDTH)]
HiddenWidth = Annotated[int, Field(gt=0, le=16 * MAX_WIDTH)]
"""The width within a feed-forward layer, in channels."""
Depth = Annotated[int, Field(gt=0, le=1000)]
"""A number of layers."""
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
"""Steps of a sampler."""
BatchSize = Annotated[int, Field(gt=0, le=MAX_BATCH)]
"""Images at once."""
ImageCount = Annotated[int, Field(gt=0, le=MAX_IMAGES)]
"""The time of training, or the size of a data set."""
GridCount = Annotated[int, Field(ge=0, le=10_000)]
"""Images beside each other in one file."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Sigma = Annotated[float, Field(gt=0, le=1e12)]
"""A noise level, whose square float32 can hold."""
SigmaOrZero = Annotated[float, Field(ge=0, le=1e12)]
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
"""A factor, or a standard deviation of data."""
Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of something, or the probability of it."""
RelativeWidth = Annotated[float, Field(ge=MIN_RELATIVE_WIDTH, le=MAX_RELATIVE_WIDTH)]
"""sigma_rel of a power-function average (EDM2): a standard deviation, as a share of time."""
LR = Annotated[float, Field(gt=0, le=MAX_LR)]
"""A learning rate."""
StepCount = Annotated[float, Field(gt=0, le=1e12)]
"""A time in steps of the optimizer."""
