"""The contract of neighborhood attention, its backends and the choice among them.

Semantics are NATTEN's (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023): the query
at (y, x) attends to the k x k keys from row clamp(y - k//2, 0, h - k) and column
clamp(x - k//2, 0, w - k) on. At a border the window is shifted to stay inside, so that each query
has exactly k*k keys.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hdit_kernels import reference, tile

log = logging.getLogger(__name__)


class Problem(NamedTuple):
    """All that the choice of a backend may depend on: never a timing, so a rerun chooses alike."""

    device: str
    dtype: torch.dtype
    height: int
    width: int
    kernel_size: int
    d_head: int


class Backend(Protocol):
    """A module of this package that computes the contract."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why this backend cannot solve the problem, or None where it can."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
        """The contract, on arguments that are known to be valid."""


BACKENDS: dict[str, Backend] = {"tile": tile, "reference": reference}
"""Backends by name, in the order in which "auto" prefers them."""


def select_backend(problem: Problem) -> str:
    """The name of the backend that "auto" takes for a problem."""
    for name, backend in BACKENDS.items():
        if backend.unsupported(problem) is None:
            return name
    raise AssertionError(f"'reference' must support every valid problem, but refused {problem}")


@lru_cache(maxsize=256)
def _log_once(problem: Problem, name: str) -> None:
    grid = f"{problem.height} x {problem.width}"
    log.info("neighborhood attention on %s: backend %r (%s)", grid, name, problem.device)


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, *, scale: float, backend: str = "auto"
) -> Tensor:
    """softmax(scale * q k^T) v over each query's k x k neighborhood; differentiable in q, k and v.

    q, k, v: (b h w n e), heads n last but one, of one floating dtype and device.
    kernel_size: odd, at most h and at most w.  scale: factor on the logits.
    backend: "auto", or one of BACKENDS; one asked for by name never falls back to another.
    Returns (b h w n e) in q's dtype.  Raises ValueError on any other input.
    """
    if q.ndim != 5 or q.shape != k.shape or q.shape != v.shape:
        shapes = [tuple(t.shape) for t in (q, k, v)]
        raise ValueError(f"q, k and v must have one shape (b h w n e), got {shapes}")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if q.device != k.device or q.device != v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}"
        )
    _, h, w, _, e = q.shape
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if kernel_size > min(h, w):
        raise ValueError(
            f"kernel_size must be at most the grid's smaller side, "
            f"got {kernel_size} on a grid of {h}x{w}"
        )
    problem = Problem(q.device.type, q.dtype, h, w, kernel_size, e)
    if backend == "auto":
        name = select_backend(problem)
        chosen = BACKENDS[name]
        if not torch.compiler.is_compiling():
            _log_once(problem, name)
    elif backend in BACKENDS:
        chosen = BACKENDS[backend]
        if reason := chosen.unsupported(problem):
            raise ValueError(f"backend {backend!r} cannot compute {problem}: {reason}")
    else:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    with torch.autocast(q.device.type, enabled=False):  # the result has q's dtype
        return chosen.attention(q, k, v, kernel_size, scale)
