import pytest
import torch
from test_hdit import FFHQ_1024, FLOWERS, IMAGENET_128, IMAGENET_256, local, paper_spec
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hdit.models import DiTSpec, HDiTSpec, build
from hdit.models.cost import cost
from hdit.protocols import Cond, DataShape

GLOBAL = {"kind": "global", "d_head": 8}
HDIT = {
    "patch_size": 2,
    "levels": [
        {"depth": 1, "width": 16, "attention": local(5)},
        {"depth": 2, "width": 24, "attention": local(3), "d_ff": 40},
        {"depth": 3, "width": 32, "attention": GLOBAL},
    ],
    "mapping": {"depth": 2, "width": 18},
}
DIT = DiTSpec(patch_size=2, depth=2, width=24, num_heads=3, mlp_ratio=3.5)


def dit_with(kind: str) -> DiTSpec:
    """The small DiT with another conditioning."""
    return DiTSpec.model_validate(DIT.model_dump() | {"conditioning": {"kind": kind}})


SMALL = {
    "hdit": (HDiTSpec.model_validate(HDIT), 0),
    "hdit-classes": (HDiTSpec.model_validate(HDIT), 10),
    "hdit-vector": (HDiTSpec.model_validate(HDIT | {"vector_width": 7}), 10),
    "hdit-flat": (HDiTSpec.model_validate(HDIT | {"levels": HDIT["levels"][2:]}), 0),
    "dit": (DIT, 0),
    "dit-classes": (DIT, 10),
    **{
        f"dit-{kind}{suffix}": (dit_with(kind), num_classes)
        for kind in ("adaln", "cross_attention", "in_context")
        for suffix, num_classes in (("", 0), ("-classes", 10))
    },
}


def total(
    spec: HDiTSpec | DiTSpec, shape: DataShape, out_channels: int | None = None
) -> tuple[int, int]:
    """Parameters and MACs."""
    rows = cost(spec, shape, out_channels)
    return sum(row.params for row in rows), sum(row.macs for row in rows)


def flops(model: torch.nn.Module, size: tuple[int, int], cond: Cond) -> int:
    """Counted on one image of 3 channels."""
    # The fused attention of a CPU is opaque to the counter; that of the formula is two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(torch.zeros(1, 3, *size), torch.tensor([1.0]), cond)
    assert out.shape[2:] == size
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("size", "out_channels"), [((24, 24), None), ((24, 40), None), ((24, 24), 6)]
)
@pytest.mark.parametrize("name", SMALL)
def test_cost_is_what_a_forward_pass_does(name, size, out_channels):
    spec, num_classes = SMALL[name]
    shape = DataShape(3, *size, num_classes, 0.5)
    model = build(spec, shape, out_channels)
    vector_width = getattr(spec, "vector_width", 0)
    cond = Cond(
        labels=torch.tensor([1]) if num_classes else None,
        vector=torch.zeros(1, vector_width) if vector_width else None,
    )
    params, macs = total(spec, shape, out_channels)
    assert flops(model, size, cond) == 2 * macs
    assert params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", [(26, 10), (2, 14)])
@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("dit")])
def test_cost_of_dit_at_another_size_is_what_a_forward_pass_does(name, size):
    spec, num_classes = SMALL[name]
    model = build(spec, DataShape(3, 24, 24, num_classes, 0.5))
    cond = Cond(torch.tensor([1]) if num_classes else None)
    _, macs = total(spec, DataShape(3, *size, num_classes, 0.5))
    assert flops(model, size, cond) == 2 * macs


@pytest.mark.parametrize(("name", "width", "biases"), [("hdit", 16, 0), ("dit", 24, 1)])
def test_cost_of_a_learned_variance_is_in_patch_out_alone(name, width, biases):
    """3 more channels of 2 x 2 patches, on 12 x 12 tokens."""
    spec, shape = SMALL[name][0], DataShape(3, 24, 24, 0, 0.5)
    *plain, out = cost(spec, shape)
    *others, more = cost(spec, shape, out_channels=6)
    assert others == plain
    assert (more.name, more.grid) == (out.name, out.grid) == ("patch out", (12, 12))
    assert more.macs - out.macs == 12 * 12 * width * 3 * 4
    assert more.params - out.params == (width + biases) * 3 * 4


def test_cost_rows_follow_the_hourglass():
    rows = cost(SMALL["hdit-classes"][0], DataShape(3, 24, 40, 10, 0.5))
    assert [(row.name, row.grid) for row in rows] == [
        ("mapping network", None),
        ("patch in", (12, 20)),
        ("level 0, neighborhood", (12, 20)),
        ("merge and split 0-1", (6, 10)),
        ("level 1, neighborhood", (6, 10)),
        ("merge and split 1-2", (3, 5)),
        ("level 2, global", (3, 5)),
        ("patch out", (12, 20)),
    ]
    assert all(row.params > 0 and row.macs > 0 for row in rows)


def test_cost_of_neighborhood_attention_is_linear_in_pixels():
    spec = SMALL["hdit-flat"][0]
    local_spec = HDiTSpec.model_validate(HDIT | {"levels": HDIT["levels"][:1]})

    def layers(spec: HDiTSpec, size: int) -> int:
        return next(
            r.macs for r in cost(spec, DataShape(3, size, size, 0, 0.5)) if "level" in r.name
        )

    modulation = 2 * 18 * 16  # one for the image, whatever its size
    small, large = (layers(local_spec, size) - modulation for size in (32, 64))
    assert large == 4 * small
    assert layers(spec, 64) > 4 * layers(spec, 32)


def shown(figure: str) -> float:
    """Tolerance for a printed figure: 0.1 percent, or one unit of its last digit."""
    _, _, decimals = figure.partition(".")
    return max(1e-3 * float(figure), 10.0 ** -len(decimals))


SMALLER = {  # the sweep of size on ImageNet-256
    "S": paper_spec([2, 2, 8], [256, 512, 1024], 2, {"depth": 2, "width": 256}),
    "M": paper_spec([2, 2, 12], [320, 640, 1280], 2, {"depth": 2, "width": 256}),
}


def row_e(n_outer: int) -> HDiTSpec:
    """Row E of the ablation: outer levels of width 384 over one of width 768 with 16x16 tokens."""
    widths = [384] * n_outer + [768]
    return paper_spec([2] * n_outer + [11], widths, n_outer, {"depth": 1, "width": 768})


@pytest.mark.parametrize(
    ("spec", "size", "num_classes", "gmacs"),
    [
        pytest.param(FLOWERS, 256, 0, "11.636", id="flowers"),
        pytest.param(FFHQ_1024, 1024, 0, "206.08", id="ffhq-1024"),
        pytest.param(IMAGENET_256, 256, 1000, "197.59", id="imagenet-256"),
        pytest.param(IMAGENET_128, 128, 1000, "31.4", id="imagenet-128"),
        pytest.param(SMALLER["S"], 256, 1000, "60", id="imagenet-256-S"),
        pytest.param(SMALLER["M"], 256, 1000, "115", id="imagenet-256-M"),
        pytest.param(row_e(2), 256, 1000, "65", id="row-E-256"),
        pytest.param(row_e(3), 512, 1000, "198", id="row-E-512"),
        pytest.param(row_e(4), 1024, 1000, "732", id="row-E-1024"),
    ],
)
def test_cost_of_hdit_is_the_published_one(spec, size, num_classes, gmacs):
    _, macs = total(spec, DataShape(3, size, size, num_classes, 0.5))
    assert macs / 1e9 == pytest.approx(float(gmacs), rel=0, abs=shown(gmacs))


@pytest.mark.parametrize(("size", "millions"), [("S", "138.7"), ("M", "301.8")])
def test_cost_counts_the_parameters_of_the_published_sweep(size, millions):
    params, _ = total(SMALLER[size], DataShape(3, 256, 256, 1000, 0.5))
    assert params / 1e6 == pytest.approx(float(millions), rel=0, abs=shown(millions))
