"""When training ends before its config says so: by a signal, or because its time is up."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hdit import signals
from hdit.training.hosts import Hosts

AGREE_EVERY = 8  # steps between two questions of several processes whether to stop


class Interrupts:
    """Whether this process, or any other of the run, was told to end.

    They ask each other by their CPUs: to ask a GPU, the host would wait for its steps.
    """

    def __init__(self, hosts: Hosts | None = None):
        self.hosts = hosts or Hosts()
        self.clear()

    def clear(self) -> None:
        """Forgets what an earlier session was told."""
        self.signalled = 0  # the number of the signal that came, to this process or another
        self.is_time_up = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A signal ends training after the current step; Ctrl-C once more, at once."""
        came = 0.0

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal came
            if not self.signalled:
                self.signalled, came = number, time.monotonic()
            elif number == signal.SIGINT and time.monotonic() - came >= signals.AGAIN:
                end = before[number]
                (end if callable(end) else signal.default_int_handler)(number, frame)

        with signals.handled(note) as before:
            yield

    def agreed(self, step: int) -> bool:
        """Whether some process was told to end: the same answer, at the same step, for all."""
        if self.hosts.size == 1:
            return bool(self.signalled or self.is_time_up)
        if step % AGREE_EVERY:
            return False
        signalled, is_time_up = self.hosts.most([self.signalled, self.is_time_up])
        # A signal that arrives during the reduce counts at the next one, or ranks would disagree.
        if signalled:
            self.signalled = signalled
        if is_time_up:
            self.is_time_up = True
        return bool(signalled or is_time_up)
