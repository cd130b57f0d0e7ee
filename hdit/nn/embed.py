"""Embeddings of noise labels, classes and positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdit.protocols import NULL_LABEL


class FourierFeatures(nn.Module):
    """Random Fourier features (Tancik et al., 2020): x (b i) -> (cos, sin) of 2 pi x W^T, (b o).

    The frequencies are a buffer, drawn once and saved with the model.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(out_features // 2, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x (b i) -> (b o), in the dtype of the frequencies: all cosines, then all sines."""
        phase = F.linear(2 * math.pi * x.to(self.weight.dtype), self.weight)
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000) -> Tensor:
    """t (b,) -> (cos, sin) at width/2 log-spaced frequencies: (b width) float32, padded if odd.

    Source: Peebles & Xie, 2023 (after Vaswani et al., 2017); cosines come first.
    """
    half = width // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    phase = t.float()[:, None] * freqs
    return F.pad(torch.cat([phase.cos(), phase.sin()], dim=-1), (0, width % 2))


def sincos_positions(h: int, w: int, width: int) -> Tensor:
    """Fixed table of DiT: (h w width) float32; the first half encodes the column, then the row.

    Each half is (sin, cos) of the integer position at 10000^(-k/(width/4)); computed in float64.
    """
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def axis(length: int) -> Tensor:
        phase = torch.arange(length, dtype=torch.float64)[:, None] * omega
        return torch.cat([phase.sin(), phase.cos()], dim=-1)  # (length width/2)

    col = axis(w)[None, :, :].expand(h, w, -1)
    row = axis(h)[:, None, :].expand(h, w, -1)
    return torch.cat([col, row], dim=-1).float()


class ClassEmbedding(nn.Module):
    """A vector for each class and, in the last row, one for "no class". labels (b,) -> (b d)."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes + 1, width))

    def forward(self, labels: Tensor) -> Tensor:
        """labels (b,) -> (b d); NULL_LABEL takes the last row."""
        return F.embedding(torch.where(labels == NULL_LABEL, self.num_classes, labels), self.weight)


def check_labels(labels: Tensor | None, num_classes: int) -> None:
    """Labels must be there exactly where the model has classes."""
    if (labels is None) != (num_classes == 0):
        have = "no labels" if labels is None else "labels"
        raise ValueError(f"the model has {num_classes} classes, but the batch came with {have}")
