"""From settings to a network and its denoiser."""

from __future__ import annotations

from hdit import models
from hdit.config import RunConfig
from hdit.device import Precision, autocast_dtype
from hdit.diffusion.denoiser import Denoiser
from hdit.models import BackboneModule
from hdit.protocols import DataShape, Network


def make_network(config: RunConfig, shape: DataShape) -> BackboneModule:
    """The backbone of a config, freshly initialised."""
    return models.build(config.model, shape, config.output_channels(shape))


def make_denoiser(
    backbone: Network, config: RunConfig, shape: DataShape, precision: Precision = "fp32"
) -> Denoiser:
    """The denoiser that a config makes of a backbone."""
    d = config.diffusion
    assert d.c_noise is not None, "the config must be resolved"
    return Denoiser(
        backbone,
        d.parametrization,
        d.c_noise,
        shape.sigma_data,
        table=d.beta_schedule,
        learned_variance=d.learned_variance,
        autocast=autocast_dtype(precision),
    )
