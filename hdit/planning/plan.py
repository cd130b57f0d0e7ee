"""What training will cost: memory of each GPU, hours, money and disk, to the end of a config."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hdit.config import RunConfig
from hdit.errors import UserError
from hdit.models.cost import cost
from hdit.models.memory import Memory
from hdit.models.peaks import PEAKS, peak_flops
from hdit.planning.measure import Measured
from hdit.planning.model import Mode, precision_for, step_memory
from hdit.protocols import DataShape, PartCost
from hdit.runs.saver import need
from hdit.sampling.sample import evaluations

COPIED = 2e9  # bytes of a checkpoint that are checked and copied to the host in a second
WRITTEN = 4e8  # and that are written, with checksums, while nothing else goes on
USABLE = 0.92  # of a card: CUDA's context, kernels' buffers and fragmentation take the rest


@dataclass(frozen=True)
class Asked:
    """What is planned for, beside the config."""

    device: str = "cuda"
    gpus: int = 1  # or processes, on a CPU
    at_once: int | None = None  # images that each takes at once
    mfu: float = 0.4
    peak: float | None = None  # FLOP/s of one
    price: float | None = None  # of one for an hour
    evaluated: int = 0  # images that are sampled for an evaluation at the end
    card: float | None = None  # bytes of a GPU that the step is to fit in


@dataclass(frozen=True)
class Step:
    """A step of one process."""

    mode: Mode
    memory: Memory


@dataclass(frozen=True)
class Fit:
    """A process's batch in as few parts as a card holds in a mode."""

    mode: Mode
    images: int  # of a part, at once; 0 if not even one fits
    accumulate: int  # parts of the batch, or 0
    peak: int  # bytes, of those parts


@dataclass(frozen=True)
class Speed:
    """What a process does in a second."""

    source: str
    images_per_second: float  # of training
    evaluations_per_second: float | None  # of the network, for one image that is sampled
    saving: float  # seconds that training stands still for each checkpoint


@dataclass(frozen=True)
class Hours:
    """Where the time goes."""

    training: float
    grids: float
    validation: float
    checkpoints: float
    evaluation: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """What was asked, and what it comes to."""

    config: RunConfig
    shape: DataShape
    asked: Asked
    parts: list[PartCost]
    precision: str
    at_once: int
    accumulate: int
    steps: list[Step]  # the config's own first
    fits: list[Fit]
    speed: Speed | None
    evaluations: int  # of the network for an image of a grid
    hours: Hours | None
    process: int | None  # bytes of a process without a model; None on a GPU
    measured: Measured | None
    notes: list[str]

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(part.params for part in self.parts)

    @property
    def macs(self) -> int:
        """Of a forward pass of one image."""
        return sum(part.macs for part in self.parts)

    @property
    def disk(self) -> tuple[int, int]:
        """Bytes of one checkpoint, and of all that a run keeps."""
        return need(self.parameters, self.config.training, 0)

    @property
    def money(self) -> float | None:
        """What all GPUs cost for so long."""
        if self.asked.price is None or self.hours is None:
            return None
        return self.asked.price * self.asked.gpus * self.hours.total


def make_plan(
    config: RunConfig,
    classes: int,
    asked: Asked,
    measured: Measured | None = None,
    process: int | None = None,
) -> Plan:
    """The plan of a config whose data has so many classes.

    `process` is the bytes of a process without a model, where memory is counted so. Raises
    UserError where batch and GPUs do not go together, or a price has no hours.
    """
    shape, t = config.data_shape(classes), config.training
    parts = cost(config.model, shape, config.output_channels(shape))
    at_once, accumulate = cut(config, asked)
    precision = precision_for(config, asked.device)
    macs = sum(part.macs for part in parts)
    disk = need(sum(part.params for part in parts), t, 0)[0]
    notes = list(measured.notes) if measured else []
    if measured:
        speed: Speed | None = _measured_speed(config, measured, disk, notes)
    else:
        speed = _stated_speed(config, asked, macs, disk)
    if asked.price is not None and speed is None:
        raise UserError(
            "--price: needs hours, and so a speed: give --measure, or --gpu or --peak-tflops"
        )
    count = evaluations(config, shape) if config.sampling.grid or asked.evaluated else 0
    hours = None
    if speed:
        hours = _hours(config, asked, speed, count, notes)
    if config.sampling.sampler.kind == "dpm_adaptive":
        notes.append("dpm_adaptive chooses its steps by the model: its grids are only guessed")
    steps = [
        Step(mode, _memory(config, shape, asked, mode, at_once, accumulate))
        for mode in modes(config, asked.gpus)
    ]
    fits = [_fit(config, shape, asked, mode) for mode in modes(config, asked.gpus)]
    return Plan(
        config, shape, asked, parts, precision, at_once, accumulate, steps,
        fits if asked.card else [], speed, count, hours, process, measured, notes,
    )  # fmt: skip


def cut(config: RunConfig, asked: Asked) -> tuple[int, int]:
    """(images at once, parts of a batch) of each process. Raises UserError if that is no cut."""
    t, gpus = config.training, asked.gpus
    at_once = asked.at_once
    if at_once is None:
        if t.batch_size % (gpus * t.accumulate):
            raise UserError(
                f"--gpus: training.batch_size ({t.batch_size}) cannot be shared by {gpus} GPUs in "
                f"{t.accumulate} accumulation steps; take a divisor, or give --batch"
            )
        return t.batch_size // (gpus * t.accumulate), t.accumulate
    if t.batch_size % (gpus * at_once):
        raise UserError(
            f"--batch: {at_once} images at once on {gpus} GPUs must divide training.batch_size "
            f"({t.batch_size}); set that, too"
        )
    return at_once, t.batch_size // (gpus * at_once)


def modes(config: RunConfig, gpus: int) -> list[Mode]:
    """Those that memory is told of, the config's own first."""
    t = config.training
    ways = ["ddp", "fsdp"] if gpus > 1 else [""]
    own = Mode(t.parallel if gpus > 1 else "", t.gradient_checkpointing)
    others = [Mode(way, checkpointing) for way in ways for checkpointing in (False, True)]
    return [own, *(mode for mode in others if mode != own)]


def _memory(
    config: RunConfig, shape: DataShape, asked: Asked, mode: Mode, at_once: int, parts: int
) -> Memory:
    return step_memory(
        config, shape, at_once, asked.device, mode, parts=parts, processes=asked.gpus
    )


# ---- what fits -----------------------------------------------------------------------------------


def _fit(config: RunConfig, shape: DataShape, asked: Asked, mode: Mode) -> Fit:
    """The largest cut of the batch that a card holds in a mode."""
    if asked.card is None:
        return Fit(mode, 0, 0, 0)

    def peak(images: int, parts: int) -> int:
        return _memory(config, shape, asked, mode, images, parts).peak

    return largest(mode, peak, USABLE * asked.card, config.training.batch_size // asked.gpus)


def largest(mode: Mode, peak: Callable[[int, int], int], room: float, batch: int) -> Fit:
    """The fewest parts of a process's `batch` whose peak, of (images, parts), is within `room`.

    A step's memory grows in its images no slower the more there are: the line through the batch
    and its half is below it, and tells which parts need no look.
    """
    whole = peak(batch, 1)
    if whole <= room:
        return Fit(mode, batch, 1, whole)
    half = batch // 2
    slope = (whole - peak(half, 1)) / (batch - half) if half else 0
    taken = whole
    for images in (n for n in range(half, 0, -1) if batch % n == 0):
        if images > 1 and whole - slope * (batch - images) > room:
            continue
        taken = peak(images, batch // images)
        if taken <= room:
            return Fit(mode, images, batch // images, taken)
    return Fit(mode, 0, 0, taken)


# ---- how long ------------------------------------------------------------------------------------


def known_peak(gpu: str | None, tflops: float | None, precision: str) -> float | None:
    """FLOP/s of a GPU by its name, or as they are given. Raises UserError for an unknown GPU."""
    if tflops is not None:
        return tflops * 1e12
    if gpu is None:
        return None
    if (peak := peak_flops(gpu, precision)) is None:
        raise UserError(
            f"--gpu: the peak of {gpu!r} in {precision} is not known; there are "
            f"{', '.join(PEAKS)}; or give --peak-tflops"
        )
    return peak


def _stated_speed(config: RunConfig, asked: Asked, macs: int, disk: int) -> Speed | None:
    """By the share of a peak that is reached: 3 forward passes' work, 4 with checkpointing."""
    if asked.peak is None:
        return None
    t = config.training
    forward = asked.mfu * asked.peak / (2 * macs)  # passes of one image in a second
    passes = 4 if t.gradient_checkpointing else 3
    saving = disk / COPIED + (0 if t.background_saves else disk / WRITTEN)
    source = f"{asked.mfu:.0%} of {asked.peak / 1e12:,.4g} TFLOP/s"
    return Speed(source, forward / passes, forward, saving)


def stated_hours(config: RunConfig, classes: int, asked: Asked) -> Hours:
    """Hours by a share of a peak, without a look at memory."""
    shape = config.data_shape(classes)
    parts = cost(config.model, shape, config.output_channels(shape))
    disk = need(sum(part.params for part in parts), config.training, 0)[0]
    speed = _stated_speed(config, asked, sum(part.macs for part in parts), disk)
    assert speed is not None, "a peak is stated"
    count = evaluations(config, shape) if config.sampling.grid else 0
    return _hours(config, asked, speed, count, [])


def _measured_speed(config: RunConfig, measured: Measured, disk: int, notes: list[str]) -> Speed:
    """By steps that were timed; slower where its workers load no more."""
    t, speed = config.training, measured.images_per_second
    if measured.loading is not None and t.workers and measured.loading * t.workers < speed:
        speed = measured.loading * t.workers
        notes.append(
            f"{t.workers} workers load {speed:,.4g} images/s, and the network takes "
            f"{measured.images_per_second:,.4g}: raise training.workers"
        )
    saving = measured.saving + (0 if t.background_saves else disk / WRITTEN)
    source = f"the median of {len(measured.steps)} steps here"
    each = 1 / measured.evaluation if measured.evaluation else None
    return Speed(source, speed, each, saving)


def _hours(
    config: RunConfig, asked: Asked, speed: Speed, evaluated: int, notes: list[str]
) -> Hours:
    """Of training and of all that it stands still for."""
    t = config.training
    checkpoints = -(-t.images // t.checkpoint_every)
    # A forward pass of a batch is a third of its training, or as fast as a grid's.
    passes = speed.evaluations_per_second or 3 * speed.images_per_second
    # All processes share grids by the image, and validation by the batch: the slowest one counts.
    grid = -(-config.sampling.grid // asked.gpus)
    seconds = Hours(
        training=t.images / (speed.images_per_second * asked.gpus),
        grids=checkpoints * grid * evaluated / passes,
        validation=_validated(config, asked.gpus) / passes,
        checkpoints=checkpoints * speed.saving,
        evaluation=asked.evaluated * evaluated / passes / asked.gpus,
    )
    if asked.gpus > 1 and speed.source.endswith("here"):
        notes.append(
            f"{asked.gpus} GPUs are taken to be as many times as fast: what they send each other "
            "is not measured"
        )
    return Hours(*(s / 3600 for s in asdict(seconds).values()))


def _validated(config: RunConfig, gpus: int) -> int:
    """Forward passes of one image that validation takes in one of so many processes, at most."""
    t, size = config.training, config.sampling.batch_size
    if not t.validate_every or not t.validate_images:
        return 0
    every, before = t.validate_every, t.images - 1
    rounds = before // every + 1  # the last is at the end
    if t.keep.best is not None:  # then also at each checkpoint
        rounds += before // t.checkpoint_every - before // math.lcm(every, t.checkpoint_every)
    batches = -(-t.validate_images // size)
    images = min(t.validate_images, -(-batches // gpus) * size)
    return rounds * images * (1 + t.ema.number)


# ---- as JSON -------------------------------------------------------------------------------------


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object: bytes, hours, images; what is not known is null."""
    s, asked, t = plan.shape, plan.asked, plan.config.training
    speed, hours, found = plan.speed, plan.hours, plan.measured
    each, kept = plan.disk
    return {
        "model": plan.config.model.kind,
        "shape": {
            "channels": s.channels, "height": s.height, "width": s.width, "classes": s.num_classes,
        },
        "parameters": plan.parameters,
        "macs": plan.macs,
        "device": asked.device,
        "gpus": asked.gpus,
        "precision": plan.precision,
        "images": t.images,
        "batch_size": t.batch_size,
        "images_at_once": plan.at_once,
        "accumulate": plan.accumulate,
        "memory": [_mode_dict(step.mode) | asdict(step.memory) for step in plan.steps],
        "process_memory": plan.process,
        "fits": [
            _mode_dict(fit.mode)
            | {"images_at_once": fit.images, "accumulate": fit.accumulate, "peak": fit.peak}
            for fit in plan.fits
        ],
        "speed": asdict(speed) if speed else None,
        "evaluations": plan.evaluations,
        "hours": (asdict(hours) | {"total": hours.total}) if hours else None,
        "price": plan.money,
        "checkpoint_bytes": each,
        "disk_bytes": kept,
        "measured": asdict(found) if found else None,
        "notes": plan.notes,
    }  # fmt: skip


def _mode_dict(mode: Mode) -> dict[str, Any]:
    return {"parallel": mode.parallel or None, "gradient_checkpointing": mode.checkpointing}
