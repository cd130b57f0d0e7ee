"""A VAE of diffusers with random weights, small enough to encode a picture in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the extra [dev] brings diffusers, for its VAE")

FACTOR, CHANNELS = 4, 4  # of a picture's side, and of the latents


def model(seed: int = 0, **config: Any) -> Any:
    """An AutoencoderKL whose pictures reach both ends of 0..255."""
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": CHANNELS,
        "scaling_factor": 0.4,
        "shift_factor": 0.3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKL(**(settings | config))
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(4)
    return vae.eval().requires_grad_(False)


def save(folder: Path, seed: int = 0, **config: Any) -> str:
    """Writes one, as diffusers does -> its folder."""
    model(seed, **config).save_pretrained(folder)
    return str(folder)


def posterior(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """(b c h w) uint8 -> (b 2c h w), mean and deviation, by the layers themselves."""
    x = images.float() / 127.5 - 1
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    return torch.cat([mean, torch.exp(logvar / 2)], dim=1)
