"""Guidance: Denoise -> Denoise, bound before a sampler sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hdit.diffusion.denoiser import Bound
from hdit.protocols import Denoise, DenoiseWithVariance

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


def cfg(
    cond: Denoise,
    uncond: Denoise,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    channels: int | None = None,
    rescale: float = 0.0,
    batching: Batching | None = None,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans, 2022) on x0: D_u + scale * (D_c - D_u).

    At scale 1 this is `cond`, and `uncond` is not evaluated. With a weaker model of the same
    conditions in the place of `uncond` it is autoguidance (Karras et al., 2024). Either argument
    may be guided itself.

    interval: (low, high]; noise levels outside are not guided (Kynkaanniemi et al., 2024).
    channels: guide the first ones only, and take the others from `cond`; 3 of 4 reproduces the
        published DiT samples.
    rescale: 0 to 1, how far the standard deviation of each guided image goes back to that of
        `cond` (Lin et al., 2024, section 3.4; here of x0).
    batching: one call of double batch where both are of the same network, else two. Where the
        memory does not suffice, two calls take its place from then on, and that is logged.

    A learned variance is that of `cond`.
    """
    if scale == 1:
        return cond
    pair = _Pair(cond, uncond, batching or Batching())

    def guide(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        inside = torch.ones_like(sigma, dtype=torch.bool)
        if interval is not None:
            inside = (sigma > interval[0]) & (sigma <= interval[1])
            if not inside.any():
                return _moments(cond, x, sigma)
        (d, v), d_uncond = pair(x, sigma)
        guided = d_uncond + scale * (d - d_uncond)
        if rescale:
            wanted, got = (_std(image[:, :channels]) for image in (d, guided))
            guided = guided * torch.lerp(torch.ones_like(got), wanted / got, rescale)
        if channels is not None:
            guided = torch.cat([guided[:, :channels], d[:, channels:]], dim=1)
        return torch.where(inside[:, None, None, None], guided, d), v

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
