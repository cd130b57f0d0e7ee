"""Counter-based randomness: each number is a function of (seed, purpose, counter) alone.

The counter is the running count of images drawn, so a resumed run repeats the uninterrupted one and
nothing depends on the number of processes or on the batch size.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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


class Stream:
    """Standard normal noise without end, of a 64-bit seed.

    A CPU draws from numpy's Philox, because torch's CPU generator keeps 32 bits of its seed; a GPU
    draws on the device. The two differ.
    """

    def __init__(self, seed: int, device: torch.device):
        self.device = device
        self.generator: np.random.Generator | torch.Generator
        if device.type == "cpu":
            self.generator = np.random.Generator(np.random.Philox(key=seed))
        else:
            self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The next noise: float32 of this shape, on the device."""
        if isinstance(self.generator, torch.Generator):
            return torch.randn(*shape, generator=self.generator, device=self.device)
        return torch.from_numpy(self.generator.standard_normal(tuple(shape), dtype=np.float32))


def streams(seed: int, purpose: str, counters: np.ndarray, device: torch.device) -> list[Stream]:
    """One stream of noise for each counter."""
    seeds = (bits(seed, purpose, counters) >> np.uint64(1)).tolist()
    return [Stream(value, device) for value in seeds]


def normal(streams: Sequence[Stream], shape: Sequence[int]) -> Tensor:
    """The next noise of each stream: (n, *shape) float32, on their device."""
    return torch.stack([stream.normal(shape) for stream in streams])
