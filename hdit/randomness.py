"""Counter-based randomness: each number is a function of (seed, purpose, counter) alone.

The counter is the running count of images drawn, so a resumed run repeats the uninterrupted one and
nothing depends on the number of processes or on the batch size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hdit.device import to_device
from hdit_kernels import philox


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al., 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(seed: int, purpose: str, counters: np.ndarray) -> np.ndarray:
    """64 random bits for each counter: (n,) integers -> (n,) uint64."""
    with np.errstate(over="ignore"):
        seeds = np.array([seed & (2**64 - 1)], np.uint64)
        stream = _mix(_mix(seeds) + np.uint64(zlib.crc32(purpose.encode())))
        golden = np.uint64(0x9E3779B97F4A7C15)
        return _mix(_mix(counters.astype(np.uint64) * golden + stream) + stream)


def uniform(seed: int, purpose: str, counters: np.ndarray) -> Tensor:
    """(n,) float64 in [0, 1)."""
    return torch.from_numpy((bits(seed, purpose, counters) >> np.uint64(11)) * 2.0**-53)


def keys(seed: int, purpose: str, counters: np.ndarray, device: torch.device) -> Tensor:
    """The key of each counter's stream of noise: (n,) integers -> (n,) int64 on the device.

    They are copied as `to_device` copies, which the host does not wait for.
    """
    values = torch.from_numpy(bits(seed, purpose, counters).view(np.int64))
    return to_device(values, device)


def normal(keys: Tensor, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard normal noise of streams: keys (n,) -> (n, *shape) float32 on their device.

    The streams are those of Philox4x32-10, with the same bits on every device: see
    hdit_kernels/philox.py. `draw` says which tensor of each stream, in 0..2^63 - 1; different draws
    are independent. An element is a function of its key, the draw and its place in the shape.
    Raises ValueError if the draw is not in its range, or the keys are not a vector of int64.
    """
    return philox.normal(keys, math.prod(shape), draw).view(len(keys), *shape)
