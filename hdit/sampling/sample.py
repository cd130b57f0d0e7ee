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
from hdit.device import (
    Precision,
    float32_products,
    multiplies_bf16,
    multiplies_tf32,
    precision_on,
    to_device,
)
from hdit.diffusion.brownian import BrownianPath
from hdit.diffusion.guidance import Batching, cfg
from hdit.errors import UserError
from hdit.models.fitting import check_sampling
from hdit.nn.compiling import compiles
from hdit.protocols import Cond, DataShape, Denoise, Space
from hdit.runs.building import make_denoiser


def settle_sampling(
    config: RunConfig, device: torch.device, images: int, warn: Callable[[str], None]
) -> RunConfig:
    """With what "auto" comes to in [sampling], for so many images on this device.

    The precision is that of training where the hardware multiplies it, and else fp32. Raises
    UserError for one that is asked for by name where the device lacks it, and for a batch that its
    memory cannot hold.
    """
    spec = config.sampling
    check_sampling(config.data_shape(0), min(images, spec.batch_size), device)
    asked: str = spec.precision
    if asked == "auto":
        asked = config.training.precision
        if (asked == "bf16" and not multiplies_bf16(device)) or (
            asked == "tf32" and not multiplies_tf32(device)
        ):
            asked = "fp32"
    update = {
        "precision": precision_on(device, asked, "sampling.precision", warn),
        "compile": compiles(spec.compile, device, calls=-(-images // spec.batch_size) * spec.steps),
    }
    return config.model_copy(update={"sampling": spec.model_copy(update=update)})


def check_guidance(config: RunConfig, shape: DataShape) -> None:
    """Raises UserError where guidance is asked of a model that has nothing to be guided from."""
    guidance = config.sampling.guidance
    if guidance.scale == 1:
        return
    got = f"sampling.guidance.scale: {guidance.scale:g} has no meaning here: "
    if shape.num_classes == 0:
        raise UserError(got + "the model has no classes; leave it at 1")
    if config.training.label_dropout == 0:
        raise UserError(
            got + "training.label_dropout was 0, so the model never saw images without a class; "
            "leave it at 1, or train with label_dropout = 0.1"
        )


@dataclass(frozen=True)
class GuideModel:
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


def _guided(
    networks: list[_Counted],
    config: RunConfig,
    shape: DataShape,
    precision: Precision,
    guide: GuideModel | None,
) -> Callable[[Cond], Denoise]:
    """Conditions -> the denoiser of the first network, guided by the second and by no class."""
    guidance = config.sampling.guidance
    options = guidance.model_dump(exclude={"scale", "batched"})
    options["batching"] = Batching(guidance.batched)  # one, as it remembers what did not fit
    denoiser = make_denoiser(networks[0], config, shape, precision)
    worse = guide and make_denoiser(networks[1], guide.config, shape, precision)

    def bind(cond: Cond) -> Denoise:
        denoise: Denoise = denoiser.bind(cond)
        if guide and worse:
            denoise = cfg(denoise, worse.bind(cond), guide.scale, **options)
        return cfg(denoise, denoiser.bind(cond.null()), guidance.scale, **options)

    return bind


def sample(
    backbone: nn.Module,
    config: RunConfig,
    shape: DataShape,
    seeds: list[int],
    labels: list[int] | None,
    device: torch.device,
    on_step: Callable[[], None] | None = None,
    guide: GuideModel | None = None,
    space: Space | None = None,
) -> Iterator[Samples]:
    """One image for each seed (and label), by config.sampling, in batches.

    The image of a seed does not depend on the others, nor on the batch size, to float tolerance;
    and with more steps it comes closer to one image, also where the sampler draws noise. `on_step`
    is called after each step of each batch; `space` is config's, opened, if it is at hand.
    """
    spec = settle_sampling(config, device, len(seeds), warn=lambda text: None).sampling
    precision = precision_on(device, spec.precision)
    space = space or config.space.open(device)
    networks = [_Counted(backbone.eval())]
    if guide:
        networks.append(_Counted(guide.backbone.eval()))
    denoise_of = _guided(networks, config, shape, precision, guide)
    sigmas = spec.sigmas(spec.steps, *config.sigma_range(), config.beta_schedule)
    start = config.diffusion.parametrization.start(sigmas[0].item())

    @torch.inference_mode()
    def batch(seeds: list[int], labels: list[int] | None) -> Samples:
        counters = np.array(seeds)
        x_keys = randomness.keys(0, "sampling", counters, device)
        path_keys = randomness.keys(0, "sampling path", counters, device)
        cond = Cond(None if labels is None else to_device(torch.tensor(labels), device))
        before = sum(network.images for network in networks)
        x0 = spec.sampler(
            denoise_of(cond),
            start * randomness.normal(x_keys, shape.chw),
            sigmas,
            noise=BrownianPath(
                lambda i: randomness.normal(path_keys, shape.chw, i), sigmas[0].item()
            ),
            on_step=None if on_step is None else lambda *_: on_step(),
        )
        seen = sum(network.images for network in networks) - before
        return Samples(space.decode(x0).cpu(), seen // len(seeds))

    for first in range(0, len(seeds), spec.batch_size):
        part = slice(first, first + spec.batch_size)
        with float32_products(precision):
            samples = batch(seeds[part], None if labels is None else labels[part])
        yield samples
