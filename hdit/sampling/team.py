"""The processes that make one set of samples, each its part: what they tell each other.

Nothing but a few numbers goes between them, by way of their CPUs. Where one fails, all of them end,
and that one alone says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hdit import signals
from hdit.processes import World, join

Made = TypeVar("Made")

LEAVE = 1.0  # seconds that the process which failed has to say why
PATIENCE = timedelta(hours=2)  # for a batch of another process, or for the files of the first


class Team:
    """A process among those that sample; by default it is alone."""

    def __init__(self, world: World | None = None, hosts: dist.ProcessGroup | None = None):
        """`hosts` is the group in which the CPUs of all processes talk."""
        self.world, self.hosts = world or World(), hosts
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        self.made = 0  # images, by all processes, in the rounds that are known

    @classmethod
    def join(cls, world: World, name: str, limit: float, say: Callable[[str], None]) -> Team:
        """All processes of `world`, once they are there. Raises ProcessError after `limit` s."""
        if world.size == 1:
            return cls(world)
        return cls(world, join(world, name, "gloo", limit, PATIENCE, say, setting=""))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the record and says how far all are."""
        return self.world.rank == 0

    def all_do(self, work: Callable[[], Made]) -> Made:
        """What `work` makes, in each process. Where one fails, that one raises and all others end.

        All processes have to call it together.
        """
        if self.hosts is None:
            return work()
        failure, made = None, None
        try:
            made = work()
        except Exception as error:
            failure = error
        self._agree(failure)
        return made  # type: ignore[return-value]

    def first_does(self, work: Callable[[], Made]) -> Made:
        """What `work` makes in the first process, in all of them; they call it together."""
        if self.hosts is None:
            return work()
        made = self.all_do(lambda: work() if self.is_first else None)
        told: list[Any] = [made]
        dist.broadcast_object_list(told, src=0, group=self.hosts)
        result: Made = told[0]
        return result

    def round(self, work: Callable[[], int]) -> int:
        """Makes some images -> how many all processes have made, as far as they have told.

        `work` returns the number of those that it made. All processes have as many rounds, and one
        may be a round ahead of another: nobody waits for the slowest in each.
        """
        if self.hosts is None:
            self.made += work()
            return self.made
        failure, number = None, 0
        try:
            number = work()
        except Exception as error:
            failure = error
        if self._settle():  # another has failed
            self._agree(failure)
        told = torch.tensor([number, failure is not None], dtype=torch.int64)
        self.pending = dist.all_reduce(told, group=self.hosts, async_op=True), told
        if failure:
            self._settle()
            self._agree(failure)
        return self.made

    def end(self, work: Callable[[], None]) -> None:
        """The last round, which waits for all processes."""

        def last() -> int:
            work()
            return 0

        self.round(last)
        if self._settle():
            self._agree(None)

    def _settle(self) -> bool:
        """Waits for what was told in the round before -> whether a process has failed."""
        if self.pending is None:
            return False
        handle, told = self.pending
        handle.wait()
        self.pending = None
        made, failed = told.tolist()
        self.made += made
        return bool(failed)

    def _agree(self, failure: Exception | None) -> None:
        """Raises the failure of the first process that has one there, and ends the others."""
        failures = [False] * self.world.size
        dist.all_gather_object(failures, failure is not None, group=self.hosts)
        if not any(failures):
            return
        if failure is None or failures.index(True) != self.world.rank:
            # One message is enough. torchrun ends all processes once one has ended: the one that
            # has something to say must not be ended before, nor this one say that it was ended.
            signals.ignore()
            time.sleep(LEAVE)
            raise SystemExit(1)
        raise failure
