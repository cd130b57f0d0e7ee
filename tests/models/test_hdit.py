import re
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import check_record, hfill, load
from reference_models import reference_model

from hdit.errors import SpecError
from hdit.models import HDiT, HDiTSpec
from hdit.models.hdit import LerpSplit, TokenMerge, TokenSplit
from hdit.nn.attention import CosineQK, Global, SelfAttention
from hdit.nn.rope import AxialRoPE, axial_positions, downscale_positions
from hdit.protocols import Cond, DataShape, Group
from hdit.training.optim import parameter_groups
from hdit_kernels.fused import rotate

CASES = ["global2", "neighborhood3", "shifted3", "none_uncond"]


def in_float32(rope: AxialRoPE):
    return lambda pos: AxialRoPE.angles(deepcopy(rope).float(), pos).double()


@pytest.mark.parametrize("size", ["16x16", "16x32", "32x16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_hdit_matches_the_reference_network(case, dtype, size):
    name = f"{size}_{str(dtype).removeprefix('torch.')}"
    run = load("hdit_forward.json")["cases"][case]["runs"][name]
    full = load("hdit_forward_full.safetensors")
    h, w = map(int, size.split("x"))
    x = hfill((2, 3, h, w), 2000, 1.5)
    model = reference_model(case).to(dtype)
    c_noise = torch.tensor([0.3, 7.0]).to(dtype).log() / 4
    labels = torch.tensor([2, -1])  # -1 is the null class, row 5 of the reference
    if not model.num_classes:
        labels = None
    for module in model.modules():
        if isinstance(module, SelfAttention) and not isinstance(module.spec, Global):
            # The reference turns these by float32 angles in a float64 network too; we do not.
            module.rope.angles = in_float32(module.rope)
    with torch.no_grad():
        out = model(x.to(dtype), c_noise, Cond(labels, hfill((2, 9), 2001, 0.5).to(dtype)))
        plain = model(x.to(dtype), c_noise, Cond(labels))
    atol = 5e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        out, full[f"{case}.{name}.out_with_aug"].to(dtype), atol=atol, rtol=0
    )
    check_record(plain, run["out_aug_none"], atol)


def rope_cases():
    return load("hdit_positions_rope.json")


@pytest.mark.parametrize("grid", ["4x4", "4x8", "8x4", "2x6", "3x5"])
def test_positions_match_the_reference(grid):
    h, w = map(int, grid.split("x"))
    expected = rope_cases()["axial_pos"][grid]["pos_flat_yx"]
    torch.testing.assert_close(
        axial_positions(h, w).flatten(), torch.tensor(expected), atol=2e-7, rtol=0
    )


@pytest.mark.parametrize("case", ["dhead16_heads2", "dhead16_heads4", "dhead64_heads8"])
def test_rope_angles_match_the_reference(case):
    expected = rope_cases()["rope"][case]
    d_head, n_heads = (int(part.lstrip("dheas")) for part in case.split("_"))
    rope = AxialRoPE(n_heads, d_head // 2)
    torch.testing.assert_close(
        rope.freqs.flatten(), torch.tensor(expected["freqs"]), atol=0, rtol=1e-6
    )
    theta = rope.angles(torch.tensor(expected["theta_at_pos_4x4_token5"]["pos"]).view(1, 1, 2))
    torch.testing.assert_close(
        theta.flatten(),
        torch.tensor(expected["theta_at_pos_4x4_token5"]["theta"]).flatten(),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("grid", ["4x4", "4x8", "8x4", "2x6"])
def test_downscaled_positions_match_the_reference(grid):
    h, w = map(int, grid.split("x"))
    expected = rope_cases()["axial_pos"][grid]["downscaled_flat_yx"]
    actual = downscale_positions(axial_positions(h, w))
    assert actual.shape == (h // 2, w // 2, 2)
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected), atol=2e-7, rtol=0)


def test_rotation_matches_the_reference():
    expected = torch.tensor(rope_cases()["apply_rotary"]["out"])
    x = hfill((1, 2, 3, 16), 3100)  # (b n t e)
    theta = hfill((3, 2, 4), 3101, 3)  # (t n e/4)
    angles = theta.movedim(0, 1).cos(), theta.movedim(0, 1).sin()
    # values below 2 in float32
    torch.testing.assert_close(rotate(x, *angles).flatten(), expected, atol=5e-7, rtol=0)


def test_cosine_similarity_matches_the_reference():
    case = rope_cases()["cosine_sim"]
    q, k = (hfill((1, 2, 3, 16), stream).transpose(1, 2) for stream in (3102, 3103))  # (b t n e)
    cosine = CosineQK(2)
    with torch.no_grad():
        cosine.scale.copy_(torch.tensor(case["scale"]))
        q, k, _ = cosine(torch.stack([q, k, k], dim=2)[:, None], None)  # (b 1 t n e)
    # values of up to sqrt(10) in float32
    for actual, expected in ((q, case["q_out"]), (k, case["k_out"])):
        torch.testing.assert_close(
            actual[:, 0].transpose(1, 2).flatten(), torch.tensor(expected), atol=1e-6, rtol=0
        )


@settings(max_examples=15, deadline=None, database=None)
@given(
    p=st.sampled_from([1, 2, 4]),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    d=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_split_inverts_merge(p, h, w, d, seed):
    rng = torch.Generator().manual_seed(seed)
    n = p * p * d
    rotation, _ = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))
    merge, split = TokenMerge(d, n, p).double(), TokenSplit(n, d, p).double()
    with torch.no_grad():
        merge.proj.weight.copy_(rotation)
        split.proj.weight.copy_(rotation.T)
        fine = torch.randn(2, h * p, w * p, d, generator=rng, dtype=torch.float64)
        coarse = torch.randn(2, h, w, n, generator=rng, dtype=torch.float64)
        # float64: a rotation and its inverse
        torch.testing.assert_close(split(merge(fine)), fine, atol=1e-13, rtol=0)
        torch.testing.assert_close(merge(split(coarse)), coarse, atol=1e-13, rtol=0)


def test_lerp_split_weights_the_upsampled_branch_by_fac():
    split = LerpSplit(6, 2).double()
    x, skip = hfill((1, 3, 2, 6), 0).double(), hfill((1, 6, 4, 2), 1).double()
    with torch.no_grad():
        upsampled = TokenSplit.forward(split, x)
        for fac in (0, 0.25, 1):
            split.fac.fill_(fac)
            expected = (1 - fac) * skip + fac * upsampled
            torch.testing.assert_close(split(x, skip), expected, atol=1e-15, rtol=0)


def local(kernel_size: int = 3, d_head: int = 8) -> dict:
    return {"kind": "neighborhood", "kernel_size": kernel_size, "d_head": d_head}


def small_spec(**changes) -> HDiTSpec:
    """Grids of 8x8 (local) and 4x4 (global) on an image of 16x16."""
    levels = [
        {"depth": 1, "width": 16, "attention": local()},
        {"depth": 2, "width": 24, "attention": {"kind": "global", "d_head": 8}},
    ]
    spec = {"patch_size": 2, "levels": levels, "mapping": {"depth": 1, "width": 16}}
    return HDiTSpec.model_validate(spec | changes)


def shape(height: int = 16, width: int = 16, num_classes: int = 0) -> DataShape:
    return DataShape(3, height, width, num_classes, 0.5)


def batch(b: int = 2, h: int = 16, w: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """x (b 3 h w) and c_noise (b,)."""
    return hfill((b, 3, h, w), 2000, 1.5), hfill((b,), 2001)


def with_random_weights(model: HDiT) -> HDiT:
    """Every parameter moved off its initialisation, so that none of them is zero."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_hdit_is_exactly_zero_at_initialisation(size):
    torch.manual_seed(0)
    model = HDiT(small_spec(), shape(*size))
    out = model(*batch(2, *size), Cond())
    assert torch.equal(out, torch.zeros(2, 3, *size))


def test_hdit_initialises_as_the_reference():
    torch.manual_seed(0)
    model = HDiT(small_spec(mapping={"width": 64}), shape(num_classes=99))
    zero = ("norm.linear.weight", "out_proj.weight", "down_proj.weight", "patch_out.proj.weight")
    for name, tensor in model.state_dict().items():
        if name.endswith(zero):
            assert not tensor.any(), name
        elif name.endswith("scale"):
            assert (tensor == (10 if name.endswith("qk.scale") else 1)).all(), name
        elif name.endswith("fac"):
            assert tensor.tolist() == [0.5]
        elif name == "class_emb.weight":
            # 6,400 draws: the error of a std is 0.9 percent
            assert tensor.std() == pytest.approx(1, rel=0.05)
        elif name.endswith("proj.weight"):
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound, name
            # at least 192 draws of a uniform: the error of a std is 3.2 percent
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.12), name
        else:
            assert name.endswith(("_emb.weight", "rope.freqs")), name


def test_hdit_trains_every_parameter():
    torch.manual_seed(0)
    model = HDiT(small_spec(vector_width=5), shape(num_classes=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    # Zeros guard zeros: patch_out moves first, then the ends of the branches, then all the rest.
    for _ in range(8):
        cond = Cond(torch.randint(-1, 4, (4,)), torch.randn(4, 9), torch.randn(4, 5))
        out = model(torch.randn(4, 3, 16, 16), torch.randn(4), cond)
        optimizer.zero_grad()
        (out - torch.randn(4, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


def paper_spec(depths: list[int], widths: list[int], n_local: int, mapping: dict) -> HDiTSpec:
    """Patch 4, heads of 64, windows of 7x7 on the first n_local levels."""
    attentions = [local(7, 64)] * n_local + [{"kind": "global"}] * (len(depths) - n_local)
    levels = [
        {"depth": depth, "width": width, "attention": attention}
        for depth, width, attention in zip(depths, widths, attentions, strict=True)
    ]
    return HDiTSpec.model_validate({"patch_size": 4, "levels": levels, "mapping": mapping})


MAPPING = {"depth": 2, "width": 256}
FLOWERS = paper_spec([2, 2, 4], [128, 256, 512], 2, MAPPING)
FFHQ_1024 = paper_spec([2, 2, 2, 2, 2], [128, 256, 384, 768, 1024], 3, MAPPING)
IMAGENET_256 = paper_spec([2, 2, 16], [384, 768, 1536], 2, MAPPING)
IMAGENET_128 = paper_spec([2, 11], [384, 768], 1, {"depth": 1, "width": 768})


def on_meta(spec: HDiTSpec, shape: DataShape) -> HDiT:
    """Shapes without values."""
    with torch.device("meta"):
        return HDiT(spec, shape)


@pytest.mark.parametrize(
    ("spec", "size", "num_classes", "params", "tensors"),
    [
        pytest.param(FLOWERS, 256, 0, 22_361_274, 117, id="flowers"),
        pytest.param(FFHQ_1024, 1024, 0, 85_079_300, 171, id="ffhq-1024"),
        pytest.param(IMAGENET_256, 256, 1000, 557_416_522, 214, id="imagenet-256"),
        pytest.param(IMAGENET_128, 128, 1000, 117_003_805, None, id="imagenet-128"),
    ],
)
def test_hdit_has_the_parameters_of_the_published_model(spec, size, num_classes, params, tensors):
    model = on_meta(spec, shape(size, size, num_classes))
    assert sum(p.numel() for p in model.parameters()) == params
    assert tensors in (None, len(model.state_dict()))


def test_hdit_asks_for_the_reference_s_parameter_groups():
    model = on_meta(FLOWERS, shape(256, 256))
    groups = parameter_groups(model)
    parameters = dict(model.named_parameters())
    assert sorted(name for names in groups.values() for name in names) == sorted(parameters)
    counts = {
        group: (len(names), sum(parameters[name].numel() for name in names))
        for group, names in groups.items()
    }
    assert counts == {
        Group(decay=True, lr_scale=1.0): (54, 19_214_336),
        Group(decay=False, lr_scale=1.0): (17, 131_258),
        Group(decay=True, lr_scale=1 / 3): (28, 3_014_656),
        Group(decay=False, lr_scale=1 / 3): (4, 1_024),
    }


def test_hdit_asks_for_the_reference_s_groups_of_the_optional_inputs():
    model = HDiT(small_spec(vector_width=5), shape(num_classes=4))
    plain = Group(decay=False, lr_scale=1.0)
    for name in ("class_emb.weight", "mapping_cond_in_proj.weight", "aug_in_proj.weight"):
        assert name in dict(model.named_parameters())
        assert model.parameter_group(name) == plain


@pytest.mark.parametrize(("h", "w"), [(24, 40), (40, 8)])
def test_hdit_gives_one_answer_whatever_size_it_was_built_for(h, w):
    model = with_random_weights(HDiT(small_spec(), shape(16, 16)))
    twin = HDiT(small_spec(), shape(h, w))
    twin.load_state_dict(model.state_dict())
    x, c_noise = batch(2, h, w)
    with torch.no_grad():
        out = model(x, c_noise, Cond())
        assert out.shape == x.shape
        assert out.std() > 0.01
        assert torch.equal(out, twin(x, c_noise, Cond()))


def test_hdit_treats_the_images_of_a_batch_apart():
    model = with_random_weights(HDiT(small_spec(), shape(num_classes=4)).double())
    x, c_noise = (t.double() for t in batch(3))
    labels = torch.tensor([0, 3, -1])
    with torch.no_grad():
        together = model(x, c_noise, Cond(labels))
        alone = torch.cat(
            [model(x[i : i + 1], c_noise[i : i + 1], Cond(labels[i : i + 1])) for i in range(3)]
        )
    # float64: products of other shapes may sum in another order
    torch.testing.assert_close(together, alone, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("num_classes", "labels", "message"),
    [
        (4, None, "4 classes, but the batch came with no labels"),
        (0, torch.tensor([1, 2]), "0 classes, but the batch came with labels"),
    ],
)
def test_hdit_refuses_labels_that_do_not_fit_it(num_classes, labels, message):
    model = HDiT(small_spec(), shape(num_classes=num_classes))
    with pytest.raises(ValueError, match=message):
        model(*batch(), Cond(labels))


@pytest.mark.parametrize(
    ("vector_width", "vector", "message"),
    [
        (5, None, "vector of width 5, but the batch came with None"),
        (0, torch.zeros(2, 5), r"vector of width 0, but .*\[2, 5\]"),
    ],
)
def test_hdit_refuses_a_vector_that_does_not_fit_it(vector_width, vector, message):
    model = HDiT(small_spec(vector_width=vector_width), shape())
    with pytest.raises(ValueError, match=message):
        model(*batch(), Cond(vector=vector))


def level(width: int = 16, **attention) -> dict:
    return {"depth": 1, "width": width, "attention": local() | attention}


BAD_SPECS = {
    "image higher than a multiple": (
        {},
        shape(18, 16),
        {"patch_size": "multiples of 4, got 18x16"},
    ),
    "image wider than a multiple": (
        {},
        shape(16, 30),
        {"patch_size": "multiples of 4, got 16x30"},
    ),
    "odd mapping width": (
        {"mapping": {"width": 15}},
        shape(),
        {"mapping.width": "even, got 15"},
    ),
    "head of no multiple of 8": (
        {"levels": [level(24, d_head=12)]},
        shape(),
        {"levels.0.attention.d_head": "multiple of 8, got 12"},
    ),
    "heads that do not fill the width": (
        {"levels": [level(), level(20)]},
        shape(),
        {"levels.1.width": r"multiple of attention.d_head \(8\), got 20"},
    ),
    "even kernel": (
        {"levels": [level(kernel_size=4)]},
        shape(),
        {"levels.0.attention.kernel_size": "odd, got 4; use 3 or 5"},
    ),
    "kernel larger than the level's grid": (
        {"levels": [level(kernel_size=7), level(kernel_size=5)]},
        shape(16, 32),
        {"levels.1.attention.kernel_size": "5 is larger .* 4x8; use at most 3, or kind = 'global'"},
    ),
    "five at once": (
        {"levels": [level(20, kernel_size=9), level(d_head=4)], "mapping": {"width": 7}},
        shape(15, 16),
        {
            "patch_size": "15x16",
            "mapping.width": "got 7",
            "levels.0.width": "got 20",
            "levels.0.attention.kernel_size": "9 is larger .* 7x8; use at most 7",
            "levels.1.attention.d_head": "got 4",
        },
    ),
}


@pytest.mark.parametrize("bad", BAD_SPECS)
def test_hdit_spec_refuses_with_all_that_is_wrong(bad):
    changes, image, expected = BAD_SPECS[bad]
    small_spec().check(shape())
    with pytest.raises(SpecError) as error:
        HDiT(small_spec(**changes), image)
    assert [path for path, _ in error.value.problems] == list(expected)
    for path, message in error.value.problems:
        assert re.search(expected[path], message)
        assert f"{path}: {message}" in str(error.value)


def test_hdit_vector_changes_the_output():
    model = with_random_weights(HDiT(small_spec(vector_width=5), shape()))
    vector = hfill((2, 5), 7)
    with torch.no_grad():
        out = model(*batch(), Cond(vector=vector))
        other = model(*batch(), Cond(vector=vector.roll(1, dims=0)))
    assert (out - other).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_hdit_vector_of_zeros_is_no_vector():
    model = with_random_weights(HDiT(small_spec(vector_width=5), shape()))
    without = HDiT(small_spec(), shape())
    without.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("mapping_cond")}
    )
    with torch.no_grad():
        out = model(*batch(), Cond(vector=torch.zeros(2, 5)))
        assert torch.equal(out, without(*batch(), Cond()))


def test_hdit_without_augmentation_is_with_one_of_zeros():
    model = with_random_weights(HDiT(small_spec(), shape()))
    with torch.no_grad():
        out = model(*batch(), Cond())
        assert torch.equal(out, model(*batch(), Cond(aug=torch.zeros(2, 9))))
        assert not torch.equal(out, model(*batch(), Cond(aug=hfill((2, 9), 0))))


@pytest.mark.parametrize(
    ("where", "others"),
    [
        ("attention", ["ff.core.down_proj"]),
        ("feed-forward", ["self_attn.core.out_proj"]),
        ("mapping", []),
    ],
)
def test_hdit_drops_out_in_training_only(where, others):
    layers, mapping = {"dropout": 0.5}, {"depth": 1, "width": 16}
    if where == "mapping":
        layers, mapping = {}, mapping | layers
    spec = small_spec(levels=[level() | layers], mapping=mapping)
    model = with_random_weights(HDiT(spec, shape()))
    for name, parameter in model.named_parameters():
        if any(other in name for other in others):
            torch.nn.init.zeros_(parameter)  # closes the level's other branch
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(model(*batch(), Cond()), model(*batch(), Cond()))
        model.eval()
        assert torch.equal(model(*batch(), Cond()), model(*batch(), Cond()))


def test_hdit_keeps_its_mapping_network_in_float32_under_autocast():
    model, mapped = reference_model("neighborhood3"), []
    model.mapping.register_forward_hook(lambda module, args, out: mapped.append(out))
    cond = Cond(torch.tensor([2, -1]), hfill((2, 9), 2001, 0.5))
    with torch.no_grad():
        model(*batch(), cond)
        with torch.autocast("cpu", torch.bfloat16):
            model(*batch(), cond)
    assert mapped[1].dtype == torch.float32
    assert torch.equal(*mapped)


@pytest.mark.parametrize("case", CASES)
def test_hdit_under_autocast_stays_close_to_float32(case):
    model = reference_model(case)
    labels = torch.tensor([2, -1]) if model.num_classes else None
    rounded = deepcopy(model)
    with torch.no_grad():
        exact = model(*batch(), Cond(labels))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*batch(), Cond(labels))
        for name, parameter in rounded.named_parameters():
            if "level" in name:
                parameter.copy_(parameter.bfloat16())
        rounding = (rounded(*batch(), Cond(labels)) - exact).square().mean().sqrt()
    assert out.dtype == torch.bfloat16
    # Autocast rounds weights, activations, q and k (logits reach 12) and the residual stream. The
    # weights alone cost 0.02 to 0.05 of the output's std, all of it about twice as much.
    assert (out - exact).square().mean().sqrt() < 4 * rounding < 0.25 * exact.std()


@pytest.mark.parametrize("size", [(18, 16), (16, 6)])
def test_hdit_refuses_an_image_that_its_levels_do_not_divide(size):
    model = HDiT(HDiTSpec(patch_size=2, levels=[level(), level()], mapping={"width": 16}), shape())
    with pytest.raises(ValueError, match=f"multiples of 4, got {size[0]}x{size[1]}"):
        model(torch.zeros(1, 3, *size), torch.zeros(1), Cond())
