"""Averages that a run did not keep, made of its snapshots when it is over (EDM2, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hdit.config.schema import EMASpec
from hdit.data.kinds import kind_of_model
from hdit.data.source import Skipped
from hdit.device import default_device, float32_products, precision_on
from hdit.errors import UserError
from hdit.files import check_writable, whole
from hdit.interop import Contents
from hdit.latents.encode import open_training_source
from hdit.names import printable
from hdit.runs import export
from hdit.runs.checkpoint import Checkpoint, CheckpointError, folder_name, remove
from hdit.runs.snapshots import combine, open_snapshots
from hdit.runs.trained import Trained
from hdit.training.ema import DecayProfile, PowerProfile, Profile, gamma_of, reconstruct
from hdit.training.held_out import hold_out
from hdit.training.objective import settle_training
from hdit.training.resume import other_data
from hdit.training.validation import Validation

TOLERABLE = 0.05
"""A distance between profiles, relative to the wanted one, that is not warned of."""


@dataclass(frozen=True)
class Wanted:
    """An average that is asked for: a relative width, or the largest decay of a plain one."""

    kind: str  # "width" or "decay"
    value: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-{self.value!r}"

    @property
    def gamma(self) -> float | None:
        """The exponent of a power-function average."""
        return gamma_of(self.value) if self.kind == "width" else None

    def profile(self, end: int, spec: EMASpec) -> Profile:
        """What it weights the first `end` steps of a run with."""
        if self.kind == "width":
            return PowerProfile(gamma_of(self.value), end)
        return DecayProfile(spec.model_copy(update={"max_decay": self.value}), end)


@dataclass(frozen=True)
class Made:
    """An average that was made."""

    wanted: Wanted
    path: Path
    snapshots: int  # that it was made of
    error: float  # of its profile, as of `reconstruct`
    losses: dict[str, Any] | None = None  # of the held-out images, as of `Validation.measure`


def make(
    run: Path,
    wanted: Sequence[Wanted],
    at: int | None,
    overwrite: bool,
    warn: Callable[[str], None],
    on_snapshot: Callable[[], None] = lambda: None,
    *,
    validate: bool = False,
) -> list[Made]:
    """Writes each of the `wanted` averages as a model into RUN/ema/<images>.

    It is as the run stood `at` so many images, or at its last snapshot. `on_snapshot` is called for
    each that was read. `validate` measures each on the held-out images of the run. Raises UserError
    where the run has no snapshots to make them of or no held-out images to measure them on, or a
    model is there already and `overwrite` was not asked for.
    """
    for i, one in enumerate(wanted):
        if one in wanted[:i]:
            raise UserError(f"--{one.kind} {one.value:g}: is asked for twice; name it once")
    snapshots = open_snapshots(run, at, warn)
    parts = _parts(snapshots)
    last = snapshots[-1]
    folder = run / "ema" / folder_name(last.state.images)
    for one in wanted:
        _check_free(folder / one.name, overwrite)
    validation = _validation(last, warn) if validate else None  # before anything is written
    made = [_make(run, one, folder / one.name, parts, last, warn, on_snapshot) for one in wanted]
    return made if validation is None else [_measured(one, validation) for one in made]


Part = tuple[Checkpoint, str, PowerProfile]
"""A snapshot, the name of an average in it, and that one's profile."""


def _parts(snapshots: list[Checkpoint]) -> list[Part]:
    """All averages in the snapshots that have had a step."""
    found: list[Part] = []
    for snapshot in snapshots:
        state = snapshot.state
        for name, width in snapshot.config.training.ema.power_sets.items():
            profile = PowerProfile(gamma_of(width), state.taken or 0, state.begun.get(name, 0))
            if profile.end > profile.begun:
                found.append((snapshot, name, profile))
    if not found:
        raise CheckpointError(f"{snapshots[-1].folder}: no step was taken up to it")
    return found


def _check_free(path: Path, overwrite: bool) -> None:
    check_writable(path)
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path}: is there already; add --overwrite to replace it")
    if not path.is_dir() or (any(path.iterdir()) and kind_of_model(path)[0] != "converted"):
        raise UserError(f"{path}: is no model that could be replaced; move it away")


def _make(
    run: Path,
    wanted: Wanted,
    path: Path,
    parts: list[Part],
    last: Checkpoint,
    warn: Callable[[str], None],
    on_snapshot: Callable[[], None],
) -> Made:
    """Writes one model."""
    state, spec = last.state, last.config.training.ema
    weights, error = reconstruct(
        [profile for _, _, profile in parts], wanted.profile(state.taken or 0, spec)
    )
    used = [(s, name, float(w)) for (s, name, _), w in zip(parts, weights, strict=True) if w]
    if error > TOLERABLE:
        warn(
            f"{wanted.kind} {wanted.value:g}: its profile is met to {error:.1%} only; take one "
            f"nearer to the widths of the run ({', '.join(map(str, spec.widths))}), or train with "
            "a smaller training.ema.snapshot_every"
        )

    tensors = combine(used, on_snapshot)
    kind = "power-function EMA of width" if wanted.kind == "width" else "EMA of decay"
    held = Contents(
        last.config,
        state.shape,
        state.classes,
        {"ema": tensors},
        f"{export.KIND} run {run.resolve().name}, snapshot {last.folder.name}, "
        f"{kind} {wanted.value:g}",
        state.images,
    )
    with whole(path) as part:
        export.write(held, part, f"{run.resolve().name}-{wanted.name}")
        if path.exists():  # now that the new one is complete
            remove(path)
    return Made(wanted, path, len({s.folder for s, _, _ in used}), error)


# ---- their losses --------------------------------------------------------------------------------


def _validation(last: Checkpoint, warn: Callable[[str], None]) -> Validation:
    """What measures networks on the held-out images of the run that a snapshot is of, on this
    device. Raises UserError where it holds out none, or these are not there or of other classes."""
    if last.config.data.held_out is None:
        raise UserError("--validate: the run has no held-out images; data.held_out names them")
    device = default_device()
    config = settle_training(last.config, device)
    space = config.space.open(device)
    source = open_training_source(config, space)
    shape = config.data_shape(len(source.classes))
    other = other_data(last, shape, source)
    if last.state.space != space.identity:
        other.append("space.vae: another VAE than that of the run")
    if other:
        raise UserError(f"--validate: the data is not that of the run: {'; '.join(other)}")

    def name_file(file: Skipped) -> None:
        warn(f"skipped {printable(file.path)}: {file.reason}")

    images = hold_out(config, space, source, None, warn)
    assert images.held_out is not None, "the settings hold some out"
    assert config.training.validate_images is not None, "the config must be resolved"
    fixed = images.held_out.fixed(config.training.validate_images)
    return Validation(fixed, images.classes, config, shape, space, device, name_file=name_file)


def _measured(made: Made, validation: Validation) -> Made:
    """With its losses."""
    network = Trained.open(made.path).network().to(validation.device)
    precision = precision_on(validation.device, validation.config.training.precision)
    with float32_products(precision):
        found = validation.measure({made.path.name: network})
    assert found is not None, "nothing ends it early"
    return replace(made, losses=found["weights"][made.path.name])
