import json

import pytest
import torch

from hdit import config
from hdit.files import fingerprint
from hdit.protocols import DataShape
from hdit.runs import checkpoint
from hdit.runs.checkpoint import CheckpointError, State

SHAPE = DataShape(1, 8, 8, 10, 0.5)


@pytest.fixture
def save(tiny, tmp_path):
    root = tmp_path / "checkpoints"

    def write(images: int):
        state = State(images, images // 16, 1498, SHAPE, tuple("0123456789"))
        tensors = {"model": {"w": torch.full((100,), float(images))}, "ema": {"w": torch.ones(3)}}
        return checkpoint.save(root, config.load(tiny), state, tensors)

    return write


def fail(text):
    raise AssertionError(f"nothing to warn of, got {text!r}")


def test_checkpoint_reads_back(save, tiny):
    found = checkpoint.open_checkpoint(save(32))
    assert found.config == config.load(tiny)
    assert found.state == State(32, 2, 1498, SHAPE, tuple("0123456789"))
    assert torch.equal(found.tensors("model")["w"], torch.full((100,), 32.0))


def test_newest_goes_by_number_and_latest_names_it(save):
    for images in (16, 1024, 96):
        save(images)
    root = save(1024 * 1024).parent
    assert checkpoint.newest(root, fail).state.images == 1024 * 1024
    assert (root / "latest").read_text() == "000001048576\n"
    assert not list(root.glob(".*")), "no unfinished folder is left"


def test_newest_of_no_folder_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent", fail) is None


def test_unfinished_checkpoint_is_not_seen(save):
    root = save(16).parent
    (root / ".000000000032.part").mkdir()
    assert checkpoint.newest(root, fail).state.images == 16
    assert checkpoint.open_checkpoint(save(32)).state.images == 32


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "config.toml", "state.json"]
)
def test_checkpoint_cut_in_half_is_named_and_the_previous_one_used(save, name):
    save(16)
    damaged = save(32) / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    warnings = []
    found = checkpoint.newest(damaged.parent.parent, warnings.append)
    assert found.state.images == 16
    assert len(warnings) == 1
    assert str(damaged) in warnings[0]
    assert str(found.folder) in warnings[0]


def test_checkpoint_with_a_flipped_bit_is_refused(save):
    path = save(16) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: its checksum"):
        checkpoint.open_checkpoint(path.parent)


def test_checkpoint_without_a_file_is_refused(save):
    path = save(16) / "ema.safetensors"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: missing"):
        checkpoint.open_checkpoint(path.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_checkpoint_with_a_damaged_manifest_is_refused(save, text):
    path = save(16) / checkpoint.MANIFEST
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        checkpoint.open_checkpoint(path.parent)


def test_checkpoint_of_another_format_is_refused(save):
    path = save(16) / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.open_checkpoint(path.parent)


def test_run_whose_checkpoints_are_all_damaged_does_not_start_anew(save):
    paths = [save(images) / "model.safetensors" for images in (16, 32)]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is complete") as error:
        checkpoint.newest(paths[0].parent.parent, fail)
    assert all(str(path) in str(error.value) for path in paths)


def test_find_takes_a_checkpoint_or_a_run(save):
    first, second = save(16), save(32)
    assert checkpoint.find(first, fail).state.images == 16
    assert checkpoint.find(second.parent.parent, fail).state.images == 32


def test_find_names_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no such run"):
        checkpoint.find(tmp_path / "absent", fail)
    with pytest.raises(CheckpointError, match="neither a run"):
        checkpoint.find(tmp_path, fail)


def test_checkpoint_of_another_version_is_refused(save):
    """Intact by its checksums, but with other facts than this version writes."""
    folder = save(16)
    state = json.loads((folder / "state.json").read_text())
    for changed in (state | {"more": 1}, {k: v for k, v in state.items() if k != "classes"}):
        (folder / "state.json").write_text(json.dumps(changed))
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        manifest["files"]["state.json"] = fingerprint(folder / "state.json")
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"state\.json: of another version"):
            checkpoint.open_checkpoint(folder)
