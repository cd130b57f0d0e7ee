"""The command, what it refuses, and what damage it meets: OUT is whole, or not there."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import TINY
from known_answers import FOLDER, load
from PIL import Image
from safetensors.torch import load_file, save_file

from hdit import config, models
from hdit.errors import UserError
from hdit.files import fingerprint
from hdit.interop import InteropError, k_diffusion
from hdit.interop.files import read_safetensors
from hdit.interop.formats import FORMATS
from hdit.protocols import Cond
from hdit.runs import checkpoint, export
from hdit.runs.checkpoint import State
from hdit.runs.conversion import convert
from hdit.runs.trained import Trained
from hdit.training.trainer import Trainer

HDIT_FILE = FOLDER / "hdit_tiny_fp32.safetensors"
DIT_FILE = FOLDER / "dit_tiny.safetensors"

DIGITS_DIT = """
data = { kind = "digits" }
model = { kind = "dit", patch_size = 2, depth = 2, width = 16, num_heads = 2 }
training = { images = 96, checkpoint_every = 32, batch_size = 16 }

[diffusion]
parametrization = { kind = "eps_vp" }
weighting = { kind = "eps" }
density = { kind = "uniform_vp" }
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the tiny config."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(TINY)
    settings = config.load(folder / "tiny.toml", ["training.images=32"])
    assert Trainer(settings, folder / "run").fit()
    return folder / "run"


@pytest.fixture
def untrained(tmp_path):
    """Makes a checkpoint of random weights, of a config's text and overrides."""

    def make(text, *overrides, classes=tuple("0123456789")):
        (tmp_path / "made.toml").write_text(text)
        settings = config.load(tmp_path / "made.toml", overrides)
        shape = settings.data_shape(len(classes))
        torch.manual_seed(0)
        model = models.build(settings.model, shape, settings.output_channels(shape))
        weights = model.state_dict()
        for name, _ in model.named_parameters():
            weights[name] += torch.randn_like(weights[name]) / 10
        state = State(32, 2, 1498, shape, classes)
        tensors = {"model": weights, "ema": weights}
        return checkpoint.save(tmp_path / "made" / "checkpoints", settings, state, tensors)

    return make


def change_config(folder, **changes):
    """Writes other values over those in config.json of a converted folder, and mends its hash."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(raw | {"sha256": export._sha256(raw)}))


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in folder.glob("0*.png")}


# ---- our own folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_converted_run_samples_the_pictures_of_the_run(raw, trained, hdit, tmp_path):
    out, options = tmp_path / "mine", ["-n", 4, "--labels", "3,none", "--guidance", 1.5, *raw]
    status, said, err = hdit("convert", trained, out, *raw)
    assert status == 0, err
    assert f"hdit run run, checkpoint 000000000032 -> hdit: {out}" in said
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    for source, name in ((trained, "a"), (out, "b")):
        status, _, err = hdit("sample", source, "--out", tmp_path / name, *options)
        assert status == 0, err
    run, converted = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert len(run) == 4
    for name, picture in run.items():
        assert np.array_equal(picture, converted[name])


def test_card_says_what_it_is_and_leaves_the_licence_open(trained, tmp_path):
    convert(trained, tmp_path / "digits-model")
    card = (tmp_path / "digits-model" / "README.md").read_text()
    model = Trained.open(tmp_path / "digits-model")
    number = sum(p.numel() for p in model.network().parameters())
    for text in (
        "# digits-model\n",
        f"| Parameters | {number:,} |",
        "| Sees and predicts | 1 x 8 x 8 (channels, height, width), pixels |",
        "| Trained on | 32 images |",
        "| Weights | moving average (EMA) |",
        "# license: to be set by whoever publishes these weights",
        "hdit sample digits-model -n 16 --labels '#0' --guidance 1.5",
    ):
        assert text in card


def test_run_whose_name_is_not_utf8_is_converted_and_sampled(trained, hdit, tmp_path):
    run, out = (tmp_path / os.fsdecode(name) for name in (b"run \xff", b"out \xfe"))
    shutil.copytree(trained, run)
    status, said, err = hdit("convert", run, out)
    assert status == 0, err
    assert r"hdit run run \xff, checkpoint 000000000032 -> hdit:" in said
    assert r"# out \xfe" in (out / "README.md").read_text()
    status, said, err = hdit("sample", out, "-n", 1)
    assert (status, r"out \xfe-samples" in said) == (0, True), err


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ([], " --labels '#0' --guidance 1.5"),
        (["training.label_dropout=0"], " --labels '#0'"),
        (
            ["space.kind='latent'", "space.factor=1", "space.channels=1"],
            " --labels '#0' --guidance 1.5 --set space.vae=FOLDER",
        ),
    ],
)
def test_card_has_a_command_that_the_model_can_do(overrides, options, untrained, tmp_path):
    convert(untrained(DIGITS_DIT, *overrides), tmp_path / "ours")
    assert f"hdit sample ours -n 16{options}\n" in (tmp_path / "ours" / "README.md").read_text()


def test_sample_of_a_converted_folder_writes_beside_it(trained, hdit, tmp_path):
    convert(trained, tmp_path / "mine")
    status, _, err = hdit("sample", tmp_path / "mine", "-n", 2)
    assert status == 0, err
    (folder,) = (tmp_path / "mine-samples").iterdir()
    assert len(pictures(folder)) == 2
    assert json.loads((folder / "samples.json").read_text())["weights"] == "ema"


def test_sample_of_raw_weights_that_were_left_behind_is_refused(trained, hdit, tmp_path):
    convert(trained, tmp_path / "mine")
    status, _, err = hdit("sample", tmp_path / "mine", "--raw")
    assert status == 1
    assert "has one set of weights, 'ema'; leave --raw out" in err


def test_converted_k_diffusion_model_samples_in_its_range(hdit, tmp_path):
    status, _, err = hdit("convert", FOLDER / "hdit_tiny_fp16.safetensors", tmp_path / "theirs")
    assert status == 0, err
    assert "note: dataset.cond" not in err, "it has a counterpart"
    options = ["-n", 2, "--steps", 2, "--guidance", 1.3, "--labels", "6"]
    status, _, err = hdit("sample", tmp_path / "theirs", "--out", tmp_path / "out", *options)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["sigma_range"] == [0.01, 160]
    assert all(picture.shape == (32, 32, 3) for picture in pictures(tmp_path / "out").values())


def test_sample_of_latents_without_a_vae_is_refused_before_anything_is_written(hdit, tmp_path):
    convert(DIT_FILE, tmp_path / "theirs")
    vae = f"space.vae={tmp_path}/nowhere"
    status, _, err = hdit("sample", tmp_path / "theirs", "--out", tmp_path / "out", "--set", vae)
    assert status == 1
    assert err.startswith("error: space.vae: ")
    assert "does not exist" in err
    assert not (tmp_path / "out").exists()


def test_help_of_convert_does_not_import_torch():
    code = (
        "import sys\nfrom hdit import cli\nsys.argv = ['hdit', 'convert', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


# ---- our models in other formats -----------------------------------------------------------------


def same_outputs(first, second):
    x = torch.randn(2, *first.shape.chw, generator=torch.Generator().manual_seed(1))
    c_noise, labels = torch.tensor([0.3, 0.7]), torch.tensor([1, -1])
    with torch.no_grad():
        a, b = (m.network()(x, c_noise, Cond(labels)) for m in (first, second))
    assert a.std() > 1e-3
    assert torch.equal(a, b)


def test_our_hdit_comes_back_from_k_diffusion(untrained, tmp_path):
    source = untrained(TINY)
    done = convert(source, tmp_path / "mine.safetensors", "k-diffusion")
    back, ours = Trained.open(done.path), Trained.open(source)
    same_outputs(ours, back)
    assert back.config.diffusion == ours.config.diffusion


@pytest.mark.parametrize(("kind", "name"), [("facebook-dit", "mine.pt"), ("diffusers", "mine")])
@pytest.mark.parametrize("learned", ["true", "false"])
def test_our_dit_of_pixels_comes_back_from_others(kind, name, learned, untrained, tmp_path):
    source = untrained(DIGITS_DIT, f"diffusion.learned_variance={learned}")
    done = convert(source, tmp_path / name, kind)
    back = Trained.open(done.path, num_heads=2 if kind == "facebook-dit" else None)
    ours = Trained.open(source)
    same_outputs(ours, back)
    assert back.shape == ours.shape


@pytest.mark.parametrize(
    ("text", "overrides", "kind", "named"),
    [
        (TINY, [], "facebook-dit", "facebook-dit holds DiT only"),
        (TINY, [], "diffusers", "diffusers holds DiT only"),
        (DIGITS_DIT, [], "k-diffusion", "k-diffusion holds HDiT only"),
        (TINY, ["model.skip=add"], "k-diffusion", "model.skip = 'add': it has 'lerp' only"),
        (TINY, ["model.positions=additive"], "k-diffusion", "model.positions = 'additive'"),
        (TINY, ["model.norm=ada_ln"], "k-diffusion", "model.norm = 'ada_ln'"),
        (TINY, ["diffusion.parametrization.kind=v"], "k-diffusion", "parametrization.kind = 'v'"),
        (TINY, ["diffusion.c_noise=atan"], "k-diffusion", "diffusion.c_noise = 'atan'"),
        (DIGITS_DIT, ["model.conditioning.kind=adaln"], "facebook-dit", "model.conditioning.kind"),
        (DIGITS_DIT, ["model.conditioning.kind=adaln"], "diffusers", "model.conditioning.kind"),
        (DIGITS_DIT, ["diffusion.parametrization.kind=v"], "diffusers", "parametrization.kind"),
        (DIGITS_DIT, ["diffusion.beta_schedule.steps=500"], "facebook-dit", "schedule.steps = 500"),
        (DIGITS_DIT, ["model.mlp_ratio=2"], "diffusers", "model.mlp_ratio = 2.0: it has 4.0 only"),
    ],
)
def test_model_that_a_format_cannot_hold_is_refused_by_its_settings(
    text, overrides, kind, named, untrained, tmp_path
):
    source = untrained(text, *overrides)
    out = tmp_path / f"out{FORMATS[kind].suffix or ''}"
    with pytest.raises(InteropError) as caught:
        convert(source, out, kind)
    assert named in str(caught.value)
    assert not list(tmp_path.glob("*out*")), "nothing is left"


def test_dit_without_classes_is_refused(untrained, tmp_path):
    source = untrained(DIGITS_DIT, classes=())
    with pytest.raises(InteropError, match="class-conditional DiT only"):
        convert(source, tmp_path / "out.pt", "facebook-dit")


def test_dit_of_oblong_images_is_refused(untrained, tmp_path):
    size = 'data={kind="shapes", size=[8, 16]}'
    source = untrained(DIGITS_DIT, size, classes=tuple("abcde"))
    with pytest.raises(InteropError, match="width = 16: it has 8 only"):
        convert(source, tmp_path / "out.pt", "facebook-dit")


def test_positions_that_diffusers_would_not_compute_are_refused(tmp_path):
    tensors = load("dit_tiny.safetensors")
    torch.save(tensors | {"pos_embed": tensors["pos_embed"] + 0.1}, tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "back.pt", "facebook-dit", num_heads=5)
    with pytest.raises(InteropError, match="pos_embed is not the table"):
        convert(tmp_path / "dit.pt", tmp_path / "out", "diffusers", num_heads=5)
    assert not (tmp_path / "out").exists()


# ---- OUT -----------------------------------------------------------------------------------------


def test_out_that_is_taken_is_refused_and_an_empty_folder_is_not(tmp_path):
    (tmp_path / "out").mkdir()
    convert(HDIT_FILE, tmp_path / "out")
    with pytest.raises(InteropError, match="is there already; hdit needs a new or an empty"):
        convert(HDIT_FILE, tmp_path / "out")
    with pytest.raises(InteropError, match=r"ends in \.safetensors"):
        convert(HDIT_FILE, tmp_path / "out2", "k-diffusion")
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b.safetensors").symlink_to("nowhere")
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(InteropError, match="name a new file"):
            convert(HDIT_FILE, tmp_path / name, "k-diffusion")


def test_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "card", full)
    with pytest.raises(OSError, match="No space left"):
        convert(HDIT_FILE, tmp_path / "out")
    with pytest.raises(OSError, match="No space left"):
        convert(HDIT_FILE, tmp_path / "new" / "folders" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([HDIT_FILE, "out", "--to", "onnx"], "--to: must be one of hdit, k-diffusion"),
        ([HDIT_FILE, "out", "--num-heads", 4], "tells the number of heads"),
        ([HDIT_FILE, "out", "--raw"], "has one set of weights"),
        ([FOLDER / "README.md", "out"], "no checkpoint that is known"),
        ([FOLDER / "none.pt", "out"], "no such run or checkpoint"),
        ([FOLDER / "hdit_tiny_io.safetensors", "out"], "holds no model that is known"),
        ([FOLDER / "dit_tiny_io.safetensors", "out"], "holds no model that is known"),
        ([FOLDER / "hdit_tiny_config_input.json", "a.toml", "--to", "hdit"], "without weights"),
        ([FOLDER / "hdit_tiny_config_input.json", "a.toml", "--raw"], "leave --raw out"),
        ([FOLDER / "hdit_tiny_config_input.json", "a.toml", "--classes", 3], "leave --classes out"),
        ([FOLDER / "samplers.json", "a.toml"], "is no config of k-diffusion"),
    ],
)
def test_command_that_makes_no_sense_is_one_message(arguments, message, hdit, tmp_path):
    source, out, *options = arguments
    status, _, err = hdit("convert", source, tmp_path / out, *options)
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


# ---- damage --------------------------------------------------------------------------------------


def refused(source, tmp_path, **options):
    """The message that converting gives, once nothing was left."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 6, 1000, -4])
@pytest.mark.parametrize("kind", ["k-diffusion", "facebook-dit"])
def test_truncated_file_is_refused(kind, keep, tmp_path):
    path = tmp_path / "cut.safetensors"
    shutil.copy(HDIT_FILE, path)
    if kind == "facebook-dit":
        path = tmp_path / "cut.pt"
        torch.save(load("dit_tiny.safetensors"), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refused(path, tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_pickle_that_would_execute_code_is_refused_unexecuted(save, tmp_path):
    victim = tmp_path / "executed"
    save({"model": load("dit_tiny.safetensors"), "args": Payload(victim)}, tmp_path / "evil.pt")
    assert "evil.pt: refused" in refused(tmp_path / "evil.pt", tmp_path)
    assert not victim.exists()


def test_pickle_that_hides_in_a_namespace_is_refused_unexecuted(tmp_path):
    victim = tmp_path / "executed"
    args = Namespace(model="DiT-S/2", results=Payload(victim))
    torch.save({"ema": load("dit_tiny.safetensors"), "args": args}, tmp_path / "evil.pt")
    message = refused(tmp_path / "evil.pt", tmp_path)
    assert "mkdir" in message
    assert not victim.exists()


def damaged(tensors, how, name):
    tensors = dict(tensors)
    if how == "missing":
        del tensors[name]
    elif how == "unknown":
        tensors["extra.weight"] = torch.zeros(3, 2)
    else:
        tensors[name] = tensors[name].new_zeros(5, 7)
    return tensors


MESSAGES = {
    "missing": "{name}: missing, {shape} expected",
    "unknown": "extra.weight: unknown, [3, 2]",
    "misshapen": "{name}: is [5, 7], {shape} expected",
}


@pytest.mark.parametrize("how", MESSAGES)
@pytest.mark.parametrize("kind", ["k-diffusion", "facebook-dit", "diffusers", "hdit"])
def test_tensors_that_do_not_fit_are_named_with_their_shapes(kind, how, tmp_path):
    source, options = tmp_path / "theirs", {}
    if kind == "k-diffusion":
        source, name = tmp_path / "theirs.safetensors", "mid_level.0.ff.up_proj.weight"
        path = shutil.copy(HDIT_FILE, source)
    elif kind == "facebook-dit":
        source, name = tmp_path / "theirs.pt", "blocks.1.attn.qkv.weight"
        torch.save(damaged(load("dit_tiny.safetensors"), how, name), source)
        path, options = None, {"num_heads": 5}
    else:
        convert(DIT_FILE, source, kind)
        names = ("model", "blocks.1.attn.qkv_proj.weight")
        if kind == "diffusers":
            names = ("diffusion_pytorch_model", "transformer_blocks.1.attn1.to_k.weight")
        path, name = source / f"{names[0]}.safetensors", names[1]
    if path is not None:
        tensors, metadata = read_safetensors(path)
        shape = list(tensors[name].shape)
        save_file(damaged(tensors, how, name), path, metadata=metadata)
        if kind == "hdit":
            change_config(source, files={path.name: fingerprint(path)})
    else:
        shape = list(load("dit_tiny.safetensors")[name].shape)
    message = refused(source, tmp_path, **options)
    assert MESSAGES[how].format(name=name, shape=shape) in message


def test_sample_of_a_folder_that_lost_a_tensor_names_it(trained, hdit, tmp_path):
    convert(trained, tmp_path / "mine")
    path = tmp_path / "mine" / "model.safetensors"
    tensors = load_file(path)
    del tensors["out_norm.scale"]
    save_file(tensors, path)
    change_config(tmp_path / "mine", files={path.name: fingerprint(path)})
    status, _, err = hdit("sample", tmp_path / "mine", "--out", tmp_path / "out")
    assert status == 1
    assert "out_norm.scale: missing, [32] expected" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 300])
def test_sample_of_a_folder_with_a_cut_config_names_it(keep, trained, hdit, tmp_path):
    convert(trained, tmp_path / "mine")
    path = tmp_path / "mine" / "config.json"
    path.write_text(path.read_text()[:keep])
    for command in (("sample", tmp_path / "mine"), ("convert", tmp_path / "mine", tmp_path / "b")):
        status, _, err = hdit(*command)
        assert status == 1
        assert f"{path}: damaged" in err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("type", "image_v1", "model.type: 'image_v1' has no counterpart here"),
        ("has_variance", True, "model.has_variance"),
        ("patch_size", [2, 4], "model.patch_size: must be square, got [2, 4]"),
        ("depths", [1, 1], "model.depths: must be a list of 3, got [1, 1]"),
        ("sigma_max", None, "model.sigma_max: missing"),
        ("sigma_data", "0.5", "model.sigma_data: must be a number, got '0.5'"),
        ("self_attns", [{"type": "swin"}] * 3, "model.self_attns.0.type: must be one of global"),
        ("self_attns", [{"type": "shifted-window"}] * 3, "self_attns.0.window_size: missing"),
        ("loss_weighting", "min-snr", "model.loss_weighting: must be one of karras, soft"),
        ("sigma_sample_density", {"type": "x"}, "sigma_sample_density.type: must be one of"),
        ("mapping_cond_dim", 8, "vector_width: must be 0"),
        ("widths", [32, 64, 63], "model.levels.2.width: must be a multiple of"),
    ],
)
def test_k_diffusion_settings_that_cannot_be_read_are_named(key, value, message):
    raw = load("hdit_tiny_config_input.json")
    raw = raw | {"model": raw["model"] | {key: value}}
    with pytest.raises(UserError) as caught:
        k_diffusion.from_config(raw, "theirs.json")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"num_classes": 9},
            "num_classes: is said to be 9, but its tensors give 7 and a null class",
        ),
        (
            {"num_classes": 8, "class_dropout_prob": 0.1},
            "num_classes: is said to be 8, but its tensors give 7 and a null class",
        ),
        ({"num_classes": "7"}, "num_classes: must be a whole number, got '7'"),
        ({"image_size": 100}, "image_size: is said to be 100, but its tensors give 8"),
        ({"image_size": 4}, "image_size: is said to be 4, but its tensors give 8"),
        ({"patch_size": 4}, "patch_size: is said to be 4, but its tensors give 2"),
        ({"hidden_size": 384}, "hidden_size: is said to be 384, but its tensors give 80"),
        ({"learn_sigma": False}, "learn_sigma: is False, but the output has 8 channels"),
        ({"model": "DiT-S/2"}, "model: is said to be DiT-S/2, but its tensors give width 80"),
        ({"num_heads": 4}, "has 4 heads, got --num-heads 5"),
        ({"predict_xstart": True}, "predict_xstart: True has no counterpart here"),
        ({"noise_schedule": "cosine"}, "noise_schedule: 'cosine' has no counterpart here"),
        ({"path_type": "GVP", "prediction": "velocity"}, "path_type = 'GVP' and prediction = 'v"),
        ({"path_type": "VP", "prediction": "score"}, "path_type = 'VP' and prediction = 'score'"),
        ({"path_type": "Linear", "prediction": "noise"}, "prediction = 'noise', as a SiT"),
        ({"path_type": "linear", "prediction": "v"}, "path_type = 'linear' and prediction = 'v'"),
        ({"path_type": "Linear"}, "path_type = 'Linear' and prediction = None"),
        ({"model": "SiT-XL/2"}, "model = 'SiT-XL/2' is a SiT"),
    ],
)
@pytest.mark.parametrize("kind", [Namespace, dict])
def test_facebook_arguments_that_contradict_the_tensors_are_refused(kind, args, message, tmp_path):
    saved = {"ema": load("dit_tiny.safetensors"), "args": kind(**args)}
    torch.save(saved, tmp_path / "dit.pt")
    assert message in refused(tmp_path / "dit.pt", tmp_path, num_heads=5)


def test_facebook_checkpoint_that_does_not_tell_its_heads_asks_for_them(tmp_path):
    torch.save(load("dit_tiny.safetensors"), tmp_path / "dit.pt")
    assert "give it with --num-heads" in refused(tmp_path / "dit.pt", tmp_path)
