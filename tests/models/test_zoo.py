"""The counts of the reference implementations (exact) and the figures that the papers print.

The papers' "GFLOP" are multiply-accumulates. DiT's printed parameters leave its fixed position
table out: with it, B/2 would print as 131 and XL/2 with adaLN as 601.
"""

from pathlib import Path

import pytest
import torch
from known_answers import load
from test_cost import shown, total

from hdit.config import load as load_config
from hdit.errors import UserError
from hdit.models import DiT, DiTSpec, build, zoo
from hdit.models.cost import cost
from hdit.protocols import DataShape


def printed(figure: str) -> object:
    """Equal to a printed figure within 0.1 percent, or one unit of its last digit."""
    return pytest.approx(float(figure), rel=0, abs=shown(figure))


# ---- DiT -----------------------------------------------------------------------------------------

LATENT = DataShape(4, 32, 32, 1000, 1.0)
COUNTS = load("dit_params_flops.json")


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: f"{row['model']}-{row['latent']}")
def test_zoo_dit_has_the_counts_of_the_reference(row):
    shape = DataShape(4, row["latent"], row["latent"], 1000, 1.0)
    spec = zoo.dit(row["model"])
    params, macs = total(spec, shape, 8)  # 8: the variance too
    with torch.device("meta"):  # shapes without values
        model = DiT(spec, shape, out_channels=8)
    assert params == row["params_excl_pos_embed"] == sum(p.numel() for p in model.parameters())
    assert params + model.pos_embed.numel() == row["params_total"]
    assert model.pos_embed.shape[0] * model.pos_embed.shape[1] == row["tokens"]
    assert len(model.state_dict()) == row["state_tensors"]
    assert macs == row["flop_counter"] / 2


@pytest.mark.parametrize(
    ("name", "gmacs", "millions"),
    [
        ("DiT-S/8", "0.36", "33"),
        ("DiT-S/4", "1.41", "33"),
        ("DiT-S/2", "6.06", "33"),
        ("DiT-B/8", "1.42", "131"),
        ("DiT-B/4", "5.56", "130"),
        ("DiT-B/2", "23.01", "130"),
        ("DiT-L/8", "5.01", "459"),
        ("DiT-L/4", "19.70", "458"),
        ("DiT-L/2", "80.71", "458"),
        ("DiT-XL/8", "7.39", "676"),
        ("DiT-XL/4", "29.05", "675"),
        ("DiT-XL/2", "118.64", "675"),
    ],
)
def test_zoo_dit_costs_what_the_paper_prints(name, gmacs, millions):
    params, macs = total(zoo.dit(name), LATENT, 8)
    assert macs / 1e9 == printed(gmacs)
    assert round(params / 1e6) == int(millions)


def test_zoo_dit_xl_2_of_512_pixels_costs_what_the_paper_prints():
    _, macs = total(zoo.dit("DiT-XL/2"), DataShape(4, 64, 64, 1000, 1.0), 8)
    assert macs / 1e9 == printed("524.6")


@pytest.mark.parametrize(
    ("kind", "gmacs", "millions"),
    [
        ("in_context", "119.37", "449"),
        ("cross_attention", "137.62", "598"),
        ("adaln", "118.56", "600"),
        ("adaln_zero", "118.64", "675"),
    ],
)
def test_zoo_dit_of_each_conditioning_costs_what_the_paper_prints(kind, gmacs, millions):
    settings = zoo.dit("DiT-XL/2").model_dump() | {"conditioning": {"kind": kind}}
    params, macs = total(DiTSpec.model_validate(settings), LATENT, 8)
    assert macs / 1e9 == printed(gmacs)
    assert round(params / 1e6) == int(millions)


# ---- HDiT ----------------------------------------------------------------------------------------

SIGNALS = {
    "hdit-imagenet128": DataShape(3, 128, 128, 1000, 0.5),
    "hdit-ffhq1024": DataShape(3, 1024, 1024, 0, 0.5),
    "hdit-imagenet256": DataShape(3, 256, 256, 1000, 0.5),
    "hdit-imagenet256-m": DataShape(3, 256, 256, 1000, 0.5),
    "hdit-imagenet256-s": DataShape(3, 256, 256, 1000, 0.5),
    "hdit-oxford-flowers": DataShape(3, 256, 256, 0, 0.5),
    "hdit-oxford-flowers-shifted-window": DataShape(3, 256, 256, 0, 0.5),
    "hdit-cifar10": DataShape(3, 32, 32, 10, 0.5),
    "hdit-mnist": DataShape(1, 28, 28, 10, 0.6162),
}


@pytest.mark.parametrize("name", zoo.HDIT)
def test_zoo_hdit_fits_the_images_that_it_is_for(name):
    zoo.hdit(name).check(SIGNALS[name])


@pytest.mark.parametrize(
    ("name", "params", "buffers", "tensors", "gmacs"),
    [
        ("hdit-oxford-flowers", 22_361_274, 1_728, 117, "11.636"),
        ("hdit-oxford-flowers-shifted-window", 22_361_274, 1_728, 117, "11.730"),
        ("hdit-cifar10", 20_981_809, 1_664, 83, "1.967"),
        ("hdit-mnist", 9_187_360, 1_536, 80, "0.347"),
        ("hdit-ffhq1024", 85_079_300, None, 171, "206.08"),
        ("hdit-imagenet256", 557_416_522, None, 214, "197.59"),
        ("hdit-imagenet128", 117_003_805, None, None, "31.4"),
    ],
)
def test_zoo_hdit_has_the_counts_of_the_reference(name, params, buffers, tensors, gmacs):
    spec, shape = zoo.hdit(name), SIGNALS[name]
    with torch.device("meta"):
        model = build(spec, shape)
    counted, macs = total(spec, shape, shape.channels)
    assert counted == params == sum(p.numel() for p in model.parameters())
    assert buffers in (None, sum(b.numel() for b in model.buffers()))
    assert tensors in (None, len(model.state_dict()))
    assert f"{macs / 1e9:.{len(gmacs.partition('.')[2])}f}" == gmacs


@pytest.mark.parametrize(
    ("name", "gmacs", "millions"),
    [
        ("hdit-imagenet128", "31.4", "117.0"),
        ("hdit-ffhq1024", "206.1", "85.08"),
        ("hdit-imagenet256", "197.6", "557.4"),
        ("hdit-imagenet256", "198", "557"),
        ("hdit-imagenet256-m", "115", "301.8"),
        ("hdit-imagenet256-s", "60", "138.7"),
    ],
)
def test_zoo_hdit_costs_what_the_paper_prints(name, gmacs, millions):
    params, macs = total(zoo.hdit(name), SIGNALS[name], 3)
    assert macs / 1e9 == printed(gmacs)
    assert params / 1e6 == printed(millions)


@pytest.mark.parametrize(
    ("name", "local"), [("hdit-imagenet128", 1), ("hdit-ffhq1024", 3), ("hdit-imagenet256", 2)]
)
def test_zoo_hdit_is_that_of_table_7(name, local):
    spec, shape = zoo.hdit(name), SIGNALS[name]
    assert spec.patch_size == 4
    assert [level.attention.kind == "neighborhood" for level in spec.levels] == [
        i < local for i in range(len(spec.levels))
    ]
    assert spec.grids(shape)[-1] == (16, 16)
    assert all(level.d_ff == 3 * level.width for level in spec.levels)
    assert {level.attention.d_head for level in spec.levels} == {64}
    assert {level.attention.kernel_size for level in spec.levels[:local]} == {7}
    dropouts = [level.dropout for level in spec.levels]
    assert dropouts == ([0, 0, 0, 0, 0.1] if name == "hdit-ffhq1024" else [0] * len(dropouts))


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "name", "first"),
    [
        (zoo.dit, "DiT-XL/3", "DiT-XL/"),
        (zoo.dit, "dit-b/4", "DiT-B/4, "),
        (zoo.hdit, "hdit-ffhq-1024", "hdit-ffhq1024, "),
        (zoo.hdit, "", ""),
    ],
)
def test_zoo_names_the_nearest_model_first(find, name, first):
    with pytest.raises(UserError) as error:
        find(name)
    message = str(error.value)
    assert message.startswith(f"no model is called {name!r}; the nearest first, there are {first}")
    names = message.partition("there are ")[2].split(", ")
    assert sorted(names) == sorted(zoo.DIT if find is zoo.dit else zoo.HDIT)


def test_zoo_holds_every_size_and_patch_of_the_paper():
    names = [f"DiT-{size}/{p}" for size in ("S", "B", "L", "XL") for p in (2, 4, 8)]
    assert list(zoo.DIT) == names


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_config_of_a_dit_is_the_model_of_its_name(size):
    config = load_config(CONFIGS / f"dit-{size.lower()}-2-256.toml")
    assert config.model == zoo.dit(f"DiT-{size}/2")
    shape = config.data_shape(1000)
    assert shape == LATENT
    [counts] = [row for row in COUNTS if (row["model"], row["latent"]) == (f"DiT-{size}/2", 32)]
    rows = cost(config.model, shape, config.output_channels(shape))
    assert sum(row.params for row in rows) == counts["params_excl_pos_embed"]
    assert sum(row.macs for row in rows) == counts["flop_counter"] / 2


def test_config_of_the_dit_of_512_sees_latents_of_64():
    config = load_config(CONFIGS / "dit-xl-2-512.toml")
    assert config.data_shape(1000) == DataShape(4, 64, 64, 1000, 1.0)
    assert config.model == zoo.dit("DiT-XL/2")


@pytest.mark.parametrize(
    ("name", "classes", "params", "gmac"),
    [
        ("hdit-oxford-flowers", 0, 22_361_274, 11.636),
        ("hdit-ffhq1024", 0, 85_079_300, 206.08),
        ("hdit-imagenet256", 1000, 557_416_522, 197.59),
        ("hdit-imagenet128", 1000, 117_003_805, 31.37),
    ],
)
def test_config_is_the_model_of_its_name(name, classes, params, gmac):
    config = load_config(CONFIGS / f"{name}.toml")
    assert config.model == zoo.hdit(name).resolved()
    rows = cost(config.model, config.data_shape(classes))
    assert sum(row.params for row in rows) == params
    assert sum(row.macs for row in rows) / 1e9 == pytest.approx(gmac, abs=0.005)
