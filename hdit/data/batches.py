"""Deterministic batches: which images make up a batch depends on seed and image count alone.

That is so for any number of processes and workers. A stream has a position beside the count.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hdit import randomness
from hdit.data.source import (
    CENTER,
    Chance,
    DataError,
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
    """The images that the counters-th draws take: a fresh permutation for each epoch."""
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
    """How a batch is cut into accumulation steps and processes."""

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


class _Guarded:
    """A source whose DataError is a value: raised in a worker, torch writes a traceback into it."""

    def __init__(self, source: Source | Stream):
        self.source = source
        self.drawn = source if isinstance(source, Drawn) else None

    def __getitem__(self, draw: _Draw) -> Sample | DataError:
        try:
            if self.drawn is not None:
                return self.drawn.draw(draw.reference, draw.chance)
            return self.source[draw.reference]
        except DataError as error:
            return error.with_traceback(None)


def collate(samples: list[Sample | DataError]) -> tuple[Tensor, Tensor, list[Skipped]] | DataError:
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        good.append(sample)
    return (
        torch.stack([sample.image for sample in good]),
        torch.tensor([sample.label for sample in good]),
        [skipped for sample in good for skipped in sample.skipped],
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the trainer needs its workers for one more step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
        """Only with `keep_state` there is a `state()`: of several processes one needs it."""
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

        loader: DataLoader[Sample] = DataLoader(
            _Guarded(source),  # type: ignore[arg-type]
            batch_sampler=_Draws(references, seed, start, layout),
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_leave_signals_to_the_trainer if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the global one
        )
        self.loaded = iter(loader)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        loaded = next(self.loaded)
        if isinstance(loaded, DataError):
            del self.loaded  # and its processes with it
            raise loaded
        position = self.layout.positions(self.step)
        batch = Batch(loaded[0], loaded[1], self.images + position, position, loaded[2])
        self.step += 1
        if self.step == self.layout.accumulate:
            self.step, self.images = 0, self.images + self.layout.batch_size
            if self.behind is not None:
                for _ in range(self.layout.batch_size):
                    next(self.behind)
        return batch

    def state(self) -> dict[str, Any] | None:
        """Of a stream, behind the whole batches that were handed out; None of other sources."""
        return None if self.behind is None else self.behind.state()


def in_order(
    source: Source | Stream, parts: Sequence[Sequence[Any]], workers: int = 0
) -> Iterator[Batch]:
    """Batches of these images, as they are without chance, by index or what a stream calls them.

    Raises DataError where the source does.
    """
    draws = [[_Draw(reference, CENTER) for reference in part] for part in parts]
    loader: DataLoader[Sample] = DataLoader(
        _Guarded(source),  # type: ignore[arg-type]
        batch_sampler=draws,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_the_trainer if workers else None,
        generator=torch.Generator(),
    )
    first = 0
    for loaded in loader:
        if isinstance(loaded, DataError):
            break
        position = np.arange(first, first + len(loaded[0]))
        yield Batch(loaded[0], loaded[1], position, position, loaded[2])
        first += len(position)
    else:
        return
    raise loaded  # out of the loop, where the loader's processes are gone
