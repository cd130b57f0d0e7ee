"""Pixel space: the diffusion sees the image itself, scaled to [-1, 1]."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from hdit.bounds import Scale
from hdit.protocols import NormalNoise, Spec
from hdit.tensors import NotFiniteError, is_finite


def from_pixels(images: Tensor) -> Tensor:
    """0 to 255 -> float32 in [-1, 1]: x/127.5 - 1."""
    return images.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """floor(clamp(127.5 x + 128, 0, 255)): rounds to the nearest of 0..255.

    Raises NotFiniteError for what is no image: a cast would make black pixels of nan.
    """
    if not is_finite(x):
        raise NotFiniteError("images: values that are not finite cannot be shown")
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


class PixelSpace(Spec):
    """uint8 images (b c h w) <-> x0 in [-1, 1]; sigma_data as Karras et al., 2022 take it."""

    kind: Literal["pixel"] = "pixel"
    sigma_data: Scale = Field(0.5, description="standard deviation of the images in -1..1")

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of what the diffusion sees: the image's own."""
        return channels, height, width

    def check(self, height: int, width: int) -> list[tuple[str, str]]:
        """Lists (key, what is wrong) for images of this size: nothing ever is."""
        return []

    def open(self, device: torch.device) -> PixelSpace:
        """Returns the space itself: there is nothing to load."""
        return self

    @property
    def identity(self) -> str:
        """Empty, as there is no VAE."""
        return ""

    def encode(self, images: Tensor) -> Tensor:
        """Returns the images: they are what is stored."""
        return images

    def normalize(self, stored: Tensor, noise: NormalNoise) -> Tensor:
        """Images (b c h w) of 0 to 255 -> x0 float32 in [-1, 1]; `noise` is not called."""
        return from_pixels(stored)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (b c h w) -> images (b c h w) uint8. Raises NotFiniteError."""
        return to_pixels(x0)
