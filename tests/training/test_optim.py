import copy
import math

import pytest
import torch
from known_answers import load
from torch import nn

from hdit.config.learning_rate import ConstantLR, ExponentialLR, InverseLR, Moment
from hdit.config.schema import OptimizerSpec
from hdit.models import DiT, DiTSpec, HDiT, HDiTSpec
from hdit.models.hdit import Level, Mapping
from hdit.nn.attention import Global
from hdit.protocols import DataShape
from hdit.training.noise_scale import GradientNoiseScale, squared
from hdit.training.optim import (
    adamw,
    load_optimizer,
    optimizer_tensors,
    set_learning_rate,
)


def restore(model, optimizer, tensors):
    def fill(targets):
        for name, target in targets.items():
            target.copy_(tensors[name])

    load_optimizer(model, optimizer, tensors, fill)


def small_dit() -> DiT:
    torch.manual_seed(0)
    return DiT(DiTSpec(patch_size=2, depth=1, width=16, num_heads=2), DataShape(1, 4, 4, 3, 0.5))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum((p * torch.arange(p.numel()).view_as(p).sin()).sum() for p in model.parameters()).backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_state_restored_by_name_continues_bitwise(fused):
    model = small_dit()
    optimizer = adamw(model, OptimizerSpec(lr=0.1), fused)
    step(model, optimizer)
    twin = copy.deepcopy(model)
    tensors = {name: t.clone() for name, t in optimizer_tensors(model, optimizer).items()}
    assert "exp_avg/blocks.0.mlp.fc1.weight" in tensors
    restored = adamw(twin, OptimizerSpec(lr=0.1), fused)
    restore(twin, restored, tensors)
    step(model, optimizer)
    step(twin, restored)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fused", [False, True])
def test_fused_and_plain_optimizers_read_each_other(fused):
    """One step by either, then one by the other, is two steps of AdamW."""
    spec = OptimizerSpec(lr=1e-3)
    model, plain = small_dit(), small_dit()
    first, both = adamw(model, spec, fused), adamw(plain, spec)
    step(model, first)
    second = adamw(model, spec, not fused)
    restore(model, second, optimizer_tensors(model, first))
    step(model, second)
    for _ in range(2):
        step(plain, both)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)  # one rounds in another order


def test_step_counters_lie_where_the_optimizer_looks_for_them():
    """A fused optimizer's with the parameters, any other's on the CPU: here meta is a GPU."""
    model = small_dit()
    optimizer = adamw(model, OptimizerSpec(), fused=True)
    step(model, optimizer)
    tensors = optimizer_tensors(model, optimizer)
    on_device = small_dit().to("meta")
    for fused in (True, False):
        restored = adamw(on_device, OptimizerSpec(), fused=False)
        for group in restored.param_groups:
            group["fused"] = fused  # torch makes no fused optimizer of meta tensors
        restore(on_device, restored, tensors)
        devices = {kind: set() for kind in ("step", "exp_avg", "exp_avg_sq")}
        for state in restored.state.values():
            for kind, value in state.items():
                devices[kind].add(value.device.type)
        step_on = "meta" if fused else "cpu"
        assert devices == {"step": {step_on}, "exp_avg": {"meta"}, "exp_avg_sq": {"meta"}}


def test_adamw_decays_matrices_only_and_scales_the_learning_rate_of_a_group():
    model = small_dit()
    optimizer = adamw(model, OptimizerSpec(lr=0.1, weight_decay=0.3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay["blocks.0.mlp.fc1.weight"] == 0.3
    assert decay["blocks.0.mlp.fc1.bias"] == 0
    assert decay["y_embedder.weight"] == 0
    assert decay.keys() == set(names.values())


@pytest.mark.parametrize(
    ("name", "schedule", "lr"),
    [
        (
            "InverseLR(base 5e-4,inv_gamma 20000,power 1,warmup .99)",
            InverseLR(inv_gamma=20000, warmup=0.99),
            5e-4,
        ),
        (
            "InverseLR(base 5e-4,inv_gamma 1,power .5,warmup 0,min_lr 1e-5)",
            InverseLR(inv_gamma=1, power=0.5, min_lr=1e-5),
            5e-4,
        ),
        (
            "ExponentialLR(base 5e-4,num_steps 1000,decay .5,warmup .99)",
            ExponentialLR(steps=1000, decay=0.5, warmup=0.99),
            5e-4,
        ),
        ("ConstantLRWithWarmup(base 5e-4,warmup .995)", ConstantLR(warmup=0.995), 5e-4),
    ],
)
def test_learning_rate_matches_the_reference(name, schedule, lr):
    for step, expected in load("schedules_ema_lr.json")[name].items():
        assert schedule(Moment(int(step), 0, 1), lr) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_reaches_every_group_in_its_proportion():
    model = HDiT(
        HDiTSpec(patch_size=1, mapping=Mapping(depth=1, width=16), levels=(
            Level(depth=1, width=16, attention=Global(d_head=8)),)),
        DataShape(1, 4, 4, 0, 0.5),
    )  # fmt: skip
    spec = OptimizerSpec(lr=0.3, schedule=ExponentialLR(steps=2, decay=0.25))
    optimizer = adamw(model, spec)
    set_learning_rate(optimizer, spec, Moment(1, 0, 1))
    assert {round(group["lr"], 12) for group in optimizer.param_groups} == {0.15, 0.05}


def test_noise_scale_matches_the_reference():
    name = "gns(beta .9; updates (2.0,1.5,8,32),(1.8,1.6,8,32))"
    first, second, unbiased = load("schedules_ema_lr.json")[name]
    scale = GradientNoiseScale(beta=0.9)
    scale.update(2.0, 1.5, 8, 32)
    assert scale.scale == pytest.approx(first, rel=1e-12)
    scale.update(1.8, 1.6, 8, 32)
    assert scale.scale == pytest.approx(second, rel=1e-12)
    assert scale.unbiased() == pytest.approx(unbiased, rel=1e-12)


def test_noise_scale_is_that_of_gradients_of_known_noise():
    """Gradients of an image are N(1, 9) in 50 dimensions: the scale is 9 / 1 images."""
    generator = torch.Generator().manual_seed(0)
    scale = GradientNoiseScale(beta=0.999)
    for _ in range(4000):
        gradients = 1 + 3 * torch.randn(32, 50, generator=generator)
        squares = (g.mean(0).square().sum().item() for g in (gradients[:8], gradients))
        scale.update(*squares, 8, 32)
    # an average over 1,000 updates, each with a standard deviation near 7 for the variance of 450
    assert scale.scale == pytest.approx(9, rel=0.03)


def test_noise_scale_of_tensors_stays_a_tensor_until_it_is_asked_for():
    numbers, tensors = GradientNoiseScale(), GradientNoiseScale()
    for i in range(200):
        small, square = 2.0 + i / 7, 1.5 + i / 11
        numbers.update(small, square, 8, 32)
        squares = (torch.tensor(x, dtype=torch.float64) for x in (small, square))
        tensors.update(*squares, 8, 32)
    assert isinstance(tensors.square, torch.Tensor)
    assert tensors.scale == pytest.approx(numbers.scale, rel=1e-12)
    assert GradientNoiseScale(*tensors.state()).scale == tensors.scale


def test_noise_scale_of_large_gradients_is_theirs_and_that_of_ruined_ones_is_left_out():
    scale = GradientNoiseScale(beta=0.9)
    small, norm = torch.tensor(2e19), torch.tensor(1.9e19)  # whose squares float32 cannot hold
    scale.update(squared(small), squared(norm), 8, 32)
    variance = (float(small) ** 2 - float(norm) ** 2) / (1 / 8 - 1 / 32)
    assert scale.unbiased()[1] == pytest.approx(variance, rel=1e-12)
    before = scale.state()[:2]
    scale.update(torch.tensor(math.inf), torch.tensor(math.nan), 8, 32)
    assert scale.state()[:2] == before
