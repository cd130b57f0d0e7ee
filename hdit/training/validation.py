"""The loss of held-out images: the same images, noise and noise levels each time.

Batches are of the same images whatever the number of processes, each batch is measured by one of
them, and losses are summed in one order, so that the result is the same to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hdit.config.schema import RunConfig
from hdit.data.batches import in_order
from hdit.data.held_out import Divisible, naming_held_out
from hdit.data.source import Skipped
from hdit.latents.store import Latents
from hdit.protocols import DataShape, Network, Space
from hdit.runs.history import BINS
from hdit.training.hosts import Hosts
from hdit.training.objective import Objective, bins_of, sigma_edges, validation_u


class _Part(NamedTuple):
    """A batch that this process measures."""

    images: Tensor
    labels: Tensor
    counters: np.ndarray
    counts: bool  # or it only keeps the calls of a sharded network together


class Validation:
    """Measures networks on held-out images, of which each process holds its part in memory."""

    def __init__(
        self,
        source: Divisible,
        indices: list[int],
        config: RunConfig,
        shape: DataShape,
        space: Space,
        device: torch.device,
        *,
        hosts: Hosts | None = None,
        sharded: bool = False,
        name_file: Callable[[Skipped], None] = lambda file: None,
    ):
        """Reads the images; the class at i of the source is that at indices[i] of the model.

        `hosts` are all processes, or None for a single one. With a `sharded` network all of them
        call it equally often. `name_file` is told of each image that cannot be read, for which
        another stands in. Raises DataError where too many are.
        """
        self.config, self.shape, self.space, self.device = config, shape, space, device
        self.hosts, self.count = hosts or Hosts(), len(source)
        self.stored = isinstance(source, Latents)
        size = config.sampling.batch_size  # what a device holds without gradients
        batches = np.split(np.arange(self.count), range(size, self.count, size))
        mine = self._deal(len(batches), sharded)
        table = torch.tensor(indices or [0])
        self.parts: list[_Part] = []
        with naming_held_out():
            read = in_order(source, [batches[i].tolist() for i, _ in mine], config.training.workers)
            told: set[str] = set()
            for (i, counts), batch in zip(mine, read, strict=True):
                for file in batch.skipped:
                    if file.path not in told:
                        name_file(file)
                    told.add(file.path)
                self.parts.append(_Part(batch.images, table[batch.labels], batches[i], counts))

    def _deal(self, batches: int, sharded: bool) -> list[tuple[int, bool]]:
        """The batches of this process, in turn with the others; without `counts`, to fill up."""
        rank, processes = self.hosts.rank, self.hosts.size
        mine = [(i, True) for i in range(rank, batches, processes)]
        missing = -(-batches // processes) - len(mine)
        return mine + [(0, False)] * missing if sharded else mine

    def measure(
        self, networks: Mapping[str, Network], is_over: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """The losses of networks by name, as a line of validation.jsonl has them.

        All processes call it together. `is_over` is asked before each batch whether to end it; then
        the result is None. With a sharded network all processes get the same answer from it.
        """
        mine: dict[str, Tensor] = {}
        over = False
        for name, network in networks.items():
            found = None if over else self._losses(network, is_over)
            over = found is None
            if found is not None:
                mine[name] = found
        if self.hosts.any_of(over):
            return None
        u = validation_u(np.arange(self.count), self.count)
        bins = bins_of(u).numpy()
        return {
            "count": self.count,
            "sigma_edges": sigma_edges(self.config, self.shape),
            # Each sum has one term that is not 0, so that none is rounded.
            "weights": {
                name: _summary(self.hosts.summed(losses).numpy(), bins)
                for name, losses in mine.items()
            },
        }

    def _losses(self, network: Network, is_over: Callable[[], bool]) -> Tensor | None:
        """(2, count) float64: losses and errors of the images of this process, 0 for others."""
        objective = Objective(
            network, self.config, self.shape, self.space, self.device, stored=self.stored
        )
        losses = torch.zeros(2, self.count, dtype=torch.float64)
        for images, labels, counters, counts in self.parts:
            if is_over():
                return None
            found = objective.held_out_losses(images, labels, counters, self.count).cpu()
            if counts:
                losses[:, counters] = found
        return losses


def _summary(losses: np.ndarray, bins: np.ndarray) -> dict[str, Any]:
    """Means of losses and errors (2, n), over all images and by bin (n,)."""
    summary: dict[str, Any] = {}
    for key, values in zip(("loss", "x0"), losses, strict=True):
        summary[key] = _mean(values)
        summary[f"{key}_by_sigma"] = [_mean(values[bins == b]) for b in range(BINS)]
    return summary


def _mean(values: np.ndarray) -> float | None:
    """The mean, of the exactly rounded sum; None of no values, and of one that is not finite."""
    if not len(values) or not np.isfinite(values).all():
        return None
    return math.fsum(values.tolist()) / len(values)


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """While it lasts, the networks are in eval mode: without dropout."""
    before = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, was in zip(networks, before, strict=True):
            network.train(was)
