"""To our folder and back: names, dtypes and values of a checkpoint come through bitwise."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_answers import FOLDER, load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hdit import config
from hdit.config.presets import find_config
from hdit.config.schema import EMASpec
from hdit.interop import Contents, InteropError, k_diffusion
from hdit.runs.conversion import convert
from hdit.runs.trained import Trained

HEADS = 5  # of dit_tiny, which is none of the paper's sizes


def assert_bitwise(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def metadata(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_k_diffusion_round_trip_is_bitwise(name, tmp_path):
    source = FOLDER / f"hdit_tiny_{name}.safetensors"
    convert(source, tmp_path / "ours")
    back = convert(tmp_path / "ours", tmp_path / "back.safetensors", "k-diffusion")
    assert_bitwise(load_file(back.path), load_file(source))
    theirs, again = metadata(source), metadata(back.path)
    again["model"].pop("sigma_sample_density"), theirs["model"].pop("sigma_sample_density")
    assert again["ema_sched"].pop("inv_gamma") == 1
    assert again == theirs
    assert Trained.open(back.path).config == Trained.open(source).config


def dit_tiny(dtype=torch.float32):
    return {name: t.to(dtype) for name, t in load("dit_tiny.safetensors").items()}


ORDER = ["pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_facebook_round_trip_is_bitwise(dtype, tmp_path):
    theirs = dit_tiny(dtype)
    torch.save(theirs, tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "ours", num_heads=HEADS)
    done = convert(tmp_path / "ours", tmp_path / "back.pt", "facebook-dit")
    back = torch.load(done.path, weights_only=True)
    assert_bitwise(back, theirs)
    assert list(dict.fromkeys(name.split(".")[0] for name in back)) == ORDER
    assert "--num-heads 5" in done.notes[-1]


@pytest.mark.parametrize("raw", [False, True])
def test_facebook_training_checkpoint_gives_its_ema_or_raw_weights(raw, tmp_path):
    ema, trained = dit_tiny(), {name: t + 1 for name, t in dit_tiny().items()}
    args = Namespace(model="DiT-tiny", image_size=64, num_classes=7, results_dir="results")
    saved = {"model": trained, "ema": ema, "opt": {"state": {}}, "args": args}
    torch.save(saved, tmp_path / "0050000.pt")
    model = Trained.open(tmp_path / "0050000.pt", num_heads=HEADS).contents(raw)
    assert model.weights == ("model" if raw else "ema")
    name = "final_layer.linear.weight"
    assert torch.equal(model.state_dict[name], (trained if raw else ema)[name])


@pytest.fixture
def diffusers_folder(tmp_path):
    """A DiT as diffusers saves it, in a pipeline with names of classes."""
    diffusers = pytest.importorskip("diffusers", reason="the extra [dev] brings diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=3,
        norm_eps=1e-6,
    )
    blocks = model.transformer_blocks
    for block in blocks:  # as a trained one has them
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    model.save_pretrained(tmp_path / "theirs" / "transformer")
    index = {"id2label": {"0": "crane", "1": "tench, Tinca tinca", "2": "crane, a bird"}}
    (tmp_path / "theirs" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "theirs"


def diffusers_weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_diffusers_round_trip_is_bitwise(diffusers_folder, tmp_path):
    convert(diffusers_folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert_bitwise(
        diffusers_weights(tmp_path / "back"), diffusers_weights(diffusers_folder / "transformer")
    )
    theirs, back = (
        json.loads((f / "config.json").read_text())
        for f in (diffusers_folder / "transformer", tmp_path / "back")
    )
    theirs.pop("_diffusers_version")
    assert back == theirs


def test_diffusers_pipeline_gives_its_classes_names_and_schedule(diffusers_folder):
    scheduler = {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.01}
    scheduler |= {"beta_schedule": "linear", "prediction_type": "epsilon"}
    (diffusers_folder / "scheduler").mkdir()
    (diffusers_folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    model = Trained.open(diffusers_folder)
    assert model.classes == ("crane (0)", "tench", "crane (2)")
    expected = torch.linspace(2e-4, 0.01, 500, dtype=torch.float64)
    torch.testing.assert_close(model.config.beta_schedule.betas(), expected)
    assert Trained.open(diffusers_folder / "transformer").classes == model.classes


def test_diffusers_blocks_that_do_not_share_embedders_are_refused(diffusers_folder):
    path = diffusers_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)
    with pytest.raises(InteropError, match=rf"{name} differs from transformer_blocks\.0"):
        Trained.open(diffusers_folder)


def test_facebook_to_diffusers_and_back_is_bitwise(tmp_path):
    """But for the table of positions, which diffusers computes: ours is theirs to float32."""
    convert(FOLDER / "dit_tiny.safetensors", tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "back.pt", "facebook-dit")
    theirs, back = dit_tiny(), torch.load(tmp_path / "back.pt", weights_only=True)
    torch.testing.assert_close(back.pop("pos_embed"), theirs.pop("pos_embed"), atol=1e-6, rtol=0)
    assert_bitwise(back, theirs)


# ---- settings ------------------------------------------------------------------------------------

DENSITIES = [
    {"kind": "lognormal", "mean": -1.0, "std": 1.5},
    {"kind": "split_lognormal", "mode": -1.0, "std_low": 0.7, "std_high": 1.3},
    {"kind": "loglogistic", "loc": -0.5, "scale": 0.4, "sigma_max": 80.0},
    {"kind": "loguniform", "sigma_min": 0.02, "sigma_max": 90.0},
    {"kind": "v_diffusion", "sigma_min": 0.002, "sigma_max": 800.0},
    {"kind": "cosine_interpolated", "noise_d_low": 16.0, "noise_d_high": 128.0},
]
WEIGHTINGS = [{"kind": "edm"}, {"kind": "eps"}, {"kind": "soft_min_snr", "gamma": 4.0}]
SCHEDULES = [
    {"kind": "constant", "warmup": 0.9},
    {"kind": "inverse", "inv_gamma": 100.0, "power": 0.5, "min_lr": 1e-6},
    {"kind": "exponential", "steps": 1000.0, "decay": 0.7},
]


def changed(**diffusion):
    """The tiny model with other settings of the diffusion."""
    model = Trained.open(FOLDER / "hdit_tiny_fp32.safetensors")
    raw = model.config.model_dump(mode="json", exclude_none=True)
    schedule = diffusion.pop("lr_schedule", None)
    raw["diffusion"] |= diffusion
    if schedule:
        raw["training"]["optimizer"]["schedule"] = schedule
    settings = config.parse(raw, "changed")
    return Contents(settings, model.shape, model.classes, {"given": model.tensors()}, "tiny")


@pytest.mark.parametrize(
    "settings",
    [
        *({"density": density} for density in DENSITIES),
        *({"weighting": weighting} for weighting in WEIGHTINGS),
        *({"lr_schedule": schedule} for schedule in SCHEDULES),
        {"loss_scales": 3},
    ],
    ids=str,
)
def test_k_diffusion_settings_come_back_as_they_went(settings):
    model = changed(**settings)
    raw, notes = k_diffusion.to_config(model)
    assert not notes
    back, _, _ = k_diffusion.from_config(json.loads(json.dumps(raw)), "back.json")
    assert back.diffusion == model.config.diffusion
    assert back.training == model.config.training


def test_k_diffusion_ema_without_warmup_warms_up_in_one_step():
    """Theirs has no other: decay min(max_value, 1 - (1 + k)^-power)."""
    model = changed()
    training = model.config.training
    settings = training.model_copy(update={"ema": EMASpec(warmup=False)})
    model = replace(model, config=model.config.model_copy(update={"training": settings}))
    theirs = k_diffusion.to_config(model)[0]["ema_sched"]
    decay = [min(theirs["max_value"], 1 - (1 + k) ** -theirs["power"]) for k in range(3)]
    assert decay == [0, 0.9999, 0.9999]


@pytest.mark.parametrize(
    ("setting", "note"),
    [
        ({"data": {"flip": True}}, "data.flip = True has no place"),
        ({"data": {"crop": "center"}}, "data.crop = 'center' has no place"),
        ({"training": {"clip_grad_norm": 0}}, "training.clip_grad_norm = 0.0 has no place"),
        ({"training": {"ema": {"warmup": False}}}, "ema.warmup = False was written as a power"),
        ({"space": {"kind": "latent", "sigma_data": 0.5}}, "space.kind = 'latent' has no place"),
    ],
)
def test_k_diffusion_recipe_that_its_config_cannot_hold_is_named(setting, note):
    model = changed()
    raw = model.config.model_dump(mode="json", exclude_none=True)
    [(table, values)] = setting.items()
    raw[table] = values if "kind" in values else raw[table] | values
    if table == "space":
        raw["data"] |= {"size": [128, 128]}
    model = replace(model, config=config.parse(raw, "changed"))
    _, notes = k_diffusion.to_config(model)
    assert len(notes) == 1
    assert note in notes[0]


@pytest.mark.parametrize("kind", ["facebook-dit", "diffusers"])
def test_dit_whose_null_class_was_not_trained_is_exported_with_a_note(kind, tmp_path):
    torch.save({"model": dit_tiny(), "args": {"class_dropout_prob": 0.0}}, tmp_path / "dit.pt")
    out = tmp_path / ("out.pt" if kind == "facebook-dit" else "out")
    done = convert(tmp_path / "dit.pt", out, kind, num_heads=HEADS)
    assert any("label_dropout was 0" in note for note in done.notes)


def test_facebook_checkpoint_has_the_recipe_of_the_preset(tmp_path):
    torch.save(dit_tiny(), tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "ours", num_heads=HEADS)
    preset = config.load(find_config(Path("dit-xl-2-256"))).training
    same = {"images": preset.images, "workers": preset.workers}
    training = Trained.open(tmp_path / "ours").config.training
    assert training.model_copy(update=same) == preset


def test_k_diffusion_training_settings_without_counterpart_are_named():
    model = changed(weighting={"kind": "min_snr"}, density={"kind": "uniform_flow"})
    raw, notes = k_diffusion.to_config(model)
    assert "min_snr" in notes[0]
    assert "uniform_flow" in notes[1]
    assert not {"loss_weighting", "sigma_sample_density"} & set(raw["model"])


def test_k_diffusion_config_alone_becomes_a_config_of_ours(tmp_path):
    raw = load("hdit_tiny_config_input.json") | {"optimizer": {"type": "sgd", "lr": 0.1}}
    raw["model"] = raw["model"] | {"augment_prob": 0.12}
    (tmp_path / "theirs.json").write_text(json.dumps(raw))
    done = convert(tmp_path / "theirs.json", tmp_path / "ours.toml")
    settings = config.load(tmp_path / "ours.toml")
    assert settings.model == Trained.open(FOLDER / "hdit_tiny_fp32.safetensors").config.model
    text = (tmp_path / "ours.toml").read_text()
    for named in ("optimizer.type = 'sgd'", "optimizer.lr = 0.1"):
        assert any(note.startswith(named) for note in done.notes), named
        assert f"# {named}" in text


def test_k_diffusion_settings_that_are_absent_are_its_loaders_defaults():
    model = {
        "type": "image_transformer_v2",
        **{"input_channels": 3, "input_size": [32, 64], "patch_size": [4, 4]},
        **{"depths": [1, 2], "widths": [64, 128], "sigma_min": 5e-4, "sigma_max": 2000.0},
    }
    settings, shape, notes = k_diffusion.from_config({"model": model}, "minimal")
    assert not notes
    assert (shape.sigma_data, shape.num_classes) == (1.0, 0)
    spec, training = settings.model, settings.training
    assert [level.attention.kind for level in spec.levels] == ["neighborhood", "global"]
    assert [level.attention.d_head for level in spec.levels] == [64, 64]
    assert spec.levels[0].attention.kernel_size == 7
    assert [level.d_ff for level in spec.levels] == [192, 384]
    mapping = spec.mapping
    assert (mapping.depth, mapping.width, mapping.d_ff, mapping.dropout) == (2, 256, 768, 0)
    assert settings.diffusion.weighting.kind == "edm"
    assert (settings.diffusion.loss_scales, settings.data.augment.probability) == (1, 0)
    optimizer, ema = training.optimizer, training.ema
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (5e-4, (0.9, 0.99), 1e-8)
    assert (optimizer.weight_decay, training.label_dropout) == (1e-4, 0.1)
    assert (optimizer.schedule.kind, optimizer.schedule.warmup) == ("constant", 0)
    assert (ema.power, ema.inv_gamma, ema.max_decay) == (0.6667, 1, 0.9999)


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("loguniform", (5e-4, 2000.0)),
        ("v-diffusion", (1e-3, 1e3)),
        ("cosine-interpolated", (5e-4, 2000.0)),
    ],
)
def test_k_diffusion_density_without_ends_has_those_of_its_model(kind, ends):
    raw = json.loads(json.dumps(load("hdit_tiny_config_input.json")))
    raw["model"] |= {"sigma_min": 5e-4, "sigma_max": 2000.0, "sigma_sample_density": {"type": kind}}
    density = k_diffusion.from_config(raw, "ends")[0].diffusion.density
    assert (density.sigma_min, density.sigma_max) == ends
