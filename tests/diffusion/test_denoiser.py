import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import hfill, load
from models.test_hdit import reference_model, reference_name

from hdit.diffusion.denoiser import Denoiser
from hdit.diffusion.guidance import cfg
from hdit.diffusion.parametrization import EDM, EpsVP
from hdit.diffusion.vp import LinearSchedule
from hdit.diffusion.weighting import (
    X0,
    EDMWeight,
    Eps,
    Flow,
    MinSNR,
    Sigmoid,
    SoftMinSNR,
    V,
)
from hdit.protocols import Cond

REFERENCE_NAMES = {"karras": EDMWeight(), "soft-min-snr": SoftMinSNR(), "snr": Eps()}
WEIGHTINGS = [Eps(), EDMWeight(), V(), X0(), MinSNR(), SoftMinSNR(gamma=3), Sigmoid(bias=1), Flow()]


def toy(x, c_noise, cond):
    """The vectors' F(x, sigma) = 0.7 tanh(x) + 0.05 ln(sigma), with c_noise = ln(sigma)/4."""
    return 0.7 * x.tanh() + 0.2 * c_noise[:, None, None, None]


def denoiser(
    backbone=toy, parametrization=None, label="log_quarter", sigma_data=0.5, autocast=None
):
    return Denoiser(
        backbone, parametrization or EDM(), label, sigma_data, LinearSchedule(), autocast
    )


def loss_cases():
    data = load("denoiser_loss.json")["cases"]
    plain = [c for c in data if c.get("scales") == 1 and c["weighting"] in REFERENCE_NAMES]
    return [pytest.param(c, id=f"{c['dtype']}-{c['sigma_data']}-{c['weighting']}") for c in plain]


@pytest.mark.parametrize("case", loss_cases())
def test_loss_matches_the_reference(case):
    dtype = getattr(torch, case["dtype"])
    x0, noise = hfill((3, 3, 8, 8), 4000).to(dtype), hfill((3, 3, 8, 8), 4001, 1.7).to(dtype)
    sigma = torch.tensor([0.05, 0.5, 5.0], dtype=dtype)
    model = denoiser(sigma_data=case["sigma_data"])
    loss = model.loss(x0, noise, sigma, Cond(), REFERENCE_NAMES[case["weighting"]])
    rtol = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(loss, torch.tensor(case["loss"], dtype=dtype), rtol=rtol, atol=0)


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


@settings(max_examples=40, deadline=None)
@given(
    weighting=st.sampled_from(WEIGHTINGS),
    log_sigma=st.lists(st.floats(-4.0, 4.5), min_size=3, max_size=3),
)
def test_weighting_gives_the_same_x0_gradient_under_edm_and_eps_vp(weighting, log_sigma):
    """A network that outputs what makes D equal has the same loss, and the same dLoss/dD."""
    sigma = torch.tensor(log_sigma, dtype=torch.float64).exp()
    x0, noise = hfill((3, 1, 4, 4), 1).double(), hfill((3, 1, 4, 4), 2, 1.7).double()
    results = []
    for parametrization in (EDM(), EpsVP()):
        c_skip, c_out, _ = (c[:, None, None, None] for c in parametrization(sigma, 0.5))
        x = x0 + sigma[:, None, None, None] * noise
        d = hfill((3, 1, 4, 4), 3).double().requires_grad_()
        model = denoiser(
            lambda *_, d=d, s=c_skip, o=c_out, x=x: (d - s * x) / o,
            parametrization,
            "log_quarter",
        )
        loss = model.loss(x0, noise, sigma, Cond(), weighting)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), d)))
    (loss, gradient), (loss_vp, gradient_vp) = results
    torch.testing.assert_close(loss, loss_vp, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, gradient_vp, rtol=1e-9, atol=1e-12)
    weight = weighting(sigma, 0.5)
    torch.testing.assert_close(
        loss, weight * (hfill((3, 1, 4, 4), 3) - x0).square().mean((1, 2, 3)), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    ("weighting", "formula"),
    [
        (Eps(), lambda s, sd: 1 / s**2),
        (EDMWeight(), lambda s, sd: (s**2 + sd**2) / (s * sd) ** 2),
        (V(), lambda s, sd: (1 + s**2) / s**2),
        (X0(), lambda s, sd: 1.0),
        (MinSNR(gamma=4), lambda s, sd: min(1 / s**2, 4)),
        (SoftMinSNR(), lambda s, sd: 1 / (s**2 + sd**2)),
        (SoftMinSNR(gamma=2), lambda s, sd: (1 / s**2) * 2 / (1 / s**2 + 2)),
        (Sigmoid(bias=2), lambda s, sd: (1 / s**2) / (1 + (1 / s**2) / torch.e**2)),
        (Flow(), lambda s, sd: ((1 + s) / s) ** 2),
    ],
)
def test_weighting_is_the_formula_of_its_paper(weighting, formula):
    for s in (0.01, 0.4, 3.0, 90.0):
        actual = weighting(torch.tensor([s], dtype=torch.float64), 0.6).item()
        assert actual == pytest.approx(formula(s, 0.6), rel=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_has_unit_variance_in_and_out(sigma):
    s = torch.tensor([sigma], dtype=torch.float64)
    c_skip, c_out, c_in = (c.item() for c in EDM()(s, 0.5))
    assert c_in**2 * (sigma**2 + 0.25) == pytest.approx(1, rel=1e-12)
    # variance of the target (x0 - c_skip x)/c_out for x0 of variance 0.25
    target = ((1 - c_skip) ** 2 * 0.25 + (c_skip * sigma) ** 2) / c_out**2
    assert target == pytest.approx(1, rel=1e-9)


def test_eps_vp_predicts_the_noise():
    """A network that returns the noise itself denoises perfectly, and has no loss."""
    x0, noise = hfill((2, 3, 4, 4), 1).double(), hfill((2, 3, 4, 4), 2).double()
    sigma = torch.tensor([0.02, 120.0], dtype=torch.float64)
    model = denoiser(lambda *_: noise, EpsVP(), "timestep")
    x = x0 + sigma[:, None, None, None] * noise
    torch.testing.assert_close(model(x, sigma, Cond()), x0, atol=1e-12, rtol=1e-12)
    assert model.loss(x0, noise, sigma, Cond(), Eps()).abs().max() < 1e-20


@pytest.mark.parametrize(
    ("label", "parametrization", "formula"),
    [
        ("log_quarter", EDM(), lambda s: s.log() / 4),
        ("atan", EDM(), lambda s: torch.atan(s / 0.5) * 2 / torch.pi),
        ("flow_t", EDM(), lambda s: s / (1 + s)),
        ("timestep", EDM(), lambda s: 999 * torch.atan(s / 0.5) * 2 / torch.pi),
        ("timestep", EpsVP(), lambda s: LinearSchedule().t(s)),
    ],
)
def test_backbone_gets_the_noise_label_and_the_scaled_input(label, parametrization, formula):
    seen = []

    def network(x, c_noise, cond):
        seen.append((x, c_noise))
        return x

    x, sigma = hfill((2, 1, 4, 4), 1), torch.tensor([0.3, 20.0])
    denoiser(network, parametrization, label)(x, sigma, Cond())
    (scaled, c_noise) = seen[0]
    torch.testing.assert_close(c_noise, formula(sigma.double()).float(), rtol=1e-6, atol=0)
    norm = {"edm": 0.25, "eps_vp": 1.0}[parametrization.kind]
    expected = x / (sigma**2 + norm).sqrt()[:, None, None, None]
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=1e-7)


def test_autocast_wraps_the_backbone_alone():
    seen = []

    def network(x, c_noise, cond):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype, c_noise.dtype))
        return x.bfloat16()

    model = denoiser(network, autocast=torch.bfloat16)
    out = model(hfill((1, 1, 4, 4), 1), torch.tensor([1.0]), Cond())
    assert seen == [(True, torch.float32, torch.float32)]
    assert out.dtype == torch.float32
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


def test_cfg_extrapolates_from_the_unconditional_denoiser():
    x, sigma = hfill((2, 1, 2, 2), 1), torch.tensor([1.0, 2.0])
    guided = cfg(lambda x, s: 3 * x, lambda x, s: x, scale=2.5)
    torch.testing.assert_close(guided(x, sigma), (1 + 2.5 * 2) * x)


def test_cfg_at_scale_one_is_the_conditional_denoiser():
    conditional = lambda x, s: 3 * x  # noqa: E731
    assert cfg(conditional, lambda x, s: 1 / 0, scale=1) is conditional


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
