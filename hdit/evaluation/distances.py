"""Distances between two sets of features: Fréchet (FID) and kernel (KID), in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hdit.tensors import NotFiniteError, is_finite

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as Binkowski et al., 2018
SMALLER = "take features of smaller values"


class Gaussian(NamedTuple):
    """The first two moments of n features: mean (d,), covariance (d d) unbiased, float64."""

    n: int
    mean: Tensor
    cov: Tensor


class Moments:
    """Mean and covariance of rows that come in batches, each merged by Chan et al., 1983."""

    def __init__(self, d: int):
        self.n = 0
        self.mean = torch.zeros(d, dtype=torch.float64)
        self.scatter = torch.zeros(d, d, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def add(self, x: Tensor) -> None:
        """x (b d), of any dtype."""
        x = x.double()
        b, mean = len(x), x.mean(0)
        shift = mean - self.mean
        rows = torch.cat([x - mean, shift[None] * (self.n * b / (self.n + b)) ** 0.5])
        self.scatter.addmm_(rows.T, rows)
        self.mean += shift * (b / (self.n + b))
        self.n += b

    def without(self, part: Moments) -> Moments:
        """The moments of the rows that are left when those of `part`, which are in, go."""
        left = Moments(len(self.mean))
        left.n = self.n - part.n
        left.mean = self.mean + (self.mean - part.mean) * (part.n / left.n)
        shift = (part.mean - left.mean)[:, None] * (left.n * part.n / self.n) ** 0.5
        left.scatter = self.scatter - part.scatter - shift @ shift.T
        return left

    def gaussian(self) -> Gaussian:
        """Of two rows or more."""
        assert self.n > 1, "a covariance needs two rows"
        return Gaussian(self.n, self.mean.clone(), self.scatter / (self.n - 1))


# ---- FID -----------------------------------------------------------------------------------------


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Heusel et al., 2017, eq. 6; it is a square).

    With any root R R^T = S1, S1 S2 has the eigenvalues of R^T S2 R, which is symmetric. Zero is
    the least that it can be; rounding below it is cut off. Raises NotFiniteError where features
    are so large that their moments, or the distance, overflow.
    """
    a, b = sorted((a, b), key=lambda gaussian: gaussian.n)  # the lower rank is the one to root
    for moments in (*a[1:], *b[1:]):
        _check(moments)  # LAPACK has no answer for others
    return distance_to(b, a, root(a.cov))


def distance_to(a: Gaussian, b: Gaussian, root_b: Tensor) -> float:
    """The distance of `frechet_distance` where a root (d rank) of the covariance of b is known."""
    product = _check(root_b.T @ a.cov @ root_b)
    covariance = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * covariance
    return max(0.0, _check(distance).item())  # max would make 0 of nan


def _check(x: Tensor) -> Tensor:
    """Returns x. Raises NotFiniteError where it has overflowed."""
    if not is_finite(x):
        raise NotFiniteError(f"FID: the features are too large for it; {SMALLER}")
    return x


def root(cov: Tensor) -> Tensor:
    """R (d rank) with R R^T = cov (d d).

    Directions whose variance is nothing but rounding are left out: what they add would not be
    small, as its square root is taken.
    """
    values, vectors = torch.linalg.eigh(cov)
    keep = values > len(cov) * torch.finfo(cov.dtype).eps * values[-1]
    return vectors[:, keep] * values[keep].sqrt()


# ---- KID -----------------------------------------------------------------------------------------


class KernelDistance(NamedTuple):
    """Mean over subsets; `error` is its standard error, None where there is one subset only.

    Subsets are drawn by `seed`.
    """

    mean: float
    error: float | None
    subsets: int
    sizes: tuple[int, int]
    seed: int


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y/d + 1)^3: x (n d), y (m d) -> (n m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al., 2012, eq. 3)."""

    def others(x: Tensor) -> Tensor:
        """Mean of the kernel over pairs of different rows."""
        kernel = polynomial_kernel(x, x)
        return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))

    return others(x) + others(y) - 2 * polynomial_kernel(x, y).mean()


def kept_for_kid(n: int, seed: int, which: int) -> np.ndarray:
    """Indices of the features, of n, that subsets are drawn from: all, but for very many."""
    order = np.random.Generator(np.random.Philox(key=[seed, which])).permutation(n)
    return np.sort(order[: SUBSETS * SUBSET_SIZE])


def kernel_distance(
    x: Tensor,
    y: Tensor,
    *,
    seed: int = 0,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    on_subset: Callable[[], None] = lambda: None,
) -> KernelDistance:
    """KID (Binkowski et al., 2018) of features x (n d), y (m d): the mean over random subsets.

    A set of fewer than `size` is taken whole. The standard error is the delete-d jackknife's (Shao
    and Wu, 1989), as subsets overlap, but no less than for subsets that do not. Raises
    NotFiniteError where the cube of the features' products overflows.
    """
    sizes = min(size, len(x)), min(size, len(y))
    if sizes == (len(x), len(y)):
        subsets = 1
    random = np.random.Generator(np.random.Philox(key=[seed, 2]))

    def subset(rows: Tensor, size: int) -> Tensor:
        chosen = random.choice(len(rows), size, replace=False)
        return rows[torch.from_numpy(chosen).to(rows.device)].double()

    values = []
    for _ in range(subsets):
        values.append(squared_mmd(subset(x, sizes[0]), subset(y, sizes[1])).item())
        if not math.isfinite(values[-1]):
            raise NotFiniteError(f"KID: the features are too large for their cubes; {SMALLER}")
        on_subset()
    left_out = min(len(x) - sizes[0], len(y) - sizes[1])
    error = None
    if left_out and subsets > 1:
        error = float(np.std(values)) * max(size / left_out, 1 / (subsets - 1)) ** 0.5
    return KernelDistance(float(np.mean(values)), error, subsets, sizes, seed)
