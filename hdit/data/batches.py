"""Deterministic batches: which images make up a batch depends on seed and image count alone.

That is so for any number of processes and workers. A stream has a position beside the count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hdit import randomness
from hdit.data.loader import load_batches
from hdit.data.source import (
    CENTER,
    Chance,
    Drawn,
    Order,
    Sample,
    Skipped,
    Source,
    Stream,
)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch: (length,) int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)


def dataset_indices(seed: int, counters: np.ndarray, length: int) -> np.ndarray:
    """Indices (b,) of the images that the counters-th draws take: each epoch permutes anew."""
    epochs, places = np.divmod(counters, length)
    return np.array(
        [permutation(seed, int(e), length)[p] for e, p in zip(epochs, places, strict=True)]
    )


class Batch(NamedTuple):
    """One process's part of a batch, or of one accumulation step of it."""

    images: Tensor  # (b c h w) uint8, or what a space stored
    labels: Tensor  # (b,) int64
    counters: np.ndarray  # (b,) running count of each image
    position: np.ndarray  # (b,) place of each image in the batch over all processes and steps
    skipped: list[Skipped]


class Layout(NamedTuple):
    """The cut of a batch into accumulation steps and processes."""

    batch_size: int
    accumulate: int = 1
    processes: int = 1
    rank: int = 0

    def positions(self, step: int) -> np.ndarray:
        """Places in the batch that this process takes at an accumulation step."""
        size = self.batch_size // (self.accumulate * self.processes)
        start = (step * self.processes + self.rank) * size
        return np.arange(start, start + size)


class _Draw(NamedTuple):
    """One image to be loaded."""

    reference: Any  # an index, or what a stream calls it
    chance: Chance


class _Draws:
    """A batch sampler that never ends: this process's part of each accumulation step."""

    def __init__(
        self, references: Callable[[np.ndarray], list[Any]], seed: int, start: int, layout: Layout
    ):
        self.references, self.seed, self.start, self.layout = references, seed, start, layout

    def __iter__(self) -> Iterator[list[_Draw]]:
        images, layout = self.start, self.layout
        while True:
            references = self.references(images + np.arange(layout.batch_size))
            for step in range(layout.accumulate):
                positions = layout.positions(step)
                counters = images + positions
                chances = zip(
                    *(randomness.uniform(self.seed, name, counters).tolist() for name in CHANCES),
                    strict=True,
                )
                yield [
                    _Draw(references[p], chance)
                    for p, chance in zip(positions, chances, strict=True)
                ]
            images += layout.batch_size


CHANCES = ("crop size", "crop top", "crop left")


class _Load:
    """Loads one image of a source. Raises DataError where the source does."""

    def __init__(self, source: Source | Stream):
        self.source = source
        self.drawn = source if isinstance(source, Drawn) else None

    def __call__(self, draw: _Draw) -> Sample:
        if self.drawn is not None:
            return self.drawn.draw(draw.reference, draw.chance)
        return self.source[draw.reference]


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[Skipped]]:
    """Stacks samples -> images (b c h w), labels (b,) int64, and the files they stand in for."""
    return (
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
        [skipped for sample in samples for skipped in sample.skipped],
    )


class Batches:
    """Batches without end, from the one that begins at image `start`.

    A stream goes on from `state`, which `state()` gave after as many images. Iterating raises
    DataError where the source does.
    """

    def __init__(
        self,
        source: Source | Stream,
        *,
        seed: int,
        start: int,
        layout: Layout,
        workers: int = 0,
        state: dict[str, Any] | None = None,
        keep_state: bool = True,
    ):
        """Starts the workers. Only with `keep_state` there is a `state()`; one process needs it."""
        self.layout, self.images, self.step = layout, start, 0
        self.behind: Order | None = None
        references: Callable[[np.ndarray], list[Any]]
        if isinstance(source, Stream):
            ahead = source.order(seed, state)  # the loader takes more than was handed out so far
            if keep_state:
                self.behind = source.order(seed, state)  # at what was handed out

            def references(counters: np.ndarray) -> list[Any]:
                return [next(ahead) for _ in counters]
        else:
            length = len(source)

            def references(counters: np.ndarray) -> list[Any]:
                return dataset_indices(seed, counters, length).tolist()

        self.loaded = load_batches(
            _Load(source),
            _Draws(references, seed, start, layout),
            collate,
            workers,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        images, labels, skipped = next(self.loaded)
        position = self.layout.positions(self.step)
        batch = Batch(images, labels, self.images + position, position, skipped)
        self.step += 1
        if self.step == self.layout.accumulate:
            self.step, self.images = 0, self.images + self.layout.batch_size
            if self.behind is not None:
                for _ in range(self.layout.batch_size):
                    next(self.behind)
        return batch

    def state(self) -> dict[str, Any] | None:
        """Resume state after the last complete batch; None for sources that have an index."""
        return None if self.behind is None else self.behind.state()


def in_order(
    source: Source | Stream, parts: Sequence[Sequence[Any]], workers: int = 0
) -> Iterator[Batch]:
    """Batches of these images in this order, without chance, by index or a stream's references.

    Raises DataError where the source does.
    """
    draws = [[_Draw(reference, CENTER) for reference in part] for part in parts]
    first = 0
    for images, labels, skipped in load_batches(_Load(source), draws, collate, workers):
        position = np.arange(first, first + len(images))
        yield Batch(images, labels, position, position, skipped)
        first += len(position)
