import importlib.util
import json
import math
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.distributions import Normal, kl_divergence

from scripts import train_vae

SIZE, PICTURES, STEPS = 8, 100, 120


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Each half is nearly black or nearly white, and no two pictures are alike."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        halves = random.choice([0, 225], (2, 1, 1)) + random.integers(31, size=(2, 1, 3))
        pixels = halves.astype(np.uint8).repeat(SIZE // 2, axis=0).repeat(SIZE, axis=1)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


def call(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_vae.py", *map(str, arguments)])
        train_vae.main()


def quick(pictures, out):
    """The arguments of a run of a few seconds."""
    return pictures, "--out", out, "--size", SIZE, "--steps", STEPS, "--lr", 4e-3


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "vae"
    call(*quick(pictures, out))
    return out


def read(pictures):
    names = Namespace(path=str(pictures), size=SIZE, channels=3, images=1000)
    return train_vae.read(names)


@torch.no_grad()
def test_folder_is_diffusers_and_scaled_latents_deviate_by_one(trained, pictures):
    vae = AutoencoderKL.from_pretrained(trained)
    assert vae.config.sample_size == SIZE
    images, _, _ = read(pictures)
    z = vae.encode(images.float() / 127.5 - 1).latent_dist.sample(torch.Generator().manual_seed(1))
    x0 = (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    assert x0.shape == (len(images), 4, SIZE // 4, SIZE // 4)
    # The same images with other noise: that changes the deviation by less than 1/sqrt(2 * 1520).
    assert x0.std().item() == pytest.approx(1, abs=0.05)
    assert abs(x0.mean().item()) < train_vae.NEAR_ZERO + 0.05


@torch.no_grad()
def test_held_out_images_come_back(trained, pictures):
    """And the figure is that of the VAE as it was saved."""
    vae = AutoencoderKL.from_pretrained(trained)
    _, held_out, _ = read(pictures)
    z = vae.encode(held_out / 127.5 - 1).latent_dist.mode()
    made = (vae.decode(z).sample * 127.5 + 127.5).clamp(0, 255).round()

    def psnr(images):
        return 10 * math.log10(255**2 / (images - held_out.float()).square().mean().item())

    figures = json.loads((trained / "training.json").read_text())["figures"]
    assert figures["psnr"] == pytest.approx(psnr(made), abs=0.02)  # halves may round either way
    error = (made - held_out).abs().mean().item() / 255
    assert figures["l1"] == pytest.approx(error, abs=1e-3)
    assert psnr(made) > psnr(held_out.float().mean((0, 2, 3), keepdim=True)) + 6


def test_folder_holds_all_there_is_to_tell_and_nothing_is_beside_it(trained):
    assert [path.name for path in trained.parent.iterdir()] == [trained.name]
    assert {path.name for path in trained.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "reconstructions.png",
        "training.json",
    }
    report = json.loads((trained / "training.json").read_text())
    assert report["settings"]["steps"] == report["figures"]["steps"] == STEPS
    held_out = PICTURES // train_vae.HELD_OUT
    assert report["figures"]["held_out"] == held_out
    assert report["figures"]["images"] == PICTURES - held_out


def test_each_20th_image_is_held_out(pictures):
    images, held_out, mirror = read(pictures)
    paths = sorted(pictures.iterdir())
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])
    pixels = pixels.permute(0, 3, 1, 2)
    assert torch.equal(held_out, pixels[19::20])
    assert not (images[:, None] == held_out).flatten(2).all(2).any()
    assert mirror


def test_an_epoch_draws_each_image_once():
    batches = train_vae.draws(10, 4)
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert torch.equal(drawn[:10].sort().values, torch.arange(10))
    assert torch.equal(drawn[10:].sort().values, torch.arange(10))
    assert not torch.equal(drawn[:10], drawn[10:])


def test_kl_is_that_of_two_normal_distributions():
    mean, logvar = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, torch.exp(logvar / 2)), Normal(0.0, 1.0)).sum() / 3
    assert train_vae.kl_divergence(mean, logvar).item() == pytest.approx(expected.item())


def test_scaled_latents_are_shifted_where_their_mean_is_far_from_zero():
    assert train_vae.scaling(0.1, 2.0) == {"scaling_factor": 0.5}
    assert train_vae.scaling(-1.0, 2.0) == {"scaling_factor": 0.5, "shift_factor": -1.0}


def test_learning_rate_rises_and_ends_at_zero():
    rates = [train_vae.learning_rate(1.0, step / 1000) for step in range(1001)]
    top = rates.index(max(rates))
    assert top == pytest.approx(1000 * train_vae.WARMUP)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] == rates[-1] == 0


def refused(*arguments):
    """-> what the command says as it ends with an error."""
    with pytest.raises(SystemExit) as exit_:
        call(*arguments)
    assert str(exit_.value).startswith("error: ")
    return str(exit_.value)


def test_an_existing_folder_is_refused_and_untouched(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "read", lambda arguments: pytest.fail("images were read"))
    out = tmp_path / "vae"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert str(out) in refused(*quick(pictures, out))
    assert [path.name for path in tmp_path.rglob("*")] == ["vae", "mine.txt"]
    assert (out / "mine.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing(pictures, tmp_path, monkeypatch):
    def interrupted(*arguments):
        assert list(tmp_path.iterdir())  # the folder has been begun
        raise KeyboardInterrupt

    monkeypatch.setattr(train_vae, "train", interrupted)
    with pytest.raises(SystemExit) as exit_:
        call(*quick(pictures, tmp_path / "new" / "vae"))
    assert exit_.value.code == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--factor", 8, "--size", 20), "no multiple of --factor 8"),
        (("--width", 12), "multiple of 8, got 12"),
        (("--minutes", 0), "--minutes: must be above 0"),
        (("--images", 19), "20 images are needed, got 19"),
    ],
)
def test_settings_that_cannot_be_are_refused(pictures, tmp_path, arguments, words):
    said = refused(pictures, "--out", tmp_path / "vae", "--size", SIZE, *arguments)
    assert words in said
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_there_is_named(tmp_path):
    said = refused(tmp_path / "nowhere", "--out", tmp_path / "vae")
    assert "nowhere" in said
    assert "does not exist" in said


def test_without_diffusers_it_tells_what_to_install(pictures, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    without = lambda name: None if name == "diffusers" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(train_vae.importlib.util, "find_spec", without)
    assert "pip install 'hdit[latent]'" in refused(*quick(pictures, tmp_path / "vae"))
