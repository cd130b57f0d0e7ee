"""Spaces, between images and what the diffusion sees, by the `kind` of their spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hdit.spaces.latent import LatentSpace
from hdit.spaces.pixel import PixelSpace

SpaceSpec = Annotated[PixelSpace | LatentSpace, Field(discriminator="kind")]

__all__ = ["LatentSpace", "PixelSpace", "SpaceSpec"]
