import math

import pytest
import torch
from known_answers import load

from hdit.diffusion.weighting import (
    EDMWeight,
    EpsWeight,
    FlowWeight,
    MinSNR,
    Sigmoid,
    SoftMinSNR,
    VWeight,
    X0Weight,
    frequency_weight,
    mean_square,
)


@pytest.mark.parametrize(
    ("weighting", "formula"),
    [
        (EpsWeight(), lambda s, sd: 1 / s**2),
        (EDMWeight(), lambda s, sd: (s**2 + sd**2) / (s * sd) ** 2),
        (VWeight(), lambda s, sd: (1 + s**2) / s**2),
        (X0Weight(), lambda s, sd: 1.0),
        (MinSNR(), lambda s, sd: min(1 / s**2, 5)),
        (MinSNR(gamma=4), lambda s, sd: min(1 / s**2, 4)),
        (SoftMinSNR(), lambda s, sd: 1 / (s**2 + sd**2)),
        (SoftMinSNR(gamma=2), lambda s, sd: (1 / s**2) * 2 / (1 / s**2 + 2)),
        (Sigmoid(bias=2), lambda s, sd: (1 / s**2) / (1 + (1 / s**2) / math.e**2)),
        (FlowWeight(), lambda s, sd: ((1 + s) / s) ** 2),
    ],
)
def test_weighting_is_the_formula_of_its_paper(weighting, formula):
    for s in (0.01, 0.4, 3.0, 90.0):
        actual = weighting(torch.tensor([s], dtype=torch.float64), 0.6).item()
        assert actual == pytest.approx(formula(s, 0.6), rel=1e-12)


def test_sigmoid_weighting_is_soft_min_snr_of_gamma_e_to_the_bias():
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    expected = SoftMinSNR(gamma=math.exp(-1.5))(sigma, 0.5)
    torch.testing.assert_close(Sigmoid(bias=-1.5)(sigma, 0.5), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [0, 1, 2, 4])
def test_frequency_weight_matches_the_reference(scales, dtype):
    expected = torch.tensor(load("denoiser_loss.json")["freq_weight"][f"n8_scales{scales}"])
    actual = frequency_weight(8, scales, torch.zeros((), dtype=dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=1e-6, atol=0)  # float32 numbers


@pytest.mark.parametrize("scales", [0, 1, 2, 3])
@pytest.mark.parametrize("frequency", [(0, 0), (0, 3), (2, 0), (1, 1), (3, 5), (1, 5)])
def test_multi_scale_loss_of_one_frequency_is_its_octaves_times_its_mean_square(frequency, scales):
    """Frequency k of n lies log2(n / (k + 1)) octaves below the highest, and one more weighs 1."""
    (i, j), (h, w) = frequency, (4, 6)
    y, x = torch.arange(h, dtype=torch.float64) + 0.5, torch.arange(w, dtype=torch.float64) + 0.5
    wave = torch.cos(torch.pi / h * i * y)[:, None] * torch.cos(torch.pi / w * j * x)
    error = torch.stack([wave, -3 * wave])[:, None]  # (b c h w)
    octaves = min(math.log2(h / (i + 1)), math.log2(w / (j + 1))) + 1
    weight = min(octaves, scales) if scales else octaves
    expected = weight * error.square().mean((1, 2, 3))
    torch.testing.assert_close(mean_square(error, scales), expected, rtol=1e-12, atol=0)
