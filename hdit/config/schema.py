"""A run's settings: typed, read from TOML with `extends` and overrides, with errors that help."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, Field, ValidationError, model_validator

from hdit.bounds import (
    LR,
    BatchSize,
    GridCount,
    ImageCount,
    RelativeWidth,
    Seed,
    Share,
    Sigma,
    SigmaOrZero,
    StepCount,
    Steps,
    Width,
)
from hdit.config.errors import ConfigError, explain
from hdit.config.learning_rate import ConstantLR, LearningRate, Moment
from hdit.config.overrides import apply, read_toml
from hdit.data import DataSpec
from hdit.data.source import NO_SHARE
from hdit.diffusion.beta_schedules import AnyBetaSchedule, CosineSchedule, LinearSchedule
from hdit.diffusion.brownian import too_close
from hdit.diffusion.context import Context, DependentSpec, Problem, under
from hdit.diffusion.densities import CosineInterpolated, Density
from hdit.diffusion.guidance import APG
from hdit.diffusion.parametrization import EDM, CNoise, Parametrization
from hdit.diffusion.samplers import Sampler, spec_of
from hdit.diffusion.sigmas import AnySigmas, Karras
from hdit.diffusion.weighting import SoftMinSNR, Weighting
from hdit.errors import SpecError
from hdit.limits import MAX_GUIDANCE, MAX_WORKERS
from hdit.models import AnyBackbone
from hdit.protocols import DataShape, Spec
from hdit.spaces import PixelSpace, SpaceSpec

# ---- the settings --------------------------------------------------------------------------------


class DiffusionSpec(DependentSpec):
    """Choose what the network predicts, and which noise levels are trained with which weight."""

    parametrization: Parametrization = EDM()
    c_noise: CNoise | None = Field(
        None, description="what the backbone is told of sigma; by the kind of model if absent"
    )
    weighting: Weighting = SoftMinSNR()
    loss_scales: int = Field(
        1, ge=0, le=64, description="octaves of the multi-scale loss; 1 is plain"
    )
    density: Density = CosineInterpolated()
    beta_schedule: AnyBetaSchedule | None = Field(
        None, description="timesteps of eps_vp and uniform_vp; linear with 1000 steps if absent"
    )
    learned_variance: bool = Field(False, description="of the reverse process, as in iDDPM")

    @property
    def timesteps(self) -> LinearSchedule | CosineSchedule:
        """The beta schedule of the VP components, whether anything goes by it or not."""
        return self.beta_schedule or LinearSchedule()

    @property
    def by_timesteps(self) -> bool:
        """Whether a part of it is defined by the beta schedule."""
        parts = self.parametrization, self.density
        return self.learned_variance or any(part.by_timesteps for part in parts)

    def valid_range(self) -> tuple[float, float, str]:
        """The noise levels that the denoiser is defined at, and what bounds them."""
        low, high = self.parametrization.sigma_range(self.timesteps)
        by = f"parametrization {self.parametrization.kind!r}"
        first, last = self.timesteps.sigma_range()
        if (low, high) != (first, last):
            if self.learned_variance:
                return max(low, first), min(high, last), "the timesteps of learned_variance"
            if self.beta_schedule and self.c_noise == "timestep":
                return max(low, first), min(high, last), "the timesteps of c_noise 'timestep'"
        return low, high, by

    def resolved(self, context: Context) -> Self:
        """Resolves its parts; fills in c_noise, and the beta schedule where a part follows it."""
        schedule = self.timesteps if self.by_timesteps else None
        filled = self.filled(c_noise=context.c_noise, beta_schedule=schedule)
        return DependentSpec.resolved(filled, replace(context, valid_range=filled.valid_range()))


Precision = Literal["auto", "fp32", "tf32", "bf16"]
Compile = Literal["auto", True, False]


class OptimizerSpec(DependentSpec):
    """AdamW. HDiT's mapping network and modulation learn at a third of lr, as the paper does."""

    kind: Literal["adamw"] = "adamw"
    lr: LR = Field(5e-4, description="learning rate")
    schedule: LearningRate = ConstantLR()
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        (0.9, 0.95), description="decay of the first and the second moment"
    )
    eps: float = Field(1e-8, ge=1e-30, le=1, description="added to the root of the second moment")
    weight_decay: float = Field(1e-2, ge=0, le=1e3, description="decoupled from the gradient")

    def check(self, context: Context) -> Iterator[Problem]:
        """Yields (key, what is wrong): a lowest rate above lr."""
        if self.schedule.lowest > self.lr:
            yield (
                "schedule.min_lr",
                f"must be at most training.optimizer.lr ({self.lr:g}), "
                f"got {self.schedule.lowest:g}",
            )


class EMASpec(Spec):
    """Averages of the weights, with decay min(max_decay, 1 - (1 + k/inv_gamma)^-power) at step k.

    Without warmup they begin from the initial weights, and the decay is max_decay at every step.
    A power-function average of EDM2 has a width instead: the standard deviation of its profile in
    time, as a share of training until now.
    """

    max_decay: Share = Field(0.9999, description="upper bound of the decay")
    warmup: bool = Field(True, description="false for max_decay from the first step, as in DiT")
    power: float = Field(0.6667, gt=0, le=100, description="how fast the decay nears 1")
    inv_gamma: StepCount = Field(1.0, description="scale of k, in steps")
    decays: Annotated[tuple[Share, ...], Field(strict=False)] = Field(
        (), max_length=16, description="upper bounds of further averages, as in [0.999, 0.9995]"
    )
    widths: Annotated[tuple[RelativeWidth, ...], Field(strict=False)] = Field(
        (),
        max_length=16,
        description="of power-function averages, for `hdit ema`; [0.05, 0.1] are EDM2's",
    )
    snapshot_every: ImageCount | None = Field(
        None,
        description="images between two snapshots of those; training.images / 64 if absent",
    )

    @property
    def plain_sets(self) -> dict[str, float]:
        """The decays of the further plain averages, by the names of their sets of weights."""
        return {f"ema-{decay!r}": decay for decay in self.decays}

    @property
    def power_sets(self) -> dict[str, float]:
        """The widths of the power-function averages, by the names of their sets of weights."""
        return {f"ema-width-{width!r}": width for width in self.widths}

    @property
    def number(self) -> int:
        """How many averages there are, each as large as the weights."""
        return 1 + len(self.decays) + len(self.widths)

    @model_validator(mode="after")
    def _are_others(self) -> Self:
        for key, values in (("decays", self.decays), ("widths", self.widths)):
            if twice := [n for i, n in enumerate(values) if n in values[:i]]:
                raise ValueError(f"{key} must not have one twice, got {twice[0]} again")
        if self.max_decay in self.decays:
            raise ValueError(
                f"decays must not have max_decay ({self.max_decay}), which the first average has"
            )
        if self.snapshot_every is not None and not self.widths:
            raise ValueError("snapshot_every has no effect without widths; leave it out")
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        fields = type(self).model_fields
        if not self.warmup and any(
            getattr(self, key) != fields[key].default for key in ("power", "inv_gamma")
        ):
            raise ValueError(
                "power and inv_gamma have no effect with warmup = false; leave them out"
            )
        return self


class GuardSpec(Spec):
    """What a loss or gradient that is not finite leads to.

    Its step changes nothing. After many in a row the run goes back to its last checkpoint, and on
    with other images.
    """

    patience: int = Field(
        10, gt=0, le=10_000, description="such steps in a row that end in going back"
    )
    rollbacks: int = Field(
        3,
        ge=0,
        le=1000,
        description="times that a session goes back to its last checkpoint before it ends",
    )
    spike: float = Field(
        8.0, gt=1, le=1000, description="running deviations above the mean that a loss is named at"
    )


class KeepSpec(Spec):
    """Which checkpoints stay; all of them if `last` is absent."""

    last: int | None = Field(
        None, gt=0, le=100_000, description="the newest so many; all if absent"
    )
    every: ImageCount | None = Field(
        None, description="and the first one at or after each multiple of so many images"
    )
    best: int | None = Field(
        None,
        gt=0,
        le=100_000,
        description="and so many with the lowest validation loss of the EMA; needs data.held_out",
    )

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        for key in ("every", "best"):
            if getattr(self, key) is not None and self.last is None:
                raise ValueError(f"{key} has no effect without last, as all checkpoints stay then")
        return self


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("names a tracker twice")
    return names


Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "trackio"], ...],
    Field(strict=False),
    AfterValidator(_each_once),
]
VALIDATED = 1000
MAX_VALIDATED = 10**6


class TrainingSpec(DependentSpec):
    """Time is counted in images drawn."""

    images: ImageCount = Field(description="where training ends")
    checkpoint_every: ImageCount = Field(description="images between two checkpoints")
    log_every: ImageCount | None = Field(
        None, description="images between two lines of metrics; 10 batches if absent"
    )
    validate_every: ImageCount | None = Field(
        None,
        description="images between two validations; checkpoint_every if data.held_out is set",
    )
    validate_images: ImageCount | None = Field(
        None,
        le=MAX_VALIDATED,
        description=f"most held-out images that are validated on; {VALIDATED:,} if absent",
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="of each device in this precision, dense, for the MFU; known of some GPUs",
    )
    batch_size: BatchSize = Field(description="images of an optimizer step, over all processes")
    accumulate: BatchSize = Field(1, description="parts that a process takes its batch in")
    workers: int = Field(
        0, ge=0, le=MAX_WORKERS, description="processes that load images; 0 loads in the trainer"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="the whole model in each process, or a shard of it (FSDP2)"
    )
    replicate: int = Field(
        1, gt=0, le=65_536, description="groups of processes that shard it each (HSDP); for fsdp"
    )
    start_timeout: float = Field(
        600, gt=0, le=86_400, description="seconds to wait for the other processes of torchrun"
    )
    seed: Seed = Field(0, description="of initial weights, order and noise")
    precision: Precision = Field(
        "auto", description="bf16 if the hardware multiplies it, else fp32; what it was at first"
    )
    compile: Compile = Field(
        "auto", description="torch.compile each block, in place; on CUDA, in a run long enough"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations within a block: less memory, a third more work"
    )
    clip_grad_norm: float = Field(
        1.0, ge=0, le=1e12, description="largest norm of the gradient; 0 does not clip"
    )
    gradient_noise_scale: bool = Field(False, description="in the metrics; needs accumulate > 1")
    label_dropout: Share = Field(0.1, description="share trained without their class")
    keep: KeepSpec = Field(KeepSpec(), description="checkpoints that stay, as in { last = 3 }")
    background_saves: bool = Field(
        True, description="go on while a checkpoint is written; takes memory for a copy of it"
    )
    guard: GuardSpec = Field(GuardSpec(), description="against steps that are not finite")
    track: Trackers = Field(
        (), description='trackers that are told of the run, as in ["tensorboard"]'
    )
    optimizer: OptimizerSpec = OptimizerSpec()
    ema: EMASpec = EMASpec()

    @property
    def largest_grad_norm(self) -> float:
        """The norm that gradients are clipped to: infinity where they are not clipped."""
        return self.clip_grad_norm or math.inf

    def moment(self, step: int, images: int) -> Moment:
        """Where the run stands at the step, counted from 0, that begins after so many images."""
        return Moment(step, images + self.batch_size / 2, self.images)

    def resolved(self, context: Context) -> Self:
        """Resolves its parts; fills in log_every and ema.snapshot_every where they are absent."""
        filled = super().resolved(context).filled(log_every=10 * self.batch_size)
        if not self.ema.widths:
            return filled
        every = max(self.batch_size, self.images // SNAPSHOTS)
        return filled.model_copy(update={"ema": self.ema.filled(snapshot_every=every)})

    def validating(self) -> Self:
        """With the settings of validation written out, for data of which some is held out."""
        return self.filled(validate_every=self.checkpoint_every, validate_images=VALIDATED)

    def idle(self) -> Iterator[Problem]:
        """Yields (key, what is wrong): settings of validation, where no images are held out."""
        given = {
            "validate_every": self.validate_every,
            "validate_images": self.validate_images,
            "keep.best": self.keep.best,
        }
        for key, value in given.items():
            if value is not None:
                yield key, "has no effect without data.held_out, the images to validate on"

    def check(self, context: Context) -> Iterator[Problem]:
        """Yields (key, what is wrong), of its parts and of how a batch is taken in parts."""
        yield from super().check(context)
        yield from under(
            "optimizer.schedule",
            self.optimizer.schedule.misfits(self.batch_size, self.images),
        )
        if self.gradient_noise_scale and self.accumulate == 1:
            yield (
                "gradient_noise_scale",
                "compares the gradients of parts of a batch: set training.accumulate above 1",
            )
        if self.parallel == "fsdp" and self.gradient_noise_scale:
            yield (
                "gradient_noise_scale",
                "needs training.parallel = 'ddp'",
            )
        if self.parallel == "ddp" and self.replicate > 1:
            yield "replicate", "has no effect with training.parallel = 'ddp'"
        if self.batch_size % self.accumulate:
            yield (
                "accumulate",
                f"must divide training.batch_size ({self.batch_size}), got {self.accumulate}",
            )


SNAPSHOTS = 64
"""Of each power-function average, in a run whose settings do not say how many."""


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= interval[0] < interval[1]:
        raise ValueError("must be two noise levels, the lower first")
    return interval


Interval = Annotated[
    tuple[SigmaOrZero, SigmaOrZero], Field(strict=False), AfterValidator(_ascending)
]


class GuidanceSpec(DependentSpec):
    """Classifier-free guidance."""

    scale: float = Field(1.0, ge=0, le=MAX_GUIDANCE, description="1 is no guidance")
    interval: Interval | None = Field(
        None, description="noise levels that are guided: above the first, up to the second"
    )
    channels: Width | None = Field(None, description="how many are guided; all if absent")
    rescale: float = Field(0.0, ge=0, le=1, description="of the guided image's contrast")
    apg: APG | None = Field(None, description="adaptive projected guidance, as in { eta = 0 }")
    batched: bool = Field(True, description="one call of double batch, or two calls")

    def check(self, context: Context) -> Iterator[Problem]:
        """Yields (key, what is wrong): more guided channels than the image has."""
        channels = context.shape.channels
        if self.channels is not None and self.channels > channels:
            yield (
                "channels",
                f"must be at most {channels}, the image's channels, got {self.channels}",
            )


class SamplingSpec(DependentSpec):
    """How images are sampled: in the grid of each checkpoint, and by `hdit sample` if not told."""

    sampler: Sampler = spec_of("dpmpp_3m_sde")
    sigmas: AnySigmas = Karras()
    steps: Steps = Field(50, description="steps of the sampler")
    sigma_min: Sigma | None = Field(
        None, description="by the sigma schedule if absent, mostly 0.01"
    )
    sigma_max: Sigma | None = Field(None, description="by the sigma schedule if absent, mostly 160")
    guidance: GuidanceSpec = Field(GuidanceSpec(), description="as in { scale = 1.5 }")
    precision: Precision = Field(
        "auto", description="training's if the hardware multiplies that, else fp32"
    )
    batch_size: BatchSize = Field(64, description="images that are sampled at once")
    compile: Compile = Field(
        "auto", description="torch.compile each block; on CUDA, for images enough"
    )
    grid: GridCount = Field(64, description="images in the grid of each checkpoint; 0 for none")

    def sigma_range(self, context: Context) -> tuple[float, float]:
        """Lowest and highest noise level: the sigma schedule's, within those of the denoiser."""
        start, end = self.sigmas.sigma_range(context.beta_schedule)
        low, high, _ = context.valid_range
        return self.sigma_min or max(start, low), self.sigma_max or min(end, high)

    def check(self, context: Context) -> Iterator[Problem]:
        """Yields (key, what is wrong): noise levels that denoiser or sigma schedule cannot have, an
        interval of guidance that has none of them.
        """
        low, high = self.sigma_range(context)
        fix = "set sigma_min and sigma_max within it"
        yield from (("", text) for text in context.misfits(low, high, fix))
        yield from super().check(context)
        if low < high:
            text = self.sigmas.misfit(self.steps, low, high, context.beta_schedule)
            if text:
                yield "sigmas", text
            elif self.sampler.draws_at_each_step and self.steps > MANY_STEPS:
                levels = self.sigmas(self.steps, low, high, context.beta_schedule)
                if close := too_close(levels):
                    yield (
                        "steps",
                        f"{self.steps:,} are too many for the noise that {self.sampler.kind} "
                        f"draws: the noise levels {close[0]:.9g} and {close[1]:.9g} are too close; "
                        "take fewer steps",
                    )
        apg = self.guidance.apg
        if apg and apg.momentum and self.sampler.kind == "dpm_adaptive":
            yield (
                "guidance.apg.momentum",
                f"must be 0, got {apg.momentum:g}: dpm_adaptive tries steps and takes them back, "
                "so that its evaluations have no order to average over",
            )
        start, end = self.guidance.interval or (0, high)
        if low < high and (start >= high or end < low):
            yield (
                "guidance.interval",
                f"has no effect: none of the noise levels that are sampled, {high:.5g} down to "
                f"{low:.5g}, lies above {start:g} and up to {end:g}",
            )


MAX_GRID_PIXELS = 2**30
MANY_STEPS = 1000  # up to here, common sigma schedules have levels that are far from each other


class RunConfig(Spec):
    """All settings of a run."""

    data: DataSpec
    space: SpaceSpec = Field(PixelSpace(), description="between images and what the model sees")
    model: AnyBackbone
    diffusion: DiffusionSpec = DiffusionSpec()
    training: TrainingSpec
    sampling: SamplingSpec = SamplingSpec()

    def data_shape(self, num_classes: int) -> DataShape:
        """Shape of what the backbone sees; `num_classes` is known once the data is open."""
        shape = self.space.shape(*self.data.shape)
        return DataShape(*shape, num_classes, self.space.sigma_data)

    @property
    def beta_schedule(self) -> LinearSchedule | CosineSchedule:
        """Beta schedule of the VP components; linear if the config names none."""
        return self.diffusion.timesteps

    def valid_range(self) -> tuple[float, float, str]:
        """The noise levels that the denoiser is defined at, and what bounds them."""
        return self.diffusion.valid_range()

    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level of the sampling sigma schedule."""
        return self.sampling.sigma_range(self.context())

    def output_channels(self, shape: DataShape) -> int:
        """Channels that the backbone predicts: those of x, and as many again for a variance."""
        return shape.channels * (2 if self.diffusion.learned_variance else 1)

    def context(self) -> Context:
        """What each setting may follow from."""
        return Context(
            shape=self.data_shape(num_classes=0),
            c_noise=self.model.c_noise,
            learned_variance=self.diffusion.learned_variance,
            beta_schedule=self.beta_schedule,
            valid_range=self.valid_range(),
        )

    def resolved(self) -> RunConfig:
        """Writes out what follows from other settings."""
        context = self.context()
        training = self.training.resolved(context)
        return self.model_copy(
            update={
                "model": self.model.resolved(),
                "diffusion": self.diffusion.resolved(context),
                "training": training if self.data.held_out is None else training.validating(),
                "sampling": self.sampling.resolved(context),
            }
        )

    def check(self) -> None:
        """Raises SpecError with every setting that is well-typed but does not fit the others."""
        if problems := list(self._problems()):
            raise SpecError(problems)

    def _problems(self) -> Iterator[Problem]:
        context = self.context()
        yield from under("space", self.space.check(*self.data.shape[1:]))
        try:
            self.model.check(context.shape)
        except SpecError as error:
            yield from under("model", error.problems)
        yield from self._check_data()
        if self.diffusion.beta_schedule and not (
            self.diffusion.by_timesteps
            or self.diffusion.c_noise == "timestep"
            or self.sampling.sigmas.by_timesteps
        ):
            yield (
                "diffusion.beta_schedule",
                "has no effect: nothing here goes by timesteps (parametrization 'eps_vp', density "
                "'uniform_vp', c_noise 'timestep', learned_variance, sigmas 'linear_t')",
            )
        yield from under("diffusion", self.diffusion.check(context))
        yield from under("sampling", self.sampling.check(context))
        yield from self._check_grid()
        yield from under("model", self.model.unmet())
        yield from under("training", self.training.check(context))
        if self.data.held_out is None:
            yield from under("training", self.training.idle())

    def _check_grid(self) -> Iterator[Problem]:
        _, height, width = self.data.shape
        most = MAX_GRID_PIXELS // (height * width)
        if self.sampling.grid > most:
            yield (
                "sampling.grid",
                f"must be at most {most:,}, with images of {height}x{width}: a grid is one file "
                f"of at most {MAX_GRID_PIXELS:,} pixels",
            )

    def _check_data(self) -> Iterator[Problem]:
        data = self.data
        if getattr(self.space, "stored", None) is not None:
            if data.augment.probability:
                yield "data.augment", "must be 0 with space.stored: it is new at each draw"
            if getattr(data, "cache", None) is not None:
                yield "data.cache", "has no effect with space.stored, which reads no images"
        elif data.kind == "tar" and isinstance(data.held_out, float):
            yield "data.held_out", NO_SHARE
        if not data.augment.probability:
            return
        if not self.model.sees_augmentation:
            yield (
                "data.augment",
                f"must be 0: it would leak into the samples of a {self.model.kind}, which is not "
                "told of it as an hdit is",
            )
        if "flip" in type(data).model_fields and not data.flip:
            yield (
                "data.flip",
                "false has no effect with data.augment above 0, which mirrors half of the images "
                "and tells the model so: samples are not mirrored; leave out one of the two",
            )

    def dump(self) -> str:
        """TOML that reads back as this config."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a TOML file, with what it extends and "a.b=value" overrides; checked, resolved.

    Raises ConfigError, which names every key that is wrong, what arrived and the nearest valid key.
    """
    raw = read_toml(Path(path))
    apply(raw, overrides)
    return parse(raw, str(path))


def parse(raw: dict[str, Any], origin: str) -> RunConfig:
    """The config that a table of settings describes. `origin` is named in errors."""
    try:
        config = RunConfig.model_validate(raw).resolved()
    except ValidationError as error:
        # An array whose entries are wrong is also reported as too short: those entries say more.
        errors = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]
        raise ConfigError(_report(origin, [explain(RunConfig, e) for e in errors])) from None
    try:
        config.check()
    except SpecError as error:
        raise ConfigError(
            _report(origin, [f"{key}: {text}" for key, text in error.problems])
        ) from None
    return config


MAX_LINES = 30  # of a message


def _report(origin: str, lines: list[str]) -> str:
    if left := len(lines[MAX_LINES:]):
        lines = [*lines[:MAX_LINES], f"and {left:,} more"]
    return "\n".join([f"{origin}:", *(f"  {line}" for line in lines)])
