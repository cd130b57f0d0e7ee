"""Neighborhood attention as its definition reads: gather each query's window, then attend.

It holds k*k copies of the keys and values. Use it to check other backends, or on small grids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hdit_kernels.contract import Problem


def window_starts(length: int, kernel_size: int, device: torch.device | None = None) -> Tensor:
    """First key of each query's window along one axis -> (length,) int64."""
    centre = torch.arange(length, device=device)
    return (centre - kernel_size // 2).clamp(0, length - kernel_size)


def unavailable() -> str | None:
    """Why the backend can run nowhere on this machine, or None; see `contract.Backend`."""
    return None


def unsupported(problem: Problem) -> str | None:
    """Why the backend cannot solve `problem`, or None; see `contract.Backend`."""
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """Neighborhood attention of valid q, k, v (b h w n e) -> (b h w n e), in q's dtype."""
    h, w = q.shape[1:3]
    offset = torch.arange(kernel_size, device=q.device)
    rows = window_starts(h, kernel_size, q.device)[:, None] + offset  # (h k)
    cols = window_starts(w, kernel_size, q.device)[:, None] + offset  # (w k)
    rows, cols = rows[:, None, :, None], cols[None, :, None, :]  # (h 1 k 1), (1 w 1 k)
    keys, values = k[:, rows, cols], v[:, rows, cols]  # (b h w k k n e)
    logits = torch.einsum("bhwne,bhwijne->bhwnij", q, keys) * scale
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("bhwnij,bhwijne->bhwne", weights, values)
