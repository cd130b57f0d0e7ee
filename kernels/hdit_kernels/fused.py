"""The elementwise parts of a transformer's blocks, each forward and backward in one pass on a CPU.

Each function is a formula in torch, and where the compiled library can (a CPU, float32 or bfloat16)
one pass of C++ instead, with arithmetic in float32, that keeps its inputs alone for the backward
pass. Under torch.compile it is the formula, which the compiler fuses by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable

from hdit_kernels import native

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
CHUNK = 64  # tokens of a part of a sum; as in native/fused.cpp


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


class Formulas(FakeTensorMode):
    """Tensors without data on the CPU, of which the library leaves the formulas to torch.

    They take the operators that other devices take, on machines that have no such device.
    """


def in_native(*tensors: Tensor) -> bool:
    """Whether the compiled library computes on these."""
    if torch.compiler.is_compiling():
        return False
    x = tensors[0]
    return (
        x.device.type == "cpu"
        and x.dtype in NAMES
        and not isinstance(getattr(x, "fake_mode", None), Formulas)
        and all(t.dtype == x.dtype and t.device == x.device for t in tensors)
        and native.unavailable() is None
    )


# ---- the library's functions as operators of torch ----------------------------------------------

_library = torch.library.Library("hdit_kernels", "FRAGMENT")


def _operator(schema: str, fake: Any) -> Any:
    """Registers the function below it under the schema."""

    def register(function: Any) -> Any:
        _library.define(schema)
        name = schema.partition("(")[0]
        _library.impl(name, function, "CPU")
        torch.library.register_fake(f"hdit_kernels::{name}", fake, lib=_library)
        return getattr(torch.ops.hdit_kernels, name).default

    return register


def _like_first(first: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _grid(x: Tensor) -> tuple[int, int, int]:
    """Images, tokens of each, width."""
    b, d = x.shape[0], x.shape[-1]
    return b, x.numel() // max(1, b * d), d


def _row_stride(*rows: Tensor | None) -> int:
    """From the row of one image to that of the next; 0 where all images share one."""
    return next((r.shape[-1] if r.ndim == 2 else 0 for r in rows if r is not None), 0)


def _parts(x: Tensor) -> Tensor:
    """Room for a sum over tokens, by images and chunks: (b, chunks, d) float32."""
    b, tokens, d = _grid(x)
    return x.new_empty(b, -(-tokens // CHUNK), d, dtype=torch.float32)


@_operator(
    "fused_norm(Tensor x, Tensor? scale, Tensor? shift, float eps, bool centre) -> Tensor",
    _like_first,
)
def _norm(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, centre: bool
) -> Tensor:
    out = _like_first(x)
    stride = _row_stride(scale, shift)
    name = f"norm_{NAMES[x.dtype]}"
    native.run(name, int(centre), *_grid(x), eps, x, scale, shift, stride, out)
    return out


def _fake_norm_backward(
    g: Tensor, x: Tensor, scale: Tensor | None, shifted: bool, eps: float, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0, dtype=torch.float32)
    return _like_first(x), none if scale is None else _parts(x), _parts(x) if shifted else none


@_operator(
    "fused_norm_backward(Tensor g, Tensor x, Tensor? scale, bool shifted, float eps, bool centre)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_norm_backward,
)
def _norm_backward(
    g: Tensor, x: Tensor, scale: Tensor | None, shifted: bool, eps: float, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale, dshift = _fake_norm_backward(g, x, scale, shifted, eps, centre)
    name, stride = f"norm_backward_{NAMES[x.dtype]}", _row_stride(scale)
    wanted = [None if scale is None else dscale, dshift if shifted else None]
    native.run(name, int(centre), *_grid(x), eps, g, x, scale, stride, dx, *wanted)
    return dx, dscale, dshift


@_operator("fused_gated(Tensor x, Tensor branch, Tensor gate) -> Tensor", _like_first)
def _gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    out = _like_first(x)
    native.run(f"gated_{NAMES[x.dtype]}", *_grid(x), x, branch, gate, _row_stride(gate), out)
    return out


def _fake_gated_backward(g: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return _like_first(branch), _parts(branch)


@_operator(
    "fused_gated_backward(Tensor g, Tensor branch, Tensor gate) -> (Tensor, Tensor)",
    _fake_gated_backward,
)
def _gated_backward(g: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dbranch, dgate = _fake_gated_backward(g, branch, gate)
    name, stride = f"gated_backward_{NAMES[g.dtype]}", _row_stride(gate)
    native.run(name, *_grid(g), g, branch, gate, stride, dbranch, dgate)
    return dbranch, dgate


@_operator("fused_dropout(Tensor x, float p, Tensor seed) -> Tensor", _like_first)
def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    out = _like_first(x)
    native.run(f"dropout_{NAMES[x.dtype]}", x.numel(), p, seed, x, out)
    return out


def _fake_geglu(up: Tensor) -> Tensor:
    return up.new_empty(*up.shape[:-1], up.shape[-1] // 2)


@_operator("fused_geglu(Tensor up) -> Tensor", _fake_geglu)
def _geglu(up: Tensor) -> Tensor:
    out = _fake_geglu(up)
    d = out.shape[-1]
    native.run(f"geglu_{NAMES[up.dtype]}", out.numel() // max(1, d), d, up, out)
    return out


@_operator("fused_geglu_backward(Tensor g, Tensor up) -> Tensor", lambda g, up: _like_first(up))
def _geglu_backward(g: Tensor, up: Tensor) -> Tensor:
    dup = _like_first(up)
    d = g.shape[-1]
    native.run(f"geglu_backward_{NAMES[up.dtype]}", g.numel() // max(1, d), d, g, up, dup)
    return dup


def _fake_prologue(qkv: Tensor, root: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
    b, h, w, _, n, e = qkv.shape
    return qkv.new_empty(b, h, w, n, e), qkv.new_empty(b, h, w, n, e)


def _heads(qkv: Tensor, table: Tensor | None) -> list[int]:
    b, h, w, _, n, e = qkv.shape
    return [b, h, w, n, e, 0 if table is None else 2 * table.shape[-1]]


@_operator(
    "fused_prologue(Tensor qkv, Tensor root, Tensor? table) -> (Tensor, Tensor)", _fake_prologue
)
def _prologue(qkv: Tensor, root: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k = _fake_prologue(qkv, root, table)
    native.run(f"prologue_{NAMES[qkv.dtype]}", _heads(qkv, table), qkv, root, table, q, k)
    return q, k


def _fake_prologue_backward(
    gq: Tensor, gk: Tensor, gv: Tensor, qkv: Tensor, root: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, h, _, _, n, _ = qkv.shape
    return _like_first(qkv), qkv.new_empty(b * h, n, dtype=torch.float32)


@_operator(
    "fused_prologue_backward(Tensor gq, Tensor gk, Tensor gv, Tensor qkv, Tensor root,"
    " Tensor? table) -> (Tensor, Tensor)",
    _fake_prologue_backward,
)
def _prologue_backward(
    gq: Tensor, gk: Tensor, gv: Tensor, qkv: Tensor, root: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    dqkv, droot = _fake_prologue_backward(gq, gk, gv, qkv, root, table)
    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in (gq, gk, gv)]
    strides = [stride for g in grads for stride in g.stride()[:4]]
    name, sizes = f"prologue_backward_{NAMES[qkv.dtype]}", _heads(qkv, table)
    native.run(name, sizes, strides, *grads, qkv, root, table, dqkv, droot)
    return dqkv, droot


# ---- with their gradients ------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, centre: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.shape = None if shift is None else shift.shape
        ctx.eps, ctx.centre = eps, centre
        return _norm(x, scale, shift, eps, centre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        shifted = ctx.shape is not None
        dx, dscale, dshift = _norm_backward(g.contiguous(), x, scale, shifted, ctx.eps, ctx.centre)
        return (
            dx,
            None if scale is None else dscale.sum(1).sum_to_size(scale.shape),
            dshift.sum(1).sum_to_size(ctx.shape) if shifted else None,
            None,
            None,
        )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(branch, gate)
        return _gated(x, branch, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        branch, gate = ctx.saved_tensors
        dbranch, dgate = _gated_backward(g.contiguous(), branch, gate)
        return g, dbranch, dgate.sum(1)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return _dropout(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _dropout(g.contiguous(), ctx.p, *ctx.saved_tensors), None, None


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor) -> Tensor:
        ctx.save_for_backward(up)
        return _geglu(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _geglu_backward(g.contiguous(), *ctx.saved_tensors)


class _Prologue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, root: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, root, table)
        q, k = _prologue(qkv, root, table)
        return q, k, qkv[:, :, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dqkv, droot = _prologue_backward(*grads, *ctx.saved_tensors)
        return dqkv, droot.sum(0), None


def _plain(small: Tensor | None) -> Tensor | None:
    """As the library reads what is not of the tokens' own size."""
    return None if small is None else small.float().contiguous()


# ---- what the models call ------------------------------------------------------------------------


def norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    centre: bool = False,
) -> Tensor:
    """scale * (x - mean) / rms(x - mean) + shift over the last axis; the mean where `centre`.

    x (b ... d); scale and shift (d,), or (b d) with one for each image; None is 1 and 0.
    Statistics in float32 or wider; result as x.
    Source: RMS norm of Zhang & Sennrich, 2019; layer norm of Ba et al., 2016.
    """
    rows = [row for row in (scale, shift) if row is not None]
    alike = all(row.shape == rows[0].shape for row in rows) and all(
        row.shape in ((x.shape[-1],), (len(x), x.shape[-1])) for row in rows
    )
    if x.ndim > 1 and alike and in_native(x) and x.is_contiguous():
        return _Norm.apply(x, _plain(scale), _plain(shift), eps, centre)
    wide = at_least_float32(x)
    if centre:
        wide = F.layer_norm(wide, x.shape[-1:], eps=eps)
    else:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)

    def of_image(row: Tensor) -> Tensor:
        return row if row.ndim == 1 else row.view(len(row), *[1] * (x.ndim - 2), -1)

    if scale is not None:
        wide = wide * of_image(scale)
    if shift is not None:
        wide = wide + of_image(shift)
    return wide.to(x.dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch: x and branch (b h w d), gate (b d), one for each image."""
    fits = x.ndim > 1 and branch.shape == x.shape and gate.shape == (len(x), x.shape[-1])
    if fits and in_native(x, branch) and x.is_contiguous() and branch.is_contiguous():
        return _Gated.apply(x, branch, _plain(gate))
    return (x + gate[:, None, None] * branch).to(x.dtype)


def dropout(x: Tensor, p: float) -> Tensor:
    """Each element 0 with probability p < 1, else divided by 1 - p (Srivastava et al., 2014).

    The choice follows from one number of torch's generator of the device, or, where it is the
    formula, from as many as torch takes.
    """
    if in_native(x) and x.is_contiguous():
        return _Dropout.apply(x, p, torch.randint(2**62, (), device=x.device))
    return torch.native_dropout(x, p, train=True)[0]  # F.dropout's on CUDA: it keeps bytes


def geglu(up: Tensor) -> Tensor:
    """value * gelu(gate) of up = [value | gate], with the exact GELU (Shazeer, 2020).

    (... 2d) -> (... d)
    """
    if up.shape[-1] % 2 == 0 and in_native(up) and up.is_contiguous():
        return _GEGLU.apply(up)
    value, gate = up.chunk(2, dim=-1)
    return value * F.gelu(gate)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + f), i < f, of x (... e) by angles (... f); the rest of x stays."""
    f = cos.shape[-1]
    a, b, rest = x.split([f, f, x.shape[-1] - 2 * f], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def spread(table: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (h w n f) of the cells of a grid from its table (h+w 2 n f/2)."""
    w = len(table) - h
    rows = table[:h, None].expand(-1, w, -1, -1, -1)
    columns = table[None, h:].expand(h, -1, -1, -1, -1)
    cos, sin = torch.cat([rows, columns], dim=-1).unbind(2)
    return cos, sin


def qk_prologue(qkv: Tensor, scale: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine-similarity scaling of q and k, and their axial RoPE (Crowson et al., 2024, 4.3).

    qkv (b h w 3 n e); scale (n,): q and k come out with length sqrt(scale), so that their product
    is scale times a cosine.  table (h+w 2 n f/2): cosines and sines of the angles by which rows,
    then columns turn the first 2f elements of a head, or None.  Returns q, k, v (b h w n e) in
    qkv's dtype; v is a view.
    """
    root = at_least_float32(scale).sqrt()
    _, h, w, _, n, e = qkv.shape
    quarter = 0 if table is None else table.shape[-1]
    if table is not None and (table.shape != (h + w, 2, n, quarter) or 4 * quarter > e):
        raise ValueError(
            f"the table of qkv {tuple(qkv.shape)} must be (h+w 2 n f/2) with f at most e/2, "
            f"got {tuple(table.shape)}"
        )
    if in_native(qkv) and qkv.is_contiguous():
        return _Prologue.apply(qkv, root, _plain(table))
    q, k, v = qkv.unbind(3)

    def unit(x: Tensor) -> Tensor:
        x = at_least_float32(x)
        return x * root[:, None] * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    q, k = unit(q), unit(k)
    if table is not None:
        cos, sin = spread(table, qkv.shape[1])
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q.to(v.dtype), k.to(v.dtype), v
