"""What every source of images offers."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import BeforeValidator
from torch import Tensor

from hdit.protocols import UserError


class DataError(UserError):
    """A data set that cannot be used, and why."""


class Skipped(NamedTuple):
    """A file that could not be read."""

    path: str
    reason: str


class Sample(NamedTuple):
    """An image and what stood in its way."""

    image: Tensor  # (c h w) uint8
    label: int  # class index; 0 where there are no classes
    skipped: tuple[Skipped, ...] = ()  # unreadable files that this image stands in for


class Source(Protocol):
    """Labelled images of one shape, by index. `classes` is empty where there are no labels."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def _sides(size: Any) -> Any:
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("must be a side in pixels, or [height, width]")
    return tuple(sides)


Size = Annotated[tuple[int, int], BeforeValidator(_sides)]
"""A setting that reads one side in pixels or [height, width], and holds (height, width)."""
