"""SiT's velocity, said in the words of rectified flow here (Ma et al., 2024, arXiv 2401.08740).

SiT has DiT's tensors. With its path "Linear" it sees x = s x0 + (1 - s) noise at a time s that goes
from noise (0) to data (1), and predicts dx/ds = x0 - noise. Rectified flow here sees the same x at
the time t = 1 - s, and predicts noise - x0. So its network is SiT's with another sign in the last
layer, and with the sinusoids of 1 - t in place of those of t, which the first layer after them can
make: cos((1 - t) f) = cos f cos(t f) + sin f sin(t f), and likewise of the sine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOTE = (
    "SiT's time runs from noise to data, and its velocity likewise: the signs of the last layer "
    "and the first layer of the time were changed, so that they are rectified flow's here"
)
FIRST, LAST = "t_embedder.mlp.0.weight", "final_layer.linear"


def as_flow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network of SiT's velocity, by our names -> one of rectified flow's.

    The first layer of the time is in float32 at least.
    """
    first = tensors[FIRST]
    turned = {f"{LAST}.{part}": -tensors[f"{LAST}.{part}"] for part in ("weight", "bias")}
    wide = torch.promote_types(first.dtype, torch.float32)
    return tensors | turned | {FIRST: _backwards(first.double()).to(wide)}


def _backwards(weight: Tensor) -> Tensor:
    """(d 2f), of (cos, sin) of t -> (d 2f), whose product with those is `weight`'s with 1 - t's."""
    cos, sin = weight.chunk(2, dim=1)  # (d f)
    half = cos.shape[1]
    freqs = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half)
    c, s = freqs.cos(), freqs.sin()
    return torch.cat([c * cos + s * sin, s * cos - c * sin], dim=1)


def first_channels(tensor: Tensor, channels: int, p: int) -> Tensor:
    """The rows of the last layer's tensor that give the first half of 2 * channels.

    SiT's network has an output for DiT's variance, which it does not use.
    """
    rows = tensor.unflatten(0, (p * p, 2, channels))  # (p*p 2 c ...)
    return rows[:, 0].flatten(0, 1)


def is_untrained(tensor: Tensor, channels: int, p: int) -> bool:
    """Whether the second half is zero, as no gradient ever reached it, and the first is not."""
    rows = tensor.unflatten(0, (p * p, 2, channels))
    return bool((rows[:, 1] == 0).all()) and bool((rows[:, 0] != 0).any())
