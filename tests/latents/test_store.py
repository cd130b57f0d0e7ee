"""Stored latents: how they are read, and that training on them is training on the images."""

import json
import os
import pickle
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny_vae
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hdit.config import RunConfig, merge, parse
from hdit.data.batches import Batches, Layout
from hdit.data.held_out import content_hashes, divide
from hdit.data.source import DataError
from hdit.errors import UserError
from hdit.latents.encode import encode
from hdit.latents.store import Latents, choose
from hdit.runs.checkpoint import CheckpointError, find
from hdit.training.trainer import Trainer

COUNT = 10


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_vae.save(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images in two classes; none is like another, nor symmetric."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / ("cat" if i < 4 else "dog") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((16, 16)).save(path)
    return folder


@pytest.fixture(scope="module")
def live(images, vae) -> RunConfig:
    """Trains on the images: 6 steps of 8, nearly 5 epochs."""
    return parse(
        {
            "data": {"kind": "folder", "path": str(images), "size": 16},
            "space": {"kind": "latent", "vae": vae, "factor": tiny_vae.FACTOR},
            "model": {"kind": "dit", "patch_size": 2, "width": 32, "depth": 1, "num_heads": 2},
            "training": {
                "images": 48,
                "checkpoint_every": 24,
                "batch_size": 8,
                "log_every": 8,
                "label_dropout": 0.3,
            },
            "sampling": {"steps": 2, "grid": 0},
        },
        "it",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, live):
    """Their latents, in shards of 4, 4 and 2."""
    out = tmp_path_factory.mktemp("latents") / "it"
    encode(live, out, shard_size=4)
    return out


def changed(config: RunConfig, **changes) -> RunConfig:
    raw = merge(config.model_dump(mode="json", exclude_none=True), changes)
    raw["space"] = {key: value for key, value in raw["space"].items() if value is not None}
    return parse(raw, "it")


@pytest.fixture(scope="module")
def stored(live, folder) -> RunConfig:
    """The same training, on the latents."""
    return changed(live, space={"stored": str(folder)})


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


# ---- reading -------------------------------------------------------------------------------------


def test_latents_are_read_by_index_as_they_were_written(folder):
    latents = Latents(str(folder))
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    posterior = torch.cat([shard["posterior"] for shard in shards])
    assert len(latents) == COUNT
    assert latents.classes == ["cat", "dog"]
    for i in (9, 0, 4, 3, 7):
        assert torch.equal(latents[i].image, posterior[i])
        assert latents[i].label == (0 if i < 4 else 1)
        assert latents[i].skipped == ()
    for i in (-1, COUNT):
        with pytest.raises(IndexError, match=f"image {i} of 10"):
            latents[i]


def test_latents_are_found_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(Latents("~/it")) == COUNT


def test_latents_survive_a_pickle_as_workers_that_are_no_forks_need(folder):
    latents = Latents(str(folder))
    latents[0]  # a shard that is open
    again = pickle.loads(pickle.dumps(latents))
    assert torch.equal(again[9].image, latents[9].image)


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_come_in_the_batches_of_the_images(live, folder, workers):
    latents, source = Latents(str(folder)), live.data.open()
    place = {source[i].image.numpy().tobytes(): i for i in range(COUNT)}
    ours, theirs = (
        islice(Batches(s, seed=3, start=8, layout=Layout(4), workers=workers), 8)
        for s in (latents, source)
    )
    for a, b in zip(ours, theirs, strict=True):
        expected = [latents[place[image.numpy().tobytes()]].image for image in b.images]
        assert torch.equal(a.images, torch.stack(expected))
        assert torch.equal(a.labels, b.labels)
        assert np.array_equal(a.counters, b.counters)


def test_choose_takes_the_mirror_image_where_it_is_told_to():
    posterior = torch.arange(2 * 2 * 3).reshape(2, 2, 3, 1, 1)
    assert torch.equal(choose(posterior, None), posterior[:, 0])
    mixed = choose(posterior, torch.tensor([True, False]))
    assert mixed.flatten().tolist() == [3, 4, 5, 6, 7, 8]


# ---- damage --------------------------------------------------------------------------------------

SHARD = "shard-00001.safetensors"


def edit(path: Path, change, vae: str | None = None) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata if vae is None else {"vae": vae})


@pytest.mark.parametrize(
    "content",
    [lambda old: b"", lambda old: old[:5], lambda old: old[:-1], lambda old: b"\xff" * len(old)],
    ids=["empty", "header", "last byte", "noise"],
)
def test_damaged_shard_is_named_with_what_to_do(copy, content):
    (copy / SHARD).write_bytes(content((copy / SHARD).read_bytes()))
    latents = Latents(str(copy))
    assert latents[3].label == 0, "the others can be read"
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{SHARD}: damaged: .*the same `hdit encode` makes"):
            latents[4]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update(labels=tensors["labels"][:-1].clone()),
        lambda tensors: tensors.update(posterior=tensors["posterior"][:-1].clone()),
        lambda tensors: tensors.update(posterior=tensors["posterior"][:, :1].clone()),
        lambda tensors: tensors.update(posterior=tensors["posterior"][..., :2].clone()),
        lambda tensors: tensors.update(posterior=tensors["posterior"].half()),
        lambda tensors: tensors.update(labels=tensors["labels"].float()),
        lambda tensors: tensors.update(labels=tensors["labels"][:, None].clone()),
        lambda tensors: tensors.update(labels=tensors["labels"] + 9),
        lambda tensors: tensors.update(labels=tensors["labels"] - 9),
    ],
    ids=[
        "labels",
        "images",
        "sides",
        "width",
        "dtype",
        "labels of floats",
        "labels of two sides",
        "labels of no class",
        "labels below 0",
    ],
)
def test_shard_of_another_shape_is_refused(copy, change):
    edit(copy / SHARD, change)
    with pytest.raises(DataError, match=rf"{SHARD}: is not of this folder's manifest"):
        Latents(str(copy))[4]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused_by_place(copy, value):
    edit(copy / SHARD, lambda tensors: tensors["posterior"][2].fill_(value))
    latents = Latents(str(copy))
    assert latents[5].label == 1, "the others can be read"
    with pytest.raises(DataError, match=rf"{SHARD}: damaged: the latents of its image 2 are not"):
        latents[6]


def test_shard_of_another_vae_is_refused(copy):
    edit(copy / SHARD, lambda tensors: None, vae="f" * 64)
    with pytest.raises(DataError, match=rf"{SHARD}: is not of this folder's manifest"):
        Latents(str(copy))[4]
    assert Latents(str(copy))[0].label == 0


def test_shard_that_lacks_its_labels_is_damaged(copy):
    edit(copy / SHARD, lambda tensors: tensors.pop("labels"))
    with pytest.raises(DataError, match=rf"{SHARD}: damaged"):
        Latents(str(copy))[4]


def test_folder_that_lacks_shards_says_how_many(copy):
    (copy / SHARD).unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 3 shards; the same `hdit encode` goes on"):
        Latents(str(copy))


def test_folder_that_is_none_of_latents_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"space\.stored: '.*nowhere' does not exist"):
        Latents(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"has no manifest\.json, which `hdit encode` writes"):
        Latents(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"format": 1}', "is damaged"),
        ('{"format": 0}', "is damaged.*has format 0"),
        ('{"format": true}', "is damaged.*has format True"),
        ("[" * 10_000, "is damaged"),
        ('{"format": 2}', r"made by a newer hdit \(format 2; this reads 1\)"),
    ],
)
def test_manifest_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Latents(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("images", 10**23, "is damaged: .*images"),
        (
            "images",
            10**12,
            r"1,000,000,000,000 images in shards of 4 are more than 1,000,000 files",
        ),
        ("images", -1, "is damaged: .*images"),
        ("shard_size", 0, "is damaged: .*shard_size"),
        ("flips", 3, "is damaged: .*flips"),
        ("latent", [4, 10**23, 4], "is damaged: .*latent"),
        ("classes", 5, "is damaged: .*classes"),
    ],
)
def test_manifest_of_numbers_that_no_folder_has_is_refused_at_once(copy, key, value, message):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(DataError, match=f"(?s){message}"):
        Latents(str(copy))


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
def test_pipe_among_latents_is_not_waited_for(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(DataError, match=f"{name}( is|:) damaged: is (a device|no regular)"):
        Latents(str(copy))[4]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_shard_ends_training_with_its_name(stored, copy, tmp_path, workers):
    (copy / SHARD).write_bytes(b"")
    config = changed(stored, space={"stored": str(copy)}, training={"workers": workers})
    with pytest.raises(DataError, match=rf"{SHARD}: damaged") as error:
        Trainer(config, tmp_path / "run").fit()
    assert "Traceback" not in str(error.value)


# ---- training ------------------------------------------------------------------------------------


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


@pytest.fixture(scope="module")
def trained(live, tmp_path_factory):
    """A run on the images."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert Trainer(live, run).fit()
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_latents_has_the_losses_of_training_on_images(
    stored, trained, tmp_path, workers
):
    """Flips, labels, sigmas and posteriors are drawn alike."""
    assert Trainer(changed(stored, training={"workers": workers}), tmp_path).fit()
    # a convolution adds in another order for another batch, and six steps carry that on
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-5)
    assert len(losses(tmp_path)) == 6


def test_training_waits_for_data_for_a_share_of_its_time(trained):
    assert all(0 < line["data_wait_share"] < 1 for line in metrics(trained))


def test_training_without_flips_takes_one_side_of_latents_that_have_two(live, stored, tmp_path):
    for name, config in (("live", live), ("stored", stored)):
        config = changed(config, data={"flip": False}, training={"images": 16})
        Trainer(config, tmp_path / name).fit()
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)


def test_training_with_flips_on_latents_of_one_side_is_refused(live, stored, tmp_path):
    encode(changed(live, data={"flip": False}), tmp_path / "one")
    with pytest.raises(DataError, match=r"data\.flip \(2 is with mirror images\): 1 there, 2 here"):
        Trainer(changed(stored, space={"stored": str(tmp_path / "one")}), tmp_path / "run")


def test_training_on_latents_in_half_precision_is_close(live, stored, trained, tmp_path):
    encode(live, tmp_path / "half", dtype="float16")
    Trainer(changed(stored, space={"stored": str(tmp_path / "half")}), tmp_path / "run").fit()
    # each number is off by up to 2^-11 of itself, and a loss is of squares
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=4 * 2**-11)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": {"crop": "shorter_side"}}, "data.crop: 'center' there, 'shorter_side' here"),
        ({"data": {"size": 32}}, "data.size and channels: [3, 16, 16] there, [3, 32, 32] here"),
        ({"data": {"background": "black"}}, "data.background: 'white' there, 'black' here"),
        ({"data": {"crop": "random"}}, "data.crop: 'center' there, 'random' here"),
    ],
)
def test_training_refuses_latents_of_other_settings(stored, tmp_path, changes, named):
    with pytest.raises(DataError) as error:
        Trainer(changed(stored, **changes), tmp_path)
    assert str(error.value).startswith("space.stored: ")
    assert named in str(error.value)


def test_training_agrees_on_the_tile_where_it_matters(live, stored, tmp_path):
    small = {"training": {"images": 8}}
    assert Trainer(changed(stored, space={"tile": 16}, **small), tmp_path / "within").fit()
    tiled = changed(live, data={"size": 32}, space={"tile": 16}, **small)
    encode(tiled, tmp_path / "latents")
    read = changed(tiled, space={"stored": str(tmp_path / "latents")})
    assert Trainer(tiled, tmp_path / "live").fit()
    assert Trainer(read, tmp_path / "run").fit()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
    for tile, here in ((32, 0), (64, 0), (0, 0)):
        with pytest.raises(DataError, match=rf"space\.tile: 16 there, {here} here"):
            Trainer(changed(read, space={"tile": tile}), tmp_path / "other")


def test_training_refuses_latents_of_another_vae(stored, tmp_path):
    other = tiny_vae.save(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"space\.vae \(hash\): '"):
        Trainer(changed(stored, space={"vae": other}), tmp_path / "run")


def test_training_on_latents_needs_no_images(stored, tmp_path):
    config = changed(stored, data={"path": str(tmp_path / "removed")}, training={"images": 8})
    assert Trainer(config, tmp_path / "run").fit()


HDIT = {
    "kind": "hdit",
    "patch_size": 1,
    "levels": [{"depth": 1, "width": 32, "attention": {"kind": "global", "d_head": 16}}],
    "mapping": {"depth": 1, "width": 32},
}


def test_augmented_images_are_augmented_before_they_are_encoded(live, tmp_path):
    """Those that were mirrored, or nothing at all, are encoded as without; the others are not."""
    raw = live.model_dump(mode="json", exclude_none=True) | {"model": HDIT}
    seen = []
    for augment in (0, 0.1):
        trainer = Trainer(parse(merge(raw, {"data": {"augment": augment}}), "it"), tmp_path)
        batch = next(Batches(trainer.source, seed=0, start=0, layout=Layout(64)))
        seen.append(trainer.objective._x0(batch))
    (plain, none), (x0, aug) = seen
    assert none is None
    same = (aug[:, 1:] == 0).all(1)
    assert 16 < same.sum() < 56
    assert set(aug[same, 0].tolist()) == {0.0, 1.0}
    off = (x0 - plain).abs().amax((1, 2, 3))
    assert off[same].max() < 1e-4  # float32, from 255 to 1 and back
    assert off[~same].median() > 0.01  # a change may be a small one


# ---- the posterior -------------------------------------------------------------------------------


def drawn(config: RunConfig, tmp_path, layout: Layout, n: int = 1, start: int = 0) -> torch.Tensor:
    """x0 of n batches, in their order."""
    trainer = Trainer(config, tmp_path / "unused")
    seed = config.training.seed
    parts = islice(Batches(trainer.source, seed=seed, start=start, layout=layout), n)
    return torch.cat([trainer.objective._x0(batch)[0] for batch in parts])


def test_posterior_is_drawn_afresh_in_each_epoch(live, tmp_path):
    """Of one image, so that nothing but the draw differs."""
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(next(Path(live.data.path).rglob("*.png")), one)
    config = changed(live, data={"path": str(one), "flip": False})
    encode(config, tmp_path / "latents")
    config = changed(config, space={"stored": str(tmp_path / "latents")})
    x0 = drawn(config, tmp_path, Layout(500), n=8).double().numpy()
    assert len(np.unique(x0[:, 0, 0, 0])) == len(x0)
    mean, std = Latents(str(tmp_path / "latents"))[0].image[0].double().numpy().reshape(2, 4, 4, 4)
    n = len(x0)
    # of 64 numbers each: 5 standard errors
    assert np.abs((x0.mean(0) - (mean - 0.3) * 0.4) / (0.4 * std)).max() < 5 / np.sqrt(n)
    assert np.abs(x0.std(0) / (0.4 * std) - 1).max() < 5 / np.sqrt(2 * n)


def test_posterior_is_a_function_of_seed_and_count_alone(stored, tmp_path):
    whole = drawn(stored, tmp_path, Layout(16), n=2)
    again = drawn(stored, tmp_path, Layout(8), n=2, start=16)
    assert torch.equal(again, whole[16:])
    for rank in (0, 1):
        part = drawn(stored, tmp_path, Layout(16, processes=2, rank=rank))
        assert torch.equal(part, whole[8 * rank : 8 * rank + 8])
    other = drawn(changed(stored, training={"seed": 1}), tmp_path, Layout(16))
    assert not torch.isin(other, whole).any()


# ---- resuming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_way(live, tmp_path_factory):
    run = tmp_path_factory.mktemp("half") / "run"
    Trainer(changed(live, training={"images": 24}), run).fit()
    return run


@pytest.fixture
def run(half_way, tmp_path) -> Path:
    """A run on the images that is half way there."""
    return shutil.copytree(half_way, tmp_path / "run")


def test_resume_with_another_vae_is_refused(live, run, tmp_path):
    for changes in ({"seed": 1}, {"scaling_factor": 0.5}):
        other = tiny_vae.save(tmp_path / "other", **changes)
        with pytest.raises(CheckpointError, match=r"space\.vae: another VAE: hash \w{12} in the"):
            Trainer(changed(live, space={"vae": other}), run)


def test_resume_without_the_vae_is_refused(live, run):
    pixels = live.model_dump(mode="json", exclude_none=True) | {"space": {"kind": "pixel"}}
    with pytest.raises(CheckpointError, match=r"space\.kind: 'latent' in the run, 'pixel' now"):
        Trainer(parse(pixels, "it"), run)


def test_resume_with_the_same_vae_from_elsewhere_goes_on(live, vae, run, trained, tmp_path, capfd):
    moved = shutil.copytree(vae, tmp_path / "moved")
    assert Trainer(changed(live, space={"vae": str(moved)}), run).fit()
    assert f"resuming with another setting: space.vae: {vae!r} in the run" in capfd.readouterr().err
    assert losses(run) == losses(trained)


def test_resume_from_images_to_their_latents_goes_on(stored, run, trained, capfd):
    assert Trainer(stored, run).fit()
    assert "resuming with another setting: space.stored: None in the run" in capfd.readouterr().err
    assert losses(run) == pytest.approx(losses(trained), rel=1e-5)  # as above


def test_resume_from_latents_to_their_images_goes_on(live, stored, trained, tmp_path):
    Trainer(changed(stored, training={"images": 24}), tmp_path).fit()
    assert Trainer(live, tmp_path).fit()
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-5)


# ---- samples -------------------------------------------------------------------------------------


def test_run_keeps_the_identity_of_its_vae_and_its_classes(live, trained):
    identity = live.space.open(torch.device("cpu")).identity
    assert find(trained, print).state.space == identity
    assert json.loads((trained / "classes.json").read_text()) == {"cat": 0, "dog": 1}


def test_grid_of_a_latent_run_is_of_images(stored, tmp_path):
    config = changed(stored, sampling={"grid": 4}, training={"images": 24})
    Trainer(config, tmp_path).fit()
    [grid] = (tmp_path / "samples").iterdir()
    with Image.open(grid) as image:
        assert min(image.size) >= 32, "two columns, a class each, and two rows"


def sampled(hdit, run, out, *options) -> dict[str, np.ndarray]:
    status, _, err = hdit("sample", run, "-n", 3, "--out", out, *options)
    assert status == 0, err
    images = {}
    for path in out.glob("0*.png"):
        with Image.open(path) as image:
            images[path.name] = np.asarray(image)
    return images


def test_sample_of_a_latent_run_gives_images(trained, hdit, tmp_path):
    images = sampled(hdit, trained, tmp_path / "out")
    assert sorted(images) == ["000000.png", "000001.png", "000002.png"]
    assert {image.shape for image in images.values()} == {(16, 16, 3)}
    assert len({image.tobytes() for image in images.values()}) == 3


def test_sample_with_the_same_vae_from_elsewhere_gives_the_same(trained, vae, hdit, tmp_path):
    moved = shutil.copytree(vae, tmp_path / "moved")
    theirs = sampled(hdit, trained, tmp_path / "a")
    ours = sampled(hdit, trained, tmp_path / "b", "--set", f"space.vae={moved}")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"seed": 1}, "error: space.vae: the model was trained on latents of another VAE"),
        ({"latent_channels": 8}, "error: space.channels: is 4, but the VAE"),
    ],
)
def test_sample_with_another_vae_is_refused(trained, hdit, tmp_path, changes, wanted):
    other = tiny_vae.save(tmp_path / "other", **changes)
    options = ["--out", tmp_path / "out", "--set", f"space.vae={other}"]
    status, _, err = hdit("sample", trained, "-n", 1, *options)
    assert status == 1
    assert err.startswith(wanted)
    assert not (tmp_path / "out").exists()


def test_sample_of_a_run_whose_vae_is_gone_asks_for_it(live, vae, hdit, tmp_path, capfd):
    moved = shutil.copytree(vae, tmp_path / "moved")
    config = changed(live, space={"vae": str(moved)}, training={"images": 8})
    Trainer(config, tmp_path / "run").fit()
    shutil.rmtree(moved)
    capfd.readouterr()
    status, _, err = hdit("sample", tmp_path / "run", "-n", 1, "--out", tmp_path / "out")
    assert status == 1
    assert err.startswith(f"error: space.vae: {str(moved)!r} does not exist")
    sampled(hdit, tmp_path / "run", tmp_path / "out", "--set", f"space.vae={vae}")


def test_training_of_latents_without_a_vae_is_refused_before_it_leaves_anything(live, tmp_path):
    with pytest.raises(UserError, match=r"space\.vae: must be set"):
        Trainer(changed(live, space={"vae": None}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- held out ------------------------------------------------------------------------------------


def test_share_of_stored_latents_is_held_out_by_what_is_stored(folder):
    latents = Latents(str(folder))
    hashes = content_hashes(latents, range(COUNT))
    training, held_out = divide(latents, 0.4, hashes)
    parts = [pickle.loads(pickle.dumps(part)) for part in (training, held_out.source)]
    ours, theirs, everyone = (
        [(s.image.numpy().tobytes(), s.label) for s in map(part.__getitem__, range(len(part)))]
        for part in (*parts, latents)
    )
    assert sorted([*ours, *theirs]) == sorted(everyone)
    with pytest.raises(IndexError):
        training[len(training)]


@pytest.mark.parametrize("kind", ["share", "latents", "images"])
def test_run_on_latents_is_validated(stored, folder, images, tmp_path, kind):
    """On a share of what is stored, on other latents, or on images through the VAE."""
    place = {"share": 0.4, "latents": str(folder), "images": str(images)}[kind]
    config = changed(stored, data={"held_out": place}, training={"images": 24})
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.fit()
    [line] = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    count, losses = json.loads(line)["count"], json.loads(line)["weights"]["ema"]
    assert count + len(trainer.source) == COUNT if kind == "share" else count == COUNT
    assert losses["loss"] > 0
    assert losses["x0"] > 0


def test_held_out_latents_of_another_crop_are_refused(live, copy, tmp_path):
    config = changed(live, data={"held_out": str(copy), "crop": "shorter_side"})
    with pytest.raises(DataError, match=r"data.held_out: .* holds latents of other settings"):
        Trainer(config, tmp_path / "run")
