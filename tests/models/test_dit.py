import pytest
import torch
from known_answers import check_record, hfill, load

from hdit.models import DiT, DiTSpec
from hdit.nn.embed import sincos_positions, timestep_embedding
from hdit.protocols import Cond, Signal


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
