"""What the processes of a run tell each other by their CPUs, which never waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hdit.processes import answered_in

Told = TypeVar("Told")


class Hosts:
    """All processes of a run, of which this is one: each method is called by all of them together.

    Each raises RuntimeError if another process is gone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        """`group` is one of all processes on their CPUs, or None for a single process."""
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    def meet(self) -> None:
        """Waits for the others."""
        self.most([])

    def any_of(self, mine: bool) -> bool:
        """Whether it holds in any process."""
        return bool(self.most([mine])[0])

    def most(self, numbers: Sequence[int], patience: timedelta | None = None) -> list[int]:
        """The largest of each of these numbers, which every process has its own of.

        Raises ProcessError if another does not ask within `patience`, if that is given.
        """
        if self.group is None:
            return list(numbers)
        said = torch.tensor([0, *numbers])

        def ask() -> None:
            dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.group)

        if patience is None:
            ask()
        else:
            answered_in(patience, ask)
        return [int(number) for number in said[1:].tolist()]

    def summed(self, mine: Tensor) -> Tensor:
        """The sum over all processes of such a tensor on the CPU, which this one becomes."""
        if self.group is not None:
            dist.all_reduce(mine, group=self.group)
        return mine

    def gathered(self, mine: Told) -> list[Told]:
        """What each process has to tell, by their ranks."""
        if self.group is None:
            return [mine]
        everyone = [mine] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone
