"""The rows of HDiT's ablation, as overlays in configs/ablation, and their printed MACs."""

from pathlib import Path

import pytest

from hdit.config import RunConfig, merge, parse, read_toml
from hdit.models.cost import cost

ROWS = Path(__file__).parents[2] / "configs" / "ablation"

# Crowson et al., 2024, tables 1 and 5: GMAC at 128, 256 and 512. E2 and E3 differ from E in the
# loss alone; F1 to H are not printed, and measured here against what each adds.
PRINTED = {
    "r1": (106, 657, 6341),
    "r2": (106, 657, 6341),
    "r3": (106, 657, 6341),
    "r4": (106, 657, 6341),
    "a": (32, 114, 1060),
    "b1": (29, 60, 185),
    "b2": (29, 60, 184),
    **dict.fromkeys(["c", "d", "e", "e2", "e3", "f2"], (31, 65, 198)),
}


def row(name: str, size: int = 128) -> RunConfig:
    raw = read_toml(ROWS / f"{name}.toml")
    if size > 128 and not name.startswith("r"):
        raw = merge(raw, read_toml(ROWS / f"size{size}.toml"))
    raw["data"]["size"] = size
    return parse(raw, name)


def gmac(config: RunConfig) -> float:
    shape = config.data_shape(1000)
    return sum(r.macs for r in cost(config.model, shape, config.output_channels(shape))) / 1e9


@pytest.mark.parametrize("name", PRINTED)
def test_row_costs_what_the_paper_prints(name):
    for size, printed in zip((128, 256, 512), PRINTED[name], strict=True):
        assert gmac(row(name, size)) == pytest.approx(printed, abs=1, rel=1e-3)


def test_every_overlay_is_a_row_or_a_size():
    found = {path.stem for path in ROWS.glob("*.toml")}
    assert found == {*PRINTED, "f1", "g", "h", "base", "size256", "size512"}


@pytest.mark.parametrize(
    ("name", "base", "extra"),
    [
        ("f1", "e", 32 * 32 * 2 * 384 * 384),  # tokens of the skip, twice the width to the width
        ("g", "e", (4 * 2 * 384 + 11 * 2 * 768) * 768),  # a shift beside each scale
        ("h", "g", (4 * 2 * 384 + 11 * 2 * 768) * 768 - 32**2 * 4 * 384**2 - 16**2 * 11 * 768**2),
    ],
)
def test_row_without_a_printed_figure_adds_what_its_change_is(name, base, extra):
    """H: gates, and 2 x 4 x d^2 instead of 3 x 3 x d^2 for each token and layer."""
    assert gmac(row(name)) * 1e9 - gmac(row(base)) * 1e9 == pytest.approx(extra, abs=1)


@pytest.mark.parametrize(
    ("name", "base", "changes"),
    [
        ("r4", "r3", {"diffusion.weighting"}),
        ("b1", "a", {"model.levels"}),
        ("b2", "a", {"model.levels"}),
        ("c", "b2", {"model.levels", "model.feed_forward"}),
        ("d", "c", {"model.positions"}),
        ("e", "d", {"diffusion.weighting"}),
        ("e2", "e", {"diffusion.weighting"}),
        ("e3", "e2", {"diffusion.weighting"}),
        ("f1", "e", {"model.skip"}),
        ("f2", "e", {"model.skip"}),
        ("g", "e", {"model.norm"}),
        ("h", "g", {"model.feed_forward", "model.output_gate", "model.levels"}),
    ],
)
def test_row_changes_one_thing(name, base, changes):
    """Of the resolved levels, the attention or the hidden width that the change brings."""
    new, old = row(name), row(base)
    assert new.training == old.training
    found = {
        f"{part}.{key}"
        for part in ("model", "diffusion")
        for key in type(getattr(new, part)).model_fields
        if getattr(getattr(new, part), key) != getattr(getattr(old, part), key)
    }
    assert found == changes
