"""RMS normalisation (Zhang & Sennrich, 2019), plain and adaptive (Crowson et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hdit_kernels.fused import at_least_float32, norm


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * LN(x) + shift: x (b h w d), shift and scale (b d)."""
    return norm(x, 1 + at_least_float32(scale), at_least_float32(shift), centre=True)


class RMSNorm(nn.Module):
    """RMS norm with a learned scale. x (... d) -> (... d)."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """scale * x / rms(x): (... d) -> (... d)."""
        return norm(x, at_least_float32(self.scale))


class AdaLN(nn.Module):
    """Layer norm whose scale and shift, (1 + a) and b of Linear(cond), are one for each image.

    x (b h w d), cond (b m). Source: Peebles & Xie, 2023.
    """

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.linear = nn.Linear(cond_width, 2 * width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(1 + a) * LN(x) + b: x (b h w d), cond (b m) -> (b h w d)."""
        scale, shift = self.linear(cond).chunk(2, dim=-1)
        return modulated_norm(x, shift, scale)


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale, 1 + Linear(cond), is one for each image. x (b h w d), cond (b m)."""

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.linear = nn.Linear(cond_width, width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(1 + Linear(cond)) * x / rms(x): x (b h w d), cond (b m) -> (b h w d)."""
        return norm(x, 1 + at_least_float32(self.linear(cond)))
