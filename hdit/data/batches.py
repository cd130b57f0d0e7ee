"""Deterministic batches: which images make up a batch depends on seed and image count alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hdit.data.source import DataError, Sample, Skipped, Source


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

    images: Tensor  # (b c h w) uint8
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


class _Counters:
    """A batch sampler that never ends."""

    def __init__(self, seed: int, start: int, length: int, layout: Layout):
        self.seed, self.start, self.length, self.layout = seed, start, length, layout

    def __iter__(self) -> Iterator[list[int]]:
        images = self.start
        while True:
            for step in range(self.layout.accumulate):
                counters = images + self.layout.positions(step)
                yield dataset_indices(self.seed, counters, self.length).tolist()
            images += self.layout.batch_size


class _Guarded:
    """A source whose DataError is a value: raised in a worker, torch writes a traceback into it."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | DataError:
        try:
            return self.source[index]
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


def batches(
    source: Source, *, seed: int, start: int, layout: Layout, workers: int = 0
) -> Iterator[Batch]:
    """Batches without end, from the one that begins at image `start`."""
    sampler = _Counters(seed, start, len(source), layout)
    loader: DataLoader[Sample] = DataLoader(
        _Guarded(source),  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_the_trainer if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the global one
    )
    images = start
    step = 0
    for loaded in loader:
        if isinstance(loaded, DataError):
            break
        pixels, labels, skipped = loaded
        position = layout.positions(step)
        yield Batch(pixels, labels, images + position, position, skipped)
        step += 1
        if step == layout.accumulate:
            step, images = 0, images + layout.batch_size
    raise loaded  # out of the loop, where the loader's iterator and its processes are gone
