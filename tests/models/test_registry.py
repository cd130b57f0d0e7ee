"""A backbone from outside the project: what it takes, and that nothing else asks for its class."""

import ast
import tomllib
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import nn

from hdit.config import ConfigError, load
from hdit.models import BackboneModule, BackboneSpec, DiT, DiTSpec, backbone, build, register
from hdit.models.cost import cost
from hdit.models.memory import training_memory
from hdit.nn.checkpointing import Runs
from hdit.protocols import DataShape, Group, PartCost
from hdit.runs.checkpoint import find

REPOSITORY = Path(__file__).parents[2]

CONFIG = """
[data]
kind = "digits"

[model]
kind = "toy"
width = 6
depth = 2

[training]
images = 64
checkpoint_every = 32
batch_size = 16
gradient_checkpointing = true
precision = "fp32"

[sampling]
steps = 2
grid = 4
"""


class ToySpec(BackboneSpec):
    c_noise: ClassVar[str] = "atan"

    kind: Literal["toy"] = "toy"
    width: int = Field(gt=0)
    depth: int = Field(2, gt=0)

    @property
    def multiple(self) -> int:
        return 1


class ToyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).tanh()


class Toy(BackboneModule, Runs):
    def __init__(self, spec, shape, out_channels=None):
        super().__init__()
        spec.check(shape)
        self.spec = spec
        self.first = nn.Conv2d(shape.channels + 1, spec.width, 1)
        self.blocks = nn.ModuleList(ToyBlock(spec.width) for _ in range(spec.depth))
        self.last = nn.Conv2d(spec.width, out_channels or shape.channels, 1)

    def parameter_group(self, name):
        return Group(decay=name.endswith("weight"))

    def parts(self, shape):
        grid = shape.height, shape.width
        pixels = shape.height * shape.width
        names = {"first": "in", "blocks": "convolutions", "last": "out"}
        sizes = {name: p.numel() for name, p in self.named_parameters() if "weight" in name}
        macs = {p: pixels * sum(n for k, n in sizes.items() if k.startswith(p)) for p in names}
        return [PartCost(name, grid, self.count(f"{p}."), macs[p]) for p, name in names.items()]

    def forward(self, x, c_noise, cond):
        level = c_noise[:, None, None, None].expand(-1, 1, *x.shape[2:])
        x = self.first(torch.cat([x, level.to(x.dtype)], 1))
        for block in self.blocks:
            x = self.run(block, x)
        return self.last(x)


@pytest.fixture
def toy(tmp_path):
    """Registers the toy for one test -> a config of it."""
    register(ToySpec, Toy)
    path = tmp_path / "toy.toml"
    path.write_text(CONFIG)
    yield path
    del BackboneSpec.members["toy"], backbone.MODULES["toy"]


def test_backbone_from_outside_trains_samples_and_is_described(toy, hdit, tmp_path):
    run = tmp_path / "run"
    status, _, err = hdit("train", toy, "--run", run)
    assert status == 0, err
    assert "toy of " in err
    assert find(run, print).state.images == 64
    status, _, err = hdit("train", toy, "--run", run, "--set", "training.images=96")
    assert status == 0, err
    assert "at 64 images" in err
    status, said, err = hdit("sample", run, "-n", 2, "--out", tmp_path / "out")
    assert status == 0, err
    assert (tmp_path / "out" / "000001.png").exists()
    status, said, err = hdit("info", toy, "--device", "cpu")
    assert status == 0, err
    for word in ("toy at 1 x 8 x 8", "convolutions", "activations of blocks"):
        assert word in said


def test_backbone_from_outside_is_read_resolved_and_written_as_the_others(toy):
    config = load(toy)
    assert isinstance(config.model, ToySpec)
    assert config.diffusion.c_noise == "atan"
    assert tomllib.loads(config.dump())["model"] == {"kind": "toy", "width": 6, "depth": 2}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.width=0", "model.width: must be greater than 0, got 0"),
        ("model.deepth=3", "model.deepth: unknown key (set to 3); did you mean model.depth?"),
        ("model.num_heads=3", "model.num_heads: unknown key (set to 3); it belongs to kind 'dit'"),
        ("model.kind=toi", "must be one of ['hdit', 'dit', 'toy'], got 'toi'; did you mean 'toy'?"),
        ("model=toy", "model: must be a table, got 'toy'; write model = { kind = 'toy' }"),
        ("data.augment=0.1", "data.augment: must be 0: it would leak into the samples of a toy"),
    ],
)
def test_backbone_from_outside_has_the_errors_of_the_others(toy, override, complaint):
    with pytest.raises(ConfigError) as error:
        load(toy, [override])
    assert complaint in str(error.value)


def test_backbone_from_outside_has_its_cost_and_memory_counted(toy):
    shape = DataShape(1, 8, 8, 0, 0.5)
    model, rows = build(ToySpec(width=6), shape), cost(ToySpec(width=6), shape)
    assert sum(row.params for row in rows) == sum(p.numel() for p in model.parameters())
    assert [row.macs // 64 for row in rows] == [2 * 6, 2 * 6 * 6 * 9, 6]
    plain, less = (
        training_memory(ToySpec(width=6), shape, 2, checkpointing=on) for on in (False, True)
    )
    assert less.activations["blocks"] < plain.activations["blocks"]


def test_backbone_without_blocks_that_run_refuses_gradient_checkpointing():
    class Bare(BackboneModule):
        pass

    with pytest.raises(ValueError, match="no module of a Bare calls its blocks"):
        Bare().checkpoint_blocks()


def test_backbone_of_a_kind_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="there is a backbone of kind 'dit' already"):
        register(DiTSpec, DiT)


FREE = ("models", "interop")  # files of other projects are of one backbone each
SOURCES = [p for p in REPOSITORY.glob("hdit/**/*.py") if not {*FREE} & {*p.parts}]


def test_nothing_outside_the_models_asks_which_backbone_it_has():
    for path in SOURCES:
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert not names & {"HDiT", "DiT", "HDiTSpec", "DiTSpec"}, path
