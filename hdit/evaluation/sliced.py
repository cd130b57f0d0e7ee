"""Sliced Wasserstein distance of two sets of features: no covariance, so few images suffice."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PROJECTIONS = 1024
CHUNK = 128  # projections at once


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, projections: int = PROJECTIONS, seed: int = 0
) -> float:
    """d times the mean squared 2-Wasserstein distance of x (n d), y (m d) along random lines.

    The lines are uniform over directions (Bonneel et al., 2015, eq. 8), drawn by `seed`. With the
    factor d a shift of all rows by v gives |v|^2 on average, which is what it adds to FID.
    """
    return float(d_times_mean(x, y, [None], projections, seed)[0])


def d_times_mean(
    x: Tensor, y: Tensor, kept: list[Tensor | None], projections: int, seed: int
) -> Tensor:
    """The distance of `sliced_wasserstein` for each subset of x that `kept` masks, (n,) bool.

    None keeps all rows. The subsets share the lines and the projected rows.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    directions = torch.from_numpy(random.standard_normal((projections, x.shape[1])))
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(x.device)
    x, y = x.double(), y.double()
    sums = torch.zeros(len(kept), dtype=torch.float64)
    for lines in directions.split(CHUNK):
        along_x, along_y = x @ lines.T, (y @ lines.T).sort(0).values  # (n p), (m p)
        for i, mask in enumerate(kept):
            rows = along_x if mask is None else along_x[mask]
            sums[i] += _squared_wasserstein(rows.sort(0).values, along_y).sum().cpu()
    return x.shape[1] * sums / projections


def _squared_wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of each column of x (n p), y (m p), both sorted: (p,).

    The quantile functions are steps, so that their squared difference is summed between all places
    where either jumps.
    """
    n, m = len(x), len(y)
    if n == m:
        return (x - y).square().mean(0)
    jumps = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))  # times n m
    left = torch.from_numpy(jumps[:-1]).to(x.device)
    widths = torch.from_numpy(np.diff(jumps)).to(x.device, torch.float64) / (n * m)
    return widths @ (x[left // m] - y[left // n]).square()
