"""Images from a trained denoiser: seeds and labels in, uint8 images out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hdit import randomness
from hdit.config import RunConfig
from hdit.diffusion.brownian import BrownianPath
from hdit.diffusion.denoiser import Denoiser
from hdit.diffusion.guidance import Batching, cfg
from hdit.protocols import Backbone, Cond, Signal, Space, UserError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


def make_denoiser(
    backbone: Backbone, config: RunConfig, signal: Signal, precision: str | None = None
) -> Denoiser:
    """The denoiser that a config makes of a backbone; in the precision of training if not told."""
    d = config.diffusion
    assert d.noise_label is not None, "the config must be resolved"
    return Denoiser(
        backbone,
        d.parametrization,
        d.noise_label,
        signal.sigma_data,
        table=d.schedule,
        learned_variance=d.learned_variance,
        autocast=AUTOCAST[precision or config.training.precision],
    )


def check_guidance(config: RunConfig, signal: Signal) -> None:
    """Raises UserError where guidance is asked of a model that has nothing to be guided from."""
    guidance = config.sampling.guidance
    if guidance.scale == 1:
        return
    got = f"sampling.guidance.scale: {guidance.scale:g} has no meaning here: "
    if signal.num_classes == 0:
        raise UserError(got + "the model has no classes; leave it at 1")
    if config.training.label_dropout == 0:
        raise UserError(
            got + "training.label_dropout was 0, so the model never saw images without a class; "
            "leave it at 1, or train with label_dropout = 0.1"
        )


@dataclass(frozen=True)
class WeakModel:
    """A worse model of the same images, to be guided away from (Karras et al., 2024)."""

    backbone: nn.Module
    config: RunConfig
    scale: float


class Samples(NamedTuple):
    """A batch: images (b c h w) uint8 on the CPU, and how often networks saw each of them."""

    images: Tensor
    evaluations: int


class _Counted:
    """A backbone, and the number of images that it was evaluated on."""

    def __init__(self, backbone: nn.Module):
        self.backbone, self.images = backbone, 0

    def __call__(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        self.images += len(x)
        return self.backbone(x, c_noise, cond)


def sample(
    backbone: nn.Module,
    config: RunConfig,
    signal: Signal,
    seeds: list[int],
    labels: list[int] | None,
    device: torch.device,
    on_step: Callable[[], None] | None = None,
    weak: WeakModel | None = None,
    space: Space | None = None,
) -> Iterator[Samples]:
    """One image for each seed (and label), by config.sampling, in batches.

    The image of a seed does not depend on the others, nor on the batch size, to float tolerance;
    and with more steps it comes closer to one image, also where the sampler draws noise. `on_step`
    is called after each step of each batch; `space` is config's, opened, if it is at hand.
    """
    spec, guidance = config.sampling, config.sampling.guidance
    space = space or config.space.open(device)
    networks = [_Counted(backbone)]
    denoiser = make_denoiser(networks[0], config, signal, spec.precision)
    if weak:
        networks.append(_Counted(weak.backbone.eval()))
        weak_denoiser = make_denoiser(networks[1], weak.config, signal, spec.precision)
    sigmas = spec.ladder(spec.steps, *config.sigma_range(), config.schedule)
    options = guidance.model_dump(exclude={"scale", "batched"})
    options["batching"] = Batching(guidance.batched)
    start = config.diffusion.parametrization.start(sigmas[0].item())

    @torch.inference_mode()
    def batch(seeds: list[int], labels: list[int] | None) -> Samples:
        counters = np.array(seeds)
        x_keys = randomness.keys(0, "sampling", counters, device)
        path_keys = randomness.keys(0, "sampling path", counters, device)
        cond = Cond(None if labels is None else torch.tensor(labels, device=device))
        denoise = denoiser.bind(cond)
        if weak:
            denoise = cfg(denoise, weak_denoiser.bind(cond), weak.scale, **options)
        denoise = cfg(denoise, denoiser.bind(cond.null()), guidance.scale, **options)
        before = sum(network.images for network in networks)
        x0 = spec.sampler(
            denoise,
            start * randomness.normal(x_keys, signal.shape),
            sigmas,
            noise=BrownianPath(
                lambda i: randomness.normal(path_keys, signal.shape, i), sigmas[0].item()
            ),
            on_step=None if on_step is None else lambda *_: on_step(),
        )
        seen = sum(network.images for network in networks) - before
        return Samples(space.decode(x0).cpu(), seen // len(seeds))

    backbone.eval()
    for first in range(0, len(seeds), spec.batch_size):
        part = slice(first, first + spec.batch_size)
        yield batch(seeds[part], None if labels is None else labels[part])
