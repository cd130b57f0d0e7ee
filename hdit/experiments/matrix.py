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
    held_out = { path = "my_images/test" }     # an overlay on [data]: images not trained on

A backward pass is counted as two forward passes.
"""

from __future__ import annotations

import hashlib
import json
import math
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError, model_validator

from hdit.bounds import BatchSize, GridCount, ImageCount, Name, Seed, Sigma
from hdit.config import RunConfig, merge, parse, read_toml
from hdit.errors import UserError
from hdit.files import fingerprint
from hdit.limits import MAX_SAMPLES
from hdit.models.cost import cost
from hdit.names import path_of
from hdit.protocols import Spec

FORMAT = 1
MAX_CELLS = 10_000


class MatrixError(UserError):
    """A matrix that cannot be run, and why."""


class Budget(Spec):
    """What each cell may spend on training: one of the three."""

    images: ImageCount | None = None
    gmacs: float | None = Field(
        None, gt=0, le=1e18, description="10^9 multiply-accumulates, backward too"
    )
    seconds: float | None = Field(None, gt=0, le=1e9)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(value is not None for value in (self.images, self.gmacs, self.seconds)) != 1:
            raise ValueError("must have one of images, gmacs and seconds")
        return self


class Measures(Spec):
    """What is measured of each cell."""

    held_out: dict[str, Any] = Field(description="overlay on [data]: images not trained on")
    images: int = Field(512, gt=1, le=10**9, description="of them, for the loss")
    bins: int = Field(8, gt=0, le=1000, description="of noise levels, evenly in their logarithm")
    sigma_min: Sigma = 0.02
    sigma_max: Sigma = 80.0
    features: Name | None = Field(
        None, description="as of `hdit evaluate`, or inception; no distance if absent"
    )
    samples: int = Field(
        1000, gt=1, le=MAX_SAMPLES, description="for the distance to the held-out images"
    )
    grid: GridCount = Field(24, gt=0, description="samples that are shown")
    batch_size: BatchSize = 64

    @model_validator(mode="after")
    def _fit(self) -> Measures:
        if not self.sigma_min < self.sigma_max:
            raise ValueError("sigma_min must be below sigma_max")
        if self.features is None and "samples" in self.model_fields_set:
            raise ValueError("samples has no effect without features")
        return self


class CellSpec(Spec):
    """A row of the matrix."""

    name: Name
    extends: list[Name] = Field([])
    set: dict[str, Any] = Field({})


class MatrixSpec(Spec):
    """See the head of this module."""

    base: list[Name] = Field([])
    seeds: list[Seed] = Field([0], min_length=1)
    budget: Budget
    set: dict[str, Any] = Field({})
    cells: list[CellSpec] = Field(min_length=1)
    cross: dict[str, dict[str, dict[str, Any]]] = Field({})
    evaluation: Measures


class Cell(NamedTuple):
    """A row with one seed: all that its figures depend on, but the images' content."""

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
    path = path_of(name) if name else None
    if path is None or not path.exists():
        return []
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [fingerprint(f)["sha256"] for f in files if f.is_file()]


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
    number = len(matrix.cells) * len(matrix.seeds) * math.prod(map(len, matrix.cross.values()))
    if number > MAX_CELLS:
        raise MatrixError(f"{path}: has {number:,} cells, and at most {MAX_CELLS:,} are taken")
    rows: dict[str, dict[str, Any]] = {}
    for cell in matrix.cells:
        table: dict[str, Any] = {}
        for name in (*matrix.base, *cell.extends):
            table = merge(table, read_toml(path.parent / path_of(name)))
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
    return config


ENDLESS = 10**12
"""Images that no budget of seconds reaches."""
