"""Features of a set of images, by as many networks as are asked for, in one pass over it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hdit.errors import UserError
from hdit.evaluation.distances import Gaussian, Moments, kept_for_kid
from hdit.evaluation.extractor import Extractor
from hdit.evaluation.image_sets import ImageSet, Part
from hdit.evaluation.inception_score import SPLITS, InceptionScore, ScoreParts

KID_SEED = 0


class Features(NamedTuple):
    """What one network makes of a set: the Gaussian of all images, and the rows (n d) of those that
    the other metrics take, which are all images but for very many."""

    gaussian: Gaussian
    rows: Tensor


@dataclass(frozen=True)
class Pixels:
    """What is known of a set from its pixels alone, in its order."""

    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width)
    digests: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Takes the next images in."""
        self.sizes.extend(part.sizes)
        self.digests.extend(part.digests)
        self.labels.extend(part.labels)

    @property
    def sha256(self) -> str:
        """Hash of all images, whatever their order."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()

    @property
    def in_order(self) -> str:
        """Hash of all images in their order."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()

    @property
    def in_words(self) -> str:
        """Their size, or how many sizes there are."""
        counts = Counter(self.sizes)
        if len(counts) == 1:
            return size_of(self.sizes[0])
        ordered = sorted(counts, key=lambda size: (size[0] * size[1], size))
        return f"{len(counts)} sizes from {size_of(ordered[0])} to {size_of(ordered[-1])}"


def size_of(size: tuple[int, int]) -> str:
    """(height, width) in words."""
    return f"{size[0]} x {size[1]}"


@dataclass(frozen=True)
class Measured:
    """A set as the metrics see it. `features` are by the slot of the network; `kept` are the
    indices of their rows. `cached` says which of them came from a cache, and from which file."""

    pixels: Pixels
    features: dict[str, Features]
    kept: Tensor
    score: InceptionScore | None = None
    cached: dict[str, str] = field(default_factory=dict)


def kept_rows(n: int, which: int) -> Tensor:
    """Indices of the images whose rows are kept, of n; `which` tells the sets apart, A is 0."""
    return torch.from_numpy(kept_for_kid(n, KID_SEED, which))


def measure(
    images: ImageSet,
    extractors: Mapping[str, Extractor],
    *,
    batch_size: int = 64,
    workers: int = 0,
    which: int = 0,
    score: str | None = None,
    on_images: Callable[[int], None] = lambda n: None,
) -> Measured:
    """Computes features of all images of a set, by each extractor.

    `which` tells the set's kept rows from the other set's; `score` is the slot of the extractor
    that predicts classes for an Inception Score. `on_images` hears of each batch's number. Raises
    UserError where images are of several sizes, or features of several widths.
    """
    n, kept = len(images), kept_rows(len(images), which)
    taken = torch.zeros(n, dtype=torch.bool)
    taken[kept] = True
    pixels, collectors = Pixels(), {slot: _Collector(one) for slot, one in extractors.items()}
    parts = ScoreParts(n) if score is not None and n >= SPLITS else None
    with ThreadPoolExecutor(1) as beside:  # sums rows while the device computes the next ones
        summing: Future[None] | None = None
        for part in images.parts([one.prepare for one in extractors.values()], batch_size, workers):
            first = len(pixels.sizes)
            pixels.add(part)
            for (slot, extractor), batch in zip(extractors.items(), part.stacked, strict=True):
                if extractor.prepare is None:
                    _check_sizes(images, pixels.sizes, first, extractor)
                assert batch is not None, "images of one size, or resized to one"
                if parts and slot == score:
                    rows, probabilities = extractor.with_probabilities(batch)
                    parts.add(probabilities)
                else:
                    rows = extractor(batch)
                if summing:
                    summing.result()  # raises what it raised
                of_part = taken[first : len(pixels.sizes)]
                summing = beside.submit(collectors[slot].add, rows, of_part)
            on_images(len(part.sizes))
        if summing:
            summing.result()
    assert len(pixels.sizes) == n, "each image once"
    features = {slot: collector.features() for slot, collector in collectors.items()}
    return Measured(pixels, features, kept, parts.score() if parts else None)


def digest(images: ImageSet, batch_size: int, workers: int) -> Pixels:
    """Reads a set without computing features."""
    pixels = Pixels()
    for part in images.parts([], batch_size, workers):
        pixels.add(part)
    return pixels


class _Collector:
    """The features of one network, batch by batch."""

    def __init__(self, extractor: Extractor):
        self.extractor, self.rows = extractor, list[Tensor]()
        self.moments: Moments | None = None

    def add(self, rows: Tensor, taken: Tensor) -> None:
        """The next rows (b d), and which of them to keep (b,)."""
        moments = self.moments = self.moments or Moments(rows.shape[1])
        if rows.shape[1] != len(moments.mean):
            raise UserError(
                f"{self.extractor.option}: {self.extractor.name} gives {rows.shape[1]} numbers an "
                f"image, after {len(moments.mean)} for those before"
            )
        moments.add(rows)
        self.rows.append(rows[taken])

    def features(self) -> Features:
        """Of two images or more."""
        assert self.moments is not None, "of images"
        return Features(self.moments.gaussian(), torch.cat(self.rows))


def _check_sizes(
    images: ImageSet, sizes: list[tuple[int, int]], first: int, extractor: Extractor
) -> None:
    for i in range(first, len(sizes)):
        if sizes[i] != sizes[0]:
            raise UserError(
                f"{extractor.option}: {extractor.name} gets images as they are, so those of a set "
                f"must be of one size; {images.name(0)} is {size_of(sizes[0])}, {images.name(i)} "
                f"is {size_of(sizes[i])}"
            )
