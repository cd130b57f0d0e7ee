"""Steps that are not finite change nothing, and a run goes back from many; spikes are named."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from hdit import config
from hdit.config.schema import OptimizerSpec
from hdit.runs import checkpoint
from hdit.training.guards import SETTLED, Guard, Spikes, first_bad_module, take_step
from hdit.training.metrics import TrainingError
from hdit.training.trainer import Trainer

STEP = 16  # images


@pytest.fixture
def tiny(trained):
    return trained.parent / "tiny.toml"


def state_of(trainer):
    """All that a step may change, as copies."""
    optimizer = [t.clone() for s in trainer.optimizer.state.values() for t in s.values()]
    weights = [*trainer.backbone.state_dict().values(), *trainer.ema.state_dict().values()]
    return [t.clone() for t in weights] + optimizer


def poison(trainer, at, values=(math.nan,)):
    """Makes the loss of the steps that begin at these images one of the values, in turn."""
    objective, poisoned = trainer.objective, []

    def changed(batch):
        loss = objective(batch)
        if int(batch.counters[0]) in at:
            loss = loss * values[len(poisoned) % len(values)]
            poisoned.append(int(batch.counters[0]))
        return loss

    trainer.objective = changed
    return poisoned


def events(run):
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_step_that_is_not_finite_changes_nothing_and_is_told_of(tiny, tmp_path, value, fused):
    trainer = Trainer(config.load(tiny, ["sampling.grid=0"]), tmp_path)
    for group in trainer.optimizer.param_groups:
        group["fused"] = fused
        group["foreach"] = False if fused else None
    poison(trainer, {3 * STEP}, (value,))
    step, states = trainer._step, []

    def watched(stream):
        states.append(state_of(trainer))
        return step(stream)

    trainer._step = watched
    assert trainer.fit()
    states.append(state_of(trainer))
    for i in range(1, 6):
        same = [torch.equal(a, b) for a, b in zip(states[i], states[i + 1], strict=True)]
        assert all(same) == (i == 3), f"step {i}"
    [event] = [e for e in events(tmp_path) if e["kind"] == "step skipped"]
    assert event["images"] == 3 * STEP
    assert event["counters"] == list(range(3 * STEP, 4 * STEP))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert ["loss" in line for line in lines] == [True] * 3 + [False] + [True] * 2


def test_first_module_that_gives_what_is_not_finite_is_named():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.SiLU())
    assert first_bad_module(network, lambda: network(torch.ones(1, 2))) is None
    with torch.no_grad():
        network[1][1].weight.fill_(math.inf)
    assert first_bad_module(network, lambda: network(torch.ones(1, 2))) == "1.1"
    assert not any(module._forward_hooks for module in network.modules())


def test_run_goes_back_to_its_last_checkpoint_and_past_those_images(tiny, tmp_path):
    """Two bad steps in a row: from 64 images back to 32, and on with the images from 64 on."""
    overrides = ["sampling.grid=0", "training.guard.patience=2", "training.images=160"]
    trainer = Trainer(config.load(tiny, overrides), tmp_path)
    drawn = []
    objective = trainer.objective
    trainer.objective = lambda batch: (drawn.append(int(batch.counters[0])), objective(batch))[1]
    poison(trainer, {2 * STEP, 3 * STEP})
    assert trainer.fit()
    [event] = [e for e in events(tmp_path) if e["kind"] == "rollback"]
    assert event["images"] == 32
    state = checkpoint.find(tmp_path, print).state
    assert (state.images, state.passed_over) == (160, 4 * STEP - 32)
    assert sorted(set(drawn)) == list(range(0, 160 + state.passed_over, STEP))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == list(range(STEP, 161, STEP))
    again = Trainer(config.load(tiny, [*overrides, "training.images=176"]), tmp_path)
    assert again.passed_over == state.passed_over
    assert again.fit()
    assert checkpoint.find(tmp_path, print).state.passed_over == state.passed_over


def test_line_after_going_back_from_a_snapshot_has_none_of_the_steps_before(tiny, tmp_path):
    """The snapshot after 48 images is ruined; the line at 64 is of the steps done anew."""
    overrides = ["sampling.grid=0", "training.log_every=32", "training.ema.widths=[0.1]"]
    overrides.append("training.ema.snapshot_every=48")
    trainer = Trainer(config.load(tiny, overrides), tmp_path)
    snapshot, step, losses = trainer.averages.snapshot, trainer._step, []

    def ruined():
        tensors = snapshot()
        if not trainer.rollbacks:
            next(iter(tensors["ema-width-0.1"].values())).fill_(math.nan)
        return tensors

    def noting(stream):
        before, at = float(trainer.metrics.loss), trainer.images
        norm = step(stream)
        losses.append((at, float(trainer.metrics.loss) - before))
        return norm

    trainer.averages.snapshot, trainer._step = ruined, noting
    assert trainer.fit()
    assert trainer.rollbacks == 1
    assert [images for images, _ in losses] == [0, 16, 32, 32, 48, 64, 80]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [32, 64, 96]
    assert lines[1]["loss"] == pytest.approx((losses[3][1] + losses[4][1]) / 2, rel=1e-6)


def test_run_goes_back_past_a_checkpoint_that_was_damaged_meanwhile(tiny, tmp_path):
    """It comes to the same number of images again, where the damaged one must not be in the way."""
    overrides = ["training.guard.patience=2", "training.images=128"]
    trainer = Trainer(config.load(tiny, overrides), tmp_path)
    poison(trainer, {4 * STEP, 5 * STEP})
    step, root = trainer._step, tmp_path / "checkpoints"

    def damaging(stream):
        if trainer.images == 4 * STEP:
            trainer.saver.finish()
            file = root / "000000000064" / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"?")
            trainer._step = step
        return step(stream)

    trainer._step = damaging
    assert trainer.fit()
    assert sorted(path.name for path in root.iterdir()) == [
        "000000000032",
        "000000000064",
        "000000000064.damaged",
        "000000000096",
        "000000000128",
        "latest",
    ]
    assert checkpoint.find(tmp_path, print).state.passed_over == 64


def test_line_after_a_rollback_is_of_the_steps_since(tiny, tmp_path):
    """From 112 images back to 64: the loss of the step from 64 on, which is undone, is no part."""
    overrides = ["training.guard.patience=2", "training.images=128", "training.log_every=64"]
    overrides += ["training.checkpoint_every=64", "sampling.grid=0"]
    trainer = Trainer(config.load(tiny, overrides), tmp_path)
    poison(trainer, {5 * STEP, 6 * STEP})
    losses, judge = [], trainer.guard.judge

    def watched(*arguments):
        bad, loss = judge(*arguments)
        losses.append(float(loss))
        return bad, loss

    trainer.guard.judge = watched
    assert trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [64, 128]
    assert len(losses) == 11
    assert lines[0]["loss"] == pytest.approx(np.mean(losses[:4]))
    assert lines[1]["loss"] == pytest.approx(np.mean(losses[7:]))


def test_run_that_diverges_again_and_again_ends_with_what_was_tried(tiny, tmp_path):
    overrides = ["sampling.grid=0", "training.guard.patience=1", "training.guard.rollbacks=2"]
    trainer = Trainer(config.load(tiny, [*overrides, "training.images=1600"]), tmp_path)
    poison(trainer, set(range(3 * STEP, 2000, STEP)))
    words = r"after going back 2 times: 1 steps in a row .*Lower training\.optimizer\.lr"
    with pytest.raises(TrainingError, match=words):
        trainer.fit()
    assert len([e for e in events(tmp_path) if e["kind"] == "rollback"]) == 2
    assert checkpoint.find(tmp_path, print).state.images == 32


def test_guard_counts_what_is_bad_in_a_row_and_keeps_few_batches():
    guard = Guard(processes=1)
    one, nan = torch.tensor(1.0), torch.tensor(math.nan)
    for i in range(40):
        bad, loss = guard.judge(i, nan if i in (5, 38, 39) else one, one, [])
        assert bad == (i in (5, 38, 39))
        assert (loss == 1) == (not bad)
    bad, _ = guard.judge(40, one, torch.tensor(math.inf), [])
    assert bad == 1
    steps = guard.read()
    assert [s.images for s in steps if not s.taken] == [5, 38, 39, 40]
    assert (guard.in_a_row, guard.skipped) == (3, 4)
    assert guard.read() == []


def test_fused_step_reads_on_the_device_whether_to_be_taken():
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=OptimizerSpec().lr, fused=True)
    weight.grad = torch.full((4,), math.nan)
    take_step(optimizer, torch.tensor(1.0))
    assert torch.equal(weight, torch.ones(4))
    weight.grad = torch.ones(4)
    take_step(optimizer, torch.tensor(0.0))
    assert not torch.equal(weight, torch.ones(4))
    assert optimizer.state[weight]["step"] == 1


def test_spikes_are_losses_far_above_the_running_mean():
    rng = np.random.default_rng(0)
    spikes = Spikes(8.0)
    losses = rng.normal(1.0, 0.1, 400)
    losses[[200, 203, 300]] = [3.0, 5.0, -9.0]
    found = {i: d for i, loss in enumerate(losses) if (d := spikes.spike(float(loss))) is not None}
    assert set(found) == {200, 203}, "not a low one"
    assert found[200] > 10
    assert SETTLED == 100


def test_loss_that_stays_high_is_not_told_of_for_ever():
    spikes = Spikes(8.0)
    rng = np.random.default_rng(0)
    told = [spikes.spike(float(x)) for x in rng.normal(1.0, 0.1, 300)]
    told += [spikes.spike(float(x)) for x in rng.normal(3.0, 0.1, 300)]
    assert 0 < sum(d is not None for d in told) < 50
