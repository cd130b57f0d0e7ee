"""What a run may change between two sessions, and what makes it another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hdit.config import RunConfig, differences
from hdit.data.source import Source, Stream, size_of
from hdit.protocols import DataShape, Space
from hdit.runs.checkpoint import Checkpoint, CheckpointError

FIXED = (
    "space.kind",
    "space.channels",
    "space.factor",
    "space.sigma_data",
    "model.",
    "diffusion.parametrization",
    "diffusion.c_noise",
    "diffusion.beta_schedule",
    "diffusion.learned_variance",
)
"""Settings that make the model what it is: a run never goes on with others."""


def keep_precision(config: RunConfig, found: Checkpoint | None) -> RunConfig:
    """With the precision that "auto" became when the run began."""
    t = config.training
    if found is None or t.precision != "auto":
        return config
    t = t.model_copy(update={"precision": found.config.training.precision})
    return config.model_copy(update={"training": t})


def check_resume(
    found: Checkpoint,
    config: RunConfig,
    shape: DataShape,
    source: Source | Stream,
    space: Space,
    run: Path,
    say: Callable[[str], None],
) -> None:
    """Tells `say` of each setting that changed since the checkpoint was saved.

    Raises CheckpointError if the settings, the data or the VAE make it another model.
    """
    fixed: list[str] = []
    changed: list[str] = []
    old, new = (c.model_dump(mode="json", exclude_none=True) for c in (found.config, config))
    for key, before, after in differences(old, new):
        line = f"{key}: {before!r} in the run, {after!r} now"
        (fixed if key.startswith(FIXED) else changed).append(line)
    fixed += other_data(found, shape, source)
    if found.state.space != space.identity:
        hashes = (name[:12] or "none" for name in (found.state.space, space.identity))
        fixed.append("space.vae: another VAE: hash {} in the run, {} now".format(*hashes))
    if fixed:
        listing = "\n  ".join(fixed)
        raise CheckpointError(
            f"{run}: holds a run of another model:\n  {listing}\n"
            "undo the change to resume it, or start anew with another --run"
        )
    sizes = found.state.data_size, size_of(source)
    if sizes[0] != sizes[1]:
        words = ("a stream" if n is None else f"{n:,} images" for n in sizes)
        changed.append("data: {} in the run, {} now; drawn in another order".format(*words))
    if old["data"].get("held_out") != new["data"].get("held_out"):
        changed.append(
            "data.held_out: other images are held out now; of those that the run has trained on, "
            "the validation loss is too low"
        )
    for line in changed:
        say(f"resuming with another setting: {line}")


def other_data(found: Checkpoint, shape: DataShape, source: Source | Stream) -> list[str]:
    """How images or classes differ from those that the run was trained on."""
    if found.state.shape != shape:
        words = (
            f"{s.channels} x {s.height} x {s.width}, {s.num_classes} classes"
            for s in (found.state.shape, shape)
        )
        return ["data: {} in the run, {} now".format(*words)]
    pairs = zip(found.state.classes, source.classes, strict=True)
    names = [f"{a!r} is {b!r} now" for a, b in pairs if a != b]
    return [f"data: other names of classes: {', '.join(names[:5])}"] if names else []
