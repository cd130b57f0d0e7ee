"""Axial rotary positions (Crowson et al., 2024, section 4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hdit.nn.norm import at_least_float32


def axial_positions(h: int, w: int, device: torch.device | None = None) -> Tensor:
    """Centres (y, x) of h x w square cells whose longer side spans [-1, 1]: (h w 2) float32."""

    def centres(length: int) -> Tensor:
        extent = length / max(h, w)
        edges = torch.linspace(-extent, extent, length + 1, device=device)
        return (edges[:-1] + edges[1:]) / 2

    return torch.stack(torch.meshgrid(centres(h), centres(w), indexing="ij"), dim=-1)


def downscale_positions(pos: Tensor) -> Tensor:
    """Mean of each 2x2 block of cells: (h w 2) -> (h/2 w/2 2)."""
    return pos.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(1, 3))


def rotate(x: Tensor, theta: Tensor) -> Tensor:
    """Rotates pairs (i, i + f) of the first 2f elements by theta (... f); the rest of x stays."""
    f = theta.shape[-1]
    a, b, rest = x.split([f, f, x.shape[-1] - 2 * f], dim=-1)
    cos, sin = theta.cos(), theta.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class AxialRoPE(nn.Module):
    """Rotates each head of q and k (b h w n e) by the cell's position pos (h w 2).

    Of a head's elements the first `rotated` turn, all or half of them. Frequencies run from pi to
    10 pi, log-spaced and interleaved over the heads, alike for y and x. They are a buffer, so that
    a checkpoint's own values are kept.
    """

    freqs: Tensor

    def __init__(self, n_heads: int, rotated: int):
        super().__init__()
        n = n_heads * (rotated // 4)
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), n + 1)[:-1].exp()
        self.register_buffer("freqs", freqs.view(-1, n_heads).mT.contiguous())  # (n rotated/4)

    def angles(self, pos: Tensor) -> Tensor:
        """(h w 2) -> (h w n rotated/2), in float32 or wider."""
        y, x = pos[:, :, None, None, 0], pos[:, :, None, None, 1]
        freqs = at_least_float32(self.freqs)
        return torch.cat([y * freqs, x * freqs], dim=-1)

    def forward(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        theta = self.angles(pos)
        return rotate(q, theta), rotate(k, theta)
