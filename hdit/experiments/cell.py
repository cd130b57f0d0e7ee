"""A cell of a matrix: checked, trained for its budget, measured, and recorded."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hdit.config import RunConfig, merge
from hdit.data import DataSpec
from hdit.data.batches import in_order
from hdit.data.source import Source, Stream, references
from hdit.device import default_device, float32_products, precision_on
from hdit.evaluation.distances import Gaussian, Moments, frechet_distance
from hdit.evaluation.features import Extractor, open_features
from hdit.experiments.matrix import FORMAT, Cell, MatrixError, Measures
from hdit.files import write_json
from hdit.locks import locked
from hdit.models.cost import cost
from hdit.reading import ReadingError, read_object
from hdit.report.grids import to_png
from hdit.runs.history import read_metrics
from hdit.runs.trained import Trained
from hdit.sampling.sample import check_null_class, sample, settle_sampling
from hdit.signals import Signalled
from hdit.tensors import NotFiniteError
from hdit.training.objective import Objective
from hdit.training.trainer import Trainer

log = logging.getLogger(__name__)

# ---- before --------------------------------------------------------------------------------------


def check_cells(cells: Sequence[Cell]) -> None:
    """Raises UserError for what would fail only after training: images, classes, features."""
    for cell in cells:
        source, held_out = cell.config.data.open(), open_held_out(cell.config, cell.measures)
        if list(held_out.classes) != list(source.classes):
            raise MatrixError(
                f"evaluation.held_out: has the classes {', '.join(held_out.classes[:5]) or 'none'}"
                f", ... and the data {', '.join(source.classes[:5]) or 'none'}, ..."
            )
        check_null_class(cell.config, cell.config.data_shape(len(source.classes)))
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
    """The images that a cell is measured on. Raises MatrixError where they are its own."""
    own = config.data.model_dump(mode="json", exclude_none=True)
    raw = merge(own, measures.held_out)
    if raw == own:
        raise MatrixError("evaluation.held_out: names the images that are trained on")
    try:
        return TypeAdapter(DataSpec).validate_python(raw).open()
    except ValidationError as error:
        raise MatrixError(f"evaluation.held_out: {error}") from None


def _open_features(name: str, device: torch.device) -> Extractor:
    return open_features(None if name == "inception" else name, device)


# ---- training and measuring ----------------------------------------------------------------------


def alone_at(cell: Cell, out: Path, wait: Callable[[str], None]) -> AbstractContextManager[None]:
    """While the block runs, no other process trains or measures the cell in the folder `out`.

    `wait` is told who does, before this waits for its end.
    """
    path = out / "runs" / f".{cell.run}.lock"
    return locked(path, f"is at {cell.name!r}, seed {cell.seed}", wait=wait)


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Trains, or goes on with, the cell in its folder, and measures it. Returns its record.

    Raises Signalled where a signal ended training, with all saved.
    """
    trainer = Trainer(cell.config, folder)
    left = None
    if cell.budget.seconds is not None:
        left = cell.budget.seconds - trained_seconds(folder, trainer.images)
    if left is None or left > 0:
        finished = trainer.fit(left)
        if not finished and trainer.signalled:
            raise Signalled(trainer.signalled)
    del trainer
    model = Trained.open(folder)
    return _facts(cell, model, folder) | measure_trained(model, cell.measures)


def _facts(cell: Cell, model: Trained, folder: Path) -> dict[str, Any]:
    """What the record says of a cell and its training."""
    path = folder / "metrics.jsonl"
    lines = [line for line in read_metrics(path, model.images) if line.keys() >= _MEASURED]
    if not lines:
        raise MatrixError(f"{path}: has no line of training; remove {folder} to train it anew")
    rows = cost(model.config.model, model.shape, model.config.output_channels(model.shape))
    return {
        "format": FORMAT,
        "name": cell.name,
        "seed": cell.seed,
        "hash": cell.hash,
        "config": cell.config.model_dump(mode="json", exclude_none=True),
        "precision": model.config.training.precision,  # what "auto" became
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


_MEASURED = {"images", "loss", "images_per_second", "peak_memory"}


def trained_seconds(run: Path, images: int) -> float:
    """Seconds of all sessions up to a checkpoint; pauses for checkpoints do not count."""
    seconds, before = 0.0, 0
    for line in read_metrics(run / "metrics.jsonl", images):
        if line.get("images_per_second", 0) > 0:  # what is missing is taken to go as fast
            seconds += (line["images"] - before) / line["images_per_second"]
            before = line["images"]
    return seconds


def measure_trained(model: Trained, measures: Measures) -> dict[str, Any]:
    """Losses by noise level on held-out images, a distance to them, and a grid of samples.

    All in one precision: that of sampling, as the device here has it.
    """
    number = max(measures.grid, measures.samples if measures.features else 0)
    device, shape = default_device(), model.shape
    config = settle_sampling(model.config, device, number, log.warning)
    held_out = open_held_out(config, measures)
    space = model.space(device)
    network = model.network().to(device)
    precision = precision_on(device, config.sampling.precision)
    objective = Objective(network, config, shape, space, device, precision=precision)
    edges = np.geomspace(measures.sigma_min, measures.sigma_max, measures.bins + 1)
    with float32_products(precision):
        losses, count = x0_losses(objective, held_out, measures, edges)
    result: dict[str, Any] = {
        "measured_in": precision,
        "sigma_edges": edges.tolist(),
        "x0_loss": losses,
        "held_out": count,
    }
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


def x0_losses(
    objective: Objective, held_out: Source | Stream, measures: Measures, edges: np.ndarray
) -> tuple[list[float], int]:
    """Mean of (D - x0)^2 over elements and images in each bin of noise levels; their number.

    Images, noise and the place of the level in its bin are those of any other cell. Raises
    NotFiniteError where a mean is not finite.
    """
    sums, count = np.zeros(len(edges) - 1), 0
    for images, labels, counters in _chosen(held_out, measures.images, measures.batch_size):
        sums += objective.x0_errors(images, labels, counters, edges).sum(1).cpu().numpy()
        count += len(images)
    losses = (sums / count).tolist()
    for loss, low, high in zip(losses, edges, edges[1:], strict=False):
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss on held-out images is {loss} at sigma {low:.3g} to {high:.3g}: the "
                "model is ruined, as by a learning rate that is too high"
            )
    return losses, count


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
    assert moments is not None, "there are images"
    return moments.gaussian()


def _chosen(
    source: Source | Stream, number: int | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """(images, labels, counters) of images that lie evenly in the source; all without number."""
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
    """The file of a cell's record in the folder of a matrix."""
    return out / "cells" / f"{cell.slug}.json"


def finished(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The record of a cell of just these settings, if it is there."""
    try:
        record = read_object(record_path(out, cell))
    except (FileNotFoundError, ReadingError):
        return None
    return record if record.get("hash") == cell.hash else None


def write_record(out: Path, cell: Cell, record: dict[str, Any]) -> None:
    """Writes the record of a cell whole, or leaves the old one."""
    write_json(record_path(out, cell), record)
