"""What the shapes of a DiT's tensors tell, with the arguments beside them and what the user tells.

A bare state dict tells all of the model but three things: the number of heads, where the model is
none of the paper's sizes (S, B, L, XL); whether the last row of the class table is a null class;
and, without a learned variance, whether it predicts DiT's noise or SiT's velocity.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor

from hdit.config import RunConfig
from hdit.interop.contents import InteropError, Told
from hdit.interop.dit import VAES, learns_variance, mlp_ratio, settings, side_of
from hdit.interop.settings import Settings, shown
from hdit.names import printable
from hdit.protocols import DataShape

HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
"""Of (width, depth): S, B, L and XL."""
NAMES = dict(zip(HEADS, ("S", "B", "L", "XL"), strict=True))

TELLING = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "final_layer.linear.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}
"""The tensors whose shapes tell the model, and their axes."""

THEIRS = re.compile(
    r"pos_embed|y_embedder\.embedding_table\.weight|(x_embedder\.proj|t_embedder\.mlp\.[02]"
    r"|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)"
    r"|final_layer\.(linear|adaLN_modulation\.1))\.(weight|bias)"
)
"""Names of a DiT's tensors."""

NOISE: dict[str, tuple[Any, ...]] = {
    "predict_xstart": (False,),
    "noise_schedule": ("linear",),
    "beta_schedule": ("linear",),
    "diffusion_steps": (1000,),
    "prediction_type": ("epsilon", "eps", "noise"),
    "parameterization": ("eps", "epsilon", "noise"),
    "objective": ("pred_noise", "eps", "epsilon", "noise"),
}
"""Arguments of DiTs elsewhere, with the values that mean DiT's own diffusion."""

MAX_FACTOR = 64
"""Largest side of an image over that of a latent."""


class Form(NamedTuple):
    """What a file's shapes and arguments tell of its model."""

    model: dict[str, Any]
    channels: int
    out_channels: int
    size: int  # side of what the backbone sees
    factor: int | None  # sides of the image over it, if known
    num_classes: int
    has_null: bool  # whether the last row of the class table is "no class"
    prediction: str | None  # if known
    vae: str  # one of VAES
    assumed: tuple[str, ...]

    def settings(self, origin: str) -> tuple[RunConfig, DataShape]:
        """Settings of a DiT, or of rectified flow where a velocity is predicted."""
        flow = self.prediction == "velocity"
        return settings(
            self.model,
            self.channels,
            self.size,
            self.num_classes,
            learns_variance(self.channels, self.out_channels, origin) and not flow,
            origin,
            factor=self.factor,
            flow=flow,
            label_dropout=0.1 if self.has_null else 0.0,
            vae=self.vae,
        )


def form_of(tensors: dict[str, Tensor], facts: Settings, told: Told) -> Form:
    """What the shapes of tensors tell, and `facts`, which came beside them; else `told`.

    Raises InteropError where this is no DiT, where two of the three contradict each other, and
    where none of them tells.
    """
    shape = _shapes(tensors, facts.origin)
    width, channels, p, q = shape["x_embedder.proj.weight"]
    if p != q:
        raise InteropError(f"{facts.origin}: x_embedder.proj.weight: has patches of {p}x{q}")
    size = side_of(shape["pos_embed"][1], f"{facts.origin}: pos_embed") * p
    out_channels = shape["final_layer.linear.weight"][0] // p**2
    rows = shape["y_embedder.embedding_table.weight"][0]
    hidden = shape["blocks.0.mlp.fc1.weight"][0]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    prediction = _prediction(facts, told)
    classes, assumed = _classes(facts, told, rows)
    _check_facts(
        facts,
        {
            "input_size": size,
            "in_channels": channels,
            "patch_size": p,
            "hidden_size": width,
            "depth": depth,
        },
    )
    _check_mlp(facts, width, hidden)
    if (learns := facts.flag("learn_sigma", None)) not in (None, out_channels == 2 * channels):
        raise facts.error("learn_sigma", f"is {learns}, but the output has {out_channels} channels")
    _check_name(facts, width, depth, p)
    model = {
        "patch_size": p,
        "depth": depth,
        "width": width,
        "num_heads": _heads(facts, told, width, depth),
        "mlp_ratio": mlp_ratio(width, hidden),
    }
    return Form(
        model,
        channels,
        out_channels,
        size,
        _factor(facts, size),
        classes,
        classes < rows,
        prediction,
        vae if (vae := facts.raw.get("vae")) in (*VAES,) else "ema",
        assumed,
    )


def _shapes(tensors: dict[str, Tensor], origin: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that tell the model. Raises InteropError, with what else is there."""
    missing = [name for name in TELLING if name not in tensors]
    if missing:
        unknown = [printable(name) for name in tensors if not THEIRS.fullmatch(name)]
        some = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if unknown[6:] else "")
        raise InteropError(
            f"{origin}: is no DiT of facebook's: {', '.join(missing)} missing"
            + (f"; it has {some}" if unknown else "")
        )
    shapes = {name: tuple(tensors[name].shape) for name in TELLING}
    for name, axes in TELLING.items():
        if len(shapes[name]) != axes or not all(shapes[name]):
            found = list(shapes[name])
            raise InteropError(f"{origin}: {name}: must have {axes} axes, got {found}")
    return shapes


def _prediction(facts: Settings, told: Told) -> str | None:
    """What the network predicts, if that is known. Raises InteropError for all but two."""
    for key, values in NOISE.items():
        facts.fixed(key, *values)
    path, predicts = facts.text("path_type", None), facts.text("prediction", None)
    name = facts.text("model", None) or ""
    found: str | None = None
    if (path, predicts) == ("Linear", "velocity"):
        found = "velocity"
    elif path is None and predicts in ("noise", "eps", "epsilon"):
        found = "noise"
    elif path is not None or predicts is not None:
        raise InteropError(
            f"{facts.origin}: has path_type = {path!r} and prediction = {predicts!r}, as a SiT; "
            "only path_type 'Linear' with prediction 'velocity' has a counterpart here"
        )
    elif name.lower().startswith("sit") and told.prediction != "velocity":
        raise InteropError(
            f"{facts.origin}: model = {shown(name)} is a SiT, and its path_type and prediction are "
            "not there: if they are 'Linear' and 'velocity', convert it with --prediction velocity"
        )
    elif name.lower().startswith("dit"):
        found = "noise"
    if found and told.prediction not in (None, found):
        raise InteropError(
            f"{facts.origin}: predicts the {found}, got --prediction {told.prediction}"
        )
    return found or told.prediction


def _classes(facts: Settings, told: Told, rows: int) -> tuple[int, tuple[str, ...]]:
    """-> (number of classes of a table of so many rows, what was assumed)."""
    number = facts.integer("num_classes", None)
    dropout = facts.number("class_dropout_prob", None, low=0, high=1)
    if rows == 1 and not number and told.num_classes in (None, 1):  # no class, or no null class
        return 1, (f"{facts.origin}: its class table of 1 row was taken for one class",)
    if number is None and dropout is not None:
        number = rows - (dropout > 0)
    if number is not None:
        allowed = (rows, rows - 1) if dropout is None else (rows - (dropout > 0),)
        if number not in allowed:
            raise facts.error(
                "num_classes",
                f"is said to be {number}, but its tensors give {rows - 1} and a null class",
            )
        if told.num_classes not in (None, number):
            raise InteropError(
                f"{facts.origin}: has {number} classes, got --classes {told.num_classes}"
            )
        return number, ()
    if told.num_classes is not None:
        if told.num_classes not in (rows, rows - 1):
            raise InteropError(
                f"{facts.origin}: its table has {rows} rows, for {rows - 1} classes and a null "
                f"class, or {rows} classes; got --classes {told.num_classes}"
            )
        return told.num_classes, ()
    assumed = (
        f"{facts.origin}: its class table of {rows} rows was taken for {rows - 1} classes and a "
        f"null class; if it was trained without one, convert it with --classes {rows}"
    )
    return rows - 1, (assumed,)


def _factor(facts: Settings, size: int) -> int | None:
    """How many times larger an image is than what the backbone sees, if its size is there."""
    if not facts.has("image_size"):
        return None
    if isinstance(facts.raw["image_size"], list | tuple):  # of height and width
        sides = facts.of({str(i): s for i, s in enumerate(facts.raw["image_size"])}, "image_size")
        image, other = (sides.integer(axis, low=1) for axis in ("0", "1"))
        if image != other:
            raise facts.error("image_size", f"must be square, got {[image, other]}")
    else:
        image = facts.integer("image_size", low=1)
    factor, rest = divmod(image, size)
    if rest or factor.bit_count() != 1 or factor > MAX_FACTOR:
        raise facts.error(
            "image_size",
            f"is said to be {image}, but its tensors give {size} of what the model sees, and no "
            "latent has such a part of an image's side",
        )
    return factor


def _check_facts(facts: Settings, expected: dict[str, int]) -> None:
    for key, value in expected.items():
        if facts.integer(key, value) != value:
            raise facts.error(
                key, f"is said to be {facts.integer(key)}, but its tensors give {value}"
            )


def _check_mlp(facts: Settings, width: int, hidden: int) -> None:
    """Raises InteropError where mlp_ratio, which was rounded down, is not that of the tensors."""
    ratio = facts.number("mlp_ratio", hidden / width)
    if abs(width * ratio - hidden) >= 1:
        raise facts.error(
            "mlp_ratio",
            f"is said to be {ratio:g}, but its tensors give a hidden width of {hidden}",
        )


def _check_name(facts: Settings, width: int, depth: int, p: int) -> None:
    """Raises InteropError where the model is said to be another one of the paper's."""
    name = facts.text("model", None) or ""
    if match := re.fullmatch(r"[DS]iT-(S|B|L|XL)/([248])", name):
        said = {size: shape for shape, size in NAMES.items()}[match[1]]
        if said != (width, depth) or int(match[2]) != p:
            raise facts.error(
                "model",
                f"is said to be {name}, but its tensors give width {width}, depth {depth} and "
                f"patches of {p}",
            )


def _heads(facts: Settings, told: Told, width: int, depth: int) -> int:
    """Number of heads by the file, the user or the paper's sizes; else InteropError."""
    in_file = facts.integer("num_heads", None, low=1)
    heads = in_file or told.num_heads or HEADS.get((width, depth))
    if in_file and told.num_heads and in_file != told.num_heads:
        raise InteropError(f"{facts.origin}: has {in_file} heads, got --num-heads {told.num_heads}")
    if heads and width % heads:
        what = "--num-heads" if heads == told.num_heads else "num_heads"
        raise InteropError(f"{facts.origin}: {what}: {heads} does not divide the width {width}")
    if heads is None:
        raise InteropError(
            f"{facts.origin}: width {width} and depth {depth} are of none of DiT-S, B, L and XL, "
            "and the tensors do not tell the number of heads: give it with --num-heads (of `hdit "
            "convert`)"
        )
    return heads
