"""From settings to a network and its denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hdit import models
from hdit.config import RunConfig
from hdit.device import Precision, autocast_dtype, precision_on
from hdit.diffusion.denoiser import Denoiser
from hdit.errors import UserError
from hdit.models import BackboneModule
from hdit.models.fitting import check_training, check_weights
from hdit.protocols import DataShape, Network


def make_network(config: RunConfig, shape: DataShape) -> BackboneModule:
    """The backbone of a config, freshly initialised. Raises UserError if it exceeds the memory."""
    check_weights(config.model, shape, config.output_channels(shape))
    return models.build(config.model, shape, config.output_channels(shape))


def check_step(
    config: RunConfig,
    shape: DataShape,
    device: torch.device,
    processes: int,
    compiled: bool,
    warn: Callable[[str], None],
) -> None:
    """Raises UserError where a training step exceeds the device's memory, by what is predicted.

    Where the blocks are compiled, which keeps less, that is a warning.
    """
    t = config.training
    batch = t.batch_size // t.accumulate // processes
    precision = precision_on(device, t.precision)
    too_much = check_training(
        config.model,
        shape,
        config.output_channels(shape),
        batch,
        device,
        checkpointing=t.gradient_checkpointing,
        shards=processes // t.replicate if t.parallel == "fsdp" else 1,
        autocast=autocast_dtype(precision),
        averages=t.ema.number,
    )
    if too_much and not compiled:
        raise UserError(too_much)
    if too_much:
        warn(too_much)


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
