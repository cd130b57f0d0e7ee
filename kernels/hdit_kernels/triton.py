"""Neighborhood attention as one fused CUDA kernel, written in Triton.

A program owns a rectangle of queries of one image and head, and walks over the halo of keys that
they see, a smaller rectangle at a time or all at once; a mask leaves each query its own k x k
window. Softmax is in float32, online where there are several steps, and the backward recomputes
the weights from the saved logsumexp, as in FlashAttention-2 (Dao, 2023). The gradients of keys and
values come from programs that own a rectangle of keys and walk over the queries that see them, so
that nothing is summed in an order left to chance. Windows are NATTEN's. The kernels are in
triton_kernels, the ways to launch them in triton_plans.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hdit_kernels.flops import backward_flops, forward_flops
from hdit_kernels.triton_kernels import ABSENT, dkv_kernel, dq_kernel, forward_kernel
from hdit_kernels.triton_plans import DTYPES, Launch, Plan, choose_plan, padded

if TYPE_CHECKING:
    from hdit_kernels.contract import Problem

if not ABSENT:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

MAX_D_HEAD = 128
INTERPRETED = not ABSENT and not isinstance(forward_kernel, triton.JITFunction)
KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None if they can."""
    if ABSENT:
        return ABSENT
    if INTERPRETED:
        return None
    if torch.version.hip:
        return "its launches are chosen for CUDA, and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device (and triton's interpreter, TRITON_INTERPRET=1, is off)"
    return None


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot compute this problem, or None if they can."""
    if reason := unavailable():
        return reason
    if problem.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {problem.dtype}"
    if problem.d_head > MAX_D_HEAD:
        return f"d_head must be at most {MAX_D_HEAD}, got {problem.d_head}"
    if INTERPRETED:
        if problem.dtype == torch.bfloat16:
            return "triton's interpreter cannot multiply matrices of bfloat16"
    elif problem.device != "cuda":
        return f"it runs on a CUDA device, not on {problem.device!r}"
    elif problem.capability is not None and problem.capability < (8, 0):
        got = "{}.{}".format(*problem.capability)
        return f"it needs a device of compute capability 8.0, got {got}"
    return None


def options(launch: Launch) -> dict[str, Any]:
    """What triton compiles a kernel with. FMA is named, as its default changes with the version."""
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}


def constants(name: str, launch: Launch, kernel_size: int, d_head: int) -> dict[str, Any]:
    """The compile-time arguments of one of KERNELS."""
    (rows, cols), (step_rows, step_cols) = launch.tile, launch.step
    width = sum(launch.tile if name == "dkv" else launch.step)  # rows and columns of keys
    known = {
        "K": kernel_size, "E": d_head, "PAD": padded(d_head),
        "ROWS": rows, "COLS": cols, "STEP_ROWS": step_rows, "STEP_COLS": step_cols,
        # a matrix product sums over 16 terms or more, of a power of two
        "WIDTH": max(16, 1 << (width - 1).bit_length()),
        # numpy, and so the interpreter, has no bfloat16, and -2^110 is beyond float16
        "MASK": tl.float32 if INTERPRETED else tl.bfloat16,
        "PRODUCT": launch.product, "TMA": launch.tma,
    }  # fmt: skip
    if name == "forward":
        known |= {"ONE_PASS": launch.one_pass, "PERSISTENT": launch.persistent > 0}
    return known


def boxes(name: str, launch: Launch) -> dict[str, tuple[int, int]]:
    """Rows and columns that a descriptor fetches at once, of each argument that is one."""
    if not launch.tma:
        return {}
    if name == "dkv":
        return {"k": launch.tile, "v": launch.tile, "q": launch.step, "grad": launch.step}
    owned = {"q": launch.tile} | ({"grad": launch.tile} if name == "dq" else {})
    return owned | {"k": launch.step, "v": launch.step}


def describable(*tensors: Tensor) -> bool:
    """Whether the Tensor Memory Accelerator can address the tensors, which have elements: they
    begin at 16 bytes, and so do all rows; the last axis has no gaps.

    Strides are bounded by cuTensorMapEncodeTiled (CUDA driver API): below 2^40 bytes.
    """
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(-1) == 1
        and all(0 < s * t.itemsize < 2**40 and s * t.itemsize % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def _described(t: Tensor, box: tuple[int, int]) -> Any:
    shape = [1, *box, 1, padded(t.shape[-1])]
    return TensorDescriptor(t, list(t.shape), list(t.stride()), shape)


def _check(name: str, launch: Launch, kernel_size: int, tensors: dict[str, Tensor]) -> None:
    if launch.one_pass and any(
        step < tile + kernel_size - 1 for tile, step in zip(launch.tile, launch.step, strict=True)
    ):
        raise ValueError(
            f"one pass over a kernel of {kernel_size} needs steps of tile + kernel_size - 1, "
            f"got a tile {launch.tile} and steps {launch.step}"
        )
    described = {arg: tensors[arg] for arg in boxes(name, launch)}
    if not describable(*described.values()):
        got = {arg: (t.data_ptr() % 16, t.stride()) for arg, t in described.items()}
        raise ValueError(
            "a plan with tma needs tensors that begin at 16 bytes, positive strides of 16 bytes "
            f"and a last stride of 1, got (data_ptr % 16, strides in elements) {got}"
        )


INTERPRETED_PROCESSORS = 3  # few, so that a persistent program walks over several tiles


def _launch(
    name: str, launch: Launch, kernel_size: int, tensors: dict[str, Tensor], scale: float
) -> None:
    """Runs one of KERNELS on its tensors, which are named as its arguments; none is empty."""
    _check(name, launch, kernel_size, tensors)
    q = tensors["q"]
    b, h, w, n, e = q.shape
    rows, cols = launch.tile
    tiles = programs = b * n * math.ceil(h / rows) * math.ceil(w / cols)
    strides = [stride for t in "qkv" for stride in tensors[t].stride()[:4]]
    described = {arg: _described(tensors[arg], box) for arg, box in boxes(name, launch).items()}
    sign, logit_scale = split(scale * math.log2(math.e))
    last = (tiles, sign, logit_scale) if name == "forward" else (sign, logit_scale, scale)
    if launch.persistent:
        processors = (
            INTERPRETED_PROCESSORS
            if INTERPRETED
            else torch.cuda.get_device_properties(q.device).multi_processor_count
        )
        programs = min(tiles, processors * launch.persistent)
    with torch.cuda.device_of(q):
        KERNELS[name][(programs,)](
            *(described.get(arg, t) for arg, t in tensors.items()),
            *strides, n, h, w, *last,
            **constants(name, launch, kernel_size, e),
            **options(launch),
        )  # fmt: skip


SMALLEST = 2.0**-100


def split(logit_scale: float) -> tuple[float, float]:
    """A scale's sign and size, as the kernels want them: the size is normal and not zero.

    Below 2^-100 all logits are zero to float32 (|q k^T| < 2^76), and the sign is 0.
    """
    if abs(logit_scale) < SMALLEST:
        return 0.0, 1.0
    return math.copysign(1.0, logit_scale), abs(logit_scale)


def _readable(x: Tensor) -> Tensor:
    """x with a head's elements together."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float, plan: Plan
) -> tuple[Tensor, Tensor]:
    """The contract under a plan -> out (b h w n e) and the logits' logsumexp (b n h w).

    The logsumexp is in float32 and to base 2: log2 of the sum of 2^(log2(e) logit).
    Raises ValueError where the plan cannot hold the kernel or address the tensors.
    """
    b, h, w, n, _ = q.shape
    q, k, v = _readable(q), _readable(k), _readable(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    logsumexp = q.new_empty((b, n, h, w), dtype=torch.float32)
    if out.numel():
        tensors = {"q": q, "k": k, "v": v, "out": out, "logsumexp": logsumexp}
        _launch("forward", plan.forward, kernel_size, tensors, scale)
    return out, logsumexp


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    kernel_size: int, scale: float, plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v (b h w n e) under a plan, from what forward returned.

    Raises ValueError where the plan cannot address the tensors.
    """
    q, k, v, grad = _readable(q), _readable(k), _readable(v), grad.contiguous()
    dq, dk, dv = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    # logsumexp and sum(grad * out) of each query; the first kernel fills it
    scalars = logsumexp.new_empty((*logsumexp.shape, 2))
    if q.numel():
        read = {"grad": grad, "q": q, "k": k, "v": v}
        tensors = read | {"out": out, "logsumexp": logsumexp, "scalars": scalars, "dq": dq}
        _launch("dq", plan.dq, kernel_size, tensors, scale)
        tensors = read | {"scalars": scalars, "dk": dk, "dv": dv}
        _launch("dkv", plan.dkv, kernel_size, tensors, scale)
    return dq, dk, dv


def _plan(q: Tensor, kernel_size: int) -> Plan:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    return choose_plan(q.shape[-1], kernel_size, q.dtype, capability)


# Not torch.library.triton_op, which inductor looks into (tried with torch 2.13, triton 3.7.1). On
# fake tensors it runs the interpreter, which fails for want of data, so that neither opcheck nor
# torch.compile would pass there; and lowering one needs a GPU's driver, so no test could hold it.
@torch.library.custom_op("hdit_kernels::neighborhood_triton", mutates_args=())
def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` under the plan that fits the device: out (b h w n e), logsumexp (b n h w)."""
    return forward(q, k, v, kernel_size, scale, _plan(q, kernel_size))


@torch.library.custom_op("hdit_kernels::neighborhood_triton_backward", mutates_args=())
def triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    kernel_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` under the plan that fits the device: gradients of q, k, v (b h w n e)."""
    plan = _plan(q, kernel_size)
    return backward(grad, q, k, v, out, logsumexp, kernel_size, scale, plan)


@triton_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> tuple[Tensor, Tensor]:
    b, h, w, n, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, n, h, w), dtype=torch.float32)


@triton_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    kernel_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.kernel_size, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grads = triton_backward(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.scale)
    return *grads, None, None


triton_forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.hdit_kernels.neighborhood_triton)
def _(q: tuple[int, ...], k: Any, v: Any, kernel_size: int, *args: Any, **kwargs: Any) -> int:
    return forward_flops(q, kernel_size)


@register_flop_formula(torch.ops.hdit_kernels.neighborhood_triton_backward)
def _(
    grad: Any, q: tuple[int, ...], k: Any, v: Any, out: Any, logsumexp: Any, kernel_size: int,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return backward_flops(q, kernel_size)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """Neighborhood attention of valid q, k, v (b h w n e) -> (b h w n e), in q's dtype."""
    out, _ = triton_forward(q, k, v, kernel_size, scale)
    return out
