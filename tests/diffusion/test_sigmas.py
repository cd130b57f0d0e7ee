import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import load
from pydantic import TypeAdapter, ValidationError

from hdit.diffusion.beta_schedules import CosineSchedule, LinearSchedule
from hdit.diffusion.sigmas import (
    VP,
    AnySigmas,
    Exponential,
    FlowShift,
    Karras,
    LinearT,
    Polyexponential,
    SigmaSchedule,
)

SCHEDULE = LinearSchedule()
CONTINUOUS = [
    Karras(),
    Karras(rho=2.0),
    Exponential(),
    Polyexponential(),
    Polyexponential(rho=2.0),
    VP(),
    VP(beta_d=5.0, beta_min=0.5),
    FlowShift(),
    FlowShift(shift=3.0),
    FlowShift(shift=0.3),
]


def named(value: object) -> str | None:
    if not isinstance(value, SigmaSchedule):
        return None
    options = value.model_dump(exclude={"kind"}, exclude_defaults=True)
    return "-".join([value.kind, *(f"{k}{v}" for k, v in options.items())])


def table(betas: torch.Tensor) -> torch.Tensor:
    bar = torch.cumprod(1 - betas, 0)
    return ((1 - bar) / bar).sqrt()


DDPM = table(torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "sigma_schedule", "ends"),
    [
        ("karras(10,.01,160,rho7)", Karras(), (0.01, 160)),
        ("karras(10,.002,80,rho7)", Karras(), (0.002, 80)),
        ("karras(5,.01,160,rho3)", Karras(rho=3.0), (0.01, 160)),
        ("exponential(10,.01,160)", Exponential(), (0.01, 160)),
        ("polyexponential(10,.01,160,rho1)", Polyexponential(), (0.01, 160)),
        ("polyexponential(10,.01,160,rho2)", Polyexponential(rho=2.0), (0.01, 160)),
        ("vp(10)", VP(), VP().sigma_range(SCHEDULE)),
    ],
)
def test_sigma_schedule_matches_the_reference(name, sigma_schedule, ends):
    expected = torch.tensor(load("schedules_ema_lr.json")[name], dtype=torch.float64)
    actual = sigma_schedule(len(expected) - 1, *ends, SCHEDULE)
    # Theirs is float32, in which exp(1e-4) - 1, in the last level of "vp", keeps 4 digits.
    rtol = torch.full_like(expected, 3e-6)
    rtol[-2] = 3e-4 if name == "vp(10)" else 3e-6
    assert ((actual - expected).abs() <= rtol * expected).all()


@pytest.mark.parametrize("sigma_schedule", CONTINUOUS, ids=named)
@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 200),
    low=st.floats(1e-3, 0.5),
    high=st.floats(1.0, 200.0),
)
def test_sigma_schedule_goes_down_from_max_to_min_and_then_zero(sigma_schedule, n, low, high):
    sigmas = sigma_schedule(n, low, high, SCHEDULE)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == n + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[[0, -2, -1]].tolist() == pytest.approx([high, low, 0.0], rel=1e-9)


@pytest.mark.parametrize("sigma_schedule", [*CONTINUOUS, LinearT()], ids=named)
def test_sigma_schedule_of_one_level_is_at_the_highest(sigma_schedule):
    low, high = sigma_schedule.sigma_range(SCHEDULE)
    assert sigma_schedule(1, low, high, SCHEDULE).tolist() == pytest.approx([high, 0.0], rel=1e-9)


@pytest.mark.parametrize("kind", ["karras", "exponential", "polyexponential", "flow"])
def test_sigma_range_is_wide_where_the_sigma_schedule_has_none_of_its_own(kind):
    sigma_schedule = TypeAdapter(AnySigmas).validate_python({"kind": kind})
    assert sigma_schedule.sigma_range(SCHEDULE) == (0.01, 160.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_flow_sigma_schedule_shifts_evenly_spaced_times(shift):
    t = torch.linspace(0.9, 0.1, 9, dtype=torch.float64)
    shifted = shift * t / (1 + (shift - 1) * t)
    expected = shifted / (1 - shifted)
    ends = expected[-1].item(), expected[0].item()
    actual = FlowShift(shift=shift)(9, *ends, SCHEDULE)[:-1]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


# ---- timesteps -----------------------------------------------------------------------------------

TENS = [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]


@pytest.mark.parametrize(
    ("sigma_schedule", "n", "timesteps"),
    [
        (LinearT(), 10, TENS),
        (LinearT(), 1000, list(range(1000))),
        (LinearT(sections=(10,)), 10, TENS),
        (LinearT(sections=(2, 1, 3)), 6, [0, 333, 334, 667, 833, 999]),  # of 334, 333 and 333
        (LinearT(stride=True), 50, list(range(0, 1000, 20))),
        (LinearT(stride=True), 10, list(range(0, 1000, 100))),
    ],
    ids=named,
)
def test_linear_t_takes_these_timesteps_of_the_ddpm_table(sigma_schedule, n, timesteps):
    sigmas = sigma_schedule(n, *SCHEDULE.sigma_range(), SCHEDULE)
    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas[:-1].flip(0), DDPM[timesteps], rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("sigma_schedule", "steps", "n", "first", "last", "total"),
    [
        (LinearT(), 1000, 50, [0, 20, 41, 61, 82], [938, 958, 979, 999], 24975),
        (LinearT(), 1000, 250, [0, 4, 8, 12, 16], [987, 991, 995, 999], 124875),
        (LinearT(sections=(10, 15, 20)), 300, 45, [0, 11, 22], [283, 289, 294, 299], 7727),
    ],
    ids=named,
)
def test_linear_t_rounds_as_the_reference(sigma_schedule, steps, n, first, last, total):
    timesteps = sigma_schedule.timesteps(n, steps)
    assert len(timesteps) == n
    assert timesteps[: len(first)] == first
    assert timesteps[-len(last) :] == last
    assert sum(timesteps) == total


def test_linear_t_reaches_from_the_timestep_of_sigma_min_to_that_of_sigma_max():
    low, high = DDPM[200].item() * 1.001, DDPM[800].item() * 0.999  # both round to their timestep
    sigmas = LinearT()(7, low, high, SCHEDULE)
    expected = DDPM[[800, 700, 600, 500, 400, 300, 200]]
    torch.testing.assert_close(sigmas[:-1], expected, rtol=1e-11, atol=0)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 500), steps=st.integers(500, 1000), cosine=st.booleans())
def test_linear_t_goes_down_the_schedule_from_end_to_end(n, steps, cosine):
    schedule = CosineSchedule(steps=steps) if cosine else LinearSchedule(steps=steps)
    sigmas = LinearT()(n, *schedule.sigma_range(), schedule)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == n + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert (sigmas[-2].item(), sigmas[0].item()) == schedule.sigma_range()
    t = schedule.t(sigmas[:-1])
    assert t.eq(t.round()).all()
    # Evenly spaced, and rounded by 1/2 at both ends of a step.
    assert ((t.diff() + (steps - 1) / (n - 1)).abs() <= 1 + 1e-9).all()


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma_schedule", "n", "message"),
    [
        (LinearT(), 1001, "cannot take 1001 timesteps of 1000"),
        (LinearT(sections=(10, 15, 20)), 44, "add up to 45 timesteps, but there are 44 steps"),
        (LinearT(sections=(400, 100)), 501, "add up to 500"),
        (LinearT(sections=(501, 100)), 601, "cannot take 501 timesteps of 500, a section of 1000"),
        (LinearT(stride=True), 300, "no whole stride through 1000 timesteps gives 300"),
    ],
    ids=named,
)
def test_linear_t_refuses_a_number_of_steps_that_it_cannot_take(sigma_schedule, n, message):
    with pytest.raises(ValueError, match=message):
        sigma_schedule(n, *SCHEDULE.sigma_range(), SCHEDULE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "linear_t", "sections": [5, 5], "stride": True}, "no effect with stride"),
        ({"kind": "karras", "rho": 0.0}, "greater than"),
        ({"kind": "polyexponential", "rho": -1.0}, "greater than"),
        ({"kind": "flow", "shift": 0.0}, "greater than"),
        ({"kind": "vp", "beta_d": 0.0}, "greater than"),
        ({"kind": "vp", "beta_min": 0.0}, "greater than"),
        ({"kind": "exponential", "rho": 7.0}, "Extra inputs"),
        ({"kind": "cosine"}, "does not match any of the expected tags"),
    ],
    ids=str,
)
def test_sigma_schedule_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(AnySigmas).validate_python(settings)
