"""Stores images in threads, so that the device goes on meanwhile."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from torch import Tensor

Put = Callable[[np.ndarray, Tensor], None]

MOST_THREADS = 4
BATCHES = 2  # that may wait to be stored, or memory would run full on a slow disk


class Writer:
    """Stores batches in the background, in order of no kind.

    What a thread raises is raised by the next call, or at the end. Where the block fails, what is
    being stored is ended well, and what waits is left.
    """

    def __init__(self, put: Put, threads: int | None = None):
        """`put` stores (indices, images); several threads call it at a time."""
        self.threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
        self.put_now = put
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="writer")
        self.waiting: deque[Future[None]] = deque()

    def put(self, indices: np.ndarray, images: Tensor) -> None:
        """Hands over images (b c h w) uint8 on the CPU; waits while too many are not stored yet."""
        self._wait(BATCHES * self.threads - 1)
        size = -(-len(indices) // self.threads)
        for first in range(0, len(indices), size):
            part = slice(first, first + size)
            self.waiting.append(self.pool.submit(self.put_now, indices[part], images[part]))

    def flush(self) -> None:
        """Waits until all is stored."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        """Waits until at most so many parts wait. Raises what storing one of the others raised."""
        while self.waiting and (len(self.waiting) > most or self.waiting[0].done()):
            self.waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=error is not None)
