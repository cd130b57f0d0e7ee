"""Whole images from seeds, with backbones whose images are known in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from hdit import config
from hdit.config.schema import RunConfig
from hdit.diffusion.beta_schedules import CosineSchedule, LinearSchedule
from hdit.diffusion.brownian import BrownianPath
from hdit.diffusion.samplers import SamplerSpec
from hdit.diffusion.sigmas import LinearT
from hdit.errors import SolverError, UserError
from hdit.protocols import NULL_LABEL, Cond
from hdit.sampling.sample import GuideModel, Samples, check_null_class, sample
from hdit.tensors import NotFiniteError

CPU = torch.device("cpu")
CLASSES = 10


class Normal(nn.Module):
    """The ideal network of data N(mean of its class, sigma_data^2); `null` is that of no class.

    D = c_skip x + (1 - c_skip) mean, and F what EDM makes of it, from c_noise = ln(sigma)/4. Any
    guidance of such models is such a model: their D is affine in the mean.
    """

    def __init__(self, slope: float = 0.1, null: float = -0.2, sign: int = 1):
        super().__init__()
        self.slope, self.null, self.sign = slope, null, sign
        self.inputs: list[Tensor] = []

    def mean(self, labels: Tensor) -> Tensor:
        return torch.where(labels < 0, self.null, self.slope * (labels - 4.0))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        assert not self.training
        self.inputs.append(x.clone())
        sigma, sd = (4 * c_noise).exp(), 0.5
        f = self.sign * self.mean(cond.labels) * sigma / (sd * (sigma**2 + sd**2).sqrt())
        return f[:, None, None, None].expand_as(x)

    @property
    def seen(self) -> int:
        """Images that it was evaluated on."""
        return sum(len(x) for x in self.inputs)


class Shifted(Normal):
    """One whose means are what `means` makes of labels."""

    def __init__(self, means):
        super().__init__()
        self.mean = means


@pytest.fixture
def settings(tiny):
    """(overrides) -> the tiny config, for 8 x 8 images of one channel and 10 classes."""
    return lambda *overrides: config.load(tiny, overrides)


def images(
    network: nn.Module,
    run: RunConfig,
    seeds: list[int] | None = None,
    labels: list[int] | None = None,
    **options,
) -> Tensor:
    """(n c h w) as int, of seeds 0, 1, 2 and their classes if not told."""
    seeds = [0, 1, 2] if seeds is None else seeds
    labels = [seed % CLASSES for seed in seeds] if labels is None else labels
    parts = sample(network, run, run.data_shape(CLASSES), seeds, labels, CPU, **options)
    return torch.cat([part.images for part in parts]).int()


def evaluations(network: Normal, run: RunConfig, **options) -> int:
    """Of each of 3 images, in batches of 2 and 1; the network counts them too."""
    others = [model.backbone for model in options.values()]
    parts = list(
        sample(network, run, run.data_shape(CLASSES), [0, 1, 2], [3, 4, 5], CPU, **options)
    )
    (count,) = {part.evaluations for part in parts}
    assert sum(model.seen for model in (network, *others)) == 3 * count
    return count


GUIDANCE = "sampling.guidance"
SOME = ["sampling.steps=6", "sampling.batch_size=2"]
KINDS = {  # network evaluations of n steps, the last of them to 0
    "euler": lambda n: n,
    "heun": lambda n: 2 * n - 1,
    "dpm2": lambda n: 2 * n - 1,
    "lms": lambda n: n,
    "euler_ancestral": lambda n: n,
    "dpm2_ancestral": lambda n: 2 * n - 1,
    "ddim": lambda n: n,
    "ddpm": lambda n: n,
    "dpmpp_2s_ancestral": lambda n: 2 * n - 1,
    "dpmpp_sde": lambda n: 2 * n - 1,
    "dpmpp_2m": lambda n: n,
    "dpmpp_2m_sde": lambda n: n,
    "dpmpp_3m_sde": lambda n: n,
    "unipc": lambda n: n,
    "dpm_fast": lambda n: n,
}


def test_every_sampler_is_sampled_from():
    """dpm_adaptive chooses its evaluations itself."""
    kinds = SamplerSpec.members.keys()
    assert kinds == {*KINDS, "dpm_adaptive"}


def by(kind: str) -> str:
    return f"sampling.sampler={{kind='{kind}'}}"


# ---- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sample_that_is_not_finite_is_refused_with_its_seeds_alone(settings, value):
    """The network is ruined for class 7, which seeds 5 and 8 ask for."""

    class Ruined(Normal):
        def forward(self, x, c_noise, cond):
            f = super().forward(x, c_noise, cond).clone()
            f[cond.labels == 7, 0, 3, 2] = value
            return f

    words = "^sample of seed 5, 8: values that are not finite: the model is ruined"
    with pytest.raises(NotFiniteError, match=words):
        images(Ruined(), settings(), [3, 5, 6, 8], [1, 7, 2, 7])
    with pytest.raises(NotFiniteError, match=r"^sample of seed 0, 1, .*7 and 12 more: values"):
        images(Ruined(), settings(), list(range(20)), [7] * 20)
    with pytest.raises(SolverError, match=r"^the solver came to a stop.*\(sample of seed 5\)$"):
        images(Ruined(), settings(by("dpm_adaptive")), [5], [7])


def test_sample_of_too_large_a_guidance_names_each_scale(settings):
    run = settings(f"{GUIDANCE}.scale=1000")
    with pytest.raises(NotFiniteError, match=r"seed 4: .*sampling\.guidance\.scale = 1000 may be"):
        images(Normal(slope=1e37), run, [4], [9])
    guide = GuideModel(Normal(slope=1e37), settings(), 1000)
    with pytest.raises(NotFiniteError, match="--guide-scale = 1000 may be too large"):
        images(Normal(), settings(), [4], [9], guide=guide)


def test_sample_warns_where_every_pixel_of_every_image_is_at_an_end(settings, caplog):
    images(Normal(slope=1e6), settings(), [0, 1], [0, 9])
    (record,) = caplog.records
    assert "every pixel of all 2 images is 0 or 255: the model is ruined" in record.message
    caplog.clear()
    images(Normal(slope=1e6), settings("sampling.batch_size=1"), [0, 1], [0, 4])
    assert not caplog.records, "the second has the mean 0"


def test_sample_command_of_a_ruined_model_leaves_nothing(ruined, hdit, tmp_path):
    status, _, err = hdit("sample", ruined, "--out", tmp_path / "out", "-n", 3)
    assert status == 1
    assert "error: sample of seed 0, 1, 2: values that are not finite" in err
    assert not (tmp_path / "out").exists()


def test_sample_gives_uint8_images_in_batches_and_tells_its_steps(settings):
    steps: list[None] = []
    run = settings("sampling.batch_size=4", "sampling.steps=5")
    parts = list(
        sample(
            Normal().train(),
            run,
            run.data_shape(CLASSES),
            list(range(10)),
            list(range(10)),
            CPU,
            on_step=lambda: steps.append(None),
        )
    )
    assert all(isinstance(part, Samples) for part in parts)
    assert [tuple(part.images.shape) for part in parts] == [(4, 1, 8, 8)] * 2 + [(2, 1, 8, 8)]
    assert {part.images.dtype for part in parts} == {torch.uint8}
    assert len(steps) == 3 * 5


@pytest.mark.parametrize("kind", [*KINDS, "dpm_adaptive"])
def test_sample_of_a_known_distribution_has_its_mean_and_deviation(settings, kind):
    run = settings(by(kind), "sampling.steps=40", "sampling.sigma_max=40")
    # by quartiles, because the tails are cut at -1 and 1
    x = (images(Normal(), run, list(range(24)), [7] * 24) - 127.5) / 127.5
    quartiles = x.flatten().double().quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    # N(0.3, 0.25); of 1,536 pixels a quartile has a standard error of 0.017
    expected = [0.3 - 0.6745 * 0.5, 0.3, 0.3 + 0.6745 * 0.5]
    assert quartiles.tolist() == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("kind", [*KINDS, "dpm_adaptive"])
def test_sample_of_a_seed_is_the_same_in_any_batch(settings, kind):
    some = [by(kind), "sampling.steps=12"]
    whole = images(Normal(), settings(*some, "sampling.batch_size=5"), list(range(5)))
    part = images(Normal(), settings(*some, "sampling.batch_size=2"), [3, 1, 4])
    assert (part - whole[[3, 1, 4]]).abs().max() <= 1, "a grey level is float rounding"
    assert (whole[3] - whole[1]).abs().max() > 50


@pytest.mark.parametrize("kind", [k for k in KINDS if "sde" in k or "ancestral" in k] + ["ddpm"])
def test_sample_with_noise_comes_closer_to_one_image_with_more_steps(settings, kind):
    """The Brownian path of a seed is one, however it is cut."""

    def at(steps: int) -> Tensor:
        run = settings(by(kind), f"sampling.steps={steps}", "sampling.sigma_max=10")
        return images(Normal(), run, list(range(4))).double()

    few, some, many = at(10), at(40), at(160)
    between_seeds = (many[:2] - many[2:]).square().mean().sqrt()
    coarse, fine = ((x - many).square().mean().sqrt() for x in (few, some))
    assert fine < 0.6 * coarse
    assert fine < 0.25 * between_seeds


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(steps=4000)], ids=repr)
def test_sample_by_every_timestep_of_a_paper_has_noise_for_each(schedule):
    """DDPM samples with 1,000 linear ones (Ho et al.), iDDPM with 4,000 cosine ones."""
    sigmas = LinearT()(schedule.steps, *schedule.sigma_range(), schedule).tolist()
    path = BrownianPath(lambda i: torch.zeros(1), sigmas[0])
    for s, s_next in pairwise(sigmas):
        path(s, s_next)


@pytest.mark.parametrize(("kind", "scale"), [("edm", 1 / math.sqrt(1 + 0.25 / 4)), ("eps_vp", 1)])
def test_sample_starts_from_the_noise_of_its_parametrization(settings, kind, scale):
    """Std sigma_max, but sqrt(sigma_max^2 + 1) of eps_vp; times c_in that is 1 for eps_vp, so the
    network sees standard normal noise, and the same for each."""
    network = Normal()
    parametrization = f"diffusion.parametrization={{kind='{kind}'}}"
    density = "diffusion.density={kind='uniform_vp'}"
    run = settings(parametrization, density, "sampling.sigma_max=2.0")
    images(network, run)
    reference = Normal()
    images(reference, settings("sampling.sigma_max=1e6"))  # where c_in * sigma is 1
    torch.testing.assert_close(network.inputs[0], scale * reference.inputs[0], rtol=2e-6, atol=1e-6)


# ---- evaluations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sample_counts_the_evaluations_of_a_sampler(settings, kind):
    assert evaluations(Normal(), settings(*SOME, by(kind))) == KINDS[kind](6)


def test_sample_counts_99_evaluations_of_50_steps_of_heun(settings):
    assert evaluations(Normal(), settings(by("heun"), "sampling.steps=50")) == 99


@pytest.mark.parametrize("batched", ["true", "false"])
def test_sample_counts_both_evaluations_of_guidance(settings, batched):
    guidance = f"sampling.guidance={{scale=2, batched={batched}}}"
    assert evaluations(Normal(), settings(*SOME, by("heun"), guidance)) == 2 * 11


@pytest.mark.parametrize("interval", [[0, 1], [0.3, 5], [100, 101]])
def test_sample_counts_fewer_evaluations_of_guidance_in_an_interval(settings, interval):
    """Heun evaluates each noise level twice, and the first once."""
    low, high = interval
    levels = [160 ** (1 / 7) + i / 5 * (0.01 ** (1 / 7) - 160 ** (1 / 7)) for i in range(6)]
    evaluated = [root**7 for root in (levels[0], *levels[1:], *levels[1:])]
    guidance = f"sampling.guidance={{scale=2, interval={interval}}}"
    expected = 11 + sum(low < sigma <= high for sigma in evaluated)
    assert evaluations(Normal(), settings(*SOME, by("heun"), guidance)) == expected


def test_sample_counts_the_evaluations_of_a_guide_model(settings):
    run = settings(*SOME, by("euler"))
    assert evaluations(Normal(), run, guide=GuideModel(Normal(), run, 2)) == 2 * 6
    assert evaluations(Normal(), run, guide=GuideModel(Normal(), run, 1)) == 6
    guided = settings(*SOME, by("euler"), f"{GUIDANCE}.scale=2")
    assert evaluations(Normal(), guided, guide=GuideModel(Normal(), run, 2)) == 3 * 6


# ---- guidance ------------------------------------------------------------------------------------

UNTRAINED = "training.label_dropout=0"


@pytest.mark.parametrize(
    ("own", "labels", "guide", "message"),
    [
        (
            [UNTRAINED, "sampling.guidance.scale=2"],
            [3],
            [],
            r"guidance\.scale: 2 .*label_dropout was 0",
        ),
        (
            [UNTRAINED, "sampling.guidance.scale=0"],
            None,
            [],
            r"guidance\.scale: 0 .*label_dropout was 0",
        ),
        ([UNTRAINED], [3, NULL_LABEL], [], r"--labels: 'none' .* the model never saw"),
        ([], [NULL_LABEL], [UNTRAINED], r"--labels: 'none' .* the model of --guide never saw"),
    ],
)
def test_null_class_that_was_not_trained_is_refused(settings, own, labels, guide, message):
    run = settings(*own)
    with pytest.raises(UserError, match=message):
        check_null_class(run, run.data_shape(CLASSES), labels, settings(*guide))


def test_null_class_is_not_missed_where_nothing_asks_for_it(settings):
    run = settings(UNTRAINED)
    check_null_class(run, run.data_shape(CLASSES), [0, 3], run)
    check_null_class(settings("sampling.guidance.scale=2"), run.data_shape(CLASSES), [NULL_LABEL])


def close(a: Tensor, b: Tensor) -> bool:
    """To a grey level, which is float rounding."""
    return bool((a - b).abs().max() <= 1)


@pytest.mark.parametrize("kind", ["euler", "dpmpp_3m_sde"])
def test_sample_with_guidance_is_that_of_the_guided_mean(settings, kind):
    strong = Normal()
    guided = Shifted(lambda labels: -0.2 + 2.5 * (strong.mean(labels) + 0.2))
    run = settings(by(kind), "sampling.steps=8")
    expected = images(guided, run)
    actual = images(Normal(), settings(by(kind), "sampling.steps=8", f"{GUIDANCE}.scale=2.5"))
    assert close(actual, expected)
    assert not close(actual, images(Normal(), run))


@pytest.mark.parametrize("extra", ["", ", interval=[0.1, 5]", ", rescale=0.7"])
def test_sample_is_the_same_with_guidance_in_one_call_or_two(settings, extra):
    networks = Normal(), Normal()
    both = [
        images(network, settings(*SOME[:1], f"{GUIDANCE}={{scale=2, batched={batched}{extra}}}"))
        for network, batched in zip(networks, ["true", "false"], strict=True)
    ]
    assert close(*both)
    assert {len(x) for x in networks[1].inputs} == {3}
    assert 6 in {len(x) for x in networks[0].inputs}
    assert networks[0].seen == networks[1].seen


def test_sample_guides_the_first_channels_alone_where_told(settings):
    data, some = "data={kind='shapes', size=8}", "sampling.steps=4"
    plain = images(Normal(), settings(data, some))
    all_, first = (
        images(Normal(), settings(data, some, f"sampling.guidance={{scale=3{channels}}}"))
        for channels in ("", ", channels=1")
    )
    assert close(first[:, :1], all_[:, :1])
    assert close(first[:, 1:], plain[:, 1:])
    assert not close(all_[:, 1:], plain[:, 1:])


def test_sample_with_a_guide_model_is_that_of_the_mean_away_from_it(settings):
    run = settings("sampling.steps=8")
    strong, guide = Normal(slope=0.1), Normal(slope=0.04)
    expected = images(Shifted(lambda y: 2 * strong.mean(y) - guide.mean(y)), run)
    assert close(images(strong, run, guide=GuideModel(guide, run, 2)), expected)


def test_sample_with_a_guide_model_at_scale_1_is_that_without(settings):
    run = settings("sampling.steps=4")
    guide = Normal(slope=-1)
    assert torch.equal(
        images(Normal(), run, guide=GuideModel(guide, run, 1)), images(Normal(), run)
    )
    assert not guide.seen


def test_sample_takes_the_guide_model_by_its_own_config(settings):
    """v is EDM's F with its sign turned."""
    run = settings("sampling.steps=4")
    other = settings("diffusion.parametrization={kind='v'}", "sampling.steps=9")
    same = images(Normal(), run, guide=GuideModel(Normal(slope=0.05), run, 2))
    turned = GuideModel(Normal(slope=0.05, sign=-1), other, 2)
    assert torch.equal(images(Normal(), run, guide=turned), same)


def test_sample_with_a_guide_model_and_guidance_guides_what_the_guide_gave(settings):
    run = settings("sampling.steps=6", f"{GUIDANCE}.scale=1.5")
    strong, guide = Normal(), Normal(slope=0.05)
    guided = Shifted(lambda y: -0.2 + 1.5 * (2 * strong.mean(y) - guide.mean(y) + 0.2))
    expected = images(guided, settings("sampling.steps=6"))
    assert close(images(strong, run, guide=GuideModel(guide, run, 2)), expected)


APG = f"{GUIDANCE}={{scale=3, apg={{momentum=-0.5, norm_threshold=5}}}}"


def test_sample_with_projected_guidance_is_the_same_in_any_batch(settings):
    """The average over evaluations is of a batch, and begins anew with the next."""
    some = [by("heun"), APG, "sampling.steps=8"]
    whole = images(Normal(), settings(*some, "sampling.batch_size=5"), list(range(5)))
    part = images(Normal(), settings(*some, "sampling.batch_size=2"), [3, 1, 4])
    assert close(part, whole[[3, 1, 4]])
    plain = images(Normal(), settings(*some[:1], f"{GUIDANCE}={{scale=3}}", some[2]), [3, 1, 4])
    assert not close(part, plain)


# ---- learned variance ----------------------------------------------------------------------------


class WithVariance(Normal):
    """2c channels: F, and then v."""

    def __init__(self, v: float):
        super().__init__()
        self.v = v

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        f = super().forward(x, c_noise, cond)
        return torch.cat([f, torch.full_like(f, self.v)], dim=1)


@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.parametrize(("v", "variance"), [(-1.0, "lower"), (1.0, "upper")])
def test_sample_with_a_learned_variance_reaches_from_the_lower_to_the_upper(
    settings, guidance, v, variance
):
    learned = ["diffusion.learned_variance=true", "diffusion.density={kind='uniform_vp'}"]
    some = ["sampling.steps=6", f"{GUIDANCE}.scale={guidance}", *learned]

    def at(v: float, variance: str) -> Tensor:
        sampler = f"sampling.sampler={{kind='ddpm', variance='{variance}'}}"
        return images(WithVariance(v), settings(*some, sampler))

    assert close(at(v, "learned"), at(0.3, variance))
    assert not close(at(0.0, "learned"), at(0.3, variance))


@pytest.mark.parametrize("kind", ["dpmpp_3m_sde", "heun"])
def test_sample_by_another_sampler_leaves_the_learned_variance_aside(settings, kind):
    density = "diffusion.density={kind='uniform_vp'}"
    bounds = ["sampling.sigma_min=0.02", "sampling.sigma_max=100", by(kind), density]
    plain = images(Normal(), settings(*bounds))
    learned = images(WithVariance(0.3), settings(*bounds, "diffusion.learned_variance=true"))
    assert torch.equal(plain, learned)
