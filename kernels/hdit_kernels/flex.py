"""Neighborhood attention through torch's flex_attention, which writes the fused CUDA kernel.

It visits blocks of 128 queries by 128 keys, so tokens are put in an order in which 128 in a row are
a tile of 8 x 16. The keys' tiles begin k//2 before the queries': the keys that a tile of queries
sees then begin at the edge of a tile, and with k up to 9 they fill 2 x 2 tiles instead of 3 x 3.

VARIANTS has other blocks and another kernel, for a benchmark to time; the backend is "default".

On a CPU it has no gradient, and outside of torch.compile it holds the weights of all tokens to all
tokens: use it to check, on small grids. FlopCounterMode fails on it, as torch does not trace
flex_attention below another mode: count with another backend.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hdit_kernels.contract import Problem

Tile = tuple[int, int]
TILE: Tile = (8, 16)  # of the grid's rows and columns: 128, which each of torch's defaults divides
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY_D_HEAD = torch.__version__ >= "2.7"


def unavailable() -> str | None:
    """Why the backend can run nowhere on this machine, or None; see `contract.Backend`."""
    return None


def _no_triton() -> bool:
    return find_spec("triton") is None


def unsupported(problem: Problem) -> str | None:
    """Why the backend cannot solve `problem`, or None; see `contract.Backend`."""
    d_head, capability = problem.d_head, problem.capability
    if problem.device not in ("cuda", "cpu"):
        return f"it runs on CUDA, and without gradients on a CPU, not on {problem.device!r}"
    if not ANY_D_HEAD and d_head & (d_head - 1):
        return f"torch's flex_attention wants a power of two as d_head before 2.7, not {d_head}"
    if problem.device == "cpu":
        return "torch's flex_attention has no gradient on a CPU" if problem.grad else None
    if problem.dtype not in DTYPES:
        return f"its kernel computes in float32, bfloat16 and float16, not in {problem.dtype}"
    if d_head < 16:
        return f"its kernel wants a d_head of at least 16, not {d_head}"
    if capability is not None and capability < (7, 0):
        return f"triton wants compute capability 7.0 or more, not {capability}"
    if capability is not None and capability < (8, 0) and problem.dtype == torch.bfloat16:
        return f"triton wants compute capability 8.0 or more for bfloat16, not {capability}"
    if _no_triton():
        return "it needs triton: pip install triton"
    return None


def tiles(h: int, w: int, kernel_size: int = 1, tile: Tile = TILE) -> tuple[int, int]:
    """Numbers of tiles of queries in a grid, or of keys, which begin kernel_size//2 before it."""
    return -(-(h + kernel_size // 2) // tile[0]), -(-(w + kernel_size // 2) // tile[1])


def seen_tiles(length: int, kernel_size: int, tile: int) -> tuple[Tensor, Tensor]:
    """Along one axis, whether a tile of queries sees any of a tile of keys, and whether all do all.

    -> two of (tiles of queries, tiles of keys) bool
    """
    halo = kernel_size // 2
    query = torch.arange(-(-length // tile) * tile)[:, None]
    key = torch.arange(-(-(length + halo) // tile) * tile) - halo
    first = (query - halo).clamp(0, length - kernel_size)  # past the grid as on its last row
    inside = (key >= first) & (key < first + kernel_size)
    inside = inside.unflatten(1, (-1, tile)).unflatten(0, (-1, tile))  # (tq q tk k)
    return inside.any(3).any(1), inside.all(3).all(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns each row holds, as BlockMask has it: how many, and their indices first."""
    index = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], index.int()[None, None]


@lru_cache(maxsize=64)
def _block_lists(
    h: int, w: int, kernel_size: int, device: torch.device, tile: Tile, full_too: bool
) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # or no gradient could use them later
        (any_y, all_y), (any_x, all_x) = (
            seen_tiles(length, kernel_size, side) for length, side in zip((h, w), tile, strict=True)
        )
        seen, full = (
            (y[:, None, :, None] & x[None, :, None, :]).flatten(2).flatten(0, 1)
            for y, x in ((any_y, any_x), (all_y, all_x))
        )  # (blocks of queries, blocks of keys)
        kinds = [seen & ~full, full] if full_too or full.any() else [seen]
        return tuple(
            t.to(device) for blocks in kinds for t in (*_listed(blocks), *_listed(blocks.mT))
        )


def block_lists(
    h: int,
    w: int,
    kernel_size: int,
    device: torch.device,
    tile: Tile = TILE,
    full_too: bool = False,
) -> tuple[Tensor, ...]:
    """kv_num_blocks, kv_indices, q_num_blocks and q_indices, as BlockMask has them, of the blocks
    to mask and then, where there are any or with `full_too`, of those seen in full."""
    return _block_lists(h, w, kernel_size, device, tile, full_too)


def block_mask(
    h: int,
    w: int,
    kernel_size: int,
    device: torch.device,
    tile: Tile = TILE,
    full_too: bool = False,
) -> BlockMask:
    """Which keys each query sees, both in the order of their tiles."""
    (rows, cols), (key_rows, key_cols) = tiles(h, w, 1, tile), tiles(h, w, kernel_size, tile)
    halo, (height, width) = kernel_size // 2, tile
    block = height * width

    def visible(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        y = query // block // cols * height + query % block // width
        x = query // block % cols * width + query % width
        key_y = key // block // key_cols * height + key % block // width - halo
        key_x = key // block % key_cols * width + key % width - halo
        top, left = (y - halo).clamp(0, h - kernel_size), (x - halo).clamp(0, w - kernel_size)
        in_rows = (key_y >= top) & (key_y < top + kernel_size)
        return in_rows & (key_x >= left) & (key_x < left + kernel_size)

    lists = block_lists(h, w, kernel_size, device, tile, full_too)
    masked, full = lists[:4], lists[4:] or [None] * 4
    return BlockMask(
        seq_lengths=(rows * cols * block, key_rows * key_cols * block),
        kv_num_blocks=masked[0],
        # sizes that torch.compile(dynamic=True) does not see in a constant
        kv_indices=masked[1].view(1, 1, rows * cols, key_rows * key_cols),
        full_kv_num_blocks=full[0],
        full_kv_indices=full[1],
        q_num_blocks=masked[2],
        q_indices=masked[3],
        full_q_num_blocks=full[2],
        full_q_indices=full[3],
        BLOCK_SIZE=(block, block),
        mask_mod=visible,
    )


# To torch.compile constants, which it does not look into: what assume_constant_result of
# torch.compiler sets, without the second that it takes to import the compiler.
_no_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]
block_lists._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tokens(x: Tensor, kernel_size: int = 1, tile: Tile = TILE) -> Tensor:
    """(b h w n e) -> (b n t e): the tokens of one tile after those of another; 0 beyond the grid"""
    _, h, w, _, _ = x.shape
    (rows, cols), halo = tiles(h, w, kernel_size, tile), kernel_size // 2
    below, right = rows * tile[0] - halo - h, cols * tile[1] - halo - w
    x = F.pad(x, (0, 0, 0, 0, halo, right, halo, below))
    x = x.unflatten(2, (cols, tile[1])).unflatten(1, (rows, tile[0]))  # (b ty y tx x n e)
    # contiguous() in four dimensions, of which torch's kernel for CPUs reads the layout
    return x.transpose(2, 3).flatten(1, 4).transpose(1, 2).contiguous()


def grid(x: Tensor, h: int, w: int, tile: Tile = TILE) -> Tensor:
    """(b n t e) -> (b h w n e), what tokens() has made of queries"""
    x = x.unflatten(2, (*tiles(h, w, 1, tile), *tile))  # (b n ty tx y x e)
    x = x.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)
    return x[:, :h, :w]


# ---- what torch's kernel may be told -------------------------------------------------------------


def _no_further_limit(problem: Problem) -> str | None:
    return None


def _blocks_of_64(problem: Problem) -> str | None:
    if problem.device == "cuda" and problem.grad and problem.dtype != torch.float32:
        # inductor looks at the steps that it would take by itself, on 9.0 128 keys for d_head 64
        return (
            "torch's backward kernel in 16 bits wants blocks that its own steps divide, "
            "128 keys on many devices, whatever kernel_options say"
        )
    return None


def _no_flash() -> bool:
    try:
        return find_spec("flash_attn.cute") is None
    except ImportError:
        return True


def _flash(problem: Problem) -> str | None:
    options = getattr(torch_flex, "FlexKernelOptions", None)
    if "BACKEND" not in getattr(options, "__annotations__", ()):
        return f"torch {torch.__version__} has no FLASH backend of flex_attention"
    if problem.device != "cuda":
        return f"FlashAttention-4 runs on CUDA, not on {problem.device!r}"
    if problem.capability is None or problem.capability[0] != 9:
        # elsewhere a tile is 256 queries and 128 keys
        return (
            "FlashAttention-4 takes blocks of 128 on compute capability 9 alone, "
            f"not on {problem.capability}"
        )
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 computes in bfloat16 and float16, not in {problem.dtype}"
    if problem.d_head % 8 or problem.d_head > 128:
        return (
            f"FlashAttention-4 wants a d_head that 8 divides, of at most 128, not {problem.d_head}"
        )
    if problem.grad:
        # https://github.com/Dao-AILab/flash-attention/issues/2623
        return (
            "FlashAttention-4 had wrong gradients of sparse blocks, in silence; it is not trusted"
        )
    if _no_flash():
        return "it needs FlashAttention-4: pip install --pre flash-attn-4"
    return None


class Variant(NamedTuple):
    """One way to have flex_attention compute the contract: call it as attention()."""

    tile: Tile = TILE
    options: tuple[tuple[str, int | str], ...] = ()  # its kernel_options
    full_too: bool = False  # whether the kernel wants lists of blocks seen in full that are empty
    limit: Callable[[Problem], str | None] = _no_further_limit

    def unsupported(self, problem: Problem) -> str | None:
        """Why this variant cannot solve the problem, or None where it can."""
        return unsupported(problem) or self.limit(problem)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
        return _run(q, k, v, kernel_size, scale, self)


FORWARD_64 = (("fwd_BLOCK_M", 64), ("fwd_BLOCK_N", 64))
BACKWARD_64 = tuple((f"bwd_BLOCK_{axis}", 64) for axis in ("M1", "N1", "M2", "N2"))

VARIANTS = {
    "default": Variant(),
    # blocks of half the size: fewer keys in vain, more blocks. Never flex_decoding, which torch
    # takes for fewer than 128 queries and which cuts blocks in its own way.
    "64x64 blocks": Variant(
        (8, 8), (*FORWARD_64, ("FORCE_USE_FLEX_ATTENTION", True)), limit=_blocks_of_64
    ),
    # the default's blocks, in smaller steps
    "64x64 steps": Variant(options=(*FORWARD_64, *BACKWARD_64)),
    "flash": Variant(options=(("BACKEND", "FLASH"),), full_too=True, limit=_flash),
}
"""By name. The backend is "default"; the others are for a benchmark to time."""


def variants(problem: Problem) -> dict[str, Variant]:
    """VARIANTS that can solve a problem."""
    return {name: v for name, v in VARIANTS.items() if v.unsupported(problem) is None}


def _attend(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float, variant: Variant
) -> Tensor:
    h, w = operator.index(q.shape[1]), operator.index(q.shape[2])  # constants, also to the compiler
    tile, options, full_too, _ = variant
    mask = block_mask(h, w, kernel_size, q.device, tile, full_too)
    query, key = tokens(q, 1, tile), tokens(k, kernel_size, tile)
    value = tokens(v, kernel_size, tile)
    told: Any = dict(options) or None
    out = flex_attention(query, key, value, block_mask=mask, scale=scale, kernel_options=told)
    return grid(out, h, w, tile)


@lru_cache(maxsize=256)
def _compiled(
    shape: torch.Size, dtype: torch.dtype, kernel_size: int, backend: str, variant: Variant
) -> Callable[..., Tensor]:
    # torch.compile counts recompilations by code object, and refuses the ninth of one: a copy each
    function = FunctionType(_attend.__code__.replace(), _attend.__globals__)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def _run(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float, variant: Variant
) -> Tensor:
    if q.numel() == 0:
        return q + k + v
    if torch.compiler.is_compiling():
        return _attend(q, k, v, kernel_size, scale, variant)
    backend = "inductor" if q.is_cuda else "eager"
    compiled = _compiled(q.shape, q.dtype, kernel_size, backend, variant)
    return compiled(q, k, v, kernel_size, scale, variant)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """Neighborhood attention of valid q, k, v (b h w n e) -> (b h w n e), in q's dtype."""
    # Not by calling the variant: torch.compile of older versions calls no instance of a NamedTuple.
    return _run(q, k, v, kernel_size, scale, VARIANTS["default"])
