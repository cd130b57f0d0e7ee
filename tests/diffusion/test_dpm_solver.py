import math

import pytest
import torch
from known_answers import check_record, hfill, load

from hdit.diffusion.beta_schedules import LinearSchedule
from hdit.diffusion.samplers import dpm_adaptive, dpm_fast
from hdit.diffusion.sigmas import Exponential, Karras
from hdit.errors import SolverError

RANGES = {"smin0.01_smax160": (0.01, 160.0), "smin0.002_smax80": (0.002, 80.0)}
TABLE = LinearSchedule()


def gaussian(x, sigma, sd=0.5):
    return x * (sd**2 / (sd**2 + sigma**2))[:, None, None, None]


def exact(x, start, end, sd=0.5):
    return x * math.sqrt((sd**2 + end**2) / (sd**2 + start**2))


def start(high, shape=(2, 3, 4, 4)):
    return hfill(shape, 5000, 1.7).double() * high


class Counted:
    def __init__(self, denoise):
        self.denoise, self.calls = denoise, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.denoise(x, sigma)


@pytest.mark.parametrize("case", RANGES)
@pytest.mark.parametrize("n", [9, 10, 12])
def test_dpm_fast_matches_the_reference(case, n):
    """Its lambda is float32, which moves its float64 results by up to 2e-5."""
    record = load("samplers.json")["cases"][f"float64_{case}"][f"dpm_fast_n{n}"]
    low, high = RANGES[case]
    denoise = Counted(gaussian)
    out = dpm_fast(denoise, start(high), Exponential()(n + 1, low, high, TABLE)[:-1])
    check_record(out, record, 2e-5)
    assert denoise.calls == record["nfe"] == n


@pytest.mark.parametrize("sigma_schedule", [Exponential(), Karras()])
@pytest.mark.parametrize("n", range(1, 9))
def test_dpm_fast_takes_one_evaluation_a_step(sigma_schedule, n):
    """It takes only the ends of the schedule, so both give the same; one more denoises last."""
    denoise = Counted(gaussian)
    sigmas = sigma_schedule(n + 1, 0.1, 10, TABLE)
    to_low = dpm_fast(denoise, start(10), sigmas[:-1])
    assert denoise.calls == n
    to_zero = dpm_fast(denoise, start(10), sigmas)
    assert denoise.calls == n + n + 1
    torch.testing.assert_close(to_zero, gaussian(to_low, torch.full((2,), 0.1).double()))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_steps_have_their_order(order):
    """Error of dpm_fast over a short way: h^(k+1), k the order of its last step, or its only."""
    evaluations = {1: 1, 2: 2, 3: 5}[order]  # 5 is 3 + 2
    errors = []
    for end in (2 * math.exp(-0.2), 2 * math.exp(-0.1)):
        sigmas = Exponential()(evaluations + 1, end, 2, TABLE)[:-1]
        out = dpm_fast(gaussian, start(2), sigmas)
        errors.append((out - exact(start(2), 2, end)).abs().max().item())
    local = min(order, 2) + 1
    assert math.log2(errors[0] / errors[1]) == pytest.approx(local, abs=0.25)


@pytest.mark.parametrize("case", RANGES)
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_comes_to_the_exact_solution(case, order):
    """And about as the reference does, which measures the whole batch at once."""
    record = load("samplers.json")["cases"][f"float64_{case}"][f"dpm_adaptive_order{order}"]
    low, high = RANGES[case]
    x, sigmas = start(high), Exponential()(2, low, high, TABLE)[:-1]
    denoise = Counted(gaussian)
    out = dpm_adaptive(denoise, x, sigmas, order=order)
    check_record(out, record, atol=0.03)
    assert abs(denoise.calls - record["info"]["nfe"]) <= 3
    errors = []
    for rtol in (1e-4, 1e-5, 1e-6):
        out = dpm_adaptive(gaussian, x, sigmas, order=order, rtol=rtol, atol=rtol / 100)
        errors.append((out - exact(x, high, low)).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


def adaptive_by_hand(x, high, low, order, rtol, atol, h):
    """k-diffusion's loop for one image (c h w), in eps form -> (x at low, steps accepted or not).

    DPM-Solver-1 and -2, or -2 with r1 = 1/3 and -3; its controller with the default gains.
    """

    def eps(x, lam):
        sigma = math.exp(-lam)
        return (x - x * 0.25 / (0.25 + sigma**2)) / sigma

    lam, end, previous, accepted = -math.log(high), -math.log(low), x, []
    while lam < end - 1e-5:
        h = min(h, end - lam)
        e, to = eps(x, lam), math.exp(-(lam + h))
        r = 1 / 2 if order == 2 else 1 / 3
        u = x - math.exp(-(lam + r * h)) * math.expm1(r * h) * e
        e1 = eps(u, lam + r * h)
        first = x - to * math.expm1(h) * e
        second = first - to / (2 * r) * math.expm1(h) * (e1 - e)
        pair = first, second
        if order == 3:
            at = math.exp(-(lam + 2 * h / 3))
            gain = math.expm1(2 * h / 3)
            u2 = x - at * gain * e - at * 2 * (gain / (2 * h / 3) - 1) * (e1 - e)
            e2 = eps(u2, lam + 2 * h / 3)
            pair = second, first - to * 3 / 2 * (math.expm1(h) / h - 1) * (e2 - e)
        delta = torch.maximum(pair[0].abs(), previous.abs()).mul(rtol).clamp(min=atol)
        error = ((pair[0] - pair[1]) / delta).norm() / math.sqrt(x.numel())
        factor = 1 + math.atan((error.item() + 1e-8) ** (-1 / order) - 1)
        accepted.append(factor >= 0.81)
        if accepted[-1]:
            x, previous, lam = pair[1], pair[0], lam + h
        h *= factor
    return x, accepted


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("rtol", "h"), [(0.05, 0.05), (0.01, 2.0)])
def test_dpm_adaptive_takes_the_steps_of_k_diffusion(rtol, h, order):
    sigmas, x, steps = Exponential()(2, 0.02, 20.0, TABLE)[:-1], start(20.0, (1, 3, 4, 4)), []
    options = {"order": order, "rtol": rtol, "atol": rtol / 6, "h_init": h}
    out = dpm_adaptive(gaussian, x, sigmas, on_step=lambda *step: steps.append(step), **options)
    expected, accepted = adaptive_by_hand(x[0], 20.0, 0.02, order, rtol, rtol / 6, h)
    assert len(steps) == len(accepted)
    assert set(accepted) == {True, False}
    torch.testing.assert_close(out[0], expected, rtol=1e-8, atol=1e-12)


def test_dpm_adaptive_gives_an_image_whatever_is_beside_it():
    x = torch.cat([start(10, (1, 3, 4, 4)), 40 * start(10, (2, 3, 4, 4))])
    sigmas = Exponential()(2, 0.1, 10, TABLE)
    together = dpm_adaptive(gaussian, x, sigmas)
    alone = torch.cat([dpm_adaptive(gaussian, image[None], sigmas) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_dpm_adaptive_goes_the_rest_of_the_way_however_short():
    """A first step of 0.05 in ln sigma leaves 0.005, half a percent of x."""
    low = math.exp(-0.055)
    sigmas = Exponential()(2, low, 1.0, TABLE)[:-1]
    out = dpm_adaptive(gaussian, start(1.0), sigmas, h_init=0.05)
    torch.testing.assert_close(out, exact(start(1.0), 1.0, low), rtol=1e-4, atol=0)


def test_dpm_adaptive_denoises_at_the_end_of_a_sigma_schedule_to_zero():
    sigmas = Exponential()(3, 0.1, 10, TABLE)
    to_low = dpm_adaptive(gaussian, start(10), sigmas[:-1])
    to_zero = dpm_adaptive(gaussian, start(10), sigmas)
    torch.testing.assert_close(to_zero, to_low * 0.25 / 0.26)


def test_dpm_adaptive_shortens_its_steps_where_the_denoiser_turns():
    """A step at sigma 1, of width 0.02 in ln(sigma): it is met by more of the steps."""
    levels = []

    def sharp(x, sigma):
        levels.append(sigma[0].item())
        return (torch.tanh(sigma.log() / 0.02) * 0.3)[:, None, None, None].expand_as(x)

    dpm_adaptive(sharp, start(10), Exponential()(2, 0.1, 10, TABLE)[:-1], rtol=1e-2, atol=1e-3)
    near = sum(0.8 < level < 1.25 for level in levels)  # a tenth of the way in ln(sigma)
    assert near > len(levels) / 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dpm_adaptive_names_where_it_came_to_a_stop(bad):
    def broken(x, sigma):
        return torch.where((sigma < 1)[:, None, None, None], bad, gaussian(x, sigma))

    with pytest.raises(SolverError, match=r"to a stop at sigma [01]\.\d+: .*a larger rtol"):
        dpm_adaptive(broken, start(10), Exponential()(2, 0.1, 10, TABLE))


def test_dpm_adaptive_has_orders_2_and_3():
    with pytest.raises(ValueError, match="order: must be 2 or 3, got 4"):
        dpm_adaptive(gaussian, start(10), Exponential()(2, 0.1, 10, TABLE), order=4)
