"""Steps that are not taken, as loss or gradient is not finite; and losses that stand out.

The optimizer is told on the device whether to take a step, so that a GPU is not waited for. The
host learns of it when it reads: after each step on a CPU, at each line of metrics elsewhere.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdit.data.batches import Batch

KEPT = 16  # steps whose batches are at hand when the host reads that one of them was not finite
SETTLED = 100  # steps before a loss can stand out
MEMORY = 0.99  # decay of the running mean and variance of the loss


@dataclass(frozen=True)
class Step:
    """A step as the host learns of it; `batches` is empty where they are not kept any more."""

    images: int  # before it
    loss: float
    taken: bool
    batches: tuple[Batch, ...]


class Guard:
    """Judges each step before it is taken, and counts those that were not."""

    def __init__(self, processes: int):
        self.processes = processes
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._batches: deque[tuple[int, tuple[Batch, ...]]] = deque(maxlen=KEPT)
        self.in_a_row = self.skipped = 0  # steps that were not taken

    def judge(
        self, images: int, loss: Tensor, norm: Tensor, batches: list[Batch]
    ) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of a step -> (bad, mean loss over all processes), () float32.

        `bad` is 1 if the loss or the gradient is not finite in any process, else 0.
        """
        if self.processes > 1:  # a loss can be infinite in one process, with a finite gradient
            loss = loss.clone()
            dist.all_reduce(loss)
            loss /= self.processes
        bad = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
        self._pending.append((images, loss, bad))
        self._batches.append((images, tuple(batches)))
        return bad, loss

    def read(self) -> list[Step]:
        """The steps since the last reading; on a GPU, the host waits for them."""
        if not self._pending:
            return []
        numbers = torch.stack([torch.stack([loss.float(), bad]) for _, loss, bad in self._pending])
        kept = dict(self._batches)
        steps = []
        for (images, _, _), (loss, bad) in zip(self._pending, numbers.tolist(), strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            self.skipped += bad > 0
            steps.append(Step(images, loss, not bad, kept.get(images, ())))
        self._pending.clear()
        return steps

    def forget(self) -> None:
        """Begins anew after a rollback."""
        self._pending.clear()
        self._batches.clear()
        self.in_a_row = 0


class Spikes:
    """Tells a loss that lies far above those before it."""

    def __init__(self, deviations: float):
        self.deviations = deviations
        self.seen, self.mean, self.variance = 0, 0.0, 0.0

    def spike(self, loss: float) -> float | None:
        """By how many running deviations the loss lies above the running mean; None if few.

        A loss that stands out is taken into mean and deviation cut down to where it would not, so
        that neither one outlier hides the next, nor a loss that stays high is told of for ever.
        """
        deviation = math.sqrt(self.variance)
        limit = self.mean + self.deviations * deviation
        found = None
        if self.seen >= SETTLED and loss > limit and deviation > 0:
            found = (loss - self.mean) / deviation
            loss = limit
        self.seen += 1
        weight = max(1 - MEMORY, 1 / self.seen)  # the plain mean at first
        change = loss - self.mean
        self.mean += weight * change
        self.variance = (1 - weight) * (self.variance + weight * change**2)
        return found


def take_step(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """The optimizer's step, unless `bad` () is 1; then it leaves weights and moments as they are.

    A fused optimizer reads `bad` on the device, any other waits for it here.
    """
    if all(group["fused"] for group in optimizer.param_groups):
        optimizer.grad_scale, optimizer.found_inf = None, bad  # type: ignore[attr-defined]
        optimizer.step()
    elif not bad:
        optimizer.step()


def first_bad_module(network: nn.Module, run: Callable[[], Any]) -> str | None:
    """The name of the first module whose output is not finite while `run` calls the network.

    None if all are: then the loss itself is not, or only the gradient.
    """
    found: list[str] = []
    with _watching(network, found), torch.no_grad():
        run()
    return found[0] if found else None


@contextmanager
def _watching(network: nn.Module, found: list[str]) -> Iterator[None]:
    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(look(name)) for name, module in network.named_modules() if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
