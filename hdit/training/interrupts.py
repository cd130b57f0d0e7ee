"""When training ends before its config says so: by a signal, or because its time is up."""

from __future__ import annotations

import signal as signals
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

AGREE_EVERY = 8  # steps between two questions of several processes whether to stop


class Interrupts:
    """Whether this process, or any other of the run, was told to end.

    `hosts` is the group of all processes, on their CPUs, or None for a single process: to ask a
    GPU, the host would wait for its steps.
    """

    def __init__(self, hosts: dist.ProcessGroup | None = None):
        self.hosts = hosts
        self.clear()

    def clear(self) -> None:
        """Forgets what an earlier session was told."""
        self.signalled, self.is_time_up = False, False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM ends training after the current step; a second Ctrl-C at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.signalled and number == signals.SIGINT:
                raise KeyboardInterrupt
            self.signalled = True

        old = {number: signals.signal(number, note) for number in (signals.SIGINT, signals.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signals.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """Whether some process was told to end: the same answer, at the same step, for all."""
        if self.hosts is None:
            return self.signalled or self.is_time_up
        if step % AGREE_EVERY:
            return False
        said = torch.tensor([self.signalled, self.is_time_up], dtype=torch.float)
        dist.all_reduce(said, group=self.hosts)
        signalled, is_time_up = (n > 0 for n in said.tolist())
        # A signal that arrives during the reduce counts at the next one, or ranks would disagree.
        if signalled:
            self.signalled = True
        if is_time_up:
            self.is_time_up = True
        return signalled or is_time_up
