"""Precision and recall of Kynkäänniemi et al., 2019: how much of each set lies in the other's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hdit.evaluation.tiles import TILE, nearest, tiles

NEIGHBOURS = 3  # k of the paper's experiments, and of ADM


class PrecisionRecall(NamedTuple):
    """Shares of a set that lie in the manifold of the other."""

    precision: float
    recall: float


def precision_recall(
    x: Tensor, y: Tensor, k: int = NEIGHBOURS, tile: int = TILE
) -> PrecisionRecall:
    """Precision and recall of samples x (n d) against real y (m d), n and m more than k.

    The manifold of a set is the union of balls around its rows, each as large as the distance to
    the k-th nearest other row (eq. 1). Precision is the share of x in the manifold of y, recall
    the share of y in that of x (eq. 2).
    """
    assert min(len(x), len(y)) > k, "a radius needs k others"
    radii_x, radii_y = (nearest(rows, None, k, tile).squared[:, -1] for rows in (x, y))
    in_y = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    in_x = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for top, left, squared in tiles(x, y, tile):
        rows, columns = slice(top, top + len(squared)), slice(left, left + squared.shape[1])
        in_y[rows] |= (squared <= radii_y[columns]).any(1)
        in_x[columns] |= (squared <= radii_x[rows, None]).any(0)
    return PrecisionRecall(in_y.double().mean().item(), in_x.double().mean().item())
