"""Arguments and options that several verbs take, declared once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from hdit.limits import MAX_BATCH, MAX_GUIDANCE, MAX_STEPS, MAX_WORKERS


def finite(value: float | None) -> float | None:
    """Refuses NaN, which no comparison with a bound does."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a number, got {value}")
    return value


ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a preset: `hdit configs`."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, as in training.batch_size=64."
    ),
]
SamplingOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, as in sampling.sampler.eta=0."
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="The weights as trained, not their EMA.")]
Steps = Annotated[int | None, typer.Option(min=1, max=MAX_STEPS, help="Steps of the sampler.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MAX_GUIDANCE,
        callback=finite,
        help="Scale of classifier-free guidance; 1 is none.",
    ),
]
BATCH_SIZE = typer.Option(min=1, max=MAX_BATCH, help="Images at once.")
SEED = typer.Option(min=0, max=2**62, help="Seed of the first image; then one more each.")
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MAX_WORKERS,
        help="Processes that read; 0 for this one.  [default: one for a CPU]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
