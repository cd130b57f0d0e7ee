"""k-diffusion's image_transformer_v2: safetensors with its JSON config in the metadata.

Its buffers (RoPE frequencies, Fourier features) are taken from the file: published ones are rounded
to float16 there, and computing them anew would change the outputs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor

from hdit.config import RunConfig, differences, parse
from hdit.config.learning_rate import ConstantLR, StepLR
from hdit.diffusion.densities import (
    CosineInterpolated,
    Density,
    LogLogistic,
    Lognormal,
    LogUniform,
    SplitLognormal,
    VDiffusion,
)
from hdit.diffusion.weighting import EDMWeight, EpsWeight, SoftMinSNR, Weighting
from hdit.interop.contents import Contents, InteropError, check_held
from hdit.interop.layout import Layout, Place, gather, make_layout, scatter
from hdit.interop.settings import Settings, read_table
from hdit.models import HDiTSpec
from hdit.names import escape, printable
from hdit.protocols import DataShape, Spec
from hdit.reading import read_object
from hdit.tensors import save_tensors

KIND = "k-diffusion"
MARK = "patch_in.proj.weight"
"""A tensor that tells its checkpoints from others."""

ATTENTION = {
    "global": ("global", ("d_head",)),
    "neighborhood": ("neighborhood", ("d_head", "kernel_size")),
    "shifted-window": ("shifted_window", ("d_head", "window_size")),
    "none": ("none", ()),
}
"""Their type -> our kind, and its settings."""

WEIGHTINGS: dict[str, Weighting] = {
    "karras": EDMWeight(),
    "soft-min-snr": SoftMinSNR(),
    "snr": EpsWeight(),
}

DENSITIES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "lognormal": ("lognormal", {"mean": ("mean", "loc"), "std": ("std", "scale")}),
    "loglogistic": ("loglogistic", {"loc": ("loc",), "scale": ("scale",)}),
    "loguniform": ("loguniform", {}),
    "v-diffusion": ("v_diffusion", {}),
    "cosine": ("v_diffusion", {}),
    "split-lognormal": (
        "split_lognormal",
        {
            "mode": ("mean", "loc"),
            "std_low": ("std_1", "scale_1"),
            "std_high": ("std_2", "scale_2"),
        },
    ),
    "cosine-interpolated": ("cosine_interpolated", {}),
}
"""Their type -> our kind, and our settings with their names."""

SCHEDULES = {
    "constant": ("warmup",),
    "inverse": ("warmup", "inv_gamma", "power", "min_lr"),
    "exponential": ("warmup", "num_steps", "decay", "min_lr"),
}
LOSSES = ("karras", "simple")

INERT = {
    "model.augment_wrapper": False,
    "model.skip_stages": 0,
    "model.has_variance": False,
    "dataset.type": "imagefolder",
}
"""Settings without a counterpart that say no more than what holds here."""


# ---- their settings -> ours ----------------------------------------------------------------------


def from_config(raw: dict[str, Any], origin: str) -> tuple[RunConfig, DataShape, tuple[str, ...]]:
    """-> (our config, resolved; the data shape; notes on what did not map).

    Takes a config as written by hand or as their loader fills it in. Raises InteropError or
    ConfigError where the model has no counterpart.
    """
    top = Settings(raw, origin)
    m = top.table("model")
    m.fixed("type", "image_transformer_v2")
    if m.flag("has_variance", False):
        raise m.error("has_variance", "a predicted variance has no counterpart here")
    dataset = top.table("dataset")
    size = m.entries("input_size", 2)
    height, width = (size.integer(axis, low=1) for axis in ("0", "1"))
    channels = m.integer("input_channels", low=1)
    sigma_data = m.number("sigma_data", 1.0, low=1e-6, high=1e6)
    shape = DataShape(channels, height, width, dataset.integer("num_classes", 0), sigma_data)
    sigma_min, sigma_max = (m.number(key, low=0) for key in ("sigma_min", "sigma_max"))
    notes: list[str] = []
    config = parse(
        {
            "data": {
                "kind": "folder",
                "path": escape(dataset.text("location", "images")),
                "size": [height, width],
                "channels": channels if channels in (1, 3) else 3,
                "augment": m.number("augment_prob", 0.0),
                "crop": "shorter_side",
                "flip": m.number("augment_prob", 0.0) > 0,  # theirs mirrors as part of it
            },
            "space": {"kind": "pixel", "sigma_data": sigma_data},
            "model": _model(m),
            "diffusion": _diffusion(m, shape, sigma_min, sigma_max, notes),
            "training": _training(top, notes),
            "sampling": {
                "sampler": {"kind": "dpmpp_2m_sde", "eta": 0.0, "solver": "heun"},
                "sigmas": {"kind": "karras"},
                "steps": 50,
                "sigma_min": sigma_min,
                "sigma_max": sigma_max,
            },
        },
        origin,
    )
    return config, shape, (*notes, *top.left_out(INERT))


def _diffusion(
    m: Settings, shape: DataShape, sigma_min: float, sigma_max: float, notes: list[str]
) -> dict[str, Any]:
    simple = m.one_of("loss_config", LOSSES, "karras") == "simple"
    scales = m.integer("loss_scales", 1)
    if simple and scales != 1:
        notes.append(f"model.loss_scales = {scales} was left out: their loss 'simple' ignores it")
        scales = 1
    diffusion: dict[str, Any] = {
        "parametrization": {"kind": "edm"},
        "c_noise": "log_quarter",
        "weighting": _weighting(m, simple, shape.sigma_data),
        "loss_scales": scales,
    }
    if m.has("sigma_sample_density"):
        size = max(shape.height, shape.width)
        diffusion["density"] = _density(m, sigma_min, sigma_max, size, shape.sigma_data)
    return diffusion


def _model(m: Settings) -> dict[str, Any]:
    widths = m.entries("widths")
    keys = list(widths.raw)
    depths = m.entries("depths", len(keys))
    d_ffs = m.entries("d_ffs", len(keys)) if m.has("d_ffs") else None
    patch = m.entries("patch_size", 2)
    p, q = (patch.integer(axis, low=1) for axis in ("0", "1"))
    if p != q:
        raise m.error("patch_size", f"must be square, got {[p, q]}")
    each = isinstance(m.raw.get("dropout_rate"), list)
    dropout = m.entries("dropout_rate", len(keys)) if each else m
    attention = m.entries("self_attns", len(keys)) if m.has("self_attns") else None
    levels = []
    for key in keys:
        default = {"kind": "global" if key == keys[-1] else "neighborhood"}
        level = {
            "depth": depths.integer(key),
            "width": widths.integer(key),
            "attention": _attention(attention.table(key)) if attention else default,
            "dropout": dropout.number(key if each else "dropout_rate", 0.0),
        }
        d_ff = d_ffs.integer(key, 0) if d_ffs else 0
        levels.append(level | ({"d_ff": d_ff} if d_ff else {}))
    width = m.integer("mapping_width", 256)
    return {
        "kind": "hdit",
        "patch_size": p,
        "levels": levels,
        "mapping": {
            "depth": m.integer("mapping_depth", 2),
            "width": width,
            "d_ff": m.integer("mapping_d_ff", 0) or 3 * width,
            "dropout": m.number("mapping_dropout_rate", 0.0),
        },
        "vector_width": m.integer("mapping_cond_dim", 0),
    }


def _attention(table: Settings) -> dict[str, Any]:
    ours, keys = ATTENTION[table.one_of("type", tuple(ATTENTION))]
    given = {key: table.integer(key, None, low=1) for key in keys if key != "window_size"}
    if "window_size" in keys:
        given["window_size"] = table.integer("window_size", low=1)
    return {"kind": ours, **{key: value for key, value in given.items() if value is not None}}


def _weighting(m: Settings, simple: bool, sigma_data: float) -> dict[str, Any]:
    name = m.one_of("loss_weighting", tuple(WEIGHTINGS), "karras")
    if simple:  # the error of eps, whatever the weighting says
        name = "snr"
    weighting = WEIGHTINGS[name].model_dump(exclude_none=True)
    return weighting | ({"gamma": sigma_data**-2} if name == "soft-min-snr" else {})


def _density(
    m: Settings, sigma_min: float, sigma_max: float, size: int, sigma_data: float
) -> dict[str, Any]:
    d = m.table("sigma_sample_density")
    ours, names = DENSITIES[d.one_of("type", tuple(DENSITIES))]
    found: dict[str, Any] = {"kind": ours}
    for key, theirs in names.items():
        values = [value for name in theirs if (value := d.number(name, None)) is not None]
        if values:
            found[key] = values[0]
    ends = {
        "loglogistic": (None, None),
        "loguniform": (sigma_min, sigma_max),
        "v_diffusion": (1e-3, 1e3),
        "cosine_interpolated": (min(sigma_min, 1e-3), max(sigma_max, 1e3)),
    }
    if ours in ends:
        low, high = (
            d.number(f"{end}_value", ends[ours][i]) for i, end in enumerate(("min", "max"))
        )
        found |= {} if not low else {"sigma_min": low}
        found |= {} if high is None else {"sigma_max": high}
    if ours == "loglogistic":
        found.setdefault("loc", math.log(sigma_data))
    if ours == "cosine_interpolated":
        scale = size / d.number("image_d", size, low=1e-6)  # only the ratios matter
        found["noise_d_low"] = d.number("noise_d_low", 32.0) * scale
        found["noise_d_high"] = d.number("noise_d_high", size) * scale
    return found


def _training(top: Settings, notes: list[str]) -> dict[str, Any]:
    return {
        "images": 64_000_000,
        "checkpoint_every": 640_000,
        "batch_size": 64,
        "label_dropout": top.table("dataset").number("cond_dropout_rate", 0.1),
        "optimizer": _optimizer(top.table("optimizer"), notes) | _lr_schedule(top, notes),
        "ema": _averaging(top.table("ema_sched"), notes),
    }


def _optimizer(o: Settings, notes: list[str]) -> dict[str, Any]:
    if (kind := o.text("type", "adamw")) != "adamw":
        notes.append(f"optimizer.type = {kind!r} has no counterpart; adamw takes its place")
        return {}
    betas = o.entries("betas", 2) if o.has("betas") else None
    return {
        "lr": o.number("lr", 5e-4),
        "betas": [betas.number(key) for key in ("0", "1")] if betas else [0.9, 0.99],
        "eps": o.number("eps", 1e-8),
        "weight_decay": o.number("weight_decay", 1e-4),
    }


def _lr_schedule(top: Settings, notes: list[str]) -> dict[str, Any]:
    schedule = top.table("lr_sched")
    kind = schedule.text("type", "constant")
    if kind not in SCHEDULES:
        notes.append(f"lr_sched.type = {kind!r} has no counterpart; a constant takes its place")
        return {}
    names = {"num_steps": "steps"}
    given = {names.get(key, key): schedule.number(key, None) for key in SCHEDULES[kind]}
    return {
        "schedule": {"kind": kind} | {key: v for key, v in given.items() if v is not None},
    }


def _averaging(ema: Settings, notes: list[str]) -> dict[str, Any]:
    if (kind := ema.text("type", "inverse")) != "inverse":
        notes.append(f"ema_sched.type = {kind!r} has no counterpart; ours takes its place")
        return {}
    return {
        "power": ema.number("power", 0.6667),
        "inv_gamma": ema.number("inv_gamma", 1.0),
        "max_decay": ema.number("max_value", 0.9999),
    }


def config_to_toml(path: Path, raw: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """A config of ours, with what did not map in its first lines -> (text, the same as notes)."""
    config, shape, notes = from_config(raw, str(path))
    notes += (
        "training.images, .checkpoint_every and .batch_size are not in their config: set them "
        "before you train",
    )
    if config.data_shape(0).channels != shape.channels:
        notes += (f"model.input_channels = {shape.channels} was left out: images have 1 or 3",)
    head = [f"Made of k-diffusion's {printable(path.name)} by `hdit convert`.", *notes]
    comment = "".join(f"# {line}\n" for line in head)
    table = config.model_dump(mode="json", exclude_none=True)
    return f"{comment}\n{tomli_w.dumps(table)}", notes


# ---- our settings -> theirs ----------------------------------------------------------------------


def to_config(model: Contents) -> tuple[dict[str, Any], tuple[str, ...]]:
    """-> (their config, as their loader fills it in; notes on what did not map).

    Raises InteropError where their model cannot be ours.
    """
    spec, d, shape, notes = model.config.model, model.config.diffusion, model.shape, []
    if not isinstance(spec, HDiTSpec):
        raise InteropError(f"{KIND} holds HDiT only, and {model.origin} is a {spec.kind}")
    low, high = model.config.sigma_range()
    raw: dict[str, Any] = {
        "model": {
            "sigma_data": shape.sigma_data,
            "augment_prob": model.config.data.augment.probability,
            "loss_config": "karras",
            "loss_weighting": _their_weighting(d.weighting, shape.sigma_data),
            "loss_scales": d.loss_scales,
            **_their_model(spec),
            "input_channels": shape.channels,
            "input_size": [shape.height, shape.width],
            "sigma_min": low,
            "sigma_max": high,
            "sigma_sample_density": _their_density(d.density),
        },
        "dataset": {
            "type": "imagefolder",
            "location": getattr(model.config.data, "path", "images"),
            "num_classes": shape.num_classes,
            "cond_dropout_rate": model.config.training.label_dropout,
        },
        **_their_training(model.config),
    }
    for key, ours in (("loss_weighting", d.weighting), ("sigma_sample_density", d.density)):
        if raw["model"][key] is None:
            del raw["model"][key]
            notes.append(f"{ours} has no counterpart in {KIND}: its model.{key} was left out")
    back, signal_back, _ = from_config(raw, f"{KIND} config of {model.origin}")
    check_held(KIND, model, back, signal_back)
    return raw, (*notes, *_not_held(model.config, back))


RECIPE = {
    "data": ("augment", "crop", "flip"),
    "space": ("kind",),
    "training": ("clip_grad_norm", "ema", "label_dropout", "optimizer"),
}
"""Settings of ours that change what a training makes, and that their trainer has a value of."""


def _not_held(config: RunConfig, back: RunConfig) -> list[str]:
    """A note for each setting of the recipe that reads back from their config as another one."""
    ours, theirs = (c.model_dump(mode="json", exclude_none=True) for c in (config, back))
    notes = []
    if not config.training.ema.warmup:
        ours["training"]["ema"] = theirs["training"]["ema"]
        notes.append(
            "training.ema.warmup = False was written as a power of 100: their average begins with "
            "the weights after the first step"
        )
    for table, keys in RECIPE.items():
        for key in keys:
            pair = (ours[table].get(key), theirs[table].get(key))
            if pair[0] is None:  # such as the crop of images that need none
                continue
            notes += [
                f"{path} = {one!r} has no place in a config of {KIND}, where it is {other!r}"
                for path, one, other in differences(*pair, f"{table}.{key}")
            ]
    return notes


def _their_model(spec: HDiTSpec) -> dict[str, Any]:
    """What of their model table is the network's alone."""
    mapping = spec.mapping
    kinds = {ours: (theirs, keys) for theirs, (ours, keys) in ATTENTION.items()}
    attentions = []
    for level in spec.levels:
        attention = level.attention
        assert attention is not None, "resolved"
        theirs, keys = kinds[attention.kind]
        attentions.append({"type": theirs, **{key: getattr(attention, key) for key in keys}})
    return {
        "type": "image_transformer_v2",
        "patch_size": [spec.patch_size, spec.patch_size],
        "depths": [level.depth for level in spec.levels],
        "widths": [level.width for level in spec.levels],
        "d_ffs": [level.d_ff for level in spec.levels],
        "self_attns": attentions,
        "dropout_rate": [level.dropout for level in spec.levels],
        "mapping_width": mapping.width,
        "mapping_depth": mapping.depth,
        "mapping_d_ff": mapping.d_ff,
        "mapping_cond_dim": spec.vector_width,
        "mapping_dropout_rate": mapping.dropout,
        "augment_wrapper": False,
        "skip_stages": 0,
        "has_variance": False,
    }


def _their_weighting(weighting: Weighting, sigma_data: float) -> str | None:
    if isinstance(weighting, SoftMinSNR):
        gamma = weighting.gamma
        same = gamma is None or math.isclose(gamma * sigma_data**2, 1, rel_tol=1e-9)
        return "soft-min-snr" if same else None
    return next((name for name, ours in WEIGHTINGS.items() if ours == weighting), None)


def _their_density(density: Density) -> dict[str, Any] | None:
    def ends(spec: Any) -> dict[str, float]:
        pairs = {"min_value": spec.sigma_min, "max_value": spec.sigma_max}
        return {key: value for key, value in pairs.items() if value is not None}

    match density:
        case Lognormal(kind="lognormal", mean=mean, std=std, sigma_min=None, sigma_max=None):
            return {"type": "lognormal", "mean": mean, "std": std}
        case SplitLognormal(mode=mode, std_low=low, std_high=high, sigma_min=None, sigma_max=None):
            return {"type": "split-lognormal", "loc": mode, "scale_1": low, "scale_2": high}
        case LogLogistic(loc=loc, scale=scale):
            return {"type": "loglogistic", "loc": loc, "scale": scale, **ends(density)}
        case LogUniform():
            return {"type": "loguniform", **ends(density)}
        case VDiffusion():
            return {"type": "v-diffusion", **ends(density)}
        case CosineInterpolated(noise_d_low=low, noise_d_high=high):
            sizes = {"noise_d_low": low, "noise_d_high": high}
            return {"type": "cosine-interpolated", **ends(density), **sizes}
    return None


def _their_training(config: RunConfig) -> dict[str, Any]:
    o, ema = config.training.optimizer, config.training.ema
    # One that counts images, and a warm-up in images, have no place there: a note tells of it.
    in_steps = isinstance(o.schedule, StepLR)
    schedule: Spec = o.schedule if in_steps else ConstantLR()
    lr = schedule.model_dump(exclude={"warmup_images"})
    lr_sched = {"type": lr.pop("kind")} | lr
    if "steps" in lr_sched:
        lr_sched["num_steps"] = lr_sched.pop("steps")
    return {
        "optimizer": {
            "type": "adamw",
            "lr": o.lr,
            "betas": list(o.betas),
            "eps": o.eps,
            "weight_decay": o.weight_decay,
        },
        "lr_sched": lr_sched,
        "ema_sched": {
            "type": "inverse",
            # Theirs always warms up; with this power only the first step, which copies.
            "power": ema.power if ema.warmup else 100.0,
            "inv_gamma": ema.inv_gamma,
            "max_value": ema.max_decay,
        },
    }


# ---- files ---------------------------------------------------------------------------------------


def their_name(name: str) -> str:
    """Our name of a parameter or buffer -> theirs."""
    for ours, theirs in (
        (".core.qk.scale", ".scale"),
        (".core.rope.freqs", ".pos_emb.freqs"),
        (".core.", "."),
    ):
        name = name.replace(ours, theirs)
    return name


def layout(config: RunConfig, data_shape: DataShape) -> Layout:
    """Where each of our tensors lies in their file."""
    return make_layout(config, data_shape, lambda name, shape: Place((their_name(name),), shape))


def read(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Contents:
    """The model of a .safetensors file."""
    if "config" not in metadata:
        raise InteropError(
            f"{path}: has no config in its metadata, where k-diffusion's convert_for_inference.py "
            "writes it"
        )
    raw = read_table(metadata["config"], f"{path}: config in the metadata")
    config, shape, notes = from_config(raw, f"{path}: config in the metadata")
    ours = gather(path, layout(config, shape), tensors, config, shape)
    classes = tuple(str(i) for i in range(shape.num_classes))
    origin = f"{KIND} checkpoint {path.name}"
    return Contents(config, shape, classes, {"given": ours}, origin, notes=notes)


def read_config(path: Path) -> dict[str, Any]:
    """Their config in a JSON file."""
    raw = read_object(path)
    if not isinstance(raw.get("model"), dict):
        raise InteropError(f"{path}: is no config of k-diffusion: it has no model table")
    return raw


def write(model: Contents, path: Path) -> tuple[str, ...]:
    """Writes a .safetensors file with its config -> notes."""
    raw, notes = to_config(model)
    tensors = scatter(layout(model.config, model.shape), model.state_dict)
    save_tensors(tensors, path, {"config": json.dumps(raw, indent=4)})
    return notes
