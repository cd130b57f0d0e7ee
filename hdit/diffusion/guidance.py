"""Guidance: Denoise -> Denoise, bound before a sampler sees it."""

from __future__ import annotations

from torch import Tensor

from hdit.protocols import Denoise


def cfg(cond: Denoise, uncond: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance (Ho & Salimans, 2022) on x0: D_u + scale * (D_c - D_u).

    At scale 1 this is `cond`, and `uncond` is not evaluated.
    """
    if scale == 1:
        return cond

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        baseline = uncond(x, sigma)
        return baseline + scale * (cond(x, sigma) - baseline)

    return guided
