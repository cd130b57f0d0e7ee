"""RMS normalisation (Zhang & Sennrich, 2019), plain and adaptive (Crowson et al., 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x * scale / rms(x) over the last axis: statistics in float32 or wider, result as x."""
    wide = at_least_float32(x)
    factor = scale * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x * factor.to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm with a learned scale. x (... d) -> (... d)."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)


class AdaLN(nn.Module):
    """Layer norm whose scale and shift, (1 + a) and b of Linear(cond), are one for each image.

    x (b h w d), cond (b m). Source: Peebles & Xie, 2023.
    """

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.linear = nn.Linear(cond_width, 2 * width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = at_least_float32(self.linear(cond))[:, None, None, :].chunk(2, dim=-1)
        wide = F.layer_norm(at_least_float32(x), x.shape[-1:], eps=1e-6)
        return torch.addcmul(shift, wide, 1 + scale).to(x.dtype)


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale, 1 + Linear(cond), is one for each image. x (b h w d), cond (b m)."""

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.linear = nn.Linear(cond_width, width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return rms_norm(x, 1 + at_least_float32(self.linear(cond))[:, None, None, :])
