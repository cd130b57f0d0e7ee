"""The switches of HDiT: attention, norm, feed-forward, gate, positions, skip, checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from known_answers import check_record, hfill, load
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hdit.errors import SpecError
from hdit.models import HDiT, HDiTSpec
from hdit.models.cost import cost
from hdit.models.hdit import AddSplit, ConcatSplit, GatedResidual, TokenSplit
from hdit.nn.attention import ShiftedWindow, window_attention
from hdit.nn.embed import sincos_positions
from hdit.nn.mlp import GELU
from hdit.nn.norm import AdaLN
from hdit.nn.rope import AxialRoPE, axial_positions
from hdit.protocols import Cond, DataShape
from hdit.training.optim import parameter_groups
from hdit_kernels.fused import rotate, spread

WINDOWS = {"kind": "shifted_window", "d_head": 8, "window_size": 4}
NARROW = [{"depth": 1, "width": 6, "attention": {"kind": "none"}}]
VARIANTS = {
    "paper": {},
    "shifted_window": {
        "local_attention": {"kind": "shifted_window", "d_head": 8, "window_size": 4}
    },
    "none": {"local_attention": {"kind": "none"}},
    "ada_ln": {"norm": "ada_ln"},
    "gelu": {"feed_forward": "gelu"},
    "gate": {"output_gate": True, "feed_forward": "gelu", "norm": "ada_ln"},
    "additive": {"positions": "additive"},
    "full": {"rotated": "full"},
    "add": {"skip": "add"},
    "concat": {"skip": "concat"},
}


def make_spec(**changes) -> HDiTSpec:
    """Grids of 8x8 and 4x4 on an image of 16x16."""
    raw = {
        "patch_size": 2,
        "levels": [
            {"depth": 2, "width": 16, "dropout": 0.1},
            {"depth": 2, "width": 24, "attention": {"kind": "global", "d_head": 8}},
        ],
        "local_attention": {"kind": "neighborhood", "d_head": 8, "kernel_size": 3},
        "mapping": {"depth": 1, "width": 16},
    }
    return HDiTSpec.model_validate(raw | changes)


def make(num_classes: int = 3, **changes) -> HDiT:
    torch.manual_seed(0)
    return HDiT(make_spec(**changes), DataShape(3, 16, 16, num_classes, 0.5))


def batch(b: int = 2, h: int = 16, w: int = 16):
    x, c_noise = hfill((b, 3, h, w), 1, 1.5), hfill((b,), 2)
    return x, c_noise, Cond(torch.arange(b) - 1, hfill((b, 9), 3, 0.5))


def randomized(model: HDiT) -> HDiT:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variant_is_zero_at_first_and_moves_every_parameter_within_8_steps(changes):
    model = make(**changes)
    x, c_noise, cond = batch()
    assert torch.equal(model(x, c_noise, cond), torch.zeros_like(x))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step in range(8):
        x, c_noise, _ = batch()
        cond = Cond((torch.arange(2) + 2 * step) % 4 - 1, hfill((2, 9), step, 0.5))
        optimizer.zero_grad()
        (model(x, c_noise + step, cond) - hfill(x.shape, 9 + step)).square().mean().backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_macs_of_a_variant_are_those_of_its_forward_pass(changes, size):
    model = make(**changes).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*batch(1, *size))
    rows = cost(make_spec(**changes), DataShape(3, *size, 3, 0.5))
    assert sum(row.macs for row in rows) == counter.get_total_flops() / 2
    assert sum(row.params for row in rows) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_checkpointing_gives_bitwise_the_gradients(changes):
    """With dropout, whose choices must be repeated."""
    plain, checkpointed = (randomized(make(**changes)).train() for _ in range(2))
    checkpointed.checkpoint_blocks()
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        model(*batch()).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_checkpointing_keeps_fewer_activations():
    kept = []
    for checkpoint in (False, True):
        model, sizes = randomized(make()).train(), []
        if checkpoint:
            model.checkpoint_blocks()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(*batch())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variant_is_trained_whole_and_its_modulation_at_a_third_of_the_rate(changes):
    model = make(**changes)
    groups = parameter_groups(model)
    assert sorted(n for names in groups.values() for n in names) == sorted(
        name for name, _ in model.named_parameters()
    )
    for group, names in groups.items():
        for name in names:
            slow = name.startswith("mapping.") or "norm.linear" in name or "gate" in name
            assert group.lr_scale == (1 / 3 if slow else 1), name
            matrix = name.endswith(("proj.weight", "linear.weight", "gate.weight"))
            inputs = ("time_in_proj", "aug_in_proj")
            assert group.decay == (matrix and not name.startswith(inputs)), name


# ---- shifted windows -----------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "shift"), [(4, 0), (4, 2), (2, 1)])
def test_window_attention_matches_the_reference(window, shift):
    record = load("hdit_forward.json")["window_attention"]["runs"][f"w{window}_s{shift}"]
    q, k, v = (hfill((1, 2, 8, 12, 8), 3010 + i).permute(0, 2, 3, 1, 4) for i in range(3))
    out = window_attention(q, k, v, 1.0, window=window, shift=shift)
    check_record(out.permute(0, 3, 1, 2, 4), record, 1e-5)


@pytest.mark.parametrize(("window", "shift"), [(4, 2), (2, 1), (4, 0)])
def test_window_attention_is_masked_attention_over_the_grid(window, shift):
    """A dense mask: same window after the shift, on one side of the edge of the grid."""
    h, w = 8, 12
    q, k, v = (hfill((2, h, w, 2, 4), i).double() for i in range(3))
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")

    def places(at, length):
        moved = at.flatten() + shift
        return torch.stack([(moved % length) // window, moved // length], -1)

    place = torch.cat([places(y, h), places(x, w)], -1)
    mask = (place[:, None] == place[None]).all(-1)
    dense = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*dense, attn_mask=mask, scale=0.7)
    out = window_attention(q, k, v, 0.7, window=window, shift=shift)
    torch.testing.assert_close(out.flatten(1, 2), expected.transpose(1, 2), atol=1e-12, rtol=0)


def test_every_other_layer_shifts_on_through_both_sides_of_the_hourglass():
    spec = make_spec(
        levels=[{"depth": 3, "width": 16}, {"depth": 2, "width": 16}, {"depth": 1, "width": 16}],
        local_attention={"kind": "shifted_window", "d_head": 8, "window_size": 2},
    )
    spec = HDiTSpec.model_validate(spec.model_dump() | {"patch_size": 1})
    spec = spec.model_copy(update={"levels": tuple(
        level if i < 2 else level.model_copy(update={"attention": ShiftedWindow(
            d_head=8, window_size=4)}) for i, level in enumerate(spec.levels))})  # fmt: skip
    model = HDiT(spec, DataShape(3, 16, 16, 0, 0.5))

    def shifts(layers):
        return [layer.self_attn.core.attend.keywords["shift"] for layer in layers]

    assert [shifts(level) for level in model.down_levels] == [[0, 1, 0], [0, 1]]
    assert [shifts(level) for level in model.up_levels] == [[1, 0, 1], [0, 1]]
    assert shifts(model.mid_level) == [0]


# ---- the components ------------------------------------------------------------------------------


def test_ada_ln_is_a_layer_norm_with_the_images_own_scale_and_shift():
    norm = AdaLN(6, 4).double()
    x, cond = hfill((2, 3, 5, 6), 1).double(), hfill((2, 4), 2).double()
    scale, shift = (cond @ norm.linear.weight.T).split(6, dim=-1)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    expected = (x - mean) / (var + 1e-6).sqrt() * (1 + scale)[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(norm(x, cond), expected, atol=1e-12, rtol=0)


def test_gelu_core_is_its_formula():
    core, x = GELU(4, 6).double(), hfill((3, 4), 1).double()
    up = x @ core.up_proj.weight.T
    expected = (up * 0.5 * (1 + torch.erf(up / 2**0.5))) @ core.down_proj.weight.T
    torch.testing.assert_close(core(x), expected, atol=1e-12, rtol=0)


def test_gated_residual_weights_the_branch_by_the_image():
    residual = GatedResidual(3, 2)
    with torch.no_grad():
        residual.gate.weight.copy_(torch.tensor([[1.0, 0], [0, 2], [0, 0]]))
    x, branch = hfill((2, 1, 1, 3), 1), hfill((2, 1, 1, 3), 2)
    out = residual(x, branch, torch.tensor([[1.0, 1], [0, -1]]))
    gate = torch.tensor([[1.0, 2, 0], [0, -2, 0]])[:, None, None]
    torch.testing.assert_close(out, x + gate * branch)


def test_add_and_concat_splits_are_their_formulas():
    x, skip = hfill((1, 3, 2, 6), 0).double(), hfill((1, 6, 4, 2), 1).double()
    add, concat = AddSplit(6, 2).double(), ConcatSplit(6, 2).double()
    torch.testing.assert_close(add(x, skip), TokenSplit.forward(add, x) + skip)
    weight_up, weight_skip = concat.skip_proj.weight.split(2, dim=1)
    expected = TokenSplit.forward(concat, x) @ weight_up.T + skip @ weight_skip.T
    torch.testing.assert_close(concat(x, skip), expected)


def test_rope_over_the_whole_head_turns_every_pair():
    """q . k then depends on the difference of positions alone, which half a head also keeps."""
    rope = AxialRoPE(2, 16).double()
    assert rope.freqs.shape == (2, 4)
    q, k = hfill((1, 1, 1, 2, 16), 1).double(), hfill((1, 1, 1, 2, 16), 2).double()
    pos = axial_positions(4, 4).double()

    def turned(rope, x, cell):
        return rotate(x, *spread(rope(pos[cell][None, None]), 1))

    def logits(a, b):
        return (turned(rope, q, a) * turned(rope, k, b)).sum(-1)

    torch.testing.assert_close(logits((0, 0), (1, 2)), logits((2, 1), (3, 3)))
    assert (turned(rope, q, (0, 0)) != q).all()
    half = turned(AxialRoPE(2, 8).double(), q, (0, 0))
    assert (half[..., :8] != q[..., :8]).all()
    assert torch.equal(half[..., 8:], q[..., 8:])


def test_additive_positions_are_the_table_of_dit_at_any_grid():
    model, seen = make(positions="additive").eval(), []
    model.down_levels[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    for size in ((16, 16), (8, 24)):
        x, c_noise, cond = batch(2, *size)
        model(x, c_noise, cond)
        table = seen[-1] - model.patch_in(x.permute(0, 2, 3, 1))
        expected = sincos_positions(size[0] // 2, size[1] // 2, 16).expand_as(table)
        torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


# ---- the spec ------------------------------------------------------------------------------------


def test_attention_is_local_but_on_the_last_level_where_it_is_not_given():
    raw = {"levels": [{"depth": 1, "width": 64}] * 3}
    kinds = [level.attention.kind for level in HDiTSpec.model_validate(raw).resolved().levels]
    assert kinds == ["neighborhood", "neighborhood", "global"]
    window = {"kind": "shifted_window", "window_size": 4}
    spec = HDiTSpec.model_validate(raw | {"local_attention": window}).resolved()
    assert [level.attention.kind for level in spec.levels][:2] == ["shifted_window"] * 2
    assert spec.resolved() == spec


@pytest.mark.parametrize(("feed_forward", "factor"), [("geglu", 3), ("gelu", 4)])
def test_hidden_width_follows_the_feed_forward(feed_forward, factor):
    levels = make_spec(feed_forward=feed_forward).resolved().levels
    assert [level.d_ff for level in levels] == [factor * 16, factor * 24]


@pytest.mark.parametrize(
    ("changes", "path", "text"),
    [
        (
            {"local_attention": WINDOWS | {"window_size": 3}},
            "levels.0.attention.window_size",
            "3 does not divide the level's grid of 8x8",
        ),
        ({"positions": "additive", "rotated": "full"}, "rotated", "has no effect"),
        ({"levels": NARROW}, "local_attention", "has no effect: no level above the last"),
        (
            {"levels": NARROW, "positions": "additive", "local_attention": None},
            "levels.0.width",
            "must be a multiple of 4",
        ),
    ],
)  # fmt: skip
def test_spec_names_what_does_not_fit(changes, path, text):
    with pytest.raises(SpecError) as error:
        make_spec(**changes).check(DataShape(3, 16, 16, 0, 0.5))
    [(found, message)] = error.value.problems
    assert found == path
    assert text in message
