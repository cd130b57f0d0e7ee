"""A matrix of small cells: read, trained, measured, resumed, reported."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hdit import randomness
from hdit.config import ConfigError
from hdit.data import DigitsSpec
from hdit.errors import UserError
from hdit.experiments.cell import (
    alone_at,
    check_cells,
    finished,
    record_path,
    run_cell,
    trained_seconds,
    write_record,
    x0_losses,
)
from hdit.experiments.matrix import MatrixError, Measures, read_matrix
from hdit.models.cost import cost
from hdit.protocols import Cond
from hdit.report.pages import bins, markdown, page, table
from hdit.runs.trained import Trained
from hdit.signals import ENDING, Signalled, raised
from hdit.training.trainer import Trainer
from scripts import ablate_backbones

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "ablate_backbones.py"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
    "OMP_NUM_THREADS": "1",
}

MATRIX = """
budget = {{ images = {images} }}
seeds = {seeds}

[set]
data = {{ kind = "digits" }}
training = {{ batch_size = 16, checkpoint_every = 32, log_every = 16 }}
sampling = {{ steps = 3 }}

[[cells]]
name = "DiT"
set = {{ model = {{ kind = "dit", patch_size = 2, width = 16, depth = 1, num_heads = 1 }} }}

[[cells]]
name = "HDiT"
[cells.set.model]
kind = "hdit"
patch_size = 1
mapping = {{ depth = 1, width = 16 }}
local_attention = {{ kind = "neighborhood", kernel_size = 3, d_head = 8 }}
levels = [
    {{ depth = 1, width = 16 }},
    {{ depth = 1, width = 16, attention = {{ kind = "global", d_head = 16 }} }},
]

{more}

[evaluation]
held_out = {{ split = "test" }}
images = 32
bins = 3
grid = 4
"""


def write(path, images=64, seeds="[0]", more=""):
    path.write_text(MATRIX.format(images=images, seeds=seeds, more=more))
    return path


BROKEN = """
[[cells]]
name = "Broken"
set.model = { kind = "dit", patch_size = 2, width = 16, depth = 1, num_heads = 1 }
set.training.optimizer.lr = 1e6
"""


def test_matrix_of_more_cells_than_anybody_can_train_is_refused(tmp_path):
    axis = "\n".join(f"o{i} = {{ sampling = {{ steps = {i + 1} }} }}" for i in range(101))
    more = f"[cross.a]\n{axis}\n[cross.b]\n{axis}\n"
    with pytest.raises(MatrixError, match=r"has 20,402 cells, and at most 10,000 are taken"):
        read_matrix(write(tmp_path / "matrix.toml", more=more))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A matrix that ran, by the script, the last of its three cells to no end: (folder, file)."""
    out = tmp_path_factory.mktemp("ablation")
    matrix = write(out / "matrix.toml", more=BROKEN)
    result = subprocess.run(
        [sys.executable, SCRIPT, matrix, "--out", out / "out"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert result.returncode == 1, result.stderr + result.stdout
    assert "failed" in result.stdout
    return out / "out", matrix


def test_matrix_crosses_cells_with_each_axis_and_seed(tmp_path):
    more = """
[cross.weighting]
eps = { diffusion = { weighting = { kind = "eps" } } }
snr = { diffusion = { weighting = { kind = "soft_min_snr" } } }
[cross.sampler]
heun = { sampling = { sampler = { kind = "heun" } } }
"""
    _, cells = read_matrix(write(tmp_path / "m.toml", seeds="[3, 5]", more=more))
    names = ["DiT / eps / heun", "DiT / snr / heun", "HDiT / eps / heun", "HDiT / snr / heun"]
    assert [c.name for c in cells] == [name for name in names for _ in range(2)]
    assert [c.seed for c in cells] == [3, 5] * 4
    assert all(c.config.training.seed == c.seed for c in cells)
    assert [c.config.diffusion.weighting.kind for c in cells[::2]] == ["eps", "soft_min_snr"] * 2
    assert {c.config.sampling.sampler.kind for c in cells} == {"heun"}
    assert len({c.hash for c in cells}) == 8


@pytest.mark.parametrize(("name", "rows"), [("paper", 16), ("small", 3)])
def test_matrices_of_the_project_are_read(name, rows):
    _, cells = read_matrix(REPOSITORY / "configs" / "matrices" / f"{name}.toml")
    assert len({c.hash for c in cells}) == rows


def test_hash_of_a_cell_changes_with_its_settings_alone(tmp_path):
    hashes = [
        [c.hash for c in read_matrix(write(tmp_path / "m.toml", **changes))[1]]
        for changes in ({}, {}, {"images": 128}, {"more": "[cross]"})
    ]
    assert hashes[0] == hashes[1] == hashes[3]
    assert not set(hashes[0]) & set(hashes[2])


def test_budget_of_macs_gives_each_cell_its_images(tmp_path):
    text = write(tmp_path / "m.toml").read_text().replace("images = 64", "gmacs = 1.0")
    (tmp_path / "m.toml").write_text(text)
    for cell in read_matrix(tmp_path / "m.toml")[1]:
        shape = cell.config.data_shape(10)
        macs = 3 * sum(row.macs for row in cost(cell.config.model, shape, 1))
        assert 0 <= cell.config.training.images * macs - 1e9 < 16 * macs


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("images = 64 }", "images = 64, seconds = 2.0 }", "budget: .*one of images"),
        ('name = "HDiT"', 'name = "DiT"', "two cells have the name 'DiT'"),
        ("patch_size = 2", "patch_size = 3", r"DiT:\n.*patch_size"),
        ("bins = 3", "binz = 3", r"evaluation\.binz"),
        ('name = "DiT"', 'name = "DiT"\nextends = ["no.toml"]', "no such config file"),
    ],
)
def test_matrix_that_is_wrong_is_named(tmp_path, old, new, message):
    path = write(tmp_path / "m.toml")
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises((MatrixError, ConfigError), match=message):
        read_matrix(path)


def test_script_measures_each_cell_and_writes_the_report(done):
    out, matrix = done
    *cells, broken = read_matrix(matrix)[1]
    for cell in cells:
        record = finished(out, cell)
        assert record["images"] == 64
        assert record["peak_memory"] > 2**25
        assert len(record["x0_loss"]) == 3
        assert record["held_out"] == 32
        assert np.isfinite(record["x0_loss"]).all()
        model = Trained.open(out / "runs" / cell.run)
        assert record["parameters"] == sum(p.numel() for p in model.network().parameters())
    assert finished(out, broken) is None
    assert "| HDiT |" in (out / "table.md").read_text()
    assert "missing: Broken, seed 0: status 1" in (out / "table.md").read_text()
    text = (out / "index.html").read_text()
    assert text.count("data:image/png;base64,") == 2, "one for each cell that is done"
    assert not re.search("https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))


def test_script_runs_what_is_not_finished_alone(done, monkeypatch, capsys):
    out, matrix = done
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    started = []

    def start(command, **_):
        started.append(command[-1])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(ablate_backbones.subprocess, "Popen", start)
    monkeypatch.setattr(ablate_backbones, "wait", lambda process: process.returncode)
    monkeypatch.setattr(sys, "argv", ["ablate_backbones.py", str(matrix), "--out", str(out)])
    assert ablate_backbones.main() == 1
    *_, broken = read_matrix(matrix)[1]
    assert started == [broken.slug]
    assert "Broken, seed 0: to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before


def test_loss_by_noise_level_is_that_of_the_definition(done):
    """By hand: the same pictures, noise and levels, and the mean square of D - x0 in float64."""
    out, matrix = done
    cell = read_matrix(matrix)[1][0]
    record = finished(out, cell)
    model = Trained.open(out / "runs" / cell.run)
    source = DigitsSpec(split="test").open()
    places = np.linspace(0, len(source) - 1, 32).astype(int)
    x0 = torch.stack([source[i].image for i in places]) / 127.5 - 1
    labels = torch.tensor([source[i].label for i in places])
    counters = np.arange(32)
    keys = randomness.keys(0, "held-out noise", counters, torch.device("cpu"))
    noise = randomness.normal(keys, (1, 8, 8))
    u = randomness.uniform(0, "held-out sigma", counters)
    denoiser = model.denoiser()
    edges = torch.logspace(np.log10(0.02), np.log10(80), 4, dtype=torch.float64)
    for i in range(3):
        sigma = (edges[i].log() * (1 - u) + edges[i + 1].log() * u).exp()
        x = x0 + sigma.float()[:, None, None, None] * noise
        with torch.inference_mode():
            error = (denoiser(x, sigma.float(), Cond(labels)) - x0).double() ** 2
        assert record["x0_loss"][i] == pytest.approx(error.mean().item(), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_cell_with_its_noise_level(value):
    class Ruined:
        def x0_errors(self, images, labels, counters, edges):
            errors = torch.ones(len(edges) - 1, len(images), dtype=torch.float64)
            errors[1, 2] = value
            return errors

    measures = Measures(held_out={}, images=8)
    edges = np.array([0.1, 1.0, 10.0, 80.0])
    with pytest.raises(UserError, match=rf"held-out images is {value} at sigma 1 to 10: the model"):
        x0_losses(Ruined(), DigitsSpec(split="test").open(), measures, edges)


def test_cell_of_a_budget_in_seconds_trains_for_so_long_over_all_sessions(tmp_path):
    text = write(tmp_path / "m.toml").read_text().replace("images = 64", "seconds = 0.3")
    (tmp_path / "m.toml").write_text(text)
    cell = read_matrix(tmp_path / "m.toml")[1][0]
    folder = tmp_path / "cell"
    trainer = Trainer(cell.config, folder)
    trainer.fit(0.1)
    first = trained_seconds(folder, trainer.images)
    record = run_cell(cell, folder)
    assert 0.1 * (1 - 1e-9) <= first < record["seconds"] >= 0.3 * (1 - 1e-9)
    assert run_cell(cell, folder)["images"] == record["images"], "nothing was left to spend"


@pytest.mark.parametrize("number", ENDING)
def test_signal_to_the_sweep_ends_its_cell_before_it(number, tmp_path):
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
    code += "print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    cell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert cell.stdout.readline() == b"up\n"
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    with cell.stdout, pytest.raises(Signalled) as error, raised():
        ablate_backbones.wait(cell)
    assert error.value.number == number
    assert cell.returncode == 7


@pytest.mark.parametrize("number", ENDING)
def test_cell_that_a_signal_ends_says_by_which(number, done, monkeypatch, tmp_path):
    cell = read_matrix(done[1])[1][0]

    def fit(trainer, seconds):
        trainer.interrupts.signalled = number
        return False

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(Signalled) as error:
        run_cell(cell, tmp_path / "run")
    assert error.value.number == number


@pytest.fixture
def sweep(monkeypatch):
    """Runs the script in this process -> its status."""

    def run(matrix, out):
        monkeypatch.setattr(sys, "argv", ["ablate_backbones.py", str(matrix), "--out", str(out)])
        return ablate_backbones.main()

    return run


def test_sweep_that_was_killed_leaves_no_process_and_the_next_one_goes_on(
    tmp_path, monkeypatch, sweep
):
    """The second begins at once, while the process of the cell is still saving.

    The killed one is any that starts a cell as the script does, which itself would take seconds.
    """
    matrix, out = write(tmp_path / "m.toml"), tmp_path / "out"
    head, cell, rest = matrix.read_text().replace("images = 64", "seconds = 1.5").split("[[cells]]")
    matrix.write_text(f"{head}[[cells]]{cell}{rest[rest.index('[evaluation]') :]}")
    [cell] = read_matrix(matrix)[1]
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    metrics = out / "runs" / cell.run / "metrics.jsonl"
    log = out / "runs" / f"{cell.run}.log"
    starter = "import sys; from subprocess import *; Popen(sys.argv[1:], stdin=PIPE).wait()"
    command = [sys.executable, SCRIPT, matrix, "--out", out, "--cell", cell.slug]
    log.parent.mkdir(parents=True)
    with (
        log.open("w") as file,
        subprocess.Popen([sys.executable, "-c", starter, *command], stderr=file) as killed,
    ):
        while not (metrics.exists() and b"\n" in metrics.read_bytes()):
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    before = metrics.read_bytes()
    assert sweep(matrix, out) == 0
    assert "interrupted; the same command goes on" in log.read_text()
    assert log.read_text().count("resuming from") == 1
    assert metrics.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert finished(out, cell)["seconds"] >= 1.5 * (1 - 1e-9)


def test_sweep_waits_for_a_cell_that_another_one_runs_and_takes_its_record(
    done, tmp_path, monkeypatch, capsys, sweep
):
    out, matrix = tmp_path / "out", write(tmp_path / "m.toml")
    cells = read_matrix(matrix)[1]
    begun, waited_for = threading.Event(), threading.Event()

    def other():
        with alone_at(cells[0], out, print):
            begun.set()
            waited_for.wait()
            for cell in cells:
                write_record(out, cell, finished(done[0], cell))

    def wait(cell, folder, tell):
        return alone_at(cell, folder, lambda owner: (waited_for.set(), tell(owner)))

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    monkeypatch.setattr(ablate_backbones, "alone_at", wait)
    monkeypatch.setattr(ablate_backbones.subprocess, "Popen", None)
    assert sweep(matrix, out) == 0
    thread.join()
    said = capsys.readouterr().out
    assert said.count("waiting: ") == 1
    assert f"another process is at 'DiT', seed 0 (process {os.getpid()} on" in said


def test_run_without_a_line_of_training_is_named(tmp_path):
    cell = read_matrix(write(tmp_path / "m.toml"))[1][0]
    Trainer(cell.config, tmp_path / "cell").fit()
    (tmp_path / "cell" / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(MatrixError, match=r"metrics\.jsonl: has no line of training; remove"):
        run_cell(cell, tmp_path / "cell")


@pytest.mark.parametrize("saved", [True, False])
def test_cell_that_was_killed_goes_on_from_its_checkpoint_alone(tmp_path, saved):
    """Lines of metrics behind the checkpoint, the last cut, are no training that counts."""
    text = write(tmp_path / "m.toml").read_text().replace("images = 64", "seconds = 0.3")
    (tmp_path / "m.toml").write_text(text)
    cell = read_matrix(tmp_path / "m.toml")[1][0]
    folder = tmp_path / "cell"
    images = 0
    if saved:
        trainer = Trainer(cell.config, folder)
        trainer.fit(0.1)
        images = trainer.images
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"images": images + 16, "images_per_second": 1e-3}) + '\n{"imag')
    record = run_cell(cell, folder)
    assert record["seconds"] >= 0.3 * (1 - 1e-9)
    assert record["images"] == Trained.open(folder).images > images


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('held_out = { split = "test" }', "held_out = {}", "names the images that are trained"),
        ("bins = 3", 'bins = 3\nfeatures = "no.pt"', "'no.pt' is not there"),
        ("bins = 3", "bins = 3\nsigma_max = 0.01", "sigma_min must be below sigma_max"),
        ("bins = 3", "bins = 3\nsamples = 30", "samples has no effect without features"),
        ("checkpoint_every = 32", "images = 5", r"training\.images: has no effect .*by budget"),
        ("seeds = [0]", "seeds = [0, 0]", "seeds: must differ"),
        ("[evaluation]", "[cross.weighting]\n[evaluation]", r"cross\.weighting: has no overlays"),
        ("steps = 3 }", "steps = 3, guidance = { scale = 2.0 } }\nx", None),
    ],
)
def test_what_would_fail_after_training_is_refused_before(tmp_path, old, new, message):
    path = write(tmp_path / "m.toml")
    if message is None:  # guidance by a class that was never dropped
        new, message = new.removesuffix("\nx"), "label_dropout was 0"
        path.write_text(path.read_text().replace("log_every", "label_dropout = 0.0, log_every"))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        check_cells(read_matrix(path)[1])


def test_measures_do_not_train_a_cell_again(tmp_path):
    cells = [
        read_matrix(write(tmp_path / "m.toml", more=more))[1][0]
        for more in ("", "[cross.steps]\nfew = { sampling = { steps = 2 } }")
    ]
    assert cells[0].hash != cells[1].hash
    assert cells[0].run.rpartition("-")[2] == cells[1].run.rpartition("-")[2]


def test_record_is_of_the_content_of_its_features(tmp_path, monkeypatch):
    path = write(tmp_path / "m.toml")
    path.write_text(path.read_text().replace("bins = 3", 'bins = 3\nfeatures = "f.pt"'))
    monkeypatch.chdir(tmp_path)
    hashes = set()
    for content in (b"a", b"b"):
        (tmp_path / "f.pt").write_bytes(content)
        hashes.add(read_matrix(path)[1][0].hash)
    assert len(hashes) == 2


def test_table_gives_means_and_spread_over_seeds(done):
    out, matrix = done
    record = finished(out, read_matrix(matrix)[1][0])
    other = record | {"seed": 1, "x0_loss": [2 * v for v in record["x0_loss"]]}
    head, line = table([record, other])
    low = np.mean(record["x0_loss"])
    assert line[head.index("x0 loss")] == f"{1.5 * low:.5f} ({low:.5f} to {2 * low:.5f})"
    assert line[head.index("images")] == "64"
    assert len(bins([record, other])) == 2


def test_report_escapes_names(done):
    out, matrix = done
    record = finished(out, read_matrix(matrix)[1][0]) | {"name": "a|b <script>"}
    assert "<script>" not in page([record], {"<x>": "<y>"})
    text = markdown([record], {"<x>": "<y>\n| z"})
    assert "a\\|b &lt;script&gt;" in text
    assert "missing: &lt;x&gt;: &lt;y&gt; \\| z" in text


def test_record_that_is_damaged_is_made_anew(done, tmp_path):
    cell = read_matrix(done[1])[1][0]
    path = record_path(tmp_path, cell)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert finished(tmp_path, cell) is None
    path.write_text(json.dumps({"hash": "other"}))
    assert finished(tmp_path, cell) is None
