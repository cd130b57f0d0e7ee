"""Images from a trained denoiser: seeds and labels in, uint8 images out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hdit.config import RunConfig
from hdit.diffusion.denoiser import Denoiser
from hdit.diffusion.guidance import cfg
from hdit.protocols import Backbone, Cond, Signal
from hdit.randomness import generators, normal
from hdit.spaces.pixel import PixelSpace

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


def make_denoiser(backbone: Backbone, config: RunConfig, signal: Signal) -> Denoiser:
    """The denoiser that a config makes of a backbone."""
    assert config.diffusion.noise_label is not None, "the config must be resolved"
    return Denoiser(
        backbone,
        config.diffusion.parametrization,
        config.diffusion.noise_label,
        signal.sigma_data,
        config.schedule,
        AUTOCAST[config.training.precision],
    )


@torch.inference_mode()
def sample(
    backbone: nn.Module,
    config: RunConfig,
    signal: Signal,
    seeds: list[int],
    labels: list[int] | None,
    device: torch.device,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """One image for each seed (and label), by config.sampling -> (n c h w) uint8, on the CPU.

    The image of a seed does not depend on the others, nor on the batch size, to float tolerance.
    `on_step` is called after each step of each batch.
    """
    spec = config.sampling
    denoiser = make_denoiser(backbone, config, signal)
    sigmas = spec.ladder(spec.steps, *config.sigma_range())

    def batch(seeds: list[int], labels: list[int] | None) -> Tensor:
        streams = generators(0, "sampling", np.array(seeds), device)
        cond = Cond(None if labels is None else torch.tensor(labels, device=device))
        x0 = spec.sampler(
            cfg(denoiser.bind(cond), denoiser.bind(cond.null()), spec.guidance),
            sigmas[0].item() * normal(streams, signal.shape),
            sigmas,
            noise=lambda sigma, sigma_next: normal(streams, signal.shape),
            on_step=None if on_step is None else lambda *_: on_step(),
        )
        return PixelSpace().decode(x0).cpu()

    was_training = backbone.training
    backbone.eval()
    parts = [slice(i, i + spec.batch_size) for i in range(0, len(seeds), spec.batch_size)]
    images = torch.cat([batch(seeds[p], None if labels is None else labels[p]) for p in parts])
    backbone.train(was_training)
    return images
