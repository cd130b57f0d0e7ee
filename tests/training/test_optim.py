import copy

import pytest
import torch
from known_answers import load
from torch import nn

from hdit.config import EMASpec, OptimizerSpec
from hdit.models import DiT, DiTSpec
from hdit.protocols import Signal
from hdit.training.optim import (
    adamw,
    ema_decay,
    load_optimizer_tensors,
    optimizer_tensors,
    update_ema,
)


@pytest.mark.parametrize("power", [0.6667, 0.75, 1.0])
def test_ema_decay_matches_the_reference(power):
    expected = load("schedules_ema_lr.json")[f"ema_warmup(power={power},max=.9999,inv_gamma=1)"]
    for step, decay in expected.items():
        assert ema_decay(int(step), EMASpec(power=power)) == pytest.approx(decay, rel=1e-12, abs=0)


def test_ema_is_the_running_average_in_closed_form():
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    model.register_buffer("table", torch.zeros(2))
    ema.register_buffer("table", torch.zeros(2))
    expected = torch.zeros(2, 3)
    for decay in (0.0, 0.5, 0.9):
        with torch.no_grad():
            model.weight.normal_()
            model.table += 1
        update_ema(ema, model, decay)
        expected = decay * expected + (1 - decay) * model.weight
    torch.testing.assert_close(ema.weight, expected)
    assert ema.table.tolist() == [3, 3]


def small_dit() -> DiT:
    torch.manual_seed(0)
    return DiT(DiTSpec(patch_size=2, depth=1, width=16, num_heads=2), Signal(1, 4, 4, 3, 0.5))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum((p * torch.arange(p.numel()).view_as(p).sin()).sum() for p in model.parameters()).backward()
    optimizer.step()


def test_optimizer_state_restored_by_name_continues_bitwise():
    model = small_dit()
    optimizer = adamw(model, OptimizerSpec(lr=0.1))
    step(model, optimizer)
    twin = copy.deepcopy(model)
    tensors = {name: t.clone() for name, t in optimizer_tensors(model, optimizer).items()}
    assert "exp_avg/blocks.0.mlp.fc1.weight" in tensors
    restored = adamw(twin, OptimizerSpec(lr=0.1))
    load_optimizer_tensors(twin, restored, tensors)
    step(model, optimizer)
    step(twin, restored)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adamw_decays_matrices_only_and_scales_the_learning_rate_of_a_group():
    model = small_dit()
    optimizer = adamw(model, OptimizerSpec(lr=0.1, weight_decay=0.3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay["blocks.0.mlp.fc1.weight"] == 0.3
    assert decay["blocks.0.mlp.fc1.bias"] == 0
    assert decay["y_embedder.weight"] == 0
    assert decay.keys() == set(names.values())
