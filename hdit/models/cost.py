"""What a forward pass costs, from the spec alone.

MACs are multiply-accumulates of matrix products, for one image; both papers print them as "GFLOPs".
FLOPs are 2 x MACs. Norms and elementwise work count as free, attention with the keys that each
query sees. The backward pass costs twice the forward.
"""

from __future__ import annotations

import torch

from hdit.models import BackboneSpec, build
from hdit.protocols import DataShape, PartCost


def cost(spec: BackboneSpec, shape: DataShape, out_channels: int | None = None) -> list[PartCost]:
    """The parts of the model in the order of the forward pass; their sums are the model's."""
    with torch.device("meta"):
        return build(spec, shape, out_channels).parts(shape)
