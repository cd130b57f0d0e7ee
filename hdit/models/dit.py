"""DiT, the diffusion transformer (Peebles & Xie, ICCV 2023, arXiv 2212.09748).

The four ways to condition it (section 3.2) are specs of their own; adaLN-Zero is the paper's model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from hdit.bounds import Depth, Side, Width
from hdit.errors import SpecError
from hdit.models.backbone import BackboneModule, BackboneSpec
from hdit.nn.attention import DotQK, Global, SelfAttention, Unrotated
from hdit.nn.checkpointing import Runs
from hdit.nn.embed import ClassEmbedding, check_labels, sincos_positions, timestep_embedding
from hdit.nn.mlp import MLP
from hdit.nn.norm import modulated_norm
from hdit.nn.residual import gated_residual
from hdit.protocols import Cond, DataShape, Group, PartCost, Spec

TIME_FEATURES = 256


# ---- the settings --------------------------------------------------------------------------------


class _Summed(Spec):
    """The blocks and the final layer see one vector, from which they regress adaptive norms."""

    def join(self, embeddings: list[Tensor]) -> Tensor:
        """The embeddings of t and, with classes, y: s times (b d) -> (b d)."""
        return reduce(torch.add, embeddings)

    def final_layer(self, width: int, channels: int, p: int) -> FinalLayer:
        return AdaLNFinalLayer(width, channels, p)

    def final_macs(self, width: int) -> int:
        """MACs of what the final layer regresses."""
        return 2 * width**2


class _Sequence(Spec):
    """The blocks see a sequence of vectors; the final layer sees none."""

    def join(self, embeddings: list[Tensor]) -> Tensor:
        """The embeddings of t and, with classes, y: s times (b d) -> (b s d)."""
        return torch.stack(embeddings, dim=1)

    def final_layer(self, width: int, channels: int, p: int) -> FinalLayer:
        return FinalLayer(width, channels, p)

    def final_macs(self, width: int) -> int:
        """MACs of what the final layer regresses: nothing."""
        return 0


class AdaLNZero(_Summed):
    """Scales and shifts of norms and gates of branches, all zero at first, come from t + y."""

    kind: Literal["adaln_zero"] = "adaln_zero"

    def blocks(self, spec: DiTSpec) -> Blocks:
        """depth adaLN-Zero blocks, conditioned on c (b d)."""
        return Blocks(AdaLNZeroBlock(spec) for _ in range(spec.depth))

    def block_macs(self, spec: DiTSpec, tokens: int, s: int) -> int:
        """MACs of a block over the tokens, conditioned on s embeddings."""
        return vit_macs(spec, tokens) + 6 * spec.width**2


class AdaLNConditioning(_Summed):
    """Scales and shifts of norms come from t + y."""

    kind: Literal["adaln"] = "adaln"

    def blocks(self, spec: DiTSpec) -> Blocks:
        """depth adaLN blocks, conditioned on c (b d)."""
        return Blocks(AdaLNBlock(spec) for _ in range(spec.depth))

    def block_macs(self, spec: DiTSpec, tokens: int, s: int) -> int:
        """MACs of a block over the tokens, conditioned on s embeddings."""
        return vit_macs(spec, tokens) + 4 * spec.width**2


class CrossAttention(_Sequence):
    """The tokens attend to the sequence of t and y after they have attended to each other."""

    kind: Literal["cross_attention"] = "cross_attention"

    def blocks(self, spec: DiTSpec) -> Blocks:
        """depth cross-attention blocks, conditioned on c (b s d)."""
        return Blocks(CrossAttentionBlock(spec) for _ in range(spec.depth))

    def block_macs(self, spec: DiTSpec, tokens: int, s: int) -> int:
        """MACs of a block over the tokens, conditioned on s embeddings."""
        d = spec.width
        cross = 2 * tokens * d * d + 2 * s * d * d + 2 * tokens * s * d  # q and out, k and v
        return vit_macs(spec, tokens) + cross


class InContext(_Sequence):
    """t and y are two more tokens, until the last block is done."""

    kind: Literal["in_context"] = "in_context"

    def blocks(self, spec: DiTSpec) -> Blocks:
        """depth ViT blocks over the grid's tokens and those of c (b s d)."""
        return InContextBlocks(Block(spec) for _ in range(spec.depth))

    def block_macs(self, spec: DiTSpec, tokens: int, s: int) -> int:
        """MACs of a block over the tokens, conditioned on s embeddings."""
        return vit_macs(spec, tokens + s)


def vit_macs(spec: DiTSpec, tokens: int) -> int:
    """MACs of self-attention and MLP of one block, without its conditioning."""
    d, d_ff = spec.width, int(spec.width * spec.mlp_ratio)
    return tokens * (4 * d * d + 2 * d * d_ff + 2 * d * tokens)


Conditioning = Annotated[
    AdaLNZero | AdaLNConditioning | CrossAttention | InContext, Field(discriminator="kind")
]


class DiTSpec(BackboneSpec):
    """A DiT; DiT-XL/2 is patch_size 2, depth 28, width 1152, num_heads 16."""

    c_noise: ClassVar[str] = "timestep"

    kind: Literal["dit"] = "dit"
    patch_size: Side = Field(2, description="side of a patch, which becomes a token")
    depth: Depth = Field(description="number of blocks")
    width: Width = Field(description="channels of a token")
    num_heads: Width = Field(description="heads of attention; divides width")
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="hidden width of the MLP over width")
    conditioning: Conditioning = Field(
        AdaLNZero(), description="how the blocks are told of noise level and class"
    )

    @property
    def multiple(self) -> int:
        """What the sides of an image must be multiples of."""
        return self.patch_size

    def grid(self, shape: DataShape) -> tuple[int, int]:
        """Tokens (h, w)."""
        return shape.height // self.patch_size, shape.width // self.patch_size

    def check(self, shape: DataShape) -> None:
        """Raises SpecError with all that does not fit the data shape or itself."""
        problems = []
        if shape.height % self.patch_size or shape.width % self.patch_size:
            problems.append(
                (
                    "patch_size",
                    f"{self.patch_size} does not divide the image of "
                    f"{shape.height}x{shape.width}; change the image size or the patch",
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

    def remarks(self, shape: DataShape, params: int) -> Iterator[str]:
        """Yields the number of parameters as the paper counts it, with the fixed position table."""
        h, w = self.grid(shape)
        yield f"with DiT's fixed position table: {params + h * w * self.width:,} parameters"


# ---- ends of the network -------------------------------------------------------------------------


def layer_norm(width: int, affine: bool) -> nn.LayerNorm:
    """With a scale and shift of its own where none are regressed.

    The paper does not say it in so many words, and the parameters that it prints for in-context and
    cross-attention (449M, 598M) hold either way; but its in-context blocks are ViT's, unmodified,
    and adaLN is said to regress what other norms learn.
    """
    return nn.LayerNorm(width, elementwise_affine=affine, eps=1e-6)


class PatchEmbed(nn.Module):
    """(b c H W) -> (b h w d); a patch's features are ordered (channel, row, column)."""

    def __init__(self, channels: int, width: int, p: int):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(channels * p * p, width)

    def forward(self, x: Tensor) -> Tensor:
        """Projects each p x p patch to a token: (b c H W) -> (b h w d)."""
        return self.proj(rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=self.p, q=self.p))


class TimestepEmbed(nn.Module):
    """t (b,), any real -> (b d)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embeds t by sinusoids and an MLP: (b,) -> (b d)."""
        return self.mlp(timestep_embedding(t, TIME_FEATURES).to(next(self.parameters()).dtype))


class AdaLNModulation(nn.Sequential):
    """n shifts, scales or gates of an image: c (b d) -> (b n*d)."""

    def __init__(self, width: int, n: int):
        super().__init__(nn.SiLU(), nn.Linear(width, n * width))


class FinalLayer(nn.Module):
    """x (b h w d) -> (b c H W); a token's features are ordered (row, column, channel)."""

    def __init__(self, width: int, channels: int, p: int, affine: bool = True):
        super().__init__()
        self.p = p
        self.norm_final = layer_norm(width, affine)
        self.linear = nn.Linear(width, p * p * channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Puts the pixels of each token in their place: (b h w p*p*c) -> (b c H W)."""
        return rearrange(x, "b h w (p q c) -> b c (h p) (w q)", p=self.p, q=self.p)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Norm, projection, unpatchify: x (b h w d) -> (b c H W); c has no effect."""
        return self.unpatchify(self.linear(self.norm_final(x)))


class AdaLNFinalLayer(FinalLayer):
    """The same, its norm modulated by c (b d)."""

    def __init__(self, width: int, channels: int, p: int):
        super().__init__(width, channels, p, affine=False)
        self.adaLN_modulation = AdaLNModulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """adaLN, projection, unpatchify: x (b h w d), c (b d) -> (b c H W)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.unpatchify(self.linear(modulated_norm(x, shift, scale)))


# ---- blocks --------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(LN(x)), then the same with an MLP, as in ViT: x (b h w d); c has no effect."""

    def __init__(self, spec: DiTSpec, affine: bool = True):
        super().__init__()
        d, e = spec.width, spec.width // spec.num_heads
        self.norm1 = layer_norm(d, affine)
        self.attn = SelfAttention(d, Global(d_head=e), DotQK(e), Unrotated(), bias=True)
        self.norm2 = layer_norm(d, affine)
        self.mlp = MLP(d, int(d * spec.mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Self-attention, then MLP: x (b h w d) -> (b h w d)."""
        x = x + self.attn(self.norm1(x), None)
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(Block):
    """x + attention(adaLN(x)), then the same with an MLP: x (b h w d), c (b d)."""

    def __init__(self, spec: DiTSpec):
        super().__init__(spec, affine=False)
        self.adaLN_modulation = AdaLNModulation(spec.width, 4)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (b h w d), c (b d), which gives both norms shift and scale -> (b h w d)."""
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=-1)
        x = x + self.attn(modulated_norm(x, shift1, scale1), None)
        return x + self.mlp(modulated_norm(x, shift2, scale2))


class AdaLNZeroBlock(Block):
    """x + gate * attention(adaLN(x)), then the same with an MLP; the identity at initialisation."""

    def __init__(self, spec: DiTSpec):
        super().__init__(spec, affine=False)
        self.adaLN_modulation = AdaLNModulation(spec.width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (b h w d), c (b d), which gives shift, scale and gate of each branch -> (b h w d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        attended = self.attn(modulated_norm(x, shift1, scale1), None)
        x = gated_residual(x, attended, gate1)
        return gated_residual(x, self.mlp(modulated_norm(x, shift2, scale2)), gate2)


class SequenceAttention(nn.Module):
    """Multi-head attention of a grid to a sequence: x (b h w d), c (b s d) -> (b h w d)."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Queries from the grid x (b h w d), keys and values from c (b s d) -> (b h w d)."""
        h, n = x.shape[1], self.n_heads
        q = rearrange(self.q_proj(x), "b h w (n e) -> b n (h w) e", n=n)
        k, v = rearrange(self.kv_proj(c), "b s (t n e) -> t b n s e", t=2, n=n)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(x, "b n (h w) e -> b h w (n e)", h=h))


class CrossAttentionBlock(Block):
    """Attention to the grid, attention to c, MLP, each added to its input: x (b h w d), c (b s d).

    Where c is a single vector (no classes), all of its queries get the same value.
    """

    def __init__(self, spec: DiTSpec):
        super().__init__(spec)
        self.norm_cross = layer_norm(spec.width, affine=True)
        self.cross_attn = SequenceAttention(spec.width, spec.num_heads)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Self-attention, cross-attention to c, MLP: x (b h w d), c (b s d) -> (b h w d)."""
        x = x + self.attn(self.norm1(x), None)
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class Blocks(nn.ModuleList, Runs):
    """The blocks, one after the other: x (b h w d), c as they take it -> (b h w d)."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Runs, or checkpoints, each block in turn: x (b h w d) -> (b h w d)."""
        for block in self:
            x = self.run(block, x, c)
        return x


class InContextBlocks(Blocks):
    """Blocks over the sequence of the grid's tokens and those of c (b s d), a grid of one row."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Appends c (b s d) to the tokens x (b h w d), runs the blocks, drops it: (b h w d)."""
        h, w = x.shape[1:3]
        x = rearrange(x, "b h w d -> b 1 (h w) d")
        x = super().forward(torch.cat([x, c[:, None]], dim=2), c)  # (b 1 h*w+s d)
        return rearrange(x[:, :, : h * w], "b 1 (h w) d -> b h w d", h=h)


# ---- the model -----------------------------------------------------------------------------------


class DiT(BackboneModule):
    """x (b c H W), c_noise (b,) in 0..999, cond -> (b out H W); zero everywhere at initialisation.

    H and W need not be those of `shape`: any size that the patch divides will do. `out_channels`
    is the channels of the data, or more where a variance is predicted beside x.
    """

    pos_embed: Tensor
    blocks: Blocks

    def __init__(self, spec: DiTSpec, shape: DataShape, out_channels: int | None = None):
        super().__init__()
        spec.check(shape)
        self.spec, self.num_classes = spec, shape.num_classes
        self.out_channels = out_channels or shape.channels
        self.register_buffer("pos_embed", sincos_positions(*spec.grid(shape), spec.width))
        self._tables: dict[tuple[object, ...], Tensor] = {}  # positions of other grids
        self.x_embedder = PatchEmbed(shape.channels, spec.width, spec.patch_size)
        self.t_embedder = TimestepEmbed(spec.width)
        self.y_embedder = (
            ClassEmbedding(shape.num_classes, spec.width) if shape.num_classes else None
        )
        self.blocks = spec.conditioning.blocks(spec)
        self.final_layer = spec.conditioning.final_layer(
            spec.width, self.out_channels, spec.patch_size
        )
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier, and zeros where adaLN-Zero has them (section 3.2 of the paper).

        Norms without gates begin plain: for those of "adaln" the paper names no initialisation.
        """
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
        """Weight decay, where asked for, is on matrices only: not on biases, norms and classes."""
        matrix = name.endswith("weight") and ".norm" not in name
        return Group(decay=matrix and not name.startswith("y_embedder."))

    def parts(self, shape: DataShape) -> list[PartCost]:
        """Parameters and MACs of conditioning, patch in, blocks and patch out at a data shape."""
        d, (h, w) = self.spec.width, self.spec.grid(shape)
        tokens, s = h * w, 2 if shape.num_classes else 1  # t, and y
        patch = tokens * self.spec.patch_size**2 * d  # of one channel
        conditioning = self.spec.conditioning
        blocks = self.spec.depth * conditioning.block_macs(self.spec, tokens, s)
        out = patch * self.out_channels + conditioning.final_macs(d)
        return [
            PartCost(
                "conditioning",
                None,
                self.count("t_embedder.", "y_embedder."),
                TIME_FEATURES * d + d * d,
            ),
            PartCost("patch in", (h, w), self.count("x_embedder."), patch * shape.channels),
            PartCost("blocks, global", (h, w), self.count("blocks."), blocks),
            PartCost("patch out", (h, w), self.count("final_layer."), out),
        ]

    def stages(self) -> Iterator[tuple[str, nn.Module]]:
        """The blocks, then the final layer as "patch out"."""
        yield from super().stages()
        yield "patch out", self.final_layer

    def positions(self, h: int, w: int) -> Tensor:
        """(h w d): `pos_embed` on the grid that the model was built for, else one of its own."""
        if self.pos_embed.shape[:2] == (h, w):
            return self.pos_embed
        key = (h, w, self.pos_embed.device, self.pos_embed.dtype)
        if key not in self._tables:
            self._tables[key] = sincos_positions(h, w, self.spec.width).to(self.pos_embed)
        return self._tables[key]

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        """x (b c H W), c_noise (b,), cond -> (b out H W).

        Raises ValueError where the patch does not divide H and W, or the labels do not fit.
        """
        check_labels(cond.labels, self.num_classes)
        multiple = self.spec.multiple
        if x.shape[2] % multiple or x.shape[3] % multiple:
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"the sides of an image must be multiples of {multiple}, got {size}")
        x = self.x_embedder(x)  # (b h w d)
        x = x + self.positions(*x.shape[1:3])
        with torch.autocast(x.device.type, enabled=False):
            embeddings = [self.t_embedder(c_noise)]  # (b d)
            if self.y_embedder is not None and cond.labels is not None:
                embeddings.append(self.y_embedder(cond.labels))
            c = self.spec.conditioning.join(embeddings)  # (b d) or (b s d)
        return self.final_layer(self.blocks(x, c), c)
