"""Neighborhood attention as one fused CUDA kernel, written in Triton.

A program owns a rectangle of queries of one image and head, and walks over the halo of keys that
they see, a smaller rectangle at a time; a mask leaves each query its own k x k window. Softmax is
online in float32 and the backward recomputes the weights from the saved logsumexp, as in
FlashAttention-2 (Dao, 2023). The gradients of keys and values come from programs that own a
rectangle of keys and walk over the queries that see them, so that nothing is summed in an order
left to chance. Windows are NATTEN's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, no_type_check

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hdit_kernels.flops import backward_flops, forward_flops

if TYPE_CHECKING:
    from hdit_kernels.contract import Problem

try:
    import triton
    import triton.language as tl
except ImportError as error:
    ABSENT = f"triton cannot be imported ({error})"

    def jit(function: Any) -> Any:
        return function
else:
    ABSENT = ""
    jit = triton.jit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_D_HEAD = 128


class Launch(NamedTuple):
    """How one kernel is cut into programs. Each rectangle's area is a power of two, at least 16."""

    tile: tuple[int, int]  # rows and columns of the grid that a program owns
    step: tuple[int, int]  # rows and columns that it meets at a time
    warps: int
    stages: int  # of the pipeline of loads


class Plan(NamedTuple):
    forward: Launch
    dq: Launch
    dkv: Launch


SMALL_KERNEL = 9  # up to here the halo of eight queries in a row is one step of 16 keys wide


def _same(launch: Launch) -> Plan:
    return Plan(launch, launch, launch)


# By padded d_head, whether the kernel is small, and bytes of an element. Not yet timed on a GPU:
# chosen so that sm_80 and sm_90 spill at most a few registers, and that a program fits into the
# 99 KiB of shared memory that every device since sm_80 has.
PLANS = {
    (32, True, 2): _same(Launch((8, 8), (4, 16), warps=4, stages=3)),
    (64, True, 2): Plan(
        forward=Launch((8, 8), (4, 16), warps=4, stages=3),
        dq=Launch((8, 8), (4, 16), warps=4, stages=2),
        dkv=Launch((8, 8), (4, 16), warps=4, stages=2),
    ),
    (128, True, 2): Plan(
        forward=Launch((8, 8), (4, 16), warps=4, stages=2),
        dq=Launch((8, 8), (2, 16), warps=4, stages=2),
        dkv=Launch((8, 8), (2, 16), warps=8, stages=2),
    ),
    (32, False, 2): _same(Launch((8, 16), (4, 16), warps=8, stages=3)),
    (64, False, 2): Plan(
        forward=Launch((8, 16), (4, 16), warps=8, stages=3),
        dq=Launch((8, 16), (4, 16), warps=8, stages=2),
        dkv=Launch((8, 16), (4, 16), warps=8, stages=2),
    ),
    (128, False, 2): Plan(
        forward=Launch((8, 16), (4, 16), warps=8, stages=2),
        dq=Launch((8, 16), (2, 16), warps=8, stages=2),
        dkv=Launch((8, 8), (2, 16), warps=8, stages=2),
    ),
    (32, True, 4): _same(Launch((8, 8), (2, 16), warps=8, stages=2)),
    (64, True, 4): _same(Launch((8, 8), (2, 16), warps=8, stages=2)),
    (128, True, 4): _same(Launch((4, 8), (2, 16), warps=8, stages=2)),
    (32, False, 4): _same(Launch((8, 8), (2, 16), warps=8, stages=2)),
    (64, False, 4): _same(Launch((8, 8), (2, 16), warps=8, stages=2)),
    (128, False, 4): _same(Launch((4, 8), (2, 16), warps=8, stages=2)),
}


def padded(d_head: int) -> int:
    """The power of two, at least 32, to which the kernels pad d_head."""
    return max(32, 1 << (d_head - 1).bit_length())


def choose_plan(d_head: int, kernel_size: int, dtype: torch.dtype) -> Plan:
    """The plan of a problem: never a timing, so a rerun chooses alike."""
    return PLANS[padded(d_head), kernel_size <= SMALL_KERNEL, dtype.itemsize]


def unavailable() -> str | None:
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


# In the kernels: K kernel size, E d_head, PAD d_head padded; ROWS x COLS the tile that a program
# owns, STEP_ROWS x STEP_COLS what it meets at a time. Offsets are int64: one tensor may hold 2^31
# elements.


@jit
@no_type_check
def window_start(i, length, K: tl.constexpr):
    """First key of the window of query i along one axis."""
    return tl.minimum(tl.maximum(i - K // 2, 0), length - K)


@jit
@no_type_check
def sees(query_y, query_x, key_y, key_x, height, width, K: tl.constexpr):
    """Whether the query's window holds the key; the arguments broadcast."""
    dy = key_y - window_start(query_y, height, K)
    dx = key_x - window_start(query_x, width, K)
    return (dy >= 0) & (dy < K) & (dx >= 0) & (dx < K)


@jit
@no_type_check
def owned(heads, height, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's image, head, and the first row and column of its tile."""
    tiles_x = tl.cdiv(width, COLS)
    tiles = tl.cdiv(height, ROWS) * tiles_x
    tile = tl.program_id(0) % tiles
    image_head = tl.program_id(0) // tiles
    y, x = tile // tiles_x * ROWS, tile % tiles_x * COLS
    return (image_head // heads).to(tl.int64), (image_head % heads).to(tl.int64), y, x


@jit
@no_type_check
def rectangle(y, x, height, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows, columns (ROWS*COLS,) of a rectangle's places, and whether each lies on the grid."""
    i = tl.arange(0, ROWS * COLS)
    y += i // COLS
    x += i % COLS
    return y, x, (y < height) & (x < width)


@jit
@no_type_check
def places(y, x, stride_h, stride_w):
    return y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@jit
@no_type_check
def load(tensor, at, on_grid, E: tl.constexpr, PAD: tl.constexpr):
    """Vectors at offsets `at` (places,) -> (places, PAD), zero off the grid and from E on."""
    e = tl.arange(0, PAD)
    mask = on_grid[:, None] & (e < E)[None, :]
    return tl.load(tensor + at[:, None] + e[None, :], mask=mask, other=0.0)


@jit
@no_type_check
def store(tensor, at, on_grid, value, E: tl.constexpr, PAD: tl.constexpr):
    e = tl.arange(0, PAD)
    mask = on_grid[:, None] & (e < E)[None, :]
    tl.store(tensor + at[:, None] + e[None, :], value.to(tensor.dtype.element_ty), mask=mask)


@jit
@no_type_check
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # float32 is float32, not TF32


@jit
@no_type_check
def forward_kernel(
    q, k, v, out, logsumexp,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    heads, height, width, logit_scale,
    K: tl.constexpr, E: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STEP_ROWS: tl.constexpr, STEP_COLS: tl.constexpr,
):  # fmt: skip
    b, n, y, x = owned(heads, height, width, ROWS, COLS)
    k += b * k_b + n * k_n
    v += b * v_b + n * v_n
    query_y, query_x, is_query = rectangle(y, x, height, width, ROWS, COLS)
    query = load(q + b * q_b + n * q_n, places(query_y, query_x, q_h, q_w), is_query, E, PAD)

    peak = tl.full((ROWS * COLS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS * COLS,), tl.float32)
    mean = tl.zeros((ROWS * COLS, PAD), tl.float32)  # not yet divided by the total
    first_y, first_x = window_start(y, height, K), window_start(x, width, K)
    end_y = window_start(y + ROWS - 1, height, K) + K
    end_x = window_start(x + COLS - 1, width, K) + K
    steps_x = tl.cdiv(end_x - first_x, STEP_COLS)
    for step in range(tl.cdiv(end_y - first_y, STEP_ROWS) * steps_x):
        key_y, key_x, is_key = rectangle(
            first_y + step // steps_x * STEP_ROWS,
            first_x + step % steps_x * STEP_COLS,
            height, width, STEP_ROWS, STEP_COLS,
        )  # fmt: skip
        key = load(k, places(key_y, key_x, k_h, k_w), is_key, E, PAD)
        value = load(v, places(key_y, key_x, v_h, v_w), is_key, E, PAD)
        visible = sees(
            query_y[:, None], query_x[:, None], key_y[None, :], key_x[None, :], height, width, K
        )
        logits = tl.where(visible, dot(query, tl.trans(key)) * logit_scale, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key seen yet
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        mean = mean * shrink[:, None] + dot(weights.to(value.dtype), value)
        peak = new_peak

    to = places(query_y, query_x, width * heads * E, heads * E)
    store(out + (b * height * width * heads + n) * E, to, is_query, mean / total[:, None], E, PAD)
    to = (b * heads + n) * height * width + places(query_y, query_x, width, 1)
    tl.store(logsumexp + to, peak + tl.log2(total), mask=is_query)


@jit
@no_type_check
def dq_kernel(
    grad, q, k, v, out, logsumexp, delta, dq,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    heads, height, width, scale, logit_scale,
    K: tl.constexpr, E: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STEP_ROWS: tl.constexpr, STEP_COLS: tl.constexpr,
):  # fmt: skip
    b, n, y, x = owned(heads, height, width, ROWS, COLS)
    k += b * k_b + n * k_n
    v += b * v_b + n * v_n
    query_y, query_x, is_query = rectangle(y, x, height, width, ROWS, COLS)
    query = load(q + b * q_b + n * q_n, places(query_y, query_x, q_h, q_w), is_query, E, PAD)
    at = (b * height * width * heads + n) * E
    at += places(query_y, query_x, width * heads * E, heads * E)
    dout = load(grad, at, is_query, E, PAD)
    inner = tl.sum(dout.to(tl.float32) * load(out, at, is_query, E, PAD).to(tl.float32), 1)
    scalar_at = (b * heads + n) * height * width + places(query_y, query_x, width, 1)
    tl.store(delta + scalar_at, inner, mask=is_query)
    normalizer = tl.load(logsumexp + scalar_at, mask=is_query, other=0.0)

    dquery = tl.zeros((ROWS * COLS, PAD), tl.float32)
    first_y, first_x = window_start(y, height, K), window_start(x, width, K)
    end_y = window_start(y + ROWS - 1, height, K) + K
    end_x = window_start(x + COLS - 1, width, K) + K
    steps_x = tl.cdiv(end_x - first_x, STEP_COLS)
    for step in range(tl.cdiv(end_y - first_y, STEP_ROWS) * steps_x):
        key_y, key_x, is_key = rectangle(
            first_y + step // steps_x * STEP_ROWS,
            first_x + step % steps_x * STEP_COLS,
            height, width, STEP_ROWS, STEP_COLS,
        )  # fmt: skip
        key = load(k, places(key_y, key_x, k_h, k_w), is_key, E, PAD)
        value = load(v, places(key_y, key_x, v_h, v_w), is_key, E, PAD)
        visible = sees(
            query_y[:, None], query_x[:, None], key_y[None, :], key_x[None, :], height, width, K
        )
        logits = dot(query, tl.trans(key)) * logit_scale
        weights = tl.where(visible, tl.exp2(logits - normalizer[:, None]), 0.0)
        dlogits = weights * (dot(dout, tl.trans(value)) - inner[:, None])
        dquery += dot(dlogits.to(key.dtype), key)
    store(dq, at, is_query, dquery * scale, E, PAD)


@jit
@no_type_check
def first_seeing(i, K: tl.constexpr):
    """The first query of an axis whose window holds key i."""
    return tl.where(i < K, 0, i - K // 2)


@jit
@no_type_check
def last_seeing(i, length, K: tl.constexpr):
    """The last query of an axis whose window holds key i; for i past the end, the last query."""
    return tl.where(i >= length - K, length - 1, i + K // 2)


@jit
@no_type_check
def dkv_kernel(
    grad, q, k, v, logsumexp, delta, dk, dv,
    q_b, q_h, q_w, q_n, k_b, k_h, k_w, k_n, v_b, v_h, v_w, v_n,
    heads, height, width, scale, logit_scale,
    K: tl.constexpr, E: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STEP_ROWS: tl.constexpr, STEP_COLS: tl.constexpr,
):  # fmt: skip
    b, n, y, x = owned(heads, height, width, ROWS, COLS)
    q += b * q_b + n * q_n
    scalars = (b * heads + n) * height * width
    vectors = (b * height * width * heads + n) * E
    key_y, key_x, is_key = rectangle(y, x, height, width, ROWS, COLS)
    key = load(k + b * k_b + n * k_n, places(key_y, key_x, k_h, k_w), is_key, E, PAD)
    value = load(v + b * v_b + n * v_n, places(key_y, key_x, v_h, v_w), is_key, E, PAD)

    dkey = tl.zeros((ROWS * COLS, PAD), tl.float32)
    dvalue = tl.zeros((ROWS * COLS, PAD), tl.float32)
    first_y, first_x = first_seeing(y, K), first_seeing(x, K)
    end_y = last_seeing(y + ROWS - 1, height, K) + 1
    end_x = last_seeing(x + COLS - 1, width, K) + 1
    steps_x = tl.cdiv(end_x - first_x, STEP_COLS)
    for step in range(tl.cdiv(end_y - first_y, STEP_ROWS) * steps_x):
        query_y, query_x, is_query = rectangle(
            first_y + step // steps_x * STEP_ROWS,
            first_x + step % steps_x * STEP_COLS,
            height, width, STEP_ROWS, STEP_COLS,
        )  # fmt: skip
        query = load(q, places(query_y, query_x, q_h, q_w), is_query, E, PAD)
        at = vectors + places(query_y, query_x, width * heads * E, heads * E)
        dout = load(grad, at, is_query, E, PAD)
        at = scalars + places(query_y, query_x, width, 1)
        normalizer = tl.load(logsumexp + at, mask=is_query, other=0.0)
        inner = tl.load(delta + at, mask=is_query, other=0.0)
        visible = sees(
            query_y[None, :], query_x[None, :], key_y[:, None], key_x[:, None], height, width, K
        )
        logits = dot(key, tl.trans(query)) * logit_scale  # (keys, queries)
        weights = tl.where(visible, tl.exp2(logits - normalizer[None, :]), 0.0)
        dvalue += dot(weights.to(dout.dtype), dout)
        dlogits = weights * (dot(value, tl.trans(dout)) - inner[None, :])
        dkey += dot(dlogits.to(query.dtype), query)
    to = vectors + places(key_y, key_x, width * heads * E, heads * E)
    store(dk, to, is_key, dkey * scale, E, PAD)
    store(dv, to, is_key, dvalue, E, PAD)


INTERPRETED = not ABSENT and not isinstance(forward_kernel, triton.JITFunction)


def options(launch: Launch) -> dict[str, Any]:
    """What triton compiles a kernel with. FMA is named, as its default changes with the version."""
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}


def _launch(kernel: Any, launch: Launch, q: Tensor, kernel_size: int, *arguments: Any) -> None:
    b, h, w, n, e = q.shape
    rows, cols = launch.tile
    programs = b * n * math.ceil(h / rows) * math.ceil(w / cols)
    sizes = (kernel_size, e, padded(e), *launch.tile, *launch.step)
    with torch.cuda.device_of(q):
        kernel[(programs,)](*arguments, *sizes, **options(launch))


def _readable(x: Tensor) -> Tensor:
    """x with a head's elements together."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:4]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float, plan: Plan
) -> tuple[Tensor, Tensor]:
    """The contract under a plan -> out (b h w n e) and the logits' logsumexp (b n h w).

    The logsumexp is in float32 and to base 2: log2 of the sum of 2^(log2(e) logit).
    """
    b, h, w, n, _ = q.shape
    q, k, v = _readable(q), _readable(k), _readable(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    logsumexp = q.new_empty((b, n, h, w), dtype=torch.float32)
    if out.numel():
        _launch(
            forward_kernel, plan.forward, q, kernel_size,
            q, k, v, out, logsumexp, *_strides(q, k, v), n, h, w, scale * math.log2(math.e),
        )  # fmt: skip
    return out, logsumexp


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    kernel_size: int, scale: float, plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v (b h w n e) under a plan, from what forward returned."""
    _, h, w, n, _ = q.shape
    q, k, v, grad = _readable(q), _readable(k), _readable(v), grad.contiguous()
    dq, dk, dv = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    delta = torch.empty_like(logsumexp)  # sum(grad * out) of each query; the first kernel fills it
    if q.numel():
        shared = (*_strides(q, k, v), n, h, w, scale, scale * math.log2(math.e))
        _launch(
            dq_kernel, plan.dq, q, kernel_size,
            grad, q, k, v, out, logsumexp, delta, dq, *shared,
        )  # fmt: skip
        _launch(
            dkv_kernel, plan.dkv, q, kernel_size,
            grad, q, k, v, logsumexp, delta, dk, dv, *shared,
        )  # fmt: skip
    return dq, dk, dv


@torch.library.custom_op("hdit_kernels::neighborhood_triton", mutates_args=())
def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, kernel_size, scale, choose_plan(q.shape[-1], kernel_size, q.dtype))


@torch.library.custom_op("hdit_kernels::neighborhood_triton_backward", mutates_args=())
def triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    kernel_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan = choose_plan(q.shape[-1], kernel_size, q.dtype)
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
    out, _ = triton_forward(q, k, v, kernel_size, scale)
    return out
