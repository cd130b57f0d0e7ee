"""Converted folders: damage and contradictions are named, whatever is wrong with them."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hdit.errors import UserError
from hdit.files import fingerprint
from hdit.runs import export
from hdit.runs.checkpoint import CheckpointError
from hdit.runs.conversion import convert
from hdit.runs.trained import Trained


def fail(text):
    raise AssertionError(f"nothing to warn of, got {text!r}")


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "model"
    convert(trained, out)
    return out


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def edit(folder, **changes):
    """Changes config.json, and writes the checksum that belongs to it."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(raw | {"sha256": export._sha256(raw)}))


def test_every_flipped_bit_of_the_weights_is_found(copy):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    for place in np.linspace(0, len(content) - 1, 24).astype(int).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged.*checksum"):
            Trained.open(copy, fail)
    path.write_bytes(content)
    Trained.open(copy, fail)


def test_every_flipped_bit_of_the_config_is_found(copy):
    path = copy / "config.json"
    content = path.read_bytes()
    for place in np.linspace(0, len(content) - 1, 150).astype(int).tolist():
        if chr(content[place]).isspace():
            continue  # between two values it means nothing
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="copy"):
            Trained.open(copy, fail)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: json.dumps(raw, indent=8).replace("\n", "\r\n"),
        lambda raw: json.dumps({"_commit_hash": "abc", **raw}),
    ],
    ids=["layout", "key"],
)
def test_config_laid_out_otherwise_or_with_a_key_of_a_hub_is_the_same(change, copy):
    path = copy / "config.json"
    path.write_bytes(change(json.loads(path.read_text())).encode())
    (copy / "README.md").write_text("licence: mine")
    Trained.open(copy, fail)


def test_setting_changed_by_hand_is_told_of_set(copy):
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"steps": 2', '"steps": 3'))
    with pytest.raises(CheckpointError, match=r"config\.json: damaged, or changed by hand.*--set"):
        Trained.open(copy, fail)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigma_data": math.nan}, "shape.sigma_data: must be a finite number, got nan"),
        ({"sigma_data": 0.6}, "shape.sigma_data is 0.6, where its config has 0.5"),
        ({"sigma_data": "0.5"}, "shape.sigma_data: must be a valid number, got '0.5'"),
        ({"height": 16}, "shape.height is 16, where its config has 8"),
        ({"width": 8.5}, "shape.width: must be a valid integer"),
        ({"num_classes": -1}, "shape.num_classes: must be greater than or equal to 0"),
        ({"num_classes": 3}, "classes names 10, and shape.num_classes is 3"),
        ({"channels": 3}, "its tensors are not those of the model"),
        ({"depth": 3}, "shape.depth: unknown key"),
    ],
)
def test_shape_that_contradicts_the_config_is_named(changes, words, copy):
    edit(copy, shape={**json.loads((copy / "config.json").read_text())["shape"], **changes})
    with pytest.raises(UserError) as error:
        Trained.open(copy, fail)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["a", "b", "c"]}, "classes names 3, and shape.num_classes is 10"),
        ({"classes": ["a"] * 10}, "classes names 1, and shape.num_classes is 10"),
        ({"classes": list(range(10))}, "classes.0: must be a valid string, got 0"),
        ({"classes": None}, "classes: must be a valid list, got None"),
        ({"weights": "best"}, "weights: must be 'ema', 'model' or 'given', got 'best'"),
        ({"images": -1}, "images: must be greater than or equal to 0"),
        ({"origin": 5}, "origin: must be a valid string"),
        ({"shape": [1, 8, 8]}, "shape: must be a table"),
        ({"config": "tiny"}, "config: must be a valid dictionary"),
        ({"config": {}}, "model: required, but not set"),
        ({"files": {}}, "config.json: damaged: it does not name model.safetensors"),
        ({"files": 5}, "config.json: damaged: files: Input should be a valid dictionary, got 5"),
        ({"hdit_format": 3}, "made by a newer hdit (format 3; this reads 2); update hdit"),
        ({"hdit_format": None}, "config.json: damaged: has format None"),
    ],
)
def test_config_that_cannot_be_is_named(changes, words, copy):
    edit(copy, **changes)
    with pytest.raises(UserError) as error:
        Trained.open(copy, fail)
    assert words in str(error.value)


def test_folder_of_an_earlier_version_is_read_with_a_warning_and_convert_mends_it(copy, hdit):
    path, out = copy / "config.json", copy.with_name("anew")
    raw = json.loads(path.read_text()) | {"hdit_format": 1}
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in ("files", "sha256")}))
    said = []
    weights = Trained.open(copy, said.append).tensors()
    assert "without checksums" in said[0]
    status, _, err = hdit("convert", copy, out)
    assert status == 0, err
    again = Trained.open(out, fail).tensors()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    raw["shape"]["sigma_data"] = 0.6
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"shape\.sigma_data is 0\.6"):
        Trained.open(copy, said.append)


def test_weights_that_are_not_finite_are_named_though_their_checksum_fits(copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["out_norm.scale"][3] = math.inf
    save_file(tensors, path)
    edit(copy, files={path.name: fingerprint(path)})
    with pytest.raises(UserError, match=r"the tensor 'out_norm.scale' has 1 of 32 values"):
        Trained.open(copy, fail)
