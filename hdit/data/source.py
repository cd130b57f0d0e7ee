"""What every source of images offers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

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


def image_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """A size setting, one number or [height, width] -> (height, width)."""
    return (size, size) if isinstance(size, int) else size
