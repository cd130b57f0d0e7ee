"""The one seam between network and diffusion: a backbone becomes D(x; sigma)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hdit.diffusion.beta_schedules import BetaSchedule
from hdit.diffusion.broadcast import per_image
from hdit.diffusion.parametrization import C_NOISES, Parametrization, Scales
from hdit.diffusion.vlb import vlb
from hdit.diffusion.weighting import Weighting, mean_square
from hdit.protocols import Cond, Denoise, Network


class Denoiser:
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), and its loss.

    Coefficients are computed in float64 and applied in x's dtype, which is that of the backbone's
    parameters, float32 but for tests; only the call of the backbone runs under `autocast`, where a
    dtype is given. `table` is the schedule
    whose timesteps the noise label tells and the learned variance goes by, if there is one. With
    `learned_variance` the backbone gives 2c channels, F and then v.
    """

    def __init__(
        self,
        backbone: Network,
        parametrization: Parametrization,
        c_noise: str,
        sigma_data: float,
        table: BetaSchedule | None = None,
        learned_variance: bool = False,
        autocast: torch.dtype | None = None,
    ):
        assert table or not learned_variance, "a learned variance goes by a table"
        self.backbone, self.parametrization, self.sigma_data = backbone, parametrization, sigma_data
        self.label = C_NOISES[c_noise]
        self.table, self.learned_variance, self.autocast = table, learned_variance, autocast

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x (b c h w) = x0 + sigma * noise, sigma (b,) > 0 -> estimate of x0 (b c h w)."""
        return self.moments(x, sigma, cond)[0]

    def moments(self, x: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """-> (estimate of x0, v of the learned variance or None), each (b c h w)."""
        c = self.parametrization(sigma.double(), self.sigma_data)
        f, v = self._network(x, sigma, c, cond)
        return self._denoised(x, f, c), v

    def bind(self, cond: Cond) -> Denoise:
        """The denoiser of these conditions, as samplers and guidance take it."""
        return (BoundWithVariance if self.learned_variance else Bound)(self, cond)

    def loss(
        self,
        x0: Tensor,
        noise: Tensor,
        sigma: Tensor,
        cond: Cond,
        weighting: Weighting,
        loss_scales: int = 1,
    ) -> Tensor:
        """lambda(sigma) * mean |D(x0 + sigma * noise; sigma) - x0|^2 of each image -> (b,).

        Computed as lambda c_out^2 |F - target|^2, so that nothing cancels at small sigma.
        `loss_scales` other than 1 takes the multi-scale mean. A learned variance adds its bound, in
        bits per dimension, which moves v alone.
        """
        sigma = sigma.double()
        c = self.parametrization(sigma, self.sigma_data)
        error, bound = self._errors(x0, noise, sigma, c, cond)
        weight = weighting(sigma, self.sigma_data) * c.c_out.square()
        loss = weight.to(error.dtype) * mean_square(error, loss_scales)
        return loss if bound is None else loss + bound

    @torch.no_grad()
    def losses(
        self,
        x0: Tensor,
        noise: Tensor,
        sigma: Tensor,
        cond: Cond,
        weighting: Weighting,
        loss_scales: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """-> (what `loss` gives, mean |D - x0|^2), each (b,) float64, of one call of the network.

        Squares are summed in float64, and the second is c_out^2 |F - target|^2: see `loss`.
        """
        sigma = sigma.double()
        c = self.parametrization(sigma, self.sigma_data)
        error, bound = self._errors(x0, noise, sigma, c, cond)
        scale = c.c_out.square()
        weight = weighting(sigma, self.sigma_data) * scale
        loss = weight * mean_square(error.double(), loss_scales)
        if bound is not None:
            loss = loss + bound.double()
        return loss, scale * mean_square(error.double())

    def _errors(
        self, x0: Tensor, noise: Tensor, sigma: Tensor, c: Scales, cond: Cond
    ) -> tuple[Tensor, Tensor | None]:
        """-> (F - target (b c h w), bound (b,) of a learned variance or None)."""
        x = x0 + per_image(sigma, x0) * noise
        of_x0 = per_image((1 - c.c_skip) / c.c_out, x0)
        of_noise = per_image(c.c_skip * sigma / c.c_out, x0)
        f, v = self._network(x, sigma, c, cond)
        error = f - (of_x0 * x0 - of_noise * noise)
        if v is None or self.table is None:
            return error, None
        return error, vlb(x0, sigma, self._denoised(x, f.detach(), c), v, self.table)

    def _denoised(self, x: Tensor, f: Tensor, c: Scales) -> Tensor:
        return per_image(c.c_skip, x) * x + per_image(c.c_out, x) * f

    def _network(
        self, x: Tensor, sigma: Tensor, c: Scales, cond: Cond
    ) -> tuple[Tensor, Tensor | None]:
        """F(c_in x, c_noise), and v where the variance is learned, in x's dtype."""
        c_noise = self.label(sigma.double(), self.sigma_data, self.table).to(x.dtype)
        with self._precision(x.device.type):
            out = self.backbone(per_image(c.c_in, x) * x, c_noise, cond)
        out = out.to(x.dtype)
        if not self.learned_variance:
            return out, None
        f, v = out.chunk(2, dim=1)
        return f, v

    def _precision(self, device: str) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device, dtype=self.autocast)


@dataclass(frozen=True)
class Bound:
    """A denoiser with its conditions: a Denoise."""

    denoiser: Denoiser
    cond: Cond

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.denoiser(x, sigma, self.cond)


class BoundWithVariance(Bound):
    """One whose network learns a variance: a DenoiseWithVariance."""

    def moments(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x (b c h w), sigma (b,) -> D(x; sigma) and the network's v, both (b c h w)."""
        denoised, v = self.denoiser.moments(x, sigma, self.cond)
        assert v is not None, "bound by Denoiser.bind"
        return denoised, v
