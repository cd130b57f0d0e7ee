"""Steps of the real trainer on this device, timed, of which nothing is left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hdit.config import RunConfig
from hdit.data.batches import Batches, Layout
from hdit.data.source import Sample, Source, Stream
from hdit.device import (
    default_device,
    float32_products,
    forget_peak_memory,
    peak_memory,
    precision_on,
)
from hdit.errors import UserError
from hdit.latents.encode import open_training_source
from hdit.protocols import Space
from hdit.sampling.sample import sample
from hdit.spaces import PixelSpace
from hdit.training.optim import optimizer_tensors
from hdit.training.trainer import Trainer

WARM = 2  # steps that are not counted: the first ones allocate, compile and choose kernels
STEPS = 3  # at least
SECONDS = 4.0  # so many more steps while this lasts, as those of small models scatter
MOST = 100
SAMPLED = 3  # steps of the sampler
ENOUGH = 10.0  # seconds that these should take at most; fewer images otherwise
LOADED = 2  # batches, to see how fast a process loads

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What one process took on this device."""

    steps: list[float]  # seconds of each
    images: int  # of a step
    evaluation: float | None  # seconds of the network for an image that is sampled, of a batch
    saving: float  # seconds in which training stands still for a checkpoint
    loading: float | None  # images a second that one process loads; None where they are drawn
    peak: int  # bytes, as metrics.jsonl tells
    notes: list[str]  # what was not as in training

    @property
    def images_per_second(self) -> float:
        """Of the median step."""
        return self.images / median(self.steps)


def measure(config: RunConfig, processes: int, classes: int, say: Say) -> Measured:
    """Times steps of one of so many processes, with the part of the batch that it would take.

    Where data or VAE cannot be opened, images are drawn, of `classes` classes. Raises UserError
    where training would, but for missing data.
    """
    t = config.training
    config = config.model_copy(
        update={"training": t.model_copy(update={"batch_size": t.batch_size // processes})}
    )
    forget_peak_memory(torch.device("cpu"))
    trainer = _Trainer.of(config, classes, say)
    precision = precision_on(trainer.device, trainer.config.training.precision)
    with float32_products(precision), closing(trainer.saver):
        stream = trainer.open_stream()
        steps = _timed_steps(trainer, stream)
        del stream  # ends its workers
        saving = _saving(trainer)
        peak = peak_memory(trainer.device)
        evaluation = _evaluation(trainer, median(steps)) if config.sampling.grid else None
        loading = None if trainer.notes else _loading(trainer)
    batch = config.training.batch_size
    return Measured(steps, batch, evaluation, saving, loading, peak, trainer.notes)


class _Trainer(Trainer):
    """A trainer that writes nothing: its folder is never made."""

    notes: list[str]

    @classmethod
    def of(cls, config: RunConfig, classes: int, say: Say) -> _Trainer:
        """For the data of a config, or for drawn images."""
        folder = Path("runs", f".plan-{os.getpid()}")
        opened, notes = _open(config, classes)
        trainer = cls(config, folder, Console(stderr=True, quiet=True), opened)
        trainer.notes = notes
        for note in notes:
            say(note)
        return trainer

    def _alone(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Drawn:
    """As many equal images as one asks for."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        self.classes = [f"class {i}" for i in range(classes)]
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.image, index % max(len(self.classes), 1))


def _open(config: RunConfig, classes: int) -> tuple[tuple[Space, Source | Stream], list[str]]:
    """Space and data, and what stands in for what cannot be opened."""
    try:
        space = config.space.open(default_device())
        return (space, open_training_source(config, space)), []
    except UserError as error:
        why = str(error)
    shape = config.data_shape(classes)
    latent = config.space.kind == "latent"
    what = "latents" if latent else "images"
    note = f"measured on {what} that were drawn, without the time to load them: {why}"
    # What the network sees has the latents' shape, and is as it is: no VAE runs.
    return (PixelSpace(sigma_data=shape.sigma_data), _Drawn(shape.chw, classes)), [note]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed_steps(trainer: _Trainer, stream: Batches) -> list[float]:
    """Seconds of each step: data, passes, optimizer and EMA, and the look at the guard."""
    took: list[float] = []
    for _ in range(WARM + MOST):
        began = _now(trainer.device)
        trainer._step(stream)
        trainer.images += trainer.config.training.batch_size
        trainer.step += 1
        trainer.is_lost(at_a_line=False)
        took.append(_now(trainer.device) - began)
        counted = took[WARM:]
        if len(counted) >= STEPS and sum(counted) >= SECONDS:
            break
    return took[WARM:]


def _saving(trainer: _Trainer) -> float:
    """Seconds that the checks of a checkpoint take, and the copy that is written later."""
    began = _now(trainer.device)
    tensors = {
        "model": trainer.backbone.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimizer": optimizer_tensors(trainer.backbone, trainer.optimizer),
    }
    trainer.why_ruined(tensors)
    for part in tensors.values():
        for tensor in part.values():
            tensor.detach().to("cpu", copy=True)
    return _now(trainer.device) - began


class _Enough(Exception):
    """Ends the sampling."""


def _evaluation(trainer: _Trainer, step: float) -> float:
    """Seconds of one evaluation of an image, in a batch as of a grid, or in one small enough."""
    config, device = trainer.config, trainer.device
    forward = step / config.training.batch_size / 3  # of an image; an estimate
    fitting = int(ENOUGH / (SAMPLED * forward))
    number = max(1, min(config.sampling.grid, config.sampling.batch_size, fitting))
    classes = trainer.shape.num_classes
    labels = [i % classes for i in range(number)] if classes else None
    seen = [0, 0]  # images that the network saw, steps of the sampler

    def count(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen[0] += len(output)

    def on_step() -> None:
        seen[1] += 1
        if seen[1] > SAMPLED:
            raise _Enough

    seconds = 0.0
    handle = trainer.ema.register_forward_hook(count)
    for _ in range(2):  # the first warms up
        seen[:], began = [0, 0], _now(device)
        parts: Iterator[Any] = sample(
            trainer.ema, config, trainer.shape, list(range(number)), labels, device, on_step,
            space=trainer.space,
        )  # fmt: skip
        with suppress(_Enough):
            next(parts)
        seconds = _now(device) - began
    handle.remove()
    return seconds / seen[0]


def _loading(trainer: _Trainer) -> float:
    """Images a second that one process loads, without the network."""
    t = trainer.config.training
    layout = Layout(t.batch_size, t.accumulate)
    stream = Batches(trainer.source, seed=t.seed, start=0, layout=layout, workers=0)
    next(stream)
    began = time.perf_counter()
    images = sum(len(next(stream).labels) for _ in range(LOADED))
    return images / (time.perf_counter() - began)
