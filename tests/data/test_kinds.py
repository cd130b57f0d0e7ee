"""What a path is, by its content, for all verbs alike."""

import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from hdit.data import DataSpec
from hdit.data.check.options import open_source
from hdit.data.kinds import MODELS, kind_of, what_is
from hdit.data.source import DataError
from hdit.errors import UserError
from hdit.evaluation.image_sets import open_set
from hdit.runs.trained import is_trained

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)


def png(i):
    content = io.BytesIO()
    Image.fromarray(PIXELS[i]).save(content, "PNG")
    return content.getvalue()


def folder(path, **files):
    """A folder of texts; a file's name has __ for a dot, and ___ for a slash."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = path / name.replace("___", "/").replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def images(path):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        (path / f"{i}.png").write_bytes(png(i))
    return path


def make_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        for i in range(2):
            file.writestr(f"{i}.png", png(i))


def make_npz(path):
    with open(path, "wb") as file:
        np.savez(file, arr_0=PIXELS)


def make_tar(path):
    with tarfile.open(path, "w") as file:
        for i in range(2):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(png(i))
            file.addfile(member, io.BytesIO(png(i)))


MAKE = {"folder": images, "zip": make_zip, "npz": make_npz, "tar": make_tar}


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name.format(kind)) for kind in ("zip", "npz", "tar") for name in ("a.{}", "a")),
        ("zip", "A.ZIP"),
        ("npz", "A.NPZ"),
        ("tar", "A.TAR"),
        ("zip", "a.npz"),
        ("npz", "a.zip"),
        ("tar", "a.zip"),
        ("zip", "a.tar"),
        ("zip", "a.bin"),
        ("folder", "a.zip"),
        ("folder", "A.TOML"),
    ],
)
def test_training_check_and_evaluation_tell_the_same_by_content(tmp_path, kind, name, is_link):
    path = tmp_path / ("real" if is_link else name)
    MAKE[kind](path)
    if is_link:
        (tmp_path / name).symlink_to("real")
    place = str(tmp_path / name)
    assert what_is(place) == kind_of(place) == kind
    assert not is_trained(tmp_path / name)
    spec = TypeAdapter(DataSpec).validate_python({"path": place, "size": 4})
    assert spec.kind == kind
    assert open_source(place, size="4").spec.kind == kind
    found = open_set(place)
    assert found.record["kind"] == kind
    assert [found.image(i)[0].permute(1, 2, 0).tolist() for i in range(2)] == PIXELS.tolist()


def test_tar_files_by_wildcard_or_braces_are_a_set_of_images(tmp_path):
    for i in range(3):
        make_tar(tmp_path / f"{i}.tar")
    assert len(open_set(f"{tmp_path}/*.tar")) == 6
    assert len(open_set(f"{tmp_path}/{{0..1}}.tar")) == 4
    with pytest.raises(UserError, match="1 of 2 are missing"):
        open_set(f"{tmp_path}/{{2..3}}.tar")


@pytest.mark.parametrize("name", ["a.npz", "a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("content", [b"", b"noise", b"PK\x03\x04 cut off"])
def test_damaged_file_is_of_the_kind_that_its_name_tells(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert what_is(tmp_path / name) in (name.split(".")[1], "zip")
    with pytest.raises(UserError, match=name):
        open_set(str(tmp_path / name))


def test_npz_is_one_whatever_lies_first_in_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("notes.txt", "how it was made")
        content = io.BytesIO()
        np.save(content, PIXELS)
        file.writestr("arr_0.npy", content.getvalue())
    assert what_is(tmp_path / "a.npz") == "npz"
    assert len(open_set(str(tmp_path / "a.npz"))) == 2


def test_zip_of_images_that_begins_with_an_array_is_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("stats.npy", b"")
        file.writestr("a.png", png(0))
    assert what_is(tmp_path / "a.zip") == "zip"


def test_device_is_nothing_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    assert what_is(tmp_path / "a.zip") is None
    with pytest.raises(UserError, match=r"a\.zip: must be a folder of images"):
        open_set(str(tmp_path / "a.zip"))


# ---- models and images ---------------------------------------------------------------------------

CHECKPOINT = {"format": 1, "files": {"state.json": {}, "model.safetensors": {}}}
EXPORT = {"hdit_format": 1, "config": {}}
DIFFUSERS = {"_class_name": "DiTTransformer2DModel"}
FOLDERS = {
    "run": {"checkpoints___000000000096___manifest__json": CHECKPOINT},
    "run, begun": {"config__toml": "", "checkpoints___latest": ""},
    "run, without checkpoints": {"config__toml": "", "metrics__jsonl": ""},
    "run, damaged": {"checkpoints___000000000096___model__safetensors": ""},
    "checkpoint": {"manifest__json": CHECKPOINT},
    "checkpoint, damaged": {"manifest__json": "{", "state__json": "", "model__safetensors": ""},
    "converted": {"config__json": EXPORT, "model__safetensors": ""},
    "converted, damaged": {"config__json": "{", "model__safetensors": ""},
    "converted, without weights": {"config__json": EXPORT},
    "diffusers": {"config__json": DIFFUSERS, "model__safetensors": ""},
    "diffusers, in parts": {"config__json": DIFFUSERS, "a-1-of-2__safetensors": ""},
    "diffusers, pipeline": {
        "model_index__json": {},
        "transformer___config__json": DIFFUSERS,
        "transformer___a__bin": "",
    },
    "diffusers, damaged": {"config__json": "{", "diffusion_pytorch_model__bin": ""},
    "diffusers, without weights": {"config__json": DIFFUSERS},
}
WEAK = [name for name in FOLDERS if "without weights" in name]


@pytest.mark.parametrize("name", FOLDERS)
def test_models_folder_is_one_damaged_or_not(tmp_path, name):
    path = folder(tmp_path / "it", **FOLDERS[name])
    assert what_is(path) == name.split(",")[0]
    assert is_trained(path)
    (path / "card.png").write_bytes(png(0))
    images(path / "samples")
    images(path / "mine")
    folder(path / "mine", samples__json={"samples": []})
    if name not in WEAK:
        assert is_trained(path)  # its card and its samples are no data set


@pytest.mark.parametrize("place", ["", "cat"])
@pytest.mark.parametrize("name", FOLDERS)
def test_folder_that_is_a_model_and_images_is_an_error_that_says_so(tmp_path, name, place):
    path = folder(tmp_path / "it", **FOLDERS[name])
    images(path / place)
    if name in WEAK:
        assert what_is(path) == "folder"
        return
    words = f"it' is both {MODELS[name.split(',')[0]]} and a folder of images, as '.*0.png'"
    for ask in (what_is, is_trained, lambda path: kind_of(str(path)), lambda p: open_set(str(p))):
        with pytest.raises(UserError, match=words):
            ask(path)
    if not place:
        spec = {"kind": "folder", "path": str(path), "size": 4}  # which leaves no doubt
        assert len(TypeAdapter(DataSpec).validate_python(spec).open()) == 2


LOOK_ALIKES = {
    "manifest": {"manifest__json": {"name": "mine"}},
    "manifest of other files": {"manifest__json": {"format": 1, "files": ["0.png", "1.png"]}},
    "manifest that is no JSON": {"manifest__json": "{"},
    "list as manifest": {"manifest__json": []},
    "config": {"config__json": {"resolution": 4}},
    "config that is no JSON": {"config__json": "{"},
    "list as config": {"config__json": []},
    "class of nothing": {"config__json": DIFFUSERS},
    "state": {"state__json": {"done": True}},
    "splits": {"dataset_dict__json": "{"},
    "checkpoints": {"checkpoints___notes__txt": ""},
    "metrics": {"metrics__jsonl": ""},
    "weights": {"model__safetensors": ""},
}


@pytest.mark.parametrize("name", [*LOOK_ALIKES, "empty checkpoints"])
def test_images_beside_what_looks_like_a_model_are_images(tmp_path, name):
    path = folder(images(tmp_path / "it"), **LOOK_ALIKES.get(name, {}))
    if name == "empty checkpoints":
        (path / "checkpoints").mkdir()
    assert what_is(path) == "folder"
    assert not is_trained(path)
    assert len(TypeAdapter(DataSpec).validate_python({"path": str(path), "size": 4}).open()) == 2
    assert len(open_source(str(path), size="4")) == 2
    assert len(open_set(str(path))) == 2


@pytest.mark.parametrize("name", ["a.pt", "a", "a.ckpt"])
def test_file_of_torch_is_weights(tmp_path, name):
    torch.save({"a": torch.zeros(2)}, tmp_path / name)
    assert what_is(tmp_path / name) == "weights"


@pytest.mark.parametrize("name", FOLDERS)
def test_model_as_data_is_named_as_what_it_is(tmp_path, name):
    path = folder(tmp_path / "it", **FOLDERS[name])
    words = f"it' is {MODELS[name.split(',')[0]]}, and no data set"
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(DataSpec).validate_python({"path": str(path), "size": 4})
    with pytest.raises(DataError, match=words):
        open_source(str(path), size="4")
    with pytest.raises(UserError, match=f"it: is {MODELS[name.split(',')[0]]}, and must be a fol"):
        open_set(str(path))


def test_stored_latents_are_neither_images_nor_a_model(tmp_path):
    manifest = {"vae": "", "latent": [4, 2, 2], "shard_size": 1}
    path = folder(tmp_path / "it", manifest__json=manifest)
    assert what_is(path) == "latents"
    assert not is_trained(path)
    with pytest.raises(DataError, match=r"stored latents; set space\.stored"):
        kind_of(str(path))
    with pytest.raises(UserError, match="it: is a folder of stored latents, and must be a folder"):
        open_set(str(path))


def test_folder_that_may_not_be_entered_is_one_of_images_and_told_as_it_is(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path / "set") + "/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    def refuse_list(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "set").mkdir()
    stat = os.stat
    monkeypatch.setattr(os, "stat", refuse)
    assert what_is(tmp_path / "set") == "folder"
    monkeypatch.setattr(os, "scandir", refuse_list)
    with pytest.raises(DataError, match=r"^data\.path: '.*set' cannot be listed: .*denied"):
        open_source(str(tmp_path / "set"))
    with pytest.raises(UserError, match=r"set: cannot be listed: .*denied"):
        open_set(str(tmp_path / "set"))
