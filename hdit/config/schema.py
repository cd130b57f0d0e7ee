"""A run's settings: typed, read from TOML with `extends` and overrides, with errors that help."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, Field, ValidationError

from hdit.config.errors import explain
from hdit.config.learning_rate import ConstantLR, LearningRate
from hdit.data import DataSpec
from hdit.diffusion.beta_schedules import AnyBetaSchedule, CosineSchedule, LinearSchedule
from hdit.diffusion.densities import CosineInterpolated, Density, LogLogistic, UniformVP, WithBounds
from hdit.diffusion.parametrization import EDM, CNoise, EpsVP, Parametrization
from hdit.diffusion.samplers import DDPM, DPMpp3MSDE, Sampler
from hdit.diffusion.sigmas import AnySigmas, Karras, LinearT
from hdit.diffusion.weighting import SoftMinSNR, Weighting
from hdit.errors import SpecError, UserError
from hdit.models import BackboneSpec, HDiTSpec
from hdit.protocols import DataShape, Spec
from hdit.spaces import PixelSpace, SpaceSpec

SMALLEST = 1e-12  # noise level whose square, and that of its inverse, float32 can hold


class ConfigError(UserError):
    """A config that cannot be used; one line of the message for each thing that is wrong."""


# ---- the settings --------------------------------------------------------------------------------


class DiffusionSpec(Spec):
    """What is predicted, and which noise levels are trained with which weight."""

    parametrization: Parametrization = EDM()
    c_noise: CNoise | None = Field(
        None, description="what the backbone is told of sigma; by the kind of model if absent"
    )
    weighting: Weighting = SoftMinSNR()
    loss_scales: int = Field(1, ge=0, description="octaves of the multi-scale loss; 1 is plain")
    density: Density = CosineInterpolated()
    beta_schedule: AnyBetaSchedule | None = Field(
        None, description="timesteps of eps_vp and uniform_vp; linear with 1000 steps if absent"
    )
    learned_variance: bool = Field(False, description="of the reverse process, as in iDDPM")


Precision = Literal["auto", "fp32", "tf32", "bf16"]
Compile = Literal["auto", True, False]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Spec):
    """AdamW. HDiT's mapping network and modulation learn at a third of lr, as the paper does."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(5e-4, gt=0)
    schedule: LearningRate = ConstantLR()
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-2, ge=0)


class EMASpec(Spec):
    """Average of the weights, with decay min(max_decay, 1 - (1 + k/inv_gamma)^-power) at step k."""

    max_decay: float = Field(0.9999, ge=0, lt=1)
    power: float = Field(0.6667, gt=0)
    inv_gamma: float = Field(1.0, gt=0)


class TrainingSpec(Spec):
    """Time is counted in images drawn."""

    images: int = Field(gt=0, description="where training ends")
    checkpoint_every: int = Field(gt=0, description="images between two checkpoints")
    log_every: int | None = Field(
        None, gt=0, description="images between two lines of metrics; 10 batches if absent"
    )
    batch_size: int = Field(gt=0, description="images of an optimizer step, over all processes")
    accumulate: int = Field(1, gt=0, description="parts that a process takes its batch in")
    workers: int = Field(0, ge=0, description="processes that load images; 0 loads in the trainer")
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Precision = Field(
        "auto", description="bf16 if the hardware multiplies it, else fp32; what it was at first"
    )
    compile: Compile = Field(
        "auto", description="torch.compile each block, in place; on CUDA, in a run long enough"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations within a block: less memory, a third more work"
    )
    clip_grad_norm: float = Field(1.0, gt=0)
    gradient_noise_scale: bool = Field(False, description="in the metrics; needs accumulate > 1")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share trained without their class")
    optimizer: OptimizerSpec = OptimizerSpec()
    ema: EMASpec = EMASpec()


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= interval[0] < interval[1]:
        raise ValueError("must be two noise levels, the lower first")
    return interval


Interval = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ascending)]


class GuidanceSpec(Spec):
    """Classifier-free guidance."""

    scale: float = Field(1.0, ge=0, description="1 is no guidance")
    interval: Interval | None = Field(
        None, description="noise levels that are guided: above the first, up to the second"
    )
    channels: int | None = Field(None, gt=0, description="how many are guided; all if absent")
    rescale: float = Field(0.0, ge=0, le=1, description="of the guided image's contrast")
    batched: bool = Field(True, description="one call of double batch, or two calls")


class SamplingSpec(Spec):
    """How images are sampled: in the grid of each checkpoint, and by `hdit sample` if not told."""

    sampler: Sampler = DPMpp3MSDE()
    sigmas: AnySigmas = Karras()
    steps: int = Field(50, gt=0)
    sigma_min: float | None = Field(
        None, gt=0, description="by the sigma schedule if absent, mostly 0.01"
    )
    sigma_max: float | None = Field(
        None, gt=0, description="by the sigma schedule if absent, mostly 160"
    )
    guidance: GuidanceSpec = Field(GuidanceSpec(), description="as in { scale = 1.5 }")
    precision: Precision = Field(
        "auto", description="training's if the hardware multiplies that, else fp32"
    )
    batch_size: int = Field(64, gt=0, description="images that are sampled at once")
    compile: Compile = Field(
        "auto", description="torch.compile each block; on CUDA, for images enough"
    )
    grid: int = Field(64, ge=0, description="images in the grid of each checkpoint; 0 for none")


class RunConfig(Spec):
    """All settings of a run."""

    data: DataSpec
    space: SpaceSpec = Field(PixelSpace(), description="between images and what the model sees")
    model: BackboneSpec
    diffusion: DiffusionSpec = DiffusionSpec()
    training: TrainingSpec
    sampling: SamplingSpec = SamplingSpec()

    def data_shape(self, num_classes: int) -> DataShape:
        """What the backbone sees; the number of classes is known once the data is open."""
        shape = self.space.shape(*self.data.shape)
        return DataShape(*shape, num_classes, self.space.sigma_data)

    @property
    def beta_schedule(self) -> LinearSchedule | CosineSchedule:
        """Of the VP components, whether the denoiser goes by it or not."""
        return self.diffusion.beta_schedule or LinearSchedule()

    def valid_range(self) -> tuple[float, float, str]:
        """The noise levels that the denoiser is defined at, and what bounds them."""
        d = self.diffusion
        low, high = d.parametrization.sigma_range(self.beta_schedule)
        by = f"parametrization {d.parametrization.kind!r}"
        first, last = self.beta_schedule.sigma_range()
        if (low, high) != (first, last):
            if d.learned_variance:
                return max(low, first), min(high, last), "the timesteps of learned_variance"
            if d.beta_schedule and d.c_noise == "timestep":
                return max(low, first), min(high, last), "the timesteps of c_noise 'timestep'"
        return low, high, by

    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level of the sampling sigma schedule."""
        start, end = self.sampling.sigmas.sigma_range(self.beta_schedule)
        low, high, _ = self.valid_range()
        return (
            self.sampling.sigma_min or max(start, low),
            self.sampling.sigma_max or min(end, high),
        )

    def output_channels(self, shape: DataShape) -> int:
        """Of the backbone: what it predicts, and a variance if it learns one."""
        return shape.channels * (2 if self.diffusion.learned_variance else 1)

    def resolved(self) -> RunConfig:
        """With what follows from other settings written out."""
        shape, d = self.data_shape(num_classes=0), self.diffusion
        model, label = self.model, "timestep"
        if isinstance(model, HDiTSpec):
            model, label = model.resolved(), "log_quarter"
        timesteps = (
            isinstance(d.parametrization, EpsVP)
            or isinstance(d.density, UniformVP)
            or d.learned_variance
        )
        diffusion = _filled(
            d,
            c_noise=label,
            beta_schedule=LinearSchedule() if timesteps else None,
        )
        weighting, density, size = d.weighting, d.density, max(shape.height, shape.width)
        if isinstance(weighting, SoftMinSNR):
            weighting = _filled(weighting, gamma=shape.sigma_data**-2)
        if isinstance(density, CosineInterpolated):
            density = _filled(density, noise_d_low=float(min(32, size)), noise_d_high=float(size))
        if isinstance(density, LogLogistic):
            density = _filled(density, loc=math.log(shape.sigma_data))
        if isinstance(density, WithBounds):
            low, high, _ = self.model_copy(update={"diffusion": diffusion}).valid_range()
            start, end = density.usual
            density = _filled(
                density,
                sigma_min=max(start or 0.0, low) or None,
                sigma_max=None if end is None and high == math.inf else min(end or high, high),
            )
        sampler = self.sampling.sampler
        if isinstance(sampler, DDPM):
            sampler = _filled(sampler, variance="learned" if d.learned_variance else "lower")
        update = {"weighting": weighting, "density": density}
        return self.model_copy(
            update={
                "model": model,
                "diffusion": diffusion.model_copy(update=update),
                "training": _filled(self.training, log_every=10 * self.training.batch_size),
                "sampling": self.sampling.model_copy(update={"sampler": sampler}),
            }
        )

    def check(self) -> None:
        """Raises SpecError with every setting that is well-typed but does not fit the others."""
        problems = [(f"space.{key}", text) for key, text in self.space.check(*self.data.shape[1:])]
        try:
            self.model.check(self.data_shape(num_classes=0))
        except SpecError as error:
            problems += [(f"model.{path}", text) for path, text in error.problems]
        problems += self._check_augmentation()
        problems += self._check_ranges()
        problems += self._check_sampling()
        if isinstance(self.model, HDiTSpec) and self.model.vector_width:
            problems.append(("model.vector_width", "must be 0: no data brings such vectors yet"))
        lr, schedule = self.training.optimizer.lr, self.training.optimizer.schedule
        if not isinstance(schedule, ConstantLR) and schedule.min_lr > lr:
            problems.append(
                (
                    "training.optimizer.schedule.min_lr",
                    f"must be at most training.optimizer.lr ({lr:g}), got {schedule.min_lr:g}",
                )
            )
        if self.training.gradient_noise_scale and self.training.accumulate == 1:
            problems.append(
                (
                    "training.gradient_noise_scale",
                    "compares the gradients of parts of a batch: set training.accumulate above 1",
                )
            )
        if self.training.batch_size % self.training.accumulate:
            problems.append(
                (
                    "training.accumulate",
                    f"must divide training.batch_size ({self.training.batch_size}), "
                    f"got {self.training.accumulate}",
                )
            )
        if problems:
            raise SpecError(problems)

    def _check_augmentation(self) -> Iterator[tuple[str, str]]:
        data = self.data
        if getattr(self.space, "stored", None) is not None:
            if data.augment.probability:
                yield "data.augment", "must be 0 with space.stored: it is new at each draw"
            if getattr(data, "cache", None) is not None:
                yield "data.cache", "has no effect with space.stored, which reads no pictures"
        if not data.augment.probability:
            return
        if not isinstance(self.model, HDiTSpec):
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

    def _check_sampling(self) -> Iterator[tuple[str, str]]:
        s = self.sampling
        learned = self.diffusion.learned_variance
        if isinstance(s.sampler, DDPM) and s.sampler.variance == "learned" and not learned:
            yield (
                "sampling.sampler.variance",
                "must be 'lower' or 'upper', got 'learned': the model learns none "
                "(diffusion.learned_variance)",
            )
        channels = self.data_shape(0).channels
        if s.guidance.channels is not None and s.guidance.channels > channels:
            yield (
                "sampling.guidance.channels",
                f"must be at most {channels}, the image's channels, got {s.guidance.channels}",
            )
        low, high = self.sigma_range()
        if not low < high:
            return
        first, last = self.beta_schedule.sigma_range()
        if isinstance(s.sigmas, LinearT) and (low < first * (1 - 1e-6) or high > last * (1 + 1e-6)):
            yield (
                "sampling.sigmas",
                f"noise levels {low:.5g} to {high:.5g} leave the timesteps' {first:.5g} to "
                f"{last:.5g}; leave out sampling.sigma_min and sigma_max, or keep them within",
            )
            return
        try:
            s.sigmas(s.steps, low, high, self.beta_schedule)
        except ValueError as error:
            yield "sampling.sigmas", f"cannot have sampling.steps = {s.steps}: {error}"

    def _check_ranges(self) -> Iterator[tuple[str, str]]:
        d = self.diffusion
        if d.beta_schedule and not (
            isinstance(d.parametrization, EpsVP)
            or isinstance(d.density, UniformVP)
            or d.c_noise == "timestep"
            or d.learned_variance
            or isinstance(self.sampling.sigmas, LinearT)
        ):
            yield (
                "diffusion.beta_schedule",
                "has no effect: nothing here goes by timesteps (parametrization 'eps_vp', density "
                "'uniform_vp', c_noise 'timestep', learned_variance, sigmas 'linear_t')",
            )
        low, high, by = self.valid_range()
        bounded = isinstance(d.density, WithBounds)
        ranges = {
            "diffusion.density": (
                d.density.sigma_range(self.data_shape(0), self.beta_schedule),
                bounded,
            ),
            "sampling": (self.sigma_range(), True),
        }
        for path, ((start, end), bounded) in ranges.items():
            if not start < end:
                yield path, f"sigma_min must be below sigma_max, got {start:.5g} and {end:.5g}"
            if start < SMALLEST or end > 1 / SMALLEST:
                yield (
                    path,
                    f"noise levels {start:.5g} to {end:.5g} are beyond float32's reach; set "
                    "sigma_min and sigma_max",
                )
                continue
            if start < low * (1 - 1e-6) or end > high * (1 + 1e-6):
                fix = "set sigma_min and sigma_max within it" if bounded else "take another density"
                yield (
                    path,
                    f"noise levels {start:.5g} to {end:.5g} leave the range of {by}, "
                    f"{low:.5g} to {high:.5g}; {fix}",
                )

    def dump(self) -> str:
        """TOML that reads back as this config."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


S = TypeVar("S", bound=Spec)


def _filled(spec: S, **defaults: Any) -> S:
    """The spec with values for those of its settings that are absent."""
    absent = {key: value for key, value in defaults.items() if getattr(spec, key) is None}
    return spec.model_copy(update=absent)


# ---- reading -------------------------------------------------------------------------------------


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


def _report(origin: str, lines: list[str]) -> str:
    return "\n".join([f"{origin}:", *(f"  {line}" for line in lines)])


def read_toml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A TOML file, merged over those that its `extends` names, relative to itself, in order."""
    if path.resolve() in above:
        chain = " -> ".join(str(p) for p in (*above, path.resolve()))
        raise ConfigError(f"{path}: extends itself: {chain}")
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    bases = own.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: must be a list of file names, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read_toml(path.parent / base, (*above, path.resolve())))
    return merge(merged, own)


def _similar_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables merge, all else replaces; so does a table of another `kind`."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            other = "kind" in value and value["kind"] != old.get("kind", value["kind"])
            result[key] = value if other else merge(old, value)
        else:
            result[key] = value
    return result


def apply(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies each "a.b=value" in order, but kinds first: they take the place of their tables."""
    for override in sorted(overrides, key=lambda text: not _KIND.match(text)):
        set_key(raw, override)


_KIND = re.compile(r"[^=]*\.kind\s*=")


def set_key(raw: dict[str, Any], override: str) -> None:
    """Applies "a.b.0.c=value"; the value is read as TOML, or as a string where it is none.

    Another `kind` leaves nothing of the table that it is set in.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: must read KEY=VALUE, as in training.batch_size=64")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = key.strip().split(".")
    node: Any = raw
    for i, part in enumerate([*parents, last]):
        where = ".".join(parents[:i]) or "the config"
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(
                    f"--set {override!r}: {where} has {len(node)} entries, counted from 0; "
                    f"{part!r} is none of them"
                )
        elif not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {where} is a value, not a table")
        index: Any = int(part) if isinstance(node, list) else part
        if i == len(parents):
            if part == "kind" and isinstance(node, dict) and node.get("kind", value) != value:
                node.clear()
            old = node.get(index) if isinstance(node, dict) else node[index]
            node[index] = merge({"": old}, {"": value})[""]
        else:
            node = node.setdefault(index, {}) if isinstance(node, dict) else node[index]


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where two dumped configs differ; None where a key is absent."""
    keys: Sequence[Any]
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        pairs = [(key, old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [(path, old, new)]
    return [d for key, a, b in pairs for d in differences(a, b, f"{path}.{key}".lstrip("."))]
