import os
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch

from hdit.config import ConfigError, RunConfig, differences, load, merge, parse, set_key
from hdit.diffusion.densities import Density
from hdit.diffusion.parametrization import Parametrization
from hdit.diffusion.samplers import SamplerSpec
from hdit.diffusion.sigmas import AnySigmas
from hdit.errors import UserError
from hdit.names import path_of
from hdit.protocols import DataShape

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

HDIT = """
[data]
kind = "shapes"
size = 32

[model]
kind = "hdit"
patch_size = 2

[[model.levels]]
depth = 1
width = 64
attention = { kind = "neighborhood", kernel_size = 5, d_head = 32 }

[[model.levels]]
depth = 2
width = 128
attention = { kind = "global", d_head = 32 }

[training]
images = 1000
checkpoint_every = 500
batch_size = 12
"""

DIT = """
[data]
kind = "digits"

[model]
kind = "dit"
depth = 2
width = 64
num_heads = 4

[diffusion]
parametrization = { kind = "eps_vp" }
weighting = { kind = "eps" }
density = { kind = "uniform_vp" }
beta_schedule = { steps = 500 }

[training]
images = 1000
checkpoint_every = 500
batch_size = 12
"""


@pytest.fixture
def write(tmp_path):
    """Writes a TOML file -> its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def changed(*overrides: str, base: str = HDIT) -> RunConfig:
    raw = tomllib.loads(base)
    for override in overrides:
        set_key(raw, override)
    return parse(raw, "run.toml")


def complaints(*overrides: str, base: str = HDIT) -> list[str]:
    """What is wrong with the config after these overrides, one line each."""
    with pytest.raises(ConfigError) as error:
        changed(*overrides, base=base)
    origin, *lines = str(error.value).split("\n")
    assert origin == "run.toml:"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def test_config_augments_only_what_is_told_of_it():
    assert changed("data.augment=0.12").data.augment.probability == 0.12
    assert "augment = 0.12" in changed("data.augment=0.12").dump()
    [line] = complaints("data.augment=0.12", base=DIT)
    assert line.startswith("data.augment: must be 0: it would leak into the samples of a dit")
    [line] = complaints("data.augment=1.2")
    assert line.startswith("data.augment")


# ---- whole configs -------------------------------------------------------------------------------


def test_configs_of_the_project_are_found():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_of_the_project_loads_and_its_dump_reads_back(path):
    config = load(path)
    assert parse(tomllib.loads(config.dump()), "dump") == config


@pytest.mark.parametrize(
    "override",
    [
        "data={kind='folder', path='a \"b\" ü', size=[32, 64], channels=1}",
        "diffusion={density={kind='lognormal', sigma_min=0.01}}",
        "diffusion={weighting={kind='sigmoid', bias=-3}, c_noise='atan'}",
        "diffusion={parametrization={kind='eps_vp'}, density={kind='uniform_vp'}}",
        "training={optimizer={lr=1e-7, betas=[0, 0.5]}, log_every=1}",
        "sampling={sampler={kind='dpmpp_2m_sde', solver='heun'}, sigmas={kind='exponential'}}",
        "sampling={sigma_min=0.3, sigma_max=80, grid=0}",
    ],
)
def test_config_with_unusual_settings_reads_back_from_its_dump(override):
    config = changed(override)
    assert config != changed()
    assert parse(tomllib.loads(config.dump()), "dump") == config


UNIONS = {
    "diffusion.parametrization": Parametrization,
    "diffusion.density": Density,
    "sampling.sigmas": AnySigmas,
}
KINDS = [
    *(
        (key, spec.model_fields["kind"].default)
        for key, union in UNIONS.items()
        for spec in get_args(get_args(union)[0])
    ),
    *(("sampling.sampler", kind) for kind in SamplerSpec.members),
]


@pytest.mark.parametrize(("key", "kind"), KINDS)
def test_config_takes_every_kind_and_reads_it_back(key, kind):
    table, _, leaf = key.partition(".")
    # every parametrization is defined at these noise levels
    density = "diffusion.density={kind='lognormal', sigma_min=0.02, sigma_max=150}"
    config = changed(density, f"{key}={{kind='{kind}'}}")
    assert getattr(getattr(config, table), leaf).kind == kind
    assert config == config.resolved(), "resolving is done once"
    assert parse(tomllib.loads(config.dump()), "dump") == config


@pytest.mark.parametrize(
    "override",
    [
        "diffusion.density={kind='split_lognormal', mode=0.1, std_low=2, std_high=0.5}",
        "diffusion.density={kind='loglogistic', loc=0.5, scale=0.3, sigma_max=99}",
        "diffusion.density={kind='logit_normal_flow', mean=0.1, sigma_min=0.03}",
        "diffusion={learned_variance=true, density={kind='uniform_vp'}, loss_scales=3}",
        "diffusion={beta_schedule={kind='cosine', steps=300}, density={kind='uniform_vp'}}",
        "sampling={sampler={kind='heun', s_churn=40, s_tmin=0.05, s_tmax=50, s_noise=1.003}}",
        "sampling={sampler={kind='lms', order=3}, sigmas={kind='polyexponential', rho=0.5}}",
        "sampling={sampler={kind='ddpm', variance='upper'}, sigmas={kind='vp', beta_d=10}}",
        "sampling={sampler={kind='dpmpp_sde', r=0.3}, sigmas={kind='flow', shift=3}}",
        "sampling={sigmas={kind='linear_t', sections=[10, 15, 25]}}",
        "sampling={sigmas={kind='linear_t', stride=true}, sampler={kind='ddim', eta=0.5}}",
        "sampling={guidance={scale=2, interval=[0, 3], channels=2, rescale=0.7, batched=false}}",
        "sampling={guidance={scale=2, apg={eta=0.1, norm_threshold=5, momentum=-0.75}}}",
    ],
)
def test_config_with_settings_of_a_kind_reads_back_from_its_dump(override):
    config = changed(override)
    assert config != changed()
    assert parse(tomllib.loads(config.dump()), "dump") == config


# ---- what follows from other settings ------------------------------------------------------------


def test_config_resolves_the_c_noise_by_the_kind_of_model():
    assert changed().diffusion.c_noise == "log_quarter"
    assert changed(base=DIT).diffusion.c_noise == "timestep"
    assert changed("diffusion.c_noise=flow_t", base=DIT).diffusion.c_noise == "flow_t"


def test_config_sampling_range_is_that_of_the_sigma_schedule_within_the_parametrization():
    assert changed().sigma_range() == (0.01, 160)
    assert changed("sampling.sigma_min=0.5", "sampling.sigma_max=2").sigma_range() == (0.5, 2)
    low, high = changed("diffusion.beta_schedule.steps=1000", base=DIT).sigma_range()
    # Ho et al., 2020: abar runs from 1 - 1e-4 to 4.0358e-5, of which 5 digits are known
    assert low == pytest.approx((1e-4 / (1 - 1e-4)) ** 0.5, rel=1e-9)
    assert high == pytest.approx((1 / 4.0358e-5 - 1) ** 0.5, rel=1e-5)


UNIFORM_VP = "diffusion.density={kind='uniform_vp'}"
DIT2 = DIT.replace('kind = "digits"', 'kind = "shapes"\nsize = 64')
LOW = "diffusion.density={kind='cosine_interpolated', sigma_min=0.001}"
LEARNED = "diffusion.learned_variance=true"


def test_config_sampling_range_of_a_sigma_schedule_by_time_is_its_own():
    def range_of(*overrides: str) -> tuple[float, float]:
        return changed(*overrides).sigma_range()

    # Karras et al., 2022, table 1: VP from t = 1 to 1e-3
    assert range_of("sampling.sigmas={kind='vp'}") == pytest.approx((0.010486, 152.17), rel=1e-4)
    linear_t = "sampling.sigmas={kind='linear_t'}"
    assert range_of(linear_t) == pytest.approx((0.0100, 157.41), rel=1e-4)
    cosine = changed(linear_t, "diffusion.beta_schedule={kind='cosine', steps=100}")
    assert cosine.sigma_range() == cosine.beta_schedule.sigma_range()


@pytest.mark.parametrize("base", [HDIT, DIT], ids=["hdit", "dit"])
@pytest.mark.parametrize(("learned", "variance"), [(True, "learned"), (False, "lower")])
def test_config_resolves_the_variance_of_ddpm_by_what_the_model_learns(base, learned, variance):
    overrides = [f"diffusion.learned_variance={str(learned).lower()}", UNIFORM_VP]
    config = changed(*overrides, "sampling.sampler={kind='ddpm'}", base=base)
    assert config.sampling.sampler.variance == variance
    channels = config.data_shape(0).channels
    assert config.output_channels(config.data_shape(0)) == channels * (2 if learned else 1)
    upper = changed(*overrides, "sampling.sampler={kind='ddpm', variance='upper'}", base=base)
    assert upper.sampling.sampler.variance == "upper"


def test_config_learned_variance_brings_a_schedule_and_its_range():
    density = "diffusion.density={kind='lognormal', sigma_min=0.02, sigma_max=100}"
    config = changed(LEARNED, density)
    assert (config.diffusion.beta_schedule.kind, config.diffusion.beta_schedule.steps) == (
        "linear",
        1000,
    )
    assert config.sigma_range() == config.beta_schedule.sigma_range()
    own = changed(LEARNED, UNIFORM_VP, "diffusion.beta_schedule={kind='cosine', steps=50}")
    assert own.diffusion.beta_schedule.kind == "cosine"


def test_config_timestep_label_with_a_schedule_keeps_to_its_range():
    density = "diffusion.density={kind='lognormal', sigma_min=0.02, sigma_max=100}"
    free = changed("diffusion.c_noise=timestep", "diffusion.density={kind='lognormal'}")
    assert (free.diffusion.beta_schedule, free.sigma_range()) == (None, (0.01, 160))
    bound = changed("diffusion.c_noise=timestep", "diffusion.beta_schedule={}", density)
    assert bound.sigma_range() == bound.beta_schedule.sigma_range()


def test_config_error_is_for_the_user():
    assert issubclass(ConfigError, UserError)


def test_config_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        changed().training.batch_size = 3


# ---- single settings that are wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("trainning.seed=1", "trainning: unknown key (set to {'seed': 1}); did you mean training?"),
        (
            "training.batchsize=8",
            "training.batchsize: unknown key (set to 8); did you mean training.batch_size?",
        ),
        (
            "model.levels.1.deptth=8",
            "model.levels.1.deptth: unknown key (set to 8); did you mean model.levels.1.depth?",
        ),
        (
            "model.levels.0.attention.kernelsize=8",
            "model.levels.0.attention.kernelsize: unknown key (set to 8); "
            "did you mean model.levels.0.attention.kernel_size?",
        ),
        (
            "sampling.sampler={kind='dpmpp_2m_sde', solvr='heun'}",
            "sampling.sampler.solvr: unknown key (set to 'heun'); "
            "did you mean sampling.sampler.solver?",
        ),
    ],
)
def test_config_key_that_is_misspelt_names_the_nearest(override, complaint):
    assert complaints(override) == [complaint]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("training.lr", "training.optimizer.lr"),
        ("lr", "training.optimizer.lr"),
        ("batch_size", "training.batch_size"),
        ("model.betas", "training.optimizer.betas"),
        ("model.guidance", "sampling.guidance"),
        ("training.max_decay", "training.ema.max_decay"),
    ],
)
def test_config_key_that_lives_elsewhere_is_shown_its_place(wrong, right):
    assert complaints(f"{wrong}=1") == [f"{wrong}: unknown key (set to 1); did you mean {right}?"]


def test_config_key_that_resembles_none_is_shown_the_valid_ones():
    assert complaints("xyzzy=1") == [
        "xyzzy: unknown key (set to 1); valid keys here: "
        "data, space, model, diffusion, training, sampling"
    ]


def test_config_of_one_kind_refuses_the_keys_of_another():
    [line] = complaints("model.num_heads=4")
    assert line.startswith("model.num_heads: unknown key (set to 4)")


@pytest.mark.parametrize(
    ("override", "key", "got"),
    [
        ("training.batch_size=many", "training.batch_size", "'many'"),
        ("training.batch_size='8'", "training.batch_size", "'8'"),
        ("training.batch_size=8.0", "training.batch_size", "8.0"),
        ("training.batch_size=true", "training.batch_size", "True"),
        ("training.batch_size=0", "training.batch_size", "0"),
        ("training.seed=-1", "training.seed", "-1"),
        ("training.optimizer.lr=fast", "training.optimizer.lr", "'fast'"),
        ("training.optimizer.lr=nan", "training.optimizer.lr", "nan"),
        ("training.optimizer.lr=inf", "training.optimizer.lr", "inf"),
        ("training.optimizer.lr=0", "training.optimizer.lr", "0"),
        ("training.precision=fp8", "training.precision", "'fp8'"),
        ("training.label_dropout=1", "training.label_dropout", "1"),
        ("training.optimizer.betas=[0.9, 'x']", "training.optimizer.betas.1", "'x'"),
        ("training.seed=2020-01-01", "training.seed", "datetime.date(2020, 1, 1)"),
        ("training=3", "training", "3"),
        ("model=[]", "model", "[]"),
        ("model.levels=3", "model.levels", "3"),
        ("model.levels=[]", "model.levels", "[]"),
        ("model.levels.1=3", "model.levels.1", "3"),
        ("model.levels.1.width=wide", "model.levels.1.width", "'wide'"),
        ("model.levels.1.attention.d_head=0.5", "model.levels.1.attention.d_head", "0.5"),
        ("sampling.sampler.kind=3", "sampling.sampler.kind", "'3'"),
        ("diffusion.c_noise=sigma", "diffusion.c_noise", "'sigma'"),
        ("diffusion.learned_variance=1", "diffusion.learned_variance", "1"),
        ("diffusion.loss_scales=-1", "diffusion.loss_scales", "-1"),
        ("diffusion.loss_scales=1.5", "diffusion.loss_scales", "1.5"),
        ("sampling.guidance.scale=-1", "sampling.guidance.scale", "-1"),
        ("sampling.guidance.scale=nan", "sampling.guidance.scale", "nan"),
        ("sampling.guidance={rescale=1.1}", "sampling.guidance.rescale", "1.1"),
        ("sampling.guidance={channels=0}", "sampling.guidance.channels", "0"),
        ("sampling.guidance={interval=[0, 'x']}", "sampling.guidance.interval.1", "'x'"),
        ("sampling.guidance={interval=[0, inf]}", "sampling.guidance.interval.1", "inf"),
        ("sampling.guidance={interval=[-1, 1]}", "sampling.guidance.interval.0", "-1"),
        ("sampling.sampler={kind='lms', order=5}", "sampling.sampler.order", "5"),
        ("sampling.sampler={kind='ddim', eta=2}", "sampling.sampler.eta", "2"),
        ("sampling.sampler={kind='dpmpp_sde', r=1}", "sampling.sampler.r", "1"),
        ("sampling.sampler={kind='ddpm', variance='x'}", "sampling.sampler.variance", "'x'"),
        ("sampling.sigmas={kind='linear_t', stride=20}", "sampling.sigmas.stride", "20"),
        ("training.optimizer.kind=sgd", "training.optimizer.kind", "'sgd'"),
    ],
)
def test_config_value_that_is_wrong_is_named_with_what_arrived(override, key, got):
    [line] = complaints(override)
    assert line.startswith(f"{key}: ")
    assert f", got {got}" in line


def test_config_long_value_is_cut_in_the_message():
    [line] = complaints(f"training.seed={'x' * 500}")
    assert len(line) < 200


def test_config_value_is_explained_by_its_description():
    [line] = complaints("training.images=0")
    assert line == "training.images: must be greater than 0, got 0 (where training ends)"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("batch_size = 12", "training.batch_size"),
        ("width = 64", "model.levels.0.width"),
    ],
)
def test_config_key_that_is_missing_is_named(line, key):
    [complaint] = complaints(base=HDIT.replace(line, ""))
    assert complaint.startswith(f"{key}: required, but not set")


def test_config_section_that_is_missing_is_named():
    assert complaints(base=HDIT.partition("[training]")[0]) == ["training: required, but not set"]


def test_config_kind_that_is_missing_lists_the_kinds():
    assert complaints("sampling.sigmas={rho=5}") == [
        "sampling.sigmas.kind: required, but not set; one of "
        "['karras', 'exponential', 'polyexponential', 'vp', 'linear_t', 'flow']"
    ]


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("data", "shape", "shapes"),
        ("model", "hdti", "hdit"),
        ("model.levels.0.attention", "neighbourhood", "neighborhood"),
        ("diffusion.weighting", "soft-min-snr", "soft_min_snr"),
        ("diffusion.parametrization", "epsvp", "eps_vp"),
        ("diffusion.density", "log_uniform", "loguniform"),
        ("diffusion.beta_schedule", "cosin", "cosine"),
        ("sampling.sigmas", "linear", "linear_t"),
        ("sampling.sampler", "huen", "heun"),
    ],
)
def test_config_kind_that_is_wrong_names_the_nearest(key, wrong, right):
    [line] = complaints(f"{key}.kind={wrong}")
    assert line.startswith(f"{key}.kind: must be one of [")
    assert line.endswith(f"], got {wrong!r}; did you mean {right!r}?")
    assert f"{right!r}" in line.partition("], got")[0]


def test_config_kind_that_resembles_none_lists_the_kinds():
    assert complaints("data.kind=imagenet") == [
        "data.kind: must be one of ['digits', 'shapes', 'folder', 'zip', 'tar', 'npz', 'hub', "
        "'python'], got 'imagenet'"
    ]


# ---- several, and settings that do not fit together ----------------------------------------------


def keys(lines: list[str]) -> set[str]:
    return {line.partition(": ")[0] for line in lines}


def test_config_names_everything_that_is_wrong_at_once():
    lines = complaints(
        "training.batchsize=8",
        "training.optimizer.lr=fast",
        "model.levels.0.width=-1",
        "model.levels.1.attention.kind=globl",
        "data.num_images=0",
        "sampling.sampler.kind=hen",
    )
    assert len(lines) == 6
    assert keys(lines) == {
        "training.batchsize",
        "training.optimizer.lr",
        "model.levels.0.width",
        "model.levels.1.attention.kind",
        "data.num_images",
        "sampling.sampler.kind",
    }


def test_config_names_every_clash_at_once():
    lines = complaints(
        "training.accumulate=5",
        "model.levels.0.attention.kernel_size=4",
        "model.levels.1.width=100",
        "model.mapping.width=33",
        "diffusion.beta_schedule.steps=100",
        "sampling.sigma_min=500",
    )
    assert keys(lines) == {
        "training.accumulate",
        "model.levels.0.attention.kernel_size",
        "model.levels.1.width",
        "model.mapping.width",
        "diffusion.beta_schedule",
        "sampling",
    }


KERNEL = "model.levels.0.attention.kernel_size"


@pytest.mark.parametrize(
    ("size", "kernel", "largest"),
    [
        ("32", 17, 15),  # on 16x16
        ("20", 11, 9),  # 10x10
        ("12", 7, 5),  # 6x6
        ("[64, 12]", 7, 5),  # 32x6
        ("[12, 64]", 9, 5),  # 6x32
        ("4", 99, 1),  # 2x2
    ],
)
def test_config_kernel_beyond_its_grid_says_which_is_the_largest(size, kernel, largest):
    [line] = complaints(f"data.size={size}", f"{KERNEL}={kernel}")
    assert line.startswith(f"{KERNEL}: {kernel} is larger than the level's grid of ")
    assert line.endswith(f"; use at most {largest}, or kind = 'global'")
    fixed = changed(f"data.size={size}", f"{KERNEL}={largest}")
    assert fixed.model.levels[0].attention.kernel_size == largest


def test_config_kernel_as_large_as_its_grid_is_valid():
    levels = "model.levels=[{depth=1, width=32, attention={kind='neighborhood', d_head=32}}]"
    config = changed("data.size=[14, 18]", levels, f"{KERNEL}=7")
    assert config.model.grids(config.data_shape(0)) == [(7, 9)]


@pytest.mark.parametrize("kernel", [2, 4, 16])
def test_config_kernel_that_is_even_names_its_neighbours(kernel):
    assert complaints(f"{KERNEL}={kernel}") == [
        f"{KERNEL}: must be odd, got {kernel}; use {kernel - 1} or {kernel + 1}"
    ]


@pytest.mark.parametrize("size", [30, "[32, 34]", "[33, 32]"])
def test_config_image_that_the_levels_do_not_divide_names_the_multiple(size):
    [line] = complaints(f"data.size={size}")
    assert line.startswith("model.patch_size: patch 2 and 2 levels need an image whose sides are ")
    assert "multiples of 4, got " in line


def test_config_image_that_the_patch_of_a_dit_does_not_divide_is_named():
    [line] = complaints("model.patch_size=3", base=DIT)
    assert line.startswith("model.patch_size: 3 does not divide the image of 8x8")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["model.levels.1.width=80"],
            "model.levels.1.width: must be a multiple of attention.d_head (32), got 80",
        ),
        (
            ["model.levels.1.attention.d_head=4"],
            "model.levels.1.attention.d_head: must be a multiple of 8, got 4",
        ),
        (["model.mapping.width=255"], "model.mapping.width: must be even, got 255"),
    ],
)
def test_config_width_of_an_hdit_that_does_not_fit_is_named(overrides, complaint):
    assert complaints(*overrides) == [complaint]


def test_config_width_of_a_dit_that_its_heads_do_not_divide_is_named():
    assert complaints("model.num_heads=5", base=DIT) == [
        "model.width: must be a multiple of num_heads (5), got 64"
    ]


def test_config_accumulate_that_does_not_divide_the_batch_is_named():
    assert complaints("training.accumulate=5") == [
        "training.accumulate: must divide training.batch_size (12), got 5"
    ]
    assert changed("training.accumulate=4").training.accumulate == 4


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("diffusion.density={kind='cosine_interpolated', sigma_max=200}", "diffusion.density"),
        ("diffusion.density={kind='lognormal', sigma_min=0.1, sigma_max=500}", "diffusion.density"),
        ("diffusion.density={kind='lognormal', sigma_min=1e-3, sigma_max=5}", "diffusion.density"),
        ("sampling.sigma_max=200", "sampling"),
        ("sampling.sigma_min=0.001", "sampling"),
    ],
)
def test_config_noise_levels_beyond_the_parametrization_are_named(override, key):
    [line] = complaints(override, base=DIT)
    assert line.startswith(f"{key}: noise levels ")
    assert " leave the range of parametrization 'eps_vp', " in line


def test_config_noise_levels_within_the_parametrization_are_valid():
    density = "diffusion.density={kind='lognormal', sigma_min=0.1, sigma_max=50}"
    low, high = changed(density, "diffusion.beta_schedule={}", base=DIT).sigma_range()
    assert changed(density, f"sampling.sigma_min={low}", f"sampling.sigma_max={high}", base=DIT)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["sampling.sigma_min=2", "sampling.sigma_max=1"], "sampling"),
        (["sampling.sigma_max=0.01"], "sampling"),
        (["diffusion.density.kind=lognormal", "diffusion.density.sigma_min=3",
          "diffusion.density.sigma_max=3"], "diffusion.density"),
    ],
)  # fmt: skip
def test_config_noise_levels_out_of_order_are_named(overrides, key):
    [line] = complaints(*overrides)
    assert line.startswith(f"{key}: sigma_min must be below sigma_max, got ")


def test_config_schedule_without_effect_is_an_error():
    [line] = complaints("diffusion.beta_schedule.steps=100")
    assert line.startswith("diffusion.beta_schedule: has no effect: ")


@pytest.mark.parametrize(
    "override",
    [
        UNIFORM_VP,
        "diffusion={c_noise='timestep', density={kind='loguniform', sigma_min=0.1}}",
        "diffusion={learned_variance=true, density={kind='loguniform', sigma_min=0.1}}",
        "sampling.sigmas={kind='linear_t'}",
    ],
)
def test_config_schedule_has_an_effect_where_something_goes_by_timesteps(override):
    schedule = "diffusion.beta_schedule={kind='cosine', steps=100}"
    assert changed(override, schedule).beta_schedule.steps == 100
    assert changed(override, schedule).beta_schedule.kind == "cosine"


@pytest.mark.parametrize("parametrization", ["edm", "eps_vp"])
def test_config_schedule_of_a_vp_density_has_an_effect(parametrization):
    config = changed(
        "diffusion.beta_schedule.steps=100",
        "diffusion.density={kind='uniform_vp'}",
        f"diffusion.parametrization.kind={parametrization}",
    )
    assert config.beta_schedule.steps == 100


FLOW = "diffusion.parametrization={kind='flow'}"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("diffusion.density={kind='uniform_flow', sigma_max=1000}", "diffusion.density"),
        ("diffusion.density={kind='v_diffusion', sigma_max=1000}", "diffusion.density"),
        ("sampling.sigma_max=1000", "sampling"),
    ],
)
def test_config_noise_levels_beyond_the_time_of_flow_are_named(override, key):
    density = "diffusion.density={kind='logit_normal_flow'}"
    [line] = complaints(FLOW, density, override)
    assert line.startswith(f"{key}: noise levels ")
    assert " to 1000 leave the range of parametrization 'flow', 0 to 999; " in line
    limit = "diffusion.density={kind='uniform_flow', sigma_max=999}"
    assert changed(FLOW, limit, "sampling.sigma_max=999").sigma_range() == (0.01, 999)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (-0.3, 1), (0.5, 0.6), (-0.5, 0.6)])
def test_config_flow_takes_the_logit_normal_densities_of_the_paper(mean, std):
    """Esser et al., 2024, compare means and widths like these; sigma_max is 999 where not set."""
    density = f"diffusion.density={{kind='logit_normal_flow', mean={mean}, std={std}}}"
    assert changed(FLOW, density).diffusion.density.sigma_max == 999


@pytest.mark.parametrize(
    "overrides",
    [
        [LEARNED, LOW],
        [LEARNED, "diffusion.density={kind='lognormal', sigma_min=0.001, sigma_max=100}"],
        [
            "diffusion.c_noise=timestep",
            "diffusion.beta_schedule={}",
            LOW,
        ],
    ],
)
def test_config_noise_levels_beyond_the_timesteps_are_named(overrides):
    [line] = complaints(*overrides)
    assert line.startswith("diffusion.density: noise levels 0.001 to ")
    assert "0.010001 to 157.41" in line


def test_config_noise_levels_beyond_the_timesteps_are_blamed_on_what_goes_by_them():
    """EDM has no range of its own: another parametrization would not mend it."""
    [line] = complaints(LEARNED, LOW)
    assert "learned_variance" in line
    assert "another parametrization" not in line
    [line] = complaints("diffusion.c_noise=timestep", "diffusion.beta_schedule={}", LOW)
    assert "c_noise" in line


def test_config_range_of_a_density_without_bounds_has_another_fix():
    """uniform_vp has no sigma_min and sigma_max to set."""
    [line] = complaints(FLOW, UNIFORM_VP, "diffusion.beta_schedule={kind='cosine'}")
    assert line.startswith("diffusion.density: noise levels 0.0064254 to 20291 leave the range of")
    assert "set sigma_min" not in line


def test_config_learned_variance_that_the_model_has_not_is_named():
    [line] = complaints("sampling.sampler={kind='ddpm', variance='learned'}")
    assert line.startswith("sampling.sampler.variance: must be 'lower' or 'upper', got 'learned': ")
    assert "diffusion.learned_variance" in line


def test_config_momentum_of_guidance_needs_a_sampler_that_goes_straight_on():
    adaptive = "sampling.sampler={kind='dpm_adaptive'}"
    [line] = complaints(adaptive, "sampling.guidance={scale=2, apg={}}")
    assert line.startswith("sampling.guidance.apg.momentum: must be 0, got -0.5: dpm_adaptive")
    changed(adaptive, "sampling.guidance={scale=2, apg={momentum=0}}")


@pytest.mark.parametrize("interval", ["[2, 1]", "[1, 1]"])
def test_config_interval_of_guidance_out_of_order_is_named(interval):
    [line] = complaints(f"sampling.guidance={{scale=2, interval={interval}}}")
    assert line.startswith(
        f"sampling.guidance.interval: must be two noise levels, the lower first, got {interval}"
    )
    assert line.count("got") == 1


@pytest.mark.parametrize("value", ["1.5", "'strong'", "[2]"])
def test_config_guidance_that_is_no_table_is_shown_one(value):
    [line] = complaints(f"sampling.guidance={value}")
    assert line == f"sampling.guidance: must be a table, got {value} (as in {{ scale = 1.5 }})"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sampling.guidance={interval=3}", "sampling.guidance.interval"),
        ("sampling.guidance={interval=[1, 2, 3]}", "sampling.guidance.interval"),
        ("sampling.sigmas={kind='linear_t', sections=3}", "sampling.sigmas.sections"),
    ],
)
def test_config_value_that_should_be_an_array_is_not_called_a_tuple(override, key):
    [line] = complaints(override)
    assert line.startswith(f"{key}: ")
    assert "tuple" not in line


@pytest.mark.parametrize(("interval", "idle"), [((200, 300), True), ((160, 161), True),
                                               ((0, 0.009), True), ((100, 300), False),
                                               ((0, 0.01), False)])  # fmt: skip
def test_config_interval_of_guidance_beyond_what_is_sampled_is_refused(interval, idle):
    override = f"sampling.guidance={{scale=2, interval={list(interval)}}}"
    if not idle:
        assert changed(override).sampling.guidance.interval == interval
        return
    [line] = complaints(override)
    assert line.startswith("sampling.guidance.interval: has no effect: none of the noise levels")
    assert "160 down to 0.01" in line


def test_config_grid_that_no_file_can_hold_is_refused():
    assert changed("sampling.grid=10000", base=DIT)
    [line] = complaints("sampling.grid=65", "data.size=4096")
    assert line.startswith("sampling.grid: must be at most 64, with images of 4096x4096")


@pytest.mark.parametrize("path", ["", "a\\u0000b"])
@pytest.mark.parametrize("key", ["data.path", "data.cache", "space.stored", "space.vae"])
def test_config_name_that_no_file_has_is_refused(key, path):
    base = "data={kind='folder', path='x', size=32}"
    lines = complaints(base, "space.kind=latent", f'{key}="{path}"')
    [line] = [line for line in lines if line.startswith(f"{key}: ")]
    assert "must not" in line


def test_config_guidance_of_more_channels_than_the_image_has_is_named():
    assert complaints("sampling.guidance={channels=4, scale=2}") == [
        "sampling.guidance.channels: must be at most 3, the image's channels, got 4"
    ]
    assert changed("sampling.guidance={channels=3, scale=2}")
    [line] = complaints("sampling.guidance.channels=2", base=DIT)  # digits have one
    assert line.startswith("sampling.guidance.channels: must be at most 1")


@pytest.mark.parametrize(
    ("steps", "settings", "complaint"),
    [
        (
            50,
            "sections=[10, 20]",
            "sampling.sigmas: cannot have sampling.steps = 50: "
            "sections: [10, 20] add up to 30 timesteps, but there are 50 steps",
        ),
        (
            400,
            "stride=true",
            "sampling.sigmas: cannot have sampling.steps = 400: "
            "no whole stride through 1000 timesteps gives 400 of them; the nearest are 334 and 500",
        ),
        (
            620,
            "sections=[600, 20]",
            "sampling.sigmas: cannot have sampling.steps = 620: cannot take 600 timesteps of 500, "
            "a section of 1000",
        ),
        (
            1001,
            "stride=false",
            "sampling.sigmas: cannot have sampling.steps = 1001: "
            "cannot take 1001 timesteps of 1000",
        ),
    ],
)
def test_config_timesteps_that_the_schedule_cannot_give_are_named(steps, settings, complaint):
    sigma_schedule = f"sampling.sigmas={{kind='linear_t', {settings}}}"
    assert complaints(f"sampling.steps={steps}", sigma_schedule) == [complaint]


def test_config_sections_with_stride_are_refused():
    sigma_schedule = "sampling.sigmas={kind='linear_t', sections=[25, 25], stride=true}"
    [line] = complaints(sigma_schedule)
    assert line.startswith("sampling.sigmas")
    assert "sections have no effect with stride = true; give one of the two" in line


def test_config_of_one_timestep_samples_from_the_highest_noise():
    """As every other sigma schedule does; from the lowest there would be nothing to denoise."""
    config = changed("sampling.sigmas={kind='linear_t'}", "sampling.steps=1")
    sigmas = config.sampling.sigmas(1, *config.sigma_range(), config.beta_schedule)
    assert sigmas.tolist() == pytest.approx([157.41, 0], rel=1e-4)


@pytest.mark.parametrize("density", ["loguniform", "v_diffusion", "uniform_flow", "lognormal"])
def test_config_density_of_a_single_noise_level_is_refused(density):
    [line] = complaints(f"diffusion.density={{kind='{density}', sigma_min=3, sigma_max=3}}")
    assert line.startswith("diffusion.density: sigma_min must be below sigma_max, got 3 and 3")


@pytest.mark.parametrize("loc", [1000, -1000])
def test_config_density_that_no_number_can_hold_is_named_by_its_setting(loc):
    [line] = complaints(f"diffusion.density={{kind='loglogistic', loc={loc}}}")
    assert line.startswith("diffusion.density.loc: ")


# ---- files and extends ---------------------------------------------------------------------------


def test_load_of_a_missing_file_suggests_the_nearest(write):
    path = write("digits-hdit.toml", HDIT)
    with pytest.raises(ConfigError, match=r"no such config file; did you mean .*/digits-hdit\."):
        load(path.with_name("digit-hdit.toml"))


def test_load_of_a_missing_file_that_resembles_none_suggests_nothing(write):
    path = write("digits-hdit.toml", HDIT)
    with pytest.raises(ConfigError, match=r"xyzzy: no such config file$"):
        load(path.with_name("xyzzy"))
    with pytest.raises(ConfigError, match=r"run\.toml: no such config file$"):
        load(path.with_name("nowhere") / "run.toml")


def test_load_of_invalid_toml_names_file_and_place(write):
    path = write("run.toml", "[data]\nkind = shapes\n")
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML: .*line 2") as error:
        load(path)
    assert str(error.value).startswith(str(path))


def test_load_of_what_is_no_text_names_the_file(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.toml: is not UTF-8 text: "):
        load(tmp_path / "run.toml")


@pytest.mark.parametrize("device", ["pipe", "/dev/zero", "folder"])
def test_load_of_what_is_no_regular_file_says_so(tmp_path, device):
    """None of them ends: it would wait, or read for ever."""
    path = tmp_path / "run.toml"
    if device == "pipe":
        os.mkfifo(path)
    elif device == "folder":
        path.mkdir()
    else:
        path.symlink_to(device)
    with pytest.raises(ConfigError, match=r"run\.toml: is a (device or pipe|folder), where a reg"):
        load(path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "not valid TOML"),
        ("a = " + "{a = " * 100 + "1" + "}" * 100, "nested more than 64 deep"),
        ("training.seed = " + "9" * 5000, "not valid TOML"),
        ("# " + "a" * 2**20, "has more than 1,048,576 bytes"),
    ],
)
def test_load_of_what_is_too_deep_or_too_long_names_the_file(write, text, wanted):
    with pytest.raises(ConfigError, match=rf"run\.toml: .*{wanted}"):
        load(write("run.toml", text))


def test_load_of_a_name_with_a_zero_byte_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "a\0b.toml")


def test_load_names_the_file_in_errors(write):
    path = write("run.toml", HDIT.replace("size = 32", "size = 30"))
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:\n  model.patch_size: ")


def test_extends_merges_tables_and_replaces_arrays(write):
    write("base.toml", HDIT)
    path = write(
        "run.toml",
        """
        extends = "base.toml"
        training = { batch_size = 6, optimizer = { betas = [0.5, 0.6] } }
        [[model.levels]]
        depth = 7
        width = 32
        attention = { kind = "global", d_head = 32 }
        """,
    )
    config = load(path)
    assert (config.training.batch_size, config.training.images) == (6, 1000)
    assert config.training.optimizer.betas == (0.5, 0.6)
    assert config.model.patch_size == 2
    assert [level.depth for level in config.model.levels] == [7]
    assert config.data.size == (32, 32)


def test_extends_with_another_kind_replaces_the_table(write):
    write("base.toml", HDIT + "[sampling]\nsampler = { kind = 'dpmpp_2m_sde', eta = 0.5 }\n")
    other = load(
        write(
            "other.toml",
            """
            extends = "base.toml"
            sampling = { sampler = { kind = "dpmpp_3m_sde" } }
            data = { kind = "folder", path = "x", size = 32 }
            """,
        )
    )
    assert other.sampling.sampler.kind == "dpmpp_3m_sde"
    assert other.sampling.sampler.eta == 1  # the default, not that of the other kind
    assert other.data.kind == "folder"
    same = load(
        write(
            "same.toml",
            """
            extends = "base.toml"
            sampling = { sampler = { kind = "dpmpp_2m_sde", s_noise = 0.9 } }
            """,
        )
    )
    assert (same.sampling.sampler.eta, same.sampling.sampler.s_noise) == (0.5, 0.9)


def test_extends_is_relative_to_the_file_that_says_so(write, monkeypatch, tmp_path):
    write("base/hdit.toml", HDIT)
    write("base/small.toml", "extends = 'hdit.toml'\ntraining.seed = 5\n")
    path = write("runs/mine/run.toml", "extends = '../../base/small.toml'\n")
    monkeypatch.chdir(tmp_path / "runs")
    for name in (path, "mine/run.toml"):
        assert load(name).training.seed == 5


def test_extends_of_several_files_lets_the_later_win_and_the_file_itself_last(write):
    write("base.toml", HDIT)
    write("a.toml", "training = { seed = 1, images = 11, batch_size = 1 }")
    write("b.toml", "training = { images = 22, batch_size = 2 }")
    config = load(
        write("run.toml", "extends = ['base.toml', 'a.toml', 'b.toml']\ntraining.batch_size = 3")
    )
    training = config.training
    assert (training.seed, training.images, training.batch_size) == (1, 22, 3)


def test_extends_of_the_same_file_on_two_ways_is_no_cycle(write):
    write("base.toml", HDIT)
    write("a.toml", "extends = 'base.toml'")
    write("b.toml", "extends = 'base.toml'\ntraining.seed = 2")
    path = write("run.toml", "extends = ['a.toml', 'b.toml']")
    assert load(path).training.seed == 2


def test_extends_of_the_same_file_twice_at_each_of_many_levels_reads_each_once(write):
    """Two to the power of 30 readings otherwise."""
    write("0.toml", HDIT)
    for i in range(1, 30):
        write(f"{i}.toml", f"extends = ['{i - 1}.toml', '{i - 1}.toml']")
    path = write("run.toml", "extends = '29.toml'\ntraining.seed = 7")
    assert load(path).training.seed == 7


def test_extends_in_a_longer_chain_than_anybody_needs_is_refused(write):
    for i in range(50):
        write(f"{i}.toml", f"extends = '{i + 1}.toml'")
    path = write("run.toml", "extends = '0.toml'")
    with pytest.raises(ConfigError, match="more than 32 files extend one another"):
        load(path)


def test_extends_in_a_cycle_names_the_chain(write):
    for name, base in [("a", "b"), ("b", "c"), ("c", "a")]:
        write(f"{name}.toml", f"extends = '{base}.toml'")
    path = write("run.toml", "extends = 'a.toml'")
    chain = " -> .*".join(f"{name}.toml" for name in ("run", "a", "b", "c", "a"))
    with pytest.raises(ConfigError, match=rf"a\.toml: extends itself: .*{chain}"):
        load(path)
    with pytest.raises(ConfigError, match=r"self\.toml: extends itself"):
        load(write("self.toml", "extends = './self.toml'"))


def test_extends_of_a_missing_file_names_it(write):
    write("base.toml", HDIT)
    path = write("run.toml", "extends = 'bse.toml'")
    with pytest.raises(ConfigError, match=r"bse\.toml: no such config file; did you mean .*/base"):
        load(path)


def test_extends_finds_a_file_whose_name_is_not_utf8(write, tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.toml")).write_text(HDIT)
    assert load(write("run.toml", r"extends = 'caf\xe9.toml'")) == changed()


@pytest.mark.parametrize("value", ["3", "['a.toml', 3]", "{ file = 'a.toml' }", "''"])
def test_extends_that_names_no_files_is_an_error(write, value):
    path = write("run.toml", f"extends = {value}")
    with pytest.raises(ConfigError, match=r"run\.toml: extends: must be a list of file names, got"):
        load(path)


def test_merge_leaves_both_of_its_tables_as_they_were():
    base, over = {"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 2}, "d": 3}
    assert merge(base, over) == {"a": {"b": 2, "c": [1, 2]}, "d": 3}
    assert (base, over) == ({"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 2}, "d": 3})


# ---- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.n=3", {"a": {"n": 3, "s": "x"}}),
        ("a.n=-1.5e-3", {"a": {"n": -1.5e-3, "s": "x"}}),
        ("a.n=1_000", {"a": {"n": 1000, "s": "x"}}),
        ("a.n=true", {"a": {"n": True, "s": "x"}}),
        ("a.s=images/cats", {"a": {"n": 0, "s": "images/cats"}}),
        ("a.s=C:\\pictures", {"a": {"n": 0, "s": "C:\\pictures"}}),
        ("a.s='3'", {"a": {"n": 0, "s": "3"}}),
        ('a.s="a=b"', {"a": {"n": 0, "s": "a=b"}}),
        ("a.s=a=b", {"a": {"n": 0, "s": "a=b"}}),
        ("a.s=", {"a": {"n": 0, "s": ""}}),
        (" a.n = 3 ", {"a": {"n": 3, "s": "x"}}),
        ("a.new=[1, 2]", {"a": {"n": 0, "s": "x", "new": [1, 2]}}),
        ("b.c.d=1", {"a": {"n": 0, "s": "x"}, "b": {"c": {"d": 1}}}),
        ("a={n = 5}", {"a": {"n": 5, "s": "x"}}),
        ("a=5", {"a": 5}),
    ],
)
def test_set_reads_the_value_as_toml_or_as_a_string(override, expected):
    raw = {"a": {"n": 0, "s": "x"}}
    set_key(raw, override)
    assert raw == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("levels.1.depth=9", [{"depth": 1}, {"depth": 9}]),
        ("levels.0.core.kind=x", [{"depth": 1, "core": {"kind": "x"}}, {"depth": 2}]),
        ("levels=[]", []),
    ],
)
def test_set_reaches_into_arrays_by_index(override, expected):
    raw = {"levels": [{"depth": 1}, {"depth": 2}]}
    set_key(raw, override)
    assert raw == {"levels": expected}


def test_set_of_a_table_merges_unless_its_kind_is_another():
    raw = {"sampler": {"kind": "a", "eta": 1}}
    set_key(raw, "sampler={eta=2, s_noise=3}")
    assert raw == {"sampler": {"kind": "a", "eta": 2, "s_noise": 3}}
    set_key(raw, "sampler={kind='b'}")
    assert raw == {"sampler": {"kind": "b"}}


@pytest.mark.parametrize("override", ["", "training.seed", "=3", " = 3", "--seed 3"])
def test_set_without_key_and_value_shows_the_syntax(override):
    with pytest.raises(ConfigError, match="must read KEY=VALUE, as in") as error:
        set_key({}, override)
    assert repr(override) in str(error.value)


@pytest.mark.parametrize("override", [".a=1", "a.=1", "a..b=1", ".=1", "a. .b=1"])
def test_set_of_a_key_that_is_empty_between_dots_is_refused(override):
    with pytest.raises(ConfigError, match="has a part of its key between dots empty") as error:
        set_key({}, override)
    assert repr(override) in str(error.value)


def test_set_allows_blanks_around_the_dots_of_a_key_as_toml_does():
    raw = {}
    set_key(raw, " a . b = 3 ")
    assert raw == {"a": {"b": 3}}


def test_link_to_nothing_is_not_offered_in_its_own_place(tmp_path):
    (tmp_path / "a.toml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"a\.toml: no such config file$"):
        load(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("sampler", "refused"),
    [
        ("{kind='dpmpp_3m_sde'}", True),
        ("{kind='ddim', eta=1}", True),
        ("{kind='ddim', eta=0}", False),
        ("{kind='heun'}", False),
        ("{kind='dpm_adaptive'}", False),
        ("{kind='ddpm'}", True),
    ],
)
def test_steps_closer_than_a_sampler_can_draw_noise_between_are_refused(sampler, refused):
    """Rather than at the first grid of a run that trained for hours."""
    sets = [f"sampling.sampler={sampler}", "sampling.steps=100000"]
    if refused:
        with pytest.raises(ConfigError, match=r"sampling\.steps: 100,000 are too many for the noi"):
            changed(*sets)
    else:
        assert changed(*sets).sampling.steps == 100_000
    assert changed(sets[0], "sampling.steps=4000").sampling.steps == 4000


@pytest.mark.parametrize("index", ["2", "10", "-1", "x", "first", "0x0"])
@pytest.mark.parametrize("rest", ["", ".depth"])
def test_set_beyond_an_array_says_how_many_entries_there_are(index, rest):
    raw = {"model": {"levels": [{"depth": 1}, {"depth": 2}]}}
    with pytest.raises(ConfigError, match=r"model\.levels has 2 entries, counted from 0") as error:
        set_key(raw, f"model.levels.{index}{rest}=3")
    assert repr(index) in str(error.value)
    assert raw == {"model": {"levels": [{"depth": 1}, {"depth": 2}]}}


@pytest.mark.parametrize("key", ["training.seed.x", "training.seed.x.y"])
def test_set_below_a_value_is_an_error(key):
    with pytest.raises(ConfigError, match=r"training\.seed is a value, not a table"):
        set_key({"training": {"seed": 1}}, f"{key}=3")


def test_load_applies_overrides_in_order_after_what_is_extended(write):
    write("base.toml", HDIT)
    path = write("run.toml", "extends = 'base.toml'\ntraining.seed = 1")
    overrides = ["training.seed=2", "training.seed=3", "model.levels.1.depth=5"]
    config = load(path, overrides)
    assert config.training.seed == 3
    assert [level.depth for level in config.model.levels] == [1, 5]


# ---- differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "training.seed=1\ntraining.batch_size=2",
        "training.seed=1\n[data]",
        "training.seed=1\r\nb=2",
        "data.path=a\nb",
        ".".join("a" * 5000) + "=1",
    ],
)
def test_set_of_more_than_a_key_and_its_value_is_refused(override):
    with pytest.raises(ConfigError, match="--set "):
        changed(override)


def test_set_takes_a_value_that_has_several_lines():
    assert changed("data.size=[32,\n64]").data.size == (32, 64)


@pytest.mark.parametrize("index", ["9" * 5000, "99999999999"])
def test_set_beyond_any_array_is_refused(index):
    with pytest.raises(ConfigError, match="levels has 2 entries"):
        changed(f"model.levels.{index}.depth=1")


@pytest.mark.parametrize("quoted", ["{}", '"{}"', '{{path="{}", kind="folder", size=32}}'])
def test_set_of_a_path_that_is_not_utf8_is_text_that_reads_back(quoted):
    """In the run's config.toml, which holds text alone."""
    name = os.fsdecode(b"caf\xe9")
    key = "data" if "kind" in quoted else "data.path"
    override = f"{key}={quoted.format(name)}"
    config = changed("data={kind='folder', path='x', size=32}", override)
    assert config.data.path == r"caf\xe9"
    assert path_of(config.data.path) == Path(name)
    assert parse(tomllib.loads(config.dump()), "dump") == config


def test_differences_of_equal_configs_are_none():
    dump = tomllib.loads(changed().dump())
    assert differences(dump, tomllib.loads(changed().dump())) == []


def test_differences_name_the_keys_of_a_config_that_changed():
    old = tomllib.loads(changed("sampling.sigma_max=80").dump())
    new = tomllib.loads(
        changed("training.seed=4", "model.levels.1.depth=3", "data.size=[32, 64]").dump()
    )
    assert sorted(differences(old, new)) == [
        ("data.size.1", 32, 64),
        ("diffusion.density.noise_d_high", 32.0, 64.0),
        ("model.levels.1.depth", 2, 3),
        ("sampling.sigma_max", 80.0, None),
        ("training.seed", 0, 4),
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": {"b": 1}}, {}, [("a", {"b": 1}, None)]),
        ({}, {"a": [1]}, [("a", None, [1])]),
        ({"a": [1, 2, 3]}, {"a": [1, 5, 3]}, [("a.1", 2, 5)]),
        ({"a": [1, 2]}, {"a": [1]}, [("a", [1, 2], [1])]),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}, [("a.0.b", 1, 2)]),
        ({"a": {"b": 1}}, {"a": 1}, [("a", {"b": 1}, 1)]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, []),
    ],
)
def test_differences_descend_into_tables_and_arrays_of_equal_length(old, new, expected):
    assert differences(old, new) == expected


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("data.size=x", "data.size: must be a side in pixels, or [height, width], got 'x'"),
        ("data.size=0", "data.size: must be a side in pixels, or [height, width], got 0"),
        ("data.size=[8, 0]", "data.size: must be a side"),
        ("data.size=[8, 8, 8]", "data.size: must be a side"),
        ("data.size=true", "data.size: must be a side"),
        ("training.optimizer.betas=[0.9, 1.5]", "training.optimizer.betas.1: must be less than 1"),
        (f"training.seed={2**63}", "training.seed: must be less than"),
        ("diffusion.beta_schedule={steps=10}", "diffusion.beta_schedule: with 10 steps the betas"),
        ('diffusion.density={kind="lognormal", mean=1000}', "diffusion.density.mean: must be less"),
        (
            'sampling.sampler={kind="euler", eta=1}',
            "sampling.sampler.eta: unknown key (set to 1); it belongs to kind 'euler_ancestral' or",
        ),
        (
            "model.levels.1.attention.kernel_size=3",
            "model.levels.1.attention.kernel_size: unknown key (set to 3); it belongs to kind "
            "'neighborhood'",
        ),
        ("model.levels.²=3", "--set"),
    ],
)
def test_load_refuses_what_no_run_could_use(override, wanted):
    with pytest.raises(ConfigError) as error:
        changed(override)
    lines = str(error.value).splitlines()
    assert wanted in str(error.value)
    assert len(lines) == 1 + (not override.startswith("model.levels.²")), lines


def test_set_merges_a_table_into_an_array_entry():
    assert (
        changed("model.levels.0={depth=3}").model.levels[0].width == changed().model.levels[0].width
    )


def test_resolved_config_writes_out_what_follows_from_other_settings():
    config = changed()
    density = config.diffusion.density
    assert config.diffusion.c_noise == "log_quarter"
    assert config.diffusion.beta_schedule is None
    assert config.diffusion.weighting.gamma == 4
    logistic = changed("diffusion.density={kind='loglogistic'}").diffusion.density
    assert logistic.loc == pytest.approx(-0.6931471805599453)  # ln of sigma_data 0.5
    assert (density.noise_d_low, density.noise_d_high) == (32, 32)
    assert all(level.d_ff == 3 * level.width for level in config.model.levels)
    assert config.training.log_every == 10 * config.training.batch_size
    assert (
        config.sampling.sigma_max is None
    )  # goes with the sigma schedule, which sampling may change


def test_resolved_config_of_a_vp_model_has_its_schedule_and_range():
    config = load(CONFIGS[0].with_name("digits-dit.toml"))
    assert config.diffusion.c_noise == "timestep"
    assert config.diffusion.beta_schedule.steps == 1000
    assert config.sigma_range() == pytest.approx((0.0100005, 157.41), rel=1e-4)


def test_config_linear_t_is_within_its_timesteps():
    """Its levels are the table's, which has none beyond its ends."""
    sigma_schedule = "sampling.sigmas={kind='linear_t'}"
    low, high = changed(sigma_schedule).sigma_range()
    assert (low, high) == pytest.approx((0.0100005, 157.407), rel=1e-5)
    [line] = complaints(sigma_schedule, "sampling.sigma_max=500")
    assert line.startswith("sampling.sigmas: noise levels 0.010001 to 500 leave the timesteps' ")


@pytest.mark.parametrize("density", ["lognormal', mean=20, std=20", "loglogistic', scale=20"])
def test_config_density_beyond_float32_is_refused(density):
    [line] = complaints(f"diffusion.density={{kind='{density}}}")
    assert line.startswith("diffusion.density: noise levels ")
    assert "beyond float32's reach; set sigma_min and sigma_max" in line


@pytest.mark.parametrize("parametrization", ["edm", "v", "eps_vp", "x0", "flow"])
@pytest.mark.parametrize(
    "density",
    [
        "cosine_interpolated",
        "lognormal",
        "split_lognormal",
        "loglogistic",
        "loguniform",
        "v_diffusion",
        "uniform_flow",
        "logit_normal_flow",
        "uniform_vp",
    ],
)
@pytest.mark.parametrize("learned", ["true", "false"])
def test_any_parametrization_goes_with_any_density_and_variance(parametrization, density, learned):
    """Bounds that are not set are those within which the denoiser is defined."""
    config = changed(
        f"diffusion.parametrization.kind={parametrization}",
        f"diffusion.density.kind={density}",
        f"diffusion.learned_variance={learned}",
    )
    low, high, _ = config.valid_range()
    start, end = config.diffusion.density.sigma_range(config.data_shape(0), config.beta_schedule)
    assert low * (1 - 1e-6) <= start < end <= high * (1 + 1e-6)
    sigmas = config.sampling.sigmas(9, *config.sigma_range(), config.beta_schedule)
    assert low * (1 - 1e-6) <= sigmas[-2] < sigmas[0] <= high * (1 + 1e-6)


def test_config_rate_below_which_it_must_not_fall_is_at_most_its_own():
    schedule = "training.optimizer.schedule={kind='inverse', min_lr=0.1}"
    [line] = complaints(schedule)
    assert line.startswith("training.optimizer.schedule.min_lr: must be at most ")


@pytest.mark.parametrize("setting", ["power=0.75", "inv_gamma=10.0"])
def test_config_ema_without_warmup_takes_no_shape_of_it(setting):
    [line] = complaints(f"training.ema={{warmup=false, {setting}}}")
    assert line.startswith("training.ema: power and inv_gamma have no effect with warmup = false")
    assert changed("training.ema={warmup=false, max_decay=0.99}").training.ema.max_decay == 0.99


def test_config_kind_without_its_table_is_shown_one():
    [line] = complaints("diffusion.parametrization=flow")
    assert line.startswith("diffusion.parametrization: must be a table, got 'flow'; write ")
    assert "{ kind = 'flow' }" in line


def test_config_of_latents_tells_the_shape_that_the_model_sees():
    config = changed("space.kind=latent", "data.size=[64, 128]", "model.patch_size=1", base=DIT2)
    assert config.data_shape(7) == DataShape(4, 8, 16, 7, 1.0)
    with pytest.raises(UserError, match=r"space\.vae: must be set to train"):
        config.space.open(torch.device("cpu"))
    [line] = complaints("space={kind='latent', factor=7, tile=0}", "model.patch_size=1", base=DIT2)
    assert line == "space.factor: 7 does not divide the image of 64x64"


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("sampling.ladder.kind=karras", "sampling.sigmas"),
        ("diffusion.schedule={kind='cosine'}", "diffusion.beta_schedule"),
        ("diffusion.noise_label=timestep", "diffusion.c_noise"),
    ],
)
def test_config_key_of_an_earlier_version_is_told_its_name(override, name):
    [line] = complaints(override)
    assert line.endswith(f"; did you mean {name}?")
