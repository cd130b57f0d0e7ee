"""Samples of a checkpoint: PNG files named by seed, a grid, and a record of how they were made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from hdit import models
from hdit.config import ConfigError, RunConfig, apply, parse
from hdit.device import default_device, keep_freed_memory
from hdit.errors import UserError
from hdit.models import BackboneModule
from hdit.protocols import NULL_LABEL
from hdit.report.grids import save_grid, save_png
from hdit.runs.checkpoint import Checkpoint, Export, find, write_atomically
from hdit.sampling.sample import WeakModel, check_guidance, sample, settled

GRID_LIMIT = 100  # images in the grid


def sampling_config(
    found: Checkpoint,
    source: Path,
    options: dict[str, tuple[str, Any]],
    overrides: list[str],
    has_weak: bool = False,
) -> RunConfig:
    """The model's config with options, each a key of [sampling] and what was given, and --set.

    Raises UserError for what has no effect, and for a setting that was given twice.
    """
    settings = found.config.model_dump(mode="json", exclude_none=True)
    for override in overrides:
        _only_sampling(override)
    for option, (key, value) in options.items():
        if value is None:
            continue
        table, _, last = key.rpartition(".")
        if last == "kind":
            settings["sampling"][table] = {last: value}
        else:
            (settings["sampling"][table] if table else settings["sampling"])[last] = value
        for override in overrides:
            if override.partition("=")[0].strip() == f"sampling.{key}":
                raise UserError(f"{option}: is set by --set {override!r} too; leave out one")
    apply(settings, overrides)
    config = parse(settings, str(source))
    for override in overrides:
        unguided = config.sampling.guidance.scale == 1 and not has_weak
        if unguided and override.startswith("sampling.guidance."):
            raise UserError(f"--set {override!r}: has no effect without --guidance or --weak")
    if options["--steps"][1] is not None and config.sampling.sampler.kind == "dpm_adaptive":
        raise UserError("--steps: dpm_adaptive chooses its steps; set sampling.sampler.rtol")
    return config


def _only_sampling(override: str) -> None:
    if not override.startswith(("sampling.", "space.vae", "space.tile")):
        raise ConfigError(
            f"--set {override!r}: sampling can change [sampling] settings, space.vae and "
            "space.tile only; the rest belongs to the trained model"
        )


def choose_labels(text: str | None, number: int, found: Checkpoint) -> list[int] | None:
    """The label of each image; None for a model without classes."""
    classes = found.state.classes
    if not classes:
        if text is not None:
            raise UserError("--labels: the model was trained without classes")
        return None
    chosen: list[int] = []
    for part in [name.strip() for name in text.split(",")] if text else []:
        if part in classes:
            chosen.append(classes.index(part))
        elif part.isdigit() and int(part) < len(classes):
            chosen.append(int(part))
        elif part == "none":
            chosen.append(NULL_LABEL)
        else:
            known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise UserError(f"--labels: {part!r} is no class of this model: {known}")
    chosen = chosen or list(range(len(classes)))
    return [chosen[i % len(chosen)] for i in range(number)]


def find_weak(
    source: Path, strong: Checkpoint, config: RunConfig, warn: Callable[[str], None]
) -> Checkpoint:
    """Raises UserError where it does not know the images, classes or noise levels of `config`."""
    found = find(source, warn)
    for what, theirs, ours in (
        ("images", found.state.shape.chw, strong.state.shape.chw),
        ("classes", found.state.classes, strong.state.classes),
        ("sigma_data", found.state.shape.sigma_data, strong.state.shape.sigma_data),
        ("latents, by the hash of their VAE", found.state.space, strong.state.space),
    ):
        if theirs != ours:
            raise UserError(f"--weak: {source} has other {what}: {theirs}, and the model {ours}")
    (start, end), (low, high, by) = config.sigma_range(), found.config.valid_range()
    if start < low * (1 - 1e-6) or end > high * (1 + 1e-6):
        raise UserError(
            f"--weak: {source} knows noise levels from {low:.5g} to {high:.5g} ({by}), and "
            f"sampling goes from {end:.5g} to {start:.5g}; set sampling.sigma_min and sigma_max"
        )
    return found


def write_samples(
    found: Checkpoint,
    config: RunConfig,
    labels: list[int] | None,
    seeds: list[int],
    out: Path | None,
    console: Console,
    *,
    raw: bool = False,
    overwrite: bool = False,
    weak: Checkpoint | None = None,
    weak_scale: float = 2.0,
) -> str:
    """Writes PNG files named by seed, grid.png and samples.json -> a line that tells of them.

    The record is there from the beginning, so that --overwrite finds what an interrupt left.
    Raises UserError where `out` is not free, or the space is not the one of training.
    """
    keep_freed_memory()
    check_guidance(config, found.state.shape)
    device = default_device()
    config = settled(config, device, len(seeds), lambda text: _warn(console, text))
    spec = config.sampling
    weights = found.weights(raw)
    if out is None:
        settings = f"{spec.sampler.kind}-{spec.steps}-cfg{spec.guidance.scale:g}"
        settings += f"-weak{weak_scale:g}" if weak else ""
        name = f"{found.state.images}-{settings}-seed{seeds[0]}{'-raw' if raw else ''}"
        out = _home(found) / name
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"--out: {out} is not empty; name another folder, or add --overwrite")
    space = config.space.open(device)
    if found.state.space and space.identity != found.state.space:
        raise UserError(
            f"space.vae: the model was trained on latents of another VAE: its hash is "
            f"{found.state.space:.12}, this one's {space.identity:.12}"
        )
    shape, classes = found.state.shape, found.state.classes
    backbone = _network(found, weights).to(device)
    if spec.compile:
        backbone.compile_blocks()
    guide = None
    if weak:
        worse = _network(weak, weak.weights(raw)).to(device)
        guide = WeakModel(worse, weak.config, weak_scale)
    out.mkdir(parents=True, exist_ok=True)
    _remove_old_samples(out)
    entries: list[dict[str, Any]] = [
        {"file": f"{seed:0{max(6, len(str(seeds[-1])))}d}.png", "seed": seed, "label": label}
        | {"class": None if label is None else classes[label]}
        for seed, label in zip(seeds, _known(labels, len(seeds)), strict=True)
    ]
    record = {
        "checkpoint": str(found.folder),
        "images": found.state.images,
        "weights": weights,
        "sampling": spec.model_dump(mode="json", exclude_none=True),
        "sigma_range": config.sigma_range(),
        "evaluations": None,  # until all are made
        "weak": {"checkpoint": str(weak.folder), "scale": weak_scale} if weak else None,
        "samples": entries,
    }
    write_atomically(out / "samples.json", json.dumps(record, indent=1))
    shown: list[Tensor] = []
    written = 0
    started = monotonic()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("sampling", total=-(-len(seeds) // spec.batch_size) * spec.steps)
        parts = sample(
            backbone, config, shape, seeds, labels, device, lambda: bar.advance(task), guide, space
        )
        evaluations = 0
        for part in parts:
            evaluations += part.evaluations * len(part.images)
            for picture in part.images:
                save_png(picture, out / entries[written]["file"])
                written += 1
                shown += [picture] if len(shown) < GRID_LIMIT else []
            # A sampler with steps of its own choosing may have made fewer or more than these.
            bar.update(task, completed=-(-written // spec.batch_size) * spec.steps)
    seconds = monotonic() - started
    save_grid(torch.stack(shown), out / "grid.png")
    record["evaluations"] = round(evaluations / len(seeds))
    write_atomically(out / "samples.json", json.dumps(record, indent=1))
    return (
        f"{len(seeds)} images of {round(evaluations / len(seeds))} network evaluations each "
        f"in {seconds:.1f} s: {out} (grid: {out / 'grid.png'})"
    )


def _warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)


def _known(labels: list[int] | None, number: int) -> list[int | None]:
    """The label of each image, or None where it has none."""
    return [None if label == NULL_LABEL else label for label in labels or [NULL_LABEL] * number]


def _home(found: Checkpoint) -> Path:
    """Where samples go if no folder is named: samples/ of the run, or beside what is no run."""
    folder = found.folder.resolve()
    if isinstance(found, Export):
        return folder.with_name(f"{folder.name}-samples")
    if folder.parent.name == "checkpoints":
        return folder.parent.parent / "samples"
    return folder.with_name("samples")


def _network(found: Checkpoint, weights: str) -> BackboneModule:
    """The backbone of a checkpoint: its "ema" or its "model" weights."""
    shape = found.state.shape
    backbone = models.build(found.config.model, shape, found.config.output_channels(shape))
    backbone.load_state_dict(found.tensors(weights))
    return backbone


def _remove_old_samples(folder: Path) -> None:
    """Deletes the pictures that an earlier samples.json lists, and it, so that no two sets mix."""
    record = folder / "samples.json"
    if not record.exists():
        return
    try:
        names = [entry["file"] for entry in json.loads(record.read_text("utf-8"))["samples"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: cannot tell what to replace: {error}; remove it") from None
    for name in names:
        (folder / Path(name).name).unlink(missing_ok=True)
    record.unlink()
