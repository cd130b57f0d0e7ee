import tomllib
from pathlib import Path

import pytest

from hdit.config import ConfigError, load, presets
from hdit.config.schema import parse

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_presets_are_the_configs_that_a_run_can_take():
    found = presets.presets()
    assert "digits-hdit" in found
    assert "ablation/e" in found
    assert not {"ablation/base", "ablation/size256", "matrices/small"} & found.keys()
    assert all(len(title) > 20 and title[-1] in ".:" for title in found.values()), found


@pytest.mark.parametrize("name", presets.presets())
def test_preset_that_is_saved_elsewhere_is_the_same_config(name):
    text = presets.standalone(name)
    assert text.startswith("# ")
    table = tomllib.loads(text)
    assert "extends" not in table
    assert parse(table, name) == load(CONFIGS / f"{name}.toml")


def test_preset_is_found_by_its_name(empty):
    assert presets.find_config(Path("digits-hdit")) == CONFIGS / "digits-hdit.toml"
    assert presets.find_config(Path("ablation/e")) == CONFIGS / "ablation" / "e.toml"
    Path("digits-hdit").mkdir()
    assert presets.find_config(Path("digits-hdit")).is_file(), "a folder is no config"


def test_file_goes_before_a_preset_of_its_name(empty):
    Path("digits-hdit").write_text("mine")
    assert presets.find_config(Path("digits-hdit")) == Path("digits-hdit")
    assert presets.or_preset("digits-hdit") == "digits-hdit"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ("digits-hdti", "digits-hdti: neither a config file nor a preset; did you mean digits-hdi"),
        ("something", "`hdit configs` lists the presets"),
        ("configs/digits-hdit.toml", "no such config file; the preset is named digits-hdit"),
    ],
)
def test_config_that_is_neither_says_what_there_is(empty, config, wanted):
    with pytest.raises(ConfigError, match=wanted):
        presets.find_config(Path(config))


DIT = [name for name in presets.presets() if name.startswith("dit-")]


@pytest.mark.parametrize("name", [*DIT, "ablation/r1"])
def test_preset_of_a_dit_has_the_recipe_of_its_paper(name):
    """Peebles & Xie, 2023, section 4, and the defaults of its code."""
    config = load(CONFIGS / f"{name}.toml").model_dump(exclude={"data", "space", "model"})
    training, diffusion = config["training"], config["diffusion"]
    assert training["optimizer"] == {
        "kind": "adamw",
        "lr": 1e-4,
        "schedule": {"kind": "constant", "warmup": 0, "warmup_images": None},
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
    }
    assert training["ema"]["max_decay"] == 0.9999
    assert not training["ema"]["warmup"]
    assert training["clip_grad_norm"] == 0
    assert training["batch_size"] == 256
    assert training["label_dropout"] == 0.1
    schedule = {"kind": "linear", "steps": 1000, "beta_start": 1e-4, "beta_end": 2e-2}
    assert diffusion == {
        "parametrization": {"kind": "eps_vp"},
        "c_noise": "timestep",
        "weighting": {"kind": "eps"},
        "loss_scales": 1,
        "density": {"kind": "uniform_vp"},
        "beta_schedule": schedule,
        "learned_variance": True,
    }
    assert config["sampling"]["sampler"] == {"kind": "ddpm", "variance": "learned"}
    assert config["sampling"]["sigmas"]["kind"] == "linear_t"
    assert config["sampling"]["steps"] == 250


@pytest.mark.parametrize("name", DIT)
def test_preset_of_a_latent_dit_has_the_data_of_its_paper(name):
    config = load(CONFIGS / f"{name}.toml")
    assert config.data.flip
    assert config.data.classes == 1000
    assert config.data_shape(1000).chw == (4, config.data.shape[1] // 8, config.data.shape[2] // 8)
    assert config.sampling.guidance.channels == 3


def test_presets_of_a_wheel_lie_in_the_package(empty, monkeypatch):
    monkeypatch.setattr(presets, "__file__", str(empty / "hdit" / "config" / "presets.py"))
    assert presets.folder() == empty / "configs"
    (empty / "hdit" / "presets").mkdir(parents=True)
    assert presets.folder() == empty / "hdit" / "presets"


def test_configs_of_imagenet_name_its_classes():
    for name in ("hdit-imagenet128", "hdit-imagenet256", "dit-xl-2-512", "ablation/h"):
        assert load(CONFIGS / f"{name}.toml").data.classes == 1000
