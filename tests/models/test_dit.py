import re

import pytest
import torch
from einops import rearrange
from known_answers import check_record, hfill, load

from hdit.models import DiT, DiTSpec
from hdit.nn.embed import sincos_positions, timestep_embedding
from hdit.protocols import Cond, Signal, SpecError


def reference_name(name: str) -> str:
    for ours, theirs in (
        (".qkv_proj.", ".qkv."),
        (".out_proj.", ".proj."),
        ("y_embedder.", "y_embedder.embedding_table."),
    ):
        name = name.replace(ours, theirs)
    return name


def reference_model() -> DiT:
    """The network of the vectors: input 8, patch 2, 4 channels, width 64, depth 2, 10 classes."""
    spec = DiTSpec(patch_size=2, depth=2, width=64, num_heads=4)
    model = DiT(spec, Signal(4, 8, 8, 10, 1.0), out_channels=8)
    ours = {reference_name(name): tensor for name, tensor in model.state_dict().items()}
    data = load("dit_forward.json")
    assert set(ours) == {name for name, _ in data["state_dict"]}
    with torch.no_grad():
        for stream, (name, shape) in enumerate(data["param_order"]):
            if name == "pos_embed":
                continue
            if name.endswith(".bias"):
                values = hfill(shape, stream, 0.1)
            elif "embedding_table" in name:
                values = hfill(shape, stream, 0.5)
            else:
                values = hfill(shape, stream, (3 / torch.Size(shape[1:]).numel()) ** 0.5)
            ours[name].copy_(values.view_as(ours[name]))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dit_matches_the_reference_network(dtype):
    name = str(dtype).removeprefix("torch.")
    run = load("dit_forward.json")["runs"][name]
    model = reference_model().to(dtype)
    t, labels = torch.tensor(run["t"]), torch.tensor([3, 7, -1])  # -1 is row 10, the null class
    with torch.no_grad():
        out = model(hfill((3, 4, 8, 8), 8000, 1.7).to(dtype), t, Cond(labels))
    # fp32 nets 5e-5; positions and time features are float32 in the float64 network too
    check_record(out, run["out"], 5e-5 if dtype == torch.float32 else 1e-6)


def test_dit_accepts_the_null_class_by_its_row():
    model, x = reference_model(), hfill((1, 4, 8, 8), 8000, 1.7)
    t = torch.tensor([500])
    by_row = model(x, t, Cond(torch.tensor([10])))
    torch.testing.assert_close(model(x, t, Cond(torch.tensor([-1]))), by_row, atol=0, rtol=0)


@pytest.mark.parametrize("width", [8, 9])
def test_timestep_embedding_matches_the_reference(width):
    expected = load("dit_forward.json")["timestep_embedding"][f"dim{width}"]
    actual = timestep_embedding(torch.tensor(expected["t"]), width)
    # float32 phases of up to 999 radians: an ulp of 6e-5
    torch.testing.assert_close(
        actual.flatten(), torch.tensor(expected["values_flat"]), atol=7e-5, rtol=0
    )


def test_positions_match_the_reference():
    expected = load("dit_forward.json")["pos_embed"]
    torch.testing.assert_close(
        sincos_positions(4, 4, 16).flatten(),
        torch.tensor(expected["dim16_grid4_flat"]),
        atol=1e-6,
        rtol=0,
    )
    check_record(sincos_positions(16, 16, 384).flatten(0, 1), expected["dim384_grid16"], 1e-6)


def test_positions_of_a_wide_grid_tell_rows_from_columns():
    table = sincos_positions(2, 5, 16)
    assert table.shape == (2, 5, 16)
    assert torch.equal(table[0, :, :8], table[1, :, :8])  # the first half knows the column only
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])


SIZES = {  # depth, width, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PAPER_MODELS = load("dit_params_flops.json")


def paper_spec(name: str) -> DiTSpec:
    """ "DiT-XL/2" -> the paper's model."""
    size, patch = name.removeprefix("DiT-").split("/")
    depth, width, heads = SIZES[size]
    return DiTSpec(patch_size=int(patch), depth=depth, width=width, num_heads=heads)


@pytest.mark.parametrize("row", PAPER_MODELS, ids=lambda row: f"{row['model']}-{row['latent']}")
def test_dit_has_the_parameters_of_the_published_model(row):
    with torch.device("meta"):  # shapes without values
        signal = Signal(4, row["latent"], row["latent"], 1000, 1.0)
        model = DiT(paper_spec(row["model"]), signal, out_channels=8)
    params = sum(p.numel() for p in model.parameters())
    assert params == row["params_excl_pos_embed"]
    assert params + model.pos_embed.numel() == row["params_total"]
    assert len(model.state_dict()) == row["state_tensors"]


def small_spec(**changes) -> DiTSpec:
    spec = {"patch_size": 2, "depth": 2, "width": 16, "num_heads": 2}
    return DiTSpec.model_validate(spec | changes)


def small_signal(height: int = 8, width: int = 8, num_classes: int = 0) -> Signal:
    return Signal(3, height, width, num_classes, 0.5)


def batch(h: int = 8, w: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """x (2 3 h w) and c_noise (2,)."""
    return hfill((2, 3, h, w), 8000, 1.7), torch.tensor([3.0, 700.5])


def with_random_weights(model: DiT) -> DiT:
    """Every parameter moved off its initialisation, so that none of them is zero."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_dit_is_exactly_zero_at_initialisation(size):
    torch.manual_seed(0)
    model = DiT(small_spec(), small_signal(*size), out_channels=6)
    out = model(*batch(*size), Cond())
    assert torch.equal(out, torch.zeros(2, 6, *size))


def test_dit_trains_every_parameter():
    torch.manual_seed(0)
    model = DiT(small_spec(), small_signal(num_classes=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    # Zeros guard zeros: final_layer.linear moves first, then the modulations, then all the rest.
    for _ in range(8):
        cond = Cond(torch.randint(-1, 4, (4,)))
        out = model(torch.randn(4, 3, 8, 8), 1000 * torch.rand(4), cond)
        optimizer.zero_grad()
        (out - torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


def test_dit_initialises_as_the_paper_says():
    torch.manual_seed(0)
    model = DiT(small_spec(width=64), small_signal(num_classes=1000))
    zero = {"final_layer.linear.weight"}
    normal = {"y_embedder.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"}
    for name, parameter in model.state_dict().items():
        if name == "pos_embed":
            continue
        if name.endswith("bias") or "adaLN_modulation" in name or name in zero:
            assert not parameter.any(), name
        elif name in normal:
            # at least 4,096 draws: the error of a std is 1.1 percent
            assert parameter.std() == pytest.approx(0.02, rel=0.05), name
            assert parameter.abs().max() > 0.05, name  # no uniform draw of this std
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert parameter.abs().max() <= bound, name
            # at least 768 draws of a uniform: the error of a std is 1.6 percent
            assert parameter.std() == pytest.approx(bound / 3**0.5, rel=0.06), name


def test_dit_on_a_wide_grid_sees_the_same_sequence_of_patches():
    wide = with_random_weights(DiT(small_spec(), small_signal(4, 12)).double())
    other = DiT(small_spec(), small_signal(6, 8)).double()
    weights = wide.state_dict()
    other.load_state_dict(weights | {"pos_embed": weights["pos_embed"].view(3, 4, 16)})
    x, t = batch(4, 12)
    patches = rearrange(x.double(), "b c (h p) (w q) -> b (h w) c p q", p=2, q=2)
    with torch.no_grad():
        out = wide(x.double(), t, Cond())
        y = other(rearrange(patches, "b (h w) c p q -> b c (h p) (w q)", h=3), t, Cond())
    assert out.shape == x.shape
    assert out.std() > 0.1
    torch.testing.assert_close(  # float64, and the same sums
        rearrange(out, "b c (h p) (w q) -> b (h w) c p q", p=2, q=2),
        rearrange(y, "b c (h p) (w q) -> b (h w) c p q", p=2, q=2),
        atol=1e-13,
        rtol=0,
    )


@pytest.mark.parametrize("size", [(16, 8), (8, 16), (4, 16), (9, 8)])
def test_dit_refuses_an_image_of_another_size(size):
    model = DiT(small_spec(), small_signal(8, 8))
    with pytest.raises(ValueError, match=f"built for images of 8x8, got {size[0]}x{size[1]}"):
        model(*batch(*size), Cond())


@pytest.mark.parametrize(
    ("num_classes", "labels", "message"),
    [
        (4, None, "4 classes, but the batch came with no labels"),
        (0, torch.tensor([1, 2]), "0 classes, but the batch came with labels"),
    ],
)
def test_dit_refuses_labels_that_do_not_fit_it(num_classes, labels, message):
    model = DiT(small_spec(), small_signal(num_classes=num_classes))
    with pytest.raises(ValueError, match=message):
        model(*batch(), Cond(labels))


BAD_SPECS = {
    "patch that does not divide the height": (
        {},
        small_signal(9, 8),
        [("patch_size", "2 does not divide the image of 9x8")],
    ),
    "patch that does not divide the width": (
        {"patch_size": 3},
        small_signal(9, 8),
        [("patch_size", "3 does not divide the image of 9x8")],
    ),
    "heads that do not fill the width": (
        {"num_heads": 3},
        small_signal(),
        [("width", r"multiple of num_heads \(3\), got 16")],
    ),
    "width without room for two sines and cosines": (
        {"width": 18},
        small_signal(),
        [("width", "multiple of 4, got 18")],
    ),
    "three at once": (
        {"patch_size": 3, "width": 18, "num_heads": 4},
        small_signal(),
        [
            ("patch_size", "3 does not divide the image of 8x8"),
            ("width", r"multiple of num_heads \(4\), got 18"),
            ("width", "multiple of 4, got 18"),
        ],
    ),
}


@pytest.mark.parametrize("bad", BAD_SPECS)
def test_dit_spec_refuses_with_all_that_is_wrong(bad):
    changes, signal, expected = BAD_SPECS[bad]
    small_spec().check(small_signal())
    with pytest.raises(SpecError) as error:
        DiT(small_spec(**changes), signal)
    problems = error.value.problems
    assert [path for path, _ in problems] == [path for path, _ in expected]
    for (path, message), (_, pattern) in zip(problems, expected, strict=True):
        assert re.search(pattern, message)
        assert f"{path}: {message}" in str(error.value)
