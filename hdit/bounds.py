"""What a number or a name of a setting may be at most: each bound is stated once, here.

The bounds are far beyond what any paper or machine has had, and such that no setting by itself
overflows, hangs or takes all memory.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

MAX_SIDE = 2**14
MAX_WIDTH = 2**16
MAX_STEPS = 100_000
MAX_BATCH = 10**6
MAX_IMAGES = 10**12
MAX_SAMPLES = 10**6  # whose samples.json can be read again
MAX_CLASSES = 10**6
MAX_WORKERS = 1024
MAX_GUIDANCE = 1000
MAX_LR = 1e6
MAX_MINUTES = 10**8  # two centuries


def _no_zero_byte(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not have a zero byte, which no file or package has in its name")
    return text


Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_zero_byte)]
"""A path or another name, which are never empty. 4096 bytes are the longest path of Linux."""
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
"""Of an image or a part of one, in pixels or tokens."""
Width = Annotated[int, Field(gt=0, le=MAX_WIDTH)]
"""Of a layer, in channels."""
HiddenWidth = Annotated[int, Field(gt=0, le=16 * MAX_WIDTH)]
"""Of a feed-forward layer."""
Depth = Annotated[int, Field(gt=0, le=1000)]
"""In layers."""
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
"""Of a sampler."""
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
"""Of something, or the probability of it."""
LR = Annotated[float, Field(gt=0, le=MAX_LR)]
"""A learning rate."""
StepCount = Annotated[float, Field(gt=0, le=1e12)]
"""A time in steps of the optimizer."""
