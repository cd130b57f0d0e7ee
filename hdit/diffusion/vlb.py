"""Learned variance and the variational bound (iDDPM, Nichol & Dhariwal, 2021), in sigma space.

For a noise level sigma and the one before it, `previous` < sigma, the posterior of x at `previous`
given x0 and x is normal with mean (1 - r) x0 + r x, r = previous^2/sigma^2. Its variance is the
lower of `posterior_variances`; a model learns one between the two. The divergence of two normals
does not change where both are scaled, so all this equals what it is for the VP's own x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hdit.diffusion.beta_schedules import BetaSchedule
from hdit.diffusion.broadcast import per_image
from hdit.protocols import Denoise, DenoiseWithVariance

Variance = Literal["lower", "upper", "learned"]
Number = TypeVar("Number", float, Tensor)

FLOOR = math.log(1e-12)  # of the log-probability of a pixel


def posterior_variances(sigma: Number, previous: Number) -> tuple[Number, Number]:
    """The posterior's variance, and beta's, for steps from sigma to previous: lower and upper.

    Both bound the variance of the reverse process (Ho et al., 2020, section 3.2).
    """
    gap = sigma**2 - previous**2
    return previous**2 * gap / sigma**2, gap * (1 + previous**2) / (1 + sigma**2)


def learned_log_variance(v: Tensor, log_low: float | Tensor, log_high: float | Tensor) -> Tensor:
    """The network's v, -1 to 1 from the lower to the upper (Nichol & Dhariwal, equation 15)."""
    fraction = (v + 1) / 2
    return fraction * log_high + (1 - fraction) * log_low


def moments_with(
    denoise: Denoise, variance: Variance
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, sigma) -> (denoised, v), where v is -1 or 1 for a variance that is not learned.

    Raises ValueError where `variance` is 'learned' and the denoiser has none.
    """
    if variance != "learned":
        v = -1.0 if variance == "lower" else 1.0
        return lambda x, sigma: (denoise(x, sigma), x.new_full((), v))
    if not isinstance(denoise, DenoiseWithVariance):
        raise ValueError(
            "variance 'learned' needs a denoiser that predicts it; take 'lower' or 'upper'"
        )
    return denoise.moments


def bounds_in_table(sigma: Tensor, table: BetaSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """(previous, log lower, log upper) for noise levels of the table: each (b,) float64.

    `previous` is one timestep lower, and 0 below timestep 1. There the posterior's variance
    vanishes, and that of timestep 1 takes its place, as iDDPM does.
    """
    t = table.t(sigma)
    whole = t.round()
    t = torch.where((t - whole).abs() < 1e-3, whole, t)  # sigma may have been rounded to float32
    previous = torch.where(t >= 1, table.sigma(t - 1), 0.0)
    low, high = posterior_variances(sigma.double(), previous)
    first = table.sigmas(sigma.device)[:2]
    clip = posterior_variances(first[1], first[0])[0] / (1 + first[0] ** 2)
    return previous, torch.where(previous > 0, low, clip).log(), high.log()


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Divergence of N(mean1, e^log_var1) from N(mean2, e^log_var2), elementwise, in nats."""
    ratio = log_var1 - log_var2
    return (ratio.exp() - 1 - ratio + (mean1 - mean2).square() * (-log_var2).exp()) / 2


def discretized_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln of the probability that N(mean, e^(2 log_std)) gives the 8-bit value x0 in -1..1.

    Elementwise, at least ln(1e-12). Bins reach 1/255 to each side, the first and the last to
    infinity (Ho et al., 2020, equation 13). The CDF is the tanh approximation of iDDPM, here as
    a sigmoid, whose logarithm is exact in the tails.
    """

    def cdf_logit(x: Tensor) -> Tensor:
        z = (x - mean) * (-log_std).exp()
        return math.sqrt(8 / math.pi) * (z + 0.044715 * z**3)

    below, above = cdf_logit(x0 - 1 / 255), cdf_logit(x0 + 1 / 255)
    first, last = F.logsigmoid(above), F.logsigmoid(-below)
    between = first + last + torch.log(-torch.expm1((below - above).clamp(max=-1e-30)))
    log_p = torch.where(x0 < -0.999, first, torch.where(x0 > 0.999, last, between))
    return log_p.clamp(min=FLOOR)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def vlb(x0: Tensor, sigma: Tensor, denoised: Tensor, v: Tensor, table: BetaSchedule) -> Tensor:
    """The bound's term of each image, in bits per dimension -> (b,).

    x0 and denoised, which is D(x0 + sigma noise; sigma): (b c h w); sigma (b,) of the table; v as
    the network gives it (b c h w), or () -1 for the lower variance and 1 for the upper. The term is
    the divergence of the model's step from the posterior; at timestep 0, the negative
    log-likelihood of the 8-bit x0. There both fixed variances are the posterior's of timestep 1,
    which iDDPM found the better for pixels; a learned one still reaches up to beta's. For training,
    detach `denoised`: the mean learns from the other loss (Nichol & Dhariwal, section 3.4).
    """
    previous, log_low, log_high = bounds_in_table(sigma, table)
    if v.ndim == 0:
        log_high = torch.where(previous > 0, log_high, log_low)
    share = per_image(1 - (previous / sigma) ** 2, x0)  # of x0 in the mean; that of x is the same
    log_variance = learned_log_variance(v, per_image(log_low, x0), per_image(log_high, x0))
    kl = normal_kl(share * x0, per_image(log_low, x0), share * denoised, log_variance)
    decoder = -discretized_log_likelihood(x0, denoised, log_variance / 2)
    return torch.where(previous > 0, _mean(kl), _mean(decoder)) / math.log(2)


class Bits(NamedTuple):
    """Bits per dimension of b images under T timesteps."""

    total: Tensor  # (b,)
    prior: Tensor  # (b,), of the noise at the highest timestep
    terms: Tensor  # (T, b), timestep 0 is the decoder


@torch.no_grad()
def vlb_bits_per_dim(
    denoise: Denoise,
    x0: Tensor,
    table: BetaSchedule,
    noise: Callable[[int], Tensor],
    variance: Variance = "learned",
) -> Bits:
    """The variational bound of x0 (b c h w), in T evaluations (Nichol & Dhariwal, equation 4).

    `noise(t)` gives the standard normal noise of timestep t. Raises ValueError where `variance` is
    'learned' and the denoiser has none.
    """
    moments = moments_with(denoise, variance)
    terms = []
    for t, level in enumerate(table.sigmas().tolist()):
        sigma = x0.new_full((len(x0),), level, dtype=torch.float64)
        x = x0 + level * noise(t)
        denoised, v = moments(x, sigma.to(x.dtype))
        terms.append(vlb(x0, sigma, denoised, v, table))
    zero = x0.new_zeros(())
    # In the VP's coordinates, where x at the last timestep should be N(0, 1).
    shape, log_variance = 1 / math.hypot(1, level), math.log(level**2 / (1 + level**2))
    prior = _mean(normal_kl(shape * x0, zero + log_variance, zero, zero)) / math.log(2)
    return Bits(prior + torch.stack(terms).sum(0), prior, torch.stack(terms))
