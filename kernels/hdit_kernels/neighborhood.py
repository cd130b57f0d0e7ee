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

from hdit_kernels import cpu, flex, natten, reference, tile, triton

log = logging.getLogger(__name__)


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
    """A module of this package that computes the contract."""

    def unavailable(self) -> str | None:
        """Why this backend can run nowhere on this machine, or None where it can. It may
        compile, but does not fail."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why this backend cannot solve the problem, or None where it can. Covers unavailable()."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
        """The contract, on arguments that are known to be valid."""


BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "triton": triton,
    "natten": natten,
    "flex": flex,
    "tile": tile,
    "reference": reference,
}
"""Backends by name."""

AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "tile", "reference"),
    "cuda": ("natten", "flex", "tile", "reference"),
}
"""The order in which "auto" tries backends on a type of device, best first.

One that is measured nowhere, as triton on CUDA, is taken by name alone.
"""

ANYWHERE = ("tile", "reference")


def select_backend(problem: Problem) -> str:
    """The name of the backend that "auto" takes for a problem."""
    for name in AUTO.get(problem.device, ANYWHERE):
        if name == "natten" and not natten.has_libnatten():
            continue  # it would be flex_attention with a detour
        if BACKENDS[name].unsupported(problem) is None:
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
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    problem = Problem(q.device.type, q.dtype, h, w, kernel_size, e, grad, capability)
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
