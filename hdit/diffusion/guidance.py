"""Guidance: Denoise -> Denoise, bound before a sampler sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from hdit.bounds import Scale
from hdit.diffusion.denoiser import Bound
from hdit.protocols import Denoise, DenoiseWithVariance, Spec

log = logging.getLogger(__name__)

Moments = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class WithVariance:
    """A function of (x, sigma) to (x0, v), as a DenoiseWithVariance."""

    moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.moments(x, sigma)[0]


@dataclass
class Batching:
    """Whether two evaluations of one network go in one call of double batch.

    Shared by calls of `cfg`, it remembers that the memory did not suffice.
    """

    together: bool = True


class APG(Spec):
    """Adaptive projected guidance: less of what oversaturates at high scales (Sadat et al., 2025).

    The difference D_c - D_u is averaged over the evaluations of a sample, its norm is limited, and
    its part along D_c is weakened (arXiv 2410.02416; r is `norm_threshold`, beta `momentum`).
    """

    eta: float = Field(
        0.0, ge=0, le=1, description="weight of the difference's part along x0; 1 keeps all of it"
    )
    norm_threshold: Scale | None = Field(
        None, description="largest norm of the difference over an image; not limited if absent"
    )
    momentum: float = Field(
        -0.5, gt=-1, lt=1, description="of the average over evaluations; 0 is none"
    )


@dataclass
class _Projected:
    """The update of APG, for the evaluations of one batch in turn."""

    apg: APG
    average: Tensor | None = field(default=None)

    def __call__(self, d: Tensor, d_uncond: Tensor, inside: Tensor) -> Tensor:
        """D_c, D_u (b c h w), which images are guided (b 1 1 1) -> what to add, at scale 2, to D_c.

        Sums over an image are float64: the parallel part is a small difference in float32.
        """
        difference = d - d_uncond
        if self.average is not None:
            difference = difference + self.apg.momentum * self.average
        if self.apg.momentum:
            before = torch.zeros_like(d) if self.average is None else self.average
            self.average = torch.where(inside, difference, before)
        if self.apg.norm_threshold is not None:
            norm = _dot(difference, difference).sqrt()
            limited = (self.apg.norm_threshold / norm).clamp(max=1)  # 1 where the norm is 0
            difference = difference * limited.to(d.dtype)
        along = _dot(difference, d) / _dot(d, d).clamp(min=1e-24)
        return difference + ((self.apg.eta - 1) * along).to(d.dtype) * d


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each image, (b c h w) -> (b 1 1 1) float64."""
    return (a.double() * b.double()).sum(dim=(1, 2, 3), keepdim=True)


def cfg(
    cond: Denoise,
    uncond: Denoise,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    channels: int | None = None,
    rescale: float = 0.0,
    apg: APG | None = None,
    batching: Batching | None = None,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans, 2022) on x0: D_u + scale * (D_c - D_u).

    The scale is that of EDM2 and DiT; Ho & Salimans' w is scale - 1. At scale 1 this is `cond`, and
    `uncond` is not evaluated. With a weaker model of the same conditions in the place of `uncond`
    it is autoguidance (Karras et al., 2024). Either argument may be guided itself.

    interval: (low, high]; noise levels outside are not guided (Kynkaanniemi et al., 2024).
    channels: guide the first ones only, and take the others from `cond`; 3 of 4 reproduces the
        published DiT samples.
    rescale: 0 to 1, how far the standard deviation of each guided image goes back to that of
        `cond` (Lin et al., 2024, section 3.4; here of x0).
    apg: D_c + (scale - 1) * the projected difference in its place (Sadat et al., 2025). With
        momentum the result remembers its evaluations: bind it anew for each batch.
    batching: one call of double batch where both are of the same network, else two. Where the
        memory does not suffice, two calls take its place from then on, and that is logged.

    A learned variance is that of `cond`.
    """
    if scale == 1:
        return cond
    pair = _Pair(cond, uncond, batching or Batching())
    projected = _Projected(apg) if apg else None

    def guide(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        inside = torch.ones_like(sigma, dtype=torch.bool)
        if interval is not None:
            inside = (sigma > interval[0]) & (sigma <= interval[1])
            if not inside.any():
                return _moments(cond, x, sigma)
        inside = inside[:, None, None, None]
        (d, v), d_uncond = pair(x, sigma)
        some, others = d[:, :channels], d_uncond[:, :channels]
        if projected is None:
            guided = others + scale * (some - others)
        else:
            guided = some + (scale - 1) * projected(some, others, inside)
        if rescale:
            wanted, got = _std(some), _std(guided)
            guided = guided * torch.lerp(torch.ones_like(got), wanted / got, rescale)
        if channels is not None:
            guided = torch.cat([guided, d[:, channels:]], dim=1)
        return torch.where(inside, guided, d), v

    return _denoise_of(guide, cond)


def _std(images: Tensor) -> Tensor:
    """Of each image: (b 1 1 1)."""
    return images.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)


def _moments(denoise: Denoise, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
    if isinstance(denoise, DenoiseWithVariance):
        return denoise.moments(x, sigma)
    return denoise(x, sigma), None


def _denoise_of(moments: Moments, like: Denoise) -> Denoise:
    """A Denoise, with variance if `like` is one."""
    if isinstance(like, DenoiseWithVariance):
        return WithVariance(moments)  # type: ignore[arg-type]
    return lambda x, sigma: moments(x, sigma)[0]


def _joined(first: Denoise, second: Denoise) -> Denoise | None:
    """Of both batches at once, where one network gives both."""
    if not (isinstance(first, Bound) and isinstance(second, Bound)):
        return None
    if first.denoiser is not second.denoiser:
        return None
    return first.denoiser.bind(first.cond.cat(second.cond))


class _Pair:
    """Evaluates two denoisers -> ((x0, v) of the first, x0 of the second)."""

    def __init__(self, first: Denoise, second: Denoise, batching: Batching):
        self.first, self.second, self.batching = first, second, batching
        self.both = _joined(first, second)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        if self.both is not None and self.batching.together:
            n = len(x)
            try:
                d, v = _moments(self.both, torch.cat([x, x]), torch.cat([sigma, sigma]))
                return (d[:n], None if v is None else v[:n]), d[n:]
            except torch.OutOfMemoryError as error:
                self.batching.together = False
                log.warning(
                    "guidance goes on with two calls of %d images: no memory for one of %d (%s)",
                    *(n, 2 * n, error),
                )
        return _moments(self.first, x, sigma), self.second(x, sigma)
