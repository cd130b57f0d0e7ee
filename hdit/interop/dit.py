"""What facebook's DiT and diffusers' have in common: the settings that follow from their model."""

from __future__ import annotations

import math
from typing import Any

from hdit.config import RunConfig, parse
from hdit.diffusion.parametrization import FLOW_SIGMA_MAX
from hdit.interop.contents import Contents, InteropError, check_held
from hdit.models import DiTSpec
from hdit.protocols import DataShape
from hdit.spaces import LatentSpace

VAES = {name: f"stabilityai/sd-vae-ft-{name}" for name in ("ema", "mse")}
"""By the names that DiT's training has; the first is that of the published samples."""

VAE_SHAPE = (4, 8)
"""Their channels and factor."""

PIXELS = (1, 3)
"""Channels of an image; others are taken for those of a latent."""

GUIDED = 3
"""Channels that DiT's own sampling script guides."""

TRAINING = {
    "images": 1_800_000_000,
    "checkpoint_every": 12_800_000,
    "batch_size": 256,
    "optimizer": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.0},
    "clip_grad_norm": 0,
    "ema": {"warmup": False},
}
"""The paper's recipe."""

FLOW_STEPS = 50


def settings(
    model: dict[str, Any],
    channels: int,
    size: int,
    num_classes: int,
    learned: bool,
    origin: str,
    *,
    schedule: dict[str, Any] | None = None,
    factor: int | None = None,
    flow: bool = False,
    label_dropout: float = 0.1,
    vae: str = "ema",
) -> tuple[RunConfig, DataShape]:
    """A DiT of the paper: noise prediction, its timesteps, recipe and sampler; or SiT's flow.

    `size` is the side of what the backbone sees: of an image where `factor` is 1, else of a latent
    of one `factor` times as large. Where that is not known, 1 or 3 channels are an image's, and
    others a latent's, of factor 8. Raises ConfigError where the model does not fit.
    """
    if factor is None:
        factor = 1 if channels in PIXELS else LatentSpace().factor
    latent = factor > 1
    space = {"kind": "latent", "channels": channels, "factor": factor, "tile": 64 * factor}
    if (channels, factor) == VAE_SHAPE:
        space["vae"] = VAES[vae]
    raw: dict[str, Any] = {
        "data": {
            "kind": "folder",
            "path": "images",
            "size": [size * factor] * 2,
            "channels": 3 if latent else channels,
        },
        "space": space if latent else {"kind": "pixel"},
        "model": {"kind": "dit", **model},
        **(_flow() if flow else _noise(learned, schedule)),
        "training": TRAINING | {"label_dropout": label_dropout},
    }
    if latent and channels > GUIDED:
        raw["sampling"]["guidance"] = {"channels": GUIDED}
    config = parse(raw, origin)
    return config, config.data_shape(num_classes)


def _noise(learned: bool, schedule: dict[str, Any] | None) -> dict[str, Any]:
    """Diffusion and sampling of DiT."""
    table = schedule or {"kind": "linear", "steps": 1000}
    return {
        "diffusion": {
            "parametrization": {"kind": "eps_vp"},
            "c_noise": "timestep",
            "weighting": {"kind": "eps"},
            "density": {"kind": "uniform_vp"},
            "beta_schedule": table,
            "learned_variance": learned,
        },
        "sampling": {
            "sampler": {"kind": "ddpm"},
            "sigmas": {"kind": "linear_t"},
            "steps": min(250, table["steps"]),
        },
    }


def _flow() -> dict[str, Any]:
    """Diffusion and sampling of rectified flow, in even steps of its time."""
    return {
        "diffusion": {
            "parametrization": {"kind": "flow"},
            "c_noise": "flow_t",
            "weighting": {"kind": "flow"},
            "density": {"kind": "uniform_flow"},
        },
        "sampling": {
            "sampler": {"kind": "heun"},
            "sigmas": {"kind": "flow"},
            "steps": FLOW_STEPS,
            "sigma_min": 1 / (FLOW_STEPS - 1),  # time 1 / FLOW_STEPS, one step from the end
            "sigma_max": FLOW_SIGMA_MAX,
        },
    }


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
    """Side of a square grid of tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise InteropError(f"{origin}: {tokens} positions are no square grid of tokens")
    return side


def dit_spec(config: RunConfig) -> DiTSpec:
    """The model of a config that is known to be of a DiT."""
    assert isinstance(config.model, DiTSpec), "checked before"
    return config.model


def notes_of_null(config: RunConfig) -> tuple[str, ...]:
    """A note for a format that tells nothing of how a null class was trained."""
    if config.training.label_dropout > 0:
        return ()
    return (
        "training.label_dropout was 0, so the last row of the class table was never trained as a "
        "null class, which this format does not tell: guidance and samples without a class will "
        "not be the model's",
    )


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
