"""Neighborhood attention by NATTEN, from whose definition this package's is taken: `natten.na2d`.

With libnatten it runs NATTEN's fused CUDA kernels: cutlass-fna, hopper-fna or blackwell-fna, as
NATTEN itself chooses. Without it, and on a CPU, NATTEN runs torch's flex_attention uncompiled,
which holds the weights of all tokens to all tokens and breaks torch.compile's graph.

NATTEN tells FlopCounterMode no formula: count with another backend.
"""

from __future__ import annotations

import re
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from hdit_kernels.contract import Problem

INSTALL = (
    "install it with `pip install --no-build-isolation natten` "
    "(with build isolation pip downloads gigabytes)"
)
FIRST = (0, 20)  # with na2d of heads last
HAS_FLEX = torch.__version__ >= "2.7"  # from which on NATTEN runs flex_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def _load() -> ModuleType | str:
    """NATTEN, or why it is unavailable: found out once a process."""
    try:
        import natten
    except Exception as error:  # of any kind: an old NATTEN fails on a new torch in its own ways
        if isinstance(error, ModuleNotFoundError) and error.name == "natten":
            return f"NATTEN is not installed; {INSTALL}"
        return f"NATTEN cannot be imported ({type(error).__name__}: {error})"
    if _version(natten) < FIRST or not hasattr(natten, "na2d"):
        version = getattr(natten, "__version__", "of unknown version")
        return f"NATTEN {version} is too old, 0.20 is the first that will do; {INSTALL}"
    return natten


def _version(natten: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", getattr(natten, "__version__", ""))[:2]))


def unavailable() -> str | None:
    """Why the backend can run nowhere on this machine, or None; see `contract.Backend`."""
    found = _load()
    return found if isinstance(found, str) else None


def has_libnatten() -> bool:
    """Whether NATTEN is there with its own CUDA kernels."""
    return bool(getattr(_load(), "HAS_LIBNATTEN", False))


def _least_d_head() -> int:
    """The least d_head of NATTEN's flex_attention."""
    found = _load()
    return 8 if isinstance(found, ModuleType) and _version(found) >= (0, 21) else 32


# To torch.compile constants, which it does not look into: what assume_constant_result of
# torch.compiler sets, without the second that it takes to import the compiler.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
has_libnatten._dynamo_marked_constant = True  # type: ignore[attr-defined]
_least_d_head._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(problem: Problem) -> str | None:
    """Why the backend cannot solve `problem`, or None; see `contract.Backend`."""
    if reason := unavailable():
        return reason
    d_head = problem.d_head
    if problem.device not in ("cuda", "cpu"):
        return f"NATTEN runs on CUDA, and without gradients on a CPU, not on {problem.device!r}"
    if problem.device == "cpu" and problem.grad:
        return "NATTEN has no gradient on a CPU"
    if problem.dtype not in DTYPES:
        return f"NATTEN computes in float32, bfloat16 and float16, not in {problem.dtype}"
    if problem.kernel_size < 2:
        return f"NATTEN wants a kernel_size of at least 2, not {problem.kernel_size}"
    if problem.device == "cuda" and has_libnatten():
        return f"NATTEN wants a d_head that 8 divides, not {d_head}" if d_head % 8 else None
    if not HAS_FLEX:
        return f"without libnatten NATTEN wants torch 2.7 or later, not {torch.__version__}"
    least = _least_d_head()
    if not least <= d_head <= 512 or d_head & (d_head - 1):
        return (
            f"without libnatten NATTEN wants a power of two from {least} to 512 as d_head, "
            f"not {d_head}"
        )
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """Neighborhood attention of valid q, k, v (b h w n e) -> (b h w n e), in q's dtype."""
    if q.numel() == 0:  # NATTEN fails on it
        return q + k + v
    if not torch.is_grad_enabled():  # NATTEN looks at requires_grad alone
        q, k, v = q.detach(), k.detach(), v.detach()
    if scale <= 0:  # NATTEN takes 0 as not given, and tells of its kernels nothing below
        q, scale = q * ((scale > 0) - (scale < 0)), abs(scale) or 1.0
    import natten  # where there is none, nobody asks

    return natten.na2d(q, k, v, kernel_size=(kernel_size, kernel_size), scale=scale)
