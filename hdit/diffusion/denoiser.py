"""The one seam between network and diffusion: a backbone becomes D(x; sigma)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hdit.diffusion.parametrization import NOISE_LABELS, EpsVP, Parametrization, Scales
from hdit.diffusion.vp import LinearSchedule
from hdit.diffusion.weighting import Weighting
from hdit.protocols import Backbone, Cond, Denoise


def per_image(scale: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b 1 1 1) in the dtype of `like`."""
    return scale.to(like.dtype)[:, None, None, None]


class Denoiser:
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), and its loss.

    Coefficients are computed in float64 and applied in x's dtype, float32 in training; only the
    call of the backbone runs under `autocast`, where a dtype is given.
    """

    def __init__(
        self,
        backbone: Backbone,
        parametrization: Parametrization,
        noise_label: str,
        sigma_data: float,
        schedule: LinearSchedule,
        autocast: torch.dtype | None = None,
    ):
        self.backbone, self.parametrization, self.sigma_data = backbone, parametrization, sigma_data
        self.label = NOISE_LABELS[noise_label]
        self.table = schedule if isinstance(parametrization, EpsVP) else None
        self.autocast = autocast

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x (b c h w) = x0 + sigma * noise, sigma (b,) -> estimate of x0 (b c h w)."""
        scales = self.parametrization(sigma.double(), self.sigma_data)
        f = self._network(x, sigma, scales, cond)
        return per_image(scales.c_skip, x) * x + per_image(scales.c_out, x) * f

    def bind(self, cond: Cond) -> Denoise:
        """The denoiser of these conditions, as samplers and guidance take it."""
        return lambda x, sigma: self(x, sigma, cond)

    def loss(
        self, x0: Tensor, noise: Tensor, sigma: Tensor, cond: Cond, weighting: Weighting
    ) -> Tensor:
        """lambda(sigma) * mean |D(x0 + sigma * noise; sigma) - x0|^2 of each image -> (b,).

        Computed as lambda c_out^2 |F - target|^2, so that nothing cancels at small sigma.
        """
        sigma = sigma.double()
        scales = self.parametrization(sigma, self.sigma_data)
        x = x0 + per_image(sigma, x0) * noise
        of_x0 = per_image((1 - scales.c_skip) / scales.c_out, x0)
        of_noise = per_image(scales.c_skip * sigma / scales.c_out, x0)
        target = of_x0 * x0 - of_noise * noise
        error = (self._network(x, sigma, scales, cond) - target).square().mean(dim=(1, 2, 3))
        weight = weighting(sigma, self.sigma_data) * scales.c_out.square()
        return weight.to(error.dtype) * error

    def _network(self, x: Tensor, sigma: Tensor, scales: Scales, cond: Cond) -> Tensor:
        """F(c_in x, c_noise) in x's dtype."""
        c_noise = self.label(sigma.double(), self.sigma_data, self.table).to(x.dtype)
        with self._precision(x.device.type):
            f = self.backbone(per_image(scales.c_in, x) * x, c_noise, cond)
        return f.to(x.dtype)

    def _precision(self, device: str) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device, dtype=self.autocast)
