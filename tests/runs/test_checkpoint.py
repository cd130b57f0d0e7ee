import json
import shutil

import pytest
import torch

from hdit import config
from hdit.files import fingerprint
from hdit.protocols import DataShape
from hdit.runs import checkpoint
from hdit.runs.checkpoint import CheckpointError, DamagedCheckpoint, State

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


def edit_manifest(folder, change):
    path = folder / checkpoint.MANIFEST
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', "[" * 10_000, "\x00" * 100, "1" * 5000]
)
def test_checkpoint_with_a_damaged_manifest_is_refused(save, text):
    path = save(16) / checkpoint.MANIFEST
    path.write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json: damaged"):
        checkpoint.open_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw["files"]["state.json"].pop("sha256"), r"state\.json\.sha256: Field"),
        (lambda raw: raw["files"]["state.json"].pop("bytes"), r"state\.json\.bytes: Field"),
        (lambda raw: raw["files"]["state.json"].update(bytes="1"), r"bytes: .*got '1'"),
        (lambda raw: raw["files"]["state.json"].update(sha256=5), r"sha256: .*got 5"),
        (lambda raw: raw["files"].update({"state.json": None}), r"state\.json: .*got None"),
        (lambda raw: raw["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}}), r"\.\./x"),
        (lambda raw: raw["files"].update({"..": {"bytes": 0, "sha256": "0" * 64}}), r"files\.\.\."),
        (lambda raw: raw["files"].pop("config.toml"), r"does not name config\.toml"),
        (lambda raw: raw.update(files=[]), "files: .*got \\[\\]"),
        (lambda raw: raw.update(format=True), "has format True"),
        (lambda raw: raw.update(format="1"), "has format '1'"),
        (lambda raw: raw.update(format=0), "has format 0"),
        (lambda raw: raw.pop("format"), "has format None"),
    ],
)
def test_manifest_with_wrong_entries_is_damaged_and_says_which(save, change, named):
    folder = save(16)
    edit_manifest(folder, change)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json: damaged.*" + named):
        checkpoint.open_checkpoint(folder)


def test_checkpoint_of_a_newer_format_is_no_damaged_one(save):
    """An older one is not taken in its place."""
    save(16)
    folder = save(32)
    edit_manifest(folder, lambda raw: raw.update(format=99, files="of another kind"))
    for read in (checkpoint.open_checkpoint, lambda _: checkpoint.newest(folder.parent, fail)):
        with pytest.raises(
            CheckpointError, match=r"made by a newer hdit \(format 99; this reads 1\)"
        ) as e:
            read(folder)
        assert not isinstance(e.value, DamagedCheckpoint)


def test_checkpoint_that_may_not_be_read_is_no_damaged_one(save, monkeypatch):
    """Root may read everything, so that this asks no real file."""
    save(16)
    folder = save(32)
    monkeypatch.setattr(checkpoint.os, "access", lambda path, mode: folder not in path.parents)
    with pytest.raises(CheckpointError, match=r"32.manifest\.json: may not be read by this user"):
        checkpoint.newest(folder.parent, fail)


def test_checkpoint_under_the_name_of_another_is_refused(save):
    folder = save(32)
    shutil.copytree(folder, folder.with_name("000000000064"))
    with pytest.raises(
        CheckpointError, match=r"000000000064: is the checkpoint 000000000032; give"
    ):
        checkpoint.newest(folder.parent, fail)


def test_folders_of_other_names_are_no_checkpoints(save):
    root = save(32).parent
    for name in ("²", "٣", "64.damaged", "latest2", ".000000000064.part"):
        (root / name).mkdir()
    assert [folder.name for folder in checkpoint.checkpoint_folders(root)] == ["000000000032"]


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
    (tmp_path / "config.toml").touch()
    with pytest.raises(CheckpointError, match="this run has no checkpoint: none yet, or none any"):
        checkpoint.find(tmp_path, fail)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"more": 1}, "more"),
        ({"classes": None}, "classes"),
        ({"classes": "abc"}, "classes"),
        ({"classes": ["a"]}, "names of 1 classes"),
        ({"images": -1}, "images"),
        ({"images": "32"}, "images"),
        ({"step": 1.5}, "step"),
        ({"data_size": True}, "data_size"),
        ({"shape": {"channels": 1}}, r"shape.*height"),
        ({"shape": {**SHAPE.__dict__, "width": 0}}, "width=0"),
        ({"shape": {**SHAPE.__dict__, "sigma_data": float("nan")}}, "sigma_data=nan"),
        ({"shape": {**SHAPE.__dict__, "sigma_data": "0.5"}}, "sigma_data"),
        ({"shape": {**SHAPE.__dict__, "more": 0}}, r"shape\.more"),
        ({"noise_scale": [0.0]}, "noise_scale"),
        ({"space": 3}, "space"),
        ({"stream": []}, "stream"),
    ],
)
def test_state_with_other_facts_or_types_is_of_another_version(save, changes, named):
    """Intact by its checksums, it is no damaged one."""
    folder = save(16)
    path = folder / "state.json"
    state = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in state.items() if v is not None}))
    edit_manifest(folder, lambda raw: raw["files"].update({"state.json": fingerprint(path)}))
    with pytest.raises(
        CheckpointError, match=r"state\.json: of another version.*" + named
    ) as error:
        checkpoint.open_checkpoint(folder)
    assert not isinstance(error.value, DamagedCheckpoint)


def test_tensors_that_are_not_there_are_named(save):
    found = checkpoint.open_checkpoint(save(16))
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: missing"):
        found.tensors("optimizer")
    (found.folder / "ema.safetensors").write_bytes(b"later")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: damaged"):
        found.tensors("ema")
