"""What a session finds of its run: checkpoints, metrics, another trainer, what a kill left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdit import config
from hdit.errors import UserError
from hdit.runs import checkpoint
from hdit.runs.checkpoint import CheckpointError
from hdit.training import grid as grids
from hdit.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels"))),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run of the config `tiny`."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def everything(folder):
    return {p: p.is_dir() or p.read_bytes() for p in folder.rglob("*")}


def images(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["images"] for line in lines]


# ---- another trainer -----------------------------------------------------------------------------


def test_run_that_another_trains_is_refused_before_anything_of_it_is_read(tiny, run):
    trainer = Trainer(config.load(tiny), run)
    (run / "checkpoints" / "000000000096" / "manifest.json").write_text("of a save under way")
    before = everything(run)
    with trainer.run.locked(), pytest.raises(UserError, match="another process is training this"):
        Trainer(config.load(tiny, ["training.images=200"]), run)
    assert everything(run) == before


def test_trainer_that_was_opened_before_another_finished_changes_nothing(tiny, tmp_path):
    first, second = (Trainer(config.load(tiny), tmp_path / "run") for _ in range(2))
    assert first.fit()
    before = everything(tmp_path / "run")
    with pytest.raises(UserError, match="another process has trained it to 96 images since it"):
        second.fit()
    assert everything(tmp_path / "run") == before
    assert Trainer(config.load(tiny), tmp_path / "run").fit()


def test_trainer_that_fails_leaves_no_folder(tiny, tmp_path):
    nowhere = f'data={{kind="folder", path="{tmp_path / "nowhere"}", size=8}}'
    with pytest.raises(UserError, match="nowhere"):
        Trainer(config.load(tiny, [nowhere]), tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def children(process: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system has no /proc")
def test_run_whose_trainer_was_killed_resumes_at_once_though_its_loaders_live(tiny, tmp_path):
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "hdit.cli", "train", str(tiny), "--run", str(run)]
    command += ["--set", "training.workers=2", "--set", "training.images=1_000_000"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 2):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        loaders = children(process.pid)
        assert len(loaders) >= 2
        for loader in loaders:
            os.kill(loader, signal.SIGSTOP)  # they cannot end before the run is resumed
        process.kill()
        process.wait()
        try:
            assert Trainer(config.load(tiny, ["training.images=32"]), run).fit()
        finally:
            for loader in loaders:
                os.kill(loader, signal.SIGCONT)
        deadline = time.monotonic() + 10
        while any(map(alive, loaders)) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = [loader for loader in loaders if alive(loader)]
        for loader in left:
            os.kill(loader, signal.SIGKILL)
        assert not left, "a loader ends soon after its trainer"


# ---- checkpoints that are gone -------------------------------------------------------------------


def remove_all(run):
    shutil.rmtree(run / "checkpoints")


def empty(run):
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def keep_metrics_and_config(run):
    for path in run.iterdir():
        if path.name not in ("metrics.jsonl", "config.toml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (remove_all, "checkpoints/ is gone"),
        (empty, "checkpoints/ has none any more"),
        (keep_metrics_and_config, "checkpoints/ is gone"),
    ],
)
def test_run_whose_checkpoints_are_gone_does_not_start_anew(tiny, run, lose, said):
    lose(run)
    before = everything(run)
    with pytest.raises(CheckpointError, match=f"tells of 96 images, .*{said}") as error:
        Trainer(config.load(tiny), run)
    for way in ("put it back", "another --run", "move metrics.jsonl away"):
        assert way in str(error.value)
    assert everything(run) == before
    (run / "metrics.jsonl").rename(run / "metrics.old.jsonl")
    assert Trainer(config.load(tiny, ["training.images=32"]), run).fit(), "a way out"
    assert images(run) == [16, 32]


def test_run_that_was_stopped_early_and_lost_its_checkpoint_does_not_start_anew(tiny, tmp_path):
    """No line of metrics proves a checkpoint here: it was noted."""
    settings = config.load(tiny, ["training.checkpoint_every=10_000"])
    assert not Trainer(settings, tmp_path / "run").fit(1e-9)
    remove_all(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"tells of 16 images, .*is gone"):
        Trainer(settings, tmp_path / "run")


@pytest.mark.parametrize("every", [32, 64, 1000])
def test_run_that_was_killed_before_its_first_checkpoint_starts_again(
    tiny, tmp_path, every, monkeypatch
):
    """With a line of metrics at the checkpoint, which is written before it, or without."""

    def kill(*arguments, **options):
        raise SystemExit("killed")

    overrides = [f"training.checkpoint_every={every}", "training.background_saves=false"]
    settings = config.load(tiny, [*overrides, "sampling.grid=0"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # noqa: PT012
        patch.setattr(checkpoint, "save", kill)
        Trainer(settings, tmp_path / "run").fit()
    assert images(tmp_path / "run")[-1] == min(every, 96)
    assert Trainer(settings, tmp_path / "run").fit()
    assert images(tmp_path / "run") == [16, 32, 48, 64, 80, 96]


def test_newest_checkpoint_that_is_gone_is_named(tiny, run, capfd):
    shutil.rmtree(run / "checkpoints" / "000000000096")
    assert Trainer(config.load(tiny), run).fit()
    said = capfd.readouterr().err
    assert "000000000096: is gone; going back to" in said
    assert "resuming from" in said
    (run / "checkpoints" / "000000000096" / "model.safetensors").write_bytes(b"")
    Trainer(config.load(tiny), run).fit()
    said = capfd.readouterr().err
    assert "going back" in said
    assert "is gone" not in said


@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_file_in_the_place_of_a_folder_is_named_before_training(tiny, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    with pytest.raises(UserError, match=f"{name}: is a file, where a run has a folder"):
        Trainer(config.load(tiny), tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["config.toml", "classes.json", "metrics.jsonl", ".saved", "checkpoints/latest"]
)
def test_link_in_the_place_of_a_file_is_named_before_training(tiny, run, tmp_path, name):
    shutil.move(run / name, tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    before = everything(run)
    with pytest.raises(UserError, match=rf"{name}: cannot be written: it is a link"):
        Trainer(config.load(tiny, ["training.images=200"]), run)
    assert everything(run) == before


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/000000000096"])
def test_checkpoints_of_a_run_are_no_place_for_another(tiny, run, place):
    before = everything(run)
    with pytest.raises(UserError, match=r"--run: .* is of the checkpoints of a run"):
        Trainer(config.load(tiny), run / place)
    assert everything(run) == before


@pytest.mark.parametrize("name", ["config.toml", "classes.json"])
def test_file_that_is_of_no_run_is_not_written_over(tiny, tmp_path, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text(tiny.read_text())
    before = everything(folder)
    with pytest.raises(UserError, match=f"{name}: is not of a run, and would be written over"):
        Trainer(config.load(tiny), folder)
    assert everything(folder) == before


def test_run_that_has_its_config_alone_begins(tiny, run, tmp_path):
    """As one that was killed at once, by an earlier version too, or whose config was copied."""
    (tmp_path / "new").mkdir()
    text = (run / "config.toml").read_text().replace("start_timeout = 600.0\n", "")
    (tmp_path / "new" / "config.toml").write_text(text)
    Trainer(config.load(tiny), tmp_path / "new")


def test_file_in_the_place_of_a_later_checkpoint_is_moved_aside(tiny, run, capfd):
    (run / "checkpoints" / "000000000128").write_text("of a copy that went wrong")
    assert Trainer(config.load(tiny, ["training.images=128"]), run).fit()
    assert "000000000128/manifest.json: damaged: cannot be" in capfd.readouterr().err
    assert (run / "checkpoints" / "000000000128.damaged").read_text().startswith("of a copy")
    assert checkpoint.find(run, print).state.images == 128


def test_newer_checkpoint_ends_a_resume_and_keeps_its_name(tiny, run):
    path = run / "checkpoints" / "000000000096" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    before = everything(run)
    with pytest.raises(CheckpointError, match=r"newer hdit \(format 2; this reads 1\)"):
        Trainer(config.load(tiny, ["training.images=200"]), run)
    assert everything(run) == before


# ---- metrics -------------------------------------------------------------------------------------

BAD = {
    "byte": b'{"images": 48, "loss": \xff}',
    "zeros": bytes(40),
    "half": b'{"images": 48, "lo',
    "number": b"48",
    "key": b'{"step": 3}',
    "type": b'{"images": "48"}',
    "value": b'{"images": 48, "loss": "x"}',
    "deep": b"[" * 5000,
    "digits": b'{"images": ' + b"1" * 5000 + b"}",
    "empty": b"",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_damaged_line_of_metrics_is_named_and_kept_aside(tiny, run, capfd, bad):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[2] = bad
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert Trainer(config.load(tiny, ["training.images=112"]), run).fit()
    assert f"warning: {path}: damaged at line 3; kept in metrics.jsonl.damaged" in (
        capfd.readouterr().err
    )
    assert (run / "metrics.jsonl.damaged").read_bytes() == bad + b"\n"
    assert images(run) == [16, 32, 64, 80, 96, 112]
    assert path.read_bytes().startswith(lines[0] + b"\n"), "sound lines stay as they are"


def test_lines_that_are_damaged_later_are_kept_beside_the_earlier_ones(tiny, run):
    for end, aside in ((112, "metrics.jsonl.damaged"), (128, "metrics.jsonl.damaged.2")):
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(f"bad {end}\n".encode())
        assert Trainer(config.load(tiny, [f"training.images={end}"]), run).fit()
        assert (run / aside).read_text() == f"bad {end}\n"


@pytest.mark.parametrize("cut", [b'{"images": 112, "st', b"\0" * 30, b'{"images": 112}'])
def test_last_line_that_a_kill_cut_is_no_damage(tiny, run, capfd, cut):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(cut)
    assert Trainer(config.load(tiny, ["training.images=112"]), run).fit()
    assert "damaged" not in capfd.readouterr().err
    assert not (run / "metrics.jsonl.damaged").exists()
    assert images(run) == [16, 32, 48, 64, 80, 96, 112]


def test_metrics_that_are_a_pipe_are_refused(tiny, run):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: .* is a device or pipe"):
        Trainer(config.load(tiny, ["training.images=112"]), run)


# ---- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [32, 96], ids=["on the way", "at the end"])
def test_grid_that_a_signal_interrupts_is_made_by_the_next_session(
    tiny, trained, tmp_path, monkeypatch, at
):
    trainer, sample = Trainer(config.load(tiny), tmp_path / "run"), grids.sample

    def interrupted(*arguments, **options):
        trainer.interrupts.signalled |= trainer.images == at
        return sample(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(grids, "sample", interrupted)
        assert not trainer.fit()
    assert checkpoint.find(tmp_path / "run", print).state.images == at, "no step without its grid"
    assert not trainer.run.grid(at).exists()
    assert Trainer(config.load(tiny), tmp_path / "run").fit()
    for n in (32, 64, 96):
        name = f"samples/{n:012d}.png"
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


def test_grid_that_is_interrupted_again_is_still_made(tiny, run, monkeypatch):
    grid = run / "samples" / "000000000096.png"
    before = grid.read_bytes()
    grid.unlink()
    settings = config.load(tiny, ["training.images=112"])
    trainer, sample = Trainer(settings, run), grids.sample

    def interrupted(*arguments, **options):
        trainer.interrupts.signalled = True
        return sample(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(grids, "sample", interrupted)
        assert not trainer.fit()
    assert not (run / "checkpoints" / "000000000112").exists()
    assert Trainer(settings, run).fit()
    assert grid.read_bytes() == before
