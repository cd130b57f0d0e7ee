"""Reading all images of a source, in any number of worker processes, and what is kept of each."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hdit.data.images import EXHAUSTED, Entries, Images, ImagesSpec, pixels_of
from hdit.data.loader import load_batches
from hdit.data.source import DataError
from hdit.data.transforms import to_mode
from hdit.names import escape

READ_AT_ONCE = 32  # images that a worker makes findings of

RECORD = np.dtype(
    [
        ("digest", "<u8", 2),  # of the pixels before the crop: upright, in the mode of training
        ("index", "<u4"),
        ("label", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
    ]
)


class BadFile(NamedTuple):
    """A file that cannot be read, and why; both escaped (see hdit.names)."""

    file: str
    reason: str


class Seen(NamedTuple):
    """The facts that are kept of one image that was read."""

    record: tuple[Any, ...]  # RECORD
    format: str  # as the file has it
    mode: str
    stored: int  # bytes of the file
    elements: int  # of the pixels after the crop: how many, their sum and that of their squares
    total: int
    squares: int


@dataclass
class Findings:
    """Facts and sums over some images of a source; sums are whole numbers, so all are exact."""

    records: np.ndarray  # (n,) RECORD, of those that can be read
    unreadable: list[BadFile]
    formats: Counter[str]
    modes: Counter[str]
    stored: int
    elements: int
    total: int
    squares: int


class Examine:
    """Reads an image as training does -> what is kept of it, or why it is bad.

    Raises DataError for what would end training.
    """

    def __init__(self, entries: Entries, spec: ImagesSpec):
        self.entries, self.spec = entries, spec

    def __call__(self, index: int) -> Seen | BadFile:
        try:
            image, label = self.entries.load(index)
            with image, warnings.catch_warnings(action="ignore"):  # Pillow's, of metadata
                about = image.format or "pixels", image.mode, _stored_bytes(image)
                pixels = pixels_of(image, self.spec).numpy()
                upright = to_mode(image, self.spec.channels, self.spec.background)
        except (MemoryError, DataError):
            raise
        except Exception as error:  # as in Images
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise
            return BadFile(
                escape(self.entries.name(index)), escape(f"{type(error).__name__}: {error}")
            )
        return Seen(
            (pixel_digest(upright), index, label, *upright.size),
            *about,
            pixels.size,
            int(pixels.sum(dtype=np.int64)),
            int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64)),
        )


def findings_of(items: list[Seen | BadFile]) -> Findings:
    """Adds up what was kept of some images, in their order."""
    seen = [item for item in items if isinstance(item, Seen)]
    return Findings(
        np.array([image.record for image in seen], RECORD),
        [item for item in items if isinstance(item, BadFile)],
        Counter(image.format for image in seen),
        Counter(image.mode for image in seen),
        sum(image.stored for image in seen),
        sum(image.elements for image in seen),
        sum(image.total for image in seen),
        sum(image.squares for image in seen),
    )


def read_all(source: Images, workers: int) -> Iterator[Findings]:
    """Findings in all images of a source, by parts, in its order. Raises DataError."""
    indices = range(len(source))
    batches = [indices[i : i + READ_AT_ONCE] for i in range(0, len(source), READ_AT_ONCE)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        findings = load_batches(Examine(source.entries, source.spec), batches, findings_of, workers)
    try:
        yield from findings
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(f"--workers: one of {workers} ended ({error}); take fewer") from None


def pixel_digest(image: Image.Image) -> tuple[int, int]:
    """128 bits of the size and all pixels of an image, as two numbers."""
    hashed = hashlib.blake2b(repr((image.mode, image.size)).encode(), digest_size=16)
    hashed.update(image.tobytes())
    high, low = np.frombuffer(hashed.digest(), "<u8").tolist()
    return high, low


def _stored_bytes(image: Image.Image) -> int:
    """Size of the file that an image was opened from; of its pixels if it is closed."""
    file = getattr(image, "fp", None)
    if file is None or getattr(file, "closed", False):
        return image.width * image.height * len(image.getbands())
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return int(size)
