"""Protocols of a source of images, and the samples that it gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

from pydantic import BeforeValidator, Field
from torch import Tensor

from hdit.bounds import Name, Side
from hdit.errors import UserError
from hdit.names import escape

MAX_NAME = 1000  # characters of a class's name; more is rather a caption


class DataError(UserError):
    """A data set that cannot be used, and why."""


class Skipped(NamedTuple):
    """A file that could not be read, in words that a terminal can show (see hdit.names)."""

    path: str
    reason: str


def check_classes(wanted: int | list[str] | None, found: list[str], place: str) -> None:
    """Raises DataError if `wanted`, of data.classes, is not what the data in `place` has."""
    number = len(wanted) if isinstance(wanted, list) else wanted
    if number is not None and number != len(found):
        raise DataError(
            f"data.classes: {number:,} are asked for, and {place!r} has {len(found):,}; set "
            f"data.classes={len(found)}, or leave it out"
        )


def class_names(names: Iterable[str], where: str) -> list[str]:
    """Names of classes in their order, as text that can be stored (see hdit.names).

    Raises DataError, whose message begins with `where`, for what no class can be called.
    """
    stored = [escape(name) for name in names]
    try:
        check_class_names(stored)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return stored


def check_class_names(names: list[str]) -> None:
    """Raises ValueError for a name that is empty, huge, no text, or there twice."""
    seen: set[str] = set()
    for name in names:
        if not 1 <= len(name) <= MAX_NAME:
            got = f"{name!r:.60}, of {len(name):,}"
            raise ValueError(f"a class must have a name of 1 to {MAX_NAME:,} characters, got {got}")
        if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
            raise ValueError(f"must name classes by text, got {name!r:.60}")
        if name in seen:
            raise ValueError(f"must name each class once, but has {name!r:.60} twice")
        seen.add(name)


class Sample(NamedTuple):
    """An image, its label, and the unreadable files that it stands in for."""

    image: Tensor  # (c h w) uint8; or what a space stored of it and of its mirror image
    label: int  # class index; 0 where there are no classes
    skipped: tuple[Skipped, ...] = ()


class Source(Protocol):
    """Labelled images of one shape, by index. `classes` is empty where there are no labels."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


Chance = tuple[float, float, float]
"""Three numbers in [0, 1) that a draw may choose by: the size, top and left of a crop."""

CENTER: Chance = (0.0, 0.5 - 2**-30, 0.5 - 2**-30)
"""What stands for chance where nothing is drawn: an odd margin is smaller at the top and left."""


@runtime_checkable
class Drawn(Protocol):
    """A source whose images need not be the same at each draw."""

    def draw(self, reference: Any, chance: Chance) -> Sample:
        """The image of this reference, as `chance` has it. Raises DataError."""


class Order(Protocol):
    """References to the images of a stream, one after the other without end."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def state(self) -> dict[str, Any]:
        """Resume state for `Stream.order`, after the images that were given out; for JSON."""


@runtime_checkable
class Stream(Protocol):
    """Labelled images of one shape whose number is not known; each pass has each of them once."""

    classes: list[str]

    def order(self, seed: int, state: dict[str, Any] | None = None) -> Order:
        """Begins a first pass, or goes on from another order's `state`. Raises DataError."""

    def first(self) -> Sample:
        """Any image, to learn whether there is one. Raises DataError."""

    def references(self) -> list[Any]:
        """References of all images, once each, in the order that they lie in."""

    def __getitem__(self, reference: Any) -> Sample:
        """The image of a reference, in any process."""


def size_of(source: Source | Stream) -> int | None:
    """The number of images; None if it is not known."""
    return None if isinstance(source, Stream) else len(source)


def references(source: Source | Stream) -> Sequence[Any]:
    """Lists what `source` is indexed by: a stream's references, or 0 to its length."""
    return source.references() if isinstance(source, Stream) else range(len(source))


def first(source: Source | Stream) -> Sample:
    """Any image, to learn whether there is one. Raises DataError."""
    return source.first() if isinstance(source, Stream) else source[0]


def warnings_of(source: Source | Stream) -> list[str]:
    """Sentences for the user before a source is read, as of files that are left out of it."""
    return list(getattr(source, "warnings", []))


def _sides(size: Any) -> Any:
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("must be a side in pixels, or [height, width]")
    return tuple(sides)


Size = Annotated[tuple[Side, Side], BeforeValidator(_sides)]
"""A setting that reads one side in pixels or [height, width], and holds (height, width)."""


def _path_or_share(value: Any) -> Any:
    if type(value) is str and 0 < len(value) <= 4096 and "\0" not in value:
        return value
    if type(value) is float and 0 < value < 1:
        return value
    raise ValueError("must be a path, or a share above 0 and below 1")


HeldOutSetting = Annotated[
    Name | Annotated[float, Field(gt=0, lt=1)], BeforeValidator(_path_or_share)
]
"""A setting that says which images are held out: those at a path, or a share of the data."""

NO_SHARE = (
    "no share can be split off tar files, whose images have no index; name a path, as in "
    'data.held_out = "held-out.tar"'
)

HELD_OUT = "images to validate on: their path, or a share split off by content; none if absent"
