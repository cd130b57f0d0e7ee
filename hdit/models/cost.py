"""What a forward pass costs, from the spec alone.

MACs are multiply-accumulates of matrix products, for one image; both papers print them as "GFLOPs".
FLOPs are 2 x MACs. Norms and elementwise work count as free, attention with the keys that each
query sees. The backward pass costs twice the forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hdit.models import DiT, HDiT, build
from hdit.models.dit import TIME_FEATURES, DiTSpec
from hdit.models.hdit import AUG_WIDTH, HDiTSpec, Level
from hdit.nn.attention import NoAttention
from hdit.protocols import DataShape


@dataclass(frozen=True)
class Row:
    """A part of the model: its token grid (h, w), or None where it works on the whole image."""

    name: str
    grid: tuple[int, int] | None
    params: int
    macs: int


def cost(spec: HDiTSpec | DiTSpec, shape: DataShape, out_channels: int | None = None) -> list[Row]:
    """The parts of the model in the order of the forward pass; their sums are the model's."""
    out = out_channels or shape.channels
    with torch.device("meta"):
        model = build(spec, shape, out)
    if isinstance(spec, HDiTSpec):
        return _hdit(spec, shape, out, model)
    return _dit(spec, shape, out, model)


def _params(model: HDiT | DiT, *prefixes: str) -> int:
    """Parameters whose name begins so; buffers do not count."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))


def _layer(spec: HDiTSpec, level: Level, h: int, w: int) -> int:
    """MACs of one HDiT layer on h x w tokens."""
    d, d_ff, m = level.width, level.d_ff, spec.mapping.width
    assert d_ff is not None, "resolved"
    up = {"geglu": 2, "gelu": 1}[spec.feed_forward]
    modulation = {"ada_rms_norm": 1, "ada_ln": 2}[spec.norm] + spec.output_gate
    macs = h * w * (up + 1) * d * d_ff + m * modulation * d
    if level.attention is None or isinstance(level.attention, NoAttention):
        return macs
    attention = 2 * d * level.attention.keys(h, w)  # logits, weighted sum
    return macs + h * w * (3 * d * d + d * d + attention) + m * modulation * d


def _hdit(spec: HDiTSpec, shape: DataShape, out: int, model: HDiT | DiT) -> list[Row]:
    spec = spec.resolved()
    m, d_ff = spec.mapping.width, spec.mapping.d_ff
    assert d_ff is not None, "resolved"
    features = (1 + AUG_WIDTH) * (m // 2)
    mapping = features + 2 * m * m + spec.vector_width * m + spec.mapping.depth * 3 * m * d_ff
    inputs = ("time_in_proj.", "aug_in_proj.", "class_emb.", "mapping_cond_in_proj.", "mapping.")
    rows = [Row("mapping network", None, _params(model, *inputs), mapping)]
    grids = spec.grids(shape)
    h, w = grids[0]
    patch = h * w * spec.patch_size**2 * spec.levels[0].width  # of one channel
    patch_in = patch * shape.channels
    rows.append(Row("patch in", grids[0], _params(model, "patch_in."), patch_in))
    last = len(spec.levels) - 1
    for i, (level, (h, w)) in enumerate(zip(spec.levels, grids, strict=True)):
        assert level.attention is not None, "resolved"
        name, layers = f"level {i}, {level.attention.kind}", level.depth * _layer(spec, level, h, w)
        if i == last:
            rows.append(Row(name, (h, w), _params(model, "mid_level."), layers))
            continue
        both = (f"down_levels.{i}.", f"up_levels.{i}.")
        rows.append(Row(name, (h, w), _params(model, *both), 2 * layers))
        moves = 2 * h * w * level.width * spec.levels[i + 1].width  # a merge and a split
        if spec.skip == "concat":
            moves += h * w * 2 * level.width**2
        ends = (f"merges.{i}.", f"splits.{i}.")
        rows.append(Row(f"merge and split {i}-{i + 1}", grids[i + 1], _params(model, *ends), moves))
    patch_out = patch * out
    rows.append(Row("patch out", grids[0], _params(model, "out_norm.", "patch_out."), patch_out))
    return rows


def _dit(spec: DiTSpec, shape: DataShape, out: int, model: HDiT | DiT) -> list[Row]:
    d, d_ff, (h, w) = spec.width, int(spec.width * spec.mlp_ratio), spec.grid(shape)
    kind, tokens = spec.conditioning.kind, h * w
    s = 2 if shape.num_classes else 1  # t, and y
    extra = s if kind == "in_context" else 0
    block = _block(tokens + extra, d, d_ff)
    block += {"adaln_zero": 6, "adaln": 4}.get(kind, 0) * d * d
    if kind == "cross_attention":
        block += 2 * tokens * d * d + 2 * s * d * d + 2 * tokens * s * d  # q and out, k and v
    final = 2 * d * d if kind in ("adaln_zero", "adaln") else 0
    patch = tokens * spec.patch_size**2 * d  # of one channel
    embed = TIME_FEATURES * d + d * d
    return [
        Row("conditioning", None, _params(model, "t_embedder.", "y_embedder."), embed),
        Row("patch in", (h, w), _params(model, "x_embedder."), patch * shape.channels),
        Row("blocks, global", (h, w), _params(model, "blocks."), spec.depth * block),
        Row("patch out", (h, w), _params(model, "final_layer."), patch * out + final),
    ]


def _block(tokens: int, d: int, d_ff: int) -> int:
    """MACs of self-attention and MLP of one DiT block, without its conditioning."""
    return tokens * (4 * d * d + 2 * d * d_ff + 2 * d * tokens)
