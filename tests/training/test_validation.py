"""The loss of held-out images: known answers, when it is measured, and what goes by it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hdit import config
from hdit.config import ConfigError
from hdit.data.source import DataError, Sample
from hdit.models.cost import cost
from hdit.protocols import DataShape
from hdit.runs import checkpoint
from hdit.runs.folder import RunFolder
from hdit.runs.trained import Trained, is_trained
from hdit.training.trainer import Trainer
from hdit.training.validation import Validation

HELD = "data.held_out=0.2"
FEW = "training.validate_images=16"
NO_GRID = "sampling.grid=0"
EPS = "diffusion.weighting={kind='eps'}"
LOGUNIFORM = "diffusion.density={kind='loguniform', sigma_min=0.01, sigma_max=100.0}"


def lines(run, name="validation"):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def at(run):
    """The images after which the run was validated."""
    return [line["images"] for line in lines(run)]


def folders(run):
    return [int(path.name) for path in reversed(checkpoint.checkpoint_folders(run / "checkpoints"))]


# ---- known answers -------------------------------------------------------------------------------


class Grey:
    """Images of one grey, in two classes in turn."""

    classes = ("a", "b")

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Sample(torch.full((1, 8, 8), 200, dtype=torch.uint8), index % 2)


def off_by(delta, labels):
    """A network whose denoiser gives the grey and `delta` more, whatever it sees."""

    def network(x, c_noise, cond):
        labels.extend(cond.labels.tolist())
        sigma = (4 * c_noise.double()).exp()[:, None, None, None]  # of EDM's ln(sigma)/4
        c_in = (sigma**2 + 0.25) ** -0.5
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma * c_in
        noisy = x.double() / c_in
        return ((200 / 127.5 - 1 + delta - c_skip * noisy) / c_out).float()

    return network


def test_losses_by_noise_level_are_those_of_the_integral(tiny):
    """With lambda = 1/sigma^2 and ln sigma uniform, a bin's mean is (a^-2 - b^-2)/(2 ln(b/a)).

    5e-3 is what 400 strata of a bin, and float32 at sigma = 0.01, leave of the integral.
    """
    settings = config.load(tiny, [EPS, LOGUNIFORM, "sampling.batch_size=700"])
    shape, labels = DataShape(1, 8, 8, 10, 0.5), []
    space = settings.space.open(torch.device("cpu"))
    validation = Validation(Grey(3200), [7, 3], settings, shape, space, torch.device("cpu"))
    found = validation.measure({"ema": off_by(0.1, labels)})
    edges = np.geomspace(0.01, 100, 9)
    np.testing.assert_allclose(found["sigma_edges"], edges, rtol=1e-12)
    a, b = edges[:-1], edges[1:]
    expected = 0.1**2 * (a**-2 - b**-2) / (2 * np.log(b / a))
    losses = found["weights"]["ema"]
    np.testing.assert_allclose(losses["loss_by_sigma"], expected, rtol=5e-3)
    assert losses["loss"] == pytest.approx(expected.mean(), rel=5e-3)
    np.testing.assert_allclose(losses["x0_by_sigma"], 0.1**2, rtol=2e-4)
    assert losses["x0"] == pytest.approx(0.1**2, rel=1e-4)
    assert found["count"] == 3200
    assert labels == [7, 3] * 1600, "classes are the model's, in the order of the images"


def test_few_images_leave_noise_levels_without_a_loss(tiny):
    settings = config.load(tiny, [EPS, LOGUNIFORM])
    shape = DataShape(1, 8, 8, 10, 0.5)
    space = settings.space.open(torch.device("cpu"))
    validation = Validation(Grey(4), [0, 1], settings, shape, space, torch.device("cpu"))
    losses = validation.measure({"model": off_by(0.1, [])})["weights"]["model"]
    told = [loss for loss in losses["loss_by_sigma"] if loss is not None]
    assert len(told) == 4
    assert losses["loss"] == pytest.approx(math.fsum(told) / 4)


def test_losses_that_are_not_finite_are_none(tiny):
    settings = config.load(tiny, [EPS, LOGUNIFORM])
    space = settings.space.open(torch.device("cpu"))
    shape = DataShape(1, 8, 8, 10, 0.5)
    validation = Validation(Grey(16), [0, 1], settings, shape, space, torch.device("cpu"))
    losses = validation.measure({"model": lambda x, c, cond: x * math.nan})["weights"]["model"]
    assert losses["loss"] is None
    assert losses["x0_by_sigma"] == [None] * 8


def test_validation_leaves_no_trace_and_has_no_dropout(tiny, tmp_path):
    """A level of the model has dropout: two measurements would differ."""
    settings = [HELD, FEW, NO_GRID, "training.images=32"]
    trainer = Trainer(config.load(tiny, settings), tmp_path / "run")
    assert trainer.fit()
    assert not trainer._validate()
    one, two = lines(tmp_path / "run")
    assert one == two
    assert trainer.backbone.training
    assert not trainer.ema.training


# ---- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [32, 64, 96]),
        (["training.validate_every=48"], [48, 96]),
        (["training.validate_every=64"], [64, 96]),
        (["training.validate_every=960"], [96]),
        (["training.validate_every=96", "training.keep={ last = 1, best = 1 }"], [32, 64, 96]),
    ],
)
def test_validation_comes_as_often_as_the_settings_have_it(tiny, tmp_path, overrides, expected):
    assert Trainer(config.load(tiny, [HELD, FEW, NO_GRID, *overrides]), tmp_path / "run").fit()
    assert at(tmp_path / "run") == expected


def test_resumed_run_has_the_curves_of_the_uninterrupted_one(tiny, tmp_path):
    settings = [HELD, NO_GRID, "training.validate_images=100"]
    assert Trainer(config.load(tiny, settings), tmp_path / "whole").fit()
    run = tmp_path / "run"
    assert Trainer(config.load(tiny, [*settings, "training.images=64"]), run).fit()
    with (run / "validation.jsonl").open("a") as file:  # of a killed run, and a damaged line
        file.write('no line\n{"images": 80, "step": 5, "count": 100}\n{"images": 96, "st')
    assert Trainer(config.load(tiny, settings), run).fit()
    assert lines(run) == lines(tmp_path / "whole")
    assert [line["count"] for line in lines(run)] == [100] * 3
    assert (run / "validation.jsonl.damaged").read_text() == "no line\n"


def test_signal_ends_validation_without_a_line_and_the_next_session_makes_it_up(tiny, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(config.load(tiny, [HELD, FEW, NO_GRID]), run)
    measure = trainer.validation.measure
    asked = []

    def signalled(networks, is_over):
        def over():
            asked.append(trainer.images)
            trainer.interrupts.signalled |= trainer.images == 64 and asked.count(64) == 2
            return is_over()

        return measure(networks, over)

    trainer.validation.measure = signalled
    assert not trainer.fit()
    assert asked.count(64) == 2
    assert (at(run), folders(run)) == ([32], [32, 64])
    assert Trainer(config.load(tiny, [HELD, FEW, NO_GRID]), run).fit()
    assert at(run) == [32, 64, 96]


def test_validation_that_is_made_up_counts_for_the_best_checkpoint(tiny, tmp_path):
    """A signal cuts off the last validation: the run is not done, and its best not known."""
    settings = [HELD, FEW, NO_GRID, "training.keep={ last = 2, best = 1 }"]
    run = tmp_path / "run"
    trainer = Trainer(config.load(tiny, settings), run)
    measure = trainer.validation.measure

    def told(loss):
        return {"weights": {"model": {"loss": loss}, "ema": {"loss": loss}}}

    def signalled(networks, is_over):
        if trainer.images < 96:
            return told(2.0)
        trainer.interrupts.signalled = 15
        return measure(networks, is_over)

    trainer.validation.measure = signalled
    assert not trainer.fit()
    best = run / "checkpoints" / "best"
    assert (at(run), best.read_text()) == ([32, 64], "000000000032\n")
    again = Trainer(config.load(tiny, settings), run)
    again.validation.measure = lambda networks, is_over: told(1.0)
    assert again.fit()
    assert (at(run), best.read_text()) == ([32, 64, 96], "000000000096\n")


def test_validation_that_is_there_is_not_made_up_again(tiny, tmp_path):
    """Not even where a later line follows, of a session that was killed before its checkpoint."""
    run = tmp_path / "run"
    assert Trainer(config.load(tiny, [HELD, FEW, NO_GRID]), run).fit()
    with (run / "validation.jsonl").open("a") as file:
        file.write('{"images": 128, "step": 8}\n')
    assert Trainer(config.load(tiny, [HELD, FEW, NO_GRID]), run).fit()
    assert at(run) == [32, 64, 96, 128]


def test_run_that_went_back_has_no_lines_of_what_it_lost(tiny, tmp_path):
    """Two steps of no loss after 48 images, and then the checkpoint at 32 images."""
    settings = [HELD, FEW, NO_GRID, "training.validate_every=16"]
    trainer = Trainer(config.load(tiny, [*settings, "training.guard.patience=2"]), tmp_path / "run")
    objective = trainer.objective
    trainer.objective = lambda b: objective(b) * (math.nan if 48 <= b.counters[0] < 80 else 1)
    assert trainer.fit()
    assert trainer.rollbacks == 1
    assert at(tmp_path / "run") == [16, 32, 48, 64, 80, 96]


# ---- what goes by it -----------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["true", "false"])
def test_best_checkpoints_stay_and_are_named(tiny, tmp_path, background):
    settings = [HELD, FEW, NO_GRID, "training.keep={ last = 1, best = 2 }"]
    settings += ["training.checkpoint_every=16", f"training.background_saves={background}"]
    trainer = Trainer(config.load(tiny, settings), tmp_path / "run")
    losses = iter([5.0, 1.0, None, 4.0, 2.0, 6.0])
    trainer.validation.measure = lambda networks, is_over: {
        "weights": {"model": {"loss": 1.0}, "ema": {"loss": next(losses)}}
    }
    assert trainer.fit()
    assert folders(tmp_path / "run") == [32, 80, 96]
    best = tmp_path / "run" / "checkpoints" / "best"
    assert best.read_text() == "000000000032\n"
    assert Trained.open(best).images == 32
    assert is_trained(best)
    shutil.rmtree(best.with_name("000000000032"))
    RunFolder(tmp_path / "run").name_best()
    assert Trained.open(best).images == 80
    best.write_text("none\n")
    with pytest.raises(checkpoint.CheckpointError, match=r"best: names no checkpoint, but 'none'"):
        Trained.open(best)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.validate_every=16"], "validate_every: has no effect without data.held_out"),
        (["training.validate_images=16"], "validate_images: has no effect without data.held_out"),
        (["training.keep={ last = 1, best = 1 }"], "keep.best: has no effect without data.held_"),
        ([HELD, "training.keep.best=1"], "best has no effect without last"),
        (["data.held_out=1.0"], "held_out: must be a path, or a share above 0 and below 1, got 1"),
        (["data.held_out=''"], "held_out: must be a path, or a share"),
        (
            ["data={kind='tar', path='a.tar', size=8, channels=1, held_out=0.1}"],
            "held_out: no share can be split off tar files",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny, overrides, words):
    with pytest.raises(ConfigError, match=words):
        config.load(tiny, overrides)


# ---- the images ----------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Overrides for 24 training images in three classes, and 6 others of two of them."""
    rng = np.random.default_rng(0)
    for part, classes, count in (("train", "abc", 24), ("test", "bc", 6)):
        for i in range(count):
            path = tmp_path / part / classes[i % len(classes)] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    train, test = tmp_path / "train", tmp_path / "test"
    data = f"kind='folder', path='{train}', size=8, channels=1, held_out='{test}'"
    return [f"data={{{data}}}", NO_GRID]


def test_images_of_a_path_are_validated_on_and_told(tiny, tmp_path, photos, capfd):
    trainer = Trainer(config.load(tiny, [*photos, "training.validate_images=5"]), tmp_path / "run")
    assert "24 images of 3 classes, 6 held out (5 to validate on)" in capfd.readouterr().err
    assert trainer.fit()
    assert checkpoint.find(tmp_path / "run", print).state.data_size == 24
    assert [line["count"] for line in lines(tmp_path / "run")] == [5] * 3
    [part] = trainer.validation.parts
    assert set(part.labels.tolist()) == {1, 2}


def test_images_that_are_trained_on_too_are_told(tiny, tmp_path, photos, capfd):
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path / "test" / "b" / "copy.png")
    Trainer(config.load(tiny, photos), tmp_path / "run")
    assert "1 of its 7 images are trained on too" in capfd.readouterr().err.replace("\n", " ")


def test_class_that_the_model_does_not_know_is_refused(tiny, tmp_path, photos):
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "d")
    with pytest.raises(DataError, match=r"data.held_out: .*test' has classes .* has not: 'd'"):
        Trainer(config.load(tiny, photos), tmp_path / "run")


def test_resumed_run_tells_that_other_images_are_held_out(tiny, tmp_path, capfd):
    assert Trainer(config.load(tiny, [HELD, FEW, NO_GRID]), tmp_path / "run").fit()
    trained_on = checkpoint.find(tmp_path / "run", print).state.data_size
    Trainer(config.load(tiny, ["data.held_out=0.3", NO_GRID]), tmp_path / "run")
    said = " ".join(capfd.readouterr().err.split())
    assert "data.held_out: 0.2 in the run, 0.3 now" in said
    assert "the validation loss is too low" in said
    assert f"data: {trained_on:,} images in the run" in said


def test_training_never_draws_what_is_held_out(tiny, tmp_path):
    trainer = Trainer(config.load(tiny, [HELD]), tmp_path / "run")
    ours, theirs = (
        {source[i].image.numpy().tobytes() for i in range(len(source))}
        for source in (trainer.source, trainer.setup.images.held_out.source)
    )
    assert not ours & theirs
    stream = trainer.open_stream()
    drawn = [next(stream).images for _ in range(2 * len(trainer.source) // 16)]
    assert {image.numpy().tobytes() for image in torch.cat(drawn)} == ours


# ---- the lines of metrics ------------------------------------------------------------------------


def test_training_tells_its_losses_by_noise_level(tiny, tmp_path):
    """A batch of 16 has two images in each octile, so that the mean of the bins is the loss."""
    assert Trainer(config.load(tiny, [NO_GRID, "training.accumulate=2"]), tmp_path).fit()
    for line in lines(tmp_path, "metrics"):
        assert np.mean(line["loss_by_sigma"]) == pytest.approx(line["loss"], rel=1e-6)
        assert len(line["sigma_edges"]) == 9
        assert line["sigma_edges"] == sorted(line["sigma_edges"])


def test_losses_of_a_step_that_is_not_taken_are_not_told(tiny, tmp_path):
    trainer = Trainer(config.load(tiny, [NO_GRID, "training.log_every=32"]), tmp_path)
    objective = trainer.objective
    trainer.objective = lambda b: objective(b) * (math.nan if b.counters[0] in (16, 64) else 1)
    assert trainer.fit()
    for line in lines(tmp_path, "metrics"):
        assert np.mean(line["loss_by_sigma"]) == pytest.approx(line["loss"], rel=1e-6)


def test_noise_levels_without_an_image_have_no_loss(tiny, tmp_path):
    settings = ["training.batch_size=4", "training.log_every=4", "training.images=8"]
    assert Trainer(config.load(tiny, [NO_GRID, *settings]), tmp_path).fit()
    for line in lines(tmp_path, "metrics"):
        told = [loss for loss in line["loss_by_sigma"] if loss is not None]
        assert len(told) == 4
        assert np.mean(told) == pytest.approx(line["loss"], rel=1e-6)


def test_seconds_go_on_over_sessions_and_macs_and_mfu_follow_from_the_images(tiny, tmp_path):
    settings = [NO_GRID, "training.peak_tflops=2.0"]
    assert Trainer(config.load(tiny, [*settings, "training.images=64"]), tmp_path).fit()
    before = lines(tmp_path, "metrics")
    before[-1]["seconds"] = 1000.0
    text = "".join(json.dumps(line) + "\n" for line in before)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert Trainer(config.load(tiny, settings), tmp_path).fit()
    after = lines(tmp_path, "metrics")
    seconds = [line["seconds"] for line in after]
    assert seconds == sorted(seconds)
    assert 1000 < seconds[4] < 1060
    model = config.load(tiny).model
    macs = 3 * sum(part.macs for part in cost(model, DataShape(1, 8, 8, 10, 0.5)))
    for line in after:
        assert line["macs"] == line["images"] * macs
        mfu = 2 * macs * line["images_per_second"] / 2e12
        assert line["mfu"] == pytest.approx(mfu, rel=1e-9)


def test_run_of_an_earlier_version_begins_to_count_seconds(tiny, tmp_path):
    assert Trainer(config.load(tiny, [NO_GRID, "training.images=64"]), tmp_path).fit()
    new = ("seconds", "macs", "sigma_edges", "loss_by_sigma")
    before = [{k: v for k, v in m.items() if k not in new} for m in lines(tmp_path, "metrics")]
    text = "".join(json.dumps(line) + "\n" for line in before)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert Trainer(config.load(tiny, [NO_GRID]), tmp_path).fit()
    *old, first, _ = lines(tmp_path, "metrics")
    assert old == before
    assert 0 < first["seconds"] < 60
    assert "mfu" not in first
