"""The contract of neighborhood attention: the problem, and the functions that a backend offers.

Semantics are NATTEN's (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023): the query
at (y, x) attends to the k x k keys from row clamp(y - k//2, 0, h - k) and column
clamp(x - k//2, 0, w - k) on. At a border the window is shifted to stay inside, so that each query
has exactly k*k keys.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Problem(NamedTuple):
    """All that the choice of a backend may depend on: never a timing, so a rerun chooses alike."""

    device: str
    dtype: torch.dtype
    height: int
    width: int
    kernel_size: int
    d_head: int
    grad: bool  # whether gradients will be asked for
    capability: tuple[int, int] | None = None  # compute capability of a CUDA device


class Backend(Protocol):
    """A module of this package that computes neighborhood attention."""

    def unavailable(self) -> str | None:
        """Why this backend can run nowhere on this machine, or None if it can.

        It may compile, but does not fail.
        """

    def unsupported(self, problem: Problem) -> str | None:
        """Why this backend cannot solve `problem`, or None if it can; covers `unavailable()`."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
        """softmax(scale * q k^T) v over each window; q, k, v and the result (b h w n e).

        The arguments are known to be valid.
        """
