"""What facebook's DiT and diffusers' have in common: the settings that follow from their model."""

from __future__ import annotations

import math
from typing import Any

from hdit.config import RunConfig, parse
from hdit.interop.contents import Contents, InteropError, check_held
from hdit.models import DiTSpec
from hdit.protocols import DataShape
from hdit.spaces import LatentSpace

VAE, VAE_CHANNELS = "stabilityai/sd-vae-ft-ema", 4
"""Of the published samples; DiT's own checkpoints do not name it."""


TRAINING = {
    "images": 1_800_000_000,
    "checkpoint_every": 12_800_000,
    "batch_size": 256,
    "optimizer": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.0},
    "clip_grad_norm": 0,
    "ema": {"warmup": False},
}
"""The paper's recipe."""


def settings(
    model: dict[str, Any],
    channels: int,
    size: int,
    num_classes: int,
    learned: bool,
    origin: str,
    schedule: dict[str, Any] | None = None,
) -> tuple[RunConfig, DataShape]:
    """A DiT of the paper: noise prediction, its timesteps, recipe and sampler.

    `size` is the side of what the backbone sees. That is an image with 1 or 3 channels, else a
    latent of one eight times as large. Raises ConfigError where the model does not fit.
    """
    latent = channels not in (1, 3)
    side = size * LatentSpace().factor if latent else size
    space = {"kind": "latent", "channels": channels}
    if channels == VAE_CHANNELS:
        space["vae"] = VAE
    table = schedule or {"kind": "linear", "steps": 1000}
    raw = {
        "data": {
            "kind": "folder",
            "path": "images",
            "size": [side, side],
            "channels": 3 if latent else channels,
        },
        "space": space if latent else {"kind": "pixel"},
        "model": {"kind": "dit", **model},
        "diffusion": {
            "parametrization": {"kind": "eps_vp"},
            "c_noise": "timestep",
            "weighting": {"kind": "eps"},
            "density": {"kind": "uniform_vp"},
            "beta_schedule": table,
            "learned_variance": learned,
        },
        "training": TRAINING,
        "sampling": {
            "sampler": {"kind": "ddpm"},
            "sigmas": {"kind": "linear_t"},
            "steps": min(250, table.get("steps", 1000)),
            "guidance": {"channels": 3} if latent else {},
        },
    }
    config = parse(raw, origin)
    return config, config.data_shape(num_classes)


def learns_variance(channels: int, out_channels: int, origin: str) -> bool:
    """Raises InteropError where the output is neither the noise nor the noise and a variance."""
    if out_channels not in (channels, 2 * channels):
        raise InteropError(
            f"{origin}: predicts {out_channels} channels of {channels}, neither as many nor twice"
        )
    return out_channels == 2 * channels


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio that gives an MLP this hidden width, rounding down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def side_of(tokens: int, origin: str) -> int:
    """Of a square grid of tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise InteropError(f"{origin}: {tokens} positions are no square grid of tokens")
    return side


def dit_spec(config: RunConfig) -> DiTSpec:
    """The model of a config that is known to be of a DiT."""
    assert isinstance(config.model, DiTSpec), "checked before"
    return config.model


def check_dit(kind: str, model: Contents, hidden: dict[str, Any] | None = None) -> DiTSpec:
    """The DiT of a model, if a square, class-conditional one with adaLN-Zero; else InteropError.

    `hidden` are settings that the format prescribes.
    """
    spec, shape = model.config.model, model.shape
    if not isinstance(spec, DiTSpec):
        raise InteropError(f"{kind} holds DiT only, and {model.origin} is an {spec.kind}")
    if not shape.num_classes:
        raise InteropError(
            f"{kind} holds class-conditional DiT only: {model.origin} has no classes"
        )
    plain = {key: getattr(spec, key) for key in ("patch_size", "depth", "width", "num_heads")}
    back, signal_back = settings(
        plain | {"mlp_ratio": spec.mlp_ratio} | (hidden or {}),
        shape.channels,
        shape.height,
        shape.num_classes,
        model.config.diffusion.learned_variance,
        f"{kind} settings of {model.origin}",
    )
    check_held(kind, model, back, signal_back)
    return spec
