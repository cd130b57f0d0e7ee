"""Whether a model fits into a machine's memory: told before anything is made, not by a kill."""

from __future__ import annotations

import torch

from hdit.device import total_memory
from hdit.errors import UserError
from hdit.models import BackboneSpec
from hdit.models.cost import cost
from hdit.models.memory import training_memory
from hdit.protocols import DataShape

TRAINED = 20  # bytes of a parameter: float32 weights, EMA, gradient and two moments
MACS_OF_A_VALUE = 10  # at least, for each value that is kept for backward; presets have 60 to 900
STATES = 4  # x, its noise, what is predicted and one between, of each image that is sampled


def check_weights(spec: BackboneSpec, shape: DataShape, out_channels: int) -> None:
    """Raises UserError where float32 weights alone exceed the memory of the CPU they are made on.

    On torch's meta device, and within FakeTensorMode, nothing is made: do not ask there.
    """
    parameters = sum(part.params for part in cost(spec, shape, out_channels))
    need, have = 4 * parameters, total_memory(torch.device("cpu"))
    if need > have:
        raise UserError(
            f"model: its {parameters:,} parameters take {_gib(need)}, and this machine has "
            f"{_gib(have)}; take a smaller width or depth"
        )


def check_training(
    spec: BackboneSpec,
    shape: DataShape,
    out_channels: int,
    batch: int,
    device: torch.device,
    *,
    checkpointing: bool,
    autocast: torch.dtype | None,
    shards: int = 1,
    averages: int = 1,
) -> str | None:
    """What to tell of an eager step with `batch` images, or None if it fits on the device.

    `shards` is the number of processes that share what is kept of each parameter, `averages` that
    of EMAs. Raises UserError where what is kept is too much already. A step that fits by far is
    told from its cost alone, as the exact prediction takes seconds.
    """
    parts = cost(spec, shape, out_channels)
    parameters, macs = sum(part.params for part in parts), sum(part.macs for part in parts)
    fixed = (TRAINED + 4 * (averages - 1)) * parameters // shards
    have = total_memory(device)
    if fixed > have:
        raise UserError(
            f"model: the weights, EMA, gradients and moments of its {parameters:,} parameters take "
            f"{_gib(fixed)}, and this machine's {device.type} has {_gib(have)}; take a smaller "
            "width or depth"
        )
    if fixed + 4 * batch * macs / MACS_OF_A_VALUE < have / 2:
        return None
    need = training_memory(
        spec,
        shape,
        batch,
        out_channels=out_channels,
        checkpointing=checkpointing,
        autocast=autocast,
        device="cuda" if device.type == "cuda" else "cpu",
    ).peak - (TRAINED * parameters - fixed)
    if need <= have:
        return None
    fix = "" if checkpointing else "training.gradient_checkpointing, "
    return (
        f"training.batch_size: a step with {batch:,} images at once takes {_gib(need)}, and this "
        f"machine's {device.type} has {_gib(have)}; set {fix}a larger training.accumulate, or a "
        "smaller batch or model"
    )


def check_sampling(shape: DataShape, batch: int, device: torch.device) -> None:
    """Raises UserError where `batch` images alone, without the network, exceed the memory."""
    need, have = 4 * STATES * batch * shape.channels * shape.height * shape.width, 0
    if need > 2**30 and need > (have := total_memory(device)):
        raise UserError(
            f"sampling.batch_size: {batch:,} images at once take more than {_gib(need)}, and this "
            f"machine's {device.type} has {_gib(have)}; set a smaller one"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.4g} GiB"
