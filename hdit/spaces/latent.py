"""Latent space: the diffusion sees what a VAE makes of the image (Rombach et al., 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from hdit.bounds import Name, Scale
from hdit.errors import UserError
from hdit.limits import MAX_SIDE
from hdit.protocols import Spec

if TYPE_CHECKING:
    from hdit.spaces.vae import VAE


class LatentSpace(Spec):
    """Latents of an image's size over `factor`, scaled to a deviation near 1.

    Scale and shift are those of the VAE's own config.
    """

    kind: Literal["latent"] = "latent"
    vae: Name | None = Field(
        None, description="an AutoencoderKL of diffusers: its folder, or its name on the hub"
    )
    channels: int = Field(4, gt=0, le=1024, description="of the VAE's latents")
    factor: int = Field(8, gt=0, le=1024, description="pixels along the side of a latent")
    sigma_data: Scale = Field(1.0, description="standard deviation of the scaled latents")
    stored: Name | None = Field(
        None, description="folder of `hdit encode`, to train on in place of the images"
    )
    tile: int = Field(
        512,
        ge=0,
        le=MAX_SIDE,
        description="side of the parts that a larger image is taken in; 0 for none",
    )

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of images of this shape."""
        # At least 1, though `check` refuses smaller images: all that is wrong is told at once.
        return self.channels, max(1, height // self.factor), max(1, width // self.factor)

    def check(self, height: int, width: int) -> list[tuple[str, str]]:
        """Lists (key, what is wrong) for images of this size."""
        problems = []
        if height % self.factor or width % self.factor:
            text = f"{self.factor} does not divide the image of {height}x{width}"
            problems.append(("factor", text))
        if self.tile % (4 * self.factor):  # tiles overlap by a quarter
            text = f"must be a multiple of 4 x factor = {4 * self.factor}, or 0, got {self.tile}"
            problems.append(("tile", text))
        return problems

    def open(self, device: torch.device) -> VAE:
        """Loads the VAE. Raises UserError where it is missing or of other latents."""
        if self.vae is None:
            raise UserError(
                "space.vae: must be set to train or sample latents: the folder of an AutoencoderKL "
                "of diffusers (scripts/train_vae.py makes one), or its name on Hugging Face's hub, "
                "as in 'stabilityai/sd-vae-ft-ema'"
            )
        from hdit.spaces.vae import VAE

        return VAE(
            self.vae,
            device,
            channels=self.channels,
            factor=self.factor,
            sigma_data=self.sigma_data,
            tile=self.tile,
        )
