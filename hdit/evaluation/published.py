"""Figures that papers printed, with the protocol that they name, to list beside one's own.

They are never ranked with others: a paper's images cannot be measured again. `gmac` is of one
forward pass; the papers print it as "GFLOP".
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A row of a paper: its figures by metric."""

    name: str
    source: str
    protocol: str
    gmac: float
    sampling: str
    figures: dict[str, float]


def _dit(size: str, gmac: float, fid: float, guidance: str = "no guidance") -> Published:
    """Peebles & Xie, 2023, tables 2 to 4."""
    source, sampling = "Peebles & Xie, 2023 (DiT)", f"250 DDPM steps, {guidance}"
    return Published(f"DiT-{size}", source, ADM, gmac, sampling, {"fid": fid})


def _hdit(
    name: str, gmac: float, figures: dict[str, float], guidance: str = "no guidance"
) -> Published:
    """Crowson et al., 2024, tables 1 and 3 to 5."""
    source = "Crowson et al., 2024 (HDiT)"
    sampling = f"50 steps of DPM++(3M) SDE, {guidance}"
    return Published(name, source, ADM, gmac, sampling, figures)


ADM = "FID and Inception Score by ADM's suite, 50,000 samples"
SMALLER = (
    ("S/8", 0.36, 153.60), ("S/4", 1.41, 100.41), ("S/2", 6.06, 68.40),
    ("B/8", 1.42, 122.74), ("B/4", 5.56, 68.38), ("B/2", 23.01, 43.47),
    ("L/8", 5.01, 118.87), ("L/4", 19.70, 45.64), ("L/2", 80.71, 23.33),
    ("XL/8", 7.39, 106.41), ("XL/4", 29.05, 43.01), ("XL/2", 118.64, 19.47),
)  # fmt: skip

PUBLISHED = {
    "imagenet256": [
        _dit("XL/2", 118.64, 9.62),
        _dit("XL/2", 118.64, 2.27, "guidance 1.5 on 3 channels"),
        _hdit("HDiT 557M", 197.6, {"fid": 6.92, "is": 135.2}),
        _hdit("HDiT 557M", 197.6, {"fid": 3.21, "is": 220.6}, "guidance about 1.3"),
    ],
    "imagenet512": [
        _dit("XL/2", 524.6, 12.03),
        _dit("XL/2", 524.6, 3.04, "guidance 1.5 on 3 channels"),
    ],
    "imagenet256-400k": [_dit(*row) for row in SMALLER],
    "imagenet128-400k": [_hdit("HDiT, row E", 31, {"fid": 27.74})],
    "ffhq1024": [_hdit("HDiT 85M", 206.1, {"fid": 5.23, "fdd": 149, "kdd": 0.354})],
}
"""By data set; those in 400k are of models of 400,000 steps of training."""
