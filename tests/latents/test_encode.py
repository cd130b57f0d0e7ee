"""`hdit encode`: what it stores is the VAE's posterior of what the data gives."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_vae
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hdit.latents.encode as hdit_encode
from hdit.config import RunConfig, load, merge, parse
from hdit.data.source import DataError
from hdit.errors import UserError
from hdit.latents import store
from hdit.latents.encode import encode, measure_sigma_data
from hdit.latents.store import Latents
from hdit.names import escape
from hdit.training.trainer import Trainer

SIZES = [(20, 16), (16, 24), (40, 33), (16, 16), (50, 17)] * 2  # of the images


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_vae.save(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images in two classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        path = folder / ("cat" if i < 4 else "dog") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)  # nothing in it is symmetric
        Image.fromarray(coarse).resize((width, height)).save(path)
    return folder


def settings(images, vae, **changes) -> RunConfig:
    raw = {
        "data": {"kind": "folder", "path": str(images), "size": 16},
        "space": {"kind": "latent", "vae": str(vae), "factor": tiny_vae.FACTOR},
        "model": {"kind": "dit", "patch_size": 2, "width": 32, "depth": 1, "num_heads": 2},
        "training": {"images": 48, "checkpoint_every": 24, "batch_size": 8},
    }
    return parse(merge(raw, changes), "it")


@pytest.fixture
def config(images, vae):
    return settings(images, vae)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SHARDS = ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"]
OF_FOUR = {"shard_size": 4, "batch_size": 3}


# ---- what is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_encode_stores_the_posterior_of_each_image_and_of_its_mirror_image(
    config, tmp_path, workers
):
    encode(config, tmp_path / "out", workers=workers, **OF_FOUR)
    tensors = [load_file(tmp_path / "out" / name) for name in SHARDS]
    assert [len(shard["labels"]) for shard in tensors] == [4, 4, 2]
    assert [tuple(shard["posterior"].shape[1:]) for shard in tensors] == [(2, 8, 4, 4)] * 3
    stored = torch.cat([shard["posterior"] for shard in tensors])
    labels = torch.cat([shard["labels"] for shard in tensors])
    assert stored.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0] * 4 + [1] * 6
    source, oracle = config.data.open(), tiny_vae.model()
    images = torch.stack([source[i].image for i in range(10)])
    mirrored = torch.from_numpy(images.numpy()[..., ::-1].copy())
    for side, seen in enumerate((images, mirrored)):
        # a convolution may add in another order for another batch
        expected = tiny_vae.posterior(oracle, seen)
        torch.testing.assert_close(stored[:, side], expected, rtol=1e-5, atol=1e-6)
    assert (stored[:, 0] - stored[:, 1]).abs().amax((1, 2, 3)).min() > 0.01, "the sides differ"


def test_encode_without_flip_stores_one_side(images, vae, tmp_path):
    config = settings(images, vae, data={"flip": False})
    encode(config, tmp_path / "one", **OF_FOUR)
    encode(settings(images, vae), tmp_path / "two", **OF_FOUR)
    for name in SHARDS:
        one, two = (load_file(tmp_path / n / name)["posterior"] for n in ("one", "two"))
        assert one.shape[1] == 1
        assert torch.equal(one[:, 0], two[:, 0])


def test_encode_in_half_precision_rounds_what_it_would_store(config, tmp_path):
    whole = encode(config, tmp_path / "whole", **OF_FOUR)
    half = encode(config, tmp_path / "half", dtype="float16", **OF_FOUR)
    for name in SHARDS:
        a, b = (load_file(tmp_path / n / name)["posterior"] for n in ("whole", "half"))
        assert b.dtype == torch.float16
        assert torch.equal(a.half(), b)
    numbers = 10 * 2 * 8 * 4 * 4
    assert 2 * numbers < half.bytes < whole.bytes - 2 * numbers + 1000  # and headers
    # rounding is unbiased and of 2^-11
    assert half.sigma_data == pytest.approx(whole.sigma_data, rel=1e-4)


def test_encode_says_in_its_manifest_what_the_latents_are_of(config, images, tmp_path):
    encode(config, tmp_path / "out", **OF_FOUR)
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    vae = found.pop("vae")
    assert vae == config.space.open(torch.device("cpu")).identity
    assert found.pop("scale") == pytest.approx([0.4])  # float32
    assert found.pop("shift") == pytest.approx([0.3])
    assert found == {
        "format": 1,
        "tile": 0,
        "image": [3, 16, 16],
        "latent": [4, 4, 4],
        "crop": "center",
        "background": "white",
        "flips": 2,
        "dtype": "float32",
        "images": 10,
        "shard_size": 4,
        "classes": ["cat", "dog"],
        "origin": f"kind=folder path={images}",
    }
    for name in SHARDS:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata()["vae"] == vae


def test_encode_reports_what_it_does(config, tmp_path):
    starts, counts = [], []
    done = encode(
        config,
        tmp_path / "out",
        on_start=lambda *numbers: starts.append(numbers),
        on_images=counts.append,
        **OF_FOUR,
    )
    assert starts == [(10,)]
    assert counts == [3, 1, 3, 1, 2]
    assert done[:3] == (10, 3, 0)
    assert done.bytes == sum((tmp_path / "out" / name).stat().st_size for name in SHARDS)


def test_encode_names_a_bad_image_and_stores_the_next_in_its_place(images, vae, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    (data / "cat" / "3.png").write_bytes(b"not an image")  # its next one is of the other class
    skipped = []
    config = settings(data, vae, data={"max_bad_share": 0.1})
    encode(config, tmp_path / "out", on_skipped=skipped.append, **OF_FOUR)
    assert [file.path for file in skipped] == [str(data / "cat" / "3.png")]
    assert "no format" in skipped[0].reason
    latents = Latents(str(tmp_path / "out"))
    assert latents[3].label == 1
    torch.testing.assert_close(latents[3].image, latents[4].image, rtol=1e-5, atol=1e-6)


def test_encode_tells_first_of_files_that_are_left_out(images, vae, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    (data / "cat" / "3.heic").touch()
    told = []
    encode(settings(data, vae), tmp_path / "out", warn=told.append, **OF_FOUR)
    assert len(told) == 1
    assert "1 file is left out, in no format that Pillow reads: .heic 1" in told[0]


def test_encode_of_too_many_bad_images_ends_as_training_does(vae, tmp_path):
    for i in range(120):
        (tmp_path / f"{i}.png").write_bytes(b"not an image")
    Image.new("RGB", (16, 16)).save(tmp_path / "z.png")
    with pytest.raises(DataError, match=r"beyond data\.max_bad_share"):
        encode(settings(tmp_path, vae), tmp_path / "out", shard_size=121)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_encode_of_a_vae_that_overflows_stores_nothing(images, tmp_path):
    broken = tiny_vae.model()
    for parameter in (broken.quant_conv.weight, broken.quant_conv.bias):
        parameter.fill_(3e38)
    broken.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"space\.vae: .* gives latents that are not finite"):
        encode(settings(images, tmp_path / "vae"), tmp_path / "out", **OF_FOUR)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


# ---- going on ------------------------------------------------------------------------------------


@pytest.fixture
def whole(config, tmp_path):
    encode(config, tmp_path / "whole", **OF_FOUR)
    return files(tmp_path / "whole")


@pytest.mark.parametrize("gone", [SHARDS[1:2], SHARDS[::2], SHARDS])
def test_encode_makes_the_shards_that_were_removed_anew(config, tmp_path, whole, gone):
    out = tmp_path / "whole"
    kept = {name: (out / name).stat().st_mtime_ns for name in SHARDS if name not in gone}
    for name in gone:
        (out / name).unlink()
    done = encode(config, out, **OF_FOUR)
    assert files(out) == whole
    assert done.shards == len(gone)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.parametrize("after", [1, 4, 7, 10])
def test_encode_that_was_interrupted_goes_on_to_the_same_files(config, tmp_path, whole, after):
    out, seen = tmp_path / "out", []

    def interrupt(count):
        seen.append(count)
        if sum(seen) >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(config, out, on_images=interrupt, **OF_FOUR)
    left = files(out)
    assert set(left) < set(whole), "a shard is whole or not there"
    assert all(whole[name] == content for name, content in left.items())
    started = []
    encode(config, out, on_start=started.append, **OF_FOUR)
    assert files(out) == whole
    assert started == [10 - 4 * (len(left) - 1)]


def test_encode_interrupted_while_it_writes_leaves_no_part(config, tmp_path, whole, monkeypatch):
    def write_half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hdit.latents.store.save_tensors", write_half)
    with pytest.raises(DataError, match="No space left on device; the same command goes on"):
        encode(config, tmp_path / "out", **OF_FOUR)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]
    monkeypatch.undo()
    encode(config, tmp_path / "out", **OF_FOUR)
    assert files(tmp_path / "out") == whole


def test_encode_again_writes_nothing(config, tmp_path, whole):
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    done = encode(config, tmp_path / "whole", **OF_FOUR)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    assert after == before
    assert done.shards == 0
    assert done.sigma_data is not None


def test_encode_of_two_processes_at_once_writes_what_one_writes(config, tmp_path, whole):
    """The second runs from front to end while the first has only just listed what is missing."""
    out, done, seen = tmp_path / "out", [], []

    def other(*numbers):
        options = OF_FOUR | {"rank": 1, "processes": 2, "on_images": seen.append}
        done.append(encode(config, out, **options))

    done.append(encode(config, out, rank=0, processes=2, on_start=other, **OF_FOUR))
    assert files(out) == whole
    assert [process.shards for process in done] == [1, 2]
    assert [process.absent for process in done] == [2, 0]
    assert sum(seen) == 4
    assert done[0].sigma_data is None, "not before all is there"
    assert done[1].sigma_data is not None


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"data": {"crop": "shorter_side"}}, {}, "data.crop: 'center' there, 'shorter_side' here"),
        ({"data": {"size": 32}}, {}, "data.size and channels: [3, 16, 16] there, [3, 32, 32] here"),
        ({"data": {"flip": False}}, {}, "data.flip (2 is with mirror images): 2 there, 1 here"),
        ({"data": {"background": "black"}}, {}, "data.background: 'white' there, 'black' here"),
        ({}, {"shard_size": 5}, "--shard-size: 4 there, 5 here"),
        ({}, {"dtype": "float16"}, "--dtype: 'float32' there, 'float16' here"),
    ],
)
def test_encode_refuses_a_folder_of_latents_by_other_settings(
    images, vae, tmp_path, whole, changes, options, named
):
    with pytest.raises(DataError) as error:
        encode(settings(images, vae, **changes), tmp_path / "whole", **(OF_FOUR | options))
    assert "holds latents of other settings" in str(error.value)
    assert named in str(error.value)
    assert files(tmp_path / "whole") == whole


@pytest.mark.parametrize("changes", [{"seed": 1}, {"scaling_factor": 0.5}])
def test_encode_refuses_a_folder_of_another_vaes_latents(images, tmp_path, whole, changes):
    other = tiny_vae.save(tmp_path / "other", **changes)
    with pytest.raises(DataError, match=r"space\.vae \(hash\): '"):
        encode(settings(images, other), tmp_path / "whole", **OF_FOUR)
    assert files(tmp_path / "whole") == whole


def test_encode_goes_on_with_the_same_vae_from_elsewhere(images, vae, tmp_path, whole):
    moved = shutil.copytree(vae, tmp_path / "moved")
    (tmp_path / "whole" / SHARDS[1]).unlink()
    encode(settings(images, moved), tmp_path / "whole", **OF_FOUR)
    assert files(tmp_path / "whole") == whole


def test_encode_refuses_a_folder_of_other_images(images, vae, tmp_path, whole):
    more = shutil.copytree(images, tmp_path / "more")
    shutil.copy(more / "cat" / "0.png", more / "cat" / "again.png")
    with pytest.raises(DataError, match="number of images: 10 there, 11 here"):
        encode(settings(more, vae), tmp_path / "whole", **OF_FOUR)


def test_encode_refuses_a_folder_that_is_not_its_own(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(DataError, match=r"is there already and has no manifest\.json"):
            encode(config, tmp_path / name, **OF_FOUR)
    assert files(tmp_path / "mine") == {"thesis.tex": b"mine"}
    assert (tmp_path / "file").read_text() == "mine"


def test_encode_takes_an_empty_folder(config, tmp_path, whole):
    (tmp_path / "empty").mkdir()
    encode(config, tmp_path / "empty", **OF_FOUR)
    assert files(tmp_path / "empty") == whole


HDIT = {
    "kind": "hdit",
    "patch_size": 1,
    "levels": [{"depth": 1, "width": 32, "attention": {"kind": "global", "d_head": 16}}],
    "mapping": {"depth": 1, "width": 32},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"crop": "random"}}, r"data\.crop: must not be 'random' to encode"),
        ({"data": {"augment": 0.1}}, r"data\.augment: must be 0 to encode"),
        ({"space": {"vae": "nowhere"}}, r"space\.vae: 'nowhere' does not exist"),
        ({"space": {"factor": 2}}, r"space\.factor: is 2, but the VAE"),
        ({"data": {"channels": 1}}, r"data\.channels: images have 1"),
        ({"data": {"path": "nowhere"}}, r"data\.path: 'nowhere' does not exist"),
    ],
)
def test_encode_refuses_what_cannot_be_stored(images, vae, tmp_path, changes, message):
    config = settings(images, vae).model_dump(mode="json", exclude_none=True)
    config = parse(merge(config, changes) | {"model": HDIT}, "it")
    with pytest.raises(UserError, match=message):
        encode(config, tmp_path / "out")


def test_encode_refuses_pixels(images, vae, tmp_path):
    raw = settings(images, vae).model_dump(mode="json", exclude_none=True)
    config = parse(raw | {"space": {"kind": "pixel"}}, "it")
    with pytest.raises(UserError, match=r"space\.kind: must be 'latent' to encode, got 'pixel'"):
        encode(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- sigma_data ----------------------------------------------------------------------------------


def test_encode_measures_the_deviation_of_what_training_will_see(config, tmp_path):
    done = encode(config, tmp_path / "out", **OF_FOUR)
    shards = [load_file(tmp_path / "out" / name)["posterior"] for name in SHARDS]
    mean, std = torch.cat(shards).double().numpy().reshape(20, 2, 64).transpose(1, 0, 2)
    # of a mixture with equal weights: the mean variance, and the variance of the means
    exact = 0.4 * np.sqrt(np.mean(std**2) + np.var(mean))
    assert done.sigma_data == pytest.approx(exact, rel=1e-6)  # scale and shift are float32
    draws = 1000
    noise = np.random.default_rng(0).standard_normal((draws, *mean.shape))
    x0 = (mean + std * noise - 0.3) * 0.4
    # of 1000 x 1280 values; a deviation is known to 1 / sqrt(2 n) of itself: here 5 of these
    assert done.sigma_data == pytest.approx(x0.std(), rel=5 / np.sqrt(2 * x0.size))


def test_measure_takes_images_evenly_where_there_are_many(config, tmp_path):
    encode(config, tmp_path / "out", **OF_FOUR)
    space, latents = config.space.open(torch.device("cpu")), Latents(str(tmp_path / "out"))
    taken = torch.stack([latents[i].image for i in (0, 4, 9)]).double().numpy()  # of 0..9, evenly
    mean, std = taken[:, :, :4], taken[:, :, 4:]
    exact = 0.4 * np.sqrt(np.mean(std**2) + np.var(mean))
    assert measure_sigma_data(latents, space, limit=3) == pytest.approx(exact, rel=1e-6)
    assert measure_sigma_data(latents, space, limit=10) != pytest.approx(exact, rel=1e-3)


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def toml(config, tmp_path):
    path = tmp_path / "latent.toml"
    path.write_text(config.dump())
    assert load(path) == config
    return path


def test_encode_of_the_command_line_says_what_it_wrote_and_how_to_go_on(
    toml, hdit, tmp_path, whole
):
    options = ["--shard-size", 4, "--batch-size", 3]
    out = tmp_path / "out"
    status, said, err = hdit("encode", toml, "--out", out, *options)
    assert status == 0, err
    assert files(out) == whole
    mib = sum(len(content) for name, content in whole.items() if name in SHARDS) / 2**20
    assert said.startswith(f"{out}: latents of 10 images, {mib:.1f} MiB; standard deviation ")
    assert said.endswith(f"(space.sigma_data is 1)\ntrain with --set space.stored={out}\n")
    assert hdit("encode", toml, "--out", out, *options)[0] == 0
    assert files(out) == whole


def test_encode_of_the_command_line_goes_to_the_folder_of_the_config(toml, hdit, tmp_path, whole):
    out = tmp_path / "out"
    options = ["--shard-size", 4, "--batch-size", 3, "--set", f"space.stored={out}"]
    assert hdit("encode", toml, *options)[0] == 0
    assert files(out) == whole


def test_encode_that_sigterm_ends_leaves_a_folder_to_go_on_with(
    toml, hdit, tmp_path, whole, monkeypatch
):
    out, write = tmp_path / "out", hdit_encode.write_shard

    def told_to_end(*arguments):
        monkeypatch.setattr(hdit_encode, "write_shard", write)
        write(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(hdit_encode, "write_shard", told_to_end)
    arguments = ["encode", toml, "--out", out, "--shard-size", 4, "--batch-size", 3]
    assert hdit(*arguments) == (143, "", "interrupted; the same command goes on\n")
    assert sorted(files(out)) == ["manifest.json", SHARDS[0]]
    status, _, err = hdit(*arguments)
    assert status == 0, err
    assert files(out) == whole


def test_encode_of_the_command_line_names_a_bad_image_once(images, vae, hdit, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    bad = data / "dog" / "5.png"
    bad.write_bytes(b"not an image")
    (data / "cat" / "notes.pdf").touch()
    spec = settings(data, vae, data={"max_bad_share": 0.1})
    (tmp_path / "it.toml").write_text(spec.dump())
    status, _, err = hdit("encode", tmp_path / "it.toml", "--out", tmp_path / "out")
    assert status == 0
    assert "1 file is left out, in no format that Pillow reads: .pdf 1; convert or remove it" in err
    assert err.count(str(bad)) == 1
    assert f"warning: skipped {bad}: " in err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "--out: name the folder to write, or set space.stored"),
        (["--dtype", "bfloat16"], "--dtype: must be float32 or float16, got 'bfloat16'"),
        (["--set", "space.vae=nowhere"], "space.vae: 'nowhere' does not exist"),
        (["--set", "space={kind='pixel'}"], "space.kind: must be 'latent' to encode"),
        (["--set", "data.crop=random"], "data.crop: must not be 'random'"),
        (["--set", "data.path=nowhere"], "data.path: 'nowhere' does not exist"),
        (["--set", "space.tile=24"], "space.tile: must be a multiple of 4 x factor = 16"),
    ],
)
def test_encode_with_bad_input_is_one_message_and_leaves_nothing(
    toml, hdit, tmp_path, arguments, wanted
):
    out = tmp_path / "out"
    where = ["--out", out] if arguments else []
    status, said, err = hdit("encode", toml, *where, *arguments)
    assert status == 1
    assert said == ""
    # a bar that is taken away leaves an empty line
    assert err.strip().startswith("error: ")
    assert "Traceback" not in err
    assert wanted in err
    assert not out.exists()


def test_encode_into_a_foreign_folder_is_one_message(toml, hdit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    status, _, err = hdit("encode", toml, "--out", tmp_path / "mine")
    assert status == 1
    assert err.strip().startswith(f"error: {tmp_path / 'mine'}: is there already")


# ---- several processes, and what a killed one leaves --------------------------------------------


def test_encode_of_a_rank_that_comes_late_writes_its_own_part(config, tmp_path, whole):
    for rank in (0, 1):
        encode(config, tmp_path / "out", rank=rank, processes=2, **OF_FOUR)
    assert files(tmp_path / "out") == whole


def test_encode_begins_where_another_process_is_beginning(config, tmp_path, whole):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".manifest.json.123.part").write_text("")
    encode(config, tmp_path / "out", **OF_FOUR)
    assert files(tmp_path / "out") == whole | {".manifest.json.123.part": b""}


def test_encode_takes_a_manifest_that_another_process_writes_meanwhile(
    config, tmp_path, whole, monkeypatch
):
    folder = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", folder)
    exists, asked = Path.exists, []

    def late(path, **options):
        asked.append(path)
        return exists(path) and (path.name != "manifest.json" or asked.count(path) > 1)

    monkeypatch.setattr(Path, "exists", late)
    encode(config, folder, **OF_FOUR)
    assert files(folder) == whole


def test_encodes_of_other_settings_that_begin_at_once_do_not_mix(
    config, images, vae, tmp_path, monkeypatch
):
    """The second begins when the first has found no manifest, and before it writes its own."""
    out, foreign, others = tmp_path / "out", store._is_foreign, []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()  # of a killed process

    def begin():
        with pytest.raises(DataError, match="holds latents of other settings"):
            encode(settings(images, vae, data={"flip": False}), out, **OF_FOUR)

    def meanwhile(path):
        if not others:
            others.append(threading.Thread(target=begin))
            others[0].start()
            others[0].join(0.5)
            assert others[0].is_alive(), "it waits"
        return foreign(path)

    monkeypatch.setattr(store, "_is_foreign", meanwhile)
    encode(config, out, **OF_FOUR)
    others[0].join()
    assert Latents(str(out)).manifest.flips == 2
    assert sorted(files(out)) == ["manifest.json", *SHARDS]


def test_encode_removes_what_a_killed_process_left(config, tmp_path, whole):
    part = tmp_path / "whole" / ".shard-00001.safetensors.1.part"
    part.write_bytes(b"x")
    os.utime(part, (0, 0))
    encode(config, tmp_path / "whole", **OF_FOUR)
    assert files(tmp_path / "whole") == whole


def test_encode_with_workers_judges_the_share_of_bad_images(vae, tmp_path):
    for i in range(120):
        (tmp_path / f"{i}.png").write_bytes(b"not an image")
    Image.new("RGB", (16, 16)).save(tmp_path / "z.png")
    with pytest.raises(DataError, match=r"beyond data\.max_bad_share"):
        encode(settings(tmp_path, vae), tmp_path / "out", workers=2, shard_size=121)


def test_encode_refuses_what_float16_cannot_hold(images, tmp_path):
    model = tiny_vae.model()
    model.quant_conv.bias[0] = 1e5
    model.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="not finite in float16"):
        encode(settings(images, tmp_path / "vae"), tmp_path / "out", dtype="float16", **OF_FOUR)


@pytest.mark.parametrize(
    ("key", "value"), [("shard_size", 0), ("images", "x"), ("latent", [4]), ("sise", 8)]
)
def test_manifest_with_wrong_values_is_named_in_a_line(tmp_path, whole, key, value):
    path = tmp_path / "whole" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=rf"manifest\.json is damaged: {key}: [^\n]*$"):
        Latents(str(tmp_path / "whole"))


# ---- settings that do not go with stored latents -------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"augment": 0.5}, r"data\.augment: must be 0 with space\.stored"),
        ({"cache": "c"}, r"data\.cache: has no effect with space\.stored"),
    ],
)
def test_config_of_stored_latents_refuses_what_needs_images(config, overlay, message):
    raw = config.model_dump(mode="json", exclude_none=True)
    with pytest.raises(UserError, match=message):
        parse(merge(raw, {"data": overlay, "space": {"stored": "latents"}}), "it")


def test_stored_latents_of_another_number_of_classes_are_refused(config, images, vae, tmp_path):
    encode(config, tmp_path / "latents", **OF_FOUR)
    raw = config.model_dump(mode="json", exclude_none=True)
    raw = merge(raw, {"data": {"classes": 3}, "space": {"stored": str(tmp_path / "latents")}})
    with pytest.raises(DataError, match=r"data\.classes: 3 are asked for, and '.*latents' has 2"):
        Trainer(parse(raw, "it"), tmp_path / "run")


def test_encode_and_info_take_a_path_in_the_home_folder(config, tmp_path, monkeypatch, hdit):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("it.toml").write_text(config.dump())
    stored = ("--set", "space.stored=~/latents")
    status, _, err = hdit("encode", "it.toml", *stored)
    assert status == 0, err
    assert (tmp_path / "home" / "latents" / "manifest.json").exists()
    status, out, _ = hdit("info", "it.toml", *stored, "--set", "data.path=nowhere")
    assert status == 0
    assert "2 classes" in out


def test_sample_refuses_a_guide_model_of_another_vae(images, vae, tmp_path, hdit):
    for name, folder in (("a", vae), ("b", tiny_vae.save(tmp_path / "other", seed=1))):
        raw = settings(images, folder).model_dump(mode="json", exclude_none=True)
        raw = merge(raw, {"sampling": {"grid": 0, "steps": 2}})
        Trainer(parse(raw, name), tmp_path / name).fit()
    status, _, err = hdit("sample", tmp_path / "a", "-n", 1, "--guide", tmp_path / "b")
    assert status == 1
    assert "has other latents, by the hash of their VAE" in err


# ---- what cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 1500])
def test_encode_on_a_full_disk_names_the_file_and_goes_on_later(
    config, tmp_path, whole, full_disk, size
):
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught, full_disk(size):
        encode(config, out, **OF_FOUR)
    file = "manifest.json" if size == 100 else "shard-00000.safetensors"
    assert str(caught.value).startswith(f"{out / file}: cannot be written: ")
    left = [path.name for path in out.iterdir() if path.name != ".lock"] if out.exists() else []
    assert left == ([] if size == 100 else ["manifest.json"])
    encode(config, out, **OF_FOUR)
    assert files(out).items() >= whole.items()


def test_encode_into_a_pipe_or_through_a_link_to_nothing_is_refused(config, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("pipe", "link", "pipe/below"):
        with pytest.raises(UserError, match=f"{name}: "):
            encode(config, tmp_path / name, **OF_FOUR)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in ("pipe", "link")) == [
        "link",
        "pipe",
    ]
    assert (tmp_path / "link").is_symlink()


def test_encode_into_more_files_than_can_be_counted_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr("hdit.latents.store.MAX_SHARDS", 2)
    with pytest.raises(DataError, match=r"out: 10 images in shards of 4 are more than 2 files"):
        encode(config, tmp_path / "out", **OF_FOUR)


@pytest.mark.parametrize("name", [b"caf\xe9", rb"a\xe9b", b"~"])
def test_latents_may_lie_in_a_folder_of_any_name(config, tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    encode(config, folder, **OF_FOUR)
    assert len(Latents(escape(str(folder)))) == len(Latents(folder)) == 10
