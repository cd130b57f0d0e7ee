"""The one DataLoader: worker processes load images, and their DataErrors are raised in this one."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from hdit import signals
from hdit.data.source import DataError

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def load_batches(
    load: Callable[[Any], Item],
    batches: Iterable[Sequence[Any]],
    collate: Callable[[list[Item]], Loaded],
    workers: int = 0,
    *,
    pin_memory: bool = False,
) -> Iterator[Loaded]:
    """Loads `batches` of references in their order, whatever the number of worker processes.

    `load` makes one item of a reference, and `collate` one object of the items of a batch; both run
    in the workers, or here without any. Workers start at once. Iterating raises DataError where
    `load` does, after the batches before it.
    """
    loader: DataLoader[Item] = DataLoader(
        _Items(load),  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_Collate(collate),
        worker_init_fn=partial(_begin_worker, os.getpid()) if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    return _raising(iter(loader))


def usable_cpus() -> int:
    """The number of CPUs that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Items(Generic[Item]):
    """A map-style data set for torch, in which a DataError is a value.

    If it were raised in a worker, torch would write a traceback into its message.
    """

    def __init__(self, load: Callable[[Any], Item]):
        self.load = load

    def __getitem__(self, reference: Any) -> Item | DataError:
        try:
            return self.load(reference)
        except DataError as error:
            return error.with_traceback(None)


class _Collate(Generic[Item, Loaded]):
    """Collates items; of a batch that has a DataError, the first one."""

    def __init__(self, collate: Callable[[list[Item]], Loaded]):
        self.collate = collate

    def __call__(self, items: list[Item | DataError]) -> Loaded | DataError:
        good: list[Item] = []
        for item in items:
            if isinstance(item, DataError):
                return item
            good.append(item)
        return self.collate(good)


def _begin_worker(parent: int, worker: int) -> None:
    """Leaves signals and the progress bar to the parent, and ends when that is gone.

    Ctrl-C reaches the whole process group; the trainer needs its workers for one more step. And a
    stream that prints above a bar may be forked with its lock held.
    """
    signals.ignore()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process within a second of a parent that was killed.

    The loader of torch notices only once it has nothing left to load, and 5 seconds later.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _raising(loaded: Iterator[Loaded | DataError]) -> Iterator[Loaded]:
    for found in loaded:
        if isinstance(found, DataError):
            break
        yield found
    else:
        return
    del loaded  # and its worker processes with it, before anybody handles the error
    raise found
