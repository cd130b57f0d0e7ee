"""The AutoencoderKL of diffusers, between uint8 images and the latents that a model sees."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from hdit.bounds import Side
from hdit.errors import UserError
from hdit.hub import asking, first_line
from hdit.manifest import explain
from hdit.names import path_of
from hdit.protocols import NormalNoise, Spec
from hdit.reading import read_object
from hdit.spaces.pixel import from_pixels, to_pixels
from hdit.tensors import check_finite

PIXELS_AT_ONCE = 2**20
"""Pixels of the images in one call of the VAE, whose activations are many times as large."""


class VAE:
    """x0 = (z - shift) * scale, where z is drawn from the posterior of an image, in float32.

    What is stored of an image is (2c h w): mean and standard deviation of its posterior.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        *,
        channels: int,
        factor: int,
        sigma_data: float,
        tile: int,
    ):
        """Loads the VAE `name`. The others are the settings of hdit.spaces.LatentSpace.

        Raises UserError where it is missing, is not finite, or has not these channels or this
        factor.
        """
        self.name, self.device, self.factor, self.sigma_data = name, device, factor, sigma_data
        self.model = _load(name).to(device).eval().requires_grad_(False)
        check_finite(self.model.state_dict(), f"space.vae: {name!r}", "name a VAE that is whole")
        config = self.model.config
        halvings = len(config.block_out_channels) - 1
        for key, ours, theirs in (
            ("channels", channels, config.latent_channels),
            ("factor", factor, 2**halvings),
        ):
            if ours != theirs:
                raise UserError(f"space.{key}: is {ours}, but the VAE {name!r} has {theirs}")
        self.image_channels: int = config.in_channels
        mean = config.shift_factor or 0.0 if config.latents_mean is None else config.latents_mean
        std = 1.0 if config.latents_std is None else config.latents_std
        self.shift = _per_channel(mean, device)
        self.scale = config.scaling_factor / _per_channel(std, device)
        if tile:
            self.model.enable_tiling()
            self.model.tile_sample_min_size = tile
            self.model.tile_latent_min_size = tile // factor
        self.identity = _identity(self.model)

    def check_channels(self, channels: int) -> None:
        """Raises UserError if images have another number of channels than the VAE takes."""
        if channels != self.image_channels:
            raise UserError(
                f"data.channels: images have {channels}, but the VAE {self.name!r} takes "
                f"{self.image_channels}; set data.channels = {self.image_channels}"
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (b c h w) of 0 to 255 -> mean and deviation of their posteriors, stacked.

        The result has twice the latents' channels, and 1/factor of the images' sides.
        """
        self.check_channels(images.shape[1])

        def part(images: Tensor) -> Tensor:
            posterior = self.model.encode(from_pixels(images)).latent_dist
            return torch.cat([posterior.mean, posterior.std], 1)

        return _in_parts(part, images, images.shape[-2] * images.shape[-1])

    def normalize(self, stored: Tensor, noise: NormalNoise) -> Tensor:
        """Draws from posteriors (b 2c h w) -> x0 (b c h w) float32, scaled; calls `noise` once."""
        mean, std = stored.float().chunk(2, 1)
        return (mean + std * noise(mean.shape[1:]) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """x0 (b c h w) -> images uint8, `factor` times as high and wide. Raises NotFiniteError."""
        latents = x0.float() / self.scale + self.shift
        size = latents.shape[-2] * latents.shape[-1] * self.factor**2
        return _in_parts(lambda part: to_pixels(self.model.decode(part).sample), latents, size)


def _in_parts(call: Callable[[Tensor], Tensor], batch: Tensor, pixels: int) -> Tensor:
    return torch.cat([call(part) for part in batch.split(max(1, PIXELS_AT_ONCE // pixels))])


def _per_channel(values: Any, device: torch.device) -> Tensor:
    """(c 1 1), or () of one number."""
    tensor = torch.tensor(values, dtype=torch.float32, device=device)
    return tensor[:, None, None] if tensor.ndim else tensor


FIX = "name a folder that has it: --set space.vae=FOLDER"


def _load(name: str) -> Any:
    """The model, on the CPU in float32. No pickle is read."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"space.vae: {name!r} needs the package diffusers ({error}); "
            "pip install 'hdit[latent]' has it"
        ) from None
    folder = path_of(name)
    where = f"space.vae: {name!r}"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            inside = " (its folder vae has)" if (folder / "vae" / "config.json").is_file() else ""
            raise UserError(f"{where} has no config.json, as an AutoencoderKL of diffusers{inside}")
        read_object(folder / "config.json")  # refuses what diffusers would wait for, or drown in
        return _open(diffusers, str(folder), where, _variant(folder))
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(f"{where} does not exist (seen from {Path.cwd()})")
    with asking(where, name, "model", FIX):
        return _open(diffusers, name, where)


WEIGHTS = "diffusion_pytorch_model"


def _variant(folder: Path) -> str | None:
    """The variant of the weights in a folder that has them in less precision alone, or None."""
    plain = f"{WEIGHTS}.safetensors"
    if any((folder / name).is_file() for name in (plain, f"{plain}.index.json")):
        return None
    for variant in ("fp32", "bf16", "fp16"):
        names = (f"{WEIGHTS}.{variant}.safetensors", f"{plain}.index.{variant}.json")
        if any((folder / name).is_file() for name in names):
            return variant
    return None


def _open(diffusers: Any, name: str, where: str, variant: str | None = None) -> Any:
    """The model of a folder, or of a name on the hub. Raises UserError where it is not whole."""
    messages = diffusers.utils.logging
    verbosity = messages.get_verbosity()
    messages.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):  # of diffusers' own calls
            config = diffusers.AutoencoderKL.load_config(name)
            if config.get("_class_name") != "AutoencoderKL":
                raise ValueError(f"its class is {config.get('_class_name')}, not AutoencoderKL")
            _check_config(config)
            model, found = diffusers.AutoencoderKL.from_pretrained(
                name,
                use_safetensors=True,
                variant=variant,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
            for kind, keys in found.items():  # missing ones would be random
                if keys:
                    raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(map(str, keys))}")
            return model
    except Exception as error:  # of files, of the network, of the hub
        raise UserError(f"{where} cannot be loaded: {first_line(error)}") from error
    finally:
        messages.set_verbosity(verbosity)


Divisor = Annotated[float, Field(gt=0, le=1e9)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]


class _Config(Spec):
    """What is checked of a VAE's config.json; absent settings are diffusers' defaults.

    Larger sizes would take all memory before the weights are seen not to fit.
    """

    model_config = ConfigDict(extra="ignore")

    in_channels: int = Field(3, gt=0, le=64)
    latent_channels: int = Field(4, gt=0, le=4096)
    layers_per_block: int = Field(1, gt=0, le=64)
    norm_num_groups: int = Field(32, gt=0, le=4096)
    block_out_channels: list[Side] = Field([64], max_length=16)
    scaling_factor: Divisor = 1.0
    shift_factor: Number = 0.0
    latents_mean: list[Number] | None = None
    latents_std: list[Divisor] | None = None

    @model_validator(mode="after")
    def _has_numbers_for_each_channel(self) -> Self:
        for key in ("latents_mean", "latents_std"):
            values = getattr(self, key)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{key} must have {self.latent_channels} numbers")
        return self


def _check_config(config: dict[str, Any]) -> None:
    """Raises ValueError with the first setting of a VAE's config that is no such thing."""
    try:
        _Config.model_validate({k: v for k, v in config.items() if v is not None})
    except ValidationError as error:
        raise ValueError(f"its config{explain(error)}") from None


def _identity(model: Any) -> str:
    """Hashes what the VAE computes: its weights and the settings in COMPUTED, wherever it lies."""
    settings = {key: model.config[key] for key in COMPUTED}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()


COMPUTED = (
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "latents_mean",
    "latents_std",
    "layers_per_block",
    "mid_block_add_attention",
    "norm_num_groups",
    "scaling_factor",
    "shift_factor",
    "up_block_types",
    "use_post_quant_conv",
    "use_quant_conv",
)
"""Settings that change latents or images; others come and go with versions of diffusers."""
