"""Images held out from training: which they are depends on what they hold, and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from pydantic import TypeAdapter, ValidationError

from hdit.data import DataSpec
from hdit.data.images import EXHAUSTED, Images, ImagesSpec
from hdit.data.kinds import kind_of
from hdit.data.loader import usable_cpus
from hdit.data.source import NO_SHARE, DataError, Source, Stream
from hdit.data.sources.hook import Hooked
from hdit.data.sources.tars import Tars

UNREADABLE = 2**64 - 1
"""The hash of what cannot be read: above any share, so that it stays with the training images,
which name it."""

CHUNK = 64  # images that a thread hashes at once
SHOWN = 5  # names in a message


@runtime_checkable
class Divisible(Protocol):
    """A source whose images have a content to go by, and that can be cut into parts."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def content(self, index: int) -> bytes:
        """The bytes that the image is stored in; its pixels where there is no file.

        May raise anything where they cannot be read.
        """

    def part(self, indices: np.ndarray) -> Self:
        """The source of these images alone, in this order."""


Whole = TypeVar("Whole", bound=Divisible)


class HeldOut(NamedTuple):
    """Images to validate on, by index, and the hash of each."""

    source: Divisible
    hashes: np.ndarray  # (n,) uint64

    def fixed(self, number: int) -> Divisible:
        """The first so many in the order of their hashes, or all if there are fewer."""
        return self.source.part(np.argsort(self.hashes, kind="stable")[:number])


# ---- hashes --------------------------------------------------------------------------------------


def content_hashes(source: Divisible, indices: Sequence[int]) -> np.ndarray:
    """(n,) uint64: 64 bits of the BLAKE2b hash of the content of each image, UNREADABLE at most.

    Threads read files while others hash. Raises DataError where the source itself is wrong.
    """
    parts = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    # A data set of the user's own need not bear several threads.
    own = isinstance(source, Images) and isinstance(source.entries, Hooked)
    pool = ThreadPoolExecutor(1 if own else min(32, 2 * usable_cpus()), "hash")
    try:
        hashed = pool.map(lambda part: [_hash(source, int(i)) for i in part], parts)
        return np.array([value for part in hashed for value in part], np.uint64)
    finally:
        pool.shutdown(cancel_futures=True)


def _hash(source: Divisible, index: int) -> int:
    try:
        content = source.content(index)
    except (MemoryError, DataError):
        raise
    except Exception as error:  # as of an image that cannot be opened: see BadFiles
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            raise
        return UNREADABLE
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return min(int.from_bytes(digest, "big"), UNREADABLE - 1)


def divide(source: Whole, share: float, hashes: np.ndarray) -> tuple[Whole, HeldOut]:
    """-> (training images, held-out ones): those whose hash is below `share` of the largest.

    Images of one content are on the same side, and no image moves when others come or go. Raises
    DataError where one side would be empty.
    """
    below = hashes < np.uint64(int(share * 2**64))
    number = int(below.sum())
    if not 0 < number < len(hashes):
        none = "all" if number else "none"
        fix = "lower" if number else "raise"
        raise DataError(
            f"data.held_out: the share {share:g} holds out {none} of {len(hashes):,} images; "
            f"{fix} it, or name a path"
        )
    [out] = np.nonzero(below)
    return source.part(np.flatnonzero(~below)), HeldOut(source.part(out), hashes[out])


def divisible(source: Source | Stream) -> Divisible:
    """The source, if a share of it can be held out. Raises DataError for a stream."""
    if not isinstance(source, Divisible):
        raise DataError(f"data.held_out: {NO_SHARE}")
    return source


def shared(ours: np.ndarray, held_out: HeldOut) -> int:
    """How many of the held-out images have the content of one of `ours`, by their hashes."""
    found = np.isin(held_out.hashes, ours) & (held_out.hashes != UNREADABLE)
    return int(found.sum())


# ---- a path of its own ---------------------------------------------------------------------------

COMMON = ("crop", "min_crop", "background", "max_pixels", "bad_files", "max_bad_share")
"""Settings of [data] that hold for its held-out images too, of whatever kind their source is."""

OF_ITS_KIND = ("label_key", "image_column", "label_column")
"""Those that hold for a source of the same kind."""


def open_path(data: Any, path: str, classes: list[str]) -> Divisible:
    """Opens the held-out images of the `data` settings at a path, whose data has these classes.

    Raises DataError, which names data.held_out, as the source does.
    """
    with naming_held_out():
        kind = kind_of(path) or "folder"
        channels, *size = data.shape
        table: dict[str, Any] = {"kind": kind, "path": path, "size": size, "channels": channels}
        if isinstance(data, ImagesSpec):
            table |= {key: getattr(data, key) for key in COMMON}
            if data.kind == kind:
                table |= {key: getattr(data, key) for key in OF_ITS_KIND if hasattr(data, key)}
        if kind == "tar":  # which alone does not know the names of its classes
            table["classes"] = list(classes) or 0
        try:
            source = TypeAdapter(DataSpec).validate_python(table).open()
        except ValidationError as error:
            raise DataError(f"data.path: {path!r}: {error.errors()[0]['msg']}") from None
        return Images(source.spec, source.listed()) if isinstance(source, Tars) else source


NAME = "data.held_out"


@contextmanager
def naming_held_out() -> Iterator[None]:
    """Lets a DataError name data.held_out where the source says data.path."""
    try:
        yield
    except DataError as error:
        text = str(error).replace("data.path", NAME).replace("space.stored", NAME)
        raise DataError(text if NAME in text else f"{NAME}: {text}") from None


def class_indices(names: list[str], known: list[str], path: str) -> list[int]:
    """The index among `known` of each class of the held-out images in `path`.

    Raises DataError where the data has other classes.
    """
    if bool(names) != bool(known):
        ours, theirs = (f"has {len(c):,} classes" if c else "has none" for c in (known, names))
        raise DataError(f"data.held_out: the data {ours}, but {path!r} {theirs}; name images alike")
    indices = {name: i for i, name in enumerate(known)}
    if unknown := [name for name in names if name not in indices]:
        more = f", and {len(unknown) - SHOWN:,} more" if len(unknown) > SHOWN else ""
        raise DataError(
            f"data.held_out: {path!r} has classes that the data has not: "
            f"{', '.join(map(repr, unknown[:SHOWN]))}{more}; the data has "
            f"{', '.join(map(repr, known[:SHOWN]))}{', ...' if len(known) > SHOWN else ''}"
        )
    return [indices[name] for name in names]
