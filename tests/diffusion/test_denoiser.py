import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import check_record, hfill, load
from reference_models import reference_model, reference_name

from hdit.diffusion.beta_schedules import CosineSchedule, LinearSchedule
from hdit.diffusion.denoiser import Denoiser
from hdit.diffusion.parametrization import EDM, X0, EpsVP, Flow, V
from hdit.diffusion.weighting import (
    EDMWeight,
    EpsWeight,
    FlowWeight,
    MinSNR,
    Sigmoid,
    SoftMinSNR,
    VWeight,
    X0Weight,
    mean_square,
)
from hdit.protocols import Cond, DenoiseWithVariance

REFERENCE_NAMES = {"karras": EDMWeight(), "soft-min-snr": SoftMinSNR(), "snr": EpsWeight()}
WEIGHTINGS = [
    *(EpsWeight(), EDMWeight(), VWeight(), X0Weight(), FlowWeight()),
    *(MinSNR(), SoftMinSNR(gamma=3), SoftMinSNR(), Sigmoid(bias=1)),
]
PARAMETRIZATIONS = [EDM(), V(), EpsVP(), X0(), Flow()]
RTOL = {"float32": 1e-5, "float64": 1e-9}


def toy(x, c_noise, cond):
    """The vectors' F(x, sigma) = 0.7 tanh(x) + 0.05 ln(sigma), with c_noise = ln(sigma)/4."""
    return 0.7 * x.tanh() + 0.2 * c_noise[:, None, None, None]


def denoiser(backbone=toy, parametrization=None, label="log_quarter", sigma_data=0.5, **options):
    return Denoiser(backbone, parametrization or EDM(), label, sigma_data, **options)


def per_image(values):
    return values[:, None, None, None]


# ---- against k-diffusion -------------------------------------------------------------------------


def reference_inputs(dtype):
    x0, noise = hfill((3, 3, 8, 8), 4000), hfill((3, 3, 8, 8), 4001, 1.7)
    return x0.to(dtype), noise.to(dtype), torch.tensor([0.05, 0.5, 5.0], dtype=dtype)


def cases(of_scalings):
    data = load("denoiser_loss.json")["cases"]
    keys = "dtype", "sigma_data", "weighting", "loss_config", "scales"
    return [
        pytest.param(case, id="-".join(str(case[key]) for key in keys if key in case))
        for case in data
        if ("scalings" in case) == of_scalings
    ]


@pytest.mark.parametrize("case", cases(of_scalings=False))
def test_loss_matches_the_reference(case):
    """Its `simple` loss, the error of the noise that D implies, is our Eps weighting."""
    weighting = EpsWeight() if "loss_config" in case else REFERENCE_NAMES[case["weighting"]]
    x0, noise, sigma = reference_inputs(getattr(torch, case["dtype"]))
    model = denoiser(sigma_data=case["sigma_data"])
    loss = model.loss(x0, noise, sigma, Cond(), weighting, case.get("scales", 1))
    expected = torch.tensor(case["loss"], dtype=x0.dtype)
    torch.testing.assert_close(loss, expected, rtol=RTOL[case["dtype"]], atol=0)


@pytest.mark.parametrize("case", cases(of_scalings=True))
def test_coefficients_and_denoised_match_the_reference(case):
    dtype, rtol = getattr(torch, case["dtype"]), RTOL[case["dtype"]]
    x, _, sigma = reference_inputs(dtype)
    scales = EDM()(sigma, case["sigma_data"])
    of_network = scales.c_out.square()  # takes lambda to the weight on the network's own error
    actual = scales._asdict() | {
        "w_soft_min_snr": SoftMinSNR()(sigma, case["sigma_data"]) * of_network,
        "w_snr": EpsWeight()(sigma, case["sigma_data"]) * of_network,
    }
    for name, value in actual.items():
        expected = torch.tensor(case[name], dtype=dtype)
        torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
    denoised = denoiser(sigma_data=case["sigma_data"])(x, sigma, Cond())
    check_record(denoised, case["denoised"], atol=rtol)


def test_loss_and_gradients_of_a_network_match_the_reference():
    expected = load("denoiser_loss.json")["hdit_neighborhood3"]
    network = reference_model("neighborhood3")
    cond = Cond(torch.tensor([2, -1]), hfill((2, 9), 2001, 0.5))
    loss = denoiser(network).loss(
        hfill((2, 3, 16, 16), 2000, 1.5),
        hfill((2, 3, 16, 16), 4002, 1.7),
        torch.tensor([0.3, 7.0]),
        cond,
        SoftMinSNR(),
    )
    torch.testing.assert_close(loss, torch.tensor(expected["loss"]), atol=5e-5, rtol=0)
    loss.mean().backward()
    norms = {reference_name(name): p.grad.norm().item() for name, p in network.named_parameters()}
    wanted = expected["grad_l2_of_mean_loss"]
    assert norms.keys() == wanted.keys()
    for name, norm in norms.items():  # two float32 networks: 5e-5 of values near 1
        assert norm == pytest.approx(wanted[name], rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS[:6])
def test_losses_are_the_loss_and_the_error_of_what_is_denoised(parametrization, weighting):
    """In float64, where (D - x0)^2 may be computed as it is written; a variance adds its bound."""
    x0, noise, sigma = reference_inputs(torch.float64)

    def with_variance(x, c_noise, cond):
        return torch.cat([toy(x, c_noise, cond), x.sin()], 1)

    plain = denoiser(parametrization=parametrization)
    learned = denoiser(
        with_variance, parametrization, table=LinearSchedule(), learned_variance=True
    )
    for model in (plain, learned):
        loss, error = model.losses(x0, noise, sigma, Cond(), weighting, 3)
        expected = model.loss(x0, noise, sigma, Cond(), weighting, 3)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        denoised = model(x0 + per_image(sigma) * noise, sigma, Cond())
        expected = (denoised - x0).square().mean((1, 2, 3))
        torch.testing.assert_close(error, expected, rtol=1e-9, atol=0)


# ---- parametrizations ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    weighting=st.sampled_from(WEIGHTINGS),
    scales=st.integers(0, 3),
    sigma_data=st.floats(0.2, 2),
    log_sigma=st.lists(st.floats(-4.0, 4.5), min_size=3, max_size=3),
)
def test_loss_depends_on_the_denoised_alone(weighting, scales, sigma_data, log_sigma):
    """Networks that output what makes D equal have equal losses, and equal dLoss/dD."""
    sigma = torch.tensor(log_sigma, dtype=torch.float64).exp()
    x0, noise = hfill((3, 1, 4, 2), 1).double(), hfill((3, 1, 4, 2), 2, 1.7).double()
    x = x0 + per_image(sigma) * noise
    d = hfill((3, 1, 4, 2), 3).double().requires_grad_()
    expected = weighting(sigma, sigma_data) * mean_square(d - x0, scales)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), d)
    for parametrization in PARAMETRIZATIONS:
        c_skip, c_out, _ = map(per_image, parametrization(sigma, sigma_data))
        f = (d - c_skip * x) / c_out
        model = denoiser(lambda *_, f=f: f, parametrization, sigma_data=sigma_data)
        loss = model.loss(x0, noise, sigma, Cond(), weighting, scales)
        (gradient,) = torch.autograd.grad(loss.sum(), d)
        # F is 1/c_out times a difference of numbers near 1, or near sigma: 1e-9 has room.
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def edm_target(x0, noise, sigma, sd):
    """The rotation of the unit vectors x0/sd and noise by the angle atan(sigma/sd)."""
    angle = torch.atan(sigma / sd)
    return (
        angle.cos() * x0 / sd + angle.sin() * noise,
        angle.sin() * x0 / sd - angle.cos() * noise,
    )


def v_target(x0, noise, sigma, sd):
    """v = alpha noise - sigma x0 of Salimans & Ho, where alpha^2 + sigma^2 = 1, for x0/sd."""
    alpha = (1 + (sigma / sd) ** 2) ** -0.5
    sigma_vp = (1 - alpha**2).sqrt()
    return alpha * x0 / sd + sigma_vp * noise, alpha * noise - sigma_vp * x0 / sd


def eps_target(x0, noise, sigma, sd):
    alpha_bar = 1 / (1 + sigma**2)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, noise


def x0_target(x0, noise, sigma, sd):
    return (x0 + sigma * noise) / (sigma**2 + sd**2).sqrt(), x0


def flow_target(x0, noise, sigma, sd):
    time = sigma / (1 + sigma)
    return (1 - time) * x0 + time * noise, noise - x0


@pytest.mark.parametrize(
    ("parametrization", "of_paper"),
    [
        (EDM(), edm_target),
        (V(), v_target),
        (EpsVP(), eps_target),
        (X0(), x0_target),
        (Flow(), flow_target),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_network_that_outputs_its_target_denoises_exactly(parametrization, of_paper, sigma_data):
    """Its input and target are those of the paper, in the paper's own coordinates."""
    x0, noise = hfill((3, 3, 4, 4), 1).double(), hfill((3, 3, 4, 4), 2, 1.7).double()
    sigma = torch.tensor([0.02, 0.6, 120.0], dtype=torch.float64)
    expected, target = of_paper(x0, noise, per_image(sigma), sigma_data)

    def network(x, c_noise, cond):
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
        return target

    model = denoiser(network, parametrization, sigma_data=sigma_data)
    x = x0 + per_image(sigma) * noise
    # Two numbers near sigma = 120 cancel: 1e-12 is 50 times their rounding.
    torch.testing.assert_close(model(x, sigma, Cond()), x0, rtol=0, atol=1e-12)
    assert model.loss(x0, noise, sigma, Cond(), EDMWeight()).abs().max() < 1e-20


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_has_unit_variance_in_and_out(sigma):
    s = torch.tensor([sigma], dtype=torch.float64)
    c_skip, c_out, c_in = (c.item() for c in EDM()(s, 0.5))
    assert c_in**2 * (sigma**2 + 0.25) == pytest.approx(1, rel=1e-12)
    # variance of the target (x0 - c_skip x)/c_out for x0 of variance 0.25
    target = ((1 - c_skip) ** 2 * 0.25 + (c_skip * sigma) ** 2) / c_out**2
    assert target == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("parametrization", "low", "high"),
    [
        (EDM(), 0, math.inf),
        (V(), 0, math.inf),
        (X0(), 0, math.inf),
        (EpsVP(), 0.0100, 157.41),
        (Flow(), 0, 0.999 / (1 - 0.999)),
    ],
)
def test_sigma_range_is_where_the_parametrization_is_defined(parametrization, low, high):
    actual = parametrization.sigma_range(LinearSchedule())
    assert actual == (pytest.approx(low, rel=1e-4), pytest.approx(high, rel=1e-4))


def test_sigma_range_of_eps_vp_is_that_of_its_schedule():
    schedule = CosineSchedule(steps=50)
    assert EpsVP().sigma_range(schedule) == schedule.sigma_range() != LinearSchedule().sigma_range()


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS, ids=lambda p: p.kind)
def test_sampling_starts_from_sigma_max_and_eps_vp_from_unit_variance_of_its_input(parametrization):
    start = parametrization.start(3.0)
    c_in = EpsVP()(torch.tensor([3.0], dtype=torch.float64), 0.5).c_in.item()
    assert start == pytest.approx(1 / c_in if parametrization.kind == "eps_vp" else 3.0, rel=1e-12)


# ---- the call of the backbone --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "table", "formula"),
    [
        ("log_quarter", None, lambda s: s.log() / 4),
        ("atan", None, lambda s: torch.atan(s / 0.5) * 2 / torch.pi),
        ("flow_t", None, lambda s: s / (1 + s)),
        ("timestep", None, lambda s: 999 * torch.atan(s / 0.5) * 2 / torch.pi),
        ("timestep", LinearSchedule(), lambda s: LinearSchedule().t(s)),
        ("timestep", CosineSchedule(steps=112), lambda s: CosineSchedule(steps=112).t(s) * 9),
    ],
)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS, ids=lambda p: p.kind)
def test_backbone_gets_the_c_noise_and_the_scaled_input(parametrization, label, table, formula):
    seen = []

    def network(x, c_noise, cond):
        seen.append((x, c_noise))
        return x

    x, sigma = hfill((2, 1, 4, 4), 1), torch.tensor([0.3, 20.0])
    denoiser(network, parametrization, label, table=table)(x, sigma, Cond())
    ((scaled, c_noise),) = seen
    torch.testing.assert_close(c_noise, formula(sigma.double()).float(), rtol=1e-6, atol=0)
    norm = {
        "eps_vp": (sigma**2 + 1).sqrt(),
        "flow": sigma + 1,
    }.get(parametrization.kind, (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(scaled, x / per_image(norm), rtol=1e-6, atol=1e-7)


def test_timestep_label_is_the_index_in_the_table():
    """0..999, and as many parts of it as a shorter table has steps, whatever the dtype."""
    seen = []
    for table, t in ((LinearSchedule(), [0, 1, 500, 999]), (LinearSchedule(steps=100), [0, 99])):
        model = denoiser(lambda x, c, _: seen.append(c) or x, EpsVP(), "timestep", table=table)
        model(torch.zeros(len(t), 1, 1, 1), table.sigmas()[t], Cond())
    assert [c.tolist() for c in seen] == [[0, 1, 500, 999], [0, 999]]


def test_autocast_wraps_the_backbone_alone():
    seen = []

    def network(x, c_noise, cond):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype, c_noise.dtype))
        return x.bfloat16()

    model = denoiser(network, autocast=torch.bfloat16)
    out = model(hfill((1, 1, 4, 4), 1), torch.tensor([1.0]), Cond())
    loss = model.loss(
        hfill((1, 1, 4, 4), 1), hfill((1, 1, 4, 4), 2), torch.tensor([1.0]), Cond(), EpsWeight()
    )
    assert seen == [(True, torch.float32, torch.float32)] * 2
    assert out.dtype == loss.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_loss_is_accurate_at_tiny_sigma_in_float32():
    """The target cancels to 1e-3 of its parts there: float32 must still give five digits."""
    x0, noise = hfill((1, 3, 8, 8), 4000), hfill((1, 3, 8, 8), 4001, 1.7)
    sigma = torch.tensor([1e-3])
    losses = [
        denoiser().loss(x0.to(t), noise.to(t), sigma.to(t), Cond(), SoftMinSNR()).double()
        for t in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


# ---- learned variance ----------------------------------------------------------------------------


def toy_with_variance(x, c_noise, cond):
    return torch.cat([toy(x, c_noise, cond), torch.sin(x) + cond.vector[:, :, None, None]], dim=1)


def test_learned_variance_is_the_second_half_of_the_channels():
    x, sigma = hfill((2, 3, 4, 4), 1), torch.tensor([0.3, 7.0])
    cond = Cond(vector=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
    model = denoiser(toy_with_variance, table=LinearSchedule(), learned_variance=True)
    d, v = model.moments(x, sigma, cond)
    assert torch.equal(d, denoiser()(x, sigma, cond))
    assert torch.equal(d, model(x, sigma, cond))
    expected = torch.sin(x / per_image(sigma**2 + 0.25).sqrt()) + cond.vector[:, :, None, None]
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_bound_denoiser_has_moments_only_where_the_variance_is_learned(learned):
    x, sigma = hfill((2, 3, 4, 4), 1), torch.tensor([0.3, 7.0])
    cond = Cond(vector=torch.ones(2, 3))
    model = denoiser(
        toy_with_variance if learned else toy, table=LinearSchedule(), learned_variance=learned
    )
    bound = model.bind(cond)
    assert isinstance(bound, DenoiseWithVariance) == learned
    assert torch.equal(bound(x, sigma), model(x, sigma, cond))
    if learned:
        for actual, expected in zip(
            bound.moments(x, sigma), model.moments(x, sigma, cond), strict=True
        ):
            assert torch.equal(actual, expected)
    else:
        assert model.moments(x, sigma, cond)[1] is None


def test_learned_variance_needs_a_table():
    with pytest.raises(AssertionError, match="table"):
        denoiser(learned_variance=True)


# ---- conditions ----------------------------------------------------------------------------------


def test_cond_drop_and_null_leave_augmentation():
    cond = Cond(torch.tensor([1, 2]), torch.ones(2, 9), torch.ones(2, 4))
    dropped = cond.drop(torch.tensor([True, False]))
    assert dropped.labels.tolist() == [-1, 2]
    assert dropped.vector.sum(-1).tolist() == [0, 4]
    assert torch.equal(dropped.aug, cond.aug)
    null = cond.null()
    assert null.labels.tolist() == [-1, -1]
    assert null.vector.abs().sum() == 0
    assert torch.equal(null.aug, cond.aug)
    assert cond.labels.tolist() == [1, 2]
    assert Cond().null() == Cond()
