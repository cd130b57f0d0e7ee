import math
from itertools import pairwise
from typing import Annotated

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import check_record, hfill, load
from pydantic import Field, TypeAdapter, ValidationError

from hdit.diffusion import samplers
from hdit.diffusion.beta_schedules import LinearSchedule
from hdit.diffusion.brownian import BrownianPath
from hdit.diffusion.samplers import SamplerSpec
from hdit.diffusion.sigmas import Exponential, Karras

SHAPE = (2, 3, 4, 4)
SCHEDULE = LinearSchedule()
DDIM = SamplerSpec.members["ddim"]
DDPM = SamplerSpec.members["ddpm"]
DPM2 = SamplerSpec.members["dpm2"]
LMS = SamplerSpec.members["lms"]
DPM2Ancestral = SamplerSpec.members["dpm2_ancestral"]
DPMpp2M = SamplerSpec.members["dpmpp_2m"]
DPMpp2MSDE = SamplerSpec.members["dpmpp_2m_sde"]
DPMpp2SAncestral = SamplerSpec.members["dpmpp_2s_ancestral"]
DPMpp3MSDE = SamplerSpec.members["dpmpp_3m_sde"]
DPMppSDE = SamplerSpec.members["dpmpp_sde"]
Euler = SamplerSpec.members["euler"]
EulerAncestral = SamplerSpec.members["euler_ancestral"]
Heun = SamplerSpec.members["heun"]
UniPC = SamplerSpec.members["unipc"]
EVERY = [kind() for kind in SamplerSpec.members.values()]
GO_DOWN_THE_LADDER = [s for s in EVERY if s.kind not in ("dpm_fast", "dpm_adaptive")]
STOCHASTIC = [
    EulerAncestral(),
    EulerAncestral(eta=0.5),
    DPM2Ancestral(),
    DPMpp2SAncestral(),
    DPMppSDE(),
    DPMpp2MSDE(),
    DPMpp2MSDE(solver="heun"),
    DPMpp3MSDE(),
    DDIM(eta=1.0),
    DDPM(),
    DDPM(variance="upper"),
    Euler(s_churn=10.0),
    Heun(s_churn=10.0),
    DPM2(s_churn=10.0),
]


def named(value: object) -> str | None:
    if not isinstance(value, SamplerSpec):
        return None
    options = value.model_dump(exclude={"kind"}, exclude_defaults=True)
    return "-".join([value.kind, *(f"{k}{v}" for k, v in options.items())])


# ---- denoisers in closed form, and noise ---------------------------------------------------------


def gaussian(x: torch.Tensor, sigma: torch.Tensor, sd: float = 0.5) -> torch.Tensor:
    """The exact denoiser of data that is N(0, sd^2) in every element."""
    assert sigma.shape == (len(x),)
    assert sigma.dtype == x.dtype
    return x * (sd**2 / (sd**2 + sigma**2))[:, None, None, None]


def gaussian_solution(x: torch.Tensor, sigma: float, end: float, sd: float = 0.5) -> torch.Tensor:
    """The probability-flow ODE of that data, from sigma down to end, in closed form."""
    return x * math.sqrt((sd**2 + end**2) / (sd**2 + sigma**2))


LEFT, RIGHT, SHARE, SPREAD = -1.0, 0.5, 0.7, 0.2  # SHARE is of the right peak


def mixture(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser of a mixture of two Gaussians in every element: nonlinear."""
    variance = (SPREAD**2 + sigma**2)[:, None, None, None]
    logit = (RIGHT - LEFT) * (x - (RIGHT + LEFT) / 2) / variance
    mean = LEFT + (RIGHT - LEFT) * torch.sigmoid(logit + math.log(SHARE / (1 - SHARE)))
    return mean + SPREAD**2 / variance * (x - mean)


def bounded(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Nonlinear, of no data at all."""
    return torch.tanh(x) / (1 + sigma)[:, None, None, None]


class ScriptedNoise:
    """The i-th call gives the i-th noise of the vectors; remembers what it was asked."""

    def __init__(self, dtype: torch.dtype = torch.float64, scale: float = 1.0):
        self.calls, self.dtype, self.scale = [], dtype, scale

    def __call__(self, sigma: float, sigma_next: float) -> torch.Tensor:
        self.calls.append((sigma, sigma_next))
        return self.scale * hfill(SHAPE, 6000 + len(self.calls) - 1, 1.7).to(self.dtype)


def no_noise(sigma: float, sigma_next: float) -> torch.Tensor:
    raise AssertionError("no noise should be drawn")


OFF_PATH = 2**19  # from here on, indices of normals that no path uses


def normals(seed: int, *shape: int):
    """Standard normal tensors by index, below 2^20."""

    def normal(i: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 2**20 + i))

    return normal


def start(sigma: float) -> torch.Tensor:
    return hfill(SHAPE, 5000, 1.7).double() * sigma


def karras(n: int, low: float, high: float) -> torch.Tensor:
    return Karras()(n, low, high, SCHEDULE)


# ---- the reference -------------------------------------------------------------------------------

REFERENCE = {
    "euler": Euler(),
    "heun": Heun(),
    "dpm_2": DPM2(),
    "lms": LMS(),
    "lms_order1": LMS(order=1),
    "lms_order3": LMS(order=3),
    "dpmpp_2m": DPMpp2M(),
    **{
        f"{key}_eta{eta:g}": kind(eta=eta)
        for eta in (0.0, 0.5, 1.0)
        for key, kind in {
            "euler_ancestral": EulerAncestral,
            "dpm_2_ancestral": DPM2Ancestral,
            "dpmpp_2s_ancestral": DPMpp2SAncestral,
            "dpmpp_sde": DPMppSDE,
            "dpmpp_3m_sde": DPMpp3MSDE,
        }.items()
    },
    **{
        f"dpmpp_2m_sde_{solver}_eta{eta:g}": DPMpp2MSDE(solver=solver, eta=eta)
        for eta in (0.0, 1.0)
        for solver in ("midpoint", "heun")
    },
}
NOT_SAMPLERS_OF_OURS = {
    *("exact_x0", "exact_at_sigma_min", "log_likelihood"),
    *("dpm_fast_n9", "dpm_fast_n10", "dpm_fast_n12", "dpm_adaptive_order2", "dpm_adaptive_order3"),
}


def test_reference_samplers_are_all_compared():
    for case in load("samplers.json")["cases"].values():
        assert case.keys() - NOT_SAMPLERS_OF_OURS == REFERENCE.keys()


@pytest.mark.parametrize("case", ["smin0.01_smax160", "smin0.002_smax80"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", REFERENCE)
def test_sampler_matches_the_reference(key, dtype, case):
    """Values, number of evaluations, and the stretches that noise is drawn for."""
    spec = REFERENCE[key]
    record = load("samplers.json")["cases"][f"{str(dtype).removeprefix('torch.')}_{case}"][key]
    low, high = (float(part[4:]) for part in case.split("_"))  # sigmas[0] is high to float32
    recorded = {(0.01, 160.0): "karras(10,.01,160,rho7)", (0.002, 80.0): "karras(10,.002,80,rho7)"}
    sigmas = torch.tensor(load("schedules_ema_lr.json")[recorded[low, high]]).double()
    x = (hfill(SHAPE, 5000, 1.7) * high).to(dtype)
    noise, evaluations = ScriptedNoise(dtype), []

    def denoise(x, sigma):
        evaluations.append(sigma)
        return gaussian(x, sigma)

    out = spec(denoise, x, sigmas, noise=noise)
    # float32: some ten roundings of values up to 300 at the first steps, which then shrink.
    rtol, atol = (1e-5, 5e-5) if dtype == torch.float32 else (1e-9, 1e-9)
    assert out.dtype == dtype
    check_record(out, record, atol, rtol)
    assert len(evaluations) == record["nfe"]
    draws = record["noise_calls"] if getattr(spec, "eta", 0) else []  # theirs may draw, and add 0
    torch.testing.assert_close(noise.calls, [tuple(c) for c in draws], rtol=1e-6, atol=0)


def test_exact_solution_matches_the_reference():
    case = load("samplers.json")["cases"]["float64_smin0.01_smax160"]
    x = (hfill(SHAPE, 5000, 1.7) * 160.0).double()
    check_record(gaussian_solution(x, 160, 0.0), case["exact_x0"], 1e-9)


# ---- every sampler, and its settings -------------------------------------------------------------


@pytest.mark.parametrize("spec", GO_DOWN_THE_LADDER, ids=named)
def test_sampler_reports_each_step_once_and_leaves_its_input_alone(spec):
    sigmas, seen = karras(5, 0.1, 10), []
    x = start(10.0)
    before = x.clone()

    def on_step(i, at, denoised):
        assert torch.equal(denoised, bounded(at, at.new_full((len(at),), sigmas[i])))
        seen.append(i)

    out = spec(bounded, x, sigmas, noise=ScriptedNoise(), on_step=on_step)
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(x, before)
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("spec", EVERY, ids=named)
def test_sampler_on_a_sigma_schedule_of_one_level_denoises_once_without_noise(spec):
    x = hfill(SHAPE, 1).double()
    out = spec(gaussian, x, karras(1, 2.0, 2.0), noise=no_noise)
    torch.testing.assert_close(out, x * 0.25 / 4.25)


@pytest.mark.parametrize("spec", STOCHASTIC, ids=named)
def test_stochastic_sampler_without_noise_says_so(spec):
    with pytest.raises(ValueError, match="pass noise="):
        spec(gaussian, torch.ones(SHAPE), karras(3, 0.1, 10))


@pytest.mark.parametrize(
    ("spec", "function", "options"),
    [
        (Euler, samplers.euler, {"s_churn": 2.0, "s_tmin": 0.5, "s_tmax": 5.0, "s_noise": 1.1}),
        (Heun, samplers.heun, {"s_churn": 2.0, "s_tmin": 0.5, "s_tmax": 5.0, "s_noise": 1.1}),
        (DPM2, samplers.dpm2, {"s_churn": 2.0, "s_tmin": 0.5, "s_tmax": 5.0, "s_noise": 1.1}),
        (LMS, samplers.lms, {"order": 2}),
        (UniPC, samplers.unipc, {"order": 3}),
        (EulerAncestral, samplers.euler_ancestral, {"eta": 0.3, "s_noise": 1.1}),
        (DPM2Ancestral, samplers.dpm2_ancestral, {"eta": 0.3, "s_noise": 1.1}),
        (DDIM, samplers.ddim, {"eta": 0.3}),
        (DDPM, samplers.ddpm, {"variance": "upper"}),
        (DPMpp2SAncestral, samplers.dpmpp_2s_ancestral, {"eta": 0.3, "s_noise": 1.1}),
        (DPMppSDE, samplers.dpmpp_sde, {"eta": 0.3, "s_noise": 1.1, "r": 0.3}),
        (DPMpp2MSDE, samplers.dpmpp_2m_sde, {"eta": 0.3, "s_noise": 1.1, "solver": "heun"}),
        (DPMpp3MSDE, samplers.dpmpp_3m_sde, {"eta": 0.3, "s_noise": 1.1}),
    ],
)
def test_spec_passes_each_option_to_its_function(spec, function, options):
    sigmas = karras(6, 0.1, 10)

    def run(sampler, **bound):
        return sampler(bounded, start(10.0), sigmas, noise=ScriptedNoise(), **bound)

    direct = run(function, **options)
    assert torch.equal(run(spec(**options)), direct)
    for left_out in options:  # and each of them has an effect
        rest = {k: v for k, v in options.items() if k != left_out}
        assert not torch.equal(run(function, **rest), direct)


def test_sampler_is_registered_by_its_signature_alone():
    """From outside the project too, and a config can name it at once."""

    def halving(
        denoise,
        x,
        sigmas,
        *,
        noise=None,
        on_step=None,
        share: Annotated[float, Field(gt=0, description="that is kept")] = 0.5,
        rounds: int = 1,
    ):
        return x * share**rounds

    try:
        assert samplers.sampler(order=1)(halving) is halving
        spec = TypeAdapter(samplers.Sampler).validate_python({"kind": "halving", "rounds": 2})
        assert spec == samplers.spec_of("halving", rounds=2)
        assert spec.model_dump() == {"kind": "halving", "share": 0.5, "rounds": 2}
        assert torch.equal(spec(gaussian, start(1.0), karras(3, 0.1, 10)), start(1.0) / 4)
        with pytest.raises(ValidationError, match="greater than 0"):
            samplers.spec_of("halving", share=0)
        with pytest.raises(ValueError, match="there is a sampler of kind 'euler' already"):
            samplers.sampler(order=1)(samplers.euler)
    finally:
        del SamplerSpec.members["halving"]


@pytest.mark.parametrize(
    "spec", [s for s in STOCHASTIC if "s_noise" in type(s).model_fields], ids=named
)
def test_s_noise_is_a_factor_on_the_noise(spec):
    sigmas = karras(6, 0.1, 10)
    louder = spec.model_copy(update={"s_noise": 1.5})
    torch.testing.assert_close(
        louder(bounded, start(10.0), sigmas, noise=ScriptedNoise()),
        spec(bounded, start(10.0), sigmas, noise=ScriptedNoise(scale=1.5)),
    )


@pytest.mark.parametrize(
    "kind", [EulerAncestral, DPM2Ancestral, DPMpp2SAncestral], ids=lambda k: k.__name__
)
def test_ancestral_noise_is_at_most_the_next_level(kind):
    """With a large eta each step goes down to 0 and all of the next level is new noise."""
    sigmas = karras(4, 0.1, 10)
    expected, noise = start(10.0), ScriptedNoise()
    for s, s_next in pairwise(sigmas.tolist()):
        expected = bounded(expected, expected.new_full((len(expected),), s))
        if s_next > 0:
            expected = expected + s_next * noise(s, s_next)
    out = kind(eta=100.0)(bounded, start(10.0), sigmas, noise=ScriptedNoise())
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("order", [0, 5])
def test_lms_refuses_an_order_outside_1_to_4(order):
    with pytest.raises(ValueError, match=f"order: must be 1 to 4, got {order}"):
        samplers.lms(gaussian, start(10.0), karras(3, 0.1, 10), order=order)
    with pytest.raises(ValidationError):
        LMS(order=order)


# ---- churn ---------------------------------------------------------------------------------------


def algorithm_2(denoise, x, t, noise, second, s_churn, s_tmin, s_tmax, s_noise):
    """Algorithm 2 of Karras et al., 2022; `second` says what corrects Euler's step, if anything."""
    n = len(t) - 1
    for i in range(n):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0
        t_hat = t[i] + gamma * t[i]
        if gamma:
            x = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * noise(t[i], t[i + 1])

        def slope(x, t):
            return (x - denoise(x, x.new_full((len(x),), t))) / t

        d = slope(x, t_hat)
        if second == "heun" and t[i + 1]:
            d = (d + slope(x + (t[i + 1] - t_hat) * d, t[i + 1])) / 2
        if second == "midpoint" and t[i + 1]:
            middle = math.exp((math.log(t_hat) + math.log(t[i + 1])) / 2)
            d = slope(x + (middle - t_hat) * d, middle)
        x = x + (t[i + 1] - t_hat) * d
    return x


LEVELS = karras(8, 0.1, 10).tolist()


@pytest.mark.parametrize(
    ("function", "second"),
    [(samplers.euler, None), (samplers.heun, "heun"), (samplers.dpm2, "midpoint")],
)
@pytest.mark.parametrize(
    ("s_churn", "s_tmin", "s_tmax", "s_noise", "raised"),
    [
        (2.0, 0.0, math.inf, 1.0, range(8)),
        (40.0, 0.0, math.inf, 1.0, range(8)),  # gamma is at its bound, sqrt(2) - 1
        (2.0, LEVELS[5], LEVELS[2], 1.007, range(2, 6)),  # both ends belong to the interval
        (2.0, LEVELS[4] * 1.01, LEVELS[3] * 0.99, 1.0, []),
        (0.0, 0.0, math.inf, 1.0, []),
    ],
)
def test_churn_is_that_of_karras_algorithm_2(
    function, second, s_churn, s_tmin, s_tmax, s_noise, raised
):
    settings = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    noise = ScriptedNoise()
    out = function(
        bounded, start(10.0), torch.tensor(LEVELS, dtype=torch.float64), noise=noise, **settings
    )
    expected = algorithm_2(bounded, start(10.0), LEVELS, ScriptedNoise(), second, **settings)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert noise.calls == [(LEVELS[i], LEVELS[i + 1]) for i in raised]


# ---- DDPM and DDIM in the coordinates of their papers --------------------------------------------


def predicted_noise(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A nonlinear eps of the VP's x; a, here and below, is alpha-bar."""
    return 0.6 * torch.tanh(2 * x) + 0.3 * a


def predicted_v(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * x) * a


class EpsDenoiser:
    """The same network as a denoiser of x0 + sigma eps."""

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.moments(x, sigma)[0]

    def moments(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = sigma[:, None, None, None]
        a = 1 / (1 + sigma**2)
        eps = predicted_noise(x * a.sqrt(), a)
        return x - sigma * eps, predicted_v(x * a.sqrt(), a)


def respaced_vp() -> torch.Tensor:
    """alpha-bar at 10 timesteps of the linear-beta table, the noisiest first, then 1."""
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    return torch.cat([bar[[999, 888, 777, 666, 555, 444, 333, 222, 111, 0]], torch.ones(1)])


def in_vp(step) -> torch.Tensor:
    """Runs step(x, x0, eps, a, a_next) -> (mean, std), in the VP's coordinates."""
    bars, noise = respaced_vp(), ScriptedNoise()
    x = start(150.0) * bars[0].sqrt()
    for a, a_next in pairwise(bars):
        eps = predicted_noise(x, a)
        x, std = step(x, (x - (1 - a).sqrt() * eps) / a.sqrt(), eps, a, a_next)
        if a_next < 1:
            x = x + std * noise(0, 0)
    return x


def in_sigma(spec) -> torch.Tensor:
    bars = respaced_vp()
    sigmas = ((1 - bars) / bars).sqrt()
    return spec(EpsDenoiser(), start(150.0), sigmas, noise=ScriptedNoise())


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_equation_12_of_song_et_al(eta):
    def equation_12(x, x0, eps, a, a_next):
        std = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
        return a_next.sqrt() * x0 + (1 - a_next - std**2).sqrt() * eps, std

    # 1 - alpha-bar loses 4 of 16 digits where it is 1e-4.
    torch.testing.assert_close(in_sigma(DDIM(eta=eta)), in_vp(equation_12), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["lower", "upper", "learned"])
def test_ddpm_has_the_mean_and_variance_of_the_papers(variance):
    def ancestral(x, x0, eps, a, a_next):
        beta = 1 - a / a_next
        c1 = beta * a_next.sqrt() / (1 - a)
        c2 = (1 - a_next) * (1 - beta).sqrt() / (1 - a)
        lower = (beta * (1 - a_next) / (1 - a)).log()
        fraction = {"lower": 0, "upper": 1, "learned": (predicted_v(x, a) + 1) / 2}[variance]
        return c1 * x0 + c2 * x, ((fraction * beta.log() + (1 - fraction) * lower) / 2).exp()

    out = in_sigma(DDPM(variance=variance))
    torch.testing.assert_close(out, in_vp(ancestral), rtol=1e-9, atol=1e-9)


def test_ddpm_with_the_lower_variance_is_ancestral_euler():
    torch.testing.assert_close(in_sigma(DDPM()), in_sigma(EulerAncestral()), rtol=1e-10, atol=1e-10)


def test_ddpm_with_a_learned_variance_refuses_a_denoiser_without_it():
    with pytest.raises(ValueError, match="'learned' needs a denoiser that predicts it"):
        DDPM(variance="learned")(bounded, start(10.0), karras(3, 0.1, 10), noise=ScriptedNoise())


# ---- convergence without noise -------------------------------------------------------------------

DETERMINISTIC = [
    Euler(),
    Heun(),
    DPM2(),
    LMS(),
    LMS(order=1),
    LMS(order=2),
    LMS(order=3),
    EulerAncestral(eta=0.0),
    DPM2Ancestral(eta=0.0),
    DDIM(),
    DPMpp2SAncestral(eta=0.0),
    DPMppSDE(eta=0.0),
    DPMppSDE(eta=0.0, r=0.3),
    DPMpp2M(),
    DPMpp2MSDE(eta=0.0),
    DPMpp2MSDE(eta=0.0, solver="heun"),
    DPMpp3MSDE(eta=0.0),
    UniPC(),
    UniPC(order=1),
]


def nominal_order(spec: SamplerSpec) -> int:
    """Of the settings, where those decide it."""
    if isinstance(spec, UniPC):
        return spec.order + 1
    return spec.order if isinstance(spec, LMS) else spec.nominal_order


def observed_order(spec: SamplerSpec, coarse: torch.Tensor, fine: torch.Tensor) -> float:
    """Slope of the largest error on the Gaussian denoiser, where fine steps are half as long."""

    def error(sigmas: torch.Tensor) -> float:
        high, low = sigmas[0].item(), sigmas[-1].item()
        out = spec(gaussian, start(high), sigmas, noise=no_noise)
        return (out - gaussian_solution(start(high), high, low)).abs().max().item()

    return math.log2(error(coarse) / error(fine))


@pytest.mark.parametrize("kind", [LMS, UniPC])
def test_nominal_order_is_that_of_the_default_settings(kind):
    assert kind.nominal_order == nominal_order(kind())


@pytest.mark.parametrize("sigma_schedule", [Karras(), Exponential()], ids=lambda s: s.kind)
@pytest.mark.parametrize("spec", DETERMINISTIC, ids=named)
def test_sampler_converges_to_the_exact_solution_at_its_order(spec, sigma_schedule):
    """Its nominal order, but of lms no more than 2, as its first step is of order 1, and of
    dpmpp_3m_sde 2, as k-diffusion weights its second difference.

    From 1 to 0.1, where the solution bends already at the first step. Slopes between 80 and 160
    steps are within 0.15 of their limit.
    """
    sigmas = (sigma_schedule(n + 1, 0.1, 1.0, SCHEDULE)[:-1] for n in (80, 160))
    expected = min(nominal_order(spec), 3 if isinstance(spec, UniPC) else 2)
    assert observed_order(spec, *sigmas) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
    "spec", [*(s for s in DETERMINISTIC if nominal_order(s) > 2), UniPC(order=3)], ids=named
)
def test_multistep_sampler_reaches_its_nominal_order_after_short_first_steps(spec):
    """The first of n steps is cut into n, whose low orders then cost O(h^4).

    Not dpmpp_3m_sde: its second difference has half the weight that order 3 takes.
    """

    def sigmas(n: int) -> torch.Tensor:
        steps = torch.arange(n + 1, dtype=torch.float64)
        return 10 ** -torch.cat([steps[:-1] / n**2, steps[1:] / n])

    order = observed_order(spec, sigmas(80), sigmas(160))
    expected = 2 if isinstance(spec, DPMpp3MSDE) else nominal_order(spec)
    assert order == pytest.approx(expected, abs=0.2)


# ---- convergence and distribution with noise -----------------------------------------------------


def std_of_samples(spec: SamplerSpec, sigmas: torch.Tensor) -> float:
    """Of Gaussian data, exactly: each normal variable of the path is a dimension of its own, and on
    a linear denoiser the norm of the result is its std."""
    seen, sigma_max = {}, sigmas[0].item()

    def unit(i: int) -> torch.Tensor:
        x = torch.zeros((1, 1, 1, 3000), dtype=torch.float64)
        x[..., seen.setdefault(i, len(seen))] = 1
        return x

    x, path = unit(OFF_PATH) * math.hypot(sigma_max, 0.5), BrownianPath(unit, sigma_max)
    return spec(gaussian, x, sigmas, noise=path).norm().item()


@pytest.mark.parametrize("spec", STOCHASTIC, ids=named)
def test_stochastic_sampler_gives_gaussian_data_its_variance(spec):
    """Slope of the std's error between 50 and 100 steps."""
    coarse, fine = (std_of_samples(spec, karras(n, 0.01, 80.0)) - 0.5 for n in (50, 100))
    assert abs(fine) < 0.03
    assert math.log2(coarse / fine) == pytest.approx(min(spec.nominal_order, 2), abs=0.25)


def std_by_dpmpp_sde(sigmas: list[float], overlap) -> float:
    """Of Gaussian data, by the variance of each step, which is linear in x and in two noises.

    overlap(a, b, c) is the correlation of the noise from a to b with that from a to c.
    """
    variance = sigmas[0] ** 2 + 0.25
    for s, s_next in pairwise(sigmas):
        shrink = 0.25 / (0.25 + s**2)  # D(x) / x
        if s_next == 0:
            return math.sqrt(variance) * shrink
        middle = math.sqrt(s * s_next)
        shrink_middle = 0.25 / (0.25 + middle**2)
        # sigma_down is to^2 / from, and sigma_up^2 what it lacks of to^2
        down_middle, down = middle**2 / s, s_next**2 / s
        up_middle = math.sqrt(middle**2 - down_middle**2)
        up = math.sqrt(s_next**2 - down**2)
        x_at_middle = down_middle / s + (1 - down_middle / s) * shrink  # a factor of x
        of_middle = (1 - down / s) * shrink_middle
        of_x = down / s + of_middle * x_at_middle
        of_noise = of_middle * up_middle
        correlation = overlap(s, middle, s_next)
        variance = of_x**2 * variance + of_noise**2 + up**2 + 2 * of_noise * up * correlation
    return math.sqrt(variance)


def test_dpmpp_sde_draws_the_noise_of_its_two_stages_from_one_path_in_sigma():
    """As k-diffusion does; a path in sigma^(1/7) would give 0.405."""
    sigmas = karras(6, 0.02, 20.0)
    expected = std_by_dpmpp_sde(sigmas.tolist(), lambda a, b, c: math.sqrt((a - b) / (a - c)))
    assert expected == pytest.approx(0.41318, abs=1e-5)
    # The path goes to the nearest tick: 2e-4 of a noise level at most.
    assert std_of_samples(DPMppSDE(), sigmas) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("spec", STOCHASTIC, ids=named)
def test_stochastic_sampler_gives_a_mixture_its_distribution(spec):
    """Largest gap between the CDFs. With 4,096 pixels chance gives 0.021 in one of 20 cases; the
    bias of the samplers of order 1 comes on top.
    """
    normal = normals(0, 1, 1, 64, 64)
    x = normal(OFF_PATH) * 80
    x = spec(mixture, x, karras(100, 0.01, 80.0), noise=BrownianPath(normal, 80.0))
    x = x.flatten().double().sort().values
    cdf = (1 - SHARE) * torch.special.ndtr((x - LEFT) / SPREAD)
    cdf += SHARE * torch.special.ndtr((x - RIGHT) / SPREAD)
    assert (cdf - torch.arange(len(x)) / len(x)).abs().max() < 0.03


def gaussian_and_mixture(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return torch.cat([gaussian(x[:1], sigma[:1]), mixture(x[1:], sigma[1:])])


@pytest.mark.parametrize("spec", STOCHASTIC, ids=named)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20))
def test_stochastic_sampler_converges_on_one_path_and_not_on_fresh_noise(spec, seed):
    """Mean distances from the samples of 160 steps on a path, of image 0 on a linear denoiser and
    image 1 on a nonlinear one. On the path, order 1 would divide them by 5 from 10 to 40 steps; the
    two peaks of image 1 make that uneven. Fresh noise leaves the mean distance of independent
    samples, which is 0.56 for image 0 and more for image 1.
    """
    normal = normals(seed, 2, 1, 8, 16)
    x = normal(OFF_PATH) * 80

    def run(n: int, noise) -> torch.Tensor:
        return spec(gaussian_and_mixture, x, karras(n, 0.01, 80.0), noise=noise)

    fresh = (normal(i) for i in range(OFF_PATH + 1, 2**20))
    fine = run(160, BrownianPath(normal, 80.0))
    path10, path40, fresh40 = (
        (run(n, noise) - fine).abs().mean((1, 2, 3))
        for n, noise in [
            (10, BrownianPath(normal, 80.0)),
            (40, BrownianPath(normal, 80.0)),
            (40, lambda *_: next(fresh)),
        ]
    )
    assert (path40 < 0.75 * path10).all()
    assert (path40 < 0.35 * fresh40).all()
    assert (fresh40 > 0.4).all()


@pytest.mark.parametrize("sigma_schedule", [[160.0], [1.0, 2.0], [2.0, 2.0, 1.0], [2.0, -1.0]])
@pytest.mark.parametrize("function", [samplers.heun, samplers.ddim, samplers.dpmpp_2m])
def test_sampler_refuses_a_sigma_schedule_that_does_not_go_down(function, sigma_schedule):
    with pytest.raises(ValueError, match="two noise levels that decrease"):
        function(gaussian, torch.ones(1, 1, 2, 2), torch.tensor(sigma_schedule))
