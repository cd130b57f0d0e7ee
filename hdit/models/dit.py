"""DiT, the diffusion transformer with adaLN-Zero (Peebles & Xie, ICCV 2023, arXiv 2212.09748)."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from hdit.nn.attention import DotQK, Global, SelfAttention, Unrotated
from hdit.nn.embed import ClassEmbedding, check_labels, sincos_positions, timestep_embedding
from hdit.nn.mlp import MLP
from hdit.protocols import Cond, Group, Signal, Spec, SpecError

TIME_FEATURES = 256


class DiTSpec(Spec):
    """A DiT; DiT-XL/2 is patch_size 2, depth 28, width 1152, num_heads 16."""

    kind: Literal["dit"] = "dit"
    patch_size: int = Field(2, gt=0)
    depth: int = Field(gt=0)
    width: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP over width")

    def grid(self, signal: Signal) -> tuple[int, int]:
        """Tokens (h, w)."""
        return signal.height // self.patch_size, signal.width // self.patch_size

    def check(self, signal: Signal) -> None:
        """Raises SpecError with all that does not fit the signal or itself."""
        problems = []
        if signal.height % self.patch_size or signal.width % self.patch_size:
            problems.append(
                (
                    "patch_size",
                    f"{self.patch_size} does not divide the image of "
                    f"{signal.height}x{signal.width}; change the image size or the patch",
                )
            )
        if self.width % self.num_heads:
            problems.append(
                ("width", f"must be a multiple of num_heads ({self.num_heads}), got {self.width}")
            )
        if int(self.width * self.mlp_ratio) < 1:
            problems.append(("mlp_ratio", f"leaves no hidden width, got {self.mlp_ratio}"))
        if self.width % 4:
            problems.append(("width", f"must be a multiple of 4, got {self.width}"))
        if problems:
            raise SpecError(problems)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (b h w d), shift and scale (b d)."""
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


class PatchEmbed(nn.Module):
    """(b c H W) -> (b h w d); a patch's features are ordered (channel, row, column)."""

    def __init__(self, channels: int, width: int, p: int):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(channels * p * p, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=self.p, q=self.p))


class TimestepEmbed(nn.Module):
    """t (b,), any real -> (b d)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, TIME_FEATURES).to(next(self.parameters()).dtype))


class AdaLNModulation(nn.Sequential):
    """n shifts, scales or gates of an image: c (b d) -> (b n*d)."""

    def __init__(self, width: int, n: int):
        super().__init__(nn.SiLU(), nn.Linear(width, n * width))


class Block(nn.Module):
    """x + gate * attention(adaLN(x)), then the same with an MLP; the identity at initialisation."""

    def __init__(self, spec: DiTSpec):
        super().__init__()
        d, e = spec.width, spec.width // spec.num_heads
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(d, Global(d_head=e), DotQK(e), Unrotated(), bias=True)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(d, int(d * spec.mlp_ratio))
        self.adaLN_modulation = AdaLNModulation(d, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        attended = self.attn(modulate(self.norm1(x), shift1, scale1), None)
        x = x + gate1[:, None, None] * attended
        return x + gate2[:, None, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """(b h w d) -> (b c H W); a token's features are ordered (row, column, channel)."""

    def __init__(self, width: int, channels: int, p: int):
        super().__init__()
        self.p = p
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, p * p * channels)
        self.adaLN_modulation = AdaLNModulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        x = self.linear(modulate(self.norm_final(x), shift, scale))
        return rearrange(x, "b h w (p q c) -> b c (h p) (w q)", p=self.p, q=self.p)


class DiT(nn.Module):
    """x (b c H W), c_noise (b,) in 0..999, cond -> (b out H W); zero everywhere at initialisation.

    `out_channels` is the signal's channels, or more where a variance is predicted beside x.
    """

    pos_embed: Tensor

    def __init__(self, spec: DiTSpec, signal: Signal, out_channels: int | None = None):
        super().__init__()
        spec.check(signal)
        self.spec, self.num_classes = spec, signal.num_classes
        self.register_buffer("pos_embed", sincos_positions(*spec.grid(signal), spec.width))
        self.x_embedder = PatchEmbed(signal.channels, spec.width, spec.patch_size)
        self.t_embedder = TimestepEmbed(spec.width)
        self.y_embedder = (
            ClassEmbedding(signal.num_classes, spec.width) if signal.num_classes else None
        )
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final_layer = FinalLayer(spec.width, out_channels or signal.channels, spec.patch_size)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier, and zeros where adaLN-Zero has them (section 3.2 of the paper)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.t_embedder.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLNModulation):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    def parameter_group(self, name: str) -> Group:
        """Weight decay, where it is asked for, is on matrices only: not on biases and classes."""
        return Group(decay=name.endswith("weight") and not name.startswith("y_embedder."))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        check_labels(cond.labels, self.num_classes)
        p, (h, w) = self.spec.patch_size, self.pos_embed.shape[:2]
        if x.shape[2:] != (h * p, w * p):
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"the model was built for images of {h * p}x{w * p}, got {size}")
        x = self.x_embedder(x) + self.pos_embed  # (b h w d)
        with torch.autocast(x.device.type, enabled=False):
            c = self.t_embedder(c_noise)  # (b d)
            if self.y_embedder is not None and cond.labels is not None:
                c = c + self.y_embedder(cond.labels)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)
