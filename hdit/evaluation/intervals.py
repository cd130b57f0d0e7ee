"""How far a figure would move with other images: jackknife errors and intervals of 95 percent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdit.evaluation.distances import Gaussian, Moments, distance_to, root
from hdit.evaluation.sliced import PROJECTIONS, d_times_mean

GROUPS = 20
GROUPS_SEED = 3  # of Philox, beside those of KID's draws
NORMAL = 1.959964
STUDENT = {9: 2.262157, 19: 2.093024}
"""Quantiles of 0.975, by degrees of freedom; else the normal's."""


def interval(value: float, error: float, method: str, freedom: int = 0) -> dict[str, Any]:
    """The interval of 95 percent around a value, for a card; `method` says how, in words."""
    reach = STUDENT.get(freedom, NORMAL) * error
    return {"low": value - reach, "high": value + reach, "error": error, "method": method}


def share_interval(share: float, n: int, method: str) -> dict[str, Any]:
    """Wilson's interval (1927) of a share of n images: at 0 and 1 it is not empty either.

    `error` is the standard error of the share, which is that of the delete-one jackknife.
    """
    square = NORMAL**2 / n
    middle = (share + square / 2) / (1 + square)
    reach = math.sqrt(NORMAL**2 * share * (1 - share) / n + square**2 / 4) / (1 + square)
    made = {"low": max(0.0, middle - reach), "high": min(1.0, middle + reach)}
    return made | {"error": math.sqrt(share * (1 - share) / (n - 1)), "method": method}


def groups_of(n: int, groups: int = GROUPS) -> Tensor:
    """The group of each of n rows, as equal in size as can be, at random but always alike: (n,)."""
    order = np.random.Generator(np.random.Philox(key=[GROUPS_SEED, n])).permutation(n)
    return torch.from_numpy(order % groups)


def jackknife_error(values: Tensor) -> float:
    """Standard error from a statistic's values (g,), each without one of g groups.

    Of g groups of about the same size: sqrt((g - 1) / g * sum (value - mean)^2).
    """
    return math.sqrt((len(values) - 1) * values.var(correction=0).item())


def frechet_error(
    rows: Tensor, whole: Gaussian, reference: Gaussian, tell: Callable[[], None]
) -> float:
    """Standard error of the Fréchet distance of rows (n d) to a reference that counts as fixed.

    A bootstrap would draw rows twice, which lowers the rank and raises the distance, and so tell
    of another bias than that of the figure. The jackknife leaves each of 20 groups out in turn:
    all 20 distances are of n (1 - 1/20) images and share one bias, which their spread is free of.
    `whole` is the Gaussian of all images, of which there may be more than rows.
    """
    groups, values = groups_of(len(rows)), []
    few = len(rows) <= rows.shape[1]  # whose covariance has the rows themselves as a root
    if not few:
        root_b, total = root(reference.cov), _moments(rows)
    for i in range(GROUPS):
        if few:
            left = _moments(rows[groups != i]).gaussian()
            root_a = (rows[groups != i].double() - left.mean).T / math.sqrt(left.n - 1)
            values.append(distance_to(reference, left, root_a))
        else:
            left = total.without(_moments(rows[groups == i])).gaussian()
            values.append(distance_to(left, reference, root_b))
        tell()
    return jackknife_error(torch.tensor(values)) * math.sqrt(len(rows) / whole.n)


def _moments(rows: Tensor) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.split(4096):
        moments.add(part)
    return moments


def sliced_error(x: Tensor, y: Tensor, seed: int = 0, projections: int = PROJECTIONS) -> float:
    """Standard error of the sliced Wasserstein distance of x (n d) to a fixed y (m d)."""
    groups = groups_of(len(x)).to(x.device)
    kept: list[Tensor | None] = [groups != i for i in range(GROUPS)]
    return jackknife_error(d_times_mean(x, y, kept, projections, seed))
