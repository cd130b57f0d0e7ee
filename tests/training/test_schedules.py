"""The learning rate and the gradient noise scale in whole runs."""

import json

import pytest

from hdit import config
from hdit.config import ConfigError
from hdit.training.trainer import Trainer


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_cools_down_after_the_fact_and_says_so(tiny, tmp_path, capsys):
    constant = "training.optimizer.schedule={kind='constant', warmup_images=32}"
    Trainer(config.load(tiny, [constant]), tmp_path).fit()
    trapezoid = (
        "training.optimizer.schedule={kind='trapezoid', warmup_images=32, cooldown_images=64}"
    )
    Trainer(config.load(tiny, [trapezoid, "training.images=160"]), tmp_path).fit()
    shares = [line["lr"] / 5e-4 for line in lines(tmp_path)]
    assert shares == pytest.approx(
        [8 / 32, 24 / 32, 1, 1, 1, 1, *(i / 64 for i in (56, 40, 24, 8))]
    )
    told = " ".join(capsys.readouterr().err.split())
    assert "schedule.kind: 'constant' in the run, 'trapezoid' now" in told
    assert "training.images: 96 in the run, 160 now" in told


def test_run_follows_its_learning_rate_and_resumes_in_it(tiny, tmp_path):
    schedule = "training.optimizer.schedule={kind='inverse', inv_gamma=2, warmup=0.5}"
    Trainer(config.load(tiny, [schedule]), tmp_path / "whole").fit()
    rates = [line["lr"] for line in lines(tmp_path / "whole")]
    expected = [5e-4 * (1 - 0.5 ** (k + 1)) / (1 + k / 2) for k in range(6)]
    assert rates == pytest.approx(expected, rel=1e-12)
    for images in (32, 96):
        settings = config.load(tiny, [schedule, f"training.images={images}"])
        trainer = Trainer(settings, tmp_path / "parts")
        trainer.fit()
    assert [line["lr"] for line in lines(tmp_path / "parts")] == rates
    used = {group["lr"] for group in trainer.optimizer.param_groups}
    assert max(used) == pytest.approx(expected[-1])
    assert min(used) == pytest.approx(expected[-1] / 3)  # of the mapping network


def test_noise_scale_is_in_the_metrics_and_survives_a_resume(tiny, tmp_path):
    wanted = ["training.accumulate=4", "training.gradient_noise_scale=true"]
    Trainer(config.load(tiny, wanted), tmp_path / "whole").fit()
    scales = [line["gradient_noise_scale"] for line in lines(tmp_path / "whole")]
    assert all(scale > 0 for scale in scales)
    for images in (64, 96):
        settings = config.load(tiny, [*wanted, f"training.images={images}"])
        Trainer(settings, tmp_path / "parts").fit()
    assert [line["gradient_noise_scale"] for line in lines(tmp_path / "parts")] == scales


def test_noise_scale_sees_the_gradients_of_a_part_and_of_the_whole_batch(tiny, tmp_path):
    overrides = ["training.accumulate=4", "training.gradient_noise_scale=true"]
    lr = "training.optimizer.lr=1e-12"  # so that the weights stay as they are
    trainer = Trainer(config.load(tiny, [*overrides, lr, "training.images=16"]), tmp_path)
    batches, told, objective = [], [], trainer.objective

    def record(batch):
        batches.append(batch)
        return objective(batch)

    trainer.objective = record
    trainer.noise_scale.update = lambda *given: told.append(given)
    trainer._step(trainer.open_stream())
    parameters = [p for p in trainer.backbone.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    squares = []
    for i, batch in enumerate(batches):
        objective(batch).mean().backward()  # adds up
        square = sum(p.grad.double().square().sum().item() for p in parameters)
        squares.append(square / (i + 1) ** 2)
    [(small, whole, part, batch_size)] = told
    assert (part, batch_size) == (4, 16)
    assert small.item() == pytest.approx(squares[0], rel=1e-4)
    assert whole.item() == pytest.approx(squares[-1], rel=1e-4)


def test_noise_scale_of_a_batch_that_is_taken_whole_is_refused(tiny):
    with pytest.raises(ConfigError, match="gradient_noise_scale: compares the gradients"):
        config.load(tiny, ["training.gradient_noise_scale=true"])
