"""Neighborhood attention on a CPU, in C++: `native/neighborhood.cpp`.

Queries in strips of a row, vectorised across queries, so that no key is computed in vain. bfloat16
and float16 are computed in float32, and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hdit_kernels import native
from hdit_kernels.contract import Problem
from hdit_kernels.flops import backward_flops, forward_flops

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def unavailable() -> str | None:
    """Why the backend can run nowhere on this machine, or None; see `contract.Backend`."""
    return native.unavailable()


def unsupported(problem: Problem) -> str | None:
    """Why the backend cannot solve `problem`, or None; see `contract.Backend`."""
    if problem.device != "cpu":
        return f"it runs on a CPU, not on {problem.device!r}"
    if problem.dtype not in NAMES and problem.dtype != torch.float16:
        return f"it computes in float32, float64, bfloat16 and float16, not in {problem.dtype}"
    return unavailable()


def _readable(x: Tensor) -> Tensor:
    """x with a head's elements together, in a dtype that the library reads."""
    x = x if x.dtype in NAMES else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _layout(q: Tensor, kernel_size: int, *tensors: Tensor) -> tuple[list[int], list[int]]:
    return [*q.shape, kernel_size], [stride for t in tensors for stride in t.stride()[:4]]


@torch.library.custom_op("hdit_kernels::neighborhood_cpu", mutates_args=())
def cpu_forward(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """The operator: q, k, v (b h w n e) -> (b h w n e), in q's dtype."""
    dtype = q.dtype
    q, k, v = _readable(q), _readable(k), _readable(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sizes, strides = _layout(q, kernel_size, q, k, v, out)
    if out.numel():
        name = f"neighborhood_forward_{NAMES[q.dtype]}"
        native.run(name, sizes, strides, float(scale), q, k, v, out)
    return out.to(dtype)


@torch.library.custom_op("hdit_kernels::neighborhood_cpu_backward", mutates_args=())
def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v (b h w n e), from that of the output."""
    dtype = q.dtype
    grad, q, k, v = (_readable(t) for t in (grad, q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
    sizes, strides = _layout(q, kernel_size, q, k, v, grad, dq, dk, dv)
    if dq.numel():
        name = f"neighborhood_backward_{NAMES[q.dtype]}"
        native.run(name, sizes, strides, float(scale), q, k, v, grad, dq, dk, dv)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@cpu_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@cpu_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.kernel_size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        grads = cpu_backward(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.scale)
    return *grads, None, None


cpu_forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.hdit_kernels.neighborhood_cpu)
def _(q: tuple[int, ...], k: Any, v: Any, kernel_size: int, *args: Any, **kwargs: Any) -> int:
    return forward_flops(q, kernel_size)


@register_flop_formula(torch.ops.hdit_kernels.neighborhood_cpu_backward)
def _(
    grad: Any, q: tuple[int, ...], k: Any, v: Any, kernel_size: int, *args: Any, **kwargs: Any
) -> int:
    return backward_flops(q, kernel_size)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """Neighborhood attention of valid q, k, v (b h w n e) -> (b h w n e), in q's dtype."""
    return cpu_forward(q, k, v, kernel_size, scale)
