import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file

from hdit import config
from hdit.data.batches import Batch, Batches, Layout
from hdit.data.sources.shapes import Shapes
from hdit.errors import SolverError, UserError
from hdit.protocols import Cond
from hdit.runs import checkpoint
from hdit.runs.checkpoint import CheckpointError
from hdit.runs.folder import RunFolder
from hdit.tensors import NotFiniteError
from hdit.training.hosts import Hosts
from hdit.training.interrupts import AGREE_EVERY, Interrupts
from hdit.training.metrics import TrainingError
from hdit.training.soundness import what_to_do
from hdit.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
LAST = "000000000096"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels"))),
    "OMP_NUM_THREADS": "1",  # as in the tests' own process: sums must have one order
}


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold bitwise the same model, EMA and optimizer."""
    for name in ("model", "ema", "optimizer"):
        left, right = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        if left.keys() != right.keys() or not all(torch.equal(left[k], right[k]) for k in left):
            return False
    return True


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_leaves_config_metrics_checkpoints_and_samples(tiny, tmp_path):
    run = tmp_path / "run"
    assert Trainer(config.load(tiny), run).fit()
    assert config.load(run / "config.toml") == config.load(tiny)
    assert [line["images"] for line in metrics(run)] == [16, 32, 48, 64, 80, 96]
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["images_per_second"] > 0 for line in metrics(run))
    folders = checkpoint.checkpoint_folders(run / "checkpoints")
    assert [int(folder.name) for folder in folders] == [96, 64, 32]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"{images:012d}.png" for images in (32, 64, 96)
    ]


def start(tiny: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "hdit.cli", "train", str(tiny), "--run", str(run)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get there in two minutes"
        time.sleep(0.01)


def test_killed_run_ends_with_the_weights_of_the_uninterrupted_one(tiny, tmp_path):
    """SIGKILL after the first checkpoint and some steps, then the same command."""
    text = tiny.read_text().replace("images = 96", "images = 960")
    tiny.write_text(text.replace("checkpoint_every = 32", "checkpoint_every = 320"))
    whole, run = tmp_path / "whole", tmp_path / "run"
    process = start(tiny, run)
    lines = run / "metrics.jsonl"
    wait_for(lambda: lines.exists() and len(lines.read_text().splitlines()) >= 23, process)
    process.kill()
    process.communicate()
    killed_at = metrics_of_killed(lines)
    assert 320 < killed_at < 960, "the run must be killed between a checkpoint and its end"

    resumed = start(tiny, run)
    _, stderr = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, stderr
    assert "resuming from" in stderr
    assert Trainer(config.load(tiny), whole).fit()
    end = "checkpoints/000000000960"
    assert same_weights(run / end, whole / end)
    timing = {"images_per_second", "data_wait_share", "peak_memory", "seconds"}
    assert [{k: v for k, v in line.items() if k not in timing} for line in metrics(run)] == [
        {k: v for k, v in line.items() if k not in timing} for line in metrics(whole)
    ]


def metrics_of_killed(path: Path) -> int:
    """Images of the last whole line; the very last may be cut."""
    text = path.read_text()
    return json.loads(text[: text.rindex("\n")].splitlines()[-1])["images"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_saves_a_checkpoint_and_resumes(tiny, tmp_path, number):
    tiny.write_text(tiny.read_text().replace("images = 96", "images = 100_000"))
    run = tmp_path / "run"
    process = start(tiny, run)
    lines = run / "metrics.jsonl"
    wait_for(lambda: lines.exists() and len(lines.read_text()) > 0, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert "the same command resumes" in stderr
    found = checkpoint.find(run, print)
    assert found.state.images == metrics(run)[-1]["images"]


def test_run_whose_terminal_is_closed_saves_a_checkpoint(tiny, tmp_path):
    """SIGHUP comes, and nothing can be printed any more."""
    tiny.write_text(tiny.read_text().replace("images = 96", "images = 100_000"))
    run = tmp_path / "run"
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "hdit.cli", "train", str(tiny), "--run", str(run)]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the terminal of its session
    )
    os.close(slave)
    lines = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        if select.select([master], [], [], 0.01)[0]:
            os.read(master, 10_000)  # or the process would wait for somebody to read
    os.close(master)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert checkpoint.find(run, print).state.images == metrics(run)[-1]["images"]


def test_ctrl_c_twice_ends_training_at_once_but_torchrun_sends_its_own_in_between(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hdit.training.interrupts.time.monotonic", lambda: now[0])
    interrupts = Interrupts()
    with interrupts.watching():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.signalled == signal.SIGINT
        now[0] = 1.5
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.agreed(1)


def test_run_whose_time_is_up_leaves_a_checkpoint_and_a_grid(tiny, tmp_path, capfd):
    trainer = Trainer(config.load(tiny), tmp_path / "run")
    assert not trainer.fit(1e-9)
    assert "time is up at 16 images; the same command resumes" in capfd.readouterr().err
    assert checkpoint.find(tmp_path / "run", print).state.images == 16
    assert trainer.run.grid(16).exists()
    assert Trainer(config.load(tiny, ["training.images=32"]), tmp_path / "run").fit(1e-9)
    assert "time is up" not in capfd.readouterr().err, "it was the end, too"


def test_processes_agree_to_stop_though_a_signal_comes_while_they_ask(monkeypatch):
    hosts = Hosts()
    hosts.size = 2
    interrupts = Interrupts(hosts)

    def most(numbers):
        interrupts.signalled = True  # as its handler does, after the others have got their answer
        return numbers

    monkeypatch.setattr(hosts, "most", most)
    assert not interrupts.agreed(AGREE_EVERY)
    assert interrupts.signalled, "for the next time"
    assert not interrupts.agreed(AGREE_EVERY + 1), "nobody asks"
    assert interrupts.agreed(2 * AGREE_EVERY)


def test_resumed_run_equals_the_uninterrupted_one_after_a_stop_in_between(tiny, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    Trainer(config.load(tiny), whole).fit()
    Trainer(config.load(tiny, ["training.images=48"]), run).fit()
    Trainer(config.load(tiny), run).fit()
    assert same_weights(run / "checkpoints" / LAST, whole / "checkpoints" / LAST)


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(tiny, tmp_path, capfd):
    run = tmp_path / "run"
    Trainer(config.load(tiny), run).fit()
    damaged = run / "checkpoints" / LAST / "model.safetensors"
    expected = load(damaged.read_bytes())
    damaged.write_bytes(damaged.read_bytes()[:500])
    capfd.readouterr()
    Trainer(config.load(tiny), run).fit()
    warning = capfd.readouterr().err
    assert str(damaged) in warning
    assert "resuming from" in warning
    again = load_file(run / "checkpoints" / LAST / "model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert (run / "checkpoints" / f"{LAST}.damaged").is_dir(), "nothing is thrown away"
    assert [line["images"] for line in metrics(run)] == [16, 32, 48, 64, 80, 96]


def test_resume_with_another_model_is_refused_with_the_difference(tiny, tmp_path):
    run = tmp_path / "run"
    Trainer(config.load(tiny), run).fit()
    before = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError) as error:
        Trainer(config.load(tiny, ["model.levels.1.depth=2", "training.images=200"]), run)
    assert "model.levels.1.depth: 1 in the run, 2 now" in str(error.value)
    vp = ['diffusion.parametrization={kind="eps_vp"}', 'diffusion.density={kind="uniform_vp"}']
    with pytest.raises(CheckpointError, match=r"diffusion\.parametrization\.kind: 'edm' in the"):
        Trainer(config.load(tiny, vp), run)
    assert sorted(run.rglob("*")) == before


def test_resume_with_other_data_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    Trainer(config.load(tiny), run).fit()
    with pytest.raises(CheckpointError, match=r"1 x 8 x 8, 10 classes in the run, 3 x 16 x 16"):
        Trainer(config.load(tiny, ['data={kind="shapes", size=16}']), run)


def test_resume_says_which_other_settings_changed(tiny, tmp_path, capfd):
    run = tmp_path / "run"
    Trainer(config.load(tiny), run).fit()
    capfd.readouterr()
    overrides = ["training.images=112", "training.optimizer.lr=1e-5"]
    assert Trainer(config.load(tiny, overrides), run).fit()
    said = capfd.readouterr().err
    assert "training.optimizer.lr: 0.0005 in the run, 1e-05 now" in said
    assert metrics(run)[-1]["images"] == 112
    assert metrics(run)[-1]["lr"] == 1e-5
    assert config.load(run / "config.toml").training.images == 112


def test_finished_run_says_so_and_changes_nothing(tiny, tmp_path, capfd):
    run = tmp_path / "run"
    Trainer(config.load(tiny), run).fit()
    before = (run / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert Trainer(config.load(tiny), run).fit()
    assert "already at its end" in capfd.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny, tmp_path):
    """Without dropout, two halves and the whole batch differ by summation order alone."""
    overrides = ["model.levels.0.dropout=0.0", "training.images=16", "sampling.grid=0"]
    norms = []
    for accumulate in (1, 2):
        settings = config.load(tiny, [*overrides, f"training.accumulate={accumulate}"])
        run = tmp_path / f"run{accumulate}"
        Trainer(settings, run).fit()
        norms.append((metrics(run)[0]["loss"], metrics(run)[0]["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_gradient_is_clipped_to_the_set_norm(tiny, tmp_path):
    overrides = ["training.clip_grad_norm=1e-3", "sampling.grid=0", "training.images=16"]
    trainer = Trainer(config.load(tiny, overrides), tmp_path / "run")
    trainer.fit()
    gradients = [p.grad for p in trainer.backbone.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert metrics(tmp_path / "run")[0]["grad_norm"] > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_gradient_is_not_clipped_to_a_norm_of_0(tiny, tmp_path):
    overrides = ["training.clip_grad_norm=0", "sampling.grid=0", "training.images=16"]
    trainer = Trainer(config.load(tiny, overrides), tmp_path / "run")
    objective = trainer.objective
    trainer.objective = lambda batch: 1000 * objective(batch)
    trainer.fit()
    gradients = [p.grad for p in trainer.backbone.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert norm > 100
    assert norm == pytest.approx(metrics(tmp_path / "run")[0]["grad_norm"], rel=1e-5)


def trainer_batch(trainer: Trainer, layout: Layout) -> Batch:
    return next(Batches(trainer.source, seed=0, start=0, layout=layout))


def test_labels_are_dropped_at_the_set_rate_and_sigmas_are_stratified(tiny, tmp_path, monkeypatch):
    trainer = Trainer(
        config.load(tiny, ["training.batch_size=1024", "training.label_dropout=0.3"]), tmp_path
    )
    seen = []

    def record(x0, noise, sigma, cond, weighting, scales):
        seen.append((x0, noise, sigma, cond))
        return torch.zeros(len(x0))

    monkeypatch.setattr(trainer.objective.denoiser, "loss", record)
    trainer.objective(trainer_batch(trainer, Layout(1024)))
    x0, noise, sigma, cond = seen[0]
    # 1,024 draws at rate 0.3 have a standard error of 0.014
    assert (cond.labels == -1).double().mean().item() == pytest.approx(0.3, abs=0.06)
    u = torch.linspace(0, 1, 1025, dtype=torch.float64)
    edges = trainer.config.diffusion.density(u, trainer.shape, trainer.config.beta_schedule)
    assert ((edges[:-1] <= sigma) & (sigma <= edges[1:])).all(), "one sigma in each stratum"
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert x0.min() >= -1
    assert x0.max() <= 1


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_images_are_mirrored_or_none(flip, tiny, tmp_path, monkeypatch):
    pixels = np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1))
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    data = f'kind="folder", path="{tmp_path / "images"}", size=8, channels=1'
    overrides = [f"data={{{data}, flip={str(flip).lower()}}}", "training.batch_size=2048"]
    trainer = Trainer(config.load(tiny, overrides), tmp_path / "run")
    seen = []

    def record(x0, *rest):
        seen.append(x0)
        return torch.zeros(len(x0))

    monkeypatch.setattr(trainer.objective.denoiser, "loss", record)
    trainer.objective(trainer_batch(trainer, Layout(2048)))
    mirrored = seen[0][:, 0, 0, 0] > seen[0][:, 0, 0, -1]
    expected = torch.from_numpy(pixels / 127.5 - 1).float()
    torch.testing.assert_close(
        seen[0], torch.where(mirrored[:, None, None, None], expected.flip(-1), expected)
    )
    # 2,048 draws at a half have a standard error of 0.011
    assert mirrored.double().mean().item() == pytest.approx(0.5 if flip else 0, abs=0.04)


@pytest.mark.parametrize("augment", [0, 0.5])
def test_random_choices_do_not_depend_on_the_layout(tiny, tmp_path, monkeypatch, augment):
    """What 2 processes draw in 2 accumulation steps each is what one process draws at once."""
    trainer = Trainer(config.load(tiny, [f"data.augment={augment}"]), tmp_path)
    seen = []
    monkeypatch.setattr(
        trainer.objective.denoiser, "loss", lambda *a: seen.append(a[:4]) or torch.zeros(len(a[0]))
    )
    trainer.objective(trainer_batch(trainer, Layout(16)))
    parts = []
    for rank in (0, 1):
        stream = Batches(trainer.source, seed=0, start=0, layout=Layout(16, 2, 2, rank))
        parts += [next(stream), next(stream)]
    for part in parts:
        trainer.objective(part)
    whole = seen[0]
    for part, (x0, noise, sigma, cond) in zip(parts, seen[1:], strict=True):
        index = torch.from_numpy(np.asarray(part.position))
        assert torch.equal(x0, whole[0][index])
        assert torch.equal(noise, whole[1][index])
        assert torch.equal(sigma, whole[2][index])
        assert torch.equal(cond.labels, whole[3].labels[index])
        assert (cond.aug is None) == (augment == 0)
        assert augment == 0 or torch.equal(cond.aug, whole[3].aug[index])
    u = torch.linspace(0, 1, 17, dtype=torch.float64)
    edges = trainer.config.diffusion.density(u, trainer.shape, trainer.config.beta_schedule)
    drawn = torch.cat([sigma for _, _, sigma, _ in seen[1:]]).sort().values
    assert ((edges[:-1] <= drawn) & (drawn <= edges[1:])).all(), "one sigma in each stratum"


def test_augmented_images_are_trained_with_their_conditions(tiny, tmp_path, monkeypatch):
    """Those whose conditions are zero are the images themselves, and the others are not."""
    seen = []
    for augment in (0, 0.2):
        trainer = Trainer(config.load(tiny, [f"data.augment={augment}"]), tmp_path / str(augment))
        monkeypatch.setattr(
            trainer.objective.denoiser, "loss", lambda *a: seen.append(a) or torch.zeros(len(a[0]))
        )
        trainer.objective(trainer_batch(trainer, Layout(64)))
    (plain, *_), (x0, _, _, cond, *_) = seen
    untouched = (cond.aug == 0).all(1)
    assert 0 < untouched.sum() < 64
    same = (x0 == plain).flatten(1).all(1)
    assert same[untouched].all()
    assert not same[~untouched].all()


def test_augmented_run_resumes_to_the_weights_of_the_uninterrupted_one(tiny, tmp_path):
    whole, run, augment = tmp_path / "whole", tmp_path / "run", "data.augment=0.5"
    Trainer(config.load(tiny, [augment]), whole).fit()
    Trainer(config.load(tiny, ["training.images=48", augment]), run).fit()
    Trainer(config.load(tiny, [augment]), run).fit()
    assert same_weights(run / "checkpoints" / LAST, whole / "checkpoints" / LAST)


# ---- learned variance, loss by frequency ---------------------------------------------------------

LEARNED = ["diffusion={learned_variance=true, density={kind='uniform_vp'}}", "sampling.grid=0"]
TINY_DIT = ["model={kind='dit', patch_size=2, depth=1, width=32, num_heads=2}"]


@pytest.mark.parametrize("model", [[], TINY_DIT], ids=["hdit", "dit"])
def test_model_with_a_learned_variance_trains_all_of_its_2c_channels(tiny, tmp_path, model):
    run = tmp_path / "run"
    trainer = Trainer(config.load(tiny, [*model, *LEARNED, "training.images=48"]), run)
    x, t = torch.randn(2, *trainer.shape.chw), torch.tensor([1.0, 900.0])
    labels = torch.tensor([3, -1])
    assert not trainer.backbone.eval()(x, t, Cond(labels)).any(), "zero at initialisation"
    trainer.backbone.train()
    assert trainer.fit()
    out = trainer.backbone.eval()(x, t, Cond(labels))
    assert out.shape == (2, 2, 8, 8)
    f, v = out.chunk(2, dim=1)
    assert f.any()
    assert v.any()
    assert all(line["loss"] > 0 for line in metrics(run))
    assert checkpoint.find(run, print).config.diffusion.learned_variance


def test_learned_variance_adds_bits_to_the_loss_that_move_it_alone(tiny, tmp_path):
    """At zero output the other loss is as without it, and so is its gradient."""
    losses, gradients = [], []
    for variance in ("false", "true"):
        overrides = [LEARNED[0], f"diffusion.learned_variance={variance}"]
        trainer = Trainer(config.load(tiny, overrides), tmp_path)
        loss = trainer.objective(trainer_batch(trainer, Layout(16))).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(trainer.backbone.patch_out.proj.weight.grad)
    plain, learned = gradients
    assert losses[1] > losses[0]
    torch.testing.assert_close(learned[:1], plain)  # patch 1: a row for each channel
    assert learned[1].any()


def test_resume_with_another_variance_is_refused(tiny, tmp_path):
    Trainer(config.load(tiny, [*LEARNED, "training.images=16"]), tmp_path).fit()
    change = "diffusion.learned_variance: True in the run, False now"
    with pytest.raises(CheckpointError, match=change):
        Trainer(config.load(tiny, [*LEARNED, "diffusion.learned_variance=false"]), tmp_path)


@pytest.mark.parametrize("scales", [1, 0, 3])
def test_loss_scales_reach_the_loss(tiny, tmp_path, scales):
    """By frequency, an error of white noise weighs more, by the mean of the weights."""
    trainer = Trainer(config.load(tiny, [f"diffusion.loss_scales={scales}"]), tmp_path)
    plain = Trainer(config.load(tiny), tmp_path)
    batch = trainer_batch(trainer, Layout(16))
    ratio = (trainer.objective(batch).mean() / plain.objective(batch).mean()).item()
    assert (ratio == 1) if scales == 1 else (1.2 < ratio < 4)
    seen = []
    trainer.objective.denoiser.loss = lambda *a: seen.append(a[5]) or torch.zeros(16)
    trainer.objective(batch)
    assert seen == [scales]


def test_run_goes_on_with_another_loss_scale_and_says_so(tiny, tmp_path, capfd):
    Trainer(config.load(tiny, ["training.images=16", "sampling.grid=0"]), tmp_path).fit()
    overrides = ["training.images=32", "sampling.grid=0", "diffusion.loss_scales=3"]
    assert Trainer(config.load(tiny, overrides), tmp_path).fit()
    assert "diffusion.loss_scales: 1 in the run, 3 now" in capfd.readouterr().err


def test_loss_that_is_not_finite_ends_the_run_with_its_reason(tiny, tmp_path):
    settings = config.load(tiny, ["training.guard.patience=2", "training.checkpoint_every=96"])
    trainer = Trainer(settings, tmp_path / "run")
    with torch.no_grad():
        trainer.backbone.patch_out.proj.weight.fill_(float("nan"))
    words = "diverged before 32 images: 2 steps in a row are of no finite loss"
    with pytest.raises(TrainingError, match=words):
        trainer.fit()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("log_every", [16, 1000])
def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, log_every):
    """NaN between a checkpoint and the next one, whether or not a line of metrics falls between."""
    overrides = [f"training.log_every={log_every}", "training.guard.rollbacks=0"]
    trainer = Trainer(config.load(tiny, overrides), tmp_path)
    step = trainer._step

    def poisoned(stream):
        if trainer.images == 48:
            with torch.no_grad():
                trainer.backbone.patch_out.proj.weight.fill_(float("nan"))
        return step(stream)

    trainer._step = poisoned
    with pytest.raises(TrainingError, match="diverged before 64 images: model: the tensor"):
        trainer.fit()
    assert checkpoint.find(tmp_path, print).state.images == 32
    assert (tmp_path / "checkpoints" / "latest").read_text() == "000000000032\n"


def fill(module: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        module.patch_out.proj.weight.fill_(value)


@pytest.mark.parametrize(
    ("ruin", "words"),
    [
        (lambda t: fill(t.ema, math.nan), "ema: the tensor 'patch_out.proj.weight' has"),
        (lambda t: fill(t.backbone, math.inf), "model: the tensor 'patch_out.proj.weight' has"),
        (
            lambda t: t.optimizer.state[t.backbone.patch_out.proj.weight]["exp_avg"].fill_(
                math.inf
            ),
            "optimizer: the tensor 'exp_avg/patch_out.proj.weight' has",
        ),
        (lambda t: fill(t.ema, 1e38), "ema: its weights are finite, but what they give is not"),
        (lambda t: fill(t.backbone, 1e38), "model: its weights are finite, but what they give"),
    ],
)
def test_ruined_model_is_never_saved_and_the_error_says_where_to_go_back_to(
    tiny, tmp_path, ruin, words
):
    """Ruined in the last step before a checkpoint, so that no loss tells of it."""
    trainer = Trainer(config.load(tiny), tmp_path)
    step = trainer._step

    def ruined(stream):
        found = step(stream)
        if trainer.images == 48:
            ruin(trainer)
        return found

    trainer._step = ruined
    with pytest.raises(TrainingError, match=re.escape(words)) as error:
        trainer.fit()
    last = tmp_path / "checkpoints" / "000000000032"
    assert f"and the same command goes on from {last}" in str(error.value)
    assert checkpoint.checkpoint_folders(tmp_path / "checkpoints") == [last]
    assert Trainer(config.load(tiny, ["training.optimizer.lr=1e-5"]), tmp_path).fit()


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        ({16: 0.9}, "begin in another --run: there is no checkpoint yet"),
        ({16: 0.9, 32: 0.8, 64: 0.5}, "and the same command goes on from {}/000000000064"),
        (
            {16: 0.9, 32: 0.8, 64: 7e3, 96: 4e7},
            "remove {0}/000000000096 (loss 4e+07), {0}/000000000064 (loss 7e+03), and the same "
            "command goes on from {0}/000000000032",
        ),
        ({16: 0.2, 32: 7e3}, "begin in another --run: no checkpoint is of use"),
    ],
)
def test_run_that_diverged_goes_back_to_the_last_checkpoint_before(tiny, tmp_path, losses, advice):
    run = RunFolder(tmp_path)
    lines = [json.dumps({"images": images, "loss": loss}) for images, loss in losses.items()]
    run.metrics.write_text("\n".join(lines) + "\n")
    for images in losses:
        if images % 32 == 0:
            (run.checkpoints / checkpoint.folder_name(images)).mkdir(parents=True)
    settings = config.load(tiny, ["training.optimizer.lr=10"])
    wanted = f"Lower training.optimizer.lr (it is 10), {advice.format(run.checkpoints)}"
    assert what_to_do(run, settings) == wanted.replace("), begin", "), and begin")
    in_bf16 = config.load(tiny, ["training.precision='bf16'"])
    assert "or train in fp32" in what_to_do(run, in_bf16)


def test_learning_rate_that_ruins_a_model_leaves_none_to_sample(tiny, hdit, tmp_path):
    run = tmp_path / "run"
    status, _, err = hdit("train", tiny, "--run", run, "--set", "training.optimizer.lr=1e6")
    assert status == 1
    assert "model: its weights are finite, but what they give is not. Lower training" in err
    assert hdit("sample", run)[0] == 1


@pytest.mark.parametrize(
    "error",
    [
        NotFiniteError("sample of seed 3: values that are not finite"),
        SolverError("the solver came to a stop"),
        OSError(28, "No space left on device"),
        torch.OutOfMemoryError("out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_grid_that_cannot_be_made_is_named_and_training_goes_on(
    tiny, tmp_path, monkeypatch, capfd, error
):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("hdit.training.grid.sample", fail)
    assert Trainer(config.load(tiny, ["training.images=32"]), tmp_path).fit()
    grid = tmp_path / "samples" / "000000000032.png"
    assert f"warning: {grid}: the grid cannot be made: {error}" in capfd.readouterr().err
    assert checkpoint.find(tmp_path, print).state.images == 32
    assert not grid.exists()


def test_ema_of_each_step_is_that_of_the_schedule_from_the_first(tiny, tmp_path):
    """In float64 from the weights after each step; the first has no decay, so that it copies."""
    settings = config.load(tiny, ["training.checkpoint_every=16", "training.ema.power=0.75"])
    assert Trainer(settings, tmp_path).fit()
    expected = None
    for step, folder in enumerate(
        reversed(checkpoint.checkpoint_folders(tmp_path / "checkpoints"))
    ):
        model, ema = (load_file(folder / f"{name}.safetensors") for name in ("model", "ema"))
        decay = 1 - (1 + step) ** -0.75
        weights = {key: value.double() for key, value in model.items()}
        expected = {
            key: value if expected is None else decay * expected[key] + (1 - decay) * value
            for key, value in weights.items()
        }
        for key, value in expected.items():  # float32, rounded at each of 6 steps
            torch.testing.assert_close(ema[key].double(), value, rtol=1e-6, atol=1e-7)
        assert metrics(tmp_path)[step]["ema_decay"] == pytest.approx(decay, rel=1e-12)
    assert step == 5


def test_signal_at_any_moment_of_a_step_leaves_a_checkpoint(tiny, tmp_path):
    """Here it comes while the metrics of a step are written, after the step asked for signals."""
    trainer = Trainer(config.load(tiny), tmp_path)
    log = trainer._log

    def signalled(*arguments):
        trainer.interrupts.signalled |= trainer.images == 48
        return log(*arguments)

    trainer._log = signalled
    assert not trainer.fit()
    assert checkpoint.find(tmp_path, print).state.images == trainer.images == 64


def test_run_that_another_process_trains_is_refused(tiny, tmp_path):
    trainer = Trainer(config.load(tiny), tmp_path)
    with trainer.run.locked(), pytest.raises(UserError, match="another process is training"):
        Trainer(config.load(tiny), tmp_path).fit()


def test_resume_clears_unfinished_checkpoints_and_keeps_each_damaged_one(tiny, tmp_path):
    for _ in range(2):
        Trainer(config.load(tiny), tmp_path).fit()
        (tmp_path / "checkpoints" / LAST / "model.safetensors").write_bytes(b"")
        (tmp_path / "checkpoints" / ".000000000064.part").mkdir()
    Trainer(config.load(tiny), tmp_path).fit()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    damaged = [f"{LAST}.damaged", f"{LAST}.damaged.2"]
    assert names == ["000000000032", "000000000064", LAST, *damaged, "latest"]


def test_resume_makes_the_grid_that_a_kill_prevented(tiny, tmp_path):
    Trainer(config.load(tiny, ["training.images=32"]), tmp_path).fit()
    grid = tmp_path / "samples" / "000000000032.png"
    before = grid.read_bytes()
    grid.unlink()
    Trainer(config.load(tiny), tmp_path).fit()
    assert grid.read_bytes() == before


def test_folder_without_a_readable_image_is_refused_before_training(tiny, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"none")
    overrides = [f'data={{kind="folder", path="{folder}", size=8}}', "training.workers=1"]
    with pytest.raises(UserError, match=r"none of the 1 files"):
        Trainer(config.load(tiny, overrides), tmp_path / "run")


def test_resume_with_renamed_classes_names_them(tiny, tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 60).save(tmp_path / "images" / name / "0.png")
    data = f'data={{kind="folder", path="{tmp_path / "images"}", size=8}}'
    settings = config.load(tiny, [data, "training.images=32"])
    Trainer(settings, tmp_path / "run").fit()
    (tmp_path / "images" / "dog").rename(tmp_path / "images" / "eel")
    with pytest.raises(CheckpointError, match="'dog' is 'eel' now"):
        Trainer(settings, tmp_path / "run")


def test_bf16_keeps_weights_ema_and_optimizer_in_float32(tiny, tmp_path):
    run = tmp_path / "run"
    Trainer(config.load(tiny, ["training.precision=bf16", "training.images=32"]), run).fit()
    folder = run / "checkpoints" / "000000000032"
    for name in ("model", "ema", "optimizer"):
        tensors = load_file(folder / f"{name}.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}, name


def test_unlabelled_folder_trains_and_samples(tiny, tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.effect_noise((40, 30), 60).convert("RGB").save(folder / f"{i}.jpg")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    overrides = [f'data={{kind="folder", path="{folder}", size=[8, 16], max_bad_share=0.2}}']
    overrides.append("training.images=32")
    run = tmp_path / "run"
    assert Trainer(config.load(tiny, overrides), run).fit()
    assert metrics(run)[-1]["skipped_files"] == 1
    [event] = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    assert event["kind"] == "file skipped"
    assert event["path"] == str(folder / "broken.png")
    assert checkpoint.find(run, print).state.shape.num_classes == 0


def test_two_processes_train_as_one(tiny, tmp_path):
    """The same images, noise and losses; sums differ in order alone. And both stop at one step."""
    text = tiny.read_text().replace("dropout = 0.1", "").replace("grid = 4", "grid = 0")
    tiny.write_text(text.replace("images = 96", "images = 100_000"))
    one, two = tmp_path / "one", tmp_path / "two"
    images = 16 * AGREE_EVERY
    assert Trainer(config.load(tiny, [f"training.images={images}"]), one).fit()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # After "--", or torchrun takes --run for an abbreviation of an option of its own.
    command = [*launch, "-m", "--", "hdit.cli", "train", str(tiny), "--run", str(two)]
    command += ["--minutes", "0.0001"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "time is up" in done.stderr
    assert metrics(two)[-1]["images"] == images
    assert checkpoint.find(two, print).state.images == images
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_image_is_read_only_where_the_model_could_take_it(tiny, tmp_path, monkeypatch):
    """A large one takes long to draw, and what is told is that none fits."""
    monkeypatch.setattr(Shapes, "__getitem__", lambda *_: pytest.fail("an image was drawn"))
    settings = config.load(tiny, ["data.kind=shapes", "data.size=4096"])
    with pytest.raises(UserError, match=r"training\.batch_size: a step with 16 images at once"):
        Trainer(settings, tmp_path / "run")
