"""Latent space: the diffusion sees what a VAE makes of the image."""

from __future__ import annotations

from typing import Literal, NoReturn

from pydantic import Field

from hdit.protocols import Spec, UserError


class LatentSpace(Spec):
    """Latents of an image's size over `factor`, scaled to a deviation near 1.

    So far it tells the model's shape and cost; images are not encoded or decoded yet.
    """

    kind: Literal["latent"] = "latent"
    channels: int = Field(4, gt=0)
    factor: int = Field(8, gt=0, description="pixels along the side of a latent")
    sigma_data: float = Field(1.0, gt=0, description="standard deviation of the scaled latents")

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """Of what the diffusion sees of an image."""
        return self.channels, height // self.factor, width // self.factor

    def check(self, height: int, width: int) -> list[tuple[str, str]]:
        """(key, what is wrong) for images of this size."""
        if height % self.factor or width % self.factor:
            return [("factor", f"{self.factor} does not divide the image of {height}x{width}")]
        return []

    def open(self) -> NoReturn:
        raise UserError(
            "space.kind: 'latent' needs a VAE, and there is none here yet: a model of latents can "
            "be built, counted and converted, but neither trained nor sampled"
        )
