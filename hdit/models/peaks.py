"""Published peaks of GPUs: FLOP/s of dense matrix products, by name and precision.

From the vendor's data sheets, without sparsity, and with accumulation in float32. Only what is sure
is here: variants of other clocks or links (PCIe and NVL of Hopper, laptops) are not known.
"""

from __future__ import annotations

import re

PEAKS: dict[str, dict[str, float]] = {
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "H100": {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "H200": {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "RTX 4090": {"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
}
"""FLOP/s by the GPU's name (H100 and H200: SXM) and the precision of [training]."""

OTHERS = {
    "H100": r"PCIE|NVL|MIG",
    "H200": r"NVL|MIG",
    "RTX 4090": r"\bD\b|LAPTOP",
    "A100": r"MIG",
}
"""What in a device's name makes it another one."""


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU at "fp32", "tf32" or "bf16", or None where it is not known.

    `name` is that of the table, or as torch tells it, such as "NVIDIA H100 80GB HBM3".
    """
    told = name.upper()
    for known, peaks in PEAKS.items():
        is_it = re.search(rf"\b{known}\b", told) and not re.search(OTHERS[known], told)
        if is_it:
            return peaks.get(precision)
    return None
