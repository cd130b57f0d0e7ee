"""Compiled blocks compute what plain ones do, in few graphs."""

import warnings
from functools import partialmethod

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from hdit import config
from hdit.data import augmentation
from hdit.models import DiTSpec, HDiTSpec, build
from hdit.protocols import Cond, DataShape
from hdit.training.trainer import Trainer

SHAPE = DataShape(3, 32, 32, 5, 0.5)
SPECS = {
    "hdit": HDiTSpec.model_validate({
        "patch_size": 2,
        "levels": [{"depth": 2, "width": 32}, {"depth": 1, "width": 64, "dropout": 0.1}],
        "local_attention": {"kind": "neighborhood", "d_head": 16, "kernel_size": 5},
    }),
    "hdit-gate": HDiTSpec.model_validate({
        "patch_size": 4, "norm": "ada_ln", "output_gate": True, "positions": "additive",
        "levels": [{"depth": 2, "width": 32, "attention": {
            "kind": "shifted_window", "d_head": 16, "window_size": 4}}],
    }),
    "hdit-none": HDiTSpec.model_validate({
        "patch_size": 4, "feed_forward": "gelu", "levels": [
            {"depth": 2, "width": 32, "attention": {"kind": "none"}},
            {"depth": 1, "width": 32, "attention": {"kind": "global", "d_head": 16}}]}),
    "dit": DiTSpec(patch_size=4, depth=3, width=48, num_heads=3),
    **{
        f"dit-{kind}": DiTSpec.model_validate({
            "patch_size": 4, "depth": 2, "width": 48, "num_heads": 3,
            "conditioning": {"kind": kind}})
        for kind in ("adaln", "in_context", "cross_attention")
    },
}  # fmt: skip
KINDS = {"hdit": 2, "hdit-gate": 2, "hdit-none": 2}
"""Graphs: one for each level, or for layers that shift their windows and that do not; DiT has 1."""


@pytest.fixture(autouse=True)
def fresh():
    """Without what was compiled before, and with torch's own limit restored after."""
    with torch._dynamo.config.patch(recompile_limit=8), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile itself
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()


def make(spec):
    torch.manual_seed(0)
    model = build(spec, SHAPE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def step(model, size=32, seed=1):
    """Output and gradients of a batch of two."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, size, size, generator=rng)
    out = model(x, torch.tensor([0.2, -0.4]), Cond(torch.tensor([1, 4])))
    out.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), gradients


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def eagerly(module, compile_module, **options):
    """As Module.compile, with the graphs run as they are: inductor takes ten seconds each."""
    compile_module(module, backend="aot_eager", **options)


def compile_eagerly(model, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(eagerly, torch.nn.Module.compile))
    model.compile_blocks()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_compiled_blocks_give_the_same_outputs_and_gradients(spec, checkpointing, monkeypatch):
    plain, compiled = make(spec).eval(), make(spec).eval()
    if checkpointing:
        plain.checkpoint_blocks()
        compiled.checkpoint_blocks()
    names = list(compiled.state_dict())
    compile_eagerly(compiled, monkeypatch)
    assert list(compiled.state_dict()) == names  # no _orig_mod
    for actual, expected in zip(step(compiled), step(plain), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert graphs() > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_steps_compile_nothing_more_and_layers_alike_share_a_graph(spec, monkeypatch):
    model = make(spec).train()
    compile_eagerly(model, monkeypatch)
    step(model)
    first = graphs()
    assert first == KINDS.get(next(n for n, s in SPECS.items() if s is spec), 1)
    for seed in range(3):
        step(model, seed=seed)
        for parameter in model.parameters():  # as an optimizer does
            parameter.data.add_(0.01)
    assert graphs() == first


def test_each_resolution_compiles_once(monkeypatch):
    spec = SPECS["hdit"]
    model = make(spec).eval()
    compile_eagerly(model, monkeypatch)
    sizes = (32, 40, 48, 56, 64)  # torch's own limit of 8 graphs would not take these
    for _ in range(2):
        for size in sizes:
            step(model, size)
        assert graphs() == 2 * len(sizes)


def test_a_block_compiles_with_inductor_and_samples_in_inference_mode():
    spec = HDiTSpec.model_validate({"patch_size": 4, "levels": [{"depth": 1, "width": 64}]})
    plain, compiled = make(spec).eval(), make(spec).eval()
    compiled.compile_blocks()
    x, c_noise = torch.randn(1, 3, 32, 32), torch.zeros(1)
    with torch.inference_mode():
        expected = plain(x, c_noise, Cond(torch.tensor([1])))
        actual = compiled(x, c_noise, Cond(torch.tensor([1])))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_steps_of_training_compile_in_the_first_alone(spec, precision, tmp_path, monkeypatch):
    """With augmentation, dropped labels and an accumulated batch, as a run has them."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(eagerly, torch.nn.Module.compile))
    monkeypatch.setattr(augmentation, "_compiled_resample", lambda: augmentation.resample)
    raw = {
        "data": {"kind": "shapes", "size": 32, "augment": 0.5 if spec.kind == "hdit" else 0},
        "model": spec.model_dump(mode="json", exclude_none=True),
        "training": {
            "images": 64, "checkpoint_every": 64, "batch_size": 8, "accumulate": 2,
            "compile": True, "precision": precision, "gradient_noise_scale": True,
        },
        "sampling": {"grid": 0},
    }  # fmt: skip
    trainer = Trainer(config.parse(raw, "test"), tmp_path)
    step, seen = trainer._step, []

    def watched(stream):
        with torch._dynamo.config.patch(error_on_recompile=bool(seen)):
            result = step(stream)
        seen.append(graphs())
        return result

    monkeypatch.setattr(trainer, "_step", watched)
    assert trainer.fit()
    assert len(seen) == 8
    assert set(seen) == {KINDS.get(next(n for n, s in SPECS.items() if s is spec), 1)}
    assert not counters["graph_break"]


def test_a_compiled_warp_is_the_warp():
    images = torch.randint(0, 256, (3, 1, 12, 10), dtype=torch.uint8)
    setting = augmentation.Augmentation(probability=0.8)
    plain, compiled = (setting(images, 0, np.arange(3), on) for on in (False, True))
    torch.testing.assert_close(compiled[0], plain[0], atol=255e-5, rtol=0)  # sums of 16 products
    assert torch.equal(compiled[1], plain[1])
