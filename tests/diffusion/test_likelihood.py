import math

import pytest
import torch
from known_answers import hfill, load

from hdit.diffusion.likelihood import bits_per_dim, dequantize, dopri5, log_likelihood
from hdit.errors import SolverError

RANGES = {"smin0.01_smax160": (0.01, 160.0), "smin0.002_smax80": (0.002, 80.0)}


def gaussian(mean: float = 0.0, sd: float = 0.5):
    """The exact denoiser of data that is N(mean, sd^2) in every element."""
    return lambda x, s: mean + (x - mean) * (sd**2 / (sd**2 + s**2))[:, None, None, None]


def normal_log_density(x, mean, variance):
    x = (x - mean).flatten(1)
    return -(x.square() / variance + math.log(2 * math.pi * variance)).sum(1) / 2


def rademacher(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


@pytest.mark.parametrize("case", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_likelihood_matches_the_reference(case, dtype):
    name = f"{str(dtype).removeprefix('torch.')}_{case}"
    record = load("samplers.json")["cases"][name]["log_likelihood"]
    x = hfill((2, 3, 4, 4), 5001, 0.9).to(dtype)
    probe = rademacher(x.shape)
    nats, evaluations = log_likelihood(gaussian(), x, *RANGES[case], probe, rtol=1e-6, atol=1e-6)
    # Theirs has the error of its tolerance, up to 2e-4 from the closed form in the same record.
    expected = torch.tensor(record["ll_nats"], dtype=torch.float64)
    torch.testing.assert_close(nats.double(), expected, atol=1e-3, rtol=0)
    assert 50 < evaluations < 400


def test_log_likelihood_is_the_closed_form_of_gaussian_data():
    """At sigma_max the density is taken as N(0, sigma_max^2): with 1e6 that costs below 1e-4."""
    x, low, high = hfill((3, 2, 4, 4), 1, 0.8).double(), 0.01, 1e6
    for mean, sd in ((0.0, 0.5), (0.3, 0.2)):
        probe = rademacher(x.shape)
        nats, _ = log_likelihood(gaussian(mean, sd), x, low, high, probe, rtol=1e-9, atol=1e-9)
        expected = normal_log_density(x, mean, sd**2 + low**2)
        torch.testing.assert_close(nats, expected, atol=1e-4, rtol=0)


def test_log_likelihood_is_unbiased_over_probes_where_pixels_depend_on_each_other():
    """Two pixels of correlation 0.8: the mean over all four probes is the exact divergence."""
    covariance = torch.tensor([[0.25, 0.2], [0.2, 0.25]], dtype=torch.float64)

    def denoise(x, sigma):
        gain = covariance @ torch.linalg.inv(covariance + sigma[0] ** 2 * torch.eye(2).double())
        return (x.flatten(1) @ gain.T).view_as(x)

    x, low, high = torch.tensor([[0.3, -0.4]]).double().view(1, 1, 1, 2), 0.02, 1e4
    values = [
        log_likelihood(denoise, x, low, high, torch.tensor([a, b]).view(1, 1, 1, 2).double(),
                       rtol=1e-8, atol=1e-8).nats
        for a in (-1, 1) for b in (-1, 1)
    ]  # fmt: skip
    assert max(values) - min(values) > 0.1
    data = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), covariance + low**2 * torch.eye(2).double()
    )
    expected = data.log_prob(x.flatten())
    torch.testing.assert_close(torch.stack(values).mean(), expected, atol=1e-4, rtol=0)


def test_log_likelihood_works_where_gradients_are_off():
    x = hfill((1, 1, 4, 4), 1).double()
    with torch.no_grad():
        nats, _ = log_likelihood(gaussian(), x, 0.01, 80, torch.ones_like(x))
    assert nats.isfinite().all()


def test_bits_of_uniform_pixels_are_eight():
    """The density of x uniform over the 256 bins is (127.5/256) in each dimension."""
    size = 48
    nats = torch.full((2,), size * math.log(127.5 / 256), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(nats, size), torch.full((2,), 8.0).double())


def test_bits_of_a_gaussian_are_its_closed_form_on_dequantized_pixels():
    """Pixels of N(0, sd^2): the entropy, ln(sd sqrt(2 pi e)), beside the mean over many pixels."""
    generator = torch.Generator().manual_seed(3)
    sd, shape = 0.2, (16, 1, 32, 32)
    pixels = (torch.randn(shape, generator=generator) * sd * 127.5 + 127.5).round().clamp(0, 255)
    x = dequantize(pixels.to(torch.uint8), torch.rand(shape, generator=generator).double())
    nats, _ = log_likelihood(gaussian(0.0, sd), x, 1e-4, 160, torch.ones_like(x))
    entropy = math.log2(sd * math.sqrt(2 * math.pi * math.e)) + math.log2(127.5)
    # 16,384 pixels, each -ln p with a standard deviation of 1/sqrt(2): 0.008 bits of their mean
    assert bits_per_dim(nats, 1024).mean().item() == pytest.approx(entropy, abs=0.03)


def test_dequantized_values_lie_around_their_own_place():
    values = torch.arange(256, dtype=torch.uint8)
    middle = dequantize(values, torch.full((256,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(middle, values.double() / 127.5 - 1)
    start, end = (dequantize(values, torch.full((256,), u).double()) for u in (0.0, 1.0))
    torch.testing.assert_close(end[:-1], start[1:])


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
def test_dopri5_solves_to_its_tolerance(tolerance):
    """dy/dt = -2ty from y(-1): y = y0 e^(1 - t^2)."""
    y = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    calls = []

    def slope(t, y):
        calls.append(t)
        return -2 * t * y

    end = dopri5(slope, y, -1.0, 2.0, tolerance, tolerance)
    torch.testing.assert_close(end, y * math.exp(1 - 4), atol=10 * tolerance, rtol=0)
    assert len(calls) < 20 * tolerance**-0.2


def test_dopri5_converges_at_order_five():
    """Steps of one length: with a tolerance that takes each, the first guess is kept at 1/20."""
    y = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for tolerance in (1e-6, 1e-11):
        calls = []

        def slope(t, y, calls=calls):
            calls.append(t)
            return y.cos()

        end = dopri5(slope, 0 * y, 0.0, 3.0, tolerance, tolerance)
        exact = 2 * math.atan(math.tanh(1.5))  # the Gudermannian function
        errors.append((abs(end.item() - exact), len(calls)))
    (coarse, few), (fine, many) = errors
    assert math.log(coarse / fine) / math.log(many / few) > 4.5


def test_dopri5_names_where_it_came_to_a_stop():
    y = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(SolverError, match=r"came to a stop at 0\.[45]\d* of 0 to 1: .*not finite"):
        dopri5(lambda t, y: y * math.nan if t > 0.5 else y, y, 0.0, 1.0, 1e-6, 1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_dopri5_ends_where_it_should_whatever_the_last_digit(seed):
    """t + (end - t) may fall short of the end by a rounding."""
    start, length = torch.rand(2, generator=torch.Generator().manual_seed(seed)).double().tolist()
    y = torch.zeros(1, 1, dtype=torch.float64)
    end = dopri5(lambda t, y: torch.ones_like(y), y, start, start + 9 * length, 1e-3, 1e-3)
    assert end.item() == pytest.approx(9 * length, rel=1e-12)


@pytest.mark.parametrize("ends", [(160, 0.01), (0.01, 0.01), (0, 160)])
def test_log_likelihood_between_levels_that_do_not_ascend_is_refused(ends):
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="sigma_min must be above 0 and below sigma_max"):
        log_likelihood(gaussian(), x, *ends, torch.ones_like(x))


def test_log_likelihood_under_inference_mode_says_what_it_needs():
    x = torch.zeros(1, 1, 2, 2)
    with torch.inference_mode(), pytest.raises(ValueError, match="call it outside"):
        log_likelihood(gaussian(), x, 0.01, 80, torch.ones_like(x))
