"""Loss weights lambda(sigma) on |D(x; sigma) - x0|^2; sd is sigma_data.

Any weight works with any parametrization: on the network's own error it is lambda * c_out^2.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from hdit.diffusion.context import Context, DependentSpec

Gamma = Annotated[float, Field(ge=1e-12, le=1e12)]


class WeightSpec(DependentSpec):
    """Base of the weights."""

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        """sigma (b,) -> the weight of each image (b,)."""
        raise NotImplementedError


class EpsWeight(WeightSpec):
    """1/s^2: the error of the predicted noise, L_simple of Ho et al., 2020. k-diffusion: "snr"."""

    kind: Literal["eps"] = "eps"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return sigma**-2


class EDMWeight(WeightSpec):
    """1/s^2 + 1/sd^2: unit weight on EDM's F (Karras et al., 2022). k-diffusion: "karras"."""

    kind: Literal["edm"] = "edm"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return sigma**-2 + sigma_data**-2


class VWeight(WeightSpec):
    """1/s^2 + 1: the error of the predicted v (Salimans & Ho, 2022)."""

    kind: Literal["v"] = "v"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return sigma**-2 + 1


class X0Weight(WeightSpec):
    """1: the error of the predicted x0."""

    kind: Literal["x0"] = "x0"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return torch.ones_like(sigma)


class MinSNR(WeightSpec):
    """min(1/s^2, gamma) (Hang et al., 2023)."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: Gamma = Field(5.0, description="largest weight")

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return (sigma**-2).clamp(max=self.gamma)


class SoftMinSNR(WeightSpec):
    """1/(s^2 + 1/gamma), gamma 1/sd^2 if absent (Crowson et al., 2024).

    k-diffusion: "soft-min-snr".
    """

    kind: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: Gamma | None = Field(None, description="SNR at which the weight saturates")

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return 1 / (sigma.square() + 1 / self._gamma(sigma_data))

    def resolved(self, context: Context) -> Self:
        """Fills in gamma of 1/sigma_data^2 where it is absent."""
        return self.filled(gamma=self._gamma(context.shape.sigma_data))

    def _gamma(self, sigma_data: float) -> float:
        return sigma_data**-2 if self.gamma is None else self.gamma


class Sigmoid(WeightSpec):
    """SNR * sigmoid(bias - ln SNR) (Hoogeboom et al., 2024): soft_min_snr with gamma = e^bias."""

    kind: Literal["sigmoid"] = "sigmoid"
    bias: float = Field(ge=-50, le=50, description="ln of the gamma that it is like")

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return 1 / (sigma.square() + math.exp(-self.bias))


class FlowWeight(WeightSpec):
    """((1 + s)/s)^2: the error of rectified flow's velocity (Liu et al., 2023)."""

    kind: Literal["flow"] = "flow"

    def __call__(self, sigma: Tensor, sigma_data: float) -> Tensor:
        return (1 + 1 / sigma).square()


def mean_square(error: Tensor, scales: int = 1) -> Tensor:
    """Mean square of each image's error (b c h w) -> (b,); by frequency if `scales` is not 1.

    The multi-scale loss takes the squares in the frequencies of the orthonormal 2-D DCT-II, and
    weights low ones more: the highest by 1, one an octave lower by 2, and so on up to `scales`
    octaves, without end if it is 0. k-diffusion: "loss_scales" (after Hoogeboom et al., 2023).
    """
    if scales == 1:
        return error.square().mean(dim=(1, 2, 3))
    h, w = error.shape[2:]
    spectrum = _dct(h, error) @ error @ _dct(w, error).T  # (b c h w)
    weight = torch.minimum(
        frequency_weight(h, scales, error)[:, None], frequency_weight(w, scales, error)
    )
    return (spectrum.square() * weight).mean(dim=(1, 2, 3))


def frequency_weight(n: int, scales: int, like: Tensor) -> Tensor:
    """(n,) how many octaves each DCT frequency lies below twice the highest, up to `scales`."""
    frequency = torch.linspace(0.5 / n, 0.5, n, dtype=torch.float64, device=like.device)
    weight = -frequency.log2()
    return (weight.clamp(max=scales) if scales else weight).to(like.dtype)


def _dct(n: int, like: Tensor) -> Tensor:
    """(n n) the orthonormal DCT-II: its product with a column is the column's spectrum."""
    i = torch.arange(n, dtype=torch.float64, device=like.device)
    matrix = torch.cos(torch.pi / n * i[:, None] * (i + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like.dtype)


Weighting = Annotated[
    EpsWeight | EDMWeight | VWeight | X0Weight | MinSNR | SoftMinSNR | Sigmoid | FlowWeight,
    Field(discriminator="kind"),
]
