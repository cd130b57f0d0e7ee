"""HDiT, the pixel-space hourglass diffusion transformer.

Source: Crowson et al., ICML 2024, arXiv 2401.11605.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from hdit.bounds import Depth, HiddenWidth, Share, Side, Width, WidthOrZero
from hdit.errors import SpecError
from hdit.models.backbone import BackboneModule, BackboneSpec
from hdit.nn.attention import (
    Attention,
    CosineQK,
    Global,
    Neighborhood,
    NoAttention,
    SelfAttention,
    Unrotated,
    WithHeads,
)
from hdit.nn.checkpointing import Runs
from hdit.nn.embed import ClassEmbedding, FourierFeatures, check_labels, sincos_positions
from hdit.nn.mlp import GEGLU, GELU
from hdit.nn.norm import AdaLN, AdaRMSNorm, RMSNorm
from hdit.nn.residual import GatedResidual, Residual
from hdit.nn.rope import AxialRoPE, axial_positions, downscale_positions
from hdit.protocols import Cond, DataShape, Group, PartCost, Spec

AUG_WIDTH = 9  # conditions of the non-leaking augmentation (Karras et al., 2022, appendix F.2)


class Level(Spec):
    """Transformer layers at one resolution of the hourglass."""

    depth: Depth = Field(description="layers; on each side of the hourglass, but for the last")
    width: Width = Field(description="channels of a token")
    attention: Attention | None = Field(
        None, description="local_attention if absent, but global on the last level"
    )
    d_ff: HiddenWidth | None = Field(
        None, description="hidden width; 3 x width for geglu, 4 x for gelu if absent"
    )
    dropout: Share = Field(0.0, description="probability, in training")


class Mapping(Spec):
    """The network that makes one conditioning vector of noise level, augmentation and class."""

    depth: Depth = Field(2, description="number of blocks")
    width: Width = Field(256, description="channels of the conditioning vector")
    d_ff: HiddenWidth | None = Field(None, description="hidden width; 3 x width if absent")
    dropout: Share = Field(0.0, description="probability, in training")


D_FF = {"geglu": 3, "gelu": 4}
"""Hidden width of a feed-forward core over that of a token, by default."""


class HDiTSpec(BackboneSpec):
    """An HDiT: levels from finest to coarsest, each with half the grid of the one before.

    The defaults of norm, feed_forward, output_gate, positions and skip are the paper's model; the
    others are the rows of its ablation (table 1).
    """

    c_noise: ClassVar[str] = "log_quarter"
    sees_augmentation: ClassVar[bool] = True

    kind: Literal["hdit"] = "hdit"
    patch_size: Side = Field(4, description="side of a patch, which becomes a token")
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=16, strict=False)]
    local_attention: Attention | None = Field(
        None, description="of the levels above the last; neighborhood if absent"
    )
    mapping: Mapping = Mapping()
    vector_width: WidthOrZero = Field(0, description="width of Cond.vector; 0 where there is none")
    norm: Literal["ada_rms_norm", "ada_ln"] = Field(
        "ada_rms_norm", description="adaptive norm before each branch"
    )
    feed_forward: Literal["geglu", "gelu"] = Field(
        "geglu", description="activation of the feed-forward layers"
    )
    output_gate: bool = Field(False, description="on each residual branch, as in DiT")
    positions: Literal["axial_rope", "additive"] = Field(
        "axial_rope", description="rotation of q and k, or an embedding added to the tokens"
    )
    rotated: Literal["half", "full"] = Field("half", description="how much of a head RoPE turns")
    skip: Literal["lerp", "add", "concat"] = Field(
        "lerp", description="how a level joins what came around the inner levels"
    )

    @property
    def multiple(self) -> int:
        """What the sides of an image must be multiples of."""
        return self.patch_size << (len(self.levels) - 1)

    def grids(self, shape: DataShape) -> list[tuple[int, int]]:
        """Tokens (h, w) of each level."""
        side = [self.patch_size << i for i in range(len(self.levels))]
        return [(shape.height // s, shape.width // s) for s in side]

    def resolved(self) -> Self:
        """Writes out the settings that follow from others."""
        local = self.local_attention or Neighborhood()
        last = len(self.levels) - 1
        levels = tuple(
            level.model_copy(
                update={
                    "attention": level.attention or (Global() if i == last else local),
                    "d_ff": level.d_ff or D_FF[self.feed_forward] * level.width,
                }
            )
            for i, level in enumerate(self.levels)
        )
        d_ff = self.mapping.d_ff or D_FF["geglu"] * self.mapping.width
        mapping = self.mapping.model_copy(update={"d_ff": d_ff})
        unused = self.local_attention if self._names_every_local() else None  # for check
        update = {"levels": levels, "mapping": mapping, "local_attention": unused}
        return self.model_copy(update=update)

    def _names_every_local(self) -> bool:
        """Whether each level above the last has an attention of its own."""
        return all(level.attention is not None for level in self.levels[:-1])

    def check(self, shape: DataShape) -> None:
        """Raises SpecError with all that does not fit the data shape or itself."""
        problems = []
        multiple = self.multiple
        if shape.height % multiple or shape.width % multiple:
            problems.append(
                (
                    "patch_size",
                    f"patch {self.patch_size} and {len(self.levels)} levels need an image whose "
                    f"sides are multiples of {multiple}, got {shape.height}x{shape.width}; "
                    "change the image size, the patch or the number of levels",
                )
            )
        if self.mapping.width % 2:
            problems.append(("mapping.width", f"must be even, got {self.mapping.width}"))
        if self.local_attention is not None and self._names_every_local():
            text = "has no effect: no level above the last is without an attention of its own"
            problems.append(("local_attention", text))
        if self.positions == "additive" and self.rotated != "half":
            problems.append(("rotated", "has no effect with positions = 'additive'"))
        if self.positions == "additive" and self.levels[0].width % 4:
            width = self.levels[0].width
            problems.append(
                ("levels.0.width", f"must be a multiple of 4 for additive positions, got {width}")
            )
        levels = self.resolved().levels
        for i, (level, grid) in enumerate(zip(levels, self.grids(shape), strict=True)):
            problems += [
                (f"levels.{i}.{key}", text) for key, text in self._check_level(level, grid)
            ]
        if problems:
            raise SpecError(problems)

    def unmet(self) -> Iterator[tuple[str, str]]:
        """Yields (key, what is wrong): a vector_width, as no data source has such vectors."""
        if self.vector_width:
            yield "vector_width", "must be 0: no data brings such vectors yet"

    def _check_level(self, level: Level, grid: tuple[int, int]) -> list[tuple[str, str]]:
        problems: list[tuple[str, str]] = []
        assert level.attention is not None, "resolved"
        if not isinstance(level.attention, NoAttention):
            d_head, multiple = level.attention.d_head, 8 if self.rotated == "half" else 4
            if d_head % multiple and self.positions == "axial_rope":
                problems.append(
                    ("attention.d_head", f"must be a multiple of {multiple}, got {d_head}")
                )
            if level.width % d_head:
                problems.append(
                    (
                        "width",
                        f"must be a multiple of attention.d_head ({d_head}), got {level.width}",
                    )
                )
        if min(grid) > 0:
            found = level.attention.check(*grid)
            problems += [(f"attention.{key}", text) for key, text in found]
        return problems


NORMS = {"ada_rms_norm": AdaRMSNorm, "ada_ln": AdaLN}
CORES = {"geglu": GEGLU, "gelu": GELU}


def _residual(spec: HDiTSpec, width: int) -> Residual | GatedResidual:
    return GatedResidual(width, spec.mapping.width) if spec.output_gate else Residual()


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), with the layer's index within its level."""

    def __init__(self, spec: HDiTSpec, level: Level, attention: WithHeads, index: int):
        super().__init__()
        d_head = attention.d_head
        n_heads = level.width // d_head
        rope: AxialRoPE | Unrotated = Unrotated()
        if spec.positions == "axial_rope":
            rope = AxialRoPE(n_heads, d_head // 2 if spec.rotated == "half" else d_head)
        self.norm = NORMS[spec.norm](level.width, spec.mapping.width)
        self.core = SelfAttention(
            level.width,
            attention,
            CosineQK(n_heads),
            rope,
            bias=False,
            dropout=level.dropout,
            index=index,
        )
        self.residual = _residual(spec, level.width)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        """x (b h w d), pos (h w 2), cond (b m) -> (b h w d)."""
        return self.residual(x, self.core(self.norm(x, cond), pos), cond)


class FeedForwardBlock(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, spec: HDiTSpec, level: Level):
        super().__init__()
        assert level.d_ff is not None, "resolved"
        self.norm = NORMS[spec.norm](level.width, spec.mapping.width)
        self.core = CORES[spec.feed_forward](level.width, level.d_ff, level.dropout)
        self.residual = _residual(spec, level.width)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        """x (b h w d), cond (b m) -> (b h w d); pos has no effect."""
        return self.residual(x, self.core(self.norm(x, cond)), cond)


class Layer(Runs):
    """Its blocks in turn; `run` calls each, or checkpoints it."""

    def __init__(self, spec: HDiTSpec, level: Level, index: int):
        super().__init__()
        assert level.attention is not None, "resolved"
        if not isinstance(level.attention, NoAttention):
            self.self_attn = AttentionBlock(spec, level, level.attention, index)
        self.ff = FeedForwardBlock(spec, level)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        """Attention, if any, and feed-forward: x (b h w d), pos (h w 2), cond (b m) -> x alike."""
        for block in self.children():
            x = self.run(block, x, pos, cond)
        return x


class Layers(nn.ModuleList):
    """The layers of one level on one side: x (b h w d), pos (h w 2), cond (b m) -> (b h w d).

    `first` is the index of the first of them within the level, whose other side has the others.
    """

    def __init__(self, spec: HDiTSpec, level: Level, first: int = 0):
        super().__init__(Layer(spec, level, first + j) for j in range(level.depth))

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        """Runs the layers in turn: x (b h w d), pos (h w 2), cond (b m) -> (b h w d)."""
        for layer in self:
            x = layer(x, pos, cond)
        return x


class MappingBlock(nn.Module):
    """x + GEGLU(RMSNorm(x))."""

    def __init__(self, spec: Mapping):
        super().__init__()
        self.norm = RMSNorm(spec.width)
        assert spec.d_ff is not None, "resolved"
        self.core = GEGLU(spec.width, spec.d_ff, spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b m) -> (b m)."""
        return x + self.core(self.norm(x))


class MappingNetwork(nn.Module):
    """Norm, residual blocks, norm. (b m) -> (b m)."""

    def __init__(self, spec: Mapping):
        super().__init__()
        self.in_norm = RMSNorm(spec.width)
        self.blocks = nn.ModuleList(MappingBlock(spec) for _ in range(spec.depth))
        self.out_norm = RMSNorm(spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps the sum of the embeddings to the conditioning vector: (b m) -> (b m)."""
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


class TokenMerge(nn.Module):
    """Each p x p block of tokens becomes one (PixelUnshuffle and projection)."""

    def __init__(self, in_width: int, out_width: int, p: int = 2):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(p * p * in_width, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b H W d) -> (b H/p W/p out)."""
        x = rearrange(x, "b (h p) (w q) d -> b h w (p q d)", p=self.p, q=self.p)
        return self.proj(x)


class TokenSplit(nn.Module):
    """Each token becomes a p x p block (projection and PixelShuffle): the inverse of TokenMerge."""

    def __init__(self, in_width: int, out_width: int, p: int = 2):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(in_width, p * p * out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b h w d) -> (b p*h p*w out)."""
        return rearrange(self.proj(x), "b h w (p q d) -> b (h p) (w q) d", p=self.p, q=self.p)


class AddSplit(TokenSplit):
    """TokenSplit, added to the skip."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """skip + split(x): x (b h w d), skip (b 2h 2w out) -> (b 2h 2w out)."""
        return skip + super().forward(x)


class ConcatSplit(TokenSplit):
    """TokenSplit beside the skip, projected to the level's width."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__(in_width, out_width)
        self.skip_proj = nn.Linear(2 * out_width, out_width, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """Linear([split(x) | skip]): x (b h w d), skip (b 2h 2w out) -> (b 2h 2w out)."""
        return self.skip_proj(torch.cat([super().forward(x), skip], dim=-1))


class LerpSplit(TokenSplit):
    """TokenSplit, interpolated with the skip: `fac` weights the upsampled branch."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__(in_width, out_width)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """skip + fac (split(x) - skip): x (b h w d), skip (b 2h 2w out) -> (b 2h 2w out)."""
        x = super().forward(x)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


SPLITS = {"lerp": LerpSplit, "add": AddSplit, "concat": ConcatSplit}


class AdditivePositions(nn.Module):
    """x (b h w d) + the fixed table of DiT for its grid."""

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[tuple[object, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(b h w d) -> (b h w d); the table of a grid is kept for the next call."""
        key = (x.shape[1:], x.device, x.dtype)
        if key not in self._tables:
            self._tables[key] = sincos_positions(*x.shape[1:]).to(x)
        return x + self._tables[key]


def mapping_macs(spec: HDiTSpec) -> int:
    """MACs of the embeddings and the mapping network, of one image."""
    m, d_ff = spec.mapping.width, spec.mapping.d_ff
    assert d_ff is not None, "resolved"
    features = (1 + AUG_WIDTH) * (m // 2)
    return features + 2 * m * m + spec.vector_width * m + spec.mapping.depth * 3 * m * d_ff


def layer_macs(spec: HDiTSpec, i: int, grid: tuple[int, int]) -> int:
    """MACs of one layer of the i-th level on its grid."""
    level, (h, w), m = spec.levels[i], grid, spec.mapping.width
    d, d_ff = level.width, level.d_ff
    assert d_ff is not None, "resolved"
    up = {"geglu": 2, "gelu": 1}[spec.feed_forward]
    modulation = {"ada_rms_norm": 1, "ada_ln": 2}[spec.norm] + spec.output_gate
    macs = h * w * (up + 1) * d * d_ff + m * modulation * d
    if level.attention is None or isinstance(level.attention, NoAttention):
        return macs
    attention = 2 * d * level.attention.keys(h, w)  # logits, weighted sum
    return macs + h * w * (3 * d * d + d * d + attention) + m * modulation * d


class HDiT(BackboneModule):
    """x (b c H W), c_noise (b,) = ln(sigma)/4, cond -> (b out H W); zero at initialisation.

    H and W need not be those of `shape`: any size that the levels divide will do. `out_channels`
    is the channels of the data, or more where a variance is predicted beside x.
    """

    def __init__(self, spec: HDiTSpec, shape: DataShape, out_channels: int | None = None):
        super().__init__()
        spec.check(shape)
        spec = spec.resolved()
        self.spec, self.num_classes = spec, shape.num_classes
        self.out_channels = out_channels or shape.channels
        self._positions: list[Tensor] | None = None
        *outer, inner = spec.levels
        m, widths = spec.mapping.width, [level.width for level in spec.levels]
        steps = list(pairwise(widths))  # (finer, coarser)
        self.patch_in = TokenMerge(shape.channels, widths[0], spec.patch_size)
        self.positions = AdditivePositions() if spec.positions == "additive" else nn.Identity()
        self.time_emb = FourierFeatures(1, m)
        self.time_in_proj = nn.Linear(m, m, bias=False)
        self.aug_emb = FourierFeatures(AUG_WIDTH, m)
        self.aug_in_proj = nn.Linear(m, m, bias=False)
        self.class_emb = ClassEmbedding(shape.num_classes, m) if shape.num_classes else None
        self.mapping_cond_in_proj = (
            nn.Linear(spec.vector_width, m, bias=False) if spec.vector_width else None
        )
        self.mapping = MappingNetwork(spec.mapping)
        self.down_levels = nn.ModuleList(Layers(spec, level) for level in outer)
        self.mid_level = Layers(spec, inner)
        self.up_levels = nn.ModuleList(Layers(spec, level, first=level.depth) for level in outer)
        self.merges = nn.ModuleList(TokenMerge(fine, coarse) for fine, coarse in steps)
        split = SPLITS[spec.skip]
        self.splits = nn.ModuleList(split(coarse, fine) for fine, coarse in steps)
        self.out_norm = RMSNorm(widths[0])
        self.patch_out = TokenSplit(widths[0], self.out_channels, spec.patch_size)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Zeroes the end of each residual branch; all else keeps its modules' initialisation.

        With an output gate that is the gate; with its branch zero too, neither would ever move.
        """
        branch_ends = ("out_proj.weight", "down_proj.weight")
        for name, parameter in self.named_parameters():
            gated = self.spec.output_gate and not name.startswith("mapping.")
            if name.endswith(("norm.linear.weight", "gate.weight")) or (
                name.endswith(branch_ends) and not gated
            ):
                parameter.zero_()
        self.patch_out.proj.weight.zero_()

    @property
    def blocks(self) -> Iterator[nn.Module]:  # type: ignore[override]
        """The layers, in order of the pass."""
        for level in (*self.down_levels, self.mid_level, *reversed(self.up_levels)):
            yield from level

    def stages(self) -> Iterator[tuple[str, nn.Module]]:
        """The levels, both sides of each under one name."""
        for levels in (self.down_levels, self.up_levels):
            for i, level in enumerate(levels):
                yield f"level {i}", level
        yield f"level {len(self.down_levels)}", self.mid_level
        yield "patch out", self.patch_out

    def parts(self, shape: DataShape) -> list[PartCost]:
        """Parameters and MACs of mapping network, patches, levels, merges and splits."""
        spec, grids = self.spec, self.spec.grids(shape)
        h, w = grids[0]
        patch = h * w * spec.patch_size**2 * spec.levels[0].width  # of one channel
        inputs = "time_in_proj.", "aug_in_proj.", "class_emb.", "mapping_cond_in_proj.", "mapping."
        ends = self.count("out_norm.", "patch_out.")
        return [
            PartCost("mapping network", None, self.count(*inputs), mapping_macs(spec)),
            PartCost("patch in", grids[0], self.count("patch_in."), patch * shape.channels),
            *(part for i, grid in enumerate(grids) for part in self._level_parts(i, grid)),
            PartCost("patch out", grids[0], ends, patch * self.out_channels),
        ]

    def _level_parts(self, i: int, grid: tuple[int, int]) -> Iterator[PartCost]:
        """A level, and the way to the next."""
        spec, level, (h, w) = self.spec, self.spec.levels[i], grid
        assert level.attention is not None, "resolved"
        name, layers = f"level {i}, {level.attention.kind}", level.depth * layer_macs(spec, i, grid)
        if i == len(spec.levels) - 1:
            yield PartCost(name, grid, self.count("mid_level."), layers)
            return
        both = (f"down_levels.{i}.", f"up_levels.{i}.")
        yield PartCost(name, grid, self.count(*both), 2 * layers)
        moves = 2 * h * w * level.width * spec.levels[i + 1].width  # a merge and a split
        if spec.skip == "concat":
            moves += h * w * 2 * level.width**2
        ends = (f"merges.{i}.", f"splits.{i}.")
        yield PartCost(f"merge and split {i}-{i + 1}", (h // 2, w // 2), self.count(*ends), moves)

    def parameter_group(self, name: str) -> Group:
        """The reference's four groups: the mapping network and what it feeds learn at lr/3."""
        modulation = name.endswith(("norm.linear.weight", "gate.weight"))
        inputs = ("time_in_proj.", "aug_in_proj.", "mapping_cond_in_proj.")
        decay = modulation or (name.endswith("proj.weight") and not name.startswith(inputs))
        mapping = modulation or name.startswith("mapping.")
        return Group(decay=decay, lr_scale=1 / 3 if mapping else 1.0)

    def conditioning(self, c_noise: Tensor, cond: Cond) -> Tensor:
        """-> (b m), in the parameters' dtype whatever autocast says."""
        check_labels(cond.labels, self.num_classes)
        if (cond.vector is None) != (self.mapping_cond_in_proj is None):
            raise ValueError(
                f"the model takes a conditioning vector of width {self.spec.vector_width}, "
                f"but the batch came with {None if cond.vector is None else cond.vector.shape}"
            )
        aug = c_noise.new_zeros(len(c_noise), AUG_WIDTH) if cond.aug is None else cond.aug
        with torch.autocast(c_noise.device.type, enabled=False):
            x = self.time_in_proj(self.time_emb(c_noise[:, None]))
            x = x + self.aug_in_proj(self.aug_emb(aug))
            if self.class_emb is not None and cond.labels is not None:
                x = x + self.class_emb(cond.labels)
            if self.mapping_cond_in_proj is not None and cond.vector is not None:
                x = x + self.mapping_cond_in_proj(cond.vector.to(x.dtype))
            return self.mapping(x)

    def level_positions(self, h: int, w: int, device: torch.device) -> list[Tensor]:
        """Positions (h w 2) of the cells of each level, those of the first on a grid of h x w.

        The same tensors for the grid of the last call: what is made of them is kept by them.
        """
        compiling = torch.compiler.is_compiling()
        kept = None if compiling else self._positions  # read once: another thread may replace it
        if kept is not None and kept[0].shape[:2] == (h, w) and kept[0].device == device:
            return kept
        with torch.inference_mode(False):
            levels = [axial_positions(h, w, device)]
            for _ in self.merges:
                levels.append(downscale_positions(levels[-1]))
        if not compiling and type(levels[0]) is Tensor:
            self._positions = levels
        return levels

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        """x (b c H W), c_noise (b,), cond -> (b out H W).

        Raises ValueError where H or W is no multiple of `spec.multiple`, or cond does not fit.
        """
        multiple = self.spec.multiple
        if x.shape[2] % multiple or x.shape[3] % multiple:
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"the sides of an image must be multiples of {multiple}, got {size}")
        m = self.conditioning(c_noise, cond)
        x = self.positions(self.patch_in(rearrange(x, "b c h w -> b h w c")))  # (b h w d)
        *outer, inner = self.level_positions(x.shape[1], x.shape[2], x.device)
        skips = []
        for level, merge, pos in zip(self.down_levels, self.merges, outer, strict=True):
            x = level(x, pos, m)
            skips.append((x, pos))
            x = merge(x)
        x = self.mid_level(x, inner, m)
        for level, split in zip(reversed(self.up_levels), reversed(self.splits), strict=True):
            skip, pos = skips.pop()
            x = level(split(x, skip), pos, m)
        return rearrange(self.patch_out(self.out_norm(x)), "b h w c -> b c h w")
