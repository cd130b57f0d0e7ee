"""Axial rotary positions (Crowson et al., 2024, section 4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hdit_kernels.fused import at_least_float32


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


class AxialRoPE(nn.Module):
    """The angles by which each head of q and k turns at the cells of a grid.

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
        self._kept: tuple[Tensor, Tensor, int, Tensor] | None = None

    def angles(self, pos: Tensor) -> Tensor:
        """(h w 2) -> (h w n rotated/2), in float32 or wider: first those of y, then of x."""
        y, x = pos[:, :, None, None, 0], pos[:, :, None, None, 1]
        freqs = at_least_float32(self.freqs)
        return torch.cat([y * freqs, x * freqs], dim=-1)

    def table(self, pos: Tensor) -> Tensor:
        """Cosines and sines of the angles of a grid's rows, then of its columns.

        pos (h w 2), each row with one y and each column with one x -> (h+w 2 n rotated/4).
        """
        rows, _ = self.angles(pos[:, :1]).chunk(2, dim=-1)  # (h 1 n rotated/4)
        _, columns = self.angles(pos[:1]).chunk(2, dim=-1)  # (1 w n rotated/4)
        angles = torch.cat([rows[:, 0], columns[0]])
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def forward(self, pos: Tensor) -> Tensor:
        """The table, made once for the positions that the last call came with.

        Anew where `freqs` is another tensor or was written to (but not through `freqs.data`).
        """
        freqs = self.freqs
        if torch.compiler.is_compiling() or type(pos) is not Tensor or freqs.is_inference():
            return self.table(pos)
        kept = self._kept  # read once: another thread may replace it
        if kept is not None and kept[0] is pos and kept[1] is freqs and kept[2] == freqs._version:
            return kept[3]
        with torch.inference_mode(False), torch.no_grad():  # it may serve training as well
            table = self.table(pos)
        if type(table) is Tensor:
            self._kept = (pos, freqs, freqs._version, table)
        return table
