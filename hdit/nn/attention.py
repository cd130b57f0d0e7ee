"""The one self-attention: a spec picks which keys a query sees, parts how q and k are made."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from hdit.nn.norm import at_least_float32
from hdit.nn.rope import AxialRoPE
from hdit.protocols import Spec
from hdit_kernels import neighborhood_attention


class Global(Spec):
    """Each query sees every key: O(n^2) in tokens."""

    kind: Literal["global"] = "global"
    d_head: int = Field(64, gt=0, description="width of a head; a multiple of 8 under RoPE")

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
        return []


class Neighborhood(Spec):
    """Each query sees its k x k neighborhood: O(n) in tokens."""

    kind: Literal["neighborhood"] = "neighborhood"
    d_head: int = Field(64, gt=0, description="width of a head; a multiple of 8 under RoPE")
    kernel_size: int = Field(7, gt=0, description="odd side k of the window")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """(b h w n e) -> (b h w n e)"""
        return neighborhood_attention(q, k, v, self.kernel_size, scale=scale)

    def keys(self, h: int, w: int) -> int:
        """Number of keys that each query sees."""
        return self.kernel_size**2

    def check(self, h: int, w: int) -> list[tuple[str, str]]:
        k, side = self.kernel_size, min(h, w)
        if k % 2 == 0:
            return [("kernel_size", f"must be odd, got {k}; use {k - 1} or {k + 1}")]
        if k > side:
            fix = f"at most {side - (side + 1) % 2}, or kind = 'global'"
            return [("kernel_size", f"{k} is larger than the level's grid of {h}x{w}; use {fix}")]
        return []


Attention = Annotated[Global | Neighborhood, Field(discriminator="kind")]


class CosineQK(nn.Module):
    """Unit-length q and k times sqrt(scale): the logit is scale * cos(q, k), one scale a head."""

    softmax_scale = 1.0

    def __init__(self, n_heads: int):
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_heads,), 10.0))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        root = at_least_float32(self.scale).sqrt()[:, None]

        def unit(x: Tensor) -> Tensor:
            x = at_least_float32(x)
            return x * root * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

        return unit(q), unit(k)


class DotQK(nn.Module):
    """q and k as they come: the logit is q . k / sqrt(e)."""

    def __init__(self, d_head: int):
        super().__init__()
        self.softmax_scale = d_head**-0.5

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class Unrotated(nn.Module):
    """No rotation: positions were added to the tokens."""

    def forward(self, q: Tensor, k: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor]:
        return q, k


class SelfAttention(nn.Module):
    """Multi-head self-attention over a grid: x (b h w d), pos (h w 2) or None -> (b h w d)."""

    def __init__(
        self,
        width: int,
        spec: Global | Neighborhood,
        qk: CosineQK | DotQK,
        rope: AxialRoPE | Unrotated,
        *,
        bias: bool,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.spec, self.qk, self.rope = spec, qk, rope
        self.n_heads = width // spec.d_head
        self.qkv_proj = nn.Linear(width, 3 * width, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, pos: Tensor | None) -> Tensor:
        qkv = rearrange(self.qkv_proj(x), "b h w (t n e) -> t b h w n e", t=3, n=self.n_heads)
        q, k, v = qkv.unbind(0)
        q, k = self.rope(*self.qk(q, k), pos)
        x = self.spec.attend(q.to(v.dtype), k.to(v.dtype), v, self.qk.softmax_scale)
        return self.out_proj(self.dropout(x.flatten(-2)))
