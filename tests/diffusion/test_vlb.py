"""Learned variance and the variational bound: iDDPM's numbers, its formulas, and closed forms.

iDDPM's x is x_vp = x / sqrt(1 + sigma^2): its means are ours divided by sqrt(1 + previous^2), and
its log-variances ours less ln(1 + previous^2).
"""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from known_answers import check_record, hfill, load

from hdit.diffusion.beta_schedules import CosineSchedule, LinearSchedule, respaced, strided
from hdit.diffusion.denoiser import Denoiser
from hdit.diffusion.parametrization import X0, EpsVP
from hdit.diffusion.samplers import ddim, ddpm, euler
from hdit.diffusion.sigmas import LinearT
from hdit.diffusion.vlb import (
    FLOOR,
    bounds_in_table,
    discretized_log_likelihood,
    learned_log_variance,
    posterior_variances,
    vlb,
    vlb_bits_per_dim,
)
from hdit.diffusion.weighting import EpsWeight, X0Weight
from hdit.protocols import Cond

TABLE = LinearSchedule()
SHAPE = (5, 4, 4, 4)
T = [0, 1, 10, 500, 999]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])

# The reference gathers its tables as float32, in float64 runs too: each coefficient is off by up to
# 6e-8 of itself, and the differences of two of them by more.
RTOL = {torch.float32: 1e-5, torch.float64: 2e-6}
ATOL_X0 = {torch.float32: 5e-5, torch.float64: 5e-6}  # x0 = 157.41 x_vp - 157.41 eps at the highest


def per_image(values):
    return values[:, None, None, None]


def eps_and_v(x, c_noise, cond):
    """The vectors' network; it gets the original timestep."""
    t = per_image(c_noise) / 1000
    return torch.cat([0.6 * x + 0.1 * t, torch.sin(2 * x) + 0.5 * t - 0.25], dim=1)


def eps_alone(x, c_noise, cond):
    return 0.6 * x + 0.1 * per_image(c_noise) / 1000


def denoiser(parametrization=None, network=eps_and_v):
    """sigma_data 1 gives X0 the VP input too."""
    learned = network is eps_and_v
    return Denoiser(network, parametrization or EpsVP(), "timestep", 1.0, TABLE, learned)


class Reference:
    """The inputs of the vectors in our coordinates, and the records."""

    def __init__(self, dtype):
        self.record = load("gaussian_diffusion.json")[str(dtype).removeprefix("torch.")]
        self.x0, self.noise = hfill(SHAPE, 9000, 1.2).to(dtype), hfill(SHAPE, 9001, 1.7).to(dtype)
        self.sigma = TABLE.sigmas()[T]
        self.x = self.x0 + per_image(self.sigma).to(dtype) * self.noise
        self.dtype = dtype

    def check(self, name, x, sigma, atol):
        """That x, at the noise levels sigma, is what the vectors have in VP coordinates."""
        record = self.record[name] if isinstance(name, str) else name
        check_record(x / per_image(1 + sigma**2).sqrt(), record, atol)

    def close(self, actual, expected, atol=1e-10):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(actual.double(), expected, rtol=RTOL[self.dtype], atol=atol)


# ---- against iDDPM: tables -----------------------------------------------------------------------


def test_tables_of_the_schedule_match_the_reference():
    expected = load("gaussian_diffusion.json")["schedule_T1000"]
    t = torch.tensor([int(i) for i in expected["betas"]])
    sigma = TABLE.sigmas()[t]
    previous, log_low, log_high = bounds_in_table(sigma, TABLE)
    low, _ = posterior_variances(sigma, previous)
    vp, vp_previous = (1 + sigma**2).sqrt(), (1 + previous**2).sqrt()

    def mean(denoised, x):
        """Of the step from (sigma, x) to previous."""
        steps = [torch.stack(pair) for pair in zip(sigma, previous, strict=True)]
        x, no_noise = torch.full((1, 1, 1, 1), x, dtype=torch.float64), lambda *_: 0
        return torch.cat(
            [ddpm(lambda x, _: 0 * x + denoised, x, s, noise=no_noise).flatten() for s in steps]
        )

    actual = {
        "betas": log_high.exp() / vp_previous**2,
        "alphas_cumprod": vp**-2,
        "alphas_cumprod_prev": vp_previous**-2,
        "posterior_variance": low / vp_previous**2,
        "posterior_log_variance_clipped": log_low - 2 * vp_previous.log(),
        "posterior_mean_coef1": mean(1, 0) / vp_previous,
        "posterior_mean_coef2": mean(0, 1) * vp / vp_previous,
        "sqrt_recip_alphas_cumprod": vp,
        "sqrt_recipm1_alphas_cumprod": sigma,
    }
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        wanted = torch.tensor(list(expected[name].values()), dtype=torch.float64)
        # 1 - abar at timestep 0 has lost 4 of 16 digits in the reference.
        torch.testing.assert_close(values, wanted, rtol=1e-11, atol=1e-15, msg=name)


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("250", respaced(1000, [250])),
        ("50", respaced(1000, [50])),
        ("10", respaced(1000, [10])),
        ("ddim50", strided(1000, 50)),
        ("ddim25", strided(1000, 25)),
        ("10,15,20", respaced(300, [10, 15, 20])),
    ],
)
def test_respaced_timesteps_and_variances_match_the_reference(name, timesteps):
    expected = load("gaussian_diffusion.json")[f"respace_{name}"]
    assert len(timesteps) == expected["n"]
    assert timesteps[:12] == expected["first12"]
    assert timesteps[-12:] == expected["last12"]
    assert sum(timesteps) == expected["sum"]
    if "betas_first4" not in expected:
        return
    sigma = TABLE.sigmas()[timesteps]
    previous = torch.cat([torch.zeros(1, dtype=torch.float64), sigma[:-1]])
    low, high = (v / (1 + previous**2) for v in posterior_variances(sigma, previous))
    low[0] = low[1]  # iDDPM's clip
    for key, values in (
        ("betas_first4", high[:4]),
        ("betas_last4", high[-4:]),
        ("plv_clipped_first4", low[:4].log()),
    ):
        wanted = torch.tensor(expected[key], dtype=torch.float64)
        torch.testing.assert_close(values, wanted, rtol=1e-11, atol=0)


# ---- against iDDPM: one timestep -----------------------------------------------------------------


@DTYPES
def test_noised_image_matches_the_reference(dtype):
    r = Reference(dtype)
    r.check("x_t", r.x, r.sigma, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("name", ["default_mse", "rescaled_mse", "rescaled_kl", "pred_x0"])
def test_moments_match_the_reference(name, dtype):
    r = Reference(dtype)
    model = denoiser(X0() if name == "pred_x0" else EpsVP())
    denoised, v = model.moments(r.x, r.sigma.to(dtype), Cond())
    record = r.record[f"pmv_{name}"]
    check_record(denoised, record["pred_xstart"], atol=ATOL_X0[dtype])
    previous, *bounds = bounds_in_table(r.sigma, TABLE)
    log_variance = learned_log_variance(v, *(per_image(b).to(dtype) for b in bounds))
    shift = per_image((1 + previous**2).log())
    check_record(log_variance - shift, record["log_variance"], atol=5e-6)
    means = [
        ddpm(lambda *_, d=d: d[None], x[None], torch.stack(pair), noise=lambda *_: 0)
        for d, x, *pair in zip(denoised, r.x, r.sigma, previous, strict=True)
    ]
    r.check(record["mean"], torch.cat(means), previous, atol=1e-6)


@DTYPES
@pytest.mark.parametrize(("name", "which"), [("fixed_small", 0), ("fixed_large", 1)])
def test_fixed_variances_match_the_reference(name, which, dtype):
    """At timestep 0 fixed_large takes the variance of timestep 1, and `vlb` does so too; here the
    bounds are those of a learned variance, which goes up to beta."""
    r = Reference(dtype)
    previous, *bounds = bounds_in_table(r.sigma, TABLE)
    actual = bounds[which] - (1 + previous**2).log()
    if name == "fixed_large":
        actual[0] = bounds[0][0]
    record = r.record[f"pmv_{name}"]
    check_record(per_image(actual).expand(SHAPE), record["log_variance"], atol=1e-6)
    denoised, v = denoiser(network=eps_alone).moments(r.x, r.sigma.to(dtype), Cond())
    check_record(denoised, record["pred_xstart"], atol=ATOL_X0[dtype])
    assert v is None


@DTYPES
@pytest.mark.parametrize(
    ("name", "model", "weighting"),
    [
        ("default_mse", denoiser(), EpsWeight()),
        ("rescaled_mse", denoiser(), EpsWeight()),
        ("pred_x0", denoiser(X0()), X0Weight()),
        ("fixed_large", denoiser(network=eps_alone), EpsWeight()),
        ("fixed_small", denoiser(network=eps_alone), EpsWeight()),
    ],
)
def test_loss_matches_the_reference(name, model, weighting, dtype):
    r = Reference(dtype)
    record = r.record[f"loss_{name}"]
    loss = model.loss(r.x0, r.noise, r.sigma, Cond(), weighting)
    r.close(loss, record["loss"])
    error = ((model(r.x, r.sigma.to(dtype), Cond()) - r.x0) ** 2).mean((1, 2, 3))
    r.close(error * weighting(r.sigma, 1.0), record["mse"])


@DTYPES
@pytest.mark.parametrize("name", ["default_mse", "pred_x0"])
def test_vlb_matches_the_reference(name, dtype):
    """rescaled_kl is T times it."""
    r = Reference(dtype)
    model = denoiser(X0() if name == "pred_x0" else EpsVP())
    denoised, v = model.moments(r.x, r.sigma.to(dtype), Cond())
    actual = vlb(r.x0, r.sigma, denoised, v, TABLE)
    # The error of x0 counts 1e-4 at timestep 999, where 5e-7 bits are left of numbers near 1.
    r.close(actual, r.record[f"loss_{name}"]["vb"])
    if name == "default_mse":
        r.close(1000 * actual, r.record["loss_rescaled_kl"]["loss"])
        r.close(actual, r.record["vb_terms_bpd_unfrozen"])


@DTYPES
def test_bits_per_dim_match_the_reference(dtype):
    r = Reference(dtype)
    bits = vlb_bits_per_dim(denoiser().bind(Cond()), r.x0, TABLE, lambda t: r.noise)
    assert bits.terms.shape == (1000, 5)
    r.close(bits.terms[T].diagonal(), r.record["vb_terms_bpd_unfrozen"])
    r.close(bits.prior, r.record["prior_bpd"], atol=1e-8)  # 1e-5 bits are left of numbers near 1
    torch.testing.assert_close(bits.total, bits.prior + bits.terms.sum(0), rtol=1e-5, atol=0)


@DTYPES
@pytest.mark.parametrize(
    ("name", "sampler", "options"),
    [
        ("p_sample", ddpm, {"variance": "learned"}),
        ("ddim_sample_eta0", ddim, {"eta": 0.0}),
        ("ddim_sample_eta1", ddim, {"eta": 1.0}),
    ],
)
def test_step_matches_the_reference(name, sampler, options, dtype):
    r, out, noise = Reference(dtype), [], hfill(SHAPE, 9002, 1.7).to(dtype)
    previous = bounds_in_table(r.sigma, TABLE)[0]
    denoise = denoiser().bind(Cond())
    for x, n, *pair in zip(r.x, noise, r.sigma, previous, strict=True):
        out.append(sampler(denoise, x[None], torch.stack(pair), noise=lambda *_, n=n: n, **options))
    record = r.record[name]
    # DDIM's sigma has 1 - abar/abar_prev, which is 2e-4 at timestep 10, of float32 numbers.
    r.check(record.get("sample", record), torch.cat(out), previous, atol=5e-6)


@DTYPES
def test_euler_upwards_is_the_reference_s_reverse_ddim(dtype):
    """The last timestep has no next one."""
    r, out = Reference(dtype), []
    above = TABLE.sigmas()[[t + 1 for t in T[:-1]]]
    denoise = denoiser().bind(Cond())
    for x, *pair in zip(r.x[:-1], r.sigma[:-1], above, strict=True):
        out.append(euler(denoise, x[None], torch.stack(pair)))
    r.check("ddim_reverse", torch.cat(out), above, atol=2e-6)


# ---- against iDDPM: whole runs -------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(("respacing", "n"), [("10", 10), ("250", 250), ("ddim50", 50)])
@pytest.mark.parametrize("name", ["p_sample", "ddim"])
def test_run_matches_the_reference(name, respacing, n, dtype):
    r, shape = Reference(dtype), (2, 4, 4, 4)
    sigmas = LinearT(stride=respacing.startswith("ddim"))(n, *TABLE.sigma_range(), TABLE)
    x = hfill(shape, 9003, 1.7).to(dtype) * math.hypot(1, sigmas[0].item())
    drawn = iter(range(20000, 21000))
    options = {"noise": lambda *_: hfill(shape, next(drawn), 1.7).to(dtype)}
    if name == "p_sample":
        out = ddpm(denoiser().bind(Cond()), x, sigmas, variance="learned", **options)
        assert next(drawn) == 20000 + n - 1  # none on the last step
    else:
        out = ddim(denoiser().bind(Cond()), x, sigmas, **options)
    # Values are near 10, and each of up to 250 steps adds the rounding of its float32 coefficients.
    check_record(out, r.record[f"loop_{name}_{respacing}"], atol=5e-5)


# ---- likelihood of 8-bit values ------------------------------------------------------------------


@DTYPES
def test_discretized_log_likelihood_matches_the_reference(dtype):
    """The reference loses digits of the tails, all in float32: these are its float64 numbers."""
    record = load("gaussian_diffusion.json")["float64"]["disc_gauss_ll"]
    x, means, expected = (torch.tensor(record[k], dtype=dtype) for k in ("x", "means", "ll"))
    actual = discretized_log_likelihood(x, means, torch.full_like(x, record["log_scales"]))
    # 1e-10, the least probability here, is there a difference of numbers near 1, off by 1e-16.
    atol = {torch.float32: 1e-4, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_cdf_is_the_reference_s_approximation():
    """The first bin reaches down to -infinity, so its probability is the CDF at its upper end."""
    record = load("gaussian_diffusion.json")["float64"]["approx_cdf"]
    z, expected = (torch.tensor(record[key], dtype=torch.float64) for key in ("x", "v"))
    black = torch.full_like(z, -1.0)
    actual = discretized_log_likelihood(black, black + 1 / 255 - z, torch.zeros_like(z)).exp()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.0, 0.9961, 4.0])
@pytest.mark.parametrize("std", [1e-3, 0.02, 0.5, 3.0])
def test_probabilities_of_all_bytes_sum_to_one(mean, std):
    """Bins share their ends, so that any CDF sums to 1, but for 256 floors of 1e-12."""
    log_p = discretized_log_likelihood(
        BYTES, torch.full_like(BYTES, mean), torch.full_like(BYTES, math.log(std))
    )
    assert log_p.exp().sum().item() == pytest.approx(1, abs=3e-10)
    assert log_p.min() >= math.log(1e-12)


def test_probabilities_of_bytes_are_near_those_of_the_normal_distribution():
    """The tanh approximation of the CDF is good to 5e-4 (as the GELU's)."""
    mean, std = torch.tensor(0.3, dtype=torch.float64), 0.1
    log_p = discretized_log_likelihood(BYTES, mean, mean.new_tensor(std).log())
    edges = torch.special.ndtr((BYTES[1:] - 1 / 255 - mean) / std)
    exact = torch.cat([edges.new_zeros(1), edges, edges.new_ones(1)]).diff()
    torch.testing.assert_close(log_p.exp(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_p.exp().cumsum(0)[:-1], edges, rtol=0, atol=5e-4)


def test_log_likelihood_has_a_floor():
    zero = torch.zeros(())
    assert discretized_log_likelihood(zero, zero + 9, zero - 4).item() == pytest.approx(FLOOR)
    assert pytest.approx(-12 * math.log(10)) == FLOOR


@settings(max_examples=60, deadline=None)
@given(
    x0=st.sampled_from(BYTES.tolist()),
    mean=st.floats(-1e3, 1e3) | st.floats(-1.5, 1.5),
    log_std=st.floats(-12, 8),
)
@example(x0=0.2, mean=1e3, log_std=-12.0)
@example(x0=-1.0, mean=1e3, log_std=-12.0)
@example(x0=1.0, mean=-1e3, log_std=-12.0)
@example(x0=1.0, mean=1.0, log_std=-12.0)
def test_gradients_of_the_log_likelihood_are_finite_in_float32(x0, mean, log_std):
    inputs = [torch.tensor(value, requires_grad=True) for value in (mean, log_std)]
    log_p = discretized_log_likelihood(torch.tensor(x0), *inputs)
    assert FLOOR - 1e-5 <= log_p.item() <= 0
    assert all(g.isfinite() for g in torch.autograd.grad(log_p, inputs))


@settings(max_examples=60, deadline=None)
@given(
    x0=st.sampled_from(BYTES.tolist()),
    mean=st.floats(-1.5, 1.5),
    log_std=st.floats(-7, 0),
)
def test_log_likelihood_in_float32_agrees_with_float64(x0, mean, log_std):
    """A bin is 8e-3 wide and its ends are off by 1e-7 at most, times z^2/2 in the tails."""
    args = [torch.tensor(value) for value in (x0, mean, log_std)]
    actual = discretized_log_likelihood(*args)
    expected = discretized_log_likelihood(*(a.double() for a in args))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=3e-4)


# ---- the bound against its formula in VP coordinates ---------------------------------------------


def bytes_log_likelihood(x0, mean, log_std):
    """ln P(x0), with 60 digits: the difference of two CDFs (1 + tanh(y))/2 = 1/(1 + e^(-2y))."""

    def cdf(x):
        z = (x - Decimal(mean)) * (-Decimal(log_std)).exp()
        y = (Decimal(2) / Decimal(math.pi)).sqrt() * (z + Decimal("0.044715") * z**3)
        return 1 / (1 + (-2 * y).exp())

    with localcontext() as context:
        context.prec = 60
        low = 0 if x0 < -0.999 else cdf(Decimal(x0) - 1 / Decimal(255))
        high = 1 if x0 > 0.999 else cdf(Decimal(x0) + 1 / Decimal(255))
        return float(max(high - low, Decimal("1e-12")).ln())


def vp_bound(x0, noise, eps, v, t, betas):
    """iDDPM's term of timestep t of one image, in nats per dimension: all in x_vp and abar."""
    bar = (1 - betas).cumprod(0)
    beta, bar_t, bar_before = betas[t], bar[t], bar[t - 1] if t else betas.new_ones(())
    x = bar_t.sqrt() * x0 + (1 - bar_t).sqrt() * noise
    # Ho et al., 2020: equation 7, and equation 11 in place of it for the model
    mean = (bar_before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - bar_before) * x) / (1 - bar_t)
    model_mean = (x - beta / (1 - bar_t).sqrt() * eps) / (1 - beta).sqrt()
    clipped = max(t, 1)
    variance = betas[clipped] * (1 - bar[clipped - 1]) / (1 - bar[clipped])
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log()
    if t == 0:
        triples = zip(x0.flatten(), model_mean.flatten(), (log_variance / 2).flatten(), strict=True)
        nats = [-bytes_log_likelihood(*(value.item() for value in triple)) for triple in triples]
        return sum(nats) / len(nats)
    q = torch.distributions.Normal(mean, variance.sqrt())
    p = torch.distributions.Normal(model_mean, (log_variance / 2).exp())
    return torch.distributions.kl_divergence(q, p).mean().item()


@settings(max_examples=60, deadline=None)
@given(
    table=st.sampled_from([TABLE, LinearSchedule(steps=100), CosineSchedule(steps=50)]),
    step=st.sampled_from([0, 1, 2, -1]) | st.integers(0, 999),
    seed=st.integers(0, 10**6),
    off=st.floats(0, 1.5),
)
def test_bound_is_that_of_the_vp_formula(table, step, seed, off):
    t = step % table.steps
    shape = (1, 1, 2, 2)
    noise, error, v = (hfill(shape, seed + i, 1.3).double() for i in range(3))
    x0 = BYTES[hfill(shape, seed + 3, 140, 128).long().clamp(0, 255)]
    eps = noise + off * error
    sigma = table.sigmas()[[t]]
    denoised = x0 + sigma * noise - sigma * eps
    actual = vlb(x0, sigma, denoised, v, table).item() * math.log(2)
    expected = vp_bound(x0, noise, eps, v, t, table.betas())
    # The formula's means of the two differ in their last digits only, where the steps are small.
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("t", [0, 1, 2, 700])
def test_bound_of_a_float32_noise_level_is_that_of_its_timestep(t):
    """Rounding takes t(sigma) a little off the whole number, below it at timestep 1."""
    sigma, v = TABLE.sigmas()[[t]], torch.full((1, 1, 1, 1), 0.3)
    expected = vlb(0 * v, sigma, 0.01 + 0 * v, v, TABLE)
    actual = vlb(0 * v, sigma.float(), 0.01 + 0 * v, v, TABLE)
    # sigma^2 - previous^2 is 1e-2 of either at timestep 700, and off by 1e-7 of them
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [1.05, 40.5, 700.95])
def test_bounds_between_timesteps_are_of_a_step_of_one(t):
    times = torch.tensor([t, t - 1], dtype=torch.float64)
    sigma, expected = TABLE.sigma(times)
    previous, log_low, log_high = bounds_in_table(sigma[None], TABLE)
    low, high = posterior_variances(sigma.item(), expected.item())
    assert previous.item() == pytest.approx(expected.item(), rel=1e-9)
    assert (log_low.item(), log_high.item()) == pytest.approx((math.log(low), math.log(high)))


# ---- the bound in training -----------------------------------------------------------------------


@pytest.mark.parametrize("t", [[0, 0, 0], [1, 400, 999]], ids=["decoder", "divergence"])
def test_bound_moves_the_variance_alone_and_the_error_the_mean_alone(t):
    shape = (3, 2, 4, 4)
    x0, noise = hfill(shape, 1).double(), hfill(shape, 2, 1.7).double()
    f = (noise + hfill(shape, 3, 0.3)).requires_grad_()
    v = hfill(shape, 4, 1.2).double().requires_grad_()
    sigma = TABLE.sigmas()[t]

    def loss(network, learned):
        model = Denoiser(network, EpsVP(), "timestep", 1.0, TABLE, learned)
        return model.loss(x0, noise, sigma, Cond(), EpsWeight())

    both, plain = loss(lambda *_: torch.cat([f, v], 1), True), loss(lambda *_: f, False)
    gradient_f, gradient_v = torch.autograd.grad(both.sum(), (f, v))
    assert torch.equal(gradient_f, torch.autograd.grad(plain.sum(), f)[0])
    bound = vlb(x0, sigma, x0 + per_image(sigma) * (noise - f.detach()), v, TABLE)
    torch.testing.assert_close(both, plain + bound, rtol=1e-9, atol=0)
    (expected,) = torch.autograd.grad(bound.sum(), v)
    torch.testing.assert_close(gradient_v, expected, rtol=1e-6, atol=1e-9)
    assert (gradient_v != 0).all()


def test_bound_has_weight_1_in_the_loss_at_any_number_of_timesteps():
    table, x0 = LinearSchedule(steps=200), hfill((3, 2, 4, 4), 1).double()
    sigma, noise = table.sigmas()[[0, 50, 199]], hfill((3, 2, 4, 4), 2, 1.7).double()
    f, v = 0.9 * noise, 0.3 * noise
    model = Denoiser(lambda *_: torch.cat([f, v], 1), EpsVP(), "timestep", 1.0, table, True)
    loss = model.loss(x0, noise, sigma, Cond(), EpsWeight())
    error = (f - noise).square().mean((1, 2, 3))
    bound = vlb(x0, sigma, x0 + per_image(sigma) * (noise - f), v, table)
    torch.testing.assert_close(loss, error + bound, rtol=1e-9, atol=0)


# ---- the bound of Gaussian data ------------------------------------------------------------------


def exact(s):
    """The denoiser of N(0, s^2)."""
    return lambda x, sigma: x * per_image(s**2 / (s**2 + sigma**2))


def gaussian(s):
    """(x0, noise): four images whose second moments are those of N(0, s^2) and of N(0, 1).

    The divergences are quadratic in the two: their mean over the four is the expectation.
    """
    signs = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64)
    x0, noise = signs.view(2, 4, 1, 1, 1)
    return s * x0, noise


def information(s, sigma):
    """Of x0 + sigma noise about x0, in bits."""
    return math.log2(1 + (s / sigma) ** 2) / 2


def divergences(s, table, variance):
    """Expected terms of the bound without the decoder's, (T - 1,)."""
    x0, noise = gaussian(s)
    return vlb_bits_per_dim(exact(s), x0, table, lambda t: noise, variance).terms[1:].mean(1)


def test_upper_variance_is_the_best_for_data_of_unit_variance():
    """The reverse process is then normal, and the bound tight (Ho et al., 2020, section 3.2)."""
    table = LinearSchedule(steps=100)
    low, high = table.sigma_range()
    total = divergences(1.0, table, "upper").sum().item()
    assert total == pytest.approx(information(1, low) - information(1, high), rel=1e-9)


def test_lower_variance_is_the_best_for_data_without_variance():
    """The reverse process is then the posterior itself: it costs nothing."""
    x0 = hfill((2, 1, 2, 2), 1).double()
    noise = hfill((2, 1, 2, 2), 2, 1.7).double()
    table = LinearSchedule(steps=100)
    lower, upper = (
        vlb_bits_per_dim(lambda x, sigma: x0, x0, table, lambda t: noise, variance).terms[1:]
        for variance in ("lower", "upper")
    )
    assert lower.abs().max() < 1e-12
    assert upper.min() > 0


class Optimal:
    """The denoiser of N(0, s^2), with the v that minimises the bound."""

    def __init__(self, s, table):
        self.s, self.table = s, table

    def __call__(self, x, sigma):
        return exact(self.s)(x, sigma)

    def moments(self, x, sigma):
        previous, low, high = bounds_in_table(sigma, self.table)
        s2, v2, u2 = self.s**2, sigma**2, previous**2
        # of x at previous given x, which are both normal
        variance = (s2 + u2) - (s2 + u2) ** 2 / (s2 + v2)
        v = 2 * (variance.log() - low) / (high - low) - 1
        return self(x, sigma), per_image(v).expand_as(x)


@pytest.mark.parametrize("s", [0.25, 0.6])
def test_learned_variance_of_gaussian_data_makes_the_bound_tight(s):
    table = LinearSchedule(steps=100)
    (x0, noise), (low, high) = gaussian(s), table.sigma_range()
    bits = vlb_bits_per_dim(Optimal(s, table), x0, table, lambda t: noise)
    best = information(s, low) - information(s, high)
    assert bits.terms[1:].mean(1).sum().item() == pytest.approx(best, rel=1e-9)
    for variance in ("lower", "upper"):
        assert divergences(s, table, variance).sum().item() > best + 0.005


def test_more_timesteps_tighten_the_bound():
    """Beta's variance costs in proportion to the length of a step."""
    excess = []
    for steps in (50, 100, 200):
        table = LinearSchedule(steps=steps)
        low, high = table.sigma_range()
        best = information(0.25, low) - information(0.25, high)
        excess.append(divergences(0.25, table, "upper").sum().item() - best)
    assert excess[0] / excess[1] == pytest.approx(2, rel=0.05)
    assert excess[1] / excess[2] == pytest.approx(2, rel=0.05)


def test_bits_per_dim_are_just_above_the_entropy_of_the_data():
    """Of 8-bit Gaussian data, whose entropy is the sum over its histogram.

    The decoder's own CDF and the bins cost the 0.02. Noise of both signs takes the place of many.
    """
    s, n, table = 0.1, 1024, LinearSchedule(steps=50)
    normal = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    byte = ((s * normal + 1) * 127.5).round().long()
    p = byte.bincount() / n
    entropy = torch.special.entr(p).sum().item() / math.log(2)
    x0 = BYTES[byte].view(1, 1, 32, 32).expand(2, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)

    def noise(t):
        one = normal[torch.randperm(n, generator=generator)].view(1, 1, 32, 32)
        return torch.cat([one, -one])

    def total(denoise, variance):
        return vlb_bits_per_dim(denoise, x0, table, noise, variance).total.mean().item()

    assert entropy < total(Optimal(s, table), "learned") < entropy + 0.02
    assert entropy + 0.1 < total(exact(s), "upper") < total(exact(s), "lower")


def fixed_variances(betas, variance):
    """iDDPM's: beta's or the posterior's, with the posterior's of timestep 1 at timestep 0."""
    bar = (1 - betas).cumprod(0)
    posterior = betas[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    return torch.cat([posterior[:1], betas[1:] if variance == "upper" else posterior])


@pytest.mark.parametrize(("variance", "total"), [("lower", 2.695130813), ("upper", 3.468592400)])
def test_bits_per_dim_with_a_fixed_variance_are_those_of_the_vp_formula(variance, total):
    """T = 200, x0 of 8 bits, and an eps that is off by a tenth of itself."""
    betas = torch.linspace(5e-4, 0.1, 200, dtype=torch.float64)
    bar, variances = (1 - betas).cumprod(0), fixed_variances(betas, variance)
    x0 = BYTES[hfill((1, 1, 4, 4), 3, 60, 128).long()]
    noise = hfill((1, 1, 4, 4), 4, 1.7).double()
    nats = []
    for t in range(200):
        x = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * noise
        before = bar[t - 1] if t else torch.ones_like(bar[0])
        # Ho et al., 2020: equation 7 of x0, and of what 0.9 noise leaves of x
        from_x0 = before.sqrt() * betas[t] / (1 - bar[t])
        from_x = (1 - betas[t]).sqrt() * (1 - before) / (1 - bar[t])
        guess = (x - (1 - bar[t]).sqrt() * 0.9 * noise) / bar[t].sqrt()
        mean, model_mean = (from_x0 * image + from_x * x for image in (x0, guess))
        if t == 0:
            log_std = variances[0].log().item() / 2
            pairs = zip(x0.flatten().tolist(), model_mean.flatten().tolist(), strict=True)
            nats.append(-sum(bytes_log_likelihood(a, b, log_std) for a, b in pairs) / 16)
            continue
        posterior = (betas[t] * (1 - before) / (1 - bar[t])).sqrt()
        q = torch.distributions.Normal(mean, posterior)
        p = torch.distributions.Normal(model_mean, variances[t].sqrt())
        nats.append(torch.distributions.kl_divergence(q, p).mean().item())
    expected = torch.tensor(nats, dtype=torch.float64) / math.log(2)

    def denoise(x, sigma):
        return x - 0.9 * per_image(sigma) * noise

    bits = vlb_bits_per_dim(denoise, x0, LinearSchedule(steps=200), lambda t: noise, variance)
    torch.testing.assert_close(bits.terms[:, 0], expected, rtol=1e-8, atol=1e-9)
    assert bits.terms[0].item() == pytest.approx(2.565574620, abs=1e-8)  # of both: see `vlb`
    assert (bits.total - bits.prior).item() == pytest.approx(total, abs=1e-8)


def test_prior_is_the_divergence_of_the_highest_noise_level_from_the_standard_normal():
    table = LinearSchedule(steps=50, beta_end=5e-3)  # far from N(0, 1)
    x0 = hfill((2, 1, 2, 2), 1).double()
    bar = (1 - table.betas()).prod()
    q = torch.distributions.Normal(bar.sqrt() * x0, (1 - bar).sqrt())
    p = torch.distributions.Normal(torch.zeros_like(x0), 1.0)
    expected = torch.distributions.kl_divergence(q, p).mean((1, 2, 3)) / math.log(2)
    bits = vlb_bits_per_dim(exact(0.5), x0, table, lambda t: torch.zeros_like(x0), "lower")
    torch.testing.assert_close(bits.prior, expected, rtol=1e-12, atol=0)
    assert bits.terms.shape == (50, 2)
    torch.testing.assert_close(bits.total, expected + bits.terms.sum(0), rtol=1e-12, atol=0)


def test_bits_per_dim_draw_the_noise_of_each_timestep_once():
    x0, drawn = torch.zeros(1, 1, 1, 1), []

    def noise(t):
        drawn.append(t)
        return torch.ones_like(x0)

    vlb_bits_per_dim(exact(0.5), x0, LinearSchedule(steps=30), noise, "upper")
    assert sorted(drawn) == list(range(30))


def test_bits_per_dim_with_learned_variance_need_a_denoiser_that_has_one():
    x0 = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="'lower' or 'upper'"):
        vlb_bits_per_dim(exact(0.5), x0, TABLE, lambda t: x0)
