"""What training minimizes: a batch becomes one loss for each of its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hdit import randomness
from hdit.config.schema import RunConfig
from hdit.data.batches import Batch
from hdit.device import Precision, precision_on, to_device
from hdit.diffusion.densities import stratify
from hdit.latents.store import choose
from hdit.protocols import Cond, DataShape, Network, NormalNoise, Space
from hdit.runs.building import make_denoiser
from hdit.runs.history import BINS


def settle_training(
    config: RunConfig, device: torch.device, warn: Callable[[str], None] = lambda text: None
) -> RunConfig:
    """With the precision that "auto" comes to in [training] on this device.

    Raises UserError for one that is asked for by name where the device lacks it.
    """
    t = config.training
    precision = precision_on(device, t.precision, "training.precision", warn)
    return config.model_copy(update={"training": t.model_copy(update={"precision": precision})})


def training_u(config: RunConfig, batch: Batch) -> Tensor:
    """What the noise levels of a batch follow from: u (b,) float64 in [0, 1), on the CPU."""
    t = config.training
    rand = randomness.uniform(t.seed, "sigma", batch.counters)
    return stratify(rand, torch.from_numpy(batch.position), t.batch_size)


def validation_u(counters: np.ndarray, total: int) -> Tensor:
    """The same of images that are validated on, whose counters go from 0 to total - 1."""
    rand = randomness.uniform(0, "validation sigma", counters)
    return stratify(rand, torch.from_numpy(counters), total)


def bins_of(u: Tensor) -> Tensor:
    """The octile of the training density that each noise level lies in: (b,) int64."""
    return (u * BINS).long()


def sigma_edges(config: RunConfig, shape: DataShape) -> list[float]:
    """Octiles of the training density: BINS + 1 noise levels, from its lowest to its highest."""
    u = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    edges: list[float] = config.diffusion.density(u, shape, config.beta_schedule).tolist()
    return edges


class Objective:
    """Batch -> loss of each image (b,), differentiable in the network's parameters.

    Every random choice is a function of the seed and the image's counter. Nothing in it makes the
    host wait for a CUDA device: what the host decides goes there by pinned memory.
    """

    def __init__(
        self,
        network: Network,
        config: RunConfig,
        shape: DataShape,
        space: Space,
        device: torch.device,
        *,
        stored: bool = False,
        compiled: bool = False,
        precision: Precision | None = None,
    ):
        """`stored` tells that batches hold a VAE's posteriors; `compiled`, to compile the warp.

        `precision` is that of [training] if it is None.
        """
        self.config, self.shape, self.space, self.device = config, shape, space, device
        self.stored, self.compiled = stored, compiled
        precision = precision or precision_on(device, config.training.precision)
        self.denoiser = make_denoiser(network, config, shape, precision)

    def __call__(self, batch: Batch) -> Tensor:
        d, seed, counters = self.config.diffusion, self.config.training.seed, batch.counters
        x0, aug = self._x0(batch)
        noise = self._normal("noise", counters)(self.shape.chw)
        # Dropout within the network draws from the global generator.
        torch.manual_seed(int(randomness.bits(seed, "dropout", counters[:1])[0] >> np.uint64(1)))
        return self.denoiser.loss(
            x0, noise, self._sigma(batch), self._cond(batch, aug), d.weighting, d.loss_scales
        )

    @torch.no_grad()
    def x0_errors(
        self, images: Tensor, labels: Tensor, counters: np.ndarray, edges: np.ndarray
    ) -> Tensor:
        """Mean of (D - x0)^2 over an image's elements, at a noise level between each two edges.

        images (b c h w) as they lie on disk, labels and counters (b,), edges (n + 1,) ->
        (n, b) float64. Noise and levels follow from the counters alone, whatever the run's seed, so
        that two models are measured alike.
        """
        stored = self.space.encode(to_device(images, self.device))
        x0 = self.space.normalize(stored, self._normal("held-out posterior", counters, seed=0))
        noise = self._normal("held-out noise", counters, seed=0)(self.shape.chw)
        u = randomness.uniform(0, "held-out sigma", counters).numpy()
        cond = Cond(to_device(labels, self.device) if self.shape.num_classes else None)
        errors = []
        for low, high in pairwise(edges):
            sigma = to_device(torch.from_numpy(low * (high / low) ** u), self.device).to(x0.dtype)
            denoised = self.denoiser(x0 + sigma[:, None, None, None] * noise, sigma, cond)
            errors.append((denoised - x0).double().square().mean((1, 2, 3)))
        return torch.stack(errors)

    @torch.no_grad()
    def held_out_losses(
        self, images: Tensor, labels: Tensor, counters: np.ndarray, total: int
    ) -> Tensor:
        """The loss of training, and mean (D - x0)^2, of each of `total` held-out images.

        images (b c h w) as they lie on disk or (b f 2c h w) as a VAE's posteriors, labels and
        counters (b,), each counter once in 0..total-1 -> (2, b) float64. Noise levels follow the
        density of training, one from each of `total` strata. They and the noise follow from the
        counters alone, whatever the run's seed; nothing is mirrored, augmented or dropped.
        """
        stored = to_device(images, self.device)
        stored = choose(stored, None) if self.stored else self.space.encode(stored)
        x0 = self.space.normalize(stored, self._normal("validation posterior", counters, seed=0))
        noise = self._normal("validation noise", counters, seed=0)(self.shape.chw)
        u = validation_u(counters, total)
        d = self.config.diffusion
        sigma = to_device(d.density(u, self.shape, self.config.beta_schedule), self.device)
        cond = Cond(to_device(labels, self.device) if self.shape.num_classes else None)
        losses = self.denoiser.losses(x0, noise, sigma, cond, d.weighting, d.loss_scales)
        return torch.stack(losses)

    def _x0(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the diffusion sees of a batch, and the parameters of its augmentation, if any."""
        data, seed, counters = self.config.data, self.config.training.seed, batch.counters
        images = to_device(batch.images, self.device)
        mirrored = aug = None
        if data.augment.probability:
            images, aug = data.augment(images, seed, counters, self.compiled)
        elif data.flip:
            mirrored = to_device(randomness.uniform(seed, "flip", counters) < 0.5, self.device)
        if self.stored:
            stored = choose(images, mirrored)
        else:
            if mirrored is not None:
                images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            stored = self.space.encode(images)
        return self.space.normalize(stored, self._normal("posterior", counters)), aug

    def _sigma(self, batch: Batch) -> Tensor:
        """Noise levels (b,) float64, one from each stratum of the whole batch."""
        u = training_u(self.config, batch)
        sigma = self.config.diffusion.density(u, self.shape, self.config.beta_schedule)
        return to_device(sigma, self.device)

    def _cond(self, batch: Batch, aug: Tensor | None) -> Cond:
        cond = Cond(aug=aug)
        if not self.shape.num_classes:
            return cond
        t = self.config.training
        dropped = randomness.uniform(t.seed, "label dropout", batch.counters) < t.label_dropout
        labels = Cond(batch.labels).drop(dropped).labels
        assert labels is not None, "the model has classes"
        return replace(cond, labels=to_device(labels, self.device))

    def _normal(self, purpose: str, counters: np.ndarray, seed: int | None = None) -> NormalNoise:
        """Noise of each counter; under the run's seed if none is given."""
        seed = self.config.training.seed if seed is None else seed
        return lambda shape: randomness.normal(
            randomness.keys(seed, purpose, counters, self.device), shape
        )
