"""What the verbs write: to a full disk, over links and devices, and where nothing can be."""

import os
import shutil
import tomllib

import numpy as np
import pytest
from PIL import Image

from hdit import config
from hdit.interop import Contents
from hdit.runs import export
from hdit.runs.building import make_network

DIT = """
data = { kind = "digits" }
model = { kind = "dit", patch_size = 2, depth = 2, width = 16, num_heads = 2 }
training = { images = 96, checkpoint_every = 32, batch_size = 16 }

[diffusion]
parametrization = { kind = "eps_vp" }
weighting = { kind = "eps" }
density = { kind = "uniform_vp" }
"""


def everything(folder):
    """Paths below a folder, with what tells whether they are the same as before."""
    return {path: (path.lstat().st_mode, path.lstat().st_ino) for path in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    """A folder with a run, images of noise and features, in which the command runs."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder / "run")
    shutil.copy(trained.parent / "tiny.toml", folder)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(4):
        noise = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{i}.png")
    (folder / "mine.py").write_text("def mean(x): return x.double().flatten(1)[:, ::64]\n")
    monkeypatch.chdir(folder)
    return folder


SAMPLE = ["sample", "run", "-n", "2", "--steps", "2", "--batch-size", "2"]
EVALUATE = ["evaluate", "images", "images", "--features", "mine:mean", "--workers", "0"]
CHECK = ["data", "check", "images", "--size", "32", "--workers", "0"]
VERBS = {
    "sample": ([*SAMPLE, "--out"], "out", 300, "out/samples.json"),
    "convert": (["convert", "run"], "out", 4000, "out/model.safetensors"),
    "evaluate": ([*EVALUATE, "--out"], "out", 900, "out"),  # more than its warnings
    "data check": ([*CHECK, "--sheet"], "out.png", 8000, "out.png"),
    "watch": (["watch", "run", "--out"], "out.html", 8000, "out.html"),
}


@pytest.mark.parametrize("verb", ["sample", "convert", "evaluate", "data check", "watch"])
def test_full_disk_is_one_message_with_the_path_and_leaves_nothing_half_written(
    here, hdit, full_disk, verb
):
    arguments, out, size, file = VERBS[verb]
    before = everything(here)
    with full_disk(size):
        status, _, err = hdit(*arguments, out)
    assert status == 1
    assert f"error: {file}: cannot be written: " in err
    assert "File too large" in err
    assert "Traceback" not in err
    left = {path.relative_to(here).as_posix() for path in everything(here).keys() - before.keys()}
    assert {name for name in left if "__pycache__" not in name and ".lock" not in name} <= {"out"}
    assert not (here / out).is_file()
    assert hdit(*arguments, out)[0] == 0  # once there is room


@pytest.mark.parametrize("kind", ["k-diffusion", "diffusers", "facebook-dit"])
def test_conversion_on_a_full_disk_leaves_nothing(tmp_path, hdit, full_disk, trained, kind):
    out = tmp_path / {"k-diffusion": "a.safetensors", "facebook-dit": "a.pt"}.get(kind, "a")
    source = trained
    if kind != "k-diffusion":
        source = tmp_path / "dit"
        settings = config.parse(tomllib.loads(DIT), "dit")
        shape = settings.data_shape(10)
        weights = {"given": make_network(settings, shape).state_dict()}
        export.write(Contents(settings, shape, tuple("0123456789"), weights, "random"), source, "")
    before = everything(tmp_path)
    with full_disk(4000):
        status, _, err = hdit("convert", source, out, "--to", kind)
    assert status == 1
    assert f"error: {out}" in err
    assert "cannot be written: " in err
    assert "Traceback" not in err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("size", [800, 4000])
def test_training_on_a_full_disk_names_the_file_and_resumes(tmp_path, tiny, hdit, full_disk, size):
    run = tmp_path / "run"
    with full_disk(size):
        status, _, err = hdit("train", tiny, "--run", run)
    assert status == 1
    assert f"{run}/" in err
    assert "cannot be written: " in err
    assert "Traceback" not in err
    assert not list(run.rglob("*.part"))
    assert hdit("train", tiny, "--run", run)[0] == 0


def pipe(path):
    os.mkfifo(path)


def link(path):
    path.with_name("target").write_text("theirs")
    path.symlink_to("target")


def link_to_nothing(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [pipe, link, link_to_nothing])
@pytest.mark.parametrize("verb", ["sample", "convert", "evaluate", "data check", "watch"])
def test_output_that_is_no_regular_file_is_refused_and_left(here, hdit, verb, make):
    arguments, out, *_ = VERBS[verb]
    make(here / out)
    before = everything(here)
    status, _, err = hdit(*arguments, out)
    assert status == 1
    assert err.strip().startswith("error: ")
    assert out in err
    assert "Traceback" not in err
    after = {p: was for p, was in everything(here).items() if "__pycache__" not in str(p)}
    assert after == before


@pytest.mark.parametrize("verb", ["sample", "convert", "evaluate", "data check", "watch"])
@pytest.mark.parametrize("folder", ["tiny.toml", "n" * 300, "/proc/nothing"])
def test_output_in_what_is_no_folder_is_refused(here, hdit, verb, folder):
    arguments, out, *_ = VERBS[verb]
    before = everything(here)
    status, _, err = hdit(*arguments, f"{folder}/{out}")
    assert status == 1
    assert "error: " in err
    assert f"{folder}/{out}" in err
    assert "Traceback" not in err
    after = {p: was for p, was in everything(here).items() if "__pycache__" not in str(p)}
    assert after == before


@pytest.mark.parametrize("name", ["000000.png", "grid.png", "samples.json"])
@pytest.mark.parametrize("make", [link, link_to_nothing, pipe, lambda path: path.mkdir()])
def test_samples_go_over_regular_files_alone(here, hdit, name, make):
    assert hdit(*SAMPLE, "--out", "out")[0] == 0
    (here / "out" / name).unlink()
    make(here / "out" / name)
    before = everything(here)
    status, _, err = hdit(*SAMPLE, "--out", "out", "--overwrite")
    assert status == 1
    assert f"out/{name}: " in err
    assert "Traceback" not in err
    assert everything(here) == before


def test_folder_of_samples_may_be_a_link(here, hdit):
    (here / "disk").mkdir()
    (here / "out").symlink_to("disk")
    for again in ([], ["--overwrite"]):
        assert hdit(*SAMPLE, "--out", "out", *again)[0] == 0
    assert (here / "out").is_symlink()
    assert (here / "disk" / "000000.png").is_file()


def test_samples_json_of_another_shape_removes_nothing(here, hdit):
    assert hdit(*SAMPLE, "--out", "out")[0] == 0
    (here / "out" / "samples.json").write_text('{"samples": [{"file": "000000.png"}, {"file": 5}]}')
    before = everything(here)
    status, _, err = hdit(*SAMPLE, "--out", "out", "--overwrite")
    assert status == 1
    assert "out/samples.json: samples[1].file must be the name of an image beside it, got 5" in err
    assert everything(here) == before
