"""Neighborhood attention: its backends, the choice among them, and the function that models call.

hdit_kernels.contract states what a backend computes.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hdit_kernels import cpu, flex, natten, reference, tile, triton
from hdit_kernels.contract import Backend, Problem

log = logging.getLogger(__name__)


BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "triton": triton,
    "natten": natten,
    "flex": flex,
    "tile": tile,
    "reference": reference,
}
"""Backends by name."""


class Choice(NamedTuple):
    """A row of AUTO: which problems it is for, and the backends to try on them, best first.

    None is any; a range includes both its ends. A row that names capabilities is for no problem
    of which the capability is not known.
    """

    device: str | None
    backends: tuple[str, ...]
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    kernel_sizes: tuple[int, int] | None = None
    d_heads: tuple[int, int] | None = None

    def fits(self, problem: Problem) -> bool:
        """Whether the row is for this problem."""
        if self.device is not None and problem.device != self.device:
            return False
        if self.capabilities is not None:
            least, most = self.capabilities
            if problem.capability is None or not least <= problem.capability <= most:
                return False
        if self.dtypes is not None and problem.dtype not in self.dtypes:
            return False
        return _within(problem.kernel_size, self.kernel_sizes) and _within(
            problem.d_head, self.d_heads
        )


def _within(value: int, ends: tuple[int, int] | None) -> bool:
    return ends is None or ends[0] <= value <= ends[1]


AUTO: tuple[Choice, ...] = (
    Choice("cpu", ("cpu", "tile", "reference")),
    Choice("cuda", ("natten", "flex", "tile", "reference")),
    Choice(None, ("tile", "reference")),
)
"""What "auto" takes: the first row that fits a problem, and of its backends the first that can.

A row names triton only for a capability on which docs/benchmarks.md has measured it, in a section
that says "capability 9.0" or the like; a test holds it. Elsewhere triton is taken by name alone.
For 16 bits on capability 9.0, for example, before the row that is there for "cuda":

    Choice("cuda", ("triton", "flex", "tile", "reference"), capabilities=((9, 0), (9, 0)),
           dtypes=(torch.bfloat16, torch.float16), kernel_sizes=(3, 13), d_heads=(32, 128))
"""


def select_backend(problem: Problem) -> str:
    """The name of the backend that "auto" takes for a problem, by AUTO."""
    for name in _order(problem):
        if name == "natten" and not natten.has_libnatten():
            continue  # it would be flex_attention with a detour
        if BACKENDS[name].unsupported(problem) is None:
            return name
    raise AssertionError(f"'reference' must support every valid problem, but refused {problem}")


def _order(problem: Problem) -> tuple[str, ...]:
    for row in AUTO:
        if row.fits(problem):
            return row.backends
    raise AssertionError(f"AUTO has no row for {problem}")


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device; None elsewhere, and of tensors without data where there is no CUDA."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device)
    return None


# To torch.compile a constant, which it does not look into: what assume_constant_result of
# torch.compiler sets, without the second that it takes to import the compiler.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _log_once(problem: Problem, name: str) -> None:
    grid = f"{problem.height} x {problem.width}"
    _say_once(f"neighborhood attention on {grid}: backend {name!r} ({problem.device})")


@lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    """Problems that differ in what is not told, as in their batch, are told of once."""
    log.info(text)


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, kernel_size: int) -> None:
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
    h, w = q.shape[1:3]
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if kernel_size > min(h, w):
        raise ValueError(
            f"kernel_size must be at most the grid's smaller side, "
            f"got {kernel_size} on a grid of {h}x{w}"
        )


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, *, scale: float, backend: str = "auto"
) -> Tensor:
    """softmax(scale * q k^T) v over each query's k x k neighborhood; differentiable in q, k and v.

    q, k, v: (b h w n e), heads n last but one, of one floating dtype and device.
    kernel_size: odd, at most h and at most w.  scale: factor on the logits.
    backend: "auto", or one of BACKENDS; one asked for by name never falls back to another.
    Returns (b h w n e) in q's dtype.  Raises ValueError on any other input.
    """
    _check_arguments(q, k, v, kernel_size)
    _, h, w, _, e = q.shape
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    problem = Problem(q.device.type, q.dtype, h, w, kernel_size, e, grad, _capability(q.device))
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
