"""The grid of samples at a checkpoint: each process makes its share of the images."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hdit.config import RunConfig
from hdit.device import float32_products, precision_on
from hdit.errors import UserError
from hdit.processes import ProcessError
from hdit.protocols import Cond, DataShape, Space
from hdit.runs.building import make_denoiser
from hdit.sampling.sample import sample
from hdit.training.distributed import Parallel
from hdit.training.interrupts import Interrupts

SOON = timedelta(minutes=1)
"""How long a process waits for others where a sharded network failed in it, as they may wait for
it within that."""


class _Stopped(Exception):
    """Ends the sampling of a grid."""


class Grid(NamedTuple):
    """Images (n c h w) uint8 on the CPU by their seeds, or None; and why they cannot be made."""

    images: Tensor | None
    problem: str = ""


class InStep(nn.Module):
    """A network that each process calls as often as all others do.

    A sharded one runs in all processes or in none, but where a sampler chooses its own steps, or
    fails, one process would call it more often than another.
    """

    idle: Callable[[], object] | None = None  # calls the network for nothing
    patience: timedelta | None = None  # with the other processes, after an error in the network

    def __init__(self, network: nn.Module, interrupts: Interrupts):
        super().__init__()
        self.network, self.interrupts = network, interrupts
        self.failed = False  # whether an error came out of the last call

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        """Raises _Stopped once a process had a signal, in all of them at the same call."""
        _, signalled = self._most(calling=True)
        if signalled:
            raise _Stopped
        self.failed = True
        # FSDP keeps what it gathers into; made in inference mode, it could not be used outside.
        with torch.inference_mode(False), torch.no_grad():
            output: Tensor = self.network(x, c_noise, cond)
        self.failed = False
        return output

    def follow(self) -> None:
        """Calls the network along with the others until they are done too, or one had a signal."""
        while self._most(calling=False) == [True, False]:
            if self.idle is not None:
                self.failed = True
                self.idle()
                self.failed = False

    def _most(self, calling: bool) -> list[int]:
        patience = self.patience if self.failed else None
        told = [calling, bool(self.interrupts.signalled)]
        return self.interrupts.hosts.most(told, patience)


class Sampler:
    """Samples grids by a network that all processes of a run have, whole or sharded."""

    def __init__(
        self,
        network: nn.Module,
        config: RunConfig,
        shape: DataShape,
        space: Space,
        device: torch.device,
        parallel: Parallel,
        interrupts: Interrupts,
    ):
        self.config, self.shape, self.space, self.device = config, shape, space, device
        self.parallel, self.hosts = parallel, interrupts.hosts
        self.network = InStep(network, interrupts)
        if parallel.sharded:
            self.network.idle, self.network.patience = self._idle, SOON

    def __call__(self) -> Grid:
        """One image for each of the seeds 0 to sampling.grid - 1. All processes call it together.

        There are no images after a signal. Raises what a sharded network raised in this process
        alone.
        """
        self.network.failed = False
        try:
            mine = Grid(self._share())
            self.network.follow()
        except _Stopped:
            mine = Grid(None)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            self._follow_after(error)
            mine = Grid(None, str(error))
        return self._gathered(mine)

    def _follow_after(self, error: Exception) -> None:
        """Lets the others end their shares. Raises the error where they wait for this process."""
        try:
            self.network.follow()
        except ProcessError:
            raise error from None
        self.parallel.reset(self.network.network)

    def _share(self) -> Tensor:
        """The images (b c h w) that this process makes."""
        classes = self.shape.num_classes
        seeds = list(range(self.hosts.rank, self.config.sampling.grid, self.hosts.size))
        if not seeds:
            return torch.empty(0)
        labels = [seed % classes for seed in seeds] if classes else None
        parts = sample(
            self.network, self.config, self.shape, seeds, labels, self.device, space=self.space
        )
        return torch.cat([part.images for part in parts])

    def _idle(self) -> None:
        """A call of the network at one image, whatever it gives."""
        precision = precision_on(self.device, self.config.training.precision)
        denoiser = make_denoiser(self.network.network, self.config, self.shape, precision)
        one = torch.ones(1, device=self.device)
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        cond = Cond(label if self.shape.num_classes else None)
        with torch.no_grad(), float32_products(precision):
            denoiser(torch.zeros(1, *self.shape.chw, device=self.device), one, cond)

    def _gathered(self, mine: Grid) -> Grid:
        """The images of all shares, unless one is missing."""
        shares: list[Tensor] = []
        for rank, (images, problem) in enumerate(self.hosts.gathered(mine)):
            if images is None:
                return Grid(None, f"rank {rank}: {problem}" if rank and problem else problem)
            shares.append(images)
        whole = torch.empty(self.config.sampling.grid, *shares[0].shape[1:], dtype=torch.uint8)
        for rank, images in enumerate(shares[: len(whole)]):  # others have none
            whole[rank :: self.hosts.size] = images
        return Grid(whole)
