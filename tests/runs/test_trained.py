"""A trained model is one thing, wherever it lies."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from known_answers import FOLDER, load
from PIL import Image
from safetensors.torch import load_file, save_file

from hdit import config
from hdit.errors import UserError
from hdit.files import fingerprint
from hdit.interop import Contents
from hdit.interop.formats import FORMATS
from hdit.protocols import Cond
from hdit.runs.building import make_network
from hdit.runs.conversion import convert
from hdit.runs.trained import Trained, is_trained
from scripts import check_digits

CPU = torch.device("cpu")
DIT = {
    "data": {"kind": "digits"},
    "model": {"kind": "dit", "patch_size": 2, "depth": 2, "width": 24, "num_heads": 2},
    "diffusion": {
        "parametrization": {"kind": "eps_vp"},
        "weighting": {"kind": "eps"},
        "density": {"kind": "uniform_vp"},
    },
    "training": {"images": 96, "checkpoint_every": 32, "batch_size": 16},
}


def fail(text):
    raise AssertionError(f"nothing to warn of, got {text!r}")


def outputs(trained):
    x = torch.randn(2, *trained.shape.chw, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return trained.network()(x, torch.tensor([0.3, 0.7]), Cond(torch.tensor([1, -1])))


@pytest.fixture(scope="module")
def hdits(trained, tmp_path_factory):
    """The tiny run in each form that there is of an HDiT."""
    folder = tmp_path_factory.mktemp("hdits")
    convert(trained, folder / "export")
    convert(trained, folder / "theirs.safetensors", "k-diffusion")
    checkpoint = trained / "checkpoints" / "000000000096"
    return [trained, checkpoint, folder / "export", folder / "theirs.safetensors"]


@pytest.fixture(scope="module")
def dits(tmp_path_factory):
    """A DiT of pixels with random weights in each form that there is of one, but a run."""
    folder = tmp_path_factory.mktemp("dits")
    settings = config.parse(DIT, "dit")
    shape = settings.data_shape(10)
    torch.manual_seed(0)
    weights = make_network(settings, shape).state_dict()
    weights = {
        k: v if k == "pos_embed" else v + torch.randn_like(v) / 10 for k, v in weights.items()
    }
    classes = tuple("0123456789")
    held = Contents(settings, shape, classes, {"given": weights}, "random weights")
    made = Trained.of(held, folder / "made").contents()
    FORMATS["facebook-dit"].write(made, folder / "dit.pt")
    FORMATS["diffusers"].write(made, folder / "diffusers")
    convert(folder / "diffusers", folder / "export")
    return [folder / "diffusers", folder / "export", folder / "dit.pt"]


@pytest.mark.parametrize("which", ["hdits", "dits"])
def test_every_form_of_a_model_opens_to_the_same_network(which, request):
    paths = request.getfixturevalue(which)
    told = {"num_heads": 2, "num_classes": 10, "prediction": "noise"}
    opened = [Trained.open(path, fail, **(told if path.suffix == ".pt" else {})) for path in paths]
    first = outputs(opened[0])
    assert first.std() > 1e-3
    for trained in opened:
        assert torch.equal(outputs(trained), first)
        assert trained.shape == opened[0].shape
        assert trained.classes == tuple("0123456789")
        assert trained.config.model == opened[0].config.model


@pytest.mark.parametrize("which", ["hdits", "dits"])
def test_every_form_of_a_model_looks_like_one(which, request):
    assert all(map(is_trained, request.getfixturevalue(which)))


def test_images_and_configs_do_not_look_like_a_model(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "a.png")
    for name, text in (("json", "{"), ("json2", "[]"), ("json3", '{"a": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "a.toml").write_text("")
    assert not any(map(is_trained, [tmp_path / "absent", *tmp_path.iterdir()]))


def test_weights_are_the_ema_unless_raw_ones_are_asked_for(trained, hdits):
    model = Trained.open(trained)
    assert (model.weights(), model.weights(raw=True)) == ("ema", "model")
    name = "patch_in.proj.weight"
    raw, ema = (model.network(raw=raw).state_dict()[name] for raw in (True, False))
    assert not torch.equal(raw, ema)
    assert list(model.contents(raw=True).sets) == ["model"]
    for path in hdits[2:]:
        with pytest.raises(UserError, match=r"has one set of weights, '\w+'; leave --raw out"):
            Trained.open(path).network(raw=True)


def test_facebook_training_checkpoint_without_ema_is_used_as_trained(tmp_path):
    torch.save({"model": load("dit_tiny.safetensors"), "opt": {}}, tmp_path / "dit.pt")
    model = Trained.open(tmp_path / "dit.pt", num_heads=5)
    assert (model.weights(), model.weights(raw=True)) == ("model", "model")


def test_denoiser_is_that_of_its_settings(trained):
    """EDM's, by hand: c_skip x + c_out F(c_in x, ln(sigma) / 4)."""
    model = Trained.open(trained)
    x, sigma, sd = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.5]), model.shape.sigma_data
    cond = Cond(torch.tensor([1, 2]))
    total = (0.5**2 + sd**2) ** 0.5
    with torch.no_grad():
        f = model.network()(x / total, sigma.log() / 4, cond)
        expected = sd**2 / total**2 * x + 0.5 * sd / total * f
        torch.testing.assert_close(model.denoiser()(x, sigma, cond), expected)


def test_space_of_another_vae_than_that_of_training_is_refused(trained):
    model = Trained.open(trained)
    assert model.space(CPU) == model.config.space
    with pytest.raises(UserError, match="trained on latents of another VAE: its hash is abc"):
        replace(model, vae="abc").space(CPU)


def test_run_that_lost_its_newest_checkpoint_warns(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "checkpoints" / "000000000096" / "ema.safetensors").unlink()
    said = []
    assert Trained.open(run, said.append).images == 64
    assert "ema.safetensors: missing" in said[0]


@pytest.mark.parametrize(
    ("told", "option"),
    [
        ({"num_heads": 2}, "--num-heads"),
        ({"num_classes": 10}, "--classes"),
        ({"prediction": "noise"}, "--prediction"),
    ],
)
def test_what_a_model_tells_itself_is_refused(told, option, hdits, dits):
    for path in (*hdits, *dits[:2]):
        with pytest.raises(UserError, match=rf"tells the .*; leave {option} out"):
            Trained.open(path, **told)


def test_model_at_another_size_keeps_its_weights(trained):
    model = Trained.open(trained)
    larger = model.configured(model.config, replace(model.shape, height=16, width=16))
    cond = Cond(torch.tensor([1]))
    assert larger.network()(torch.zeros(1, 1, 16, 16), torch.zeros(1), cond).shape[-1] == 16


# ---- through the commands ------------------------------------------------------------------------


def images(folder):
    return {p.name: np.asarray(Image.open(p)) for p in folder.glob("0*.png")}


def test_sample_takes_a_file_of_another_project(hdits, hdit, tmp_path):
    """With the sampler of the run, for k-diffusion's file has its own."""
    found = []
    for name, source in (("run", hdits[0]), ("theirs", hdits[-1])):
        options = ["-n", 2, "--sampler", "heun", "--sigmas", "karras", "--steps", 2]
        status, _, err = hdit("sample", source, *options, "--out", tmp_path / name)
        assert status == 0, err
        found.append(images(tmp_path / name))
    assert len(found[0]) == 2
    for name, image in found[0].items():
        assert (image == found[1][name]).all()


def test_sample_of_a_file_or_folder_of_another_project_writes_beside_it(hdits, dits, hdit):
    for source, name in ((hdits[-1], "theirs"), (dits[0], "diffusers")):
        status, _, err = hdit("sample", source, "-n", 1, "--steps", 2)
        assert status == 0, err
        [folder] = (source.parent / f"{name}-samples").iterdir()
        record = json.loads((folder / "samples.json").read_text())
        assert (record["checkpoint"], record["weights"]) == (str(source), "given")


def test_model_of_another_project_guides_one_of_ours(hdits, hdit, tmp_path):
    options = ["-n", 1, "--out", tmp_path / "out", "--guide", hdits[-1]]
    status, _, err = hdit("sample", hdits[0], *options)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    guide = record["guide"]
    assert (guide["checkpoint"], guide["scale"]) == (str(hdits[-1]), 2.0)
    assert len(guide["sha256"]) == 64


def test_path_of_a_model_that_is_not_utf8_is_escaped_in_the_record(hdits, hdit, tmp_path):
    model = shutil.copy(hdits[-1], tmp_path / os.fsdecode(b"caf\xe9.safetensors"))
    options = ["-n", 1, "--steps", 2, "--out", tmp_path / "out", "--guide", model]
    status, _, err = hdit("sample", model, *options)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    stored = str(tmp_path / r"caf\xe9.safetensors")
    assert record["checkpoint"] == record["guide"]["checkpoint"] == stored


def test_evaluate_samples_models_of_other_projects(hdits, dits, hdit, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "thumbs.py").write_text(
        "def small(x): return x[:, :, ::3, ::3].double().flatten(1)"
    )
    reference = hdits[0] / "config.toml"
    for source in (hdits[-1], dits[0]):
        options = ["-n", 3, "--steps", 2, "--features", "thumbs:small", "--workers", 0, "--json"]
        status, out, err = hdit("evaluate", source, reference, *options)
        assert status == 0, err
        card = json.loads(out)
        assert (card["a"]["place"], card["a"]["weights"]) == (str(source), "given")


def test_evaluate_refuses_a_model_of_another_project_as_reference(hdits, hdit):
    status, _, err = hdit("evaluate", hdits[0] / "config.toml", hdits[-1])
    assert status == 1
    assert "is a model; the reference must be images" in err


def test_digits_are_checked_of_any_model(hdits, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_digits.py", str(hdits[-1]), "-n", "4"])
    classifier = check_digits.classifier
    monkeypatch.setattr(
        check_digits, "classifier", lambda images, labels: classifier(images, labels, epochs=1)
    )
    check_digits.main()
    assert "theirs.safetensors: 4 samples" in capsys.readouterr().out.replace("\n", "")


def test_dit_that_does_not_tell_its_heads_asks_for_a_conversion(dits, hdit):
    status, _, err = hdit("sample", dits[-1])
    assert status == 1
    assert "give it with --num-heads (of `hdit convert`)" in err


def test_sample_of_a_file_without_a_model_is_one_message(hdit, tmp_path):
    source = FOLDER / "hdit_tiny_io.safetensors"
    status, _, err = hdit("sample", source, "--out", tmp_path / "out", "-n", 1)
    assert status == 1
    assert err.startswith(f"error: {source}: holds no model that is known")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("which", "inside"), [(0, "checkpoints/000000000096"), (1, "")], ids=["run", "checkpoint"]
)
def test_weights_that_are_not_finite_are_refused(which, inside, hdits, hdit, tmp_path):
    path = shutil.copytree(hdits[which], tmp_path / "copy")
    file, manifest = (path / inside / name for name in ("ema.safetensors", "manifest.json"))
    tensors = load_file(file)
    tensors["out_norm.scale"][1] = float("nan")
    save_file(tensors, file)
    raw = json.loads(manifest.read_text())
    raw["files"][file.name] = fingerprint(file)
    manifest.write_text(json.dumps(raw))
    status, _, err = hdit("sample", path, "--out", tmp_path / "out", "-n", 1)
    assert status == 1
    assert f"{file}: the tensor 'out_norm.scale' has 1 of 32 values that are not finite" in err
    assert f"without {file.parent}, a run goes on from the one before" in err
    assert not (tmp_path / "out").exists()
