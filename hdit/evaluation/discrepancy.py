"""Maximum mean discrepancy of whole sets by any kernel, with its jackknife; and CMMD by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hdit.evaluation.tiles import ROWS, TILE

Kernel = Callable[[Tensor, Tensor], Tensor]
"""x (n d), y (m d) in float64 -> (n m)."""

SIGMA, SCALE = 10.0, 1000.0  # of CMMD (Jayasumana et al., 2024, section 4)


class Discrepancy(NamedTuple):
    """A squared maximum mean discrepancy and its standard error, of the delete-one jackknife."""

    squared: float
    error: float


class _Rows(NamedTuple):
    """The kernel of each row of a set (n,): its mean over the other set, its sum over its own set,
    and its value with itself."""

    across: Tensor
    within: Tensor
    own: Tensor


def discrepancy(
    x: Tensor, y: Tensor, kernel: Kernel, *, unbiased: bool = True, tile: int = TILE
) -> Discrepancy:
    """Squared MMD of x (n d) and y (m d) (Gretton et al., 2012), n and m of at least 3.

    Unbiased it is the paper's equation 3; else equation 5, which counts each row with itself. The
    error is the root of both sets' jackknife variances. What the statistic is without a row follows
    from that row's sums, so that no kernel is computed twice for it.
    """
    assert min(len(x), len(y)) > 2, "a jackknife leaves one out of three or more"
    sets = [_rows(x, y, kernel, tile), _rows(y, x, kernel, tile)]
    within = [_within(rows.within.sum(), rows.own.sum(), len(rows.own), unbiased) for rows in sets]
    value = within[0] + within[1] - 2 * sets[0].across.mean()
    variance = sum(_variance(rows, unbiased) for rows in sets)
    return Discrepancy(value.item(), float(variance) ** 0.5)


def _rows(x: Tensor, y: Tensor, kernel: Kernel, tile: int) -> _Rows:
    own = torch.cat([kernel(part, part).diagonal() for part in x.double().split(64)])
    return _Rows(_sums(x, y, kernel, tile) / len(y), _sums(x, x, kernel, tile), own)


def _sums(x: Tensor, y: Tensor, kernel: Kernel, tile: int) -> Tensor:
    """Sums over y of the kernel of each row of x: (n,)."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    columns = max(1, tile // ROWS)
    for top in range(0, len(x), ROWS):
        band = x[top : top + ROWS].double()
        for left in range(0, len(y), columns):
            sums[top : top + ROWS] += kernel(band, y[left : left + columns].double()).sum(1)
    return sums


def _within(total: Tensor, own: Tensor, n: int, unbiased: bool) -> Tensor:
    """The mean of the kernel over the pairs of a set of n rows, from its sums."""
    return (total - own) / (n * (n - 1)) if unbiased else total / n**2


def _variance(rows: _Rows, unbiased: bool) -> Tensor:
    """The jackknife's variance over the rows of one set; what the others add does not vary."""
    n = len(rows.own)
    total = rows.within.sum() - 2 * rows.within + rows.own  # (n,), each without a row
    within = _within(total, rows.own.sum() - rows.own, n - 1, unbiased)
    across = (rows.across.sum() - rows.across) / (n - 1)
    return (n - 1) * (within - 2 * across).var(correction=0)


# ---- CMMD ----------------------------------------------------------------------------------------


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) of x (n d), y (m d) -> (n m), sigma that of CMMD."""
    lengths = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.exp((x @ y.T - lengths / 2).clamp(max=0) / SIGMA**2)


def cmmd(x: Tensor, y: Tensor, tile: int = TILE) -> Discrepancy:
    """CMMD of embeddings of CLIP, of length 1: x (n d), y (m d).

    The biased estimate with a Gaussian kernel of sigma 10, times 1000.
    """
    found = discrepancy(x, y, gaussian_kernel, unbiased=False, tile=tile)
    return Discrepancy(SCALE * found.squared, SCALE * found.error)
