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
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from hdit import randomness
from hdit.config import RunConfig, merge, parse, read_toml
from hdit.data import DataSpec
from hdit.data.batches import in_order
from hdit.data.source import Source, Stream, references
from hdit.device import default_device, precision_on
from hdit.diffusion.denoiser import Denoiser
from hdit.errors import UserError
from hdit.evaluation.distances import Gaussian, Moments, frechet_distance
from hdit.evaluation.features import Extractor, open_features
from hdit.interop import Model, load
from hdit.models.cost import cost
from hdit.protocols import Cond, DataShape, NormalNoise, Space, Spec
from hdit.report.grids import to_png
from hdit.runs.checkpoint import write_atomically
from hdit.runs.folder import read_metrics
from hdit.sampling.sample import check_guidance, make_denoiser, sample
from hdit.training.objective import settled
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
    features: str | None = Field(
        None, description="as of `hdit evaluate`, or inception; no distance if absent"
    )
    samples: int = Field(1000, gt=1, description="for the distance to the held-out pictures")
    grid: int = Field(24, gt=0, description="samples that are shown")
    batch_size: int = Field(64, gt=0)

    @model_validator(mode="after")
    def _fit(self) -> Measures:
        if not self.sigma_min < self.sigma_max:
            raise ValueError("sigma_min must be below sigma_max")
        if self.features is None and "samples" in self.model_fields_set:
            raise ValueError("samples has no effect without features")
        return self


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
    """A row with one seed: all that its figures depend on, but the pictures' content."""

    name: str
    seed: int
    config: RunConfig
    budget: Budget
    measures: Measures

    @property
    def run(self) -> str:
        """A name for the folder of its run, another one for what is trained otherwise."""
        config = self.config.model_dump(mode="json", exclude={"sampling"})
        vae = getattr(self.config.space, "vae", None)
        return self._named(_hash([FORMAT, config, self.budget.model_dump(), _content(vae)]))

    @property
    def hash(self) -> str:
        """Tells this cell from one that is trained or measured otherwise."""
        config = self.config.model_dump(mode="json")
        features = _content(self.measures.features)
        return _hash([self.run, config, self.measures.model_dump(), features])

    @property
    def slug(self) -> str:
        """A name for its record."""
        return self._named(self.hash)

    def _named(self, hashed: str) -> str:
        words = "".join(c if c.isalnum() else "-" for c in self.name.lower())
        return f"{'-'.join(filter(None, words.split('-')))}-seed{self.seed}-{hashed[:8]}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _content(name: str | None) -> list[str]:
    """Hashes of the file, or of the files in the folder, of this name; empty if it is neither."""
    path = Path(name).expanduser() if name else None
    if path is None or not path.exists():
        return []
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]


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
    _refuse_what_the_matrix_sets(path, matrix)
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


def _refuse_what_the_matrix_sets(path: Path, matrix: MatrixSpec) -> None:
    """Raises MatrixError for overlays that would have no effect, and for an axis without any."""
    overlays = [matrix.set, *(cell.set for cell in matrix.cells)]
    for name, axis in matrix.cross.items():
        if not axis:
            raise MatrixError(f"{path}: cross.{name}: has no overlays; leave it out")
        overlays += axis.values()
    for overlay in overlays:
        for key, by in SET_BY.items():
            table, _, last = key.partition(".")
            if last in overlay.get(table, {}):
                raise MatrixError(f"{path}: {key}: has no effect in an overlay; it is set by {by}")
    if len(set(matrix.seeds)) < len(matrix.seeds):
        raise MatrixError(f"{path}: seeds: must differ, got {matrix.seeds}")


SET_BY = {
    "training.images": "budget",
    "training.seed": "seeds",
    "sampling.grid": "evaluation.grid",
}


def check(cells: Sequence[Cell]) -> None:
    """Raises UserError for what would fail only after training: pictures, classes, features."""
    for cell in cells:
        source, held_out = cell.config.data.open(), open_held_out(cell.config, cell.measures)
        if list(held_out.classes) != list(source.classes):
            raise MatrixError(
                f"evaluation.held_out: has the classes {', '.join(held_out.classes[:5]) or 'none'}"
                f", ... and the data {', '.join(source.classes[:5]) or 'none'}, ..."
            )
        check_guidance(cell.config, cell.config.data_shape(len(source.classes)))
        low, high, by = cell.config.valid_range()
        m = cell.measures
        if m.sigma_min < low * (1 - 1e-6) or m.sigma_max > high * (1 + 1e-6):
            raise MatrixError(
                f"evaluation.sigma_min, sigma_max: {m.sigma_min:g} to {m.sigma_max:g} leave the "
                f"range of {cell.name!r}, {low:.5g} to {high:.5g} ({by})"
            )
    if cells and cells[0].measures.features:
        _open_features(cells[0].measures.features, torch.device("cpu"))


def open_held_out(config: RunConfig, measures: Measures) -> Source | Stream:
    """The pictures that a cell is measured on. Raises MatrixError where they are its own."""
    own = config.data.model_dump(mode="json", exclude_none=True)
    raw = merge(own, measures.held_out)
    if raw == own:
        raise MatrixError("evaluation.held_out: names the pictures that are trained on")
    try:
        return TypeAdapter(DataSpec).validate_python(raw).open()
    except ValidationError as error:
        raise MatrixError(f"evaluation.held_out: {error}") from None


def _open_features(name: str, device: torch.device) -> Extractor:
    return open_features(None if name == "inception" else name, device)


def _budgeted(raw: dict[str, Any], budget: Budget, name: str) -> RunConfig:
    """The config of a cell, which ends by the budget and samples no grids on the way."""
    raw = merge(raw, {"sampling": {"grid": 0}, "training": {"images": budget.images or ENDLESS}})
    raw["training"].setdefault("checkpoint_every", ENDLESS)
    config = parse(raw, name)
    if budget.gmacs is not None:
        shape = config.data_shape(len(config.data.open().classes))
        macs = 3 * sum(row.macs for row in cost(config.model, shape, config.output_channels(shape)))
        images = math.ceil(1e9 * budget.gmacs / macs / config.training.batch_size)
        images *= config.training.batch_size
        config = parse(merge(raw, {"training": {"images": images}}), name)
    device = default_device()
    return settled(config, device)


ENDLESS = 10**12
"""Images that no budget of seconds reaches."""


# ---- a cell --------------------------------------------------------------------------------------


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Trains, or goes on with, the cell in its folder, and measures it. Returns its record.

    Raises KeyboardInterrupt where training was interrupted, with all saved.
    """
    trainer = Trainer(cell.config, folder)
    left = None
    if cell.budget.seconds is not None:
        left = cell.budget.seconds - trained_seconds(folder, trainer.images)
    if left is None or left > 0:
        finished = trainer.fit(left)
        if not finished and trainer.signalled:
            raise KeyboardInterrupt
    shape = trainer.shape
    del trainer
    model = load(str(folder))
    lines = read_metrics(folder / "metrics.jsonl", model.images)
    assert lines[-1]["images"] == model.images, "a line is written before each checkpoint"
    rows = cost(cell.config.model, shape, cell.config.output_channels(shape))
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
        "images": model.images,
        "seconds": trained_seconds(folder, model.images),
        "images_per_second": median(line["images_per_second"] for line in lines),
        "peak_memory": max(line["peak_memory"] for line in lines),
        "curve": _thinned([(line["images"], line["loss"]) for line in lines]),
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        },
    }
    return record | measure(model, cell.measures)


def trained_seconds(run: Path, images: int) -> float:
    """Of all sittings up to a checkpoint, by the metrics; pauses for checkpoints do not count."""
    seconds, before = 0.0, 0
    for line in read_metrics(run / "metrics.jsonl", images):
        seconds += (line["images"] - before) / line["images_per_second"]
        before = line["images"]
    return seconds


def measure(model: Model, measures: Measures) -> dict[str, Any]:
    """Losses by noise level on held-out pictures, a distance to them, and a grid of samples."""
    config, shape = model.config, model.shape
    device = default_device()
    held_out = open_held_out(config, measures)
    space = config.space.open(device)
    network = model.network().to(device)
    precision = precision_on(device, config.training.precision)
    denoiser = make_denoiser(network, config, shape, precision)
    edges = np.geomspace(measures.sigma_min, measures.sigma_max, measures.bins + 1)
    losses, count = x0_losses(denoiser, space, held_out, shape, measures, edges, device)
    result: dict[str, Any] = {
        "sigma_edges": edges.tolist(),
        "x0_loss": losses,
        "held_out": count,
    }
    number = max(measures.grid, measures.samples if measures.features else 0)
    classes = shape.num_classes
    asked = [i % classes for i in range(number)] if classes else None
    parts = sample(network, config, shape, list(range(number)), asked, device, space=space)
    samples = torch.cat([part.images for part in parts])
    columns = classes if 1 < classes <= 16 else min(12, measures.grid)
    result["grid"] = to_png(samples[: measures.grid], columns=columns)
    if measures.features:
        extractor = _open_features(measures.features, device)
        batches = (images for images, _, _ in _chosen(held_out, None, measures.batch_size))
        real = _gaussian(extractor, batches)
        fake = _gaussian(extractor, samples[: measures.samples].split(measures.batch_size))
        result["frechet_distance"] = frechet_distance(fake, real)
        result["frechet_images"] = [fake.n, real.n]
        result["features"] = {"name": extractor.name, "sha256": extractor.sha256}
    return result


@torch.inference_mode()
def x0_losses(
    denoiser: Denoiser,
    space: Space,
    held_out: Source | Stream,
    shape: DataShape,
    measures: Measures,
    edges: np.ndarray,
    device: torch.device,
) -> tuple[list[float], int]:
    """Mean of (D - x0)^2 over elements and pictures in each bin of noise levels; their number.

    Pictures, noise and the place of the level in its bin are those of any other cell.
    """
    sums, count = np.zeros(len(edges) - 1), 0
    for images, labels, counters in _chosen(held_out, measures.images, measures.batch_size):
        x0 = space.normalize(
            space.encode(images.to(device)), _normal("held-out posterior", counters, device)
        )
        noise = _normal("held-out noise", counters, device)(shape.chw)
        u = randomness.uniform(0, "held-out sigma", counters).numpy()
        cond = Cond(labels.to(device) if shape.num_classes else None)
        for i, (low, high) in enumerate(pairwise(edges)):
            sigma = torch.from_numpy(low * (high / low) ** u).to(x0)
            denoised = denoiser(x0 + sigma[:, None, None, None] * noise, sigma, cond)
            sums[i] += (denoised - x0).double().square().mean((1, 2, 3)).sum().item()
        count += len(images)
    return (sums / count).tolist(), count


def _normal(purpose: str, counters: np.ndarray, device: torch.device) -> NormalNoise:
    return lambda shape: randomness.normal(randomness.keys(0, purpose, counters, device), shape)


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
    chosen = references(source)
    if number is not None and number < len(chosen):
        places = np.linspace(0, len(chosen) - 1, number).astype(int)
        chosen = [chosen[i] for i in places]
    parts = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    for batch in in_order(source, parts):
        for file in batch.skipped:  # another would stand in for it
            raise MatrixError(f"evaluation.held_out: {file.path}: {file.reason}; mend or remove it")
        yield batch.images, batch.labels, batch.counters


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
