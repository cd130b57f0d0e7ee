"""HDiT networks with the weights that the known answers were computed with."""

from __future__ import annotations

import torch
from known_answers import hfill, load

from hdit.models import HDiT, HDiTSpec
from hdit.protocols import DataShape


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
    kind = spec["type"].replace("-", "_")
    return {"kind": kind, **{key: value for key, value in spec.items() if key != "type"}}


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
    model = HDiT(spec, DataShape(3, 16, 16, data["config"]["dataset"]["num_classes"], 0.5))
    ours = {reference_name(name): tensor for name, tensor in model.state_dict().items()}
    assert {name: list(t.shape) for name, t in ours.items()} == dict(data["state_dict"])
    with torch.no_grad():
        for stream, (name, shape) in enumerate(data["param_order"]):
            ours[name].copy_(reference_fill(name, shape, stream))
        ours["time_emb.weight"].copy_(hfill(ours["time_emb.weight"].shape, 1000, 3**0.5))
        ours["aug_emb.weight"].copy_(hfill(ours["aug_emb.weight"].shape, 1001, 3**0.5))
    return model
