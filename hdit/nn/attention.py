"""The one self-attention: a spec picks which keys a query sees, parts how q and k are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from hdit.bounds import Side, Width
from hdit.nn.dropout import Dropout
from hdit.nn.rope import AxialRoPE
from hdit.protocols import Spec
from hdit_kernels import neighborhood_attention
from hdit_kernels.fused import qk_prologue

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v, scale of the logits), each (b h w n e) -> (b h w n e)."""


class Global(Spec):
    """Each query sees every key: O(n^2) in tokens."""

    kind: Literal["global"] = "global"
    d_head: Width = Field(64, description="width of a head; a multiple of 8 under RoPE")

    def of_layer(self, index: int) -> Attend:
        """What the layer with this index within its level does."""
        return self.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """(b h w n e) -> (b h w n e)"""
        h = q.shape[1]
        q, k, v = (rearrange(t, "b h w n e -> b n (h w) e") for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return rearrange(x, "b n (h w) e -> b h w n e", h=h)

    def keys(self, h: int, w: int) -> int:
        """Number of keys that each query sees."""
        return h * w

    def check(self, h: int, w: int) -> list[tuple[str, str]]:
        """[(key, what is wrong)] on a grid of h x w: nothing, any grid will do."""
        return []


class Neighborhood(Spec):
    """Each query sees its k x k neighborhood: O(n) in tokens."""

    kind: Literal["neighborhood"] = "neighborhood"
    d_head: Width = Field(64, description="width of a head; a multiple of 8 under RoPE")
    kernel_size: Side = Field(7, description="odd side k of the window")

    def of_layer(self, index: int) -> Attend:
        """What the layer with this index within its level does."""
        return self.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """(b h w n e) -> (b h w n e)"""
        return neighborhood_attention(q, k, v, self.kernel_size, scale=scale)

    def keys(self, h: int, w: int) -> int:
        """Number of keys that each query sees."""
        return self.kernel_size**2

    def check(self, h: int, w: int) -> list[tuple[str, str]]:
        """[(key, what is wrong)] on a grid of h x w: a window that is even or larger than it."""
        k, side = self.kernel_size, min(h, w)
        if k % 2 == 0:
            return [("kernel_size", f"must be odd, got {k}; use {k - 1} or {k + 1}")]
        if k > side:
            fix = f"at most {side - (side + 1) % 2}, or kind = 'global'"
            return [("kernel_size", f"{k} is larger than the level's grid of {h}x{w}; use {fix}")]
        return []


class ShiftedWindow(Spec):
    """Each query sees its window; every other layer shifts the windows by half (Swin, 2021).

    O(n) in tokens. The windows of a shifted layer wrap around the grid, where both sides of the
    seam do not see each other.
    """

    kind: Literal["shifted_window"] = "shifted_window"
    d_head: Width = Field(64, description="width of a head; a multiple of 8 under RoPE")
    window_size: Side = Field(8, description="side of a window; divides the level's grid")

    def of_layer(self, index: int) -> Attend:
        """What the layer with this index within its level does."""
        shift = self.window_size // 2 if index % 2 else 0
        return partial(window_attention, window=self.window_size, shift=shift)

    def keys(self, h: int, w: int) -> int:
        """Number of keys that each query sees."""
        return self.window_size**2

    def check(self, h: int, w: int) -> list[tuple[str, str]]:
        """[(key, what is wrong)] on a grid of h x w: windows that do not divide it."""
        if h % self.window_size or w % self.window_size:
            text = f"{self.window_size} does not divide the level's grid of {h}x{w}"
            return [("window_size", text)]
        return []


class NoAttention(Spec):
    """The layers have their feed-forward part alone."""

    kind: Literal["none"] = "none"

    def check(self, h: int, w: int) -> list[tuple[str, str]]:
        """[(key, what is wrong)] on a grid of h x w: nothing."""
        return []


WithHeads = Global | Neighborhood | ShiftedWindow
Attention = Annotated[WithHeads | NoAttention, Field(discriminator="kind")]


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, window: int, shift: int
) -> Tensor:
    """Attention within windows of the grid, rolled down and right by `shift`: (b h w n e) alike.

    Of the first row and column of windows, which hold what was rolled around, either side of the
    seam sees only itself.
    """
    b, h, w = q.shape[:3]

    def windows(x: Tensor) -> Tensor:
        x = x.roll((shift, shift), dims=(1, 2))
        return rearrange(x, "b (i p) (j q) n e -> (b i j) n (p q) e", p=window, q=window)

    mask = None
    if shift:
        mask = _same_side(h // window, w // window, window, shift, q.device).repeat(b, 1, 1, 1)
    q, k, v = windows(q), windows(k), windows(v)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    shape = {"b": b, "i": h // window, "p": window}
    x = rearrange(x, "(b i j) n (p q) e -> b (i p) (j q) n e", **shape)
    return x.roll((-shift, -shift), dims=(1, 2))


def _same_side(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(windows 1 tokens tokens) bool: whether two tokens of a window are on one side of a seam."""
    inside = torch.arange(window, device=device) >= shift
    side = {
        axis: (torch.arange(n, device=device)[:, None] > 0) | inside  # (windows places)
        for axis, n in (("row", rows), ("column", columns))
    }
    row = side["row"][:, None, :, None].expand(-1, columns, -1, window).flatten(2).flatten(0, 1)
    column = side["column"][None, :, None, :].expand(rows, -1, window, -1)
    column = column.flatten(2).flatten(0, 1)  # (windows tokens)
    same = (row[:, :, None] == row[:, None]) & (column[:, :, None] == column[:, None])
    return same[:, None]


class CosineQK(nn.Module):
    """Unit-length q and k times sqrt(scale): the logit is scale * cos(q, k), one scale a head."""

    softmax_scale = 1.0

    def __init__(self, n_heads: int):
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_heads,), 10.0))

    def forward(self, qkv: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (b h w 3 n e) -> scaled q and k, rotated if there is a table, and v: (b h w n e)."""
        return qk_prologue(qkv, self.scale, table)


class DotQK(nn.Module):
    """q and k as they come: the logit is q . k / sqrt(e)."""

    def __init__(self, d_head: int):
        super().__init__()
        self.softmax_scale = d_head**-0.5

    def forward(self, qkv: Tensor, table: None) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (b h w 3 n e) -> q, k and v, each (b h w n e)."""
        q, k, v = qkv.unbind(3)
        return q, k, v


class Unrotated(nn.Module):
    """No rotation: positions were added to the tokens."""

    def forward(self, pos: Tensor | None) -> None:
        """No table, wherever the tokens are."""
        return None


class SelfAttention(nn.Module):
    """Multi-head self-attention over a grid: x (b h w d), pos (h w 2) or None -> (b h w d).

    `index` is that of the layer within its level.
    """

    def __init__(
        self,
        width: int,
        spec: WithHeads,
        qk: CosineQK | DotQK,
        rope: AxialRoPE | Unrotated,
        *,
        bias: bool,
        dropout: float = 0.0,
        index: int = 0,
    ):
        super().__init__()
        self.spec, self.qk, self.rope = spec, qk, rope
        self.attend = spec.of_layer(index)
        self.n_heads = width // spec.d_head
        self.qkv_proj = nn.Linear(width, 3 * width, bias=bias)
        self.dropout = Dropout(dropout)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, pos: Tensor | None) -> Tensor:
        """Projects to q, k and v, attends, projects back: x (b h w d) -> (b h w d)."""
        qkv = rearrange(self.qkv_proj(x), "b h w (t n e) -> b h w t n e", t=3, n=self.n_heads)
        q, k, v = self.qk(qkv, self.rope(pos))
        x = self.attend(q, k, v, self.qk.softmax_scale)
        return self.out_proj(self.dropout(x.flatten(-2)))
