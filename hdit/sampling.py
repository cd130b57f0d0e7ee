"""Images from a trained denoiser: seeds and labels in, uint8 images out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hdit import randomness
from hdit.config import RunConfig
from hdit.diffusion.denoiser import Denoiser
from hdit.diffusion.guidance import cfg
from hdit.protocols import Backbone, Cond, Signal, UserError

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


def check_guidance(config: RunConfig, signal: Signal) -> None:
    """Raises UserError where guidance is asked of a model that has nothing to be guided from."""
    if config.sampling.guidance == 1:
        return
    got = f"sampling.guidance: {config.sampling.guidance:g} has no meaning here: "
    if signal.num_classes == 0:
        raise UserError(got + "the model has no classes; leave it at 1")
    if config.training.label_dropout == 0:
        raise UserError(got + "training.label_dropout is 0, so it never saw images without a class")


def sample(
    backbone: nn.Module,
    config: RunConfig,
    signal: Signal,
    seeds: list[int],
    labels: list[int] | None,
    device: torch.device,
    on_step: Callable[[], None] | None = None,
) -> Iterator[Tensor]:
    """One image for each seed (and label), by config.sampling: batches (b c h w) uint8, on the CPU.

    The image of a seed does not depend on the others, nor on the batch size, to float tolerance.
    `on_step` is called after each step of each batch.
    """
    spec = config.sampling
    denoiser = make_denoiser(backbone, config, signal)
    sigmas = spec.ladder(spec.steps, *config.sigma_range())

    @torch.inference_mode()
    def batch(seeds: list[int], labels: list[int] | None) -> Tensor:
        streams = randomness.streams(0, "sampling", np.array(seeds), device)
        cond = Cond(None if labels is None else torch.tensor(labels, device=device))
        x0 = spec.sampler(
            cfg(denoiser.bind(cond), denoiser.bind(cond.null()), spec.guidance),
            sigmas[0].item() * randomness.normal(streams, signal.shape),
            sigmas,
            noise=lambda sigma, sigma_next: randomness.normal(streams, signal.shape),
            on_step=None if on_step is None else lambda *_: on_step(),
        )
        return config.space.decode(x0).cpu()

    backbone.eval()
    for start in range(0, len(seeds), spec.batch_size):
        part = slice(start, start + spec.batch_size)
        yield batch(seeds[part], None if labels is None else labels[part])
