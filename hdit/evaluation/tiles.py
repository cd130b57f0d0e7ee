"""Distances between all rows of two sets of features, a tile at a time, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 2**24
"""Distances at once: 128 MiB of float64, whatever the numbers of rows."""
ROWS = 2048


class Tile(NamedTuple):
    """Squared distances (r c) between rows x[top : top + r] and y[left : left + c]."""

    top: int
    left: int
    squared: Tensor


def tiles(x: Tensor, y: Tensor, tile: int = TILE) -> Iterator[Tile]:
    """Squared distances of x (n d) to y (m d), band by band of rows of x, from left to right.

    Both are centred on the mean of y first: |x|^2 + |y|^2 - 2 x.y would lose the digits that the
    offset takes. Memory is that of a tile and of the rows that it is of, whatever n and m are.
    """
    centre = y.double().mean(0)
    columns = max(1, tile // ROWS)
    for top in range(0, len(x), ROWS):
        band = x[top : top + ROWS].double() - centre
        lengths = band.square().sum(1, keepdim=True)
        for left in range(0, len(y), columns):
            part = y[left : left + columns].double() - centre
            squared = lengths + part.square().sum(1) - 2 * band @ part.T
            yield Tile(top, left, squared.clamp_(min=0))


def without_itself(tile: Tile) -> Tensor:
    """The distances of a tile of a set to itself, those of a row to itself infinite."""
    rows = torch.arange(tile.top, tile.top + tile.squared.shape[0], device=tile.squared.device)
    columns = torch.arange(tile.left, tile.left + tile.squared.shape[1], device=rows.device)
    return tile.squared.masked_fill(rows[:, None] == columns, torch.inf)


class Nearest(NamedTuple):
    """Of each row of x: `squared` distances (n k) to its nearest rows of y, and their `indices`."""

    squared: Tensor
    indices: Tensor


def nearest(x: Tensor, y: Tensor | None, k: int = 1, tile: int = TILE) -> Nearest:
    """The k nearest rows of y (m d) to each row of x (n d), the nearest first.

    Without y those of x itself, in which a row is no neighbour of itself; m must be more than k
    then, and else at least k.
    """
    others = x if y is None else y
    assert len(others) >= k + (y is None), "there must be as many neighbours"
    squared = x.new_full((len(x), k), torch.inf, dtype=torch.float64)
    indices = torch.zeros((len(x), k), dtype=torch.int64, device=x.device)
    for part in tiles(x, others, tile):
        found = part.squared if y is not None else without_itself(part)
        band = slice(part.top, part.top + len(found))
        least, places = found.topk(min(k, found.shape[1]), dim=1, largest=False)
        both = torch.cat([squared[band], least], 1)
        which = torch.cat([indices[band], places + part.left], 1)
        squared[band], order = both.topk(k, dim=1, largest=False, sorted=True)
        indices[band] = which.gather(1, order)
    return Nearest(squared, indices)
