import io
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_guards import STEP, poison

from hdit import config
from hdit.config.errors import ConfigError
from hdit.reading import read_json
from hdit.runs.folder import RunFolder
from hdit.training import tracking
from hdit.training.tracking import Tracking, TrackingError, of_event, of_metrics, of_validation
from hdit.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
ALL = {"scalars": 0, "images": 0, "tensors": 0}  # 0: no sample of the points, but each

needs_trackio = pytest.mark.skipif(not find_spec("trackio"), reason="trackio is not installed")
needs_wandb = pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def in_tensorboard(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance=ALL).Reload()


def curve(read: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read.Scalars(name)]


def tracked(tiny: Path, *settings: str) -> config.RunConfig:
    return config.load(tiny, ['training.track=["tensorboard"]', *settings])


# ---- what is told -------------------------------------------------------------------------------


def test_metrics_go_to_groups_by_name():
    line = {"images": 32, "step": 2, "loss": 0.5, "images_per_second": 9.0, "peak_memory": 7}
    line |= {"data_wait_share": 0.25, "sigma_edges": [0.1, 1, 10], "loss_by_sigma": [0.75, None]}
    assert of_metrics(line) == (
        32,
        {
            "train/step": 2,
            "train/loss": 0.5,
            "speed/images_per_second": 9.0,
            "speed/peak_memory": 7,
            "data/wait_share": 0.25,
            "train/loss_by_sigma/0": 0.75,
        },
        None,
    )


def test_validation_goes_by_the_name_of_its_weights():
    parts = {"loss": 0.5, "loss_by_sigma": [0.25, None]}
    line = {"images": 32, "step": 2, "count": 9, "weights": {"ema-0.999": parts, "model": parts}}
    assert of_validation(line).values == {
        "validation/ema-0.999/loss": 0.5,
        "validation/ema-0.999/loss_by_sigma/0": 0.25,
        "validation/model/loss": 0.5,
        "validation/model/loss_by_sigma/0": 0.25,
    }


def test_event_is_a_text_on_one_line():
    event = {"kind": "step skipped", "images": 32, "time": 1.0, "loss": "nan", "module": "a\nb"}
    assert of_event(event).values == {"events/step_skipped": r"loss nan, module a\nb"}


# ---- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_has_every_line_and_grid_of_two_sessions_once(tiny, tmp_path):
    run = tmp_path / "run"
    assert Trainer(tracked(tiny, "training.images=48"), run).fit()
    assert Trainer(tracked(tiny), run).fit()
    read, lines = in_tensorboard(run), metrics(run)
    assert [line["images"] for line in lines] == [16, 32, 48, 64, 80, 96]
    for line in lines:
        for name, value in of_metrics(line).values.items():
            # TensorBoard's numbers are of 32 bits.
            assert (line["images"], np.float32(value)) in curve(read, name), name
    assert {len(curve(read, name)) for name in read.Tags()["scalars"]} == {len(lines)}
    grids = read.Images("samples")
    assert [grid.step for grid in grids] == [32, 48, 64, 96]
    for grid in grids:
        with (
            Image.open(io.BytesIO(grid.encoded_image_string)) as seen,
            Image.open(run / "samples" / f"{grid.step:012d}.png") as kept,
        ):
            assert np.array_equal(seen, kept.convert("RGB"))
    *_, told = read.Tensors("config/text_summary")
    settings = (run / "config.toml").read_text()
    assert told.tensor_proto.string_val[0].decode() == f"```toml\n{settings}```"


class Written:
    """A run's folder, and its trackers told of the lines that training would write."""

    def __init__(self, path: Path):
        path.mkdir()
        self.folder, self.said = RunFolder(path), []
        self.settings = config.load(REPOSITORY / "configs" / "digits-hdit.toml")

    def session(self, images: int, *names: str) -> Tracking:
        self.folder.keep_lines(images, self.said.append)
        self.tracking = Tracking(names, self.folder, self.said.append)
        self.tracking.start(self.settings, images, self.said.append)
        return self.tracking

    def lines(self, losses: dict[int, float]) -> None:
        for images, loss in losses.items():
            line = {"images": images, "loss": loss}
            self.folder.log(line)
            self.tracking.line(line)

    def kept(self) -> list[tuple[int, float]]:
        return [(line["images"], line["loss"]) for line in metrics(self.folder.path)]


@pytest.fixture
def written(tmp_path):
    return Written(tmp_path / "run")


def test_tensorboard_has_points_of_a_killed_session_once(written):
    """Nothing of the first session is closed, and it got further than its last checkpoint."""
    written.session(0, "tensorboard")
    written.lines({16: 0.5, 32: 0.25, 48: 9.0, 64: 9.0})
    written.session(32, "tensorboard")
    written.lines({48: 0.125, 64: 0.0625})
    written.tracking.close()
    read = in_tensorboard(written.folder.path)
    assert curve(read, "train/loss") == written.kept()
    assert [loss for _, loss in written.kept()] == [0.5, 0.25, 0.125, 0.0625]


def test_tensorboard_has_points_of_a_rollback_once(written):
    written.session(0, "tensorboard")
    written.lines({16: 0.5, 32: 0.25, 48: 9.0, 64: 9.0})
    written.folder.keep_lines(32, written.said.append)
    written.tracking.go_back(32)
    written.tracking.event({"kind": "rollback", "images": 32, "reason": "9 is too much"})
    written.lines({48: 0.125})
    written.tracking.close()
    read = in_tensorboard(written.folder.path)
    assert curve(read, "train/loss") == written.kept() == [(16, 0.5), (32, 0.25), (48, 0.125)]
    [event] = read.Tensors("events/rollback/text_summary")
    assert (event.step, event.tensor_proto.string_val) == (32, [b"reason 9 is too much"])


def test_run_that_goes_back_is_the_same_in_tensorboard_and_its_files(tiny, tmp_path):
    """Two bad steps in a row: from 64 images back to 32, and on with other images."""
    settings = tracked(tiny, "sampling.grid=0", "training.guard.patience=2", "training.images=160")
    trainer = Trainer(settings, tmp_path / "run")
    poison(trainer, {2 * STEP, 3 * STEP})
    assert trainer.fit()
    read, lines = in_tensorboard(tmp_path / "run"), metrics(tmp_path / "run")
    assert [line["images"] for line in lines] == list(range(STEP, 161, STEP))
    for name in ("train/loss", "speed/images_per_second"):
        expected = [(line["images"], np.float32(of_metrics(line).values[name])) for line in lines]
        assert curve(read, name) == expected
    assert [event.step for event in read.Tensors("events/rollback/text_summary")] == [32]


def test_tracker_that_comes_later_is_told_all_that_the_files_have(written):
    written.session(0)
    written.lines({16: 0.5, 32: 0.25, 48: 0.125})
    line = {"images": 32, "weights": {"ema": {"loss": 0.75}}}
    (written.folder.path / "validation.jsonl").write_text(json.dumps(line) + "\n")
    for images in (16, 48):  # the one at 48 is of a part of the run that is not gone on from
        path = written.folder.grid(images)
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), images).save(path)
    written.folder.note("slow", 32, usual=7)
    written.folder.note("step skipped", 32, loss="nan")
    written.session(32, "tensorboard").close()
    read = in_tensorboard(written.folder.path)
    assert curve(read, "train/loss") == [(16, 0.5), (32, 0.25)]
    assert curve(read, "validation/ema/loss") == [(32, 0.75)]
    assert [grid.step for grid in read.Images("samples")] == [16]
    for kind in ("slow", "step_skipped"):
        assert [event.step for event in read.Tensors(f"events/{kind}/text_summary")] == [32]


def test_tracker_whose_files_were_deleted_is_told_all_again(written):
    written.session(0, "tensorboard")
    written.lines({16: 0.5, 32: 0.25})
    written.tracking.close()
    shutil.rmtree(written.folder.path / "tensorboard")
    written.session(32, "tensorboard").close()
    assert curve(in_tensorboard(written.folder.path), "train/loss") == written.kept()


def test_copied_run_gets_curves_of_its_own(written, tmp_path):
    written.session(0, "tensorboard").close()
    shutil.copytree(written.folder.path, tmp_path / "copy")
    original, copy = (tracking.Curves(tmp_path / name) for name in ("run", "copy"))
    assert original.name.startswith("run-")
    assert copy.name.startswith("copy-")
    assert (original.told, copy.told) == ({"tensorboard": 0}, {})
    (tmp_path / "run").rename(tmp_path / "moved")
    assert tracking.Curves(tmp_path / "moved").name == original.name


# ---- a tracker that takes nothing back -----------------------------------------------------------


class Recorder(tracking.Tracker):
    """Keeps what it is told, in the place of Weights & Biases."""

    name, takes_back = "wandb", False
    points: list[tracking.Point] = []  # noqa: RUF012 - of all sessions
    broken = False

    def check(self):
        pass

    def open(self, run, name, config, told, images):
        self.place = name
        return told

    def log(self, point):
        if self.broken:
            raise OSError("the line is cut")
        self.points.append(point)

    def close(self):
        pass

    place = ""


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "points", [])
    monkeypatch.setitem(tracking.KINDS, "wandb", Recorder)
    return Recorder


@pytest.mark.parametrize("killed", [True, False])
def test_tracker_that_takes_nothing_back_is_not_told_twice(written, recorder, killed):
    written.session(0, "wandb")
    written.lines({16: 0.5, 32: 0.25, 48: 0.125})
    if killed:
        written.session(32, "wandb")
    else:
        written.folder.keep_lines(32, written.said.append)
        written.tracking.go_back(32)
    written.tracking.event({"kind": "rollback", "images": 32})
    written.lines({48: 0.125, 64: 0.0625})
    told = [(p.images, p.values["train/loss"]) for p in recorder.points if "train/loss" in p.values]
    assert told == written.kept()
    assert [p.images for p in recorder.points if "events/rollback" in p.values] == [32]


def test_tracker_that_fails_is_left_out_and_told_the_rest_later(written, recorder, monkeypatch):
    written.session(0, "wandb", "tensorboard")
    written.lines({16: 0.5})
    monkeypatch.setattr(recorder, "broken", True)
    written.lines({32: 0.25, 48: 0.125})
    written.tracking.close()
    [warning] = [text for text in written.said if "failed" in text]
    assert warning.startswith("training.track: wandb failed, and is left out from here on: OSError")
    read = in_tensorboard(written.folder.path)
    assert curve(read, "train/loss") == written.kept()


def test_tracker_that_fails_at_the_start_is_told_the_rest_later(written, recorder, monkeypatch):
    written.session(0)
    written.lines({16: 0.5, 32: 0.25, 48: 0.125})
    log = recorder.log

    def fail_at_48(self, point):
        log(self, point)
        if point.images == 48:
            raise OSError("the line is cut")

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "log", fail_at_48)
        with pytest.raises(TrackingError, match="'wandb' does not start: OSError: the line is cut"):
            written.session(48, "wandb")
    written.session(48, "wandb")
    written.lines({64: 0.0625})
    assert [point.images for point in recorder.points] == [16, 32, 48, 64]


def test_failing_tracker_does_not_end_training(tiny, tmp_path, recorder, monkeypatch, capsys):
    monkeypatch.setattr(recorder, "broken", True)
    run = tmp_path / "run"
    settings = config.load(tiny, ['training.track=["wandb"]', "training.images=32"])
    assert Trainer(settings, run).fit()
    assert [line["images"] for line in metrics(run)] == [16, 32]
    assert capsys.readouterr().err.count("the line is cut") == 1


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(tracking.KINDS))
def test_tracker_that_is_not_installed_is_named_before_anything_is_made(
    tiny, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    settings = config.load(tiny, [f'training.track=["{name}"]'])
    with pytest.raises(TrackingError, match=f"'{name}' is not installed; pip install {name}"):
        Trainer(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a module of this text in the place of a tracker's package."""

    def put(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)

    return put


def test_folder_with_the_name_of_a_tracker_is_no_package(tmp_path, monkeypatch):
    """Such as wandb/, where wandb leaves its runs."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(TrackingError, match="'wandb' is not installed"):
        Tracking(["wandb"], RunFolder(tmp_path / "run"), print)


def test_package_that_cannot_be_imported_is_told_with_its_reason(tmp_path, stand_in):
    stand_in("trackio", "import no_such_module")
    with pytest.raises(TrackingError, match=r"'trackio' cannot be imported: .*'no_such_module'"):
        Tracking(["trackio"], RunFolder(tmp_path / "run"), print)


WANDB = """
from types import SimpleNamespace as Names
def setup(): return Names(settings=Names(mode={mode!r}))
def login(prompt): {login}
def Settings(**settings): pass
def init(**settings): raise OSError("no way out")
"""


@pytest.mark.parametrize(
    ("login", "message"),
    [
        ("return False", r"'wandb' has no login; run `wandb login`, set WANDB_MODE=offline"),
        ("raise ValueError('bad key')", r"failed: ValueError: bad key; run .* WANDB_MODE=offline"),
    ],
)
def test_wandb_without_a_login_is_refused_with_the_way_to_work_offline(
    tmp_path, stand_in, login, message
):
    stand_in("wandb", WANDB.format(mode="online", login=login))
    with pytest.raises(TrackingError, match=message):
        Tracking(["wandb"], RunFolder(tmp_path / "run"), print)


def test_tracker_that_does_not_start_ends_the_others(written, stand_in):
    stand_in("wandb", WANDB.format(mode="offline", login="raise AssertionError"))
    with pytest.raises(
        TrackingError, match="'wandb' does not start: OSError: no way out; set WANDB_MODE"
    ):
        written.session(0, "tensorboard", "wandb")
    assert written.tracking.going == []
    assert read_json(written.folder.path / "tracking.json")["told"] == {"tensorboard": 0}


def test_old_accelerate_is_told_of(written, monkeypatch):
    monkeypatch.delattr("accelerate.tracking.TensorBoardTracker")
    with pytest.raises(TrackingError, match="newer accelerate; pip install --upgrade accelerate"):
        written.session(0, "tensorboard")


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"name": "a", "folder": "b", "told": {"wandb": 1.5}}', '{"name": 1, "told": {}}'],
)
def test_damaged_tracking_json_is_named(written, text):
    path = written.folder.path / "tracking.json"
    path.write_text(text)
    with pytest.raises(TrackingError, match=r"tracking.json: .*; move it away") as caught:
        written.session(0, "tensorboard")
    assert path.read_text() == text, caught.value


def test_track_of_an_unknown_or_repeated_name_is_a_config_error(tiny):
    with pytest.raises(ConfigError, match=r"training.track"):
        config.load(tiny, ['training.track=["mlflow"]'])
    with pytest.raises(ConfigError, match=r"training.track: .*names a tracker twice"):
        config.load(tiny, ['training.track=["wandb", "wandb"]'])


# ---- the trackers themselves, in processes of their own ------------------------------------------


def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels"))),
        "OMP_NUM_THREADS": "1",  # as in the tests' own process: sums must have one order
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
    }


def train(tiny: Path, tmp_path: Path, *trackers: str, images: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "hdit.cli", "train", tiny, "--run", tmp_path / "run"]
    command += ["--set", f"training.track={json.dumps(trackers)}"]
    command += ["--set", f"training.images={images}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(tmp_path), text=True, **pipes)


def kill_and_resume(tiny: Path, tmp_path: Path, *trackers: str) -> None:
    """Kills a run after its first checkpoint and some lines, and runs it to its end."""
    tiny.write_text(tiny.read_text().replace("checkpoint_every = 32", "checkpoint_every = 320"))
    process = train(tiny, tmp_path, *trackers, images=960)
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and len(lines.read_text().splitlines()) >= 23):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get there in two minutes"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    resumed = train(tiny, tmp_path, *trackers, images=960)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert "resuming from" in err
    assert out == ""


IN_TRACKIO = """
import json
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage
[run] = Api().runs("hdit")
logs = SQLiteStorage.get_logs("hdit", run.name, run_id=run.id)
print(json.dumps({"name": run.name, "config": run.config, "logs": logs}))
"""


@needs_trackio
def test_killed_run_is_the_same_in_tensorboard_trackio_and_its_files(tiny, tmp_path):
    kill_and_resume(tiny, tmp_path, "tensorboard", "trackio")
    run = tmp_path / "run"
    command = [sys.executable, "-c", IN_TRACKIO]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, check=True)
    found, read, lines = json.loads(done.stdout), in_tensorboard(run), metrics(run)
    assert [line["images"] for line in lines] == list(range(16, 961, 16))
    assert found["name"] == read_json(run / "tracking.json")["name"]
    assert found["config"]["training"]["images"] == 960
    for name in of_metrics(lines[0]).values:
        expected = [(line["images"], of_metrics(line).values[name]) for line in lines]
        assert [(log["step"], log[name]) for log in found["logs"] if name in log] == expected
        assert curve(read, name) == [(step, np.float32(value)) for step, value in expected]
    grids = {log["step"]: log["samples"] for log in found["logs"] if "samples" in log}
    assert list(grids) == [320, 640, 960] == [grid.step for grid in read.Images("samples")]
    for images, grid in grids.items():
        seen = tmp_path / "trackio" / "media" / grid["file_path"]
        assert seen.read_bytes() == (run / "samples" / f"{images:012d}.png").read_bytes()
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == len(grids)


IN_WANDB = """
import json, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
rows = []
for path in sorted(Path(sys.argv[1]).glob("offline-run-*/run-*.wandb")):
    data, at, whole = path.read_bytes(), 7, b""  # after the file's own header
    while at < len(data):
        if 32768 - at % 32768 < 7:  # what is left of a block cannot hold a record's header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                pairs = ((i.key or ".".join(i.nested_key), i.value_json) for i in items)
                rows.append({key: json.loads(value) for key, value in pairs})
print(json.dumps(rows))
"""
"""The offline files are logs in LevelDB's format, of records that wandb's own protobuf parses."""


@needs_wandb
def test_two_sessions_are_in_wandbs_offline_files(tiny, tmp_path):
    for images in (48, 96):
        process = train(tiny, tmp_path, "wandb", images=images)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, ""), err
    run = tmp_path / "run"
    command = [sys.executable, "-c", IN_WANDB, run / "wandb"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, check=True)
    rows, lines = json.loads(done.stdout), metrics(run)
    for name in of_metrics(lines[0]).values:
        expected = [(line["images"], of_metrics(line).values[name]) for line in lines]
        assert [(row["images"], row[name]) for row in rows if name in row] == expected
    grids = {row["images"]: row["samples._type"] for row in rows if "samples._type" in row}
    assert grids == dict.fromkeys((32, 48, 64, 96), "image-file")
    assert list(tmp_path.glob("**/wandb")) == [run / "wandb"]
