import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import hfill

from hdit.diffusion.beta_schedules import LinearSchedule
from hdit.diffusion.denoiser import Denoiser
from hdit.diffusion.guidance import APG, Batching, cfg
from hdit.diffusion.parametrization import EDM, EpsVP
from hdit.protocols import Cond, DenoiseWithVariance

SHAPE = (3, 4, 3, 5)
LABELS = Cond(labels=torch.tensor([4, 2, 7]))


def x():
    return hfill(SHAPE, 1, 1.5)


def sigmas(*values):
    return torch.tensor(values or (0.5, 2.0, 5.0))


class Counted:
    """A denoiser that is not linear in x; remembers the sigmas it was asked for."""

    def __init__(self, a):
        self.a, self.calls = a, []

    def __call__(self, x, sigma):
        self.calls.append(sigma.tolist())
        return torch.sin(self.a * x) * self.a / (1 + sigma[:, None, None, None])


class WithMoments(Counted):
    def moments(self, x, sigma):
        return self(x, sigma), torch.cos(self.a * x)


class Network:
    """A backbone that depends on the label, and remembers how many images it was asked for."""

    def __init__(self, most=math.inf, learned=False, error=torch.OutOfMemoryError):
        self.most, self.learned, self.error, self.calls = most, learned, error, []

    def __call__(self, x, c_noise, cond):
        self.calls.append(len(x))
        if len(x) > self.most:
            raise self.error("Tried to allocate 2 GiB.\nThe rest of the message.")
        label = cond.labels.to(x.dtype)[:, None, None, None]
        f = torch.sin(x * (1 + label / 10)) + c_noise[:, None, None, None]
        return torch.cat([f, torch.cos(x + label)], dim=1) if self.learned else f

    def denoiser(self):
        table = LinearSchedule() if self.learned else None
        return Denoiser(self, EDM(), "log_quarter", 0.5, table, self.learned)


def test_cfg_extrapolates_from_the_unconditional_denoiser():
    x, sigma = hfill((2, 1, 2, 2), 1), torch.tensor([1.0, 2.0])
    guided = cfg(lambda x, s: 3 * x, lambda x, s: x, scale=2.5)
    torch.testing.assert_close(guided(x, sigma), (1 + 2.5 * 2) * x)


def test_cfg_at_scale_one_is_the_conditional_denoiser():
    conditional = lambda x, s: 3 * x  # noqa: E731
    assert cfg(conditional, lambda x, s: 1 / 0, scale=1) is conditional


def test_cfg_at_scale_zero_is_the_unconditional_denoiser():
    cond, uncond = Counted(2), Counted(0.7)
    assert torch.equal(cfg(cond, uncond, 0)(x(), sigmas()), uncond(x(), sigmas()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cfg_guides_inside_its_interval_without_the_low_end(dtype):
    """A batch that mixes levels is guided image by image. The ends are no binary fractions."""
    low, high = 0.1, 0.7
    at = torch.tensor([0.05, low, 0.1001, 0.3, high, 0.7001], dtype=dtype)
    x = hfill((6, 1, 2, 2), 1).to(dtype)
    cond, uncond = Counted(2), Counted(0.7)
    actual = cfg(cond, uncond, 3, interval=(low, high))(x, at)
    inside = torch.tensor([False, False, True, True, True, False])
    assert torch.equal(actual[inside], cfg(cond, uncond, 3)(x, at)[inside])
    assert torch.equal(actual[~inside], cond(x, at)[~inside])


@pytest.mark.parametrize("level", [0.1, 5.0])
@pytest.mark.parametrize("kind", [Counted, WithMoments])
def test_cfg_evaluates_cond_alone_where_no_image_is_in_its_interval(kind, level):
    cond, uncond = kind(2), kind(0.7)
    guided = cfg(cond, uncond, 3, interval=(0.1, 2.0))
    out = guided(x(), sigmas(level, level, level))
    assert len(cond.calls) == 1
    assert uncond.calls == []
    assert torch.equal(out, cond(x(), sigmas(level, level, level)))


def test_cfg_outside_its_interval_calls_a_network_once_with_the_batch_it_has():
    network = Network()
    denoiser = network.denoiser()
    guided = cfg(denoiser.bind(LABELS), denoiser.bind(LABELS.null()), 3, interval=(0.0, 0.2))
    guided(x(), sigmas())
    assert network.calls == [3]


def test_cfg_of_channels_takes_the_others_from_cond():
    cond, uncond = Counted(2), Counted(0.7)
    actual = cfg(cond, uncond, 4, channels=3)(x(), sigmas())
    assert torch.equal(actual[:, :3], cfg(cond, uncond, 4)(x(), sigmas())[:, :3])
    assert torch.equal(actual[:, 3:], cond(x(), sigmas())[:, 3:])


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(-2, 8), rescale=st.floats(0, 1), channels=st.sampled_from([None, 3]))
def test_cfg_rescale_is_that_of_lin_et_al(scale, rescale, channels):
    """phi x_cfg std(x_pos)/std(x_cfg) + (1 - phi) x_cfg, image by image, over what is guided."""
    cond, uncond = Counted(2), Counted(0.7)
    guided = cfg(cond, uncond, scale, rescale=rescale, channels=channels)
    actual = guided(x().double(), sigmas().double())
    positive, negative = cond(x().double(), sigmas()), uncond(x().double(), sigmas())
    for i in range(SHAPE[0]):
        pos = positive[i, :channels]
        x_cfg = negative[i, :channels] + scale * (pos - negative[i, :channels])
        expected = rescale * (x_cfg * (pos.std() / x_cfg.std())) + (1 - rescale) * x_cfg
        torch.testing.assert_close(actual[i, :channels], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("contrast", [1e-6, 0.0])
def test_cfg_rescale_of_an_image_almost_without_contrast_is_as_of_any(contrast):
    guided = cfg(lambda x, _: 2 * x, lambda x, _: x.roll(1, -1), 4, rescale=0.7)
    expected = contrast * guided(x().double(), sigmas().double())
    actual = guided(contrast * x().double(), sigmas().double())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_cfg_rescale_leaves_images_outside_the_interval_alone():
    cond, uncond = Counted(2), Counted(0.7)
    actual = cfg(cond, uncond, 4, interval=(1.0, 3.0), rescale=0.7)(x(), sigmas())
    rescaled, plain = cfg(cond, uncond, 4, rescale=0.7)(x(), sigmas()), cond(x(), sigmas())
    assert torch.equal(actual, torch.stack([plain[0], rescaled[1], plain[2]]))


def test_cfg_rescale_keeps_the_channels_that_are_not_guided():
    cond, uncond = Counted(2), Counted(0.7)
    actual = cfg(cond, uncond, 4, channels=3, rescale=0.7)(x(), sigmas())
    assert torch.equal(actual[:, 3:], cond(x(), sigmas())[:, 3:])


# ---- as papers define it -------------------------------------------------------------------------


def test_cfg_is_edm2s_interpolation_between_reference_and_network():
    """D_ref.lerp(D, guidance) (Karras et al., 2024): 1 is none, and 2 doubles the difference."""
    net, reference = Counted(2), Counted(0.7)
    at = sigmas().double()
    expected = torch.lerp(reference(x().double(), at), net(x().double(), at), 1.85)
    actual = cfg(net, reference, 1.85)(x().double(), at)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_cfg_of_three_channels_is_dits_of_the_noise():
    """forward_with_cfg of Peebles & Xie (2023) guides eps of the first 3 channels of 4 alone."""

    class Eps:
        def __call__(self, x, c_noise, cond):
            label = cond.labels.to(x.dtype)[:, None, None, None]
            return torch.sin((1 + label / 10) * x)

    denoiser = Denoiser(Eps(), EpsVP(), "timestep", 1.0, LinearSchedule())
    noisy, at = x().double(), sigmas().double()
    guided = cfg(denoiser.bind(LABELS), denoiser.bind(LABELS.null()), 1.5, channels=3)
    s = at[:, None, None, None]
    x_vp = noisy / torch.sqrt(1 + s**2)
    cond, uncond = (Eps()(x_vp, None, c) for c in (LABELS, LABELS.null()))
    eps = torch.cat([(uncond + 1.5 * (cond - uncond))[:, :3], cond[:, 3:]], dim=1)
    torch.testing.assert_close(guided(noisy, at), noisy - s * eps, rtol=1e-12, atol=1e-12)


def apg_by_hand(conds, unconds, scale, eta, r, beta):
    """The guided D after the last of some evaluations, of one image as a vector."""
    average = torch.zeros_like(conds[0])
    for d_c, d_u in zip(conds, unconds, strict=True):
        average = (d_c - d_u) + beta * average
        update = average * min(1.0, r / average.norm().item())
        unit = d_c / d_c.norm()
        parallel = torch.dot(update, unit) * unit
        result = d_c + (scale - 1) * (update - parallel + eta * parallel)
    return result


@settings(max_examples=25, deadline=None)
@given(
    scale=st.floats(0, 20),
    eta=st.floats(0, 1),
    r=st.floats(0.1, 50),
    beta=st.floats(-0.9, 0.9),
    channels=st.sampled_from([None, 3]),
)
def test_apg_is_that_of_sadat_et_al_over_the_evaluations_of_a_sample(scale, eta, r, beta, channels):
    cond, uncond = Counted(2), Counted(0.7)
    apg = APG(eta=eta, norm_threshold=r, momentum=beta)
    guided = cfg(cond, uncond, scale, apg=apg, channels=channels)
    levels = [sigmas(s, s, s).double() for s in (5.0, 2.0, 0.5)]
    states = [(1 + s[0]) * x().double() for s in levels]
    for noisy, level in zip(states, levels, strict=True):
        actual = guided(noisy, level)
    for i in range(SHAPE[0]):
        conds, unconds = (
            [f(a, b)[i, :channels].flatten() for a, b in zip(states, levels, strict=True)]
            for f in (cond, uncond)
        )
        expected = conds[-1] if scale == 1 else apg_by_hand(conds, unconds, scale, eta, r, beta)
        found = actual[i, :channels].flatten()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    if channels:
        assert torch.equal(actual[:, 3:], cond(states[-1], levels[-1])[:, 3:])


def test_apg_with_all_of_the_parallel_part_and_no_more_is_cfg():
    cond, uncond = Counted(2), Counted(0.7)
    apg = APG(eta=1, momentum=0)
    actual = cfg(cond, uncond, 4, apg=apg)(x().double(), sigmas().double())
    expected = cfg(cond, uncond, 4)(x().double(), sigmas().double())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_apg_without_the_parallel_part_adds_nothing_along_cond():
    """So that the norm grows by the added part alone, as in a right triangle."""
    cond, uncond = Counted(2), Counted(0.7)
    actual = cfg(cond, uncond, 9, apg=APG(norm_threshold=0.3))(x().double(), sigmas().double())
    d = cond(x().double(), sigmas().double())
    added = (actual - d).flatten(1)
    assert ((added * d.flatten(1)).sum(1).abs() < 1e-12).all()
    assert (added.norm(dim=1) <= 8 * 0.3 + 1e-12).all()
    assert added.norm(dim=1).min() > 0.1


def test_apg_averages_an_image_over_what_is_guided_of_it():
    """The second evaluation is outside the interval for the first image alone."""
    cond, uncond, apg = Counted(2), Counted(0.7), APG(momentum=0.5)
    guided = cfg(cond, uncond, 3, apg=apg, interval=(1.0, 9.0))
    levels = [sigmas(s, t, t).double() for s, t in ((5.0, 5.0), (0.5, 4.0), (2.0, 2.0))]
    for level in levels:
        actual = guided(x().double(), level)
    for i, seen in enumerate(([0, 2], [0, 1, 2])):
        conds, unconds = (
            [f(x().double(), levels[k])[i].flatten() for k in seen] for f in (cond, uncond)
        )
        expected = apg_by_hand(conds, unconds, 3, 0, math.inf, 0.5)
        torch.testing.assert_close(actual[i].flatten(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cond", [lambda x, s: 0 * x, lambda x, s: x])
def test_apg_of_denoisers_that_agree_or_see_nothing_is_finite(cond):
    guided = cfg(cond, cond, 5, apg=APG(norm_threshold=1))
    assert torch.equal(guided(x(), sigmas()), cond(x(), sigmas()))


# ---- one call or two -----------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
def test_cfg_of_one_network_is_one_call_of_double_batch_or_two_calls(learned):
    outs, calls = [], []
    for batched in (True, False):
        network = Network(learned=learned)
        denoiser = network.denoiser()
        guided = cfg(
            denoiser.bind(LABELS), denoiser.bind(LABELS.null()), 3, batching=Batching(batched)
        )
        outs.append(guided.moments(x(), sigmas()) if learned else (guided(x(), sigmas()),))
        calls.append(network.calls)
    assert calls == [[6], [3, 3]]
    for one, two in zip(*outs, strict=True):
        assert one.shape == SHAPE
        # The same sums, of vectors of other lengths: float32 rounding.
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    cond, uncond = (denoiser(x(), sigmas(), c) for c in (LABELS, LABELS.null()))
    torch.testing.assert_close(outs[0][0], uncond + 3 * (cond - uncond), rtol=1e-5, atol=1e-6)


def test_cfg_of_two_networks_is_a_call_of_each():
    strong, weak = Network(), Network()
    cfg(strong.denoiser().bind(LABELS), weak.denoiser().bind(LABELS), 3)(x(), sigmas())
    assert (strong.calls, weak.calls) == ([3], [3])


@pytest.mark.parametrize("learned", [False, True])
def test_cfg_without_memory_for_a_double_batch_goes_on_with_two_calls(learned, caplog):
    network = Network(most=3, learned=learned)
    denoiser = network.denoiser()
    cond, uncond = denoiser.bind(LABELS), denoiser.bind(LABELS.null())
    guided = cfg(cond, uncond, 3)
    expected = cfg(cond, uncond, 3, batching=Batching(False))(x(), sigmas())
    network.calls.clear()
    first, second = guided(x(), sigmas()), guided(x(), sigmas())
    assert network.calls == [6, 3, 3, 3, 3]
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = caplog.records[0].getMessage()
    assert "two calls of 3 images" in message
    assert "Tried to allocate 2 GiB." in message


def test_cfg_does_not_hide_that_memory_lacks_for_a_single_batch():
    denoiser = Network(most=2).denoiser()
    guided = cfg(denoiser.bind(LABELS), denoiser.bind(LABELS.null()), 3)
    with pytest.raises(torch.OutOfMemoryError):
        guided(x(), sigmas())


def test_cfg_passes_other_errors_of_a_double_batch_on():
    network = Network(most=3, error=RuntimeError)
    denoiser = network.denoiser()
    guided = cfg(denoiser.bind(LABELS), denoiser.bind(LABELS.null()), 3)
    with pytest.raises(RuntimeError, match="Tried to allocate"):
        guided(x(), sigmas())
    assert network.calls == [6]


# ---- compositions --------------------------------------------------------------------------------


def test_cfg_guided_by_a_weaker_guided_model_is_both_formulas():
    """Autoguidance of a guided model by a weaker one; the inner interval keeps its meaning."""
    a, b, c = Counted(2), Counted(0.7), Counted(1.3)
    inner = cfg(a, b, 3, interval=(1.0, 3.0))
    actual = cfg(inner, c, 1.5)(x(), sigmas())
    da, db, dc = (d(x(), sigmas()) for d in (a, b, c))
    guided = torch.where(
        torch.tensor([False, True, False])[:, None, None, None], 3 * da - 2 * db, da
    )
    torch.testing.assert_close(actual, 1.5 * guided - 0.5 * dc, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        cfg(c, inner, 1.5)(x(), sigmas()), 1.5 * dc - 0.5 * guided, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("uncond", [Counted(0.7), WithMoments(0.7)], ids=["without", "with"])
@pytest.mark.parametrize("level", [2.0, 20.0], ids=["inside", "outside"])
def test_cfg_keeps_the_learned_variance_of_cond(uncond, level):
    cond = WithMoments(2)
    guided = cfg(cfg(cond, uncond, 3, interval=(0.0, 9.0)), WithMoments(1.3), 1.5)
    assert isinstance(guided, DenoiseWithVariance)
    at = sigmas(level, level, level)
    d, v = guided.moments(x(), at)
    assert torch.equal(v, torch.cos(2 * x()))
    assert torch.equal(d, guided(x(), at))


def test_cfg_of_a_denoiser_without_variance_has_none():
    guided = cfg(Counted(2), WithMoments(0.7), 3)
    assert not isinstance(guided, DenoiseWithVariance)
    torch.testing.assert_close(
        guided(x(), sigmas()), cfg(Counted(2), Counted(0.7), 3)(x(), sigmas())
    )


def test_cond_cat_appends_the_images_of_the_other():
    first = Cond(torch.tensor([1, 2]), torch.ones(2, 9), torch.ones(2, 4))
    both = first.cat(first.null())
    assert both.labels.tolist() == [1, 2, -1, -1]
    assert both.aug.shape == (4, 9)
    assert both.vector.sum(1).tolist() == [4, 4, 0, 0]
    assert Cond().cat(Cond()) == Cond()


@pytest.mark.parametrize("other", [Cond(), Cond(LABELS.labels, vector=torch.ones(3, 2))])
def test_cond_cat_refuses_other_parts(other):
    with pytest.raises(AssertionError, match="parts"):
        LABELS.cat(other)
