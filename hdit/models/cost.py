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
from hdit.protocols import Signal


@dataclass(frozen=True)
class Row:
    """A part of the model: its token grid (h, w), or None where it works on the whole image."""

    name: str
    grid: tuple[int, int] | None
    params: int
    macs: int


def cost(spec: HDiTSpec | DiTSpec, signal: Signal, out_channels: int | None = None) -> list[Row]:
    """The parts of the model in the order of the forward pass; their sums are the model's."""
    out = out_channels or signal.channels
    with torch.device("meta"):
        model = build(spec, signal, out)
    if isinstance(spec, HDiTSpec):
        return _hdit(spec, signal, out, model)
    return _dit(spec, signal, out, model)


def _params(model: HDiT | DiT, *prefixes: str) -> int:
    """Parameters whose name begins so; buffers do not count."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))


def _layer(level: Level, h: int, w: int, mapping_width: int) -> int:
    """MACs of one HDiT layer on h x w tokens."""
    d, d_ff = level.width, level.d_ff or 3 * level.width
    projections = 3 * d * d + d * d + 3 * d * d_ff  # q k v, out, up and gate, down
    attention = 2 * d * level.attention.keys(h, w)  # logits, weighted sum
    return h * w * (projections + attention) + 2 * mapping_width * d


def _hdit(spec: HDiTSpec, signal: Signal, out: int, model: HDiT | DiT) -> list[Row]:
    m, d_ff = spec.mapping.width, spec.mapping.d_ff or 3 * spec.mapping.width
    features = (1 + AUG_WIDTH) * (m // 2)
    mapping = features + 2 * m * m + spec.vector_width * m + spec.mapping.depth * 3 * m * d_ff
    inputs = ("time_in_proj.", "aug_in_proj.", "class_emb.", "mapping_cond_in_proj.", "mapping.")
    rows = [Row("mapping network", None, _params(model, *inputs), mapping)]
    grids = spec.grids(signal)
    h, w = grids[0]
    patch = h * w * spec.patch_size**2 * spec.levels[0].width  # of one channel
    patch_in = patch * signal.channels
    rows.append(Row("patch in", grids[0], _params(model, "patch_in."), patch_in))
    last = len(spec.levels) - 1
    for i, (level, (h, w)) in enumerate(zip(spec.levels, grids, strict=True)):
        kind = level.attention.kind
        layers = level.depth * _layer(level, h, w, m)
        if i == last:
            rows.append(Row(f"level {i}, {kind}", (h, w), _params(model, "mid_level."), layers))
            continue
        both = (f"down_levels.{i}.", f"up_levels.{i}.")
        rows.append(Row(f"level {i}, {kind}", (h, w), _params(model, *both), 2 * layers))
        moves = 2 * h * w * level.width * spec.levels[i + 1].width  # a merge and a split
        ends = (f"merges.{i}.", f"splits.{i}.")
        rows.append(Row(f"merge and split {i}-{i + 1}", grids[i + 1], _params(model, *ends), moves))
    patch_out = patch * out
    rows.append(Row("patch out", grids[0], _params(model, "out_norm.", "patch_out."), patch_out))
    return rows


def _dit(spec: DiTSpec, signal: Signal, out: int, model: HDiT | DiT) -> list[Row]:
    d, (h, w) = spec.width, spec.grid(signal)
    patch = h * w * spec.patch_size**2 * d  # of one channel
    projections = 4 * d * d + 2 * d * int(d * spec.mlp_ratio)
    block = h * w * (projections + 2 * d * h * w) + 6 * d * d
    embed = TIME_FEATURES * d + d * d
    return [
        Row("conditioning", None, _params(model, "t_embedder.", "y_embedder."), embed),
        Row("patch in", (h, w), _params(model, "x_embedder."), patch * signal.channels),
        Row("blocks, global", (h, w), _params(model, "blocks."), spec.depth * block),
        Row("patch out", (h, w), _params(model, "final_layer."), patch * out + 2 * d * d),
    ]
