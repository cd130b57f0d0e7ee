import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from known_answers import check_record, hfill, load

from hdit.errors import SpecError
from hdit.models import DiT, DiTSpec
from hdit.nn.embed import sincos_positions, timestep_embedding
from hdit.protocols import Cond, DataShape


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
    model = DiT(spec, DataShape(4, 8, 8, 10, 1.0), out_channels=8)
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


CONDITIONINGS = ["adaln_zero", "adaln", "cross_attention", "in_context"]


def small_spec(conditioning: str = "adaln_zero", **changes) -> DiTSpec:
    spec = {"patch_size": 2, "depth": 2, "width": 16, "num_heads": 2}
    return DiTSpec.model_validate(spec | {"conditioning": {"kind": conditioning}} | changes)


def small_signal(height: int = 8, width: int = 8, num_classes: int = 0) -> DataShape:
    return DataShape(3, height, width, num_classes, 0.5)


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


def test_dit_is_conditioned_by_adaln_zero_unless_told():
    spec = DiTSpec(depth=2, width=16, num_heads=2)
    assert spec == small_spec("adaln_zero")


@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_dit_is_exactly_zero_at_initialisation(conditioning, size, num_classes):
    torch.manual_seed(0)
    model = DiT(small_spec(conditioning), small_signal(*size, num_classes), out_channels=6)
    out = model(*batch(*size), Cond(torch.tensor([1, -1]) if num_classes else None))
    assert torch.equal(out, torch.zeros(2, 6, *size))


@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_dit_trains_every_parameter(conditioning, num_classes):
    torch.manual_seed(0)
    model = DiT(small_spec(conditioning), small_signal(num_classes=num_classes))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    # Zeros guard zeros: final_layer.linear moves first, then the modulations, then all the rest.
    for _ in range(8):
        cond = Cond(torch.randint(-1, 4, (4,)) if num_classes else None)
        out = model(torch.randn(4, 3, 8, 8), 1000 * torch.rand(4), cond)
        optimizer.zero_grad()
        (out - torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    # Without classes, the queries of cross-attention have no effect; round-off alone moves them.
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


def test_dit_has_no_use_for_the_queries_of_a_sequence_of_one():
    """A softmax over t alone is 1."""
    model = with_random_weights(DiT(small_spec("cross_attention"), small_signal())).double()
    (x, t), block = batch(), model.blocks[0]
    with torch.no_grad():
        out = model(x.double(), t, Cond())
        for parameter in (*block.norm_cross.parameters(), *block.cross_attn.q_proj.parameters()):
            parameter.mul_(-3)
        # float64: softmax rounds
        torch.testing.assert_close(model(x.double(), t, Cond()), out, atol=1e-13, rtol=0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_dit_initialises_as_the_paper_says(conditioning):
    torch.manual_seed(0)
    model = DiT(small_spec(conditioning, width=64), small_signal(num_classes=1000))
    zero = {"final_layer.linear.weight"}
    normal = {"y_embedder.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"}
    for name, parameter in model.state_dict().items():
        if name == "pos_embed":
            continue
        if name.endswith("bias") or "adaLN_modulation" in name or name in zero:
            assert not parameter.any(), name
        elif ".norm" in name:
            assert torch.equal(parameter, torch.ones(64)), name
        elif name in normal:
            # at least 4,096 draws: the error of a std is 1.1 percent
            assert parameter.std() == pytest.approx(0.02, rel=0.05), name
            assert parameter.abs().max() > 0.05, name  # no uniform draw of this std
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert parameter.abs().max() <= bound, name
            # at least 768 draws of a uniform: the error of a std is 1.6 percent
            assert parameter.std() == pytest.approx(bound / 3**0.5, rel=0.06), name


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_dit_decays_matrices_only(conditioning):
    model = DiT(small_spec(conditioning), small_signal(num_classes=4))
    decayed = {name for name, _ in model.named_parameters() if model.parameter_group(name).decay}
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert decayed == matrices - {"y_embedder.weight"}


# ---- conditioning --------------------------------------------------------------------------------


def torch_layer(block: torch.nn.Module) -> torch.nn.Module:
    """PyTorch's own pre-norm layer with the weights of a block of width 16, float64."""
    crossed = hasattr(block, "cross_attn")
    kind = torch.nn.TransformerDecoderLayer if crossed else torch.nn.TransformerEncoderLayer
    gelu = partial(F.gelu, approximate="tanh")
    layer = kind(16, 2, 64, 0.0, gelu, 1e-6, batch_first=True, norm_first=True).double()
    weights = {}
    for name, tensor in block.state_dict().items():
        for ours, theirs in (
            ("norm2.", "norm3." if crossed else "norm2."),
            ("norm_cross.", "norm2."),
            ("cross_attn.out_proj.", "multihead_attn.out_proj."),
            ("cross_attn.", "multihead_attn."),
            ("attn.qkv_proj.", "self_attn.in_proj_"),
            ("attn.out_proj.", "self_attn.out_proj."),
            ("mlp.fc1.", "linear1."),
            ("mlp.fc2.", "linear2."),
        ):
            if name.startswith(ours):
                weights[name.replace(ours, theirs, 1)] = tensor
                break
        else:
            weights[name] = tensor
    for end in ("weight", "bias") if crossed else ():
        parts = [weights.pop(f"multihead_attn.{part}.{end}") for part in ("q_proj", "kv_proj")]
        weights[f"multihead_attn.in_proj_{end}"] = torch.cat(parts)
    layer.load_state_dict(weights)
    return layer


@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("conditioning", ["cross_attention", "in_context"])
def test_dit_blocks_are_those_of_pytorch_s_transformer(conditioning, s):
    model = with_random_weights(DiT(small_spec(conditioning), small_signal())).double()
    x, c = hfill((2, 3, 4, 16), 1).double(), hfill((2, s, 16), 2).double()
    sequence = x.flatten(1, 2)  # (b h*w d)
    if conditioning == "in_context":
        sequence = torch.cat([sequence, c], dim=1)
    with torch.no_grad():
        for block in model.blocks:
            layer = torch_layer(block)
            sequence = layer(sequence, c) if conditioning == "cross_attention" else layer(sequence)
        expected = sequence[:, :12].unflatten(1, (3, 4))
        # float64, values of about 10: two ways to sum
        torch.testing.assert_close(model.blocks(x, c), expected, atol=1e-11, rtol=0)


def test_dit_adaln_is_adaln_zero_with_open_gates():
    """Of the six modulations of the reference-tested block, numbers 2 and 5 are the gates."""
    shape = small_signal(num_classes=4)
    plain = with_random_weights(DiT(small_spec("adaln"), shape)).double()
    gated = DiT(small_spec("adaln_zero"), shape).double()
    weights = plain.state_dict()
    for name, tensor in weights.items():
        if name.startswith("blocks.") and "adaLN_modulation" in name:
            shift1, scale1, shift2, scale2 = tensor.chunk(4)
            gate = torch.full_like(shift1, 1.0 if name.endswith("bias") else 0.0)
            weights[name] = torch.cat([shift1, scale1, gate, shift2, scale2, gate])
    gated.load_state_dict(weights)
    (x, t), cond = batch(), Cond(torch.tensor([2, -1]))
    with torch.no_grad():
        out = plain(x.double(), t, cond)
        assert out.std() > 0.1
        # float64, and the same sums
        torch.testing.assert_close(out, gated(x.double(), t, cond), atol=1e-13, rtol=0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_dit_listens_to_noise_level_and_class(conditioning):
    model = with_random_weights(DiT(small_spec(conditioning), small_signal(num_classes=4)))
    x, t = batch()
    x, t = x[:1], t[:1]

    def out(t: torch.Tensor, label: int) -> torch.Tensor:
        return model(x, t, Cond(torch.tensor([label])))

    with torch.no_grad():
        base = out(t, 1)
        for other in (out(t + 300, 1), out(t, 2), out(t, -1)):
            assert (other - base).abs().max() > 1e-2  # far above float32's round-off


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_dit_recomputes_blocks_to_the_same_gradients(conditioning):
    model = with_random_weights(DiT(small_spec(conditioning), small_signal(num_classes=4)))

    def gradients() -> list[torch.Tensor]:
        loss = model(*batch(), Cond(torch.tensor([2, -1]))).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    kept = gradients()
    model.checkpoint_blocks()
    for a, b in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


# ---- grids ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("size", [(16, 8), (8, 16), (6, 10), (2, 2)])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_dit_at_another_size_is_the_model_built_for_it(conditioning, size):
    model = with_random_weights(DiT(small_spec(conditioning), small_signal()))
    names = list(model.state_dict())
    other = DiT(small_spec(conditioning), small_signal(*size))
    table = other.pos_embed
    other.load_state_dict(model.state_dict() | {"pos_embed": table})
    with torch.no_grad():
        out = model(*batch(*size), Cond())
        torch.testing.assert_close(out, other(*batch(*size), Cond()), atol=0, rtol=0)
    assert out.std() > 0.1
    assert list(model.state_dict()) == names


def test_dit_computes_the_positions_of_a_grid_once(monkeypatch):
    asked = []

    def positions(h: int, w: int, width: int) -> torch.Tensor:
        asked.append((h, w))
        return sincos_positions(h, w, width)

    monkeypatch.setattr("hdit.models.dit.sincos_positions", positions)
    model = DiT(small_spec(), small_signal())
    assert asked == [(4, 4)]
    for size in [(8, 8), (6, 8), (8, 8), (6, 8), (8, 6)]:
        model(*batch(*size), Cond())
    assert asked == [(4, 4), (3, 4), (4, 3)]


def test_dit_keeps_positions_in_the_dtype_of_its_own():
    model = DiT(small_spec(), small_signal())
    assert model.positions(3, 4).dtype == torch.float32
    table = model.double().positions(3, 4)
    assert table.dtype == torch.float64
    assert torch.equal(table, sincos_positions(3, 4, 16).double())  # rounded to float32 before


def test_dit_trains_at_a_size_that_it_sampled_first():
    model = with_random_weights(DiT(small_spec(), small_signal()))
    with torch.inference_mode():
        model(*batch(4, 12), Cond())
    model(*batch(4, 12), Cond()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", [(9, 8), (8, 10), (10, 13)])
def test_dit_refuses_an_image_that_the_patch_does_not_divide(size):
    model = DiT(small_spec(patch_size=4), small_signal())
    message = f"sides of an image must be multiples of 4, got {size[0]}x{size[1]}"
    with pytest.raises(ValueError, match=message):
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
    changes, shape, expected = BAD_SPECS[bad]
    small_spec().check(small_signal())
    with pytest.raises(SpecError) as error:
        DiT(small_spec(**changes), shape)
    problems = error.value.problems
    assert [path for path, _ in problems] == [path for path, _ in expected]
    for (path, message), (_, pattern) in zip(problems, expected, strict=True):
        assert re.search(pattern, message)
        assert f"{path}: {message}" in str(error.value)
