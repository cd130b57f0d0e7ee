"""Pixel space: the diffusion sees the image itself, scaled to [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


class PixelSpace:
    """uint8 images (b c h w) <-> x0 in [-1, 1]; sigma_data 0.5, as Karras et al., 2022 take it."""

    sigma_data = 0.5

    def encode(self, images: Tensor) -> Tensor:
        """What is stored is the image."""
        return images

    def normalize(self, stored: Tensor) -> Tensor:
        """uint8 -> float32 in [-1, 1]: x/127.5 - 1."""
        return stored.float() / 127.5 - 1

    def decode(self, x0: Tensor) -> Tensor:
        """floor(clamp(127.5 x + 128, 0, 255)): rounds to the nearest of 0..255."""
        return (127.5 * x0 + 128).clamp(0, 255).to(torch.uint8)
