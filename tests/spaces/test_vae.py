"""The VAE of a latent space, against diffusers' own AutoencoderKL."""

import json
import math
import os
import pickle
import shutil
import sys
import time
from types import SimpleNamespace

import huggingface_hub.errors
import numpy as np
import pytest
import tiny_vae
import torch
from safetensors.torch import load_file, save_file

from hdit.errors import UserError
from hdit.spaces import LatentSpace, PixelSpace, vae
from hdit.spaces.vae import VAE
from hdit.tensors import NotFiniteError

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALING, SHIFT = 0.4, 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vae.save(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def oracle():
    return tiny_vae.model()


def spec(folder: str | None, **settings) -> LatentSpace:
    return LatentSpace(**{"vae": folder, "factor": tiny_vae.FACTOR, **settings})


def opened(folder: str, **settings) -> VAE:
    return spec(folder, **settings).open(CPU)


def random_images(n: int = 3, height: int = 24, width: int = 32) -> torch.Tensor:
    pixels = np.random.default_rng(n).integers(0, 256, (n, 3, height, width), np.uint8)
    return torch.from_numpy(pixels)


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))


def rounded(x: torch.Tensor) -> np.ndarray:
    """floor(clamp(127.5 x + 128, 0, 255))."""
    return np.floor(np.clip(127.5 * x.double().numpy() + 128, 0, 255)).astype(int)


# ---- encode and decode ---------------------------------------------------------------------------


def test_encode_gives_mean_and_deviation_of_diffusers_posterior(folder, oracle):
    images = random_images()
    stored = opened(folder).encode(images)
    theirs = oracle.encode(images / 127.5 - 1).latent_dist
    assert stored.shape == (3, 8, 6, 8)
    assert stored.dtype == torch.float32
    # the same kernels on the same numbers
    torch.testing.assert_close(stored, torch.cat([theirs.mean, theirs.std], 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(stored, tiny_vae.posterior(oracle, images), rtol=1e-5, atol=1e-6)
    assert (stored[:, 4:] > 0).all()


CONFIGS = {
    "neither": ({"scaling_factor": 0.18215, "shift_factor": None}, [0] * 4, [0.18215] * 4),
    "shift": ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, [0.1159] * 4, [0.3611] * 4),
    "channels": (
        {
            "scaling_factor": 0.5,
            "shift_factor": None,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.0, 2.0, 4.0, 0.5],
        },
        [0.1, -0.2, 0.3, 0.0],
        [0.5, 0.25, 0.125, 1.0],
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def scaled(request, tmp_path_factory):
    """A VAE by each way that a config scales latents, with its shift and scale of each channel."""
    config, shift, scale = CONFIGS[request.param]
    space = opened(tiny_vae.save(tmp_path_factory.mktemp("scaled"), **config))
    return space, *(np.array(v)[:, None, None] for v in (shift, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalize_draws_from_the_posterior_and_scales_by_the_config(scaled, dtype):
    space, shift, scale = scaled
    mean, std, noise = (normal(3, 4, 2, 3) + i for i in range(3))
    stored = torch.cat([mean, std], 1).to(dtype)
    mean, std = (part.double().numpy() for part in stored.chunk(2, 1))
    asked = []
    x0 = space.normalize(stored, lambda shape: asked.append(tuple(shape)) or noise)
    assert asked == [(4, 2, 3)]
    assert x0.dtype == torch.float32
    expected = (mean + std * noise.double().numpy() - shift) * scale
    np.testing.assert_allclose(x0.numpy(), expected, rtol=1e-5, atol=1e-6)  # float32


def test_decode_hands_the_model_what_was_scaled(scaled, monkeypatch):
    space, shift, scale = scaled
    z, given = normal(3, 4, 2, 3), []

    def record(latents):
        given.append(latents)
        return SimpleNamespace(sample=torch.zeros(len(latents), 3, 8, 12))

    monkeypatch.setattr(space.model, "decode", record)
    grey = space.decode(torch.from_numpy((z.double().numpy() - shift) * scale))
    # float32 of numbers below 4, through a difference and a quotient
    torch.testing.assert_close(given[0], z, rtol=1e-5, atol=1e-6)
    assert (grey == 128).all()


def test_decode_gives_diffusers_image_rounded_to_bytes(folder, oracle):
    x0 = normal(2, 4, 8, 8)
    images = opened(folder).decode(x0)
    expected = rounded(oracle.decode(x0 / SCALING + SHIFT).sample)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 32, 32)
    assert {0, 255} < set(np.unique(expected)), "both ends are clamped to"
    off = np.abs(images.numpy().astype(int) - expected)
    # float32 rounding moves a value by some 1e-4 levels, across an integer that rarely
    assert off.max() <= 1
    assert (off > 0).mean() < 0.002


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_decode_of_what_is_not_finite_is_refused(folder, space, value):
    """The cast to bytes would make a black image of nan."""
    decoder = PixelSpace() if space == "pixel" else opened(folder)
    x0 = normal(3, 4, 6, 8)
    x0[1, 2, 3, 4] = value
    with pytest.raises(NotFiniteError):
        decoder.decode(x0)
    assert decoder.decode(x0[::2]).dtype == torch.uint8


def test_decode_that_overflows_in_the_vae_is_refused(folder):
    with pytest.raises(NotFiniteError):
        opened(folder).decode(normal(1, 4, 6, 8) * 1e38)


def test_vae_whose_weights_are_not_finite_is_refused_by_name(tmp_path):
    broken = tiny_vae.model()
    broken.decoder.conv_in.bias[2] = math.nan
    broken.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"space\.vae: .*the tensor 'decoder\.conv_in\.bias' has 1"):
        opened(str(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling_factor": math.nan},
        {"scaling_factor": 0.0},
        {"shift_factor": math.inf},
        {"latents_std": [1.0, 0.0, 1.0, 1.0]},
        {"latents_mean": [0.0, math.nan, 0.0, 0.0]},
    ],
    ids=str,
)
def test_vae_that_scales_by_what_is_not_finite_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match=r"its config\.(scaling|shift|latents)_.*: Input should be"):
        opened(tiny_vae.save(tmp_path, **settings))


def test_decode_of_a_half_is_that_of_the_same_numbers(folder):
    x0 = normal(1, 4, 4, 4).half()
    space = opened(folder)
    assert torch.equal(space.decode(x0), space.decode(x0.float()))


def test_latents_neither_train_the_vae_nor_keep_its_graph(folder):
    space = opened(folder)
    assert not space.model.training
    assert not any(p.requires_grad for p in space.model.parameters())
    x0 = normal(1, 4, 4, 4).requires_grad_()
    assert not space.decode(x0).requires_grad
    assert not space.encode(random_images(1)).requires_grad


# ---- tiles and parts -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiling():
    """diffusers' own, in tiles of 32 pixels."""
    oracle = tiny_vae.model()
    oracle.enable_tiling()
    oracle.tile_sample_min_size, oracle.tile_latent_min_size = 32, 8
    return oracle


@pytest.mark.parametrize("size", [(64, 32), (32, 48), (72, 40)])
def test_image_larger_than_a_tile_is_encoded_as_diffusers_does_in_tiles(
    folder, oracle, tiling, size
):
    images = random_images(2, *size)
    ours = opened(folder, tile=32).encode(images)
    theirs = tiling.encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(ours, torch.cat([theirs.mean, theirs.std], 1), rtol=1e-6, atol=1e-7)
    whole = tiny_vae.posterior(oracle, images)
    assert (ours - whole).abs().max() > 1e-3, "tiles are not the whole"
    torch.testing.assert_close(opened(folder, tile=0).encode(images), whole, rtol=1e-5, atol=1e-6)


def test_latents_larger_than_a_tile_are_decoded_as_diffusers_does_in_tiles(folder, oracle, tiling):
    x0 = normal(2, 4, 16, 8)
    ours, whole = (opened(folder, tile=tile).decode(x0).numpy().astype(int) for tile in (32, 0))
    z = x0 / SCALING + SHIFT
    for pixels, theirs in ((ours, tiling), (whole, oracle)):
        off = np.abs(pixels - rounded(theirs.decode(z).sample))
        assert off.max() <= 1  # as above
        assert (off > 0).mean() < 0.002
    assert np.abs(ours - whole).max() > 1, "tiles are not the whole"


@pytest.mark.parametrize("size", [(32, 32), (16, 32)])
def test_image_within_a_tile_is_taken_whole(folder, oracle, size):
    images = random_images(2, *size)
    tiled, plain = opened(folder, tile=32), opened(folder, tile=0)
    stored = tiled.encode(images)
    assert torch.equal(stored, plain.encode(images))
    torch.testing.assert_close(stored, tiny_vae.posterior(oracle, images), rtol=1e-5, atol=1e-6)
    assert torch.equal(tiled.decode(stored[:, :4]), plain.decode(stored[:, :4]))


def test_large_batch_goes_through_the_model_in_parts_that_equal_one_by_one(folder, monkeypatch):
    space, images = opened(folder), random_images(5, 32, 32)
    stored, x0 = space.encode(images), normal(5, 4, 8, 8)
    decoded = space.decode(x0)
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 2 * 32 * 32)
    sizes = []
    for name in ("encode", "decode"):
        method = getattr(space.model, name)
        monkeypatch.setattr(
            space.model, name, lambda part, call=method: sizes.append(len(part)) or call(part)
        )
    in_parts = space.encode(images)
    pixels = space.decode(x0)
    assert sizes == [2, 2, 1, 2, 2, 1]
    # a convolution may add in another order for another batch
    torch.testing.assert_close(in_parts, stored, rtol=1e-5, atol=1e-6)
    assert (pixels.int() - decoded.int()).abs().max() <= 1
    for i in range(5):
        torch.testing.assert_close(
            space.encode(images[i : i + 1])[0], stored[i], rtol=1e-5, atol=1e-6
        )


def test_image_larger_than_a_part_goes_through_alone(folder, monkeypatch):
    space, images = opened(folder), random_images(3, 32, 32)
    stored = space.encode(images)
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 100)
    torch.testing.assert_close(space.encode(images), stored, rtol=1e-5, atol=1e-6)


# ---- identity ------------------------------------------------------------------------------------


def test_identity_is_that_of_the_numbers_not_of_the_folder(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    config = json.loads((moved / "config.json").read_text())
    config["_diffusers_version"] = "0.0.0"
    (moved / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert opened(str(moved), tile=0).identity == opened(folder).identity


def test_identity_of_one_changed_weight_is_another(folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "changed")
    tensors = load_file(changed / WEIGHTS)
    for name in ("encoder.conv_in.weight", "decoder.conv_out.bias"):
        other = {key: value.clone() for key, value in tensors.items()}
        other[name].view(-1)[0] += 1e-6
        assert not torch.equal(other[name], tensors[name])
        save_file(other, changed / WEIGHTS, {"format": "pt"})
        assert opened(str(changed)).identity != opened(folder).identity


@pytest.mark.parametrize(
    "setting",
    [
        {"scaling_factor": 0.41},
        {"shift_factor": 0.31},
        {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    ],
)
def test_identity_of_another_scaling_is_another(folder, tmp_path, setting):
    other = tiny_vae.save(tmp_path, **setting)
    assert opened(other).identity != opened(folder).identity


# ---- errors --------------------------------------------------------------------------------------


def refused(folder, **settings) -> str:
    with pytest.raises(UserError) as error:
        opened(str(folder), **settings)
    assert str(error.value).startswith("space.")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_vae_that_is_not_set_is_asked_for():
    with pytest.raises(UserError, match=r"space\.vae: must be set to train or sample latents"):
        spec(None).open(CPU)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "~/no/where", "a/b/c"])
def test_vae_that_does_not_exist_is_named(name):
    said = refused(name)
    assert repr(name) in said
    assert "does not exist (seen from" in said


def test_vae_of_another_class_is_named(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    assert "its class is AutoencoderTiny, not AutoencoderKL" in refused(other)


def test_folder_of_a_pipeline_is_told_where_its_vae_is(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vae")
    assert "has no config.json, as an AutoencoderKL of diffusers (its folder vae has)" in refused(
        tmp_path
    )
    assert opened(str(tmp_path / "vae")).identity == opened(folder).identity


def test_folder_without_a_config_is_refused(tmp_path):
    assert refused(tmp_path).endswith("has no config.json, as an AutoencoderKL of diffusers")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scaling_factor", "x"),
        ("scaling_factor", 0),
        ("shift_factor", [1]),
        ("latents_mean", 3),
        ("latents_std", [1.0, 0.0, 1.0, 1.0]),
        ("latents_std", [1.0]),
        ("block_out_channels", 5),
        ("block_out_channels", [10**9]),
        ("latent_channels", 10**9),
        ("layers_per_block", True),
    ],
)
def test_setting_of_a_vae_that_is_no_such_thing_is_named(key, value, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {key: value}))
    said = refused(other)
    assert "its config" in said
    assert key in said


def test_config_that_is_a_pipe_is_refused_unread(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "config.json").unlink()
    os.mkfifo(other / "config.json")
    with pytest.raises(UserError, match=r"config\.json"):
        opened(str(other))


@pytest.mark.parametrize("shards", ["10GB", "40KB"])
def test_vae_of_less_precision_alone_is_read(shards, tmp_path):
    model = tiny_vae.model().half()
    half = {"variant": "fp16", "max_shard_size": shards}
    model.save_pretrained(tmp_path / "half", **half)
    assert not (tmp_path / "half" / WEIGHTS).exists()
    (tmp_path / "same").mkdir()
    model.float().save_pretrained(tmp_path / "same")
    assert opened(str(tmp_path / "half")).identity == opened(str(tmp_path / "same")).identity


# ---- the hub -------------------------------------------------------------------------------------

NAME = "nobody/no-such-vae"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of its own, and a hub that does not answer: what it was asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    asked = []

    def fail(self, repo_id, **options):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise huggingface_hub.errors.OfflineModeIsEnabled
        asked.append(repo_id)
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    return asked


def test_vae_that_cannot_be_downloaded_is_told_at_once_with_what_to_do(hub, caplog, capfd):
    began = time.monotonic()
    said = refused(NAME)
    assert time.monotonic() - began < 5, "the hub's package pauses 23 s between its attempts"
    assert f"{NAME!r} is not in the cache of this machine" in said
    assert "hub cannot be reached (ConnectionError: Name or service not known); " in said
    assert said.endswith("--set space.vae=FOLDER")
    assert hub == [NAME]
    assert not caplog.records
    assert not capfd.readouterr().err
    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "only while it loads"


def test_vae_is_not_asked_for_where_the_hub_may_not_be_asked(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = refused(NAME)
    assert "HF_HUB_OFFLINE is set, so that nothing is downloaded; " in said
    assert said.endswith("--set space.vae=FOLDER")
    assert not hub


def test_vae_in_the_cache_needs_no_hub(hub, folder, tmp_path):
    kept = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(folder, kept / "snapshots" / ("abcd" * 10))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abcd" * 10)
    assert opened(NAME).identity == opened(folder).identity


class Touch:
    """What a pickle can do to whoever reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_unread(folder, tmp_path):
    tiny_vae.model().save_pretrained(tmp_path / "only", safe_serialization=False)
    [weights] = (tmp_path / "only").glob("*.bin")
    assert "cannot be loaded" in refused(tmp_path / "only")
    weights.write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    assert "cannot be loaded" in refused(tmp_path / "only")
    assert not (tmp_path / "touched").exists()


def test_truncated_weights_are_one_message(folder, tmp_path):
    torn = shutil.copytree(folder, tmp_path / "torn")
    (torn / WEIGHTS).write_bytes((torn / WEIGHTS).read_bytes()[:1000])
    assert "cannot be loaded" in refused(torn)


def test_weights_of_another_shape_are_one_message(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 8, 12]}))
    assert "cannot be loaded" in refused(other)


def test_latents_of_other_channels_or_factor_are_refused_with_both_numbers(folder):
    assert refused(folder, channels=16).startswith("space.channels: is 16, but the VAE ")
    assert refused(folder, channels=16).endswith("has 4")
    said = refused(folder, factor=8)
    assert said.startswith("space.factor: is 8, but the VAE ")
    assert said.endswith("has 4")


def test_grey_images_are_refused_by_a_vae_of_colours(folder):
    with pytest.raises(UserError, match=r"data\.channels: images have 1, .*set data\.channels = 3"):
        opened(folder).encode(random_images()[:, :1])


def test_diffusers_that_is_not_installed_is_named_with_what_has_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    said = refused(folder)
    assert "needs the package diffusers" in said
    assert "pip install 'hdit[latent]'" in said


def test_verbosity_of_diffusers_is_as_before(folder, tmp_path):
    messages = tiny_vae.diffusers.utils.logging
    before = messages.get_verbosity()
    messages.set_verbosity_info()
    try:
        opened(folder)
        refused(tmp_path)
        assert messages.get_verbosity() == messages.INFO
    finally:
        messages.set_verbosity(before)


def test_vae_that_lacks_a_weight_is_refused(tmp_path):
    folder = tiny_vae.save(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.pop("quant_conv.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys: quant_conv\.weight"):
        LatentSpace(vae=folder, factor=4).open(torch.device("cpu"))


def test_identity_is_of_what_is_computed(tmp_path):
    """Not of settings that diffusers may add or that only tell how to tile."""
    folder = tiny_vae.save(tmp_path / "vae")
    identity = LatentSpace(vae=folder, factor=4).open(torch.device("cpu")).identity
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 128}))
    assert LatentSpace(vae=folder, factor=4).open(torch.device("cpu")).identity == identity
