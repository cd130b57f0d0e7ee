"""Facebook's DiT: the .pt of its release or its training, or its tensors in safetensors.

A bare state dict tells all of the model but the number of heads; the names of the paper's sizes
(S, B, L, XL) do. No pickle is executed: argparse.Namespace, which its training saves, is the one
class that is allowed.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import Tensor

from hdit.config import RunConfig
from hdit.interop.contents import Contents, InteropError
from hdit.interop.dit import check_dit, dit_spec, learns_variance, mlp_ratio, settings, side_of
from hdit.interop.files import parse_json
from hdit.interop.layout import Layout, Place, gather, make_layout, scatter
from hdit.protocols import DataShape
from hdit.spaces import LatentSpace
from hdit.tensors import save_pickled

KIND = "facebook-dit"
MARK = "x_embedder.proj.weight"
"""A tensor that tells its checkpoints from others."""

HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
"""Of (width, depth): S, B, L and XL."""


def their_name(name: str) -> str:
    """Our name of a parameter or buffer -> theirs."""
    for ours, theirs in (
        ("y_embedder.", "y_embedder.embedding_table."),
        (".qkv_proj.", ".qkv."),
        (".attn.out_proj.", ".attn.proj."),
    ):
        name = name.replace(ours, theirs)
    return name


def layout(config: RunConfig, data_shape: DataShape) -> Layout:
    """Where each of our tensors lies in their file."""
    c, p = data_shape.channels, dit_spec(config).patch_size

    def place(name: str, shape: tuple[int, ...]) -> Place:
        if name == "pos_embed":
            h, w, d = shape
            shape = (1, h * w, d)
        elif name == "x_embedder.proj.weight":  # their convolution
            shape = (shape[0], c, p, p)
        return Place((their_name(name),), shape)

    return make_layout(config, data_shape, place)


def _heads(
    facts: dict[str, Any], num_heads: int | None, width: int, depth: int, origin: str
) -> int:
    """By what the file or the user says, or by the paper's sizes; else InteropError."""
    told = facts.get("num_heads")
    heads = told or num_heads or HEADS.get((width, depth))
    if told and num_heads and told != num_heads:
        raise InteropError(f"{origin}: has {told} heads, got num_heads = {num_heads}")
    if heads is None:
        raise InteropError(
            f"{origin}: width {width} and depth {depth} are of none of DiT-S, B, L and XL, and the "
            "tensors do not tell the number of heads: give it with --num-heads (of `hdit convert`)"
        )
    return heads


def from_shapes(
    tensors: dict[str, Tensor], facts: dict[str, Any], num_heads: int | None, origin: str
) -> tuple[RunConfig, DataShape]:
    """The settings that the tensors' shapes tell. `facts` are those that came beside them."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise InteropError(f"{origin}: {name}: missing, so this is no DiT of facebook's")
        found = tuple(tensors[name].shape)
        if len(found) != axes:
            raise InteropError(f"{origin}: {name}: must have {axes} axes, got {list(found)}")
        return found

    width, channels, p, _ = shape("x_embedder.proj.weight", 4)
    size = side_of(shape("pos_embed", 3)[1], f"{origin}: pos_embed") * p
    out_channels = shape("final_layer.linear.weight", 2)[0] // p**2
    classes = shape("y_embedder.embedding_table.weight", 2)[0] - 1
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    hidden = shape("blocks.0.mlp.fc1.weight", 2)[0]
    depth = len(blocks)
    expected = {
        "num_classes": classes,
        "input_size": size,
        "in_channels": channels,
        "image_size": size * LatentSpace().factor,
    }
    for key, value in expected.items():
        if key in facts and facts[key] != value:
            raise InteropError(
                f"{origin}: {key} is said to be {facts[key]}, but its tensors give {value}"
                + (" and a null class" if key == "num_classes" else "")
            )
    model = {
        "patch_size": p,
        "depth": depth,
        "width": width,
        "num_heads": _heads(facts, num_heads, width, depth, origin),
        "mlp_ratio": mlp_ratio(width, hidden),
    }
    learned = learns_variance(channels, out_channels, origin)
    return settings(model, channels, size, classes, learned, origin)


def read_sets(
    path: Path,
    sets: dict[str, dict[str, Tensor]],
    facts: dict[str, Any],
    num_heads: int | None,
) -> Contents:
    """The model of one or more of their state dicts, by name."""
    config, shape = from_shapes(next(iter(sets.values())), facts, num_heads, str(path))
    place = layout(config, shape)
    ours = {name: gather(path, place, theirs, config, shape) for name, theirs in sets.items()}
    classes = tuple(str(i) for i in range(shape.num_classes))
    return Contents(config, shape, classes, ours, f"{KIND} checkpoint {path.name}")


def read_safetensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], num_heads: int | None
) -> Contents:
    """The model of a file's tensors, and of the arguments in its metadata if there are any."""
    text = metadata.get("config")
    facts = parse_json(text, str(path)) if text else {}
    return read_sets(path, {"given": tensors}, facts, num_heads)


def read_pickled(path: Path, saved: Any, num_heads: int | None) -> Contents:
    """The model of what torch.load gave: a state dict, or their trainer's dict of several."""
    facts: dict[str, Any] = {}
    if isinstance(saved, dict) and isinstance(saved.get("config"), dict) and "model_ema" in saved:
        raise InteropError(
            f"{path}: is a training checkpoint of k-diffusion; its convert_for_inference.py makes "
            "the .safetensors file that is read here"
        )
    sets = {"given": saved}
    if isinstance(saved, dict) and not _is_state(saved) and ("ema" in saved or "model" in saved):
        args = saved.get("args")
        facts = dict(vars(args)) if isinstance(args, Namespace) else {}
        facts.pop("num_heads", None)  # not among their arguments
        sets = {name: saved[name] for name in ("ema", "model") if name in saved}
    for tensors in sets.values():
        if not _is_state(tensors):
            raise InteropError(f"{path}: is no state dict of tensors, but {type(tensors).__name__}")
    return read_sets(path, sets, facts, num_heads)


def _is_state(saved: Any) -> bool:
    return isinstance(saved, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in saved.items()
    )


def write(model: Contents, path: Path) -> tuple[str, ...]:
    """Writes a bare state dict with torch.save -> notes."""
    spec = check_dit(KIND, model)
    save_pickled(scatter(layout(model.config, model.shape), model.state_dict), path)
    if HEADS.get((spec.width, spec.depth)) == spec.num_heads:
        return ()
    return (f"a state dict does not tell its heads: to read it, give --num-heads {spec.num_heads}",)
