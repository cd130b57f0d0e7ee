"""The known answers in tests/vectors, and the deterministic fills that they were computed from."""

from __future__ import annotations

import json
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "vectors"


@cache
def load(name: str) -> Any:
    """Contents of tests/vectors/NAME.json, or the tensors of NAME.safetensors."""
    path = FOLDER / name
    return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


def u01(n: int, stream: int) -> np.ndarray:
    """Hash of 0..n-1 to [0, 1), float64; vectors/README.md has the definition."""
    h = (np.arange(n, dtype=np.uint64) * 2654435761 + stream * 40503 + 12345) % 2**32
    h ^= h >> np.uint64(16)
    h = h * 2246822519 % 2**32
    h ^= h >> np.uint64(13)
    h = h * 3266489917 % 2**32
    h ^= h >> np.uint64(16)
    return h / 2.0**32


def hfill(
    shape: tuple[int, ...] | list[int], stream: int, amp: float = 1, base: float = 0
) -> Tensor:
    """base + amp * (2u - 1), row-major, rounded to float32."""
    values = base + amp * (2 * u01(prod(shape), stream) - 1)
    return torch.from_numpy(values.astype(np.float32)).view(*shape)


def check_record(actual: Tensor, record: dict[str, Any], atol: float, rtol: float = 0) -> None:
    """Asserts that a tensor has a record's shape, values where it lists them, and statistics."""
    x = actual.detach().double()
    assert list(x.shape) == record["shape"]
    x = x.flatten()

    def close(a: Tensor | float, b: list[float] | float, scale: float = 1) -> None:
        a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
        torch.testing.assert_close(a, b, atol=atol * scale, rtol=max(rtol, 1e-12))

    close(x[: len(record["first8"])], record["first8"])
    close(x[record["strided_idx"]], record["strided"])
    close(x.mean(), record["mean"])
    close(x.std(correction=0), record["std_pop"])
    weights = torch.sin(0.1 * torch.arange(1, x.numel() + 1, dtype=torch.float64))
    close((x * weights).sum(), record["wsum"], scale=x.numel())
