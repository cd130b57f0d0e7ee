"""Images from a trained denoiser: seeds and labels in, uint8 images out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
from hdit.errors import SolverError, UserError
from hdit.models.fitting import check_sampling
from hdit.nn.compiling import compiles
from hdit.protocols import NULL_LABEL, Cond, DataShape, Denoise, Network, Space
from hdit.runs.building import make_denoiser
from hdit.tensors import NotFiniteError

log = logging.getLogger(__name__)


def settle_sampling(
    config: RunConfig, device: torch.device, images: int, warn: Callable[[str], None]
) -> RunConfig:
    """Settles what "auto" in [sampling] means for so many images on this device.

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


def check_null_class(
    config: RunConfig,
    shape: DataShape,
    labels: Sequence[int] | None = None,
    guide: RunConfig | None = None,
) -> None:
    """Raises UserError where guidance, or a label, is of a null class that was not trained.

    `guide` is the config of the model to guide away from, which sees the same labels.
    """
    scale, untrained = config.sampling.guidance.scale, "never saw images without a class"
    if scale != 1:
        got = f"sampling.guidance.scale: {scale:g} has no meaning here: "
        if shape.num_classes == 0:
            raise UserError(got + "the model has no classes; leave it at 1")
        if config.training.label_dropout == 0:
            raise UserError(
                f"{got}training.label_dropout was 0, so the model {untrained}; leave it at 1, or "
                "train with label_dropout = 0.1"
            )
    if NULL_LABEL in (labels or ()):
        for who, of in (("model", config), ("model of --guide", guide)):
            if of and of.training.label_dropout == 0:
                raise UserError(
                    f"--labels: 'none' has no meaning here: training.label_dropout was 0, so the "
                    f"{who} {untrained}; name classes, or train with label_dropout = 0.1"
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

    def __init__(self, backbone: Network):
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
    options: dict[str, Any] = {
        key: getattr(guidance, key) for key in ("interval", "channels", "rescale", "apg")
    }
    options["batching"] = Batching(guidance.batched)  # one, as it remembers what did not fit
    denoiser = make_denoiser(networks[0], config, shape, precision)
    worse = guide and make_denoiser(networks[1], guide.config, shape, precision)

    def bind(cond: Cond) -> Denoise:
        denoise: Denoise = denoiser.bind(cond)
        if guide and worse:
            denoise = cfg(denoise, worse.bind(cond), guide.scale, **options)
        return cfg(denoise, denoiser.bind(cond.null()), guidance.scale, **options)

    return bind


def _solver(
    config: RunConfig, shape: DataShape, device: torch.device, on_step: Callable[[], None] | None
) -> Callable[[Denoise, list[int]], Tensor]:
    """(denoiser of a batch, its seeds) -> x0, by the sampler and the noise levels of a config.

    Raises SolverError, which names the seeds, where the sampler cannot go on.
    """
    spec = config.sampling
    sigmas = spec.sigmas(spec.steps, *config.sigma_range(), config.beta_schedule)
    start = config.diffusion.parametrization.start(sigmas[0].item())

    def solve(denoise: Denoise, seeds: list[int]) -> Tensor:
        counters = np.array(seeds)
        x_keys = randomness.keys(0, "sampling", counters, device)
        path_keys = randomness.keys(0, "sampling path", counters, device)
        try:
            x0: Tensor = spec.sampler(
                denoise,
                start * randomness.normal(x_keys, shape.chw),
                sigmas,
                noise=BrownianPath(
                    lambda i: randomness.normal(path_keys, shape.chw, i), sigmas[0].item()
                ),
                on_step=None if on_step is None else lambda *_: on_step(),
            )
        except SolverError as error:
            raise SolverError(f"{error} ({_named(seeds)})") from None
        return x0

    return solve


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

    Raises NotFiniteError with the seeds whose x0 is not finite, and warns once where every pixel
    of all images is at an end of its range.
    """
    spec = settle_sampling(config, device, len(seeds), warn=lambda text: None).sampling
    precision = precision_on(device, spec.precision)
    space = space or config.space.open(device)
    networks = [_Counted(backbone.eval())]
    if guide:
        networks.append(_Counted(guide.backbone.eval()))
    denoise_of = _guided(networks, config, shape, precision, guide)
    solve = _solver(config, shape, device, on_step)

    @torch.inference_mode()
    def batch(seeds: list[int], labels: list[int] | None) -> Samples:
        cond = Cond(None if labels is None else to_device(torch.tensor(labels), device))
        before = sum(network.images for network in networks)
        x0 = solve(denoise_of(cond), seeds)
        seen = sum(network.images for network in networks) - before
        return Samples(_decode(space, x0, seeds, config, guide), seen // len(seeds))

    saturated = True
    for first in range(0, len(seeds), spec.batch_size):
        part = slice(first, first + spec.batch_size)
        with float32_products(precision):
            samples = batch(seeds[part], None if labels is None else labels[part])
        saturated &= bool(((samples.images == 0) | (samples.images == 255)).all())
        yield samples
    if saturated:
        log.warning(
            "warning: every pixel of all %d images is 0 or 255: %s",
            *(len(seeds), _causes(config, guide)),
        )


def evaluations(config: RunConfig, shape: DataShape) -> int:
    """How often networks see each image that is sampled, counted on a model that predicts 0."""
    guidance = config.sampling.guidance.model_copy(update={"batched": True})
    spec = config.sampling.model_copy(update={"guidance": guidance})
    config = config.model_copy(update={"sampling": spec})
    small = replace(shape, height=min(shape.height, 4), width=min(shape.width, 4))
    channels = config.output_channels(small)
    network = _Counted(lambda x, c_noise, cond: x.new_zeros(len(x), channels, *x.shape[2:]))
    labels = torch.zeros(1, dtype=torch.long) if shape.num_classes else None
    with torch.inference_mode():
        denoise = _guided([network], config, small, "fp32", None)(Cond(labels))
        _solver(config, small, torch.device("cpu"), None)(denoise, [0])
    return network.images


def _decode(
    space: Space, x0: Tensor, seeds: list[int], config: RunConfig, guide: GuideModel | None
) -> Tensor:
    """The images of x0 on the CPU. Raises NotFiniteError with the seeds of those that are none."""
    try:
        return space.decode(x0).cpu()
    except NotFiniteError:
        bad = [seed for seed, one in zip(seeds, x0.split(1), strict=True) if not _shows(space, one)]
    bad = bad or seeds  # where it takes the whole batch
    raise NotFiniteError(f"{_named(bad)}: values that are not finite: {_causes(config, guide)}")


def _named(seeds: list[int], limit: int = 8) -> str:
    """Names the samples of these seeds."""
    more = f" and {len(seeds) - limit} more" if seeds[limit:] else ""
    return f"sample of seed {', '.join(map(str, seeds[:limit]))}{more}"


def _shows(space: Space, x0: Tensor) -> bool:
    """Whether x0 can be decoded."""
    try:
        space.decode(x0)
    except NotFiniteError:
        return False
    return True


def _causes(config: RunConfig, guide: GuideModel | None) -> str:
    """What may have ruined samples, and what to do."""
    scales = {"sampling.guidance.scale": config.sampling.guidance.scale}
    if guide:
        scales["--guide-scale"] = guide.scale
    listing = " and ".join(f"{key} = {scale:g}" for key, scale in scales.items() if scale != 1)
    guidance = f"{listing} may be too large; if not, " if listing else ""
    return guidance + (
        "the model is ruined, as by a learning rate that is too high; use an earlier checkpoint"
    )
