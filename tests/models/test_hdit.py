from copy import deepcopy

import pytest
import torch
from known_answers import check_record, hfill, load

from hdit.models import HDiT, HDiTSpec
from hdit.nn.attention import Neighborhood, SelfAttention
from hdit.nn.rope import AxialRoPE, axial_positions
from hdit.protocols import Cond, Signal

CASES = ["global2", "neighborhood3"]


def reference_name(name: str) -> str:
    """Our parameter names -> those of the reference's state dict."""
    for ours, theirs in (
        (".core.qk.scale", ".scale"),
        (".core.rope.freqs", ".pos_emb.freqs"),
        (".core.", "."),
    ):
        name = name.replace(ours, theirs)
    return name


def reference_fill(name: str, shape: tuple[int, ...], stream: int) -> torch.Tensor:
    if name.endswith("self_attn.scale"):
        return hfill(shape, stream, 2, 10)
    if name.endswith("norm.scale"):
        return hfill(shape, stream, 0.2, 1)
    if name.endswith(".fac"):
        return hfill(shape, stream, 0.2, 0.5)
    if name == "class_emb.weight":
        return hfill(shape, stream, 1)
    return hfill(shape, stream, (3 / shape[1]) ** 0.5)


def attention(spec: dict) -> dict:
    return {"kind" if key == "type" else key: value for key, value in spec.items()}


def reference_model(case: str) -> HDiT:
    """The network of a case with the weights that its vectors were made with."""
    data = load("hdit_forward.json")["cases"][case]
    config = data["config"]["model"]
    spec = HDiTSpec.model_validate(
        {
            "patch_size": config["patch_size"][0],
            "levels": [
                {"depth": depth, "width": width, "attention": attention(attn)}
                for depth, width, attn in zip(
                    config["depths"], config["widths"], config["self_attns"], strict=True
                )
            ],
            "mapping": {"depth": config["mapping_depth"], "width": config["mapping_width"]},
        }
    )
    model = HDiT(spec, Signal(3, 16, 16, data["config"]["dataset"]["num_classes"], 0.5))
    ours = {reference_name(name): tensor for name, tensor in model.state_dict().items()}
    assert {name: list(t.shape) for name, t in ours.items()} == dict(data["state_dict"])
    with torch.no_grad():
        for stream, (name, shape) in enumerate(data["param_order"]):
            ours[name].copy_(reference_fill(name, shape, stream))
        ours["time_emb.weight"].copy_(hfill(ours["time_emb.weight"].shape, 1000, 3**0.5))
        ours["aug_emb.weight"].copy_(hfill(ours["aug_emb.weight"].shape, 1001, 3**0.5))
    return model


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
    for module in model.modules():
        if isinstance(module, SelfAttention) and isinstance(module.spec, Neighborhood):
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
    rope = AxialRoPE(n_heads, d_head)
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
