"""Paired comparisons of configs: a matrix of cells, each trained for one budget and measured alike.

A matrix is a TOML file:

    base = ["../hdit-imagenet128.toml"]        # what all cells extend, relative to this file
    seeds = [0, 1]                             # each cell is trained with each of them
    budget = { seconds = 300 }                 # of training; or { images = N }, or { gmacs = N }

    [set]                                      # an overlay on all cells
    training = { batch_size = 32 }

    [[cells]]                                  # the rows
    name = "DiT-B/4"
    extends = ["r1.toml"]
    set = { model = { depth = 6 } }

    [cross.weighting]                          # each cell with each of these, and so on
    eps = { diffusion = { weighting = { kind = "eps" } } }
    snr = { diffusion = { weighting = { kind = "soft_min_snr" } } }

    [evaluation]
    held_out = { path = "my_images/test" }     # an overlay on [data]: pictures not trained on

A backward pass is counted as two forward passes.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from hdit import randomness
from hdit.config import ConfigError, RunConfig, merge, parse, read_toml
from hdit.data import DataSpec
from hdit.data.batches import in_order
from hdit.data.source import Source, Stream
from hdit.evaluation.distances import Gaussian, Moments, frechet_distance
from hdit.evaluation.features import Extractor, open_features
from hdit.interop import Model, load
from hdit.models.cost import cost
from hdit.protocols import Cond, Spec, UserError
from hdit.report.grid import to_png
from hdit.sampling import make_denoiser, sample
from hdit.training.checkpoint import write_atomically
from hdit.training.trainer import Trainer

FORMAT = 1


class MatrixError(UserError):
    """A matrix that cannot be run, and why."""


# ---- the matrix ----------------------------------------------------------------------------------


class Budget(Spec):
    """What each cell may spend on training: one of the three."""

    images: int | None = Field(None, gt=0)
    gmacs: float | None = Field(None, gt=0, description="10^9 multiply-accumulates, backward too")
    seconds: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(value is not None for value in (self.images, self.gmacs, self.seconds)) != 1:
            raise ValueError("must have one of images, gmacs and seconds")
        return self


class Measures(Spec):
    """What is measured of each cell."""

    held_out: dict[str, Any] = Field(description="overlay on [data]: pictures not trained on")
    images: int = Field(512, gt=1, description="of them, for the loss")
    bins: int = Field(8, gt=0, description="of noise levels, evenly in their logarithm")
    sigma_min: float = Field(0.02, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    features: str | None = Field(None, description="as of `hdit evaluate`; no distance if absent")
    samples: int = Field(1000, gt=1, description="for the distance to the held-out pictures")
    grid: int = Field(24, gt=0, description="samples that are shown")
    batch_size: int = Field(64, gt=0)


class CellSpec(Spec):
    """A row of the matrix."""

    name: str
    extends: list[str] = Field([])
    set: dict[str, Any] = Field({})


class MatrixSpec(Spec):
    """See the head of this module."""

    base: list[str] = Field([])
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    budget: Budget
    set: dict[str, Any] = Field({})
    cells: list[CellSpec] = Field(min_length=1)
    cross: dict[str, dict[str, dict[str, Any]]] = Field({})
    evaluation: Measures


class Cell(NamedTuple):
    """A row with one seed: all that its figures depend on."""

    name: str
    seed: int
    config: RunConfig
    budget: Budget
    measures: Measures

    @property
    def hash(self) -> str:
        """Tells this cell from one of other settings."""
        text = json.dumps(
            [
                FORMAT,
                self.config.model_dump(mode="json"),
                self.budget.model_dump(),
                self.measures.model_dump(),
            ],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def slug(self) -> str:
        """A name for its files."""
        words = "".join(c if c.isalnum() else "-" for c in self.name.lower())
        return f"{'-'.join(filter(None, words.split('-')))}-seed{self.seed}-{self.hash[:8]}"


def read_matrix(path: Path) -> tuple[MatrixSpec, list[Cell]]:
    """The cells in the order of the file, the seeds of each together.

    Raises MatrixError or ConfigError, with every setting that is wrong.
    """
    raw = read_toml(path)
    try:
        matrix = MatrixSpec.model_validate(raw)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'the matrix'}: {e['msg']}" for e in error.errors()
        ]
        raise MatrixError("\n".join([f"{path}:", *lines])) from None
    rows: dict[str, dict[str, Any]] = {}
    for cell in matrix.cells:
        table: dict[str, Any] = {}
        for name in (*matrix.base, *cell.extends):
            table = merge(table, read_toml(path.parent / name))
        table = merge(merge(table, matrix.set), cell.set)
        for options in product(*(axis.items() for axis in matrix.cross.values())):
            row, names = table, [cell.name]
            for name, overlay in options:
                row, names = merge(row, overlay), [*names, name]
            if " / ".join(names) in rows:
                raise MatrixError(f"{path}: two cells have the name {' / '.join(names)!r}")
            rows[" / ".join(names)] = row
    cells = []
    for name, row in rows.items():
        for seed in matrix.seeds:
            config = _budgeted(merge(row, {"training": {"seed": seed}}), matrix.budget, name)
            cells.append(Cell(name, seed, config, matrix.budget, matrix.evaluation))
    return matrix, cells


def _budgeted(raw: dict[str, Any], budget: Budget, name: str) -> RunConfig:
    """The config of a cell, which ends by the budget and samples no grids on the way."""
    raw = merge(raw, {"sampling": {"grid": 0}, "training": {"images": budget.images or ENDLESS}})
    raw["training"].setdefault("checkpoint_every", ENDLESS)
    config = parse(raw, name)
    if budget.gmacs is not None:
        signal = config.signal(len(config.data.open().classes))
        macs = 3 * sum(
            row.macs for row in cost(config.model, signal, config.output_channels(signal))
        )
        images = math.ceil(1e9 * budget.gmacs / macs / config.training.batch_size)
        images *= config.training.batch_size
        config = parse(merge(raw, {"training": {"images": images}}), name)
    return config


ENDLESS = 10**12
"""Images that no budget of seconds reaches."""


# ---- a cell --------------------------------------------------------------------------------------


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Trains, or goes on with, the cell in its folder, and measures it. Returns its record."""
    run = folder / "run"
    trainer = Trainer(cell.config, run)
    seconds = cell.budget.seconds
    if seconds is None:
        if not trainer.fit():
            raise KeyboardInterrupt
    else:
        left = seconds - trained_seconds(run)
        if left > 0:
            trainer.fit(left)
            if trainer.seconds < left:
                raise KeyboardInterrupt
    peak = _peak_memory(trainer.device)
    signal = trainer.signal
    model = load(str(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = cost(cell.config.model, signal, cell.config.output_channels(signal))
    record = {
        "format": FORMAT,
        "name": cell.name,
        "seed": cell.seed,
        "hash": cell.hash,
        "config": cell.config.model_dump(mode="json", exclude_none=True),
        "budget": cell.budget.model_dump(exclude_none=True),
        "measures": cell.measures.model_dump(exclude_none=True),
        "parameters": sum(row.params for row in rows),
        "gmacs": sum(row.macs for row in rows) / 1e9,
        "images": lines[-1]["images"],
        "seconds": trained_seconds(run),
        "images_per_second": median(line["images_per_second"] for line in lines),
        "peak_memory": peak,
        "curve": _thinned([(line["images"], line["loss"]) for line in lines]),
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        },
    }
    return record | measure(model, cell.measures)


def trained_seconds(run: Path) -> float:
    """Of all sittings of a run, as far as its metrics tell; pauses for checkpoints do not count."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0.0
    seconds, before = 0.0, 0
    for text in path.read_text().splitlines():
        line = json.loads(text)
        seconds += (line["images"] - before) / line["images_per_second"]
        before = line["images"]
    return seconds


def measure(model: Model, measures: Measures) -> dict[str, Any]:
    """Losses by noise level on held-out pictures, a distance to them, and a grid of samples."""
    config, signal = model.config, model.signal
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raw = merge(config.data.model_dump(mode="json", exclude_none=True), measures.held_out)
    try:
        held_out = TypeAdapter(DataSpec).validate_python(raw).open()
    except ValidationError as error:
        raise MatrixError(f"evaluation.held_out: {error}") from None
    if list(held_out.classes) != list(model.classes):
        raise MatrixError(
            f"evaluation.held_out: has the classes {', '.join(held_out.classes[:5]) or 'none'}..., "
            f"and the data {', '.join(model.classes[:5]) or 'none'}..."
        )
    space = config.space.open(device)
    network = model.network().to(device)
    denoiser = make_denoiser(network, config, signal)
    edges = np.geomspace(measures.sigma_min, measures.sigma_max, measures.bins + 1)
    low, high, _ = config.valid_range()
    sums, count = np.zeros(measures.bins), 0
    started = time.monotonic()
    with torch.inference_mode():
        for images, labels, counters in _chosen(held_out, measures.images, measures.batch_size):

            def normal(purpose: str, counters: np.ndarray = counters) -> Any:
                return lambda shape: randomness.normal(
                    randomness.streams(0, purpose, counters, device), shape
                )

            x0 = space.normalize(space.encode(images.to(device)), normal("held-out posterior"))
            noise = normal("held-out noise")(signal.shape)
            u = randomness.uniform(0, "held-out sigma", counters).numpy()
            cond = Cond(labels.to(device) if signal.num_classes else None)
            for i in range(measures.bins):
                sigma = np.exp(np.log(edges[i]) + u * np.log(edges[i + 1] / edges[i]))
                sigma = torch.from_numpy(sigma.clip(low, high)).to(x0)
                denoised = denoiser(x0 + sigma[:, None, None, None] * noise, sigma, cond)
                sums[i] += (denoised - x0).double().square().mean((1, 2, 3)).sum().item()
            count += len(images)
        losses = sums / count
    result: dict[str, Any] = {
        "sigma_edges": edges.tolist(),
        "x0_loss": losses.tolist(),
        "held_out": count,
        "loss_seconds": time.monotonic() - started,
    }
    number = max(measures.grid, measures.samples if measures.features else 0)
    seeds = list(range(number))
    classes = signal.num_classes
    asked = [i % classes for i in seeds] if classes else None
    started = time.monotonic()
    parts = sample(network, config, signal, seeds, asked, device, space=space)
    samples = torch.cat([part.images for part in parts])
    result["sampling_seconds"] = time.monotonic() - started
    result["grid"] = to_png(samples[: measures.grid], columns=min(12, measures.grid))
    if measures.features:
        extractor = open_features(measures.features, device)
        real = _gaussian(
            extractor,
            (images for images, _, _ in _chosen(held_out, None, measures.batch_size)),
        )
        fake = _gaussian(extractor, samples.split(measures.batch_size))
        result["frechet_distance"] = frechet_distance(fake, real)
        result["frechet_images"] = [fake.n, real.n]
        result["features"] = {"name": extractor.name, "sha256": extractor.sha256}
    return result


def _gaussian(extractor: Extractor, batches: Iterable[Tensor]) -> Gaussian:
    """The moments of the features of images (b c h w) uint8, grey or RGB."""
    moments: Moments | None = None
    for images in batches:
        images = images.expand(-1, 3, -1, -1)
        if extractor.prepare is not None:
            images = torch.stack([extractor.prepare(image) for image in images])
        features = extractor(images)
        moments = moments or Moments(features.shape[1])
        moments.add(features)
    assert moments is not None, "there are pictures"
    return moments.gaussian()


def _chosen(
    source: Source | Stream, number: int | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """(images, labels, counters) of pictures that lie evenly in the source; all without number."""
    references = source.references() if isinstance(source, Stream) else list(range(len(source)))
    if number is not None and number < len(references):
        places = np.linspace(0, len(references) - 1, number).astype(int)
        references = [references[i] for i in places]
    parts = [references[i : i + batch_size] for i in range(0, len(references), batch_size)]
    for batch in in_order(source, parts):
        yield batch.images, batch.labels, batch.counters


def _peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU's tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _cpu() -> str:
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def _thinned(points: list[tuple[int, float]], limit: int = 100) -> list[tuple[int, float]]:
    """At most `limit` points of a curve, each the mean of those that it stands for."""
    size = math.ceil(len(points) / limit)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (part[-1][0], float(f"{sum(loss for _, loss in part) / len(part):.5g}")) for part in parts
    ]


# ---- records -------------------------------------------------------------------------------------


def record_path(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.slug}.json"


def finished(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The record of a cell of just these settings, if it is there."""
    try:
        record = json.loads(record_path(out, cell).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if record.get("hash") == cell.hash else None


def write_record(out: Path, cell: Cell, record: dict[str, Any]) -> None:
    path = record_path(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


__all__ = [
    "Cell",
    "ConfigError",
    "MatrixError",
    "finished",
    "read_matrix",
    "record_path",
    "run_cell",
    "write_record",
]
