"""What a model and a step of it take, as a config asks for them: nothing is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hdit.config import RunConfig
from hdit.data.source import DataError
from hdit.device import (
    Precision,
    autocast_dtype,
    default_device,
    memory_in_use,
    precision_on,
)
from hdit.latents.store import read_manifest
from hdit.models import memory
from hdit.models.memory import Memory
from hdit.names import path_of
from hdit.protocols import DataShape
from hdit_kernels import native


def classes_of(config: RunConfig) -> tuple[int, str | None]:
    """How many classes the config names, or its data has; or 0, and why they are not known."""
    named = getattr(config.data, "classes", None)
    if named is not None:
        return (named if isinstance(named, int) else len(named)), None
    stored = getattr(config.space, "stored", None)
    try:
        held = read_manifest(path_of(stored)) if stored else config.data.open()
    except DataError as error:
        return 0, (
            "counted without classes (or give --classes, or set data.classes), as the data cannot "
            f"be read: {error}"
        )
    return len(held.classes), None


def precision_for(config: RunConfig, device: str) -> Precision:
    """What training.precision comes to on a device, which need not be in this machine."""
    asked, cuda_here = config.training.precision, torch.cuda.is_available()
    if device == "cpu" or cuda_here:
        return precision_on(torch.device(device), asked, "training.precision")
    # Devices from compute capability 8.0 on, which are assumed, have all of them.
    return "bf16" if asked == "auto" else asked


@dataclass(frozen=True)
class Mode:
    """How a step is taken: what a config may set to spend less memory."""

    parallel: str  # ddp or fsdp; empty for a single process
    checkpointing: bool

    @property
    def title(self) -> str:
        """Its name in a table."""
        told = "checkpointed" if self.checkpointing else "plain"
        return f"{self.parallel} {told}".strip()


def step_memory(
    config: RunConfig,
    shape: DataShape,
    images: int,
    device: str,
    mode: Mode,
    *,
    parts: int = 1,
    processes: int = 1,
) -> Memory:
    """Of an eager step in one of so many processes, with `images` at once."""
    shards = processes // config.training.replicate if mode.parallel == "fsdp" else 1
    return memory.training_memory(
        config.model,
        shape,
        images,
        out_channels=config.output_channels(shape),
        checkpointing=mode.checkpointing,
        autocast=autocast_dtype(precision_for(config, device)),
        device=device,
        parts=parts,
        averages=config.training.ema.number,
        processes=processes,
        shards=shards,
    )


def operators_on(device: str) -> str:
    """Whose operators are counted on a device, in words."""
    if device == "cuda" or native.unavailable():
        return "torch's operators"
    return "the C++ library's and torch's operators"


def device_here() -> str:
    """The kind of device that a run here would take."""
    return default_device().type


def process_memory() -> int:
    """Bytes of this process, with all code that a step on a CPU loads, and no model to speak of."""
    layer = nn.Linear(32, 32)
    optimizer = torch.optim.AdamW(layer.parameters())
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            x = nn.functional.layer_norm(layer(torch.zeros(64, 32)), [32])
            q = x.view(1, 2, 32, 32)
            out = nn.functional.scaled_dot_product_attention(q, q, q)
        out.float().square().mean().backward()
        optimizer.step()
    return memory_in_use(torch.device("cpu"))
