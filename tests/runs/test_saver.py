"""Which checkpoints stay, what they take, and that they are whole whenever it ends."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hdit import config
from hdit.config import ConfigError
from hdit.config.schema import KeepSpec
from hdit.errors import UserError
from hdit.runs import checkpoint, saver
from hdit.runs.checkpoint import CheckpointError
from hdit.runs.saver import disk_need, dispensable, need
from hdit.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def tiny(trained):
    return trained.parent / "tiny.toml"


def folders(run):
    return [int(path.name) for path in reversed(checkpoint.checkpoint_folders(run / "checkpoints"))]


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (KeepSpec(), list(range(10, 101, 10))),
        (KeepSpec(last=1), [100]),
        (KeepSpec(last=3), [80, 90, 100]),
        (KeepSpec(last=2, every=40), [40, 80, 90, 100]),
        (KeepSpec(last=1, every=25), [30, 50, 80, 100]),
        (KeepSpec(last=50), list(range(10, 101, 10))),
        (KeepSpec(last=1, best=1), [40, 100]),
        (KeepSpec(last=2, best=2), [40, 60, 90, 100]),
        (KeepSpec(last=1, best=3), [20, 40, 60, 100]),
        (KeepSpec(last=1, best=1, every=25), [30, 40, 50, 80, 100]),
        (KeepSpec(last=1, best=20), [10, 20, 40, 50, 60, 70, 80, 100]),
    ],
)
def test_checkpoints_stay_as_the_settings_have_it(keep, stay):
    """As they come one after the other, so that one that went cannot be the first of a period.

    The loss is lowest at 40, then 60, then 20 and, as low, 70; at 30 and 90 there is none.
    """
    losses = {10: 9.0, 20: 3.0, 40: 1.0, 50: 8.0, 60: 2.0, 70: 3.0, 80: 7.0, 100: 6.0}
    images = []
    for new in range(10, 101, 10):
        images.append(new)
        gone = dispensable(images, keep, {n: loss for n, loss in losses.items() if n <= new})
        images = [n for n in images if n not in gone]
    assert images == stay


@pytest.mark.parametrize("background", [True, False])
def test_run_keeps_the_last_and_the_newest_is_named(tiny, tmp_path, background):
    overrides = [
        "training.keep={ last = 2, every = 48 }",
        "training.checkpoint_every=16",
        "sampling.grid=0",
        f"training.background_saves={str(background).lower()}",
    ]
    assert Trainer(config.load(tiny, overrides), tmp_path).fit()
    assert folders(tmp_path) == [48, 80, 96]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "000000000096\n"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_need_of_the_disk_is_told_and_one_that_does_not_fit_is_refused(tiny, tmp_path, monkeypatch):
    training = config.load(tiny, ["training.images=1000", "training.checkpoint_every=100"]).training
    each, total = need(1000, training, 250)
    assert (each, total) == (16_000, 8 * 16_000)
    kept = training.model_copy(update={"keep": KeepSpec(last=2, every=500)})
    assert need(1000, kept, 0) == (16_000, (2 + 2 + 1) * 16_000)
    kept = training.model_copy(update={"keep": KeepSpec(last=2, best=3)})
    assert need(1000, kept, 0) == (16_000, (2 + 3 + 1) * 16_000)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    assert "warning: checkpoints of" in disk_need(tmp_path / "a" / "run", 1000, training, 0)
    with pytest.raises(UserError, match=r"--run: a checkpoint takes .*make room"):
        disk_need(tmp_path, 2000, training, 0)


def test_settings_of_what_stays_that_have_no_effect_are_refused(tiny):
    with pytest.raises(ConfigError, match="every has no effect without last"):
        config.load(tiny, ["training.keep.every=100"])


def test_checkpoint_holds_the_weights_of_its_time_though_training_goes_on(
    tiny, tmp_path, monkeypatch
):
    """The first save waits until the run has taken two steps more."""
    trainer = Trainer(config.load(tiny, ["sampling.grid=0"]), tmp_path / "run")
    done, expected = threading.Event(), {}
    write, step = checkpoint.save, trainer._step

    def late(root, settings, state, tensors, **options):
        assert done.wait(60)
        return write(root, settings, state, tensors, **options)

    def watched(stream):
        if trainer.images == 32:
            expected.update({k: t.clone() for k, t in trainer.backbone.state_dict().items()})
        if trainer.images == 48:
            assert not (tmp_path / "run" / "checkpoints").exists()
            done.set()
        return step(stream)

    trainer._step = watched
    monkeypatch.setattr(checkpoint, "save", late)
    assert trainer.fit()
    found = checkpoint.open_checkpoint(tmp_path / "run" / "checkpoints" / "000000000032")
    for key, tensor in found.tensors("model").items():
        assert torch.equal(tensor, expected[key])


def test_checkpoint_that_cannot_be_written_ends_the_run_with_the_last_one_whole(
    tiny, tmp_path, monkeypatch
):
    write = checkpoint.save

    def full(root, settings, state, tensors, **options):
        if state.images > 32:
            raise OSError(28, "No space left on device", str(root))
        return write(root, settings, state, tensors, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    trainer = Trainer(config.load(tiny, ["sampling.grid=0"]), tmp_path)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert folders(tmp_path) == [32]
    monkeypatch.undo()
    assert Trainer(config.load(tiny, ["sampling.grid=0"]), tmp_path).fit()


def test_checkpoint_that_failed_is_told_of_before_the_next_one(tiny, tmp_path):
    trainer = Trainer(config.load(tiny, ["sampling.grid=0"]), tmp_path)
    trainer.saver.running = Future()
    trainer.saver.check()
    trainer.saver.running.set_exception(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert trainer.images == 16, "at the first line"


def test_shard_that_is_not_where_another_process_wrote_it_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"^shard-2 of another process is not there; .* disk"):
        saver._move(tmp_path / "shard-2", tmp_path / "to")


# ---- killed at any time --------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
import torch
from hdit import config
from hdit.training.trainer import Trainer
torch.set_num_threads(1)
Trainer(config.load(sys.argv[1], sys.argv[3:]), Path(sys.argv[2])).fit()
"""
MANY = ["training.images=640", "training.checkpoint_every=16", "sampling.grid=0"]


def weights(run):
    found = checkpoint.find(run, print)
    assert found.state.images == 640
    return {name: found.tensors(name) for name in ("model", "ema", "optimizer")}


def kill_and_resume(tiny, run, times, seed):
    """Kills the run so often, at random moments, within saves too, and lets it end at last."""
    chance = random.Random(seed)
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", RUN, str(tiny), str(run), *MANY, "training.keep.last=3"]
    killed = 0
    while killed < times:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        before = set(folders(run))
        end = time.monotonic() + 60
        while process.poll() is None and set(folders(run)) <= before and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0), err
        if process.returncode == 0:
            break
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return killed


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_run_that_is_killed_at_any_moment_ends_with_the_same_weights(tiny, tmp_path, times):
    assert Trainer(config.load(tiny, MANY), tmp_path / "whole").fit()
    assert kill_and_resume(tiny, tmp_path / "killed", times, seed=times) > 0
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name, tensors in expected.items():
        assert all(torch.equal(found[name][key], t) for key, t in tensors.items()), name
    assert folders(tmp_path / "killed") == [608, 624, 640]
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == list(range(16, 641, 16))
