"""Neighborhood attention as dense attention of 8x8 query tiles to the halo of keys that they see.

The queries of a tile share one halo of at most (8 + k - 1)^2 keys; a mask leaves each query its own
k x k window. How windows lie within the halo depends only on where the tile lies (first, inner or
last along each axis), so tiles of one class share one mask and one call of the fused attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hdit_kernels.contract import Problem
from hdit_kernels.flops import backward_flops, forward_flops
from hdit_kernels.reference import window_starts

TILE = 8  # smaller tiles are too little work for one product, larger ones mostly masked keys
CHUNK = 32  # tiles times heads times batch in one call


class Axis(NamedTuple):
    """Tiles of one class along one axis."""

    queries: Tensor  # (tiles, t) index of each query; t < TILE only for a cut last tile
    halo: Tensor  # (tiles, s) index of each key
    inside: Tensor  # (t, s) whether the query's window holds the key; the same for all tiles


def unavailable() -> str | None:
    """Why the backend can run nowhere on this machine, or None; see `contract.Backend`."""
    return None


def unsupported(problem: Problem) -> str | None:
    """Why the backend cannot solve `problem`, or None; see `contract.Backend`."""
    return None


@lru_cache(maxsize=128)
def axis_classes(length: int, kernel_size: int) -> tuple[Axis, ...]:
    """The tiles along one axis, grouped by how the queries' windows lie within their halo."""
    window = window_starts(length, kernel_size)  # (length,)
    groups: dict[tuple[int, ...], list[tuple[Tensor, int]]] = {}
    size = min(TILE + kernel_size - 1, length)
    for first in range(0, length, TILE):
        queries = torch.arange(first, min(first + TILE, length))
        start = min(max(first - kernel_size // 2, 0), length - size)
        offsets = tuple((window[queries] - start).tolist())
        groups.setdefault(offsets, []).append((queries, start))
    key = torch.arange(size)
    classes = []
    for offsets, members in groups.items():
        begin = torch.tensor(offsets)[:, None]
        classes.append(
            Axis(
                queries=torch.stack([queries for queries, _ in members]),
                halo=torch.stack([start + key for _, start in members]),
                inside=(key >= begin) & (key < begin + kernel_size),
            )
        )
    return tuple(classes)


@lru_cache(maxsize=32)
def tile_classes(
    h: int, w: int, kernel_size: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each class of tiles: query index (tiles, tq), halo index (tiles, tk) and mask (tq, tk).

    Indices count row-major over the h x w grid; the mask is 0 or -inf, to be added to the logits.
    """

    def grid(rows: Tensor, cols: Tensor) -> Tensor:
        index = rows[:, None, :, None] * w + cols[None, :, None, :]  # (ny nx ty tx)
        return index.flatten(2).flatten(0, 1).to(device)

    classes = []
    for y in axis_classes(h, kernel_size):
        for x in axis_classes(w, kernel_size):
            inside = y.inside[:, None, :, None] & x.inside[None, :, None, :]
            inside = inside.flatten(2).flatten(0, 1)
            mask = torch.zeros(inside.shape, dtype=dtype).masked_fill_(~inside, -torch.inf)
            classes.append((grid(y.queries, x.queries), grid(y.halo, x.halo), mask.to(device)))
    return classes


def take(grid: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (tiles, t) of grid (bn, hw, e) -> (bn, tiles, t, e)."""
    return grid.index_select(1, index.flatten()).unflatten(1, index.shape)


def heads_first(x: Tensor) -> Tensor:
    """(b h w n e) -> (bn, hw, e), contiguous, or index_select would copy all of it at each call"""
    b, h, w, n, e = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(b * n, h * w, e).contiguous()


def heads_last(x: Tensor, like: Tensor) -> Tensor:
    """(bn, hw, e) -> (b h w n e), contiguous"""
    b, h, w, n, e = like.shape
    return x.view(b, n, h, w, e).permute(0, 2, 3, 1, 4).contiguous()


def chunks(q: Tensor, kernel_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The classes of q's grid; on a CPU in pieces whose halos and weights stay in its cache."""
    b, h, w, n, _ = q.shape
    size = max(1, CHUNK // max(1, b * n)) if q.device.type == "cpu" else h * w
    for queries, halo, mask in tile_classes(h, w, kernel_size, q.dtype, q.device):
        for i in range(0, len(queries), size):
            yield queries[i : i + size], halo[i : i + size], mask


@torch.library.custom_op("hdit_kernels::neighborhood_tile", mutates_args=())
def tile_forward(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """Attends tile by tile, each tile of queries to its halo: (b h w n e) -> (b h w n e)."""
    query, key, value = heads_first(q), heads_first(k), heads_first(v)
    out = torch.empty_like(query)
    for queries, halo, mask in chunks(q, kernel_size):
        tiles = F.scaled_dot_product_attention(
            take(query, queries), take(key, halo), take(value, halo), attn_mask=mask, scale=scale
        )  # (bn tiles tq e)
        out[:, queries.flatten()] = tiles.flatten(1, 2)
    return heads_last(out, q)


@torch.library.custom_op("hdit_kernels::neighborhood_tile_backward", mutates_args=())
def tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputes the weights P tile by tile: dS = P * (dP - sum(grad * out)), as FlashAttention."""
    query, key, value = heads_first(q), heads_first(k), heads_first(v)
    grad = heads_first(grad)
    delta = (grad * heads_first(out)).sum(-1, keepdim=True)  # (bn hw 1)
    dq, dk, dv = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for queries, halo, mask in chunks(q, kernel_size):
        qt, gt = take(query, queries), take(grad, queries)  # (bn tiles tq e)
        kt, vt = take(key, halo), take(value, halo)  # (bn tiles tk e)
        p = (qt @ kt.mT * scale + mask).softmax(-1)  # (bn tiles tq tk)
        ds = p * (gt @ vt.mT - take(delta, queries)) * scale
        dq[:, queries.flatten()] = (ds @ kt).flatten(1, 2)
        dk.index_add_(1, halo.flatten(), (ds.mT @ qt).flatten(1, 2))
        dv.index_add_(1, halo.flatten(), (p.mT @ gt).flatten(1, 2))
    return heads_last(dq, q), heads_last(dk, q), heads_last(dv, q)


@tile_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@tile_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.kernel_size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        grads = tile_backward(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.scale)
    return *grads, None, None


tile_forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.hdit_kernels.neighborhood_tile)
def _(q: tuple[int, ...], k: Any, v: Any, kernel_size: int, *args: Any, **kwargs: Any) -> int:
    return forward_flops(q, kernel_size)


@register_flop_formula(torch.ops.hdit_kernels.neighborhood_tile_backward)
def _(
    grad: Any, q: tuple[int, ...], k: Any, v: Any, out: Any, kernel_size: int, *args: Any, **kw: Any
) -> int:
    return backward_flops(q, kernel_size)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """Neighborhood attention of valid q, k, v (b h w n e) -> (b h w n e), in q's dtype."""
    return tile_forward(q, k, v, kernel_size, scale)
